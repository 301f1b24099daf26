"""fusion.py: which activation always follows which norm, so that one kernel may do both.

Two proofs are accepted: they are neighbours in an nn.Sequential, or torch.fx's trace of the model, in training and in
evaluation, shows one call of each with nothing in between and no other reader of the norm's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch.fx
from torch import nn


def act_of(module: nn.Module) -> str | None:
    """What normkern calls this activation, or None where it has no such, or calling the module does more."""
    kind = type(module)
    if has_hooks(module) or "forward" in module.__dict__:
        return None
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU and module.approximate == "none":
        return "gelu"
    if kind is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leaky_relu"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Someone wants to see, or change, what goes in or comes out."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Fused(nn.Identity):
    """Where an activation was before its norm took it over; hands its input through."""

    def extra_repr(self) -> str:
        return "in the norm before"


@dataclass(frozen=True)
class Pair:
    """The activation behind a norm: its name in normkern, the module and its name in the model."""

    act: str
    follower: nn.Module
    name: str


@dataclass
class Fusions:
    """By id of the norm: what can be fused, and what cannot and why."""

    pairs: dict[int, Pair] = field(default_factory=dict)
    why_not: dict[int, str] = field(default_factory=dict)


def find(model: nn.Module, is_norm: Callable[[nn.Module], bool]) -> Fusions:
    """The activations that follow norms of the model; is_norm tells which modules could take one over."""
    names: dict[int, str] = {}
    places: Counter[int] = Counter()
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), name)
        places[id(module)] += 1
    found = Fusions()
    norms = {id(m): m for m in model.modules() if is_norm(m)}
    neighbours = list(_neighbours(model, norms))
    traced = None
    if set(norms) - {id(first) for first, _ in neighbours}:
        traced = _traced(model, norms)
    if isinstance(traced, str):
        found.why_not = dict.fromkeys(norms, f"torch.fx cannot trace the model ({traced})")
    elif traced is not None:
        found.why_not = dict.fromkeys(norms, "no activation module follows it, always and alone")
        neighbours += traced
    for first, second in neighbours:
        act = act_of(second)
        if act is None:
            why = f"{type(second).__name__} is no activation that normkern has, or has hooks"
        elif has_hooks(first):
            why = "the norm has hooks, which would see another output"
        elif places[id(first)] > 1 or places[id(second)] > 1:
            why = "norm or activation is used in several places"
        else:
            found.pairs[id(first)] = Pair(act, second, names[id(second)])
            found.why_not.pop(id(first), None)
            continue
        found.why_not[id(first)] = why
    return found


def _neighbours(model: nn.Module, norms: dict[int, nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for parent in model.modules():
        if type(parent) is nn.Sequential and "forward" not in parent.__dict__:
            for first, second in pairwise(parent):
                if id(first) in norms:
                    yield first, second


class _Tracer(torch.fx.Tracer):
    def __init__(self, norms: dict[int, nn.Module]) -> None:
        super().__init__()
        self.norms = norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.norms or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, norms: dict[int, nn.Module]) -> list[tuple[nn.Module, nn.Module]] | str:
    """Pairs that hold in training and in evaluation, or why the model has no trace."""
    training = {m: m.training for m in model.modules()}
    found: list[set[tuple[str, str]]] = []
    try:
        for mode in (True, False):
            for module in training:
                module.training = mode
            found.append(set(_calls_in_a_row(_Tracer(norms).trace(model), model, norms)))
    except Exception as error:  # anything that the model's own code may raise
        return type(error).__name__
    finally:
        for module, mode in training.items():
            module.training = mode
    return [(model.get_submodule(a), model.get_submodule(b)) for a, b in sorted(found[0] & found[1])]


def _calls_in_a_row(graph: torch.fx.Graph, model: nn.Module, norms: dict[int, nn.Module]) -> Iterator[tuple[str, str]]:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(model.get_submodule(str(node.target))) for node in calls)
    for node in calls:
        first = model.get_submodule(str(node.target))
        if id(first) not in norms or times[id(first)] != 1 or len(node.users) != 1:
            continue
        (user,) = node.users
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            continue
        if times[id(model.get_submodule(str(user.target)))] == 1:
            yield str(node.target), str(user.target)
