# Sharpness-aware minimization as the paper's formulas and released code have it, tensor by tensor, with whole copies:
# Mueller et al. 2023, section 2: SAM, ASAM (element, layer) and Fisher, for p = 2 and p = infinity.
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def transform_of(kind: str, w: Tensor, g: Tensor, eta: float) -> Tensor:
    if kind == "element":
        return w.abs() + eta
    if kind == "layer":
        return torch.full_like(w, float(w.norm() * (1 + eta)))
    if kind == "fisher":
        return (1 + eta * g**2) ** -0.5
    return torch.ones_like(w)


def step(
    model: nn.Module,
    base: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
    perturbed: list[str],
    rho: float,
    p: float | str,
    transform: str,
    eta: float,
    normalize_bias: bool,
) -> Tensor:
    """One step; `perturbed` names parameters. Everything is computed, copied and put back."""
    parameters = dict(model.named_parameters())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.zero_grad()
    loss = loss_of()
    loss.backward()
    after_first = {name: b.clone() for name, b in model.named_buffers()}
    before = {name: w.detach().clone() for name, w in parameters.items()}
    with torch.no_grad():
        t = {}
        for name in perturbed:
            w, g = parameters[name], parameters[name].grad
            plain = name.endswith("bias") and not normalize_bias
            t[name] = transform_of("none" if plain else transform, w, g, eta)
        norm = sum(float((t[name] * parameters[name].grad).pow(2).sum()) for name in perturbed) ** 0.5
        for name in perturbed:
            g = parameters[name].grad
            if p == 2:
                parameters[name] += rho * t[name] ** 2 * g / (norm + 1e-16)
            else:
                parameters[name] += rho * t[name] * g.sign()
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    model.zero_grad()
    loss_of().backward()
    with torch.no_grad():
        for name, w in parameters.items():
            w.copy_(before[name])
    for name, b in model.named_buffers():
        b.copy_(after_first[name])
    base.step()
    return loss.detach()
