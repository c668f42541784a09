"""`python -m batchnorm`: what it prints, its exit status, its errors in one line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import batchnorm.__main__
import numpy as np
import pytest

from support.command import command, error, output
from support.problem import rng
from support.refusals import MOST_SECONDS


def numbers(text: str) -> list[list[float]]:
    """The rows of the table: channel, mean, std, count."""
    head, *rows = text.splitlines()
    assert head.split() == ["channel", "mean", "std", "count"]
    return [[float(cell) for cell in row.split()] for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = rng("command line")
    np.save(tmp_path / "a.npy", random.standard_normal((10, 3, 4, 4)).astype(np.float32))
    np.save(tmp_path / "b.npy", random.standard_normal((5, 3, 2, 2)).astype(np.float32))
    np.save(tmp_path / "four.npy", np.arange(12.0).reshape(3, 4))
    np.save(tmp_path / "nothing.npy", np.empty((0, 3)))
    (tmp_path / "broken.npy").write_bytes(b"hello")
    return tmp_path


@pytest.fixture
def pictures(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra images)")
    colours, grey = rng("pictures").integers(0, 256, (2, 20, 30, 3), np.uint8), np.zeros((9, 8), np.uint8)
    image.fromarray(colours[0]).save(folder / "one.png")
    image.fromarray(colours[1]).save(folder / "two.png")
    image.fromarray(colours[0]).quantize(16).save(folder / "palette.png")
    image.fromarray(grey).save(folder / "grey.png")
    image.fromarray(grey).save(folder / "film.gif", save_all=True, append_images=[image.fromarray(grey + 99)])
    (folder / "short.png").write_bytes((folder / "one.png").read_bytes()[:300])
    (folder / "text.png").write_text("hello")
    np.save(folder / "both.npy", colours)
    return folder


# ---- info --------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batchnorm.show_config()
    first, *rest = capsys.readouterr().out.splitlines()
    lines = output(command(tmp_path, "info")).splitlines()
    assert lines[0] == first and [line.split()[0] for line in lines[1:]] == [line.split()[0] for line in rest]
    found = json.loads(output(command(tmp_path, "info", "--json")))
    assert found.keys() == batchnorm.config().keys() and found["version"] == batchnorm.__version__
    assert output(command(tmp_path, "--version")) == f"{batchnorm.__version__}\n"


STACKS = {
    "too little": ("", False),
    "too little, and so it was asked for": ("import os; os.environ['OMP_STACKSIZE'] = '128K'", True),
    "a runtime that was there before": ("import ctypes; ctypes.CDLL('libgomp.so.1')", True),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this system is not Linux")
@pytest.mark.skipif("libgomp" not in batchnorm.config()["openmp"], reason="this build is without libgomp")
@pytest.mark.parametrize("case", STACKS)
def test_threads_get_the_stack_that_a_call_needs(folder: Path, case: str) -> None:
    # By `ulimit -s`, which glibc gives its threads; with musl they have 128 KiB anyhow.
    before, small = STACKS[case]
    code = f"""{before}
