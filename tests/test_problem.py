# The geometry of every norm against brute force: the group of each element, found through logical indices, is the
# group that the domains name for its place in memory.
from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkern import problem
from normkern.problem import Domain, Moments, Problem, fit, is_dense, memory_order

Index = tuple[int, ...]


def dense_strides(shape: Index, order: Index, odd: int = 0) -> Index:
    """Strides of a dense tensor whose dimensions lie in memory in this order; size-1 dimensions get an odd stride."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step if shape[dim] != 1 else step + odd
        step *= shape[dim]
    return tuple(strides)


@st.composite
def layouts(draw: st.DrawFn, least: int = 2, most: int = 5) -> tuple[Index, Index]:
    rank = draw(st.integers(least, most))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=rank, max_size=rank)))
    order = tuple(draw(st.permutations(range(rank))))
    return shape, dense_strides(shape, order, draw(st.integers(0, 7)))


def elements(shape: Index, strides: Index) -> list[tuple[Index, int]]:
    """(logical index, place in memory) of every element."""
    every = itertools.product(*(range(n) for n in shape))
    return [(i, sum(a * b for a, b in zip(i, strides, strict=True) if b)) for i in every]


def places(shape: Index, strides: Index) -> list[tuple[Index, int]]:
    """As elements(), with the strides of size-1 dimensions out of the way."""
    return elements(shape, tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)))


def assert_partition(domain: Domain, keys: dict[int, Index]) -> None:
    """Elements share a group exactly where they share a key (place in memory -> key), and all groups are used."""
    assert domain.numel == len(keys)
    group_of_key: dict[Index, int] = {}
    for place, key in keys.items():
        assert group_of_key.setdefault(key, domain.group_of(place)) == domain.group_of(place)
    assert sorted(group_of_key.values()) == list(range(domain.groups))
    assert domain.groups * domain.count == domain.numel


def assert_weights(found: Problem, sizes: Index, indices: dict[int, Index]) -> None:
    """Affine group g is element g of the weight, after it was permuted by weight_order."""
    weight = torch.arange(math.prod(sizes)).view(sizes)
    flat = weight if found.weight_order is None else weight.permute(found.weight_order)
    flat = flat.reshape(-1)
    assert found.affine.groups == flat.numel()
    for place, index in indices.items():
        assert flat[found.affine.group_of(place)] == weight[index]


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_batch(layout: tuple[Index, Index]) -> None:
    shape, strides = layout
    found = problem.batch(shape, strides)
    assert found is not None, "every dense tensor fits batch norm"
    assert_partition(found.stats, {place: i[1:2] for i, place in places(shape, strides)})
    assert_weights(found, shape[1:2], {place: i[1:2] for i, place in places(shape, strides)})
    assert found.weight_order is None
    # Moments come back in group order and are used as running statistics: that is channel order.
    assert all(found.stats.group_of(place) == i[1] for i, place in places(shape, strides))


@settings(max_examples=200, deadline=None)
@given(layouts(), st.data())
def test_group(layout: tuple[Index, Index], data: st.DataObject) -> None:
    shape, strides = layout
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 6) if shape[1] % g == 0]))
    found = problem.group(shape, strides, groups)
    if found is None:
        assert problem.group(shape, dense_strides(shape, tuple(range(len(shape)))), groups) is not None
        return
    bundle = shape[1] // groups
    assert_partition(found.stats, {place: (i[0], i[1] // bundle) for i, place in places(shape, strides)})
    assert_weights(found, shape[1:2], {place: i[1:2] for i, place in places(shape, strides)})


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_instance(layout: tuple[Index, Index]) -> None:
    shape, strides = layout
    found = problem.instance(shape, strides)
    if found is None:
        assert problem.instance(shape, dense_strides(shape, tuple(range(len(shape))))) is not None
        return
    assert_partition(found.stats, {place: i[:2] for i, place in places(shape, strides)})
    assert_weights(found, shape[1:2], {place: i[1:2] for i, place in places(shape, strides)})


@settings(max_examples=200, deadline=None)
@given(layouts(least=1), st.data())
def test_layer(layout: tuple[Index, Index], data: st.DataObject) -> None:
    shape, strides = layout
    dims = data.draw(st.integers(1, len(shape)))
    second = data.draw(st.booleans())
    found = problem.layer(shape, strides, dims, second=second)
    if found is None:
        assert problem.layer(shape, dense_strides(shape, tuple(range(len(shape)))), dims) is not None
        return
    lead = len(shape) - dims
    assert found.moments == (Moments.second if second else Moments.mean_var)
    assert_partition(found.stats, {place: i[:lead] for i, place in places(shape, strides)})
    assert_weights(found, shape[lead:], {place: i[lead:] for i, place in places(shape, strides)})


@settings(max_examples=150, deadline=None)
@given(layouts(least=1), st.data())
def test_reduced(layout: tuple[Index, Index], data: st.DataObject) -> None:
    shape, strides = layout
    dims = tuple(d for d in range(len(shape)) if data.draw(st.booleans()))
    domain = problem.reduced(shape, strides, dims)
    if domain is not None:
        kept = [d for d in range(len(shape)) if d not in dims]
        assert_partition(domain, {place: tuple(i[d] for d in kept) for i, place in places(shape, strides)})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 4, 6, 7])), min_size=1, max_size=3),
)
def test_is_dense_is_what_torch_says(dims: list[tuple[int, int]]) -> None:
    shape, strides = [d[0] for d in dims], [d[1] for d in dims]
    x = torch.empty(200).as_strided(shape, strides)
    assert is_dense(shape, strides) == torch.ops.aten.is_non_overlapping_and_dense(x)
    order = memory_order(shape, strides)
    assert sorted(order) == list(range(len(shape)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.booleans()), max_size=7))
def test_fit_takes_exactly_four_alternating_runs(extents: list[tuple[int, bool]]) -> None:
    kinds = [kept for size, kept in extents if size != 1]
    runs = [kept for kept, _ in itertools.groupby(kinds)]
    domain = fit(extents)
    assert (domain is not None) == (len(runs) <= (4 if runs[:1] == [True] else 3))
    if domain is not None:
        assert domain.numel == math.prod(size for size, _ in extents)
        assert domain.groups == math.prod(size for size, kept in extents if kept)


NCHW, NHWC = (3, 8, 5, 4), (160, 1, 32, 8)
CONTIGUOUS = (160, 20, 4, 1)


@pytest.mark.parametrize(
    ("found", "stats", "affine"),
    [
        (problem.layer((7, 9, 8), (72, 8, 1), 1), (63, 1, 1, 8), (1, 63, 8, 1)),
        (problem.layer((7, 9, 8), (72, 8, 1), 2), (7, 1, 1, 72), (1, 7, 72, 1)),
        (problem.layer((8,), (1,), 1), (1, 1, 1, 8), (8, 1, 1, 1)),
        (problem.layer((3, 5, 4, 8), (160, 4, 1, 20), 1), (3, 8, 20, 1), (1, 3, 8, 20)),
        (problem.group(NCHW, CONTIGUOUS, 2), (6, 1, 1, 80), (1, 3, 8, 20)),
        (problem.group(NCHW, NHWC, 2), (3, 20, 2, 4), (1, 60, 8, 1)),
        (problem.group(NCHW, NHWC, 1), (3, 1, 1, 160), (1, 60, 8, 1)),
        (problem.group(NCHW, NHWC, 8), (3, 20, 8, 1), (1, 60, 8, 1)),
        (problem.instance(NCHW, CONTIGUOUS), (24, 1, 1, 20), (1, 3, 8, 20)),
        (problem.instance(NCHW, NHWC), (3, 20, 8, 1), (1, 60, 8, 1)),
        (problem.batch(NCHW, CONTIGUOUS), (1, 3, 8, 20), (1, 3, 8, 20)),
        (problem.batch(NCHW, NHWC), (1, 60, 8, 1), (1, 60, 8, 1)),
        (problem.batch((3, 8), (8, 1)), (1, 3, 8, 1), (1, 3, 8, 1)),
        (problem.batch((1, 8, 20), (160, 20, 1)), (8, 1, 1, 20), (8, 1, 1, 20)),
    ],
)
def test_rows_of_the_design(found: Problem | None, stats: Index, affine: Index) -> None:
    assert found is not None
    assert found.stats.sizes == stats
    assert found.affine.sizes == affine


def test_what_does_not_fit_is_refused() -> None:
    positions_outside = dense_strides(NCHW, (2, 0, 3, 1))
    assert problem.group(NCHW, positions_outside, 2) is None
    assert problem.instance(NCHW, positions_outside) is None
    assert problem.batch(NCHW, positions_outside) is not None
    assert problem.batch(NCHW, (320, 20, 4, 1)) is None  # a slice
    assert problem.batch(NCHW, (0, 20, 4, 1)) is None  # expanded
    assert problem.batch((4, 2), (2, 2)) is None  # overlapping


def test_a_float_is_not_an_int() -> None:
    """The cache of problems must not answer 2.0 with what it knows of 2."""
    assert problem.group(NCHW, CONTIGUOUS, 2) is problem.group(NCHW, CONTIGUOUS, 2)
    assert problem.layer(NCHW, CONTIGUOUS, 1, eps=1) is not problem.layer(NCHW, CONTIGUOUS, 1, eps=1.0)
