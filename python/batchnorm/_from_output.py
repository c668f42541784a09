"""Training that keeps y instead of x: backward recovers the normalised values from the output."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _args
from ._functional import Gradients, TrainResult, batch_norm, batch_norm_backward, batch_norm_train

__all__ = [
    "SavedForBackward",
    "SavingTrainResult",
    "batch_norm_backward_from_output",
    "batch_norm_train_saving",
]

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SavedForBackward:
    """What :func:`batch_norm_train_saving` leaves for :func:`batch_norm_backward_from_output` besides y: some
    vectors, and x itself of the channels whose output does not tell it, ``kept_channels``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axis: int
    activation: Literal["leaky_relu"] | None
    slope: float | None
    mean: NDArray[np.float64]
    inv_std: NDArray[np.float64]
    gamma: Array | None  # copies: the forward pass's, whatever becomes of the arrays
    beta: Array | None
    kept_channels: NDArray[np.intp]
    kept_x: Array  # x of these channels

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        arrays = (self.mean, self.inv_std, self.gamma, self.beta, self.kept_channels, self.kept_x)
        return sum(a.nbytes for a in arrays if a is not None)

    def __repr__(self) -> str:
        kept = f"x of {self.kept_channels.size} of {self.shape[self.axis]} channels"
        return f"SavedForBackward({kept}, {self.nbytes} bytes)"


class SavingTrainResult(TrainResult):
    """A TrainResult, three values to unpack, with ``saved`` for :func:`batch_norm_backward_from_output`."""

    saved: SavedForBackward


def batch_norm_train_saving(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    decay: float = 0.9,
    running_ddof: int = 1,
    eps: float = 1e-5,
    axis: int = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    activation: Literal["leaky_relu"] | None = None,
    slope: float | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
    **unknown: NoReturn,
) -> SavingTrainResult:
    """Normalise ``x`` as :func:`batch_norm_train`, for a backward pass that needs y and not x.

    With ``out=x`` the input is overwritten, and a layer keeps one tensor instead of two.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Not changed, unless it is also ``out``.
    gamma, beta : array of float32 or float64, shape (C,), optional
        Scale and shift per channel, of either sign, 0 included; absent means 1 and 0. Finite.
    running_mean, running_var, decay, running_ddof, eps, axis, data_format, num_threads, out
        As in :func:`batch_norm_train`.
    activation : None or "leaky_relu"
        Those from whose output the input can be recovered.
    slope : float, optional
        As in :func:`batch_norm_train`; positive, from 2**-60 to 2**60.

    Returns
    -------
    SavingTrainResult
        ``y, mean, inv_std`` with the bits of :func:`batch_norm_train`, and ``saved`` for
        :func:`batch_norm_backward_from_output`: about four vectors, and x of the channels that y does not
        tell.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_train`; also with another activation or a residual. Nothing is changed then.

    Notes
    -----
    From y backward has ``x_hat = (y - beta) / gamma``, as in [1]_, whose gamma however must be positive. With
    u the roundoff of y's dtype, y is off by about ``u * (|beta| + |gamma * x_hat|)``, or half the smallest
    number t that it can hold, and x_hat so by ``u * |x_hat| + (u * |beta| + t / 2) / |gamma|``. Where ``(u *
    (|beta| + |gamma|) + t / 2) / |gamma|`` exceeds ``u ** (2 / 3)``, that is where a third of the digits is
    lost (|gamma| below 0.4 % of |beta| + |gamma| in float32, 8 % in float16, 16 % in bfloat16, 0.0005 % in
    float64), the channel's x is kept instead; also where y may overflow, as ``|x_hat| < sqrt(n)`` tells.
    What the gradients lose is of the same size, relative to what they are sums of. Behind leaky_relu, t
    counts ``1 / slope`` times where that is more.

    .. [1] S. Rota Bulo, L. Porzi, P. Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized
       Training of DNNs", 2018, arXiv:1712.02616, section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> gamma, beta = np.full(64, -0.5, np.float32), np.ones(64, np.float32)
    >>> gamma[3] = 0
    >>> result = batchnorm.batch_norm_train_saving(x, gamma, beta, out=x)
    >>> result.y is x, result.mean.shape, result.saved.kept_channels.shape
    (True, (64,), (1,))
    >>> dy = np.ones_like(x)
    >>> dx, dgamma, dbeta = batchnorm.batch_norm_backward_from_output(dy, result.y, result.saved)
    >>> dx.shape, dgamma.shape, dbeta.shape
    ((8, 64, 32, 32), (64,), (64,))
    """
    if "residual" in unknown:
        raise TypeError(
            "batch_norm_train_saving() has no argument 'residual': y would not tell x without it; drop it "
            "and add it afterwards, or use batch_norm_train"
        )
    if unknown:
        _args.reject_keywords(batch_norm_train_saving, unknown)
    x, channel_axis = _args._input(x, axis, data_format)
    g, b = _args._affine(gamma, beta, x, channel_axis)
    name, factor = _invertible(activation, slope, x.dtype)
    kept = np.flatnonzero(_lost(g, b, x, channel_axis, factor))
    # Before the call, as y may take x's place. If that fails, nothing has happened.
    kept_x = np.take(x, kept, channel_axis)
    g, b = (None if v is None else v.copy() for v in (g, b))
    result = batch_norm_train(
        x,
        gamma,
        beta,
        running_mean=running_mean,
        running_var=running_var,
        decay=decay,
        running_ddof=running_ddof,
        eps=eps,
        axis=channel_axis,
        activation=name,
        slope=factor,
        num_threads=num_threads,
        out=out,
    )
    saving = SavingTrainResult(*result)
    saving.saved = SavedForBackward(
        x.shape, x.dtype, channel_axis % x.ndim, name, factor, result.mean, result.inv_std, g, b, kept, kept_x
    )
    return saving


