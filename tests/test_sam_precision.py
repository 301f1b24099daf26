# SAM under loss scales, half precision, autocast and torch.compile, and what it refuses.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ascents import ASCENTS, ascending
from test_sam import NORMS, assert_same, batch, closure_of, first_gradient, net, sgd, state
from torch import Tensor, nn

import normkern
from normkern.optim import SAM


def scaled(
    model: nn.Module, optimizer: SAM, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    return closure


@pytest.mark.parametrize("form", ["closure", "passes"])
@pytest.mark.parametrize(("p", "transform"), [(2, "none"), ("inf", "element"), (2, "fisher")])
@pytest.mark.parametrize("how", ASCENTS[:2])
def test_loss_scale_does_not_matter(how: str, p: Any, transform: Any, form: str) -> None:
    states = []
    for enabled in (False, True):
        model = net()
        # Biases without T are beside weights with it in one norm: all gradients must have the same scale.
        optimizer = SAM(model, sgd(model), rho=0.1, p=p, transform=transform, eta=0.5, normalize_bias=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=enabled)
        for number in range(3):
            x, y = batch(seed=number)
            closure = scaled(model, optimizer, scaler, x, y)
            if form == "closure":
                with ascending(how):
                    optimizer.step(closure, scaler=scaler)
            else:
                with optimizer.first_pass():
                    closure()
                with ascending(how):
                    optimizer.first_step(scaler=scaler)
                with optimizer.second_pass():
                    closure()
                scaler.step(optimizer)
            scaler.update()
        states.append(state(model))
    assert_same(states[1], states[0], 1e-12)


@pytest.mark.parametrize("p", [2, "inf"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_are_skipped(bad: float, p: Any) -> None:
    model, (x, y) = net(torch.float32), batch(torch.float32)
    optimizer = SAM(model, sgd(model), rho=0.5, p=p)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = model.two.weight.register_hook(lambda g: g * bad)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.equal(model.one.weight, before["one.weight"]))
        return scaled(model, optimizer, scaler, x, y)()

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert seen == [True, True]  # the second pass was at w
    assert_same(dict(model.named_parameters()), before)  # type: ignore[arg-type]
    assert scaler.get_scale() == 2.0
    handle.remove()
    optimizer.step(closure, scaler=scaler)
    assert seen == [True, True, True, False]
    assert not torch.equal(model.conv.weight, before["conv.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Gradients whose squares are out of the type's range, beside parameters of another dtype."""
    model, (x, y) = net(torch.float32), batch(torch.float32)
    model.one.to(dtype)
    model.one.register_forward_pre_hook(lambda m, args: (args[0].to(dtype),))
    model.one.register_forward_hook(lambda m, args, y: y.float())
    optimizer = SAM(model, sgd(model), rho=0.5)
    before = state(model)
    first_gradient(model, x, y)
    for p in normkern.norm_parameters(model):
        p.grad *= 2000 / p.grad.abs().max()
    g = {name: model.get_parameter(name).grad.double() for name in NORMS}
    norm = torch.cat([t.flatten() for t in g.values()]).norm()
    optimizer.first_step()
    for name in NORMS:
        expected = before[name].double() + 0.5 * g[name] / norm
        eps = torch.finfo(before[name].dtype).eps  # float32 arithmetic, rounded to the parameter's dtype
        torch.testing.assert_close(model.get_parameter(name).detach().double(), expected, rtol=eps, atol=1e-7)
    optimizer.restore()
    assert_same(dict(model.named_parameters()), {n: before[n] for n, _ in model.named_parameters()})  # type: ignore[arg-type]


def test_autocast() -> None:
    model, (x, y) = net(torch.float32), batch(torch.float32)
    optimizer = SAM(model, sgd(model), rho=0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_compiled_model() -> None:
    """Two graphs, one with and one without gradients of all weights, and no more from then on."""
    states = []
    for compiled in (False, True):
        model = net()
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        run = torch.compile(model, backend=backend) if compiled else model
        optimizer = SAM(run, sgd(model), rho=0.5)
        for number in range(4):
            x, y = batch(seed=number)
            optimizer.step(closure_of(run, optimizer, x, y))
        assert len(graphs) == (2 if compiled else 0)
        states.append(state(model))
    assert_same(states[1], states[0], 1e-12)


# ---- bad input


def test_errors() -> None:
    model = net()
    base = sgd(model)
    for options, message in (
        ({"rho": 0.0}, "rho must be positive; got rho=0.0"),
        ({"rho": float("nan")}, "rho must be positive"),
        ({"rho": 1, "p": 3}, 'p must be 2 or "inf"; got p=3'),
        ({"rho": 1, "transform": "rows"}, "got 'rows'"),
        ({"rho": 1, "eta": -1.0}, "eta must not be negative"),
        ({"rho": 1, "perturb": "some"}, "got 'some'"),
        ({"rho": 1, "running_stats": "off"}, "got 'off'"),
        ({"rho": 1, "perturb": lambda name, p: False}, "no parameters found"),
    ):
        with pytest.raises(ValueError, match=message):
            SAM(model, base, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameters found for norm layers"):
        SAM(nn.Linear(2, 2), base, rho=1)
    with pytest.raises(ValueError, match="no parameters found"):  # not the base optimizer's
        SAM(model, sgd(model.conv), rho=1)
    with pytest.raises(ValueError, match="needs the model"):
        SAM(model.parameters(), base, rho=1, running_stats="update")
    with pytest.raises(ValueError, match="needs the model"):
        SAM(model.parameters(), base, rho=1, perturb="all")
    with pytest.raises(ValueError, match="rho of a parameter group"):
        SAM(model, torch.optim.SGD([{"params": list(model.parameters()), "rho": -1}], lr=1), rho=1)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        SAM(model, torch.optim.SGD, rho=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a model or parameters; got a Tensor"):
        SAM(model.shift, base, rho=1, perturb="all", running_stats="update")
    with pytest.raises(TypeError, match="use fully_shard"):
        SAM(nn.Sequential(type("FullyShardedDataParallel", (nn.Module,), {})(), model), base, rho=1)
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="lazy"):
        SAM(lazy, torch.optim.SGD(lazy.parameters(), lr=1), rho=1)


def test_errors_of_order() -> None:
    model, (x, y) = net(), batch()
    optimizer = SAM(model, sgd(model), rho=0.5)
    before = state(model)
    with pytest.raises(RuntimeError, match="give it a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="backward must run before"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="call first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="call first_step"), optimizer.second_pass():
        pass
    with pytest.raises(RuntimeError, match="backward must run before"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert_same(dict(model.named_parameters()), {n: before[n] for n, _ in model.named_parameters()})  # type: ignore[arg-type]
    first_gradient(model, x, y)
    with pytest.raises(RuntimeError, match="backward must run before"):  # what another backward left does not count
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    first_gradient(model, x, y)
    optimizer.first_step(zero_grad=True)
    for method in (optimizer.first_step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(RuntimeError, match="weights are perturbed"):
            method()
    with pytest.raises(RuntimeError, match="backward must run before"):
        optimizer.second_step()
    assert_same(dict(model.named_parameters()), {n: before[n] for n, _ in model.named_parameters()})  # type: ignore[arg-type]


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.LayerNorm(4))
    x = torch.tensor([1, 2])

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss  # type: ignore[no-any-return]

    every = SAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, perturb="all")
    before = state(model)
    with pytest.raises(RuntimeError, match=r"dense; got torch.sparse_coo for 0.weight"):
        every.step(closure)
    assert_same(state(model), before)
    SAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5).step(closure)  # not perturbed: not its matter
    assert not torch.equal(model[0].weight, before["0.weight"])  # type: ignore[arg-type]
