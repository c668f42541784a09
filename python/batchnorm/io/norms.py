"""What libraries call the arrays of a batch norm, and what their files do not hold: one table.

A `Norm` is a batch norm as a file has it: four vectors, a counter, and of the options those that are known.
`find` takes them out of named arrays, `arrays_of` is the way back. Readers of files hand their content to
`find`. Nothing here opens a file or knows a layer's class.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ..running import RunningStatistics
from ..settings import Settings, integer, kind, word
from ..typing import Array, LayerLike
from .layer_state import COUNTERS, ENTRIES, options_of

__all__ = ["FORMATS", "Format", "Norm", "arrays_of", "find", "from_layer", "lost"]

VECTORS = ("gamma", "beta", "mean", "var")
OPTIONS = ("eps", "decay", "running_ddof", "channel_axis")
NOTHING: dict[str, Any] = dict.fromkeys(("mean", "var"), np.zeros(0, np.float32))  # of what cannot be read


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm of a model file, or of named arrays.

    Attributes
    ----------
    name : str
        Its prefix among the names, without separators and without what wrappers add (``module.``,
        ``_orig_mod.``).
    mean, var : ndarray of float32 or float64, shape (C,)
        Running statistics, as they are in the file: NaN and negative variances too. 16-bit ones are widened.
    gamma, beta : ndarray of float32 or float64, shape (C,), or None
        Scale and shift.
    num_updates : int or None
        Updates of the statistics, as far as the file counts them.
    eps, decay : float or None
        None: the file does not say. `decay` weighs the old value, in every format.
    running_ddof, channel_axis : int or None
        The estimator of `var` and the axis of the channels; None: the file does not say.
    format : str
        Whose names these are, a key of ``FORMATS``.
    zero_debias : bool
        Whether training goes on as with ``BatchNorm(zero_debias=True)``: in Caffe and Haiku. TensorFlow's
        ``moving_mean/biased`` is passed over, as it has none for the variance.
    unsure : str
        Why this may not be a batch norm; else empty.
    fault : str
        Why it cannot be used: what of it could not be read; else empty.
    other : dict of str to object
        Settings of a layer of this package that no other format holds, such as ``activation``.
    counters : dict of str to object
        The counters of such a layer beside `num_updates`.
    keys : dict of str to str
        The name of each array in the mapping, by "gamma", "beta", "mean", "var", "num_updates".
    """

    name: str
    mean: Array
    var: Array
    gamma: Array | None = None
    beta: Array | None = None
    num_updates: int | None = None
    eps: float | None = None
    decay: float | None = None
    running_ddof: int | None = None
    channel_axis: int | None = None
    format: str = "pytorch"
    zero_debias: bool = False
    unsure: str = ""
    fault: str = ""
    other: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """The options that the file does not hold."""
        return tuple(name for name in OPTIONS if getattr(self, name) is None)

    def option(self, name: str) -> Any:
        """An option, or the default of the library whose names these are.

        Parameters
        ----------
        name : str
            "eps", "decay", "running_ddof" or "channel_axis".

        Returns
        -------
        float or int
        """
        value = getattr(self, name)
        return getattr(FORMATS[self.format], name) if value is None else value

    def said(self, **options: Any) -> Norm:
        """The same with options that a file says, checked; and its name."""
        axis = options.get("channel_axis")
        if isinstance(axis, list | tuple) and len(axis) == 1:  # of Keras 2
            axis = options["channel_axis"] = axis[0]
        if axis is not None:
            integer("channel_axis", axis, -64, 63, "an int, the axis that holds the channels")
        count = options.get("num_updates", 0)
        integer("num_updates", 0 if count is None else count, 0, 2**63 - 1, "an int >= 0")
        Settings(**{name: value for name, value in options.items() if name not in ("name", "num_updates")})
        return replace(self, **options)

    def with_eps(self, eps: float | None = None) -> Norm:
        """The same function in eval mode with another eps: `var` takes the difference.

        Parameters
        ----------
        eps : float, optional
            By default the file's, unless variances down to -eps want a smaller one: some exporters take a
            part of eps into the variance.

        Returns
        -------
        Norm

        Raises
        ------
        ValueError
            A variance would be negative, or is NaN.
        """
        old, var = float(self.option("eps")), self.var.astype(np.float64)
        shift = min(float(var.min()), 0.0) if eps is None else eps - old
        if not (var >= max(shift, -old)).all():  # so is NaN
            where = int(np.argmin(var >= max(shift, -old)))
            expected = f"expected at least {max(shift, -old):g}"
            why = ", -eps" if eps is None else f", what var + eps allows as eps goes from {old:g} to {eps:g}"
            raise ValueError(f"{self._key('var')} is {var[where]:g} at channel {where}, {expected}{why}")
        new = self.said(eps=max(old + shift, 0.0) if eps is None else eps)
        return replace(new, var=(var - shift).astype(self.var.dtype)) if shift else new

    def check(self) -> None:
        """Raise if it cannot be used as it is: NaN or Inf, or an array that is missing."""
        if self.fault:
            raise ValueError(self.fault)
        for name in VECTORS:
            if (value := getattr(self, name)) is not None and not np.isfinite(value).all():
                where = int(np.argmax(~np.isfinite(value)))
                got = f"{self._key(name)} is {value[where]} at channel {where}"
                raise ValueError(f"{got}, expected finite numbers: mend it by training, or recalibrate()")

    def _key(self, name: str) -> str:
        return self.keys.get(name, f"{name} of {self.name!r}")


