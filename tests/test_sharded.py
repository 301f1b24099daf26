# DTensors: every norm with every dimension of its input sharded over two processes, against one process with all of it;
# DistributedDataParallel, FSDP2 and sequence parallelism on converted models.
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor, nn

import normkern

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@dataclasses.dataclass(frozen=True)
class Norm:
    run: Callable[..., Tensor]
    shape: tuple[int, ...]
    parameter: tuple[int, ...]


NORMS = {
    "batch": Norm(lambda x, w, b: normkern.batch_norm(x, None, None, w, b, True, act="relu"), (4, 6, 4, 3), (6,)),
    "batch_2d": Norm(lambda x, w, b: normkern.batch_norm(x, None, None, w, b, True), (5, 6), (6,)),
    "group": Norm(lambda x, w, b: normkern.group_norm(x, 2, w, b, act="silu"), (4, 6, 4, 3), (6,)),
    "group_3": Norm(lambda x, w, b: normkern.group_norm(x, 3, w, b), (3, 6, 4), (6,)),
    "instance": Norm(lambda x, w, b: normkern.instance_norm(x, weight=w, bias=b), (4, 6, 4, 3), (6,)),
    "response": Norm(lambda x, w, b: normkern.filter_response_norm(x, w, b, act="relu"), (4, 6, 4, 3), (6,)),
    "layer": Norm(lambda x, w, b: normkern.layer_norm(x, (6,), w, b, act="gelu"), (4, 5, 6), (6,)),
    "layer_2": Norm(lambda x, w, b: normkern.layer_norm(x, (4, 6), w, b), (3, 4, 6), (4, 6)),
    "rms": Norm(lambda x, w, b: normkern.rms_norm(x, (6,), w, residual=2 * x), (4, 5, 6), (6,)),
    "moments": Norm(lambda x, w, b: torch.cat([t.flatten() for t in normkern.moments(x, (1,))]), (4, 5, 6), (1,)),
    "eval": Norm(lambda x, w, b: normkern.batch_norm(x, w.detach(), w.detach().abs() + 1, w, b), (4, 6, 3), (6,)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(norm: Norm, x: Tensor, w: Tensor, b: Tensor, dy: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    y = norm.run(x, w, b)
    if y.requires_grad:
        y.backward(dy(y))
    return [y, x.grad, w.grad, b.grad]


def whole_and_parts(
    rank: int, name: str, dim: int | None, weight_sharded: bool, layout: str
) -> list[tuple[Tensor, Tensor] | None]:
    """Pairs of what normkern makes of DTensors, put together, and of plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    norm = NORMS[name]
    mesh = init_device_mesh("cpu", (2,))

    def place(t: Tensor, shard: int | None) -> Tensor:
        return distribute_tensor(t, mesh, [Replicate() if shard is None else Shard(shard)])

    def data() -> tuple[Tensor, Tensor, Tensor]:
        x = numbers(norm.shape, 1).contiguous(memory_format=LAYOUTS[layout])
        return x, numbers(norm.parameter, 2), numbers(norm.parameter, 3)

    inputs = [t.requires_grad_() for t in data()]
    with torch.set_grad_enabled(name != "moments"):
        expected = results(norm, *inputs, lambda y: numbers(tuple(y.shape), 4))  # type: ignore[call-arg]
        x, w, b = data()
        shards = (dim, 0, 0) if weight_sharded else (dim, None, None)
        placed = [place(t, s).requires_grad_() for t, s in zip((x, w, b), shards, strict=True)]
        found = results(norm, *placed, lambda y: place(numbers(tuple(y.shape), 4), None))  # type: ignore[call-arg]
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for mine, theirs in zip(found, expected, strict=True):
        if mine is None or theirs is None:
            assert (mine is None) == (theirs is None)
            pairs.append(None)
            continue
        assert isinstance(mine, DTensor)
        pairs.append((mine.full_tensor().detach(), theirs.detach()))
    if name != "moments" and dim is not None:
        assert found[0].placements == (Shard(dim),) or name.startswith("group")
        assert placed[1].grad is None or placed[1].grad.placements == placed[1].placements
        assert found[0].stride() == expected[0].stride()
    return pairs


def all_dims(rank: int, name: str) -> list[tuple[str, list[Any]]]:
    """Every dimension in one go: starting a function costs more than running it."""
    norm = NORMS[name]
    done = []
    for layout in ("contiguous", "channels_last") if len(norm.shape) == 4 else ("contiguous",):
        for dim in (None, *range(len(norm.shape))):
            for weight_sharded in (False, True):
                what = f"{layout}, dim {dim}, weight {'sharded' if weight_sharded else 'replicated'}"
                done.append((what, whole_and_parts(rank, name, dim, weight_sharded, layout)))
    return done


@pytest.mark.parametrize("name", NORMS)
def test_any_dimension_may_be_sharded(name: str, ranks: Ranks) -> None:
    for per_rank in ranks.run(all_dims, name):
        for what, pairs in per_rank:
            for key, pair in zip(("y", "dx", "dweight", "dbias"), pairs, strict=True):
                if pair is not None:
                    torch.testing.assert_close(
                        *pair, rtol=1e-11, atol=1e-11, msg=lambda m, w=what, k=key: f"{w}, {k}: {m}"
                    )


def test_only_what_is_needed_is_sent(ranks: Ranks) -> None:
    """Sharded outside of its groups, a norm asks no other process; inside, one gather and one sum."""
    for outside, inside in ranks.run(counted):
        assert outside == (0, 0)
        assert inside == (1, 1)


def counted(rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    seen = []
    for dim in (1, 2):
        x = distribute_tensor(numbers((4, 6, 8), 1), mesh, [Shard(dim)]).requires_grad_()
        dy = distribute_tensor(numbers((4, 6, 8), 2), mesh, [Shard(dim)])
        with CommDebugMode() as forward:
            y = normkern.rms_norm(x, (8,))
        with CommDebugMode() as backward:
            y.backward(dy)
        seen.append((forward.get_total_counts(), backward.get_total_counts()))
    return seen[0], seen[1]


# ---- models


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 4)).double()


def steps(model: nn.Module, x: Tensor, scale: float = 1.0) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = scale * model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def under_fsdp(rank: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = normkern.convert(transformer())
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="revert"):
        normkern.revert(model)
    # Gradients are averaged over two processes.
    steps(model, numbers((4, 3, 6), 1).split(2)[rank], 2.0)
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}


def under_ddp(rank: int) -> dict[str, Tensor]:
    model = normkern.convert(transformer())
    steps(nn.parallel.DistributedDataParallel(model), numbers((4, 3, 6), 1).split(2)[rank], 2.0)
    return model.state_dict()


@pytest.mark.parametrize("how", [under_fsdp, under_ddp])
def test_data_parallel(how: Any, ranks: Ranks) -> None:
    model = transformer()
    steps(model, numbers((4, 3, 6), 1))
    for state in ranks.run(how):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-12)


def in_sequence_parallel(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    model = normkern.convert(nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)).double())
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": SequenceParallel(), "1": SequenceParallel()})
    x = numbers((3, 4, 8), 1)
    y = model(x.chunk(2, 1)[rank])
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(1),)
    y.full_tensor().pow(3).sum().backward()
    return y.full_tensor().detach(), {n: p.grad.full_tensor() for n, p in model.named_parameters()}


def test_sequence_parallel(ranks: Ranks) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)).double()
    y = model(numbers((3, 4, 8), 1))
    y.pow(3).sum().backward()
    for found, gradients in ranks.run(in_sequence_parallel):
        torch.testing.assert_close(found, y.detach(), rtol=1e-11, atol=1e-11)
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-11, atol=1e-11)
