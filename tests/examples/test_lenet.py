"""The LeNet example: its file readers, its layers against finite differences, and the whole job."""

from __future__ import annotations

import gzip
import importlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import batchnorm
import numpy as np
import pytest

# The whole file trains networks; the library's own tests are elsewhere.
pytestmark = pytest.mark.slow

SIDE = 28


@pytest.fixture(scope="module")
def lenet(example):
    return example


@pytest.fixture(scope="module")
def image_data(example):
    return importlib.import_module("image_data")


@pytest.fixture(scope="module")
def layers(example):
    return importlib.import_module("numpy_layers")


# --- files that the tests write -----------------------------------------------------------------------------


def idx_bytes(array, type_code=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, type_code, array.ndim, *array.shape) + array.tobytes()


def pictures(count, side=SIDE, seed=0):
    """Bright squares whose place tells the label: [count, side, side] and labels [count]."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.uint8)
    images = rng.integers(0, 30, (count, side, side), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[row * 6 + 2 : row * 6 + 8, column * 5 + 2 : column * 5 + 7] = 250
    return images, labels


def write_mnist(folder, *, train=40, test=20, suffix="", dot=False, side=SIDE):
    folder.mkdir(parents=True, exist_ok=True)
    write = gzip.open if suffix == ".gz" else open
    for name, count in (("train", train), ("t10k", test)):
        for kind, array in zip(("images-idx3", "labels-idx1"), pictures(count, side), strict=True):
            file = f"{name}-{kind}-ubyte{suffix}"
            with write(folder / (file.replace("-idx", ".idx") if dot else file), "wb") as stream:
                stream.write(idx_bytes(array))


def write_cifar(folder, *, records=8):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        labels = (np.arange(records) % 10).astype(np.uint8)[:, None]
        planes = np.repeat(np.arange(3, dtype=np.uint8), 32 * 32) * 50  # red 0, green 50, blue 100
        pixels = np.broadcast_to(planes + np.uint8(number), (records, 3 * 32 * 32)) + labels
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, pixels]).tobytes())


# --- MNIST and Fashion-MNIST --------------------------------------------------------------------------------


@pytest.mark.parametrize("sub", ["", "raw", "MNIST/raw", "FashionMNIST/raw"])
@pytest.mark.parametrize(("suffix", "dot"), [("", False), (".gz", False), ("", True), (".gz", True)])
def test_mnist_is_read_as_written(image_data, tmp_path, suffix, dot, sub):
    write_mnist(tmp_path / sub, suffix=suffix, dot=dot)
    data = image_data.load_folder(tmp_path)
    for part, count in (("train", 40), ("test", 20)):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        expected_images, expected_labels = pictures(count)
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        np.testing.assert_array_equal(images, expected_images[:, None])
        np.testing.assert_array_equal(labels, expected_labels)


def test_mnist_bytes_by_hand(image_data, tmp_path):
    path = tmp_path / "two-images"
    path.write_bytes(bytes.fromhex("00000803 00000002 00000001 00000003") + bytes([1, 2, 3, 4, 5, 255]))
    np.testing.assert_array_equal(image_data.read_idx(path, ndim=3), [[[1, 2, 3]], [[4, 5, 255]]])


IMAGES = idx_bytes(pictures(40)[0])
LABELS = idx_bytes(pictures(40)[1])
BAD_IDX = {
    "labels instead of images": ("images", LABELS, r"magic number is 0x00000801, expected 0x00000803"),
    "images instead of labels": ("labels", IMAGES, r"magic number is 0x00000803, expected 0x00000801"),
    "float values": ("images", idx_bytes(np.zeros((1, 2, 2), ">f4"), 13), r"magic number is 0x00000d03"),
    "text": ("images", b"<!DOCTYPE html><html>not found</html>", r"magic number is 0x3c21444f"),
    "empty": ("images", b"", r"0 bytes, expected 16 of an IDX header"),
    "half a header": ("images", IMAGES[:9], r"9 bytes, expected 16 of an IDX header"),
    "truncated": ("images", IMAGES[:-1], r"header says 40 x 28 x 28, so 31360 bytes must follow, got 31359"),
    "too long": ("labels", LABELS + b"\0", r"header says 40, so 40 bytes must follow, got more than 40"),
    "no images": ("images", idx_bytes(np.zeros((0, 28, 28), np.uint8)), r"0 x 28 x 28, expected between 1"),
    "huge": ("images", struct.pack(">4I", 0x803, *[2**32 - 1] * 3), r"expected between 1 and 1073741824"),
    "lying": ("labels", struct.pack(">2I", 0x801, 2**30) + b"\1\2", "1073741824 bytes must follow, got 2"),
    "label 10": ("labels", LABELS[:-1] + b"\x0a", r"label 10, expected labels 0 to 9"),
    "other count": ("labels", idx_bytes(pictures(39)[1]), r"39 labels, expected 40, as many as"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files(image_data, tmp_path, case, suffix):
    kind, content, message = BAD_IDX[case]
    write_mnist(tmp_path, suffix=suffix)
    name = f"train-images-idx3-ubyte{suffix}" if kind == "images" else f"train-labels-idx1-ubyte{suffix}"
    (tmp_path / name).write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=message) as caught:
        image_data.load_mnist(tmp_path)
    assert name in str(caught.value)


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


PACKED = gzip.compress(IMAGES, mtime=0)
BAD_GZIP = {
    "not gzip": (IMAGES, "not a valid gzip file"),
    "truncated": (PACKED[: len(PACKED) // 2], "truncated gzip file"),
    "without its check sum": (PACKED[:-8], "truncated gzip file"),
    "wrong check sum": (flipped(PACKED, len(PACKED) - 6), "not a valid gzip file"),
    "broken stream": (flipped(PACKED, 10), "not a valid gzip file"),
}


@pytest.mark.parametrize("case", BAD_GZIP)
def test_bad_gzip_files(image_data, tmp_path, case):
    content, message = BAD_GZIP[case]
    write_mnist(tmp_path, suffix=".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        image_data.load_mnist(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_mnist_files_are_listed(image_data, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte, t10k-images-idx3-ubyte"):
        image_data.load_folder(tmp_path)


def test_mnist_images_of_two_sizes(image_data, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((20, 32, 32), np.uint8)))
    with pytest.raises(ValueError, match="images are 32 x 32, expected 28 x 28 as in train-images"):
        image_data.load_mnist(tmp_path)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sub", ["", "cifar-10-batches-bin"])
def test_cifar_is_read_as_written(image_data, tmp_path, sub):
    write_cifar(tmp_path / sub)
    data = image_data.load_folder(tmp_path)
    assert data.train_images.shape == (40, 3, 32, 32) and data.test_images.shape == (8, 3, 32, 32)
    np.testing.assert_array_equal(data.train_labels, np.tile(np.arange(8), 5))
    for batch, images in enumerate([*np.split(data.train_images, 5), data.test_images]):
        values = np.arange(8)[:, None] + np.arange(3) * 50 + batch  # of record and colour plane
        np.testing.assert_array_equal(images, np.broadcast_to(values[:, :, None, None], images.shape))


BAD_CIFAR = {
    "truncated": (lambda data: data[:-1], "24583 bytes, expected a multiple of 3073"),
    "empty": (lambda data: b"", "0 bytes, expected a multiple of 3073"),
    "one record short": (lambda data: data[:-3073], "7 images, expected 8 as in data_batch_1.bin"),
    "label": (lambda data: b"\xff" + data[1:], "label 255, expected labels 0 to 9"),
}


@pytest.mark.parametrize("case", BAD_CIFAR)
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_bad_cifar_files(image_data, tmp_path, case, name):
    change, message = BAD_CIFAR[case]
    write_cifar(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        image_data.load_cifar10(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_cifar_files_are_listed(image_data, tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin, test_batch\.bin"):
        image_data.load_folder(tmp_path)


class Trap:
    """Unpickled, this writes the file at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "caught")


