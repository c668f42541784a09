"""The operations as functions: state comes in as arguments and goes out as results, or in place where the
docstring says so."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _args, _core, _images, _per_sample, _positions, _several_axes

__all__ = [
    "Gradients",
    "MeanVar",
    "ResidualGradients",
    "ResidualTrainResult",
    "TrainResult",
    "activation_mask_bytes",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_train",
    "moments",
]

Array = NDArray[Any]

_new = tuple.__new__


class MeanVar(NamedTuple):
    """Mean and variance per channel, float64."""

    mean: NDArray[np.float64]
    var: NDArray[np.float64]


class TrainResult(NamedTuple):
    """Result of :func:`batch_norm_train`: the output, and the float64 statistics that backward needs."""

    y: Array
    mean: NDArray[np.float64]
    inv_std: NDArray[np.float64]


class ResidualTrainResult(TrainResult):
    """A TrainResult, three values to unpack, that also holds ``activation_mask``: where the activation let
    values through, one bit per element, for :func:`batch_norm_backward`."""

    activation_mask: NDArray[np.uint8]


class Gradients(NamedTuple):
    """Result of :func:`batch_norm_backward`; what was not asked for is None."""

    dx: Array | Any
    dgamma: Array | Any
    dbeta: Array | Any


class ResidualGradients(Gradients):
    """Gradients, three values to unpack, with ``dresidual``, the residual's gradient, like x."""

    dresidual: Array


def batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    activation: _args.ActivationName | None = None,
    slope: float | None = None,
    residual: Array | None = None,
    activation_mask: NDArray[np.uint8] | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: NDArray[Any] | None = None,
    lengths_axis: int | None = None,
    dtype: DTypeLike | None = None,
    out_format: _args.DataFormatName | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
    **unknown: NoReturn,
) -> Array:
    """Normalise ``x`` with given statistics: inference.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Not changed, unless it is also ``out``. Or an image of uint8, int16 or uint16, without
        ``activation`` and ``residual``; see also :func:`normalize_images`.
    mean, var : array of float32 or float64, shape (C,)
        Statistics per channel, for example running statistics. Finite; ``var >= 0``.
    gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
        Scale and shift per channel, or of each sample per channel, N being the length of axis 0; absent means
        1 and 0. Finite.
    eps : float
        Added to the variance inside the square root; finite, >= 0.
    axis : int, or tuple of int
        The axis of ``x`` that holds the C channels. Several axes, for example (1, 2, 3), give each activation
        statistics of its own; per-channel arrays then have the shape of these axes, in increasing order.
    data_format : str, optional
        Alias of ``axis``: NC, NCL, NLC, NCHW, NHWC, NCDHW, NDHWC, channels_first or channels_last. Not
        together with ``axis``.
    activation : None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh" or "silu"
        Applied to the result in the same pass.
    slope : float, optional
        leaky_relu's factor for values below 0, 0.01 if absent; finite, may be 0 or negative. An error with
        another activation.
    residual : array like x, optional
        Added before the activation, in the same pass; x's shape and dtype.
    activation_mask : writable uint8 array of shape (activation_mask_bytes(x),), optional
        Receives where relu, leaky_relu or relu6 let values through unchanged, for a backward with
        ``stats="fixed"`` after a residual. Bits between runs of a channel keep their value.
    mask : bool array, optional
        False excludes positions: of shape (N,), or one that broadcasts to x's shape without its channel axis.
        What x and the residual hold there is not used, the result is 0 there.
    lengths : int array of shape (N,), optional
        The same for sequences: of sample i, steps from ``lengths[i]`` on do not count. Not together with
        ``mask``.
    lengths_axis : int, optional
        The axis of the steps. Of an ``x`` of 3 axes it is the one that is neither 0 nor the channel axis.
    dtype : dtype, optional
        Of the result, for integer ``x``: float32 (also if absent), float64, float16 or bfloat16.
    out_format : str, optional
        Layout of the result, for integer ``x``, with a name as for ``data_format``: "channels_first" moves
        the channels to axis 1, "channels_last" to the last. Absent means x's.
    num_threads : int, optional
        Threads for this call, 1 to 65536; absent means :func:`get_num_threads`. No result depends on it.
    out : array like x, optional
        Receives the result; may be ``x`` or ``residual`` itself (in place), no other overlap.

    Returns
    -------
    array of x's dtype, shape and memory order
        Of integer ``x``, of ``dtype`` and ``out_format``. ``out`` if it was given.

    Raises
    ------
    TypeError
        An argument of the wrong kind or dtype, an unknown keyword (``momentum`` among them), ``axis`` and
        ``data_format`` together.
    ValueError
        A wrong shape or value, NaN or Inf in a per-channel array, ``out`` that overlaps ``x`` without being
        ``x``, ``mask`` and ``lengths`` together, ``lengths`` beyond the axis, ``lengths_axis`` missing.

    Notes
    -----
    ``y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)`` [1]_, computed as ``(x - c) * a +
    b`` with per-channel numbers from float64; the part of the mean that float32 cannot hold goes into ``b``.
    Arithmetic on elements is float64 for float64 and integer input and float32 otherwise; the result for
    integers is that for ``x.astype(float64)``, rounded to float32, and from there to 16 bits.

    With v the activation's input: relu ``max(v, 0)``, leaky_relu ``v if v > 0 else slope * v`` [2]_, relu6
    ``min(max(v, 0), 6)`` [3]_, sigmoid ``1 / (1 + exp(-v))``, tanh, silu ``v * sigmoid(v)`` [4]_. The smooth
    ones are within 5 units in the last place of that arithmetic, at both ends of the range too. NaN stays
    NaN, and infinity gives the limit: silu(-inf) is -0.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2.
    .. [2] A. Maas, A. Hannun and A. Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models",
       2013, section 2.
    .. [3] A. Krizhevsky, "Convolutional Deep Belief Networks on CIFAR-10", 2010.
    .. [4] S. Elfwing, E. Uchibe and K. Doya, "Sigmoid-Weighted Linear Units for Neural Network Function
       Approximation in Reinforcement Learning", 2017, arXiv:1702.03118, equation 5.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.ones((8, 64, 32, 32), np.float32)
    >>> mean, var = np.zeros(64, np.float32), np.ones(64, np.float32)
    >>> batchnorm.batch_norm(x, mean, var).shape
    (8, 64, 32, 32)
    """
    if (
        data_format is None
        and dtype is None
        and out_format is None
        and not unknown
        and mask is None
        and lengths is None
        and lengths_axis is None
    ):
        y = _core.batch_norm(
            x,
            mean,
            var,
            gamma,
            beta,
            eps,
            axis,
            activation,
            slope,
            residual,
            activation_mask,
            num_threads,
            out,
            None,
            False,
            False,
        )
        if y is not None:
            return y
    if unknown:
        _args.reject_keywords(batch_norm, unknown)
    if type(axis) is tuple:
        return cast("Array", _several_axes.call(batch_norm, locals()))
    if _images.has_integers(x):
        _positions.refuse_integers(x, mask, lengths)
        return _images.batch_norm_integers(
            x, mean, var, gamma, beta, eps, axis, data_format, num_threads, out, dtype, out_format,
            activation=activation, slope=slope, residual=residual, activation_mask=activation_mask,
        )  # fmt: skip
    if dtype is not None or out_format is not None:
        _images.keep_like_x(x, axis, data_format, dtype, out_format)
        dtype = out_format = None
    if _per_sample.asked(x, gamma, beta, axis, data_format):
        return cast("Array", _per_sample.call(batch_norm, locals()))
    arguments = _args.inference(
        x,
        mean,
        var,
        gamma,
        beta,
        eps,
        axis,
        data_format,
        activation,
        slope,
        residual,
        activation_mask,
        num_threads,
        out,
        _positions.asked(mask, lengths, lengths_axis),
    )
    y = _core.batch_norm(*arguments)
    assert y is not None
    return y


