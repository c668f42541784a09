"""A progress bar on stderr, by the package rich if that is there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .settings import flag

__all__ = ["bar", "idle"]


def idle(n: int) -> None:
    """What a bar that is not shown is told."""


@contextlib.contextmanager
def bar(
    show: bool | None, what: str, total: int | None, *, of_bytes: bool = False
) -> Iterator[Callable[[int], object]]:
    """A function that is told how much more is done, and shows it; with ``show=None`` on terminals alone."""
    show = None if show is None else flag("progress", show)
    progress = _made(show, of_bytes) if show or (show is None and sys.stderr.isatty()) else None
    if progress is None:
        yield idle
        return
    with progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)
        done = progress.tasks[0].completed
        progress.update(task, total=done, completed=done)  # known at last


def _made(show: bool | None, of_bytes: bool) -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        if show:
            remedy = "pip install 'batchnorm[progress]', or pass progress=False"
            raise ImportError(f"progress=True needs the package rich: {remedy}") from None
        return None
    numbers: Any = (progress.MofNCompleteColumn,)
    if of_bytes:
        numbers = progress.DownloadColumn, progress.TransferSpeedColumn
    made = [column() for column in (progress.BarColumn, *numbers, progress.TimeRemainingColumn)]
    return progress.Progress("{task.description}", *made, console=Console(stderr=True))
