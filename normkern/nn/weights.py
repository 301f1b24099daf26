"""weights.py: convolutions that normalize their weight, all at once if asked for, and the activation that goes with
weight norm.

In eval mode and without gradients the normalized weight is kept until the weight changes: until it is written to in
place, replaced, moved or loaded, or the mode changes. Writing through `weight.data` is not seen; call train() or eval()
after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from normkern import functional as F
from normkern.family import _check_variant


class _WeightConv2d(torch.nn.Conv2d):
    """A Conv2d whose kernel is `normalized_weight()`; a subclass says what that is."""

    gain: torch.nn.Parameter | None

    def __init__(self, *args: Any, gain: bool, eps: float, **kwargs: Any) -> None:
        self.eps = eps
        self._kept: Any = None  # what it was made from, and the normalized weight, without gradients
        self._lent: Tensor | None = None  # the normalized weight, during a forward pass of standardize_together
        super().__init__(*args, **kwargs)
        where: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.gain = torch.nn.Parameter(torch.ones(self.out_channels, **where)) if gain else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        gain = self.__dict__.get("_parameters", {}).get("gain")
        if gain is not None:
            torch.nn.init.ones_(gain)

    def _normalize(self) -> Tensor:
        raise NotImplementedError

    def normalized_weight(self) -> Tensor:
        """The kernel that forward uses, of weight's shape."""
        if torch.compiler.is_compiling():
            return self._normalize()
        if self._lent is not None:
            return self._lent
        if not self._may_keep():
            return self._normalize()
        if not self._is_kept():
            self._kept = self._state(), self._normalize()
        return self._kept[1]  # type: ignore[no-any-return]

    def _may_keep(self) -> bool:
        return not (self.training or torch.is_grad_enabled())

    def _state(self) -> tuple[Any, ...]:
        return tuple((id(p), p._version, p.data_ptr()) for p in (self.weight, self.gain) if p is not None)

    def _is_kept(self) -> bool:
        return self._kept is not None and self._kept[0] == self._state()

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, self.normalized_weight(), self.bias)
        return y

    def train(self, mode: bool = True) -> Any:
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_lent": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"  # type: ignore[no-untyped-call]


class WSConv2d(_WeightConv2d):
    """Conv2d with weight standardization (Qiao et al. 2019), see normkern.weight_standardize.

    Args:
        in_channels to padding_mode: as of torch.nn.Conv2d.
        gain: whether there is `gain`, a factor for every output channel.
        eps, variant: of normkern.weight_standardize.
    """

    scaled = False

    def __init__(
        self, *args: Any, gain: bool = False, eps: float = 1e-5, variant: str = "torch", **kwargs: Any
    ) -> None:
        _check_variant(type(self).__name__, variant)
        self.variant = variant
        super().__init__(*args, gain=gain, eps=eps, **kwargs)

    def _normalize(self) -> Tensor:
        return F.weight_standardize(self.weight, self.gain, self.eps, scaled=self.scaled, variant=self.variant)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gain={self.gain is not None}, variant={self.variant!r}"


class ScaledWSConv2d(WSConv2d):
    """Conv2d with scaled weight standardization, made for relu (Brock et al. 2021), see normkern.weight_standardize.

    The gain of relu, sqrt(2 pi/(pi - 1)), is folded into the kernel, so a plain relu follows.

    Args:
        as of WSConv2d, with a gain.
    """

    scaled = True

    def __init__(self, *args: Any, gain: bool = True, eps: float = 1e-5, variant: str = "torch", **kwargs: Any) -> None:
        super().__init__(*args, gain=gain, eps=eps, variant=variant, **kwargs)


def standardize_together(model: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Standardize the kernels of all WSConv2d and ScaledWSConv2d of a model at the start of its forward pass, together.

    One launch forward and one backward on CUDA, one operator on the CPU, for all kernels of a dtype with the same eps
    (normkern.weight_standardize_all) instead of one for every layer. Results and gradients are the same. Without
    gradients in eval mode the kernels are kept until they change, as without it. What is not called through `model`,
    torch.compile, and weights that are DTensors are as before.

    All kernels exist from the start of the pass to its end. Parts that recompute their activations
    (torch.utils.checkpoint) compute their kernels then again, which torch answers with an error: leave such models out.

    Returns:
        A handle whose remove() ends it.
    """
    before = model.register_forward_pre_hook(_lend)
    after = model.register_forward_hook(_take_back, always_call=True)
    return _Both(before, after)


class _Both(torch.utils.hooks.RemovableHandle):
    """Two handles as one."""

    def __init__(self, *handles: torch.utils.hooks.RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _lend(model: torch.nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    sets: dict[tuple[Any, ...], list[WSConv2d]] = {}
    for layer in _standardizing(model):
        if not (layer._may_keep() and layer._is_kept()):
            sets.setdefault((layer.eps, layer.scaled, layer.variant), []).append(layer)
    for (eps, scaled, variant), layers in sets.items():
        weights, gains = [layer.weight for layer in layers], [layer.gain for layer in layers]
        found = F.weight_standardize_all(weights, gains, eps, scaled=scaled, variant=variant)
        for layer, weight in zip(layers, found, strict=True):
            if layer._may_keep():
                layer._kept = layer._state(), weight
            else:
                layer._lent = weight


def _take_back(model: torch.nn.Module, *_: Any) -> None:
    for layer in _standardizing(model):
        layer._lent = None


def _standardizing(model: torch.nn.Module) -> Iterable[WSConv2d]:
    for layer in model.modules():
        if isinstance(layer, WSConv2d) and not hasattr(layer.weight, "device_mesh"):
            yield layer


class WeightNormConv2d(_WeightConv2d):
    """Conv2d with weight norm (Salimans and Kingma 2016), see normkern.weight_norm; ScaledReLU goes with it.

    Args:
        in_channels to padding_mode: as of torch.nn.Conv2d.
        eps: of normkern.weight_norm; Lubana et al. 2021 have 1e-5 in its place.
    """

    def __init__(self, *args: Any, eps: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, gain=True, eps=eps, **kwargs)

    def _normalize(self) -> Tensor:
        return F.weight_norm(self.weight, self.gain, self.eps)


class CenteredConv2d(_WeightConv2d):
    """Conv2d with weight centering, see normkern.weight_center.

    Args:
        in_channels to padding_mode: as of torch.nn.Conv2d.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gain=False, eps=0.0, **kwargs)

    def _normalize(self) -> Tensor:
        return F.weight_center(self.weight)


class ScaledReLU(torch.nn.Module):
    """normkern.scaled_relu: relu, scaled and shifted to the mean 0 and variance 1 for a standard normal input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.scaled_relu(input)
