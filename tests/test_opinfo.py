# torch's own samples for the five norms (OpInfo: what torch promises its users), against float64.
from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SETUPS, Setup
from reference import half_ulp
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

import normkern

NAMES = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")
OPS = {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.removeprefix("nn.functional.") in NAMES}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def to(value: Any, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(to(v, dtype, device) for v in value)
    return {k: to(v, dtype, device) for k, v in value.items()} if isinstance(value, dict) else value


def running_stats(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """batch_norm's samples pass them by position, instance_norm's by name."""
    found = [*args[:2], kwargs.get("running_mean"), kwargs.get("running_var")]
    return [t for t in found if isinstance(t, Tensor)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_samples(backend: Setup, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op, ours = OPS[name], getattr(normkern, name)
    samples = [*op.sample_inputs("cpu", dtype), *op.reference_inputs("cpu", dtype)]
    assert len(samples) >= 12
    if backend.simulated:
        samples = samples[::4]
    for sample in samples:
        if name == "rms_norm" and sample.kwargs.get("eps") is None:
            # eps=None means the epsilon of the dtype that torch computes in: say it, before widening the reference.
            eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
            wide_kwargs = {**to(sample.kwargs, torch.float64), "eps": eps}
        else:
            wide_kwargs = to(sample.kwargs, torch.float64)
        wide_args = to(sample.args, torch.float64)
        want = op.op(to(sample.input, torch.float64), *wide_args, **wide_kwargs)
        args, kwargs = to(sample.args, device=backend.device), to(sample.kwargs, device=backend.device)
        got = ours(to(sample.input, device=backend.device), *args, **kwargs)
        assert got.dtype == dtype
        assert got.shape == want.shape
        error = (got.cpu().double() - want).abs() - half_ulp(want, dtype)
        scale = 1 + want.abs()
        assert (error <= TOLERANCE[dtype] * scale).all(), f"{sample}: {error.max():.3g}"
        if name in ("batch_norm", "instance_norm"):
            stats = zip(running_stats(args, kwargs), running_stats(wide_args, wide_kwargs), strict=True)
            for ours_after, after in stats:
                error = (ours_after.cpu().double() - after).abs() - half_ulp(after, dtype)
                assert (error <= TOLERANCE[dtype] * (1 + after.abs())).all(), f"{sample}: running statistics"


@pytest.mark.parametrize("name", ["group_norm", "rms_norm"])
def test_error_inputs(backend: Setup, name: str) -> None:
    """The calls that torch lists as errors raise the same type here."""
    errors = list(OPS[name].error_inputs("cpu"))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type):
            getattr(normkern, name)(
                to(sample.input, device=backend.device), *to(sample.args, device=backend.device), **sample.kwargs
            )


def differentiable(sample: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a sample that want gradients, and a function that puts others in their places."""
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]

    def call(f: Any, *leaves: Tensor) -> Any:
        # Running statistics are fresh for every call: what is measured is a function.
        values = [t.clone() if isinstance(t, Tensor) and i not in places else t for i, t in enumerate(flat)]
        for place, leaf in zip(places, leaves, strict=True):
            values[place] = leaf
        x, args, kwargs = tree_unflatten(values, spec)
        return f(x, *args, **kwargs)

    return [flat[i] for i in places], call


# Other backends' first derivatives are held against float64 by test_norms; higher ones are eager's everywhere.
@pytest.mark.parametrize("runs_on", [s.name for s in SETUPS if s.name in ("native", "eager") and not s.missing])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(runs_on: str, name: str) -> None:
    """As torch's own suite checks it: forward AD, batched gradients, second derivatives, forward over reverse."""
    torch.manual_seed(0)
    ours = getattr(normkern, name)
    count = 0
    for sample in OPS[name].sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves, call = differentiable(sample)

        def f(*tensors: Tensor, call: Any = call) -> Tensor:
            return call(ours, *tensors)  # type: ignore[no-any-return]

        checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        with normkern.use_backend(runs_on):
            assert gradcheck(f, leaves, fast_mode=True, **checks)  # type: ignore[arg-type]
            assert gradgradcheck(f, leaves, fast_mode=True, check_batched_grad=True, check_fwd_over_rev=True)
        count += 1
    assert count >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_running_statistics_of_half_instances(dtype: torch.dtype) -> None:
    """Where torch itself misses a float64 reference: it averages the moments of samples in half precision. Ours are
    within half an ulp of the reference, torch's of the same call are not."""
    op = OPS["instance_norm"]
    torch.manual_seed(0)
    missed = checked = 0
    for sample in [*op.sample_inputs("cpu", dtype), *op.reference_inputs("cpu", dtype)]:
        if not running_stats(sample.args, sample.kwargs):
            continue
        results = []
        for function, wide in ((op.op, True), (normkern.instance_norm, False), (op.op, False)):
            target = torch.float64 if wide else dtype
            args, kwargs = to(sample.args, target), to(sample.kwargs, target)
            function(to(sample.input, target), *args, **kwargs)
            results.append(running_stats(args, kwargs))
        for want, ours, theirs in zip(*results, strict=True):
            bound = half_ulp(want, dtype) + 2e-6 * (1 + want.abs())
            assert ((ours.double() - want).abs() <= bound).all()
            missed += int(((theirs.double() - want).abs() > bound).any())
            checked += 1
    assert checked > 0
    assert missed > 0
