"""Why a layer that trains well tests badly: its statistics looked at, in words and numbers.

`report` looks at a layer alone, `diagnose_layer` at an input beside it, `diagnose` at a network's layers.
None of them changes statistics. Each finding says what is so, how much, where, and what to do.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..running import COLD, updates_until
from ..typing import Array, Examined, LayerLike, Mask, Vector
from . import shown
from .network import Collector, Layers, named, run, watching

__all__ = ["Compared", "Diagnosis", "Finding", "Words", "diagnose"]

# A batch and the running statistics disagree if they differ by more than this ...
_MEAN_DISTANCE = 0.5  # standard deviations
_VAR_RATIO = 2.0
# ... and by more than so many standard errors of the batch's own statistics.
_ERRORS = 5.0
# Batch statistics of fewer values than this are uncertain by 18 % of a standard deviation, 25 % of var.
_FEW = 32
# A smaller decay than this averages fewer than 10 batches, so it is never advised.
_LEAST_DECAY = 0.9
# A gamma is the standard deviation of what a channel gives; it begins at 1, and trained ones rarely pass 10.
_HUGE_GAMMA = 100.0
# A smaller decay makes the running statistics those of the last batch or two.
_SHORT = 0.5
_LOOK = "Look for NaN and Inf in the data or in the layers before this one"
_FITS = "no channel is further off than chance explains"
_SHOWN = 5  # channels that a text lists
_NETWORK = "batchnorm.recalibrate(layers, forward, batches) in a network"

_Where = NDArray[np.intp]


@dataclass(frozen=True)
class Words:
    """What findings say of a layer's library: here of this one's layers.

    Braces stand for the weights of the old value and of the batch in a running average.
    """

    recalibrate: str = f"{_NETWORK}, bn.recalibrate(inputs) of one layer"
    average: str = "decay={old}"
    longer: str = "use decay={old:g} or less for so many updates"
    unbiased: str = "build the layer with zero_debias=True or decay=None"
    short: str = "decay is the weight of the old value, 1 - momentum of PyTorch: use decay={old:g}"
    broken: str = "calls in eval mode are an error"
    keep_out: str = "BatchNorm(on_nonfinite='raise') or 'skip' keeps them out of the running statistics"
    assign: str = "assign running_mean and running_var"
    initial: str = "If initial values are meant, build the layer with allow_initial_statistics=True"
    unfreeze: str = "Call unfreeze() and train"
    calls: str = "Check that forward calls it"
    renorm: str = ", or batch renormalisation"
    own: str = "give this data statistics of its own, bn.clone(share='params')"


_OURS = Words()


def _words(layer: Examined) -> Words:
    return getattr(layer, "words", _OURS)


def _rate(text: str, decay: float | None) -> str:
    """A text of `Words` with the weights that a decay is."""
    return text.format(old=decay, new=decay if decay is None else round(1 - decay, 12))


@dataclass(frozen=True)
class Finding:
    """One thing that is so with a layer.

    Attributes
    ----------
    code : str
        "never_updated", "cold", "mismatched", "invalid_statistics", "skipped_batches", "short_average",
        "invalid_batch", "small_batch", "constant_channels", "eps_dominates", "not_reached" or "fine". Of
        PyTorch also "frozen" and "untracked", of files "dead_channels", "huge_gamma", "shifted_var", "unsure"
        and "unreadable".
    text : str
        What is so, in words and numbers.
    remedy : str
        What to do about it; empty where nothing needs to be done.
    channels : tuple of int
        The channels concerned, worst first; empty if it concerns all. With several channel axes they are
        counted through, the last axis fastest.
    numbers : dict of str to float
        The numbers of the text, by name.
    layer : str
        The layer's name, empty if it has none.
    """

    code: str
    text: str
    remedy: str = ""
    channels: tuple[int, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    layer: str = ""

    def __str__(self) -> str:
        text = f"{self.layer}: {self.text}." if self.layer else f"{self.text}."
        return f"{text} {self.remedy}." if self.remedy else text


@dataclass(frozen=True, eq=False, slots=True)
class Compared:
    """Of one layer, the running statistics beside those of the batches.

    Attributes
    ----------
    layer : str
        Its name.
    distance : array of float64, shape (C,)
        How far the means are apart, in running standard deviations; NaN where one is unknown.
    ratio : array of float64, shape (C,)
        The variance of the batches by the running one; NaN where one is unknown.
    count : float
        Values per channel that are normalised together, the least of all channels; 0 if none came.
    """

    layer: str
    distance: Vector
    ratio: Vector
    count: float


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Findings about layers; ``print`` it, iterate over it, or ask ``codes``.

    Layers are in their order, of each the most serious finding comes first.

    Attributes
    ----------
    findings : tuple of Finding
        Never empty: without faults it has the finding "fine".
    compared : tuple of Compared
        Of a network each layer in numbers, also of those without a finding.
    """

    findings: tuple[Finding, ...]
    compared: tuple[Compared, ...] = ()

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings."""
        return tuple(finding.code for finding in self.findings)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.codes == ("fine",)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        return "\n".join(f"{finding.code}: {finding}" for finding in self.findings)

    def __repr__(self) -> str:
        return f"Diagnosis({', '.join(self.codes)})"

    def table(self) -> str:
        """A line per layer: how far its statistics are off at most, in which channel, and its findings.

        Returns
        -------
        str
            To be printed. Without `compared` (of one layer alone) it has no numbers.
        """
        return shown.table(self)

    def to_json(self) -> str:
        """Findings and numbers as JSON, for a log or another program.

        Returns
        -------
        str
            An object with ``ok``, ``findings`` and ``layers``. Numbers that are not finite are null.
        """
        return shown.to_json(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw how far every channel of every layer is off.

        Parameters
        ----------
        path : path, optional
            The file to write, whose suffix says the format.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        RuntimeError
            There is nothing to draw: this is no diagnosis of a network.
        ModuleNotFoundError
            matplotlib is not installed.
        """
        return shown.plot(self, path)


