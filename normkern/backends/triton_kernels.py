"""triton_kernels.py: the programs as Triton kernels: fused; reduce, finish and prepare; map.

A kernel sees the buffer as lines of `width = units * ALIGN` elements and works on tiles [R, C] of them. ALIGN tells the
compiler that lines begin on whole vectors. A domain (block, cols, keep) finds the group of an element as that of its
line's first element plus that of its column, which triton_plan.py makes sure of. Moments are float64 once they leave
the lanes; a mean is two numbers of the compute type A, so that (x - high) - low loses nothing. What belongs to lines or
columns alone is a vector, [R] or [C], until it meets the tile: as a tile each thread would hold it many times over.
"""

import triton
import triton.language as tl

from normkern.backends.triton_activation import activate, through_activation
from normkern.backends.triton_tiles import (
    add_up,
    column_group,
    gather,
    inverse_std,
    line_group,
    load_sum,
    narrow,
    spread,
    two_parts,
    width_of,
)

GROUP = tl.constexpr(1)
LINE = tl.constexpr(2)
COLUMN = tl.constexpr(3)


@triton.jit
def lines_of_tile(tile, groups, rows, keep, WHOLE: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    """The lines of a fused tile, whether they are there, their group ([R], or a number where they share one), and the
    first line."""
    if WIDE:
        tile = tl.cast(tile, tl.int64)  # a plain number where the interpreter runs a loop
    r = tl.arange(0, R)
    if WHOLE:
        first = tile * R
        line = first + r
        line_in = line < groups
        group = line
    else:
        first = tile // keep * rows * keep + tile % keep
        line = first + r * keep
        line_in = r < rows
        group = tile
    return line, line_in, group, first


@triton.jit(do_not_specialize=["groups", "rows", "keep", "units", "a_block", "a_cols", "a_keep"])
def fused_forward(
    x, add, y, total, weight, bias, residual, mean_out, var_out,
    groups, rows, keep, units, a_block, a_cols, a_keep,
    EPS: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr,
    WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    A_LINE: tl.constexpr, A_COLUMN: tl.constexpr,
):  # fmt: skip
    width = width_of(units, ALIGN, WIDE)
    line, line_in, group, first = lines_of_tile(tl.program_id(0), groups, rows, keep, WHOLE, R, WIDE)
    col = tl.arange(0, C)
    col_in = col < width
    inside = line_in[:, None] & col_in[None, :]
    begin = line.to(tl.int64) * width
    at = begin[:, None] + col[None, :]
    v = load_sum(x, add, at, inside, A)
    if total is not None:
        tl.store(total + at, narrow(v, total), mask=inside)
    n = width.to(tl.float64)
    if not WHOLE:
        n = n * rows.to(tl.float64)

    if SECOND:
        var = add_up(v * v, WHOLE).to(tl.float64) / n
        xhat = v * spread(inverse_std(var, EPS, A), WHOLE)
    else:
        # Any value of the group will do to keep a large mean out of the sums.
        start = (line if WHOLE else first).to(tl.int64) * width
        shift = load_sum(x, add, start, group < groups, A)
        d = tl.where(inside, v - spread(shift, WHOLE), 0.0)
        mean = shift.to(tl.float64) + add_up(d, WHOLE).to(tl.float64) / n
        # Once more around a mean that is nearly right: exact sums for its last digits and for the variance.
        high, low = two_parts(mean, A)
        d = tl.where(inside, (v - spread(high, WHOLE)) - spread(low, WHOLE), 0.0)
        off = add_up(d, WHOLE).to(tl.float64) / n
        var = add_up(d * d, WHOLE).to(tl.float64) / n - off * off
        var = tl.where(var < 0, 0.0, var)
        mean += off
        high, low = two_parts(mean, A)
        xhat = ((v - spread(high, WHOLE)) - spread(low, WHOLE)) * spread(inverse_std(var, EPS, A), WHOLE)

    group_in = group < groups
    if mean_out is not None:
        tl.store(mean_out + group, mean, mask=group_in)
    if var_out is not None:
        tl.store(var_out + group, var, mask=group_in)
    if y is not None:
        a_line = line_group(line, first, width, a_block, a_cols, a_keep, A_LINE)
        a_col = column_group(col, a_block, a_cols, a_keep, A_COLUMN)
        z = xhat
        if weight is not None:
            z = z * gather(weight, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
        if bias is not None:
            z = z + gather(bias, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
        if residual is not None:
            z = z + tl.load(residual + at, mask=inside, other=0).to(A)
        tl.store(y + at, narrow(activate(z, ACT), y), mask=inside)


@triton.jit(do_not_specialize=["groups", "tiles", "rows", "keep", "units", "a_block", "a_cols", "a_keep"])
def fused_backward(
    dy, x, dtotal, weight, bias, residual, mean, var, dx, dresidual, dweight, dbias,
    groups, tiles, rows, keep, units, a_block, a_cols, a_keep,
    EPS: tl.constexpr, SECOND: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, GRADIENTS: tl.constexpr,
    WHOLE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    A_LINE: tl.constexpr, A_COLUMN: tl.constexpr,
):  # fmt: skip
    # dweight and dbias are the gradients themselves (GROUP), or float64 partial results.
    width = width_of(units, ALIGN, WIDE)
    col = tl.arange(0, C)
    col_in = col < width
    a_col = column_group(col, a_block, a_cols, a_keep, A_COLUMN)
    n = width.to(tl.float64)
    if not WHOLE:
        n = n * rows.to(tl.float64)
    # The same for all tiles of a program: read once, whatever it stores in between.
    if A_LINE == 0:
        if weight is not None:
            w = gather(weight, 0, a_col, True, col_in, A_LINE, A_COLUMN, A)
        if bias is not None and ACT != 0:
            b = gather(bias, 0, a_col, True, col_in, A_LINE, A_COLUMN, A)
    if GRADIENTS == COLUMN:
        dweight_sum = tl.zeros([R, C], A)
        dbias_sum = tl.zeros([R, C], A)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        line, line_in, group, first = lines_of_tile(tile, groups, rows, keep, WHOLE, R, WIDE)
        inside = line_in[:, None] & col_in[None, :]
        at = (line.to(tl.int64) * width)[:, None] + col[None, :]
        xhat = tl.load(x + at, mask=inside, other=0).to(A)
        dz = tl.load(dy + at, mask=inside, other=0).to(A)
        group_in = group < groups
        rstd = inverse_std(tl.load(var + group, mask=group_in, other=1).to(tl.float64), EPS, A)
        if SECOND:
            xhat = xhat * spread(rstd, WHOLE)
        else:
            high, low = two_parts(tl.load(mean + group, mask=group_in, other=0).to(tl.float64), A)
            xhat = ((xhat - spread(high, WHOLE)) - spread(low, WHOLE)) * spread(rstd, WHOLE)
        xhat = tl.where(inside, xhat, 0.0)

        a_line = line_group(line, first, width, a_block, a_cols, a_keep, A_LINE)
        if A_LINE > 0:
            if weight is not None:
                w = gather(weight, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
            if bias is not None and ACT != 0:
                b = gather(bias, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
        if ACT != 0:
            z = xhat
            if weight is not None:
                z = z * w
            if bias is not None:
                z = z + b
            if residual is not None:
                z = z + tl.load(residual + at, mask=inside, other=0).to(A)
            dz = through_activation(dz, z, ACT)
        if dresidual is not None:
            tl.store(dresidual + at, narrow(dz, dresidual), mask=inside)

        if GRADIENTS == GROUP:
            if dweight is not None:
                product = add_up(dz * xhat, WHOLE)
                tl.store(dweight + group, narrow(product, dweight), mask=group_in)
            if dbias is not None:
                tl.store(dbias + group, narrow(add_up(dz, WHOLE), dbias), mask=group_in)
        elif GRADIENTS == LINE:
            if dweight is not None:
                tl.store(dweight + line, tl.sum(dz * xhat, 1).to(tl.float64), mask=line_in)
            if dbias is not None:
                tl.store(dbias + line, tl.sum(dz, 1).to(tl.float64), mask=line_in)
        elif GRADIENTS == COLUMN:
            if dweight is not None:
                dweight_sum += dz * xhat
            if dbias is not None:
                dbias_sum += dz

        if dx is not None:
            g = dz
            if weight is not None:
                g = g * w
            slope = (add_up(g * xhat, WHOLE).to(tl.float64) / n).to(A)
            if not SECOND:
                g = g - spread((add_up(g, WHOLE).to(tl.float64) / n).to(A), WHOLE)
            g = (g - xhat * spread(slope, WHOLE)) * spread(rstd, WHOLE)
            if dtotal is not None:
                g = g + tl.load(dtotal + at, mask=inside, other=0).to(A)
            tl.store(dx + at, narrow(g, dx), mask=inside)

    if GRADIENTS == COLUMN:
        out = tl.program_id(0).to(tl.int64) * width + col
        if dweight is not None:
            tl.store(dweight + out, tl.sum(dweight_sum.to(tl.float64), 0), mask=col_in)
        if dbias is not None:
            tl.store(dbias + out, tl.sum(dbias_sum.to(tl.float64), 0), mask=col_in)


# ---- split: reduce, finish, prepare


@triton.jit
def place(across, parts, rows, keep, width, C: tl.constexpr, WIDE: tl.constexpr):
    """Of a program: its strip (group and part), its part, its first line and its first column."""
    pid = tl.program_id(0)
    strip = pid // across
    column = (pid % across) * C
    if WIDE:
        strip = strip.to(tl.int64)
        column = (pid % across).to(tl.int64) * C
    group = strip // parts
    return strip, strip % parts, group // keep * rows * keep + group % keep, column


@triton.jit
def sum_lanes(v, BY_COLUMN: tl.constexpr):
    """[C] sums of each column, or the sum of the tile."""
    total = tl.sum(v, 0)
    if not BY_COLUMN:
        total = tl.sum(total, 0)
    return total


@triton.jit
def store_partial(p, value, strip, column, col, width, BY_COLUMN: tl.constexpr):
    if BY_COLUMN:
        at = column + col
        tl.store(p + strip.to(tl.int64) * width + at, value, mask=at < width)
    else:
        tl.store(p + strip, value)


@triton.jit(do_not_specialize=["rows", "keep", "units", "across", "parts", "steps", "all_steps", "column_tiles"])
def reduce_moments(
    x, add, total, count_out, mean_out, m2_out,
    rows, keep, units, across, parts, steps, all_steps, column_tiles,
    SECOND: tl.constexpr, A: tl.constexpr, BY_COLUMN: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    width = width_of(units, ALIGN, WIDE)
    strip, part, top, column = place(across, parts, rows, keep, width, C, WIDE)
    r = tl.arange(0, R)
    col = tl.arange(0, C)
    # Every lane is relative to the first value it meets, so that a large mean costs no digits.
    count = tl.zeros([R, C], A)
    shift = tl.zeros([R, C], A)
    mean = tl.zeros([R, C], A)
    m2 = tl.zeros([R, C], A)
    for step in range(part * steps, tl.minimum((part + 1) * steps, all_steps)):
        row = step // column_tiles * R + r
        at = column + step % column_tiles * C + col
        inside = (row < rows)[:, None] & (at < width)[None, :]
        e = ((top + row * keep).to(tl.int64) * width)[:, None] + at[None, :]
        v = load_sum(x, add, e, inside, A)
        if total is not None:
            tl.store(total + e, narrow(v, total), mask=inside)
        if SECOND:
            m2 += v * v
        else:
            shift = tl.where(count == 0, v, shift)
            count += tl.where(inside, 1.0, 0.0)
            delta = (v - shift) - mean
            mean += tl.where(inside, delta / tl.maximum(count, 1.0), 0.0)
            m2 += tl.where(inside, delta * ((v - shift) - mean), 0.0)

    if SECOND:
        store_partial(m2_out, sum_lanes(m2.to(tl.float64), BY_COLUMN), strip, column, col, width, BY_COLUMN)
    else:
        n = sum_lanes(count.to(tl.float64), BY_COLUMN)
        lane = shift.to(tl.float64) + mean.to(tl.float64)
        # Sums are around the first lane's mean: exact where all values are equal.
        first = (r == 0)[:, None] & ((col == 0)[None, :] | BY_COLUMN)
        origin = sum_lanes(tl.where(first, lane, 0.0), BY_COLUMN)
        away = tl.where(count > 0, lane - origin, 0.0)  # [C] or a number: both meet columns
        off = sum_lanes(count.to(tl.float64) * away, BY_COLUMN) / tl.maximum(n, 1.0)
        squares = m2.to(tl.float64) + count.to(tl.float64) * (away - off) * (away - off)
        store_partial(count_out, n, strip, column, col, width, BY_COLUMN)
        store_partial(mean_out, origin + off, strip, column, col, width, BY_COLUMN)
        store_partial(m2_out, sum_lanes(squares, BY_COLUMN), strip, column, col, width, BY_COLUMN)


@triton.jit(do_not_specialize=[
    "rows", "keep", "units", "across", "parts", "steps", "all_steps", "column_tiles",
    "s_block", "s_cols", "s_keep", "a_block", "a_cols", "a_keep",
])  # fmt: skip
def reduce_gradients(
    dy, x, weight, bias, residual, high, low, rstd, first_out, second_out,
    rows, keep, units, across, parts, steps, all_steps, column_tiles,
    s_block, s_cols, s_keep, a_block, a_cols, a_keep,
    WEIGHTED: tl.constexpr, ACT: tl.constexpr, A: tl.constexpr, BY_COLUMN: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    S_LINE: tl.constexpr, S_COLUMN: tl.constexpr, A_LINE: tl.constexpr, A_COLUMN: tl.constexpr,
):  # fmt: skip
    # Sums of g and g*xhat (WEIGHTED: g = dz*weight) or of dz and dz*xhat.
    width = width_of(units, ALIGN, WIDE)
    strip, part, top, column = place(across, parts, rows, keep, width, C, WIDE)
    r = tl.arange(0, R)
    col = tl.arange(0, C)
    g_sum = tl.zeros([R, C], A)
    gx_sum = tl.zeros([R, C], A)
    for step in range(part * steps, tl.minimum((part + 1) * steps, all_steps)):
        if BY_COLUMN:  # what depends on columns alone stays the same for all steps
            row = step * R
            at = column + col
        else:
            row = step // column_tiles * R
            at = column + step % column_tiles * C + col
        line_in = row + r < rows
        col_in = at < width
        inside = line_in[:, None] & col_in[None, :]
        first = top + row * keep
        line = first + r * keep
        e = (line.to(tl.int64) * width)[:, None] + at[None, :]
        g = tl.load(dy + e, mask=inside, other=0).to(A)
        xhat = tl.load(x + e, mask=inside, other=0).to(A)
        s_line = line_group(line, top if S_LINE == 3 else first, width, s_block, s_cols, s_keep, S_LINE)
        s_col = column_group(at, s_block, s_cols, s_keep, S_COLUMN)
        if high is not None:
            xhat = xhat - gather(high, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
            xhat = xhat - gather(low, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
        xhat = xhat * gather(rstd, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
        a_line = line_group(line, top if A_LINE == 3 else first, width, a_block, a_cols, a_keep, A_LINE)
        a_col = column_group(at, a_block, a_cols, a_keep, A_COLUMN)
        if ACT != 0:
            z = xhat
            if weight is not None:
                z = z * gather(weight, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
            if bias is not None:
                z = z + gather(bias, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
            if residual is not None:
                z = z + tl.load(residual + e, mask=inside, other=0).to(A)
            g = through_activation(g, z, ACT)
        if WEIGHTED and weight is not None:
            g = g * gather(weight, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
        g_sum += tl.where(inside, g, 0.0)
        gx_sum += tl.where(inside, g * xhat, 0.0)
    store_partial(first_out, sum_lanes(g_sum.to(tl.float64), BY_COLUMN), strip, column, col, width, BY_COLUMN)
    store_partial(second_out, sum_lanes(gx_sum.to(tl.float64), BY_COLUMN), strip, column, col, width, BY_COLUMN)


@triton.jit(do_not_specialize=["groups", "parts", "keep", "cols", "count"])
def finish_moments(
    counts, means, m2s, mean_out, var_out, high_out, low_out, rstd_out,
    groups, parts, keep, cols, count,
    EPS: tl.constexpr, SECOND: tl.constexpr, A: tl.constexpr, J: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    # Partial results lie as [batch, parts, keep, cols], in float64.
    group = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    group_in = group < groups
    top = group // keep * (parts * keep * cols) + group % keep * cols
    share = 1.0 / count.to(tl.float64)
    m2 = tl.zeros([J, G], tl.float64)
    off = tl.zeros([J, G], tl.float64)
    if not SECOND:
        origin = tl.load(means + top, mask=group_in, other=0)
    for begin in range(0, parts * cols, J):
        j = begin + tl.arange(0, J)
        inside = (j < parts * cols)[:, None] & group_in[None, :]
        at = top[None, :] + (j // cols * (keep * cols) + j % cols)[:, None]
        m2 += tl.load(m2s + at, mask=inside, other=0)
        if not SECOND:
            n = tl.load(counts + at, mask=inside, other=0)
            away = tl.where(inside, tl.load(means + at, mask=inside, other=0) - origin[None, :], 0.0)
            off += n * away
            m2 += n * away * away
    var = tl.sum(m2, 0) * share
    if not SECOND:
        shift = tl.sum(off, 0) * share
        var = var - shift * shift
        var = tl.where(var < 0, 0.0, var)
        mean = origin + shift
        if mean_out is not None:
            tl.store(mean_out + group, mean, mask=group_in)
        if high_out is not None:
            high, low = two_parts(mean, A)
            tl.store(high_out + group, high, mask=group_in)
            tl.store(low_out + group, low, mask=group_in)
    if var_out is not None:
        tl.store(var_out + group, var, mask=group_in)
    if rstd_out is not None:
        tl.store(rstd_out + group, inverse_std(var, EPS, A), mask=group_in)


@triton.jit(do_not_specialize=["groups", "parts", "keep", "cols", "count"])
def finish_gradients(
    firsts, seconds, weight, dweight, dbias, average_g, average_gx,
    groups, parts, keep, cols, count,
    J: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    # Affine sums become dweight and dbias; with `weight` they are averages of g as well.
    group = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    group_in = group < groups
    top = group // keep * (parts * keep * cols) + group % keep * cols
    first = tl.zeros([J, G], tl.float64)
    second = tl.zeros([J, G], tl.float64)
    for begin in range(0, parts * cols, J):
        j = begin + tl.arange(0, J)
        inside = (j < parts * cols)[:, None] & group_in[None, :]
        at = top[None, :] + (j // cols * (keep * cols) + j % cols)[:, None]
        if firsts is not None:
            first += tl.load(firsts + at, mask=inside, other=0)
        if seconds is not None:
            second += tl.load(seconds + at, mask=inside, other=0)
    dz = tl.sum(first, 0)
    product = tl.sum(second, 0)
    if dweight is not None:
        tl.store(dweight + group, narrow(product, dweight), mask=group_in)
    if dbias is not None:
        tl.store(dbias + group, narrow(dz, dbias), mask=group_in)
    if average_gx is not None:
        n = count.to(tl.float64)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + group, mask=group_in, other=0).to(tl.float64)
        tl.store(average_gx + group, narrow(product * w / n, average_gx), mask=group_in)
        if average_g is not None:
            tl.store(average_g + group, narrow(dz * w / n, average_g), mask=group_in)


@triton.jit(do_not_specialize=["groups"])
def prepare(mean, var, high_out, low_out, rstd_out, groups, EPS: tl.constexpr, A: tl.constexpr, G: tl.constexpr):
    """What the split programs read of the moments, once for each group."""
    group = tl.program_id(0) * G + tl.arange(0, G)
    inside = group < groups
    if mean is not None:
        high, low = two_parts(tl.load(mean + group, mask=inside, other=0).to(tl.float64), A)
        tl.store(high_out + group, high, mask=inside)
        tl.store(low_out + group, low, mask=inside)
    var = tl.load(var + group, mask=inside, other=1).to(tl.float64)
    tl.store(rstd_out + group, inverse_std(var, EPS, A), mask=inside)


# ---- map


@triton.jit
def map_place(lines, units, column_tiles, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """The lines and columns of a program and its first line. From the end to the start: a reduction before it read the
    buffer the other way, and what it read last is in the cache."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    first = pid // column_tiles * R
    line = first + tl.arange(0, R)
    col = pid % column_tiles * C + tl.arange(0, C)
    return line, first, col, line < lines, col < width_of(units, ALIGN, WIDE)


@triton.jit(do_not_specialize=[
    "lines", "units", "column_tiles", "s_block", "s_cols", "s_keep", "a_block", "a_cols", "a_keep",
])  # fmt: skip
def map_forward(
    x, y, weight, bias, residual, high, low, rstd,
    lines, units, column_tiles, s_block, s_cols, s_keep, a_block, a_cols, a_keep,
    ACT: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    S_LINE: tl.constexpr, S_COLUMN: tl.constexpr, A_LINE: tl.constexpr, A_COLUMN: tl.constexpr,
):  # fmt: skip
    width = width_of(units, ALIGN, WIDE)
    line, first, col, line_in, col_in = map_place(lines, units, column_tiles, R, C, ALIGN, WIDE)
    inside = line_in[:, None] & col_in[None, :]
    e = (line.to(tl.int64) * width)[:, None] + col[None, :]
    z = tl.load(x + e, mask=inside, other=0).to(A)
    s_line = line_group(line, first, width, s_block, s_cols, s_keep, S_LINE)
    s_col = column_group(col, s_block, s_cols, s_keep, S_COLUMN)
    if high is not None:
        z = z - gather(high, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
        z = z - gather(low, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
    z = z * gather(rstd, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
    a_line = line_group(line, first, width, a_block, a_cols, a_keep, A_LINE)
    a_col = column_group(col, a_block, a_cols, a_keep, A_COLUMN)
    if weight is not None:
        z = z * gather(weight, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
    if bias is not None:
        z = z + gather(bias, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
    if residual is not None:
        z = z + tl.load(residual + e, mask=inside, other=0).to(A)
    tl.store(y + e, narrow(activate(z, ACT), y), mask=inside)


@triton.jit(do_not_specialize=[
    "lines", "units", "column_tiles", "s_block", "s_cols", "s_keep", "a_block", "a_cols", "a_keep",
])  # fmt: skip
def map_backward(
    dy, x, dtotal, weight, bias, residual, high, low, rstd, average_g, average_gx, dx, dresidual,
    lines, units, column_tiles, s_block, s_cols, s_keep, a_block, a_cols, a_keep,
    ACT: tl.constexpr, A: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    S_LINE: tl.constexpr, S_COLUMN: tl.constexpr, A_LINE: tl.constexpr, A_COLUMN: tl.constexpr,
):  # fmt: skip
    # x is None where nothing depends on it: moments given, and no activation.
    width = width_of(units, ALIGN, WIDE)
    line, first, col, line_in, col_in = map_place(lines, units, column_tiles, R, C, ALIGN, WIDE)
    inside = line_in[:, None] & col_in[None, :]
    e = (line.to(tl.int64) * width)[:, None] + col[None, :]
    g = tl.load(dy + e, mask=inside, other=0).to(A)
    s_line = line_group(line, first, width, s_block, s_cols, s_keep, S_LINE)
    s_col = column_group(col, s_block, s_cols, s_keep, S_COLUMN)
    a_line = line_group(line, first, width, a_block, a_cols, a_keep, A_LINE)
    a_col = column_group(col, a_block, a_cols, a_keep, A_COLUMN)
    scale = gather(rstd, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
    if weight is not None:
        w = gather(weight, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
    if x is not None:
        xhat = tl.load(x + e, mask=inside, other=0).to(A)
        if high is not None:
            xhat = xhat - gather(high, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
            xhat = xhat - gather(low, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
        xhat = xhat * scale
        if ACT != 0:
            z = xhat
            if weight is not None:
                z = z * w
            if bias is not None:
                z = z + gather(bias, a_line, a_col, line_in, col_in, A_LINE, A_COLUMN, A)
            if residual is not None:
                z = z + tl.load(residual + e, mask=inside, other=0).to(A)
            g = through_activation(g, z, ACT)
    if dresidual is not None:
        tl.store(dresidual + e, narrow(g, dresidual), mask=inside)
    if dx is not None:
        if weight is not None:
            g = g * w
        if average_g is not None:
            g = g - gather(average_g, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
        if average_gx is not None:
            g = g - xhat * gather(average_gx, s_line, s_col, line_in, col_in, S_LINE, S_COLUMN, A)
        g = g * scale
        if dtotal is not None:
            g = g + tl.load(dtotal + e, mask=inside, other=0).to(A)
        tl.store(dx + e, narrow(g, dx), mask=inside)
