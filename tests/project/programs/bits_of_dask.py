"""One hash of a Dask array's statistics, whatever the order, the workers, the scheduler.

python tests/project/programs/bits_of_dask.py
"""
# needs dask
# needs distributed

import contextlib
import functools
import hashlib

import dask
import dask.array as da
import numpy as np
from batchnorm import dataset_moments

n = np.arange(120 * 3 * 64 * 64, dtype=np.uint64)
noise = ((n * 2654435761 % 2**32) >> 16).astype(np.float32).reshape(120, 3, 64, 64)
x = noise / np.float32(3) + np.float32(1e4)
one = x[0].nbytes


def hash_of(blocks, **options):
    m = dataset_moments(blocks, **options).moments
    return hashlib.sha256(m.counts.tobytes() + m.mean.tobytes() + m.m2.tobytes()).hexdigest()[:12]


def table():
    """(blocks, hash): of each kind of blocks what all of its orders give."""
    for samples in (10, 40):
        blocks = da.from_array(x, chunks=(samples, 3, 64, 64))
        orders = [np.random.default_rng(seed).permutation(120 // samples) for seed in range(3)]
        hashes = {hash_of(da.concatenate([blocks.blocks[i] for i in order])) for order in orders}
        yield f"blocks of {samples} samples", hashes
    cut = [da.from_array(x, chunks=(samples, 3, 64, 64)) for samples in (10, 40, (1, 50, 69))]
    yield "any, sample by sample", {hash_of(blocks, chunk_bytes=one) for blocks in cut}
    whole = [da.from_array(noise.astype(np.uint16), chunks=c) for c in ((10, 3, 64, 64), (37, 2, 9, 64))]
    yield "any, of integers", {hash_of(blocks) for blocks in whole}


@contextlib.contextmanager
def cluster():
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as two, Client(two):
        yield


def main(everything):
    settings = [
        {"scheduler": "synchronous"},
        *({"scheduler": "threads", "num_workers": n} for n in (1, 2, 4)),
    ]
    contexts = [functools.partial(dask.config.set, chosen) for chosen in settings]
    if everything:
        contexts += [lambda: dask.config.set(scheduler="processes", num_workers=2), cluster]
    found = {}
    for context in contexts:
        with context():
            for kind, hashes in table():
                found[kind] = found.get(kind, set()) | hashes
    for kind, hashes in found.items():
        print(f"{kind:24}", *hashes)
        assert len(hashes) == 1


if __name__ != "__mp_main__":  # a worker of "processes"
    main(everything=__name__ == "__main__")
