"""Population statistics of a PyTorch model: its running statistics replaced by those of data, exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from ..diagnose.network import Collector
from ..diagnose.recalibrate import population
from ..moments import Moments
from ..progress import bar
from ..settings import flag, kind
from ..typing import Vector
from .model import STATISTICS, Layer, array_of, check, collecting, hooked, layers_of, passed, quiet, unwrapped

__all__ = ["recalibrate"]

# The layers whose input depends on the output of each.
Dependents = dict[str, set[str]]


def recalibrate(
    model: Any, batches: Iterable[Any], *, forward: Callable[[Any], Any] | None = None,
    one_by_one: bool = True, group: Any = None, progress: bool | None = None,
) -> None:  # fmt: skip
    """Replace the running statistics of all batch norms of a model by those of data.

    Parameters
    ----------
    model : torch.nn.Module
        As for :func:`batchnorm.torch.diagnose`. Its ``running_mean``, ``running_var`` and
        ``num_batches_tracked`` are changed in place, and nothing else.
    batches : iterable
        As there, of any sizes; no labels are needed. With ``one_by_one`` it is gone through several times,
        so it must be a list or a DataLoader, not a generator.
    forward : callable, optional
        As there.
    one_by_one : bool, default True
        True: a pass for the layers that no other batch norm comes before, then one for those behind them,
        and so on. Each layer that is called once gets exactly the statistics that it will meet in eval mode,
        those of one giant batch. False: one pass, in which each layer normalises with each batch's own
        statistics meanwhile, as ``torch.optim.swa_utils.update_bn`` does. The first layers then have the
        exact statistics, and the others nearly so if batches are large and shuffled.
    group : torch.distributed.ProcessGroup, optional
        Processes that hold parts of the data, of any sizes, also none. All must call this. All get the same
        bits. With DistributedDataParallel its group, if none is given.
    progress : bool, optional
        Show a progress bar on stderr; needs the package rich. None: on a terminal, if rich is there.

    Raises
    ------
    TypeError, ValueError
        As ``diagnose``; also a layer that no batch reached, NaN or Inf in what reaches one, no running
        statistics in any layer. Nothing is changed then.
    RuntimeError
        Another process of the group failed.

    Notes
    -----
    All modules are in eval mode meanwhile, so that dropout does not enter. The variance is divided by
    n - 1, as PyTorch does. Batches are merged by :class:`batchnorm.Moments`: every value weighs the same,
    however small the batch that it came in. Which layers depend on which is found by changing each one's
    output and looking whose input changes, on the first batches that reach all of them. A layer that is
    called several times has the statistics of all its calls, in which it normalises by the batch; so itself
    is not exact, those behind it are. ``diagnose``, where all layers normalise by the batch, may call either
    ``mismatched``.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> batches = torch.randn(150, 3).split(50)
    >>> batchnorm.torch.recalibrate(model, batches)
    >>> batchnorm.torch.diagnose(model, batches).codes
    ('fine',)
    """
    exact = flag("one_by_one", one_by_one)
    if exact and isinstance(batches, Iterator):
        why = "gone through only once, expected a list or a DataLoader; or pass one_by_one=False for one pass"
        raise TypeError(f"batches is {kind(batches)}, which can be {why}")
    check(batches)
    plain = unwrapped(model)
    modules = layers_of(plain)
    layers = {name: Layer(name, module) for name, module in modules.items()}
    chosen = {name: modules[name] for name, layer in layers.items() if layer.tracked}
    if not chosen:
        what = "none of the model's batch norms has running statistics (track_running_stats=False)"
        raise ValueError(f"{what}, expected one that does")
    everyone = _everyone(group, model)
    old = {name: tuple(getattr(module, each) for each in STATISTICS) for name, module in chosen.items()}
    new: dict[str, tuple[Any, Any, int]] = {}
    run = partial(passed, plain, forward=forward, least=int(everyone is _alone))
    with quiet(plain, modules):
        passes = [list(chosen)]
        if exact and len(chosen) > 1:
            passes = _passes(chosen, everyone(partial(_dependents, chosen, layers, batches, run)))
        total = len(passes) * len(batches) if isinstance(batches, Sized) else None
        with bar(progress, "recalibrate", total) as advance:
            for names in passes:
                some = {name: layers[name] for name in names}
                parts = everyone(partial(_collected, chosen, some, batches, run, advance))
                for name, layer in some.items():
                    new[name] = _population(layer, [part[name] for part in parts], old[name])
                    for word, values in zip(STATISTICS, new[name][:2], strict=True):
                        setattr(chosen[name], word, values.clone())
    with torch.no_grad():
        for name, (mean, var, count) in new.items():
            old[name][0].copy_(mean)
            old[name][1].copy_(var)
            if chosen[name].num_batches_tracked is not None:
                chosen[name].num_batches_tracked.fill_(count)


# ---- which layers are measured together --------------------------------------------------------------------


def _dependents(
    chosen: Mapping[str, Any], layers: Mapping[str, Layer], batches: Iterable[Any], run: Any
) -> Dependents:
    """The layers in the order in which batches reach them; of each those whose input its output changes.

    Found on those batches that reach a layer that none before them has reached.
    """
    state = torch.get_rng_state()

    def inputs(batch: Any) -> dict[str, bytes]:
        collectors: dict[str, Collector] = {name: Collector(layers[name]) for name in chosen}
        torch.set_rng_state(state)
        with collecting(chosen, collectors):
            deque(run([batch]), 0)
        reached = {name: each for name, each in collectors.items() if each.batches}
        return {name: each.moments.to_array().tobytes() for name, each in reached.items()}

    found: Dependents = {}
    for batch in batches:
        before = inputs(batch)
        for name in before if before.keys() - found.keys() else ():
            with hooked([chosen[name].register_forward_hook(_disturbed)]):
                after = inputs(batch)
            changed = {other for other in chosen if after.get(other) != before.get(other)}
            found.setdefault(name, set()).update(changed)
        if found.keys() == chosen.keys():
            break
    return found


def _disturbed(module: Any, inputs: Any, output: Any) -> Any:
    return output + torch.randn_like(output) * (1 + output.abs().mean())


def _passes(names: Iterable[str], parts: Iterable[Dependents]) -> list[list[str]]:
    """Layers in the order in which they can be measured; those of one pass do not depend on each other."""
    behind: Dependents = {}
    for part in parts:  # of each process; one without batches knows nothing
        for name, others in part.items():
            behind.setdefault(name, set()).update(others)
    todo, passes = [*behind], list[list[str]]()
    while todo:
        ready = [n for n in todo if not any(n in behind[other] for other in todo if other != n)]
        passes.append(ready or todo[:1])  # none: layers that are called again behind themselves
        todo = [n for n in todo if n not in passes[-1]]
    return passes + [[name] for name in names if name not in behind]


# ---- a pass ------------------------------------------------------------------------------------------------


def _collected(
    chosen: Mapping[str, Any], some: Mapping[str, Layer], batches: Iterable[Any], run: Any, advance: Any
) -> dict[str, tuple[Vector, int]]:
    """What reaches some layers while all batches run: of each its Moments as an array, and a count."""
    collectors = {name: Collector(layer) for name, layer in some.items()}
    with collecting(chosen, collectors):
        for _ in run(batches):
            advance(1)
    return {name: (each.moments.to_array(), each.batches) for name, each in collectors.items()}


def _population(layer: Layer, parts: list[tuple[Vector, int]], old: tuple[Any, ...]) -> tuple[Any, Any, int]:
    """Mean and variance of what all processes collected, like the tensors that they will replace."""
    total = Collector(layer)
    for array, count in parts:
        total.moments.merge(Moments.from_array(array))
        total.batches += count
    if not total.batches:
        got = f"{layer.name}: no batch reached this layer, the statistics are unchanged"
        raise ValueError(f"{got}. {layer.words.calls}; pass forward=, a function that does")
    new = population(layer, total, layer.name)
    tensors = []
    for word, values, tensor in zip(STATISTICS, (new.mean, new.var), old, strict=True):
        made = torch.from_numpy(np.where(new.known, values, array_of(tensor))).to(tensor)
        if not made.isfinite().all() and new.known.all():
            got = f"{layer.name}: {word} does not fit {tensor.dtype}, the statistics are unchanged"
            place = "model" if layer.name == "model" else f"model.get_submodule({layer.name!r})"
            raise ValueError(f"{got}; keep them in float32, {place}.float()")
        tensors.append(made)
    return tensors[0], tensors[1], total.batches


# ---- several processes -------------------------------------------------------------------------------------


def _alone(make: Callable[[], Any]) -> list[Any]:
    return [make()]


def _everyone(group: Any, model: Any) -> Callable[[Callable[[], Any]], list[Any]]:
    """A function that gives what every process of the group makes, in the order of their ranks."""
    parallel = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if group is None and not parallel:
        return _alone
    group = parallel[0].process_group if group is None else group
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        remedy = "torch.distributed.init_process_group('gloo'), then torch.distributed.group.WORLD"
        raise TypeError(f"group is {kind(group)}, expected a torch.distributed.ProcessGroup: {remedy}")

    def gathered(make: Callable[[], Any]) -> list[Any]:
        error: Exception | None = None
        try:
            mine = make()
        except Exception as caught:  # the others wait for an answer
            error, mine = caught, f"{type(caught).__name__}: {caught}"
        parts: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(parts, (error is None, mine), group=group)
        if error is not None:
            raise error
        for rank, (good, part) in enumerate(parts):
            if not good:
                raise RuntimeError(f"process {rank} of the group failed, nothing is changed here: {part}")
        return [part for _, part in parts]

    return gathered
