"""triton_activation.py: the activations and their derivatives, for the Triton kernels."""

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)  # torch.nn.functional.leaky_relu's default
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)
LEAKY_RELU = tl.constexpr(4)


@triton.jit
def activate(z, ACT: tl.constexpr):
    # Comparisons fail on NaN, which so stays NaN, as in torch.
    if ACT == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif ACT == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACT == GELU:
        z = 0.5 * z * (1 + tl.erf(z * 0.70710678118654752440))
    elif ACT == LEAKY_RELU:
        z = tl.where(z < 0, z * LEAKY_SLOPE, z)
    return z


@triton.jit
def through_activation(dy, z, ACT: tl.constexpr):
    if ACT == RELU:
        dy = tl.where(z <= 0, dy * 0.0, dy)
    elif ACT == SILU:
        s = 1 / (1 + tl.exp(-z))
        dy = dy * (s * (1 + z * (1 - s)))
    elif ACT == GELU:
        cdf = 0.5 * (1 + tl.erf(z * 0.70710678118654752440))
        dy = dy * (cdf + z * 0.39894228040143267794 * tl.exp(-0.5 * z * z))
    elif ACT == LEAKY_RELU:
        dy = tl.where(z <= 0, dy * LEAKY_SLOPE, dy)
    return dy