@pytest.mark.parametrize("sub", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("dataset", [None, "cifar10"])
def test_pickled_cifar_is_refused_unopened(image_data, tmp_path, sub, dataset):
    folder = tmp_path / sub
    folder.mkdir(exist_ok=True)
    trap = tmp_path / "trap"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match=r"pickles.*binary version \(cifar-10-binary\.tar\.gz"):
        image_data.load_folder(tmp_path, dataset)
    assert not trap.exists()


# --- folders ------------------------------------------------------------------------------------------------


def test_wrong_folders(image_data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        image_data.load_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no data set found in"):
        image_data.load_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing in .*: train-images-idx3-ubyte, train-labels"):
        image_data.load_folder(tmp_path, "mnist")
    with pytest.raises(FileNotFoundError, match=r"missing in .*: data_batch_1\.bin, data_batch_2"):
        image_data.load_folder(tmp_path, "cifar10")
    with pytest.raises(ValueError, match="dataset is 'imagenet', expected 'mnist' or 'cifar10'"):
        image_data.load_folder(tmp_path, "imagenet")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file, expected the folder"):
        image_data.load_folder(file)


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class(image_data):
    data = image_data.load_digits(seed=3)
    assert data.train_images.shape[1:] == data.test_images.shape[1:] == (1, 28, 28)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    for label in range(10):
        test, train = (data.test_labels == label).sum(), (data.train_labels == label).sum()
        assert abs(test - (test + train) / 4) <= 0.5
    border = np.pad(np.zeros((1, 20, 20), bool), ((0, 0), (4, 4), (4, 4)), constant_values=True)
    assert not data.train_images[:, border].any() and data.train_images.max() == 255


def test_split_depends_on_the_seed_only(image_data):
    first, again, other = (image_data.load_digits(seed).test_labels for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_enlarge_interpolates_linearly(image_data):
    ramp = np.add.outer(10.0 * np.arange(8), np.arange(8))[None]
    expected = np.add.outer(10 * np.linspace(0, 7, 20), np.linspace(0, 7, 20))[None]
    np.testing.assert_allclose(image_data.enlarge(ramp, 20), expected, rtol=1e-13)


# --- layers against finite differences ----------------------------------------------------------------------


def in_float64(layer):
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not None:
            setattr(layer, name, getattr(layer, name).astype(np.float64))
    return layer


def numeric_gradient(function, x, step=1e-5):
    """Central differences of the scalar function() for every entry of x, which is changed and put back.

    Their error is step**2 / 6 times the third derivative plus rounding of about 1e-15 / step: 1e-10 each
    here, where all values are of the order of 1. The tests allow 1e-8.
    """
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + step
        above = function()
        x[index] = value - step
        gradient[index] = (above - function()) / (2 * step)
        x[index] = value
    return gradient


def check_gradients(layer, x):
    rng = np.random.default_rng(1)
    dy = rng.standard_normal(layer(x).shape)
    dx = layer.backward(dy)
    assert dx.shape == x.shape and dx.dtype == np.float64

    def loss():
        return float((layer(x) * dy).sum())

    np.testing.assert_allclose(dx, numeric_gradient(loss, x), rtol=0, atol=1e-8)
    for name, value, gradient in layer.parameters():
        assert gradient.shape == value.shape, name
        np.testing.assert_allclose(gradient, numeric_gradient(loss, value), rtol=0, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "size"), [(1, 2, 3), (3, 2, 2), (2, 3, 1)])
def test_convolution_gradients(layers, inputs, outputs, size, bias):
    rng = np.random.default_rng(0)
    layer = in_float64(layers.Conv2D(inputs, outputs, rng, size=size, bias=bias))
    check_gradients(layer, rng.standard_normal((2, inputs, 4, 5)))


def test_convolution_by_hand(layers):
    rng = np.random.default_rng(0)
    layer = in_float64(layers.Conv2D(2, 3, rng, size=2))
    layer.bias += [1, 2, 3]
    x = rng.standard_normal((2, 2, 4, 5))
    weight = layer.weight.reshape(3, 2, 2, 2)
    expected = np.empty((2, 3, 3, 4))
    for n, o, i, j in np.ndindex(expected.shape):
        expected[n, o, i, j] = (x[n, :, i : i + 2, j : j + 2] * weight[o]).sum() + layer.bias[o]
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_dense_gradients(layers, bias):
    rng = np.random.default_rng(0)
    check_gradients(in_float64(layers.Dense(4, 3, rng, bias=bias)), rng.standard_normal((5, 4)))


@pytest.mark.parametrize("name", ["AvgPool", "Sigmoid", "Flatten"])
def test_plain_layer_gradients(layers, name):
    layer = getattr(layers, name)()
    check_gradients(layer, np.random.default_rng(0).standard_normal((2, 3, 4, 6)))


def test_pooling_and_sigmoid_values(layers):
    x = np.arange(24.0).reshape(1, 1, 4, 6)
    np.testing.assert_array_equal(layers.AvgPool()(x)[0, 0], [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])
    far = np.array([-1000, -1, 0, 1, 1000], np.float32)
    np.testing.assert_allclose(layers.Sigmoid()(far), [0, 0.26894142, 0.5, 0.73105858, 1], rtol=1e-6)


def test_cross_entropy_gradient(layers):
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((6, 10)), rng.integers(0, 10, 6)
    loss, gradient = layers.cross_entropy(scores, labels)
    probability = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(probability[np.arange(6), labels]).mean(), rel=1e-14)
    numeric = numeric_gradient(lambda: layers.cross_entropy(scores, labels)[0], scores)
    np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_of_the_whole_network(layers, lenet, batch_norm, frozen):
    """The derivative along a random direction in the space of images, through all 13 or 17 layers."""
    network = lenet.build_lenet((2, 16, 16), 0, batch_norm=batch_norm)
    for layer in network.layers.values():
        in_float64(layer)
        if frozen and isinstance(layer, batchnorm.BatchNorm):
            layer.allow_initial_statistics = True
            layer.freeze()
    rng = np.random.default_rng(0)
    x, direction = rng.standard_normal((2, 6, 2, 16, 16))
    labels = rng.integers(0, 10, 6)

    def loss(step):
        return layers.cross_entropy(network(x + step * direction), labels)[0]

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    _, gradient = layers.cross_entropy(network(x), labels)
    dx = network.backward(gradient)
    assert dx.dtype == np.float64
    assert float((dx * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-9)


# --- network, optimisers, batches ---------------------------------------------------------------------------


def test_same_start_with_and_without_batch_norm(lenet):
    networks = [lenet.build_lenet((1, 28, 28), 5, batch_norm=on) for on in (True, False)]
    assert sum(isinstance(layer, batchnorm.BatchNorm) for layer in networks[0].layers.values()) == 4
    for name in ("conv1", "conv2", "dense3", "dense4", "dense5"):
        with_bn, without = (network.layers[name] for network in networks)
        np.testing.assert_array_equal(with_bn.weight, without.weight)
        assert (with_bn.bias is None) == (name != "dense5") and without.bias is not None


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 30, 30), (3, 28, 32)])
def test_images_that_do_not_fit(lenet, shape):
    with pytest.raises(ValueError, match=f"images are {shape[1]} x {shape[2]}, expected squares of side 16"):
        lenet.build_lenet(shape, 0, batch_norm=True)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_optimisers_find_a_minimum(layers, name):
    value, target = np.zeros(3, np.float32), np.array([1, -2, 3], np.float32)
    optimizer = getattr(layers, name)()
    for _ in range(300):
        optimizer.step([("value", value, 2 * (value - target))], 0.05)
    np.testing.assert_allclose(value, target, atol=0.02)