# ---- what is asked -----------------------------------------------------------------------------------------


def report(layer: Examined) -> Diagnosis:
    """What the running statistics tell of themselves."""
    running = layer.running
    how = _times(running.num_updates, "update") if running.num_updates else "assigned or loaded"
    if running.untouched().any():
        how = "the initial ones, which are allowed"
    return diagnosis(of_layer(layer), f"the running statistics are in order ({how})", layer)


def diagnose_layer(layer: Examined, x: Array, **positions: Any) -> Diagnosis:
    """What the running statistics tell, and how they compare with those of an input."""
    collector = Collector(layer)
    collector(x, **positions)()
    if not collector.batches:
        got = f"x has shape {x.shape} and no values that count"
        raise ValueError(f"{got}, expected a batch like those in use")
    return diagnosis(of_layer(layer, collector), f"the running statistics fit this batch: {_FITS}", layer)


def diagnosis(found: list[Finding], fine: str, layer: Examined | None = None) -> Diagnosis:
    """These findings, or that all is fine."""
    numbers, name = ({}, "") if layer is None else (_counts(layer), layer.name or "")
    return Diagnosis(tuple(found) or (Finding("fine", fine, "", (), numbers, name),))


def of_network(
    layers: Mapping[str, Examined], collectors: Mapping[str, Collector],
    more: Callable[[Any], list[Finding]] = lambda layer: [],
) -> Diagnosis:  # fmt: skip
    """What is wrong with the layers of a network through which batches have passed, and `more` of each."""
    found = [
        replace(finding, layer=name)
        for name, layer in layers.items()
        for finding in [*of_layer(layer, collectors[name]), *more(layer)]
    ]
    fine = f"the running statistics of {_times(len(layers), 'layer')} fit these batches: {_FITS}"
    numbers = tuple(compared(name, layer, collectors[name]) for name, layer in layers.items())
    return replace(diagnosis(found, fine), compared=numbers)


