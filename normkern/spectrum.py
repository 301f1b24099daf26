"""spectrum.py: the Fourier preconditioner on a torus: lags of a kernel, V = S^(-1/2), and the convolution with it.

Three functions, differentiable any number of times, each by the compiled kernels where there are some and otherwise by
the formulas in plain PyTorch, which stand beside them: `lags` (summed autocorrelation of the kernels), `inverse_root`
(V on the frequencies of a torus), `precondition` (a map on the torus, or a part of it, through V). csrc/core/spectrum.h
has the formulas and the order of the lags.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from normkern.backends import select
from normkern.backends.triton_spectrum import lag_count as lag_count  # its module registers operators

logger = logging.getLogger("normkern")

# The compiled kernels take maps there and back by matrices of the transform up to this many points a side, on the CPU
# (kMaxPreconditionPoints in csrc/cpu/spectrum.h); larger ones go through torch.fft.
_MOST_POINTS_CPU = 96


@dataclass(frozen=True)
class Points:
    """The points of one axis of a torus that a tensor holds: first, first + step, ..."""

    first: int
    step: int
    count: int

    def slice(self) -> slice:
        return slice(self.first, self.first + (self.count - 1) * self.step + 1, self.step)


Part = tuple[Points, Points]  # of rows and of columns


@dataclass(frozen=True)
class Torus:
    """A kernel, rows x cols taps with their dilation, on a torus of `size` points."""

    kernel: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    eps: float

    @property
    def taps(self) -> list[int]:
        return [*self.kernel, *self.dilation]

    def whole(self) -> Part:
        return Points(0, 1, self.size[0]), Points(0, 1, self.size[1])


def _offsets(kernel: Sequence[int]) -> list[tuple[int, int]]:
    """The lags in their order: row 0 from column 0 on, then whole rows."""
    rows, cols = kernel
    return [(i, j) for i in range(rows) for j in range(0 if i == 0 else 1 - cols, cols)]


def _kernels(x: Tensor) -> str | None:
    """The backend whose kernels can take x, None for the formulas: operators are opaque to torch.func and to forward
    mode, and the eager backend has none."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    name = select(x).name
    return name if name in _OPERATORS else None


# ---- the formulas in plain PyTorch


def eager_lags(weight: Tensor) -> Tensor:
    """r[d] = sum_j sum_p a_j[p] a_j[p + d], float64, (Cout, lags)."""
    a = weight.double()
    rows, cols = weight.shape[2:]
    found = []
    for i, j in _offsets((rows, cols)):
        above, below = a[:, :, : rows - i], a[:, :, i:]
        left, right = (above[..., : cols - j], below[..., j:]) if j >= 0 else (above[..., -j:], below[..., : cols + j])
        found.append((left * right).sum((1, 2, 3)))
    return torch.stack(found, 1)


