# The planner of the Triton backend: what real shapes get, and properties of every plan: each element is read by exactly
# one program, finds its groups in both domains, and no tile is larger than registers allow.
from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkern import problem
from normkern.backends import triton_plan
from normkern.backends.triton_plan import (
    DEFAULT,
    TUNINGS,
    Chip,
    Fused,
    Index,
    Lines,
    Map,
    Plan,
    Reduce,
    Tile,
    index_of,
    plan_backward,
    plan_forward,
    plan_moments,
    power_from,
)
from normkern.problem import Domain, Problem

H200, A100, L4 = Chip(132), Chip(108), Chip(58)
# Warps of few threads: tiles of few elements, so that small tensors take many of them.
TINY, NARROW = Chip(2, warp=1), Chip(5, warp=4)


def contiguous(*shape: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def channels_last(*shape: int) -> tuple[int, ...]:
    c, *spatial = shape[1:]
    return (math.prod(shape[1:]), 1, *(s * c for s in contiguous(*spatial)))


def layer(rows: int, cols: int) -> Problem:
    return found(problem.layer((rows, cols), (cols, 1), 1))


def group(shape: tuple[int, ...], groups: int, last: bool = False) -> Problem:
    return found(problem.group(shape, (channels_last if last else contiguous)(*shape), groups))


def batch(shape: tuple[int, ...], last: bool = False) -> Problem:
    return found(problem.batch(shape, (channels_last if last else contiguous)(*shape)))


def found(p: Problem | None) -> Problem:
    assert p is not None
    return p


def tile_text(tile: Tile) -> str:
    return f"{tile.lines}x{tile.columns}/{tile.warps}"


def reduce_text(r: Reduce) -> str:
    return f"{'columns' if r.by_column else 'rows'} {r.programs} of {tile_text(r.tile)}, {r.parts} parts"


def text(plan: Plan) -> str:
    """Programs, tiles as lines x columns / warps, and how dweight and dbias come about."""
    parts = []
    if plan.fused:
        how = f" by {plan.fused.gradients}" if plan.fused.gradients else ""
        parts.append(f"fused {plan.fused.programs} of {tile_text(plan.fused.tile)}{how}")
    if plan.reduce:
        parts.append(f"reduce {reduce_text(plan.reduce)}")
    if plan.map:
        parts.append(f"map {plan.map.programs} of {tile_text(plan.map.tile)}")
    if plan.affine:
        parts.append(f"affine {reduce_text(plan.affine)}")
    return "; ".join(parts)


# chip, problem, bytes of an element, backward (with dweight and dbias), plan
GOLDEN = [
    (H200, layer(16384, 4096), 2, False, "fused 16384 of 1x4096/4"),
    (H200, layer(16384, 4096), 2, True, "fused 264 of 1x4096/8 by column"),
    (H200, layer(131072, 128), 2, False, "fused 8192 of 16x128/2"),
    (H200, layer(131072, 128), 2, True, "fused 264 of 32x128/8 by column"),
    (A100, layer(65536, 1024), 4, True, "fused 216 of 4x1024/8 by column"),
    (H200, layer(4096, 16384), 2, False, "fused 4096 of 1x16384/16"),
    (
        H200,
        layer(4096, 16384),
        2,
        True,
        "reduce rows 4096 of 1x2048/8, 1 parts; map 32768 of 1x2048/4; affine columns 768 of 32x64/8, 3 parts",
    ),
    (
        H200,
        layer(1024, 12288),
        2,
        True,
        "reduce rows 1024 of 1x2048/8, 1 parts; map 6144 of 1x2048/4; affine columns 576 of 32x64/8, 3 parts",
    ),
    (H200, layer(8, 100_003), 2, False, "reduce rows 392 of 1x2048/8, 49 parts; map 392 of 1x2048/4"),
    (
        L4,
        layer(64, 1_000_003),
        4,
        True,
        "reduce rows 256 of 1x2048/8, 4 parts; map 31296 of 1x2048/4; affine columns 31251 of 64x32/8, 1 parts",
    ),
    (H200, layer(1_000_000, 8), 8, False, "fused 15625 of 64x8/1"),
    (H200, group((2, 1280, 8, 8), 32), 2, True, "fused 64 of 64x64/8 by line"),
    (H200, group((2, 1280, 16, 16), 32), 2, False, "fused 64 of 64x256/16"),
    (H200, group((16, 320, 64, 64), 32), 2, False, "reduce rows 1024 of 1x2048/8, 2 parts; map 10240 of 1x2048/4"),
    (
        H200,
        group((16, 320, 64, 64), 32),
        2,
        True,
        "reduce rows 1024 of 1x2048/8, 2 parts; map 10240 of 1x2048/4; affine rows 640 of 1x2048/8, 2 parts",
    ),
    (
        H200,
        group((1, 512, 256, 256), 32),
        2,
        True,
        "reduce rows 544 of 1x2048/8, 17 parts; map 16384 of 1x2048/4; affine rows 1024 of 1x2048/8, 2 parts",
    ),
    (
        H200,
        group((16, 320, 64, 64), 32, last=True),
        2,
        True,
        "reduce columns 560 of 32x64/8, 7 parts; map 16384 of 4x512/4; affine columns 515 of 32x64/8, 103 parts",
    ),
    (
        A100,
        group((2, 1280, 8, 8), 32, last=True),
        2,
        True,
        "fused 64 of 64x64/8; affine columns 80 of 32x64/8, 4 parts",
    ),
    (H200, batch((256, 64, 112, 112)), 2, False, "reduce rows 576 of 1x2048/8, 9 parts; map 114688 of 1x2048/4"),
    (H200, batch((256, 64, 112, 112)), 2, True, "reduce rows 576 of 1x2048/8, 9 parts; map 114688 of 1x2048/4"),
    (H200, batch((256, 512, 7, 7)), 2, True, "reduce columns 784 of 32x64/8, 2 parts; map 3328 of 1x2048/4"),
    (
        H200,
        batch((256, 256, 14, 14), last=True),
        2,
        True,
        "reduce columns 524 of 32x64/8, 131 parts; map 6272 of 8x256/4",
    ),
    (L4, batch((8, 64, 16, 16)), 4, True, "fused 64 of 8x256/4 by group"),
    (H200, batch((4096, 1000)), 2, False, "reduce columns 512 of 32x64/8, 32 parts; map 2048 of 2x1024/4"),
]


@pytest.mark.parametrize(("chip", "p", "size", "backward", "expected"), GOLDEN)
def test_golden(chip: Chip, p: Problem, size: int, backward: bool, expected: str) -> None:
    plan = plan_backward(p, size, chip, True) if backward else plan_forward(p, size, chip)
    assert text(plan) == expected


# ---- what a kernel does with a plan, in plain Python


def line_of(lines: Lines, group: int, row: int) -> int:
    return (group // lines.keep * lines.rows + row) * lines.keep + group % lines.keep


def group_at(index: Index, lines: list[int], at: int, top: int, col: int, width: int) -> int:
    """The group of an element: that of its line (or of the first of its tile or program) plus that of its column."""

    def group_of(e: int) -> int:
        return e // index.block * index.keep + e // index.cols % index.keep

    line = {0: 0, 1: group_of(lines[at] * width), 2: group_of(lines[0] * width), 3: group_of(top * width)}[index.line]
    column = {0: 0, 1: col, 2: col // index.cols, 3: group_of(col)}[index.column]
    return line + column


Visit = tuple[int, list[int], int, int, int]  # program, lines of the tile, place among them, first line, column


def visits_fused(fused: Fused) -> list[Visit]:
    lines, tile, seen = fused.lines, fused.tile, []
    tiles = triton_plan.ceil_div(lines.groups, tile.lines) if fused.whole else lines.groups
    for program in range(fused.programs):
        for t in range(program, tiles, fused.programs):
            if fused.whole:
                inside = [line for line in range(t * tile.lines, (t + 1) * tile.lines) if line < lines.groups]
            else:
                inside = [line_of(lines, t, row) for row in range(min(tile.lines, lines.rows))]
            for at, col in itertools.product(range(len(inside)), range(min(tile.columns, lines.width))):
                seen.append((program, inside, at, inside[0], col))
    return seen


def visits_reduce(r: Reduce) -> list[Visit]:
    lines, tile, seen = r.lines, r.tile, []
    all_steps = triton_plan.ceil_div(lines.rows, tile.lines) * r.column_tiles
    for program in range(r.programs):
        strip, column = program // r.across, program % r.across * tile.columns
        group, part = divmod(strip, r.parts)
        for step in range(part * r.steps, min((part + 1) * r.steps, all_steps)):
            row, begin = step // r.column_tiles * tile.lines, column + step % r.column_tiles * tile.columns
            inside = [line_of(lines, group, row + i) for i in range(tile.lines) if row + i < lines.rows]
            for at, col in itertools.product(range(len(inside)), range(begin, begin + tile.columns)):
                if col < lines.width:
                    seen.append((program, inside, at, line_of(lines, group, 0), col))
    return seen


def visits_map(m: Map, numel: int) -> list[Visit]:
    seen = []
    for program in range(m.programs):
        row, column = divmod(program, m.column_tiles)
        first = row * m.tile.lines
        inside = [line for line in range(first, first + m.tile.lines) if line < numel // m.width]
        for at, col in itertools.product(range(len(inside)), range(m.tile.columns)):
            col += column * m.tile.columns
            if col < m.width:
                seen.append((program, inside, at, first, col))
    return seen


def assert_covers(seen: list[Visit], width: int, domains: list[tuple[Domain, Index]], numel: int) -> None:
    places = [lines[at] * width + col for _, lines, at, _, col in seen]
    assert Counter(places) == Counter(range(numel)), "an element is missed or read twice"
    for domain, index in domains:
        for place, (_, lines, at, top, col) in zip(places, seen, strict=True):
            assert group_at(index, lines, at, top, col, width) == domain.group_of(place), (domain, index, place)


def assert_sound(p: Problem, plan: Plan, size: int, chip: Chip, backward: bool) -> None:
    numel = p.stats.numel
    if plan.fused:
        f = plan.fused
        assert f.tile.lines >= (1 if f.whole else f.lines.rows)
        assert f.tile.columns >= f.lines.width
        each = DEFAULT.backward if backward else DEFAULT.forward  # what fits is the same for every tuning
        assert f.tile.elements <= triton_plan.largest_tile(each, size, chip)
        domains = [(p.affine, triton_plan.fused_index(f, p))]
        assert_covers(visits_fused(f), f.lines.width, domains, numel)
        if f.gradients in ("line", "column"):
            assert f.partials is not None
            assert f.partials.groups == p.affine.groups
            count = f.programs * f.lines.width if f.gradients == "column" else numel // f.lines.width
            assert f.partials.numel == count
    for reduce, domain in ((plan.reduce, p.stats), (plan.affine, p.affine)):
        if reduce:
            seen = visits_reduce(reduce)
            own = [(d, triton_plan.reduce_index(reduce, domain, d)) for d in (p.stats, p.affine)] if backward else []
            assert_covers(seen, reduce.lines.width, own, numel)
            assert_partials(reduce, domain, seen)
    if plan.map:
        domains = [(d, index_of(d, plan.map.width, plan.map.tile.lines)) for d in (p.stats, p.affine)]
        assert_covers(visits_map(plan.map, numel), plan.map.width, domains, numel)
    for tile in (t.tile for t in (plan.fused, plan.reduce, plan.map, plan.affine) if t):
        assert tile.lines == power_from(tile.lines)
        assert tile.columns == power_from(tile.columns)
        assert 1 <= tile.warps <= triton_plan.MOST_WARPS


def assert_partials(r: Reduce, domain: Domain, seen: list[Visit]) -> None:
    """A partial result holds elements of one group, and lies where the merge looks for that group."""
    assert r.partials.groups == domain.groups
    held: dict[int, set[int]] = {}
    for program, lines, at, _, col in seen:
        strip = program // r.across
        place = strip * r.lines.width + col if r.by_column else strip
        held.setdefault(place, set()).add(domain.group_of(lines[at] * r.lines.width + col))
    assert sorted(held) == list(range(r.partials.numel)), "a partial result is missing"
    for place, groups in held.items():
        assert groups == {r.partials.group_of(place)}


sizes = st.integers(1, 8)
layouts = st.sampled_from(["contiguous", "channels_last", "swapped", "transposed"])


def strides_of(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    order = list(range(len(shape)))
    if layout == "channels_last":
        order = [0, *range(2, len(shape)), 1]
    elif layout == "swapped":
        order[:2] = 1, 0
    elif layout == "transposed":
        order[-2:] = order[:-3:-1]
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = (draw(sizes), draw(sizes), draw(st.integers(1, 5)), draw(st.integers(1, 20)))
    strides = strides_of(shape, draw(layouts))
    kind = draw(st.sampled_from(["batch", "given", "group", "instance", "layer", "rms"]))
    if kind in ("batch", "given"):
        p = problem.batch(shape, strides, given=kind == "given")
    elif kind == "group":
        divisors = [g for g in range(1, shape[1] + 1) if shape[1] % g == 0]
        p = problem.group(shape, strides, draw(st.sampled_from(divisors)))
    elif kind == "instance":
        p = problem.instance(shape, strides)
    else:
        p = problem.layer(shape, strides, draw(st.integers(1, 3)), second=kind == "rms")
    # Strides that do not fit are copied before a backend sees them.
    return p or found(problem.batch(shape, contiguous(*shape)))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([TINY, NARROW]), st.sampled_from(TUNINGS))
def test_every_element_once_in_its_groups(
    p: Problem, size: int, split: bool, chip: Chip, tuning: triton_plan.Tuning
) -> None:
    assert_sound(p, plan_forward(p, size, chip, split, tuning), size, chip, False)
    assert_sound(p, plan_backward(p, size, chip, True, split, tuning), size, chip, True)
    if p.moments != problem.Moments.given:
        assert_sound(p, plan_moments(p, size, chip, split, tuning), size, chip, False)


# Beyond what hypothesis draws: lines of several tiles, many steps, whole cache lines of channels.
LARGER = [
    layer(3, 1500),
    group((2, 8, 7, 30), 2),
    group((2, 8, 16, 16), 2),
    group((3, 64, 5, 2), 8, last=True),
    group((2, 160, 2, 2), 4, last=True),
    batch((5, 3, 10, 21)),
    batch((4, 100, 3, 2), last=True),
]


@pytest.mark.parametrize("p", LARGER, ids=lambda p: "x".join(map(str, p.stats.sizes)))
@pytest.mark.parametrize("split", [False, True], ids=["", "split"])
def test_larger_groups(p: Problem, split: bool) -> None:
    for chip in (TINY, NARROW):
        assert_sound(p, plan_forward(p, 2, chip, split), 2, chip, False)
        assert_sound(p, plan_backward(p, 2, chip, True, split), 2, chip, True)


def test_few_groups_are_split_over_the_chip() -> None:
    for p in (group((1, 512, 256, 256), 32), layer(4, 1_000_000), batch((256, 64, 112, 112))):
        for chip in (L4, A100, H200):
            reduce = plan_forward(p, 2, chip).reduce
            assert reduce is not None
            assert reduce.programs >= 2 * chip.processors


def test_constants_of_a_kernel_do_not_follow_the_batch_size() -> None:
    """Tiles and indices, which are compiled in, are the same for every large enough batch."""
    kinds = {
        "layer": lambda n: layer(n, 1000),
        "group": lambda n: group((n, 320, 64, 64), 32),
        "group_last": lambda n: group((n, 320, 64, 64), 32, last=True),
        "batch": lambda n: batch((n, 64, 56, 56)),
        "batch_last": lambda n: batch((n, 64, 56, 56), last=True),
    }
    for name, make in kinds.items():
        compiled = set()
        for n in (1024, 1025, 2000, 4096, 5001):
            p = make(n)
            for plan in (plan_forward(p, 2, H200), plan_backward(p, 2, H200, True)):
                for part in (plan.fused, plan.reduce, plan.map, plan.affine):
                    if part:
                        width = part.width if isinstance(part, Map) else part.lines.width
                        compiled.add((type(part).__name__, part.tile, triton_plan.alignment(width)))
        assert len(compiled) <= 7, f"{name}: {compiled}"


def test_domains_that_no_norm_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"triton: the groups of Domain.* do not fit lines of 6 elements"):
        index_of(Domain(2, 3, 5, 4), 6)


def test_simplified_domains_keep_their_groups() -> None:
    for d in (Domain(2, 3, 1, 4), Domain(2, 1, 3, 4), Domain(1, 1, 1, 7), Domain(2, 3, 4, 5)):
        s = triton_plan.simplify(d)
        assert [s.group_of(e) for e in range(d.numel)] == [d.group_of(e) for e in range(d.numel)]
