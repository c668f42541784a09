"""A diagnosis of a network as a table, as JSON, as a picture: each layer, with a finding or without."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from typing import Any

import numpy as np

from ..typing import Vector

__all__ = ["plot", "table", "to_json"]

_WRONG, _RIGHT = "#D55E00", "#0072B2"


def _worst(values: Vector) -> tuple[float, int]:
    """The largest number and its channel; NaN and -1 if none is known."""
    if np.isnan(values).all():
        return math.nan, -1
    channel = int(np.nanargmax(values))
    return float(values[channel]), channel


def _factors(ratio: Vector) -> Vector:
    """Ratios as factors of at least 1, by which the larger variance is larger."""
    with np.errstate(divide="ignore"):
        return np.maximum(ratio, 1 / ratio)


def _codes(diagnosis: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {each.layer: [] for each in diagnosis.compared}
    for finding in diagnosis:
        if finding.code != "fine":
            found.setdefault(finding.layer, []).append(finding.code)
    return found


def table(diagnosis: Any) -> str:
    """See ``Diagnosis.table``."""
    codes, numbers = _codes(diagnosis), {each.layer: each for each in diagnosis.compared}
    titles = (
        "layer",
        "channels",
        "values",
        "mean off by",
        "channel",
        "variance off by",
        "channel",
        "findings",
    )
    rows: list[tuple[str, ...]] = [titles]
    for name, found in codes.items():
        cells = [""] * 6
        if each := numbers.get(name):
            off, first = _worst(each.distance)
            factor, second = _worst(_factors(each.ratio))
            known = first >= 0
            cells = [
                str(each.distance.size),
                f"{each.count:.{4 if each.count < 1000 else 16}g}",
                f"{off:.3g} std" if known else "-",
            ]
            cells += [str(first) if known else "", f"{factor:.3g} x" if known else "-"]
            cells += [str(second) if known else ""]
        rows.append((name, *cells, ", ".join(found) or "fine"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(titles) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """For JSON: without NaN and infinities, which it does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return value


def to_json(diagnosis: Any) -> str:
    """See ``Diagnosis.to_json``."""
    found = [asdict(finding) for finding in diagnosis]
    layers = [{name: getattr(each, name) for name in each.__slots__} for each in diagnosis.compared]
    return json.dumps(_plain({"ok": diagnosis.ok, "findings": found, "layers": layers}), allow_nan=False)


def plot(diagnosis: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """See ``Diagnosis.plot``."""
    if not diagnosis.compared:
        raise RuntimeError(
            "plot() has nothing to draw: batchnorm.diagnose(layers, ...) has the numbers for it"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        remedy = "pip install matplotlib, or print(diagnosis.table())"
        raise ModuleNotFoundError(f"plot() needs matplotlib: {remedy}", name=error.name) from error
    codes, layers = _codes(diagnosis), diagnosis.compared
    figure: Any = Figure(figsize=(11, 1.8 + 0.28 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, each in enumerate(layers):
        colour = _WRONG if codes[each.layer] else _RIGHT
        for axis, values in ((left, each.distance), (right, _factors(each.ratio))):
            values = values[np.isfinite(values)]
            axis.plot(values, np.full(values.size, row), "|", color=colour, alpha=0.5, markersize=9)
            if values.size:
                axis.plot(values.max(), row, "o", color=colour, markersize=4)
            else:
                axis.text(0.02, row, "unknown", color=colour, fontsize=8, va="center",
                          transform=axis.get_yaxis_transform())  # fmt: skip
    labels = [
        f"{name}: {', '.join(codes[name])}" if codes[name] else name for name in (e.layer for e in layers)
    ]
    left.set_yticks(range(len(layers)), labels, fontsize=9)
    left.set(ylim=(len(layers) - 0.5, -0.5), xlabel="running mean off by (running standard deviations)")
    known = np.concatenate([_factors(each.ratio) for each in layers])
    most = np.max(known, initial=10, where=np.isfinite(known))
    right.set(
        xscale="log", xlim=(0.93, 1.15 * most), xlabel="larger variance / smaller, batch against running"
    )
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.suptitle("Each channel (|) and the worst one (•) of each layer; orange: with a finding")
    if path is not None:
        figure.savefig(os.fspath(path), dpi=120)
    return figure