def batch_norm_train(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    decay: float = 0.9,
    running_ddof: int = 1,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    activation: _args.ActivationName | None = None,
    slope: float | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: NDArray[Any] | None = None,
    lengths_axis: int | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
    **unknown: NoReturn,
) -> TrainResult:
    """Normalise ``x`` with its own batch statistics, and update running statistics in place.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Not changed, unless it is also ``out``.
    gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
        Scale and shift per channel, or of each sample per channel, N being the length of axis 0; absent means
        1 and 0. Finite.
    running_mean, running_var : writable array of float32 or float64, shape (C,), optional
        Both or neither. Updated in place once the call has succeeded.
    decay : float in [0, 1]
        Weight of the OLD running value (1 - ``momentum`` of PyTorch, ``momentum`` of Keras).
    running_ddof : 0 or 1
        The running variance receives ``var * n / (n - running_ddof)``: 1 as PyTorch and the paper, 0 as
        Keras, Flax and ONNX.
    eps : float
        Added to the variance inside the square root; finite, >= 0.
    weights : array of floats or ints, optional
        How often each position counts in the statistics, of shape (N,), one per sample, or one that
        broadcasts to x's shape without its channel axis; finite, >= 0. A weight of k gives the statistics of
        k copies. ``y`` is computed everywhere; to take a position out altogether use ``mask``, with which
        weights may be combined.
    mask, lengths, lengths_axis
        As in :func:`batch_norm`; what does not count is as if it were not in the batch.
    axis, data_format, activation, slope, residual, num_threads, out
        As in :func:`batch_norm`.

    Returns
    -------
    TrainResult
        ``y`` like x (dtype, shape, memory order), and ``mean`` and ``inv_std = 1 / sqrt(var + eps)``,
        float64 of shape (C,), for :func:`batch_norm_backward`. With ``residual`` and relu, leaky_relu or
        relu6 a :class:`ResidualTrainResult`, whose ``activation_mask`` backward needs as well; after
        sigmoid, tanh and silu it needs the ``residual`` itself. An empty batch gives an empty ``y``, NaN
        statistics and no update. So does one of which nothing counts, or of which all weights are 0; its
        ``y`` is 0.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; also one value per channel, only one running array, running arrays that are
        read-only, overlap or have the wrong shape, weights of a sum that is not more than ``running_ddof``.
        Nothing is changed then.

    Notes
    -----
    ``y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)`` with mean and population variance of
    the n values of each channel [1]_, with weights ``mean = sum(w * x) / n``, ``var = sum(w * (x - mean)^2) /
    n`` and ``n = sum(w)`` over the positions that count; ``running = decay * running + (1 - decay) * batch``.
    Sums run in float64, a second time about the mean where that is needed, so mean and variance keep their
    digits for any ``|mean| / std`` up to 1e6, and the result has the same bits for any number of threads.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> running_mean, running_var = np.zeros(64, np.float32), np.ones(64, np.float32)
    >>> y, mean, inv_std = batchnorm.batch_norm_train(x, running_mean=running_mean, running_var=running_var)
    >>> y.shape, y.dtype, mean.shape, mean.dtype
    ((8, 64, 32, 32), dtype('float32'), (64,), dtype('float64'))
    """
    if (
        data_format is None
        and not unknown
        and weights is None
        and mask is None
        and lengths is None
        and lengths_axis is None
    ):
        result = _core.batch_norm_train(
            x,
            gamma,
            beta,
            running_mean,
            running_var,
            decay,
            running_ddof,
            eps,
            axis,
            activation,
            slope,
            residual,
            num_threads,
            out,
            None,
            None,
            False,
            False,
        )
        if result is not None:
            return _new(TrainResult, result) if len(result) == 3 else _with_mask(result)
    if unknown:
        _args.reject_keywords(batch_norm_train, unknown)
    if type(axis) is tuple:
        return cast("TrainResult", _several_axes.call(batch_norm_train, locals()))
    if _per_sample.asked(x, gamma, beta, axis, data_format):
        return cast("TrainResult", _per_sample.call(batch_norm_train, locals()))
    arguments = _args.training(
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        decay,
        running_ddof,
        eps,
        axis,
        data_format,
        activation,
        slope,
        residual,
        num_threads,
        out,
        _positions.asked(mask, lengths, lengths_axis, weights),
    )
    result = _core.batch_norm_train(*arguments)
    assert result is not None
    return _new(TrainResult, result) if len(result) == 3 else _with_mask(result)


