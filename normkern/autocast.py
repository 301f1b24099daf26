"""autocast.py: what torch.autocast("cuda") does to layer, group and RMS norm, and the switch that leaves it out.

torch's list has these norms compute and answer in float32, which copies every half precision input into twice the
bytes. normkern's kernels compute in float32 whatever they read, so the copies buy the float32 answer alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Blocks of keep_half that are open, in any thread: a plain global, which torch.compile sees change.
_open = 0
_always = os.environ.get("NORMKERN_AUTOCAST") == "keep"


@contextmanager
def keep_half() -> Iterator[None]:
    """Inside the block torch.autocast does not cast the inputs of layer, group and RMS norm to float32.

    float16 and bfloat16 tensors on a GPU are then read as they are and the output has their dtype: 4 bytes of traffic
    for an element instead of 14 (2 read, a float32 copy written and read, a float32 answer), with the same float32
    arithmetic. The block holds for all threads of the process, since a backward pass or a data-parallel replica runs in
    others. The environment variable NORMKERN_AUTOCAST=keep does the same for the whole process. Without autocast
    nothing changes.
    """
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def casts(x: Tensor) -> bool:
    """Whether autocast wants this input in float32."""
    return x.is_cuda and torch.is_autocast_enabled("cuda") and not _always and _open == 0


def to_float32(t: T) -> T:
    """A tensor on a GPU as torch.autocast has it for these norms."""
    if isinstance(t, Tensor) and t.is_cuda and t.is_floating_point() and t.dtype is not torch.float64:
        return t.float()  # type: ignore[return-value]
    return t
