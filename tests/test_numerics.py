# The numerics contract: no error that grows with the mean, exact results where exactness is possible, nan and inf
# where torch has them and nowhere else, the range of magnitudes, and how results spread over units in the last place.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import NORMS, Case, Inputs, build, call, in_layout
from conftest import Setup
from reference import compare, expected, first, half_ulp, moments, relative_error
from test_norms import run
from torch import Tensor

import normkern
from normkern.backends import BACKENDS

OFFSETS = (0.0, 10.0, 100.0, 1e3, 1e4)
LAYOUTS = ("contiguous", "channels_last")


def case_of(norm: str, layout: str = "contiguous", dtype: str = "float32", **options: object) -> Case:
    """A shape with a few hundred elements in every group, in any layout."""
    shape = (16, 6, 5, 7) if norm == "batch" else (3, 8, 12, 11)
    dims = 3 if norm in ("layer", "rms") and layout == "contiguous" else 2
    params = "w" if norm == "rms" else "wb"
    return Case(norm, shape, groups=2, dims=dims, layout=layout, dtype=dtype, **{"params": params, **options})  # type: ignore[arg-type]


def with_x(case: Case, values: Tensor) -> Inputs:
    inputs = build(case)
    inputs.x = in_layout(values.to(case.torch_dtype), case.layout)
    return inputs


