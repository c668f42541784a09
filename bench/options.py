"""Options that the benchmarks share, checked before anything is measured."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from machine import cpus
from peers import PEERS
from peers.protocol import ITEM


def at_least(least: int) -> Callable[[str], int]:
    """An integer from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse


def threads(text: str) -> int:
    """As many as there are CPUs for this process at most: two threads on one CPU measure the scheduler."""
    value = at_least(1)(text)
    here = sorted(cpus())
    if value > len(here):
        named = ", ".join(map(str, here))
        raise argparse.ArgumentTypeError(
            f"{value} threads, but this process may use {len(here)} CPUs ({named})"
        )
    return value


def python(text: str) -> tuple[str, str]:
    """NAME=PATH of an interpreter."""
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PATH, for example tensorflow=/venv/bin/python"
        )
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"no peer is called {name!r}; there are {', '.join(PEERS)}")
    found = shutil.which(path)
    if found is None:
        raise argparse.ArgumentTypeError(f"{path!r} is not a program")
    return name, os.path.abspath(found)


def new_file(text: str) -> Path:
    """A file that can be written later: its folder exists."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def folder(text: str) -> Path:
    """A folder, made if its parent exists."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder that should hold {text!r} does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def existing_folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text).absolute()


def size(text: str) -> int:
    """Bytes: 65536, 64K, 256M, 4G."""
    units = {"K": 10, "M": 20, "G": 30}
    digits, shift = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 0)
    if not digits.isdigit() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 65536, 64K, 256M or 4G")
    return int(digits) << shift


def add_contestants(parser: argparse.ArgumentParser, peers: list[str]) -> None:
    """Who takes part, and with what."""
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=peers, metavar="PEER",
        help=f"who to compare with, of {', '.join(PEERS)} (default: {' '.join(peers)}); none: no peer",
    )  # fmt: skip
    parser.add_argument(
        "--python", action="append", type=python, default=[], metavar="NAME=PATH",
        help="run a peer with another interpreter, e.g. tensorflow=/venv/bin/python (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--onednn", type=existing_folder, default=Path(sys.prefix), metavar="FOLDER",
        help="prefix that holds oneDNN's include and lib (default: that of this Python)",
    )  # fmt: skip


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", nargs="+", choices=ITEM, default=["float32"], help="storage types")
