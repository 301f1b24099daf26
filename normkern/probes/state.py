"""state.py: measuring a model without a trace: what passes through it may change, kept and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]  # a forward pass on the same batch at every call, to a mean loss


class Snapshot:
    """Buffers and train flags of a model, and torch's random generators of the CPU and of the model's CUDA devices."""

    def __init__(self, model: nn.Module) -> None:
        self._flags = [(module, module.training) for module in model.modules()]
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        for module in model.modules():
            for name, buffer in module._buffers.items():
                copy = None if buffer is None else buffer.detach().clone()
                self._buffers.append((module, name, buffer, copy))
        tensors = [*model.parameters(), *model.buffers()]
        self._devices = sorted({t.device.index for t in tensors if t.is_cuda and t.device.index is not None})
        self._generator = torch.get_rng_state()
        self._generators = [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        for module, training in self._flags:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, copy in self._buffers:
                module._buffers[name] = buffer  # a forward pass may have put another tensor in its place
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)
        torch.set_rng_state(self._generator)
        for device, state in zip(self._devices, self._generators, strict=True):
            torch.cuda.set_rng_state(state, device)


class Point:
    """The values of parameters: where they are put back to, exactly."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]

    def restore(self) -> None:
        self.move(self.values)

    def move(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


@contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """Inside the block passes may do what they do; behind it, also by an exception, the buffers, train flags, `.grad`s
    and random generators are what they were. Parameters are the business of a Point."""
    snapshot = Snapshot(model)
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    try:
        yield snapshot
    finally:
        for p, grad in grads:
            p.grad = grad
        snapshot.restore()


def trained(name: str, model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> list[nn.Parameter]:
    """The given parameters, or those of the model, that require gradients."""
    found = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    if not found:
        raise ValueError(f"{name}: no parameter requires a gradient")
    return found


def evaluate(name: str, loss: Loss) -> Tensor:
    with torch.enable_grad():
        value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: loss must return a tensor with one element; got {got}")
    return value


def gradient(name: str, loss: Loss, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
    """The loss and its gradient; `.grad` is not touched. What the loss does not depend on has gradient 0."""
    value = evaluate(name, loss)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return value.item(), grads


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Over all elements, in float64."""
    parts: Any = [torch.linalg.vecdot(x.double().flatten(), y.double().flatten()) for x, y in zip(a, b, strict=True)]
    return float(sum(float(part) for part in parts))


def norm(a: Sequence[Tensor]) -> float:
    """The l2 norm over all elements, in float64."""
    return float(sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in a) ** 0.5)


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """nan where one of them is 0."""
    length = norm(a) * norm(b)
    return dot(a, b) / length if length > 0 else float("nan")