def test_first_steps_of_the_optimisers(layers):
    gradient = np.array([4.0, -0.5])
    value = np.zeros(2)
    layers.Adam().step([("value", value, gradient)], 0.1)
    np.testing.assert_allclose(value, [-0.1, 0.1], rtol=1e-6)  # the size of the first step is the rate
    value = np.zeros(2)
    sgd = layers.SGD(momentum=0.5)
    for _ in range(2):
        sgd.step([("value", value, gradient)], 0.1)
    np.testing.assert_allclose(value, -0.1 * 2.5 * gradient)  # 1 + (1 + 0.5) steps


def test_batches_show_every_image(image_data, lenet):
    images = np.arange(1, 23, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 16, 16), np.uint8)
    data = image_data.ImageData("flat", images, np.arange(22), images[:5], np.arange(5))
    source = lenet.Images(data)
    batches = list(source.training_batches(4, np.random.default_rng(0)))
    seen = np.concatenate([labels for _, labels in batches])
    assert [x.shape for x, _ in batches] == [(4, 1, 16, 16)] * 5 and len(set(seen)) == 20
    for x, labels in batches:
        assert x.dtype == np.float32
        raw = x[:, 0, 0, 0] * source.std.item() + source.mean.item()
        np.testing.assert_allclose(raw, labels + 1, rtol=1e-5)
    assert [len(labels) for _, labels in source.test_batches(2)] == [2, 2, 1]


