// activate.h: the activations of core/act.h and their derivatives on packs. Included by norm.cpp alone.
//
// float32 and below are evaluated in float32 by polynomials good to 1-2 ulp near zero; float64 calls libm.
#pragma once

#include "../core/problem.h"
#include "exponential.h"
#include "lanes.h"
#include "sums.h"

namespace normkern::cpu::NK_ISA {
namespace {

// Phi(z), the normal distribution function, and phi(z), its density. With t = |z|/sqrt(2):
// erfc(t) = exp(-t^2) * P((t - 3)/(t + 3)) / (t + 3), P fitted to 3e-9 on [0, 10.6], beyond which exp(-t^2) is 0.
struct Normal {
  Floats distribution, density;
};

NK_INLINE Normal normal_lanes(Floats z) {
  const Floats zero = fill(0.0f), t = largest(z, zero - z) * fill(0.707106781f);
  const Floats density = exp_lanes(fill(-0.5f) * z * z), inverse = fill(1.0f) / (t + fill(3.0f));
  const Floats s = fma(fill(-6.0f), inverse, fill(1.0f));
  const Floats p =
      polynomial<10>(s, {1.0740069150924683f, -0.8833944797515869f, 0.590228259563446f, -0.31046587228775024f,
                         0.11952950060367584f, -0.02684074454009533f, -0.0012289189035072923f, 0.003081245580688119f,
                         -0.0004785163328051567f, -0.000322898558806628f});
  const Floats tail = fill(0.5f) * density * p * inverse;
  return {where_less(z, zero, tail, fill(1.0f) - tail), density * fill(0.398942280f)};
}

__attribute__((noinline)) Floats activate(Act act, Floats z) {
  const Floats zero = fill(0.0f);
  switch (act) {
    case Act::none: return z;
    case Act::relu: return where_less(z, zero, zero, z);
    case Act::silu: return z / (fill(1.0f) + exp_lanes(zero - z));
    case Act::gelu: return z * normal_lanes(z).distribution;
    case Act::leaky_relu: return where_less(z, zero, z * fill(0.01f), z);
  }
  return z;
}

__attribute__((noinline)) Floats activate_slope(Act act, Floats z) {
  const Floats zero = fill(0.0f), one = fill(1.0f);
  switch (act) {
    case Act::none: return one;
    case Act::relu: return where_at_most(z, zero, zero, one);
    case Act::silu: {
      const Floats s = one / (one + exp_lanes(zero - z));
      return s * fma(z, one - s, one);
    }
    case Act::gelu: {
      const Normal n = normal_lanes(z);
      return fma(z, n.density, n.distribution);
    }
    case Act::leaky_relu: return where_at_most(z, zero, fill(0.01f), one);
  }
  return one;
}

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;

__attribute__((noinline)) Doubles activate(Act act, Doubles z) {
  double v[kLanes];
  store(v, z);
  for (double& e : v) switch (act) {
      case Act::none: break;
      case Act::relu: e = e < 0 ? 0 : e; break;
      case Act::silu: e = e / (1 + __builtin_exp(-e)); break;
      case Act::gelu: e = 0.5 * e * __builtin_erfc(-e * kSqrtHalf); break;
      case Act::leaky_relu: e = e < 0 ? 0.01 * e : e; break;
    }
  return load<double>(static_cast<const double*>(v));
}

__attribute__((noinline)) Doubles activate_slope(Act act, Doubles z) {
  double v[kLanes];
  store(v, z);
  for (double& e : v) switch (act) {
      case Act::none: e = 1; break;
      case Act::relu: e = e <= 0 ? 0 : 1; break;
      case Act::silu: {
        const double s = 1 / (1 + __builtin_exp(-e));
        e = s * (1 + e * (1 - s));
        break;
      }
      case Act::gelu: e = 0.5 * __builtin_erfc(-e * kSqrtHalf) + e * kInvSqrt2Pi * __builtin_exp(-0.5 * e * e); break;
      case Act::leaky_relu: e = e <= 0 ? 0.01 : 1; break;
    }
  return load<double>(static_cast<const double*>(v));
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