import os, numpy as np, batchnorm
y, saved = batchnorm.batch_norm_train(np.ones((64, 64, 50, 50)), num_threads=2)
batchnorm.batch_norm_backward(y, saved)
assert {small} or "OMP_STACKSIZE" not in os.environ"""
    done = command(folder, "info", code=code, shell=("sh", "-c", 'ulimit -s 176 && exec "$0" "$@"'))
    assert ("calls run on one thread" in output(done)) == small


# ---- stats -------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_table(folder: Path) -> None:
    paths = [folder / "a.npy", folder / "b.npy"]
    want = batchnorm.dataset_moments(paths)
    got = numbers(output(command(folder, "stats", "a.npy", "b.npy")))
    np.testing.assert_allclose(got, np.stack([np.arange(3), want.mean, want.std, want.counts], 1), rtol=1e-8)


def test_json_has_every_digit(folder: Path) -> None:
    want = batchnorm.dataset_moments(folder / "a.npy", ddof=1)
    got = json.loads(output(command(folder, "stats", "a.npy", "--json", "--ddof", "1")))
    assert {k: v.tolist() for k, v in vars(want).items() if k == "counts"} == {"counts": got.pop("counts")}
    assert got == {"mean": want.mean.tolist(), "var": want.var.tolist(), "std": want.std.tolist()}


def test_json_has_null_for_nan(folder: Path) -> None:
    np.save(folder / "nan.npy", np.array([[np.nan, 1], [2, 3]]))
    got = json.loads(output(command(folder, "stats", "nan.npy", "--json")))
    assert got["mean"] == [None, 2] and got["std"] == [None, 1] and got["counts"] == [2, 2]


OPTIONS = {
    "--channel-axis=0": {"channel_axis": 0},
    "--channel-axis -1": {"channel_axis": -1},
    "--data-format NHWC": {"data_format": "NHWC"},
    "--nodata nan --ddof 2": {"nodata": np.nan, "ddof": 2},
    "--nodata=-1,0.5,7": {"nodata": [-1, 0.5, 7]},
    "--max-value 4": {"max_value": 4},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(folder: Path, options: str) -> None:
    want = batchnorm.dataset_moments(folder / "a.npy", **OPTIONS[options])  # type: ignore[arg-type]
    got = numbers(output(command(folder, "stats", "a.npy", *options.split())))
    np.testing.assert_allclose([row[1] for row in got], want.mean, rtol=1e-8)
    np.testing.assert_allclose([row[2] for row in got], want.std, rtol=1e-8)


def test_several_channel_axes(folder: Path) -> None:
    want = batchnorm.dataset_moments(folder / "a.npy", channel_axis=(1, 3))
    _, *rows = output(command(folder, "stats", "a.npy", "--channel-axis=1,3")).splitlines()
    assert [row.split()[0] for row in rows[:5]] == ["0,0", "0,1", "0,2", "0,3", "1,0"]
    np.testing.assert_allclose([float(row.split()[1]) for row in rows], want.mean.ravel(), rtol=1e-8)


def test_pictures(pictures: Path) -> None:
    got = output(command(pictures, "stats", "one.png", "two.png", "--max-value", "255"))
    assert got == output(command(pictures, "stats", "both.npy", "--channel-axis=-1", "--max-value=255"))
    assert got == output(command(pictures, "stats", "both.npy", "--data-format=NHWC", "--max-value=255"))
    assert [row[3] for row in numbers(output(command(pictures, "stats", "both.npy", "one.png")))] == [
        1800
    ] * 3
    assert len(numbers(output(command(pictures, "stats", "palette.png")))) == 3
    assert numbers(output(command(pictures, "stats", "grey.png"))) == [[0, 0, 0, 72]]


def test_a_progress_bar_is_for_terminals_alone(folder: Path) -> None:
    pytest.importorskip("rich", reason="rich is not installed (extra progress)")
    code = "import sys; sys.stderr.isatty = lambda: True"
    done = command(folder, "stats", "a.npy", code=code)
    assert done.returncode == 0 and "moments" in done.stderr
    assert done.stdout == output(command(folder, "stats", "a.npy"))


# ---- errors ------------------------------------------------------------------------------------------------

ERRORS = {
    "missing.npy": "[Errno 2] No such file or directory: 'missing.npy'",
    "broken.npy": "cannot read 'broken.npy' as an .npy file: EOF: reading magic string, expected 8 bytes got "
    "5",
    "a.npy four.npy": "four.npy: x has channels of shape (4,), expected (3,) as before",
    "four.npy --channel-axis 5": "four.npy: channel_axis is 5, expected -2 <= channel_axis < 2 for x of "
    "shape (3, 4)",
    "a.npy --nodata=1,2": "a.npy: nodata has shape (2,), expected a number, or (3,), one per channel",
    "four.npy --ddof 3": "ddof is 3, expected less than 3, the number of values",
    "nothing.npy": "batches holds no values that count, expected at least one; all is masked or nodata",
}


@pytest.mark.quick
@pytest.mark.parametrize("arguments", ERRORS)
def test_errors(folder: Path, arguments: str) -> None:
    assert error(command(folder, "stats", *arguments.split())) == ERRORS[arguments]


SOON = {
    **{f"stats {arguments}": "error: " + text for arguments, text in ERRORS.items()},
    "inspect missing.onnx": "missing.onnx",
    "inspect a.npy": "a.npy",
    "inspect broken.npy --kind nonsense": "nonsense",
    "convert missing.npz x.npz": "missing.npz",
    "convert a.npy x.onnx": "a.npy",
    "fold missing.onnx x.onnx": "missing.onnx",
    "fold a.npy x.npz": "a.npy",
}


@pytest.mark.quick
@pytest.mark.parametrize("arguments", SOON)
def test_errors_come_soon_and_change_no_file(
    folder: Path, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, once its modules are there.
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments.split()])
    held = lambda: {path.name: path.read_bytes() for path in folder.iterdir()}  # noqa: E731
    before, seconds = held(), []
    while not seconds or (min(seconds) > MOST_SECONDS and len(seconds) < 4):
        started = time.perf_counter()
        assert batchnorm.__main__._main() == 1
        seconds.append(time.perf_counter() - started)
        said = capsys.readouterr()
        assert said.out == "" and len(said.err.splitlines()) == 1 and SOON[arguments] in said.err
    assert min(seconds) <= MOST_SECONDS and held() == before


def test_an_error_has_the_words_of_the_command_line(pictures: Path) -> None:
    said = error(command(pictures, "stats", "both.npy", "--max-value", "0.5"))
    assert said.startswith("both.npy: max_value is 0.5, ") and said.endswith("pass --max-value 2")


PICTURE_ERRORS = {
    "text.png": "cannot identify image file 'text.png'",
    "short.png": "short.png: ",
    "film.gif": "film.gif: it has 2 frames, expected a picture of one",
    "one.png grey.png": "grey.png: x has channels of shape (1,), expected (3,) as before",
    ".": "[Errno 21] Is a directory: '.'",
}


@pytest.mark.parametrize("arguments", PICTURE_ERRORS)
def test_errors_of_pictures(pictures: Path, arguments: str) -> None:
    assert error(command(pictures, "stats", *arguments.split())).startswith(PICTURE_ERRORS[arguments])


def test_pictures_without_pillow(folder: Path) -> None:
    done = command(folder, "stats", "x.png", code="import sys; sys.modules['PIL'] = None")
    assert error(done) == "x.png is no .npy file, and pictures need Pillow: pip install 'batchnorm[images]'"


WRONG = {
    "": "the following arguments are required: COMMAND",
    "nonsense": "argument COMMAND: invalid choice: 'nonsense'",
    "stats": "the following arguments are required: FILE",
    "stats a.npy --channel-axis x": "argument --channel-axis: invalid numbers value: 'x'",
    "stats a.npy --axis 1": "unrecognized arguments: --axis 1",
}


@pytest.mark.quick
@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_command_line(folder: Path, arguments: str) -> None:
    done = command(folder, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "") and WRONG[arguments] in done.stderr


def test_a_reader_that_has_enough(folder: Path) -> None:
    # As with `| head`: the pipe is closed before anything is written.
    code = "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
    assert (done := command(folder, "stats", "a.npy", code=code)).returncode == 0 and done.stderr == ""


def test_ctrl_c(folder: Path) -> None:
    code = "import numpy as np\ndef stop(*a, **k): raise KeyboardInterrupt\nnp.lib.format.open_memmap = stop"
    assert (done := command(folder, "stats", "a.npy", code=code)).returncode == 130 and done.stderr == ""
