"""What a layer consists of: its slots, their public names, the arrays of one value per channel, the counters.

`BatchNorm` (``_layer``) builds on this, by way of ``_layer_state``. Nothing here computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from . import _args, _running

_T = TypeVar("_T")

INITIAL = {
    "gamma": 1.0, "beta": 0.0, "running_mean": 0.0, "running_var": 1.0, "renorm_mean": 0.0, "renorm_std": 1.0
}  # fmt: skip
REFERENCE = ("renorm_mean", "renorm_std")
STATISTICS = ("running_mean", "running_var")

# Statistics are cold while the initial values weigh more than this.
COLD = 0.01


class Counters:
    """What a layer knows about its running statistics beside their values. Layers that share statistics share
    one of these."""

    __slots__ = (
        "assigned",
        "initial_weight",
        "num_skipped",
        "num_updates",
        "num_values",
        "trusted",
        "warned",
    )

    def __init__(self) -> None:
        self.num_updates = 0  # batches in the statistics
        self.num_values: float = 0  # elements in the statistics, of all channels together
        self.num_skipped = 0  # batches that on_nonfinite="skip" left out
        self.initial_weight = 1.0  # of the initial values in the statistics
        self.assigned: tuple[str, ...] = ()  # statistics that were given, not learned
        self.trusted = False  # whether an eval call need not ask again
        self.warned = False  # of cold statistics

    def copy(self) -> Counters:
        """The same numbers, apart."""
        other = Counters()
        other.take(self)
        return other

    def take(self, other: Counters) -> None:
        """Take over the numbers of another."""
        for name in Counters.__slots__:
            setattr(self, name, getattr(other, name))

    def step(self, decay: float, elements: float) -> None:
        """Count an update at this effective decay."""
        self.num_updates += 1
        self.num_values += elements
        self.initial_weight *= decay

    def know(self, updates: int, elements: float) -> None:
        """The statistics have been replaced by ones that hold nothing of the initial values."""
        self.num_updates, self.num_values, self.initial_weight = updates, elements, 0.0
        self.trusted = self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _counters, tuple(getattr(self, name) for name in Counters.__slots__)


def _counters(*values: Any) -> Counters:
    counters = Counters()
    for name, value in zip(Counters.__slots__, values, strict=True):
        setattr(counters, name, value)
    return counters


class Setting(Generic[_T]):
    """The public name of a slot: read-only, or with `check` assignable to what that returns."""

    def __init__(self, doc: str, check: Callable[[object], _T] | None = None) -> None:
        self.__doc__ = doc
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._slot = "_" + name

    def __get__(self, layer: object, owner: type | None = None) -> _T:
        return cast(_T, self if layer is None else getattr(layer, self._slot))

    def __set__(self, layer: LayerBase, value: _T) -> None:
        if self._check is None:
            raise AttributeError(f"{self._name} of a BatchNorm is read-only")
        setattr(layer, self._slot, self._check(value))
        layer._refresh()


class _Vector(Setting["NDArray[Any] | Any"]):
    """A slot with one value per channel. Assigning copies into the array, which optimisers hold."""

    def __set__(self, layer: LayerBase, value: NDArray[Any]) -> None:
        current = self.__get__(layer)
        if current is None:
            unknown = "its channel count is not known yet, build it with BatchNorm(num_features)"
            why = unknown if layer.num_features is None else "it was built so"
            raise ValueError(f"{self._name} cannot be assigned, the layer has none ({why})")
        if value is not current:  # it is the same array after `layer.gamma -= step`
            np.copyto(current, checked_vector(self._name, value, len(current), current.dtype, cast=True))
        if self._name in STATISTICS:
            layer._mark_assigned(self._name)


class LayerBase:
    """The slots of a layer and what belongs to them."""

    __slots__ = (
        "__weakref__", "_activation", "_allow_initial_statistics", "_axis", "_beta", "_center", "_collector",
        "_counters", "_data_format", "_decay", "_dtype", "_eps", "_frozen", "_gamma", "_history", "_initial",
        "_needs", "_num_features", "_on_nonfinite", "_rank", "_renorm", "_renorm_mean", "_renorm_std",
        "_running_ddof", "_running_mean", "_running_var", "_save_memory", "_saved", "_scale", "_slope",
        "_special", "_training", "_updating", "_virtual_batch_size", "_warmup", "_zero_debias", "dbeta",
        "dgamma", "dresidual",
    )  # fmt: skip

    # The vectors, None until the channel count is known: Any spares the call path asking twice.
    _gamma: Any
    _beta: Any
    _running_mean: Any
    _running_var: Any
    _renorm_mean: Any  # a reference of its own, with renorm={"decay": ...}
    _renorm_std: Any
    _renorm: Any  # the limits by name, or None
    _virtual_batch_size: Any  # int or None
    _save_memory: bool
    _num_features: int | None
    _activation: Any
    _axis: int
    _data_format: _args.DataFormatName | None
    _rank: int | None
    _dtype: np.dtype[Any]
    _decay: Any  # float or None; Any spares the call path asking
    _eps: float
    _scale: bool
    _center: bool
    _running_ddof: int
    _slope: float | None
    _warmup: bool
    _zero_debias: bool
    _on_nonfinite: str
    _allow_initial_statistics: bool
    _initial: dict[str, Any] | None  # until the vectors are made
    _counters: Counters
    _training: bool
    _frozen: tuple[str, ...]  # of "statistics", "parameters"
    _updating: bool  # False inside no_update()
    _collector: Any  # inside recalibrating()
    _history: Any
    _needs: tuple[str, ...]
    _special: bool  # whether calls need more than the short way
    _saved: Any  # see _layer
    dgamma: NDArray[Any] | Any
    dbeta: NDArray[Any] | Any
    dresidual: NDArray[Any] | Any

    gamma = _Vector("Scale, one value per channel, or None.")
    beta = _Vector("Shift, one value per channel, or None.")
    running_mean = _Vector("Moving average of the batch means; None while there is no channel count.")
    running_var = _Vector("Moving average of the batch variances; None while there is no channel count.")
    num_features = Setting["int | None"]("Number of channels; None until it is known.")
    axis = Setting[int]("The channel axis.")
    data_format = Setting["_args.DataFormatName | None"]("The data_format given instead of an axis, or None.")
    scale = Setting[bool]("Whether the layer has gamma.")
    center = Setting[bool]("Whether the layer has beta.")
    renorm_mean = _Vector("Reference mean of batch renormalisation with a decay of its own, or None.")
    renorm_std = _Vector("Reference standard deviation of the same, or None.")
    virtual_batch_size = Setting["int | None"]("Samples of the parts that are normalised apart, or None.")
    save_memory = Setting[bool]("Whether y is kept for backward instead of x.")
    running_ddof = Setting[int]("1: running_var is the unbiased estimate; 0: the population variance.")
    activation = Setting["_args.ActivationName | None"]("The activation applied to the result, or None.")
    slope = Setting["float | None"]("leaky_relu's slope, or None with another activation.")
    dtype = Setting["np.dtype[Any]"]("Data type of parameters and running statistics.")
    eps = Setting("Added to the variance inside the square root; may be changed.", _args.check_eps)
    training = Setting("What a call without ``training=`` does.", partial(_args.check_flag, name="training"))
    warmup = Setting[bool]("Whether early batches weigh more: min(decay, (1 + t) / (10 + t)).")
    zero_debias = Setting[bool]("Whether the initial statistics weigh nothing from the first batch on.")
    on_nonfinite = Setting("What NaN or Inf in running statistics does.", _running.check_on_nonfinite)
    allow_initial_statistics = Setting(
        "Whether eval calls take statistics as they are, learned or not.",
        partial(_args.check_flag, name="allow_initial_statistics"),
    )

    @property
    def decay(self) -> float | None:
        """Weight of the old value in the running statistics, or None: cumulative. May be changed."""
        return cast("float | None", self._decay)

    @decay.setter
    def decay(self, value: float | None) -> None:
        self._decay = _running.check_schedule(value, self._warmup, self._zero_debias)[0]
        self._refresh()

    @property
    def num_updates(self) -> int:
        """Number of batches in the running statistics: training forwards that updated them."""
        return self._counters.num_updates

    @property
    def num_samples(self) -> float:
        """Number of values per channel in the running statistics (with weights, their sum)."""
        values = self._counters.num_values
        count = values / (self._num_features or 1)
        return int(count) if isinstance(values, int) else count

    @property
    def num_skipped(self) -> int:
        """Number of batches that ``on_nonfinite="skip"`` left out of the running statistics."""
        return self._counters.num_skipped

    @property
    def initial_weight(self) -> float:
        """How much the initial values still weigh in the running statistics: 1 at first, then decay^n."""
        return self._counters.initial_weight

    @property
    def frozen(self) -> bool:
        """Whether calls use the running statistics and update nothing, in training too; see freeze()."""
        return bool(self._frozen)

    # ---- what follows from the settings --------------------------------------------------------------------

    def _refresh(self) -> None:
        """To be called when a setting has changed."""
        short = (
            self._num_features is not None
            and self._decay is not None
            and not (self._warmup or self._zero_debias or self._frozen)
            and self._on_nonfinite == "propagate"
            and self._updating
            and self._collector is None
            and self._history is None
            and self._renorm is None
            and self._virtual_batch_size is None
            and not self._save_memory
        )
        self._special = not short
        trained = () if "parameters" in self._frozen else self._parameter_names()
        self._needs = ("dx", *("d" + name for name in trained))

    def _parameter_names(self) -> tuple[str, ...]:
        return (*(("gamma",) * self._scale), *(("beta",) * self._center))

    def _vector_names(self) -> tuple[str, ...]:
        own = self._renorm is not None and self._renorm["decay"] is not None
        return (*self._parameter_names(), *STATISTICS, *(REFERENCE * own))

    # ---- vectors -------------------------------------------------------------------------------------------

    def _allocate(self, count: int) -> None:
        """Make the vectors; `_forget` undoes it."""
        initial = self._initial or {}
        vectors = {name: _initial_vector(name, initial, count, self._dtype) for name in self._vector_names()}
        for name, value in vectors.items():
            setattr(self, "_" + name, value)
        self._num_features = count
        for name in STATISTICS:
            if name in initial:
                self._mark_assigned(name)
        self._refresh()

    def _forget(self) -> None:
        self._num_features = None
        self._gamma = self._beta = self._running_mean = self._running_var = None
        self._renorm_mean = self._renorm_std = None
        self._counters = Counters()
        self._refresh()

    def _known_vectors(self, what: str) -> dict[str, NDArray[Any]]:
        if self._num_features is None:
            raise RuntimeError(
                f"{what} needs the channel count, which is not known yet: "
                "build the layer with it, BatchNorm(num_features), or call the layer once"
            )
        return {name: getattr(self, "_" + name) for name in self._vector_names()}

    def _mark_assigned(self, name: str) -> None:
        """Statistics that were given count as known, once both were."""
        counters = self._counters
        counters.assigned = tuple(n for n in STATISTICS if n == name or n in counters.assigned)
        if counters.assigned == STATISTICS:
            counters.initial_weight = 0.0
        counters.trusted = counters.warned = False

    def _untouched_statistics(self) -> list[str]:
        """The statistics that still are what every layer begins with."""
        if self._num_features is None:
            return list(STATISTICS)
        if self._counters.num_updates or self._counters.initial_weight == 0:
            return []
        return [
            name
            for name in STATISTICS
            if name not in self._counters.assigned and (getattr(self, "_" + name) == INITIAL[name]).all()
        ]


# ---- checks ------------------------------------------------------------------------------------------------


def checked_int(value: object, name: str, low: int, high: int, expected: str) -> int:
    """`value` as an int within bounds."""
    number = _args.check_int(value, name, expected)
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, expected {expected}")
    return int(number)


def checked_dtype(value: Any) -> np.dtype[Any]:
    """The dtype of parameters and statistics."""
    with contextlib.suppress(TypeError, ValueError):
        dtype: np.dtype[Any] = np.dtype(value)
        if value is not None and dtype in (np.float32, np.float64):
            return dtype
    raise TypeError(f"dtype is {value!r:.60}, expected numpy.float32 or numpy.float64")


def checked_initial(value: object, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The option `initial`: names of vectors that the layer has."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"initial is {_args._kind(value)}, expected a mapping such as {{'gamma': 0.5}}")
    for name in value:
        if name not in names:
            raise ValueError(f"initial names {name!r}, expected names among {', '.join(names)}")
    return dict(value)


def _initial_vector(name: str, initial: Mapping[str, Any], count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    value = initial.get(name, INITIAL[name])
    if callable(value):
        value = value(count)
    if not isinstance(value, np.ndarray):
        expected = f"a number, an array of shape ({count},), or a function of the channel count giving one"
        value = np.full(count, _args._real(value, f"initial {name}", expected))
    return checked_vector(f"initial {name}", value, count, dtype, cast=True).copy()


def checked_vector(
    name: str, value: Any, count: int | None, dtype: np.dtype[Any], *, cast: bool = False
) -> NDArray[Any]:
    """`value`, if gamma, beta, running_mean or running_var may have it; `count` None: of any length."""
    if isinstance(value, list | tuple):
        use = f"use numpy.array({name}, numpy.{dtype})"
        raise TypeError(f"{name} is {_args._kind(value)}, expected an array of {dtype}; {use}")
    if not cast and isinstance(value, np.ndarray) and value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {dtype}, the dtype of this layer")
    given = _args._vector(value, name)
    if len(given) != (count or len(given) or 1):
        raise ValueError(f"{name} has shape {given.shape}, expected ({count or 'C'},), one value per channel")
    with np.errstate(over="ignore", under="ignore"):
        vector = given.astype(dtype, copy=False)
    not_negative = name.endswith(("running_var", "renorm_std"))
    good = np.isfinite(vector) & ((vector >= 0) | (not not_negative))
    if not good.all():
        channel = int(good.argmin())
        expected = f"finite {dtype} values" + " >= 0" * not_negative
        raise ValueError(f"{name} is {given[channel]} at channel {channel}, expected {expected}")
    return vector