@_core.entrance
def diagnose(layers: Layers, forward: Callable[[Any], Any], batches: Iterable[Any]) -> Diagnosis:
    """Why is a network good in training and bad in testing? Look at its layers while data runs through.

    Parameters
    ----------
    layers : iterable of BatchNorm, or mapping of names to them
        The layers to look at, in the order in which data reaches them.
    forward : callable
        ``forward(batch)`` runs the network. What it returns is ignored.
    batches : iterable
        What `forward` takes: best many and large ones of the data that tests badly.

    Returns
    -------
    Diagnosis
        To print, to iterate over, or to ask for its ``codes``. Each finding names its layer.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong kind, or whatever `forward` raises.

    Notes
    -----
    Every layer normalises with each batch's own statistics meanwhile, whatever its mode, and updates nothing.
    So one layer with wrong statistics does not make those behind it look wrong. What is found for each layer
    is what ``BatchNorm.diagnose`` finds. A layer that did not know its channel count learns it.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm, diagnose
    >>> layers = {"bn1": BatchNorm(3), "bn2": BatchNorm(3)}
    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    >>> found = diagnose(layers, lambda x: layers["bn2"](layers["bn1"](x)), [x])
    >>> [(finding.layer, finding.code) for finding in found]
    [('bn1', 'never_updated'), ('bn2', 'never_updated')]
    """
    chosen = named(layers)
    with watching(chosen) as collectors:
        run(forward, batches)
    return of_network(chosen, collectors)


def settle(layer: Any, collector: Collector) -> None:
    """Of another library's layer, believe that initial values still weigh something only if what passed
    through fits better without them: the decay may be another one than in training, or the statistics
    recalibrated."""
    running = layer.running
    if running.mean is None or not (collector.batches and running.num_updates):
        return
    mean, var, weight = (v.astype(np.float64) for v in (running.mean, running.var, running.initial_weight))
    samples = np.minimum(collector.counts, collector.samples)
    batch = collector.moments.mean, collector.moments.var, samples
    valid = np.isfinite(mean) & np.isfinite(var) & (var >= 0) & (collector.counts > 0)
    with np.errstate(all="ignore"):
        seen = mean / (1 - weight), np.maximum((var - weight) / (1 - weight), 0)
    believed = valid & (weight < 1)
    as_it_is = misfit(layer.settings.eps, batch, mean, var, valid)[0].sum()
    if as_it_is <= misfit(layer.settings.eps, batch, *seen, believed)[0].sum() and weight.any():
        running.restore(initial_weight=0.0)


def of_layer(layer: Examined, collector: Collector | None = None) -> list[Finding]:
    """All that is wrong with a layer, the most serious first."""
    state = (never_updated(layer), *_invalid(layer), cold(layer), *_skipped(layer), *_short(layer))
    found = [finding for finding in state if finding is not None] or _eps_dominates(layer)
    if collector is not None:
        found = [*found, *_beside(layer, collector, "cold" in (finding.code for finding in found))]
    return [replace(finding, layer=layer.name or "") for finding in found]


# ---- the layer alone ---------------------------------------------------------------------------------------


def never_updated(layer: Examined) -> Finding | None:
    """That nothing has given the layer its statistics, in some channel."""
    running, untouched = layer.running, layer.running.untouched().ravel()
    if layer.settings.allow_initial_statistics or not untouched.any():
        return None
    some, skipped = _some(np.flatnonzero(untouched), untouched), running.num_skipped
    when = "of a frozen layer" if layer.frozen else "in eval mode"
    why = f"; {_times(skipped, 'batch', 'es')} with NaN or Inf left out" if skipped else ""
    text = (
        f"{' and '.join(running.untouched_names())} never updated{some[0]}: calls {when} would use the "
        f"initial values, mean 0 and variance 1 as a rule, whatever the data are{why}"
    )
    words = _words(layer)
    train = words.unfreeze if layer.frozen else "Train"
    others = f"or load a state; or {words.assign}; or call {words.recalibrate}"
    remedy = f"{train} in training mode; {others}"
    remedy += _sentence(words.initial)
    return Finding("never_updated", text, remedy, some[1], _counts(layer), layer.name or "")


