"""spectrum.py: exact singular values of convolutions: an SVD of the transfer matrix at every frequency (Sedghi et al.
2019, "The Singular Values of Convolutional Layers"), which reshaping the kernel to a matrix does not give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkern.probes.result import Result, axes
from normkern.probes.state import untouched


def _each(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    found = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(found) != dims or any(v < 1 for v in found):
        raise ValueError(f"conv_singular_values: {name} must be positive, one or {dims} of them; got {value}")
    return found


def _transfer(
    weight: Tensor,
    size: Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    half: bool,
) -> Tensor:
    """Matrices (frequencies, groups, Cout / groups, aliases * Cin / groups); half of the last axis of frequencies
    where `half`: a real kernel has the same singular values at a frequency and at its mirror."""
    if not isinstance(weight, Tensor) or weight.dim() < 3 or not weight.is_floating_point():
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"conv_singular_values: weight must be a real (Cout, Cin / groups, ...) kernel; got {got}")
    dims = weight.dim() - 2
    steps, spread = _each("stride", stride, dims), _each("dilation", dilation, dims)
    points = _each("size", tuple(size), dims)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"conv_singular_values: groups must divide the {weight.shape[0]} outputs; got {groups}")
    if any(n % s for n, s in zip(points, steps, strict=True)):
        raise ValueError(f"conv_singular_values: stride must divide size; got stride={steps} and size={points}")
    kernel = weight.detach().double()
    for axis, (gap, n) in enumerate(zip(spread, points, strict=True), start=2):
        # Taps at their places on the torus; those that are a whole turn apart meet.
        places = torch.arange(kernel.shape[axis], device=kernel.device) * gap % n
        shape = list(kernel.shape)
        shape[axis] = n
        kernel = kernel.new_zeros(shape).index_add(axis, places, kernel)
    axes_of_space = tuple(range(2, 2 + dims))
    strided = any(s > 1 for s in steps)
    halved = half and not strided
    spectrum = torch.fft.rfftn(kernel, dim=axes_of_space) if halved else torch.fft.fftn(kernel, dim=axes_of_space)
    out, depth = weight.shape[:2]
    shape = [groups, out // groups, depth]
    for n, s in zip(spectrum.shape[2:], steps, strict=True):
        shape += [s, n // s]
    # What a stride leaves of the outputs at s neighbouring points adds up over the s aliases of a frequency.
    spectrum = spectrum.reshape(shape) / math.sqrt(math.prod(steps))
    frequencies, aliases = [4 + 2 * i for i in range(dims)], [3 + 2 * i for i in range(dims)]
    matrices: Tensor = spectrum.permute(*frequencies, 0, 1, 2, *aliases).reshape(
        -1, groups, out // groups, depth * math.prod(steps)
    )
    return matrices


def conv_singular_values(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """All singular values of the convolution (1-D to 3-D) with circular padding on maps of `size`, float64, falling.

    Args:
        weight: (Cout, Cin / groups, ...), as a torch convolution has it.
        size: of the input map, one integer for every dimension of space. stride must divide it.

    There are min(Cout, Cin * prod(stride)) of them for each of the prod(size / stride) frequencies, groups counted
    apart; others are 0. Raises ValueError for arguments that do not fit.
    """
    values: Tensor = torch.linalg.svdvals(_transfer(weight, size, stride, dilation, groups, False))
    return values.flatten().sort(descending=True).values


def conv_spectral_norm(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> float:
    """The largest of `conv_singular_values`, in half the time: the exact operator norm with circular padding. With
    zeros around the map, the norm on a torus of the map and its padding is an upper bound."""
    return float(torch.linalg.svdvals(_transfer(weight, size, stride, dilation, groups, True)).max())


@dataclass(frozen=True)
class LayerNorms:
    """A layer, the torus its norm was taken on (() for a linear layer), and two norms: of the convolution, and of its
    kernel as a (Cout, Cin * taps) matrix, which is not the operator's."""

    layer: str
    size: tuple[int, ...]
    spectral_norm: float
    reshaped: float
    exact: bool  # False: zeros around the map, or none, and spectral_norm is an upper bound


@dataclass(frozen=True)
class SpectralNorms(Result):
    """What `spectral_norms` finds, in the order of the calls."""

    layers: tuple[LayerNorms, ...]

    def table(self) -> tuple[LayerNorms, ...]:
        return self.layers

    def plot(self, ax: Any = None) -> Any:
        """Both norms by layer."""
        axis = axes(ax)
        names = [row.layer for row in self.layers]
        axis.plot(names, [row.spectral_norm for row in self.layers], marker="o", label="convolution")
        axis.plot(names, [row.reshaped for row in self.layers], marker="x", label="kernel as a matrix")
        axis.set(ylabel="spectral norm")
        axis.tick_params(axis="x", rotation=90)
        axis.legend()
        return axis


_FORWARDS = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


def spectral_norms(model: nn.Module, *inputs: Any) -> SpectralNorms:
    """The spectral norm of every convolution and linear layer that `model(*inputs)` calls, at the sizes they meet.

    A convolution with circular padding, of as much as keeps the size, is taken on its map: exact. One that pads with
    zeros, or not at all, is part of the convolution on the torus of its padded map: the norm there bounds it from
    above, and comes close on maps much larger than the kernel. Parametrized layers are measured with the weight they
    use, those of normkern.nn with a normalized weight by that one. Other layers whose forward is not torch's own
    (ConvNorm2d), transposed convolutions and other padding are left out, as is what follows a layer. The model is
    left exactly as it was.
    """
    rows: dict[str, LayerNorms] = {}
    hooks = []
    for name, module in model.named_modules():
        if type(module).forward in _FORWARDS or hasattr(module, "normalized_weight"):

            def measure(module: nn.Module, given: tuple[Tensor, ...], _: Any, name: str = name) -> None:
                if name not in rows and (found := _measured(name, module, given[0])) is not None:
                    rows[name] = found

            hooks.append(module.register_forward_hook(measure))
    try:
        with untouched(model), torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return SpectralNorms(tuple(rows.values()))


def _measured(name: str, module: Any, x: Tensor) -> LayerNorms | None:
    weight = (module.normalized_weight() if hasattr(module, "normalized_weight") else module.weight).detach()
    reshaped = float(torch.linalg.svdvals(weight.double().flatten(1)).max())
    if isinstance(module, nn.Linear):
        return LayerNorms(name, (), reshaped, reshaped, True)
    dims = weight.dim() - 2
    size = tuple(x.shape[-dims:])
    padding = module._reversed_padding_repeated_twice  # (left, right) of the last axis first
    padded = [padding[2 * i] + padding[2 * i + 1] for i in reversed(range(dims))]
    exact = module.padding_mode == "circular"
    if exact:
        if padded != [gap * (k - 1) for gap, k in zip(module.dilation, weight.shape[2:], strict=True)]:
            return None
    elif module.padding_mode != "zeros":
        return None
    else:
        size = tuple(n + p for n, p in zip(size, padded, strict=True))
        # Zeros that fill up to a multiple of the stride change no output.
        size = tuple(n + -n % s for n, s in zip(size, module.stride, strict=True))
    if any(n % s for n, s in zip(size, module.stride, strict=True)):
        return None
    value = conv_spectral_norm(weight, size, stride=module.stride, dilation=module.dilation, groups=module.groups)
    return LayerNorms(name, size, value, reshaped, exact)
