# The probes: their values against definitions worked out by hand or by brute force, and that they leave no trace.
from __future__ import annotations

import builtins
import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkern
from normkern import probes


class Net(nn.Module):
    """Convolutions, batch norm, dropout, an activation used twice, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), normkern.nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        return self.head(self.drop(self.relu(self.second(x))).mean((2, 3)))  # type: ignore[no-any-return]


def batch(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    model = Net()
    model.drop.eval()
    model.drop.train()
    x, y = batch(1)
    F.cross_entropy(model(x), y).backward()  # there are gradients and running statistics to lose
    return model


def closure(model: nn.Module) -> Callable[[], Tensor]:
    x, y = batch()
    return lambda: F.cross_entropy(model(x), y)


def everything(model: nn.Module) -> tuple[Any, ...]:
    """All that a probe might change, and the identities that it must keep."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return (
        [t.detach().clone() for t in tensors],
        [id(t) for t in tensors],
        [m.training for m in model.modules()],
        hooks,
        torch.get_rng_state(),
    )


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return tensors and before[1:4] == after[1:4] and torch.equal(before[4], after[4])


def update(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * torch.sin(torch.arange(p.numel()).view_as(p)))


def shift(model: nn.Module) -> None:
    start = [p.detach().clone() for p in model.parameters()]
    with probes.covariate_shift(model, closure(model)):
        update(model)
    with torch.no_grad():
        moved = [p.detach().clone() for p in model.parameters()]
        for p, w in zip(model.parameters(), start, strict=True):
            p.copy_(w)
        update(model)
        for p, w, m in zip(model.parameters(), start, moved, strict=True):
            assert torch.equal(p, m)  # the block's update, bit for bit
            p.copy_(w)


PROBES: dict[str, Callable[[nn.Module], Any]] = {
    "activations": lambda model: probes.activations(model, closure(model)),
    "landscape": lambda model: probes.landscape(model, closure(model), [0.1, 1.0]),
    "covariate_shift": shift,
    "sharpness": lambda model: probes.sharpness(model, [batch()], 0.01, steps=3),
    "spectral_norms": lambda model: probes.spectral_norms(model, batch()[0]),
}


@pytest.mark.parametrize("name", PROBES)
def test_no_trace(net: Net, name: str) -> None:
    net.norm.eval()  # train flags that are not all alike
    before = everything(net)
    PROBES[name](net)
    assert same(before, everything(net))


class FailsLater(nn.Module):
    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, x: Tensor) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise ArithmeticError("on purpose")
        return self.model(x)


@pytest.mark.parametrize("name", PROBES)
def test_no_trace_of_one_that_fails(net: Net, name: str) -> None:
    if name == "covariate_shift":
        model = FailsLater(net, 3)  # on the way through the layers, when the block has ended
        before = everything(net)
        weights = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(ArithmeticError), probes.covariate_shift(model, closure(model)):
            update(net)
        expected = copy.deepcopy(net)
        with torch.no_grad():
            for p, w in zip(expected.parameters(), weights, strict=True):
                p.copy_(w)
        update(expected)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True))
        with torch.no_grad():
            for p, w in zip(net.parameters(), weights, strict=True):
                p.copy_(w)
    else:
        calls = 0 if name in ("activations", "spectral_norms") else 2
        model = FailsLater(net, calls)
        before = everything(net)
        with pytest.raises(ArithmeticError):
            PROBES[name](model)
    assert same(before, everything(net))


# ---- activations


def test_activations_by_definition(net: Net) -> None:
    net.drop.p = 0.0
    x, y = batch()
    expected = copy.deepcopy(net)
    a = expected.relu(expected.norm(expected.first(x)))
    convolved = expected.second(a)
    convolved.retain_grad()
    b = expected.relu(convolved)
    F.cross_entropy(expected.head(b.mean((2, 3))), y).backward()
    rows = probes.activations(net, closure(net)).layers
    assert [(row.layer, row.call) for row in rows] == [("first", 0), ("relu", 0), ("second", 0), ("relu", 1)]
    for row, activation in ((rows[1], a), (rows[3], b)):
        n = len(activation)
        flat = activation.detach().double().flatten(1)
        pairs = [F.cosine_similarity(flat[i], flat[j], 0) for i, j in itertools.permutations(range(n), 2)]
        unit = flat / flat.norm(dim=1, keepdim=True)
        top = torch.linalg.matrix_norm(unit, 2).square()
        assert row.similarity == pytest.approx(float(sum(pairs)) / len(pairs), rel=1e-5)
        assert row.stable_rank == pytest.approx(float(unit.square().sum() / top), rel=1e-5)
        assert row.variance == pytest.approx(float(activation.detach().double().var((0, 2, 3)).mean()), rel=1e-5)
        assert row.gradient_norm is None
    assert rows[2].gradient_norm == pytest.approx(float(convolved.grad.norm()), rel=1e-5)  # type: ignore[union-attr]
    assert rows[2].variance is None


