"""The price of group=: sums by samples and exact, on one process; and an exchange, over those of MPI.

    python bench/group.py                              # the price on one process, against the plain call
    mpirun -n 3 python bench/group.py --mpi            # microseconds of a call on hardly any data

Contestants run in turn; a ratio is the median over rounds. One thread. Bytes are what each rank sends.
"""

from __future__ import annotations

import argparse
import statistics
import time

import batchnorm
import numpy as np
from batchnorm.distributed import LocalGroup

SHAPES = [
    ("NCHW", (32, 64, 56, 56), 1), ("NCHW", (32, 256, 14, 14), 1), ("NCHW", (32, 512, 7, 7), 1),
    ("NHWC", (32, 56, 56, 64), 3), ("NHWC", (32, 7, 7, 512), 3), ("NCL", (64, 128, 50), 1),
    ("rows", (256, 1024), 1), ("rows", (4096, 256), 1), ("rows", (65536, 10), 1), ("rows", (32, 64), 1),
]  # fmt: skip
TINY = [("NCHW", (4, 3, 8, 8), 1), ("rows", (16, 10), 1)]


def ratio(plain, shared, rounds):
    """Median over rounds of the time of one over that of the other, in turn."""
    calls, taken = (plain, shared), ([], [])
    for call in calls:
        call()
    for _ in range(rounds):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(b / a for a, b in zip(*taken, strict=True)), statistics.median(taken[0])


def price(shapes, rounds):
    group = LocalGroup(1)[0]
    print(f"{'':6}{'x':>18} {'dtype':8}{'forward':>9}{'backward':>9}   over the plain call, which takes")
    for layout, shape, axis in shapes:
        for dtype in (np.float32, np.float64):
            random = np.random.default_rng(0)
            x, dy = random.normal(1, 2, (2, *shape)).astype(dtype)
            out, ones = np.empty_like(x), np.ones(shape[axis], dtype)
            options = {"channel_axis": axis, "num_threads": 1}

            def forward(shared=None, x=x, out=out, ones=ones, options=options):
                return batchnorm.batch_norm_train(x, ones, ones, out=out, group=shared, **options).saved

            saved = [
                batchnorm.batch_norm_train(x, ones, ones, group=g, **options).saved for g in (None, group)
            ]
            backward = [
                lambda s=s, dy=dy, out=out: batchnorm.batch_norm_backward(dy, s, out=out, num_threads=1)
                for s in saved
            ]
            there, took = ratio(forward, lambda f=forward: f(group), rounds)
            back, took_back = ratio(*backward, rounds)
            name = " x ".join(map(str, shape))
            print(f"{layout:6}{name:>18} {np.dtype(dtype).name:8}{there:9.2f}{back:9.2f}", end="   ")
            print(f"{took * 1e6:.0f}, {took_back * 1e6:.0f} us")


class Counted:
    """A group that counts what is sent."""

    def __init__(self, group):
        self.group, self.calls, self.bytes = group, 0, 0

    def allgather(self, array, /):
        self.calls, self.bytes = self.calls + 1, self.bytes + array.nbytes
        return self.group.allgather(array)


def exchanges(rounds):
    from mpi4py import MPI

    group = Counted(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank == 0:
        print(f"{MPI.COMM_WORLD.size} ranks, {MPI.Get_library_version().split(',')[0]}")
        print("channels  forward us   bytes  backward us   bytes  allgather us  plain us")
    for channels in (16, 64, 256, 1024):
        x = np.random.default_rng(0).normal(size=(8, channels)).astype(np.float32)

        def timed(call):
            call()
            MPI.COMM_WORLD.Barrier()
            group.calls = group.bytes = 0
            taken = []
            for _ in range(rounds):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            return statistics.median(taken) * 1e6, group.bytes // rounds

        saved = batchnorm.batch_norm_train(x, group=group).saved
        forward = timed(lambda x=x: batchnorm.batch_norm_train(x, group=group))
        backward = timed(lambda x=x, saved=saved: batchnorm.batch_norm_backward(x, saved))
        bare = timed(lambda n=channels: group.allgather(np.zeros(12 * n + 8)))
        plain = timed(lambda x=x: batchnorm.batch_norm_train(x))
        if MPI.COMM_WORLD.rank == 0:
            print(
                f"{channels:8}{forward[0]:12.0f}{forward[1]:8}{backward[0]:13.0f}{backward[1]:8}"
                f"{bare[0]:14.0f}{plain[0]:10.0f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mpi", action="store_true", help="the exchange, on the ranks of mpirun")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    arguments = parser.parse_args()
    exchanges(arguments.rounds) if arguments.mpi else price(
        TINY if arguments.tiny else SHAPES, arguments.rounds
    )
