// registers.h: whole registers of float or of double, for the loops over spectra. Included by files that are compiled
// once per instruction set.
#pragma once

#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

template <class A>
constexpr int kWidth = kRegister / int(sizeof(A));
template <class A>
using Vec = Vector<A, kWidth<A>>;

template <class A>
NK_INLINE Vec<A> get(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
NK_INLINE void put(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

NK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
NK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace normkern::cpu::NK_ISA
