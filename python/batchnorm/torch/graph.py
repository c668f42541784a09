"""Which module's output goes to which module, and nowhere else, as ``torch.fx`` sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from .modules import Normalising

__all__ = ["Call", "traced"]


class Call(NamedTuple):
    """A call of a module: its path, and that of the one that alone takes the result, if a module does."""

    name: str
    taker: str | None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return isinstance(m, Normalising) or super().is_leaf_module(m, module_qualified_name)


def traced(model: Any) -> tuple[list[Call], set[str]]:
    """Calls in the model or, where it cannot be traced, in its parts; and the modules that this shows."""
    try:
        with torch.no_grad():
            graph = _Tracer().trace(model)
    except Exception:  # whatever its code does when it meets a proxy
        calls, shown = list[Call](), set[str]()
        for name, child in model.named_children():
            if any(True for _ in child.children()):
                inner, seen = traced(child)
                calls += [Call(f"{name}.{c.name}", c.taker and f"{name}.{c.taker}") for c in inner]
                shown |= {f"{name}.{each}" for each in seen}
        return calls, shown
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    # A module whose parameters are used by themselves, too, counts as called once more.
    others = [node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"]
    calls = [Call(node.target, _taker(node)) for node in nodes] + [Call(name, None) for name in others]
    return calls, {name for name, _ in model.named_modules()}


def _taker(node: Any) -> str | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    first = users[0].args[0] if users[0].args else users[0].kwargs.get("input")
    return users[0].target if first is node else None
