# Gradients as torch's autograd uses them: numerically checked to second order, any subset, any layout of dy, twice.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ACTIVATIONS, NORMS, Case, Inputs, build, call, in_layout
from conftest import Setup
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import normkern

LEAVES = ("x", "weight", "bias", "residual")


def case_of(norm: str, **options: Any) -> Case:
    params = "w" if norm == "rms" else "wb"
    options = {"dtype": "float64", "params": params, "data": "scaled", "eps": 1e-2, **options}
    return Case(norm, (3, 4, 2, 3), groups=2, **options)


def leaves_of(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    return {n: getattr(inputs, n).detach().clone().requires_grad_() for n in LEAVES if getattr(inputs, n) is not None}


def function_of(case: Case, backend: Setup) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The case as a function of its differentiable inputs; running statistics start afresh at every call."""
    inputs = build(case).to(backend.device)
    leaves = leaves_of(case, inputs)

    def f(*tensors: Tensor) -> Tensor:
        fresh = Inputs(**vars(inputs))
        for name in ("running_mean", "running_var"):
            value = getattr(inputs, name)
            setattr(fresh, name, None if value is None else value.clone())
        for name, tensor in zip(leaves, tensors, strict=True):
            setattr(fresh, name, tensor)
        return call(case, fresh, normkern)

    return f, leaves


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(backend: Setup, norm: str, act: str | None) -> None:
    case = case_of(norm, act=act, residual="like" if act in ("silu", "relu") else None)
    f, leaves = function_of(case, backend)
    fast = backend.simulated
    assert gradcheck(f, list(leaves.values()), fast_mode=fast)
    if act != "relu":  # one activation with a kink says as much as two
        assert gradgradcheck(f, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_gradcheck_with_given_moments(backend: Setup, norm: str) -> None:
    f, leaves = function_of(case_of(norm, training=False, act="gelu", residual="like"), backend)
    assert gradcheck(f, list(leaves.values()), fast_mode=backend.simulated)
    assert gradgradcheck(f, list(leaves.values()), fast_mode=True)


def plain(case: Case, inputs: Inputs) -> Tensor:
    """The norm as elementary operations. (torch's own batch and layer norm are wrong from the third order on.)"""
    rows = case.grouped(inputs.x)
    if case.norm != "rms":
        rows = rows - rows.mean(1, keepdim=True)
    assert case.eps is not None
    xhat = case.ungrouped(rows / (rows.square().mean(1, keepdim=True) + case.eps).sqrt())
    assert inputs.weight is not None
    bias = 0.0 if inputs.bias is None else case.broadcast(inputs.bias)
    return ACTIVATIONS[case.act](xhat * case.broadcast(inputs.weight) + bias)


@pytest.mark.parametrize("norm", NORMS)
def test_third_order(backend: Setup, norm: str) -> None:
    """The third derivative along fixed directions."""
    case = case_of(norm, act="silu", running=False)
    inputs = build(case).to(backend.device)
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(case.shape, dtype=torch.float64, generator=generator).to(backend.device) for _ in range(3)
    ]

    def third(function: Callable[[Case, Inputs], Tensor]) -> Tensor:
        x = inputs.x.clone().requires_grad_()
        value = (function(case, Inputs(**{**vars(inputs), "x": x})) * directions[0]).sum()
        for direction in directions[1:]:
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad * direction).sum()
        return torch.autograd.grad(value, x)[0]

    want = third(plain)
    got = third(lambda c, i: call(c, i, normkern))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * want.abs().max().item())


@pytest.mark.parametrize("norm", NORMS)
def test_create_graph_changes_no_gradient(backend: Setup, norm: str) -> None:
    """The differentiable backward and the plain one are two programs for the same numbers."""
    for act in (None, "silu", "leaky_relu"):
        case = case_of(norm, dtype="float32", act=act, residual="like")
        f, leaves = function_of(case, backend)
        dy = build(case).dy.to(backend.device)
        plain = torch.autograd.grad(f(*leaves.values()), list(leaves.values()), dy)
        graph = torch.autograd.grad(f(*leaves.values()), list(leaves.values()), dy, create_graph=True)
        for name, a, b in zip(leaves, plain, graph, strict=True):
            torch.testing.assert_close(
                a, b.detach(), rtol=1e-5, atol=1e-5 * a.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
            )
            assert b.requires_grad or act is None, name