class Format(NamedTuple):
    """How a library's batch norms are called and what they do if nobody says otherwise.

    Attributes
    ----------
    names : str
        The names of gamma, beta, mean, var and the counter of updates, "-" for none.
    before : str
        Characters that may stand between prefix and name; the first one is written.
    holds : str
        What its own files, of weights alone, hold beside the vectors.
    eps, decay : float
        The library's defaults.
    running_ddof, channel_axis : int
        The library's estimator of the running variance and default axis.
    """

    names: str
    before: str
    holds: str
    eps: float
    decay: float
    running_ddof: int
    channel_axis: int


# The rows are tried in this order.
FORMATS = {
    "batchnorm": Format("gamma beta running_mean running_var num_updates", "./",
                        "num_updates eps decay running_ddof channel_axis zero_debias", 1e-5, 0.9, 1, 1),
    "pytorch": Format("weight bias running_mean running_var num_batches_tracked", "./", "num_updates",
                      1e-5, 0.9, 1, 1),
    "tensorflow": Format("gamma beta moving_mean moving_variance moving_mean/local_step", "/", "num_updates",
                         1e-3, 0.999, 0, -1),
    "keras": Format("gamma beta moving_mean moving_variance -", "/.", "", 1e-3, 0.99, 0, -1),
    "mxnet": Format("gamma beta moving_mean moving_var -", "_./", "", 1e-3, 0.9, 0, 1),
    "gluon": Format("gamma beta running_mean running_var -", "_./", "", 1e-5, 0.9, 0, 1),
    "haiku": Format("scale offset ~/mean_ema/average ~/var_ema/average ~/mean_ema/counter", "/",
                    "num_updates zero_debias", 1e-5, 0.99, 0, -1),
    "flax": Format("scale bias mean var -", "/.", "", 1e-5, 0.99, 0, -1),
    "onnx": Format("scale B input_mean input_var -", "./", "eps decay", 1e-5, 0.9, 0, 1),
    "caffe": Format("- - - - -", "", "eps decay num_updates", 1e-5, 0.999, 1, 1),
}  # fmt: skip
# Settings that say nothing about the function, or that the vectors say.
_ELSEWHERE = (*OPTIONS, "zero_debias", "scale", "center", "data_format", "keep", "on_nonfinite",
              "allow_initial_statistics")  # fmt: skip
_COUNTERS = [name for name in COUNTERS if name != "num_updates"]
_COLLECTIONS = re.compile(r"(?:^|(?<=/))(?:params|batch_stats|state)/|^(?:arg|aux):")
_WRAPPED = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_WRAPPERS = re.compile(rf"(?:^|(?<=/))(?:module\.|{_WRAPPED})+|(?<=\.){_WRAPPED}")
_INSTANCE = re.compile(r"(?:^|[._/])(?:in|inst|instance)_?(?:norm)?_?\d*$|instance_?norm", re.I)
_MAY_BE = "may be an instance norm with running statistics, whose names are the same"
_formats = word(*FORMATS, none=True)


