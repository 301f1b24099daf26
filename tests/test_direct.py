# Small calls on the CPU that are recognized (normkern/direct.py): the same bits, gradients and errors as the general
# path, and not recognized wherever something watches or transforms the call.
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import ACTIVATIONS, CASES, Case, build, call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import normkern
import normkern.nn
from normkern import autograd, direct

pytestmark = pytest.mark.skipif(direct._HOST is None, reason="the compiled library is not there")

SMALL = [c for c in CASES if 0 < c.numel <= direct.MOST_ELEMENTS]
X = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))


class Counter:
    """Counts what the direct path answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hits = 0
        self.patch = monkeypatch
        run = direct._run

        def counted(*arguments: Any) -> Any:
            y = run(*arguments)
            self.hits += y is not None
            return y

        monkeypatch.setattr(direct, "_run", counted)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    direct._HOST.forget()
    yield Counter(monkeypatch)
    direct._HOST.forget()


def results(case: Case) -> list[Tensor | None]:
    """Output, gradients and running statistics of one call."""
    i = build(case)
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias, i.residual) if t is not None]
    y = call(case, i, normkern)
    grads = torch.autograd.grad(y, leaves, i.dy, allow_unused=True)
    return [y, *grads, i.running_mean, i.running_var]


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_for_every_small_case(counter: Counter, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    recognized = 0
    try:
        for case in SMALL[:: 3 - threads]:
            first = results(case)
            hits = counter.hits
            second = results(case)
            recognized += counter.hits - hits
            for a, b in zip(first, second, strict=True):
                assert (a is None) == (b is None), case
                if a is not None and b is not None:
                    assert a.stride() == b.stride(), case
                    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), case
            with torch.no_grad():
                i = build(case)
                assert torch.equal(call(case, i, normkern), second[0]), case  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    # Those that are not: strides that are not dense or have to be copied, residuals laid out otherwise.
    assert recognized > len(SMALL[:: 3 - threads]) / 2


def norms() -> dict[str, Callable[[Tensor], Tensor]]:
    mean, var = torch.zeros(6), torch.ones(6)
    weight = torch.full((6,), 1.5)
    return {
        "batch": lambda x: normkern.batch_norm(x, mean, var, weight, training=True),
        "batch_eval": lambda x: normkern.batch_norm(x, torch.zeros(6), torch.ones(6), weight),
        "group": lambda x: normkern.group_norm(x, 2, weight),
        "instance": lambda x: normkern.instance_norm(x, weight=weight),
        "layer": lambda x: normkern.layer_norm(x, (4,)),
        "rms": lambda x: normkern.rms_norm(x, (4, 4), act="silu"),
    }


@pytest.mark.parametrize("norm", norms())
def test_recognized_only_once_checked(counter: Counter, norm: str) -> None:
    f = norms()[norm]
    y = f(X)
    assert counter.hits == 0
    assert torch.equal(f(X), y)
    assert counter.hits == 1
    f(X.to(memory_format=torch.channels_last))  # another layout is another call
    assert counter.hits == 1
    f(X.double())
    assert counter.hits == 1
    f(torch.nn.Parameter(X))  # a parameter is a tensor
    assert counter.hits == 2


@pytest.mark.parametrize("norm", norms())
def test_not_where_calls_are_watched_or_transformed(counter: Counter, norm: str) -> None:
    f = norms()[norm]
    y = f(X).clone()
    f(X)
    assert counter.hits == 1
    if norm != "batch":
        torch.testing.assert_close(torch.func.vmap(f)(torch.stack([X, X]))[1], y)
        torch.func.jvp(f, (X,), (X,))
        torch.func.grad(lambda x: f(x).square().sum())(X)
        torch.func.vmap(lambda t: t + f(X))(torch.zeros(2, 1))  # what is not batched is a tensor like any other
        torch.testing.assert_close(torch.jit.trace(f, X, check_trace=False)(X + 0), y)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f(X)
    operator = "batch_forward" if norm == "batch" else "forward"
    assert any(event.name == f"normkern::{operator}" for event in profile.events())
    graph = make_fx(f)(X)
    assert f"normkern.{operator}" in graph.code
    with FakeTensorMode(allow_non_fake_inputs=True):
        f(X)
    with normkern.use_backend("eager"):
        torch.testing.assert_close(f(X), y)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), y)
    assert counter.hits == 1


def test_not_for_unusual_tensors(counter: Counter) -> None:
    class Mine(Tensor):
        pass

    weight, x = torch.ones(6), X.clone()
    want = normkern.group_norm(x, 2, weight)
    unusual: list[tuple[Tensor, Tensor]] = [
        (x.as_subclass(Mine), weight),
        (torch._neg_view(-x), weight),
        (x, torch._neg_view(-weight)),
        (x, torch.ones(12)[::2]),
        (x, weight.as_subclass(Mine)),
    ]
    for a, b in unusual:
        for _ in range(2):
            torch.testing.assert_close(normkern.group_norm(a, 2, b).as_subclass(Tensor), want)
    assert counter.hits == 0
    wide = torch.randn(1, 6, 1000, 1000)
    for _ in range(2):
        normkern.group_norm(wide, 2)
    assert counter.hits == 0


def test_types_of_options_are_told_apart(counter: Counter) -> None:
    x = X[:, :1].contiguous()
    for _ in range(2):
        normkern.group_norm(x, 1)
        normkern.layer_norm(x, (4,), eps=1.0)
        normkern.batch_norm(x, torch.zeros(1), torch.ones(1), training=True, momentum=1.0)
    assert counter.hits == 3
    with pytest.raises(TypeError, match="num_groups must be an int"):
        normkern.group_norm(x, True)
    with pytest.raises(TypeError, match="num_groups must be an int"):
        normkern.group_norm(x, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must hold ints"):
        normkern.layer_norm(x, (4.0,), eps=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="training must be a bool"):
        normkern.batch_norm(x, torch.zeros(1), torch.ones(1), training=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="momentum must be a float"):
        normkern.batch_norm(x, torch.zeros(1), torch.ones(1), momentum="a")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="running_mean must not require gradients"):
        normkern.batch_norm(x, torch.zeros(1, requires_grad=True), torch.ones(1), training=True)
    assert normkern.batch_norm(x, torch.zeros(1), torch.ones(1), training=True, momentum=1).shape == x.shape
    assert counter.hits == 3


def test_versions_count_what_is_written(counter: Counter) -> None:
    mean, var = torch.zeros(6), torch.ones(6)
    for expected in (1, 2, 3):
        normkern.batch_norm(X, mean, var, training=True)
        assert (mean._version, var._version) == (expected, expected)
    for _ in range(2):
        normkern.batch_norm(X, mean, var)
    assert (mean._version, var._version) == (3, 3)
    assert counter.hits == 3
    # Evaluation saves the statistics for its backward pass, so a later update must be noticed.
    x = X.clone().requires_grad_()
    for _ in range(2):
        y = normkern.batch_norm(x, mean, var)
    normkern.batch_norm(X, mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_inference_mode(counter: Counter) -> None:
    with torch.inference_mode():
        x, mean, var = X.clone(), torch.zeros(6), torch.ones(6)
        a, b = (normkern.batch_norm(x, mean, var, training=True) for _ in range(2))
        assert b.is_inference()
    assert counter.hits == 1
    assert torch.equal(a, b)


def test_saved_tensors_may_come_back_laid_out_otherwise(counter: Counter) -> None:
    """Hooks that offload or compress may lose strides; the problem was that of the strides there were."""
    x = X.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    dy = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for hook in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        for _ in range(2):
            leaf = x.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
                y = normkern.group_norm(leaf, 2, act="silu", residual=x)
            y.backward(dy)
            grads.append(leaf.grad)
    assert counter.hits == 3
    for grad in grads[1:]:
        assert torch.equal(grad, grads[0])  # type: ignore[arg-type]


def test_backward_stays_in_cpp(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever dy's layout is; but not where the gradient is to be differentiable."""
    gradients, general = autograd.gradients, []

    def counted(*arguments: Any) -> Any:
        general.append(arguments)
        return gradients(*arguments)

    x, residual, weight = X.clone().requires_grad_(), X.clone().requires_grad_(), torch.ones(6, requires_grad=True)

    def made(dy: Tensor, **options: Any) -> tuple[Tensor, ...]:
        y = normkern.group_norm(x, 2, weight, residual=residual)
        return torch.autograd.grad(y, (x, residual, weight), dy, **options)

    dense = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    layouts = (dense, dense.to(memory_format=torch.channels_last), dense[:, :1].expand(X.shape))
    want = [made(dy.contiguous()) for dy in layouts]
    monkeypatch.setattr(autograd, "gradients", counted)
    for dy, expected in zip(layouts, want, strict=True):
        for got, exact in zip(made(dy), expected, strict=True):
            assert torch.equal(got, exact)
    assert counter.hits == 5
    assert not general
    made(dense, create_graph=True)
    assert len(general) == 1


