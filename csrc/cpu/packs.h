// packs.h: a range of elements pack by pack, and where the results of each go. Included by norm.cpp alone.
#pragma once

#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
template <bool kYes>
struct YesIf {
  typedef Yes type;
};
template <>
struct YesIf<false> {
  typedef No type;
};

// Calls step(i, pack length, stream) over [0, n) in packs that are written to `to`. Packs may overlap, so a step must
// only depend on its elements; ranges shorter than a pack come as one partial pack. With kPairs, pair(i, stream) takes
// two packs at once wherever it can.
template <bool kPairs, class T, class Step, class PairStep>
NK_INLINE void for_packs(const T* to, int64_t n, bool stream, Step step, PairStep pair) {
  if (n < kLanes) return step(0, n, No());
  int64_t i = 0;
  const auto whole = [&](auto stream) NK_INLINED {
    if constexpr (kPairs)
      for (; i + 2 * kLanes <= n; i += 2 * kLanes) pair(i, stream);
    for (; i + kLanes <= n; i += kLanes) step(i, int64_t(kLanes), stream);
  };
  constexpr int64_t kAligned = kPairs ? kStreamedPair<T> : kStreamed<T>;
  const int64_t past = reinterpret_cast<uintptr_t>(to) % kAligned;
  // Lines of memory that are written in part go out in part; so no short ranges, unless they are whole.
  if (stream && (n >= 32 * kLanes || (past == 0 && n % kLanes == 0))) {
    if (past) {
      step(0, int64_t(kLanes), No());
      i = (kAligned - past) / sizeof(T);
      if (i > kLanes) step(i - kLanes, int64_t(kLanes), No());
    }
    whole(Yes());
  } else {
    whole(No());
  }
  if (i < n) step(n - kLanes, int64_t(kLanes), No());
}

template <class T, class Step>
NK_INLINE void for_packs(const T* to, int64_t n, bool stream, Step step) {
  for_packs<false>(to, n, stream, step, 0);
}

// As for_packs of pairs alone: n is a multiple of two packs.
template <class T, class PairStep>
NK_INLINE void for_pairs(const T* to, int64_t n, bool stream, PairStep pair) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % kStreamedPair<T> == 0;
  for_packs<true>(to, n, stream && aligned, [](int64_t, int64_t, auto) {}, pair);
}

constexpr int64_t kAheadBytes = 2048;  // the hardware's own fetching ends with a page
constexpr int64_t kNearBytes = 1024;

template <class Stream, class T, class A>
NK_INLINE void put(T* p, Pack<A> v, int64_t n, Stream) {
  if constexpr (Stream::value) {
    stream(p, v);
  } else {
    // A register of float32 is a line of memory, which has to be there before it is written.
    if constexpr (sizeof(T) >= 4) __builtin_prefetch(p + kNearBytes / int64_t(sizeof(T)), 1);
    store_some(p, v, n);
  }
}

template <class Stream>
NK_INLINE void put_pair(bf16* p, Pair<float> v, Stream) {
  const PairBits bits = rounded(v);
  if constexpr (Stream::value)
    stream_bits(p, bits);
  else
    __builtin_memcpy(p, &bits, sizeof(bits));
}

// What streams has left the caches: the next tile comes into the L2 cache while this one goes, or without tiles into
// the L1 cache what lies a little ahead.
template <class Stream, class T>
NK_INLINE void fetch(const T* p, int64_t ahead, Stream) {
  if constexpr (Stream::value) {
    if (ahead)
      __builtin_prefetch(p + ahead, 0, 2);
    else
      __builtin_prefetch(p + kAheadBytes / int64_t(sizeof(T)));
  }
}

// The same of runs, where also what lies in a farther cache is worth it. Not of parts of rows: what is ahead of one is
// not what comes next.
template <class Stream, class T>
NK_INLINE void fetch_run(const T* p, int64_t ahead, Stream stream) {
  if constexpr (Stream::value)
    fetch(p, ahead, stream);
  else
    __builtin_prefetch(p + kNearBytes / int64_t(sizeof(T)));
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
