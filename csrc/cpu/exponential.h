// exponential.h: e^x on packs. Included by the files that are compiled once per instruction set.
#pragma once

#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

// e^x: x = n*ln2 + r with |r| <= ln2/2, the Taylor polynomial of e^r (truncated below 6e-9), and 2^n in two factors,
// so that results reach from the smallest subnormal to infinity.
NK_INLINE Pack<float> exp_lanes(Pack<float> x) {
  x = where_less(x, fill(-104.0f), fill(-104.0f), where_less(fill(89.0f), x, fill(89.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits.
  const Pack<float> shifted = x * fill(1.44269504f) + fill(12582912.0f), n = shifted - fill(12582912.0f);
  const Pack<float> r = (x - n * fill(0.693145751953125f)) - n * fill(1.42860682e-6f);
  Pack<float> p = fill(1.0f / 5040);
  p = p * r + fill(1.0f / 720);
  p = p * r + fill(1.0f / 120);
  p = p * r + fill(1.0f / 24);
  p = p * r + fill(1.0f / 6);
  p = p * r + fill(0.5f);
  p = p * r + fill(1.0f);
  p = p * r + fill(1.0f);
  using I = Vector<int32_t, kLanes>;
  const I exponent = bit_cast<I>(shifted) - 0x4b400000, half = exponent >> 1;
  const Pack<float> low = bit_cast<Pack<float>>((half + 127) << 23), high = bit_cast<Pack<float>>((exponent - half + 127) << 23);
  return p * low * high;
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