def cold(layer: Examined, bound: float = COLD) -> Finding | None:
    """That the initial values still weigh more than `bound` in the statistics."""
    running, settings, decay = layer.running, layer.settings, layer.settings.decay
    weights = np.where(running.untouched(), 0, running.initial_weight).ravel()
    worst, weight = int(weights.argmax()), float(weights.max())
    if weight <= bound or not running.num_updates or settings.allow_initial_statistics:
        return None
    aim = COLD if weight > COLD else weight / 100  # means far from 0 show less than 1 % of it
    updates = int(running.num_updates - running.missed_updates.flat[worst])
    if decay is None:
        unit, more = "values per channel", float(running.num_values.flat[worst]) * (weight / aim - 1)
    else:
        unit, more = "updates", updates_until(aim / weight, decay, settings.warmup, updates)
    numbers, words = {**_counts(layer), f"{unit.split()[0]}_missing": more}, _words(layer)
    wait, ways = "no update changes that", []
    if more < 1e15:
        wait, ways = f"{more:.0f} more {unit} bring that to {100 * aim:.2g} %", ["train longer"]
    enough = math.floor(1000 * aim ** (1 / max(updates, 1))) / 1000
    if decay is not None and enough >= _LEAST_DECAY:
        numbers["recommended_decay"] = enough
        ways.append(_rate(words.longer, enough))
    if decay is not None and words.unbiased and not (settings.warmup or settings.zero_debias):
        ways.append(words.unbiased)
    remedy, some = ", or ".join(ways), _some(np.flatnonzero(weights > bound), -weights)
    remedy = f"{remedy[:1].upper()}{remedy[1:]}. To mend the statistics now call {words.recalibrate}"
    share = f"{100 * weight:{'.0f' if weight >= 0.1 else '.2g'}} %"
    with_ = _rate(words.average, decay)
    after = f"after {_times(updates, 'update')} with {with_} the initial values still weigh {share}"
    text = f"the running statistics are cold{some[0]}: {after}, {wait}"
    return Finding("cold", text, remedy, some[1], numbers, layer.name or "")


def _counts(layer: Examined) -> dict[str, float]:
    running = layer.running
    return {"num_updates": running.num_updates, "initial_weight": float(running.initial_weight.max())}


def invalid(layer: Examined) -> Finding | None:
    """That the running statistics are no statistics."""
    found = next(_invalid(layer), None)
    return found and replace(found, layer=layer.name or "")


def _invalid(layer: Examined) -> Iterator[Finding]:
    for name, vector in (("running_mean", layer.running.mean), ("running_var", layer.running.var)):
        values = np.zeros(0) if vector is None else vector.ravel()
        bad = np.flatnonzero(~np.isfinite(values) | ((values < 0) & (name == "running_var")))
        some = ", ".join(f"{value:g}" for value in values[bad[:_SHOWN]])
        words = _words(layer)
        text = f"{name} is {some} in {_channels(bad)}: {words.broken}"
        remedy = f"Load a good state, or call {words.recalibrate}{_sentence(words.keep_out)}"
        yield from _in(bad, "invalid_statistics", text, remedy)


def _skipped(layer: Examined) -> Iterator[Finding]:
    numbers: dict[str, float] = {n: getattr(layer.running, n) for n in ("num_skipped", "num_updates")}
    if all(numbers.values()):
        skipped, updates = numbers.values()
        text = f"{_times(skipped, 'batch', 'es')} with NaN or Inf left out of the running statistics"
        yield Finding("skipped_batches", f"{text}, {updates} taken in", _LOOK, (), numbers)


