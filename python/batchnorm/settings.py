"""What a layer is told when it is built: a frozen dataclass whose fields are the one table of options.

A field holds the option's default, its check, whether it may be assigned later and whether ``repr`` always
shows it. Constructor, repr, state and copies go by ``dataclasses.fields``. The checks of single values are
here as well; they know no layer.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ._arrays import is_masked
from ._hints import kind as kind
from ._hints import suggestion
from .typing import ActivationName, ChannelAxis, DataFormatName, OnNonfinite

__all__ = ["Settings"]

_MAX = sys.float_info.max
_FLOATS = np.dtype(np.float32), np.dtype(np.float64)


Check = Callable[[str, Any], Any]


class UnsaidAxis(int):
    """A channel axis that nobody asked for: the default, or what follows from a data_format."""


# ---- checks of one value -----------------------------------------------------------------------------------


def real(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """`value` as a float within bounds; a bool, a string or an array is none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {kind(value)}, expected {expected}")
    if not low <= value <= high:  # type: ignore[operator]  # so is NaN
        raise ValueError(f"{name} is {value!s:.40}, expected {expected}")
    return float(value)


def integer(name: str, value: Any, low: int, high: int, expected: str) -> int:
    """`value` as an int within bounds; a bool is none."""
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {kind(value)}, expected {expected}")
    real(name, value, low, high, expected)
    return int(value)


