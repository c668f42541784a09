"""A layer's state as named arrays, format 3; states of formats 1 and 2 are read as well.

========================================== ===========================================================
entry                                      value
========================================== ===========================================================
gamma, beta, running_mean, running_var,    the layer's dtype, shape of the channels; only those that the
renorm_mean, renorm_std                    layer has
num_values, initial_weight                 float64, shape of the channels (formats 1 and 2: one number)
missed_updates                             int64, shape of the channels (formats 1 and 2: none, 0)
num_updates, num_skipped, format_version   int64
name                                       str, empty for None
every field of ``Settings``                its value; a bool as 0 or 1, None as "none", ``renorm`` as
                                           renorm_rmin, renorm_rmax, renorm_dmax and renorm_decay
========================================== ===========================================================

Nothing here changes a layer: `checked` returns what ``load_state_dict`` is to take over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..settings import Settings, check_decay, checked_vector, flag, integer, kind
from ..typing import Array, LayerLike
from .npz import failing_as, read_arrays, write_arrays

__all__ = ["New", "checked", "options_of", "reading", "save", "state_of", "upgraded"]

FORMAT_VERSION = 3

_VECTORS = ("gamma", "beta", "running_mean", "running_var", "renorm_mean", "renorm_std")
_LIMITS = ("rmin", "rmax", "dmax", "decay")
_FIELDS = {field.name: field.default for field in dataclasses.fields(Settings)}
ENTRIES = (*(n for n in _FIELDS if n != "renorm"), *(f"renorm_{limit}" for limit in _LIMITS), "name")
# Counters: the kinds of their dtype, least and largest value, and whether each channel has one.
COUNTERS = {
    "num_updates": ("iu", 0, 2**63 - 1, False), "num_skipped": ("iu", 0, 2**63 - 1, False),
    "num_values": ("iuf", 0, 1e308, True), "initial_weight": ("iuf", 0, 1, True),
    "missed_updates": ("iu", -(2**63), 2**63 - 1, True),
}  # fmt: skip
_FORMAT_1 = ("eps", "decay", "running_ddof", "activation", "data_format", "channel_axis")
# What the network around the layer decides: a layer that exists keeps its own.
_KEPT = ("channel_axis", "data_format", "scale", "center", "activation", "slope")
_FOREIGN = {
    "weight": "gamma", "scale": "gamma", "bias": "beta", "offset": "beta", "moving_mean": "running_mean",
    "moving_variance": "running_var", "moving_var": "running_var", "mean": "running_mean",
    "mean_": "running_mean", "var": "running_var", "var_": "running_var",
    "num_batches_tracked": "num_updates",
}  # fmt: skip
# What a layer may take over.
_TAKEN = {*_VECTORS, *COUNTERS, *ENTRIES, "save_memory"}.difference(_KEPT)


class New(NamedTuple):
    """What a layer takes over from a state: checked, copied, and as far as the state has it."""

    settings: Settings
    vectors: dict[str, Array]
    counters: dict[str, Any]


def state_of(layer: LayerLike) -> dict[str, Array]:
    """The state of a layer that knows its channel count: copies."""
    settings, running = layer.settings, layer.running
    values = {name: getattr(settings, name) for name in _FIELDS} | {"name": layer.name or ""}
    values |= {f"renorm_{limit}": settings.renorm and settings.renorm[limit] for limit in _LIMITS}
    state = {name: value.copy() for name, value in _vectors(layer).items()}
    state["format_version"] = np.array(FORMAT_VERSION)
    for name in ENTRIES:
        value = values[name]
        state[name] = np.array("none" if value is None else int(value) if isinstance(value, bool) else value)
    return state | {name: np.array(getattr(running, name)) for name in COUNTERS}


def save(layer: LayerLike, path: str | os.PathLike[str]) -> None:
    """Write the state of a layer, unless `reading` it would be refused."""
    for name, value in _vectors(layer).items():
        checked_vector(name, value, value.shape, value.dtype)
    write_arrays(path, state_of(layer))


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[dict[str, Array]]:
    """Read a state file; what then turns out to be wrong with the state is a ValueError naming the file."""
    state = read_arrays(path)
    with failing_as(f"cannot load {os.fspath(path)!r}"):
        yield state


def options_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a new layer for this state."""
    state = upgraded(state)
    options = _settings(state)
    if (data_format := options.get("data_format")) is not None and "channel_axis" in options:
        axis = options.pop("channel_axis")
        if axis != Settings(data_format=data_format).channel_axis:
            raise ValueError(f"channel_axis is {axis} but data_format is {data_format!r}")
    dtype = getattr(state.get("running_mean"), "dtype", np.float32)
    return options | {"dtype": dtype, "name": _python("name", state.get("name", "")) or None}