def test_shifted_moves_by_at_most_one_pixel(lenet):
    images = np.zeros((200, 1, 8, 8), np.uint8)
    images[:, :, 4, 4] = 1
    moved = lenet.shifted(images, 1, np.random.default_rng(0))
    _, _, rows, columns = np.nonzero(moved)
    assert len(rows) == 200 and set(zip(rows, columns, strict=True)) == {
        (i, j) for i in (3, 4, 5) for j in (3, 4, 5)
    }


# --- the script ---------------------------------------------------------------------------------------------


def is_picture(path):
    return path.read_bytes().startswith((b"\x89PNG\r\n\x1a\n", b"%PDF", b"<?xml"))


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_short_run_on_digits(lenet, tmp_path, capsys, suffix):
    out = tmp_path / f"picture{suffix}"
    threads = batchnorm.get_num_threads()
    arguments = ["--limit", "100", "--epochs", "2", "--batch", "20", "--seeds", "2", "--out", str(out)]
    (with_bn, _), (without, _) = lenet.main(arguments)
    assert is_picture(out) and batchnorm.get_num_threads() == threads
    assert len(with_bn.loss) == len(without.test_accuracy) == 2 and len(with_bn.step_loss) == 10
    assert np.shape(with_bn.statistics.running_mean) == (10, 16) and not without.statistics.batch_mean
    printed = capsys.readouterr().out
    for words in (
        "scikit-learn's digits: 100 training, 100 test images",
        "seed 1, without batch norm",
        "10/10",
        "±",
    ):
        assert words in printed


