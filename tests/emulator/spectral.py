"""spectral.py: the spectral CUDA kernels on the CPU: what csrc/bind/ops_spectral_cuda.cpp does, with torch.fft for
cuFFT."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from emulator.backend import DTYPES, Fields, Struct, load
from torch import Tensor

from normkern.spectrum import Part, Torus, lag_count

# ---- mirrors of csrc/core/spectrum.h


class CTaps(Struct):
    _fields_: ClassVar[Fields] = [(name, ctypes.c_int64) for name in ("rows", "cols", "dilation_rows", "dilation_cols")]


class CPoints(Struct):
    _fields_: ClassVar[Fields] = [(name, ctypes.c_int64) for name in ("first", "step", "count")]


class CLagsArgs(Struct):
    _fields_: ClassVar[Fields] = [
        ("weight", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("channels", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("taps", CTaps),
        ("lags", ctypes.c_void_p),
    ]


class CSpectrum(Struct):
    _fields_: ClassVar[Fields] = [
        ("lags", ctypes.c_void_p),
        ("channels", ctypes.c_int64),
        ("taps", CTaps),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class CMultiplyArgs(Struct):
    _fields_: ClassVar[Fields] = [
        ("spectrum", CSpectrum),
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("first_col", ctypes.c_int64),
        ("stride_rows", ctypes.c_int64),
        ("stride_cols", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


class CPointsArgs(Struct):
    _fields_: ClassVar[Fields] = [
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_points", CPoints),
        ("col_points", CPoints),
        ("from_", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
    ]


MIRRORS = [CTaps, CPoints, CLagsArgs, CSpectrum, CMultiplyArgs, CPointsArgs]


class EmulatedSpectra:
    def __init__(self, mode: str = "checked", seed: int = 1) -> None:
        self.library, self.seed = load(mode), seed
        sizes = (ctypes.c_int64 * 16)()
        count = self.library.nk_spectral_sizes(sizes, 16)
        mirrored = [ctypes.sizeof(mirror) for mirror in MIRRORS]
        if list(sizes[:count]) != mirrored:
            raise RuntimeError(
                f"emulator: csrc/core/spectrum.h changed: {sizes[:count]} bytes; mirrors have {mirrored}"
            )

    def lags(self, weight: Tensor) -> Tensor:
        out, depth, rows, cols = weight.shape
        found = torch.full((out, lag_count((rows, cols))), float("nan"), dtype=torch.float64)
        self._run(
            "nk_spectral_lags",
            CLagsArgs(weight.data_ptr(), DTYPES[weight.dtype], out, depth, CTaps(rows, cols, 1, 1), found.data_ptr()),
        )
        return found

    def inverse_root(self, torus: Torus, lags: Tensor, dtype: torch.dtype) -> Tensor:
        v = torch.full((len(lags), torus.size[0], torus.size[1] // 2 + 1), float("nan"), dtype=dtype)
        self._run("nk_spectral_root", self._spectrum(torus, lags), ctypes.c_int32(DTYPES[dtype]), v.data_ptr())
        return v

    def multiply(self, torus: Torus, x: Tensor, lags: Tensor, fold: list[int], scale: float) -> Tensor:
        """x and the result are complex; without a fold it is in place."""
        first_row, down, first_col, right = fold
        size = torus.size[0] // down, torus.size[1] // right // 2 + 1
        y = x if (down, right) == (1, 1) else torch.full((*x.shape[:2], *size), float("nan"), dtype=x.dtype)
        dtype = DTYPES[torch.float64 if x.dtype == torch.complex128 else torch.float32]
        arguments = CMultiplyArgs(
            self._spectrum(torus, lags), dtype, len(x), first_row, first_col, down, right, x.data_ptr(), y.data_ptr()
        )
        self._run("nk_spectral_multiply", arguments, ctypes.c_double(scale))
        return y

    def points(self, dense: Tensor, part: Part, other: Tensor, embeds: bool) -> Tensor:
        """Points of the dense torus to `other`, or back; returns what was written."""
        arguments = CPointsArgs(
            DTYPES[dense.dtype], *dense.shape, *(CPoints(p.first, p.step, p.count) for p in part),
            (other if embeds else dense).data_ptr(), (dense if embeds else other).data_ptr(),
            (ctypes.c_int64 * 4)(*other.stride()),
        )  # fmt: skip
        self._run("nk_spectral_points", arguments, ctypes.c_int64(other.numel()), ctypes.c_int(embeds))
        return dense if embeds else other

    def precondition(self, torus: Torus, x: Tensor, lags: Tensor, source: Part, target: Part, like: Tensor) -> Tensor:
        """The steps of SpectralCuda::run; the result is written with the strides of `like`."""
        dense = torch.full((*x.shape[:2], *torus.size), float("nan"), dtype=x.dtype)
        dense = self.points(dense, source, x, embeds=True)
        rows, cols = target
        down = rows.step if torus.size[0] % rows.step == 0 else 1
        right = cols.step if torus.size[1] % cols.step == 0 else 1
        fold = [rows.first if down > 1 else 0, down, cols.first if right > 1 else 0, right]
        size = torus.size[0] // down, torus.size[1] // right
        spectrum = torch.fft.rfft2(dense).contiguous()
        folded = self.multiply(torus, spectrum, lags, fold, 1 / (size[0] * size[1]))
        back = torch.fft.irfft2(folded, s=size, norm="forward").contiguous()
        part = (
            type(rows)(0, 1, rows.count) if down > 1 else rows,
            type(cols)(0, 1, cols.count) if right > 1 else cols,
        )
        return self.points(back, part, torch.full_like(like, float("nan")), embeds=False)

    def _spectrum(self, torus: Torus, lags: Tensor) -> CSpectrum:
        return CSpectrum(lags.data_ptr(), len(lags), CTaps(*torus.taps), *torus.size, torus.eps)

    def _run(self, name: str, arguments: Struct, *others: object) -> None:
        self.library.nk_options(self.seed, 4, 25, 0)
        if getattr(self.library, name)(ctypes.byref(arguments), *self._c(others)):
            raise RuntimeError(f"{self.library.nk_last_error().decode()}\n({name}, schedule {self.seed}, {arguments})")

    @staticmethod
    def _c(others: tuple[object, ...]) -> list[object]:
        return [ctypes.c_void_p(other) if isinstance(other, int) else other for other in others]
