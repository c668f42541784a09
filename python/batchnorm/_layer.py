"""The layer: an object that holds parameters, running statistics and what backward needs.

All work on data is in the functions of ``_functional``; here are only flags, counters and arrays of one
value per channel. A call that fails leaves the layer as it was: everything is assigned after the function
has returned.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _args, _state
from ._functional import batch_norm, batch_norm_backward, batch_norm_train

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BatchNorm", "Parameter"]

_T = TypeVar("_T")

_INITIAL = {"gamma": 1.0, "beta": 0.0, "running_mean": 0.0, "running_var": 1.0}


class Parameter:
    """A trainable array of a layer and its gradient; ``name, value, grad = parameter`` works too.

    `name` is "gamma" or "beta". `grad` is that of the last ``backward``, None before the first; each backward
    makes a new array, so ask ``parameters()`` again after it.
    """

    __slots__ = ("_value", "grad", "name")

    def __init__(self, name: str, value: NDArray[Any], grad: NDArray[Any] | Any) -> None:
        self.name, self._value, self.grad = name, value, grad

    @property
    def value(self) -> NDArray[Any]:
        """The layer's own array: an optimiser changes it in place (``value -= rate * grad``)."""
        return self._value

    @value.setter
    def value(self, array: NDArray[Any]) -> None:
        if array is not self._value:  # it is the same one after `parameter.value -= step`
            raise AttributeError(
                f"value of {self.name} cannot be replaced; change it in place, value[:] = ..."
            )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.name, self.value, self.grad))

    def __repr__(self) -> str:
        return f"Parameter({self.name!r}, {self.value!r}, {self.grad!r})"


class _Setting(Generic[_T]):
    """The public name of a slot: read-only, or with `check` assignable to what that returns."""

    def __init__(self, doc: str, check: Callable[[object], _T] | None = None) -> None:
        self.__doc__ = doc
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._slot = "_" + name

    def __get__(self, layer: object, owner: type | None = None) -> _T:
        return cast(_T, self if layer is None else getattr(layer, self._slot))

    def __set__(self, layer: BatchNorm, value: _T) -> None:
        if self._check is None:
            raise AttributeError(f"{self._name} of a BatchNorm is read-only")
        setattr(layer, self._slot, self._check(value))


class _Vector(_Setting["NDArray[Any] | Any"]):
    """A slot with one value per channel. Assigning copies into the array, which optimisers hold."""

    def __set__(self, layer: BatchNorm, value: NDArray[Any]) -> None:
        current = self.__get__(layer)
        if current is None:
            unknown = "its channel count is not known yet, build it with BatchNorm(num_features)"
            why = unknown if layer.num_features is None else "it was built so"
            raise ValueError(f"{self._name} cannot be assigned, the layer has none ({why})")
        if value is not current:  # it is the same array after `layer.gamma -= step`
            np.copyto(current, _checked_vector(self._name, value, len(current), current.dtype, cast=True))


