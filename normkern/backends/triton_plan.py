"""triton_plan.py: how a problem is cut into Triton programs, as a value.

A pure function of (problem, element size, chip), like csrc/core/plan.h, so that every row of it can be tested on any
machine. A kernel sees the dense buffer as lines of `width` elements and reads tiles of `lines x columns` of them; the
group of an element is that of its line's first element plus that of its column, in both domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from normkern.problem import Domain, Moments, Problem

RUN_BYTES = 128  # shorter runs of a group are read across groups: one cache line of device memory
FUSED_RUN_BYTES = 64  # runs that a fused tile may be made of: two sectors
MOST_WARPS = 16
ACCESS_BYTES = 16  # the widest access of a thread
ALIGNMENT = 16  # elements, enough for it whatever their size


@dataclass(frozen=True)
class Tuning:
    """The free choices of a plan. The defaults are as many elements as a thread can hold of each tensor without
    spilling (bench/results/triton/resources.csv); NORMKERN_TRITON_AUTOTUNE=1 measures the others of TUNINGS."""

    forward: int = 32  # elements that a thread holds of each tensor, by program
    backward: int = 16
    reduce: int = 8
    map: int = 16
    column_warps: int = 8  # of a program that sums dweight over its tiles
    waves: int = 4  # programs per processor that a split reduction aims at


DEFAULT = Tuning()
TUNINGS = (
    DEFAULT,
    Tuning(forward=16, backward=8, reduce=16, map=8),
    Tuning(forward=8, backward=4, reduce=4, map=4, waves=8),
    Tuning(column_warps=4, reduce=16, waves=2),
    Tuning(column_warps=16, map=8, waves=8),
)


@dataclass(frozen=True)
class Chip:
    """What the planner must know of a GPU: its multiprocessors, and the threads of a warp."""

    processors: int
    warp: int = 32


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time: powers of two, at least as large as what is used of them."""

    lines: int
    columns: int
    warps: int

    @property
    def elements(self) -> int:
        return self.lines * self.columns


