"""numpy.copyto, each thread its share of the array: the roof where bandwidth.cpp cannot be built. A weak one:
it writes through the caches, so a program with non-temporal stores can exceed it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .protocol import Case, Work


class Peer:
    """Copies one array of the case's size to another."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.version = f"numpy.copyto of NumPy {np.__version__}, {threads} threads"

    def prepare(self, case: Case) -> Work:
        x = np.ones(case.bytes, np.uint8)
        y = np.zeros_like(x)
        to, source = np.array_split(y, self._threads), np.array_split(x, self._threads)
        shares = list(zip(to, source, strict=True))

        def copy() -> None:
            others = [self._pool.submit(np.copyto, *share) for share in shares[1:]]
            np.copyto(*shares[0])
            for other in others:
                other.result()

        return Work(copy, lambda: [y])
