"""Why a PyTorch model is good in training and bad in testing: its batch norms as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..diagnose.findings import Diagnosis, Finding, of_network, settle
from ..diagnose.network import Collector
from .model import Layer, check, collecting, layers_of, passed, quiet, unwrapped

__all__ = ["diagnose"]


def diagnose(model: Any, batches: Iterable[Any], *, forward: Callable[[Any], Any] | None = None) -> Diagnosis:
    """Why is a model good in training and bad in testing? Look at its batch norms while data runs through.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with ``nn.BatchNorm1d``, ``2d``, ``3d``, ``SyncBatchNorm`` or subclasses of them, on any
        device, in any mode; also in DistributedDataParallel or compiled. It is not changed. Meanwhile buffers
        are None, so a subclass whose own forward computes with ``running_mean`` fails.
    batches : iterable
        Best many and large ones of the data that tests badly, such as a DataLoader. Of a tuple or list
        the model gets the first, of a mapping all as keywords.
    forward : callable, optional
        ``forward(batch)`` runs the model, where it wants to be called in another way.

    Returns
    -------
    batchnorm.Diagnosis
        To ``print``, as a ``table()``, to ``plot()``, ``to_json()``, or to ask for its ``codes``. Each
        finding names its layer by the module path.

    Raises
    ------
    TypeError, ValueError
        No model, no batch norm in it, no batches, batches on another device, a batch with one value per
        channel, a forward that calls ``train()``; or whatever the model raises. Nothing is changed then
        either.

    See Also
    --------
    batchnorm.torch.recalibrate : Mends what is out of date.

    Notes
    -----
    All modules are in eval mode meanwhile, but batch norms normalise with each batch's own statistics, so
    that one layer with wrong statistics does not make those behind it look wrong. Nothing is updated; modes,
    buffers and random numbers are as before afterwards. Tensors of other devices are copied to the CPU.

    PyTorch keeps no record of what the initial values still weigh. That is worked out from
    ``num_batches_tracked`` and today's ``momentum``, and believed if the batches agree.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> found = batchnorm.torch.diagnose(model, [torch.randn(64, 3)])
    >>> [(finding.layer, finding.code) for finding in found]
    [('1', 'never_updated')]
    """
    check(batches)
    plain = unwrapped(model)
    modules = layers_of(plain)
    layers = {name: Layer(name, module, plain.training) for name, module in modules.items()}
    collectors = {name: Collector(layer) for name, layer in layers.items()}
    with quiet(plain, modules), collecting(modules, collectors):
        for _ in passed(plain, batches, forward):
            pass
    for name, layer in layers.items():
        settle(layer, collectors[name])
    return of_network(layers, collectors, lambda layer: list(_of_torch(layer)))


def _of_torch(layer: Layer) -> Iterator[Finding]:
    """What only PyTorch's layers can have."""
    momentum = layer.momentum
    if not layer.tracked:
        text = (
            "it has no running statistics (track_running_stats=False): in eval mode, too, it normalises by "
        )
        text += "the batch, and its output depends on what else is in it"
        remedy = "If that is not meant, build it with track_running_stats=True and recalibrate"
        yield Finding("untracked", text, remedy)
    elif momentum is not None and not 0 <= momentum <= 1:
        text = (
            f"momentum={momentum:g} is outside [0, 1]: the running statistics leave the range of the batches'"
        )
        yield Finding("short_average", text, "Use momentum=0.1", (), {"momentum": momentum})
    elif layer.frozen or momentum == 0:
        why = "it is in eval mode while the model is in training mode" if layer.frozen else "momentum=0"
        text = f"its statistics are frozen, {why}: training does not change them"
        yield Finding("frozen", text, "If that is not meant, call model.train(), with a momentum above 0")
