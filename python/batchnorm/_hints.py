"""What to write instead of a keyword or an attribute that other libraries have: the text of errors.

The functions get it through ``_core.use_hints``; the classes call it themselves.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from typing import NoReturn

# Foreign names of our keywords; the first of ours that a function has is named.
_RENAMED = {
    "gamma": "weight scale", "beta": "bias offset", "x": "input inputs X", "dy": "grad grad_output",
    "running_mean": "moving_mean", "running_var": "moving_variance moving_var",
    "mean": "running_mean moving_mean", "var": "variance running_var moving_variance moving_var",
    "eps": "epsilon variance_epsilon", "num_features": "num_channels channels features input_size",
    "activation": "activation_fn act act_layer nonlinearity", "slope": "negative_slope alpha",
    "residual": "z addend side_input shortcut", "num_threads": "n_jobs threads workers",
    "return_saved": "keep", "training": "is_training phase train training_mode",
    "group": "process_group comm synchronized axis_name",
    "weights": "sample_weight sample_weights batch_weights", "seen": "samples num_batches_tracked",
    "ddof": "correction", "lengths": "sequence_length sequence_lengths seq_len",
    "virtual_batch_size": "ghost_batch_size", "initial": "param_initializers gamma_initializer",
    "max_value": "scale rescale",
}  # fmt: skip

_MODE = "use batch_norm_train or batch_norm; a BatchNorm has train(), eval() and bn(x, training=...)"
_KEY = "it is a key of renorm={'rmax': ..., ...}: rmin, rmax, dmax, decay, mean, std"
_NAN = "pass mask=~numpy.isnan(x): what is NaN then does not count"
_LONG = "saved has it; of statistics of your own make one, Saved.of(x, mean, inv_std, gamma, ...)"
_RANK = "any rank from 2 is taken as it is; num_features is the number of channels"
_REDUCED = "pass channel_axis=, the axes that it leaves out"
_KEPT = "what backward needs is the second result, y, saved = batch_norm_train(...)"
# What is said in another way here.
_SAID = {
    "affine": "leave gamma and beta away (functions), or pass scale=False, center=False (BatchNorm)",
    "track_running_stats": "batch_norm_train without running arrays uses batch statistics only",
    "use_batch_statistics use_global_stats use_running_average training is_training phase train": _MODE,
    "inplace in_place": "pass out=x", "device": "there is only the CPU",
    "trainable": "freeze() makes a BatchNorm use the running statistics and update nothing",
    "unbiased": "pass ddof=1 for True, ddof=0 for False (running_ddof= of running statistics)",
    "where": "it is called mask here, True where a value counts", "skipna nan_policy": _NAN,
    "key_padding_mask": "pass mask=~key_padding_mask: here True counts",
    "shift": "drop it: the statistics keep their digits without a guess of the mean",
    "renorm_clipping": "pass renorm={'rmin': ..., 'rmax': ..., 'dmax': ...}",
    "renorm_decay renorm_momentum renorm_mean renorm_std rmin rmax dmax": _KEY,
    "adjustment": "pass gamma and beta of shape (N, C) with the call", "num_dims ndim input_shape": _RANK,
    "reduction_axes reduction_axis": _REDUCED, "save_memory": "pass keep='y' for True",
    "activation_mask": _KEPT, "inv_std stats invvar save_mean": _LONG, "name": "only a BatchNorm has a name",
    "param_regularizers": "weight_decay_groups() splits parameters by whether to decay them",
}  # fmt: skip

_CALL, _STATE = "call the layer, y = bn(x)", "use state_dict() and load_state_dict()"
_MEAN, _VAR = "it is called running_mean here", "it is called running_var here"
_ATTRIBUTES = {
    "weight": "it is called gamma here", "bias offset": "it is called beta here",
    "moving_mean mean": _MEAN, "moving_variance moving_var running_variance var": _VAR,
    "epsilon": "it is called eps here", "axis dim": "it is called channel_axis here",
    "momentum": "decay is the weight of the old value: 1 - momentum of PyTorch, momentum of Keras",
    "num_batches_tracked": "it is running.num_updates here", "num_samples": "it is running.num_values here",
    "affine": "see scale and center", "save_memory": "it is called keep here, 'y' for True",
    "track_running_stats": "bn(x, stats='batch') uses the batch's statistics", "forward call": _CALL,
    "predict": "call the layer, y = bn.eval()(x)", "grad": "the gradients are dgamma and dbeta",
    "zero_grad": "backward() overwrites the gradients unless it is told accumulate=True",
    "get_weights set_weights weights variables": _STATE,
    "named_parameters trainable_variables trainable_weights": "use parameters(), each of which has a name",
    "non_trainable_weights named_buffers": "use buffers()",
    "trainable requires_grad requires_grad_": "freeze() and unfreeze() do that",
    "reset_running_stats": "recalibrate() or rollback() replace the statistics",
    "to cuda cpu": "there is only the CPU",
}  # fmt: skip


def explain(function: str, keyword: str, value: object, known: tuple[str, ...]) -> str:
    """The message for a keyword that `function`, whose keywords are `known`, does not have."""
    refused = f"{function}() has no argument {keyword!r}"
    if keyword == "momentum" and "decay" in known:
        return f"{refused}, which means opposite things: {_momentum(value)}"
    if keyword in ("axis", "axes", "dim") and "channel_axis" in known:
        return f"{refused}, which means opposite things: {_axis(value)}"
    for ours, foreign in _RENAMED.items():
        if ours in known and keyword in foreign.split():
            return f"{refused}; it is called {ours} here"
    said = _find(keyword, _SAID)
    if said is not None:
        return f"{refused}; {said}"
    close = difflib.get_close_matches(keyword, known, n=1)
    return refused + (f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}")


def refuse_keywords(function: str, unknown: Mapping[str, object], known: Iterable[str] | None) -> NoReturn:
    """Raise the TypeError for a keyword that `function`, whose keywords are `known`, does not have."""
    name, value = next(iter(unknown.items()))
    raise TypeError(explain(function, name, value, tuple(known or ())))


def foreign_attribute(name: str) -> str | None:
    """What a BatchNorm has instead of an attribute that other libraries' layers have, or None."""
    return _find(name, _ATTRIBUTES)


