# SAM's perturbation over many tensors, by every kernel, against its formulas in float64 on the same rounded inputs.
from __future__ import annotations

from typing import Any

import paper_sam
import pytest
import torch
from ascents import ASCENTS, ascending
from torch import Tensor, nn

from normkern.backends import BACKENDS, use_backend
from normkern.optim import ascent
from normkern.optim.ascent import Member, Rule, perturb

KERNELS = ASCENTS[1:]
NATIVE = pytest.mark.skipif(BACKENDS["native"].why_not(torch.empty(1)) is not None, reason="not built")
RULES = [Rule(p, t, 0.4) for p in (2, "inf") for t in ("none", "element", "layer", "fisher")]  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def member(weight: Tensor, grad: Tensor, rho: float = 0.3, transformed: bool = True) -> Member:
    return Member(weight, grad, rho, transformed, weight.numel())


def mixture() -> list[Member]:
    """Every dtype, odd and even sizes, one element and none, several pieces, buffers that begin anywhere, images in
    channels-last order, gradients wider and narrower than their weights, two radii, some without T."""
    members = []
    shapes = [(3,), (0,), (1,), (), (64,), (1000,), (7, 33), (4097,), (2, 3, 5, 4)]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    for i, shape in enumerate(shapes * 4):
        dtype = dtypes[(i + i // len(shapes)) % 4]
        grad_dtype = dtypes[(i + 1) % 4] if i % 5 == 4 else dtype
        weight, grad = normal(*shape, seed=i, dtype=dtype), normal(*shape, seed=i + 99, dtype=grad_dtype)
        if len(shape) == 4:
            weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (weight, grad))
        if len(shape) == 1 and i % 3 == 0:  # not on a boundary of 16 bytes
            weight, grad = (torch.cat((t[:1], t)).narrow(0, 1, len(t)) if len(t) else t for t in (weight, grad))
        members.append(member(weight, grad, 0.3 if i % 2 else 0.7, i % 4 != 1))
    return members


def copied(members: list[Member]) -> list[Member]:
    return [Member(m.weight.clone(), m.grad, m.rho, m.transformed, m.numel) for m in members]


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in tensors]


def exact(members: list[Member], rule: Rule, grad_scale: float = 1.0) -> list[Tensor]:
    """The perturbed weights, float64."""
    pairs = [(m.weight.double(), m.grad.double() / grad_scale) for m in members]
    kinds = [rule.transform if m.transformed else "none" for m in members]
    factors = [paper_sam.transform_of(kind, w, g, rule.eta) for kind, (w, g) in zip(kinds, pairs, strict=True)]
    norm = torch.stack([(t * g).square().sum() for t, (_, g) in zip(factors, pairs, strict=True)]).sum().sqrt()
    found = []
    for m, t, (w, g) in zip(members, factors, pairs, strict=True):
        e = t * t * g / (norm + 1e-16) if rule.p == 2 else t * g.sign()
        found.append(w + m.rho * e)
    return found


def assert_near(members: list[Member], expected: list[Tensor], before: list[Member], ulps: dict[int, float]) -> None:
    """Within so many units of the last place, by the bytes of an element, of the larger of w and w + e."""
    for i, (m, y, old) in enumerate(zip(members, expected, before, strict=True)):
        scale = torch.maximum(y.abs(), old.weight.double().abs())
        bound = ulps[m.weight.element_size()] * torch.finfo(m.weight.dtype).eps * scale
        error = (m.weight.double() - y).abs()
        assert bool((error <= bound).all()), f"tensor {i}, {m.weight.dtype} {tuple(m.weight.shape)}: {error.max()}"


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("how", ASCENTS)
def test_mixed_tensors(how: str, rule: Rule) -> None:
    """The kernels compute in float64 and round once, or for 16 bits on the CPU twice. Plain PyTorch has up to six
    roundings in float32, and the norm has them too."""
    before = mixture()
    members = copied(before)
    with ascending(how):
        weights, copies = perturb(members, rule, 2.0 if rule.transform == "fisher" else 1.0)
    assert all(w is m.weight for w, m in zip(weights, members, strict=True))
    assert bits(copies) == bits([m.weight for m in before])
    expected = exact(before, rule, 2.0 if rule.transform == "fisher" else 1.0)
    # float64 sums of 20 thousand terms in another order: the norm is some 30 units away at most.
    ulps = {2: 1, 4: 8, 8: 8 * 2.0**29} if how == "eager" else {2: 1, 4: 0.51, 8: 64}
    assert_near(members, expected, before, ulps)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("how", ASCENTS)
