"""triton_spectral_kernels.py: lags of kernels, and the product of spectra with V, as Triton kernels.

The formulas and the order of the lags are those of csrc/core/spectrum.h. A program of `multiply` has some frequencies
of one channel: it sums S from the lags in float64 and applies V to every map of the batch.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["depth", "rows", "cols"])
def sum_lags(weight, lags, depth, rows, cols, J: tl.constexpr):
    """A program has one lag of one channel of weight [channels, depth, rows, cols]."""
    wide = 2 * cols - 1
    count = cols + (rows - 1) * wide
    program = tl.program_id(0)
    channel, lag = (program // count).to(tl.int64), program % count
    below = lag >= cols
    d1 = tl.where(below, (lag - cols) // wide + 1, 0)
    d2 = tl.where(below, (lag - cols) % wide + 1 - cols, lag)
    taps = rows * cols
    base = weight + channel * depth * taps
    total = tl.zeros([J], tl.float64)
    for start in range(0, depth, J):
        j = start + tl.arange(0, J)
        for p1 in range(0, rows - d1):
            for p2 in range(tl.maximum(-d2, 0), tl.minimum(cols, cols - d2)):
                at = base + j.to(tl.int64) * taps + p1 * cols + p2
                a = tl.load(at, j < depth, 0.0).to(tl.float64)
                b = tl.load(at + d1 * cols + d2, j < depth, 0.0).to(tl.float64)
                total += a * b
    tl.store(lags + channel * count + lag, tl.sum(total, 0))


@triton.jit
def inverse_root(lags, waves, f1, f2, rows, cols, kh, kw, down, right, EPS: tl.constexpr):
    """V at the frequencies (f1, f2) from the lags of one channel, float64; `waves` are cos and sin of the rows' points,
    then of the columns'."""
    step1, step2 = down * f1 % rows, right * f2 % cols
    far_left = (cols - (kw - 1) * step2 % cols) % cols
    col_waves = waves + 2 * rows
    r0 = tl.load(lags)
    power = f1 * 0.0 - r0
    p1 = f1 * 0
    lag = lags
    for d1 in range(0, kh):
        cosine, sine = power * 0, power * 0
        p2 = tl.where(d1 == 0, 0, far_left)
        for _ in range(tl.where(d1 == 0, 0, 1 - kw), kw):
            r = tl.load(lag)
            cosine += r * tl.load(col_waves + p2)
            sine += r * tl.load(col_waves + cols + p2)
            p2 += step2
            p2 = tl.where(p2 >= cols, p2 - cols, p2)
            lag += 1
        power += 2 * (cosine * tl.load(waves + p1) - sine * tl.load(waves + rows + p1))
        p1 += step1
        p1 = tl.where(p1 >= rows, p1 - rows, p1)
    power = tl.where(power < EPS * r0, EPS * r0, power)
    v = 1.0 / tl.sqrt(power)
    if EPS > 0:
        v = tl.where(r0 == 0, 0.0, v)
    return v


@triton.jit(do_not_specialize=["batch", "channels", "rows", "cols", "kh", "kw", "down", "right"])
def multiply(
    x, y, lags, waves, batch, channels, rows, cols, kh, kw, down, right, EPS: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """y = x V over [batch, channels, rows, cols/2 + 1] complex numbers; without x, y is V itself."""
    half = cols // 2 + 1
    frequencies = rows * half
    tiles = (frequencies + F - 1) // F
    program = tl.program_id(0)
    channel, tile = (program // tiles).to(tl.int64), program % tiles
    f = tile * F + tl.arange(0, F)
    inside = f < frequencies
    f = tl.where(inside, f, 0)
    count = kw + (kh - 1) * (2 * kw - 1)
    v = inverse_root(
        lags + channel * count, waves, f // half, f % half, rows, cols, kh, kw, down, right, EPS
    )  # fmt: skip
    v = v.to(y.dtype.element_ty)
    if x is None:
        tl.store(y + channel * frequencies + f, v, inside)
    else:
        for n in range(0, batch):
            at = ((n * channels + channel) * frequencies + f) * 2
            tl.store(y + at, tl.load(x + at, inside, 0.0) * v, inside)
            tl.store(y + at + 1, tl.load(x + at + 1, inside, 0.0) * v, inside)
