"""landscape.py: the loss along a step, and how a step moves the gradients of the layers above (Santurkar et al. 2018,
"How Does Batch Normalization Help Optimization?", figure 4 and definition 2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkern.probes.result import Result, axes
from normkern.probes.state import Loss, Point, Snapshot, cosine, evaluate, gradient, norm, trained, untouched


@dataclass(frozen=True)
class LandscapeStep:
    """At w - step * direction: the loss, how far from w that is, and the gradient there against the one at w."""

    step: float
    loss: float
    distance: float
    gradient_distance: float
    gradient_cosine: float


@dataclass(frozen=True)
class Landscape(Result):
    """What `landscape` finds: the loss and the norm of the gradient at w, and a row for every step."""

    loss: float
    gradient_norm: float
    steps: tuple[LandscapeStep, ...]

    @property
    def loss_range(self) -> tuple[float, float]:
        """Smallest and largest loss on the way."""
        return _range(row.loss for row in self.steps)

    @property
    def gradient_predictiveness(self) -> tuple[float, float]:
        """Smallest and largest l2 distance of the gradient on the way from that at w."""
        return _range(row.gradient_distance for row in self.steps)

    @property
    def gradient_cosine(self) -> tuple[float, float]:
        """Smallest and largest cosine of the gradient on the way with that at w."""
        return _range(row.gradient_cosine for row in self.steps)

    @property
    def beta_smoothness(self) -> float:
        """The largest ratio of how far the gradient moved to how far the weights did."""
        ratios = (row.gradient_distance / row.distance if row.distance > 0 else math.nan for row in self.steps)
        return _range(ratios)[1]

    def table(self) -> tuple[LandscapeStep, ...]:
        return self.steps

    def plot(self, ax: Any = None) -> Any:
        """Two axes: loss and distance of the gradient by step."""
        left, right = axes(ax, 2)
        lengths = [row.step for row in self.steps]
        left.plot([0.0, *lengths], [self.loss, *(row.loss for row in self.steps)], marker="o")
        right.plot([0.0, *lengths], [0.0, *(row.gradient_distance for row in self.steps)], marker="o")
        left.set(xlabel="step", ylabel="loss")
        right.set(xlabel="step", ylabel="l2 distance of the gradient")
        return [left, right]


def _range(values: Iterable[float]) -> tuple[float, float]:
    """nan where one of them is: a walk that left the finite has no range."""
    found = list(values)
    if any(math.isnan(value) for value in found):
        return math.nan, math.nan
    return min(found), max(found)


def landscape(
    model: nn.Module,
    loss: Loss,
    steps: Sequence[float],
    *,
    direction: Sequence[Tensor] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Landscape:
    """Loss range, gradient predictiveness and effective beta-smoothness along one step from where the model stands.

    Walks to w - a * g for every a in `steps` along the one gradient g at w, on one batch, in the mode (train or eval)
    that the model is in, and takes loss and gradient there.

    Args:
        model: its parameters, buffers, gradients, train flags and random generators are put back exactly. Not to be
            called between a forward pass and its backward pass.
        loss: a forward pass to a loss of one element, always on the same batch: `lambda: cross_entropy(model(x), y)`.
            Dropout and other noise are the same at every call.
        steps: positive; multiples of the learning rate, say.
        direction: tensors like the parameters that require gradients, to walk along in place of the gradient.
        parameters: those that move; by default all of the model that require gradients.

    Norms, distances and cosines are over all parameters at once, in float64. Raises ValueError for a loss of more than
    one element, steps that are not positive, a direction that does not fit, and where no parameter requires gradients.
    """
    lengths = [float(step) for step in steps]
    if not lengths or not all(0 < step < math.inf for step in lengths):
        raise ValueError(f"landscape: steps must be positive, finite and at least one; got {list(steps)}")
    moved = trained("landscape", model, parameters)
    if direction is not None and [d.shape for d in direction] != [p.shape for p in moved]:
        raise ValueError(
            f"landscape: direction must have the shapes of the parameters; got {[tuple(d.shape) for d in direction]} "
            f"for {[tuple(p.shape) for p in moved]}"
        )
    start = Point(moved)
    rows = []
    try:
        with untouched(model) as before:
            value, slope = gradient("landscape", loss, moved)
            way = slope if direction is None else list(direction)
            for step in lengths:
                start.move([w - step * d for w, d in zip(start.values, way, strict=True)])
                before.restore()
                here, found = gradient("landscape", loss, moved)
                # What rounding left of the step: p - w, not step * g.
                distance = norm([p.detach() - w for p, w in zip(moved, start.values, strict=True)])
                apart = norm([f - g for f, g in zip(found, slope, strict=True)])
                rows.append(LandscapeStep(step, here, distance, apart, cosine(found, slope)))
    finally:
        start.restore()
    return Landscape(value, norm(slope), tuple(rows))


@dataclass(frozen=True)
class ShiftedLayer:
    """The gradient of one layer before (G) and after (G') all layers below it moved: internal covariate shift is
    ||G - G'||, 0 and cosine 1 where the layers below do not matter."""

    layer: str
    l2: float  # ||G - G'||
    relative: float  # ||G - G'|| / ||G||
    cosine: float
    gradient_norm: float  # ||G||


@dataclass(frozen=True)
class CovariateShift(Result):
    """What `covariate_shift` finds, from the first layer to the last."""

    layers: tuple[ShiftedLayer, ...]

    def table(self) -> tuple[ShiftedLayer, ...]:
        return self.layers

    def plot(self, ax: Any = None) -> Any:
        """Two axes: l2 distance and cosine by layer."""
        left, right = axes(ax, 2)
        names = [row.layer for row in self.layers]
        left.plot(names, [row.l2 for row in self.layers], marker="o")
        right.plot(names, [row.cosine for row in self.layers], marker="o")
        for axis, title in ((left, "||G - G'||"), (right, "cosine of G and G'")):
            axis.set(ylabel=title)
            axis.tick_params(axis="x", rotation=90)
        return [left, right]


class ShiftRecorder:
    """What `with covariate_shift(...) as shift` gives; `shift.result` is there when the block has ended."""

    def __init__(self) -> None:
        self._result: CovariateShift | None = None

    @property
    def result(self) -> CovariateShift:
        if self._result is None:
            raise RuntimeError("covariate_shift: the result is there when the with block has ended")
        return self._result


@contextmanager
def covariate_shift(
    model: nn.Module, loss: Loss, *, layers: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module
) -> Iterator[ShiftRecorder]:
    """Internal covariate shift of the update made inside the block (definition 2.1).

    ```
    with normkern.probes.covariate_shift(model, lambda: cross_entropy(model(x), y)) as shift:
        optimizer.step()
    shift.result.to_pandas()
    ```
    For every layer i, in the order in which the loss first calls them: G is the gradient of its parameters at the
    weights on entry, G' the gradient with the layers before i at their weights on exit, i and those behind it at those
    on entry; both on the batch of `loss`, with the same noise. That is a forward and backward pass for every layer.

    Args:
        model: left as the block leaves it; gradients, buffers, train flags and random generators are not touched.
        loss: as in `landscape`.
        layers: types of the modules that are measured. All that have parameters move with the rest. Parameters of
            modules that are never called count to the module around them that is; those without a gradient do not move.

    Raises ValueError where the loss depends on no parameter of a measured layer, and RuntimeError when `result` is
    read inside the block.
    """
    chosen, at_start = _layers(model, loss)
    measured = [name for name, (module, _) in chosen.items() if isinstance(module, layers)]
    if not measured:
        raise ValueError("covariate_shift: no layer of these types has parameters that the loss depends on")
    everything = [p for _, group in chosen.values() for p in group]
    before, state = Point(everything), Snapshot(model)
    recorder = ShiftRecorder()
    yield recorder
    after = Point(everything)
    rows = []
    try:
        with untouched(model):
            target = list(before.values)
            position = 0
            for name, (_, group) in chosen.items():
                if name in measured:
                    before.move(target)
                    state.restore()
                    _, found = gradient("covariate_shift", loss, group)
                    rows.append(_shifted(name, [at_start[p] for p in group], found))
                target[position : position + len(group)] = after.values[position : position + len(group)]
                position += len(group)
    finally:
        after.restore()
    recorder._result = CovariateShift(tuple(rows))


def _shifted(name: str, g: list[Tensor], moved: list[Tensor]) -> ShiftedLayer:
    apart, length = norm([b - a for a, b in zip(g, moved, strict=True)]), norm(g)
    relative = apart / length if length > 0 else math.nan
    return ShiftedLayer(name, apart, relative, cosine(g, moved), length)


def _layers(
    model: nn.Module, loss: Loss
) -> tuple[dict[str, tuple[nn.Module, list[nn.Parameter]]], dict[nn.Parameter, Tensor]]:
    """Modules in the order of their first call, with the parameters that are theirs alone; and the gradients."""
    names = {module: name for name, module in model.named_modules()}
    order: dict[nn.Module, None] = {}

    def note(module: nn.Module, _: Any) -> None:
        order.setdefault(module)

    parameters = trained("covariate_shift", model, None)
    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        with untouched(model):
            found = torch.autograd.grad(evaluate("covariate_shift", loss), parameters, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    grads = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
    parents = {child: module for module in names for child in module.children()}
    groups: dict[nn.Module, list[nn.Parameter]] = {module: [] for module in order}
    seen: set[nn.Parameter] = set()
    for module in names:
        owner = module
        while owner not in order and owner in parents:
            owner = parents[owner]
        for p in module.parameters(recurse=False):
            if p in grads and p not in seen:  # tied weights belong to the first
                seen.add(p)
                groups.setdefault(owner, []).append(p)
    return {names[module]: (module, group) for module, group in groups.items() if group}, grads
