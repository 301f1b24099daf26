"""sharpness.py: how much the loss can grow in a box around the weights (as in Mueller et al. 2023, "Normalization
Layers Are All That Sharpness-Aware Minimization Needs", and Andriushchenko et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkern.probes.result import Result, axes
from normkern.probes.state import Point, gradient, trained, untouched

_ALIVE = 0.75  # share of the steps since the last checkpoint that must have raised the loss
_NEW = 0.75  # share of the new point in the average with the one before it


@dataclass(frozen=True)
class BatchSharpness:
    """A batch: its loss at the weights, and the largest that was found in the box."""

    batch: int
    samples: int
    loss: float
    worst: float

    @property
    def sharpness(self) -> float:
        return self.worst - self.loss


@dataclass(frozen=True)
class Sharpness(Result):
    """What `sharpness` finds."""

    rho: float
    batches: tuple[BatchSharpness, ...]

    @property
    def value(self) -> float:
        """The mean over batches of what the loss grows by."""
        return sum(row.sharpness for row in self.batches) / len(self.batches)

    def table(self) -> tuple[BatchSharpness, ...]:
        return self.batches

    def plot(self, ax: Any = None) -> Any:
        """A bar for every batch, and their mean."""
        axis = axes(ax)
        axis.bar([row.batch for row in self.batches], [row.sharpness for row in self.batches])
        axis.axhline(self.value, color="black", linestyle="--", label=f"mean {self.value:.3g}")
        axis.set(xlabel="batch", ylabel=f"growth of the loss, rho = {self.rho:g}")
        axis.legend()
        return axis


def sharpness(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    rho: float,
    *,
    adaptive: bool = False,
    normalize_logits: bool = True,
    steps: int = 20,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Sharpness:
    """m-sharpness: the mean over batches B of max L_B(w + d) - L_B(w) over |d_i| <= rho c_i, by APGD.

    Args:
        model: measured in eval mode, so that batch norm uses its running statistics; left exactly as it was.
        batches: pairs of input and target; m is their size (128 in the papers).
        rho: radius of the box.
        adaptive: c_i = |w_i|, which does not depend on the scale of the weights, in place of 1.
        normalize_logits: logits are centered and divided by their l2 norm, sample by sample, so that a network cannot
            become flat or sharp by scaling its last layer.
        steps: of sign ascent. The first is 2 rho long; it is halved and the search goes on from the best point found
            at checkpoints since which fewer than 75 % of the steps raised the loss, or since which neither the step
            nor the best point changed (Croce and Hein 2020).
        loss: of logits and target, a mean.
        parameters: those that move; by default all of the model that require gradients.

    What is found is a point of the box, so the true maximum is this large or larger. Raises ValueError for a radius or
    a number of steps that is not positive, for no batch, and where no parameter requires gradients.
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"sharpness: rho must be positive and finite; got {rho}")
    if steps < 1:
        raise ValueError(f"sharpness: steps must be at least 1; got {steps}")
    moved = trained("sharpness", model, parameters)
    rows: list[BatchSharpness] = []
    with untouched(model) as before:
        for x, y in batches:

            def objective(x: Tensor = x, y: Tensor = y) -> Tensor:
                before.restore()  # the same noise at every call
                model.eval()
                logits = model(x)
                if normalize_logits:
                    logits = logits - logits.mean(-1, keepdim=True)
                    logits = logits / torch.linalg.vector_norm(logits, dim=-1, keepdim=True).clamp(min=1e-10)
                return loss(logits, y)

            start = Point(moved)
            try:
                here, worst = _ascend(objective, start, rho, adaptive, steps)
            finally:
                start.restore()
            rows.append(BatchSharpness(len(rows), len(x), here, worst))
    if not rows:
        raise ValueError("sharpness: batches must hold at least one pair of input and target")
    return Sharpness(rho, tuple(rows))


def _checkpoints(steps: int) -> set[int]:
    """Steps at the shares 0.22, 0.41, 0.57, ... of all: the gaps shrink by 0.03 down to 0.06."""
    found, last, share = set(), 0.0, 0.22
    while share <= 1:
        found.add(math.ceil(share * steps))
        last, share = share, share + max(share - last - 0.03, 0.06)
    return found


def _ascend(
    objective: Callable[[], Tensor], start: Point, rho: float, adaptive: bool, steps: int
) -> tuple[float, float]:
    """The loss at the start, and the largest one that sign ascent meets in the box around it."""
    radius = [rho * w.abs() if adaptive else torch.full_like(w, rho) for w in start.values]
    offset = [torch.zeros_like(w) for w in start.values]
    best_offset, checkpoints = offset, _checkpoints(steps)
    length, raised, last_checkpoint, halved, best_then = 2.0, 0, 0, False, -math.inf
    here, grads = gradient("sharpness", objective, start.parameters)
    first = best = here
    best_grads = grads
    for step in range(1, steps + 1):
        taken = []
        for d, g, r in zip(offset, grads, radius, strict=True):
            new = torch.clamp(d + length * r * g.sign(), -r, r)
            taken.append(_NEW * new + (1 - _NEW) * d if step > 1 else new)
        offset, last = taken, here
        start.move([w + d for w, d in zip(start.values, offset, strict=True)])
        here, grads = gradient("sharpness", objective, start.parameters)
        raised += here > last
        if here > best:
            best, best_offset, best_grads = here, offset, grads
        if step in checkpoints:
            stuck = not halved and best_then == best
            halved = raised < _ALIVE * (step - last_checkpoint) or stuck
            if halved:
                length /= 2
                offset, here, grads = best_offset, best, best_grads
            raised, last_checkpoint, best_then = 0, step, best
    return first, best
