"""What can be asked of a layer beside calling it: what is wrong, new statistics, a history, a pure call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _args, _diagnosis, _history, _recalibrate
from ._diagnosis import Diagnosis
from ._functional import Gradients, ResidualGradients
from ._history import History
from ._layer_state import LayerState

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._layer import BatchNorm


class _Pair(NamedTuple):
    y: NDArray[Any]
    state: dict[str, NDArray[Any]]


class Applied(_Pair):
    """Result of ``bn.apply``: y and the new state, two values to unpack, with the way back."""

    _layer: BatchNorm

    def backward(self, dy: NDArray[Any]) -> Gradients:
        """Gradients of the call: dx, dgamma, dbeta, and of a residual ``.dresidual``; nothing is changed."""
        dx, layer = self._layer.backward(dy), self._layer
        if layer.dresidual is None:
            return Gradients(dx, layer.dgamma, layer.dbeta)
        gradients = ResidualGradients(dx, layer.dgamma, layer.dbeta)
        gradients.dresidual = layer.dresidual
        return gradients


class LayerTools(LayerState):
    """The part of BatchNorm that looks at a layer and mends it."""

    __slots__ = ()

    # ---- what is wrong -------------------------------------------------------------------------------------

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
        return _diagnosis.report(self)

    def diagnose(
        self,
        x: NDArray[Any],
        *,
        mask: NDArray[np.bool_] | None = None,
        lengths: NDArray[Any] | None = None,
        lengths_axis: int | None = None,
        weights: NDArray[Any] | None = None,
    ) -> Diagnosis:
        """Why is the network good in training and bad in testing? Look at this layer with one of its inputs.

        Tells apart statistics that were never updated, cold ones (with the number of updates that are
        missing), NaN or negative ones, and ones that do not belong to this data (which channels, how far);
        and says whether the batch is too small, has constant channels, or variances below eps. Each finding
        names its remedy. Nothing is changed.

        Parameters
        ----------
        x : ndarray
            An input of this layer, as of a call: best a large one of the data that tests badly.
        mask, lengths, lengths_axis, weights : optional
            Which positions count, as in a call.

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
        self._check_channels(x)
        given = {"mask": mask, "lengths": lengths, "lengths_axis": lengths_axis, "weights": weights}
        positions = {name: value for name, value in given.items() if value is not None}
        return _diagnosis.diagnose(self, x, self._where(), positions)

    def _where(self) -> dict[str, Any]:
        return {"axis": self._axis} if self._data_format is None else {"data_format": self._data_format}

    def _check_channels(self, x: Any) -> None:
        """Raise if `x` has another channel count than this layer."""
        raise NotImplementedError  # by BatchNorm

    # ---- new statistics ------------------------------------------------------------------------------------

    def recalibrate(self, batches: Iterable[NDArray[Any]]) -> Self:
        """Replace the running statistics by those of the data; return the layer.

        Parameters
        ----------
        batches : iterable of ndarray
            Inputs of this layer, of any sizes. For a layer inside a network use ``batchnorm.recalibrate`` or
            ``recalibrating()``.

        Raises
        ------
        TypeError, ValueError
            No values, NaN or Inf, or no inputs of this layer. Nothing is changed then, nor if `batches`
            raises.

        Notes
        -----
        Exactly the mean and variance of one giant batch, every value weighing the same, by ``Moments``,
        rounded once. `num_updates` and `num_samples` then say what is in the statistics, and training goes on
        from there. A frozen layer is recalibrated, too: this is no training.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn, x = BatchNorm(2), np.arange(12, dtype=np.float32).reshape(6, 2)
        >>> bn.recalibrate([x[:4], x[4:]]).running_mean.tolist()
        [5.0, 6.0]
        """
        if isinstance(batches, np.ndarray):
            raise TypeError("batches is an array, expected an iterable of arrays; use recalibrate([x])")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches is {_args._kind(batches)}, expected an iterable of arrays")
        collector = _recalibrate.Collector()
        for x in batches:
            self._check_channels(x)
            collector.add(collector.measure(x, self._where()))
        mean, var = _recalibrate.population(self, collector)
        if self._num_features is None:
            self._allocate(len(mean))
            self._initial = None
        _recalibrate.commit(self, collector, mean, var)
        return self

    @contextlib.contextmanager
    def recalibrating(self) -> Iterator[Self]:
        """Collect what passes through the layer, and make it the running statistics at the end.

        Inside this context calls normalise with the batch's own statistics, whatever the mode, and update
        nothing; at the end the running statistics become those of everything seen, as ``recalibrate`` does.
        An error inside changes nothing. For several layers at once see ``batchnorm.recalibrate``.

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
        >>> bn.running_mean.tolist(), bn.num_samples
        ([1.0, 1.0], 12)
        """
        with _recalibrate.recalibrating([self]):
            yield self

    # ---- history -------------------------------------------------------------------------------------------

    @property
    def history(self) -> History | None:
        """The statistics of past updates, if they are recorded; see ``record_history``."""
        history: History | None = self._history
        return history

    def record_history(self, limit: int | None = 500) -> Self:
        """Keep batch and running statistics of up to `limit` updates from now on; return the layer.

        They are evenly spread over all updates from now on: memory stays below ``16 * limit * C`` bytes. None
        ends the recording and forgets. What has been recorded is no part of the state.
        """
        self._history = None if limit is None else History(_history.checked_limit(limit))
        self._refresh()
        return self

    def plot_statistics(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        channels: Sequence[int] | None = None,
        title: str | None = None,
    ) -> Any:
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
        return _history.plot(self, channels, path, title)

    # ---- without side effects ------------------------------------------------------------------------------

    def apply(self, state: Mapping[str, NDArray[Any]], x: NDArray[Any], **options: Any) -> Applied:
        """Call a layer with another state, its settings among it, in this one's mode; nothing is changed.

        Parameters
        ----------
        state : mapping
            As ``state_dict`` gives it.
        x : ndarray
            As in a call.
        options
            Keywords of a call, but for ``out``.

        Returns
        -------
        Applied
            ``y`` and the new ``state``, two values to unpack. ``result.backward(dy)`` gives the gradients
            ``dx, dgamma, dbeta``.

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
        >>> int(state["num_updates"]), int(new_state["num_updates"]), bn.num_updates
        (0, 1, 0)
        """
        if "out" in options:
            raise TypeError("apply() has no argument 'out': it changes nothing; drop it")
        layer: Any = self.clone().load_state_dict(state)
        result = Applied(layer(x, **options), layer.state_dict())
        result._layer = layer
        return result