def _short(layer: Examined) -> Iterator[Finding]:
    decay, words = layer.settings.decay, _words(layer)
    if decay is not None and decay < _SHORT and layer.running.num_updates:
        weight = f"with {_rate(words.average, decay)} the last batch weighs {100 * (1 - decay):.3g} %"
        text = f"{weight} in the running statistics, which average hardly any others"
        # Whoever took the one weight for the other meant this.
        remedy = _rate(words.short, 1 - decay if decay <= 1 - _LEAST_DECAY else _LEAST_DECAY)
        yield Finding("short_average", text, remedy[:1].upper() + remedy[1:], (), {"decay": decay})


def _eps_dominates(layer: Examined) -> list[Finding]:
    var, eps = layer.running.var, layer.settings.eps
    var = np.zeros(0) if var is None else var.ravel()
    where = _sorted(np.flatnonzero((var < eps) & (var > 0)), var)
    least = float(var[where[:1]].sum())
    std = (least / (least + (eps or 1))) ** 0.5
    text = f"the running variance is below eps={eps:g} in {_channels(where)}, {least:.3g} at the least: the"
    text += f" output there has a standard deviation of {std:.3g} instead of 1"
    remedy = f"Scale the data up, or use an eps well below the variances, such as eps={least / 100:.1g}"
    return _in(where, "eps_dominates", text, remedy, smallest_var=least, eps=eps)


# ---- the layer in a file -----------------------------------------------------------------------------------


def of_file(layer: LayerLike) -> list[Finding]:
    """What the numbers of a trained layer tell, of its gamma too: 0 is where training may begin."""
    return [*of_layer(layer), *_dead(layer), *_huge(layer)]


def _dead(layer: LayerLike) -> Iterator[Finding]:
    var = layer.running.var.ravel()
    gamma = np.ones_like(var) if layer.gamma is None else layer.gamma.ravel()
    where, zero = np.flatnonzero((var == 0) | (gamma == 0)), int((gamma == 0).sum())
    text = f"the running variance or gamma is 0 in {_channels(where)}, gamma in {zero} of them"
    remedy = "Their output is constant in use, or was in training: prune them, or look for units that died"
    yield from _in(where, "dead_channels", text, remedy, gamma_zero=zero, var_zero=int((var == 0).sum()))


def _huge(layer: LayerLike) -> Iterator[Finding]:
    gamma = np.zeros(0) if layer.gamma is None else np.abs(layer.gamma.ravel())
    where = np.flatnonzero(~(gamma <= _HUGE_GAMMA))  # so is NaN
    where, most = _sorted(where, -gamma), float(np.max(gamma, initial=0))
    text = f"|gamma| is above {_HUGE_GAMMA:g} in {_channels(where)}, {most:.3g} at the most"
    remedy = "Look for training that diverged, or for another array in gamma's place"
    yield from _in(where, "huge_gamma", text, remedy, largest=most)


# ---- beside batches ----------------------------------------------------------------------------------------


def _beside(layer: Examined, collector: Collector, called_cold: bool) -> Iterator[Finding]:
    """What the statistics of what passed through tell."""
    if not collector.batches:
        text = "no values of these batches reached this layer"
        yield Finding("not_reached", text, _words(layer).calls)
        return
    total = collector.moments
    counts, mean, var = collector.counts.ravel(), total.mean.ravel(), total.var.ravel()
    finite = np.isfinite(mean) & np.isfinite(var)
    bad = np.flatnonzero((counts > 0) & ~finite)
    text = f"the batch holds NaN or Inf in {_channels(bad)}"
    yield from _in(bad, "invalid_batch", text, _LOOK + _sentence(_words(layer).keep_out))
    known = (counts > 0) & finite & ~layer.running.untouched().ravel()
    samples = np.minimum(counts, collector.samples)  # values of one sample count as one: neighbours are alike
    yield from _mismatched(layer, (mean, var, samples), known, called_cold)
    constant = np.flatnonzero((counts >= 2) & finite & (var == 0))
    zero = int((mean[constant] == 0).sum())
    text = f"the batch is constant in {_channels(constant)}{f', {zero} of them 0 everywhere' * (zero > 0)}"
    text += ": the output there is beta alone"
    remedy = "Look for units that died before this layer (ReLU, too large a learning rate) or constant inputs"
    yield from _in(constant, "constant_channels", text, remedy, zero=zero)
    yield from _small(layer, collector, counts)


