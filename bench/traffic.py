"""The bytes a case moves at least, and the bytes it moves with today's algorithms."""

from __future__ import annotations

from typing import NamedTuple

from peers.protocol import Case

# What stays cached between two passes over the same data, per thread, where the size that the system reports
# cannot be believed: in a virtual machine it is the L3 of the whole socket, shared with unknown neighbours.
CACHE_PER_THREAD_IN_A_VM = 16 << 20


class Traffic(NamedTuple):
    """Bytes."""

    minimal: float
    real: float


def usable_cache(machine: dict[str, object], threads: int) -> int:
    """The last-level cache that a run with this many threads may count on."""
    sizes = machine["caches"]
    assert isinstance(sizes, dict)
    reported = int(max(sizes.values(), default=32 << 20))
    return min(reported, threads * CACHE_PER_THREAD_IN_A_VM) if machine["hypervisor"] else reported


def traffic(case: Case, cache: int, threads: int) -> Traffic:
    """Minimal: every tensor read or written once. Forward and inference x, y; backward dy, x, dx; with a
    residual z in addition, or dz. Residual + ReLU needs to know in backward where y > 0: one bit per element,
    written by forward and read by backward (reading y itself would be a whole tensor).

    Real: forward and backward need their sums before they can write, so they read their inputs twice. The
    second read comes from memory if more than the cache holds passed by in between: where a channel's
    values lie together (NCHW) that is one channel per thread, otherwise (NHWC, matrices) the whole tensors.
    With a residual, forward's second pass reads z for the first time and backward's second reads of x and dz
    count, hence 4 and 6.
    """
    tensor = case.bytes
    reads = {"forward": 1, "backward": 2, "inference": 0}[case.op]  # tensors that are read twice
    minimal = {"forward": 2, "backward": 3, "inference": 2}[case.op] + (1 if case.residual else 0)
    mask = case.elements / 8 if case.residual and case.op != "inference" else 0
    together = tensor if case.inner == 1 else threads * tensor // case.channels
    between = min(tensor, together) * reads
    again = reads if between > cache else 0
    return Traffic(tensor * minimal + mask, tensor * (minimal + again) + mask)
