"""The layer: an object that holds parameters, running statistics and what backward needs.

All work on data is in the functions of ``_functional``; here are only flags, counters and arrays of one
value per channel. A call that fails leaves the layer as it was: everything is assigned after the function
has returned. The everyday call is here, all others are in ``_forward``; state and copies are
in ``_layer_state``, what mends a layer in ``_layer_tools``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _args, _forward, _running, _ways
from ._forward import Request
from ._functional import batch_norm, batch_norm_backward, batch_norm_train
from ._history import History, checked_limit
from ._layer_base import Counters, checked_dtype, checked_initial, checked_int, checked_vector
from ._layer_tools import LayerTools

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BatchNorm"]

# What `_saved` is when backward cannot be: None before any forward, or one of these.
_OVERWRITTEN = "overwritten"
_NOT_KEPT = "not kept"

Initial = float | NDArray[Any] | Callable[[int], "float | NDArray[Any]"]


class BatchNorm(LayerTools):
    """Batch normalization as a layer: normalise each channel over the batch, learn a scale and a shift.

    Parameters
    ----------
    num_features : int, optional
        Number of channels C. None: learned from the first input.
    decay : float or None, default 0.9
        Weight of the OLD value in the running statistics, in [0, 1]:
        ``running = decay * running + (1 - decay) * batch``. None: a cumulative average in which every value
        seen weighs the same.
    warmup : bool, default False
        Early batches weigh more: ``min(decay, (1 + t) / (10 + t))`` after t updates.
    zero_debias : bool, default False
        The initial values weigh nothing from the first batch on; see ``effective_decay``. Not together with
        `warmup`, and neither with ``decay=None``. Statistics that were assigned count as initial values here
        and with ``decay=None``: to go on from them use a plain decay.
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
    activation : {None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"}
        Applied to the result (plus the residual, if there is one), in the same pass.
    slope : float, optional
        leaky_relu's factor for values below 0; 0.01 if absent. An error with another activation.
    renorm : bool or mapping, optional
        Batch renormalisation in training: limits ``rmin``, ``rmax``, ``dmax`` as in ``batch_renorm_train``,
        such as ``{"rmax": 3.0, "dmax": 5.0}``; True: none. With ``decay`` among them the reference is a pair
        of its own, `renorm_mean` and `renorm_std`. The first batch, for which there is no reference yet, is
        normalised plainly. The limits may be changed by assigning to `renorm`.
    virtual_batch_size : int, optional
        Normalise parts of so many samples each by its own statistics in training, as
        ``ghost_batch_norm_train``. The running statistics receive the average of the parts' in one update, so
        `decay` means the same as without.
    save_memory : bool, default False
        Keep y for ``backward`` instead of x, as ``batch_norm_train_saving``; with ``out=x`` the layer then
        needs no memory of its own. y must not be changed before backward. Only with leaky_relu or without an
        activation.
    on_nonfinite : {"propagate", "raise", "skip"}
        What happens when NaN or Inf would enter the running statistics: they take it (it stays in its
        channel); the call is a ValueError that changes nothing; or the batch is normalised, but left out of
        the statistics and counted in `num_skipped`.
    allow_initial_statistics : bool, default False
        Whether eval calls may use statistics that no training forward has updated, and cold ones without a
        warning.
    initial : mapping, optional
        First values of ``gamma``, ``beta``, ``running_mean``, ``running_var``: a number, a float32 or float64
        array of shape (C,), or a function of the channel count that returns either. Defaults 1, 0, 0, 1.
        Both running statistics given count as known.
    history : int, optional
        Keep the statistics of up to so many updates, as ``record_history`` does, for ``plot_statistics``.
    dtype : {numpy.float32, numpy.float64}
        Of parameters and running statistics. Inputs may have any supported dtype whatever this is.

    Attributes
    ----------
    gamma, beta : ndarray of `dtype`, shape (C,), or None
        Scale and shift, 1 and 0 at first. None without `scale` / `center`, and while the channel count is
        unknown. Assigning a float32 or float64 array copies into the layer's array, so whoever holds that
        sees the new values.
    running_mean, running_var : ndarray of `dtype`, shape (C,), or None
        0 and 1 at first; updated in place by training forwards. Assigning both makes them known.
    dgamma, dbeta : ndarray, shape (C,), or None
        Gradients of the last ``backward``, each time new arrays; None before it and without `scale` /
        `center`.
    dresidual : ndarray or None
        Gradient of the last ``backward`` with respect to the residual, if the forward had one.
    num_features : int or None
    num_updates, num_samples, num_skipped : int
        Batches in the running statistics, values per channel in them, and batches left out.
    initial_weight : float
        How much the initial values weigh in the running statistics; above 0.01 they are cold.
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
    formulas and accuracy are described there. An eval call writes nothing to statistics or counters, and
    raises RuntimeError while the statistics are the initial ones; the first one with cold statistics warns
    (ColdStatisticsWarning). A call that raises changes nothing at all.

    Which statistics normalise and whether they are updated can be told apart, in order of precedence: per
    call (``stats=``, ``update=``), ``freeze()``, ``no_update()``, per call ``training=``, and the mode.

    The layer remembers one forward: a later call replaces it. A call in training keeps its input alive until
    the next call; an eval call keeps nothing, and ``backward`` after it is an error, unless it says
    ``keep=True``. A layer used twice in one network needs one object per use. Changing `x`, `gamma` or `beta`
    between forward and backward is not detected.

    Statistics and settings are saved (``save``, ``state_dict``), mode and gradients are not. ``parameters``,
    ``buffers``, ``state_dict`` and ``save`` raise RuntimeError while the channel count is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm
    >>> bn = BatchNorm(16, zero_debias=True)
    >>> x = np.random.default_rng(0).normal(size=(8, 16, 5, 5)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> y.shape, dx.shape, [(p.name, p.value.shape, p.grad.shape) for p in bn.parameters()]
    ((8, 16, 5, 5), (8, 16, 5, 5), [('gamma', (16,), (16,)), ('beta', (16,), (16,))])
    >>> bn
    BatchNorm(16, decay=0.9, eps=1e-05, axis=1, activation=None, zero_debias=True, num_updates=1,
      training=True)
    >>> bn.eval()(x[:1]).shape
    (1, 16, 5, 5)
    """

    __slots__ = ()

    def __init__(
        self,
        num_features: int | None = None,
        *,
        decay: float | None = 0.9,
        warmup: bool = False,
        zero_debias: bool = False,
        eps: float = 1e-5,
        axis: int = _args.DEFAULT_AXIS,
        data_format: _args.DataFormatName | None = None,
        scale: bool = True,
        center: bool = True,
        running_ddof: int = 1,
        activation: _args.ActivationName | None = None,
        slope: float | None = None,
        renorm: Mapping[str, float] | bool | None = None,
        virtual_batch_size: int | None = None,
        save_memory: bool = False,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        allow_initial_statistics: bool = False,
        initial: Mapping[str, Initial] | None = None,
        history: int | None = None,
        dtype: DTypeLike = np.float32,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            _args.reject_keywords(BatchNorm.__init__, unknown)
        if num_features is not None:
            expected = f"an int from 1 to {2**31}, or None to learn it from x"
            num_features = checked_int(num_features, "num_features", 1, 2**31, expected)
        self._decay, self._warmup, self._zero_debias = _running.check_schedule(decay, warmup, zero_debias)
        self._eps = _args.check_eps(eps)
        self._scale = _args.check_flag(scale, "scale")
        self._center = _args.check_flag(center, "center")
        self._running_ddof = _args.check_ddof(running_ddof, "running_ddof")
        self._activation = _args.check_activation(activation)
        self._slope = _args.check_slope(slope, self._activation)
        self._renorm = _ways.check_renorm(renorm)
        self._virtual_batch_size = _ways.check_virtual_batch_size(virtual_batch_size)
        self._save_memory = _args.check_flag(save_memory, "save_memory")
        _ways.check_together(self._renorm, virtual_batch_size, save_memory, activation)
        self._on_nonfinite = _running.check_on_nonfinite(on_nonfinite)
        self._allow_initial_statistics = _args.check_flag(
            allow_initial_statistics, "allow_initial_statistics"
        )
        self._initial = checked_initial(initial, self._vector_names())
        self._axis = int(_args.resolve_axis_argument(axis, data_format))
        self._data_format = data_format
        self._rank = None if data_format is None else _args.DATA_FORMATS[data_format][0]
        self._dtype = checked_dtype(dtype)
        self._history = None if history is None else History(checked_limit(history))
        self._counters = Counters()
        self._collector, self._updating, self._frozen, self._training = None, True, (), True
        self._num_features = self._gamma = self._beta = self._running_mean = self._running_var = None
        self._renorm_mean = self._renorm_std = None
        self._saved = self.dgamma = self.dbeta = self.dresidual = None
        self._refresh()
        if num_features is not None:
            self._allocate(num_features)
            self._initial = None

    # ---- modes ---------------------------------------------------------------------------------------------

    @property
    def renorm(self) -> dict[str, float | None] | None:
        """The limits of batch renormalisation, or None. Assigning changes them."""
        return None if self._renorm is None else dict(self._renorm)

    @renorm.setter
    def renorm(self, value: Mapping[str, float | None] | bool | None) -> None:
        renorm = _ways.check_renorm(value)
        own = self._renorm is not None and self._renorm["decay"] is not None
        if (renorm is not None and renorm["decay"] is not None) != own:
            raise ValueError(
                "renorm: whether the reference has a decay of its own is decided when the layer is built; "
                + ("give decay among the limits" if own else "leave decay away")
            )
        _ways.check_together(renorm, self._virtual_batch_size, self._save_memory, self._activation)
        self._renorm = renorm
        self._refresh()

    def train(self, mode: bool = True) -> Self:
        """Let calls use and update statistics as in training (or not, with False); return the layer.

        A layer that is frozen stays so.
        """
        self._training = _args.check_flag(mode, "mode")
        return self

    def eval(self) -> Self:
        """Let calls normalise with the running statistics and change nothing; return the layer."""
        self._training = False
        return self

    def freeze(self, *, parameters: bool = False) -> Self:
        """Let calls use the running statistics and update nothing, in training mode too; return the layer.

        For fine-tuning with the statistics of before. Calls in training mode still keep what ``backward``
        needs, which then takes the statistics as constants. Holds until ``unfreeze()``, whatever ``train()``
        and ``eval()`` say, and for calls with ``training=True``; a call with ``stats="batch"`` has its way.

        Parameters
        ----------
        parameters : bool, default False
            Whether gamma and beta are frozen as well: ``parameters()`` then gives none, and ``backward``
            computes no gradients for them (None).
        """
        both = _args.check_flag(parameters, "parameters")
        self._frozen = ("statistics", "parameters") if both else ("statistics",)
        self._refresh()
        return self

    def unfreeze(self) -> Self:
        """End what ``freeze`` began, for statistics and parameters; return the layer."""
        self._frozen = ()
        self._refresh()
        return self

    # ---- forward and backward ------------------------------------------------------------------------------

    def __call__(
        self,
        x: NDArray[Any],
        *,
        training: bool | None = None,
        stats: Literal["batch", "running"] | None = None,
        update: bool | None = None,
        keep: bool | None = None,
        residual: NDArray[Any] | None = None,
        mask: NDArray[Any] | None = None,
        lengths: NDArray[Any] | None = None,
        lengths_axis: int | None = None,
        weights: NDArray[Any] | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Normalise `x`.

        Parameters
        ----------
        x : ndarray, rank >= 2, float32 / float64 / float16 / bfloat16
            Its channel axis must have `num_features` entries. A call in training keeps a reference to it for
            `backward`.
        training : bool, optional
            For this call only: True normalises with the batch's own statistics and updates the running ones,
            False normalises with the running statistics and writes nothing. None: as the attribute `training`
            says.
        stats : {"batch", "running"}, optional
            The statistics that normalise, whatever the mode says. "running" together with an update means
            the running statistics as they are before it.
        update : bool, optional
            Whether the batch's statistics enter the running ones, whatever the mode says.
        keep : bool, optional
            Whether `backward` is to follow. None: if this is a call in training.
        residual : ndarray like x, optional
            Added before the activation, in the same pass. ``backward`` leaves its gradient in `dresidual`.
        mask, lengths, lengths_axis, weights : optional
            Which positions count, and in the batch's statistics how often, as in ``batch_norm_train``; for
            ``backward`` and `num_samples` too. Not with `renorm`, `virtual_batch_size` or `save_memory` in
            training.
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
            `x`, `residual` or `out` of the wrong kind, dtype or shape; a flag that is no plain bool; one
            value per channel in training; ``update=True`` where a freeze or no_update() forbids it; NaN, Inf
            or a negative variance in the running statistics in eval.
        RuntimeError
            Running statistics are used that nothing has ever updated.
        """
        if training is None:
            training = self._training
        elif training is not True and training is not False:
            _args.check_flag(training, "training")
        if (
            self._special
            or stats is not None
            or update is not None
            or keep is not None
            or residual is not None
            or mask is not None
            or lengths is not None
            or lengths_axis is not None
            or weights is not None
        ):
            request = Request(
                training, stats, update, keep, residual, out, mask, lengths, lengths_axis, weights
            )
            return self._call_at_length(x, request)
        axis, data_format = self._axis, None
        if self._rank is not None and getattr(x, "ndim", None) != self._rank:
            axis, data_format = _args.DEFAULT_AXIS, self._data_format  # for the function to refuse
        try:
            if training:
                y, mean, inv_std = batch_norm_train(
                    x, self._gamma, self._beta,
                    running_mean=self._running_mean, running_var=self._running_var,
                    decay=self._decay, running_ddof=self._running_ddof, eps=self._eps,
                    axis=axis, data_format=data_format, activation=self._activation, slope=self._slope,
                    out=out,
                )  # fmt: skip
                self._saved = (x, mean, inv_std)
                size = x.size
                if size:
                    counters = self._counters
                    counters.num_updates += 1
                    counters.num_values += size
                    counters.initial_weight *= self._decay
            else:
                if not self._counters.trusted:
                    _forward.check_statistics(self, x, {"axis": axis, "data_format": data_format}, 3)
                y = batch_norm(
                    x, self._running_mean, self._running_var, self._gamma, self._beta, eps=self._eps,
                    axis=axis, data_format=data_format, activation=self._activation, slope=self._slope,
                    out=out,
                )  # fmt: skip
                self._saved = _NOT_KEPT
        except ValueError:
            self._check_call(x, not training)
            raise
        if out is not None and _args._same_memory(out, x):
            self._saved = _OVERWRITTEN
        return y

    def _call_at_length(self, x: NDArray[Any], request: Request) -> NDArray[Any]:
        lazy = self._num_features is None
        if lazy:  # learn the channel count, and forget it again if the call fails
            self._allocate(self._channels_of(x) or 1)  # with 1, the function says what is wrong with x
        where: dict[str, Any] = {"axis": self._axis}
        if self._rank is not None and getattr(x, "ndim", None) != self._rank:
            where = {"data_format": self._data_format}  # for the function to refuse
        try:
            y, kept = _forward.forward(self, x, request, where)
        except BaseException as error:
            if isinstance(error, ValueError):
                self._check_call(x, not _forward.resolve(self, request).batch or self._renorm is not None)
            if lazy:
                self._forget()
            raise
        if lazy:
            self._initial = None
        self._saved = _NOT_KEPT if kept is None else kept
        in_place = request.out is not None and _args._same_memory(request.out, x)
        if in_place and (kept is None or kept.saved is None):
            self._saved = _OVERWRITTEN
        if _forward.spoils(request.out, kept):
            self._saved = _OVERWRITTEN
        return y

    def _check_call(self, x: NDArray[Any], reads_statistics: bool) -> None:
        """Raise the error of a failed call, if this layer knows better than the function what is wrong."""
        self._check_channels(x)
        count, own = self._channels_of(x), self._num_features
        for name in ("running_mean", "running_var") if count and reads_statistics else ():
            try:
                checked_vector(name, getattr(self, name), own, self._dtype)
            except ValueError as error:
                raise ValueError(
                    f"{error}: a training batch held NaN, Inf or huge values, or the layer's {name} was set "
                    f"so; load a saved state, bn.recalibrate(batches), or assign finite statistics "
                    f"(bn.{name} = ...) and train again; on_nonfinite='raise' or 'skip' keeps them out"
                ) from None

    def _check_channels(self, x: Any) -> None:
        count, own = self._channels_of(x), self._num_features
        if count and own and count != own:  # the function's error is about gamma
            hint = f"; axis -1 has {own}: build the layer with axis=-1" if x.shape[-1] == own else ""
            if x.ndim == 3 and self._axis == 1 and x.shape[0] == own:
                hint += "; a single image needs a batch axis, x[None]"
            raise ValueError(
                f"x has {count} channels on axis {self._axis} of its shape {x.shape}, "
                f"expected {own}, the num_features of this layer{hint}"
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
        saved = self._saved
        if type(saved) is tuple:
            x, mean, inv_std = saved
            dx, dgamma, dbeta = batch_norm_backward(
                dy, x, mean, inv_std, self._gamma, self._beta, axis=self._axis,
                activation=self._activation, slope=self._slope, needs=self._needs, out=out,
            )  # fmt: skip
            dresidual = None
        elif type(saved) is _ways.Kept:
            x = saved.x
            result = saved.backward(self, dy, out)
            dx, dgamma, dbeta = result
            dresidual = getattr(result, "dresidual", None)
        else:
            self._no_backward()
        assert dx is not None  # it is always in needs
        self.dgamma = dgamma
        self.dbeta = dbeta
        self.dresidual = dresidual
        if out is not None and _args._same_memory(out, x):
            self._saved = _OVERWRITTEN
        if type(saved) is _ways.Kept and _forward.spoils(out, saved):
            self._saved = _OVERWRITTEN
        return dx

    def _no_backward(self) -> NoReturn:
        if self._saved is None:
            raise RuntimeError("backward before any forward: call y = bn(x) first, then bn.backward(dy)")
        if self._saved is _NOT_KEPT:
            raise RuntimeError(
                "backward is not possible, the last forward was an eval call, which keeps nothing: for "
                "gradients with fixed statistics call bn(x, training=False, keep=True), or freeze() the "
                "layer and stay in training mode"
            )
        raise RuntimeError(
            "backward is not possible, the input of the last forward has been overwritten: "
            "call the layer with another out than x (or none), and backward with another out than x"
            + ", nor the residual"
            * (self._activation in ("sigmoid", "tanh", "silu"))
        )

    # ---- text ----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        usual = {
            "scale": True, "center": True, "running_ddof": 1, "warmup": False, "zero_debias": False,
            "on_nonfinite": "propagate", "allow_initial_statistics": False, "renorm": None,
            "virtual_batch_size": None, "save_memory": False,
        }  # fmt: skip
        if self._slope is not None:
            usual["slope"] = _args.DEFAULT_SLOPE
        fields = [f"{name}={getattr(self, name)!r}" for name in ("decay", "eps", "axis", "activation")]
        fields += [f"{n}={getattr(self, n)!r}" for n, value in usual.items() if getattr(self, n) != value]
        fields += [f"dtype={self._dtype}"] * (self._dtype != np.float32)
        fields += [f"num_updates={self.num_updates}", f"training={self._training}"]
        fields += [f"frozen={' and '.join(self._frozen)}"] * self.frozen
        return f"{type(self).__name__}({self._num_features}, {', '.join(fields)})"
