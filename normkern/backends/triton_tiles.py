"""triton_tiles.py: tiles as the kernels use them: numbers in and out of memory, sums, and the groups of elements."""

import triton
import triton.language as tl


@triton.jit
def two_parts(mean, A: tl.constexpr):
    """A float64 mean as high + low of type A; an infinite mean has no low part."""
    high = mean.to(A)
    rest = mean - high.to(tl.float64)
    return high, tl.where(rest == rest, rest, 0.0).to(A)


@triton.jit
def inverse_std(var, EPS: tl.constexpr, A: tl.constexpr):
    return (1.0 / tl.sqrt(var + EPS)).to(A)


@triton.jit
def width_of(units, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        units = units.to(tl.int64)
    return units * ALIGN


@triton.jit
def narrow(v, p):
    """v as an element of p. From float64 by way of float32: not every compiler has float64 to bfloat16."""
    if p.dtype.element_ty != tl.float64:
        v = v.to(tl.float32)
    return v.to(p.dtype.element_ty)


@triton.jit
def load_sum(x, add, at, inside, A: tl.constexpr):
    """x, or with `add` the sum of both as an element of x, at some places."""
    v = tl.load(x + at, mask=inside, other=0).to(A)
    if add is not None:
        v = narrow(v + tl.load(add + at, mask=inside, other=0).to(A), x).to(A)
    return v


@triton.jit
def add_up(v, WHOLE: tl.constexpr):
    """[R] sums of each line, or the sum of the tile."""
    total = tl.sum(v, 1)
    if not WHOLE:
        total = tl.sum(total, 0)
    return total


@triton.jit
def spread(v, WHOLE: tl.constexpr):
    """What add_up gave, to meet the tile."""
    if WHOLE:
        v = v[:, None]
    return v


@triton.jit
def line_group(line, first, width, block, cols, keep, BY_LINE: tl.constexpr):
    """Of each line, or of the first one if they share it."""
    if BY_LINE > 0:
        e = (line if BY_LINE == 1 else first) * width
        group = e // block * keep + e // cols % keep
    else:
        group = first * 0
    return group


@triton.jit
def column_group(col, block, cols, keep, BY_COLUMN: tl.constexpr):
    if BY_COLUMN == 3:
        group = col // block * keep + col // cols % keep
    elif BY_COLUMN == 2:
        group = col // cols
    else:
        group = col
    return group


@triton.jit
def gather(p, line, col, line_in, col_in, BY_LINE: tl.constexpr, BY_COLUMN: tl.constexpr, A: tl.constexpr):
    """The elements of p that belong to a tile, of shape [R, C], [R, 1], [1, C] or none; line and col are vectors."""
    if BY_LINE == 1 and BY_COLUMN > 0:
        value = tl.load(p + (line[:, None] + col[None, :]), mask=line_in[:, None] & col_in[None, :], other=0).to(A)
    elif BY_LINE == 1:
        value = tl.load(p + line, mask=line_in, other=0).to(A)[:, None]
    elif BY_COLUMN > 0:
        value = tl.load(p + (line + col), mask=col_in, other=0).to(A)[None, :]
    else:
        value = tl.load(p + line).to(A)
    return value
