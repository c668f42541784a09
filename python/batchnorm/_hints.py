"""What to write instead of a word that other libraries have: the text of errors, and where warnings point.

The extension asks for it: ``refusal`` where arguments do not fit a function's parameters, ``suggestion``
where a str is none of some words, ``kind`` for what a value is.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import inspect
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import accumulate
from operator import attrgetter
from typing import Any

import numpy as np

_Names = tuple[str, ...]
# Foreign names, and ours for them; the first of ours that a function has is named.
_RENAMED = {
    "weight scale gamma_initializer": "gamma", "bias offset beta_initializer": "beta",
    "moving_mean mean_ running_average_mean moving_mean_initializer": "running_mean mean",
    "moving_variance moving_var running_variance var_ moving_variance_initializer": "running_var var",
    "running_mean save_mean": "mean", "running_var variance": "var running_var", "mean": "running_mean",
    "var": "running_var", "invvar rstd save_invstd": "inv_std", "input inputs X": "x",
    "grad grad_output dout": "dy", "epsilon variance_epsilon": "eps", "kernel": "weight",
    "axis axes": "out_axis", "num_channels channels features input_size": "num_features",
    "use_scale": "scale", "use_bias centre": "center", "negative_slope alpha": "slope",
    "activation_fn act act_layer nonlinearity": "activation",
    "z addend side_input shortcut": "residual", "where": "mask",
    "n_jobs threads workers": "num_threads", "is_training phase train training_mode": "training",
    "sample_weight sample_weights batch_weights": "weights", "samples": "seen",
    "num_batches_tracked": "updates", "correction": "ddof running_ddof", "nodata_value fill_value": "nodata",
    "ghost_batch_size": "virtual_batch_size",
    "sequence_length sequence_lengths seq_len seq_lens": "lengths", "param_initializers": "initial",
}  # fmt: skip

_DECAY = "decay is the weight of the old value: 1 - momentum of PyTorch, momentum of Keras"
# What is said in another way: words, the keywords that a function must have for it, and the way. Last those
# of functions that do not have what it means.
_SAID = (
    ("use_global_stats use_running_average", "update", "pass stats='running' for True"),
    ("track_running_stats", "update", "pass stats='batch', update=False for False"),
    ("track_running_stats", "running_mean", "without running arrays nothing is tracked"),
    ("use_batch_statistics use_global_stats use_running_average training is_training phase train", "var",
     "use batch_norm_train or batch_norm; a BatchNorm has train(), eval() and bn(x, training=...)"),
    ("affine", "center", "pass scale=False, center=False for False"),
    ("affine", "gamma eps", "leave gamma and beta away for False"),
    ("inplace in_place", "max_value out", "pass out=, an array of the result's dtype and shape"),
    ("inplace in_place", "dy out", "pass out=dy"), ("inplace in_place", "x out", "pass out=x"),
    ("unbiased", "running_ddof", "pass running_ddof=1 for True, 0 for False"),
    ("unbiased", "ddof", "pass ddof=1 for True"), ("save_memory", "keep", "pass keep='y' for True"),
    ("skipna nan_policy", "nodata", "pass nodata=numpy.nan: what is NaN then does not count"),
    ("skipna nan_policy", "mask", "pass mask=~numpy.isnan(x): what is NaN then does not count"),
    ("key_padding_mask padding_mask", "mask", "pass mask=~{0}: here True counts"),
    ("attention_mask input_mask", "mask", "pass mask={0} != 0: True counts"),
    ("epsilon eps variance var running_var", "inv_std", "pass inv_std=1 / numpy.sqrt(var + eps)"),
    ("renorm_clipping", "renorm", "pass renorm={{'rmin': ..., 'rmax': ..., 'dmax': ...}}"),
    ("renorm_decay renorm_momentum renorm_mean renorm_std rmin rmax dmax r_max d_max", "renorm",
     "it is a key of renorm={{'rmax': ..., ...}}: rmin, rmax, dmax, decay, mean, std"),
    ("adjustment", "gamma", "pass gamma and beta of shape (N, C)"),
    ("num_dims ndim input_shape", "channel_axis", "any rank from 2 is taken; num_features are the channels"),
    ("activation_mask", "dy", "what backward needs is the second result, y, saved = batch_norm_train(...)"),
    ("momentum", "", "it keeps no moving average; update_running() moves one"),
    ("trainable", "", "freeze() makes a BatchNorm use the running statistics and update nothing"),
    ("device", "", "the arrays say where: drop it"), ("name", "", "only a BatchNorm has a name"),
    ("fused", "", "drop it: there is one implementation"), ("shift", "", "drop it: no digit needs it"),
    ("num_threads n_jobs threads workers", "", "set_num_threads() says it for all calls"),
    ("process_group", "group", "pass group=batchnorm.distributed.torch_group({0})"),
    ("comm communicator synchronized axis_name", "group", "pass group=, an mpi4py communicator for example"),
    ("param_regularizers gamma_regularizer beta_regularizer", "", "weight_decay_groups() splits parameters"),
)  # fmt: skip
# Who has what a function does not have.
_ELSEWHERE = {
    "batch_norm": "batch_norm_train", "batch_norm_train": "effective_decay", "Saved.of": "batch_norm_train",
    "batch_norm_backward": "batch_norm_train Saved.of", "update_running": "effective_decay",
    "batch_norm_double_backward": "batch_norm_train Saved.of", "BatchNorm": "BatchNorm.__call__",
    "BatchNorm.__call__": "BatchNorm", "BatchNorm.backward": "BatchNorm.__call__ BatchNorm",
    "BatchNorm.fold": "BatchNorm", "BatchNorm.recalibrate": "Moments.update Moments",
    "Moments": "Moments.update Moments.variance", "Moments.update": "Moments Moments.variance",
}  # fmt: skip
_BACKWARD = ("batch_norm_backward", "batch_norm_double_backward")
_AXES = ("axis", "axes", "dim", "dims", "reduction_axes", "reduction_axis", "reduced_axes")
_OPPOSITE = ("it means opposite things: for the channels' axis (Keras, Flax, scikit-image) pass {0}; for the "
             "axes to reduce (NumPy, SciPy, TensorFlow's moments) pass {1}")  # fmt: skip
_MOMENTUM = ("it means opposite things: where it weighs the new value (PyTorch, cuDNN) pass decay={0}; where "
             "it weighs the old value (Keras, Flax, ONNX, MXNet, Paddle) pass decay={1}")  # fmt: skip
_LONG = ("; write {0}(dy, saved) with y, saved = batch_norm_train(x, gamma, beta, ...), or, of statistics of "
         "your own, saved = Saved.of(x, mean, inv_std, gamma, ...)")  # fmt: skip

_VECTORS = ("gamma", "beta", "running_mean", "running_var")
_ATTRIBUTES = {
    "axis dim": "it is called channel_axis here", "momentum": _DECAY, "affine": "see scale and center",
    "is_training": "it is called training here", "num_batches_tracked": "it is running.num_updates here",
    "num_samples n_samples_seen_": "it is running.num_values here", "to cuda cpu": "its arrays are NumPy's",
    "save_memory": "it is called keep here, 'y' for True", "forward call": "call the layer, y = bn(x)",
    "saved": "y, saved = bn(x, return_saved=True) returns it",
    "track_running_stats": "bn(x, stats='batch') uses the batch's statistics",
    "predict transform": "call the layer, y = bn.eval()(x)", "grad": "the gradients are dgamma and dbeta",
    "fit partial_fit": "recalibrate(batches) makes the statistics of data",
    "zero_grad": "backward() overwrites the gradients unless it is told accumulate=True",
    "get_weights set_weights weights variables": "use state_dict() and load_state_dict()",
    "named_parameters trainable_variables trainable_weights": "use parameters(), each of which has a name",
    "non_trainable_weights named_buffers": "use buffers()",
    "trainable requires_grad requires_grad_": "freeze() and unfreeze() do that",
    "reset_running_stats": "recalibrate() or rollback() replace the statistics",
    "reset_parameters": "build a new one, BatchNorm(num_features)",
    "half double float": "it is decided when the layer is built, BatchNorm(num_features, dtype=...)",
}  # fmt: skip

# Foreign values of options, one of ours in lower case that must be possible for it, and what to write.
_WORDS = (
    ("swish", "silu", "did you mean 'silu'?"), ("linear identity none", "relu", "did you mean None?"),
    ("lrelu leakyrelu leaky", "leaky_relu", "did you mean 'leaky_relu'?"),
    ("gelu elu selu celu mish softplus softmax softsign hardswish hard_swish hardsigmoid hard_sigmoid "
     "hardtanh prelu rrelu crelu glu", "relu",
     "apply it outside, and multiply dy by its derivative before backward"),
    ("nwc ntc", "nlc", "did you mean 'NLC'?"), ("ncw nct", "ncl", "did you mean 'NCL'?"),
    ("hwc", "nhwc", "for one image pass x[None] with 'NHWC'"),
    ("chw", "nchw", "for one image pass x[None] with 'NCHW'"), ("momentum renorm_decay", "rmax", _DECAY),
)  # fmt: skip
_CLOSE = 0.85  # of a guess; below it "momentum" is close to "moments"


_wanted = contextvars.ContextVar("_wanted", default=True)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into this package, however deep the call is by now."""
    if not _wanted.get():
        return
    frame, level = inspect.currentframe(), 1
    while frame and str(frame.f_globals.get("__name__")).startswith("batchnorm."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Without the warnings of `warn` in this thread."""
    before = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(before)


def _find(word: str, table: Mapping[str, str]) -> str:
    return next((said for words, said in table.items() if word in words.split()), "")


def _said(word: str, rows: Iterable[tuple[str, str, str]], known: Iterable[str]) -> str:
    """What the first row says that has the word, and whose condition is among what is known."""
    fits = (text for words, needs, text in rows if word in words.split() and {*needs.split()} <= {*known})
    return next(fits, "")


def _guess(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, 1, _CLOSE)), None)


# ---- calls -------------------------------------------------------------------------------------------------


def refusal(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
    """Why a function's binding refuses these arguments, and what to write instead."""
    name, parameters = function.__qualname__.removesuffix(".__init__"), inspect.signature(function).parameters
    placed = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    method = placed[:1] == ["self"]
    known, placed, given = tuple(parameters)[method:], placed[method:], arguments[method:]
    text = _LONG.format(name) if name in _BACKWARD else ""
    if foreign := [keyword for keyword in keywords if keyword not in parameters]:
        ranks = [value.ndim for value in (*given, keywords.get("x")) if hasattr(value, "ndim")]
        text = _explanation(name, foreign[0], keywords[foreign[0]], known, next(iter(ranks), None), text)
    elif len(given) > len(placed):
        named = "=, ".join(known[len(placed) :])
        others = f"; pass the others by name: {named}=" if named else ""
        taken = f"takes by position {', '.join(placed) or 'nothing'}, and was given"
        text = f"{name}() {taken} {len(given)} positional arguments{text or others}"
    else:
        try:
            text = str(function(*arguments, **keywords))  # which has refused them before
        except TypeError as error:
            text = str(error)
    who = getattr(arguments[0], "name", None) if method and arguments else None
    return f"{who}: {text}" if isinstance(who, str) else text


def _explanation(name: str, keyword: str, value: Any, known: _Names, rank: int | None, long: str) -> str:
    """The message for a keyword that a function of these parameters does not have."""
    refused = f"{name}() has no argument {keyword!r}; "
    if said := _translation(keyword, value, known, rank, "here"):
        return refused + said
    vector = next((own for own in (keyword, *_find(keyword, _RENAMED).split()) if own in _VECTORS), None)
    if vector and "initial" in known:
        return f"{refused}pass initial={{{vector!r}: ...}}"
    for place in _ELSEWHERE.get(name, "").split():
        there = inspect.signature(attrgetter(place)(sys.modules[__package__])).parameters
        said = "" if keyword in there else _translation(keyword, value, tuple(there), rank, "there")
        if said or keyword in there:
            return f"{refused}{place}() takes it{': ' * bool(said)}{said}{long}"
    close = _guess(keyword, known)
    guess = f"did you mean {close!r}?" if close else f"it has {', '.join(known)}"
    return refused + (_said(keyword, (row for row in _SAID if not row[1]), ()) or guess)


def _translation(keyword: str, value: Any, known: _Names, rank: int | None, here: str) -> str:
    """What to write instead in a function of these parameters, or nothing."""
    if keyword == "momentum" and "decay" in known:
        number = isinstance(value, numbers.Real) and 0 <= float(value) <= 1
        old = Decimal(repr(float(value))) if number else Decimal(0)  # for a difference without rounding
        return _MOMENTUM.format(*((1 - old, old) if number else ("1 - momentum", "momentum")))
    if keyword in _AXES and "channel_axis" in known:
        return _axis(keyword, value, known, rank)
    if keyword in ("scale", "rescale") and "max_value" in known:
        plain = isinstance(value, numbers.Real) and 0 < float(value) < float("inf")
        return f"pass max_value={1 / float(value) if plain else f'1 / {keyword}'}, the value that becomes 1"
    for ours in _find(keyword, _RENAMED).split():
        if ours in known:
            return f"it is called {ours} {here}"
    return _said(keyword, (row for row in _SAID if row[1]), known).format(keyword)


def _axis(keyword: str, value: Any, known: _Names, rank: int | None) -> str:
    """Both readings of an axis: the channels', or what is reduced, as far as the rank of x tells."""
    axes = list(value) if isinstance(value, Iterable) else [value]
    ints = all(isinstance(a, numbers.Integral) for a in axes)
    axes = [int(a) for a in axes] if ints else axes
    several = len(axes) > 1 and (0 in axes or -(rank or 0) in axes)
    channels = f"channel_axis={axes[0] if len(axes) == 1 else tuple(axes)}"
    channels = "other axes than 0, which holds the samples" if several else channels
    each = "virtual_batch_size=1 and " if "virtual_batch_size" in known else "x[i : i + 1] and "
    if rank is None or not ints or not all(-rank <= a < rank for a in axes):
        reduced = "channel_axis=, the axes that it leaves out; where axis 0 is left out, too, for statistics "
        reduced += f"of each sample pass {each}the others as channel_axis="
    elif kept := [a for a in range(rank) if a not in {b % rank for b in axes}]:
        sample = kept[0] == 0 and len(kept) > 1
        where = f"channel_axis={tuple(kept[sample:]) if len(kept) > 1 + sample else kept[-1]}"
        reduced = f"{each}{where}: axis 0 is left out, the statistics are those of each sample"
        reduced = reduced if sample else f"{where}, what it leaves out"
    else:
        reduced = "x.reshape(-1, 1), all of it as one channel"
    return f"pass {reduced}" if keyword.startswith("redu") else _OPPOSITE.format(channels, reduced)


# ---- attributes and values ---------------------------------------------------------------------------------


def foreign_attribute(name: str) -> str | None:
    """What a BatchNorm has instead of an attribute that other libraries' layers have, or None."""
    ours = next((own for own in _find(name, _RENAMED).split() if own in (*_VECTORS, "eps")), None)
    return f"it is called {ours} here" if ours else _find(name, _ATTRIBUTES) or None


def suggestion(value: str, words: Iterable[str]) -> str:
    """What to write instead of a str that is none of some words: "; did you mean 'relu'?", or nothing."""
    names, low = {each.lower(): each for each in words}, value.strip().lower()
    close = _guess(low, names)
    said = _said(low, _WORDS, names) or (f"did you mean {names[close]!r}?" if close else "")
    return f"; {said}" * bool(said)


def kind(value: object) -> str:
    """What a value is, for a message: its type, and of short plain values the value."""
    if value is None:
        return "None"
    of = type(value)
    name, places = of.__name__, accumulate(of.__module__.split("."), "{}.{}".format)
    place = next((p for p in places if getattr(sys.modules.get(p), name, None) is of), of.__module__)
    name = name if place == "builtins" else f"{place}.{name}"
    if isinstance(value, str | int | float | complex | np.generic):
        with contextlib.suppress(ValueError):  # an int of too many digits
            text = repr(value)
            return f"{text if len(text) <= 40 else text[:40] + '...'} ({name})"
    return f"of type {name}"
