# relu after a residual on CUDA: a bit for each element takes the residual's place in what backward keeps. The emulated
# kernels with masks and without must agree to the last bit.
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Setup, or_skip
from emulator.backend import MEDIUM, SMALL, STRATEGIES, TINY, EmulatedBackend, Gpu
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

import normkern
from normkern import direct
from normkern.backends import BACKENDS, run_on
from normkern.problem import Act, Domain, Moments, Problem

Norm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
needs_native = pytest.mark.skipif(BACKENDS["native"].why_not(torch.empty(1)) is not None, reason="not built")


def emulated(strategy: str = "automatic", gpu: Gpu | None = None, masks: bool = True) -> EmulatedBackend:
    backend: EmulatedBackend = or_skip(EmulatedBackend, mode="checked", strategy=strategy, gpu=gpu)
    backend.masks = lambda x: masks  # type: ignore[method-assign]
    return backend


def batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return normkern.batch_norm(x, None, None, weight, bias, training=True, residual=residual, act="relu")


def moving(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1], dtype=torch.float64)
    y = normkern.batch_norm(x, *running, weight, bias, training=True, residual=residual, act="relu")
    return y + sum(running).nan_to_num().view(1, -1, 1, 1).to(y.dtype)  # type: ignore[union-attr]


def given(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    running = torch.linspace(-1, 1, x.shape[1]), torch.linspace(0.5, 2, x.shape[1])
    return normkern.batch_norm(x, *running, weight, bias, residual=residual, act="relu")


def group(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return normkern.group_norm(x, x.shape[1] // 5, weight, bias, residual=residual, act="relu")


def instance(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return normkern.instance_norm(x, None, None, weight, bias, residual=residual, act="relu")


def layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return normkern.layer_norm(x, (x.shape[-1],), weight, bias, residual=residual, act="relu")


def rms(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return normkern.rms_norm(x, (x.shape[-1],), weight, residual=residual, act="relu") + 0 * bias.sum()


# Units of every kind: groups, lines and columns that have a weight; slabs of one group and of several to an access;
# groups in several blocks. Where moments are given, the last byte is not full.
CASES: dict[str, tuple[Norm, tuple[int, ...], bool]] = {
    "batch": (batch, (3, 5, 8, 9), False),
    "batch, parts": (moving, (2, 2, 48, 50), False),
    "batch last": (moving, (3, 8, 5, 7), True),
    "batch last, parts": (batch, (3, 24, 17, 12), True),
    "given": (given, (3, 5, 7, 3), False),
    "given last": (given, (3, 5, 7, 3), True),
    "group": (group, (2, 10, 4, 8), False),
    "group last": (group, (3, 40, 5, 3), True),
    "instance": (instance, (2, 3, 8, 10), False),
    "layer": (layer, (70, 136), False),
    "rms": (rms, (9, 1000), False),
}


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias, residual and dy. z is 0 in the first channel, and NaN somewhere in the last one."""
    _, shape, last = CASES[name]
    generator = torch.Generator().manual_seed(3)
    x, residual, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    channels = 1 if len(shape) > 2 else -1
    weight, bias = torch.linspace(0, 2, shape[channels]), torch.linspace(0, -1, shape[channels])
    residual.select(channels, 0).copy_(torch.tensor(-0.0))
    residual.select(channels, -1)[0] = float("nan")
    layout = torch.channels_last if last else torch.contiguous_format
    x, residual, dy = (t.to(dtype).contiguous(memory_format=layout) for t in (x * 2 + 3, residual, dy))
    return x, weight, bias, residual, dy


@contextmanager
def saved_bytes() -> Iterator[list[tuple[torch.dtype, int]]]:
    """The dtype and bytes of each tensor that is saved for backward."""
    seen: list[tuple[torch.dtype, int]] = []

    def pack(t: Tensor) -> Tensor:
        seen.append((t.dtype, t.nbytes))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield seen


def results(backend: EmulatedBackend, name: str, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Any]]:
    *leaves, dy = tensors
    own = [t.detach().requires_grad_() for t in leaves]
    with run_on(backend), saved_bytes() as seen:
        y = CASES[name][0](*own)
    with run_on(backend):
        return [y, *torch.autograd.grad(y, own, dy)], seen


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bits_are_those_of_the_residual(strategy: str, dtype: torch.dtype) -> None:
    """And a sixteenth of it is kept."""
    for number, name in enumerate(CASES):
        if (number + DTYPES.index(dtype)) % 2 and strategy != "split":
            continue
        if strategy == "warp" and CASES[name][2]:  # no whole accesses: it takes another strategy than without masks
            continue
        tensors = inputs(name, dtype)
        gpu = (SMALL, TINY)[number // 2 % 2]
        want, plain = results(emulated(strategy, gpu, masks=False), name, tensors)
        got, masked = results(emulated(strategy, gpu), name, tensors)
        for one, two in zip(got, want, strict=True):
            assert_close(one, two, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        assert (torch.uint8, -(-tensors[0].nbytes // 16)) in masked, name
        assert (dtype, tensors[3].nbytes) in [kept for kept in plain if kept not in masked or plain.count(kept) > 1]
        assert sum(n for _, n in plain) - sum(n for _, n in masked) == tensors[3].nbytes - -(-tensors[3].nbytes // 16)


@pytest.mark.parametrize("name", ["batch", "batch last", "layer"])
def test_every_backend_keeps_one_or_the_other(backend: Setup, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where masks are left they change nothing; z is far from 0, where two programs might round to two signs."""
    x, weight, bias, residual, dy = (t.nan_to_num().to(backend.device) for t in inputs(name, torch.float32))
    residual = 16 * (residual + 0.5).sign()
    kind = type(BACKENDS[backend.name])
    leaves_masks = hasattr(kind, "masks") and BACKENDS[backend.name].masks(x)  # type: ignore[attr-defined]
    outcomes = []
    for on in (leaves_masks, False):
        if hasattr(kind, "masks"):
            monkeypatch.setattr(kind, "masks", lambda self, x, on=on: on)
        own = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        with saved_bytes() as seen:
            y = CASES[name][0](*own)
        kept = (torch.uint8, residual.nbytes // 16) if on else (torch.float32, residual.nbytes)
        assert seen.count(kept) == (1 if on else 2), seen
        outcomes.append([y, *torch.autograd.grad(y, own, dy)])
    assert_close(
        *outcomes, rtol=1e-5, atol=1e-5
    )  # a forced strategy may give way to split, which sums in another order


def test_which_gradients_pass() -> None:
    """What is not at most 0: NaN passes, both zeros do not. Eight to a byte in bfloat16, the first one lowest."""
    z = torch.tensor([1, 0, -0.0, -1, float("nan"), float("inf"), -float("inf"), 2**-120, -(2**-120), 3]).bfloat16()
    problem = Problem(Domain(1, 1, 1, 10), Domain(1, 1, 10, 1), Moments.given, Act.relu, 1.0)
    zero = torch.zeros(1, dtype=torch.float64)
    for residual in (z, z.repeat(2)[1:11]):  # the second off a 16-byte boundary
        x = torch.zeros_like(residual)
        y, _, _, mask = emulated().masked_forward(problem, x, None, None, residual, zero, zero, None)
        bits = [int(mask[i // 8]) >> i % 8 & 1 for i in range(10)]
        assert bits == [not v <= 0 for v in residual.tolist()]
        assert_close(y, residual.relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lines_that_begin_inside_of_a_byte(strategy: str) -> None:
    """Nobody asks for such a mask (Problem.can_mask), and yet every byte of it has one writer."""
    lines, weights = Domain(1, 4, 3, 35), Domain(1, 4, 3, 35)
    rows, columns = Domain(12, 1, 1, 35), Domain(1, 12, 35, 1)
    for stats, affine in ((lines, weights), (rows, columns)):
        x, residual = (torch.randn(420, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
        backend = emulated(strategy, MEDIUM)
        y, _, _, mask = backend.masked_forward(
            Problem(stats, affine, Moments.mean_var, Act.relu), x, None, None, residual, None, None, None
        )
        assert [int(mask[i // 8]) >> i % 8 & 1 for i in range(420)] == (y > 0).tolist()
        assert backend.plan.strategy_name == "split"


@pytest.mark.parametrize("name", ["batch", "batch last", "group last", "layer"])
def test_off_16_byte_boundaries(name: str) -> None:
    """Forward copies what is not on one; backward reads masks in single elements, too."""

    def off(t: Tensor) -> Tensor:
        wide = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return wide.as_strided(t.shape, t.stride(), 1).copy_(t)

    x, weight, bias, residual, dy = inputs(name, torch.bfloat16)
    want, _ = results(emulated("split"), name, (x, weight, bias, residual, dy))
    got, seen = results(emulated("split"), name, (off(x), weight, bias, off(residual), off(dy)))
    assert any(dtype == torch.uint8 for dtype, _ in seen)
    for one, two in zip(got, want, strict=True):  # sums of single elements have another order
        scale = two.double().nan_to_num().abs().max().item()
        assert_close(one.double(), two.double(), rtol=0, atol=0.01 * scale, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "act"), [((3, 5, 7, 7), "relu"), ((3, 5, 8, 8), "silu"), ((3, 5, 8, 8), "leaky_relu")]
)
def test_else_the_residual_is_kept(shape: tuple[int, ...], act: str) -> None:
    x, residual = torch.randn(shape).requires_grad_(), torch.randn(shape)
    with run_on(emulated()), saved_bytes() as seen:
        normkern.batch_norm(x, None, None, training=True, residual=residual, act=act)
    assert seen.count((torch.float32, x.nbytes)) == 2
    assert not any(dtype == torch.uint8 for dtype, _ in seen)


def test_what_comes_back_from_hooks_may_be_laid_out_otherwise() -> None:
    x, weight, bias, residual, dy = inputs("batch last", torch.float32)
    want, _ = results(emulated(), "batch last", (x, weight, bias, residual, dy))
    own = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    with run_on(emulated()):
        with saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t.clone()):
            y = CASES["batch last"][0](*own)
        got = [y, *torch.autograd.grad(y, own, dy)]
    assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["batch", "given", "group last", "layer"])
def test_second_derivatives(name: str) -> None:
    """z is far from 0 everywhere; residual, x and the weights get theirs through the mask."""
    norm, _, last = CASES[name]
    shape = (3, 4) if name == "layer" else (2, 10, 2, 2)
    layout = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator().manual_seed(1)
    x, far = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    x, residual = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, 8 * far.sign()))
    channels = shape[-1] if name == "layer" else shape[1]
    leaves = (x, *(torch.linspace(a, 1, channels).double().requires_grad_() for a in (0.5, -1)), residual)
    with run_on(emulated()):
        with saved_bytes() as seen:
            y = norm(*leaves)
        assert any(dtype == torch.uint8 for dtype, _ in seen)
        dy = torch.cos(y.detach())
        plain = torch.autograd.grad(norm(*leaves), leaves, dy)
        graph = torch.autograd.grad(norm(*leaves), leaves, dy, create_graph=True)
        assert_close(graph, plain)
        assert torch.autograd.gradcheck(norm, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(norm, leaves, fast_mode=True)


def test_running_statistics_that_are_weights() -> None:
    """One thread may write where another still reads."""
    x, table = torch.randn(4, 6, 5), torch.ones(12)
    for statistics in (table[:6], torch.ones(6)), (torch.zeros(6), table[3:9]):
        for parameters in ((table[5:11], None), (None, table[5:11])):
            with run_on(emulated()), pytest.raises(RuntimeError, match="running statistics are weight or bias"):
                normkern.batch_norm(x, *statistics, *parameters, training=True)
            with run_on(emulated()):
                normkern.batch_norm(x, *statistics, *parameters)
    with run_on(emulated()):
        normkern.batch_norm(x, table[:6], torch.ones(6), table[6:], training=True)


# ---- the operator, with the emulated kernels in the place of CUDA's


def from_operator(*arguments: Any) -> tuple[Tensor, ...]:
    x, weight, bias, residual, mean, var, running_mean, running_var, stats, affine, moments, eps, momentum = arguments
    problem = Problem(Domain(*stats), Domain(*affine), Moments(moments), Act.relu, eps)
    if running_mean is not None:  # .data: that they are written is for the caller to say
        running = running_mean.data, running_var.data
        return emulated().masked_forward(problem, x, weight, bias, residual, *running, momentum)
    return emulated().masked_forward(problem, x, weight, bias, residual, mean, var, None)


def backward_from_operator(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, stats, affine, moments, act, eps, needs = arguments
    problem = Problem(Domain(*stats), Domain(*affine), Moments(moments), Act(act), eps)
    return emulated().backward(problem, *tensors, needs)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("normkern", "IMPL")
    library.impl("masked_forward", from_operator, "CPU")
    with warnings.catch_warnings():  # that it takes the place of the CPU's
        warnings.simplefilter("ignore")
        library.impl("backward", backward_from_operator, "CPU", allow_override=True)
    monkeypatch.setattr(direct, "_run", lambda *_: None)
    monkeypatch.setattr(type(BACKENDS["native"]), "masks", lambda self, x: True)
    yield
    library._destroy()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_opcheck(operators: None, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(3, 8, 4, 5).to(dtype) for _ in range(2))
    weight, channels, group = torch.ones(8), [1, 3, 8, 20], [6, 1, 1, 80]
    running = torch.zeros(8), torch.ones(8)
    for arguments in (
        (x, weight, None, residual, None, None, *running, channels, channels, 0, 1e-5, 0.3),
        (x, weight, weight.clone(), residual, None, None, None, None, group, channels, 0, 1e-5, 0.0),
        (x, None, None, residual, *running, None, None, channels, channels, 2, 1e-5, 0.0),
    ):
        done = torch.library.opcheck(torch.ops.normkern.masked_forward.default, arguments)
        assert set(done.values()) == {"SUCCESS"}, done


@needs_native
@pytest.mark.parametrize("name", ["batch last", "given", "layer"])
def test_compiled(operators: None, name: str) -> None:
    """The same bits from a graph with symbolic sizes, which keeps the mask."""
    tensors = inputs(name, torch.float32)
    run = torch.compile(CASES[name][0], backend="aot_eager", fullgraph=True, dynamic=True)
    outcomes = []
    for function in (CASES[name][0], run):
        own = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors[:4]]
        with normkern.use_backend("native"), saved_bytes() as seen:
            y = function(*own)
            assert any(dtype == torch.uint8 for dtype, _ in seen)
            outcomes.append([y, *torch.autograd.grad(y, own, tensors[4])])
    assert_close(*outcomes, rtol=0, atol=0, equal_nan=True)


@needs_native
def test_running_statistics_count_as_written(operators: None) -> None:
    x, residual = torch.randn(3, 8, 4, 5).requires_grad_(), torch.randn(3, 8, 4, 5)
    running = torch.zeros(8), torch.ones(8)
    with normkern.use_backend("native"), saved_bytes() as seen:
        normkern.batch_norm(x, *running, training=True, residual=residual, act="relu")
    assert any(dtype == torch.uint8 for dtype, _ in seen)
    assert [t._version for t in running] == [1, 1]
    assert_close(running[0], 0.1 * x.detach().mean((0, 2, 3)))


@needs_native
def test_the_cpu_takes_no_mask() -> None:
    x, ones = torch.randn(4, 8), torch.ones(4, dtype=torch.float64)
    problem = [4, 1, 1, 8], [1, 4, 8, 1], 0, 1, 1e-5, 1
    with pytest.raises(RuntimeError, match="a mask must be what masked_forward left"):
        torch.ops.normkern.backward(x, x, None, None, torch.zeros(8, dtype=torch.uint8), ones, ones, *problem)
