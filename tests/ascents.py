# The ways SAM's perturbation is computed, for the tests: plain PyTorch, the CPU kernel, and the CUDA kernel emulated.
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import or_skip

from normkern.backends import BACKENDS, use_backend
from normkern.optim import ascent

ASCENTS = ("eager", "native", "emulated")


@functools.cache
def emulated(**options: Any) -> Any:
    from emulator.perturb import EmulatedAscent

    return or_skip(EmulatedAscent, **options)


@contextmanager
def ascending(how: str, **options: Any) -> Iterator[None]:
    """Every perturbation inside the block is computed this way, or the test fails."""
    if how == "eager":
        with use_backend("eager"):
            yield
        return
    why = BACKENDS["native"].why_not(torch.empty(1))
    if why is not None:
        pytest.skip(why)
    kernel: Callable[..., None] = ascent.KERNELS["native"] if how == "native" else emulated(**options)
    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(len(arguments))
        kernel(*arguments)

    with pytest.MonkeyPatch.context() as patch, use_backend("native"):
        patch.setitem(ascent.KERNELS, "native", counted)
        yield
    assert calls, f"the {how} kernel was not asked"
