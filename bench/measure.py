"""One case, by all contestants in turn, several rounds; and the statistics of it."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from contestants import Contestant, Died, Field

from peers.protocol import Case

ROOFS = ("bandwidth", "numpy.copyto")
SAMPLES = 16
# Largest difference from our values that rounding explains, relative to the largest value of the sample.
TOLERANCE = {"float32": 1e-3, "float64": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
# Bytes a roof kernel moves per byte of the array.
MOVED = {"copy": 2, "copy-nt": 2, "triad": 3, "triad-nt": 3}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, itself thrice."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: list[float]) -> float:
    """The interquartile range as a share of the median."""
    low, middle, high = quartiles(values)
    return (high - low) / middle


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


@dataclass
class Measured:
    """Times of one case: seconds by contestant and round, GB/s of the roof's kernels by round, and why some
    contestants have none."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bandwidth: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def time(self, name: str) -> float:
        """Median seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str) -> float:
        """How much longer `name` takes than batchnorm: the median over rounds, each round's two times being
        neighbours."""
        pairs = zip(self.seconds[name], self.seconds["batchnorm"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def roof(self) -> tuple[str, float]:
        """The fastest kernel and its median GB/s."""
        best = max(self.bandwidth, key=lambda k: statistics.median(self.bandwidth[k]))
        return best, statistics.median(self.bandwidth[best])

    def to_json(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "bandwidth": self.bandwidth, "reasons": self.reasons}


def differs(case: Case, ours: list[float], theirs: list[float]) -> str | None:
    """What is wrong with a contestant's results, if anything. One value in eight may be off: next to zero,
    16-bit rounding decides whether ReLU lets a gradient through."""
    if len(ours) != len(theirs):
        return f"computes {len(theirs) // SAMPLES} results, batchnorm {len(ours) // SAMPLES}"
    wrong = 0
    for i in range(0, len(ours), SAMPLES):
        a, b = ours[i : i + SAMPLES], theirs[i : i + SAMPLES]
        allowed = TOLERANCE[case.dtype] * max(map(abs, a))
        wrong += sum(not abs(p - q) <= allowed for p, q in zip(a, b, strict=True))
    return f"{wrong} of {len(ours)} values differ from batchnorm's" if wrong > len(ours) / 8 else None


def ready(field_: Field, case: Case, result: Measured) -> list[Contestant]:
    """Those that can do the case and compute the same as batchnorm, which is asked first."""
    able: list[Contestant] = []
    ours: list[float] = []
    for c in sorted(field_.contestants, key=lambda c: c.name != "batchnorm"):
        try:
            reason = c.prepare(case)
            if reason is None and c.name not in ROOFS:
                sample = c.sample(SAMPLES)
                if isinstance(sample, str):
                    reason = sample
                elif c.name == "batchnorm":
                    ours = sample
                elif ours:
                    reason = differs(case, ours, sample)
        except Died as e:
            reason = str(e)
            field_.contestants.remove(c)
        if reason is None:
            able.append(c)
        else:
            result.reasons[c.name] = reason
    return able


Lane = tuple[str, Contestant, str | None]  # the name in the results, who is asked, for which of its kernels


def lanes_of(contestants: list[Contestant]) -> list[Lane]:
    """Everybody once, the roof once per kernel."""
    lanes: list[Lane] = []
    for c in contestants:
        if c.name in ROOFS:
            lanes += [(kernel, c, kernel) for kernel in c.kernels] or [("copy", c, None)]
        else:
            lanes.append((c.name, c, None))
    return lanes


def measure(field_: Field, case: Case, rounds: int, target: float = 0.02) -> Measured:
    """All contestants, another one first in every round, each for about `target` seconds or one call."""
    result = Measured(case)
    lanes = lanes_of(ready(field_, case, result))
    counts: dict[str, tuple[int, int]] = {}
    for i in range(rounds):
        start = i % max(1, len(lanes))
        for lane in lanes[start:] + lanes[:start]:
            name, c, kernel = lane
            try:
                if name not in counts:
                    once = min(c.time(1, 2, 1, kernel))
                    counts[name] = (
                        max(1, min(20_000, int(target / max(once, 1e-7)))),
                        3 if once < target else 1,
                    )
                seconds = statistics.median(c.time(*counts[name], kernel=kernel))
            except Died as e:
                field_.contestants.remove(c)
                lanes = [other for other in lanes if other[1] is not c]
                result.seconds.pop(name, None)
                result.reasons[c.name] = str(e)
                continue
            if c.name in ROOFS:
                result.bandwidth.setdefault(name, []).append(MOVED[name] * case.bytes / seconds / 1e9)
            else:
                result.seconds.setdefault(name, []).append(seconds)
    for c in field_.contestants:
        c.drop()
    return result
