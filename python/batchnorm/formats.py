"""Batch norms of other libraries' models: read, inspect, convert, fold.

- ``read``: every batch norm of a model file; ``find``: of named arrays
- ``to_layer``, ``from_layer``: a :class:`batchnorm.BatchNorm` of one, and back
- ``write``: layers in a file of another library; ``arrays_of``: as named arrays
- ``inspect``: what is in a file, and what looks wrong there
- ``convert``, ``fold_file``: from file to file
- ``FORMATS``: what each library calls things, and what its files do not hold

Files: .safetensors, .pt, .keras, .weights.h5, .h5, .onnx, .caffemodel, .npz. The libraries that read them are
the extra ``batchnorm[formats]``, and PyTorch for .pt. They are imported when they are used.

>>> import numpy as np
>>> from batchnorm.formats import find, to_layer
>>> names = "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"
>>> bn = to_layer(find({name: np.ones(3) for name in names})["bn1"], eps=1e-3)
>>> bn.name, bn.gamma.shape, bn.eps, bn.decay, bn.channel_axis
('bn1', (3,), 0.001, 0.9, 1)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from .io import files, folding
from .io.files import KINDS, kind_of
from .io.folding import Folded, Pair
from .io.inspection import Inspection, inspect
from .io.layer_state import state_of
from .io.norms import FORMATS, OPTIONS, AsLayer, Format, Norm, arrays_of, find, from_layer, lost
from .io.npz import failing_as, path_text
from .io.tensors import rewrite
from .layer import BatchNorm
from .settings import Settings, word
from .settings import kind as kind_of_value

__all__ = [
    "FORMATS",
    "Folded",
    "Format",
    "Inspection",
    "Norm",
    "Pair",
    "arrays_of",
    "convert",
    "find",
    "fold_file",
    "from_layer",
    "inspect",
    "lost",
    "read",
    "to_layer",
    "write",
]

Path = str | os.PathLike[str]
_TENSORS = ("safetensors", "torch")
_names = word(*(name for name in FORMATS if name not in ("onnx", "caffe")))


def read(path: Path, kind: str | None = None) -> dict[str, Norm]:
    """Every batch norm of a model file, by name.

    Parameters
    ----------
    path : str or PathLike
        The file. No pickle is ever read: of .pt files PyTorch reads tensors alone.
    kind : str, optional
        "safetensors", "torch", "keras", "onnx", "caffe" or "npz"; by default what the file's name says.

    Returns
    -------
    dict of str to Norm
        What the file does not hold is None in them, see ``Norm.missing``.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        There is no such file.
    ValueError
        The file is damaged, hostile, or something else.
    ModuleNotFoundError
        The library that reads such files is not installed.

    Examples
    --------
    >>> import os, tempfile
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import read
    >>> path = os.path.join(tempfile.mkdtemp(), "bn1.npz")
    >>> BatchNorm(3, name="bn1").save(path)
    >>> read(path)["bn1"].mean.shape
    (3,)
    """
    return files.read(path, kind).norms


def to_layer(norm: Norm, **options: Any) -> BatchNorm:
    """A layer that goes on where a batch norm of a file has stopped.

    Parameters
    ----------
    norm : Norm
        Of `read` or `find`. Variances down to -eps are taken: eps becomes smaller by as much.
    **options
        Name and settings of :class:`batchnorm.BatchNorm`, which replace those of the file and of the library
        where the file has none: see ``norm.missing``. An `eps` other than that of the file changes
        `running_var`, so that the function in eval mode stays the same.

    Returns
    -------
    BatchNorm
        In training mode, with copies of the arrays, of float64 if `mean` is.

    Raises
    ------
    TypeError, ValueError
        NaN or Inf; a variance below -eps; an array that could not be read; options that a layer refuses.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.formats import find, to_layer
    >>> state = {"bn/gamma": np.ones(3), "bn/moving_mean": np.ones(3), "bn/moving_variance": np.ones(3)}
    >>> bn = to_layer(find(state, "keras")["bn"])
    >>> bn.eps, bn.decay, bn.channel_axis, bn.center
    (0.001, 0.99, -1, False)
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"norm is {kind_of_value(norm)}, expected a Norm, as read() and find() give them")
    norm.check()
    norm = replace(norm, name=options.pop("name", norm.name) or "")
    for name in options.keys() - {each.name for each in fields(Settings)}:
        BatchNorm(norm.mean.size, **options)  # says more of a wrong name
        raise TypeError(f"to_layer() has no argument {name!r}, which the norm decides: drop it")
    if norm.eps is None and "eps" in options:
        norm = norm.said(eps=options.pop("eps"))
    norm = norm.with_eps(options.pop("eps", None))
    return BatchNorm.from_state_dict(state_of(AsLayer(norm, **options)))


