// exponential.h: polynomials and e^x on packs. Included by the files that are compiled once per instruction set.
#pragma once

#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

// The sum of c[i] * x^i in pairs (Estrin): a chain half as long as Horner's, and it is latency that packs wait for.
template <int kTerms>
struct Coefficients {
  float c[kTerms];
};

template <int kTerms>
NK_INLINE Pack<float> polynomial(Pack<float> x, Coefficients<kTerms> of) {
  Pack<float> v[kTerms];
  int n = 0;
#pragma GCC unroll 16
  for (int i = 0; i < kTerms; i += 2)
    v[n++] = i + 1 < kTerms ? fma(fill(of.c[i + 1]), x, fill(of.c[i])) : fill(of.c[i]);
#pragma GCC unroll 16
  while (n > 1) {
    x = x * x;
    int half = 0;
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2) v[half++] = i + 1 < n ? fma(v[i + 1], x, v[i]) : v[i];
    n = half;
  }
  return v[0];
}

// e^x: x = n*ln2 + r with |r| <= ln2/2, the Taylor polynomial of e^r (truncated below 6e-9), and 2^n in two factors,
// so that results reach from the smallest subnormal to infinity.
NK_INLINE Pack<float> exp_lanes(Pack<float> x) {
  x = largest(fill(-104.0f), smallest(fill(89.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  const Pack<float> shifted = fma(x, fill(1.44269504f), fill(12582912.0f)), n = shifted - fill(12582912.0f);
  const Pack<float> r = fma(n, fill(-1.42860682e-6f), fma(n, fill(-0.693145751953125f), x));
  const Pack<float> p = polynomial<8>(r, {1.0f, 1.0f, 0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040});
  using I = Vector<int32_t, kLanes>;
  const I exponent = bit_cast<I>(shifted) - 0x4b400000, half = exponent >> 1;
  return bit_cast<Pack<float>>(bit_cast<I>(p) + (half << 23)) * bit_cast<Pack<float>>((exponent - half + 127) << 23);
}

// float64 calls libm.
NK_INLINE Pack<double> exp_lanes(Pack<double> x) {
  double v[kLanes];
  store(v, x);
  for (double& e : v) e = __builtin_exp(e);
  return load<double>(static_cast<const double*>(v));
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
