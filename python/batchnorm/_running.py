"""Running statistics: how much the old value weighs at a step, and the step itself.

Every schedule is one number per step, the effective decay: the running statistics are always
``decay * running + (1 - decay) * batch``, whatever the schedule. The layer asks `scheduled` for that number
and hands it to the same functions as a plain decay.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _args, _core

__all__ = ["effective_decay", "update_running"]

Array = NDArray[Any]


def scheduled(
    decay: float | None, warmup: bool, zero_debias: bool, updates: int, samples: float, count: float
) -> float:
    """The effective decay; arguments are checked already. `updates` and `samples` do not count this step."""
    if decay is None:
        return samples / (samples + count)
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


def updates_until(weight: float, decay: float, warmup: bool = False, updates: int = 0) -> float:
    """How many updates, after `updates` so far, take the initial values down to a share `weight` of what they
    weigh now."""
    more, left = 0, 1.0
    while warmup and left > weight and (1 + updates + more) / (10 + updates + more) < decay:
        left *= (1 + updates + more) / (10 + updates + more)
        more += 1
    if left <= weight:
        return more
    if decay == 0:
        return more + 1
    if decay == 1:
        return math.inf
    return more + max(0, math.ceil(math.log(weight / left) / math.log(decay) - 1e-9))


def check_schedule(decay: object, warmup: object, zero_debias: object) -> tuple[float | None, bool, bool]:
    """The three options of a schedule, checked, also against each other."""
    number = None if decay is None else _args.check_decay(decay)
    early = _args.check_flag(warmup, "warmup")
    debiased = _args.check_flag(zero_debias, "zero_debias")
    if early and debiased:
        raise ValueError(
            "warmup and zero_debias are both True, two ways to be rid of the initial values: drop one of them"
        )
    for name, wanted in (("warmup", early), ("zero_debias", debiased)):
        if number is None and wanted:
            raise ValueError(
                f"{name} is True and decay is None: a cumulative average holds nothing of the initial "
                f"values; drop {name}, or give a decay"
            )
    return number, early, debiased


def check_on_nonfinite(value: object) -> str:
    """What to do with NaN and Inf in running statistics: the word, checked."""
    expected = "'propagate', 'raise' or 'skip'"
    if not isinstance(value, str):
        raise TypeError(f"on_nonfinite is {_args._kind(value)}, expected {expected}")
    if value not in ("propagate", "raise", "skip"):
        raise ValueError(f"on_nonfinite is {value!r}, expected {expected}")
    return str(value)


def check_updates(value: object) -> int:
    """A number of updates: an int >= 0."""
    updates = _args.check_int(value, "updates", "an int >= 0, the updates before this one")
    if updates < 0:
        raise ValueError(f"updates is {updates}, expected an int >= 0, the updates before this one")
    return updates


def check_amount(value: object, name: str, *, zero: bool) -> float:
    """A number of values per channel, or, with weights, their sum: finite and > 0, or >= 0 with `zero`."""
    expected = f"a finite number {'>=' if zero else '>'} 0, values per channel"
    if value is None:
        raise TypeError(f"{name} is None, expected {expected}: with decay=None it decides the decay")
    number = _args._real(value, name, expected)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} is {number:g}, expected {expected}")
    return number


def effective_decay(
    decay: float | None,
    *,
    updates: int = 0,
    warmup: bool = False,
    zero_debias: bool = False,
    samples: float | None = None,
    count: float | None = None,
    **unknown: NoReturn,
) -> float:
    """The weight of the old running value at one step of a schedule.

    Parameters
    ----------
    decay : float in [0, 1] or None
        The decay that the schedule tends to. None: a cumulative average, every value seen weighs the same.
    updates : int
        Updates before this one; matters with ``warmup`` and ``zero_debias``.
    warmup : bool
        ``min(decay, (1 + updates) / (10 + updates))``: early batches weigh more [1]_.
    zero_debias : bool
        The first batch replaces the initial value, and the weights of the batches seen always add up to 1
        [2]_: right for any initial value, and for mean and variance alike.
    samples, count : float, optional
        For ``decay=None`` alone: values per channel seen before, and in this batch.

    Returns
    -------
    float
        For the ``decay=`` of :func:`batch_norm_train` or :func:`update_running`.

    Raises
    ------
    TypeError, ValueError
        Wrong kinds or values; ``warmup`` with ``zero_debias``, or one of them with ``decay=None``;
        ``samples`` or ``count`` with a decay, or absent without one.

    Notes
    -----
    Cumulative: ``samples / (samples + count)``. Zero-debiased, with t updates before:
    ``decay * (1 - decay^t) / (1 - decay^(t + 1))``, which makes the running value
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
    >>> batchnorm.effective_decay(None, samples=300, count=100)
    0.75
    """
    if unknown:
        _args.reject_keywords(effective_decay, unknown)
    number, early, debiased = check_schedule(decay, warmup, zero_debias)
    step = check_updates(updates)
    if number is not None:
        _no_samples(samples, count)
        return scheduled(number, early, debiased, step, 0, 0)
    seen, batch = check_amount(samples, "samples", zero=True), check_amount(count, "count", zero=False)
    return scheduled(None, False, False, step, seen, batch)


def _no_samples(samples: object, count: object = None) -> None:
    for name, value in (("samples", samples), ("count", count)):
        if value is not None:
            raise ValueError(
                f"{name} is {_args._kind(value)} and decay is a number; values seen decide the weight only "
                f"with decay=None: drop one of them"
            )


def update_running(
    running_mean: Array,
    running_var: Array,
    mean: Array,
    var: Array,
    *,
    decay: float | None = None,
    count: int | None = None,
    samples: float | None = None,
    ddof: int = 1,
    **unknown: NoReturn,
) -> None:
    """Move running statistics towards those of a batch, in place.

    Parameters
    ----------
    running_mean, running_var : writable array of float32 or float64, shape (C,)
        Updated in place; they must not share memory.
    mean, var : array of float32 or float64, shape (C,)
        The batch's mean and population variance (``ddof=0``), as :func:`moments` gives them.
    decay : float in [0, 1], optional
        Weight of the OLD running value; :func:`effective_decay` gives that of other schedules. None: a
        cumulative average, which needs ``samples``.
    count : int
        Number of values per channel that ``mean`` and ``var`` came from. Required.
    samples : float, optional
        For ``decay=None``: values per channel seen before this batch, 0 at first; the caller adds ``count``
        to it after the call.
    ddof : 0 or 1
        The running variance receives ``var * count / (count - ddof)``.

    Raises
    ------
    TypeError, ValueError
        Wrong kinds, dtypes, shapes or values; both or neither of ``decay`` and ``samples``. Nothing is
        changed then.

    Notes
    -----
    ``running = decay * running + (1 - decay) * batch`` in float64, rounded once to the array's dtype. With
    ``decay=0`` the old value does not count at all, even if it is NaN. A cumulative average uses
    ``samples / (samples + count)``, so that every value weighs the same, however large its batch.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> running_mean, running_var = np.zeros(3), np.ones(3)
    >>> batchnorm.update_running(running_mean, running_var, np.ones(3), np.full(3, 2.0), decay=0.9, count=5)
    >>> running_mean.shape, float(running_var[0])
    ((3,), 1.15)
    """
    if unknown:
        _args.reject_keywords(update_running, unknown)
    if decay is not None:
        _no_samples(samples)
    elif samples is None:
        raise TypeError(
            "decay is None, expected a number in [0, 1], the weight of the old value; or, for a cumulative "
            "average, give samples=, the values per channel seen before"
        )
    weight = 0.0 if decay is None else decay
    arguments = _args.running_update(running_mean, running_var, mean, var, weight, count, ddof)
    if decay is None:
        n = arguments[5]
        weight = scheduled(None, False, False, 0, check_amount(samples, "samples", zero=True), n)
        arguments = (*arguments[:4], weight, *arguments[5:])
    _core.update_running(*arguments)


def first_nonfinite(mean: Array, var: Array) -> tuple[str, int, float] | None:
    """The first NaN or Inf of two vectors: its name, channel and value."""
    for name, vector in (("mean", mean), ("variance", var)):
        good = np.isfinite(vector)
        if not good.all():
            channel = int(good.argmin())
            return name, channel, float(vector[channel])
    return None
