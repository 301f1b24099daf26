# The norms of "Beyond BatchNorm" and "How Does BatchNorm Help", and the normalizations of weights: each against its
# formula in float64 on every backend, with gradients, second derivatives, layouts, saved memory and errors. (Filter
# response norm without a threshold is a norm of the table in cases.py as well.)
from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import in_layout
from conftest import Setup
from reference import half_ulp, unit
from test_norms import strides
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normkern
import normkern.functional as F

EPS = 1e-3
RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))


def over(p: Tensor, x: Tensor) -> Tensor:
    return p.view(1, -1, *[1] * (x.dim() - 2))


def first(p: Tensor, x: Tensor) -> Tensor:
    return p.view(-1, *[1] * (x.dim() - 1))


def spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def channel(x: Tensor) -> list[int]:
    return [0, *spatial(x)]


# ---- the formulas, transcribed


def response(x: Tensor, w: Tensor, b: Tensor, eps: Tensor | float = EPS) -> Tensor:
    return x * (x.square().mean(spatial(x), keepdim=True) + eps).rsqrt() * over(w, x) + over(b, x)


def variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / (x.var(channel(x), correction=0, keepdim=True) + EPS).sqrt() * over(w, x) + over(b, x)


def s0(x: Tensor, w: Tensor, b: Tensor, v: Tensor, groups: int = 2, correction: int = 0) -> Tensor:
    var = x.reshape(x.shape[0], groups, -1).var(2, correction=correction).repeat_interleave(x.shape[1] // groups, 1)
    root = (var + EPS).sqrt().view(*x.shape[:2], *[1] * (x.dim() - 2))
    return x * torch.sigmoid(over(v, x) * x) / root * over(w, x) + over(b, x)


def b0(x: Tensor, w: Tensor, b: Tensor, v: Tensor, var: Tensor | None = None, correction: int = 0) -> Tensor:
    batch = x.var(channel(x), correction=0, keepdim=True) if var is None else over(var, x)
    right = over(v, x) * x + (x.var(spatial(x), correction=correction, keepdim=True) + EPS).sqrt()
    return x / torch.maximum((batch + EPS).sqrt(), right) * over(w, x) + over(b, x)


def standardized(w: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    dims = list(range(1, w.dim()))
    centred = w - w.mean(dims, keepdim=True)
    return centred / (w.var(dims, correction=0, keepdim=True) + EPS).sqrt() * first(g, w) * scale


def unit_length(w: Tensor, g: Tensor, eps: float = 0.0) -> Tensor:
    return first(g, w) * w / (first(w.flatten(1).norm(dim=1), w) + eps)


@dataclass(frozen=True)
class Norm:
    """A function of x and of parameters with a number for each channel, beside its formula."""

    run: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    parameters: int
    of_weights: bool = False
    residual: bool = False
    large: tuple[str, ...] = ("x",)  # what may be saved of x's size


def running(x: Tensor) -> Tensor:
    return 0.5 + torch.arange(x.shape[1], dtype=x.dtype, device=x.device) / 8  # exact in every dtype


NORMS: dict[str, Norm] = {
    "response": Norm(lambda x, w, b: F.filter_response_norm(x, w, b, None, EPS), response, 2),
    "response_tlu": Norm(
        lambda x, w, b, t: F.filter_response_norm(x, w, b, t, EPS),
        lambda x, w, b, t: torch.maximum(response(x, w, b), over(t, x)),
        3,
    ),
    "response_tlu_residual": Norm(
        lambda x, w, b, t, r: F.filter_response_norm(x, w, b, t, EPS, residual=r),
        lambda x, w, b, t, r: torch.maximum(response(x, w, b) + r, over(t, x)),
        3,
        residual=True,
        large=("x", "residual"),
    ),
    "response_learned": Norm(
        lambda x, w, b, t, e: F.filter_response_norm(x, w, b, t, e),
        lambda x, w, b, t, e: torch.maximum(response(x, w, b, over(e.abs(), x)), over(t, x)),
        4,
    ),
    "response_learned_one": Norm(
        lambda x, w, b, e: F.filter_response_norm(x, w, b, None, e[1]),
        lambda x, w, b, e: response(x, w, b, e[1].abs()),
        3,
    ),
    "variance": Norm(lambda x, w, b: F.variance_norm(x, None, w, b, True, eps=EPS), variance, 2),
    "variance_residual_act": Norm(
        lambda x, w, b, r: F.variance_norm(x, None, w, b, True, eps=EPS, residual=r, act="silu"),
        lambda x, w, b, r: nn.functional.silu(variance(x, w, b) + r),
        2,
        residual=True,
        large=("x", "residual"),
    ),
    "variance_eval": Norm(
        lambda x, w, b: F.variance_norm(x, running(x), w, b, eps=EPS),
        lambda x, w, b: x / over((running(x) + EPS).sqrt(), x) * over(w, x) + over(b, x),
        2,
    ),
    "s0": Norm(lambda x, w, b, v: F.evo_norm_s0(x, 2, w, b, v, EPS), s0, 3),
    "s0_paper": Norm(
        lambda x, w, b, v: F.evo_norm_s0(x, 2, w, b, v, EPS, variant="paper"),
        lambda x, w, b, v: s0(x, w, b, v, correction=1),
        3,
    ),
    "s0_affine": Norm(
        lambda x, w, b: F.evo_norm_s0(x, 2, w, b, None, EPS), lambda x, w, b: x * over(w, x) + over(b, x), 2
    ),
    "b0": Norm(lambda x, w, b, v: F.evo_norm_b0(x, None, w, b, v, True, eps=EPS), b0, 3),
    "b0_paper": Norm(
        lambda x, w, b, v: F.evo_norm_b0(x, None, w, b, v, True, eps=EPS, variant="paper"),
        lambda x, w, b, v: b0(x, w, b, v, correction=1),
        3,
    ),
    "b0_eval": Norm(
        lambda x, w, b, v: F.evo_norm_b0(x, running(x), w, b, v, eps=EPS),
        lambda x, w, b, v: b0(x, w, b, v, running(x)),
        3,
    ),
    "group_paper": Norm(
        lambda x, w, b: F.paper_group_norm(x, 2, w, b, EPS),
        lambda x, w, b: s0_like_group(x, w, b),
        2,
    ),
    "standardize": Norm(lambda w, g: F.weight_standardize(w, g, EPS), standardized, 1, of_weights=True),
    "standardize_scaled": Norm(
        lambda w, g: F.weight_standardize(w, g, EPS, scaled=True),
        lambda w, g: standardized(w, g, RELU_GAIN / math.sqrt(w[0].numel())),
        1,
        of_weights=True,
    ),
    "standardize_paper": Norm(
        lambda w, g: F.weight_standardize(w, g, EPS, scaled=True, variant="paper"),
        lambda w, g: (w - w.mean((1, 2, 3), keepdim=True))
        / (w.std((1, 2, 3), correction=0, keepdim=True) + EPS)
        * first(g, w)
        * (RELU_GAIN / math.sqrt(w[0].numel())),
        1,
        of_weights=True,
        large=("x", "centred"),
    ),
    "weight_norm": Norm(lambda w, g: F.weight_norm(w, g), unit_length, 1, of_weights=True),
    "weight_norm_paper": Norm(
        lambda w, g: F.weight_norm(w, g, EPS), lambda w, g: unit_length(w, g, EPS), 1, of_weights=True
    ),
    "weight_center": Norm(
        lambda w: F.weight_center(w), lambda w: w - w.mean((1, 2, 3), keepdim=True), 0, of_weights=True, large=()
    ),
}


def s0_like_group(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], 2, -1)
    xhat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, correction=1, keepdim=True) + EPS).sqrt()
    return xhat.view(x.shape) * over(w, x) + over(b, x)