Layers = Mapping[str, BatchNorm | Norm] | Iterable[BatchNorm | Norm] | BatchNorm | Norm


def _norms(given: Layers) -> dict[str, Norm]:
    """Norms by their names."""
    layers: Any = [given] if isinstance(given, BatchNorm | Norm) else given
    if isinstance(layers, str) or not isinstance(layers, Mapping | Iterable):
        raise TypeError(f"layers is {kind_of_value(layers)}, expected BatchNorm layers, or norms of a file")
    pairs = layers.items() if isinstance(layers, Mapping) else ((None, layer) for layer in layers)
    found: dict[str, Norm] = {}
    for key, layer in pairs:
        if not isinstance(layer, BatchNorm | Norm):
            raise TypeError(
                f"layers holds {kind_of_value(layer)}, expected BatchNorm layers, or norms of a file"
            )
        name = (layer.name or "") if key is None else key
        if name in found or (not name and found):
            raise ValueError(
                f"layers holds two of the name {name!r}, expected a name for each: a mapping gives them"
            )
        found[name] = replace(from_layer(layer, name) if isinstance(layer, BatchNorm) else layer, name=name)
    if not found:
        raise ValueError("layers is empty, expected BatchNorm layers, or norms of a file")
    return found


def write(
    path: Path, layers: Layers, *, names: str | None = None, kind: str | None = None
) -> tuple[str, ...]:
    """Write layers to a file of another library, whole or not at all.

    Parameters
    ----------
    path : str or PathLike
        The file: .safetensors, .pt (needs PyTorch), .weights.h5, .onnx, .caffemodel, .npz (one layer). An old
        one is replaced at the end, in one step.
    layers : mapping of str to BatchNorm or Norm, or iterable of them
        With their names.
    names : str, optional
        Of .safetensors and .pt files: whose names the arrays get, a key of ``FORMATS``; "pytorch" if absent.
    kind : str, optional
        "safetensors", "torch", "keras", "onnx", "caffe" or "npz"; by default what the file's name says.

    Returns
    -------
    tuple of str
        What the file cannot hold: whoever reads it has to know that from elsewhere.

    Raises
    ------
    TypeError, ValueError
        Layers without names or with the same; NaN or Inf; several channel axes; no such kind.
    ModuleNotFoundError
        The library that writes such files is not installed.

    Examples
    --------
    >>> import os, tempfile
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import write
    >>> write(os.path.join(tempfile.mkdtemp(), "bn1.npz"), BatchNorm(3, name="bn1"))
    ()
    """
    chosen, norms = kind_of(path, kind), _norms(layers)
    row = KINDS[chosen]
    if chosen == "keras" and not path_text(path).lower().endswith(".weights.h5"):
        got = f"path is {os.fspath(path)!r}"
        raise ValueError(
            f"{got}, expected .weights.h5: Keras alone writes whole models; load_weights() takes these"
        )
    if names is not None and row.names:
        raise ValueError(f"names is {names!r}, but a file of {chosen} has its own: drop it")
    format = row.names or _names("names", names or "pytorch")
    holds = row.holds or FORMATS[format].holds
    taken = {n: norm for n, norm in norms.items() if norm.eps is None and norm.format != format}
    norms |= {name: norm.said(eps=norm.option("eps")) for name, norm in taken.items()}
    for name, norm in norms.items():
        norm.check()
        if "eps" in holds.split() and norm.var.min() < 0:  # else what nobody said would seem to be said
            norms[name] = norm.with_eps()
    files.writing(path, lambda temporary: row.write(temporary, norms, format))
    return (*_lost(norms, chosen, format), *_taken(taken))