def _mismatched(
    layer: Examined, batch: tuple[Vector, Vector, Vector], known: Mask, called_cold: bool
) -> Iterator[Finding]:
    if layer.running.mean is None:
        return
    mean, var = (v.astype(np.float64).ravel() for v in (layer.running.mean, layer.running.var))
    weight, eps = layer.running.initial_weight.ravel(), layer.settings.eps
    valid = known & np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    badness, distance, ratio = misfit(eps, batch, mean, var, valid)
    if not layer.settings.allow_initial_statistics and weight[badness > 0].any():
        # Do the batches seen, without the initial values, say the same?
        with np.errstate(all="ignore"):
            mean, var = mean / (1 - weight), np.maximum((var - weight) / (1 - weight), 0)
        badness, distance, ratio = misfit(eps, batch, mean, var, valid & (weight < 0.999))
        if not badness.any() and not called_cold and (finding := cold(layer, 0)):
            yield finding
    where = _sorted(np.flatnonzero(badness), -badness)
    sizes = [f"{r:.3g} times as large" if r >= 1 else f"{1 / r:.3g} times as small" for r in ratio[where]]
    listed = _list(
        f"channel {c}: mean off by {distance[c]:.2g} standard deviations, variance {size}"
        for c, size in zip(where, sizes, strict=True)
    )
    beyond = ", more than the initial values in them explain" * called_cold
    count = f"{len(where)} of {len(mean)} channels{beyond}"
    text = f"the running statistics are not those of this batch in {count} ({listed})"
    words = _words(layer)
    same = (
        f"If this batch is prepared as in training, the statistics are out of date: call {words.recalibrate}"
    )
    other = "If not, prepare it the same way (scaling, colour order, augmentation)"
    remedy = f"{same}. {other}, or {words.own}"
    off, ratio_off = (float(values[where[:1]].sum()) for values in (distance, ratio))
    yield from _in(where, "mismatched", text, remedy, distance=off, ratio=ratio_off)


def misfit(
    eps: float, batch: tuple[Vector, Vector, Vector], mean: Vector, var: Vector, valid: Mask
) -> tuple[Vector, Vector, Vector]:
    """How badly each channel differs (0: not), the distance of the means, the ratio of the variances."""
    with np.errstate(all="ignore"):
        distance, samples = np.abs(batch[0] - mean) / np.sqrt(var + eps), batch[2]
        ratio = (batch[1] + eps) / (var + eps)
        error = np.sqrt(np.maximum(ratio, 1) / samples)  # of the batch's mean, in running deviations
        far_mean = valid & (distance > np.maximum(_MEAN_DISTANCE, _ERRORS * error))
        spread = np.maximum(_VAR_RATIO, np.exp(_ERRORS * np.sqrt(2 / samples)))  # of the variance, a factor
        # The variance of a handful of samples is often far too small.
        far_var = valid & ((ratio > spread) | ((ratio < 1 / spread) & (samples >= 16)))
        off = np.maximum(ratio, 1 / ratio)
    badness = np.maximum(np.where(far_mean, distance / _MEAN_DISTANCE, 0), np.where(far_var, off, 0))
    return badness, distance, ratio


