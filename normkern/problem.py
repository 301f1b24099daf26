"""problem.py: what a normalization is, as two domains over one dense buffer.

The buffer holds x in memory order and is viewed as [batch, rows, keep, cols]; a group is one (batch, keep). One domain
says which elements share moments, the other which share a weight. The constructors below (`batch`, `group`, `layer`,
`instance`) are all that is specific to a norm; they mirror csrc/core/problem.h and return None where the strides do
not fit, so that the caller copies x once and asks again.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Moments(enum.IntEnum):
    """Where mean and variance come from; the values are those of csrc/core/problem.h."""

    mean_var = 0
    second = 1
    given = 2


class Act(enum.IntEnum):
    """What follows the affine step and the residual; the values are those of csrc/core/problem.h."""

    none = 0
    relu = 1
    silu = 2
    gelu = 3
    leaky_relu = 4


# Bytes of x to a byte of a mask; the layout is in csrc/core/arguments.h.
MASKED = 16

# Bits of a backward pass: which gradients are wanted.
NEED_DX, NEED_DWEIGHT, NEED_DBIAS, NEED_DRESIDUAL = 1, 2, 4, 8


@dataclass(frozen=True)
class Domain:
    """A partition of a [batch, rows, keep, cols] buffer into batch * keep groups of rows * cols elements."""

    batch: int = 1
    rows: int = 1
    keep: int = 1
    cols: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.rows, self.keep, self.cols

    @property
    def groups(self) -> int:
        return self.batch * self.keep

    @property
    def count(self) -> int:
        return self.rows * self.cols

    @property
    def numel(self) -> int:
        return self.groups * self.count

    def group_of(self, element: int) -> int:
        return element // (self.rows * self.keep * self.cols) * self.keep + element // self.cols % self.keep


@dataclass(frozen=True)
class Problem:
    """One normalization of one buffer; its dtype is x's.

    `weight_order` permutes a weight of several dimensions into the order of the affine groups; None: it is in order.
    """

    stats: Domain
    affine: Domain
    moments: Moments = Moments.mean_var
    act: Act = Act.none
    eps: float = 1e-5
    weight_order: tuple[int, ...] | None = None

    def can_mask(self, itemsize: int) -> bool:
        """Whether relu's gradient may be kept as a bit for each element, eight or fewer to a byte.

        A byte covers 16 bytes of x (MASKED) and must have one writer, so lines may not begin inside of one: runs are
        multiples of it, or short ones lie side by side in lines that are.
        """
        if self.act != Act.relu:
            return False
        if self.moments == Moments.given:
            return True
        stats, affine, together = self.stats, self.affine, MASKED // itemsize
        if stats.rows == 1 or stats.keep == 1:
            return stats.count % together == 0 and (affine.cols == 1 or affine.cols % together == 0)
        short = stats.cols * itemsize < 4 * MASKED
        return stats.cols % together == 0 or (short and stats.keep * stats.cols % together == 0)


class Axis(NamedTuple):
    """One extent of x, and whether elements that differ in it have different moments, or different weights."""

    size: int
    stride: int
    stats: bool
    affine: bool


def memory_order(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions from outermost to innermost; dimensions of size 1, whose stride says nothing, come first."""
    order: list[int] = []
    # Insertion instead of sorted(): torch.compile can trace comparisons of symbolic sizes, but not sort them.
    for dim, size in enumerate(sizes):
        at = len(order)
        while at > 0 and size != 1 and sizes[order[at - 1]] != 1 and strides[order[at - 1]] < strides[dim]:
            at -= 1
        if size == 1:
            at = 0
        order.insert(at, dim)
    return order


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """The elements fill one range of memory, each place once."""
    expected = 1
    for dim in reversed(memory_order(sizes, strides)):
        if sizes[dim] != 1 and strides[dim] != expected:
            return False
        expected *= sizes[dim]
    return True


def fit(extents: Iterable[tuple[int, bool]]) -> Domain | None:
    """The domain of (size, kept) extents in memory order, or None where they are no [batch, rows, keep, cols].

    Neighbours of one kind are one extent; the pattern is kept, reduced, kept, reduced, and any of them may be missing.
    """
    found = [1, 1, 1, 1]
    place = 0
    for size, kept in extents:
        if size == 1:
            continue
        if (place % 2 == 0) != kept:
            place += 1
        if place == 4:
            return None
        found[place] *= size
    batch, rows, keep, cols = found
    if keep == 1:
        return Domain(batch, 1, 1, rows * cols)
    if rows == 1:
        return Domain(batch * keep, 1, 1, cols)
    return Domain(batch, rows, keep, cols)


