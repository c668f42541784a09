"""What each process of a group runs: one hash of everything that a training step, recalibration and merged
statistics give, of the whole data, however it is shared out. `ranks.py mpi|gloo SEED [FOLDER RANK RANKS]`"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings

import numpy as np
from batchnorm import BatchNorm, Moments, batch_norm_backward, batch_norm_train, recalibrate

N = 30


def results(group, rank, ranks, seed):
    """Arrays that must not depend on ranks and seed, which shares the samples out and orders them."""
    random = np.random.default_rng(0)
    x, dy = random.normal(3, 2, (2, N, 6, 5, 4)).astype(np.float32)
    pieces = random.normal(1e4, 1, (10, 8, 6, 16)).astype(np.float32)
    own = np.random.default_rng(seed)
    order, cuts = own.permutation(N), np.sort(own.integers(0, N + 1, ranks - 1))
    mine = np.split(order, cuts)[rank]

    def of_all(values):
        sent = np.concatenate([mine[:, None], values.reshape(len(mine), x[0].size)], axis=1)
        rows = np.concatenate([each.reshape(-1, 1 + x[0].size) for each in group.allgather(sent.ravel())])
        return rows[np.argsort(rows[:, 0])]

    for dtype in (np.float32, np.float64):
        mean, var = np.zeros(6), np.ones(6)
        y, saved = batch_norm_train(
            x[mine].astype(dtype), running_mean=mean, running_var=var, activation="relu", group=group
        )
        g = batch_norm_backward(
            dy[mine].astype(dtype), saved, needs=("dx", "dgamma", "dbeta"), all_reduce=True
        )
        yield from (of_all(y), of_all(g.dx), g.dgamma, g.dbeta, mean, var, saved.mean, saved.count)
    layer = BatchNorm(6, group=group)
    for i in range(3):
        yield of_all(layer(x[mine] + np.float32(i)))
    yield from (layer.running_mean, layer.running_var)
    shares = [pieces[i] for i in own.permutation(10)[rank::ranks]] if seed else list(pieces[rank::ranks])
    total = Moments()
    for piece in shares:
        total.update(piece)
    total = total.allreduce(group)
    yield from (total.mean, total.var, total.counts)
    recalibrate([layer], layer, shares, group=group)
    yield from (layer.running_mean, layer.running_var)


def fails(group, rank):
    """What a rank raises if the last one's x is no array; they are in step afterwards."""
    last = len(group.allgather(np.zeros(1))) - 1
    try:
        batch_norm_train("x" if rank == last else np.ones((2, 6), np.float32), group=group)
        return "nothing"
    except (TypeError, RuntimeError) as error:
        group.allgather(np.zeros(1))
        return f"{type(error).__name__}: {error}"


def overflows(group):
    """Whether merging says so where squares exceed a float64, which takes two ranks here; Inf is no error."""
    Moments().update(np.full((1, 3), np.inf)).allreduce(group)
    mine = Moments().update(np.full((1, 3), 1.2e154))
    try:
        mine.allreduce(group)
        return "fits"
    except ValueError as error:
        assert "squares" in str(error) and "add up to more than 1.8e308" in str(error), error
        return "overflows"


def main(kind, seed, folder="", rank=0, ranks=1):
    warnings.simplefilter("error")
    if kind == "mpi":
        from mpi4py import MPI

        group = MPI.COMM_WORLD
        rank, ranks = group.rank, group.size
    else:
        from batchnorm.distributed import torch_group
        from torch import distributed

        distributed.init_process_group(
            "gloo", f"file://{folder}/store", rank=int(rank), world_size=int(ranks)
        )
        group = torch_group()
    made = results(group, int(rank), int(ranks), int(seed))
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a, np.float64).tobytes() for a in made)).hexdigest()
    sys.stdout.write(
        f"{digest[:16]} {overflows(group)} {fails(group, int(rank))}\n"
    )  # one line, whoever else writes
    sys.stdout.flush()
    if kind == "gloo":
        distributed.barrier()
        os._exit(0)  # now and then the end of the interpreter aborts over a thread of gloo's


if __name__ == "__main__":
    main(*sys.argv[1:])
