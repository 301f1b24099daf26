// half.h: float16 and bfloat16 as storage, with exact conversions that need no instruction set.
//
// Both directions round to nearest even, keep infinities and signed zeros, and turn every NaN into a quiet NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace normkern {

struct f16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

inline float to_float(bf16 h) { return float_of(uint32_t(h.bits) << 16); }

inline float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = (h.bits >> 10) & 31, mantissa = h.bits & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | (mantissa ? 0x400000 | mantissa << 13 : 0));
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return float_of(sign | bits_of(float(mantissa) * 0x1p-24f));  // subnormal: an exact product
}

inline bf16 to_bf16(float v) {
  const uint32_t u = bits_of(v);
  if (v != v) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

inline f16 to_f16(float v) {
  const uint32_t u = bits_of(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {
    // Below 2^-14 the result is a multiple of 2^-24, which is the last place of 0.5f: the addition does the rounding.
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  }
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// From float64 in one rounding: the float in between is rounded to odd, so that it keeps what the second one needs.
inline float round_to_odd(double v) {
  const float nearest = float(v);
  uint32_t u = bits_of(nearest);
  if (double(nearest) == v || v != v || (u & 0x7fffffff) == 0x7f800000) return nearest;
  if ((u & 1) == 0) {
    const bool above = double(nearest) > v;
    // An even neighbour was chosen: step to the odd one on the other side of v.
    if ((u & 0x7fffffff) == 0) return float_of((v < 0 ? 0x80000000u : 0u) | 1u);
    u += (above == (nearest > 0)) ? -1u : 1u;
  }
  return float_of(u);
}

inline bf16 to_bf16(double v) { return to_bf16(round_to_odd(v)); }
inline f16 to_f16(double v) { return to_f16(round_to_odd(v)); }

}  // namespace normkern