def _find(word: str, table: dict[str, str]) -> str | None:
    return next((said for words, said in table.items() if word in words.split()), None)


def _momentum(value: object) -> str:
    new, old = "decay=1 - momentum", "decay=momentum"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        new, old = f"decay={1 - float(value):g}", f"decay={float(value):g}"
    return (
        f"where it weighs the new value (PyTorch, cuDNN, TensorFlow's fused op) pass {new}; where it weighs "
        f"the old value (Keras, Flax, ONNX, MXNet, Paddle) pass {old}"
    )


def _axis(value: object) -> str:
    """Both readings of an axis: the channels', or what is reduced."""
    channels, reduced = "it as channel_axis=", "channel_axis=, the axes that it leaves out"
    axes = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    if axes and all(isinstance(a, int) for a in axes):
        channels = f"channel_axis={axes if len(axes) > 1 else axes[0]}"
        if len(axes) == 1 and -2 <= axes[0] <= 1:
            reduced = f"channel_axis={1 - axes[0] % 2} of a matrix, of more axes all the others"
        elif len(axes) > 1 and min(axes) >= 0:
            left = [a for a in range(max(axes)) if a not in axes] or [-1]
            reduced = f"channel_axis={left[0] if len(left) == 1 else tuple(left)}, what it leaves out"
        if len(axes) > 1 and 0 in axes:
            channels = "other axes than 0, which holds the samples"
    return (
        f"for the channels' axis (Keras, Flax, scikit-image) pass {channels}; for the axes to reduce (NumPy, "
        f"SciPy, TensorFlow's moments) pass {reduced}"
    )