def test_second_derivatives_go_on(counter: Counter) -> None:
    x = X.double().requires_grad_()
    for norm, f in norms().items():
        if norm == "batch":
            continue
        wide = (lambda t, g=f: g(t)) if norm in ("layer", "rms") else f
        first = []
        for _ in range(2):
            (grad,) = torch.autograd.grad(wide(x).pow(3).sum(), x, create_graph=True)
            first.append(torch.autograd.grad(grad.square().sum(), x)[0])
        torch.testing.assert_close(*first, rtol=1e-12, atol=1e-12)
    assert counter.hits > 0


def test_the_table_is_bounded(counter: Counter) -> None:
    for rows in range(1, 5000):
        normkern.layer_norm(torch.ones(rows % 4099 + 1, 2), (2,))
    assert 0 < direct._HOST.known() <= 4096


def test_misuse_of_the_module_raises() -> None:
    """C++ trusts nobody: what does not fit the call is refused, not read."""
    host = direct._HOST
    host.forget()
    arguments = ("layer_norm", X, None, None, None, None, None, (4,), 1e-5, None)
    with pytest.raises(ValueError, match="does not cover x"):
        host.remember(arguments, None, (1, 1, 1, 4), (1, 1, 1, 4), 0, 0, 1e-5)
    with pytest.raises(TypeError):
        host.remember(arguments, None, (1, 1, 1), (1, 1, 1, 4), 0, 0, 1e-5)
    elsewhere = ("layer_norm", X.to("meta"), *arguments[2:])
    assert not host.remember(elsewhere, None, (48, 1, 1, 4), (1, 48, 4, 1), 0, 0, 0.1)
    assert host.run(("layer_norm",), None) is None
    assert host.run(arguments, None) is None
    with pytest.raises(TypeError):
        host.run(arguments)


def test_modules_take_it_too(counter: Counter) -> None:
    for act in ACTIVATIONS:
        module = normkern.nn.BatchNorm2d(6, act=act)
        module(X)
        module(X)
        assert int(module.num_batches_tracked) == 2  # type: ignore[arg-type]
        module.eval()
        module(X)
        module(X)
    assert counter.hits == 2 * len(ACTIVATIONS)