def test_recorder_follows_training(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    twin, other = copy.deepcopy(net), batch()
    with probes.record_activations(net, at=nn.ReLU, samples=4) as recorder:
        for seed in range(3):
            x, y = batch(seed)
            torch.manual_seed(seed)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    net(other[0])  # not recorded
    rows = recorder.result.layers
    assert [row.step for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row.call for row in rows] == [0, 0, 0, 1] * 3  # calls of a layer are counted anew in every step
    assert all(row.gradient_norm is not None for row in rows if row.layer in ("first", "second"))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for seed in range(3):
        x, y = batch(seed)
        torch.manual_seed(seed)
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    recorder.clear()
    assert recorder.result.layers == ()
    with torch.no_grad(), recorder:
        net(other[0])
    assert {row.step for row in recorder.result.layers} == {0}


def test_recorder_at_functions_and_fused_activations() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), normkern.nn.GroupNorm(2, 4, act="relu"), nn.Flatten(), nn.Linear(144, 2))
    x, _ = batch()
    rows = probes.activations(model, lambda: model(x).square().mean()).layers
    assert [row.layer for row in rows] == ["0", "1"]
    rows = probes.activations(
        model, lambda: model(x).square().mean(), at=lambda name, _: name == "3", gradients_at=nn.Linear
    ).layers
    assert [row.layer for row in rows] == ["3"]
    assert rows[0].variance is not None
    assert rows[0].gradient_norm is not None
    with torch.no_grad(), probes.record_activations(model) as recorder:
        model(x)
    assert all(row.gradient_norm is None for row in recorder.result.layers)
    ends = nn.Sequential(
        normkern.nn.FilterResponseNorm2d(1), normkern.nn.EvoNorm2dS0(1, 1), normkern.nn.EvoNorm2dB0(1),
        normkern.nn.FilterResponseNorm2d(1, tlu=False), normkern.nn.ScaledReLU(),
    )  # fmt: skip
    assert [row.layer for row in probes.activations(ends, lambda: ends(x).sum()).layers] == ["0", "1", "2", "4"]


def test_samples_that_count_for_similarity() -> None:
    model, (x, _) = nn.ReLU(), batch()
    x.requires_grad_()
    few, first = (
        probes.activations(model, lambda x=x: model(x).sum(), samples=samples).layers[0]  # type: ignore[misc]
        for x, samples in ((x, 3), (x[:3], 12))
    )
    assert (few.similarity, few.stable_rank) == (first.similarity, first.stable_rank)
    assert few.variance != first.variance


def test_degenerate_activations() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU())

    def activity(x: Tensor) -> probes.LayerActivity:
        return probes.activations(model, lambda: model(x).sum()).layers[0]

    equal = activity(torch.ones(5, 3, 2).cumsum(1))
    assert equal.similarity == pytest.approx(1, rel=1e-6)
    assert equal.stable_rank == pytest.approx(1, rel=1e-6)
    apart = activity(torch.eye(5))
    assert (apart.similarity, apart.stable_rank) == (0, pytest.approx(5))
    dead = activity(-torch.ones(5, 3))
    assert dead.similarity == 0
    assert math.isnan(dead.stable_rank)  # type: ignore[arg-type]
    alone = activity(torch.ones(1, 3))
    assert alone.similarity is None
    assert math.isnan(alone.variance)  # type: ignore[arg-type]
    assert math.isnan(activity(torch.full((3, 3), torch.inf)).stable_rank)  # type: ignore[arg-type]


# ---- landscape


