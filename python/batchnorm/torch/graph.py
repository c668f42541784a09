"""Which module's output goes to which module, and nowhere else, as ``torch.fx`` sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["Call", "traced"]


class Call(NamedTuple):
    """A call of a module: its path, and that of the one that alone takes the result, if a module does."""

    name: str
    taker: str | None


def traced(model: Any) -> list[Call]:
    """Calls in the whole model; ValueError if it cannot be traced. Its parts would not show who uses them."""
    try:
        with torch.no_grad():
            graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever its code does when it meets a proxy
        raise ValueError(f"torch.fx cannot trace the model: {error}") from error
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    # A module whose parameters are used by themselves, too, counts as called once more.
    others = [node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"]
    return [Call(node.target, _taker(node)) for node in nodes] + [Call(name, None) for name in others]


def _taker(node: Any) -> str | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    first = users[0].args[0] if users[0].args else users[0].kwargs.get("input")
    return users[0].target if first is node else None