def test_running_statistics_are_recorded_as_they_were(lenet, tmp_path):
    """With zero_debias they are, at every step, the average of the batches so far, weighted by 0.9^age."""
    arguments = ["--limit", "60", "--epochs", "1", "--batch", "12", "--out", str(tmp_path / "picture.png")]
    log = lenet.main(arguments)[0][0].statistics
    for batch, running in ((log.batch_mean, log.running_mean), (log.batch_var, log.running_var)):
        for step, running_value in enumerate(running, 1):
            expected = np.average(batch[:step], axis=0, weights=0.9 ** np.arange(step)[::-1])
            np.testing.assert_allclose(running_value, expected, rtol=1e-5, atol=1e-6)


def test_same_seed_same_numbers(lenet, tmp_path):
    arguments = ["--limit", "60", "--epochs", "1", "--seed", "7", "--out", str(tmp_path / "picture.png")]
    first, again = (lenet.main(arguments)[0] for _ in range(2))
    assert [run.step_loss for run in first] == [run.step_loss for run in again]
    assert [run.test_accuracy for run in first] == [run.test_accuracy for run in again]
    assert first[0].step_loss != first[1].step_loss


@pytest.mark.parametrize("write", [write_mnist, write_cifar])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_short_run_on_a_folder(lenet, tmp_path, write, optimizer):
    write(tmp_path / "data")
    out = tmp_path / "picture.png"
    arguments = ["--data", str(tmp_path / "data"), "--epochs", "1", "--batch", "8", "--optimizer", optimizer]
    (with_bn,), _ = lenet.main([*arguments, "--out", str(out)])
    assert is_picture(out) and len(with_bn.step_loss) == 5