def compared(name: str, layer: Examined, collector: Collector) -> Compared:
    """The numbers of one layer and of what passed through it."""
    nothing = np.full(0 if layer.running.mean is None else layer.running.mean.size, np.nan)
    if not collector.batches:
        return Compared(name, nothing, nothing, 0.0)
    per_batch, _ = _normalised_together(layer, collector, collector.counts.ravel())
    if layer.running.mean is None:
        nothing = np.full(per_batch.size, np.nan)
        return Compared(name, nothing, nothing, float(per_batch.min()))
    mean, var = (v.astype(np.float64).ravel() for v in (layer.running.mean, layer.running.var))
    counts = collector.counts.ravel()
    batch = collector.moments.mean.ravel(), collector.moments.var.ravel(), counts
    valid = (counts > 0) & ~layer.running.untouched().ravel()
    _, distance, ratio = misfit(layer.settings.eps, batch, mean, var, valid)
    distance, ratio = (np.where(valid & np.isfinite(v), v, np.nan) for v in (distance, ratio))
    return Compared(name, distance, ratio, float(per_batch.min()))


def _normalised_together(layer: Examined, collector: Collector, counts: Vector) -> tuple[Vector, float]:
    """Values per channel in a batch or a part of one, and the samples of a batch."""
    samples, size = collector.samples / collector.batches, layer.settings.virtual_batch_size or math.inf
    return counts / collector.batches * min(1, size / samples), samples


def _small(layer: Examined, collector: Collector, counts: Vector) -> Iterator[Finding]:
    """Whether what is normalised together, a batch or a part of one, has few values."""
    per_batch, samples = _normalised_together(layer, collector, counts)
    size = layer.settings.virtual_batch_size or math.inf
    where = np.flatnonzero((per_batch > 0) & (per_batch < _FEW))
    if len(where):
        count = max(float(per_batch[where].min()), 1.0)
        mean_error, var_error = (1 / count) ** 0.5, (2 / max(count - 1, 1)) ** 0.5
        some, renorm = _some(where, per_batch), "" if layer.settings.renorm else _words(layer).renorm
        what = "a batch" if size >= samples else f"a part of {_times(size, 'sample')}"
        by = f"{mean_error:.2g} of a standard deviation, the variance by {100 * var_error:.0f} %"
        has = f"{what} has {count:.3g} value{'s' * (count > 1)} per channel{some[0]}"
        text = f"{has}: the mean is uncertain by {by}"
        more = "diagnose more values than these, which prove little"
        remedy = f"Use larger batches in training{renorm}; {more}"
        numbers = {"count": count, "mean_error": mean_error, "var_error": var_error}
        yield Finding("small_batch", text, remedy, some[1], numbers)


def _sentence(text: str) -> str:
    return f". {text}" if text else ""


# ---- words -------------------------------------------------------------------------------------------------


def _in(where: _Where, code: str, text: str, remedy: str, **numbers: float) -> list[Finding]:
    """The finding of some channels, if there are any."""
    numbers = {"channels": len(where), **numbers}
    return [Finding(code, text, remedy, tuple(map(int, where)), numbers)] if len(where) else []


def _some(where: _Where, order: Array) -> tuple[str, tuple[int, ...]]:
    """Words and channels, least of `order` first, for a finding that may concern some channels or all."""
    where = _sorted(where, order)
    return ("", ()) if len(where) == len(order) else (f" in {_channels(where)}", tuple(map(int, where)))


def _sorted(where: _Where, order: Array) -> _Where:
    return where[np.argsort(order[where], kind="stable")]


def _channels(where: _Where) -> str:
    listed = _list(map(str, where))
    return f"channel {listed}" if len(where) == 1 else f"{len(where)} channels ({listed})"


def _list(words: Iterable[str]) -> str:
    first = [*itertools.islice(words, _SHOWN + 1)]
    return ", ".join(first[:_SHOWN]) + ", ..." * (len(first) > _SHOWN)


def _times(number: float, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
