"""Image preprocessing in one call: photos of uint8 to normalised float planes, against the lines in NumPy.

    python examples/image_preprocessing.py                 # two photos that ship inside scikit-learn
    python examples/image_preprocessing.py --out FILE.png  # where the picture goes

The statistics come from the photos themselves, exactly: `dataset_moments` reads integers, and `max_value=255`
gives them in the units that image pipelines use. `normalize_images` then does what takes NumPy four passes
and a copy, with the accuracy of float64 arithmetic that is rounded to float32 at the end. Start reading at
`preprocess`.

Needs the extra `demo` of batchnorm: scikit-learn (the photos), matplotlib (the picture).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import matplotlib as mpl
    from batchnorm import dataset_moments, normalize_images
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from sklearn.datasets import load_sample_images
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo]'") from error

Photos = NDArray[np.uint8]
Planes = NDArray[np.float32]
# Red, green, blue that eyes of all kinds tell apart.
CHANNELS = {"red": "#D55E00", "green": "#009E73", "blue": "#0072B2"}
BINS = 24
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


class Result(NamedTuple):
    """What main() found: planes, the share of values equal to float64's, NumPy's time over ours."""

    planes: Planes
    equal: float
    ratio: float


# --- the work -----------------------------------------------------------------------------------------------


def preprocess(photos: Photos) -> tuple[Planes, NDArray[np.float64], NDArray[np.float64]]:
    """Normalise photos [N, H, W, 3] by their own statistics: planes [N, 3, H, W], mean and std in [0, 1]."""
    found = dataset_moments(photos, channel_axis=-1, max_value=255)
    return normalize_images(photos, found.mean, found.std), found.mean, found.std


def preprocess_in_numpy(photos: Photos, mean: NDArray[np.float64], std: NDArray[np.float64]) -> Planes:
    """The usual lines, in float32."""
    scaled = photos.astype(np.float32) / 255
    normalised = (scaled - mean.astype(np.float32)) / std.astype(np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def exactly(photos: Photos, mean: NDArray[np.float64], std: NDArray[np.float64]) -> Planes:
    """The same lines in float64, rounded at the end."""
    normalised = (photos.astype(np.float64) / 255 - mean) / std
    return normalised.transpose(0, 3, 1, 2).astype(np.float32)


def seconds_in_turn(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each call; the calls take turns, so that all see the same neighbours."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


# --- the picture --------------------------------------------------------------------------------------------


def draw(photos: Photos, planes: Planes, path: Path) -> None:
    """Each photo before and after, with the histogram of every channel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 3.1 * len(photos) + 0.7), dpi=110, layout="constrained")
        title = "normalize_images: uint8 in, float32 planes out, of mean 0 and std 1 over both photos"
        figure.suptitle(title, fontsize=15, fontweight="bold")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)
        rows = figure.subplots(len(photos), 4, squeeze=False, width_ratios=(1.5, 1, 1.5, 1))
        widest = np.linspace(planes.min(), planes.max(), BINS + 1)
        for photo, plane, (left, pixels, right, values) in zip(photos, planes, rows, strict=True):
            show(left, photo, f"before: {photo.dtype} {photo.shape}")
            histogram(pixels, np.moveaxis(photo, -1, 0), np.linspace(0, 256, BINS + 1), "pixel value")
            show(right, shown(plane), f"after: {plane.dtype} {plane.shape}, 0 is grey")
            histogram(values, plane, widest, "normalised value")
            values.axvline(0, color="#6B6B6B", linewidth=0.8, linestyle=":", zorder=0)
        rows[0, 1].legend(loc="upper center")
        figure.savefig(path)


def shown(plane: Planes) -> NDArray[np.float32]:
    """Planes as a picture: 0 is grey, two standard deviations reach black and white."""
    return np.clip(plane.transpose(1, 2, 0) / 4 + 0.5, 0, 1)


def show(axes: Axes, picture: NDArray[np.generic], title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title)
    axes.set_axis_off()


def histogram(axes: Axes, channels: NDArray[np.generic], edges: NDArray[np.float64], label: str) -> None:
    """Share of the pixels by value, a line for each of `channels` [3, H, W]."""
    for (name, colour), channel in zip(CHANNELS.items(), channels, strict=True):
        share = np.histogram(channel, edges)[0] / channel.size
        axes.stairs(share, edges, color=colour, label=name, linewidth=1.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(label)
    axes.set_ylabel("share of pixels")


# --- the program --------------------------------------------------------------------------------------------


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each contestant (25)")
    parser.add_argument("--out", type=Path, default=Path("image_preprocessing.png"), help="the picture")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds is {given.rounds}, expected at least 1")
    if given.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out is {given.out}, expected a name that ends in .png, .pdf or .svg")
    folder = given.out.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--out: folder {given.out.parent} does not exist or cannot be written to")
    return given


def main(arguments: Sequence[str] | None = None) -> Result:
    """Preprocess the photos both ways, compare, measure, draw."""
    given = options(arguments)
    photos = np.stack(load_sample_images().images)
    planes, mean, std = preprocess(photos)
    print(
        f"{len(photos)} photos {photos.shape[1:]} {photos.dtype}; "
        f"mean {mean.round(4)}, std {std.round(4)} of 1"
    )

    want, usual = exactly(photos, mean, std), preprocess_in_numpy(photos, mean, std)
    equal = float(np.mean(planes == want))
    worst = float(np.abs(usual - want).max())
    print(f"equal to float64 arithmetic rounded once: {equal:.3%} of {planes.size:,} values")
    print(f"so are {np.mean(usual == want):.1%} of NumPy's float32 lines; their largest error is {worst:.1e}")
    if not np.allclose(planes, want, rtol=1e-6, atol=1e-12):
        raise SystemExit("the two results differ")

    ours, theirs = seconds_in_turn(
        [lambda: normalize_images(photos, mean, std), lambda: preprocess_in_numpy(photos, mean, std)],
        given.rounds,
    )
    print(
        f"one call {ours * 1e3:.2f} ms, NumPy's lines {theirs * 1e3:.1f} ms: "
        f"{theirs / ours:.0f} times as long"
    )
    draw(photos, planes, given.out)
    print(f"picture: {given.out}")
    return Result(planes, equal, theirs / ours)


if __name__ == "__main__":
    main()