# ---- out of named arrays -----------------------------------------------------------------------------------


def find(arrays: Mapping[str, Any], format: str | None = None) -> dict[str, Norm]:
    """Every batch norm among named arrays, by its prefix.

    Parameters
    ----------
    arrays : mapping of str to array, or to such a mapping
        A ``state_dict`` of PyTorch, variables of Flax or Haiku, parameters of MXNet, a TensorFlow checkpoint,
        ``{v.path: v for v in model.variables}`` of Keras; or layers' ``state_dict()`` by name. Values are
        anything that ``numpy.asarray`` takes, and tensors of PyTorch; those of batch norms alone are read.
    format : str, optional
        A key of ``FORMATS``; by default what the names are.

    Returns
    -------
    dict of str to Norm

    Raises
    ------
    TypeError, ValueError
        `arrays` is no mapping, or `format` is none. An array that holds no real numbers is the ``fault`` of
        its batch norm.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm.formats import find
    >>> state = {f"bn1.{name}": np.ones(3, np.float32) for name in ("weight", "running_mean", "running_var")}
    >>> norm = find({**state, "fc.weight": np.ones((2, 3))})["bn1"]
    >>> norm.format, norm.mean.shape, norm.missing
    ('pytorch', (3,), ('eps', 'decay'))
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays is {kind(arrays)}, expected a mapping of names to arrays")
    wanted = _formats("format", format)
    flat: dict[str, tuple[str, Any]] = {}
    twins: dict[str, str] = {}  # of two arrays of one name what is wrong, by the key of the later one
    for key, value in leaves(arrays):
        short = _COLLECTIONS.sub("", key).removesuffix(":0")
        if short in flat and flat[short][1] is not value:
            twins[key] = f"{flat[short][0]} and {key} are both {short}, expected one of them: drop the other"
        flat[short] = key, value
    found: dict[str, Norm] = {}
    most: dict[str, int] = {}  # of the names of several libraries those that are there win
    for _, names, before in _rows(wanted):
        for keys in _groups(flat, names, before):
            most[keys["mean"]] = max(len(keys), most.get(keys["mean"], 0))
    for name, names, before in _rows(wanted):
        # Of twins the one that is not wrapped keeps the name.
        for keys in sorted(_groups(flat, names, before), key=lambda keys: plain(keys[""]) != keys[""]):
            if len(keys) < most[keys["mean"]]:
                continue
            prefix = keys.pop("")
            slim = "BatchNorm" in prefix.split("/") or "num_updates" in keys
            if name == "tensorflow" and wanted is None and not slim:
                continue  # of Keras
            if (norm := _norm(name, prefix, {role: flat[key] for role, key in keys.items()}, flat)) is None:
                continue
            for key in keys.values():
                flat.pop(key)
            title = norm.name if norm.name not in found else prefix.rstrip("./_")
            fault = next((twins[key] for key in norm.keys.values() if key in twins), norm.fault)
            found[title] = replace(norm, name=title, fault=fault)
    order = {key: i for i, (key, _) in enumerate(leaves(arrays))}
    return dict(sorted(found.items(), key=lambda item: order[item[1].keys["mean"]]))


def plain(name: str) -> str:
    """A name without what wrappers add: DataParallel, DistributedDataParallel, FSDP, torch.compile."""
    return _WRAPPERS.sub("", name)


def leaves(arrays: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of mappings in mappings, and in lists of them or of arrays, by their path."""
    for key, value in arrays.items():
        if isinstance(value, list | tuple) and any(isinstance(v, Mapping) or len(_shape(v)) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _rows(wanted: str | None) -> Iterator[tuple[str, list[str], str]]:
    for name, row in FORMATS.items():
        if wanted in (None, name):
            yield name, row.names.split(), row.before


def _groups(flat: Mapping[str, Any], names: list[str], before: str) -> Iterator[dict[str, str]]:
    """The keys of each batch norm by role, "" for the prefix: wherever a mean has a variance beside it."""
    roles = dict(zip((*VECTORS, "num_updates"), names, strict=True))
    for key in flat:
        prefix = key.removesuffix(roles["mean"])
        if prefix == key or (prefix and prefix[-1] not in before) or prefix + roles["var"] not in flat:
            continue
        there = {role: prefix + name for role, name in roles.items() if prefix + name in flat}
        yield {"": prefix, **there}


def _norm(format: str, prefix: str, held: dict[str, tuple[str, Any]], flat: Mapping[str, Any]) -> Norm | None:
    """The batch norm of a row of the table, if these are one."""
    options: dict[str, Any] = {}
    if format == "batchnorm":
        if prefix + "format_version" not in flat and "num_updates" not in held:
            return None  # of Gluon or PyTorch
        entries = {n: np.asarray(flat[prefix + n][1]) for n in ENTRIES if prefix + n in flat}
        said = options_of({"num_updates": 0, **entries})
        options = _own_options(said | {"channel_axis": Settings(**_layout_of(said)).channel_axis})
        options["counters"] = {n: flat[prefix + n][1] for n in _COUNTERS if prefix + n in flat}
    shapes = {role: _shape(value) for role, (_, value) in held.items()}
    channels = math.prod(shapes["mean"])
    good = [role for role in VECTORS if role in held and math.prod(shapes[role]) == channels
            and max(shapes[role], default=0) == channels]  # fmt: skip
    if not {"mean", "var"} <= {*good} or not channels:
        return None
    vectors, options["fault"] = vectors_of({role: held[role] for role in good})
    keys = {role: held[role][0] for role in (*good, *(["num_updates"] if "num_updates" in held else []))}
    if "num_updates" in held:
        options["num_updates"] = _count(*held["num_updates"])
    name = plain(prefix).rstrip("./_")
    if format == "haiku":  # as its averages are by default
        options["zero_debias"] = "num_updates" in held
    if format != "batchnorm":  # where a library leaves no choice
        options["running_ddof"] = FORMATS[format].running_ddof
        options["channel_axis"] = 1 if format == "pytorch" else None
    if other := [role for role in ("gamma", "beta") if role in held and role not in good]:
        got = f"{held[other[0]][0]} has shape {shapes[other[0]]}"
        options["fault"] = f"{got}, expected {shapes['mean']}, that of {held['mean'][0]}"
    options["unsure"] = _doubt(format, name, {*good, *held})
    return Norm(name, format=format, keys=keys, **vectors, **options)


def _doubt(format: str, name: str, there: set[str]) -> str:
    """Why these arrays may be something else."""
    bare = not {"gamma", "beta"} & there
    if format == "pytorch" and (bare or _INSTANCE.search(name)):
        return f"{_MAY_BE}: {'it has neither weight nor bias' if bare else 'its own name says so'}"
    return "a mean and a var alone may be other statistics" * (bare and format == "flax")


def _layout_of(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: said[name] for name in ("data_format", "channel_axis") if said.get(name) is not None}


def _own_options(own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a norm, from settings of a layer of this package."""
    options: dict[str, Any] = {name: own.get(name) for name in OPTIONS}
    options["zero_debias"] = own.get("zero_debias", False)
    default = {each.name: each.default for each in fields(Settings) if each.name not in _ELSEWHERE}
    options["other"] = {n: v for n, v in own.items() if n in default and v != default[n]}
    if own.get("decay", 0) is None:  # which elsewhere means that it is not known
        options["other"]["decay"] = None
    return options


def _shape(value: Any) -> tuple[int, ...]:
    shape = getattr(value, "shape", None)
    return tuple(map(int, np.shape(value) if shape is None else shape))


def vector_of(key: str, value: Any) -> Array:
    """One value per channel as a new array of float32 or float64."""
    if hasattr(value, "detach"):  # of PyTorch: on any device, with or without gradient, of 16 bits too
        value = value.detach().cpu()
        value = value.numpy() if value.element_size() > 2 else value.float().numpy()
    array = np.asarray(value).reshape(-1)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise ValueError(f"{key} has dtype {array.dtype}, expected real numbers")
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32)


def vectors_of(held: Mapping[str, tuple[str, Any]]) -> tuple[dict[str, Any], str]:
    """Vectors by role, of keys and values; or none, and what is wrong with one of them."""
    try:
        return {role: vector_of(*held[role]) for role in held}, ""
    except ValueError as error:
        return NOTHING, str(error)


def _count(key: str, value: Any) -> int:
    values = vector_of(key, value)
    count = float(values[0]) if values.size == 1 else math.nan
    if not 0 <= count < 2**63:
        raise ValueError(f"{key} is {value!s:.40}, expected the number of updates, at least 0")
    return int(count)


# ---- as a layer --------------------------------------------------------------------------------------------


class AsLayer:
    """A norm as functions on layers see one: whatever its numbers are, unlike a layer of this package.

    `options` are settings of the layer that replace what the norm says, and what its library does.
    """

    frozen = False

    def __init__(self, norm: Norm, **options: Any) -> None:
        self.name: str | None = norm.name or None
        wide = norm.mean.dtype == np.float64
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)
        own = {name: norm.option(name) for name in OPTIONS} | {"zero_debias": norm.zero_debias}
        own |= {"scale": norm.gamma is not None, "center": norm.beta is not None}
        if "data_format" in options:
            own.pop("channel_axis")
        self.settings = Settings(**{**own, **norm.other, **options})
        parameters = {n: v.astype(self.dtype) for n, v in filled(norm).items()}
        self.gamma = parameters["gamma"] if self.settings.scale else None
        self.beta = parameters["beta"] if self.settings.center else None
        self.running = RunningStatistics()
        mean, var = norm.mean.astype(self.dtype), norm.var.astype(self.dtype)
        self.running.allocate(mean, var, self.settings.has_reference)
        updates, decay = norm.num_updates or 0, self.settings.decay
        first = updates == 0 and not mean.any() and bool((var == 1).all())
        left = 0.0 if self.settings.zero_debias or decay is None or not updates else decay**updates
        counters = {"num_values": 0.0, "initial_weight": 1.0 if first else left, **norm.counters}
        self.running.restore(num_updates=updates, **counters)

    def _layer_only(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError("a norm of a file cannot be called: make a layer of it, to_layer(norm)")

    snapshot = rollback = using = no_update = freeze = _layer_only


# ---- the way back ------------------------------------------------------------------------------------------


def from_layer(layer: LayerLike, name: str | None = None) -> Norm:
    """A layer as a batch norm of a file: copies.

    Parameters
    ----------
    layer : BatchNorm
        A layer that knows its channel count, with one channel axis.
    name : str, optional
        By default the layer's.

    Returns
    -------
    Norm

    Raises
    ------
    RuntimeError
        The channel count is unknown.
    ValueError
        Several channel axes: no other format has them.

    Examples
    --------
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import from_layer
    >>> norm = from_layer(BatchNorm(3, name="bn1", eps=1e-3))
    >>> norm.name, norm.mean.shape, norm.eps
    ('bn1', (3,), 0.001)
    """
    running, settings = layer.running, layer.settings
    if running.mean is None:
        raise RuntimeError("from_layer() needs the channel count, which is not known: call the layer once")
    if running.mean.ndim > 1:
        got = f"the layer has channel_axis={settings.channel_axis}"
        raise ValueError(f"{got}, expected one channel axis, as all other formats have")
    options = _own_options({each.name: getattr(settings, each.name) for each in fields(Settings)})
    title = name or layer.name or ""
    vectors: dict[str, Any] = {"mean": running.mean.copy(), "var": running.var.copy()}
    vectors |= {n: v.copy() for n in ("gamma", "beta") if (v := getattr(layer, n)) is not None}
    options["counters"] = {name: copy.copy(getattr(running, name)) for name in _COUNTERS}
    return Norm(title, **vectors, **options, num_updates=running.num_updates, format="batchnorm")


def arrays_of(norm: Norm, format: str) -> dict[str, Array]:
    """A batch norm as named arrays of a format.

    Parameters
    ----------
    norm : Norm
        For example of `from_layer` or `find`.
    format : str
        A key of ``FORMATS``. `lost` tells what its names cannot hold.

    Returns
    -------
    dict of str to ndarray
        New arrays, by the norm's name and the format's names. Where a format always has gamma and beta (all
        but "pytorch", "batchnorm", "keras", "tensorflow"), absent ones are 1 and 0.

    Raises
    ------
    ValueError
        `format` is none, or has no names (ONNX and Caffe have files alone).

    Examples
    --------
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import arrays_of, from_layer
    >>> list(arrays_of(from_layer(BatchNorm(3, name="bn1")), "keras"))
    ['bn1/gamma', 'bn1/beta', 'bn1/moving_mean', 'bn1/moving_variance']
    """
    row = FORMATS[word(*FORMATS)("format", format)]
    if format in ("onnx", "caffe"):
        raise ValueError(f"format is {format!r}, which has no named arrays: write a file of it")
    separator = row.before[0]
    prefix = norm.name + separator * bool(norm.name)
    roles = dict(zip((*VECTORS, "num_updates"), row.names.split(), strict=True))
    values: dict[str, Any] = {role: getattr(norm, role) for role in roles}
    if format in ("haiku", "flax", "mxnet", "gluon"):
        values = {**values, **filled(norm)}
    if norm.num_updates is None and format == "pytorch":
        values["num_updates"] = 0
    found = {}
    for role, name in roles.items():
        if name != "-" and values[role] is not None:
            value = np.array(values[role])
            place = f"{prefix}{name}"
            if format == "flax":
                place = f"{'params' if role in ('gamma', 'beta') else 'batch_stats'}/{place}"
            found[place] = value
    if format == "haiku":  # which keeps the averages before their zero debias as well
        count = found[f"{prefix}~/mean_ema/counter"] = np.array(norm.num_updates or 0, np.int32)
        for role in ("mean", "var"):
            weight = 1 - float(norm.option("decay")) ** int(count)
            found[f"{prefix}~/{role}_ema/hidden"] = (getattr(norm, role) * weight).astype(norm.mean.dtype)
            found[f"{prefix}~/{role}_ema/counter"] = count
    return found


def filled(norm: Norm) -> dict[str, Array]:
    """gamma and beta, 1 and 0 where there is none."""
    one = {"gamma": np.ones_like(norm.mean), "beta": np.zeros_like(norm.mean)}
    return {name: one[name] if (v := getattr(norm, name)) is None else v for name in one}


def lost(norm: Norm, format: str, holds: str | None = None) -> list[str]:
    """What a format cannot hold of a batch norm: what whoever reads it has to know from elsewhere.

    Parameters
    ----------
    norm : Norm
    format : str
        A key of ``FORMATS``.
    holds : str, optional
        Words for what the target holds for this package; by default that of the format's own files.

    Returns
    -------
    list of str
        As "eps=0.001 (pytorch: 1e-05 unless told)"; empty if nothing is lost.

    Examples
    --------
    >>> from batchnorm import BatchNorm
    >>> from batchnorm.formats import from_layer, lost
    >>> lost(from_layer(BatchNorm(3, decay=0.99)), "pytorch")
    ['decay=0.99 (pytorch: 0.9 unless told)']
    """
    row = FORMATS[word(*FORMATS)("format", format)]
    held = (row.holds if holds is None else holds).split()
    unread = {*held} - {*row.holds.split()}  # it is there, for this package alone
    notes = []
    for name in OPTIONS:
        value, default = getattr(norm, name), getattr(row, name)
        if value not in (None, default) and name in unread:
            notes.append(f"{name}={value} where {format} reads it ({default} unless told)")
        elif value not in (None, default) and name not in held:
            notes.append(f"{name}={value} ({format}: {default} unless told)")
    if norm.num_updates and "num_updates" not in held:
        notes.append(f"num_updates={norm.num_updates}")
    if norm.zero_debias and format != "caffe" and "zero_debias" not in held:
        notes.append("zero_debias=True")
    other = {} if "other" in held else norm.other
    return [*notes, *(f"{name}={value!r}" for name, value in other.items())]
