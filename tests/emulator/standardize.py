"""standardize.py: the CUDA kernels that standardize many tensors, on the CPU: an emulated backend that has them."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from emulator.backend import DTYPES, CVector, EmulatedBackend, Fields, Struct
from torch import Tensor

from normkern.problem import NEED_DWEIGHT, NEED_DX

# ---- mirrors of csrc/core/standardize.h


class CForward(Struct):
    _fields_: ClassVar[Fields] = [
        ("groups", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("weight", CVector),
        ("y", ctypes.c_void_p),
        ("mean_out", ctypes.c_void_p),
        ("var_out", ctypes.c_void_p),
    ]


class CBackward(Struct):
    _fields_: ClassVar[Fields] = [
        ("groups", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("dy", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("weight", CVector),
        ("mean", ctypes.c_void_p),
        ("var", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("dweight", CVector),
    ]


def _poisoned(x: Tensor, wanted: bool = True) -> Tensor:
    return torch.empty_like(x).fill_(float("nan")) if wanted else x.new_empty(0)


def _pointer(t: Tensor, element: int = 0) -> int | None:
    return t.data_ptr() + element * t.element_size() if t.numel() else None


def _vector(t: Tensor) -> CVector:
    return CVector(_pointer(t), DTYPES[t.dtype])


class EmulatedStandardizer(EmulatedBackend):
    """`seed` is the schedule; `most` is the number of tensors in a launch."""

    def __init__(self, mode: str = "checked", seed: int = 1, preempt_ppm: int = 0) -> None:
        super().__init__(mode, seed=seed, preempt_ppm=preempt_ppm)
        sizes = (ctypes.c_int64 * 2)()
        self.most = self.library.nk_standardize_sizes(sizes)
        mirrored = [ctypes.sizeof(CForward), ctypes.sizeof(CBackward)]
        if list(sizes) != mirrored:
            raise RuntimeError(f"emulator: csrc/core/standardize.h changed: {list(sizes)}; mirrors have {mirrored}")

    def standardizes(self, x: Tensor) -> bool:
        return True

    def standardize(
        self, xs: list[Tensor], weights: list[Tensor], eps: float, save: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        ys = [_poisoned(x) for x in xs]
        channels = sum(len(x) for x in xs) if save else 0
        mean, var = torch.full((2, channels), float("nan"), dtype=torch.float64)
        first, parts = 0, []
        for x, weight, y in zip(xs, weights, ys, strict=True):
            parts.append(
                CForward(
                    len(x), x[0].numel(), _pointer(x), _vector(weight), _pointer(y),
                    _pointer(mean, first), _pointer(var, first),
                )
            )  # fmt: skip
            first += len(x)
        self._call("nk_standardize", CForward, parts, xs[0], eps)
        return ys, mean, var

    def standardize_backward(
        self,
        dys: list[Tensor],
        xs: list[Tensor],
        weights: list[Tensor],
        mean: Tensor,
        var: Tensor,
        eps: float,
        needs: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        dxs = [_poisoned(x, bool(n & NEED_DX)) for x, n in zip(xs, needs, strict=True)]
        dweights = [_poisoned(w, bool(n & NEED_DWEIGHT)) for w, n in zip(weights, needs, strict=True)]
        first, parts = 0, []
        for dy, x, weight, dx, dweight, need in zip(dys, xs, weights, dxs, dweights, needs, strict=True):
            if need:
                parts.append(
                    CBackward(
                        len(x), x[0].numel(), _pointer(dy), _pointer(x), _vector(weight),
                        _pointer(mean, first), _pointer(var, first), _pointer(dx), _vector(dweight),
                    )
                )  # fmt: skip
            first += len(x)
        if parts:
            self._call("nk_standardize_backward", CBackward, parts, xs[0], eps)
        return dxs, dweights

    def _call(self, function: str, kind: Any, parts: list[Any], x: Tensor, eps: float) -> None:
        self.library.nk_options(self.seed, 4, 25, self.preempt_ppm)
        array = (kind * len(parts))(*parts)
        if getattr(self.library, function)(array, len(parts), DTYPES[x.dtype], ctypes.c_double(eps)):
            raise RuntimeError(f"{self.library.nk_last_error().decode()}\n(schedule {self.seed})")
