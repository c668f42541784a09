"""Processes of a torch.distributed group: a function runs on every rank, and what it returns comes back."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def _work(rank, world, folder, function, arguments):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # now and then the end of the interpreter aborts over a thread of gloo's


def on_ranks(world, function, *arguments):
    """What ``function(rank, *arguments)`` returns on each of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (world, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
