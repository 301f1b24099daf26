// parameters.h: vectors of parameters into the kernels' floats, and their gradients out of float64. For norm.cpp alone.
#pragma once

#include "lanes.h"
#include "types.h"

namespace normkern::cpu::NK_ISA {
namespace {

template <class A>
NK_INLINE Pack<A> canonical(Pack<A> v) {
  return where_at_most(v, v, v, fill(A(__builtin_nan(""))));
}

void read_floats(const void* from, DType dtype, int64_t n, float* to) {
  with_type(dtype, [&](auto type) NK_INLINED {
    const auto* p = static_cast<const decltype(type)*>(from);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t m = n - i < kLanes ? n - i : int64_t(kLanes);
      if constexpr (sizeof(type) == 8)
        store_some(to + i, canonical(convert<float>(load_some<double>(p + i, m))), m);
      else
        store_some(to + i, canonical(load_some<float>(p + i, m)), m);
    }
  });
}

// Doubles that a float holds exactly, rounded to odd: what is rounded from there on to fewer digits is rounded once.
NK_INLINE Pack<double> round_to_odd(Pack<double> v) {
  using I = Vector<int64_t, Pack<double>::kWidth>;
  constexpr int64_t kLast = int64_t(1) << (52 - 23), kRest = kLast - 1;
  for (int i = 0; i < Pack<double>::kParts; ++i) {
    const I bits = bit_cast<I>(v.part[i]), inexact = (bits & kRest) != I{};
    v.part[i] = bit_cast<Pack<double>::V>((bits & ~kRest) | (inexact & kLast));
  }
  return v;
}

void write_doubles(const double* from, int64_t n, DType dtype, void* to) {
  with_type(dtype, [&](auto type) NK_INLINED {
    auto* p = static_cast<decltype(type)*>(to);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t m = n - i < kLanes ? n - i : int64_t(kLanes);
      const Pack<double> v = canonical(load_some<double>(from + i, m));
      if constexpr (sizeof(type) == 8)
        store_some(p + i, v, m);
      else
        store_some(p + i, convert<float>(sizeof(type) == 2 ? round_to_odd(v) : v), m);
    }
  });
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