def _taken(norms: Mapping[str, Norm]) -> Iterator[str]:
    """What is said of norms whose eps nobody says, where it matters."""
    for format in dict.fromkeys(norm.format for norm in norms.values()):
        whose = _listed([name for name, norm in norms.items() if norm.format == format])
        yield f"eps: not in the source; {FORMATS[format].eps:g}, the default of {format}, taken for {whose}"


def _lost(norms: Mapping[str, Norm], kind: str, format: str | None = None) -> tuple[str, ...]:
    """What a file cannot hold of all norms, each thing once; without a format by the norms' own names."""
    said: dict[str, list[str]] = {}
    for name, norm in norms.items():
        names = format or norm.format
        for note in lost(norm, names, KINDS[kind].holds or FORMATS[names].holds):
            said.setdefault(note, []).append(name or "the layer")
    return tuple(f"{note} of {_listed(whose)}" for note, whose in said.items())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def convert(
    source: Path, target: Path, *, names: str | None = None, only: Sequence[str] | None = None,
    eps: float | None = None, source_eps: float | None = None,
    kinds: tuple[str | None, str | None] = (None, None),
) -> tuple[str, ...]:  # fmt: skip
    """Write the batch norms of one model file to another, of any kind.

    Between .safetensors and .pt the other tensors come along, if nothing else is asked for.

    Parameters
    ----------
    source, target : str or PathLike
        The files. `target` is written whole or not at all.
    names, only : str; sequence of str, optional
        Whose names the arrays get, see `write`; the batch norms that are wanted.
    eps : float, optional
        The eps that readers of `target` will use: variances take the difference to that of `source`.
    source_eps : float, optional
        What batch norms were built with whose eps is not in `source`. If it is not said either, it is the
        default of the library whose names these are, and a note says so.
    kinds : tuple of two str or None
        The kinds of the files, see `read`; by default what their names say.

    Returns
    -------
    tuple of str
        What `target` cannot hold, or does not.

    Raises
    ------
    TypeError, ValueError, OSError, ModuleNotFoundError
        As `read` and `write`, and names in `only` that are not in `source`.

    Examples
    --------
    >>> import os, tempfile
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import convert
    >>> path = os.path.join(tempfile.mkdtemp(), "bn1.npz")
    >>> BatchNorm(3, name="bn1").save(path)
    >>> convert(path, path.replace("bn1", "copy"))
    ()
    """
    content, chosen = files.read(source, kinds[0]), kind_of(target, kinds[1])
    norms = content.norms
    if only is not None:
        if unknown := [name for name in only if name not in norms]:
            known = _listed([*norms]) or "none"
            raise ValueError(
                f"only names {unknown[0]!r}, expected names of batch norms in {source!r}: {known}"
            )
        norms = {name: norms[name] for name in only}
    if not norms:
        raise ValueError(f"{os.fspath(source)!r} has no batch norms, expected at least one")
    asked = (names, only, eps, source_eps)
    if content.kind in _TENSORS and chosen in _TENSORS and not any(each is not None for each in asked):
        both = content.kind, chosen
        with failing_as(f"cannot convert {os.fspath(source)!r}"):
            rewrite(
                path_text(source), both, lambda write: files.writing(target, write), lambda tensors: tensors
            )
        return _lost(norms, chosen)
    silent = {name: norm for name, norm in norms.items() if norm.eps is None}
    if source_eps is not None:
        if not silent:
            raise ValueError(f"source_eps is {source_eps}, but the source says eps itself: drop it")
        norms = norms | {name: norm.said(eps=source_eps) for name, norm in silent.items()}
        silent = {}
    guessed: tuple[str, ...] = ()
    if eps is not None:
        norms, guessed = {name: norm.with_eps(eps) for name, norm in norms.items()}, tuple(_taken(silent))
    if names is None and content.kind in _TENSORS and chosen in _TENSORS:
        names = next(iter(norms.values())).format
    notes = (*write(target, norms, names=names, kind=chosen), *guessed)
    missing = {name: rest for name, norm in norms.items() if (rest := {*norm.missing} - {"eps"})}
    if missing:
        words = ", ".join(name for name in OPTIONS if any(name in each for each in missing.values()))
        notes = (*notes, f"{words}: not in the source, of {_listed([*missing])}; defaults stand where needed")
    if left := content.others + sum(len(norm.keys) for n, norm in content.norms.items() if n not in norms):
        tensors = "tensor that belongs" if left == 1 else "tensors that belong"
        notes = (*notes, f"{left} {tensors} to none of these batch norms")
    return notes


