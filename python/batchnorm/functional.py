"""The operations as functions: state comes in as arguments and goes out as results, or in place where the
docstring says so.

A function here is its signature and its docstring; the extension has its body and all its checks.
"""
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from numpy.typing import DTypeLike

from . import _core
from ._core import Saved
from .typing import (
    ActivationName,
    Array,
    ChannelAxis,
    DataFormatName,
    GradientName,
    Group,
    KeepName,
    Mask,
    OnNonfinite,
    RenormOptions,
)

__all__ = [
    "DoubleGradients",
    "Gradients",
    "Saved",
    "TrainResult",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_train",
]


class TrainResult(NamedTuple):
    """Result of :func:`batch_norm_train`, ``y, saved``.

    Attributes
    ----------
    y : array like x
        The output.
    saved : Saved
        The statistics, and what :func:`batch_norm_backward` needs. It refers to x (or y), which stays alive
        as long as it does.
    """

    y: Array
    saved: Saved


class _Three(NamedTuple):
    dx: Array | Any
    dgamma: Array | Any
    dbeta: Array | Any


class Gradients(_Three):
    """Result of :func:`batch_norm_backward`, ``dx, dgamma, dbeta``; what was not asked for is None.

    Attributes
    ----------
    dx : array like x, or None
    dgamma, dbeta : array like gamma and beta, or None
    dresidual : array like x, or None
        The residual's gradient. Not among the three values to unpack.
    """

    dresidual: Array | Any = None


class DoubleGradients(NamedTuple):
    """Result of :func:`batch_norm_double_backward`: gradients with respect to what backward depends on.

    Attributes
    ----------
    ddy, dx : array like x
    dgamma, dbeta : array like gamma and beta, or None if the forward had none
    dresidual : array like x, or None if the forward had no residual
    """

    ddy: Array
    dx: Array
    dgamma: Array | Any
    dbeta: Array | Any
    dresidual: Array | Any


_core.use_results(TrainResult, Gradients, DoubleGradients)


