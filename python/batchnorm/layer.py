"""The layer: an object that holds parameters, running statistics and what backward needs.

All work on data is in the functions of ``functional``; here are flags, counters and arrays of one value per
channel. A call that fails leaves the layer as it was: whatever it changes, it changes after the function has
returned.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
from numpy.typing import DTypeLike

from . import _core, _hints, functional
from ._arrays import as_array
from .diagnose import Diagnosis, History, findings
from .diagnose.history import plot
from .diagnose.recalibrate import collected, population, recalibrating
from .distributed import tell
from .fold import fold
from .functional import Saved, TrainResult, batch_norm_backward
from .io import layer_state
from .moments import Moments
from .parameter import Parameter
from .running import STATISTICS, ColdStatisticsWarning, RunningStatistics
from .settings import Settings, UnsaidAxis, checked_dtype, checked_vector, flag, integer, kind, real, word
from .typing import (
    ActivationName,
    Array,
    CallOptions,
    ChannelAxis,
    DataFormatName,
    Group,
    Mask,
    Observe,
    OnNonfinite,
    RenormOptions,
    StatsName,
    Vector,
)  # fmt: skip

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Applied", "BatchNorm"]

_T = TypeVar("_T")
Initial = float | Array | Callable[[Any], "float | Array"]
Share = Literal["params", "stats"]

_INITIAL = {"gamma": 1.0, "beta": 0.0, "running_mean": 0.0, "running_var": 1.0}
_UNSAID = UnsaidAxis(1)
# Calls of an attribute pass many keywords without a dict in between, unless the compiler sees an import.
_functions = functional
_HINDRANCES = {
    "using": "inside recalibrating(), which replaces the statistics: drop it",
    "frozen": "and the layer is frozen: drop it, or call unfreeze() first",
    "paused": "inside no_update(): drop one of them",
}
_TWICE = "y, saved = bn(x, return_saved=True) and bn.backward(dy, saved)"
_UNKNOWN: Any = object()  # whether other processes wait for this one
# Why there is nothing to go back through.
_NONE_YET = "backward before any forward: call y = bn(x) first, then bn.backward(dy)"
_AGAIN = f"use {_TWICE}, with accumulate=True from the second one on"
_USED = f"backward came twice after one forward: call bn(x) again; for a layer used several times {_AGAIN}"
_EVAL = f"the last call was in eval mode, which keeps nothing: use {_TWICE}, or freeze() the layer"
_RETURNED = "the last call returned what backward needs: pass it, bn.backward(dy, saved)"
_ADD = (
    "saved is of a forward that came before the last backward of this layer, whose gradients are still in "
    "dgamma and dbeta: say accumulate=True to add to them, or accumulate=False to replace them"
)


def _saying_the_name(method: Any) -> Any:
    """A method of a layer whose errors say the layer's name."""

    @wraps(method)
    def named(layer: BatchNorm, *arguments: Any, **options: Any) -> Any:
        try:
            return method(layer, *arguments, **options)
        except Exception as error:
            layer._explain(error)
            raise

    return named


# ---- attributes of a layer ---------------------------------------------------------------------------------


class _Part(Generic[_T]):
    """A part of the layer's state as an attribute: read-only, or assignable to what a check returns."""

    def __init__(self, doc: str, check: Callable[[str, Any], Any] | None = None, path: str = "") -> None:
        self.__doc__, self._check, self._path = doc, check, path

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._get = name, attrgetter(self._path or name)

    def __get__(self, layer: BatchNorm | None, owner: type | None = None) -> _T:
        return cast(_T, self if layer is None else self._get(layer._state))

    def __set__(self, layer: BatchNorm, value: _T) -> None:
        if self._check is None:
            raise AttributeError(f"{self._name} of a BatchNorm is read-only")
        setattr(layer._state, self._name, self._check(self._name, value))


def _option(name: str, assignable: bool) -> property:
    """A setting as an attribute. Assigning replaces the settings, where their table allows it."""

    def assign(layer: BatchNorm, value: Any) -> None:
        layer._state.settings = layer.settings.changed(name, value)

    doc = f"``settings.{name}``{'; may be assigned' * assignable}."
    return property(lambda layer: copy.copy(getattr(layer.settings, name)), assign, doc=doc)


class _Vector(_Part["Array | Any"]):
    """One value per channel. Assigning copies into the layer's array, which optimisers hold."""

    def __set__(self, layer: BatchNorm, value: Array) -> None:
        current = self._get(layer._state)
        if current is None:
            unknown = "its channel count is not known yet, build it with BatchNorm(num_features)"
            why = unknown if layer.num_features is None else "it was built so"
            raise ValueError(f"{self._name} cannot be assigned, the layer has none ({why})")
        if value is not current:  # it is the same array after `layer.gamma -= step`
            np.copyto(current, checked_vector(self._name, value, current.shape, current.dtype, cast=True))
        layer.running.mark_assigned(self._name)
        if self._name in ("renorm_mean", "renorm_std"):
            layer.running.known = True  # a reference, whatever its values


@dataclass(slots=True, eq=False)
class _State:
    """What a layer consists of. A class of its own, so that calls need not go through ``__getattr__``."""

    settings: Settings
    name: str | None
    dtype: np.dtype[Any]
    initial: dict[str, Any] | None  # until the vectors are made
    history: History | None = None
    running: RunningStatistics = field(default_factory=RunningStatistics)
    gamma: Any = None
    beta: Any = None
    training: bool = True
    frozen: tuple[str, ...] = ()  # of "statistics", "parameters"
    paused: bool = False  # inside no_update()
    using: tuple[StatsName, Observe | None] | None = None
    # What forwards and backwards have left.
    saved: Saved | str = _NONE_YET  # of the last forward, or why there is none
    forwards: int = 0
    graded: int = 0  # forwards at the time of the last backward
    group: Group | None = None
    token: object = field(default_factory=object)  # what a Saved of this layer has for its owner
    dgamma: Any = None
    dbeta: Any = None
    dresidual: Any = None


class _Pair(NamedTuple):
    y: Array
    state: dict[str, Array]


class Applied(_Pair):
    """Result of ``bn.apply``: ``y, state = applied``.

    Attributes
    ----------
    y : array like x
    state : dict of str to ndarray
        The state after the call, as ``state_dict`` gives it.
    saved : Saved
        For ``batch_norm_backward(dy, applied.saved)``.
    """

    saved: Saved


# ---- checks ------------------------------------------------------------------------------------------------


def _name(name: str, value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and value):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} is {kind(value)}, expected a str that is not empty, or None")
    if value is not None and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ValueError(f"{name} is {value!r}, expected what a file can hold: neither NUL nor surrogates")
    return value


def _group(name: str, value: Any) -> Any:
    if value is not None:
        _core.check_group(value)
    return value


def _any(name: str, value: Any) -> Any:
    return value


_stats = word("batch", "running")


def _channel_shape(num_features: Any, channel_axis: ChannelAxis) -> tuple[int, ...]:
    """The lengths of the channel axes that `num_features` says."""
    shape = num_features if isinstance(num_features, tuple) else (num_features,)
    if len(shape) != (len(channel_axis) if isinstance(channel_axis, tuple) else 1):
        expected = f"an int for each channel_axis, {channel_axis}"
        raise ValueError(f"num_features is {num_features}, expected {expected}")
    expected = f"an int from 1 to {2**31}, or None to learn it from x"
    return tuple(integer("num_features", n, 1, 2**31, expected) for n in shape)