class Quadratic(nn.Module):
    """0.5 w^T A w with curvatures 1, 4 and 10."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.register_buffer("curvature", torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * self.w.square()).sum()


def test_landscape_of_a_quadratic() -> None:
    model = Quadratic()
    a, w = model.curvature, model.w.detach().clone()
    steps = [0.01, 0.1, 0.3]
    found = probes.landscape(model, model, steps)
    g = a * w
    assert found.loss == pytest.approx(float(0.5 * (a * w * w).sum()), rel=1e-12)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    for row, step in zip(found.steps, steps, strict=True):
        there = w - step * g
        assert row.loss == pytest.approx(float(0.5 * (a * there * there).sum()), rel=1e-12)
        assert row.distance == pytest.approx(step * float(g.norm()), rel=1e-12)
        assert row.gradient_distance == pytest.approx(step * float((a * g).norm()), rel=1e-12)
        assert row.gradient_cosine == pytest.approx(float(F.cosine_similarity(a * there, g, 0)), rel=1e-12)
    assert found.beta_smoothness == pytest.approx(float((a * g).norm() / g.norm()), rel=1e-12)  # at any step
    assert found.loss_range == (min(r.loss for r in found.steps), max(r.loss for r in found.steps))
    assert found.gradient_predictiveness[1] == found.steps[-1].gradient_distance
    axis = [torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)]
    assert probes.landscape(model, model, steps, direction=axis).beta_smoothness == pytest.approx(10, rel=1e-12)


def test_landscape_has_the_same_noise_at_every_step(net: Net) -> None:
    """Dropout and batch norm see one batch and one mask: the walk of a tiny step goes nowhere."""
    found = probes.landscape(net, closure(net), [1e-6, 1e-5])
    assert all(row.loss == pytest.approx(found.loss, abs=1e-4) for row in found.steps)
    assert all(row.gradient_cosine > 0.999 for row in found.steps)


def test_landscape_measures_the_step_that_was_taken() -> None:
    """Rounding may leave nothing of it."""
    found = probes.landscape(model := Quadratic().float(), model, [1e-9, 0.1])
    assert found.steps[0].distance == 0
    assert found.steps[1].distance > 0
    assert math.isnan(found.beta_smoothness)


def test_landscape_that_leaves_the_finite() -> None:
    model = Quadratic()
    found = probes.landscape(model, lambda: model().exp().log(), [1e-3, 1e4])
    assert math.isnan(found.gradient_predictiveness[1])


# ---- internal covariate shift


def test_covariate_shift_by_definition(net: Net) -> None:
    net.drop.p = 0.0
    before, after = copy.deepcopy(net), copy.deepcopy(net)
    update(after)
    with probes.covariate_shift(net, closure(net)) as shift:
        update(net)
    rows = shift.result.layers
    assert [row.layer for row in rows] == ["first", "norm", "second", "head"]
    order = ["first", "norm", "second", "head"]
    for i, (row, name) in enumerate(zip(rows, order, strict=True)):
        mixed = copy.deepcopy(before)
        for below in order[:i]:
            mixed.get_submodule(below).load_state_dict(after.get_submodule(below).state_dict())
        grads = []
        for model in (before, mixed):
            model.zero_grad()
            closure(model)().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.get_submodule(name).parameters()]))  # type: ignore[union-attr]
        g, moved = grads
        assert row.gradient_norm == pytest.approx(float(g.norm()), rel=1e-5)
        assert row.l2 == pytest.approx(float((g - moved).norm()), rel=1e-4, abs=1e-6 * float(g.norm()))
        assert row.relative == pytest.approx(row.l2 / row.gradient_norm)
        assert row.cosine == pytest.approx(float(F.cosine_similarity(g, moved, 0)), rel=1e-5)
    assert rows[0].l2 == 0  # nothing lies below the first layer
    assert rows[2].l2 > 0


def test_covariate_shift_of_nothing(net: Net) -> None:
    """The same noise at every pass: without an update there is no shift, dropout or not."""
    with probes.covariate_shift(net, closure(net)) as shift:
        pass
    assert [row.l2 for row in shift.result.layers] == [0] * 4


def test_covariate_shift_counts_tied_weights_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    model[2].weight = model[0].weight
    with probes.covariate_shift(model, lambda: model(torch.ones(2, 3)).sum()) as shift:
        update(model)
    assert [row.layer for row in shift.result.layers] == ["0", "3"]


def test_covariate_shift_of_some_layers(net: Net) -> None:
    with probes.covariate_shift(net, closure(net), layers=nn.Conv2d) as shift:
        with pytest.raises(RuntimeError, match="when the with block has ended"):
            _ = shift.result
        update(net)
    assert [row.layer for row in shift.result.layers] == ["first", "second"]
    with (
        pytest.raises(ValueError, match="no layer of these types"),
        probes.covariate_shift(net, closure(net), layers=nn.Conv3d),
    ):
        pass


def test_covariate_shift_counts_parameters_of_modules_that_are_not_called() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.linear.weight)

    model = nn.Sequential(Inner(), nn.Linear(3, 1))
    with probes.covariate_shift(model, lambda: model(torch.ones(2, 3)).sum()) as shift:
        update(model)
    assert [row.layer for row in shift.result.layers] == ["0", "1"]


# ---- what is put back


class Counting(Quadratic):
    """Puts another tensor in the place of its buffer, and has a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> Tensor:
        self.calls = self.calls + 1
        return super().forward()


