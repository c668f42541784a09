"""Mean and standard deviation of each colour of a data set larger than memory, as image pipelines want them.

    python examples/dataset_statistics.py                  # crops of the photographs inside scikit-learn
    python examples/dataset_statistics.py --data FOLDER    # .npy, .png or .jpg files, channels last

The folder is read once, file by file, with a progress bar (`batchnorm.dataset_moments`). Two processes read
it once more, each with half of the files; their accumulators (`batchnorm.Moments`) are merged, which gives
the same bits. Beside it stands what NumPy gives in float64 with all files in memory. Statistics of pixels
are exact here but for the last rounding, so the difference is the error of NumPy's sum. The last step
normalises an image with the result, in one pass.

Needs the extra `demo` of batchnorm: scikit-learn (photographs), rich (progress bar).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from batchnorm import DatasetMoments, Moments, batch_norm, dataset_moments
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo]'") from error

WORKERS = 2
SIDE = 64  # pixels of a crop
CROPS = 400  # per file
KINDS = (".npy", ".png", ".jpg", ".jpeg")


class Report(NamedTuple):
    """What the example found: statistics of one pass, merged accumulators, NumPy's, a normalised image."""

    one_pass: DatasetMoments
    merged: Moments
    numpy_mean: NDArray[np.float64]
    numpy_var: NDArray[np.float64]
    normalised: NDArray[np.float32]


def write_crops(folder: Path, files: int, seed: int) -> None:
    """Write files of random crops of scikit-learn's two photographs, uint8 [CROPS, SIDE, SIDE, 3] each."""
    from sklearn.datasets import load_sample_images  # here, because a folder of files needs no scikit-learn

    rng = np.random.default_rng(seed)
    photographs = load_sample_images().images
    for i in range(files):
        crops = np.empty((CROPS, SIDE, SIDE, 3), np.uint8)
        for crop in crops:
            photograph = photographs[rng.integers(len(photographs))]
            row, column = (rng.integers(size - SIDE + 1) for size in photograph.shape[:2])
            crop[...] = photograph[row : row + SIDE, column : column + SIDE]
        np.save(folder / f"crops-{i:03}.npy", crops)


def read(path: Path) -> NDArray[Any]:
    """What `dataset_moments` calls with each path: images with the channels last."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    from PIL import Image  # here, because .npy files need no Pillow

    return np.asarray(Image.open(path).convert("RGB"))


def largest(path: Path) -> int | None:
    """The largest value that pixels can have, by which the statistics are to be divided; None for floats."""
    dtype = read(path).dtype
    return int(np.iinfo(dtype).max) if dtype.kind == "u" else None


def moments_of(files: Sequence[Path]) -> Moments:
    """What one worker does. A function of the module, so that other processes find it."""
    return dataset_moments(files, read=read, channel_axis=-1, num_threads=1, progress=False).moments


def in_workers(files: Sequence[Path]) -> Moments:
    """Each process takes every second file; what comes back is a few numbers per channel."""
    shares = [share for i in range(WORKERS) if (share := files[i::WORKERS])]
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        return Moments.merged(pool.map(moments_of, shares))


def by_numpy(files: Sequence[Path], unit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same with everything in memory, in float64."""
    arrays = [read(file).astype(np.float64) / unit for file in files]
    pixels = np.concatenate([x.reshape(-1, x.shape[-1]) for x in arrays])
    return pixels.mean(axis=0), pixels.var(axis=0)


def run(files: Sequence[Path], console: Console) -> Report:
    unit = largest(files[0]) or 1
    table = Table(title=f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.0f} MB")
    table.caption = "Processes are for files that are slow to read: starting them takes time."
    for heading in ("", "mean", "std", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(title: str, mean: NDArray[np.float64], std: NDArray[np.float64], start: float) -> None:
        numbers = (" ".join(f"{v:.4f}" for v in vector[:4]) for vector in (mean, std))
        table.add_row(title, *numbers, f"{time.perf_counter() - start:.2f}")

    start = time.perf_counter()
    bar = True if console.is_terminal else None
    one_pass = dataset_moments(files, read=read, channel_axis=-1, max_value=unit, progress=bar)
    row("one pass", one_pass.mean, one_pass.std, start)
    start = time.perf_counter()
    merged = in_workers(files)
    row(f"{WORKERS} processes", merged.mean / unit, merged.std / unit, start)
    start = time.perf_counter()
    mean, var = by_numpy(files, unit)
    row("NumPy, all in memory", mean, np.sqrt(var), start)
    console.print(table)

    whole = one_pass.moments
    same = np.array_equal(whole.mean, merged.mean) and np.array_equal(whole.var, merged.var)
    difference = np.abs(one_pass.var / var - 1).max()
    console.print(f"one pass and {WORKERS} processes: {'the same bits' if same else 'NOT the same'}")
    console.print(f"NumPy's variances differ by up to {difference:.1e} of them: its rounding errors")

    first = read(files[0])
    images = first[:1] if first.ndim == 4 else first[None]
    y = batch_norm(images, merged.mean, merged.var, eps=0, channel_axis=-1)  # pixels in, float32 out
    console.print(f"first image normalised: mean {y.mean():.3f}, std {y.std():.3f} (0 and 1 over all images)")
    return Report(one_pass, merged, mean, var, y)


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of .npy, .png or .jpg files, channels last")
    parser.add_argument(
        "--files", type=int, default=8, help="how many files of crops to write without --data"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    options = parser.parse_args(arguments)
    console = Console()
    if options.data is not None:
        files = sorted(path for path in options.data.glob("*") if path.suffix.lower() in KINDS)
        if not files:
            parser.error(f"no {', '.join(KINDS)} files in {options.data}")
        return run(files, console)
    if options.files < 1:
        parser.error(f"--files is {options.files}, expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        write_crops(Path(folder), options.files, options.seed)
        return run(sorted(Path(folder).glob("*.npy")), console)


if __name__ == "__main__":
    main()
