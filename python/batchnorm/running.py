"""Running statistics: their step, how much the old value weighs in it, and the object that a layer has.

A schedule is one number per step and channel, the effective decay: whatever the schedule, the step is
``running = decay * running + (1 - decay) * batch``. The extension does the step; here are the numbers and the
counters that they need.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from . import _core
from .settings import Settings, check_decay, check_schedule, flag, integer, kind, real
from .typing import Array, Mask, Vector

__all__ = ["ColdStatisticsWarning", "RunningStatistics", "effective_decay", "update_running"]

# Statistics are cold while the initial values weigh more than this.
COLD = 0.01
STATISTICS = ("running_mean", "running_var")


class ColdStatisticsWarning(UserWarning):
    """Running statistics were used while the initial values still weigh more than 1 % in them."""


@_core.operation
def update_running(
    running_mean: Array, running_var: Array, mean: Array, var: Array, *, decay: float | Array | None = None,
    count: float | Array, seen: float | Array | None = None, ddof: int = 1,
) -> None:  # fmt: skip
    """Move running statistics towards those of a batch, in place.

    Parameters
    ----------
    running_mean, running_var : writable array of float32 or float64, shape (C,)
        Updated in place; they must not share memory.
    mean, var : array of float32 or float64, shape (C,)
        The batch's mean and population variance (``ddof=0``), as :func:`moments` gives them.
    decay : float in [0, 1], or array of shape (C,), optional
        Weight of the OLD running value; :func:`effective_decay` gives that of other schedules. None: a
        cumulative average, which needs ``seen``.
    count : number, or array of shape (C,)
        Values per channel that ``mean`` and ``var`` came from, or the sum of their weights.
    seen : number, or array of shape (C,), optional
        With ``decay=None``: values per channel in the running statistics before this batch, 0 at first. Add
        ``count`` to it after the call.
    ddof : {1, 0}
        The running variance receives ``var * count / (count - ddof)``.

    Raises
    ------
    TypeError, ValueError
        Wrong kinds, dtypes, shapes or values; both or neither of ``decay`` and ``seen``. Nothing is changed
        then.

    Notes
    -----
    ``running = decay * running + (1 - decay) * batch`` in float64, rounded once to the array's dtype. With
    ``decay=0`` the old value does not count at all, even if it is NaN. A cumulative average has
    ``decay = seen / (seen + count)``: every value weighs the same, however large its batch. A channel with
    fewer than two values, or not more than ``ddof``, stays as it is.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> running_mean, running_var = np.zeros(3), np.ones(3)
    >>> batchnorm.update_running(running_mean, running_var, np.ones(3), np.full(3, 2.0), decay=0.9, count=5)
    >>> running_mean.shape, float(running_var[0])
    ((3,), 1.15)
    """
    ...


# ---- schedules ---------------------------------------------------------------------------------------------


def _scheduled(decay: float, warmup: bool, zero_debias: bool, updates: int) -> float:
    """The effective decay after `updates` updates; arguments are checked already."""
    if warmup:
        return min(decay, (1 + updates) / (10 + updates))
    if not zero_debias:
        return decay
    if decay == 0 or updates == 0:
        return 0.0
    if decay == 1:
        return updates / (updates + 1)  # the limit of the expression below
    rate = math.log(decay)  # 1 - decay^t without cancellation, for decays near 1
    return decay * math.expm1(updates * rate) / math.expm1((updates + 1) * rate)


def _each(function: Callable[[Any], float], values: Any) -> float | Vector:
    """`function` of a number, or of every element of an array."""
    if not isinstance(values, np.ndarray):
        return function(values)
    different, where = np.unique(values, return_inverse=True)
    return np.array([*map(function, different)])[where.reshape(values.shape)]


def _amount(name: str, value: Any, low: float) -> Any:
    """Numbers of values: one, or one per channel."""
    expected = f"a finite number {'> 0' if low else '>= 0'}, values per channel, or an array of them"
    if value is None:
        raise TypeError(f"{name} is None, expected {expected}: with decay=None it decides the decay")
    if not isinstance(value, np.ndarray):
        return real(name, value, low, 1e300, expected)
    if value.dtype.kind not in "iuf":
        raise TypeError(f"{name} has dtype {value.dtype}, expected {expected}")
    good = np.isfinite(value) & (value >= low)
    if not good.all():
        raise ValueError(f"{name} is {value.flat[int(good.argmin())]}, expected {expected}")
    return value.astype(np.float64)


@_core.entrance
def effective_decay(
    decay: float | None, *, updates: int | NDArray[np.integer[Any]] = 0, warmup: bool = False,
    zero_debias: bool = False, seen: float | Array | None = None, count: float | Array | None = None,
) -> float | Vector:  # fmt: skip
    """The weight of the old running value at one step of a schedule.

    Parameters
    ----------
    decay : float in [0, 1] or None
        The decay that the schedule tends to. None: a cumulative average, every value seen weighs the same.
    updates : int, or int array of shape (C,)
        Updates before this one; matters with ``warmup`` and ``zero_debias``.
    warmup : bool
        ``min(decay, (1 + updates) / (10 + updates))``: early batches weigh more [1]_.
    zero_debias : bool
        The first batch replaces the initial value, and the weights of the batches seen always add up to 1
        [2]_. So it is right for any initial value, and for mean and variance alike.
    seen, count : number, or array of shape (C,), optional
        For ``decay=None`` alone: values per channel seen before, and in this batch.

    Returns
    -------
    float, or float64 array of shape (C,) if an argument is one
        For the ``decay=`` of :func:`batch_norm_train` or :func:`update_running`.

    Raises
    ------
    TypeError, ValueError
        Wrong kinds or values; ``warmup`` with ``zero_debias``, or one of them with ``decay=None``; ``seen``
        or ``count`` with a decay, or absent without one.

    Notes
    -----
    Cumulative: ``seen / (seen + count)``. Zero-debiased, with t updates before:
    ``decay * (1 - decay^t) / (1 - decay^(t + 1))``. That makes the running value
    ``sum(decay^(t - i) * batch_i) / sum(decay^(t - i))``, the estimate of [2]_ without its division at the
    time of reading.

    .. [1] TensorFlow, ``tf.train.ExponentialMovingAverage``, ``num_updates``.
    .. [2] D. P. Kingma and J. Ba, "Adam", 2014, arXiv:1412.6980, section 3.

    Examples
    --------
    >>> import batchnorm
    >>> [batchnorm.effective_decay(0.5, updates=t, zero_debias=True) for t in range(2)]
    [0.0, 0.3333333333333333]
    >>> batchnorm.effective_decay(0.99, updates=8, warmup=True)
    0.5
    >>> batchnorm.effective_decay(None, seen=300, count=100)
    0.75
    """
    number = check_decay("decay", decay)
    early, debiased = flag("warmup", warmup), flag("zero_debias", zero_debias)
    check_schedule(number, early, debiased)
    expected = "an int >= 0, the updates before this one"
    for step in updates.flat if isinstance(updates, np.ndarray) else [updates]:
        integer("updates", step, 0, 2**63 - 1, expected)
    if number is None:
        before = _amount("seen", seen, 0)
        added = _amount("count", count, 5e-324)
        shapes = [np.shape(n) for n in (before, added)]
        if () not in shapes and shapes[0] != shapes[1]:
            got = f"seen has shape {shapes[0]} and count {shapes[1]}"
            raise ValueError(f"{got}, expected one shape, one number for each channel; or a single number")
        weight: float | Vector = before / (before + added)
        return weight
    for name, given in (("seen", seen), ("count", count)):
        if given is not None:
            why = "values seen decide the weight only with decay=None: drop one of them"
            raise ValueError(f"{name} is {kind(given)} and decay is a number; {why}")
    return _each(lambda t: _scheduled(number, early, debiased, t), updates)


def updates_until(weight: float, decay: float, warmup: bool = False, updates: int = 0) -> float:
    """How many updates, after `updates` so far, take the initial values down to a share `weight` of what they
    weigh now; inf if none do."""
    more, left = 0, 1.0
    while warmup and left > weight and (early := _scheduled(decay, True, False, updates + more)) < decay:
        left *= early
        more += 1
    if left <= weight:
        return more
    if decay == 0:
        return more + 1
    if decay == 1:
        return math.inf
    return more + max(0, math.ceil(math.log(weight / left) / math.log(decay) - 1e-9))


# ---- what a layer keeps ------------------------------------------------------------------------------------


def _merged(values: NDArray[Any]) -> Any:
    """One number for an array of equal ones, which is cheaper to count with."""
    first = values.flat[0]
    return first.item() if (values == first).all() else values


def _each_channel(name: str, doc: str, dtype: Any = np.float64) -> property:
    def get(running: RunningStatistics) -> NDArray[Any]:
        shape = (1,) if running.mean is None else running.mean.shape
        return np.full(shape, getattr(running, name), dtype)

    return property(get, doc=doc)


def entered(saved: Any, ddof: int) -> Vector:
    """The counts of the channels, and parts, that a forward's running statistics took; 0 of the others: those
    of fewer than two values, or of weights that leave no variance."""
    return np.where((saved._values >= 2) & (saved.count > ddof), saved.count, 0.0)


class RunningStatistics:
    """Running statistics of a layer, and what is known about them; ``bn.running``.

    Layers made by ``bn.clone(share="stats")`` have the same one. ``bn.snapshot()`` is a copy.

    Attributes
    ----------
    mean, var : ndarray of the layer's dtype, shape (C,), or None
        None while the channel count is unknown.
    renorm_mean, renorm_std : ndarray of the layer's dtype, shape (C,), or None
        Batch renormalisation's reference, if that has a decay of its own.
    num_updates : int
        Batches that are in the statistics.
    num_skipped : int
        Batches that ``on_nonfinite="skip"`` left out.
    """

    __slots__ = (
        "__weakref__", "_mean", "_missed", "_renorm_mean", "_renorm_std", "_values", "_var", "_weight",
        "assigned", "known", "noted", "num_skipped", "num_updates", "trusted",
    )  # fmt: skip

    mean = property(attrgetter("_mean"), doc="Moving average of the batch means, changed in place.")
    var = property(attrgetter("_var"), doc="Moving average of the batch variances, changed in place.")
    renorm_mean = property(attrgetter("_renorm_mean"), doc="Reference mean of batch renormalisation.")
    renorm_std = property(attrgetter("_renorm_std"), doc="Reference deviation of batch renormalisation.")
    seen = property(attrgetter("_values"), doc="Values in the statistics: a number where channels agree.")
    num_values = _each_channel("_values", "Values in the statistics; with weights, the sum of their weights.")
    initial_weight = _each_channel("_weight", "Weight of the initial values: 1 at first, then decay^n.")
    missed_updates = _each_channel("_missed", "Updates whose batches had fewer than two values.", np.int64)

    def __init__(self) -> None:
        self._mean: Any = None
        self._var: Any = None
        self._renorm_mean: Any = None
        self._renorm_std: Any = None
        self.num_updates = self.num_skipped = 0
        # Numbers while all channels agree, else arrays.
        self._values: Any = 0.0  # values in the statistics, or the sum of their weights
        self._weight: Any = 1.0  # of the initial values
        self._missed: Any = 0  # updates that had nothing of the channel
        self.assigned: tuple[str, ...] = ()  # statistics that were given, not learned
        self.known = False  # whether batch renormalisation has a reference in every channel
        self.trusted = False  # not the initial ones, and not cold without its having been said
        self.noted = 0  # of a snapshot: the updates in the layer's history

    def __repr__(self) -> str:
        channels = "unknown" if self.mean is None else " x ".join(map(str, self.mean.shape))
        return f"RunningStatistics({channels} channels, num_updates={self.num_updates})"

    @property
    def updates(self) -> NDArray[np.int64]:
        """Updates of each channel."""
        return cast("NDArray[np.int64]", self.num_updates - self.missed_updates)

    def untouched_names(self) -> tuple[str, ...]:
        """The statistics that are still what every layer begins with, in some channel."""
        never = (self.updates == 0) & (self.initial_weight > 0)
        initial = {"running_mean": (self.mean, 0), "running_var": (self.var, 1)}
        return tuple(
            name
            for name, (array, value) in initial.items()
            if array is None or (never.any() and name not in self.assigned and (array[never] == value).all())
        )

    def untouched(self) -> Mask:
        """The channels that nothing is known of: neither updated nor assigned nor written."""
        return cast(Mask, (self.updates == 0) & (self.initial_weight > 0) & bool(self.untouched_names()))

    # ---- a step ----

    def effective_decay(self, settings: Settings) -> float | Vector:
        """How much the old value weighs in the next update of a schedule."""
        schedule = cast(float, settings.decay), settings.warmup, settings.zero_debias
        return _each(lambda t: _scheduled(*schedule, t), self.num_updates - self._missed)

    def renorm(self, settings: Settings, by_batch: bool, updating: bool) -> tuple[Any, Any]:
        """The ``renorm`` of a call, and what is to be called after it, or None. Without a reference in every
        channel it is plain."""
        limits: dict[str, Any] = dict(settings.renorm or {})
        decay, mean, std = limits.pop("decay"), self.renorm_mean, self.renorm_std
        if not self.known:
            unknown = self.untouched() if mean is None else (mean == 0) & (std == 1)
            self.known = not unknown.any()
        plainly = not (by_batch and self.known)
        settle = None
        if mean is None:  # the running pair is the reference, as it is before its update
            if plainly or updating:
                return None if plainly else limits, None
            mean, std = self.mean, np.sqrt(self.var.astype(np.float64) + settings.eps)
        elif plainly:
            limits = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}
        if updating:  # the first batch becomes the reference, where there is none
            limits["decay"] = decay if self.known else 0.0
            if not (self.known or unknown.all()):
                old = mean.astype(np.float64), std.astype(np.float64)
                settle = partial(self._average, ~unknown, decay, *old)
        return {**limits, "mean": mean, "std": std}, settle

    def _average(self, known: Mask, decay: float, mean: Vector, std: Vector) -> None:
        """Of channels that had a reference, `mean` and `std`: its average with the batch's, in its place."""
        for own, old in ((self._renorm_mean, mean), (self._renorm_std, std)):
            average = decay * old + (1 - decay) * own
            np.copyto(own, average, casting="same_kind", where=known & (own != old))

    def count(self, saved: Any, values: Any, decay: Any, ddof: int, settle: Any) -> None:
        """Count the batch of a forward pass that had these statistics for its target. Cannot fail.

        `values` is the number of each channel, None if `saved` must be asked. `decay` is the effective one,
        None for a cumulative average. `settle` is what `renorm` wants to be called, or None.
        """
        if settle is not None:
            settle()
        if values is None or not saved.updated:
            counts = entered(saved, ddof).reshape(-1, *self.mean.shape)
            values = _merged(counts.sum(axis=0))  # over the parts
        took = values > 0
        if not saved.updated:
            self.num_skipped += bool(np.any(took))
            return
        if decay is None:
            decay = self._values / np.maximum(self._values + values, 5e-324)
        self.num_updates += 1
        self._values = self._values + values
        if took is True:  # every channel alike
            self._weight = self._weight * decay
        else:
            self._weight = _merged(np.where(took, self._weight * decay, self._weight))
            self._values, self._missed = _merged(self._values), _merged(self._missed + ~took)

    # ---- given statistics ----

    def allocate(self, mean: Array, var: Array, reference: bool) -> None:
        """Begin with a channel count."""
        self._mean, self._var = mean, var
        if reference:
            self._renorm_mean, self._renorm_std = np.zeros_like(mean), np.ones_like(var)

    def forget(self) -> None:
        """Be as before a channel count was known."""
        self.__init__()  # type: ignore[misc]

    def mark_assigned(self, *names: str) -> None:
        """Statistics that were given count as known, once both were. Other names do not matter."""
        if any(name in STATISTICS for name in names):
            self.assigned = tuple(n for n in STATISTICS if n in names or n in self.assigned)
            self._weight = 0.0 if self.assigned == STATISTICS else self._weight
            self.known = self.trusted = False

    def replace(
        self, mean: Array, var: Array, std: Array, num_values: Array, num_updates: int, known: Mask
    ) -> None:
        """Put other statistics in place of these, in the channels that are known of them. Cannot fail.

        `var` has the layer's ddof, `std` is the reference of batch renormalisation.
        """
        pairs = {"_mean": mean, "_var": var, "_renorm_mean": mean, "_renorm_std": std}
        for name, new in pairs.items():
            if (own := getattr(self, name)) is not None:
                np.copyto(own, new, casting="same_kind", where=known)
        self.restore(
            num_updates=num_updates,
            num_values=np.where(known, num_values, self._values),
            initial_weight=np.where(known, 0.0, self._weight),
            missed_updates=np.where(known, 0, num_updates - self.updates),
        )

    def restore(self, **counters: Any) -> None:
        """Set counters by their public names: numbers, or arrays with one per channel."""
        places = {"num_values": "_values", "initial_weight": "_weight", "missed_updates": "_missed"}
        for name, value in counters.items():
            setattr(self, places.get(name, name), copy.copy(_merged(np.asarray(value))))
        self.assigned = ()
        self.known = self.trusted = False

    # ---- copies ----

    def copy(self) -> RunningStatistics:
        """The same statistics and counters, apart."""
        return copy.deepcopy(self)

    def take(self, other: RunningStatistics) -> None:
        """Become like `other`, in the arrays of this one; ValueError if that has others."""
        if other.form != self.form:
            raise ValueError(f"snapshot has {other.form}, expected {self.form}: it is that of another layer")
        for name in self.__slots__[1:]:
            own, value = getattr(self, name), getattr(other, name)
            if name in ("_mean", "_var", "_renorm_mean", "_renorm_std") and own is not None:
                np.copyto(own, value)
            else:
                setattr(self, name, copy.copy(value))

    @property
    def form(self) -> str:
        """What arrays these are, in words."""
        if self.mean is None:
            return "statistics of an unknown channel count"
        own = ", with a reference of batch renormalisation" if self.renorm_mean is not None else ""
        return f"statistics of shape {self.mean.shape} of {self.mean.dtype}{own}"
