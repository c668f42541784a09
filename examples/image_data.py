"""Small image data sets for the examples: MNIST, Fashion-MNIST, CIFAR-10 and scikit-learn's digits.

Every loader returns an `ImageData` of uint8 images [N, C, H, W] and int64 labels [N]. Files are checked
before they are believed: magic number, sizes against the length of the file, labels against the number of
images and classes. A missing file is a FileNotFoundError, bad content a ValueError; each message names the
file. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

CLASSES = 10
IDX_NAMES = {
    "train_images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train_labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test_images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test_labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}
CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
CIFAR_SHAPE = (3, 32, 32)
# Where the archives and the usual download scripts put the files below the folder a user names.
SUBFOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw", "cifar-10-batches-bin", "cifar-10-batches-py")
# A header is believed only up to this many bytes: 20 times the largest of these data sets.
MAX_BYTES = 1 << 30
CHUNK = 1 << 20


class ImageData(NamedTuple):
    """Images uint8 [N, C, H, W], labels int64 [N] in 0..9, for training and for testing."""

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


# --- which data set is it? ----------------------------------------------------------------------------------


def load_folder(folder: str | Path, dataset: str | None = None) -> ImageData:
    """Read "mnist" (or Fashion-MNIST, which has the same format) or "cifar10" files; None: what is there."""
    dataset = dataset or detect(folder)
    if dataset == "mnist":
        return load_mnist(folder)
    if dataset == "cifar10":
        return load_cifar10(folder)
    raise ValueError(f"dataset is {dataset!r}, expected 'mnist' or 'cifar10' to read a folder")


def detect(folder: str | Path) -> str:
    """Name the data set whose files are in `folder`: "mnist" or "cifar10"."""
    for place in _places(folder):
        if any(_find(place, names) for names in IDX_NAMES.values()):
            return "mnist"
        if any((place / name).exists() for name in (*CIFAR_TRAIN, CIFAR_TEST)) or _is_pickled_cifar(place):
            return "cifar10"
    raise FileNotFoundError(
        f"no data set found in {folder}: expected the four files of MNIST or Fashion-MNIST "
        f"({IDX_NAMES['train_images'][0]}[.gz], ...) or of the binary version of CIFAR-10 "
        f"({CIFAR_TRAIN[0]}, ...)"
    )


def _places(folder: str | Path) -> list[Path]:
    """Return `folder` and those of its usual sub-folders that exist."""
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, expected the folder that holds the data files")
    return [place for sub in SUBFOLDERS if (place := root / sub).is_dir()]


# --- MNIST and Fashion-MNIST: IDX files ---------------------------------------------------------------------


def load_mnist(folder: str | Path) -> ImageData:
    """Read the four IDX files of MNIST or Fashion-MNIST, plain or .gz: images [N, 1, H, W]."""
    places = _places(folder)
    place = next((p for p in places if any(_find(p, names) for names in IDX_NAMES.values())), places[0])
    paths = {key: _find(place, names) for key, names in IDX_NAMES.items()}
    missing = [IDX_NAMES[key][0] for key, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"missing in {place}: {', '.join(missing)} (plain or .gz)")
    found = {key: path for key, path in paths.items() if path is not None}
    train_images, train_labels = _read_idx_pair(found["train_images"], found["train_labels"])
    test_images, test_labels = _read_idx_pair(found["test_images"], found["test_labels"])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{found['test_images']}: images are {_size(test_images)}, "
            f"expected {_size(train_images)} as in {found['train_images'].name}"
        )
    name = Path(folder).resolve().name  # MNIST or Fashion-MNIST, the files do not tell
    return ImageData(name, train_images, train_labels, test_images, test_labels)


def _find(place: Path, names: tuple[str, ...]) -> Path | None:
    candidates = (place / (name + suffix) for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_idx_pair(images_path: Path, labels_path: Path) -> tuple[Images, Labels]:
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: {len(labels)} labels, expected {len(images)}, as many as in {images_path.name}"
        )
    return images[:, None], _checked_labels(labels, labels_path)


def read_idx(path: str | Path, *, ndim: int) -> Images:
    """Read one IDX file of unsigned bytes with `ndim` dimensions, gzip-compressed if its name ends in .gz.

    The format: bytes 0, 0, 8 (unsigned byte), ndim; then ndim sizes as big-endian uint32; then the values.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read_idx_stream(file, path, ndim)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a valid gzip file ({error})") from error
    except EOFError as error:
        raise ValueError(f"{path}: truncated gzip file") from error


