"""Which module's output goes to which module, and nowhere else, as ``torch.fx`` sees it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["Call", "traced"]


class Call(NamedTuple):
    """A call of a module: its path, and that of the one that alone takes the result, if a module does."""

    name: str
    taker: str | None


def traced(model: Any) -> list[list[Call]]:
    """Calls in the whole model; ValueError if it cannot be traced. Its parts would not show who uses them.

    An argument that is traced is never None. So where some after the first have defaults, there is a second
    trace with these.
    """
    try:
        given = [*inspect.signature(model.forward).parameters.values()][1:]
        defaults = {each.name: each.default for each in given if each.default is not each.empty}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing asserts a default
            ways = [None, defaults] if defaults else [None]
            return [_calls(fx.Tracer().trace(model, way)) for way in ways]
    except Exception as error:  # whatever its code does when it meets a proxy
        raise ValueError(f"torch.fx cannot trace the model: {error}") from error


def _calls(graph: fx.Graph) -> list[Call]:
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    # A module whose parameters are used by themselves, too, counts as called once more.
    others = [str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"]
    return [Call(str(node.target), _taker(node)) for node in nodes] + [Call(name, None) for name in others]


def _taker(node: Any) -> str | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    first = users[0].args[0] if users[0].args else users[0].kwargs.get("input")
    return users[0].target if first is node else None