def _with_mask(result: tuple[Array, ...]) -> ResidualTrainResult:
    masked = _new(ResidualTrainResult, result[:3])
    masked.activation_mask = result[3]
    return masked


def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int | tuple[int, ...] = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    stats: Literal["batch", "fixed"] = "batch",
    activation: _args.ActivationName | None = None,
    slope: float | None = None,
    activation_mask: NDArray[np.uint8] | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: NDArray[Any] | None = None,
    lengths_axis: int | None = None,
    needs: tuple[str, ...] = ("dx", "dgamma", "dbeta"),
    num_threads: int | None = None,
    out: Array | None = None,
    out_residual: Array | None = None,
    **unknown: NoReturn,
) -> Gradients:
    """Gradients of batch normalization with respect to ``x``, ``gamma``, ``beta`` and the residual.

    Parameters
    ----------
    dy : array like x
        Gradient with respect to the output ``y``; x's shape and dtype.
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        The forward pass's input.
    mean, inv_std : array of float32 or float64, shape (C,)
        As :func:`batch_norm_train` returned them; or the given statistics, with ``inv_std = 1 / sqrt(var +
        eps)``. Keep them in float64: a float32 mean is wrong by 1e-2 standard deviations where ``|mean| /
        std`` is 1e6.
    gamma, beta : array of float32 or float64, shape (C,), optional
        The forward pass's scale and shift; ``beta`` matters only with an activation.
    axis, data_format
        As in :func:`batch_norm`.
    stats : "batch" or "fixed"
        "batch": the statistics came from ``x`` itself and gradients flow through them. "fixed": they were
        given (inference, frozen statistics).
    activation, slope
        The forward pass's. Its input is recomputed from ``x``, nothing needs to be kept, unless there was a
        residual.
    activation_mask : uint8 array, optional
        The forward pass's ``activation_mask``, for an ``x`` of the same memory order. After a residual with
        an activation it or ``residual`` is required: without them the gradients would be those of a forward
        without the residual, and nothing here can tell.
    residual : array like x, optional
        The forward pass's ``residual``, for any activation; after sigmoid, tanh and silu there is no other
        way. Not together with ``activation_mask``, and an error without an activation.
    weights, mask, lengths, lengths_axis
        The forward pass's. Positions that do not count give nothing to any gradient and get 0 in ``dx`` and
        ``dresidual``. Weights are those of the statistics: ``dy`` is not weighted. They are an error with
        ``stats="fixed"``, on which they have no influence.
    needs : tuple of "dx", "dgamma", "dbeta", "dresidual"
        What to compute; the rest is None and costs nothing. "dresidual" makes the result a
        :class:`ResidualGradients`.
    num_threads : int, optional
        As in :func:`batch_norm`.
    out, out_residual : array like x, optional
        Receive ``dx`` and ``dresidual``; one of them may be ``dy`` or ``residual`` itself (in place).

    Returns
    -------
    Gradients
        ``dx`` like x; ``dgamma`` and ``dbeta`` of shape (C,) in gamma's and beta's dtype, or, without them,
        float64 for float64 ``x`` and float32 otherwise. An empty batch gives zero ``dgamma`` and ``dbeta``.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; also ``dy`` of another shape or dtype, unknown names in ``needs``, ``out``
        without "dx" in ``needs``, ``out_residual`` without "dresidual", "dresidual" with an activation and
        with neither activation_mask nor residual, or with both.

    Notes
    -----
    With ``x_hat = (x - mean) * inv_std`` and n values per channel: ``dbeta = sum(dy)``, ``dgamma = sum(dy *
    x_hat)``, and ``dx = gamma * inv_std * (dy - dbeta / n - x_hat * dgamma / n)`` [1]_, or ``gamma *
    inv_std * dy`` with fixed statistics. With weights, the two terms of the statistics are multiplied by the
    position's weight w, and n is the sum of weights: ``dx = gamma * inv_std * (dy - w * dbeta / n - w * x_hat
    * dgamma / n)``. Sums run in float64.

    With an activation, ``dy * act'(v)`` takes the place of dy, and is the residual's gradient; v is the
    activation's input. At 0 and 6, where relu, leaky_relu and relu6 have no derivative, they take that of the
    flat side: 0, and ``slope`` for leaky_relu.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> y, mean, inv_std = batchnorm.batch_norm_train(x)
    >>> dx, dgamma, dbeta = batchnorm.batch_norm_backward(y, x, mean, inv_std)
    >>> dx.shape, dgamma.shape, dbeta.shape
    ((8, 64, 32, 32), (64,), (64,))

    Frozen statistics; that ``inv_std`` is not ``var`` or ``std`` cannot be checked:

    >>> running_mean, running_var = np.zeros(64, np.float32), np.ones(64, np.float32)
    >>> inv_std = 1 / np.sqrt(running_var.astype(np.float64) + 1e-5)
    >>> batchnorm.batch_norm_backward(y, x, running_mean, inv_std, stats="fixed").dx.shape
    (8, 64, 32, 32)
    """
    if (
        data_format is None
        and not unknown
        and weights is None
        and mask is None
        and lengths is None
        and lengths_axis is None
        and type(needs) is tuple
        and (needs == _args.GRADIENTS or needs == _args.NEEDS)
        and type(stats) is str
        and (stats == "batch" or stats == "fixed")
    ):
        result = _core.batch_norm_backward(
            dy,
            x,
            mean,
            inv_std,
            gamma,
            beta,
            axis,
            stats == "fixed",
            activation,
            slope,
            activation_mask,
            residual,
            True,
            True,
            True,
            len(needs) == 4,
            num_threads,
            out,
            out_residual,
            None,
            False,
            False,
        )
        if result is not None:
            return _new(Gradients, result) if len(result) == 3 else _with_dresidual(result)
    if unknown:
        _args.reject_keywords(batch_norm_backward, unknown)
    if type(axis) is tuple:
        return cast("Gradients", _several_axes.call(batch_norm_backward, locals()))
    if _per_sample.asked(x, gamma, beta, axis, data_format):
        return cast("Gradients", _per_sample.call(batch_norm_backward, locals()))
    arguments = _args.backward(
        dy, x, mean, inv_std, gamma, beta, axis, data_format, stats, activation, slope,
        activation_mask, residual, needs, num_threads, out, out_residual,
        _positions.asked(mask, lengths, lengths_axis, weights),
    )  # fmt: skip
    result = _core.batch_norm_backward(*arguments)
    assert result is not None
    return _new(Gradients, result) if len(result) == 3 else _with_dresidual(result)


