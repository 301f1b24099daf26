"""backends: who computes. `native` are the compiled kernels, `triton` the same programs in Triton, `eager` is plain
PyTorch and can always run.

A call takes the first of BACKENDS that can run it. `use_backend` and NORMKERN_BACKEND force one; a forced backend that
cannot run is an error that says why.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from normkern.backends.eager import Eager
from normkern.backends.native import Native
from normkern.backends.triton import Triton
from normkern.problem import Problem

logger = logging.getLogger("normkern")


class Backend(Protocol):
    """The three programs. Tensors are as csrc/core/arguments.h has them: x is dense, dy and residual have its strides,
    parameters are contiguous with an element per affine group, moments are float64 with one per statistics group."""

    name: str

    def why_not(self, x: Tensor) -> str | None:
        """None where x can be computed, else a sentence that says why it cannot."""

    def forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and var; the moments have size 0 unless `save`, or where there is nothing to save."""

    def backward(
        self,
        problem: Problem,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx, dweight, dbias, dresidual; size 0 where the bit of `needs` is not set. A backend that leaves masks takes
        one, uint8, as the residual."""

    def add_forward(
        self, problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y of x + add, which has no activation, then that sum, rounded to x's dtype, mean and var."""

    def add_backward(
        self,
        problem: Problem,
        dy: Tensor,
        dtotal: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx + dtotal, dweight and dbias; x is the sum, and dtotal its gradient that came past the norm."""

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        """mean and biased variance, or the second moment, over problem.stats."""


class MovingBackend(Backend, Protocol):
    """A backend that moves running statistics in the forward pass of a batch norm."""

    def batch_forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and var. Every group is a channel of more than one element, and the running statistics, contiguous,
        move as in running.update."""


class MaskingBackend(MovingBackend, Protocol):
    """A backend whose forward pass can leave the backward pass a bit for each element in place of the residual."""

    def masks(self, x: Tensor) -> bool:
        """Whether it does on the device of x."""

    def masked_forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, mean, var and the mask, uint8 (csrc/core/arguments.h); problem.act is relu. With `momentum` it is
        batch_forward, and mean and var are the running statistics."""


BACKENDS: dict[str, Backend] = {"native": Native(), "triton": Triton(), "eager": Eager()}


class _Forced(threading.local):
    """The backend that is forced in this thread."""

    backend: Backend | None = None


_forced = _Forced()

# The same for all threads together, innermost last: torch.compile sees a change of a global, but none of a
# threading.local, and would go on with the backend of the first call.
_forced_anywhere: list[Backend] = []

_environment = os.environ.get("NORMKERN_BACKEND") or None

_announced: set[str] = set()


def _existing(name: str, source: str) -> Backend:
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"{source}: name must be one of {', '.join(BACKENDS)}; got {name!r}")
    return backend


@contextmanager
def run_on(backend: Backend) -> Iterator[None]:
    """Run every call of this thread inside the block on this backend."""
    before = _forced.backend
    _forced.backend = backend
    _forced_anywhere.append(backend)
    try:
        yield
    finally:
        _forced.backend = before
        # The innermost of its name: another thread may have entered a block since.
        del _forced_anywhere[len(_forced_anywhere) - 1 - _forced_anywhere[::-1].index(backend)]


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run every call of this thread inside the block on one backend: "native", "triton" or "eager"."""
    return run_on(_existing(name, "use_backend"))


def forced_backend() -> Backend | None:
    """What use_backend or NORMKERN_BACKEND asks for, if anything."""
    if _forced_anywhere and torch.compiler.is_compiling():
        return _forced_anywhere[-1]
    if _forced.backend is not None:
        return _forced.backend
    return None if _environment is None else _existing(_environment, "NORMKERN_BACKEND")


def select(x: Tensor) -> Backend:
    """The backend that runs a call on x."""
    if type(x) is not Tensor and hasattr(x, "device_mesh"):  # a DTensor, whose parts are selected for in their turn
        from normkern.sharded import SHARDED

        return SHARDED
    forced = forced_backend() if _forced_anywhere or _environment is not None else None
    if forced is not None:
        why = forced.why_not(x)
        if why is not None:
            raise RuntimeError(f"normkern: backend {forced.name!r} is asked for but cannot run: {why}")
        return forced
    for backend in BACKENDS.values():
        why = backend.why_not(x)
        if why is None:
            return backend
        if why not in _announced and not torch.compiler.is_compiling():
            _announced.add(why)
            logger.warning("normkern: running without the %s backend: %s", backend.name, why)
    raise RuntimeError(f"normkern: no backend can run a tensor on {x.device}")  # eager always can
