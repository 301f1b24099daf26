# Autograd's node of a small call (csrc/graph/node.cpp): a node like torch's own in everything that users see of it, and
# the general path where it is not there.
from __future__ import annotations

import gc
import importlib
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import normkern
from normkern import autograd, direct
from normkern.problem import Problem

pytestmark = pytest.mark.skipif(direct.node_why_not is not None, reason=f"_node: {direct.node_why_not}")

GENERATOR = torch.Generator().manual_seed(0)
X, DY = (torch.randn(2, 6, 4, 4, generator=GENERATOR) for _ in range(2))
WEIGHT = torch.randn(6, generator=GENERATOR)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    direct._HOST.forget()
    yield
    direct._HOST.forget()


def leaves() -> tuple[Tensor, Tensor]:
    return X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()


def node(y: Tensor) -> Any:
    assert y.grad_fn is not None
    return y.grad_fn


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Through the node: the call that was checked comes first."""
    with torch.no_grad():
        normkern.group_norm(x, 2, weight, eps=eps)
    y = normkern.group_norm(x, 2, weight, eps=eps)
    assert node(y).name() == "NormBackward"
    return y


def general(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    direct._HOST.forget()
    y = normkern.group_norm(x, 2, weight, eps=eps)
    assert node(y).name() == "_NormalizeBackward"
    return y


@pytest.fixture
def want() -> tuple[Tensor, ...]:
    x, weight = leaves()
    return torch.autograd.grad(general(x, weight), (x, weight), DY)


def same(got: Any, want: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_that_are_asked_for(want: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = leaves()
    asked = []
    gradients = autograd.gradients

    def counted(*arguments: Any) -> Any:
        asked.append(arguments[2])
        return gradients(*arguments)

    monkeypatch.setattr(autograd, "gradients", counted)
    y = norm(x, weight)
    assert same(torch.autograd.grad(y, (x, weight), DY, retain_graph=True), want)
    assert same(torch.autograd.grad(y, (weight,), DY, retain_graph=True), want[1:])
    y.backward(DY)
    assert same((x.grad, weight.grad), want)
    assert not asked
    with torch.no_grad():
        assert not normkern.group_norm(x, 2, weight).requires_grad
    frozen = norm(X, weight)
    frozen.backward(DY)
    assert same((weight.grad,), (2 * want[1],))
    y = norm(x, weight)
    torch.autograd.grad(y, (weight,), DY, create_graph=True)
    assert asked == [(False, True, False, False)]


def test_edges_and_hooks(want: tuple[Tensor, ...]) -> None:
    x, weight = leaves()
    y = norm(x * 1, weight)
    nodes = [follower for follower, _ in node(y).next_functions]
    assert [follower and follower.name() for follower in nodes] == [
        "MulBackward0",
        "torch::autograd::AccumulateGrad",
        None,
        None,
    ]
    seen: list[Any] = []
    node(y).register_prehook(lambda grads: seen.append(grads[0]) or (2 * grads[0],))  # type: ignore[func-returns-value]
    node(y).register_hook(lambda made, grads: seen.append(made))
    assert same(torch.autograd.grad(y, (x, weight), DY), [2 * t for t in want])
    assert torch.equal(seen[0], DY)
    assert torch.equal(seen[1][1], 2 * want[1])
    assert seen[1][2:] == (None, None)


def test_errors_of_the_graph() -> None:
    x, weight = leaves()
    y = norm(x, weight)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = norm(x * 1, weight)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_exceptions_of_python_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise KeyError("from Python")

    monkeypatch.setattr(autograd, "gradients", fails)
    x, weight = leaves()
    with pytest.raises(KeyError, match="from Python"):
        torch.autograd.grad(norm(x, weight), x, DY, create_graph=True)

    def refuses(tensor: Tensor) -> Tensor:
        raise KeyError("from a hook")

    with torch.autograd.graph.saved_tensors_hooks(refuses, lambda t: t), pytest.raises(KeyError, match="from a hook"):
        norm(x, weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, refuses):
        y = norm(x, weight)
    with pytest.raises(KeyError, match="from a hook"):
        y.backward(DY)


def references() -> int:
    """To all problems there are; a cache keeps those of this file."""
    return sum(sys.getrefcount(thing) for thing in gc.get_objects() if type(thing) is Problem)


def test_nothing_outlives_the_graph() -> None:
    norm(*leaves())
    direct._HOST.forget()
    before = references()
    for backward in (False, True):
        x, weight = leaves()
        hidden = x * 1
        y = norm(hidden, weight)
        alive, result = weakref.ref(hidden), weakref.ref(y)
        del hidden
        assert alive() is not None
        if backward:
            y.backward(DY)
            assert alive() is None
        del y
        assert alive() is None
        assert result() is None
    assert references() > before
    direct._HOST.forget()
    assert references() == before


def test_a_remembered_call_lives_as_long_as_its_node(want: tuple[Tensor, ...]) -> None:
    x, weight = leaves()
    y = norm(x, weight)
    direct._HOST.forget()
    gc.collect()
    assert same(torch.autograd.grad(y, (x, weight), DY), want)


def test_from_many_threads(want: tuple[Tensor, ...]) -> None:
    wrong = []

    def train() -> None:
        for _ in range(50):
            x, weight = leaves()
            if not same(torch.autograd.grad(normkern.group_norm(x, 2, weight), (x, weight), DY), want):
                wrong.append(1)

    norm(*leaves())
    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_checkpoints_and_anomaly_mode(want: tuple[Tensor, ...]) -> None:
    x, weight = leaves()
    norm(x, weight)
    for reentrant in (False, True):
        checkpoint(normkern.group_norm, x, 2, weight, use_reentrant=reentrant).backward(DY)
        assert same((x.grad, weight.grad), want)
        x.grad = weight.grad = None
    with (
        pytest.warns(UserWarning, match="Error detected in NormBackward"),
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.raises(RuntimeError, match="NormBackward"),
    ):
        norm(x, weight).backward(torch.full_like(DY, float("nan")))


def test_compiled_autograd() -> None:
    """One graph serves all calls that are alike, and no other."""
    calls = [(eps, factor) for eps in (1e-5, 1.0) for factor in (1.0, 3.0, 5.0)]
    expected = []
    for eps, factor in calls:
        x, weight = leaves()
        expected.append(torch.autograd.grad(general(x * factor, weight, eps), (x, weight), DY))
    captured = []
    for (eps, factor), exact in zip(calls, expected, strict=True):
        x, weight = leaves()
        y = norm(x * factor, weight, eps)
        before = counters["compiled_autograd"]["captures"]
        with compiled_autograd._enable(lambda graph: graph):
            y.backward(DY)
        assert same((x.grad, weight.grad), exact)
        captured.append(counters["compiled_autograd"]["captures"] - before)
    assert captured == [1, 0, 0, 1, 0, 0]


def test_without_the_node(monkeypatch: pytest.MonkeyPatch, want: tuple[Tensor, ...]) -> None:
    """Calls that need a graph take the general path; the others are still recognized."""
    hits = []
    run = direct._run

    def counted(*arguments: Any) -> Any:
        y = run(*arguments)
        hits.append(y is not None)
        return y

    monkeypatch.setattr(direct, "_run", counted)
    x, weight = leaves()
    direct._HOST.lend(None)
    try:
        for _ in range(2):
            y = normkern.group_norm(x, 2, weight)
            assert node(y).name() == "_NormalizeBackward"
            assert same(torch.autograd.grad(y, (x, weight), DY), want)
        with torch.no_grad():
            assert torch.equal(normkern.group_norm(x, 2, weight), y)
        assert torch.equal(normkern.group_norm(X, 2, WEIGHT), y)
        assert hits == [False, False, True, True]
        negative = torch._neg_view(-X)
        torch.testing.assert_close(normkern.group_norm(negative, 2, WEIGHT), y.detach())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            normkern.group_norm(X, 2, WEIGHT)
        assert hits[4:] == [False, False]
    finally:
        assert direct._take_node(direct._HOST) is None


def test_only_under_the_torch_it_was_built_against(monkeypatch: pytest.MonkeyPatch) -> None:
    host = direct._HOST
    other = SimpleNamespace(build_info={**host.build_info, "torch": "2.12.0"}, passes=host.passes, lend=host.lend)
    assert direct._take_node(other) == "built for torch 2.12.0"
    assert direct._take_node(None) == "the kernels are not built"
    monkeypatch.setitem(sys.modules, "normkern._node", None)
    assert str(direct._take_node(host)).startswith("not built (")


def test_misuse_raises() -> None:
    module = importlib.import_module("normkern._node")
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        module.lend(direct._HOST, print)
    with pytest.raises(TypeError):
        module.lend(direct._HOST.passes)
    with pytest.raises(ValueError, match="incorrect name"):
        direct._HOST.lend(direct._HOST.passes)
