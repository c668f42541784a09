"""What an optimiser sees of a layer: trainable arrays with their gradients, and which of them to decay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from numpy.typing import NDArray

from . import _args

__all__ = ["Parameter", "weight_decay_groups"]


class Parameter:
    """A trainable array of a layer and its gradient; ``name, value, grad = parameter`` works too.

    `name` is "gamma" or "beta". `grad` is that of the last ``backward``, None before the first; each backward
    makes a new array, so ask ``parameters()`` again after it. `weight_decay` is False: an L2 penalty on gamma
    or beta does not make the network simpler, as the weights before it can undo any scale.
    """

    __slots__ = ("_value", "grad", "name")

    weight_decay = False

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


def weight_decay_groups(parameters: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Split a network's parameters into those an optimiser should decay and those it should not.

    Parameters
    ----------
    parameters : iterable
        :class:`Parameter` objects of BatchNorm layers, and the parameters of other layers as they are: of
        any type. Those with an attribute ``weight_decay`` that is False go to the second group.

    Returns
    -------
    decayed, not_decayed : list
        The same objects, in order.

    Raises
    ------
    TypeError
        ``parameters`` cannot be iterated over.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm, weight_decay_groups
    >>> weight = ("weight", np.ones((3, 4)), np.zeros((3, 4)))
    >>> decayed, not_decayed = weight_decay_groups([weight, *BatchNorm(4).parameters()])
    >>> [name for name, *_ in decayed], [name for name, *_ in not_decayed]
    (['weight'], ['gamma', 'beta'])
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters is {_args._kind(parameters)}, expected an iterable, such as the lists of "
            f"parameters() of all layers put together"
        )
    groups: tuple[list[Any], list[Any]] = ([], [])
    for parameter in parameters:
        groups[getattr(parameter, "weight_decay", True) is False].append(parameter)
    return groups