def _with_dresidual(result: tuple[Any, ...]) -> ResidualGradients:
    gradients = _new(ResidualGradients, result[:3])
    gradients.dresidual = result[3]
    return gradients


def activation_mask_bytes(
    x: Array,
    *,
    axis: int | tuple[int, ...] = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    **unknown: NoReturn,
) -> int:
    """Number of bytes of an activation_mask for ``x``: about one bit per element.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Its shape and memory order count, its values do not. The activation_mask fits an ``x`` of the
        same shape and memory order.
    axis, data_format
        As in :func:`batch_norm`.

    Returns
    -------
    int
        The length of the uint8 array that ``activation_mask=`` of :func:`batch_norm` fills.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`.

    Notes
    -----
    Runs of a channel, and rows of at least 64 channels, start at whole bytes; 4 bytes at the end are spare.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> batchnorm.activation_mask_bytes(np.zeros((8, 64, 32, 32), np.float32))
    65540
    """
    if unknown:
        _args.reject_keywords(activation_mask_bytes, unknown)
    if type(axis) is tuple:
        return cast(int, _several_axes.call(activation_mask_bytes, locals()))
    return _core.activation_mask_bytes(*_args.mask_view(x, axis, data_format))


def moments(
    x: Array,
    *,
    axis: int | tuple[int, ...] = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    ddof: int = 0,
    keepdims: bool = False,
    weights: Array | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: NDArray[Any] | None = None,
    lengths_axis: int | None = None,
    shift: float | Array | None = None,
    num_threads: int | None = None,
    **unknown: NoReturn,
) -> MeanVar:
    """Mean and variance of each channel of ``x``.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Or an image of uint8, int16 or uint16.
    axis, data_format
        The channel axis, as in :func:`batch_norm`; all other axes are reduced.
    ddof : int
        The variance divides by ``n - ddof``.
    keepdims : bool
        Keep the reduced axes with length 1, so that the results broadcast against ``x``.
    weights, mask, lengths, lengths_axis
        Which positions count, and how often, as in :func:`batch_norm_train`; ``n`` is the sum of weights.
    shift : float, or array of shape (C,), optional
        TensorFlow's guess of the mean. Checked, and without influence: the result keeps its digits anyway.
    num_threads : int, optional
        As in :func:`batch_norm`.

    Returns
    -------
    MeanVar
        ``mean`` and ``var``, float64 of shape (C,), or of x's rank with ``keepdims``. NaN if ``x`` holds no
        values, or none that count.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; also ``ddof`` that is not less than the number of values per channel, or
        the sum of weights.

    Notes
    -----
    ``mean = K + sum(x - K) / n`` and ``var = (sum((x - K)^2) - sum(x - K)^2 / n) / (n - ddof)`` in float64,
    where the squares of float32 are exact. K is 0, or for float64 the mean of the channel's first 16 values;
    if the mean turns out so far from it that digits were lost (128 standard deviations, 2 for float64), once
    more with K the mean [1]_. The sums of integers are exact, and their mean and variance the correctly
    rounded ones.

    .. [1] T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", The American
       Statistician 37 (1983).

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    >>> mean, var = batchnorm.moments(x)
    >>> mean.shape, mean.tolist()
    ((3,), [7.5, 11.5, 15.5])

    Two sequences, of 4 and 2 steps:

    >>> batchnorm.moments(x, lengths=np.array([4, 2])).mean.shape
    (3,)
    """
    if (
        data_format is None
        and not unknown
        and keepdims is False
        and weights is None
        and mask is None
        and lengths is None
        and lengths_axis is None
        and shift is None
    ):
        result = _core.moments(x, axis, ddof, num_threads, None, False)
        if result is not None:
            return _new(MeanVar, result)
    if unknown:
        _args.reject_keywords(moments, unknown)
    if type(axis) is tuple:
        return cast("MeanVar", _several_axes.call(moments, locals()))
    keep = _args.check_flag(keepdims, "keepdims")
    positions = _positions.asked(mask, lengths, lengths_axis, weights)
    arguments = _args.statistics(x, axis, data_format, ddof, num_threads, positions)
    _args.check_shift(shift, x, arguments[1])
    result = _core.moments(*arguments)
    assert result is not None
    if not keep:
        return _new(MeanVar, result)
    shape = [1] * x.ndim
    shape[arguments[1]] = -1
    return MeanVar(result[0].reshape(shape), result[1].reshape(shape))