def _pair(axes: Sequence[Axis]) -> tuple[Domain, Domain, list[int]] | None:
    """The domains of moments and of weights, and the memory order of the axes."""
    sizes = [axis.size for axis in axes]
    strides = [axis.stride for axis in axes]
    if not is_dense(sizes, strides):
        return None
    order = memory_order(sizes, strides)
    stats = fit([(axes[a].size, axes[a].stats) for a in order])
    affine = fit([(axes[a].size, axes[a].affine) for a in order])
    if stats is None or affine is None:
        return None
    return stats, affine, order


def cached(build: Callable[P, R]) -> Callable[P, R]:
    """Remember results: building a problem costs more than everything else Python does in a call."""
    known = functools.lru_cache(maxsize=4096, typed=True)(build)

    @functools.wraps(build)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        try:
            return known(*args, **kwargs)  # type: ignore[arg-type]
        except TypeError:  # symbolic sizes have no hash
            return build(*args, **kwargs)

    return call


@cached
def batch(
    shape: Sequence[int], strides: Sequence[int], act: Act = Act.none, eps: float = 1e-5, given: bool = False
) -> Problem | None:
    """Moments over all but the channels (dimension 1); given moments are per channel as well."""
    pair = _pair([Axis(n, s, dim == 1, dim == 1) for dim, (n, s) in enumerate(zip(shape, strides, strict=True))])
    if pair is None:
        return None
    return Problem(pair[0], pair[1], Moments.given if given else Moments.mean_var, act, eps)


@cached
def group(
    shape: Sequence[int], strides: Sequence[int], groups: int, act: Act = Act.none, eps: float = 1e-5
) -> Problem | None:
    """Moments over a sample's channels in `groups` neighbouring bundles; a weight per channel."""
    bundle = shape[1] // groups
    axes = [Axis(n, s, dim == 0, False) for dim, (n, s) in enumerate(zip(shape, strides, strict=True))]
    axes[1:2] = [Axis(groups, strides[1] * bundle, True, True), Axis(bundle, strides[1], False, True)]
    pair = _pair(axes)
    if pair is None:
        return None
    return Problem(pair[0], pair[1], Moments.mean_var, act, eps)


@cached
def instance(
    shape: Sequence[int], strides: Sequence[int], act: Act = Act.none, eps: float = 1e-5, second: bool = False
) -> Problem | None:
    """Moments over the positions of every channel of every sample; a weight per channel.

    With `second` it is the second moment about 0: filter response norm.
    """
    pair = _pair([Axis(n, s, dim < 2, dim == 1) for dim, (n, s) in enumerate(zip(shape, strides, strict=True))])
    if pair is None:
        return None
    return Problem(pair[0], pair[1], Moments.second if second else Moments.mean_var, act, eps)


@cached
def layer(
    shape: Sequence[int],
    strides: Sequence[int],
    dims: int,
    act: Act = Act.none,
    eps: float = 1e-5,
    second: bool = False,
) -> Problem | None:
    """Moments over the last `dims` dimensions, wherever they are in memory; a weight per element of those.

    With `second` it is the second moment about 0: RMS norm.
    """
    lead = len(shape) - dims
    pair = _pair([Axis(n, s, dim < lead, dim >= lead) for dim, (n, s) in enumerate(zip(shape, strides, strict=True))])
    if pair is None:
        return None
    stats, affine, order = pair
    normalized = tuple(dim - lead for dim in order if dim >= lead)
    wide = [dim for dim in normalized if shape[lead + dim] != 1]
    weight_order = None if wide == sorted(wide) else normalized
    return Problem(stats, affine, Moments.second if second else Moments.mean_var, act, eps, weight_order)


@cached
def kernel(shape: Sequence[int], strides: Sequence[int], eps: float = 0.0, second: bool = False) -> Problem | None:
    """Moments of every output channel (dimension 0) of a layer's weight, and a gain for each."""
    pair = _pair([Axis(n, s, dim == 0, dim == 0) for dim, (n, s) in enumerate(zip(shape, strides, strict=True))])
    if pair is None:
        return None
    return Problem(pair[0], pair[1], Moments.second if second else Moments.mean_var, Act.none, eps)


@cached
def reduced(shape: Sequence[int], strides: Sequence[int], dims: tuple[int, ...]) -> Domain | None:
    """The domain that reduces `dims` and keeps the others."""
    if not is_dense(shape, strides):
        return None
    return fit([(shape[dim], dim not in dims) for dim in memory_order(shape, strides)])
