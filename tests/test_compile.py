# torch.compile without graph breaks, for fixed and for symbolic sizes, and the operators against torch's own checks of
# custom operators.
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import normkern
import normkern.nn
from normkern import problem
from normkern.backends import BACKENDS
from normkern.problem import Act, Problem

RUNNABLE = [name for name in ("native", "eager") if BACKENDS[name].why_not(torch.empty(0)) is None]
needs_native = pytest.mark.skipif("native" not in RUNNABLE, reason="the compiled library is not there")

Shape = Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Call:
    name: str
    run: Callable[[Tensor, Any], Tensor]
    shape: Shape


class Parameters:
    """Fresh for every call: running statistics change."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(6, generator=generator).requires_grad_()
        self.bias = torch.randn(6, generator=generator).requires_grad_()
        self.mean, self.var = torch.zeros(6), torch.ones(6)


def image(n: int, h: int) -> tuple[int, ...]:
    return n, 6, h, 4


def rows(n: int, h: int) -> tuple[int, ...]:
    return n, h, 6


CALLS = [
    Call("batch", lambda x, p: normkern.batch_norm(x, p.mean, p.var, p.weight, p.bias, True), image),
    Call("batch_eval", lambda x, p: normkern.batch_norm(x, p.mean, p.var, p.weight, p.bias, act="relu"), image),
    Call("group", lambda x, p: normkern.group_norm(x, 2, p.weight, p.bias, residual=x, act="silu"), image),
    Call("instance", lambda x, p: normkern.instance_norm(x, p.mean, p.var, p.weight, act="gelu"), image),
    Call("layer", lambda x, p: normkern.layer_norm(x, (6,), p.weight, p.bias), rows),
    Call("rms", lambda x, p: normkern.rms_norm(x, (6,), p.weight, residual=x + 1, act="leaky_relu"), rows),
    Call("add_rms", lambda x, p: sum(normkern.add_rms_norm(x, 2 * x, (6,), p.weight)), rows),
    Call("moments", lambda x, p: torch.cat(normkern.moments(x, (0, 2))), image),
]


def in_layout(shape: tuple[int, ...], layout: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if layout == "reversed":
        return torch.randn(shape[::-1], generator=generator).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    x = torch.randn(shape, generator=generator)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, dynamic: bool) -> Any:
    # aot_eager traces forward and backward as inductor does, without the minutes of compiling C++.
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")


def combinations() -> Iterator[Any]:
    """Every call on the compiled library for fixed and symbolic sizes, odd layouts where they take a path of their own;
    eager, which torch can look into, once."""
    for call in CALLS:
        if "native" in RUNNABLE:
            yield "native", call, "contiguous", True
            yield "native", call, "channels_last", False
            if call.name in ("batch", "group", "layer"):
                yield "native", call, "reversed", True
                yield "native", call, "sliced", True
        yield "eager", call, "channels_last", True


@pytest.mark.parametrize(
    ("runs_on", "call", "layout", "dynamic"),
    [
        pytest.param(*row, id=f"{row[0]}-{row[1].name}-{row[2]}-{'dynamic' if row[3] else 'static'}")
        for row in combinations()
    ],
)
def test_same_values_gradients_strides_and_statistics(runs_on: str, call: Call, layout: str, dynamic: bool) -> None:
    run = compiled(call.run, dynamic)
    for n, h in ((3, 5), (4, 7)) if dynamic else ((3, 5),):
        results = []
        for function in (run, call.run):
            x = in_layout(call.shape(n, h), layout).requires_grad_()
            p = Parameters()
            with normkern.use_backend(runs_on):
                y = function(x, p)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
            results.append((y, x.grad, p.weight.grad, p.bias.grad, p.mean, p.var))
        for mine, theirs in zip(*results, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs)
                assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("runs_on", RUNNABLE)
def test_symbolic_sizes_compile_once(runs_on: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def run(x: Tensor) -> Tensor:
        return normkern.group_norm(x, 2)

    function = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    with normkern.use_backend(runs_on):
        counts = []
        for n, h in ((3, 5), (4, 7), (5, 9), (6, 2)):
            x = torch.randn(image(n, h))
            torch.testing.assert_close(function(x), run(x))
            counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == counts[:-1]


MODULES = [
    (normkern.nn.BatchNorm2d, (6,), {"momentum": None}),
    (normkern.nn.BatchNorm2d, (6,), {"act": "relu"}),
    (normkern.nn.BatchNorm2d, (6,), {"track_running_stats": False}),
    (normkern.nn.GroupNorm, (3, 6), {"act": "silu"}),
    (normkern.nn.InstanceNorm2d, (6,), {"track_running_stats": True, "affine": True}),
    (normkern.nn.LayerNorm, ((5, 4),), {}),
    (normkern.nn.RMSNorm, ((5, 4),), {"act": "gelu"}),
]


@pytest.mark.parametrize(("kind", "arguments", "options"), MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules(kind: Any, arguments: Any, options: Any, training: bool) -> None:
    module = kind(*arguments, **options).train(training)
    twin = copy.deepcopy(module)
    function = compiled(module, dynamic=False)
    for step in range(3):
        x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(function(x, residual=x), twin(x, residual=x))
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))


def test_switching_backends_is_seen_by_compiled_code() -> None:
    """The backend is part of what a compiled function was compiled for."""

    class Spy(type(BACKENDS["eager"])):  # type: ignore[misc]
        name = "spy"

        def forward(self, problem: Problem, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
            y, mean, var = BACKENDS["eager"].forward(problem, x, *rest)
            return y + 100, mean, var

    BACKENDS["spy"] = Spy()
    try:
        function = compiled(lambda x: normkern.layer_norm(x, (6,)), dynamic=False)
        x = torch.randn(3, 6)
        plain = function(x)
        with normkern.use_backend("spy"):
            torch.testing.assert_close(function(x), plain + 100)
        torch.testing.assert_close(function(x), plain)

        def block(x: Tensor) -> Tensor:
            with normkern.use_backend("spy"):
                return normkern.layer_norm(x, (6,))

        torch.testing.assert_close(compiled(block, dynamic=False)(x), plain + 100)
        torch.testing.assert_close(function(x), plain)
    finally:
        del BACKENDS["spy"]


@pytest.mark.parametrize("runs_on", RUNNABLE[:1])
def test_inductor(runs_on: str) -> None:
    """Once through the real compiler, running statistics and backward included."""
    call = CALLS[0]
    results = []
    for function in (torch.compile(call.run, fullgraph=True), call.run):
        x, p = in_layout(image(3, 5), "channels_last").requires_grad_(), Parameters()
        with normkern.use_backend(runs_on):
            y = function(x, p)
        y.square().sum().backward()
        results.append((y, x.grad, p.weight.grad, p.bias.grad, p.mean, p.var))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"skip_nonfinite": True}], ids=str)
def test_batch_norm_with_symbolic_sizes(options: dict[str, Any]) -> None:
    """Statistics, their count and gradients, for any batch and size, in one graph that is compiled once."""
    module = normkern.nn.BatchNorm2d(6, act="relu", **options)
    twin = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for step, (n, h) in enumerate(((3, 5), (4, 7), (2, 9))):
        xs = [torch.randn(image(n, h), generator=torch.Generator().manual_seed(step)).requires_grad_() for _ in "ab"]
        for f, x in zip((function, twin), xs, strict=True):
            f(x).square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
        torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))
        counts.append(counter.frame_count)
    torch.testing.assert_close(module.weight.grad, twin.weight.grad)
    assert counts == [counts[0]] * 3


def test_frozen_statistics_are_seen_by_compiled_code() -> None:
    module = normkern.nn.BatchNorm2d(6)
    function = compiled(module, dynamic=False)
    x = torch.randn(image(3, 5))
    function(x)
    before = module.running_mean.clone()  # type: ignore[union-attr,operator]
    with normkern.frozen_running_stats(module):
        function(x)
    torch.testing.assert_close(module.running_mean, before, rtol=0, atol=0)
    function(x)
    assert int(module.num_batches_tracked) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("runs_on", RUNNABLE)
def test_export(runs_on: str) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normkern.nn.GroupNorm(3, 6, act="silu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)  # type: ignore[no-any-return]

    block = Block()
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    with normkern.use_backend(runs_on):
        program = torch.export.export(block, (torch.randn(4, 6, 5),), dynamic_shapes=sizes)
        x = torch.randn(7, 6, 5)
        torch.testing.assert_close(program.module()(x), block(x))


# ---- the operators themselves


def found(x: Tensor, **changes: Any) -> Problem:
    result = problem.group(x.shape, x.stride(), 2, Act.silu)
    assert result is not None
    return result


def operator_calls(layout: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    x = in_layout((2, 6, 3, 4), layout).to(dtype)
    p = found(x)
    weight, bias = torch.ones(6), torch.zeros(6, dtype=dtype)
    mean, var = BACKENDS["eager"].moments(p, x)
    geometry = (list(p.stats.sizes), list(p.affine.sizes), int(p.moments), int(p.act), p.eps)
    sum_geometry = (*geometry[:3], p.eps)
    return {
        "forward": (x, weight, bias, x.clone(), None, None, *geometry, True),
        "forward_bare": (x, None, None, None, None, None, *geometry, False),
        "backward": (x.clone(), x, weight, bias, None, mean, var, *geometry, 7),
        "backward_residual": (x.clone(), x, weight, None, x.clone(), mean, var, *geometry, 1 | 8),
        "add_forward": (x, x.clone(), weight, bias, *sum_geometry, True),
        "add_forward_bare": (x, x, None, None, *sum_geometry, False),
        "add_backward": (x.clone(), x.clone(), x, weight, bias, mean, var, *sum_geometry, 7),
        "moments": (x, geometry[0], 0),
        "moments_second": (x, geometry[0], 1),
    }


def operator_of(operators: Any, name: str) -> Any:
    """The operator that a key of operator_calls begins with."""
    words = name.split("_")
    return getattr(operators, "_".join(words[: 1 + (words[0] == "add")])).default


def statistics_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for batches in (1, 3):
        moments = [torch.rand(6 * batches, dtype=torch.float64) for _ in range(2)]
        yield torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype), *moments, 12, 0.25


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors, and tracing with symbolic sizes."""
    for name, arguments in operator_calls(layout, dtype).items():
        operator = operator_of(torch.ops.normkern, name)
        done = torch.library.opcheck(operator, arguments)
        assert set(done.values()) == {"SUCCESS"}, (name, done)
        assert len(done) == 4


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_opcheck_of_running_statistics(dtype: torch.dtype) -> None:
    for arguments in statistics_calls(dtype):
        done = torch.library.opcheck(torch.ops.normkern.update_running.default, arguments)
        assert set(done.values()) == {"SUCCESS"}, done
        mean, var, batch_mean, batch_var, count, momentum = [
            a.clone() if isinstance(a, Tensor) else a for a in arguments
        ]
        torch.ops.normkern.update_running(mean, var, batch_mean, batch_var, count, momentum)
        want_mean = 0.75 * 0 + momentum * batch_mean.view(-1, 6).mean(0)
        want_var = 0.75 * 1 + momentum * batch_var.view(-1, 6).mean(0) * (count / (count - 1))
        torch.testing.assert_close((mean, var), (want_mean.to(dtype), want_var.to(dtype)))


