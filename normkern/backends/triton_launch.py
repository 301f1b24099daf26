"""triton_launch.py: from a problem to launches of the Triton kernels.

Plans come from triton_plan.py, kernels from triton_kernels.py, which is imported with Triton itself on the first call
that needs them.
"""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from normkern.backends import triton_plan, triton_tuning
from normkern.backends.triton_plan import Chip, Fused, Index, Map, Reduce, Tuning
from normkern.problem import NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Act, Domain, Moments, Problem

WIDE_FROM = 1 << 30  # elements; offsets of padded tiles stay below 2^31 until here
FINISH_TILE = 1024  # partial results that a program merges at a time, and its most groups
FINISH_GROUPS = 64
PREPARE_GROUPS = 256
INTERPRETED = Chip(processors=2)  # few programs, each of them large: the interpreter's time goes by programs
GRADIENTS = {"": 0, "group": 1, "line": 2, "column": 3}


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels() -> Any:
    return importlib.import_module("normkern.backends.triton_kernels")


@functools.cache
def broken() -> str | None:
    """Why an installed Triton cannot be used, if so."""
    try:
        kernels()
    except Exception as error:  # whatever a broken installation raises
        return f"Triton does not load ({type(error).__name__}: {error})"
    return None


@functools.cache
def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def running_on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Launcher:
    """The launches of one call: what every kernel of it is told."""

    # Forward of x + add, and where that sum goes; backward: what is added to dx.
    add: Tensor | None = None
    total: Tensor | None = None
    dtotal: Tensor | None = None

    def __init__(self, problem: Problem, x: Tensor) -> None:
        import triton.language as tl

        self.kernels = kernels()
        self.problem = problem
        self.x = x
        self.double = x.dtype == torch.float64
        self.second = problem.moments == Moments.second
        self.compute = torch.float64 if self.double else torch.float32
        self.A = tl.float64 if self.double else tl.float32
        self.wide = x.numel() >= WIDE_FROM

    def empty(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.x.new_empty(count, dtype=dtype)

    def arrays(self, count: int) -> list[Tensor]:
        """`count` vectors of the compute type with an element per statistics group."""
        return list(self.empty(count * self.problem.stats.groups, self.compute).view(count, -1))

    def moment_arrays(self) -> list[Tensor | None]:
        """For the mean in two parts, which a second moment has not, and 1/std."""
        return [None, None, *self.arrays(1)] if self.second else [*self.arrays(3)]

    def average_arrays(self) -> list[Tensor | None]:
        """For the averages of g, which a second moment does without, and of g*xhat."""
        return [None, *self.arrays(1)] if self.second else [*self.arrays(2)]

    def geometry(self, width: int) -> dict[str, Any]:
        align = triton_plan.alignment(width)
        return {"units": width // align, "ALIGN": align, "WIDE": self.wide, "A": self.A}

    def _fused(self, fused: Fused) -> dict[str, Any]:
        lines, tile = fused.lines, fused.tile
        return {
            **self.geometry(lines.width),
            **_index("a", triton_plan.fused_index(fused, self.problem)),
            "groups": lines.groups,
            "rows": lines.rows,
            "keep": lines.keep,
            "EPS": self.problem.eps,
            "SECOND": self.second,
            "ACT": int(self.problem.act),
            "WHOLE": fused.whole,
            "R": tile.lines,
            "C": tile.columns,
            "num_warps": tile.warps,
        }

    def fused_forward(
        self, fused: Fused, y: Tensor | None, params: list[Tensor | None], mean: Tensor | None, var: Tensor | None
    ) -> None:
        self.kernels.fused_forward[(fused.programs,)](
            self.x, self.add, y, self.total, *params, mean, var, **self._fused(fused)
        )

    def fused_backward(
        self,
        fused: Fused,
        dy: Tensor,
        params: list[Tensor | None],
        mean: Tensor | None,
        var: Tensor | None,
        grads: list[Tensor | None],
    ) -> None:
        dx, dweight, dbias, dresidual = grads
        first, second = dbias, dweight
        partials = fused.partials
        if partials:
            first, second = (None if t is None else self.empty(partials.numel) for t in (dbias, dweight))
        elif not fused.gradients:
            first = second = None
        tiles = triton_plan.ceil_div(fused.lines.groups, fused.tile.lines) if fused.whole else fused.lines.groups
        self.kernels.fused_backward[(fused.programs,)](
            dy, self.x, self.dtotal, *params, mean, var, dx, dresidual, second, first,
            tiles=tiles, GRADIENTS=GRADIENTS[fused.gradients], **self._fused(fused),
        )  # fmt: skip
        if partials:
            self.finish_gradients(partials, [first, second], [dweight, dbias], None, [None, None])

    def _reduce(self, reduce: Reduce) -> dict[str, Any]:
        lines, tile = reduce.lines, reduce.tile
        return {
            **self.geometry(lines.width),
            "rows": lines.rows,
            "keep": lines.keep,
            "across": reduce.across,
            "parts": reduce.parts,
            "steps": reduce.steps,
            "all_steps": triton_plan.ceil_div(lines.rows, tile.lines) * reduce.column_tiles,
            "column_tiles": reduce.column_tiles,
            "BY_COLUMN": reduce.by_column,
            "R": tile.lines,
            "C": tile.columns,
            "num_warps": tile.warps,
        }

    def reduce_moments(
        self, reduce: Reduce, mean: Tensor | None, var: Tensor | None, arrays: list[Tensor | None]
    ) -> None:
        count = reduce.partials.numel
        partials = [None, None, self.empty(count)] if self.second else list(self.empty(3 * count).view(3, -1))
        self.kernels.reduce_moments[(reduce.programs,)](
            self.x, self.add, self.total, *partials, SECOND=self.second, **self._reduce(reduce)
        )
        self.kernels.finish_moments[_finish_grid(reduce.partials)](
            *partials, mean, var, *arrays, count=self.problem.stats.count,
            EPS=self.problem.eps, SECOND=self.second, A=self.A, **_finish(reduce.partials),
        )  # fmt: skip

    def prepare(self, mean: Tensor | None, var: Tensor | None) -> list[Tensor | None]:
        """The mean in two parts and 1/std of each group, in the compute type."""
        groups = self.problem.stats.groups
        arrays = self.moment_arrays()
        self.kernels.prepare[(triton_plan.ceil_div(groups, PREPARE_GROUPS),)](
            None if self.second else mean, var, *arrays, groups=groups,
            EPS=self.problem.eps, A=self.A, G=PREPARE_GROUPS,
        )  # fmt: skip
        return arrays

    def reduce_gradients(
        self,
        reduce: Reduce,
        domain: Domain,
        dy: Tensor,
        params: list[Tensor | None],
        arrays: list[Tensor | None],
        weighted: bool,
    ) -> list[Tensor | None]:
        """Partial sums over `domain`."""
        p = self.problem
        partials = list(self.empty(2 * reduce.partials.numel).view(2, -1))
        self.kernels.reduce_gradients[(reduce.programs,)](
            dy, self.x, *params, *arrays, *partials,
            **_index("s", triton_plan.reduce_index(reduce, domain, p.stats)),
            **_index("a", triton_plan.reduce_index(reduce, domain, p.affine)),
            WEIGHTED=weighted, ACT=int(p.act), **self._reduce(reduce),
        )  # fmt: skip
        return [*partials]

    def finish_gradients(
        self,
        partials: Domain,
        sums: list[Tensor | None],
        grads: list[Tensor | None],
        weight: Tensor | None,
        averages: list[Tensor | None],
    ) -> None:
        self.kernels.finish_gradients[_finish_grid(partials)](
            *sums, weight, *grads, *averages, count=self.problem.stats.count, **_finish(partials)
        )

    def _map(self, plan: Map) -> dict[str, Any]:
        return {
            **self.geometry(plan.width),
            **_index("s", triton_plan.index_of(self.problem.stats, plan.width, plan.tile.lines)),
            **_index("a", triton_plan.index_of(self.problem.affine, plan.width, plan.tile.lines)),
            "lines": self.x.numel() // plan.width,
            "column_tiles": plan.column_tiles,
            "ACT": int(self.problem.act),
            "R": plan.tile.lines,
            "C": plan.tile.columns,
            "num_warps": plan.tile.warps,
        }

    def map_forward(self, plan: Map, y: Tensor, params: list[Tensor | None], arrays: list[Tensor | None]) -> None:
        x = self.x if self.total is None else self.total
        self.kernels.map_forward[(plan.programs,)](x, y, *params, *arrays, **self._map(plan))

    def map_backward(
        self,
        plan: Map,
        dy: Tensor,
        params: list[Tensor | None],
        arrays: list[Tensor | None],
        averages: list[Tensor | None],
        dx: Tensor | None,
        dresidual: Tensor | None,
    ) -> None:
        needs_x = self.problem.moments != Moments.given or self.problem.act != Act.none
        self.kernels.map_backward[(plan.programs,)](
            dy, self.x if needs_x else None, self.dtotal, *params, *arrays, *averages, dx, dresidual,
            **self._map(plan),
        )  # fmt: skip


def _index(name: str, index: Index) -> dict[str, Any]:
    upper = name.upper()
    return {
        f"{name}_block": index.block,
        f"{name}_cols": index.cols,
        f"{name}_keep": index.keep,
        f"{upper}_LINE": index.line,
        f"{upper}_COLUMN": index.column,
    }


def _finish_groups(partials: Domain) -> int:
    return min(triton_plan.power_from(partials.groups), FINISH_GROUPS)


def _finish_grid(partials: Domain) -> tuple[int]:
    return (triton_plan.ceil_div(partials.groups, _finish_groups(partials)),)


def _finish(partials: Domain) -> dict[str, int]:
    groups = _finish_groups(partials)
    return {
        "groups": partials.groups,
        "parts": partials.rows,
        "keep": partials.keep,
        "cols": partials.cols,
        # At least 2: tiles of one line are compiled with spills.
        "J": max(2, min(triton_plan.power_from(partials.count), FINISH_TILE // groups)),
        "G": groups,
    }


def forward(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    save: bool,
    split: bool = False,
    add: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the moments of every group if `save`; see backends.Backend. With `add`, of x + add, which `total` gets."""
    launcher = _Launcher(problem, x)
    launcher.add, launcher.total = add, total
    y = x.new_empty_strided(x.shape, x.stride())
    out_mean, out_var = _moments_of(launcher, save)
    params = [weight, bias, residual]

    def run(tuning: Tuning) -> None:
        plan = triton_plan.plan_forward(problem, x.element_size(), chip_of(x.device), split, tuning)
        if plan.fused:
            launcher.fused_forward(plan.fused, y, params, _or_none(out_mean), _or_none(out_var))
            return
        if plan.reduce:
            arrays = launcher.moment_arrays()
            launcher.reduce_moments(plan.reduce, _or_none(out_mean), _or_none(out_var), arrays)
        else:
            arrays = launcher.prepare(mean, var)
        assert plan.map is not None
        launcher.map_forward(plan.map, y, params, arrays)

    with running_on(x.device):
        run(triton_tuning.choose("forward", problem, x, run))
    return y, out_mean, out_var


def backward(
    problem: Problem,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    needs: int,
    split: bool = False,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual, of size 0 where `needs` has no bit; see backends.Backend. dx gets `dtotal`."""
    launcher = _Launcher(problem, x)
    launcher.dtotal = dtotal
    groups = problem.affine.groups
    wanted = [bool(needs & bit) for bit in (NEED_DX, NEED_DWEIGHT, NEED_DBIAS, NEED_DRESIDUAL)]
    dx, dresidual = (x.new_empty_strided(x.shape, x.stride()) if w else x.new_empty(0) for w in (wanted[0], wanted[3]))
    dweight, dbias = (
        (x if p is None else p).new_empty(groups if w else 0) for p, w in ((weight, wanted[1]), (bias, wanted[2]))
    )
    grads: list[Tensor | None] = [
        t if w else None for t, w in zip((dx, dweight, dbias, dresidual), wanted, strict=True)
    ]
    params = [weight, bias, residual]
    gradients = wanted[1] or wanted[2]
    shared = triton_plan.sums_shared(problem)

    def run(tuning: Tuning) -> None:
        plan = triton_plan.plan_backward(problem, x.element_size(), chip_of(x.device), gradients, split, tuning)
        if plan.fused:
            launcher.fused_backward(plan.fused, dy, params, mean, var, grads)
        arrays = launcher.prepare(mean, var) if plan.affine or plan.map else []
        if plan.affine:
            sums = launcher.reduce_gradients(plan.affine, problem.affine, dy, params, arrays, False)
            launcher.finish_gradients(plan.affine.partials, sums, grads[1:3], None, [None, None])
        if plan.map:
            averages: list[Tensor | None] = [None, None]
            if plan.reduce and (wanted[0] or (shared and gradients)):
                averages = launcher.average_arrays()
                sums = launcher.reduce_gradients(plan.reduce, problem.stats, dy, params, arrays, not shared)
                own: list[Tensor | None] = grads[1:3] if shared else [None, None]
                launcher.finish_gradients(plan.reduce.partials, sums, own, weight if shared else None, averages)
            if wanted[0] or wanted[3]:
                launcher.map_backward(plan.map, dy, params, arrays, averages, grads[0], grads[3])

    with running_on(x.device):
        run(triton_tuning.choose("backward", problem, x, run))
    return dx, dweight, dbias, dresidual


def add_forward(
    problem: Problem,
    x: Tensor,
    add: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    save: bool,
    split: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of x + add, that sum, and the moments; see backends.Backend."""
    total = x.new_empty_strided(x.shape, x.stride())
    y, mean, var = forward(problem, x, weight, bias, None, None, None, save, split, add, total)
    return y, total, mean, var


def moments(problem: Problem, x: Tensor, split: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, or the second moment, of every group; see backends.Backend."""
    launcher = _Launcher(problem, x)
    mean, var = _moments_of(launcher, True)

    def run(tuning: Tuning) -> None:
        plan = triton_plan.plan_moments(problem, x.element_size(), chip_of(x.device), split, tuning)
        if plan.fused:
            launcher.fused_forward(plan.fused, None, [None, None, None], _or_none(mean), var)
        else:
            assert plan.reduce is not None
            launcher.reduce_moments(plan.reduce, _or_none(mean), var, [None, None, None])

    with running_on(x.device):
        run(triton_tuning.choose("moments", problem, x, run))
    return mean, var


def _moments_of(launcher: _Launcher, save: bool) -> tuple[Tensor, Tensor]:
    kind, groups = launcher.problem.moments, launcher.problem.stats.groups
    mean = launcher.empty(groups if save and kind == Moments.mean_var else 0)
    return mean, launcher.empty(groups if save and kind != Moments.given else 0)


def _or_none(t: Tensor) -> Tensor | None:
    return t if t.numel() else None
