"""``python -m batchnorm``: this build, statistics of files, thresholds for this machine, model files.

Exit status: 0, done; 1, a file or a value of no use, said in one line on stderr; 2, a wrong command line; 3,
``inspect`` has found something.
"""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from . import formats
from ._version import __version__
from .dataset import dataset_moments
from .io.files import KINDS
from .runtime import config, show_config
from .tune import CALLS, recommended, tune
from .typing import Array


class _Error(Exception):
    """Said in the words of the command line."""


# ---- info --------------------------------------------------------------------------------------------------


def _info(given: Namespace) -> None:
    """Print version, compiler, instruction sets and threads."""
    print(json.dumps(config(), indent=2)) if given.json else show_config()


# ---- stats -------------------------------------------------------------------------------------------------


def numbers(text: str) -> Any:  # its name stands in an error of argparse
    many = tuple(float(t) if set(t) - set("-0123456789") else int(t) for t in text.split(","))
    return many if len(many) > 1 else many[0]


def _stats_arguments(add: Any) -> None:
    add("files", nargs="+", metavar="FILE", help=".npy, or a picture that Pillow reads")
    add("--channel-axis", type=numbers, metavar="N", help="default: 1; more than one: --channel-axis=1,3")
    add("--data-format", metavar="NAME", help="NHWC, NCHW, ...; default: NHWC if there are pictures")
    add("--nodata", type=numbers, metavar="V", help="value that does not count; V,V,... for each channel")
    add("--max-value", type=float, metavar="V", help="divide by it: with 255 pixels are in [0, 1]")
    add("--ddof", type=int, metavar="N", help="the variance divides by count - N; default: 0")


class _Files(list[str]):
    """Paths that know which of them is being read."""

    current = ""

    def __iter__(self) -> Iterator[str]:
        for self.current in super().__iter__():
            yield self.current
        self.current = ""


def _is_npy(path: str) -> bool:
    return path.lower().endswith(".npy")


def _read(path: str) -> Array:
    if _is_npy(path):
        return np.lib.format.open_memmap(path, mode="r")
    try:
        from PIL import Image
    except ImportError:
        remedy = "pictures need Pillow: pip install 'batchnorm[images]'"
        raise ValueError(f"{path} is no .npy file, and {remedy}") from None
    with Image.open(path) as picture:
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise ValueError(f"it has {frames} frames, expected a picture of one")
        return np.asarray(picture.convert({"P": "RGB", "1": "L"}.get(picture.mode, picture.mode)))


def _stats(given: Namespace) -> None:
    """Print mean, standard deviation and count of each channel of all files together."""
    names = ("channel_axis", "data_format", "nodata", "max_value", "ddof")
    options: Any = {name: value for name in names if (value := getattr(given, name)) is not None}
    files = _Files(given.files)
    if not all(map(_is_npy, given.files)):
        options["read"] = _read
        if not options.keys() & {"channel_axis", "data_format"}:
            options["data_format"] = "NHWC"
    try:
        found = dataset_moments(files, **options)
    except Exception as error:  # of Pillow, many kinds
        text = re.sub(r"; pass read=.*|, or a generator .*", "", str(error) or type(error).__name__)
        text = re.sub(rf"\b({'|'.join(names)})=", lambda m: f"--{m[1].replace('_', '-')} ", text)
        raise _Error(f"{files.current}: {text}" if files.current not in text else text) from error
    if given.json:
        columns = ((k, getattr(found, k), np.array(None)) for k in ("mean", "var", "std", "counts"))
        return print(json.dumps({k: np.where(np.isfinite(a), a, null).tolist() for k, a, null in columns}))
    print(f"{'channel':>7} {'mean':>16} {'std':>16} {'count':>16}")
    for i, mean in np.ndenumerate(found.mean):
        name = ",".join(map(str, i))
        print(f"{name:>7} {mean:16.9g} {found.std[i]:16.9g} {found.counts[i]:16.15g}")


# ---- tune --------------------------------------------------------------------------------------------------


def _tune(given: Namespace) -> None:
    """Measure the thresholds that suit this machine, in a minute, and print BATCHNORM_TUNING for it."""
    lines = []
    if not given.json:
        print(f"{'threshold':>17} {'size':>12}   gain beyond it: {', '.join(CALLS)}", file=sys.stderr)
    for line in tune():
        lines.append(line)
        if not given.json:
            gains = " ".join(f"{gain:.2f}" for gain in line.gains)
            print(f"{line.name:>17} {line.size:12}   {gains}", file=sys.stderr)
    found = recommended(lines)
    measured = [dict(name=line.name, size=line.size, gains=line.gains) for line in lines]
    print(json.dumps({"tuning": found, "measured": measured}) if given.json else f"BATCHNORM_TUNING={found}")


# ---- model files -------------------------------------------------------------------------------------------