def batch_norm_backward_from_output(
    dy: Array,
    y: Array,
    saved: SavedForBackward,
    *,
    needs: tuple[str, ...] = _args.GRADIENTS,
    num_threads: int | None = None,
    out: Array | None = None,
    **unknown: NoReturn,
) -> Gradients:
    """Gradients of :func:`batch_norm_train_saving` from its output.

    Parameters
    ----------
    dy : array like y
        Gradient with respect to ``y``.
    y : array
        The forward pass's output, unchanged.
    saved : SavedForBackward
        The forward pass's ``saved``: axis, statistics, gamma and beta are in it.
    needs : tuple of "dx", "dgamma", "dbeta"
        What to compute; the rest is None.
    num_threads : int, optional
        As in :func:`batch_norm`.
    out : array like y, optional
        Receives ``dx``; may be ``dy`` or ``y`` itself (in place), no other overlap.

    Returns
    -------
    Gradients
        As from :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_backward`; also ``saved`` of something else, ``y`` of another shape or dtype than
        the forward pass's.

    Notes
    -----
    ``x_hat = (y - beta) / gamma`` is what :func:`batch_norm_backward` makes of x with mean beta and inv_std
    ``1 / gamma``; with ``gamma ** 2 * inv_std`` for gamma, its dx is ``gamma * inv_std * (dy - mean(dy) -
    x_hat * mean(dy * x_hat))``, for gamma of either sign. How far x_hat, and with it the gradients, may be
    off: see :func:`batch_norm_train_saving`. Channels whose x was kept have the plain gradients.

    Behind leaky_relu its input ``y if y > 0 else y / slope`` and ``dy if y > 0 else slope * dy`` are made
    first, in two passes more, each rounded to y's dtype. That takes one more tensor for the time of the call.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> result = batchnorm.batch_norm_train_saving(x, out=x)
    >>> dy = np.ones_like(x)
    >>> batchnorm.batch_norm_backward_from_output(dy, result.y, result.saved, out=dy).dx.shape
    (8, 64, 32, 32)
    """
    if unknown:
        _args.reject_keywords(batch_norm_backward_from_output, unknown)
    if not isinstance(saved, SavedForBackward):
        raise TypeError(
            f"saved is {_args._kind(saved)}, expected the saved of batch_norm_train_saving's result"
        )
    y = _args._tensor(y, "y")
    if y.shape != saved.shape or y.dtype != saved.dtype:
        raise ValueError(
            f"y has shape {y.shape} and dtype {y.dtype}, expected {saved.shape} and {saved.dtype} of the "
            f"forward pass"
        )
    dy = _args._like_x(dy, "dy", y)
    need_dx, *_, need_dresidual = _args.check_needs(needs)
    if need_dresidual:
        raise ValueError("needs contains 'dresidual', but there is no residual here; drop it")
    if out is not None:
        if not need_dx:
            raise ValueError(
                "out is given but needs does not contain 'dx', which it would receive; drop one of them"
            )
        _args._output(out, "out", y, {"dy": dy, "y": y}, {})
    kept, index = saved.kept_channels, (slice(None),) * saved.axis + (saved.kept_channels,)
    # First, as dx may take dy's place.
    from_x = None
    if kept.size:
        from_x = batch_norm_backward(
            np.take(dy, kept, saved.axis),
            saved.kept_x,
            saved.mean[kept],
            saved.inv_std[kept],
            *(None if v is None else v[kept] for v in (saved.gamma, saved.beta)),
            axis=saved.axis,
            activation=saved.activation,
            slope=saved.slope,
            needs=tuple(needs),
            num_threads=num_threads,
        )
    ones, zeros = np.ones(saved.mean.shape), np.zeros(saved.mean.shape)
    gamma = ones if saved.gamma is None else saved.gamma.astype(np.float64)
    beta = zeros if saved.beta is None else saved.beta.astype(np.float64)
    gamma[kept] = 1  # whatever comes of it is overwritten
    with np.errstate(over="ignore", invalid="ignore"):
        scale = gamma * gamma * saved.inv_std
    # A channel whose inv_std is NaN or infinite has NaN for y, and so for its gradients whatever its scale.
    scale = np.where(np.isfinite(scale), scale, 1.0)
    if saved.activation is not None:
        dy, y, out = _before_activation(dy, y, saved, num_threads, out, need_dx)
    result = batch_norm_backward(
        dy, y, beta, 1 / gamma, scale, axis=saved.axis, needs=tuple(needs), num_threads=num_threads, out=out
    )
    default = np.dtype(np.float64 if y.dtype == np.float64 else np.float32)
    types = [v.dtype for v in (saved.gamma, saved.beta) if v is not None] or [default]
    dx, dgamma, dbeta = result
    if from_x is not None:
        if dx is not None:
            dx[index] = from_x.dx
        for mended, right in ((dgamma, from_x.dgamma), (dbeta, from_x.dbeta)):
            if mended is not None:
                mended[kept] = right
    return Gradients(
        dx,
        None if dgamma is None else dgamma.astype(types[0]),
        None if dbeta is None else dbeta.astype(types[-1]),
    )


