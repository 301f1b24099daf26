// act.h: the activations that can follow a norm, and their derivatives, at the value z that enters them.
#pragma once

#include <math.h>

#include "problem.h"

namespace normkern {

constexpr double kLeakySlope = 0.01;  // torch.nn.functional.leaky_relu's default

// NaN stays NaN in every branch, as in torch: comparisons are written so that they fail on NaN.
template <class A>
constexpr A activate(Act act, A z) {
  switch (act) {
    case Act::none: return z;
    case Act::relu: return z < A(0) ? A(0) : z;
    case Act::silu: return z / (A(1) + exp(-z));
    case Act::gelu: return A(0.5) * z * (A(1) + erf(z * A(0.70710678118654752440)));
    case Act::leaky_relu: return z < A(0) ? z * A(kLeakySlope) : z;
  }
  return z;
}

template <class A>
constexpr A activate_slope(Act act, A z) {
  switch (act) {
    case Act::none: return A(1);
    case Act::relu: return z <= A(0) ? A(0) : A(1);
    case Act::silu: {
      const A s = A(1) / (A(1) + exp(-z));
      return s * (A(1) + z * (A(1) - s));
    }
    case Act::gelu:
      return A(0.5) * (A(1) + erf(z * A(0.70710678118654752440))) +
             z * A(0.39894228040143267794) * exp(A(-0.5) * z * z);
    case Act::leaky_relu: return z <= A(0) ? A(kLeakySlope) : A(1);
  }
  return A(1);
}

}  // namespace normkern