def _waves(torus: Torus, device: torch.device) -> Tensor:
    """cos(w . d), twice but for d = 0: (lags, rows, cols/2 + 1) float64. S is lags times this."""
    (rows, cols), (down, right) = torus.size, torus.dilation
    turn = torch.arange(rows, device=device).reshape(1, -1, 1), torch.arange(cols // 2 + 1, device=device)
    d = torch.tensor(_offsets(torus.kernel), device=device)
    # Whole turns are taken off in integers, where they cost nothing.
    first = (d[:, :1, None] * down * turn[0] % rows).double() / rows
    second = (d[:, 1:, None] * right * turn[1] % cols).double() / cols
    weights = torch.full((len(d), 1, 1), 2.0, dtype=torch.float64, device=device)
    weights[0] = 1
    return weights * torch.cos(2 * torch.pi * (first + second))


def _spectra(torus: Torus, lags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S before and after it is kept at eps r[0] or more, and the waves."""
    waves = _waves(torus, lags.device)
    s = torch.einsum("kd,dhw->khw", lags, waves)
    return s, torch.maximum(s, torus.eps * lags[:, 0, None, None]), waves


def eager_inverse_root(torus: Torus, lags: Tensor, dtype: torch.dtype) -> Tensor:
    """V, (Cout, rows, cols/2 + 1) in dtype."""
    _s, kept, _ = _spectra(torus, lags)
    null = (lags[:, 0, None, None] == 0) if torus.eps > 0 else torch.zeros_like(kept, dtype=torch.bool)
    return torch.where(null, 0.0, torch.where(null, 1.0, kept).rsqrt()).to(dtype)


def _embed(torus: Torus, x: Tensor, part: Part) -> Tensor:
    """The map on the whole torus that holds x at the points and 0 elsewhere."""
    if part == torus.whole():
        return x
    whole = x.new_zeros((*x.shape[:2], *torus.size))
    whole[:, :, part[0].slice(), part[1].slice()] = x
    return whole


def eager_precondition(torus: Torus, x: Tensor, lags: Tensor, source: Part, target: Part) -> Tensor:
    v = eager_inverse_root(torus, lags, x.dtype)
    y: Tensor = torch.fft.irfft2(torch.fft.rfft2(_embed(torus, x, source)) * v, s=torus.size)
    return y[:, :, target[0].slice(), target[1].slice()].contiguous()


# ---- lags


class _Lags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _operator("lags", weight)(weight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dlags: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return lags_gradient(weight, dlags)


def lags_gradient(weight: Tensor, dlags: Tensor) -> Tensor:
    """da_j[p] = sum over the half plane of g[d] (a_j[p + d] + a_j[p - d]): a depth-wise convolution of the kernels."""
    out, _depth, rows, cols = weight.shape
    plane = torch.zeros(out, 2 * rows - 1, 2 * cols - 1, dtype=torch.float64, device=weight.device)
    row, col = torch.tensor(_offsets((rows, cols)), device=weight.device).unbind(1)
    plane = plane.index_put((torch.arange(out, device=weight.device)[:, None], row + rows - 1, col + cols - 1), dlags)
    plane = (plane + plane.flip(1, 2)).unsqueeze(1)
    a = weight.double().transpose(0, 1)
    return F.conv2d(a, plane, padding=(rows - 1, cols - 1), groups=out).transpose(0, 1).to(weight.dtype)


def lags(weight: Tensor) -> Tensor:
    """Summed autocorrelation of weight (Cout, depth, kh, kw): float64 (Cout, lags)."""
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    if _kernels(weight) is None:
        return eager_lags(weight)
    weight = weight.contiguous()
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Lags.apply(weight)  # type: ignore[no-any-return,no-untyped-call]
    return _operator("lags", weight)(weight)  # type: ignore[no-any-return]


# ---- V


class _InverseRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, torus: Torus, lags: Tensor, wide: bool) -> Tensor:
        ctx.torus = torus
        v = _operator("inverse_root", lags)(lags, torus.taps, list(torus.size), torus.eps, wide)
        ctx.save_for_backward(lags)
        return v  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> tuple[None, Tensor, None]:
        (lags,) = ctx.saved_tensors
        return None, inverse_root_gradient(ctx.torus, lags, dv), None


def inverse_root_gradient(torus: Torus, lags: Tensor, dv: Tensor) -> Tensor:
    """dS = -V^3/2 dV, and S is lags times waves; where S is kept at eps r[0] it is that."""
    s, kept, waves = _spectra(torus, lags)
    v = eager_inverse_root(torus, lags, torch.float64)
    ds = -0.5 * v.pow(3) * dv.double()
    held = s < kept
    dlags = torch.einsum("khw,dhw->kd", torch.where(held, 0.0, ds), waves)
    dr0 = torus.eps * torch.where(held, ds, 0.0).sum((1, 2))
    return torch.cat((dlags[:, :1] + dr0[:, None], dlags[:, 1:]), 1)


def inverse_root(torus: Torus, lags: Tensor, dtype: torch.dtype) -> Tensor:
    """V = S^(-1/2): (Cout, rows, cols/2 + 1), float32 or float64, from lags."""
    if _kernels(lags) is None:
        return eager_inverse_root(torus, lags, dtype)
    wide = dtype == torch.float64
    lags = lags.contiguous()
    if torch.is_grad_enabled() and lags.requires_grad:
        return _InverseRoot.apply(torus, lags, wide)  # type: ignore[no-any-return,no-untyped-call]
    return _operator("inverse_root", lags)(  # type: ignore[no-any-return]
        lags, torus.taps, list(torus.size), torus.eps, wide
    )


# ---- maps through V


class _Precondition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, torus: Torus, x: Tensor, lags: Tensor, source: Part, target: Part) -> Tensor:
        ctx.torus, ctx.source, ctx.target = torus, source, target
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, lags)
        return _run_precondition(torus, x, lags, source, target)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        x, lags = ctx.saved_tensors
        torus, source, target = ctx.torus, ctx.source, ctx.target
        dx = dlags = None
        if ctx.needs_input_grad[1]:  # V is real and even: its circular convolution is its own transpose
            dx = precondition(torus, dy, lags, target, source)
        if ctx.needs_input_grad[2]:
            dlags = precondition_lags_gradient(torus, x, dy, lags, source, target)
        return None, dx, dlags, None, None


def precondition_lags_gradient(torus: Torus, x: Tensor, dy: Tensor, lags: Tensor, source: Part, target: Part) -> Tensor:
    """The closed form dV = c / (rows cols) sum_n Re(conj(X) G), c = 1 for columns that are their own mirror, else 2."""
    rows, cols = torus.size
    there = torch.fft.rfft2(_embed(torus, x, source).double())
    back = torch.fft.rfft2(_embed(torus, dy, target).double())
    column = torch.arange(cols // 2 + 1, device=x.device)
    mirrored = torch.where((column == 0) | (2 * column == cols), 1.0, 2.0).double()
    # Real and imaginary parts apart: a complex product would make parts that are thrown away.
    dv = (there.real * back.real + there.imag * back.imag).sum(0) * (mirrored / (rows * cols))
    return inverse_root_gradient(torus, lags, dv)


def _run_precondition(torus: Torus, x: Tensor, lags: Tensor, source: Part, target: Part) -> Tensor:
    if _takes_maps(torus, x):
        (a, b), (p, q) = source, target
        points = [a.first, a.step, b.first, b.step], [p.first, p.step, p.count, q.first, q.step, q.count]
        return _operator("precondition", x)(  # type: ignore[no-any-return]
            x, lags, torus.taps, list(torus.size), *points, torus.eps
        )
    return fft_precondition(torus, x, lags, source, target)


def _takes_maps(torus: Torus, x: Tensor) -> bool:
    if select(x).name != "native":
        return False
    if x.is_cuda:
        return _CUFFT_WHY_NOT is None
    return max(torus.size) <= _MOST_POINTS_CPU


def fft_precondition(torus: Torus, x: Tensor, lags: Tensor, source: Part, target: Part) -> Tensor:
    """Through torch.fft, with the product by V in between. Native kernels fold the spectrum by a stride that divides
    the torus, so that the inverse transform is shorter by it."""
    rows, cols = target
    folds = select(x).name == "native"
    down = rows.step if folds and torus.size[0] % rows.step == 0 else 1
    right = cols.step if folds and torus.size[1] % cols.step == 0 else 1
    fold = [rows.first if down > 1 else 0, down, cols.first if right > 1 else 0, right]
    spectrum = torch.view_as_real(torch.fft.rfft2(_embed(torus, x, source))).contiguous()
    folded = _operator("spectral_multiply", x)(spectrum, lags, torus.taps, list(torus.size), fold, torus.eps)
    size = torus.size[0] // down, torus.size[1] // right
    y: Tensor = torch.fft.irfft2(torch.view_as_complex(folded), s=size)
    row = slice(0, rows.count) if down > 1 else rows.slice()
    col = slice(0, cols.count) if right > 1 else cols.slice()
    return y[:, :, row, col].contiguous()


def precondition(torus: Torus, x: Tensor, lags: Tensor, source: Part, target: Part) -> Tensor:
    """The points `target` of V applied to what x (N, Cout, ...; float32 or float64) holds at the points `source`."""
    if _kernels(x) is None:
        return eager_precondition(torus, x, lags, source, target)
    if torch.is_grad_enabled() and (x.requires_grad or lags.requires_grad):
        return _Precondition.apply(torus, x, lags, source, target)  # type: ignore[no-any-return,no-untyped-call]
    return _run_precondition(torus, x, lags, source, target)


# ---- the operators


_OPERATORS = {"native": torch.ops.normkern, "triton": torch.ops.normkern_triton}


def _operator(name: str, x: Tensor) -> Callable[..., Any]:
    """Of the backend that runs x: both have the same arguments."""
    return getattr(_OPERATORS[select(x).name], name).default  # type: ignore[no-any-return]


def _register_fakes(library: str) -> None:
    fake: Callable[[str], Callable[[Callable[..., object]], object]] = torch.library.register_fake

    def register(name: str) -> Callable[[Callable[..., object]], object]:
        return fake(f"{library}::{name}")

    @register("lags")
    def lags(weight: Tensor) -> Tensor:
        return weight.new_empty((weight.shape[0], lag_count(weight.shape[2:])), dtype=torch.float64)

    @register("inverse_root")
    def inverse_root(lags: Tensor, taps: list[int], torus: list[int], eps: float, wide: bool) -> Tensor:
        dtype = torch.float64 if wide else torch.float32
        return lags.new_empty((lags.shape[0], torus[0], torus[1] // 2 + 1), dtype=dtype)

    @register("spectral_multiply")
    def spectral_multiply(
        x: Tensor, lags: Tensor, taps: list[int], torus: list[int], fold: list[int], eps: float
    ) -> Tensor:
        return x.new_empty((x.shape[0], x.shape[1], torus[0] // fold[1], torus[1] // fold[3] // 2 + 1, 2))

    if library != "normkern":  # the others take no maps
        return

    @register("precondition")
    def precondition(
        x: Tensor,
        lags: Tensor,
        taps: list[int],
        torus: list[int],
        source: list[int],
        target: list[int],
        eps: float,
    ) -> Tensor:
        shape = (x.shape[0], x.shape[1], target[2], target[5])
        if x.stride(1) == 1 and x.shape[1] > 1:
            return x.new_empty((shape[0], shape[2], shape[3], shape[1])).permute(0, 3, 1, 2)
        return x.new_empty(shape)


def _cufft_why_not() -> str | None:
    """None where cuFFT can be called, else why not; maps then go through torch.fft, and a warning says so once."""
    if torch.version.cuda is None or not hasattr(torch.ops.normkern, "cufft_why_not"):
        return "this is no CUDA build"
    why: str = torch.ops.normkern.cufft_why_not()
    if why:
        logger.warning("normkern: conv_norm runs through torch.fft on CUDA: %s", why)
    return why or None


if hasattr(torch.ops.normkern, "lags"):
    _register_fakes("normkern")
_register_fakes("normkern_triton")
# Asked once, at import: torch.compile takes it for a constant.
_CUFFT_WHY_NOT = _cufft_why_not()