def _before_activation(
    dy: Array, y: Array, saved: SavedForBackward, num_threads: int | None, out: Array | None, need_dx: bool
) -> tuple[Array, Array, Array | None]:
    """leaky_relu's gradient and its input, and where dx goes: over one of them, in `out` if that is given."""
    assert saved.slope is not None
    zeros, ones = np.zeros(saved.mean.shape), np.ones(saved.mean.shape)
    over_dy = out is not None and _args._same_memory(out, dy)
    options: dict[str, Any] = {
        "axis": saved.axis, "activation": saved.activation, "num_threads": num_threads,
    }  # fmt: skip
    # The gradient first, as it needs the sign of y, whose place its input may take.
    g = batch_norm_backward(
        dy,
        y,
        zeros,
        ones,
        stats="fixed",
        slope=saved.slope,
        needs=("dx",),
        out=out if over_dy else None,
        **options,
    ).dx
    v = batch_norm(y, zeros, ones, eps=0.0, slope=1 / saved.slope, out=None if over_dy else out, **options)
    return g, v, (out if over_dy else v) if need_dx else None


def _invertible(
    activation: object, slope: object, dtype: np.dtype[Any]
) -> tuple[Literal["leaky_relu"] | None, float | None]:
    """An activation whose output tells its input, and its slope."""
    name = _args.check_activation(activation)
    factor = _args.check_slope(slope, name, dtype)
    if name is None:
        return None, None
    if name != "leaky_relu":
        raise ValueError(
            f"activation is {name!r}, from whose output the input cannot be recovered, expected None or "
            f"'leaky_relu'; use batch_norm_train and batch_norm_backward, or apply it afterwards"
        )
    if factor is None or not 2.0**-60 <= factor <= 2.0**60:
        raise ValueError(
            f"slope is {factor}, expected a number from 2**-60 to 2**60, so that the input can be recovered; "
            f"use batch_norm_train and batch_norm_backward"
        )
    return "leaky_relu", factor


def _lost(
    gamma: Array | None, beta: Array | None, x: Array, axis: int, slope: float | None
) -> NDArray[np.bool_]:
    """Of each channel, whether y does not tell x_hat well enough; the bound is in the Notes above."""
    channels = x.shape[axis]
    roundoff, smallest, largest = _FORMATS[x.dtype.name]
    factor = 1.0 if slope is None else slope
    size = np.ones(channels) if gamma is None else np.abs(gamma.astype(np.float64))
    offset = np.zeros(channels) if beta is None else np.abs(beta.astype(np.float64))
    coarse = smallest / 2 / min(factor, 1)
    digits_lost: NDArray[np.bool_] = roundoff * (offset + size) + coarse > roundoff ** (2 / 3) * size
    overflows: NDArray[np.bool_] = (offset + size * np.sqrt(x.size // channels)) * max(factor, 1) >= largest
    return digits_lost | overflows


# Half the distance from 1 to the next number, the smallest number above 0, the largest.
_FORMATS = {
    "float32": (2.0**-24, 2.0**-149, (2 - 2.0**-23) * 2.0**127),
    "float64": (2.0**-53, 2.0**-1074, (2 - 2.0**-52) * 2.0**1023),
    "float16": (2.0**-11, 2.0**-24, (2 - 2.0**-10) * 2.0**15),
    "bfloat16": (2.0**-8, 2.0**-133, (2 - 2.0**-7) * 2.0**127),
}