def _read_idx_stream(file: IO[bytes], path: Path, ndim: int) -> Images:
    header_size = 4 + 4 * ndim
    header = file.read(header_size)
    magic = 0x0800 + ndim
    if len(header) >= 4 and header[:4] != struct.pack(">I", magic):
        raise ValueError(f"{path}: magic number is 0x{header[:4].hex()}, expected 0x{magic:08x}")
    if len(header) < header_size:
        raise ValueError(f"{path}: {len(header)} bytes, expected {header_size} of an IDX header first")
    shape = struct.unpack(f">{ndim}I", header[4:])
    count = math.prod(shape)
    claim = f"the header says {' x '.join(map(str, shape))}"
    if not 0 < count <= MAX_BYTES:
        raise ValueError(f"{path}: {claim}, expected between 1 and {MAX_BYTES} values")
    values = _read_at_most(file, count + 1)
    if len(values) != count:
        got = f"more than {count}" if len(values) > count else str(len(values))
        raise ValueError(f"{path}: {claim}, so {count} bytes must follow, got {got}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_at_most(file: IO[bytes], count: int) -> bytearray:
    """Read `count` bytes or what there is, in chunks: a lying header costs no more memory than the file."""
    data = bytearray()
    while len(data) < count and (chunk := file.read(min(CHUNK, count - len(data)))):
        data += chunk
    return data


# --- CIFAR-10, binary version -------------------------------------------------------------------------------


def load_cifar10(folder: str | Path) -> ImageData:
    """Read the binary version of CIFAR-10 (data_batch_1.bin ... test_batch.bin): images [N, 3, 32, 32]."""
    places = _places(folder)
    names = (*CIFAR_TRAIN, CIFAR_TEST)
    place = next((p for p in places if any((p / name).is_file() for name in names)), None)
    if place is None:
        _refuse_pickled_cifar(places)
        place = places[0]
    missing = [name for name in names if not (place / name).is_file()]
    if missing:
        raise FileNotFoundError(f"missing in {place}: {', '.join(missing)}")
    batches = [_read_cifar_batch(place / name) for name in names]
    for name, (_, labels) in zip(names, batches, strict=True):
        if len(labels) != len(batches[0][1]):
            raise ValueError(
                f"{place / name}: {len(labels)} images, expected {len(batches[0][1])} as in {names[0]}; "
                "one of them is truncated"
            )
    *train, test = batches
    train_images, train_labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return ImageData("CIFAR-10", train_images, train_labels, *test)


def _read_cifar_batch(path: Path) -> tuple[Images, Labels]:
    """Read one file of records: one label byte, then the red, green and blue planes of a 32 x 32 image."""
    record = 1 + math.prod(CIFAR_SHAPE)
    size = path.stat().st_size
    if size == 0 or size % record or size > MAX_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected a multiple of {record} (one image); truncated?")
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, record)
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE), _checked_labels(records[:, 0], path)


def _is_pickled_cifar(place: Path) -> bool:
    return any((place / name).is_file() for name in ("data_batch_1", "test_batch", "batches.meta"))


def _refuse_pickled_cifar(places: list[Path]) -> None:
    for place in places:
        if _is_pickled_cifar(place):
            raise ValueError(
                f"{place} holds the Python version of CIFAR-10. Its files are pickles, which can run any "
                "code when read, so they are not opened; get the binary version (cifar-10-binary.tar.gz with "
                "data_batch_1.bin, ...)"
            )


# --- scikit-learn's digits ----------------------------------------------------------------------------------


def load_digits(seed: int, *, digit_size: int = 20, border: int = 4) -> ImageData:
    """Return the 1,797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn.

    They are enlarged to `digit_size` and framed by `border` pixels of background: by default [N, 1, 28, 28],
    as in MNIST. Every class gives a quarter of its images to the test set; `seed` chooses which.
    """
    from sklearn import datasets  # here, because a folder of files needs no scikit-learn

    digits = datasets.load_digits()
    images = np.rint(enlarge(digits.images, digit_size) * (255 / 16)).astype(np.uint8)
    images = np.pad(images, ((0, 0), (border, border), (border, border)))[:, None]
    labels = digits.target.astype(np.int64)
    train, test = stratified_split(labels, 0.25, np.random.default_rng(seed))
    return ImageData("scikit-learn's digits", images[train], labels[train], images[test], labels[test])


def enlarge(images: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Interpolate images [N, S, S] linearly to [N, size, size]; the corner pixels keep their values."""
    old = images.shape[-1]
    position = np.linspace(0, old - 1, size)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))  # [size, S], rows sum to 1
    return weights @ images @ weights.T


def stratified_split(labels: Labels, share: float, rng: np.random.Generator) -> tuple[Labels, Labels]:
    """Return shuffled indices (train, test); of every class, `share` of the members go to test."""
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(share * len(members))
        test.append(members[:cut])
        train.append(members[cut:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


# --- shared checks ------------------------------------------------------------------------------------------


def _checked_labels(labels: NDArray[np.uint8], path: Path) -> Labels:
    if labels.max() >= CLASSES:
        raise ValueError(f"{path}: label {labels.max()}, expected labels 0 to {CLASSES - 1}")
    return labels.astype(np.int64)


def _size(images: Images) -> str:
    return " x ".join(map(str, images.shape[-2:]))