@dataclass(frozen=True)
class Lines:
    """The buffer as [batch, rows, keep, width]; a program walks the rows of one (batch, keep)."""

    batch: int
    rows: int
    keep: int
    width: int

    @property
    def groups(self) -> int:
        return self.batch * self.keep

    @property
    def count(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Index:
    """Where a domain's group of an element comes from.

    `line`: 0 not from its line, 1 from each line, 2 from the first line of a tile, since all of them share it, 3 from
    the first line of a program likewise. `column`: 0 not from its column, 1 the column is the group, 2 column // cols,
    3 that and the wrap at the end of a line of the domain.
    """

    block: int
    cols: int
    keep: int
    line: int
    column: int


@dataclass(frozen=True)
class Reduce:
    """One reduction: programs leave partial results, which lie as `partials`, and a second launch merges them.

    `across` programs stand side by side on a line of neighbouring groups; with 1 a program's lines are one group's.
    """

    lines: Lines
    tile: Tile
    by_column: bool
    across: int
    parts: int
    steps: int  # of each program
    column_tiles: int
    programs: int
    partials: Domain


@dataclass(frozen=True)
class Fused:
    """A whole norm in one read. `whole`: every line of the tile is a group; else the tile is one group."""

    lines: Lines
    tile: Tile
    whole: bool
    programs: int
    # Backward: how dweight and dbias come about, "" not here, "group" from the group's own sums, "line" from each
    # line's, "column" from sums that a program keeps over all its tiles; the last two leave partial results.
    gradients: str = ""
    partials: Domain | None = None


@dataclass(frozen=True)
class Map:
    """One element from its group."""

    width: int
    tile: Tile
    column_tiles: int
    programs: int


@dataclass(frozen=True)
class Plan:
    """`fused`, or `reduce` (unless the moments are given) and `map`; `affine` where dweight and dbias take a
    reduction of their own."""

    fused: Fused | None = None
    reduce: Reduce | None = None
    map: Map | None = None
    affine: Reduce | None = None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_from(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def simplify(d: Domain) -> Domain:
    """The same groups with as few extents above 1 as possible: contiguous groups have rows == 1."""
    if d.keep == 1:
        d = Domain(d.batch, 1, 1, d.rows * d.cols)
    return Domain(d.batch * d.keep, 1, 1, d.cols) if d.rows == 1 else d


def sums_shared(p: Problem) -> bool:
    """Batch norm: the sums that dx needs are dweight and dbias, too."""
    return p.moments != Moments.given and same_groups(p.stats, p.affine)


def bounds(domain: Domain) -> list[int]:
    """The lengths after which the group of an element changes: of a run, of a line of runs, of a batch."""
    d = simplify(domain)
    return [d.cols, d.keep * d.cols, d.rows * d.keep * d.cols]


def index_of(domain: Domain, width: int, tile: int | None = None, own: bool = False) -> Index:
    """The groups of `domain` in a buffer of lines of `width` elements.

    `tile`: so many lines of a tile follow each other from a multiple of it. `own`: all lines of a program share their
    group.
    """
    d = simplify(domain)
    run, line, block = bounds(d)
    if any(bound % width and width % bound for bound in (run, line, block)):
        raise ValueError(f"triton: the groups of {domain} do not fit lines of {width} elements")
    by_line = 0
    if d.numel > width and (line > width or d.batch > 1):
        together = run // width if width <= run else block // width if line <= width <= block else 1
        by_line = 3 if own else 2 if tile and together % tile == 0 else 1
    column = 0 if width <= run else 1 if run == 1 and width <= line else 2 if width <= line else 3
    return Index(block, d.cols, d.keep, by_line, column)


def same_groups(a: Domain, b: Domain) -> bool:
    return simplify(a) == simplify(b)


def fused_index(fused: Fused, p: Problem) -> Index:
    """Of the affine domain."""
    if fused.whole:
        return index_of(p.affine, fused.lines.width, fused.tile.lines)
    return index_of(p.affine, fused.lines.width, own=same_groups(p.stats, p.affine))


def reduce_index(reduce: Reduce, walked: Domain, domain: Domain) -> Index:
    """Of `domain` where a reduction walks `walked`."""
    lines, tile = reduce.lines, reduce.tile
    follow = lines.keep == 1 and (lines.batch == 1 or lines.rows % tile.lines == 0)
    return index_of(domain, lines.width, tile.lines if follow else None, same_groups(walked, domain))


def alignment(width: int) -> int:
    """The largest power of two that every line's first element is a multiple of, as far as it matters."""
    return math.gcd(width, ALIGNMENT)


def warps_of(elements: int, each: int, chip: Chip) -> int:
    return min(max(power_from(ceil_div(elements, each * chip.warp)), 1), MOST_WARPS)


def largest_tile(each: int, size: int, chip: Chip) -> int:
    """Elements of a tile with `each` of them in a thread; float64 takes two registers."""
    return MOST_WARPS * chip.warp * each // (2 if size == 8 else 1)


# ---- fused


def plan_fused(
    p: Problem, size: int, chip: Chip, backward: bool, gradients: bool, tuning: Tuning = DEFAULT
) -> Fused | None:
    """One read, where a group fits into the registers of a program; else None."""
    d = simplify(p.stats)
    each = tuning.backward if backward else tuning.forward
    # What fits does not depend on the tuning, so that a tuned plan reads no more than an untuned one.
    limit = DEFAULT.backward if backward else DEFAULT.forward
    most = largest_tile(limit, size, chip)
    if d.rows == 1 and (lined := _lined(p, d, size, most)) is not None:
        lines, whole = lined, False
    elif d.rows == 1:
        lines, whole = Lines(d.batch, 1, 1, d.cols), True
    elif d.cols * size >= FUSED_RUN_BYTES:
        lines, whole = Lines(d.batch, d.rows, d.keep, d.cols), False
    else:
        return None
    if alignment(lines.width) * size < ACCESS_BYTES:  # element by element, which takes registers for each
        each, most = max(each // 2, 1), most // 2
    columns = power_from(lines.width)
    if (1 if whole else power_from(lines.rows)) * columns > most:
        return None
    if not whole:
        rows = power_from(lines.rows)
        tile = Tile(rows, columns, warps_of(rows * columns, each, chip))
        fused = Fused(lines, tile, whole, lines.groups)
    else:
        # Two warps' worth of short groups to a program, but no fewer programs than processors.
        rows = min(max(2 * chip.warp * each // columns, 1), power_from(ceil_div(lines.batch, chip.processors)), 64)
        tile = Tile(rows, columns, warps_of(rows * columns, each, chip))
        fused = Fused(lines, tile, whole, ceil_div(lines.batch, rows))
    return with_gradients(p, fused, chip, tuning) if gradients else fused


def _lined(p: Problem, d: Domain, size: int, most: int) -> Lines | None:
    """Contiguous groups whose channels are runs: a line to each channel finds its weight without a division."""
    run = simplify(p.affine).cols
    if run >= d.cols or d.cols % run or run * size < RUN_BYTES:
        return None
    rows = d.cols // run
    padded = power_from(rows) * power_from(run)
    if padded > most or padded > 2 * power_from(d.cols) or 4 * padded > 7 * d.cols:
        return None
    return Lines(d.batch, rows, 1, run)


def with_gradients(p: Problem, fused: Fused, chip: Chip, tuning: Tuning) -> Fused:
    """How dweight and dbias come out of the same read, where they can."""
    a, width = simplify(p.affine), fused.lines.width
    if sums_shared(p):
        return replace(fused, gradients="group")
    if not fused.whole and a.cols % width == 0:
        return replace(fused, gradients="line", partials=Domain(a.batch, a.rows, a.keep, a.cols // width))
    if fused.whole and a.batch == 1 and a.keep * a.cols == width:
        # A program has a partial result of its own: few, large programs, as many as run at once.
        elements = tuning.column_warps * chip.warp * tuning.backward
        rows = min(max(elements // fused.tile.columns, 1), power_from(ceil_div(fused.lines.batch, chip.processors)))
        tile = Tile(rows, fused.tile.columns, warps_of(rows * fused.tile.columns, tuning.backward, chip))
        resident = chip.processors * max(MOST_WARPS // tile.warps, 1)
        programs = min(ceil_div(fused.lines.batch, rows), resident)
        partials = Domain(1, programs, a.keep, a.cols)
        return replace(fused, tile=tile, gradients="column", programs=programs, partials=partials)
    return fused


# ---- split


def plan_reduce(domain: Domain, size: int, chip: Chip, other: Domain | None = None, tuning: Tuning = DEFAULT) -> Reduce:
    """Any number of groups of any size. `other`: the domain whose groups the kernel looks up as well."""
    d = simplify(domain)
    elements = tuning.reduce * chip.warp * 8  # eight warps
    by_column = d.cols * size < RUN_BYTES and d.groups > 1
    if by_column:
        lines = Lines(1, 1, 1, d.numel) if d.rows == 1 else Lines(d.batch, d.rows, 1, d.keep * d.cols)
        columns = min(power_from(lines.width), max(RUN_BYTES // size, elements // power_from(lines.rows)), elements)
        across = ceil_div(lines.width, columns)
        rows = min(elements // columns, power_from(lines.rows))
        column_tiles = 1
        steps = ceil_div(lines.rows, rows)
    else:
        lines, across = Lines(d.batch, d.rows, d.keep, d.cols), 1
        run = simplify(other).cols if other else d.cols
        if d.rows == 1 and run < d.cols and d.cols % run == 0 and run * size >= RUN_BYTES:
            lines = Lines(d.batch, d.cols // run, 1, run)  # a channel to a line
        columns = min(power_from(lines.width), elements)
        rows = min(elements // columns, power_from(lines.rows))
        column_tiles = ceil_div(lines.width, columns)
        steps = ceil_div(lines.rows, rows) * column_tiles
    items = lines.groups * across
    parts = min(max(ceil_div(tuning.waves * chip.processors, items), 1), steps)
    steps_each = ceil_div(steps, parts)
    parts = ceil_div(steps, steps_each)
    if by_column:
        partials = Domain(d.batch, parts, d.keep, d.cols) if d.rows > 1 else Domain(1, parts, d.groups, d.cols)
    else:
        partials = Domain(d.groups, 1, 1, parts)
    tile = Tile(rows, columns, warps_of(rows * columns, tuning.reduce, chip))
    return Reduce(lines, tile, by_column, across, parts, steps_each, column_tiles, items * parts, partials)


def plan_map(p: Problem, size: int, chip: Chip, tuning: Tuning = DEFAULT) -> Map:
    """Lines on which both groups are constant, where they are long enough; else the shortest that are."""
    numel = p.stats.numel
    both = bounds(p.stats) + bounds(p.affine) + [numel]
    constant = min(simplify(p.stats).cols, simplify(p.affine).cols)
    width = min((b for b in both if b * size >= RUN_BYTES and b >= constant), default=numel)
    elements = tuning.map * chip.warp * 4 // (2 if size == 8 else 1)
    columns = min(power_from(width), elements)
    rows = min(elements // columns, power_from(numel // width))
    tile = Tile(rows, columns, warps_of(rows * columns, tuning.map, chip))
    column_tiles = ceil_div(width, columns)
    return Map(width, tile, column_tiles, column_tiles * ceil_div(numel // width, rows))


# ---- the three passes


def plan_moments(p: Problem, size: int, chip: Chip, split: bool = False, tuning: Tuning = DEFAULT) -> Plan:
    fused = None if split else plan_fused(p, size, chip, False, False, tuning)
    return Plan(fused=fused) if fused else Plan(reduce=plan_reduce(p.stats, size, chip, None, tuning))


def plan_forward(p: Problem, size: int, chip: Chip, split: bool = False, tuning: Tuning = DEFAULT) -> Plan:
    given = p.moments == Moments.given
    fused = None if split or given else plan_fused(p, size, chip, False, False, tuning)
    if fused:
        return Plan(fused=fused)
    reduce = None if given else plan_reduce(p.stats, size, chip, None, tuning)
    return Plan(reduce=reduce, map=plan_map(p, size, chip, tuning))


def plan_backward(
    p: Problem, size: int, chip: Chip, gradients: bool, split: bool = False, tuning: Tuning = DEFAULT
) -> Plan:
    """`gradients`: dweight or dbias is wanted."""
    given = p.moments == Moments.given
    fused = None if split or given else plan_fused(p, size, chip, True, gradients, tuning)
    own = gradients and not sums_shared(p) and (fused is None or not fused.gradients)
    affine = plan_reduce(p.affine, size, chip, p.stats, tuning) if own else None
    if fused:
        return Plan(fused=fused, affine=affine)
    reduce = None if given else plan_reduce(p.stats, size, chip, p.affine, tuning)
    return Plan(reduce=reduce, map=plan_map(p, size, chip, tuning), affine=affine)
