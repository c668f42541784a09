"""Train LeNet with batch normalization on several processes, with uneven shares of each batch, to the same
bits as on one.

    python examples/lenet_processes.py                     # one process
    mpirun -n 3 python examples/lenet_processes.py         # three: the same hash of all that was learned

A batch norm is given the processes, `layer.group = MPI.COMM_WORLD`, and asked for the whole batch's gradients
of gamma and beta, `all_reduce=True`. The gradients of the other layers are means over samples too: `moments`
with a group gives them, one row per sample, as exactly. Matrix products are taken sample by sample, since
those of a whole batch round as their size wants. The processes' batches are slices of 1/6, 2/6 and 3/6.

Needs the extras `demo` and `mpi` of batchnorm, and an MPI (`apt install openmpi-bin`); one process needs no
MPI.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from image_data import ImageData, Labels, load_digits
from lenet import Images, build_lenet
from numpy_layers import Adam, Array, Layer, Parameters, Sequential, Weighted, cross_entropy

try:
    from batchnorm import BatchNorm, moments
    from batchnorm.distributed import LocalGroup
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo,mpi]'") from error


def processes() -> tuple[Any, int, int]:
    """The group, this process's rank and how many there are; without MPI one."""
    try:
        from mpi4py import MPI
    except ImportError:
        return LocalGroup(1)[0], 0, 1
    return MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


class Shared:
    """A layer with weights whose gradients are means over the samples of all processes."""

    def __init__(self, layer: Weighted, group: Any) -> None:
        self.layer: Any = layer
        self.group = group

    def __call__(self, x: Array) -> Array:
        self.states, results = [], []
        for sample in x[:, None]:
            results.append(self.layer(sample))
            self.states.append(dict(vars(self.layer)))
        return np.concatenate(results)

    def backward(self, dy: Array) -> Array:
        results, rows = [], []
        for state, sample in zip(self.states, dy[:, None], strict=True):
            vars(self.layer).update(state)
            results.append(self.layer.backward(sample))
            rows.append(np.concatenate([gradient.ravel() for _, _, gradient in self.layer.parameters()]))
        self.gradients = moments(np.stack(rows), group=self.group).mean
        return np.concatenate(results)

    def parameters(self) -> Parameters:
        own = self.layer.parameters()
        ends = np.cumsum([value.size for _, value, _ in own])[:-1]
        parts = np.split(self.gradients.astype(np.float32), ends)
        return [(n, v, g.reshape(v.shape)) for (n, v, _), g in zip(own, parts, strict=True)]

    def buffers(self) -> dict[str, Array]:
        return {}

    def train(self, mode: bool = True) -> object:
        return self


class SharedNorm:
    """A batch norm whose batch is that of all processes."""

    def __init__(self, layer: BatchNorm, group: Any, batch: int) -> None:
        layer.group = group
        self.layer, self.batch = layer, np.float32(batch)

    def __call__(self, x: Array) -> Array:
        return self.layer(x)

    def backward(self, dy: Array) -> Array:
        return self.layer.backward(dy, all_reduce=True)

    def parameters(self) -> Parameters:
        return [(p.name, p.value, p.grad / self.batch) for p in self.layer.parameters()]

    def buffers(self) -> dict[str, Array]:
        return dict(self.layer.buffers())

    def train(self, mode: bool = True) -> object:
        return self.layer.train(mode)


def shared(network: Sequential, group: Any, batch: int) -> Sequential:
    """The network on several processes."""

    def of(layer: Layer) -> Layer:
        if isinstance(layer, BatchNorm):
            return SharedNorm(layer, group, batch)
        return Shared(layer, group) if isinstance(layer, Weighted) else layer

    return Sequential({name: of(layer) for name, layer in network.layers.items()})


def train_step(network: Sequential, x: Array, labels: Labels) -> None:
    """Scores of this process's samples and back; each sample's loss counts once."""
    scores = network(x)
    each = [cross_entropy(scores[i : i + 1], labels[i : i + 1])[1] for i in range(len(labels))]
    network.backward(np.concatenate(each))


def train(images: Images, options: argparse.Namespace, group: Any, rank: int, ranks: int) -> Sequential:
    batch, optimizer = options.batch, Adam()
    network = build_lenet(images.data.train_images.shape[1:], options.seed, batch_norm=True)
    network = shared(network, group, batch)
    ends = np.cumsum(np.arange(ranks + 1)) * batch // (ranks * (ranks + 1) // 2)  # shares 1 : 2 : 3 : ...
    mine = slice(ends[rank], ends[rank + 1])
    rng = np.random.default_rng(options.seed + 1)  # every process draws the same batches
    for epoch in range(options.epochs):
        network.train()
        for x, labels in images.training_batches(batch, rng):
            train_step(network, x[mine], labels[mine])
            optimizer.step(network.parameters(), 0.01 * 0.85**epoch)
    return network


def learned(network: Sequential) -> str:
    """One hash of all parameters and running statistics."""
    values = [value for _, value, _ in network.parameters()] + network.buffers()
    return hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in values)).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> str:
    """Train, print the test accuracy and the hash; return the hash."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="images per step, of all processes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="take at most so many training images")
    options = parser.parse_args(arguments)
    group, rank, ranks = processes()
    if options.batch < ranks * (ranks + 1) // 2:
        parser.error(f"--batch is {options.batch}, too few for {ranks} processes to have a share each")
    data = load_digits(options.seed)
    images = Images(ImageData(data.name, *(a[: options.limit] for a in data[1:3]), *data[3:]))
    with threadpool_limits(1, user_api="blas"):
        network = train(images, options, group, rank, ranks)
        network.eval()
        hits = sum(int((network(x).argmax(axis=1) == y).sum()) for x, y in images.test_batches())
    digest = learned(network)
    if rank == 0:
        accuracy = hits / len(images.data.test_images)
        print(f"{ranks} processes: test accuracy {accuracy:.1%}, learned {digest}", flush=True)
    return digest


if __name__ == "__main__":
    main()
