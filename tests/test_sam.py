# normkern.optim.SAM against the paper's formulas, its saving, and everything a training loop does with an optimizer.
from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import paper_sam
import pytest
import torch
import torch.nn.functional as F
from ascents import ASCENTS, ascending
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkern
from normkern.optim import SAM


class Net(nn.Module):
    """Batch, group, layer and RMS norm, a convolution, linear layers and a parameter that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.one = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.two = normkern.nn.GroupNorm(2, 4)
        self.shift = nn.Parameter(torch.full((4,), 0.1))
        self.tail = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.one(self.conv(x)))
        y = F.silu(self.two(self.conv2(y)))
        return self.tail(y.mean((2, 3)) + self.shift)  # type: ignore[no-any-return]


NORMS = [f"{name}.{kind}" for name in ("one", "two", "tail.0") for kind in ("weight", "bias")] + ["tail.2.weight"]


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    model = Net().to(dtype)
    with torch.no_grad():
        for name in NORMS:
            model.get_parameter(name).add_(0.3 * torch.randn_like(model.get_parameter(name)))
    return model


def batch(dtype: torch.dtype = torch.float64, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 5, 5, generator=generator, dtype=dtype), torch.arange(8) % 3


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, **options)


def closure_of(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 0.0) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def first_gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


# ---- the algorithm


# The checked emulator takes a second for a step of one of the larger sets.
PERTURBED = [
    pytest.param(how, perturb, marks=pytest.mark.slow if how == "emulated" and perturb != "norm" else ())
    for how in ASCENTS
    for perturb in ("norm", "no_norm", "all")
]


@pytest.mark.parametrize(("how", "perturb"), PERTURBED)
@pytest.mark.parametrize("transform", ["none", "element", "layer", "fisher"])
@pytest.mark.parametrize("p", [2, "inf"])
def test_as_the_paper(how: str, p: float | str, transform: Any, perturb: Any) -> None:
    eta = {"none": 0.0, "element": 0.05, "layer": 0.2, "fisher": 3.0}[transform]
    rho = {2: 0.3, "inf": 0.02}[p]  # type: ignore[index]
    normalize_bias = p == 2
    model, theirs = net(), net()
    names = [name for name, _ in model.named_parameters()]
    names = {"norm": NORMS, "no_norm": [n for n in names if n not in NORMS], "all": names}[perturb]
    base = sgd(theirs)
    optimizer = SAM(
        model, sgd(model), rho=rho, p=p, transform=transform, eta=eta, perturb=perturb, normalize_bias=normalize_bias
    )
    for number in range(20):
        x, y = batch(seed=100 + number)
        with ascending(how):
            loss = optimizer.step(closure_of(model, optimizer, x, y))
        expected = paper_sam.step(
            theirs,
            base,
            lambda x=x, y=y: F.cross_entropy(theirs(x), y),  # type: ignore[misc]
            names,
            rho,
            p,
            transform,
            eta,
            normalize_bias,
        )
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-9)
    # Rounding of one step, 1e-16, grows over 20 steps of a network with norms, by a factor of up to 1e4 with these
    # batches (with the seeds from 0 on by 2e5, nearly all of it in the second step).
    assert_same(state(model), state(theirs), 1e-11)


def test_small_rho_is_plain_sgd() -> None:
    model, plain = net(), net()
    optimizer, base = SAM(model, sgd(model), rho=1e-13), sgd(plain)
    for number in range(20):
        x, y = batch(seed=number)
        optimizer.step(closure_of(model, optimizer, x, y))
        closure_of(plain, base, x, y)()
        base.step()
    assert_same(state(model), state(plain), 1e-10)


@pytest.mark.parametrize("perturb", ["norm", "all"])
def test_there_and_back(perturb: Any) -> None:
    """Up by rho exactly, in the perturbed set only, and back bit for bit."""
    model = net(torch.float32)
    before, (x, y) = state(model), batch(torch.float32)
    optimizer = SAM(model, sgd(model), rho=0.7, perturb=perturb)
    with optimizer.first_pass():
        first_gradient(model, x, y)
    optimizer.first_step()
    up = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert abs(float(torch.cat([e.flatten() for e in up.values()]).norm()) - 0.7) < 1e-5
    assert {name for name, e in up.items() if e.abs().max() > 0} == (set(NORMS) if perturb == "norm" else set(up))
    with optimizer.second_pass():
        first_gradient(model, x, y)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_tensors_beside_each_other() -> None:
    """Cut into several runs, the step is the same."""
    ascents = []
    for run in (1 << 24, 7):
        model, (x, y) = net(), batch()
        optimizer = SAM(model, sgd(model), rho=0.5, transform="layer", perturb="all")
        first_gradient(model, x, y)
        with pytest.MonkeyPatch.context() as patch, ascending("eager"):
            patch.setattr("normkern.optim.ascent._RUN", run)
            optimizer.first_step()
        ascents.append(state(model))
    assert_same(*ascents, 1e-14)


def test_loss_is_the_one_before_the_step() -> None:
    model, (x, y) = net(), batch()
    expected = F.cross_entropy(copy.deepcopy(model)(x), y)
    optimizer = SAM(model, sgd(model), rho=0.5)

    def closure() -> dict[str, Any]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss, "count": len(x)}

    result = optimizer.step(closure)
    assert torch.equal(result["loss"], expected)
    assert result["count"] == 8


# ---- the saving


class WeightGradients(TorchDispatchMode):
    """How many convolutions and matrices computed the gradient of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[bool] = []
        self.matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.convolutions.append(args[-1][1])
        self.matrices += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_first_pass_computes_no_other_weight_gradients() -> None:
    model, (x, y) = net(torch.float32), batch(torch.float32)
    optimizer = SAM(model, sgd(model), rho=0.5)
    first, second = WeightGradients(), WeightGradients()
    with optimizer.first_pass(), first:
        first_gradient(model, x, y)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(NORMS)
    assert all(p.requires_grad for p in model.parameters())
    optimizer.first_step()
    with optimizer.second_pass(), second:
        first_gradient(model, x, y)
    # Nothing lies before the first norm but a convolution, which first needs no backward at all.
    assert first.convolutions == [False]
    assert second.convolutions == [True, True]
    assert second.matrices - first.matrices == 2


