# SAM on two processes: as one process on the joined batch, each for itself (m-sharpness), and sharded by FSDP2.
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normkern.nn import SyncBatchNorm
from normkern.optim import SAM

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def network(synced: bool) -> nn.Module:
    torch.manual_seed(4)
    norm = SyncBatchNorm(6) if synced else nn.BatchNorm1d(6)
    return nn.Sequential(
        nn.Linear(5, 6), norm, nn.SiLU(), nn.Linear(6, 7), nn.LayerNorm(7), nn.SiLU(), nn.Linear(7, 3)
    ).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def train(model: nn.Module, rank: int | None, steps: int, watched: list[int] | None = None, **options: Any) -> None:
    optimizer = SAM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)
    for step in range(steps):
        x, y = (t if rank is None else t.chunk(2)[rank] for t in data(step))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in model.state_dict().items()
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"rho": 0.5},
    "layer": {"rho": 0.5, "transform": "layer", "eta": 0.1},
    "inf": {"rho": 0.02, "p": "inf", "transform": "element"},
    "all": {"rho": 0.1, "perturb": "all"},
    "no_norm": {"rho": 0.1, "perturb": "no_norm", "transform": "layer"},
}


def replicated(rank: int, name: str) -> dict[str, Tensor]:
    model = network(synced=True)
    train(DistributedDataParallel(model), rank, 5, **OPTIONS[name])
    return whole(model)


def sharded(rank: int, name: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network(synced=True)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[3], model[4]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, rank, 5, **OPTIONS[name])
    return whole(model)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("how", [replicated, sharded])
def test_as_one_process(how: Any, name: str, ranks: Ranks) -> None:
    model = network(synced=False)
    train(model, None, 5, **OPTIONS[name])
    for found in ranks.run(how, name):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


def counted(rank: int, sync_ascent: bool) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Numbers sent in the first pass; weights before, at w + e and after the step."""
    model = network(synced=False)
    replica = DistributedDataParallel(model)
    optimizer = SAM(replica, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, sync_ascent=sync_ascent)
    x, y = (t.chunk(2)[rank] for t in data(0))
    before, sent = whole(model), []
    reduce = dist.all_reduce

    def watched(values: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(values.numel())
        return reduce(values, *arguments, **options)

    dist.all_reduce = watched
    try:
        with optimizer.first_pass():
            F.cross_entropy(replica(x), y).backward()
        optimizer.first_step(zero_grad=True)
    finally:
        dist.all_reduce = reduce
    up = whole(model)
    with optimizer.second_pass():
        F.cross_entropy(replica(x), y).backward()
    optimizer.second_step()
    return sent, before, up, whole(model)


NORM_WEIGHTS = ("1.weight", "1.bias", "4.weight", "4.bias")


def test_what_is_sent(ranks: Ranks) -> None:
    """The gradients of the norm layers, in one message, and no others."""
    one, two = ranks.run(counted, True)
    assert one[0] == two[0] == [2 * 6 + 2 * 7]
    assert all(torch.equal(one[2][name], two[2][name]) for name in NORM_WEIGHTS)


def test_each_for_itself(ranks: Ranks) -> None:
    """sync_ascent=False: own ascents, of radius rho each, and a common step."""
    one, two = ranks.run(counted, False)
    assert one[0] == two[0] == []
    for _, before, up, _ in (one, two):
        length = sum(float((up[n] - before[n]).square().sum()) for n in NORM_WEIGHTS) ** 0.5
        assert abs(length - 0.5) < 1e-12
    assert not torch.equal(one[2]["4.weight"], two[2]["4.weight"])
    for name, value in one[3].items():
        if "running" not in name:
            assert torch.equal(value, two[3][name]), name


def refused(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network(synced=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="whole parameters") as caught:
        SAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, sync_ascent=False)
    return str(caught.value)


def test_shards_climb_together_only(ranks: Ranks) -> None:
    assert all("sync_ascent=False" in message for message in ranks.run(refused))