@pytest.mark.parametrize("norm", NORMS)
def test_any_subset_of_gradients(backend: Setup, norm: str) -> None:
    """Asking for less must give the same numbers for what is asked."""
    case = case_of(norm, dtype="float32", act="gelu", residual="like")
    f, leaves = function_of(case, backend)
    dy = build(case).dy.to(backend.device)
    full = dict(zip(leaves, torch.autograd.grad(f(*leaves.values()), list(leaves.values()), dy), strict=True))
    names = list(leaves)
    for chosen in range(1, 2 ** len(names)):
        wanted = [n for k, n in enumerate(names) if chosen >> k & 1]
        tensors = [leaves[n] if n in wanted else leaves[n].detach() for n in names]
        grads = torch.autograd.grad(f(*tensors), [leaves[n] for n in wanted], dy)
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, full[name], rtol=1e-6, atol=1e-6)
    assert not f(*(t.detach() for t in leaves.values())).requires_grad
    with torch.no_grad():
        assert not f(*leaves.values()).requires_grad


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_layout_of_dy(backend: Setup, norm: str, layout: str) -> None:
    """dy may be laid out in any way, whatever the layout of x; the truth is that of both contiguous."""
    case = case_of(norm, dtype="float32", act="silu")
    f, leaves = function_of(case, backend)
    values = build(case).dy

    def gradients(dy: Tensor | None) -> tuple[Tensor, ...]:
        y = f(*leaves.values())
        return torch.autograd.grad(y.sum() if dy is None else y, list(leaves.values()), dy)

    want = gradients(values.to(backend.device))
    want_of_ones = gradients(torch.ones(case.shape, device=backend.device))
    leaves["x"] = in_layout(leaves["x"].detach().cpu(), layout).to(backend.device).requires_grad_()
    for dy_layout in ("contiguous", "channels_last", "sliced", "cropped", "transposed", "swapped", "offset"):
        for a, b in zip(gradients(in_layout(values, dy_layout).to(backend.device)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # .sum() hands down one number, expanded over every dimension.
    for a, b in zip(gradients(None), want_of_ones, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_backward_twice(backend: Setup) -> None:
    f, leaves = function_of(case_of("group", dtype="float32", act="gelu", residual="like"), backend)
    y = f(*leaves.values())
    dy = torch.ones_like(y)
    once = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    again = torch.autograd.grad(y, list(leaves.values()), dy)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, list(leaves.values()), dy)


@pytest.mark.parametrize("name", LEAVES)
def test_changing_a_saved_tensor_raises(backend: Setup, name: str) -> None:
    f, leaves = function_of(case_of("group", dtype="float32", act="gelu", residual="like"), backend)
    tensors = {n: t.clone() for n, t in leaves.items()}
    y = f(*tensors.values())
    tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dresidual_without_activation_is_dy(backend: Setup) -> None:
    f, leaves = function_of(case_of("layer", dtype="bfloat16", residual="like"), backend)
    dy = torch.randn_like(leaves["x"])
    (grad,) = torch.autograd.grad(f(*leaves.values()), leaves["residual"], dy)
    assert torch.equal(grad, dy)


@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_add_norms(backend: Setup, function: str) -> None:
    """Both outputs, and the gradient that reaches x and the residual through both of them."""
    generator = torch.Generator().manual_seed(1)
    x, residual, dy, dsum = (
        torch.randn(5, 3, 33, generator=generator).to(backend.device).requires_grad_() for _ in range(4)
    )
    weight = torch.randn(33, generator=generator).to(backend.device).requires_grad_()
    y, total = getattr(normkern, function)(x, residual, (33,), weight)
    grads = torch.autograd.grad((y, total), (x, residual, weight), (dy, dsum))
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    norm = torch.nn.functional.layer_norm if function == "add_layer_norm" else torch.nn.functional.rms_norm
    eps = 1e-5 if function == "add_layer_norm" else torch.finfo(torch.float32).eps
    want_y = norm(wide[0] + wide[1], (33,), wide[2], eps=eps)
    want = torch.autograd.grad((want_y, wide[0] + wide[1]), wide, (dy.double(), dsum.double()))
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    for a, b in zip((y, *grads), (want_y, *want), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_gradcheck_of_sums(backend: Setup, function: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(3, 4, dtype=torch.float64, generator=generator).to(backend.device) for _ in range(2))
    weight = torch.rand(4, dtype=torch.float64, generator=generator).to(backend.device)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]

    def f(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(normkern, function)(x, residual, (4,), weight, eps=1e-2)

    assert gradcheck(f, leaves, fast_mode=backend.simulated)
    assert gradgradcheck(f, leaves, fast_mode=True)
    given = residual.detach(), x.detach().cos()
    plain = torch.autograd.grad(f(*leaves), leaves, given)
    torch.testing.assert_close(torch.autograd.grad(f(*leaves), leaves, given, create_graph=True), plain)
    (twice,) = torch.autograd.grad(f(x, x, weight)[0].square().sum(), x)
    (once,) = torch.autograd.grad(f(x, x.detach(), weight)[0].square().sum(), x)
    torch.testing.assert_close(twice, 2 * once)
    y, total = f(x.detach(), residual.detach(), weight)
    assert (y.requires_grad, total.requires_grad) == (True, False)


def test_moments_are_differentiable(backend: Setup) -> None:
    x = (
        torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        .to(backend.device)
        .requires_grad_()
    )
    assert gradcheck(lambda t: normkern.moments(t, (0, 2)), x, fast_mode=True)
    assert gradgradcheck(lambda t: normkern.moments(t, (0, 2)), x, fast_mode=True)
