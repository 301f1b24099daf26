"""perturb.py: the CUDA kernel of SAM's ascent on the CPU: what csrc/bind/perturb.h does, as a kernel for
normkern.optim.ascent.KERNELS."""

from __future__ import annotations

import ctypes
from typing import ClassVar, get_args

import torch
from emulator.backend import DTYPES, Fields, Struct, load
from torch import Tensor

from normkern.optim.ascent import Member, Rule, Transform

# ---- mirrors of csrc/core/perturb.h


class CPerturbed(Struct):
    _fields_: ClassVar[Fields] = [
        ("weight", ctypes.c_void_p),
        ("copy", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rho", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("transformed", ctypes.c_bool),
    ]


class CAscent(Struct):
    _fields_: ClassVar[Fields] = [
        ("transform", ctypes.c_int32),
        ("maximum", ctypes.c_bool),
        ("eta", ctypes.c_double),
        ("grad_factor", ctypes.c_double),
    ]


class EmulatedAscent:
    """On a chip of `sms` multiprocessors; `busy` of them are held by others, so that the blocks may find no room
    together."""

    def __init__(self, mode: str = "checked", seed: int = 1, sms: int = 2, busy: int = 0) -> None:
        self.library, self.seed, self.sms, self.busy, self.calls = load(mode), seed, sms, busy, 0
        sizes = (ctypes.c_int64 * 8)()
        count = self.library.nk_perturb_sizes(sizes)
        mirrored = [ctypes.sizeof(mirror) for mirror in (CPerturbed, CAscent)]
        if list(sizes[:count]) != mirrored:
            raise RuntimeError(f"emulator: csrc/core/perturb.h changed: {sizes[:count]} bytes; mirrors have {mirrored}")

    def __call__(self, members: list[Member], copies: list[Tensor], rule: Rule, grad_scale: float) -> None:
        for copy in copies:
            copy.fill_(float("nan"))
        rows = [
            CPerturbed(
                m.weight.data_ptr(), copy.data_ptr(), m.grad.data_ptr(), m.weight.numel(), m.rho,
                DTYPES[m.weight.dtype], DTYPES[m.grad.dtype], m.transformed,
            )
            for m, copy in zip(members, copies, strict=True) if m.weight.numel()
        ]  # fmt: skip
        ascent = CAscent(get_args(Transform).index(rule.transform), rule.p == "inf", rule.eta, 1 / grad_scale)
        self.calls += 1
        self.library.nk_options(self.seed, 4, 25, 0)
        self.library.nk_occupy(self.busy, 16)
        try:
            table = (CPerturbed * len(rows))(*rows)
            if self.library.nk_perturb(table, ctypes.c_int64(len(rows)), ctypes.byref(ascent), ctypes.c_int(self.sms)):
                raise RuntimeError(f"{self.library.nk_last_error().decode()}\n(schedule {self.seed}, {rule})")
        finally:
            self.library.nk_occupy(0, 16)
        torch.autograd.graph.increment_version([m.weight for m in members])
