"""native.py: the compiled kernels, as torch.ops.normkern.

Loads the libraries that are there, tells torch.compile the shapes, strides and dtypes of the operators' results, and
says in one sentence why a device cannot be served.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from normkern.backends import fakes
from normkern.problem import Domain, Problem

_HERE = Path(__file__).resolve().parent.parent
_REBUILD = "rebuild with `pip install --no-build-isolation -e .`"


def _load(file: str, remedy: str) -> str | None:
    """None once the library is loaded, else why it is not."""
    path = _HERE / file
    if not path.exists():
        return f"no compiled kernels found ({file} is missing); {remedy}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{file} does not load ({error}); {_REBUILD}"
    return None


def thread_pool() -> tuple[int, int]:
    """The addresses in the loaded CPU library of torch's thread count and of its parallel loop; zeros without them."""
    try:
        library = ctypes.CDLL(str(_HERE / "_C_cpu.so"))
        functions = library.normkern_thread_count, library.normkern_run_on_threads
    except (OSError, AttributeError):
        return 0, 0
    count, run = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return count, run


class Native:
    """The compiled kernels as a backend."""

    name = "native"

    def __init__(self) -> None:
        self.cpu_why_not = _load("_C_cpu.so", _REBUILD)
        newest = hasattr(torch.ops.normkern, "masked_forward") and hasattr(torch.ops.normkern, "standardize")
        if self.cpu_why_not is None and not newest:
            self.cpu_why_not = f"_C_cpu.so is of an older version; {_REBUILD}"
        # The operators' schemas are in the CPU library.
        self.cuda_why_not = self.cpu_why_not or _load(
            "_C_cuda.so", f"{_REBUILD} and NORMKERN_CUDA=1, with nvcc on PATH"
        )
        if self.cpu_why_not is None:
            _register_fakes()
            # Looking an operator up costs more than calling it.
            self._forward = torch.ops.normkern.forward.default
            self._batch_forward = torch.ops.normkern.batch_forward.default
            self._masked_forward = torch.ops.normkern.masked_forward.default
            self._backward = torch.ops.normkern.backward.default
            self._add_forward = torch.ops.normkern.add_forward.default
            self._add_backward = torch.ops.normkern.add_backward.default
            self._moments = torch.ops.normkern.moments.default
            self._update_running = torch.ops.normkern.update_running.default
            self._evolve = torch.ops.normkern.evolve.default
            self._evolve_sums = torch.ops.normkern.evolve_sums.default
            self._evolve_backward = torch.ops.normkern.evolve_backward.default
            self._standardize = torch.ops.normkern.standardize.default
            self._standardize_backward = torch.ops.normkern.standardize_backward.default
        has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
        if self.cuda_why_not is None and not has_kernel("normkern::masked_forward", "CUDA"):
            self.cuda_why_not = f"_C_cuda.so is of an older version; {_REBUILD} and NORMKERN_CUDA=1"
        self._standardizes_on_cuda = self.cuda_why_not is None and has_kernel("normkern::standardize", "CUDA")

    def why_not(self, x: Tensor) -> str | None:
        if x.is_cpu or x.is_meta:  # several times cheaper than comparing x.device
            return self.cpu_why_not
        if x.is_cuda:
            return self.cuda_why_not
        return f"there are no kernels for device {x.device.type}"

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
        y, mean, var = self._forward(
            x,
            weight,
            bias,
            residual,
            mean,
            var,
            _extents(problem.stats),
            _extents(problem.affine),
            int(problem.moments),  # an IntEnum as it is takes 3 us longer to pass
            int(problem.act),
            problem.eps,
            save,
        )
        return y, mean, var

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
        channels, act = _extents(problem.stats), int(problem.act)
        y, mean, var = self._batch_forward(
            x, weight, bias, residual, running_mean, running_var, channels, act, problem.eps, momentum
        )
        _written(running_mean, running_var)
        return y, mean, var

    def masks(self, x: Tensor) -> bool:
        return x.is_cuda

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
        stats, affine, moments = _extents(problem.stats), _extents(problem.affine), int(problem.moments)
        statistics = (mean, var, None, None) if momentum is None else (None, None, mean, var)
        y, group_mean, group_var, mask = self._masked_forward(
            x, weight, bias, residual, *statistics, stats, affine, moments, problem.eps, momentum or 0.0
        )
        if momentum is not None and mean is not None and var is not None:
            _written(mean, var)
        return y, group_mean, group_var, mask

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
        dx, dweight, dbias, dresidual = self._backward(
            dy,
            x,
            weight,
            bias,
            residual,
            mean,
            var,
            _extents(problem.stats),
            _extents(problem.affine),
            int(problem.moments),
            int(problem.act),
            problem.eps,
            needs,
        )
        return dx, dweight, dbias, dresidual

    def add_forward(
        self, problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stats, affine = _extents(problem.stats), _extents(problem.affine)
        y, total, mean, var = self._add_forward(
            x, add, weight, bias, stats, affine, int(problem.moments), problem.eps, save
        )
        return y, total, mean, var

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
        stats, affine = _extents(problem.stats), _extents(problem.affine)
        dx, dweight, dbias = self._add_backward(
            dy, dtotal, x, weight, bias, mean, var, stats, affine, int(problem.moments), problem.eps, needs
        )
        return dx, dweight, dbias

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self._moments(x, _extents(problem.stats), int(problem.moments))
        return mean, var

    def update_running(
        self, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
    ) -> None:
        """Move running statistics in one operator."""
        self._update_running(running_mean, running_var, mean, var, count, momentum)
        _written(running_mean, running_var)

    def evolves(self, x: Tensor) -> bool:
        """Whether there are kernels for the maps of evolved.py: on the CPU only, as yet."""
        return x.is_cpu or x.is_meta

    def evolve(self, kind: int, domain: Domain, x: Tensor, rows: Tensor) -> Tensor:
        """The map of core/evolved.h; `rows` is its table of coefficients."""
        return self._evolve(x, rows, _extents(domain), kind)  # type: ignore[no-any-return]

    def evolve_sums(self, kind: int, domain: Domain, dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """Sums over every group, float64 [sums, groups]."""
        return self._evolve_sums(dy, x, rows, _extents(domain), kind).view(-1, domain.groups)  # type: ignore[no-any-return]

    def evolve_backward(self, kind: int, domain: Domain, dy: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        return self._evolve_backward(dy, x, rows, _extents(domain), kind)  # type: ignore[no-any-return]

    def standardizes(self, x: Tensor) -> bool:
        return self._standardizes_on_cuda if x.is_cuda else x.is_cpu

    def standardize(
        self, xs: list[Tensor], weights: list[Tensor], eps: float, save: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        return self._standardize(xs, weights, eps, save)  # type: ignore[no-any-return]

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
        return self._standardize_backward(dys, xs, weights, mean, var, eps, needs)  # type: ignore[no-any-return]


def _written(*tensors: Tensor) -> None:
    """An operator of the stable ABI has no kernel that would count this for autograd."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _extents(domain: Domain) -> list[int]:
    return [domain.batch, domain.rows, domain.keep, domain.cols]


def _register_fakes() -> None:
    register: Callable[[str], Callable[[Callable[..., object]], object]] = torch.library.register_fake
    names = "forward", "backward", "add_forward", "add_backward", "batch_forward", "masked_forward", "moments"
    for name in names:
        register(f"normkern::{name}")(getattr(fakes, name))

    @register("normkern::update_running")
    def update_running(
        running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
    ) -> None:
        return None

    @register("normkern::evolve")
    def evolve(x: Tensor, rows: Tensor, domain: list[int], kind: int) -> Tensor:
        return fakes.like(x)

    @register("normkern::evolve_sums")
    def evolve_sums(dy: Tensor, x: Tensor, rows: Tensor, domain: list[int], kind: int) -> Tensor:
        return x.new_empty((3, 5)[kind] * domain[0] * domain[2], dtype=torch.float64)

    @register("normkern::evolve_backward")
    def evolve_backward(dy: Tensor, x: Tensor, rows: Tensor, domain: list[int], kind: int) -> Tensor:
        return fakes.like(x)
