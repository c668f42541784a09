"""Tuning, the numbers that lay out a call's work: how they are set, and that no result depends on them."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest
from batchnorm import _core

from cases import DTYPES, Shape, gradient_of, normal, parameters, residual_of
from processes import output, run

NAMES = (
    "l2_bytes", "cached_bytes", "stream_run_bytes", "group_bytes", "map_bytes", "fetch_bytes",
    "parallel_elements",
)  # fmt: skip
MOST = 2**50


def values():
    return {name: int(number) for name, number in (s.split("=") for s in _core.tuning().split(","))}


# ---- names and numbers ---------------------------------------------------------------------------


def test_names_and_defaults(set_tuning):
    set_tuning("")
    numbers = values()
    assert tuple(numbers) == NAMES
    assert all(0 < n <= MOST for n in numbers.values())
    assert numbers["cached_bytes"] <= 60 << 20, "what a machine says of its L3 is believed up to here"
    assert numbers["parallel_elements"] == 49152 and numbers["stream_run_bytes"] == 512


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0, 1, 12345, MOST])
def test_one_at_a_time(name, number, set_tuning):
    set_tuning("")
    before = values()
    set_tuning(f"{name}={number}")
    assert values() == before | {name: number}
    set_tuning("")
    assert values() == before


def test_several_at_once(set_tuning):
    set_tuning("map_bytes=7,l2_bytes=8")
    set_tuning("group_bytes=9,l2_bytes=1,l2_bytes=10")
    numbers = values()
    assert [numbers[name] for name in ("map_bytes", "l2_bytes", "group_bytes")] == [7, 10, 9]
    everything = _core.tuning()
    set_tuning("")
    assert _core.tuning() != everything
    set_tuning(everything)
    assert _core.tuning() == everything


@pytest.mark.parametrize(
    "settings", ["l3_bytes=1", "L2_bytes=1", " l2_bytes=1", "l2_bytes =1", "=1", ",", "l2", "1"]
)
def test_unknown_name(settings, set_tuning):
    set_tuning("map_bytes=7")
    before = _core.tuning()
    name = settings.split(",")[0].split("=")[0]
    with pytest.raises(ValueError, match=f"^tuning has '{name}', expected one of {', '.join(NAMES)}$"):
        set_tuning(settings)
    assert _core.tuning() == before


BAD_NUMBERS = ["", "x", "-1", "+1", "1.5", "1e3", "0x10", " 5", "5 ", "5;", "5=5", str(MOST + 1), str(10**30)]


@pytest.mark.parametrize("number", BAD_NUMBERS)
def test_bad_number(number, set_tuning):
    set_tuning("map_bytes=7")
    before = _core.tuning()
    with pytest.raises(ValueError) as caught:
        set_tuning(f"l2_bytes=1,group_bytes={number},map_bytes=2")
    expected = f"tuning has group_bytes='{number}', expected an integer from 0 to 2^50"
    assert str(caught.value) == expected
    assert _core.tuning() == before, "an error changes nothing, not what came before it either"


def test_a_name_without_a_number(set_tuning):
    with pytest.raises(ValueError, match="tuning has l2_bytes='', expected an integer"):
        set_tuning("l2_bytes")


# ---- no result depends on them -------------------------------------------------------------------

SHAPES = [
    Shape("ncs", 3, 33, 700), Shape("ncs", 2, 2, 17000), Shape("ncs", 300, 20, 9), Shape("ncs", 5, 1, 49),
    Shape("nsc", 3500, 20, 1), Shape("nsc", 1100, 64, 1), Shape("nsc", 40, 2051, 1), Shape("nsc", 9, 3, 49),
]  # fmt: skip
EXTREMES = [f"{name}={number}" for name in NAMES for number in (0, 100, MOST)]
TOGETHER = [
    ",".join(f"{name}=0" for name in NAMES),
    ",".join(f"{name}={MOST}" for name in NAMES),
    "l2_bytes=0,map_bytes=0,parallel_elements=0",
    f"l2_bytes=0,map_bytes=0,cached_bytes=0,stream_run_bytes=0,parallel_elements={MOST}",
    f"group_bytes=5000,map_bytes=5000,l2_bytes=0,parallel_elements={MOST}",
    "group_bytes=5000,map_bytes=5000,cached_bytes=0,stream_run_bytes=0,parallel_elements=0",
]


def everything(shape, dtype):
    """The bytes of what every function makes of data of this shape."""
    x, dy, z = (make(shape, dtype) for make in (normal, gradient_of, residual_of))
    gamma, beta = parameters(shape.channels)
    mean, var = batchnorm.moments(x)
    results = [mean, var, batchnorm.batch_norm(x, mean, var, gamma, beta)]
    for activation, residual in ((None, None), ("relu", None), ("relu", z)):
        forward = batchnorm.batch_norm_train(x, gamma, beta, activation=activation, residual=residual)
        results += forward
        options = {"activation": activation}
        if residual is not None:
            results.append(forward.activation_mask)
            options |= {
                "activation_mask": forward.activation_mask,
                "needs": ("dx", "dgamma", "dbeta", "dresidual"),
            }
        for stats in ("batch", "fixed"):
            got = batchnorm.batch_norm_backward(
                dy, x, forward.mean, forward.inv_std, gamma, beta, stats=stats, **options
            )
            results += got if residual is None else (*got, got.dresidual)
    return [np.ascontiguousarray(a).tobytes() for a in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_do_not_depend_on_it(shape, dtype, set_tuning):
    want = everything(shape, dtype)
    for settings in (*EXTREMES, *TOGETHER):
        set_tuning("")
        set_tuning(settings)
        assert everything(shape, dtype) == want, settings


def test_a_second_pass_about_the_mean(set_tuning):
    # Data far from its first value is summed twice; the elementwise pass follows the second.
    x = np.random.default_rng(0).standard_normal((6, 20, 300)) + 1e6
    x[0, :, 0] = 0
    want = batchnorm.batch_norm_train(x)
    for settings in TOGETHER:
        set_tuning(settings)
        for order in (x, np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)):
            got = batchnorm.batch_norm_train(order)
            np.testing.assert_allclose(got.mean, want.mean, rtol=1e-14)
            np.testing.assert_allclose(got.y, want.y, atol=1e-8)


# ---- by environment ------------------------------------------------------------------------------

PRINT = "import batchnorm; from batchnorm import _core; print(_core.tuning())"


def test_by_environment():
    numbers = dict(s.split("=") for s in output(PRINT, BATCHNORM_TUNING="map_bytes=77,l2_bytes=0").split(","))
    defaults = dict(s.split("=") for s in output(PRINT).split(","))
    assert numbers == defaults | {"map_bytes": "77", "l2_bytes": "0"}
    assert output(PRINT, BATCHNORM_TUNING="") == output(PRINT)


def test_what_the_environment_sets_are_the_defaults():
    code = """
        from batchnorm import _core
        before = _core.tuning()
        _core.set_tuning("map_bytes=5,l2_bytes=5")
        _core.set_tuning("")
        print(_core.tuning() == before, "map_bytes=77," in before)
    """
    assert output(code, BATCHNORM_TUNING="map_bytes=77") == "True True"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("junk", "tuning has 'junk', expected one of l2_bytes, "),
        ("map_bytes=many", "tuning has map_bytes='many', expected an integer from 0 to 2^50"),
        ("map_bytes=1, l2_bytes=1", "tuning has ' l2_bytes', expected one of l2_bytes, "),
    ],
)
def test_junk_in_the_environment_fails_at_import(settings, message):
    done = run("import batchnorm", BATCHNORM_TUNING=settings)
    assert done.returncode != 0
    assert f"environment variable BATCHNORM_TUNING: {message}" in done.stderr


def test_results_do_not_depend_on_the_environment():
    code = """
        import hashlib, numpy as np, batchnorm as b
        h = hashlib.sha256()
        for dtype in (np.float32, np.float64, np.float16):
            for shape, axis in (((5, 7, 9, 11), 1), ((5, 9, 11, 7), -1), ((300, 65), 1)):
                x = (np.random.default_rng(0).standard_normal(shape) * 3 + 1).astype(dtype)
                f = b.batch_norm_train(x, axis=axis, activation="relu", residual=x)
                g = b.batch_norm_backward(
                    x[::-1], x, f.mean, f.inv_std, axis=axis, activation="relu",
                    activation_mask=f.activation_mask,
                )
                for a in (*f, f.activation_mask, *g):
                    h.update(a.tobytes())
        print(h.hexdigest())
    """
    assert len({output(code, BATCHNORM_TUNING=settings) for settings in ("", *TOGETHER)}) == 1