class BatchNorm:
    """Batch normalization as a layer: normalise each channel over the batch, learn a scale and a shift.

    Parameters
    ----------
    num_features : int, optional
        Number of channels C. None: learned from the first input.
    decay : float, default 0.9
        Weight of the OLD value in the running statistics, in [0, 1]:
        ``running = decay * running + (1 - decay) * batch``.
    eps : float, default 1e-5
        Added to the variance inside the square root; finite and >= 0.
    axis : int, default 1
        The channel axis of the input; negative counts from the end.
    data_format : str, optional
        Alias of `axis` that also fixes the rank: "NC", "NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC", or,
        for any rank, "channels_first", "channels_last". Not together with `axis`.
    scale, center : bool, default True
        Whether the layer has gamma (scale) and beta (shift).
    running_ddof : {1, 0}
        The estimator kept in `running_var`: var*n/(n-1) (1, as PyTorch and the paper) or var (0, as Keras and
        ONNX). Batches are always normalised with the population variance.
    activation : {None, "relu"}
        Applied to the result, in the same pass.
    dtype : {numpy.float32, numpy.float64}
        Of parameters and running statistics. Inputs may have any supported dtype whatever this is.

    Attributes
    ----------
    gamma, beta : ndarray of `dtype`, shape (C,), or None
        Scale and shift, 1 and 0 at first. None without `scale` / `center`, and while the channel count is
        unknown. Assigning a float32 or float64 array copies into the layer's array, so whoever holds that
        sees the new values.
    running_mean, running_var : ndarray of `dtype`, shape (C,), or None
        0 and 1 at first; updated in place by training forwards.
    dgamma, dbeta : ndarray, shape (C,), or None
        Gradients of the last ``backward``, each time new arrays; None before it and without `scale` /
        `center`.
    num_features : int or None
    num_updates : int
        Number of training forwards that updated the running statistics.
    training : bool
        What a call without ``training=`` does; True at first.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or out of range; ``momentum=`` (the message translates it); an unknown
        keyword.

    Notes
    -----
    A training call uses ``batch_norm_train``, an eval call ``batch_norm`` with the running statistics;
    formulas and accuracy are described there. An eval call writes nothing to statistics or counters. A call
    that raises changes nothing at all.

    The layer remembers one forward: a later call, an eval call included, replaces it, so ``backward`` after
    ``bn(x); bn(x_val, training=False)`` gives the gradient at `x_val` with fixed statistics. A layer used
    twice in one network needs one object per use. Changing `x`, `gamma` or `beta` between forward and
    backward is not detected. The last input stays alive until the next call.

    Statistics and settings are saved (``save``, ``state_dict``), mode and gradients are not. ``parameters``,
    ``buffers``, ``state_dict`` and ``save`` raise RuntimeError while the channel count is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm
    >>> bn = BatchNorm(16)
    >>> x = np.random.default_rng(0).normal(size=(8, 16, 5, 5)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> y.shape, dx.shape, [(p.name, p.value.shape, p.grad.shape) for p in bn.parameters()]
    ((8, 16, 5, 5), (8, 16, 5, 5), [('gamma', (16,), (16,)), ('beta', (16,), (16,))])
    >>> bn.eval()(x[:1]).shape
    (1, 16, 5, 5)
    >>> bn
    BatchNorm(16, decay=0.9, eps=1e-05, axis=1, activation=None, num_updates=1, training=False)
    """

    __slots__ = (
        "__weakref__", "_activation", "_axis", "_beta", "_center", "_data_format", "_decay", "_dtype", "_eps",
        "_gamma", "_needs", "_num_features", "_num_updates", "_rank", "_running_ddof", "_running_mean",
        "_running_var", "_saved", "_scale", "_training", "dbeta", "dgamma",
    )  # fmt: skip

    # What backward needs of the last forward: (x, mean, inv_std) after a training forward, (x, None, None)
    # after an eval forward, (None, None, None) once x has been overwritten in place. None: no forward yet.
    _saved: tuple[NDArray[Any] | None, NDArray[Any] | None, NDArray[Any] | None] | None
    # The vectors, None until the channel count is known: Any spares the call path asking twice.
    _gamma: Any
    _beta: Any
    _running_mean: Any
    _running_var: Any
    _num_features: int | None
    _activation: Any
    dgamma: NDArray[Any] | Any
    dbeta: NDArray[Any] | Any

    gamma = _Vector("Scale, one value per channel, or None.")
    beta = _Vector("Shift, one value per channel, or None.")
    running_mean = _Vector("Moving average of the batch means; None while there is no channel count.")
    running_var = _Vector("Moving average of the batch variances; None while there is no channel count.")
    num_features = _Setting["int | None"]("Number of channels; None until it is known.")
    num_updates = _Setting[int]("Number of training forwards that updated the running statistics.")
    axis = _Setting[int]("The channel axis.")
    data_format = _Setting["_args.DataFormatName | None"](
        "The data_format given instead of an axis, or None."
    )
    scale = _Setting[bool]("Whether the layer has gamma.")
    center = _Setting[bool]("Whether the layer has beta.")
    running_ddof = _Setting[int]("1: running_var is the unbiased estimate; 0: the population variance.")
    activation = _Setting["_args.ActivationName | None"]("The activation applied to the result, or None.")
    dtype = _Setting["np.dtype[Any]"]("Data type of parameters and running statistics.")
    decay = _Setting("Weight of the old value in the running statistics; may be changed.", _args.check_decay)
    eps = _Setting("Added to the variance inside the square root; may be changed.", _args.check_eps)
    training = _Setting("What a call without ``training=`` does.", partial(_args.check_flag, name="training"))

    def __init__(
        self,
        num_features: int | None = None,
        *,
        decay: float = 0.9,
        eps: float = 1e-5,
        axis: int = _args.DEFAULT_AXIS,
        data_format: _args.DataFormatName | None = None,
        scale: bool = True,
        center: bool = True,
        running_ddof: int = 1,
        activation: _args.ActivationName | None = None,
        dtype: DTypeLike = np.float32,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            _args.reject_keywords(BatchNorm.__init__, unknown)
        if num_features is not None:
            expected = f"an int from 1 to {2**31}, or None to learn it from x"
            num_features = _checked_int(num_features, "num_features", 1, 2**31, expected)
        self._decay = _args.check_decay(decay)
        self._eps = _args.check_eps(eps)
        self._scale = _args.check_flag(scale, "scale")
        self._center = _args.check_flag(center, "center")
        self._running_ddof = _args.check_ddof(running_ddof, "running_ddof")
        self._activation = _args.check_activation(activation)
        self._axis = int(_args.resolve_axis_argument(axis, data_format))
        self._data_format = data_format
        self._rank = None if data_format is None else _args.DATA_FORMATS[data_format][0]
        self._dtype = _checked_dtype(dtype)
        self._needs = ("dx", *(("dgamma",) if scale else ()), *(("dbeta",) if center else ()))
        self._num_features = None
        self._gamma = self._beta = self._running_mean = self._running_var = None
        self.dgamma = self.dbeta = None
        self._num_updates = 0
        self._training = True
        self._saved = None
        if num_features is not None:
            self._allocate(num_features)

    # ---- forward and backward ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Let calls use and update statistics as in training (or not, with False); return the layer."""
        self._training = _args.check_flag(mode, "mode")
        return self

    def eval(self) -> Self:
        """Let calls normalise with the running statistics and change nothing; return the layer."""
        self._training = False
        return self

    def __call__(
        self, x: NDArray[Any], *, training: bool | None = None, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Normalise `x`.

        Parameters
        ----------
        x : ndarray, rank >= 2, float32 / float64 / float16 / bfloat16
            Its channel axis must have `num_features` entries. The layer keeps a reference to it for
            `backward`.
        training : bool, optional
            For this call only: True normalises with the batch's own statistics and updates the running ones,
            False normalises with the running statistics and writes nothing. None: as the attribute `training`
            says.
        out : ndarray, optional
            Receives the result: shape and dtype of `x`, may be `x` itself. After a call in place there is no
            backward.

        Returns
        -------
        y : ndarray, shape and dtype of `x`
            `out` if given.

        Raises
        ------
        TypeError, ValueError
            `x`, `out` or `training` of the wrong kind, dtype or shape; one value per channel in training;
            NaN, Inf or a negative variance in the running statistics in eval.
        """
        if training is None:
            training = self._training
        elif training is not True and training is not False:
            _args.check_flag(training, "training")
        if self._num_features is None:
            return self._first_call(x, training, out)
        axis, data_format = self._axis, None
        if self._rank is not None and getattr(x, "ndim", None) != self._rank:
            axis, data_format = _args.DEFAULT_AXIS, self._data_format  # for the function to refuse
        try:
            if training:
                y, mean, inv_std = batch_norm_train(
                    x, self._gamma, self._beta,
                    running_mean=self._running_mean, running_var=self._running_var,
                    decay=self._decay, running_ddof=self._running_ddof, eps=self._eps,
                    axis=axis, data_format=data_format, activation=self._activation, out=out,
                )  # fmt: skip
                self._saved = (x, mean, inv_std)
                if x.size:
                    self._num_updates += 1
            else:
                y = batch_norm(
                    x, self._running_mean, self._running_var, self._gamma, self._beta, eps=self._eps,
                    axis=axis, data_format=data_format, activation=self._activation, out=out,
                )  # fmt: skip
                self._saved = (x, None, None)
        except ValueError:
            self._check_call(x, training)
            raise
        if out is not None and _args._same_memory(out, x):
            self._saved = (None, None, None)
        return y

    def _first_call(self, x: NDArray[Any], training: bool, out: NDArray[Any] | None) -> NDArray[Any]:
        """A call that learns the channel count, and forgets it again if it fails."""
        self._allocate(self._channels_of(x) or 1)  # with 1, the function says what is wrong with x
        try:
            return BatchNorm.__call__(self, x, training=training, out=out)
        except BaseException:
            self._num_features = None
            self._gamma = self._beta = self._running_mean = self._running_var = None
            raise

    def _check_call(self, x: NDArray[Any], training: bool) -> None:
        """Raise the error of a failed call, if this layer knows better than the function what is wrong."""
        count, own = self._channels_of(x), self._num_features
        if count and count != own:  # the function's error is about gamma
            hint = f"; axis -1 has {own}: build the layer with axis=-1" if x.shape[-1] == own else ""
            if x.ndim == 3 and self._axis == 1 and x.shape[0] == own:
                hint += "; a single image needs a batch axis, x[None]"
            raise ValueError(
                f"x has {count} channels on axis {self._axis} of its shape {x.shape}, "
                f"expected {own}, the num_features of this layer{hint}"
            ) from None
        for name in ("running_mean", "running_var") if count and not training else ():
            try:
                _checked_vector(name, getattr(self, name), own, self._dtype)
            except ValueError as error:
                raise ValueError(
                    f"{error}: a training batch held NaN, Inf or huge values, or the layer's {name} was set "
                    f"so; load a saved state, or assign finite statistics (bn.{name} = ...) and train again"
                ) from None

    def _channels_of(self, x: Any) -> int | None:
        """The channel count of `x`, or None if it has no channel axis."""
        if not isinstance(x, np.ndarray) or x.ndim < 2 or not -x.ndim <= self._axis < x.ndim:
            return None
        return x.shape[self._axis] if self._rank in (None, x.ndim) else None

    def backward(self, dy: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Gradients of the last forward, whether that was in training or eval mode.

        Sets `dgamma` and `dbeta` (overwriting, never adding) and returns dx. After a training forward the
        gradient runs through the batch statistics; after an eval forward the running statistics are
        constants. gamma and beta must still be those of the forward, and so must the contents of its x.

        Parameters
        ----------
        dy : ndarray, shape and dtype of the forward's x
            Gradient of the loss with respect to y.
        out : ndarray, optional
            Receives dx; may be `dy` itself.

        Returns
        -------
        dx : ndarray, shape and dtype of x
            `out` if given.

        Raises
        ------
        RuntimeError
            No forward came before, or it overwrote its input (``out=x``).
        TypeError, ValueError
            `dy` or `out` do not fit.
        """
        if self._saved is None:
            raise RuntimeError("backward before any forward: call y = bn(x) first, then bn.backward(dy)")
        x, mean, inv_std = self._saved
        if x is None:
            raise RuntimeError(
                "backward is not possible, the input of the last forward has been overwritten: "
                "call the layer with another out than x (or none), and backward with another out than x"
            )
        stats: Literal["batch", "fixed"] = "batch"
        if mean is None or inv_std is None:
            stats, mean = "fixed", self._running_mean
            with np.errstate(all="ignore"):  # var = eps = 0 gives inf, as in the forward
                inv_std = 1.0 / np.sqrt(self._running_var.astype(np.float64) + self._eps)
        dx, dgamma, dbeta = batch_norm_backward(
            dy, x, mean, inv_std, self._gamma, self._beta, axis=self._axis, stats=stats,
            activation=self._activation, needs=self._needs, out=out,
        )  # fmt: skip
        assert dx is not None  # it is always in needs
        self.dgamma = dgamma
        self.dbeta = dbeta
        if out is not None and _args._same_memory(out, x):
            self._saved = (None, None, None)
        return dx

    # ---- parameters and state ------------------------------------------------------------------------------

    def _vector_names(self) -> tuple[str, ...]:
        return (*(("gamma",) * self._scale), *(("beta",) * self._center), "running_mean", "running_var")

    def _allocate(self, count: int) -> None:
        vectors = {name: np.full(count, _INITIAL[name], self._dtype) for name in self._vector_names()}
        for name, value in vectors.items():
            setattr(self, "_" + name, value)
        self._num_features = count

    def _known_vectors(self, what: str) -> dict[str, NDArray[Any]]:
        if self._num_features is None:
            raise RuntimeError(
                f"{what} needs the channel count, which is not known yet: "
                "build the layer with it, BatchNorm(num_features), or call the layer once"
            )
        return {name: getattr(self, "_" + name) for name in self._vector_names()}

    def parameters(self) -> list[Parameter]:
        """What an optimiser trains: gamma and beta, as far as the layer has them, with their gradients."""
        vectors = self._known_vectors("parameters()")
        gradients = {"gamma": self.dgamma, "beta": self.dbeta}
        return [Parameter(name, vectors[name], gradients[name]) for name in vectors if name in gradients]

    def buffers(self) -> dict[str, NDArray[Any]]:
        """The running statistics, by name: the layer's own arrays, which no optimiser should touch."""
        self._known_vectors("buffers()")
        return {"running_mean": self._running_mean, "running_var": self._running_var}

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that makes the layer continue bit for bit: copies, by name.

        Returns
        -------
        dict of str to ndarray
            ``gamma``, ``beta`` (if present), ``running_mean``, ``running_var``: shape (C,), layer's dtype;
            ``format_version``, ``num_updates``, ``axis``, ``running_ddof``: int64; ``eps``, ``decay``:
            float64; ``activation``, ``data_format``: str ("none" for None); all of shape (). Gradients, mode
            and the saved input are not part of it.
        """
        state = {name: value.copy() for name, value in self._known_vectors("state_dict()").items()}
        for name in _SCALARS:
            value = 1 if name == "format_version" else getattr(self, name)
            state[name] = np.array("none" if value is None else value)
        return state

    def load_state_dict(self, state: Mapping[str, NDArray[Any]], *, strict: bool = True) -> Self:
        """Take over a state of ``state_dict``; return the layer.

        Arrays are copied into the layer's own. `eps`, `decay`, `running_ddof` and `num_updates` are taken
        over too; `activation` belongs to the network around the layer and must agree. `axis` and
        `data_format` serve ``load`` only: here the layer keeps its own. A layer without a channel count gets
        that of the state. Gradients and the saved input are dropped.

        Parameters
        ----------
        state : mapping of str to ndarray
            As ``state_dict`` gives it; single values may also be plain Python numbers or str.
        strict : bool, default True
            Whether missing and unexpected names are an error. With False the layer keeps what is missing,
            and what is unexpected is ignored, but not names of other libraries (``weight``, ``moving_mean``);
            what is used is checked all the same.

        Raises
        ------
        TypeError, ValueError
            `state` is no mapping; missing or unexpected names; an entry of another dtype or shape; another
            activation or format; NaN, Inf or a negative variance.
        """
        _args.check_flag(strict, "strict")
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {_args._kind(state)}, expected a mapping of names to arrays")
        state = dict(state)
        scalars = _checked_scalars(state)
        names = self._vector_names()
        _check_names(state, (*names, *_SCALARS), strict, " (strict=False loads what fits)")
        if scalars.get("activation", self._activation) != self._activation:
            raise ValueError(
                f"activation is {scalars['activation']!r} in the state, expected {self._activation!r} as in "
                "this layer: build the layer with it, or take it out of the state and load with strict=False"
            )
        count = self._num_features
        vectors: dict[str, NDArray[Any]] = {}
        for name in names:
            if name in state:
                vectors[name] = _checked_vector(name, state[name], count, self._dtype).copy()
                count = len(vectors[name])
                if self._num_features and not getattr(self, name).flags.writeable:
                    raise ValueError(f"{name} of this layer has been made read-only, expected writable")
        if self._num_features is None and count is not None:
            self._allocate(count)
        # Nothing below can fail.
        for name, value in vectors.items():
            np.copyto(getattr(self, "_" + name), value)
        for name in ("eps", "decay", "running_ddof", "num_updates"):
            if name in scalars:
                setattr(self, "_" + name, scalars[name])
        self.dgamma = self.dbeta = self._saved = None
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to an .npz file, under exactly this name; equal states give equal bytes.

        A file of that name is replaced at the end, in one step: a failure leaves it as it was.

        Raises
        ------
        ValueError
            The state holds NaN, Inf or a negative variance: ``load`` would refuse the file.
        OSError
            The file cannot be written.
        """
        for name, value in self._known_vectors("save()").items():
            _checked_vector(name, value, self._num_features, self._dtype)
        _state.write_state(path, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Build a layer from a file of ``save``, with the saved settings, in training mode.

        Always a new layer, also from ``bn.load``. For an existing one,
        ``bn.load_state_dict(BatchNorm.load(path).state_dict())``. No pickle is ever read.

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            There is no such file.
        ValueError
            The file is damaged or is something else.
        """
        state = _state.read_state(path)
        try:
            scalars = _checked_scalars(state)
            layout = "axis" if scalars.get("data_format") is None else "data_format"
            names = ("decay", "eps", layout, "running_ddof", "activation")
            options = {name: scalars[name] for name in names if name in scalars}
            dtype = state["running_mean"].dtype if "running_mean" in state else np.float32
            layer = cls(scale="gamma" in state, center="beta" in state, dtype=dtype, **options)
            _check_names(state, (*layer._vector_names(), *_SCALARS), True, "")
            if layer.axis != scalars["axis"]:
                raise ValueError(f"axis is {scalars['axis']} but data_format is {layer.data_format!r}")
            return layer.load_state_dict(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot load {os.fspath(path)!r}: {error}") from error

    # ---- copies and text -----------------------------------------------------------------------------------

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """For pickle and copy: all but the saved input, so a copy needs a forward before its backward."""
        slots = {name: getattr(self, name) for name in BatchNorm.__slots__ if name != "__weakref__"}
        return getattr(self, "__dict__", None), slots | {"_saved": None}  # a subclass may have a __dict__

    def __repr__(self) -> str:
        usual = {"scale": True, "center": True, "running_ddof": 1}
        fields = [f"{name}={getattr(self, name)!r}" for name in ("decay", "eps", "axis", "activation")]
        fields += [f"{n}={getattr(self, n)}" for n, value in usual.items() if getattr(self, n) != value]
        fields += [f"dtype={self._dtype}"] * (self._dtype != np.float32)
        fields += [f"num_updates={self._num_updates}", f"training={self._training}"]
        return f"{type(self).__name__}({self._num_features}, {', '.join(fields)})"


def _checked_int(value: object, name: str, low: int, high: int, expected: str) -> int:
    number = _args.check_int(value, name, expected)
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, expected {expected}")
    return int(number)


def _checked_dtype(value: Any) -> np.dtype[Any]:
    with contextlib.suppress(TypeError, ValueError):
        dtype: np.dtype[Any] = np.dtype(value)
        if value is not None and dtype in (np.float32, np.float64):
            return dtype
    raise TypeError(f"dtype is {value!r:.60}, expected numpy.float32 or numpy.float64")


def _checked_vector(
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
    good = np.isfinite(vector) & ((vector >= 0) | (name != "running_var"))
    if not good.all():
        channel = int(good.argmin())
        expected = f"finite {dtype} values" + " >= 0" * (name == "running_var")
        raise ValueError(f"{name} is {given[channel]} at channel {channel}, expected {expected}")
    return vector


# Entries of other libraries' states, and what they are called here.
_FOREIGN = {
    "weight": "gamma", "scale": "gamma", "bias": "beta", "offset": "beta", "moving_mean": "running_mean",
    "moving_variance": "running_var", "num_batches_tracked": "num_updates",
}  # fmt: skip


def _check_names(state: Mapping[str, Any], expected: tuple[str, ...], strict: bool, hint: str) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [str(name) for name in state if name not in expected]
    foreign = [f"{name} is called {_FOREIGN[name]} here" for name in unexpected if name in _FOREIGN]
    if foreign:
        assign = "bn.gamma = ..., bn.beta = ..., bn.running_mean = ..., bn.running_var = ..."
        hint = f" ({', '.join(foreign)}; assign arrays of PyTorch or Keras one by one: {assign})"
    if foreign or (strict and (missing or unexpected)):
        both = (("missing", missing), ("unexpected", unexpected))
        found = "; ".join(f"{what} {', '.join(names)}" for what, names in both if names)
        raise ValueError(f"the state does not fit the layer: {found}; expected {', '.join(expected)}{hint}")


# The entries of a state that are one number or word, and what makes a setting of them or raises.
_SCALARS: dict[str, Callable[[object], Any]] = {
    "format_version": lambda v: _checked_int(v, "format_version", 1, 1, "1, which this batchnorm reads"),
    "num_updates": lambda v: _checked_int(v, "num_updates", 0, 2**63, "an int >= 0"),
    "eps": _args.check_eps,
    "decay": _args.check_decay,
    "axis": lambda v: _args.check_int(v, "axis", "an int"),
    "running_ddof": lambda v: _args.check_ddof(v, "running_ddof"),
    "activation": lambda v: _args.check_activation(None if v == "none" else v),
    "data_format": lambda v: None if v == "none" else v,  # for ``load``, where the constructor checks it
}


def _checked_scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `state` that are one number or word, as Python values, checked."""
    scalars = {}
    for name in filter(state.__contains__, _SCALARS):
        value = state[name]
        if isinstance(value, np.ndarray):
            if value.shape != ():
                raise ValueError(f"{name} has shape {value.shape}, expected a single value, shape ()")
            value = value.item()
        scalars[name] = _SCALARS[name](value)
    return scalars
