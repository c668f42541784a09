"""Bad input, of whatever call: the right error, soon, in the right words; and nothing has changed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

MOST_SECONDS = 0.05 * float(os.environ.get("SLOWER", "1"))  # sanitizers take their time

Errors = type[BaseException] | tuple[type[BaseException], ...]


def bytes_of(value: Any) -> Any:
    """What tells whether a value has changed: bytes of arrays and of the memory they are views of, of tensors
    of PyTorch, of what a mapping or a sequence holds; other things by themselves."""
    if isinstance(value, np.ndarray):
        owner = value.base if isinstance(value.base, np.ndarray) else value
        arrays = [a for a in (value, owner) if a.dtype != object]
        return [(a.shape, a.dtype.str, np.ascontiguousarray(a).tobytes()) for a in arrays]
    if isinstance(value, Mapping):
        return {name: bytes_of(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [bytes_of(v) for v in value]
    if hasattr(value, "is_sparse"):  # a tensor of PyTorch
        return None if value.is_meta else repr(value.detach().to_dense().tolist())
    return repr(value) if isinstance(value, int | float | complex | str | bytes) else id(value)


def refused(
    call: Callable[[], Any],
    error: Errors,
    words: str | Iterable[str] = (),
    unchanged: Callable[[], Any] | None = None,
    most_seconds: float = MOST_SECONDS,
) -> str:
    """`call` raises `error` itself, no subclass, within `most_seconds`; its message has all of `words` in it,
    or matches them if they are a pattern; what `unchanged` returns has the bytes it had. Returns the message.
    """
    before = None if unchanged is None else bytes_of(unchanged())
    seconds: list[float] = []
    while not seconds or (min(seconds) > most_seconds and len(seconds) < 5):  # the machine may be busy
        started = time.perf_counter()
        with pytest.raises(Exception) as caught:
            call()
        seconds.append(time.perf_counter() - started)
    message = str(caught.value)
    errors = error if isinstance(error, tuple) else (error,)
    assert caught.type in errors, f"{caught.type.__name__}: {message}"
    if isinstance(words, str):
        assert re.search(words, message), f"{words!r} does not match: {message}"
    else:
        missing = [word for word in words if word not in message]
        assert not missing, f"{missing} are not in: {message}"
    assert min(seconds) <= most_seconds, f"took {min(seconds):.3f} s"
    if unchanged is not None:
        assert bytes_of(unchanged()) == before, "an error changes nothing"
    return message
