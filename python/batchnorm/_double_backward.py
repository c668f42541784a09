"""The gradient of the gradient: what second-order methods, gradient penalties and Hessian products need."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from . import _args, _core, _several_axes

__all__ = ["DoubleGradients", "batch_norm_double_backward"]

Array = NDArray[Any]


class DoubleGradients(NamedTuple):
    """Result of :func:`batch_norm_double_backward`: gradients with respect to ``dy``, ``x`` and ``gamma``."""

    ddy: Array
    dx: Array
    dgamma: Array


def batch_norm_double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
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
    num_threads: int | None = None,
    **unknown: NoReturn,
) -> DoubleGradients:
    """Gradients of :func:`batch_norm_backward`'s results with respect to ``dy``, ``x`` and ``gamma``.

    For a loss that depends on ``dx, dgamma, dbeta = batch_norm_backward(dy, x, mean, inv_std, gamma)``. There
    is no third order: this function has no backward of its own.

    Parameters
    ----------
    ddx : array like x, or None
        The loss' gradient with respect to ``dx``; None for zeros.
    ddgamma, ddbeta : array of float32 or float64, shape (C,), or None
        The loss' gradients with respect to ``dgamma`` and ``dbeta``; None for zeros. Finite.
    dy, x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        The arguments of the backward pass, of one shape and dtype.
    mean, inv_std, gamma, beta
        As in :func:`batch_norm_backward`; ``beta`` matters only with an activation.
    axis, data_format, stats, num_threads
        As in :func:`batch_norm_backward`.
    activation : None, "relu", "leaky_relu" or "relu6"
        The forward pass's activation. These have no curvature: where relu was off, ``dy`` counts as 0, and so
        does the gradient with respect to it.
    slope : float, optional
        leaky_relu's, as in :func:`batch_norm`.

    Returns
    -------
    DoubleGradients
        ``ddy`` and ``dx`` like x, and ``dgamma`` of shape (C,) in gamma's dtype, or, without it, float64 for
        float64 ``x`` and float32 otherwise. ``dx`` is what reaches x through the backward pass alone: the
        forward pass's own gradient comes on top.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_backward`; also another activation, whose curvature is not computed, and all of
        ``ddx``, ``ddgamma`` and ``ddbeta`` None.

    Notes
    -----
    With ``s = inv_std``, ``h = (x - mean) s``, g = dy behind the activation, u = ddx, means over the n
    values of a channel written M, and ``P(a) = a - M(a) - h M(a h)``, the backward pass is ``dx = gamma s
    P(g)``, ``dgamma = sum g h``, ``dbeta = sum g`` [1]_. Differentiating ``sum u dx + ddgamma dgamma + ddbeta
    dbeta``:

    - ``ddy = gamma s P(u) + ddgamma h + ddbeta``
    - ``dgamma = s A`` with ``A = sum P(u) g = sum u g - n M(u) M(g) - n M(u h) M(g h)``
    - ``dx = s (a P(u) + b P(g)) - gamma s^2 h A / n`` with ``a = -gamma s M(g h)`` and ``b = ddgamma - gamma
      s M(u h)``

    With fixed statistics ``ddy = gamma s u + ddgamma h + ddbeta``, ``dgamma = s sum u g``, ``dx = ddgamma s
    g``. Sums run in float64. Of float32 data, ``dx`` takes two elementwise steps of a few roundings each.

    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> rng = np.random.default_rng(0)
    >>> x, dy, ddx = rng.normal(size=(3, 8, 16, 5, 5))
    >>> _, mean, inv_std = batchnorm.batch_norm_train(x)
    >>> second = batchnorm.batch_norm_double_backward(ddx, None, None, dy, x, mean, inv_std)
    >>> second.ddy.shape, second.dx.shape, second.dgamma.shape
    ((8, 16, 5, 5), (8, 16, 5, 5), (16,))
    """
    if unknown:
        _args.reject_keywords(batch_norm_double_backward, unknown)
    if type(axis) is tuple:
        return cast("DoubleGradients", _several_axes.call(batch_norm_double_backward, locals()))
    call = _Call(dy, x, mean, inv_std, gamma, beta, axis, data_format, stats, activation, slope, num_threads)
    return call.second_order(ddx, ddgamma, ddbeta)


class _Call:
    """One call's arguments, checked, and the two passes over tensors that its formulas are made of."""

    def __init__(
        self, dy: Any, x: Any, mean: Any, inv_std: Any, gamma: Any, beta: Any, axis: Any, data_format: Any,
        stats: Any, activation: Any, slope: Any, num_threads: Any,
    ) -> None:  # fmt: skip
        if activation is not None and activation not in _args.PIECEWISE_LINEAR:
            _args.check_activation(activation)
            raise ValueError(
                f"activation is {activation!r}, whose curvature is not computed, expected None, "
                f"{', '.join(map(repr, _args.PIECEWISE_LINEAR))}; apply the activation, and its own second "
                f"order, outside"
            )
        prepared = _args.backward(
            dy, x, mean, inv_std, gamma, beta, axis, data_format, stats, activation, slope, None,
            None, ("dx", "dgamma", "dbeta"), num_threads, None, None,
        )  # fmt: skip
        self.dy, self.x, self.mean, self.inv_std, self.gamma, self.beta, self.axis, self.fixed = prepared[:8]
        self.activation, self.slope, self.threads = activation, prepared[9], num_threads
        self.count = self.x.size // self.x.shape[self.axis]
        wide = self.x.dtype == np.float64 if gamma is None else gamma.dtype == np.float64
        self.vector = np.dtype(np.float64 if wide else np.float32)

    def _sums(self, a: Array, b: Array, shift: Array | None) -> tuple[Array, Array]:
        return cast("tuple[Array, Array]", _core.channel_sums(a, b, self.axis, shift, self.threads))

    def _combine(self, a: Array, b: Array, k_a: Any, center: Any, k_b: Any, k_0: Any, out: Any) -> Array:
        """a * k_a + (b - center) * k_b + k_0, numbers per channel."""
        return _core.combine(a, b, k_a, center, k_b, k_0, self.axis, None, self.threads, out)

    def _gated(self, a: Array, out: Array | None) -> Array:
        """`a` times the activation's slope at the forward's value."""
        if self.activation is None:
            return a
        gate = (self.activation, self.inv_std, self.gamma, self.beta, self.slope)
        options = (None, self.mean, None, None, self.axis, gate, self.threads, out)
        return _core.combine(a, self.x, *options)

    def _cotangent(self, value: Any, name: str) -> Array:
        """ddgamma or ddbeta in float64, zeros for None."""
        if value is None:
            return np.zeros(self.x.shape[self.axis])
        return _args._per_channel(value, name, self.x, self.axis).astype(np.float64)

    def second_order(self, ddx: Any, ddgamma: Any, ddbeta: Any) -> DoubleGradients:
        if ddx is None and ddgamma is None and ddbeta is None:
            raise ValueError("ddx, ddgamma and ddbeta are all None, expected at least one of them")
        x, mean, n = self.x, self.mean, self.count
        v, w = self._cotangent(ddgamma, "ddgamma"), self._cotangent(ddbeta, "ddbeta")
        s = self.inv_std.astype(np.float64)
        slope = s if self.gamma is None else s * self.gamma
        if ddx is not None:
            _, ddx = _args._in_one_direction(x, _args._like_x(ddx, "ddx", x), {}, self.axis)
        if n == 0:
            return DoubleGradients(np.empty_like(x), np.empty_like(x), np.zeros(len(s), self.vector))
        g = self._gated(self.dy, None)
        zero = np.zeros(len(s))
        u_mean = u_h = g_mean = g_h = aligned = zero  # M(u), M(u h), M(g), M(g h), A
        if ddx is not None:
            _, u_g = self._sums(ddx, g, None)
            aligned = u_g
        if not self.fixed:
            sum_g, sum_g_x = self._sums(g, x, mean)
            g_mean, g_h = sum_g / n, sum_g_x * s / n
            if ddx is not None:
                sum_u, sum_u_x = self._sums(ddx, x, mean)
                u_mean, u_h = sum_u / n, sum_u_x * s / n
                aligned = u_g - n * u_mean * g_mean - n * u_h * g_h
        a, b = -slope * g_h, v - slope * u_h
        to_h = s * (v - slope * u_h)
        first = x if ddx is None else ddx
        ddy = self._combine(first, x, zero if ddx is None else slope, mean, to_h, w - slope * u_mean, None)
        ddy = self._gated(ddy, ddy)
        if self.fixed:
            dx = self._combine(g, x, v * s, None, None, None, None)
        else:
            k_x = -s * s * (a * u_h + b * g_h) - slope * s * s * aligned / n
            k_0 = -s * (a * u_mean + b * g_mean)
            if ddx is None:
                dx = self._combine(g, x, s * b, mean, k_x, k_0, None)
            else:
                dx = self._combine(ddx, g, s * a, None, s * b, None, None)
                dx = self._combine(dx, x, None, mean, k_x, k_0, dx)
        return DoubleGradients(ddy, dx, (s * aligned).astype(self.vector))