def on(inputs: Inputs, backend: Setup) -> Inputs:
    return inputs.to(backend.device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_error_is_flat_in_the_offset(backend: Setup, norm: str, layout: str) -> None:
    """At mean/std up to 1e4 no error is more than twice that at 0, on the average of a few draws: gradients of weights
    are six numbers here, and one draw may be luckier than another."""
    case = case_of(norm, layout)
    seeds = range(1 if backend.simulated else 6)
    base: dict[str, float] = {}
    for offset in OFFSETS:
        errors: dict[str, list[float]] = {}
        for seed in seeds:
            noise = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            inputs = with_x(case, noise + offset)
            want = expected(case, inputs)
            got = run(case, on(inputs, backend))
            for name in ("y", "dx", "dweight", "dbias"):
                if name in want:
                    errors.setdefault(name, []).append(relative_error(got[name].cpu(), want[name].value))
        for name, found in errors.items():
            error = sum(found) / len(found)
            # The same in the float32 sums of the GPU kernels, of which there is a single draw.
            lucky = name in ("dweight", "dbias") and (backend.simulated or backend.device != "cpu")
            limit = 2 * base.setdefault(name, error) + (2**-22 if lucky else 1e-8)
            assert error <= limit, f"{name} at offset {offset}: {error:.2e}, at 0: {base[name]:.2e}"
            assert base[name] <= 3e-7


def test_group_norm_channels_last_at_1000(backend: Setup) -> None:
    """The case that torch 2.13 gets wrong by a factor of 160."""
    case = Case("group", (2, 64, 14, 14), groups=32, layout="channels_last", params="")
    noise = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = with_x(case, noise + 1000)
    want = expected(case, inputs)["y"].value
    got = run(case, on(inputs, backend))["y"].cpu()
    assert relative_error(got, want) <= 1e-6
    assert relative_error(call(case, inputs), want) > 1e-3, (
        "torch has mended its channels-last group norm: tell the README"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance"])
def test_constant_groups_are_exact(backend: Setup, norm: str, dtype: str) -> None:
    """x - mean is exactly 0 whatever the constant and the count, so y is the bias bit for bit."""
    for layout in LAYOUTS:
        for value in (0.1, -7.7, 1e4 / 3):
            case = case_of(norm, layout, dtype)
            inputs = with_x(case, torch.full(case.shape, value, dtype=torch.float64))
            y = call(case, on(inputs, backend), normkern).cpu()
            assert inputs.bias is not None
            bias = case.broadcast(inputs.bias).expand_as(y)
            assert torch.equal(y, bias), f"{layout}, {value}"


def test_constant_moments_are_exact(backend: Setup) -> None:
    for count in (1, 3, 7, 49, 193, 1000):
        x = torch.full((3, count), 0.1, device=backend.device)
        mean, var = normkern.moments(x, 1)
        assert torch.equal(var, torch.zeros_like(var)), count
        assert torch.equal(mean, x[:, 0]), count


def test_moments(backend: Setup) -> None:
    """Mean to float32's last place at any offset, variance of an offset group to a few units."""
    g = torch.Generator().manual_seed(2)
    for shape, dim in (((5, 193), (1,)), ((2, 6, 9, 7), (0, 2, 3)), ((2, 6, 9, 7), (2, 3)), ((4, 3, 50), (1, 2))):
        x = (torch.randn(shape, dtype=torch.float64, generator=g) + 1e4).float()
        mean, var = (t.cpu() for t in normkern.moments(x.to(backend.device), dim))
        want_mean = x.double().mean(dim)
        assert mean.dtype == torch.float32
        assert (mean.double() - want_mean).abs().max() <= 1e4 * 2**-24
        torch.testing.assert_close(var.double(), x.double().var(dim, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "norm", ["group", "layer"]
)  # torch refuses eps=0 in batch norm, and returns 0 in instance norm
def test_zero_eps_on_a_constant_group_is_nan_as_in_torch(backend: Setup, norm: str) -> None:
    case = case_of(norm, eps=0.0)
    x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = case.grouped(x).clone()
    rows[0] = 2.0
    inputs = with_x(case, case.ungrouped(rows))
    y = case.grouped(call(case, on(inputs, backend), normkern).cpu())
    assert torch.equal(y.isnan(), case.grouped(call(case, inputs)).isnan())
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_poison_stays_in_its_group(backend: Setup, norm: str, layout: str, poison: float) -> None:
    """One bad element spoils its group and the weights it meets, as in torch, and nothing else."""
    case = case_of(norm, layout)
    x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rows = case.grouped(x).clone()
    rows[1, 5] = poison
    inputs = with_x(case, case.ungrouped(rows))
    stock = run(case, Inputs(**{k: v if v is None else v.double() for k, v in vars(inputs).items()}), F)
    want = expected(case, inputs)
    got = run(case, on(inputs, backend))
    if "running_mean" in want:
        # Torch's running mean after an inf is inf on CPUs and nan on GPUs, where sums go through differences, as here.
        for found in (stock, got):
            found["running_mean"] = found["running_mean"].where(found["running_mean"].isfinite(), torch.nan)
        want["running_mean"].value.masked_fill_(~want["running_mean"].value.isfinite(), torch.nan)
    for name, theirs in stock.items():
        other = got[name].cpu().isnan() != theirs.isnan()
        assert not other.any(), f"{name}: not nan where torch is, or the reverse, e.g. at {first(other)}"
    for name, value in want.items():
        compare(name, got[name], value, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_poison_with_given_statistics_counts_once(backend: Setup, layout: str) -> None:
    """Where no statistic turns nan, an infinity reaches the weight gradient of its channel as one: at ends of runs and
    of lines that are no whole accesses too."""
    shape = (2, 6, 7, 7) if layout == "contiguous" else (8, 67, 2, 2)
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    x.view(shape[0], shape[1], -1)[1, ::5, -3:] = float("inf")
    dy = dy.abs()
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])

    def weight_gradient(batch_norm: Any, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        given = [t.to(device, dtype) for t in (*statistics, torch.ones(shape[1]), torch.zeros(shape[1]))]
        weight = given[2].requires_grad_()
        y = batch_norm(in_layout(x.to(device, dtype), layout), *given)
        (gradient,) = torch.autograd.grad(y, weight, in_layout(dy.to(device, dtype), layout))
        return gradient.cpu().double()

    want = weight_gradient(F.batch_norm, "cpu", torch.float64)
    assert want[::5].isposinf().all()
    torch.testing.assert_close(
        weight_gradient(normkern.functional.batch_norm, backend.device, torch.float32), want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("norm", NORMS)
def test_an_outlier_comes_first(backend: Setup, norm: str) -> None:
    """Sums around the first value must not lose the others when that one is far away."""
    for layout in LAYOUTS:
        case = case_of(norm, layout)
        rows = case.grouped(torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
        rows = rows.clone()
        rows[:, 0] = 300.0
        inputs = with_x(case, case.ungrouped(rows))
        want = expected(case, inputs)
        got = run(case, on(inputs, backend))
        for name, value in want.items():
            compare(name, got[name], value, f"{case} with an outlier")


# The largest |x| whose squares are still summed without overflow. Float64 statistics have all of float32's range; the
# CUDA kernels square in float32.
LARGEST = {
    "float32": {"eager": 1e38, "native": 1e37, "emulated": 1e17},
    "bfloat16": {"eager": 1e38, "native": 1e37, "emulated": 1e17},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_largest_magnitudes(backend: Setup, norm: str, dtype: str) -> None:
    # Like the CUDA kernels, the Triton kernels square in float32.
    gpu = backend.emulated or backend.name.startswith("triton") or backend.device == "cuda"
    kind = "emulated" if gpu else backend.name
    size = 6e4 if dtype == "float16" else LARGEST[dtype][kind]
    for layout in LAYOUTS:
        case = case_of(norm, layout, dtype, params="")
        x = torch.rand(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2 - 1
        inputs = with_x(case, x * size)
        compare("y", call(case, on(inputs, backend), normkern), expected(case, inputs)["y"], case)


@pytest.mark.parametrize("norm", NORMS)
def test_smallest_magnitudes(backend: Setup, norm: str) -> None:
    """Without eps a group of size 1e-15 (variance 1e-30) is normalized like any other."""
    case = case_of(norm, params="", eps=1e-36)  # batch norm refuses 0
    x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    inputs = with_x(case, x * 1e-15)
    compare("y", call(case, on(inputs, backend), normkern), expected(case, inputs)["y"], case)


@pytest.mark.parametrize("norm", NORMS)
def test_units_in_the_last_place(backend: Setup, norm: str) -> None:
    """Most float32 results are the correctly rounded ones or their neighbours."""
    case = case_of(norm, params="")
    x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    inputs = with_x(case, x)
    want = expected(case, inputs)["y"].value
    ulps = (call(case, on(inputs, backend), normkern).cpu().double() - want).abs() / (2 * half_ulp(want, torch.float32))
    ulps = ulps[want.abs() > 0.1]  # nearer to 0 the last place says nothing
    # Three roundings in float32: x - mean, rstd, their product; a GPU's rstd has an error of its own.
    cpu = backend.name in ("native", "eager")
    assert (ulps <= 1).double().mean() >= (0.75 if cpu else 0.7)
    assert ulps.max() <= (4 if cpu else 5)


@pytest.mark.skipif(BACKENDS["native"].why_not(torch.empty(1)) is not None, reason="the compiled library is not there")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "group", "instance", "layer"])
def test_last_places_near_zero(norm: str, layout: str) -> None:
    """On the CPU the smallest float32 results, too, are within 4 units in their last place: the mean is good to more
    than float32, since values are summed in float64."""
    x = torch.randn(8, 64, 28, 28, generator=torch.Generator().manual_seed(9)) * 3 + 0.1
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "batch": lambda functions, t: functions.batch_norm(t, None, None, training=True),
        "group": lambda functions, t: functions.group_norm(t, 32),
        "instance": lambda functions, t: functions.instance_norm(t),
        "layer": lambda functions, t: functions.layer_norm(t.permute(0, 2, 3, 1), (64,)),
    }
    with normkern.use_backend("native"):
        y = calls[norm](normkern, x)
    want = calls[norm](F, x.double())
    assert want.abs().min() < 1e-5
    assert ((y.double() - want).abs() / (2 * half_ulp(want, torch.float32))).max() <= 4


def test_reference_moments() -> None:
    """The oracle itself, against exact rational arithmetic."""
    from fractions import Fraction

    x = (torch.randn(1, 501, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) + 1e4).float().double()
    values = [Fraction(v) for v in x[0].tolist()]
    mean = sum(values) / len(values)
    var = sum((v - mean) ** 2 for v in values) / len(values)
    got_mean, got_var = moments(x)
    assert abs(Fraction(got_mean.item()) - mean) <= 1e4 * 2.0**-53
    assert abs(Fraction(got_var.item()) / var - 1) <= 1e-14