def _kind_argument(add: Any, name: str) -> None:
    add(f"--{name}", metavar="KIND", help=f"kind of the file, by its name if absent: {', '.join(KINDS)}")


def _inspect_arguments(add: Any) -> None:
    add("file", metavar="FILE", help=".safetensors, .pt, .keras, .weights.h5, .h5, .onnx, .caffemodel, .npz")
    add("--ignore", default="", metavar="CODE,...", help="findings that are neither printed nor counted")
    _kind_argument(add, "kind")


def _inspect(given: Namespace) -> int:
    """List the batch norms of a model file and what looks wrong; exit status 3 if anything does."""
    found = formats.inspect(given.file, given.kind)
    found = replace(found, findings=tuple(each for each in found if each.code not in given.ignore.split(",")))
    print(json.dumps(found.as_dict()) if given.json else found)
    return 3 if found.findings else 0


def _files_arguments(add: Any) -> None:
    add("source", metavar="IN", help="a model file")
    add("target", metavar="OUT", help="the file to write, whole or not at all")
    _kind_argument(add, "from")
    _kind_argument(add, "to")


def _convert_arguments(add: Any) -> None:
    _files_arguments(add)
    add("--eps", type=float, metavar="V", help="eps of whoever reads OUT: variances take the difference")
    add("--from-eps", type=float, metavar="V", help="eps that IN was built with, where it does not say it")
    add("--names", metavar="FORMAT", help="whose names in .safetensors and .pt: pytorch, keras, flax, ...")
    add("--only", action="append", metavar="NAME", help="a batch norm to take; may be repeated")


def _convert(given: Namespace) -> None:
    """Write the batch norms of a model file to one of another kind, and print what that cannot hold."""
    notes = formats.convert(given.source, given.target, names=given.names, only=given.only, eps=given.eps,
                            source_eps=given.from_eps, kinds=(getattr(given, "from"), given.to))  # fmt: skip
    if given.json:
        return print(json.dumps({"lost": notes}))
    for note in notes:
        print(note if "not in the source" in note else f"not in OUT: {note}")


def pair(text: str) -> formats.Pair:  # its name stands in an error of argparse
    layer, norm, *places = text.replace("=", ":").split(":")
    return formats.Pair(layer, norm, *map(int, places))


def _fold_arguments(add: Any) -> None:
    _files_arguments(add)
    add("--eps", type=float, metavar="V", help="eps of the batch norms, where IN does not say it")
    add("--pair", type=pair, action="append", metavar="LAYER:NORM[:OUT_AXIS[:GROUPS]]",
        help="of .safetensors and .pt: a layer and the batch norm behind it; out_axis is 1 for transposed "
        "convolutions, else 0; may be repeated")  # fmt: skip
    add("--check", action="store_true", help="of .onnx: compare both models on random input by ONNX Runtime")


def _fold(given: Namespace) -> None:
    """Fold the batch norms of a model file into the convolutions and dense layers before them."""
    found = formats.fold_file(given.source, given.target, pairs=given.pair, eps=given.eps, check=given.check,
                              kinds=(getattr(given, "from"), given.to))  # fmt: skip
    if given.json:
        return print(json.dumps(found._asdict()))
    for name in found.folded:
        print(f"folded: {name}")
    for name, why in found.left.items():
        print(f"left: {name}: {why}")
    if found.error is not None:
        print(f"largest difference of the outputs: {found.error:.2g} of the largest output")


# ---- the command line --------------------------------------------------------------------------------------

# A command is a line here: what does it, whose docstring is its help, and what adds its arguments.
_COMMANDS: dict[str, Any] = {
    "info": (_info, lambda add: None),
    "stats": (_stats, _stats_arguments),
    "tune": (_tune, lambda add: None),
    "inspect": (_inspect, _inspect_arguments),
    "convert": (_convert, _convert_arguments),
    "fold": (_fold, _fold_arguments),
}


def _main() -> int:
    parser = ArgumentParser("python -m batchnorm", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, arguments) in _COMMANDS.items():
        one = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="print JSON")
        arguments(one.add_argument)
    given = parser.parse_args()
    run, status = _COMMANDS[given.command][0], 0
    try:
        try:
            status = run(given) or 0
        except (ValueError, TypeError, ImportError) as error:
            if run not in (_inspect, _convert, _fold):
                raise
            text = str(error).replace("source_eps is", "from-eps is").replace("{'conv1': 'bn1'}", "conv1:bn1")
            said = r"(?<!\w)(names|only|eps|from-eps|check|pair)s?(?= is| are| and| names|=\d)"
            raise _Error(re.sub(said, r"--\1", text)) from error
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        return 130
    except (_Error, OSError) as error:
        print(f"python -m batchnorm {given.command}: error:", *str(error).split(), file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(_main())