def _checked_initial(value: Any, settings: Settings) -> dict[str, Any]:
    """The option `initial`: first values of vectors that the layer has, by name."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"initial is {kind(value)}, expected a mapping such as {{'gamma': 0.5}}")
    absent = {"gamma": not settings.scale, "beta": not settings.center}
    names = [name for name in _INITIAL if not absent.get(name)]
    for name in set(value or ()) - set(names):
        raise ValueError(f"initial names {name!r}, expected names among {', '.join(names)}")
    return dict(value or {})


def _channels_seem_last(x: tuple[int, ...]) -> bool:
    """Whether a shape looks like (N, ..., C): images are square, or large with 1, 3 or 4 channels."""
    if len(x) < 4:
        return False
    inner, last = x[1:-1], x[-1]
    square, few = len(set(inner)) == 1 and last != inner[0], last in (1, 3, 4) and min(inner, default=0) >= 8
    return square or few


def _check_sum(name: str, old: Array | None, parameter: Array | None) -> None:
    """An error if a gradient cannot be added to the last one."""
    if old is not None and parameter is not None and old.shape != parameter.shape:
        shapes = f"shape {old.shape} of the last backward and {parameter.shape} of this one"
        raise ValueError(f"accumulate is True and {name} has {shapes}, expected the same shape")


def _sum(old: Array | None, new: Array | None) -> Array | None:
    """Accumulated gradients."""
    return new if old is None else old if new is None else old + new


# ---- the layer ---------------------------------------------------------------------------------------------


class BatchNorm:
    """Batch normalization as a layer: normalise each channel over the batch, learn a scale and a shift.

    Parameters
    ----------
    num_features : int or tuple of int, optional
        Number of channels C; with several channel axes their lengths. None: learned from the first input.
    name : str, optional
        What warnings, reports, errors and ``parameters()`` call the layer, for example "conv1.bn".
    decay : float or None, default 0.9
        Weight of the OLD value in the running statistics, in [0, 1]:
        ``running = decay * running + (1 - decay) * batch``. None: a cumulative average in which every value
        seen weighs the same. May be assigned.
    warmup : bool, default False
        Early batches weigh more: ``min(decay, (1 + t) / (10 + t))`` after t updates.
    zero_debias : bool, default False
        The initial values weigh nothing from the first batch on; see :func:`effective_decay`. Not together
        with `warmup`, and neither with ``decay=None``. Statistics that were assigned count as initial values
        here and with ``decay=None``: to go on from them use a plain decay.
    eps : float, default 1e-5
        Added to the variance inside the square root; finite and >= 0. May be assigned.
    channel_axis : int or tuple of int, default 1
        The axis of the input that holds the channels; negative counts from the end. Several axes give each
        activation statistics of its own.
    data_format : str, optional
        Another way to say `channel_axis`, which also fixes the rank: "NC", "NCL", "NLC", "NCHW", "NHWC",
        "NCDHW", "NDHWC", or, for any rank, "channels_first", "channels_last". Not together with it.
    scale, center : bool, default True
        Whether the layer has gamma (scale) and beta (shift). Without them they may be given with a call.
    running_ddof : {1, 0}
        The estimator kept in `running_var`: var*n/(n-1) (1, as PyTorch and the paper) or var (0, as Keras and
        ONNX). Batches are always normalised with the population variance.
    activation : {None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"}
        Applied to the result (plus the residual, if there is one), in the same pass.
    slope : float, optional
        leaky_relu's factor for values below 0; 0.01 if absent. An error with another activation.
    renorm : bool or mapping, optional
        Batch renormalisation in training: limits ``rmin``, ``rmax``, ``dmax`` as in
        :func:`batch_norm_train`, such as ``{"rmax": 3.0, "dmax": 5.0}``; True: none. With ``decay`` among
        them the reference is a pair of its own, `renorm_mean` and `renorm_std`. As long as a channel has no
        reference, batches are normalised plainly. The limits may be assigned.
    virtual_batch_size : int, optional
        Normalise parts of so many samples each by its own statistics in training. The running statistics
        receive the parts' average in one update. May be assigned.
    keep : {"x", "y"}
        The tensor that is kept for ``backward``. With "y" and ``out=x`` the layer needs no memory of its own;
        y must not be changed before backward. "y" takes leaky_relu or no activation, and no residual. May be
        assigned.
    group : Group, optional
        Other processes that hold parts of each batch, as in :func:`batch_norm_train`: every call in training,
        and whatever else normalises by the batch or updates, is made by all of them, and so are the backward
        calls after it. Their parameters and running statistics stay the same. It is no part of the state. A
        layer with a group is neither pickled nor copied; ``clone`` shares it. May be assigned.
    on_nonfinite : {"propagate", "raise", "skip"}
        What happens when NaN or Inf would enter the running statistics: they take it (it stays in its
        channel); the call is a ValueError that changes nothing; or the batch is normalised, but left out of
        the statistics and counted in ``running.num_skipped``. May be assigned.
    allow_initial_statistics : bool, default False
        Whether eval calls may use statistics that no training forward has updated, and cold ones without a
        warning. May be assigned.
    initial : mapping, optional
        First values of ``gamma``, ``beta``, ``running_mean``, ``running_var``: a number, a float32 or float64
        array of shape (C,), or a function of `num_features` that returns either. Defaults 1, 0, 0, 1. Both
        running statistics given count as known.
    history : int, optional
        Keep the statistics of up to so many updates, as ``record_history`` does, for ``plot_statistics``.
        With `group` on every process or on none: a call with ``stats="running", update=True`` is measured by
        one exchange more.
    dtype : {numpy.float32, numpy.float64}
        Of parameters and running statistics. Inputs may have any supported dtype whatever this is.

    Attributes
    ----------
    settings : Settings
        All options from decay to allow_initial_statistics, checked; each is an attribute of the layer, too.
    gamma, beta : ndarray of `dtype`, shape (C,), or None
        Scale and shift, 1 and 0 at first. None without `scale` / `center`, and while the channel count is
        unknown. Assigning a float32 or float64 array copies into the layer's array, so whoever holds that
        sees the new values.
    running : RunningStatistics
        Running statistics and their counters.
    running_mean, running_var : ndarray of `dtype`, shape (C,), or None
        ``running.mean`` and ``running.var``, 0 and 1 at first; updated in place by training forwards.
        Assigning both makes them known.
    dgamma, dbeta : ndarray, shape (C,), or None
        Gradients of the last ``backward``, each time new arrays; None before it and without `scale` /
        `center`. Of a gamma or beta given with the call they have that one's shape.
    dresidual : ndarray or None
        Gradient of the last ``backward`` with respect to the residual, if the forward had one.
    training : bool
        What a call without ``training=`` does; True at first.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or out of range, or an unknown keyword, with its translation if another
        library has it.

    Warns
    -----
    UserWarning
        A layer that learns its channel count on axis 1 of images whose last axis looks like the channels.

    Notes
    -----
    A training call uses :func:`batch_norm_train`, an eval call :func:`batch_norm` with the running
    statistics. An eval call writes nothing to statistics or counters. It raises RuntimeError while the
    statistics of a channel are the initial ones; the first one with cold statistics warns
    (ColdStatisticsWarning). A call that raises changes nothing at all.

    Which statistics normalise and whether they are updated can be told apart, in order of precedence: per
    call (``stats=``, ``update=``), ``freeze()``, ``no_update()``, per call ``training=``, and the mode.

    A call in training keeps its input alive until its ``backward`` or the next call. ``backward`` uses it up.
    A layer that is used several times in a step returns what backward needs, ``y, saved = bn(x,
    return_saved=True)``; from the second ``backward(dy, saved)`` on say ``accumulate=True``.

    One thread trains a layer. Eval calls may come from several threads while none trains.

    Settings and statistics are saved (``save``, ``state_dict``), mode and gradients are not. ``parameters``,
    ``buffers``, ``state_dict`` and ``save`` raise RuntimeError while the channel count is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm
    >>> bn = BatchNorm(16, zero_debias=True, name="bn1")
    >>> x = np.random.default_rng(0).normal(size=(8, 16, 5, 5)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> y.shape, dx.shape, [(p.name, p.value.shape, p.grad.shape) for p in bn.parameters()]
    ((8, 16, 5, 5), (8, 16, 5, 5), [('bn1.gamma', (16,), (16,)), ('bn1.beta', (16,), (16,))])
    >>> bn
    BatchNorm(16, name='bn1', decay=0.9, zero_debias=True, eps=1e-05, channel_axis=1, activation=None,
      num_updates=1, training=True)
    >>> bn.eval()(x[:1]).shape
    (1, 16, 5, 5)
    """

    __slots__ = ("__weakref__", "_state")

    _state: _State

    settings = _Part[Settings]("All options from decay to allow_initial_statistics, a frozen dataclass.")
    running = _Part[RunningStatistics]("The running statistics and their counters.")
    dtype = _Part["np.dtype[Any]"]("Data type of parameters and running statistics.")
    history = _Part["History | None"]("Statistics of past updates, if recorded; see ``record_history``.")
    name = _Part["str | None"]("What messages call the layer, or None. May be assigned.", _name)
    group = _Part["Group | None"]("The processes that hold parts of each batch. May be assigned.", _group)
    training = _Part[bool]("What a call without ``training=`` does. May be assigned.", flag)

    gamma = _Vector("Scale, one value per channel, or None.")
    beta = _Vector("Shift, one value per channel, or None.")
    running_mean = _Vector("Moving average of the batch means, ``running.mean``.", path="running.mean")
    running_var = _Vector("Moving average of the batch variances, ``running.var``.", path="running.var")
    renorm_mean = _Vector(
        "Reference mean of renorm with a decay of its own, or None.", path="running.renorm_mean"
    )
    renorm_std = _Vector(
        "Reference deviation of renorm with a decay of its own, or None.", path="running.renorm_std"
    )
    dgamma = _Part["Array | Any"]("gamma's gradient of the last backward, or None.", _any)
    dbeta = _Part["Array | Any"]("beta's gradient of the last backward, or None.", _any)
    dresidual = _Part["Array | Any"]("The residual's gradient of the last backward, or None.", _any)

    @_core.entrance
    def __init__(
        self, num_features: int | tuple[int, ...] | None = None, *, name: str | None = None,
        decay: float | None = 0.9, warmup: bool = False, zero_debias: bool = False, eps: float = 1e-5,
        channel_axis: ChannelAxis = _UNSAID, data_format: DataFormatName | None = None, scale: bool = True,
        center: bool = True, running_ddof: int = 1, activation: ActivationName | None = None,
        slope: float | None = None, renorm: RenormOptions | bool | None = None,
        virtual_batch_size: int | None = None, keep: Literal["x", "y"] = "x", group: Group | None = None,
        on_nonfinite: OnNonfinite = "propagate", allow_initial_statistics: bool = False,
        initial: Mapping[str, Initial] | None = None, history: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:  # fmt: skip
        given = dict(locals())
        settings = Settings(**{each.name: given[each.name] for each in fields(Settings)})
        values = _checked_initial(initial, settings)
        self._state = _State(settings, _name("name", name), checked_dtype(dtype), values)
        self._state.group = _group("group", group)
        self.record_history(history)
        if num_features is not None:
            self._allocate(_channel_shape(num_features, settings.channel_axis))

    @property
    def num_features(self) -> int | tuple[int, ...] | None:
        """Number of channels, with several channel axes their lengths; None until it is known."""
        mean = self.running.mean
        return None if mean is None else mean.shape if mean.ndim > 1 else mean.size

    @property
    def frozen(self) -> bool:
        """Whether calls use the running statistics and update nothing, in training too; see ``freeze``."""
        return bool(self._state.frozen)

    def parameters(self) -> list[Parameter]:
        """What an optimiser trains: gamma and beta, as far as the layer has them, with their gradients.

        They are views: their ``grad`` is always the latest, so one list serves the whole training. After
        ``freeze(parameters=True)`` there are none. :func:`weight_decay_groups` tells which to decay.

        Returns
        -------
        list of Parameter
        """
        self._known("parameters()")
        own = {"gamma": self.scale, "beta": self.center}
        return [Parameter(self, n) for n in own if own[n] and "parameters" not in self._state.frozen]

    def buffers(self) -> dict[str, Array]:
        """The running statistics, by name: the layer's own arrays, which no optimiser should touch.

        To give them values, assign (``bn.running_mean = array``). Then the layer knows that they are known.

        Returns
        -------
        dict of str to ndarray
            ``running_mean`` and ``running_var``, shape (C,), of the layer's dtype.
        """
        self._known("buffers()")
        return {name: getattr(self, name) for name in STATISTICS}

    def scale_shift(self) -> tuple[Vector, Vector]:
        """What a call in eval mode does to each channel: ``x * scale + shift``, then the activation.

        Returns
        -------
        scale, shift : ndarray of float64, shape (C,)

        Raises
        ------
        RuntimeError
            The running statistics are unknown.
        ValueError
            They hold NaN, Inf or a negative variance, or ``var + eps`` is 0.
        """
        self._known("scale_shift()")
        shape = self.running.mean.shape
        scale, shift = self._folded(np.ones(self.running.mean.size), None, 0, 1)
        return scale.reshape(shape), shift.reshape(shape)

    @_core.entrance
    def fold(
        self, weight: Array, bias: Array | None = None, *, out_axis: int | tuple[int, ...], groups: int = 1,
        activation: ActivationName | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Weights of the layer before this one that do what both do in eval mode; see :func:`batchnorm.fold`.

        Parameters
        ----------
        weight : array of float16, float32, float64 or bfloat16
            As in :func:`batchnorm.fold`.
        bias : array of float32 or float64, shape (C,), optional
            As there.
        out_axis : int or tuple of int
            As there.
        groups : int, default 1
            As there.
        activation : str, optional
            This layer's activation, if it has one: it says that you apply that behind the folded weights.

        Returns
        -------
        weight, bias : array

        Raises
        ------
        TypeError, ValueError
            As :func:`batchnorm.fold`, or another `activation` than the layer's.
        RuntimeError
            The running statistics are unknown.
        """
        self._known("fold()")
        if activation != self.activation:
            expected = f"expected that of this layer, {self.activation!r}"
            why = "it says that you apply it behind the folded weights"
            raise ValueError(f"activation is {activation!r}, {expected}: {why}")
        return self._folded(weight, bias, out_axis, groups)

    def _folded(self, weight: Array, bias: Array | None, out_axis: Any, groups: int) -> tuple[Array, Array]:
        self._check_statistics()
        if (invalid := findings.invalid(self)) is not None:
            raise ValueError(str(invalid))
        mean, var = self.running.mean.ravel(), self.running.var.ravel()
        gamma, beta = (None if v is None else v.ravel() for v in (self.gamma, self.beta))
        return fold(weight, bias, mean, var, gamma, beta, eps=self.eps, out_axis=out_axis, groups=groups)

    # ---- modes ---------------------------------------------------------------------------------------------

    @_core.entrance
    def train(self, mode: bool = True) -> Self:
        """Let calls use and update statistics as in training (or not, with False); return the layer.

        A layer that is frozen stays so.

        Parameters
        ----------
        mode : bool, default True
            False does what ``eval()`` does.

        Returns
        -------
        BatchNorm
            This layer.
        """
        return self._change(training=flag("mode", mode))

    def eval(self) -> Self:
        """Let calls normalise with the running statistics and change nothing; return the layer.

        Returns
        -------
        BatchNorm
            This layer.
        """
        return self.train(False)

    @_core.entrance
    def freeze(self, *, parameters: bool = False) -> Self:
        """Let calls use the running statistics and update nothing, in training mode too; return the layer.

        For fine-tuning with the statistics of before. Calls in training mode still keep what ``backward``
        needs, which then takes the statistics as constants. Holds until ``unfreeze()``, whatever ``train()``
        and ``eval()`` say, and for calls with ``training=True``. A call with ``stats="batch"`` has its way.

        Parameters
        ----------
        parameters : bool, default False
            Whether gamma and beta are frozen as well: ``parameters()`` then gives none, and ``backward``
            computes no gradients for them (None).

        Returns
        -------
        BatchNorm
            This layer.
        """
        both = flag("parameters", parameters)
        return self._change(frozen=("statistics", "parameters") if both else ("statistics",))

    def unfreeze(self) -> Self:
        """End what ``freeze`` began, for statistics and parameters; return the layer.

        Returns
        -------
        BatchNorm
            This layer.
        """
        return self._change(frozen=())

    def no_update(self) -> AbstractContextManager[Self]:
        """Inside this context no call updates the running statistics, in training either.

        For forwards that are repeated (gradient checkpointing) or only looked at. ``update=True`` at a call
        is an error there. For a whole network see :func:`batchnorm.no_update`.

        Returns
        -------
        context manager
            Of this layer.
        """
        return self._inside(paused=True)

    def using(
        self, stats: StatsName, observe: Observe | None = None, name: str | None = None
    ) -> AbstractContextManager[Self]:
        """Inside this context every call normalises with the same statistics and updates nothing.

        Neither the mode, freezing nor arguments of the call change that. Batch renormalisation is off, and
        running statistics are taken as they are, known or not. ``backward`` stays with the forward before.
        On an error a channel count that was learned inside is forgotten.

        Parameters
        ----------
        stats : {"batch", "running"}
        observe : callable, optional
            Called as ``done = observe(x, mask=..., lengths=..., lengths_axis=..., weights=...)`` before each
            call computes anything. ``done()`` is called after the call has succeeded.
        name : str, optional
            What errors inside call the layer, if it has no name.

        Returns
        -------
        context manager
            Of this layer.

        Raises
        ------
        RuntimeError
            Inside another such context of this layer.
        """
        if self._state.using is not None:
            why = "using() or recalibrating() inside another one of the same layer"
            raise RuntimeError(f"{why}: drop one of them")
        return self._inside(using=(_stats("stats", stats), observe), name=self.name or name)

    @contextmanager
    def _inside(self, **changes: Any) -> Iterator[Self]:
        before = {name: getattr(self._state, name) for name in changes}
        initial = self._state.initial
        try:
            yield self._change(**changes)
        except BaseException:
            self._unlearn(initial if "using" in changes else None)
            raise
        finally:
            self._change(**before)

    def _change(self, **changes: Any) -> Self:
        for name, value in changes.items():
            setattr(self._state, name, value)
        return self

    def _mode(self, training: Any, stats: Any, update: Any) -> tuple[bool, bool, bool, Group | None]:
        """What modes and arguments come to: normalise by the batch, update, keep what backward needs; group.

        Inside using() nothing is kept: the forward before it stays the one to go back through. Nor is the
        batch shared with other processes.
        """
        state = self._state
        mode = state.training if training is None else flag("training", training)
        learning = mode and not state.frozen
        by_batch = learning if stats is None else _stats("stats", stats) == "batch"
        updating = learning and not state.paused if update is None else flag("update", update)
        if update is not None and updating:
            for context, why in _HINDRANCES.items():
                if getattr(state, context):
                    raise ValueError(f"update is True {why}")
        if state.using is not None:
            return state.using[0] == "batch", False, False, None
        return by_batch, updating, mode, state.group

    # ---- forward and backward ------------------------------------------------------------------------------

    @overload
    def __call__(
        self, x: Array, *, return_saved: Literal[False] = False, **options: Unpack[CallOptions]
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, *, return_saved: Literal[True], **options: Unpack[CallOptions]
    ) -> TrainResult: ...

    @_core.entrance
    def __call__(
        self, x: Array, *, training: bool | np.bool_ | None = None, stats: StatsName | None = None,
        update: bool | np.bool_ | None = None, gamma: Array | None = None, beta: Array | None = None,
        residual: Array | None = None, mask: Mask | None = None, lengths: Array | None = None,
        lengths_axis: int | None = None, weights: Array | None = None, return_saved: bool = False,
        out: Array | None = None,
    ) -> Array | TrainResult:  # fmt: skip
        """Normalise `x`.

        Parameters
        ----------
        x : ndarray, rank >= 2, float32 / float64 / float16 / bfloat16
            Its channel axis must have `num_features` entries. A call in training keeps a reference to it for
            `backward`. In eval also an image of uint8, int16 or uint16.
        training : bool, optional
            For this call only: True normalises with the batch's own statistics and updates the running ones,
            False normalises with the running statistics and writes nothing. None: as the attribute `training`
            says.
        stats : {"batch", "running"}, optional
            The statistics that normalise, whatever the mode says. "running" together with an update means
            the running statistics as they are before it.
        update : bool, optional
            Whether the batch's statistics enter the running ones, whatever the mode says.
        gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
            Scale and shift of this call, for a layer without `scale` or `center`. ``backward`` leaves their
            gradients in `dgamma` and `dbeta`.
        residual : ndarray like x, optional
            Added before the activation, in the same pass. ``backward`` leaves its gradient in `dresidual`.
        mask : bool array, optional
            Which positions count, as in :func:`batch_norm_train`: True counts.
        lengths : int array of shape (N,), optional
            The same for padded sequences, as there.
        lengths_axis : int, optional
            The axis of the steps, as there.
        weights : array of floats or ints, optional
            How often positions count in the batch's statistics, as there.
        return_saved : bool, default False
            Return what ``backward(dy, saved)`` needs instead of keeping it: for a layer that is used several
            times in a step, and for gradients in eval mode.
        out : ndarray, optional
            Receives the result: shape and dtype of `x`, may be `x` itself. A backward pass then needs
            ``keep="y"``.

        Returns
        -------
        y : ndarray, shape and dtype of `x`
            `out` if given. With `return_saved` the pair ``y, saved``.

        Raises
        ------
        TypeError, ValueError
            `x`, `residual`, a mask or `out` of the wrong kind, dtype or shape; a flag that is no bool; one
            value per channel in training; ``update=True`` where a freeze or no_update() forbids it; NaN, Inf
            or a negative variance in the running statistics in eval.
        RuntimeError
            Running statistics are used that nothing has ever updated.
        """
        state, by_batch, settings, running = self._state, True, self._state.settings, self._state.running
        initial, saved, done, measured, renorm, settle = state.initial, None, None, None, None, None
        decay: Any = 1.0
        waiting: Any = _UNKNOWN
        try:
            by_batch, updating, keeping, group = self._mode(training, stats, update)
            waiting = group if by_batch or updating else None
            x = x if isinstance(x, np.ndarray) else as_array("x", x, False)
            if initial is not None or settings.data_format is not None or not (by_batch or running.trusted):
                self._prepare(x, not by_batch)
            if state.using is not None or state.history is not None:
                given = {"mask": mask, "lengths": lengths, "lengths_axis": lengths_axis, "weights": weights}
                done, measured = self._watch(x, updating and not by_batch, group, given)
            scale = state.gamma if gamma is None else self._given("gamma", "scale", gamma)
            shift = state.beta if beta is None else self._given("beta", "center", beta)
            mean, var = running.mean, running.var
            asked = return_saved is not False and flag("return_saved", return_saved)
            keep = settings.keep if asked or keeping else None
            if by_batch or updating or keep or weights is not None:
                if updating:
                    scheduled = settings.warmup or settings.zero_debias
                    decay = running.effective_decay(settings) if scheduled else settings.decay
                parts = settings.virtual_batch_size if by_batch or updating else None
                if settings.renorm is not None and state.using is None and (by_batch or updating):
                    renorm, settle = running.renorm(settings, by_batch, updating)
                waiting = None
                y, saved = _functions.batch_norm_train(
                    x, scale, shift, mean=None if by_batch else mean, var=None if by_batch else var,
                    running_mean=mean if updating else None, running_var=var if updating else None,
                    decay=decay, seen=running.seen if decay is None else None, eps=settings.eps,
                    channel_axis=settings.channel_axis, activation=settings.activation, slope=settings.slope,
                    residual=residual, mask=mask, lengths=lengths, lengths_axis=lengths_axis, weights=weights,
                    renorm=renorm, virtual_batch_size=parts, keep=keep, group=group,
                    on_nonfinite=settings.on_nonfinite, running_ddof=settings.running_ddof, out=out,
                )  # fmt: skip
            else:
                y = _functions.batch_norm(
                    x, mean, var, scale, shift, eps=settings.eps, channel_axis=settings.channel_axis,
                    activation=settings.activation, slope=settings.slope, residual=residual, mask=mask,
                    lengths=lengths, lengths_axis=lengths_axis, out=out,
                )  # fmt: skip
        except BaseException as error:
            self._unlearn(initial)
            self._explain(error, x, not by_batch or settings.renorm is not None, waiting)
            raise
        state.forwards += 1  # nothing below can fail
        if state.using is None:
            state.saved = _RETURNED if return_saved else _EVAL if saved is None or not keeping else saved
        if done is not None:
            done()
        if saved is None:
            return y
        saved._owner, saved._serial = state.token, state.forwards
        if updating:
            values = x.size // mean.size if mask is lengths is weights is None is group else None
            running.count(saved, values, decay, settings.running_ddof, settle)
            if state.history is not None and saved.updated:
                state.history.add(running, saved if measured is None else measured, settings.running_ddof)
        return TrainResult(y, saved) if return_saved else y

    @_core.entrance
    def backward(
        self, dy: Array, saved: Saved | None = None, *, accumulate: bool | np.bool_ | None = None,
        all_reduce: bool = False, out: Array | None = None, out_residual: Array | None = None,
    ) -> Array:  # fmt: skip
        """Gradients of a forward, in training or in eval mode.

        Sets `dgamma`, `dbeta` and `dresidual`, and returns dx. After a training forward the gradient runs
        through the batch statistics; after a forward by running statistics these are constants. The gradient
        is that of the forward's gamma and beta, whatever has become of them. The contents of its x (with
        ``keep="y"``: of its y) must still be the same.

        Parameters
        ----------
        dy : ndarray, shape and dtype of the forward's x
            Gradient of the loss with respect to y.
        saved : Saved, optional
            What a call with ``return_saved=True`` of this layer returned. None: the last forward's, which is
            used up by this.
        accumulate : bool, optional
            True adds to `dgamma` and `dbeta`; otherwise they are overwritten. Needed from the second backward
            on where a layer is used several times in a step, or where gradients of several batches are added
            up (``accumulate=i > 0``).
        all_reduce : bool, default False
            As in :func:`batch_norm_backward`.
        out, out_residual : ndarray, optional
            Receive dx and dresidual; one of them may be `dy` itself.

        Returns
        -------
        dx : ndarray, shape and dtype of x
            `out` if given.

        Raises
        ------
        RuntimeError
            No forward is left to go back through; its input was overwritten; or `saved` is of a forward that
            came before the last backward, and nothing says whether its gradients add to those there.
        TypeError, ValueError
            `dy`, `saved` or `out` do not fit, or `saved` is another layer's.
        """
        state = self._state
        needs: Any = None
        used: Any = state.saved if saved is None else saved
        waiting: Any = _UNKNOWN
        try:
            if saved is None and isinstance(used, str):
                raise RuntimeError(used)
            if not isinstance(used, Saved):
                expected = "what bn(x, return_saved=True) returned with y"
                raise TypeError(f"saved is {kind(used)}, expected {expected}")
            if used._owner is not state.token:
                whose = "a function's" if used._owner is None else "another layer's"
                remedy = "batch_norm_backward(dy, saved) takes any"
                raise ValueError(f"saved is {whose}, expected one of this layer; {remedy}")
            there = state.dgamma is not None or state.dbeta is not None
            if accumulate is None and there and used._serial <= state.graded:
                raise RuntimeError(_ADD)
            adding = accumulate is not None and flag("accumulate", accumulate)
            if adding:
                _check_sum("dgamma", state.dgamma, used.gamma)
                _check_sum("dbeta", state.dbeta, used.beta)
            if "parameters" in state.frozen:  # of gamma and beta only those of the call
                given = used.gamma is not None and not self.scale, used.beta is not None and not self.center
                needs = [*compress(("dx", "dgamma", "dbeta", "dresidual"), (True, *given, used.has_residual))]
            waiting = None
            gradients = batch_norm_backward(
                dy, used, needs=needs, all_reduce=all_reduce, out=out, out_residual=out_residual
            )
            dx, dgamma, dbeta = gradients
            if adding:
                dgamma, dbeta = _sum(state.dgamma, dgamma), _sum(state.dbeta, dbeta)
        except BaseException as error:
            if waiting is _UNKNOWN and isinstance(used, Saved):
                waiting = used.group if all_reduce is True or used._shares else None
            self._explain(error, waiting=waiting)
            raise
        state.dgamma, state.dbeta, state.dresidual = dgamma, dbeta, gradients.dresidual
        state.graded = state.forwards
        if saved is None:
            state.saved = _USED
        return dx

    # ---- checks of a call, and the arrays ------------------------------------------------------------------

    def _prepare(self, x: Any, reads_running: bool) -> None:
        """Look at the shape of `x`, learn the channel count from it, and look at the running statistics."""
        shape = _core.channel_shape(x, **self.settings.where)
        if self.running.mean is None:
            self._learn(shape, x.shape)
        if reads_running:
            self._check_statistics()

    def _learn(self, shape: tuple[int, ...], of: tuple[int, ...]) -> None:
        """Take a channel count from an input's shape, and say so where it looks like another axis's."""
        settings, who = self.settings, self.name or "a BatchNorm"
        unsaid = isinstance(settings.channel_axis, UnsaidAxis) and settings.data_format is None
        self._allocate(shape)
        if unsaid and _channels_seem_last(of):
            learned = f"{who} has learned {shape[0]} channels on axis 1 of x {of}"
            remedy = "Build it with channel_axis=-1 if it is; channel_axis=1 or "
            remedy += f"BatchNorm({shape[0]}) says that it is not"
            _hints.warn(f"{learned}, whose last axis looks like the channels. {remedy}")

    def _watch(
        self, x: Array, measure: bool, group: Group | None, given: dict[str, Any]
    ) -> tuple[Any, Saved | None]:
        """Show `x` to an observer; measure it for the history, where the call does not say what it had."""
        state, saved = self._state, None
        done = state.using and state.using[1] and state.using[1](x, **given)
        if measure and state.history is not None:
            how: dict[str, Any] = {
                "virtual_batch_size": state.settings.virtual_batch_size,
                "keep": None,
                "group": group,
            }
            with suppress(ValueError):  # no channel has a variance; or the call itself says it
                saved = _functions.batch_norm_train(x, **state.settings.where, **given, **how).saved
        return done, saved

    def _given(self, name: str, option: str, value: Array) -> Array:
        """gamma or beta of a call."""
        if getattr(self._state, name) is not None:
            build = f"build it with {option}=False, or assign bn.{name}"
            raise ValueError(f"{name} is given and the layer has its own: {build}")
        return value

    def _check_statistics(self) -> None:
        """Before running statistics are used: raise if they are the initial ones, warn if they are cold."""
        running = self.running
        if running.trusted or self.allow_initial_statistics or self._state.using is not None:
            return  # the latter two may change, and layers that share the statistics may have them otherwise
        if (found := findings.never_updated(self)) is not None:
            raise RuntimeError(str(found))
        if (found := findings.cold(self)) is not None:
            _hints.warn(str(found), ColdStatisticsWarning)
        running.trusted = True

    def _explain(
        self, error: BaseException, x: Any = None, reads_running: bool = False, waiting: Any = None
    ) -> None:
        """Let the error of a failed call say the layer's name, and what the layer knows better.

        `waiting`: processes that are at an exchange to which this one will not come; unknown before it is
        known whether the call has one: then those of a call without arguments.
        """
        if waiting is _UNKNOWN:
            waiting = None if self._state.using or self._state.frozen else self.group
        if isinstance(error, TypeError | ValueError | RuntimeError):
            better = isinstance(error, ValueError) and x is not None and self._better(x, reads_running)
            who = f"{self.name}: " if self.name else ""
            error.args = (who + (better or str(error)).removeprefix(who),)
        tell(waiting, error)

    def _better(self, x: Any, reads_running: bool) -> str | None:
        """What is wrong with the channels of `x` or with the running statistics, if that is it."""
        own, axis = self.running.mean, self.channel_axis
        try:
            got = _core.channel_shape(x, **self.settings.where)
        except (TypeError, ValueError):
            return None
        if own is None or got == own.shape:
            found = findings.report(self) if reads_running else ()
            return next((str(each) for each in found if each.code == "invalid_statistics"), None)
        sizes, expected = (" x ".join(map(str, shape)) for shape in (got, own.shape))
        hint = f"; axis -1 has {expected}: build it with channel_axis=-1" * (x.shape[-1:] == own.shape)
        if x.ndim == 3 and axis == 1 and x.shape[:1] == own.shape:
            hint += "; a single image needs a batch axis, x[None]"
        what = f"x has {sizes} channels on axis {axis} of its shape {x.shape}, expected {expected}"
        return f"{what}, the num_features of this layer{hint}"

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Make the vectors of values that are numbers, arrays, or functions of `num_features`."""
        settings, initial, vectors = self.settings, self._state.initial or {}, []
        for name, default in _INITIAL.items():
            name, value = f"initial {name}", initial.get(name, default)
            if callable(value):
                value = value(shape[0] if len(shape) == 1 else shape)
            if not isinstance(value, np.ndarray):
                expected = f"a number, an array of shape {shape}, or a function of num_features giving one"
                value = np.full(shape, real(name, value, -math.inf, math.inf, expected))
            vectors.append(checked_vector(name, value, shape, self.dtype, cast=True).copy())
        gamma, beta, mean, var = vectors
        self.running.allocate(mean, var, settings.has_reference)
        self.running.mark_assigned(*initial)
        own = {"gamma": gamma if settings.scale else None, "beta": beta if settings.center else None}
        self._change(initial=None, **own)

    def _unlearn(self, initial: dict[str, Any] | None) -> None:
        """After an error: be again without a channel count, with these initial values, if they are some."""
        if initial is not None:
            self.running.forget()
            self._change(initial=initial, gamma=None, beta=None)

    def _known(self, what: str) -> None:
        if self.running.mean is None:
            why = "needs the channel count, which is not known yet"
            raise RuntimeError(f"{what} {why}: build BatchNorm(num_features), or call the layer once")

    # ---- state and copies ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """Everything that makes the layer continue bit for bit: copies, by name.

        Returns
        -------
        dict of str to ndarray
            ``gamma``, ``beta`` (if present), ``running_mean``, ``running_var``: shape (C,), layer's dtype;
            ``num_values``, ``initial_weight``, ``missed_updates``: shape (C,); all others have shape ():
            ``format_version``, ``name``, the counters ``num_updates`` and ``num_skipped``, and the settings,
            "none" for None. With ``renorm={"decay": ...}`` also ``renorm_mean``, ``renorm_std``. Gradients,
            mode and the saved forward are not part of it.
        """
        self._known("state_dict()")
        return layer_state.state_of(self)

    @_core.entrance
    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> Self:
        """Take over a state of ``state_dict``; return the layer.

        Arrays are copied into the layer's own, and settings and counters are taken over. What belongs to the
        network around the layer stays: its name and layout, and `activation` and `slope`, which must agree. A
        layer without a channel count gets that of the state. Gradients and the saved forward are dropped.
        States of formats 1 and 2 load as well.

        Parameters
        ----------
        state : mapping of str to ndarray
            As ``state_dict`` gives it; single values may also be plain Python numbers or str.
        strict : bool, default True
            Whether missing and unexpected names are an error. With False the layer keeps what is missing,
            and what is unexpected is ignored, but not names of other libraries (``weight``, ``moving_mean``).
            What is used is checked all the same, and a state without any name of a layer's is an error.

        Returns
        -------
        BatchNorm
            This layer.

        Raises
        ------
        TypeError, ValueError
            `state` is no mapping; missing or unexpected names; an entry of another dtype or shape; another
            activation or format; NaN, Inf or a negative variance; options that exclude each other.
        """
        new = layer_state.checked(self, state, strict)
        if self.running.mean is None and new.vectors:
            self._allocate(next(iter(new.vectors.values())).shape)
        for name, value in new.vectors.items():
            np.copyto(getattr(self, name), value)
        if new.counters:
            self.running.restore(**new.counters)
        if "initial_weight" not in new.counters:
            self.running.mark_assigned(*new.vectors)
        gone = {"saved": _NONE_YET, "dgamma": None, "dbeta": None, "dresidual": None}
        return self._change(settings=new.settings, graded=self._state.forwards, **gone)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to an .npz file, under exactly this name; equal states give equal bytes.

        A file of that name is replaced at the end, in one step: a failure leaves it as it was.

        Parameters
        ----------
        path : str or PathLike
            The file.

        Raises
        ------
        ValueError
            The state holds NaN, Inf or a negative variance: ``load`` would refuse the file.
        OSError
            The file cannot be written.
        """
        self._known("save()")
        layer_state.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Build a layer from a file of ``save``, with the saved settings and name, in training mode.

        Always a new layer, also from ``bn.load``. For an existing one,
        ``bn.load_state_dict(BatchNorm.load(path).state_dict())``. No pickle is ever read. The ``__init__`` of
        a subclass is not called.

        Parameters
        ----------
        path : str or PathLike
            The file.

        Returns
        -------
        BatchNorm

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            There is no such file.
        ValueError
            The file is damaged or is something else.
        """
        with layer_state.reading(path) as state:
            return cls.from_state_dict(state)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Build a layer from a state of ``state_dict``, with its settings and name, in training mode.

        The ``__init__`` of a subclass is not called.

        Parameters
        ----------
        state : mapping of str to ndarray
            As ``state_dict`` gives it.

        Returns
        -------
        BatchNorm

        Raises
        ------
        TypeError, ValueError
            As ``load_state_dict``.
        """
        layer = cls.__new__(cls)
        BatchNorm.__init__(layer, **layer_state.options_of(state))
        return layer.load_state_dict(state)

    def snapshot(self) -> RunningStatistics:
        """Copy the running statistics and their counters, all that a training forward changes.

        Returns
        -------
        RunningStatistics
            For ``rollback``.

        Examples
        --------
        A step that is rejected must not have counted:

        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn = BatchNorm(3)
        >>> before = bn.snapshot()
        >>> y = bn(np.ones((4, 3), np.float32))
        >>> bn.rollback(before).running.num_updates
        0

        A forward that is computed a second time, as gradient checkpointing does, needs no snapshot:
        ``bn(x, update=False)``, or a whole network inside ``with batchnorm.no_update(layers):``.
        """
        self._known("snapshot()")
        new = self.running.copy()
        new.noted = 0 if self.history is None else self.history.seen
        return new

    def rollback(self, snapshot: RunningStatistics) -> Self:
        """Put running statistics and counters back to a snapshot of this layer; return the layer.

        Parameters, gradients and what backward needs stay as they are, and so does the snapshot.

        Parameters
        ----------
        snapshot : RunningStatistics
            What ``snapshot()`` returned.

        Returns
        -------
        BatchNorm
            This layer.

        Raises
        ------
        TypeError, ValueError
            `snapshot` is none, or one of a layer with another channel count or dtype.
        """
        if not isinstance(snapshot, RunningStatistics):
            raise TypeError(f"snapshot is {kind(snapshot)}, expected the result of bn.snapshot()")
        self._known("rollback()")
        self.running.take(snapshot)
        if self.history is not None:
            self.history.forget_after(snapshot.noted)
        return self

    @_core.entrance
    def clone(self, *, share: Share | tuple[Share, ...] | None = None) -> Self:
        """A new layer with the same settings and values, in the same mode.

        Parameters
        ----------
        share : {None, "params", "stats", ("params", "stats")}
            "params": gamma and beta are the same arrays in both layers, each with its own statistics, such
            as one set for clean and one for augmented batches (SplitBN), or one per domain. Each layer has
            its own gradients: add them up, and give the optimiser the parameters of one of them.
            "stats": running statistics and their counters are the same, ``running`` is one object.

        Returns
        -------
        BatchNorm
            Without the saved forward and without gradients.

        Raises
        ------
        TypeError, ValueError
            `share` is something else.
        RuntimeError
            `share` is given and the channel count is not known yet: there is nothing to share.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> clean = BatchNorm(3)
        >>> noisy = clean.clone(share="params")
        >>> y = noisy(np.ones((4, 3), np.float32))
        >>> noisy.gamma is clean.gamma, noisy.running.num_updates, clean.running.num_updates
        (True, 1, 0)
        """
        shared = share if isinstance(share, tuple) else () if share is None else (share,)
        for each in shared:
            if each not in ("params", "stats"):
                error = ValueError if isinstance(each, str) else TypeError
                raise error(f"share is {kind(each)}, expected None, 'params', 'stats' or a tuple of both")
        if shared:
            self._known(f"clone(share={share!r})")
        state, kept = self._state, [*getattr(self, "__dict__", {}).values()]  # of a subclass
        kept += [state.gamma, state.beta] * ("params" in shared) + [state.running] * ("stats" in shared)
        kept += [state.dgamma, state.dbeta, state.dresidual, state.history]  # which the new layer has not
        bare = type(self).__new__(type(self))
        bare._state = replace(state, group=None)
        getattr(bare, "__dict__", {}).update(getattr(self, "__dict__", {}))
        other = copy.deepcopy(bare, {id(each): each for each in kept})
        history = None if state.history is None else History(state.history.limit)
        return other._change(dgamma=None, dbeta=None, dresidual=None, history=history, group=state.group)

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """For pickle and copy: all but the saved forward, so a copy needs a forward before its backward."""
        if self.group is not None:
            who = f"{self.name}: " if self.name else ""
            got = f"{who}group is {kind(self.group)}, which belongs to this process, so that the layer is"
            raise TypeError(
                f"{got} neither pickled nor copied; set bn.group = None before, or use bn.clone()"
            )
        bare = replace(self._state, saved=_NONE_YET, graded=0, token=object(), using=None, paused=False)
        return getattr(self, "__dict__", None), {"_state": bare}  # a subclass has a __dict__

    def apply(self, state: Mapping[str, Any], x: Array, **options: Unpack[CallOptions]) -> Applied:
        """Call a layer with another state, its settings among it, in this one's mode; nothing is changed.

        Parameters
        ----------
        state : mapping
            As ``state_dict`` gives it.
        x : ndarray
            As in a call.
        **options : CallOptions
            Keywords of a call, but for ``out`` and ``return_saved``.

        Returns
        -------
        Applied
            ``y`` and the new ``state``, two values to unpack. ``batch_norm_backward(dy, applied.saved)``
            gives the gradients.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As a call and ``load_state_dict``.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn, x = BatchNorm(3), np.ones((4, 3), np.float32)
        >>> state = bn.state_dict()
        >>> y, new_state = bn.apply(state, x)
        >>> int(state["num_updates"]), int(new_state["num_updates"]), bn.running.num_updates
        (0, 1, 0)
        """
        for name in {"out", "return_saved"} & set(options):
            raise TypeError(f"apply() has no argument {name!r}: it changes nothing and has .saved; drop it")
        layer = self.clone().load_state_dict(state)
        y, saved = layer(x, return_saved=True, **options)
        result = Applied(y, layer.state_dict())
        result.saved = saved
        return result

    # ---- what is wrong, and new statistics -----------------------------------------------------------------

    def report(self) -> Diagnosis:
        """Look at the running statistics: never updated, cold, NaN, too small for eps, or in order.

        Nothing is changed. ``diagnose(x)`` compares them with a batch as well.

        Returns
        -------
        Diagnosis
            To print, to iterate over, or to ask for its ``codes``.

        Examples
        --------
        >>> from batchnorm import BatchNorm
        >>> BatchNorm(3).report().codes
        ('never_updated',)
        """
        return findings.report(self)

    @_core.entrance
    def diagnose(
        self, x: Array, *, mask: Mask | None = None, lengths: Array | None = None,
        lengths_axis: int | None = None, weights: Array | None = None,
    ) -> Diagnosis:  # fmt: skip
        """Why is the network good in training and bad in testing? Look at this layer with one of its inputs.

        Tells apart statistics that were never updated, cold ones (with the number of updates that are
        missing), NaN or negative ones, and ones that do not belong to this data (which channels, how far);
        and says whether the batch is too small, has constant channels, or variances below eps. Each finding
        names its remedy. Nothing is changed. For all layers of a network see :func:`batchnorm.diagnose`.

        Parameters
        ----------
        x : ndarray
            An input of this layer, as of a call: best a large one of the data that tests badly.
        mask : bool array, optional
            Which positions count, as in a call.
        lengths : int array of shape (N,), optional
            As in a call.
        lengths_axis : int, optional
            As in a call.
        weights : array of floats or ints, optional
            As in a call.

        Returns
        -------
        Diagnosis
            To print, to iterate over, or to ask for its ``codes``.

        Raises
        ------
        TypeError, ValueError
            `x` is no input of this layer, or holds no values.

        Notes
        -----
        Means differ if they are further apart than 0.5 standard deviations, variances if by more than a
        factor of 2, and both only if it is more than 5 standard errors of the batch's statistics; values of
        one sample count as one, as neighbours are alike.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn = BatchNorm(2, decay=None)
        >>> x = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
        >>> y = bn(x)
        >>> bn.diagnose(x).codes
        ('fine',)
        >>> print(bn.diagnose(x + np.float32([0, 100])).findings[0].channels)
        (1,)
        """
        positions = {"mask": mask, "lengths": lengths, "lengths_axis": lengths_axis, "weights": weights}
        return findings.diagnose_layer(self, x, **positions)

    @_core.entrance
    def recalibrate(self, batches: Iterable[Array] | Moments, *, group: Group | None = None) -> Self:
        """Replace the running statistics by those of the data; return the layer.

        Parameters
        ----------
        batches : iterable of ndarray, or Moments
            Inputs of this layer, of any sizes; or what has accumulated them, with masks, in other processes.
            For a layer inside a network use :func:`batchnorm.recalibrate` or ``recalibrating()``.
        group : Group, optional
            Other processes that do the same with other batches, or none: the statistics are those of all,
            the same bits on every process and however the batches are shared out.

        Returns
        -------
        BatchNorm
            This layer.

        Raises
        ------
        TypeError, ValueError
            No values, NaN or Inf, or no inputs of this layer. Nothing is changed then, nor if `batches`
            raises.

        Notes
        -----
        Exactly the mean and variance of one giant batch, every value weighing the same, by :class:`Moments`,
        rounded once. ``running.num_updates`` and ``running.num_values`` then say what is in the statistics,
        and training goes on from there. A frozen layer is recalibrated, too: this is no training.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn, x = BatchNorm(2), np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> bn.recalibrate([x[:4], x[4:]]).running_mean.tolist()
        [5.0, 6.0]
        """
        collector = collected(self, batches, group)
        new = population(self, collector)
        if self.running.mean is None:
            self._learn(new.mean.shape, collector.shape)
        self.running.replace(*new)
        return self

    @contextmanager
    def recalibrating(self) -> Iterator[Self]:
        """Collect what passes through the layer, and make it the running statistics at the end.

        Inside this context calls normalise with the batch's own statistics, whatever the mode, and update
        nothing. At the end the running statistics become those of everything seen, as ``recalibrate`` does.
        An error inside changes nothing. For several layers at once see :func:`batchnorm.recalibrate`.

        Raises
        ------
        ValueError
            At the end: nothing has passed through, or NaN or Inf has.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn = BatchNorm(2)
        >>> with bn.recalibrating():
        ...     for i in range(3):
        ...         y = bn(np.full((4, 2), i, np.float32))
        >>> bn.running_mean.tolist(), bn.running.num_values.tolist()
        ([1.0, 1.0], [12.0, 12.0])
        """
        with recalibrating({self.name or "": self}):
            yield self

    def record_history(self, limit: int | None = 500) -> Self:
        """Keep batch and running statistics of up to `limit` updates from now on; return the layer.

        They are evenly spread over all updates from now on: memory stays below ``16 * limit * C`` bytes. What
        has been recorded is no part of the state.

        Parameters
        ----------
        limit : int or None, default 500
            None ends the recording and forgets.

        Returns
        -------
        BatchNorm
            This layer.
        """
        return self._change(history=None if limit is None else History(limit))

    def plot_statistics(
        self, path: str | os.PathLike[str] | None = None, *, channels: Sequence[int] | None = None,
        title: str | None = None,
    ) -> Any:  # fmt: skip
        """Draw batch against running statistics over time.

        Left, for some channels, each batch's mean and variance as dots, the running ones as lines; right, for
        all channels, how far the two are apart.

        Parameters
        ----------
        path : str or PathLike, optional
            Where to write the picture: .png, .pdf, .svg.
        channels : sequence of int, optional
            The channels on the left; by default six, spread over all.
        title : str, optional

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        RuntimeError
            Nothing has been recorded, see ``record_history``.
        ModuleNotFoundError
            matplotlib is not installed.
        TypeError, ValueError
            `channels` are none.
        """
        return plot(self.history, eps=self.eps, name=self.name, channels=channels, path=path, title=title)

    # ---- attributes ----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        state = self._state
        parts = [str(self.num_features)] + [f"name={state.name!r}"] * (state.name is not None)
        parts += state.settings.described() + [f"dtype={state.dtype}"] * (state.dtype != np.float32)
        parts += [f"num_updates={state.running.num_updates}", f"training={state.training}"]
        parts += [f"frozen={' and '.join(state.frozen)}"] * self.frozen
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getattr__(self, name: str) -> Any:
        hint = (
            f"it is running.{name} here" if name in layer_state.COUNTERS else _hints.foreign_attribute(name)
        )
        text = f"{type(self).__name__} has no attribute {name!r}{f': {hint}' if hint else ''}"
        raise AttributeError(text, name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        own = hasattr(type(self), name) or (hasattr(self, "__dict__") and not _hints.foreign_attribute(name))
        if not own:
            self.__getattr__(name)
        try:
            object.__setattr__(self, name, value)
        except (TypeError, ValueError) as error:
            self._explain(error)
            raise


for _field in fields(Settings):
    setattr(BatchNorm, _field.name, _option(_field.name, _field.metadata["assignable"]))
for _name_of_it in (
    "parameters", "buffers", "scale_shift", "fold", "state_dict", "load_state_dict", "save", "snapshot",
    "rollback", "clone", "apply", "diagnose", "recalibrate", "plot_statistics", "using",
):  # fmt: skip
    setattr(BatchNorm, _name_of_it, _saying_the_name(getattr(BatchNorm, _name_of_it)))