def checked(layer: LayerLike, state: Mapping[str, Any], strict: bool) -> New:
    """What ``layer.load_state_dict(state)`` takes over; raises if that cannot be."""
    flag("strict", strict)
    state, own = upgraded(state), layer.settings
    given = _settings(state)
    for name, value in (("activation", own.activation), ("slope", own.slope)):
        if given.get(name, value) != value:
            remedy = "build the layer with it, or take it out of the state and load with strict=False"
            got = f"{name} is {given[name]!r} in the state, expected {value!r} as in this layer"
            raise ValueError(f"{got}: {remedy}")
    settings = dataclasses.replace(own, **{n: v for n, v in given.items() if n not in _KEPT})
    if settings.has_reference != own.has_reference:
        raise ValueError(
            "renorm has a decay of its own, and so renorm_mean and renorm_std, either in the state or in "
            "this layer, expected both or neither: build the layer as the saved one was"
        )
    there = (settings.scale, settings.center, True, True, *[settings.has_reference] * 2)
    names = list(itertools.compress(_VECTORS, there))
    if strict:
        _check_names(state, (*names, "format_version", *ENTRIES, *COUNTERS))
    held, vectors = _vectors(layer), dict[str, Array]()
    shape = held["running_mean"].shape if held else None
    for name in filter(state.__contains__, names):
        vectors[name] = checked_vector(name, state[name], shape, layer.dtype).copy()
        shape = vectors[name].shape
        if held and not held[name].flags.writeable:
            raise ValueError(f"{name} of this layer has been made read-only, expected writable")
    return New(settings, vectors, {n: _counter(n, state[n], shape or ()) for n in COUNTERS if n in state})


# ---- the entries -------------------------------------------------------------------------------------------


def _vectors(layer: LayerLike) -> dict[str, Array]:
    """The arrays of a layer, by name; none while its channel count is unknown."""
    values = (layer.gamma, layer.beta, *(getattr(layer.running, n) for n in ("mean", "var", *_VECTORS[4:])))
    return {name: value for name, value in zip(_VECTORS, values, strict=True) if value is not None}


def upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of any format as one of today's. What a format did not know is what its layers did."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {kind(state)}, expected a mapping of names to arrays")
    _refuse_foreign(state)
    _check_for_names(state)
    version = _python("format_version", state.get("format_version", FORMAT_VERSION))
    expected = f"1 to {FORMAT_VERSION}, which this batchnorm reads"
    if integer("format_version", version, 1, FORMAT_VERSION, expected) == FORMAT_VERSION:
        return dict(state)
    renamed = {"axis": "channel_axis", "save_memory": "keep"}
    new = {renamed.get(str(name), str(name)): value for name, value in state.items()}
    added = {"name": "", "scale": "gamma" in new, "center": "beta" in new, "slope": None, "missed_updates": 0}
    if "keep" in new:
        new["keep"] = "y" if integer("save_memory", _python("keep", new["keep"]), 0, 1, "0 or 1") else "x"
    mean, var = np.asarray(new.get("running_mean", 0)), np.asarray(new.get("running_var", 1))
    if version == 1:
        updates = _counter("num_updates", new.get("num_updates", 0), ())
        decay = check_decay("decay", _python("decay", new.get("decay", "none"))) or 0.0
        known = not updates and ((mean != 0).any() or (var != 1).any())
        added |= {name: _FIELDS.get(name) for name in ENTRIES if name not in (*_FORMAT_1, *added)}
        added |= {"num_skipped": 0, "num_values": 0, "initial_weight": 0.0 if known else decay**updates}
    if "num_values" in new:  # of all channels together
        new["num_values"] = _counter("num_values", new["num_values"], ()) / max(mean.size, 1)
    return {**added, **new}


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Settings that a state has, as Python values; Settings checks them."""
    found = {name: _python(name, state[name]) for name in _FIELDS if name in state}
    for name, value in found.items():
        if isinstance(_FIELDS[name], bool) and isinstance(value, int):
            found[name] = bool(integer(name, int(value), 0, 1, "0 or 1"))
    limits = {n: _python(f"renorm_{n}", state[f"renorm_{n}"]) for n in _LIMITS if f"renorm_{n}" in state}
    if limits:
        found["renorm"] = None if {limits.get(n) for n in _LIMITS[:3]} == {None} else limits
    return found


def _python(name: str, value: Any) -> Any:
    """An entry that is one number or word, or several axes, as a Python value."""
    if isinstance(value, np.ndarray | np.generic):
        if value.ndim > (name == "channel_axis"):
            raise ValueError(f"{name} has shape {value.shape}, expected a single value, shape ()")
        value = tuple(value.tolist()) if value.ndim else value.item()
    return None if isinstance(value, str) and value == "none" and name != "name" else value


def _counter(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """A counter: a number, or an array of the channels' shape, which one number may fill."""
    kinds, least, largest, each = COUNTERS[name]
    given = np.asarray(value)
    good = given.dtype.kind in kinds and given.shape in ((), shape if each else ())
    if not good or not ((given >= least) & (given <= largest)).all():
        expected = f"{'an int' if kinds == 'iu' else 'a number'} from {least} to {largest:g}"
        many = f", or an array of them of shape {shape}" * each
        got = f"{np.array2string(given, threshold=6)}, {given.dtype} of shape {given.shape}"
        raise ValueError(f"{name} is {got}, expected {expected}{many}")
    full = np.broadcast_to(given, shape if each else ())
    return full.astype(np.int64 if kinds == "iu" else np.float64) if full.ndim else full.item()


