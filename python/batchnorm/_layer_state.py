"""A layer's state: to dictionaries and files and back, snapshots of its statistics, copies that share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _args, _running, _state, _ways
from ._layer_base import INITIAL, REFERENCE, STATISTICS, Counters, LayerBase, checked_int, checked_vector
from ._parameter import Parameter

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 2


class Snapshot:
    """Running statistics and their counters at one moment, from ``bn.snapshot()`` for ``bn.rollback()``."""

    __slots__ = ("_counters", "_vectors")

    def __init__(self, vectors: Mapping[str, NDArray[Any]], counters: Counters) -> None:
        self._vectors = {name: value.copy() for name, value in vectors.items()}
        self._counters = counters.copy()

    def __repr__(self) -> str:
        channels = len(self._vectors["running_mean"])
        return f"Snapshot({channels} channels, num_updates={self._counters.num_updates})"


class LayerState(LayerBase):
    """The part of BatchNorm that gives, takes and copies state."""

    __slots__ = ()

    def parameters(self) -> list[Parameter]:
        """What an optimiser trains: gamma and beta, as far as the layer has them, with their gradients.

        After ``freeze(parameters=True)`` there are none. ``weight_decay_groups`` tells which to decay.
        """
        vectors = self._known_vectors("parameters()")
        gradients = {"gamma": self.dgamma, "beta": self.dbeta}
        names = () if "parameters" in self._frozen else self._parameter_names()
        return [Parameter(name, vectors[name], gradients[name]) for name in names]

    def buffers(self) -> dict[str, NDArray[Any]]:
        """The running statistics, by name: the layer's own arrays, which no optimiser should touch.

        To give them values, assign (``bn.running_mean = array``): then the layer knows that they are known.
        """
        self._known_vectors("buffers()")
        return {"running_mean": self._running_mean, "running_var": self._running_var}

    # ---- dictionaries and files ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything that makes the layer continue bit for bit: copies, by name.

        Returns
        -------
        dict of str to ndarray
            ``gamma``, ``beta`` (if present), ``running_mean``, ``running_var``: shape (C,), layer's dtype;
            all others have shape (): the counters ``num_updates``, ``num_values``, ``num_skipped``,
            ``initial_weight``, and ``format_version``, ``axis``, ``running_ddof``: int64; ``eps``, ``decay``:
            float64; ``warmup``, ``zero_debias``, ``allow_initial_statistics``: int64, 0 or 1;
            ``renorm_rmin``, ``renorm_rmax``, ``renorm_dmax``, ``renorm_decay``: float64;
            ``slope``, of leaky_relu alone: float64; ``virtual_batch_size``, ``save_memory``: int64;
            ``activation``, ``data_format``, ``on_nonfinite``: str; "none" for None. With ``renorm={"decay":
            ...}`` also ``renorm_mean``, ``renorm_std``. Gradients, mode and the saved input are not part of
            it.
        """
        state = {name: value.copy() for name, value in self._known_vectors("state_dict()").items()}
        for name in SCALARS:
            value = FORMAT_VERSION if name == "format_version" else self._scalar(name)
            if name == "slope" and value is None:
                continue
            if value is True or value is False:
                value = int(value)
            state[name] = np.array("none" if value is None else value)
        return state

    def _scalar(self, name: str) -> Any:
        if name.startswith("renorm_"):
            return None if self._renorm is None else self._renorm[name.removeprefix("renorm_")]
        return getattr(self._counters if name in _COUNTERS else self, name)

    def load_state_dict(self, state: Mapping[str, NDArray[Any]], *, strict: bool = True) -> Self:
        """Take over a state of ``state_dict``; return the layer.

        Arrays are copied into the layer's own. `eps`, `running_ddof`, schedule (`decay`, `warmup`,
        `zero_debias`), `on_nonfinite` and the counters are taken over too; `activation` belongs to the
        network around the layer and must agree. `axis` and `data_format` serve ``load`` only: here the layer
        keeps its own. A layer without a channel count gets that of the state. Gradients and the saved input
        are dropped. States of format 1, which knew no schedules, load as well.

        Parameters
        ----------
        state : mapping of str to ndarray
            As ``state_dict`` gives it; single values may also be plain Python numbers or str.
        strict : bool, default True
            Whether missing and unexpected names are an error. With False the layer keeps what is missing,
            and what is unexpected is ignored, but not names of other libraries (``weight``, ``moving_mean``);
            what is used is checked all the same.

        Raises
        ------
        TypeError, ValueError
            `state` is no mapping; missing or unexpected names; an entry of another dtype or shape; another
            activation or format; NaN, Inf or a negative variance; options that exclude each other.
        """
        _args.check_flag(strict, "strict")
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {_args._kind(state)}, expected a mapping of names to arrays")
        state = dict(state)
        scalars = checked_scalars(state)
        names = self._vector_names()
        check_names(state, (*names, *scalar_names(scalars)), strict, " (strict=False loads what fits)")
        for name in ("activation", "slope"):
            own = getattr(self, name)
            if scalars.get(name, own) != own:
                raise ValueError(
                    f"{name} is {scalars[name]!r} in the state, expected {own!r} as in this layer: build the "
                    "layer with it, or take it out of the state and load with strict=False"
                )
        schedule = {name: scalars.get(name, getattr(self, name)) for name in _SCHEDULE}
        _running.check_schedule(**schedule)
        renorm = _renorm_of(scalars, self._renorm)
        parts = scalars.get("virtual_batch_size", self._virtual_batch_size)
        saving = scalars.get("save_memory", self._save_memory)
        _ways.check_together(renorm, parts, saving, self._activation)
        if _ways.has_reference(renorm) != _ways.has_reference(self._renorm):
            raise ValueError(
                "renorm has a decay of its own, and so renorm_mean and renorm_std, either in the state or in "
                "this layer, expected both or neither: build the layer as the saved one was"
            )
        count = self._num_features
        vectors: dict[str, NDArray[Any]] = {}
        for name in names:
            if name in state:
                vectors[name] = checked_vector(name, state[name], count, self._dtype).copy()
                count = len(vectors[name])
                if self._num_features and not getattr(self, name).flags.writeable:
                    raise ValueError(f"{name} of this layer has been made read-only, expected writable")
        if self._num_features is None and count is not None:
            self._allocate(count)
            self._initial = None
        # Nothing below can fail.
        for name, value in vectors.items():
            np.copyto(getattr(self, "_" + name), value)
        for name in ("eps", "running_ddof", "on_nonfinite", "allow_initial_statistics"):
            if name in scalars:
                setattr(self, "_" + name, scalars[name])
        self._renorm = renorm
        self._virtual_batch_size, self._save_memory = parts, saving
        for name, value in schedule.items():
            setattr(self, "_" + name, value)
        self._load_counters(vectors, scalars)
        self.dgamma = self.dbeta = self.dresidual = self._saved = None
        self._refresh()
        return self

    def _load_counters(self, vectors: Mapping[str, NDArray[Any]], scalars: Mapping[str, Any]) -> None:
        counters = self._counters
        if scalars.get("format_version") == 1:
            scalars = {"num_values": 0, "num_skipped": 0, **scalars}
        for name in _COUNTERS:
            if name in scalars:
                setattr(counters, name, scalars[name])
        given = [name for name in STATISTICS if name in vectors]
        counters.trusted = counters.warned = False
        if "initial_weight" in scalars:
            counters.assigned = ()
        elif "num_updates" in scalars and given:  # format 1: what its own numbers say
            counters.assigned = ()
            counters.initial_weight = (self._decay or 0.0) ** counters.num_updates
            if not counters.num_updates and any((vectors[n] != INITIAL[n]).any() for n in given):
                for name in given:
                    self._mark_assigned(name)
        else:
            for name in given:
                self._mark_assigned(name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to an .npz file, under exactly this name; equal states give equal bytes.

        A file of that name is replaced at the end, in one step: a failure leaves it as it was.

        Raises
        ------
        ValueError
            The state holds NaN, Inf or a negative variance: ``load`` would refuse the file.
        OSError
            The file cannot be written.
        """
        for name, value in self._known_vectors("save()").items():
            checked_vector(name, value, self._num_features, self._dtype)
        _state.write_state(path, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Build a layer from a file of ``save``, with the saved settings, in training mode.

        Always a new layer, also from ``bn.load``. For an existing one,
        ``bn.load_state_dict(BatchNorm.load(path).state_dict())``. No pickle is ever read.

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            There is no such file.
        ValueError
            The file is damaged or is something else.
        """
        state = _state.read_state(path)
        try:
            scalars = checked_scalars(state)
            layout = "axis" if scalars.get("data_format") is None else "data_format"
            options = {name: scalars[name] for name in (*_OPTIONS, layout) if name in scalars}
            dtype = state["running_mean"].dtype if "running_mean" in state else np.float32
            options["renorm"] = _renorm_of(scalars, None)
            options |= {"scale": "gamma" in state, "center": "beta" in state, "dtype": dtype}
            layer = cls(**options)
            check_names(state, (*layer._vector_names(), *scalar_names(scalars)), True, "")
            if layer.axis != scalars["axis"]:
                raise ValueError(f"axis is {scalars['axis']} but data_format is {layer.data_format!r}")
            return layer.load_state_dict(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot load {os.fspath(path)!r}: {error}") from error

    # ---- statistics that may have to go back ---------------------------------------------------------------

    def _statistics_names(self) -> tuple[str, ...]:
        """The vectors that a training forward changes."""
        return tuple(name for name in self._vector_names() if name in (*STATISTICS, *REFERENCE))

    def snapshot(self) -> Snapshot:
        """Copy the running statistics and their counters, all that a training forward changes.

        Examples
        --------
        A step that is rejected must not have counted:

        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> bn = BatchNorm(3)
        >>> before = bn.snapshot()
        >>> y = bn(np.ones((4, 3), np.float32))
        >>> bn.rollback(before).num_updates
        0

        A forward that is computed a second time, as gradient checkpointing does, needs no snapshot:
        ``bn(x, update=False)``, or a whole network inside ``with bn.no_update():``.
        """
        vectors = self._known_vectors("snapshot()")
        return Snapshot({name: vectors[name] for name in self._statistics_names()}, self._counters)

    def rollback(self, snapshot: Snapshot) -> Self:
        """Put running statistics and counters back to a snapshot of this layer; return the layer.

        Parameters, gradients and what backward needs stay as they are, and so does the snapshot.

        Raises
        ------
        TypeError, ValueError
            `snapshot` is none, or one of a layer with another channel count or dtype.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot is {_args._kind(snapshot)}, expected the result of bn.snapshot()")
        own, theirs = self._known_vectors("rollback()")["running_mean"], snapshot._vectors["running_mean"]
        names = self._statistics_names()
        if theirs.shape != own.shape or theirs.dtype != own.dtype or tuple(snapshot._vectors) != names:
            raise ValueError(
                f"snapshot has {', '.join(snapshot._vectors)} of {len(theirs)} channels of {theirs.dtype}, "
                f"expected {', '.join(names)} of {self._num_features} of {own.dtype}: it is that of "
                f"another layer"
            )
        for name in names:
            np.copyto(getattr(self, "_" + name), snapshot._vectors[name])
        self._counters.take(snapshot._counters)
        if self._history is not None:
            self._history.forget_after(self._counters.num_updates)
        return self

    @contextlib.contextmanager
    def no_update(self) -> Iterator[Self]:
        """Inside this context no call updates the running statistics, in training either.

        For forwards that are repeated (gradient checkpointing) or only looked at. ``update=True`` at a call
        is an error there.
        """
        before, self._updating = self._updating, False
        self._refresh()
        try:
            yield self
        finally:
            self._updating = before
            self._refresh()

    # ---- copies --------------------------------------------------------------------------------------------

    def clone(self, *, share: Literal["params", "stats"] | None = None) -> Self:
        """A new layer with the same settings and values, in the same mode.

        Parameters
        ----------
        share : {None, "params", "stats"}
            "params": gamma and beta are the same arrays in both layers, each with its own statistics, such
            as one set for clean and one for augmented batches (SplitBN), or one per domain. Each layer has
            its own gradients: add them up, and give the optimiser the parameters of one of them.
            "stats": running statistics and their counters are the same, parameters apart.

        Returns
        -------
        BatchNorm
            Without the saved forward and without gradients.

        Raises
        ------
        TypeError, ValueError
            `share` is something else.
        RuntimeError
            `share` is given and the channel count is not known yet: there is nothing to share.

        Examples
        --------
        >>> import numpy as np
        >>> from batchnorm import BatchNorm
        >>> clean = BatchNorm(3)
        >>> noisy = clean.clone(share="params")
        >>> y = noisy(np.ones((4, 3), np.float32))
        >>> noisy.gamma is clean.gamma, noisy.num_updates, clean.num_updates
        (True, 1, 0)
        """
        if share is not None and share not in ("params", "stats"):
            error = ValueError if isinstance(share, str) else TypeError
            raise error(f"share is {_args._kind(share)}, expected None, 'params' or 'stats'")
        if share is not None:
            self._known_vectors(f"clone(share={share!r})")
        other = type(self).__new__(type(self))
        if hasattr(self, "__dict__"):  # of a subclass
            other.__dict__.update(self.__dict__)
        for name in LayerBase.__slots__:
            if name != "__weakref__":
                setattr(other, name, getattr(self, name))
        apart = {
            None: self._vector_names(),
            "params": self._statistics_names(),
            "stats": self._parameter_names(),
        }[share]
        for name in apart if self._num_features is not None else ():
            setattr(other, "_" + name, getattr(self, "_" + name).copy())
        if share != "stats":
            other._counters = self._counters.copy()
        other._saved = other.dgamma = other.dbeta = other.dresidual = None
        other._collector, other._updating = None, True
        other._history = None if self._history is None else self._history.emptied()
        other._refresh()
        return other

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """For pickle and copy: all but the saved input, so a copy needs a forward before its backward."""
        slots = {name: getattr(self, name) for name in LayerBase.__slots__ if name != "__weakref__"}
        slots |= {"_saved": None, "_collector": None, "_updating": True}  # contexts do not reach into copies
        return getattr(self, "__dict__", None), slots  # a subclass may have a __dict__


# ---- the entries of a state --------------------------------------------------------------------------------

# Entries of other libraries' states, and what they are called here.
_FOREIGN = {
    "weight": "gamma", "scale": "gamma", "bias": "beta", "offset": "beta", "moving_mean": "running_mean",
    "moving_variance": "running_var", "num_batches_tracked": "num_updates",
}  # fmt: skip


def check_names(state: Mapping[str, Any], expected: tuple[str, ...], strict: bool, hint: str) -> None:
    """Refuse a state with other names than those expected."""
    missing = [name for name in expected if name not in state]
    unexpected = [str(name) for name in state if name not in expected]
    foreign = [f"{name} is called {_FOREIGN[name]} here" for name in unexpected if name in _FOREIGN]
    if foreign:
        assign = "bn.gamma = ..., bn.beta = ..., bn.running_mean = ..., bn.running_var = ..."
        hint = f" ({', '.join(foreign)}; assign arrays of PyTorch or Keras one by one: {assign})"
    if foreign or (strict and (missing or unexpected)):
        both = (("missing", missing), ("unexpected", unexpected))
        found = "; ".join(f"{what} {', '.join(names)}" for what, names in both if names)
        raise ValueError(f"the state does not fit the layer: {found}; expected {', '.join(expected)}{hint}")


def _checked_amount(value: object) -> float:
    number = _running.check_amount(value, "num_values", zero=True)
    return value if type(value) is int else number


def _checked_weight(value: object) -> float:
    expected = "a number in [0, 1], the weight of the initial values"
    number = _args._real(value, "initial_weight", expected)
    if not 0 <= number <= 1:
        raise ValueError(f"initial_weight is {number}, expected {expected}")
    return number


def _is_none(value: object) -> bool:
    return isinstance(value, str) and value == "none"


def _limit(name: str) -> Callable[[object], float | None]:
    def check(value: object) -> float | None:
        if _is_none(value):
            return None
        limits = _ways.check_renorm({name: _args._real(value, f"renorm_{name}", "a number or 'none'")})
        assert limits is not None
        return float(limits[name])

    return check


def _flag(name: str) -> Callable[[object], bool]:
    return lambda v: checked_int(v, name, 0, 1, "0 or 1") == 1


# The entries of a state that are one number or word, and what makes a setting of them or raises.
SCALARS: dict[str, Callable[[object], Any]] = {
    "format_version": lambda v: checked_int(
        v, "format_version", 1, FORMAT_VERSION, f"1 or {FORMAT_VERSION}, which this batchnorm reads"
    ),
    "num_updates": lambda v: checked_int(v, "num_updates", 0, 2**63, "an int >= 0"),
    "eps": _args.check_eps,
    "decay": lambda v: None if isinstance(v, str) and v == "none" else _args.check_decay(v),
    "axis": lambda v: _args.check_int(v, "axis", "an int"),
    "running_ddof": lambda v: _args.check_ddof(v, "running_ddof"),
    "activation": lambda v: _args.check_activation(None if v == "none" else v),
    "data_format": lambda v: None if v == "none" else v,  # for ``load``, where the constructor checks it
    "num_values": _checked_amount,
    "num_skipped": lambda v: checked_int(v, "num_skipped", 0, 2**63, "an int >= 0"),
    "initial_weight": _checked_weight,
    "warmup": _flag("warmup"),
    "zero_debias": _flag("zero_debias"),
    "on_nonfinite": _running.check_on_nonfinite,
    "allow_initial_statistics": _flag("allow_initial_statistics"),
    "virtual_batch_size": lambda v: None if _is_none(v) else _ways.check_virtual_batch_size(v),
    "save_memory": _flag("save_memory"),
    **{f"renorm_{name}": _limit(name) for name in ("rmin", "rmax", "dmax", "decay")},
    "slope": lambda v: _args.check_slope(v, "leaky_relu"),
}
_FORMAT_1 = tuple(SCALARS)[:8]
_COUNTERS = ("num_updates", "num_values", "num_skipped", "initial_weight")
_SCHEDULE = ("decay", "warmup", "zero_debias")
_OPTIONS = (
    *_SCHEDULE, "eps", "running_ddof", "activation", "slope", "on_nonfinite", "allow_initial_statistics",
    "virtual_batch_size", "save_memory",
)  # fmt: skip


def _renorm_of(scalars: Mapping[str, Any], own: dict[str, Any] | None) -> dict[str, Any] | None:
    """The option `renorm` of a state; `own` is the layer's, for what the state does not say."""
    found = {name: scalars[f"renorm_{name}"] for name in _RENORM if f"renorm_{name}" in scalars}
    if not found:
        return own
    if found.get("rmin", 0) is None:
        return None
    return _ways.check_renorm({**(own or {}), **{name: v for name, v in found.items() if v is not None}})


_RENORM = ("rmin", "rmax", "dmax", "decay")


def scalar_names(scalars: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries beside the vectors that a state of this one's format has."""
    names = _FORMAT_1 if scalars.get("format_version") == 1 else tuple(SCALARS)
    return names if scalars.get("activation") == "leaky_relu" else tuple(n for n in names if n != "slope")


def checked_scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `state` that are one number or word, as Python values, checked."""
    scalars = {}
    for name in filter(state.__contains__, SCALARS):
        value = state[name]
        if isinstance(value, np.ndarray):
            if value.shape != ():
                raise ValueError(f"{name} has shape {value.shape}, expected a single value, shape ()")
            value = value.item()
        scalars[name] = SCALARS[name](value)
    return scalars
