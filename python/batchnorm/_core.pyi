"""The extension module. See cpp/bind/module.cpp: `prepared=False` gives None where arguments need `_args`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def batch_norm(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    beta: Any,
    eps: Any,
    axis: Any,
    activation: Any,
    slope: Any,
    residual: Any,
    activation_mask: Any,
    num_threads: Any,
    out: Any,
    positions: tuple[NDArray[Any] | None, NDArray[Any] | None] | None,
    disjoint: bool,
    prepared: bool,
    /,
) -> NDArray[Any] | None: ...
def batch_norm_integers(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    beta: Any,
    eps: Any,
    axis: Any,
    out_axis: Any,
    dtype: Any,
    num_threads: Any,
    out: Any,
    disjoint: bool,
    prepared: bool,
    /,
) -> NDArray[Any] | None: ...
def batch_norm_train(
    x: Any,
    gamma: Any,
    beta: Any,
    running_mean: Any,
    running_var: Any,
    decay: Any,
    running_ddof: Any,
    eps: Any,
    axis: Any,
    activation: Any,
    slope: Any,
    residual: Any,
    num_threads: Any,
    out: Any,
    positions: tuple[NDArray[Any] | None, NDArray[Any] | None] | None,
    renorm: tuple[NDArray[Any], NDArray[Any], float, float, float] | None,
    disjoint: bool,
    prepared: bool,
    /,
) -> tuple[Any, ...] | None: ...
def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    fixed: bool,
    activation: Any,
    slope: Any,
    activation_mask: Any,
    residual: Any,
    need_dx: bool,
    need_dgamma: bool,
    need_dbeta: bool,
    need_dresidual: bool,
    num_threads: Any,
    out: Any,
    out_residual: Any,
    positions: tuple[NDArray[Any] | None, NDArray[Any] | None] | None,
    disjoint: bool,
    prepared: bool,
    /,
) -> tuple[NDArray[Any] | None, ...] | None: ...
def moments(
    x: Any,
    axis: Any,
    ddof: Any,
    num_threads: Any,
    positions: tuple[NDArray[Any] | None, NDArray[Any] | None] | None,
    prepared: bool,
    /,
) -> tuple[NDArray[Any], NDArray[Any]] | None: ...
def moment_sums(
    x: Any,
    axis: Any,
    num_threads: Any,
    positions: tuple[NDArray[Any] | None, NDArray[Any] | None] | None,
    prepared: bool,
    /,
) -> NDArray[np.float64] | None: ...
def merged_moment_sums(a: NDArray[np.float64], b: NDArray[np.float64], /) -> NDArray[np.float64]: ...
def moments_from_sums(sums: NDArray[np.float64], /) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def update_running(
    running_mean: NDArray[Any],
    running_var: NDArray[Any],
    mean: NDArray[Any],
    var: NDArray[Any],
    decay: float,
    count: int,
    ddof: int,
    /,
) -> None: ...
def channel_sums(
    a: NDArray[Any], b: NDArray[Any], axis: int, shift: NDArray[Any] | None, num_threads: int | None, /
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def combine(
    a: NDArray[Any],
    b: NDArray[Any],
    k_a: NDArray[Any] | None,
    center: NDArray[Any] | None,
    k_b: NDArray[Any] | None,
    k_0: NDArray[Any] | None,
    axis: int,
    gate: tuple[Any, ...] | None,
    num_threads: int | None,
    out: NDArray[Any] | None,
    /,
) -> NDArray[Any]: ...
def new_like(x: NDArray[Any], /) -> NDArray[Any]: ...
def has_view(arrays: list[NDArray[Any]], axis: int, /) -> bool: ...
def activation_mask_bytes(x: NDArray[Any], axis: int, /) -> int: ...
def tuning() -> str: ...
def set_tuning(settings: str, /) -> None: ...
def set_main_thread(ident: int, /) -> None: ...
def set_bfloat16_type_num(n: int, /) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def isa_levels() -> list[str]: ...
def isa_built() -> list[str]: ...
def isa_reason() -> str: ...
def cache_info() -> tuple[int, int, int, int, int, int]: ...
def set_cache_limit(limit: int, /) -> None: ...
def empty_cache() -> int: ...
def container_limits(root: str, groups: str, /) -> tuple[int, int]: ...
def openmp_runtime() -> str: ...
def compiler() -> str: ...
def version() -> str: ...