def test_buffers_that_are_replaced_and_parameters_that_are_not_used() -> None:
    model, plain = Counting(), Quadratic()
    calls = model.calls
    found, want = (probes.landscape(m, m, [0.1]) for m in (model, plain))
    assert model.calls is calls
    assert calls == 0
    assert found == want


# ---- results


RESULTS: dict[str, Callable[[Net], probes.Activations | Any]] = {
    "activations": lambda net: probes.activations(net, closure(net)),
    "landscape": lambda net: probes.landscape(net, closure(net), [0.1, 0.2]),
    "covariate_shift": lambda net: _shift_result(net),
    "sharpness": lambda net: probes.sharpness(net, [batch()], 0.01, steps=2),
    "spectral_norms": lambda net: probes.spectral_norms(net, batch()[0]),
    "predict": lambda _: probes.predict(4, 3),
}


def _shift_result(net: Net) -> probes.CovariateShift:
    with probes.covariate_shift(net, closure(net)) as shift:
        update(net)
    return shift.result


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_tables_and_plots(net: Net, name: str) -> None:
    result = RESULTS[name](net)
    rows = list(result.table())
    assert rows
    assert result == copy.deepcopy(result)  # plain values
    if importlib.util.find_spec("pandas"):
        frame = result.to_pandas()
        assert len(frame) == len(rows)
        first = rows[0]
        assert all(frame[key][0] == getattr(first, key) or frame[key].isna()[0] for key in first.__dict__)
    else:
        with pytest.raises(ImportError, match="pip install pandas"):
            result.to_pandas()
    if importlib.util.find_spec("matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        drawn = result.plot()
        drawn = drawn if isinstance(drawn, list) else [drawn]
        assert all(axis.lines or axis.patches for axis in drawn)
        again = result.plot(drawn if len(drawn) > 1 else drawn[0])
        assert again == (drawn if len(drawn) > 1 else drawn[0])
        drawn[0].figure.canvas.draw()
        from matplotlib import pyplot

        pyplot.close("all")
    else:
        with pytest.raises(ImportError, match="pip install matplotlib"):
            result.plot()


def test_without_pandas_and_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("pandas", "matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    result = probes.predict(2, 2)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_pandas()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


# ---- mistakes


def mistakes() -> Iterator[tuple[str, Callable[[Net], Any], str]]:
    yield "steps", lambda net: probes.landscape(net, closure(net), [0.0]), "landscape: steps must be positive"
    yield "no steps", lambda net: probes.landscape(net, closure(net), []), "at least one"
    yield "loss", lambda net: probes.landscape(net, lambda: net(batch()[0]), [1.0]), r"one element; got shape \(12, 4\)"
    yield (
        "direction",
        lambda net: probes.landscape(net, closure(net), [1.0], direction=[torch.ones(2)]),
        "direction must have the shapes",
    )
    yield (
        "frozen",
        lambda net: probes.landscape(net.requires_grad_(False), closure(net), [1.0]),
        "no parameter requires a gradient",
    )
    yield "rho", lambda net: probes.sharpness(net, [batch()], 0.0), "rho must be positive and finite; got 0.0"
    yield "ascent", lambda net: probes.sharpness(net, [batch()], 1.0, steps=0), "steps must be at least 1; got 0"
    yield "batches", lambda net: probes.sharpness(net, [], 1.0), "at least one pair"
    yield (
        "modules",
        lambda net: probes.activations(net, closure(net), at=nn.Tanh, gradients_at=nn.Conv3d),
        "no module of the model matches",
    )
    yield "samples", lambda net: probes.record_activations(net, samples=1), "samples must be at least 2; got 1"
    yield "kernel", lambda _: probes.conv_singular_values(torch.ones(2, 2), (4, 4)), "weight must be a real"
    yield "size", lambda _: probes.conv_singular_values(torch.ones(2, 2, 3, 3), (4,)), "size must be positive"
    yield (
        "stride",
        lambda _: probes.conv_spectral_norm(torch.ones(2, 2, 3, 3), (5, 4), stride=2),
        r"stride must divide size; got stride=\(2, 2\) and size=\(5, 4\)",
    )
    yield "groups", lambda _: probes.conv_singular_values(torch.ones(2, 2, 3, 3), (4, 4), groups=4), "groups must"
    yield "group size", lambda _: probes.predict(2.5, 1), "group_size must be an integer"
    yield "depth", lambda _: probes.predict(2, 0), "depth must be an integer from 1 on; got 0"
    yield "cosine", lambda _: probes.predict(2, 1, similarity=2.0), "similarity must be from -1 to 1; got 2.0"


@pytest.mark.parametrize(("call", "message"), [pytest.param(*m[1:], id=m[0]) for m in mistakes()])
def test_mistakes(net: Net, call: Callable[[Net], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(net)