def test_extreme_gradients(how: str, scale: float) -> None:
    """Neither sum of squares can be held in float32. From w = 0 the step itself is seen."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        before = [member(torch.zeros(50, dtype=dtype), normal(50, seed=i).mul(scale).to(dtype)) for i in range(3)]
        members = copied(before)
        with ascending(how):
            perturb(members, RULES[0])
        expected = exact(before, RULES[0])
        # 1e-30 against the 1e-16 of the formula: steps of 1e-15 that are not lost.
        assert all(float(y.abs().max()) > 1e-16 for y in expected)
        assert_near(members, expected, before, {2: 1, 4: 4, 8: 16})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("how", ASCENTS)
def test_a_gradient_that_is_not_finite_moves_nothing(how: str, rule: Rule, bad: float) -> None:
    for place in (0, 1):
        before = [member(normal(n, seed=n, dtype=torch.bfloat16), normal(n, dtype=torch.bfloat16)) for n in (70, 3)]
        before[place].grad[-1] = bad
        members = copied(before)
        with ascending(how):
            _, copies = perturb(members, rule)
        assert bits([m.weight for m in members]) == bits(copies) == bits([m.weight for m in before])


@pytest.mark.parametrize("how", KERNELS)
def test_copies_keep_every_bit(how: str) -> None:
    """Also of NaNs, whose bits arithmetic would change."""
    patterns = torch.tensor([0x7F800001, -1, 0x7FC12345, 0x00000001, -0x80000000, 0x3F800000], dtype=torch.int32)
    for rule in (RULES[0], RULES[1]):
        weights = [patterns.repeat(3).view(dtype).clone() for dtype in (torch.float32, torch.bfloat16, torch.float64)]
        before = bits(weights)
        with ascending(how):
            _, copies = perturb([member(w, torch.ones_like(w)) for w in weights], rule)
        assert bits(copies) == before


@pytest.mark.parametrize("rule", RULES[1:3], ids=str)
@pytest.mark.parametrize(("how", "count"), [("native", 3000), ("emulated", 200)])
def test_thousands_of_tiny_tensors(how: str, count: int, rule: Rule) -> None:
    before = [
        member(normal(i % 6, seed=i, dtype=torch.float32), normal(i % 6, seed=-i, dtype=torch.float32), 0.1 + i % 7)
        for i in range(count)
    ]
    members = copied(before)
    with ascending(how):
        perturb(members, rule)
    assert_near(members, exact(before, rule), before, {4: 0.51})


def test_threads_do_not_matter() -> None:
    """The sums are cut by size, not by threads."""
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            members = [member(normal(n, seed=n, dtype=torch.float32), normal(n)) for n in (5, 300_000, 40_000)]
            with ascending("native"):
                perturb(members, RULES[2])
            found.append(bits([m.weight for m in members]))
    finally:
        torch.set_num_threads(threads)
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize("rule", [RULES[2], RULES[5]], ids=str)
def test_schedules_do_not_matter(rule: Rule) -> None:
    """Blocks and threads in any order, on a chip that holds them together and on one that does not."""
    found = []
    for options in ({"seed": 0}, {"seed": 1}, {"seed": 5}, {"seed": 6}, {"seed": 7}, {"busy": 2}):
        members = copied(mixture())
        with ascending("emulated", **options):
            perturb(members, rule)
        found.append(bits([m.weight for m in members]))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("sms", [1, 7])
def test_chips(sms: int) -> None:
    """Several pieces to a block, and pieces of another size."""
    before = mixture()
    members = copied(before)
    with ascending("emulated", sms=sms):
        perturb(members, RULES[2])
    assert_near(members, exact(before, RULES[2]), before, {2: 1, 4: 0.51, 8: 64})


@NATIVE
def test_what_the_kernel_leaves_to_plain_pytorch() -> None:
    class Wrapped(Tensor):
        pass

    plain, grid = normal(4, 5), normal(4, 5)
    for other in (
        member(plain.clone(), grid.t().contiguous().t()),  # another order in memory
        member(normal(4, 9)[:, ::2], grid),  # with holes
        member(plain.clone().as_subclass(Wrapped), grid),
        member(plain.clone(), grid.to(torch.complex128)),
        member(plain.to("meta"), grid.to("meta")),
        Member(plain.clone(), grid, 0.3, True, 20, holders=(object(),)),  # type: ignore[arg-type]
    ):
        assert ascent.kernel_of([member(plain, grid), other]) is None
    assert ascent.kernel_of([member(plain, grid), member(grid, plain)]) is ascent.KERNELS["native"]
    with use_backend("eager"):
        assert ascent.kernel_of([member(plain, grid)]) is None
    before = [member(plain, grid.t().contiguous().t()), member(normal(4, 9)[:, ::2], grid)]
    members = [member(plain.clone(), before[0].grad), member(normal(4, 9)[:, ::2], grid)]
    perturb(members, RULES[1])
    assert_near(members, exact(before, RULES[1]), before, {8: 64})


@NATIVE
def test_errors_come_before_the_first_change() -> None:
    weights = [normal(4), normal(5)]
    before = bits(weights)

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "weights": weights, "copies": [torch.empty_like(w) for w in weights], "grads": [normal(4), normal(5)],
            "rho": [0.1, 0.1], "transformed": [1, 1], "transform": 0, "maximum": False, "eta": 0.0, "grad_scale": 1.0,
        }  # fmt: skip
        torch.ops.normkern.perturb_(*(arguments | changes).values())

    with torch.no_grad():
        for changes, message in (
            ({"grads": [normal(4)]}, "as many copies, grads"),
            ({"rho": [0.1]}, "as many copies, grads"),
            ({"grads": [normal(4), normal(6)]}, "grad must have its weight's sizes"),
            ({"grads": [normal(4), normal(10)[::2]]}, "grad must have its weight's sizes and strides"),
            ({"copies": [normal(4), normal(5).float()]}, "copy must have its weight's dtype"),
            ({"weights": [weights[0], normal(10)[::2]]}, "dense"),
            ({"grads": [normal(4), torch.ones(5, dtype=torch.int64)]}, "grad must be float64"),
            ({"transform": 4}, "transform must be 0 to 3"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(**changes)
        assert bits(weights) == before
        call()
    assert bits(weights) != before


def test_autograd_sees_the_change() -> None:
    norm = nn.LayerNorm(3)
    loss = (norm(normal(2, 3).float()) * norm.weight).square().sum()
    norm.weight.grad = torch.ones(3)
    with torch.no_grad(), ascending("native"):
        perturb([member(norm.weight, norm.weight.grad)], RULES[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
