"""activations.py: what a forward and backward pass does, layer by layer (Lubana et al. 2021, "Beyond BatchNorm"):
variance, similarity between samples and stable rank of activations, and the gradient at every convolution's output."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normkern import nn as layers
from normkern.functional import moments
from normkern.probes.result import Result, axes
from normkern.probes.state import Loss, gradient, untouched

Layers = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool]

_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
    layers.ScaledReLU,
)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# Norms that end in an activation of their own, where they have this parameter.
_ENDS_IN_ACTIVATION: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((layers.FilterResponseNorm1d, layers.FilterResponseNorm2d, layers.FilterResponseNorm3d), ("tau",)),
    **dict.fromkeys((layers.EvoNorm2dS0, layers.EvoNorm2dB0), ("v",)),
}


def _is_activation(_: str, module: nn.Module) -> bool:
    """It is an activation, or a layer that ends in one."""
    return (
        isinstance(module, _ACTIVATIONS)
        or isinstance(getattr(module, "act", None), str)
        or any(getattr(module, name, None) is not None for name in _ENDS_IN_ACTIVATION.get(type(module), ()))
    )


@dataclass(frozen=True)
class LayerActivity:
    """One call of one layer. Values that were not asked for, or of which there was nothing, are None."""

    step: int  # forward passes of the model before this one
    layer: str
    call: int  # of this layer in this forward pass: a ReLU may be used twice
    variance: float | None  # over samples and positions, unbiased, averaged over channels
    similarity: float | None  # mean cosine of the flattened activations of two different samples
    stable_rank: float | None  # of the normalized activations: samples / largest eigenvalue of their cosines
    gradient_norm: float | None  # l2 norm of d loss / d output over the whole batch


@dataclass(frozen=True)
class Activations(Result):
    """What was recorded, in the order of the calls."""

    layers: tuple[LayerActivity, ...]

    def table(self) -> tuple[LayerActivity, ...]:
        return self.layers

    def plot(self, ax: Any = None) -> Any:
        """Four axes: variance, similarity, stable rank and gradient norm by layer; a line for every step."""
        drawn = axes(ax, 4)
        names = ("variance", "similarity", "stable_rank", "gradient_norm")
        for axis, name in zip(drawn, names, strict=True):
            for step in dict.fromkeys(row.step for row in self.layers):
                rows = [row for row in self.layers if row.step == step and getattr(row, name) is not None]
                labels = [row.layer if row.call == 0 else f"{row.layer} ({row.call + 1})" for row in rows]
                axis.plot(labels, [getattr(row, name) for row in rows], marker=".")
            axis.set(title=name.replace("_", " "))
            axis.tick_params(axis="x", rotation=90)
        drawn[0].set_yscale("log")
        drawn[3].set_yscale("log")
        return drawn


@dataclass
class _Call:
    """Of one call, as tensors: nothing waits for the device before the values are read."""

    step: int
    layer: str
    call: int
    variance: Tensor | None = None
    cosines: Tensor | None = None
    gradient_norm: Tensor | None = None


@dataclass
class Recorder:
    """What `record_activations` gives: a context manager; `result` can be read at any time, `clear` forgets."""

    model: nn.Module
    at: Layers
    gradients_at: Layers
    samples: int
    _calls: list[_Call] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)
    _step: int = -1
    _seen: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Recorder:
        if self._hooks:
            raise RuntimeError("record_activations: this recorder is open already")
        activations = _chosen(self.model, self.at)
        outputs = _chosen(self.model, self.gradients_at)
        if not activations and not outputs:
            raise ValueError(
                "record_activations: no module of the model matches at= or gradients_at=; activations that are "
                "functions have no module: name the ones around them"
            )
        self._hooks.append(self.model.register_forward_pre_hook(self._begin, prepend=True))
        for name, module in self.model.named_modules():
            if module in activations or module in outputs:
                hook = self._hook(name, module in activations, module in outputs)
                self._hooks.append(module.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def clear(self) -> None:
        """Forget what was recorded; steps count from 0 again."""
        self._calls.clear()
        self._step = -1

    def _begin(self, _: nn.Module, __: Any) -> None:
        self._step += 1
        self._seen.clear()

    def _hook(self, name: str, activations: bool, gradients: bool) -> Callable[..., None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            y = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() < 2:
                return
            call = _Call(max(self._step, 0), name, self._seen[name])
            self._seen[name] += 1
            self._calls.append(call)
            if activations:
                with torch.no_grad():
                    call.variance, call.cosines = channel_variance(y.detach()), cosines(y.detach()[: self.samples])
            if gradients and y.requires_grad:

                def take(dy: Tensor) -> None:
                    call.gradient_norm = torch.linalg.vector_norm(dy.detach(), dtype=torch.float64)

                y.register_hook(take)  # type: ignore[no-untyped-call]

        return record

    @property
    def result(self) -> Activations:
        rows = []
        for call in self._calls:
            similarity = rank = None
            if call.cosines is not None and len(call.cosines) > 1:
                similarity, rank = mean_similarity(call.cosines), stable_rank(call.cosines)
            variance, slope = call.variance, call.gradient_norm
            rows.append(
                LayerActivity(
                    call.step,
                    call.layer,
                    call.call,
                    None if variance is None else variance.item(),
                    similarity,
                    rank,
                    None if slope is None else slope.item(),
                )
            )
        return Activations(tuple(rows))


def _chosen(model: nn.Module, wanted: Layers) -> set[nn.Module]:
    if isinstance(wanted, (type, tuple)):
        return {module for module in model.modules() if isinstance(module, wanted)}
    return {module for name, module in model.named_modules() if wanted(name, module)}


def record_activations(
    model: nn.Module,
    *,
    at: Layers = _is_activation,
    gradients_at: Layers = _CONVOLUTIONS,
    samples: int = 128,
) -> Recorder:
    """Record every forward and backward pass made inside the block, by hooks that are gone behind it.

    ```
    with normkern.probes.record_activations(model) as recorder:
        cross_entropy(model(x), y).backward()
    recorder.result.to_pandas()
    ```
    Args:
        model: a forward pass of it is a step.
        at: where variance, similarity and stable rank are taken: types of modules, or a function of name and module.
            By default modules that are, or end in, an activation.
        gradients_at: where the norm of the gradient with respect to the output is taken; by default convolutions.
        samples: the first so many of a batch count for similarity and stable rank, whose cost is their square times
            the size of a sample.

    Outputs are (N, C, ...), floating-point; of tuples the first element counts. Nothing is computed on the host, and
    nothing waits for the device, until `result` is read. Raises ValueError on entry where no module matches.
    """
    if samples < 2:
        raise ValueError(f"record_activations: samples must be at least 2; got {samples}")
    return Recorder(model, at, gradients_at, samples)


def activations(
    model: nn.Module,
    loss: Loss,
    *,
    at: Layers = _is_activation,
    gradients_at: Layers = _CONVOLUTIONS,
    samples: int = 128,
) -> Activations:
    """One forward and backward pass, recorded as by `record_activations`; the model is left exactly as it was.

    loss: a forward pass to a loss of one element: `lambda: cross_entropy(model(x), y)`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with untouched(model), record_activations(model, at=at, gradients_at=gradients_at, samples=samples) as recorder:
        if parameters:
            gradient("activations", loss, parameters)
        else:
            loss()
    return recorder.result


def channel_variance(y: Tensor) -> Tensor:
    """The unbiased variance of every channel over samples and positions of y (N, C, ...), averaged over channels."""
    count = y.numel() // y.shape[1]
    _, var = moments(y, [dim for dim in range(y.dim()) if dim != 1])
    return var.mean() * (count / (count - 1) if count > 1 else math.nan)


def cosines(y: Tensor) -> Tensor:
    """(N, N): cosines between the flattened samples of y (N, ...); those with a sample of zeros are 0."""
    flat = y.flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    unit = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    gram: Tensor = unit @ unit.T
    return gram


def mean_similarity(gram: Tensor) -> float:
    """The mean of the off-diagonal of `cosines`."""
    n = len(gram)
    wide = gram.double()
    return float((wide.sum() - wide.diagonal().sum()) / (n * (n - 1)))


def stable_rank(gram: Tensor) -> float:
    """trace / largest eigenvalue of `cosines`: from 1, where all samples are one direction, to N."""
    if not bool(gram.isfinite().all()):
        return math.nan
    wide = gram.double()
    largest = float(torch.linalg.eigvalsh(wide)[-1])
    return float(wide.diagonal().sum()) / largest if largest > 0 else math.nan