def test_extra_memory_is_the_perturbed_set() -> None:
    for perturb in ("norm", "all"):
        model, (x, y) = net(torch.float32), batch(torch.float32)
        optimizer = SAM(model, sgd(model), rho=0.5, perturb=perturb)  # type: ignore[arg-type]
        first_gradient(model, x, y)
        held = sum(t.numel() for t in tensors_of(optimizer))
        optimizer.first_step()
        count = sum(p.numel() for n, p in model.named_parameters() if perturb == "all" or n in NORMS)
        assert sum(t.numel() for t in tensors_of(optimizer)) - held == count
        optimizer.restore()
        assert sum(t.numel() for t in tensors_of(optimizer)) == held


def tensors_of(optimizer: SAM) -> list[Tensor]:
    """What the optimizer itself keeps, without parameters."""
    seen: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            return
        if isinstance(value, Tensor):
            seen[id(value)] = value
        elif isinstance(value, dict):
            for item in value.items():
                visit(item)
        elif isinstance(value, list | tuple | set):
            for item in value:
                visit(item)

    visit(vars(optimizer))
    return list(seen.values())


@pytest.mark.parametrize("failing", [0, 1])
def test_a_closure_that_raises_leaves_all_as_it_was(failing: int) -> None:
    model, (x, y) = net(), batch()
    optimizer = SAM(model, sgd(model), rho=0.5)
    model.conv.weight.requires_grad_(False)
    before, calls = state(model), itertools.count()

    def closure() -> Tensor:
        if next(calls) == failing:
            raise KeyError("data")
        return closure_of(model, optimizer, x, y)()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert_same(
        {n: p.detach() for n, p in model.named_parameters()}, {n: before[n] for n, _ in model.named_parameters()}
    )
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.weight"]
    optimizer.step(closure_of(model, optimizer, x, y))  # and goes on


# ---- running statistics


@pytest.mark.parametrize("running_stats", ["freeze", "update"])
def test_running_statistics_move_once(running_stats: Any) -> None:
    for make in (nn.BatchNorm2d, normkern.nn.BatchNorm2d):
        model, (x, y) = net(), batch()
        model.one = make(4).double()
        once = copy.deepcopy(model)
        once(x)
        optimizer = SAM(model, sgd(model), rho=0.5, running_stats=running_stats)
        optimizer.step(closure_of(model, optimizer, x, y))
        assert model.one.num_batches_tracked == (1 if running_stats == "freeze" else 2)
        assert torch.equal(model.one.running_mean, once.one.running_mean) == (running_stats == "freeze")  # type: ignore[arg-type]


# ---- loops


def test_pass_by_pass_is_the_closure() -> None:
    states = []
    for form in ("closure", "passes", "bare"):
        model = net()
        optimizer = SAM(model, sgd(model), rho=0.5, running_stats="update" if form == "bare" else "freeze")
        for number in range(3):
            x, y = batch(seed=number)
            if form == "closure":
                optimizer.step(closure_of(model, optimizer, x, y))
            elif form == "passes":
                with optimizer.first_pass():
                    first_gradient(model, x, y)
                optimizer.first_step(zero_grad=True)
                with optimizer.second_pass():
                    first_gradient(model, x, y)
                optimizer.second_step(zero_grad=True)
            else:
                first_gradient(model, x, y)
                optimizer.first_step(zero_grad=True)
                with normkern.frozen_running_stats(model):
                    first_gradient(model, x, y)
                optimizer.second_step(zero_grad=True)
        states.append(state(model))
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