def fold_file(
    source: Path, target: Path, *, pairs: Mapping[str, str] | Sequence[Any] | None = None,
    eps: float | None = None, check: bool = False, kinds: tuple[str | None, str | None] = (None, None),
) -> Folded:  # fmt: skip
    """Fold the batch norms of a model file into the layers before them.

    Parameters
    ----------
    source, target : str or PathLike
        .onnx, or .safetensors and .pt. `target` is written whole or not at all.
    pairs : mapping of str to str, or sequence of Pair
        Of .safetensors and .pt files, which do not say what follows what: layers by name and the batch norms
        behind them. ``Pair(layer, norm, out_axis=1, groups=g)`` is a transposed convolution.
    eps : float, optional
        What the batch norms were built with, needed where the file does not hold it.
    check : bool, default False
        Run both .onnx models by ONNX Runtime on random input; outputs that differ are an error.
    kinds : tuple of two str or None
        The kinds of the files, see `read`; by default what their names say.

    Returns
    -------
    Folded
        ``folded``, ``left`` (name to reason) and ``error``.

    Raises
    ------
    TypeError, ValueError
        A file of another kind; names that are not there; eps that nobody knows; shapes that do not fit;
        outputs that differ.
    ModuleNotFoundError
        The library that reads such files, or onnxruntime, is not installed.

    See Also
    --------
    batchnorm.fold : The same of arrays.

    Examples
    --------
    >>> import os, tempfile
    >>> from batchnorm.formats import fold_file
    >>> fold_file("model.keras", "folded.keras")
    Traceback (most recent call last):
    ValueError: source is of kind 'keras', expected onnx, safetensors or torch
    """
    paths = path_text(source), path_text(target)
    first, second = kind_of(source, kinds[0]), kind_of(target, kinds[1])
    if first not in ("onnx", *_TENSORS):
        raise ValueError(f"source is of kind {first!r}, expected onnx, safetensors or torch")
    if (first == "onnx") != (second == "onnx") or second not in ("onnx", *_TENSORS):
        expected = "onnx" if first == "onnx" else "safetensors or torch"
        raise ValueError(f"target is of kind {second!r}, expected {expected}, as source is {first}")
    if first == "onnx":
        if pairs is not None or eps is not None:
            raise ValueError(
                "pairs and eps are for .safetensors and .pt files: an .onnx file says both, drop them"
            )
        return folding.fold_onnx(*paths, check)
    if check:
        raise ValueError("check is True, but only .onnx files can be run: drop it")
    if not pairs:
        example = "{'conv1': 'bn1'}"
        raise ValueError(
            f"pairs is {pairs!r}, expected layers and the batch norms behind them, such as {example}"
        )
    return folding.fold_tensors(*paths, (first, second), folding.pairs_of(pairs), eps)