def batch_call(layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x = in_layout((3, 6, 3, 4), layout).to(dtype)
    p = problem.batch(x.shape, x.stride(), Act.relu)
    assert p is not None
    vectors = torch.linspace(0.5, 2, 6), torch.zeros(6, dtype=dtype), x.clone(), torch.zeros(6), torch.ones(6)
    return x, *vectors, list(p.stats.sizes), int(p.act), p.eps, 0.25


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_batch_forward(layout: str, dtype: torch.dtype) -> None:
    """And the bits are those of forward, then update_running."""
    done = torch.library.opcheck(torch.ops.normkern.batch_forward.default, batch_call(layout, dtype))
    assert set(done.values()) == {"SUCCESS"}, done
    assert len(done) == 4
    x, weight, bias, residual, mean, var, sizes, act, eps, momentum = batch_call(layout, dtype)
    want = torch.ops.normkern.forward(x, weight, bias, residual, None, None, sizes, sizes, 0, act, eps, True)
    moved = mean.clone(), var.clone()
    torch.ops.normkern.update_running(*moved, *want[1:], x.numel() // 6, momentum)
    got = torch.ops.normkern.batch_forward(x, weight, bias, residual, mean, var, sizes, act, eps, momentum)
    for one, two in zip((*got, mean, var), (*want, *moved), strict=True):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()
    assert not torch.equal(mean, torch.zeros(6))


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_is_one_operator(dynamic: bool) -> None:
    """The statistics move in the graph's one call of batch norm, and its gradients are those of eager mode."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    modules = [normkern.nn.BatchNorm2d(6, act="silu") for _ in range(2)]
    run = torch.compile(modules[0], backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=dynamic)
    for n in (3, 4):
        results = []
        for module, function in zip(modules, (run, modules[1]), strict=True):
            x = torch.randn(image(n, 5), generator=torch.Generator().manual_seed(n)).requires_grad_()
            y = function(x)
            y.backward(torch.cos(y.detach()))
            results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
    forwards = [code for code in graphs if "batch_forward" in code]
    assert forwards
    assert not any("update_running" in code for code in graphs)


@needs_native
def test_meta_tensors_have_real_strides_and_dtypes() -> None:
    for layout in ("contiguous", "channels_last"):
        for name, arguments in operator_calls(layout, torch.float32).items():
            operator = operator_of(torch.ops.normkern, name)
            meta = [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a
                for a in arguments
            ]
            for fake, real in zip(operator(*meta), operator(*arguments), strict=True):
                assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
                assert fake.device.type == "meta"
