"""Processes of a torch.distributed group: a function runs on every rank, and what it returns comes back."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def _work(rank, world, folder, function, arguments):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def on_ranks(world, function, *arguments):
    """What ``function(rank, *arguments)`` returns on each of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
