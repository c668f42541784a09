"""The functions on arrays of a GPU, rehearsed: every option gives the CPU's bits, in arrays of x's kind, and
nothing but the kernels touches the arrays' memory."""

from __future__ import annotations

import pytest
from batchnorm._arrays import gpu_extension

from support.gpu import (
    ByDlpack,
    ByInterface,
    Taken,
    crossed,
    differing,
    needs_rehearsal,
    on_cpu,
    powered,
    results,
)

pytestmark = [pytest.mark.quick, needs_rehearsal]

if gpu_extension() is not None:
    from batchnorm._gpu import GpuArray


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with powered(monkeypatch):
        yield


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_every_option_has_the_bits_of_the_cpu(kind):
    served = 0
    for p in crossed(300, kind is ByDlpack):
        if p.dtype.name == "bfloat16" and kind is ByInterface:  # which has no name for it
            continue
        try:
            made = results(p, kind)
        except TypeError as error:
            assert "would have to be copied first" in str(error), f"{p}: {error}"
            assert p.layout != "C" or p.positions != "all", p
            continue
        found = differing(p, made, on_cpu)
        assert not found, f"{p}: {found}"
        assert type(made["y"]) is type(made["mean"]) is {ByInterface: GpuArray, ByDlpack: Taken}[kind]
        served += 1
    assert served > 150