def inputs(norm: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[list[Tensor], Tensor]:
    """x, the parameters and a residual if there is one, on the CPU; and dy."""
    kind = NORMS[norm]
    g = torch.Generator().manual_seed(zlib.crc32(f"{norm}{shape}{dtype}{layout}".encode()))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    x = in_layout((normal(*shape) * 2 + normal(*shape[:2], *[1] * (len(shape) - 2))).to(dtype), layout)
    param_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    channels = shape[0] if kind.of_weights else shape[1]
    tensors = [x, *((normal(channels) / 2 + 0.5).to(param_dtype) for _ in range(kind.parameters))]
    dy = in_layout(normal(*shape).to(dtype), layout)
    if kind.residual:
        tensors.append(in_layout(normal(*shape).to(dtype), layout))
    return tensors, dy


C = 24  # roundings of one element's chain (a sigmoid and a division in it), and those inside one thread's sums


def check(backend: Setup, norm: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    kind = NORMS[norm]
    tensors, dy = inputs(norm, shape, dtype, layout)
    leaves = [t.detach().to(backend.device).requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want_y = kind.formula(*wide)
    # Where rounding may put a value on the other side of a kink (max) there is no gradient to agree on.
    y = kind.run(*leaves)
    want = [want_y, *torch.autograd.grad(want_y, wide, dy.double())]
    got = [y, *torch.autograd.grad(y, leaves, dy.to(backend.device))]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        like_x = g.shape == leaves[0].shape
        assert g.dtype == (dtype if like_x else tensors[i - 1].dtype)
        if like_x:
            assert strides(g) == strides(leaves[0])
        g, w = g.detach().cpu().double(), w.detach()
        # Sums that cancel are as exact as their largest terms; those of a parameter's gradient grow like a random walk.
        growth = 1.0 if like_x else math.sqrt(math.prod(shape) / max(w.numel(), 1))
        allowed = C * unit(dtype) * growth * (w.abs() + w.abs().amax())
        allowed = allowed + half_ulp(w, dtype if like_x else tensors[i - 1].dtype) * 1.001
        bad = (g - w).abs() > allowed
        assert not bad.any(), (
            f"{norm}: {('y', 'dx')[i] if i < 2 else f'gradient {i - 1}'}: {g[bad][0]} is not {w[bad][0]}"
        )


@pytest.mark.parametrize("norm", NORMS)
def test_formula(backend: Setup, norm: str) -> None:
    """Values, gradients, dtypes and layouts against float64 on the same rounded input."""
    for layout in ("contiguous", "channels_last"):
        check(backend, norm, (3, 4, 5, 3), torch.float32, layout)
    if not backend.simulated:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            for layout in ("contiguous", "channels_last", "swapped"):
                check(backend, norm, (3, 8, 7, 5), dtype, layout)


@pytest.mark.parametrize("norm", [n for n, kind in NORMS.items() if not kind.of_weights])
def test_shapes(norm: str) -> None:
    """1-D to 3-D, one position, long and short runs, more threads than samples."""
    plain = Setup("native")
    for shape, layout in (
        ((3, 4, 193), "contiguous"),
        ((2, 4, 3, 4, 5), "channels_last"),
        ((1, 2, 65, 49), "channels_last"),
        ((1, 34, 64, 64), "channels_last"),
        ((2, 4, 97, 33), "contiguous"),
        ((2, 6, 5, 7), "transposed"),
        ((2, 6, 4, 5), "swapped"),
        ((2, 6, 4, 5), "sliced"),
    ):
        if layout != "sliced":
            check(plain, norm, shape, torch.float32, layout)
        else:
            tensors, _ = inputs(norm, shape, torch.float32, "contiguous")
            cut = [in_layout(t, "sliced") if t.dim() > 1 else t for t in tensors]
            assert torch.equal(NORMS[norm].run(*cut), NORMS[norm].run(*tensors))
    if norm != "group_paper" and not norm.endswith("paper"):
        check(plain, norm, (64, 6, 1, 1), torch.float32, "contiguous")


@pytest.mark.parametrize("norm", NORMS)
def test_derivatives(norm: str) -> None:
    for name in ("native", "eager"):
        tensors, _ = inputs(norm, (2, 4, 3, 2), torch.float64, "channels_last")
        leaves = [t.requires_grad_() for t in tensors]
        with normkern.use_backend(name):
            assert gradcheck(NORMS[norm].run, leaves)
            assert gradgradcheck(NORMS[norm].run, leaves, fast_mode=True)


@pytest.mark.parametrize("norm", [n for n in NORMS if "paper" not in n or NORMS[n].of_weights is False])
def test_saved_for_backward(norm: str) -> None:
    """Of x's size only x, and a residual where a threshold or an activation needs it, are kept."""
    kind = NORMS[norm]
    tensors, _ = inputs(norm, (4, 8, 16, 16), torch.float32, "contiguous")
    leaves = [t.requires_grad_() for t in tensors]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kind.run(*leaves)
    large = {t.data_ptr() for t in saved if t.numel() >= leaves[0].numel()}
    allowed = {leaves[0].data_ptr(), *([leaves[-1].data_ptr()] if kind.residual else [])}
    assert large <= (allowed if kind.large else set())


@pytest.mark.parametrize("norm", ["response_tlu", "response_learned", "variance", "s0", "b0", "standardize"])
def test_transforms_and_compile(norm: str) -> None:
    kind = NORMS[norm]
    tensors, dy = inputs(norm, (3, 4, 4, 5), torch.float64, "contiguous")
    plain = torch.autograd.grad(kind.run(*[t.requires_grad_() for t in tensors]), tensors, dy)
    found = torch.func.grad(lambda x: (kind.run(x, *tensors[1:]) * dy).sum())(tensors[0])
    assert torch.allclose(found, plain[0], rtol=1e-10, atol=1e-12)
    compiled = torch.compile(kind.run, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(*tensors), tensors, dy)
    for a, b in zip(again, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_statistics_of_the_batch() -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) * 3
    count = x.numel() // 3
    for variant, correction in (("torch", 1), ("paper", 0)):
        target = x.var((0, 2, 3), correction=correction)
        for run in (
            lambda r, variant=variant: F.variance_norm(x, r, training=True, momentum=0.25, variant=variant),
            lambda r, variant=variant: F.evo_norm_b0(
                x, r, v=torch.ones(3), training=True, momentum=0.25, variant=variant
            ),
        ):
            running_var = torch.full((3,), 2.0, dtype=torch.float64)
            run(running_var)
            assert torch.allclose(running_var, 0.75 * 2 + 0.25 * target, rtol=1e-12)
    layer = normkern.nn.PaperBatchNorm2d(3, momentum=0.25).double()
    assert torch.equal(layer.running_mean, torch.ones(3, dtype=torch.float64))
    y = layer(x)
    assert torch.equal(y, F.batch_norm(x, None, None, layer.weight, layer.bias, True))
    assert torch.allclose(layer.running_mean, 0.75 + 0.25 * x.mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(layer.running_var, 0.75 + 0.25 * x.var((0, 2, 3), correction=0), rtol=1e-12)
    assert int(layer.num_batches_tracked) == 1
    assert count > 1


def test_unbiased_variance_of_one_element_is_zero() -> None:
    x = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    w, b, v = torch.rand(3, 4, dtype=torch.float64)
    y = F.evo_norm_b0(x, None, w, b, v, True, eps=EPS, variant="paper")
    assert torch.allclose(y, b0(x, w, b, v), rtol=1e-12)


def test_large_mean() -> None:
    """Moments are exact at any offset: what of y = x/std is wrong is the rounding of x alone."""
    x = torch.randn(4, 8, 16, 16) + 1e4
    for norm in ("s0", "b0", "variance"):
        leaves = [x.requires_grad_(), *(torch.rand(8).requires_grad_() for _ in range(NORMS[norm].parameters))]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        y, want = NORMS[norm].run(*leaves), NORMS[norm].formula(*wide)
        assert ((y - want).norm() / want.norm()).item() < 1e-6
        dy = torch.randn_like(x)
        dx = torch.autograd.grad(y, leaves[0], dy)[0]
        true = torch.autograd.grad(want, wide[0], dy.double())[0]
        assert ((dx - true).norm() / true.norm()).item() < 1e-6


def test_nothing_there() -> None:
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        for norm, kind in NORMS.items():
            if not kind.of_weights and norm != "group_paper":
                tensors, _ = inputs(norm, shape, torch.float32, "contiguous")
                y = kind.run(*[t.requires_grad_() for t in tensors])
                assert y.shape == shape
                assert all(not g.any() for g in torch.autograd.grad(y.sum(), tensors))


def test_nan_reaches_its_group_alone() -> None:
    x = torch.randn(2, 4, 5, 5)
    x[0, 0, 0, 0] = math.nan
    v = torch.ones(4)
    y = F.evo_norm_s0(x, 2, v=v)
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().all()
    assert F.filter_response_norm(x, tau=v)[0, 0].isnan().all()
    assert F.evo_norm_b0(x, None, v=v, training=True)[:, 0].isnan().all()


class Distributed(Tensor):
    """What tells a DTensor."""

    device_mesh = None


X, P = torch.zeros(2, 4, 3, 3), torch.ones(4)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: F.filter_response_norm(X[:, :, 0, 0]), RuntimeError, "filter_response_norm: input must have at least 3"),
    (lambda: F.filter_response_norm(X, tau=P, act="relu"), ValueError, "tau and act must not both be given"),
    (lambda: F.filter_response_norm(X, P[:3]), RuntimeError, r"weight must have shape \(4,\); got \(3,\)"),
    (lambda: F.filter_response_norm(X, eps=P[:3]), RuntimeError, r"eps must have shape \(4,\)"),
    (lambda: F.filter_response_norm(X, eps=-1.0), ValueError, "eps must be at least 0; got eps=-1.0"),
    (lambda: F.filter_response_norm(X, act="relu", eps=P), ValueError, "act needs an eps that is a number"),
    (lambda: F.filter_response_norm(X.long()), NotImplementedError, "input must be float64, float32"),
    (lambda: F.variance_norm(X, None), RuntimeError, "running_var must be given where training=False"),
    (lambda: F.variance_norm(X[:1, :, :1, :1], None, training=True), ValueError, "Expected more than 1 value"),
    (lambda: F.variance_norm(X, P, variant="lubana"), ValueError, "variant must be one of torch, paper"),
    (lambda: F.evo_norm_s0(X, 3, v=P), RuntimeError, "num_groups must divide the channels; got num_groups=3"),
    (lambda: F.evo_norm_s0(X, 2.0, v=P), TypeError, "num_groups must be an int"),
    (lambda: F.evo_norm_b0(X, None, v=P), RuntimeError, "evo_norm_b0: running_var must be given"),
    (lambda: F.evo_norm_b0(X, P[:2], v=P, training=True), RuntimeError, "running_var must have shape"),
    (lambda: F.evo_norm_s0(X.as_subclass(Distributed), 2, v=P), NotImplementedError, "a plain tensor; got a DTensor"),
    (lambda: F.paper_group_norm(X[:, :, :1, :1], 4), ValueError, "Expected more than 1 value per group"),
    (lambda: F.weight_standardize(P), RuntimeError, "weight_standardize: input must have at least 2 dimensions"),
    (lambda: F.weight_standardize(X, P), RuntimeError, r"gain must have shape \(2,\); got \(4,\)"),
    (lambda: F.weight_standardize(X, eps=-1.0), ValueError, "eps must be at least 0"),
    (lambda: F.weight_standardize(X, scaled=1), TypeError, "scaled must be a bool"),
    (lambda: F.weight_norm(X, P), RuntimeError, "gain must have shape"),
    (lambda: F.lp_batch_norm(X, None, None, training=True, p=3), ValueError, "p must be 1, 2 or inf; got p=3"),
    (lambda: F.lp_batch_norm(X, None, None), RuntimeError, "running_mean and running_size must be given"),
    (lambda: F.batch_noise(X, scale_range=0.5), ValueError, "scale_range must be at least 1; got scale_range=0.5"),
    (lambda: normkern.nn.EvoNorm2dS0(4), ValueError, "groups must divide num_features; got num_features=4"),
    (lambda: normkern.nn.FilterResponseNorm2d(0), ValueError, "num_features must be positive"),
    (lambda: normkern.nn.FilterResponseNorm2d(4)(X[0]), ValueError, "input must have 4 dimensions"),
    (lambda: normkern.nn.FilterResponseNorm1d(4, act="relu"), ValueError, "act needs tlu=False"),
    (lambda: normkern.nn.LpBatchNorm2d(4, p=0), ValueError, "p must be 1, 2 or inf"),
    (lambda: normkern.nn.WSConv2d(3, 4, 3, variant="x"), ValueError, "variant must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.normkern
    for x, domain in (
        (torch.randn(2, 3, 4, 5), [6, 1, 1, 20]),
        (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), [2, 20, 3, 1]),
    ):
        x = x.to(dtype)
        rows = torch.rand(7, 6, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
        for kind in (0, 1):
            for operator, tensors in (
                (ops.evolve.default, (x, rows)),
                (ops.evolve_sums.default, (torch.randn_like(x), x, rows)),
                (ops.evolve_backward.default, (torch.randn_like(x), x, rows)),
            ):
                done = torch.library.opcheck(operator, (*tensors, domain, kind))
                assert set(done.values()) == {"SUCCESS"}, done


def test_operators_keep_memory_safe() -> None:
    """What Python never passes: too few rows, of another dtype, another kind, domain or layout of dy."""
    ops, x = torch.ops.normkern, torch.randn(2, 3, 4, 5)
    rows, domain = torch.rand(5, 6), [6, 1, 1, 20]
    for call, message in (
        (lambda: ops.evolve(x, rows[:2], domain, 0), "rows must hold 3 rows of 6"),
        (lambda: ops.evolve(x, rows.double(), domain, 0), "rows must be contiguous, and float32"),
        (lambda: ops.evolve(x, rows, domain, 2), "kind must be 0 or 1"),
        (lambda: ops.evolve(x, rows, [6, 1, 1, 19], 0), "the extents of domain must multiply to 120"),
        (lambda: ops.evolve_backward(x, x, rows, domain, 1), "rows must hold 7 rows of 6"),
        (lambda: ops.evolve_sums(x.double(), x, rows, domain, 0), "dy must have x's sizes, strides and dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
