# SyncBatchNorm: two processes with parts of a batch get what one process gets with the whole of it.
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normkern
from normkern.nn import SyncBatchNorm

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def whole(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, offset: float = 0.0, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy and a residual."""
    return whole(shape, dtype, offset), whole(shape, dtype, 0.25, 8), whole(shape, dtype, -0.5, 9)


def part_of(x: Tensor, rank: int, split: tuple[int, int]) -> Tensor:
    return x.split(split)[rank]


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def step(module: Any, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    if residual is None:
        y = module(x)
    else:
        residual = residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(x, residual)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    if residual is not None:
        found["dresidual"] = residual.grad
    inner = getattr(module, "_orig_mod", module)
    found |= {f"d{name}": p.grad.clone() for name, p in inner.named_parameters()}
    found |= {name: b.clone() for name, b in inner.named_buffers()}
    return found


def one_step(
    rank: int, shape: tuple[int, ...], split: tuple[int, int], options: dict[str, Any], compiled: str | None = None
) -> dict[str, Tensor]:
    """One training step of this rank's part; `options` are those of the case, beside the layer's own."""
    options = dict(options)
    dtype, parameters = options.pop("dtype", torch.float64), options.pop("parameters", torch.float64)
    layout, residual, offset = options.pop("layout", None), options.pop("residual", False), options.pop("offset", 0.0)
    steps = options.pop("steps", 1)
    module = randomized(SyncBatchNorm(shape[1], dtype=parameters, **options))
    if compiled is not None:
        torch._dynamo.reset()
        module = torch.compile(module, fullgraph=True, backend=compiled)  # type: ignore[assignment]
    x, dy, r = (part_of(t, rank, split) for t in inputs(shape, dtype, offset))
    if layout is not None:
        x, dy, r = (t.contiguous(memory_format=layout) for t in (x, dy, r))
    for _ in range(steps):
        result = step(module, x, dy, r if residual else None)
    result["stride"] = torch.tensor([result["y"].stride(), result["dx"].stride()])
    return result


def together(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What one process would have: parts joined, gradients of parameters added, statistics equal everywhere."""
    joined = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if name in ("y", "dx", "dresidual"):
            joined[name] = torch.cat(parts)
        elif name in ("dweight", "dbias"):
            joined[name] = parts[0] + parts[1]
        elif name != "stride":
            assert torch.equal(*parts), name
            joined[name] = parts[0]
    return joined


def reference(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    """torch's batch norm in float64 on the whole batch, with the same rounded numbers."""
    options = dict(options)
    dtype, parameters = options.pop("dtype", torch.float64), options.pop("parameters", torch.float64)
    residual, offset, steps = options.pop("residual", False), options.pop("offset", 0.0), options.pop("steps", 1)
    options.pop("layout", None)
    act = options.pop("act", None)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    module = randomized(kind(shape[1], dtype=parameters, **options)).double()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = module

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = self.norm(x)
            y = y if residual is None else y + residual
            return y if act is None else getattr(nn.functional, act)(y)  # type: ignore[no-any-return]

    x, dy, r = (t.double() for t in inputs(shape, dtype, offset))
    model = Whole()
    for _ in range(steps):
        found = step(model, x, dy, r if residual else None)
    return {name.replace("norm.", ""): t for name, t in found.items()}


CASES: dict[str, tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "3+3": ((6, 4, 5, 3), (3, 3), {}),
    "5+1": ((6, 4, 5, 3), (5, 1), {}),
    "4+0": ((4, 4, 5, 3), (4, 0), {}),
    "0+4": ((4, 4, 5, 3), (0, 4), {"act": "relu", "residual": True}),
    "channels_last": ((6, 4, 5, 3), (3, 3), {"layout": torch.channels_last}),
    "channels_last_empty": ((6, 5, 2, 3), (6, 0), {"layout": torch.channels_last, "act": "silu"}),
    "no_affine": ((6, 4, 5, 3), (4, 2), {"affine": False}),
    "no_bias": ((6, 4, 5, 3), (4, 2), {"bias": False, "act": "gelu"}),
    "2d_input": ((6, 4), (2, 4), {}),
    "3d_input": ((6, 4, 5), (2, 4), {"momentum": None, "steps": 3}),
    "5d_input": ((6, 3, 2, 3, 4), (2, 4), {"act": "leaky_relu"}),
    "single_input_per_process": ((2, 4), (1, 1), {}),
    "single_input_in_all": ((3, 4), (3, 0), {"eps": 0.1}),
    "no_statistics": ((6, 4, 3), (2, 4), {"track_running_stats": False}),
    "fused": ((6, 4, 5, 3), (5, 1), {"act": "silu", "residual": True}),
    "residual": ((6, 4, 5, 3), (5, 1), {"residual": True}),
    "offset": ((6, 4, 5, 3), (5, 1), {"offset": 1e4}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case: str, ranks: Ranks) -> None:
    shape, split, options = CASES[case]
    found, expected = together(ranks.run(one_step, shape, split, options)), reference(shape, options)
    assert found.keys() == expected.keys()
    # At an offset of 1e4 the input itself, and torch's answer, are that much coarser.
    bound = 1e-12 if "offset" not in options else 1e-8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["3+3", "fused", "4+0", "no_affine"])
def test_eager_backend(name: str, ranks: Ranks) -> None:
    shape, split, options = CASES[name]
    found, expected = together(ranks.run(forced_eager, shape, split, options)), reference(shape, options)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def forced_eager(rank: int, *arguments: Any) -> dict[str, Tensor]:
    with normkern.use_backend("eager"):
        return one_step(rank, *arguments)


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("parameters", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype: torch.dtype, parameters: torch.dtype | None, act: str | None, ranks: Ranks) -> None:
    shape, split = (6, 4, 5, 3), (5, 1)
    options = {"dtype": dtype, "parameters": parameters or dtype, "act": act}
    found, expected = together(ranks.run(one_step, shape, split, options)), reference(shape, options)
    for name, value in expected.items():
        if name == "num_batches_tracked":
            continue
        mine = found[name]
        assert mine.dtype == (dtype if name in ("y", "dx") else parameters or dtype)
        # Rounded where it is stored, and dx once more on the way there.
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.double(), value, rtol=0, atol=3 * eps * value.abs().max().item())


@pytest.mark.parametrize("case", ["channels_last", "channels_last_empty", "3+3", "fused"])
def test_layout_stays(case: str, ranks: Ranks) -> None:
    shape, split, options = CASES[case]
    for rank, result in enumerate(ranks.run(one_step, shape, split, options)):
        x = part_of(whole(shape), rank, split)
        x = x.contiguous(memory_format=options.get("layout", torch.contiguous_format))
        assert result["stride"].tolist() == [list(x.stride())] * 2


def test_not_dense(ranks: Ranks) -> None:
    results = ranks.run(sliced)
    for result in results:
        torch.testing.assert_close(*result)


def sliced(rank: int) -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(4, dtype=torch.float64)
    x = whole((3, 4, 5, 6))
    return layer(x[..., ::2]).detach(), layer(x[..., ::2].contiguous()).detach()


def test_same_bits_every_time(ranks: Ranks) -> None:
    shape, split, options = CASES["fused"]
    first, second = (together(ranks.run(one_step, shape, split, options)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


# ---- torch.compile

COMPILED = [("aot_eager", case) for case in ("3+3", "5+1", "4+0", "fused", "3d_input", "no_affine")]
COMPILED.append(("inductor", "5+1"))


@pytest.mark.parametrize(
    ("compiler", "case"),
    [
        *COMPILED,
        *(pytest.param("inductor", case, marks=pytest.mark.slow) for case in ("3+3", "4+0")),
    ],
)
def test_compiled_in_one_graph(compiler: str, case: str, ranks: Ranks) -> None:
    shape, split, options = CASES[case]
    found, expected = together(ranks.run(one_step, shape, split, options, compiler)), reference(shape, options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- groups, modes, and ranks that do not come


def test_process_groups(ranks: Ranks) -> None:
    for rank, (alone, both) in enumerate(ranks.run(in_groups)):
        layer = nn.BatchNorm1d(4, dtype=torch.float64)
        torch.testing.assert_close(alone, layer(whole((6, 4)).split(3)[rank]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both, layer(whole((6, 4))).split(3)[rank], rtol=1e-12, atol=1e-12)


def in_groups(rank: int) -> tuple[Tensor, Tensor]:
    groups = [dist.new_group([0]), dist.new_group([1]), dist.new_group([0, 1])]
    x = whole((6, 4)).split(3)[rank]
    layers = [SyncBatchNorm(4, process_group=g, dtype=torch.float64) for g in (groups[rank], groups[2])]
    return layers[0](x).detach(), layers[1](x).detach()


def test_evaluation_talks_to_nobody(ranks: Ranks) -> None:
    assert ranks.run(training_then_evaluation) == [(6, 0), (6, 0)]


def training_then_evaluation(rank: int) -> tuple[int, int]:
    calls = [0]
    genuine = normkern_distributed()._all_gather

    def counted(*arguments: Any) -> Tensor:
        calls[0] += 1
        return genuine(*arguments)  # type: ignore[no-any-return]

    normkern_distributed()._all_gather = counted
    try:
        model = DistributedDataParallel(SyncBatchNorm(2, track_running_stats=False))
        for _ in range(6):
            model(torch.randn(4, 2, 3, 3)).sum().backward()
        trained = calls[0]
        model.module.eval()
        if rank == 0:
            model.module(torch.randn(4, 2, 3, 3)).sum().backward()
        return trained, calls[0] - trained
    finally:
        normkern_distributed()._all_gather = genuine


def normkern_distributed() -> Any:
    import normkern.distributed

    return normkern.distributed


def test_a_rank_that_does_not_come(ranks: Ranks) -> None:
    told = ranks.run(one_comes)
    assert "every process of the group must call the layer" in told[0]
    assert told[1] == "elsewhere"


def one_comes(rank: int) -> str:
    from datetime import timedelta

    layer = SyncBatchNorm(4, process_group=dist.new_group([0, 1], timeout=timedelta(seconds=3)))
    if rank == 1:
        return "elsewhere"
    try:
        layer(torch.randn(3, 4))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_without_gradients(ranks: Ranks) -> None:
    expected = nn.BatchNorm1d(4, dtype=torch.float64)
    y = expected(whole((6, 4)))
    for rank, (mine, mean, frozen) in enumerate(ranks.run(no_gradients)):
        torch.testing.assert_close(mine, y.split((4, 2))[rank], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mean, expected.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(frozen, torch.full((4,), float(4 - 2 * rank), dtype=torch.float64))


def no_gradients(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    layer = SyncBatchNorm(4, dtype=torch.float64)
    x = whole((6, 4)).split((4, 2))[rank]
    with torch.no_grad():
        y = layer(x)
    mean = layer.running_mean.clone()
    layer(x).sum().backward()  # only the parameters want one
    return y, mean, layer.bias.grad


def test_samples_on_no_rank(ranks: Ranks) -> None:
    for y, mean, var, grad in ranks.run(nothing_at_all):
        assert y.shape == (0, 4, 3)
        assert torch.equal(mean, torch.zeros(4))
        assert torch.equal(var, torch.ones(4))
        assert torch.equal(grad, torch.zeros(4))


def nothing_at_all(rank: int) -> tuple[Tensor, ...]:
    layer = SyncBatchNorm(4)
    y = layer(torch.empty(0, 4, 3, requires_grad=True))
    y.sum().backward()
    return y.detach(), layer.running_mean, layer.running_var, layer.weight.grad


def test_nonfinite_batches_can_be_skipped(ranks: Ranks) -> None:
    for skipped, taken in ranks.run(nonfinite):
        assert torch.equal(skipped, torch.zeros(4))
        assert not torch.isfinite(taken[0])
        assert torch.isfinite(taken[1:]).all()


def nonfinite(rank: int) -> tuple[Tensor, Tensor]:
    x = whole((4, 4), torch.float32)
    x[2 * rank, 0] = float("inf") if rank else 1.0
    seen = []
    for skip in (True, False):
        mean, var = torch.zeros(4), torch.ones(4)
        normkern_distributed().sync_batch_norm(x, mean, var, training=True, skip_nonfinite=skip)
        seen.append(mean)
    return seen[0], seen[1]


def test_second_derivatives(ranks: Ranks) -> None:
    for split in ((3, 3), (5, 1), (4, 0)):
        for act in (None, "silu"):
            expected = second_derivatives(nn.BatchNorm1d(4, dtype=torch.float64), whole((sum(split), 4, 3)), act)
            results = ranks.run(rank_second_derivatives, split, act)
            torch.testing.assert_close(torch.cat([r[0] for r in results]), expected[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(results[0][1] + results[1][1], expected[1], rtol=1e-10, atol=1e-10)


def second_derivatives(layer: Any, x: Tensor, act: str | None = None) -> tuple[Tensor, Tensor]:
    """Of a penalty on the gradient, as WGAN-GP has it."""
    randomized(layer)
    x = x.detach().requires_grad_()
    y = layer(x)
    y = y if act is None else getattr(nn.functional, act)(y)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    penalty = dx.square().sum()
    return torch.autograd.grad(penalty, (x, layer.weight))  # type: ignore[return-value]


def rank_second_derivatives(rank: int, split: tuple[int, int], act: str | None) -> tuple[Tensor, Tensor]:
    x = whole((sum(split), 4, 3)).split(split)[rank]
    return second_derivatives(SyncBatchNorm(4, dtype=torch.float64, act=act), x)


# ---- in a model, under DistributedDataParallel


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6)
    ).double()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * torch.linspace(-1, 1, 6, dtype=torch.float64)).square().sum()


def ddp_steps(rank: int, split: tuple[int, int], fuse_act: bool) -> dict[str, Tensor]:
    model = normkern.convert(network(), sync=True, fuse_act=fuse_act)
    x = whole((8, 3, 5, 5)).split(split)[rank]
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        # Gradients are averaged over two processes.
        (2 * loss_of(parallel, x)).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("split", "fuse_act"), [((4, 4), False), ((7, 1), True), ((8, 0), False)])
def test_trains_as_one_process(split: tuple[int, int], fuse_act: bool, ranks: Ranks) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, whole((8, 3, 5, 5))).backward()
        optimizer.step()
    results = ranks.run(ddp_steps, split, fuse_act)
    for name, value in model.state_dict().items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], value, rtol=1e-10, atol=1e-10)


def test_uneven_inputs_stop(ranks: Ranks) -> None:
    told = ranks.run(uneven_inputs)
    assert told[0][0] == 3
    assert told[0][1].startswith("Detected at least one rank that exhausted inputs.")
    assert told[1] == (3, "Rank 1 exhausted all inputs.")


def uneven_inputs(rank: int) -> tuple[int, str]:
    model = DistributedDataParallel(normkern.convert(network(), sync=True))
    done = 0
    try:
        with model.join(throw_on_early_termination=True):
            for _ in range(6 if rank == 0 else 3):
                loss_of(model, whole((8, 3, 5, 5))).backward()
                done += 1
    except RuntimeError as error:
        return done, next(line for line in str(error).splitlines() if "exhausted" in line).strip()
    return done, "nothing"


def test_distributed_data_parallel_logs(ranks: Ranks) -> None:
    for data in ranks.run(logged):
        assert data["module_name"] == "Sequential"
        # DistributedDataParallel looks for torch's class, which it does not take on the CPU.
        assert not data["has_sync_bn"]


def logged(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(normkern.convert(network(), sync=True))
    return dict(model._get_ddp_logging_data())


# ---- one process


def test_alone_it_is_batch_norm() -> None:
    layer, stock = randomized(SyncBatchNorm(4)), randomized(nn.BatchNorm2d(4))
    x = whole((3, 4, 2, 2), torch.float32)
    torch.testing.assert_close(layer(x), stock(x))
    torch.testing.assert_close(layer.state_dict(), stock.state_dict())
    layer.load_state_dict(nn.SyncBatchNorm(4).state_dict())
    old = {k: v for k, v in nn.BatchNorm2d(4).state_dict().items() if k != "num_batches_tracked"}
    layer.load_state_dict(old)  # from before there was a count
    assert torch.equal(layer.num_batches_tracked, torch.tensor(0))
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert repr(SyncBatchNorm(4, act="relu")).endswith("track_running_stats=True, act='relu')")
    assert copy.deepcopy(layer).process_group is None


def test_errors(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"SyncBatchNorm: input must have at least 2 dimensions; got shape \(4,\)"):
        SyncBatchNorm(4)(torch.randn(4))
    for messages in ranks.run(bad_calls):
        assert messages[0].startswith("RuntimeError: sync_batch_norm: weight must have shape (4,)")
        assert messages[1].startswith("ValueError: sync_batch_norm: eps must be positive in training")
        assert messages[2].startswith("NotImplementedError: sync_batch_norm: input must be float64")
        assert messages[3].startswith("ValueError: sync_batch_norm: residual must have the shape of input")
        assert messages[4].startswith("RuntimeError: sync_batch_norm: torch.func")
        assert messages[5].startswith("TypeError: sync_batch_norm: training must be a bool")
        assert messages[6].startswith("ValueError: sync_batch_norm: act must be one of")


def bad_calls(rank: int) -> list[str]:
    call = normkern_distributed().sync_batch_norm
    x = torch.randn(3, 4)
    calls = [
        lambda: call(x, None, None, torch.ones(5), training=True),
        lambda: call(x, None, None, training=True, eps=0.0),
        lambda: call(x.int(), None, None, training=True),
        lambda: call(x, None, None, training=True, residual=x[:2]),
        lambda: torch.func.grad(lambda t: call(t, None, None, training=True).sum())(x),
        lambda: call(x, None, None, training=1),
        lambda: call(x, None, None, training=True, act="tanh"),
    ]
    told = []
    for attempt in calls:
        try:
            attempt()
            told.append("no error")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told