def flag(name: str, value: Any) -> bool:
    """A Python or NumPy bool. Anything that is merely truthy would choose what nobody asked for."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {kind(value)}, expected True or False")
    return bool(value)


def word(*words: str, none: bool = False) -> Check:
    """A check that a value is one of some words, or, if `none`, None."""
    *most, last = [*(["None"] if none else []), *map(repr, words)]
    expected = f"{', '.join(most)} or {last}"

    def check(name: str, value: Any) -> Any:
        if (value is None and none) or (isinstance(value, str) and value in words):
            return None if value is None else str(value)
        if not isinstance(value, str):
            raise TypeError(f"{name} is {kind(value)}, expected {expected}")
        raise ValueError(f"{name} is {value!r:.60}, expected {expected}{suggestion(value, words)}")

    return check


def bounded(check: Any, low: float, high: float, expected: str, none: bool = False) -> Check:
    """A check that a value is a number within bounds, or, if `none`, None."""
    return lambda name, value: None if none and value is None else check(name, value, low, high, expected)


def checked_dtype(value: Any) -> np.dtype[Any]:
    """The dtype of parameters and running statistics: float32 or float64."""
    with contextlib.suppress(TypeError, ValueError):
        if value is not None and (dtype := np.dtype(value)) in _FLOATS:
            return _FLOATS[_FLOATS.index(dtype)]
    raise TypeError(f"dtype is {value!r:.60}, expected numpy.float32 or numpy.float64")


def checked_vector(
    name: str, value: Any, shape: tuple[int, ...] | None, dtype: np.dtype[Any], *, cast: bool = False
) -> NDArray[Any]:
    """`value` as an array of `dtype`, if one value per channel may be so; `shape` None: of any channel count.

    With `cast` it may be float32 or float64, whatever `dtype` is. Not always a copy.
    """
    dtypes = _FLOATS if cast else (dtype,)
    expected = f"an array of {' or '.join(map(str, dtypes))}, one value per channel"
    if not isinstance(value, np.ndarray) or is_masked(value):
        use = f"; use numpy.array({_expression(name)}, numpy.{dtype})" * isinstance(value, list | tuple)
        raise TypeError(f"{name} is {kind(value)}, expected {expected}{use}")
    if value.dtype not in dtypes:
        use = f"; use {_expression(name)}.astype(numpy.{dtype})" * (value.dtype.kind in "fiub")
        shown = value.dtype if value.dtype.isnative else value.dtype.str
        raise TypeError(f"{name} has dtype {shown}, expected {expected}{use}")
    if not value.ndim or not value.size or value.shape != (shape or value.shape):
        raise ValueError(f"{name} has shape {value.shape}, expected {shape or '(C,)'}, one value per channel")
    with np.errstate(over="ignore", under="ignore"):
        vector = np.asarray(value).astype(dtype, copy=False)
    least = 0.0 if name.endswith(("running_var", "renorm_std")) else -np.inf
    for where in map(tuple, np.argwhere(~(np.isfinite(vector) & (vector >= least)))):
        rule = f"finite {dtype} values" + " >= 0" * (least == 0)
        raise ValueError(f"{name} is {value[where]} at channel {', '.join(map(str, where))}, expected {rule}")
    return vector


def _expression(name: str) -> str:
    """Python for what a message calls "initial gamma"."""
    whole, _, key = name.partition(" ")
    return f"{whole}[{key!r}]" if key else name


def check_schedule(decay: float | None, warmup: bool, zero_debias: bool) -> None:
    """Raise if the three options of a schedule contradict each other."""
    if warmup and zero_debias:
        why = "two ways to be rid of the initial values: drop one of them"
        raise ValueError(f"warmup and zero_debias are both True, {why}")
    if decay is None and (warmup or zero_debias):
        name = "warmup" if warmup else "zero_debias"
        why = "a cumulative average holds nothing of the initial values"
        raise ValueError(f"{name} is True and decay is None: {why}; drop {name}, or give a decay")


check_decay = bounded(real, 0, 1, "a number in [0, 1], the weight of the old value", none=True)


def _channel_axis(name: str, value: Any) -> ChannelAxis:
    expected = "an int, the axis that holds the channels, or a tuple of several"
    if not isinstance(value, tuple | list):
        axis = integer(name, value, -64, 63, expected)
        return UnsaidAxis(axis) if isinstance(value, UnsaidAxis) else axis
    axes = tuple(integer(name, axis, -64, 63, expected) for axis in value)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"{name} is {axes}, expected {expected}, each once")
    if 0 in axes and len(axes) > 1:
        hint = f"if these are axes to reduce, as NumPy's axis=, pass those that they leave out as {name}="
        raise ValueError(f"{name} is {axes}, expected several axes to be without 0, the samples; {hint}")
    if min(axes) >= 0 or max(axes) < 0:  # in x's order, which values of several axes have
        axes = tuple(sorted(axes))
    return axes[0] if len(axes) == 1 else axes


def _renorm(name: str, value: Any) -> dict[str, Any] | None:
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, Mapping):
        example = "a mapping such as {'rmax': 3.0, 'dmax': 5.0}"
        raise TypeError(f"{name} is {kind(value)}, expected True, None, or {example}")
    given: Mapping[Any, Any] = {} if value is True else value
    for key in given:
        if key not in _LIMITS:
            hint = suggestion(str(key), _LIMITS)
            raise ValueError(f"{name} names {key!r}, expected names among {', '.join(_LIMITS)}{hint}")
    return {limit: check(limit, given.get(limit, default)) for limit, (default, check) in _LIMITS.items()}


# ---- the table ---------------------------------------------------------------------------------------------


_size = bounded(integer, 1, 2**62, "an int >= 1, or None", none=True)
_slope = bounded(real, -_MAX, _MAX, "a finite number, leaky_relu's factor for values below 0", none=True)
_eps = bounded(real, 0, _MAX, "a finite number >= 0")
_ddof = bounded(integer, 0, 1, "0 (divide by n) or 1 (divide by n - 1)")
_LIMITS: dict[str, tuple[Any, Check]] = {
    "rmin": (0.0, bounded(real, 0, 1, "a number in [0, 1]")),
    "rmax": (math.inf, bounded(real, 1, math.inf, "a number >= 1")),
    "dmax": (math.inf, bounded(real, 0, math.inf, "a number >= 0")),
    "decay": (None, check_decay),
}


def _rule(check: Check, assignable: bool = False, shown: bool = False) -> dict[str, Any]:
    return {"check": check, "assignable": assignable, "shown": shown}


_activation = word(*get_args(ActivationName), none=True)
_data_format = word(*get_args(DataFormatName), none=True)
_on_nonfinite = word("propagate", "raise", "skip")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a layer, checked one by one and together; what they mean is said by the layer.

    Raises TypeError or ValueError where the layer's constructor would. ``dataclasses.replace`` makes changed
    ones.
    """

    decay: float | None = field(default=0.9, metadata=_rule(check_decay, assignable=True, shown=True))
    warmup: bool = field(default=False, metadata=_rule(flag))
    zero_debias: bool = field(default=False, metadata=_rule(flag))
    eps: float = field(default=1e-5, metadata=_rule(_eps, assignable=True, shown=True))
    channel_axis: ChannelAxis = field(default=UnsaidAxis(1), metadata=_rule(_channel_axis, shown=True))
    data_format: DataFormatName | None = field(default=None, metadata=_rule(_data_format))
    scale: bool = field(default=True, metadata=_rule(flag))
    center: bool = field(default=True, metadata=_rule(flag))
    running_ddof: int = field(default=1, metadata=_rule(_ddof))
    activation: ActivationName | None = field(default=None, metadata=_rule(_activation, shown=True))
    slope: float | None = field(default=None, metadata=_rule(_slope))
    renorm: dict[str, float | None] | None = field(default=None, metadata=_rule(_renorm, assignable=True))
    virtual_batch_size: int | None = field(default=None, metadata=_rule(_size, assignable=True))
    keep: Literal["x", "y"] = field(default="x", metadata=_rule(word("x", "y"), assignable=True))
    on_nonfinite: OnNonfinite = field(default="propagate", metadata=_rule(_on_nonfinite, assignable=True))
    allow_initial_statistics: bool = field(default=False, metadata=_rule(flag, assignable=True))

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, each.metadata["check"](each.name, getattr(self, each.name)))
        check_schedule(self.decay, self.warmup, self.zero_debias)
        if self.data_format is not None:
            if not isinstance(self.channel_axis, UnsaidAxis):
                both = f"channel_axis is {self.channel_axis} and data_format is {self.data_format!r}"
                raise TypeError(f"{both}; they say the same thing, give one of them")
            last = self.data_format.endswith(("LC", "WC", "last"))
            object.__setattr__(self, "channel_axis", UnsaidAxis(-1 if last else 1))
        leaky = self.activation == "leaky_relu"
        if self.slope is not None and not leaky:
            what = f"slope is given with activation={self.activation!r}, which has none"
            raise ValueError(f"{what}; drop it, or use activation='leaky_relu'")
        object.__setattr__(self, "slope", 0.01 if leaky and self.slope is None else self.slope)
        if self.keep == "y" and not (leaky or self.activation is None):
            what = f"keep is 'y' and activation is {self.activation!r}, from whose output x cannot be had"
            raise ValueError(f"{what}; drop one of them, or apply the activation afterwards")
        if self.keep == "y" and leaky and not 2.0**-60 <= cast(float, self.slope) <= 2.0**60:
            expected = "a number from 2**-60 to 2**60, so that y tells x"
            raise ValueError(f"slope is {self.slope:g}, expected {expected}; or keep x")

    def changed(self, name: str, value: Any) -> Settings:
        """The settings with one option that may be assigned set anew."""
        if not self.__dataclass_fields__[name].metadata["assignable"]:
            raise AttributeError(f"{name} of a BatchNorm is read-only, it is decided when the layer is built")
        new = replace(self, **{name: value})
        if self.has_reference != new.has_reference:
            how = "give decay among the limits" if self.has_reference else "leave decay away"
            what = "that the reference has a decay of its own is decided when the layer is built"
            raise ValueError(f"renorm: {what}; {how}")
        return new

    @property
    def where(self) -> dict[str, Any]:
        """The keyword of a function that says where the channels are."""
        name = "channel_axis" if self.data_format is None else "data_format"
        return {name: getattr(self, name)}

    @property
    def has_reference(self) -> bool:
        """Whether batch renormalisation goes by a reference of its own, with a decay of its own."""
        return self.renorm is not None and self.renorm["decay"] is not None

    def described(self) -> list[str]:
        """The options as ``repr`` shows them: the important ones, and the changed ones."""
        hidden = "channel_axis" if self.data_format is not None else ""  # the two exclude each other
        return [
            f"{each.name}={value!r}"
            for each in fields(self)
            if each.name != hidden
            and ((value := getattr(self, each.name)) != each.default or each.metadata["shown"])
        ]
