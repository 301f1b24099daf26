# SyncBatchNorm: two processes with parts of a batch get what one process gets with the whole of it.
from __future__ import annotations

import copy
from collections.abc import Iterator
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
_ranks: list[Ranks] = []


@pytest.fixture
def ranks() -> Ranks:
    """Started by the first test, and anew by the one after a failure."""
    if not _ranks or not _ranks[0].alive:
        _ranks[:] = [Ranks()]
    return _ranks[0]


@pytest.fixture(scope="module", autouse=True)
def close_ranks() -> Iterator[None]:
    yield
    for started in _ranks:
        if started.alive:
            started.close()
    _ranks.clear()


def whole(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


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
    x, dy, r = (part_of(whole(shape, dtype, o), rank, split) for o in (offset, 0.25, -0.5))
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

    x, dy, r = (whole(shape, dtype, o).double() for o in (offset, 0.25, -0.5))
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
