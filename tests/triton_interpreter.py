# Triton's interpreter, mended and made strict. Importing this turns it on (TRITON_INTERPRET=1), so it must come before
# Triton. As shipped (3.6.0 and 3.7.1) it cuts bfloat16 off instead of rounding it and lets accesses fall anywhere. Here
# - float32 to bfloat16 rounds to nearest even, subnormals and overflow included;
# - every load and store must stay inside a tensor that was passed to the kernel;
# - two programs of a launch must not meet: writing what another one wrote or read, or reading what it wrote, is a race;
# - Triton's language is patched once a launch, not at each call of a function: most of the time went there.
from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NOBODY = -1


class Memory:
    """The tensors of one launch, and which program read and wrote each of their elements last."""

    def __init__(self, tensors: list[Any]) -> None:
        spans = {
            t.data_ptr(): (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.element_size())
            for t in sorted(tensors, key=lambda t: t.numel() * t.element_size())
            if t.numel()
        }
        self.spans = sorted(spans.values())
        self.starts = np.array([start for start, _, _ in self.spans], np.uint64)
        self.ends = np.array([end for _, end, _ in self.spans], np.uint64)
        self.written = [np.full((end - start) // size, NOBODY) for start, end, size in self.spans]
        self.read = [np.full((end - start) // size, NOBODY) for start, end, size in self.spans]
        self.programs: dict[tuple[int, ...], int] = {}

    def check(self, kind: str, pointers: Any, mask: Any) -> None:
        places = np.broadcast_to(pointers, np.broadcast_shapes(np.shape(pointers), np.shape(mask)))
        places = places[np.broadcast_to(mask, places.shape)].reshape(-1).astype(np.uint64)
        if not places.size:
            return
        span = np.searchsorted(self.starts, places, "right").astype(np.int64) - 1
        outside = (span < 0) | (places >= self.ends[span])
        if outside.any():
            raise IndexError(f"out of bounds: {kind} of {int(outside.sum())} of {places.size} elements")
        program = self.programs.setdefault(tuple(interpreter.interpreter_builder.grid_idx), len(self.programs))
        for which in np.unique(span):
            start, _, size = self.spans[which]
            at = ((places[span == which] - np.uint64(start)) // np.uint64(size)).astype(np.int64)
            written, read = self.written[which], self.read[which]
            if ((written[at] != NOBODY) & (written[at] != program)).any():
                raise RuntimeError(f"race: {kind} of what another program wrote")
            if kind == "load":
                read[at] = np.where((read[at] == NOBODY) | (read[at] == program), program, len(self.programs) + 1)
                continue
            if ((read[at] != NOBODY) & (read[at] != program)).any():
                raise RuntimeError("race: store of what another program read")
            if len(np.unique(at)) != at.size:
                raise RuntimeError("race: one store writes an element twice")
            written[at] = program


def to_bfloat16(values: Any) -> Any:
    """Bits of float32 values as bits of bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16).astype(np.uint16) | 0x40, rounded)


_memory: Memory | None = None
_patched: set[frozenset[int]] = set()  # modules of Triton's language, in this launch


def _install() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    convert, load, store = interpreter._convert_float, builder.create_masked_load, builder.create_masked_store
    init, call, patch = executor._init_args_hst, executor.__call__, interpreter._patch_lang

    def mended_convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(values).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            wide = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(values.shape)
        return convert(values, source, target, mode)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.check("load", pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.check("store", pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def remember_tensors(self: Any, args: Any, kwargs: Any) -> Any:
        global _memory
        found = init(self, args, kwargs)
        _memory = Memory([t for t in [*found[0], *found[1].values()] if hasattr(t, "data_ptr")])
        return found

    def patch_once(function: Any) -> Any:
        languages = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if languages in _patched:
            return None  # only the launch itself, which comes first, wants to undo it
        _patched.add(languages)
        return patch(function)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _memory
        _patched.clear()
        try:
            with np.errstate(all="ignore"):
                return call(self, *args, **kwargs)
        finally:
            _memory = None

    interpreter._convert_float, interpreter._patch_lang = mended_convert, patch_once
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst, executor.__call__ = remember_tensors, run


_install()
