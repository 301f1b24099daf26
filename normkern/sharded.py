"""sharded.py: DTensors as a backend. Every process computes on its own part.

A dimension of x that is sharded either lies outside the statistics groups, and then nobody needs anybody, or inside
them, and then the moments of the parts are merged (distributed.py), as are the two sums of backward. Only what is
neither, a partial sum or a shard that cuts through channel groups, is made whole first. Weights may be replicated,
sharded or plain tensors; their gradients come back as they are.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from normkern.backends import select
from normkern.distributed import Part, part_backward, part_forward, part_moments
from normkern.problem import Domain, Moments, Problem, fit, memory_order


def _axis_of(domain: Domain, inner: int, size: int, shards: int) -> tuple[int, int] | None:
    """Which of [batch, rows, keep, cols] a dimension of this size, with `inner` elements within, is cut along, and into
    how many even pieces at most (0: any cut is right); None where cutting it into `shards` fits no axis."""
    low, pieces = domain.numel, []
    for axis, extent in enumerate(domain.sizes):
        low //= extent
        piece = min(low * extent, inner * size) // max(low, inner)
        if piece > 1:
            pieces.append((axis, piece))
    if len(pieces) == 1:
        return pieces[0][0], 0
    axis, piece = pieces[0]  # channels that are groups times channels of a group: whole groups may be dealt out
    return (axis, piece) if piece % shards == 0 else None


@dataclass(frozen=True)
class _Cut:
    """Dimension `dim` of x is sharded over dimension `mesh_dim` of the mesh; the axes of the two domains it lies on."""

    dim: int
    mesh_dim: int
    stats: int
    affine: int


class _Layout:
    """How a DTensor and a problem on it fall to this process."""

    def __init__(self, problem: Problem, x: DTensor) -> None:
        self.mesh = mesh = x.device_mesh
        self.order = memory_order(x.shape, x.stride())
        self.shape, self.stride, self.problem = x.shape, x.stride(), problem
        self.cuts: list[_Cut] = []
        placements: list[Any] = []
        for mesh_dim, placement in enumerate(x.placements):
            cut = self._cut(placement, mesh_dim) if type(placement) is Shard else None
            placements.append(Replicate() if cut is None else placement)
            if cut is not None:
                self.cuts.append(cut)
        self.placements = tuple(placements)
        self.local_shape, self.offset = compute_local_shape_and_global_offset(x.shape, mesh, self.placements)
        groups = tuple(mesh.get_group(c.mesh_dim).group_name for c in self.cuts if c.stats in (1, 3))
        local = dataclasses.replace(
            problem,
            stats=self._local(problem.stats, [c.stats for c in self.cuts]),
            affine=self._local(problem.affine, [c.affine for c in self.cuts]),
            weight_order=None,
        )
        self.part = Part(local, () if problem.moments == Moments.given else groups)

    def _inner(self, dim: int) -> int:
        return math.prod(self.shape[d] for d in self.order[self.order.index(dim) + 1 :])

    def _cut(self, placement: Shard, mesh_dim: int) -> _Cut | None:
        dim, shards = placement.dim, self.mesh.size(mesh_dim)
        if self.shape[dim] == 1 or any(cut.dim == dim for cut in self.cuts):
            return None
        found = [
            _axis_of(d, self._inner(dim), self.shape[dim], shards) for d in (self.problem.stats, self.problem.affine)
        ]
        if found[0] is None or found[1] is None or found[1][1]:
            return None
        return _Cut(dim, mesh_dim, found[0][0], found[1][0])

    def _local(self, domain: Domain, axes: list[int]) -> Domain:
        sizes = list(domain.sizes)
        for cut, axis in zip(self.cuts, axes, strict=True):
            sizes[axis] = sizes[axis] * self.local_shape[cut.dim] // self.shape[cut.dim]
        if 0 in sizes:
            return Domain(*sizes)
        found = fit(zip(sizes, (True, False, True, False), strict=True))
        assert found is not None, "four extents in order are a domain"
        return found

    # ---- tensors with an element for each of x

    def local(self, t: Tensor) -> Tensor:
        """This process's part, dense and with the memory order of x."""
        t = (
            t
            if isinstance(t, DTensor)
            else DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        )
        part = t.redistribute(self.mesh, self.placements).to_local()
        strides, step = [1] * part.dim(), 1
        for dim in reversed(self.order):
            strides[dim] = step
            step *= max(part.shape[dim], 1)
        if part.numel() == 0 or part.stride() == tuple(strides):
            return part
        return torch.empty_strided(part.shape, strides, dtype=part.dtype, device=part.device).copy_(part)

    def joined(self, part: Tensor) -> DTensor:
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    # ---- tensors with an element for each group of a domain

    def _kept(self, which: str) -> list[int]:
        """The dimensions of x whose elements are in different groups, in memory order."""
        domain = getattr(self.problem, which)
        found = []
        for dim in self.order:
            if self.shape[dim] > 1:
                axis = _axis_of(domain, self._inner(dim), self.shape[dim], 1)
                if axis is not None and axis[0] in (0, 2):
                    found.append(dim)
        return found

    def _pieces(self, which: str) -> tuple[list[int], list[tuple[int, int, int, int]]]:
        """The sizes of a vector of groups, seen by dimensions of x, and for each cut of those the mesh dimension, the
        index among the sizes, the start and the length."""
        kept, domain = self._kept(which), getattr(self.problem, which)
        sizes = [self.shape[dim] for dim in kept]
        for i, dim in enumerate(kept):
            axis = _axis_of(domain, self._inner(dim), self.shape[dim], 1)
            if axis is not None and axis[1]:
                sizes[i] = axis[1]
        cuts = []
        for cut in self.cuts:
            if getattr(cut, which) in (0, 2):
                i = kept.index(cut.dim)
                scale = self.shape[cut.dim] // sizes[i]
                cuts.append((cut.mesh_dim, i, self.offset[cut.dim] // scale, self.local_shape[cut.dim] // scale))
        return sizes, cuts

    def vector(self, t: Tensor | None, which: str) -> Tensor | None:
        """This process's part of a vector with an element for each group of the domain `which`."""
        if t is None:
            return None
        sizes, cuts = self._pieces(which)
        if isinstance(t, DTensor):
            placements: list[Any] = [Replicate()] * self.mesh.ndim
            for mesh_dim, i, _, _ in cuts:
                placements[mesh_dim] = Shard(i)
            if list(t.shape) == sizes and t.device_mesh == self.mesh:
                return t.redistribute(self.mesh, placements).to_local().contiguous().view(-1)
            t = t.full_tensor()
        t = t.reshape(sizes)
        for _, i, start, length in cuts:
            t = t.narrow(i, start, length)
        return t.contiguous().view(-1)

    def whole(self, part: Tensor, which: str, like: Tensor | None = None, summed: bool = False) -> Tensor:
        """The vector of all groups from this process's part; `summed`: to be added up where x is cut within a group.
        With `like` it gets that tensor's shape and placements, or is a plain tensor if that is one."""
        sizes, cuts = self._pieces(which)
        placements: list[Any] = [Replicate()] * self.mesh.ndim
        if summed:
            for cut in self.cuts:
                placements[cut.mesh_dim] = Partial()
        local_sizes = list(sizes)
        for mesh_dim, i, _, length in cuts:
            placements[mesh_dim], local_sizes[i] = Shard(i), length
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        t: Any = DTensor.from_local(
            part.view(local_sizes),
            self.mesh,
            placements,
            run_check=False,
            shape=torch.Size(sizes),
            stride=tuple(strides),
        )
        everywhere = [Replicate()] * self.mesh.ndim
        found: Tensor
        if like is None:
            found = t if len(sizes) == 1 else t.redistribute(self.mesh, everywhere).view(-1)
        elif isinstance(like, DTensor):
            if t.shape != like.shape:
                t = t.redistribute(self.mesh, everywhere).view(like.shape)
            found = t.redistribute(self.mesh, like.placements)
        else:
            found = t.redistribute(self.mesh, everywhere).to_local().view(like.shape)
        return found

    def moments(self, part: Tensor) -> Tensor:
        """Moments as they are saved: a DTensor where one dimension of x tells the groups apart, else this process's."""
        sizes, cuts = self._pieces("stats")
        return self.whole(part, "stats") if part.numel() and (len(sizes) == 1 or not cuts) else part


class Sharded:
    """DTensors as a backend."""

    name = "sharded"

    def why_not(self, x: Tensor) -> str | None:
        return None

    def forward(
        self,
        problem: Problem,
        x: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _Layout(problem, x)
        local = layout.local(x)
        backend = select(local)
        parameters = layout.vector(weight, "affine"), layout.vector(bias, "affine")
        addend = None if residual is None else layout.local(residual)
        nothing = local.new_empty(0, dtype=torch.float64)
        if problem.moments == Moments.given:
            y = torch.empty_like(local)
            if local.numel():
                given = layout.vector(mean, "stats"), layout.vector(var, "stats")
                y = backend.forward(layout.part.problem, local, *parameters, addend, *given, False)[0]
            return layout.joined(y), nothing, nothing
        y, _, mean, var = part_forward(layout.part, backend, local, *parameters, addend)
        if not save:
            return layout.joined(y), nothing, nothing
        return layout.joined(y), layout.moments(mean) if mean.numel() else nothing, layout.moments(var)

    def backward(
        self,
        problem: Problem,
        dy: Tensor,
        x: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layout = _Layout(problem, x)
        local = layout.local(x)
        backend = select(local)
        parameters = layout.vector(weight, "affine"), layout.vector(bias, "affine")
        addend = None if residual is None else layout.local(residual)
        dy = layout.local(dy)
        nothing = local.new_empty(0)
        mean, var = (
            layout.vector(t, "stats") if isinstance(t, DTensor) or problem.moments == Moments.given else t
            for t in (mean, var)
        )
        assert var is not None
        if problem.moments == Moments.given:
            arguments = layout.part.problem, dy, local, *parameters, addend, mean, var, needs
            if local.numel():
                dx, dweight, dbias, dresidual = backend.backward(*arguments)
            else:
                dx = dresidual = local
                dweight, dbias = (nothing if p is None else torch.zeros_like(p) for p in parameters)
        else:
            count = torch.full((1,), problem.stats.count, dtype=torch.float64, device=local.device)
            mean = var[:0] if mean is None else mean
            dx, dweight, dbias, dresidual = part_backward(
                layout.part, backend, dy, local, *parameters, addend, count, mean, var, needs
            )
        return (
            layout.joined(dx) if needs & 1 else nothing,
            layout.whole(dweight, "affine", weight, summed=True) if needs & 2 else nothing,
            layout.whole(dbias, "affine", bias, summed=True) if needs & 4 else nothing,
            layout.joined(dresidual) if needs & 8 else nothing,
        )

    def add_forward(
        self, problem: Problem, x: Any, add: Any, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = x + add  # by torch, which knows what becomes of two placements
        y, mean, var = self.forward(problem, total, weight, bias, None, None, None, save)
        return y, total, mean, var

    def add_backward(
        self,
        problem: Problem,
        dy: Tensor,
        dtotal: Tensor,
        x: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias, _ = self.backward(problem, dy, x, weight, bias, None, mean, var, needs)
        return dx + dtotal, dweight, dbias

    def moments(self, problem: Problem, x: Any) -> tuple[Tensor, Tensor]:
        layout = _Layout(problem, x)
        local = layout.local(x)
        _, mean, var = part_moments(layout.part, select(local), local)
        nothing = local.new_empty(0, dtype=torch.float64)
        return layout.whole(mean, "stats") if mean.numel() else nothing, layout.whole(var, "stats")


SHARDED = Sharded()
