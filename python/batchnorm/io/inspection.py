"""What is in a model file, and what looks wrong there: the findings of layers, from a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..diagnose.findings import Finding, of_file
from .files import Content, read
from .norms import OPTIONS, VECTORS, AsLayer, Norm

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` has found; ``print`` it, iterate over its findings, or ask for its ``codes``.

    Attributes
    ----------
    kind : str
        Of the file: "safetensors", "torch", "keras", "onnx", "caffe" or "npz".
    norms : dict of str to Norm
        The batch norms by name.
    others : int
        Tensors in the file that are not theirs.
    findings : tuple of Finding
        What looks wrong; each names its batch norm. Empty if nothing does.
    """

    kind: str
    norms: dict[str, Norm]
    others: int
    findings: tuple[Finding, ...]

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings."""
        return tuple(finding.code for finding in self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "C", "names of", "gamma", "beta", *OPTIONS, "updates")]
        for name, norm in self.norms.items():
            has = ("-" if v is None else "yes" for v in (norm.gamma, norm.beta))
            options = (getattr(norm, n) for n in (*OPTIONS, "num_updates"))
            shown = ("?" if value is None else f"{value:g}" for value in options)
            rows.append((name or "-", str(norm.mean.size), norm.format, *has, *shown))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        count, others = len(self.norms), self.others
        ending = f"{count} batch norm{'s' * (count != 1)}, {others} other tensor{'s' * (others != 1)}"
        lines = lines if self.norms else []
        whose: dict[tuple[str, ...], list[str]] = {}
        for each in self.findings:
            whose.setdefault((each.code, each.text, each.remedy), []).append(each.layer or "the layer")
        said = [f"{code}: {', '.join(n)}: {text}. {remedy}." for (code, text, remedy), n in whose.items()]
        return "\n".join([*lines, ending, *said])

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON holds it.

        Returns
        -------
        dict of str to object
            Numbers, str, lists and dicts; None also for NaN and Inf.
        """
        norms = {name: _described(norm) for name, norm in self.norms.items()}
        found = [{"code": f.code, "name": f.layer, "text": f.text, "remedy": f.remedy, "channels": f.channels,
                  "numbers": {k: v if np.isfinite(v) else None for k, v in f.numbers.items()}}
                 for f in self.findings]  # fmt: skip
        return {"kind": self.kind, "batch_norms": norms, "others": self.others, "findings": found}


def inspect(path: str | os.PathLike[str], kind: str | None = None) -> Inspection:
    """Look at the batch norms of a model file.

    Parameters
    ----------
    path : str or PathLike
        The file. Of large files only names, shapes and the arrays of batch norms are read, but an .onnx or a
        .caffemodel has to be read whole.
    kind : str, optional
        "safetensors", "torch", "keras", "onnx", "caffe" or "npz"; by default what the file's name says.

    Returns
    -------
    Inspection

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        There is no such file.
    ValueError
        The file is damaged, hostile, or something else.
    ModuleNotFoundError
        The library that reads such files is not installed.

    Notes
    -----
    The findings of ``BatchNorm.report``, and "dead_channels", "huge_gamma", "unsure" and "unreadable". Where
    the file holds no eps, it is compared with the default of the library whose names the arrays have.

    Examples
    --------
    >>> import os, tempfile
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import inspect
    >>> path = os.path.join(tempfile.mkdtemp(), "bn1.npz")
    >>> BatchNorm(3, name="bn1").save(path)
    >>> inspect(path).codes
    ('never_updated',)
    """
    content: Content = read(path, kind)
    found = [finding for norm in content.norms.values() for finding in _findings(norm)]
    return Inspection(content.kind, content.norms, content.others, tuple(found))


def _findings(norm: Norm) -> Iterator[Finding]:
    if norm.fault:
        remedy = "Read it where its other numbers are: in the whole model, not in its weights alone"
        yield Finding("unreadable", norm.fault, remedy, layer=norm.name)
    if norm.unsure:
        yield Finding("unsure", norm.unsure, "Look at the model's source", layer=norm.name)
    if not norm.mean.size:
        return
    eps = float(norm.option("eps"))
    least = float(np.min(norm.var))
    if -eps <= least < 0:
        text = f"var is {least:.3g} at the least, not below -eps={-eps:g}: a part of eps seems to be in it"
        remedy = "to_layer() and convert() read it so, with a smaller eps"
        yield Finding(
            "shifted_var", text, remedy, numbers={"smallest_var": least, "eps": eps}, layer=norm.name
        )
        norm = norm.with_eps((eps + least) / 2)  # so that the least is not 0, which means something else
    with np.errstate(over="ignore"):
        yield from (replace(finding, layer=norm.name) for finding in of_file(AsLayer(norm)))


def _described(norm: Norm) -> dict[str, Any]:
    """A norm without its arrays, but with their ranges."""
    found: dict[str, Any] = {"channels": norm.mean.size, "dtype": str(norm.mean.dtype), "format": norm.format}
    found |= {name: getattr(norm, name) for name in (*OPTIONS, "num_updates")}
    for name in VECTORS:
        value = getattr(norm, name)
        if value is not None and value.size:
            least, most = float(np.min(value)), float(np.max(value))
            found[name] = [least if np.isfinite(least) else None, most if np.isfinite(most) else None]
        else:
            found[name] = None
    return found | {"unsure": norm.unsure, "fault": norm.fault, "keys": norm.keys}