def test_gradient_accumulation() -> None:
    """Parts of a batch, each with its share of the loss, are the batch."""
    states = []
    for count in (1, 4):
        model = net()
        model.one = nn.GroupNorm(2, 4).double()  # type: ignore[assignment]
        optimizer = SAM(model, sgd(model), rho=0.5)
        for number in range(3):
            x, y = batch(seed=number)

            parts = list(zip(x.chunk(count), y.chunk(count), strict=True))

            def closure(optimizer: SAM = optimizer, model: nn.Module = model, parts: Any = parts) -> Tensor:
                optimizer.zero_grad()
                losses = [F.cross_entropy(model(a), b) / len(parts) for a, b in parts]
                for loss in losses:
                    loss.backward()
                return sum(losses)  # type: ignore[return-value]

            optimizer.step(closure)
        states.append(state(model))
    assert_same(states[1], states[0], 1e-12)


def test_groups_have_their_own_rho() -> None:
    model, (x, y) = net(), batch()
    groups = [
        {"params": list(model.one.parameters()), "rho": 0.25},
        {"params": [*model.two.parameters(), *model.conv.parameters(), *model.conv2.parameters(), model.shift]},
        {"params": list(model.tail.parameters()), "rho": 0.0},
    ]
    optimizer = SAM(model, torch.optim.SGD(groups, lr=0.1), rho=1.0)
    before = state(model)
    first_gradient(model, x, y)
    g = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([g[name].flatten() for name in NORMS if "tail" not in name]).norm()  # type: ignore[union-attr]
    optimizer.first_step()
    for name, p in model.named_parameters():
        rho = 0.0 if name not in NORMS or "tail" in name else 0.25 if "one" in name else 1.0
        torch.testing.assert_close(p.detach() - before[name], rho * g[name] / norm, rtol=1e-10, atol=1e-14)  # type: ignore[operator]


def test_state_dict_round_trip() -> None:
    def made() -> tuple[Net, SAM]:
        model = net()
        return model, SAM(model, torch.optim.AdamW(model.parameters(), lr=0.01), rho=0.5)

    model, optimizer = made()
    x, y = batch()
    for _ in range(2):
        optimizer.step(closure_of(model, optimizer, x, y))
    other, restored = made()
    other.load_state_dict(state(model))
    restored.param_groups[0]["rho"] = 0.1
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.param_groups[0]["rho"] == 0.5
    assert restored.param_groups is restored.base_optimizer.param_groups
    for m, o in ((model, optimizer), (other, restored)):
        o.step(closure_of(m, o, x, y))
    assert_same(state(other), state(model))
    plain = torch.optim.AdamW(model.parameters(), lr=0.02)  # a checkpoint from before SAM
    restored.load_state_dict(plain.state_dict())
    assert restored.param_groups[0]["rho"] == 0.5
    assert restored.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("given", ["sam", "base"])
def test_schedulers(given: str, recwarn: pytest.WarningsRecorder) -> None:
    model, (x, y) = net(), batch()
    optimizer = SAM(model, sgd(model), rho=0.5)
    target = optimizer if given == "sam" else optimizer.base_optimizer
    schedule = torch.optim.lr_scheduler.StepLR(target, 1, 0.5)
    for number in range(3):
        optimizer.step(closure_of(model, optimizer, x, y))
        schedule.step()
        assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (number + 1)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_groups_added_later() -> None:
    model, (x, y) = net(), batch()
    head = [p for name, p in model.named_parameters() if name.startswith("tail")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("tail")]
    optimizer = SAM(model, torch.optim.SGD(rest, lr=0.1), rho=0.5)
    before = state(model)
    for added in (False, True):
        if added:
            optimizer.add_param_group({"params": head, "rho": 0.2})
        first_gradient(model, x, y)
        optimizer.first_step(zero_grad=True)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in NORMS if added or not n.startswith("tail")}
        optimizer.restore()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adam(p, foreach=True),
    ],
)
def test_fused_base_optimizers(make: Any) -> None:
    model, (x, y) = net(torch.float32), batch(torch.float32)
    optimizer = SAM(model, make(model.parameters()), rho=0.5)
    losses = [optimizer.step(closure_of(model, optimizer, x, y)).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_copies_and_hooks() -> None:
    model, (x, y) = net(), batch()
    optimizer = SAM(model, sgd(model), rho=0.5)
    optimizer.step(closure_of(model, optimizer, x, y))
    twin: SAM = copy.deepcopy(optimizer)
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *given: calls.append(given))
    optimizer.step(closure_of(model, optimizer, x, y))
    assert len(calls) == 1
    assert twin.model is not None
    twin.step(closure_of(twin.model, twin, x, y))
    assert_same(state(twin.model), state(model))
    assert "rho: 0.5" in repr(optimizer)


def test_parameters_instead_of_a_model() -> None:
    """The last layers only: a backward that stops early is not far."""
    model, (x, y) = net(), batch()
    few = normkern.norm_parameters(model.tail)
    optimizer = SAM(few, sgd(model), rho=0.5, perturb="all", running_stats="update")
    before = state(model)
    with optimizer.first_pass():
        first_gradient(model, x, y)
    assert model.one.weight.grad is None
    optimizer.first_step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in NORMS if n.startswith("tail")}
    optimizer.restore()
    chosen = SAM(model, sgd(model), rho=0.5, perturb=lambda name, p: name.startswith("tail") and p.dim() == 1)
    chosen.first_step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in NORMS if n.startswith("tail")}  # biases of linear layers had no gradient
