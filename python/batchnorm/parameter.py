"""What an optimiser sees of a layer: trainable arrays with their gradients, and which of them to decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .settings import kind
from .typing import Array

__all__ = ["Parameter", "weight_decay_groups"]


@dataclass(slots=True, unsafe_hash=True, repr=False)
class Parameter(Sequence[Any]):
    """A trainable array of a layer and its gradient: a view, which is always up to date.

    ``name, value, grad = parameter`` and ``parameter[1]`` work too. Two views of one layer's array are equal.
    An L2 penalty on gamma or beta does not make a network simpler, as the weights before it can undo any
    scale: so `weight_decay` is False.

    Attributes
    ----------
    name : str
        "gamma" or "beta"; of a layer with a name for example "conv1.bn.gamma".
    value : ndarray of the layer's dtype, shape (C,)
        The layer's own array. An optimiser changes it in place, ``value -= rate * grad``.
    grad : ndarray, shape (C,), or None
        The layer's latest gradient, None before the first ``backward``. Each backward makes a new array.
    weight_decay : bool
        False.
    """

    _layer: Any
    _attribute: str

    weight_decay = False

    @property
    def name(self) -> str:
        """The attribute's name, after that of the layer if it has one."""
        return f"{self._layer.name}.{self._attribute}" if self._layer.name else self._attribute

    @property
    def value(self) -> Array:
        """The layer's own array, to be changed in place."""
        return cast(Array, getattr(self._layer, self._attribute))

    @value.setter
    def value(self, array: Array) -> None:
        if array is not self.value:  # it is the same one after `parameter.value -= step`
            raise AttributeError(
                f"value of {self.name} cannot be replaced; change it in place, value[:] = ..."
            )

    @property
    def grad(self) -> Array | Any:
        """The gradient of the latest backward, or None. Assigning replaces the layer's."""
        return getattr(self._layer, "d" + self._attribute)

    @grad.setter
    def grad(self, array: Array | None) -> None:
        setattr(self._layer, "d" + self._attribute, array)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return (self.name, self.value, self.grad)[index]

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
    >>> decayed, not_decayed = weight_decay_groups([weight, *BatchNorm(4, name="bn1").parameters()])
    >>> [name for name, *_ in decayed], [name for name, *_ in not_decayed]
    (['weight'], ['bn1.gamma', 'bn1.beta'])
    """
    if not isinstance(parameters, Iterable):
        example = "the lists of parameters() of all layers put together"
        raise TypeError(f"parameters is {kind(parameters)}, expected an iterable, such as {example}")
    groups: tuple[list[Any], list[Any]] = ([], [])
    for parameter in parameters:
        groups[getattr(parameter, "weight_decay", True) is False].append(parameter)
    return groups
