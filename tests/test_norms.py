# The table of cases on every backend: values, gradients and running statistics within their bounds, dtypes, layouts.
from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ACTIVATIONS, ADDED, NORMS, Case, Inputs, build, call, smoke
from conftest import SETUPS, USED, Setup
from reference import Expected, compare, expected, inputs_for
from torch import Tensor

import normkern

LEAVES = ("x", "weight", "bias", "residual")


def run(case: Case, inputs: Inputs, functions: Any = normkern) -> dict[str, Tensor]:
    """Forward and backward through public functions; leaves `inputs` alone, running statistics excepted."""
    leaves = Inputs(**vars(inputs))
    wanted = {"dx": "x", "dweight": "weight", "dbias": "bias", "dresidual": "residual"}
    wanted = {grad: name for grad, name in wanted.items() if getattr(inputs, name) is not None}
    for name in wanted.values():
        setattr(leaves, name, getattr(inputs, name).detach().requires_grad_())
    y = call(case, leaves, functions)
    # autograd.grad, not backward(): a leaf's .grad may be copied into another layout.
    grads = torch.autograd.grad(y, [getattr(leaves, name) for name in wanted.values()], inputs.dy)
    got = {"y": y, **dict(zip(wanted, grads, strict=True))}
    if inputs.running_mean is not None and case.training:
        got |= {"running_mean": inputs.running_mean, "running_var": inputs.running_var}
    return got


def strides(t: Tensor) -> list[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def check(case: Case, backend: Setup) -> None:
    inputs = inputs_for(case)
    want = expected(case, inputs)
    moved = inputs.to(backend.device)
    before = {name: (t, t.clone(), t._version) for name, t in vars(moved).items() if t is not None}
    got = run(case, moved)

    for name, value in want.items():
        used = compare(name, got[name], value, case)
        key = (str(backend), case.dtype, name)
        USED[key] = max(USED[key], used)
    for name in ("y", "dx", "dresidual"):
        if name in got and case.dense and case.numel:
            # What belongs to x is laid out as x is; a residual in another layout has its gradient in either.
            allowed = [strides(moved.x)] + ([strides(moved.residual)] if name == "dresidual" else [])
            assert strides(got[name]) in allowed, f"{name} has strides {got[name].stride()}, x {moved.x.stride()}"
    for name, (tensor, value, version) in before.items():
        if name.startswith("running") and case.training:
            continue
        assert tensor._version == version, f"{name} was written to"
        assert torch.equal(tensor, value), f"{name} has changed"


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_backend_is_there(setup: Setup) -> None:
    """All other tests run on the backends that are there; this one shows which are not."""
    if setup.missing:
        pytest.skip(setup.missing)


def test_table(backend: Setup, case: Case) -> None:
    check(case, backend)


@pytest.mark.parametrize("norm", NORMS)
def test_every_dtype_and_layout(backend: Setup, norm: str) -> None:
    """A plain case in each combination: the sampled table of the slow backends cannot hold a hole here."""
    for case in smoke():
        if case.norm == norm:
            for dtype in ("float32", "float16", "bfloat16", "float64"):
                check(Case(**{**vars(case), "dtype": dtype}), backend)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(backend: Setup, act: str | None) -> None:
    for residual in (None, "like"):
        for training in (True, False):
            check(Case("batch", (3, 5, 4, 7), act=act, residual=residual, training=training), backend)


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_added(backend: Setup, case: Case) -> None:
    """The norm of a sum is that of the table; the sum is torch's to the last bit; the gradient of either output alone,
    and of both at once with one rounding where one launch makes it."""
    inputs = build(case)
    assert inputs.residual is not None
    dtotal = torch.randn(case.shape, generator=torch.Generator().manual_seed(7)).to(case.torch_dtype)
    alone = Case(**{**vars(case), "residual": None})
    total = inputs.x + inputs.residual
    want = expected(alone, Inputs(**{**vars(inputs), "x": total, "residual": None}))
    moved = inputs.to(backend.device)
    leaves = {n: getattr(moved, n).detach().requires_grad_() for n in LEAVES if getattr(moved, n) is not None}
    leaf = Inputs(**{**vars(moved), **leaves})
    parameters = {"weight": leaf.weight, "eps": case.eps}
    if case.norm == "layer":
        y, got_total = normkern.add_layer_norm(leaf.x, leaf.residual, case.param_shape, bias=leaf.bias, **parameters)
    else:
        y, got_total = normkern.add_rms_norm(leaf.x, leaf.residual, case.param_shape, **parameters)
    compare("y", y, want["y"], case)
    assert got_total.dtype == total.dtype
    assert torch.equal(got_total.detach().cpu(), total)
    if case.dense and case.numel:
        assert strides(y) == strides(got_total) == strides(moved.x)

    one_launch = case.residual == "like" and case.dense
    through = want["dx"].value
    past = {"y": None, "total": dtotal.to(backend.device), "both": dtotal.to(backend.device)}
    for outputs, dsum in past.items():
        pairs = [(y, moved.dy)] * (outputs != "total") + [(got_total, dsum)] * (outputs != "y")
        grads = torch.autograd.grad(
            [p[0] for p in pairs], list(leaves.values()), [p[1] for p in pairs], retain_graph=True, allow_unused=True
        )
        got = dict(zip(leaves, grads, strict=True))
        if outputs == "total":
            assert torch.equal(got["x"].cpu(), dtotal)
            assert torch.equal(got["residual"].cpu(), dtotal)
            assert got.get("weight") is None or not got["weight"].any()
            continue
        dx = want["dx"]
        if outputs == "both":
            scale = dx.scale + dtotal.double().abs()
            if not one_launch:
                scale = scale + through.abs() * torch.finfo(case.torch_dtype).eps / dx.unit
            dx = Expected(through + dtotal.double(), scale, dx.unit, dx.dtype, one_launch)
        compare("dx", got["x"], dx, case)
        compare("dresidual", got["residual"], dx, case)
        for name in ("weight", "bias"):
            if name in got:
                compare(f"d{name}", got[name], want[f"d{name}"], case)


@pytest.mark.parametrize("act", [None, "silu"])
def test_saved_for_backward(backend: Setup, act: str | None) -> None:
    """Only x and the moments are kept, half of what a norm and an activation keep as two functions; and the residual
    where the derivative of an activation needs it."""
    x, residual = (torch.randn(2, 8, 16, 16, device=backend.device, requires_grad=True) for _ in range(2))
    weight = torch.ones(8, device=backend.device, requires_grad=True)
    for added, kept in ((None, [x]), (residual, [x] if act is None else [x, residual])):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            normkern.group_norm(x, 4, weight, weight, act=act, residual=added)
        large = [t.data_ptr() for t in saved if t.numel() >= x.numel()]
        assert large == [t.data_ptr() for t in kept]