# ---- names -------------------------------------------------------------------------------------------------


def _refuse_foreign(state: Mapping[str, Any]) -> None:
    """Say what to do with a state of PyTorch, Keras or Flax."""
    found = {}
    for key, value in state.items():
        last = re.split("[./]", str(key))[-1].removesuffix(":0")
        last = last[last.find("moving_") :] if "_moving_" in last else last  # of MXNet
        if last in _FOREIGN and (last != "scale" or np.ndim(value)):  # a number is the setting
            found[last] = f"{last} is called {_FOREIGN[last]} here"
    if found:
        assign = ", ".join(f"bn.{name} = ..." for name in _VECTORS[:4])
        raise ValueError(
            f"the state is that of another library: {', '.join(found.values())}. Take it by find and"
            f" to_layer of batchnorm.formats. Or assign its arrays, {assign}, and build the layer with its"
            " eps (1e-5 in PyTorch, 1e-3 in Keras by default)"
        )


def _check_names(state: Mapping[str, Any], expected: Sequence[str]) -> None:
    """Refuse a state with other names than those expected."""
    missing = [name for name in expected if name not in state]
    unexpected = [str(name) for name in state if name not in expected]
    if missing or unexpected:
        both = (("missing", missing), ("unexpected", unexpected))
        words = [
            f"{what} {', '.join(n[:8])}{f' and {len(n) - 8} more' * (len(n) > 8)}" for what, n in both if n
        ]
        hint = " (strict=False loads what fits)" * (not set(_VECTORS).isdisjoint(state))
        raise ValueError(f"the state does not fit the layer: {'; '.join(words)}{hint}")


def _check_for_names(state: Mapping[str, Any]) -> None:
    """Refuse a state that has no name of a layer's: nothing would be loaded."""
    names = [str(name) for name in state]
    if not _TAKEN.isdisjoint(names):
        return
    prefixes = dict.fromkeys(n.removesuffix(v) for n in names for v in _VECTORS if n.endswith(v))
    remedy, example = "pass what state_dict() of a BatchNorm gives", next(iter(prefixes), "")
    if example:
        whose = f"those of {len(prefixes)} layers" if len(prefixes) > 1 else "a layer's with a prefix"
        strip = "{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}"
        remedy = f"they are {whose}: pass {strip} with p = {example!r}"
    elif any(isinstance(value, Mapping) for value in state.values()):
        remedy = (
            "its values are mappings: take the arrays out of them, and assign bn.gamma, bn.running_mean ..."
        )
    shown = (
        f"the names {', '.join(map(repr, names[:6]))}{', ...' * (len(names) > 6)}" if names else "no names"
    )
    raise ValueError(f"the state has {shown}, expected some of {', '.join(_VECTORS[:4])}; {remedy}")