@_core.operation
def batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: ChannelAxis = 1,
    data_format: DataFormatName | None = None,
    activation: ActivationName | None = None,
    slope: float | None = None,
    residual: Array | None = None,
    mask: Mask | None = None,
    lengths: Array | None = None,
    lengths_axis: int | None = None,
    dtype: DTypeLike | None = None,
    out_format: DataFormatName | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise ``x`` with given statistics: inference.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Not changed, unless it is also ``out``. Or an image of uint8, int16 or uint16.
        In a build with CUDA also of a GPU, where the other arrays must be and the results are.
    mean, var : array of float32 or float64, shape (C,)
        Statistics per channel, for example running statistics. Finite; ``var >= 0``.
    gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
        Scale and shift per channel, or of each sample per channel, N being the length of axis 0. Absent means
        1 and 0. Finite.
    eps : float, default 1e-5
        Added to the variance inside the square root; finite, >= 0.
    channel_axis : int or tuple of int, default 1
        The axis of ``x`` that holds the C channels. All other axes are the batch. Several axes, for example
        (1, 2, 3), give each activation statistics of its own; per-channel arrays then have the shape of these
        axes, in increasing order. 0, the samples, cannot be among several.
    data_format : str, optional
        Another way to say ``channel_axis``: NC, NCL, NLC, NCHW, NHWC, NCDHW, NDHWC, channels_first or
        channels_last. Not together with it.
    activation : {None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"}
        Applied to the result in the same pass.
    slope : float, optional
        leaky_relu's factor for values below 0, 0.01 if absent; finite, may be 0 or negative. An error with
        another activation.
    residual : array like the result, optional
        Added before the activation, in the same pass.
    mask : bool array, optional
        True counts, as NumPy's where=; numpy.ma and PyTorch's key_padding_mask are the other way round. What
        does not count is not used, and the result is 0 there. The rank of the mask says what it covers, its
        sizes never do:

        - x's rank: each axis has x's length or 1. Only so can channels differ.
        - x's rank without the channel axes: these axes, in order.
        - rank 1: the samples.
    lengths : int array of shape (N,), optional
        The same for padded sequences: of sample i the first ``lengths[i]`` steps count. Not together with
        ``mask``.
    lengths_axis : int, optional
        The axis of the steps. It need not be given if only one axis holds neither samples nor channels.
    dtype : dtype, optional
        Of the result, for integer ``x``: float32 (also if absent), float64, float16 or bfloat16.
    out_format : str, optional
        Layout of the result, for integer ``x``, with a name as for ``data_format``: "channels_first" moves
        the channels to axis 1, "channels_last" to the last. Absent means x's.
    num_threads : int, optional
        Threads for this call, 1 to 65536; absent means :func:`get_num_threads`. No result depends on it.
    out : array like the result, optional
        Receives the result. May be ``x`` or ``residual`` itself (in place); no other overlap.

    Returns
    -------
    array of x's dtype, shape and memory order
        Of integer ``x``, of ``dtype`` and ``out_format``. ``out`` if it was given.

    Raises
    ------
    TypeError
        An argument of the wrong kind or dtype, or an unknown keyword, with its translation if another library
        has it.
    ValueError
        A wrong shape, value or combination. An error changes nothing.

    See Also
    --------
    batch_norm_train : With the batch's own statistics, or with given ones and a backward pass.
    normalize_images : For pixels.

    Notes
    -----
    ``y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)`` [1]_.

    Pass gamma and beta by name when coming from TensorFlow: ``tf.nn.batch_normalization`` takes offset (beta)
    before scale (gamma). Swapped arrays have the right shapes, so nothing can notice.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 2.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.ones((8, 64, 32, 32), np.float32)
    >>> mean, var = np.zeros(64, np.float32), np.ones(64, np.float32)
    >>> batchnorm.batch_norm(x, mean, var).shape
    (8, 64, 32, 32)
    """
    ...


@_core.operation
def batch_norm_train(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    mean: Array | None = None,
    var: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    decay: float | Array | None = 0.9,
    seen: float | Array | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    channel_axis: ChannelAxis = 1,
    data_format: DataFormatName | None = None,
    activation: ActivationName | None = None,
    slope: float | None = None,
    residual: Array | None = None,
    mask: Mask | None = None,
    lengths: Array | None = None,
    lengths_axis: int | None = None,
    weights: Array | None = None,
    renorm: RenormOptions | bool | None = None,
    virtual_batch_size: int | None = None,
    keep: KeepName = "x",
    group: Group | None = None,
    on_nonfinite: OnNonfinite = "propagate",
    num_threads: int | None = None,
    out: Array | None = None,
) -> TrainResult:
    """Normalise ``x`` with its own batch statistics, and update running statistics in place.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Not changed, unless it is also ``out``.
        In a build with CUDA also of a GPU, where the other arrays must be and the results are.
    gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
        As in :func:`batch_norm`.
    mean, var : array of float32 or float64, shape (C,), optional
        Both or neither. Statistics to normalise with instead of the batch's: frozen statistics, with a
        backward pass that takes them for constants.
    running_mean, running_var : writable array of float32 or float64, shape (C,), optional
        Both or neither. Updated in place once the call has succeeded.
    decay : float in [0, 1], array of shape (C,), or None, default 0.9
        Weight of the OLD running value (1 - ``momentum`` of PyTorch, ``momentum`` of Keras). None: a
        cumulative average, ``seen / (seen + n)``.
    seen : float, or array of shape (C,), optional
        With ``decay=None``: how many values of a channel the running statistics hold already, 0 at first.
    running_ddof : {1, 0}
        The running variance receives ``var * n / (n - running_ddof)``: 1 as PyTorch and the paper, 0 as
        Keras, Flax and ONNX.
    eps : float, default 1e-5
        As in :func:`batch_norm`.
    channel_axis : int or tuple of int, default 1
        As in :func:`batch_norm`.
    data_format : str, optional
        As in :func:`batch_norm`.
    activation : {None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"}
        As in :func:`batch_norm`.
    slope : float, optional
        As in :func:`batch_norm`.
    residual : array like x, optional
        As in :func:`batch_norm`. Backward then gives its gradient too.
    mask : bool array, optional
        True counts, as NumPy's where=; numpy.ma and PyTorch's key_padding_mask are the other way round.
        Shapes as in :func:`batch_norm`. What does not count is as if it were not in the batch.
    lengths : int array of shape (N,), optional
        As in :func:`batch_norm`.
    lengths_axis : int, optional
        As in :func:`batch_norm`.
    weights : array of floats or ints, optional
        How often each position counts in the statistics; finite, >= 0. A weight of k is as good as k copies.
        ``y`` is computed everywhere. Shapes as for ``mask``, with a channel axis of length 1.
    renorm : bool or mapping, optional
        Batch renormalisation: the batch's statistics are corrected towards a reference, within the limits
        ``rmin`` (0), ``rmax`` (inf) and ``dmax`` (inf). The reference is the running pair, or ``mean`` and
        ``std``, arrays of shape (C,) that are updated in place if ``decay`` is given. True: no limits.
    virtual_batch_size : int, optional
        Normalise parts of so many samples each by its own statistics (ghost batches). The last part may be
        shorter; with a single value per channel it joins the one before. 1 is instance normalisation. The
        running statistics receive the parts' average, weighted by n.
    keep : {"x", "y", None}
        What ``saved`` refers to for backward. "y" recovers x from the output; with ``out=x`` a network then
        keeps one tensor instead of two. It takes no residual and no activation but leaky_relu. None: nothing,
        and backward is given ``x=``.
    group : Group, optional
        Other processes that hold parts of the batch, each any number of samples, also none: an mpi4py
        communicator, or another object with ``allgather(array)`` (:mod:`batchnorm.distributed`). Statistics,
        running statistics and dx are those of the whole batch, the same bits however it is shared out. Every
        process makes the same calls with the same options, the backward ones too. The samples are on axis 0.
        Not with ``virtual_batch_size``.
    on_nonfinite : {"propagate", "raise", "skip"}
        What NaN or Inf that would enter the running statistics does: it enters its channel; the call is an
        error that writes nothing; or the batch is left out of them, as ``saved.updated`` tells.
    num_threads : int, optional
        As in :func:`batch_norm`.
    out : array like x, optional
        As in :func:`batch_norm`. With ``out=x`` a backward pass needs ``keep="y"``.

    Returns
    -------
    TrainResult
        ``y, saved``: the output, like x (dtype, shape, memory order), and what :func:`batch_norm_backward`
        needs. ``saved.mean``, ``.var``, ``.inv_std`` and ``.count`` are float64 of shape (C,), or of shape
        (parts, C) with ``virtual_batch_size``.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; also a batch in which no channel has two values, only one running array,
        running arrays that are read-only or overlap. Nothing is changed then.

    See Also
    --------
    batch_norm_backward : The gradients, from ``saved``.
    batch_norm : With given statistics, and nothing kept.
    BatchNorm : The layer, which holds the state.

    Notes
    -----
    ``y = act(x_hat * gamma + beta + residual)`` with ``x_hat = (x - mean) / sqrt(var + eps)``, mean and
    population variance of the n values of each channel [1]_, and ``running = decay * running + (1 - decay) *
    batch``. With weights ``mean = sum(w * x) / n``, ``var = sum(w * (x - mean)^2) / n`` and ``n = sum(w)``.
    Batch renormalisation has ``x_hat * r + d`` for ``x_hat``, with ``r = clip(std / reference, rmin, rmax)``
    and ``d = clip((mean - reference mean) / reference, -dmax, dmax)`` [2]_; ``saved`` has them.

    Too few values are an error only where no part and channel has two. Otherwise a channel of which no value
    counts has NaN statistics and y = 0, one with a single value has x_hat = 0, and neither enters the running
    statistics of that channel. An empty batch gives an empty y and no update.

    ``keep="y"`` stores x itself of channels whose output does not tell it, those with a small ``|gamma|``
    against ``|beta|`` (``saved.kept_channels``). With gamma = 0 everywhere nothing is saved.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 1.
    .. [2] S. Ioffe, "Batch Renormalization", 2017, arXiv:1702.03275, algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> running_mean, running_var = np.zeros(64, np.float32), np.ones(64, np.float32)
    >>> y, saved = batchnorm.batch_norm_train(x, running_mean=running_mean, running_var=running_var)
    >>> y.shape, y.dtype, saved.mean.shape, saved.mean.dtype
    ((8, 64, 32, 32), dtype('float32'), (64,), dtype('float64'))
    """
    ...


@_core.operation
def batch_norm_backward(
    dy: Array,
    saved: Saved,
    *,
    x: Array | None = None,
    residual: Array | None = None,
    needs: Collection[GradientName] | None = None,
    all_reduce: bool = False,
    num_threads: int | None = None,
    out: Array | None = None,
    out_residual: Array | None = None,
) -> Gradients:
    """Gradients of batch normalization with respect to ``x``, ``gamma``, ``beta`` and the residual.

    Parameters
    ----------
    dy : array like x
        Gradient with respect to the output ``y``; x's shape and dtype.
    saved : Saved
        The forward pass's, from :func:`batch_norm_train`, or of statistics of your own ``Saved.of``. It is
        not used up: there may be several backward passes.
    x : array, optional
        The forward pass's input, for a ``saved`` with ``keep=None``, which holds no tensor.
    residual : array like x, optional
        The forward pass's residual, for the same.
    needs : collection of "dx", "dgamma", "dbeta", "dresidual", optional
        What to compute; the rest is None and costs nothing. Absent means a gradient for everything that the
        forward had.
    all_reduce : bool, default False
        After a forward with a group: False gives this process's dgamma and dbeta, to be added up as all other
        gradients are; True those of the whole batch, exactly. Of a gamma of each sample both are the same.
    num_threads : int, optional
        As in :func:`batch_norm`.
    out, out_residual : array like x, optional
        Receive ``dx`` and ``dresidual``. One of them may be ``dy``, and ``out`` the kept tensor (in place).

    Returns
    -------
    Gradients
        ``dx, dgamma, dbeta``, and ``dresidual`` as an attribute. dx is like x, dgamma and dbeta have gamma's
        and beta's shape and dtype. Of a parameter that the forward did not have, asked for by name, the
        gradient has shape (C,) and is float64 for float64 x, else float32, or of the other parameter's dtype.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; also ``dy`` of another shape or dtype than the forward's output, unknown names
        in ``needs``, ``out`` without "dx" in it.
    RuntimeError
        ``saved`` holds no tensor, or its tensor was overwritten after the forward pass.

    See Also
    --------
    batch_norm_double_backward : Gradients of these.

    Notes
    -----
    With ``g = dy * act'``, ``x_hat = (x - mean) * inv_std`` and n values per channel: ``dbeta = sum(g)``,
    ``dgamma = sum(g * x_hat)``, ``dx = gamma * inv_std * (g - dbeta / n - x_hat * dgamma / n)`` [1]_, or
    ``gamma * inv_std * g`` with given statistics; g is the residual's gradient. Weights multiply the two
    terms of the statistics, and n is their sum. Where x does not count, every gradient is 0. At 0 and 6,
    where relu, leaky_relu and relu6 have no derivative, act' is that of the flat side.

    That the kept tensor was overwritten is noticed mostly, not always: a few of its values are compared.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x, z, dy = np.random.default_rng(0).normal(size=(3, 8, 64, 32, 32)).astype(np.float32)
    >>> gamma, beta = np.ones(64, np.float32), np.zeros(64, np.float32)
    >>> y, saved = batchnorm.batch_norm_train(x, gamma, beta, residual=z, activation="relu")
    >>> g = batchnorm.batch_norm_backward(dy, saved)
    >>> g.dx.shape, g.dgamma.shape, g.dbeta.shape, g.dresidual.shape
    ((8, 64, 32, 32), (64,), (64,), (8, 64, 32, 32))
    >>> dx, dgamma, dbeta = g
    """
    ...


@_core.operation
def batch_norm_double_backward(
    dy: Array,
    saved: Saved,
    *,
    ddx: Array | None = None,
    ddgamma: Array | None = None,
    ddbeta: Array | None = None,
    ddresidual: Array | None = None,
    x: Array | None = None,
    residual: Array | None = None,
    num_threads: int | None = None,
) -> DoubleGradients:
    """Gradients of what :func:`batch_norm_backward` computes: gradient penalties, second-order methods.

    For a loss that depends on ``dx, dgamma, dbeta = batch_norm_backward(dy, saved)``. There is no third
    order: this function has no backward of its own.

    Parameters
    ----------
    dy : array like x
        The one that :func:`batch_norm_backward` was given.
    saved : Saved
        The forward pass's.
    ddx, ddresidual : array like x, optional
        The loss' gradients with respect to ``dx`` and ``dresidual``; absent means 0. One of the four is
        required.
    ddgamma, ddbeta : array of float32 or float64, shape of gamma and beta, optional
        The loss' gradients with respect to ``dgamma`` and ``dbeta``; absent means 0. Finite.
    x : array, optional
        As in :func:`batch_norm_backward`.
    residual : array like x, optional
        As in :func:`batch_norm_backward`.
    num_threads : int, optional
        As in :func:`batch_norm`.

    Returns
    -------
    DoubleGradients
        ``ddy, dx, dgamma, dbeta, dresidual``: what reaches dy, x, gamma, beta and the residual through the
        backward pass alone. The forward pass's own gradients come on top.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`.

    Notes
    -----
    With ``s = inv_std``, ``h = (x - mean) s``, v the activation's input, ``g = dy act'(v)``, u = ddx, M the
    mean over a channel's n values, and ``P(a) = a - M(a) - h M(a h)``, backward is ``dx = gamma s P(g)``,
    ``dgamma = sum g h``, ``dbeta = sum g`` [1]_. Its derivatives are

    - with respect to g: ``G = gamma s P(u) + ddgamma h + ddbeta + ddresidual``
    - with respect to gamma: ``s sum u P(g)``
    - with respect to x: ``s (a P(u) + b P(g)) - gamma s^2 h sum(u P(g)) / n``, where ``a = -gamma s M(g h)``
      and ``b = ddgamma - gamma s M(u h)``

    and ``ddy = G act'(v)``. With a smooth activation, ``G dy act''(v)`` goes through the forward pass's own
    gradient as well. Everything is computed in float64.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x, dy = np.random.default_rng(0).normal(size=(2, 8, 16, 5, 5))
    >>> y, saved = batchnorm.batch_norm_train(x, np.ones(16), np.zeros(16), activation="silu")
    >>> dx = batchnorm.batch_norm_backward(dy, saved).dx
    >>> second = batchnorm.batch_norm_double_backward(dy, saved, ddx=2 * dx)  # of sum(dx**2)
    >>> second.ddy.shape, second.dx.shape, second.dgamma.shape, second.dbeta.shape
    ((8, 16, 5, 5), (8, 16, 5, 5), (16,), (16,))
    """
    ...


@_core.operation
def saved_of(
    x: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    stats: Literal["batch", "fixed"] = "batch",
    channel_axis: ChannelAxis = 1,
    data_format: DataFormatName | None = None,
    activation: ActivationName | None = None,
    slope: float | None = None,
    residual: Array | None = None,
    mask: Mask | None = None,
    lengths: Array | None = None,
    lengths_axis: int | None = None,
    weights: Array | None = None,
) -> Saved:
    """Make the Saved of a forward pass from its arguments and statistics: one that was not ours, or is gone.

    Prefer the ``saved`` of :func:`batch_norm_train`. Nothing here can tell whether the statistics and options
    are the forward's, and what is left out gives wrong gradients without a word.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        The forward pass's input.
    mean, inv_std : array of float32 or float64, shape (C,)
        Its statistics, ``inv_std = 1 / sqrt(var + eps)``. Keep them in float64: a float32 mean is wrong by
        1e-2 standard deviations where ``|mean| / std`` is 1e6.
    gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
        The forward's.
    stats : {"batch", "fixed"}
        "batch": the statistics came from ``x`` itself, and gradients flow through them. "fixed": they were
        given.
    channel_axis : int or tuple of int, default 1
        As in :func:`batch_norm`.
    data_format : str, optional
        As in :func:`batch_norm`.
    activation : {None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"}
        The forward's.
    slope : float, optional
        The forward's.
    residual : array like x, optional
        The forward's.
    mask : bool array, optional
        The forward's.
    lengths : int array of shape (N,), optional
        The forward's.
    lengths_axis : int, optional
        The forward's.
    weights : array of floats or ints, optional
        The forward's.

    Returns
    -------
    Saved
        For :func:`batch_norm_backward` and :func:`batch_norm_double_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_train`; also ``stats`` that is neither.

    Notes
    -----
    ``inv_std = 1 / sqrt(var + eps)`` [1]_, neither var nor std: that too cannot be checked.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x, dy = np.random.default_rng(0).normal(size=(2, 8, 64, 6, 6))
    >>> mean, var = np.zeros(64), np.ones(64)
    >>> saved = batchnorm.Saved.of(x, mean, 1 / np.sqrt(var + 1e-5), stats="fixed")
    >>> batchnorm.batch_norm_backward(dy, saved).dx.shape
    (8, 64, 6, 6)
    """
    ...
