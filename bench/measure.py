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
TARGET = 0.02  # seconds of one measurement: long against the clock, short against a neighbour's moods
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


@dataclass(eq=False)
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


@dataclass(frozen=True, eq=False)
class Lane:
    """Somebody who gets a turn in every round: a contestant, or one kernel of the roof."""

    field_: Field
    result: Measured
    contestant: Contestant
    kernel: str | None = None

    def time(self, inner: int, repeat: int) -> list[float]:
        return self.contestant.time(inner, repeat, kernel=self.kernel)

    def note(self, seconds: float) -> None:
        """Write a round's time down."""
        result, name = self.result, self.contestant.name
        if name in ROOFS:
            kernel = self.kernel or "copy"
            speed = MOVED[kernel] * result.case.bytes / seconds / 1e9
            result.bandwidth.setdefault(kernel, []).append(speed)
        else:
            result.seconds.setdefault(name, []).append(seconds)


def lanes_of(field_: Field, result: Measured) -> list[Lane]:
    """Everybody who can do the case once, the roof once per kernel; nobody if batchnorm cannot, since then
    there is nothing to compare with."""
    able = ready(field_, result.case, result)
    if all(c.name != "batchnorm" for c in able):
        return []
    return [Lane(field_, result, c, kernel) for c in able for kernel in (*c.kernels,) or (None,)]


def measure(field_: Field, case: Case, rounds: int) -> Measured:
    """One case by all contestants."""
    (result,) = measure_fields([field_], case, rounds)
    return result


def measure_fields(fields: list[Field], case: Case, rounds: int) -> list[Measured]:
    """One case by all contestants of all fields in turn, another one first in every round, each for about
    TARGET seconds or one call."""
    results = [Measured(case) for _ in fields]
    lanes = [lane for pair in zip(fields, results, strict=True) for lane in lanes_of(*pair)]
    counts: dict[Lane, tuple[int, int]] = {}
    gone: set[Contestant] = set()
    for i in range(rounds):
        start = i % max(1, len(lanes))
        for lane in lanes[start:] + lanes[:start]:
            if lane.contestant in gone:
                continue
            try:
                if lane not in counts:
                    once = min(lane.time(1, 2))
                    counts[lane] = (
                        max(1, min(20_000, int(TARGET / max(once, 1e-7)))),
                        3 if once < TARGET else 1,
                    )
                lane.note(statistics.median(lane.time(*counts[lane])))
            except Died as e:
                gone.add(lane.contestant)
                lane.field_.contestants.remove(lane.contestant)
                lane.result.seconds.pop(lane.contestant.name, None)
                lane.result.reasons[lane.contestant.name] = str(e)
    for field_ in fields:
        for c in field_.contestants:
            c.drop()
    return results