BAD_OPTIONS = {
    "--epochs 0": "'0' is not a whole number of at least 1",
    "--epochs two": "'two' is not a whole number of at least 1",
    "--batch 1": "'1' is not a whole number of at least 2",
    "--limit 5": "'5' is not a whole number of at least 20",
    "--seeds 0": "'0' is not a whole number of at least 1",
    "--seed -1": "'-1' is not a whole number of at least 0",
    "--lr nan": "'nan' is not a finite number above 0",
    "--lr 0": "'0' is not a finite number above 0",
    "--lr fast": "'fast' is not a finite number above 0",
    "--dataset imagenet": "invalid choice: 'imagenet'",
    "--dataset mnist": "--dataset mnist needs --data FOLDER",
    "--dataset digits --data .": "--dataset digits goes without --data",
    "--data nowhere": "data folder nowhere does not exist",
    "--data .": "no data set found in .",
    "--data . --dataset cifar10": "missing in .: data_batch_1.bin",
    "--out nowhere/picture.png": "folder nowhere does not exist or cannot be written to",
    "--out picture.txt": "--out is picture.txt, expected a name that ends in .png, .pdf or .svg",
}


@pytest.mark.parametrize("arguments", BAD_OPTIONS)
def test_bad_options(lenet, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        lenet.main(arguments.split())
    assert caught.value.code == 2
    assert BAD_OPTIONS[arguments] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"side": 30}, "images are 30 x 30, expected squares of side 16"), ({"train": 1}, "one training image")],
)
def test_folders_that_lenet_cannot_use(lenet, tmp_path, capsys, change, message):
    write_mnist(tmp_path, **change)
    with pytest.raises(SystemExit):
        lenet.main(["--data", str(tmp_path), "--out", str(tmp_path / "picture.png")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_divergence_is_an_error(lenet, tmp_path, optimizer):
    arguments = ["--optimizer", optimizer, "--lr", "1e30", "--limit", "64", "--epochs", "2"]
    with pytest.raises(SystemExit, match=r"training diverged .*: try a --lr below 1e\+30"):
        lenet.main([*arguments, "--out", str(tmp_path / "picture.png")])
    assert not list(tmp_path.iterdir())


def test_help_of_the_script(lenet):
    run = subprocess.run(
        [sys.executable, lenet.__file__, "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--data", "--dataset", "--epochs", "--batch", "--lr", "--seed", "--limit", "--out"):
        assert option in run.stdout


def test_full_job(lenet, tmp_path, monkeypatch, recwarn):
    """The whole example as a user starts it: batch norm is better by more than the spread, and sooner."""
    monkeypatch.chdir(tmp_path)
    results = lenet.main([])
    assert not recwarn.list
    with_bn, without = ([run.test_accuracy for run in runs] for runs in results)
    assert len(with_bn) == len(without) == 3
    assert min(run[-1] for run in with_bn) > max(0.98, max(run[-1] for run in without) + 0.005)
    assert min(run[0] for run in with_bn) > 0.8 > 0.5 > max(run[0] for run in without)  # after one epoch
    early, late = ([run.epochs_to(0.9) for run in runs] for runs in results)
    assert max(early) <= 2 and min(late) >= 4
    assert is_picture(tmp_path / "lenet.png")
