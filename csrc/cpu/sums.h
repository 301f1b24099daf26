// sums.h: moments of runs and of columns. Included by norm.cpp alone.
//
// What is summed is x - shift and its square, where shift is an average of a few of the values: with a large mean the
// difference is exact, and squares stay small. A sum is at most kTerms additions in S (float32 but for float64 data),
// four chains of them are added as a tree, and the rest is float64; but float32 values themselves are summed in float64
// from the first, see SumOf. The caller checks that shift was near enough to the mean, and that nothing overflowed, and
// asks for the exact form (S = float64) where it was not. Equal values leave both sums at exactly 0.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

constexpr int kTerms = 16;

template <bool kFirst, class First, class Second>
struct Either {
  typedef First type;
};
template <class First, class Second>
struct Either<false, First, Second> {
  typedef Second type;
};

// Chains of additions that hide their latency, within 16 registers.
template <class S>
constexpr int kChains = sizeof(S) == 4 ? 4 : 2;
template <class S>
constexpr int64_t kBlock = kTerms * kChains<S> * kLanes;  // elements of one block of sums

// Sums over n <= kBlock elements: step(i, to) adds the pack at i to the kSums packs `to`, pair(i, to, other) the two
// packs from i on to one each, and last(n, left, to) the last `left` of the n elements, where they are no whole pack.
template <class S, int kSums, class Pairs, class Step, class Last>
NK_INLINE void add_block(int64_t n, Pack<S> (&sums)[kSums], Pairs pair, Step step, Last last) {
  // Only constant indices: else the compiler keeps the array in memory.
  Pack<S> chain[kChains<S>][kSums] = {};
  int64_t i = 0;
  for (; i + kChains<S> * kLanes <= n; i += kChains<S> * kLanes) {
    pair(i, chain[0], chain[1]);
    if constexpr (kChains<S> == 4) pair(i + 2 * kLanes, chain[2], chain[3]);
  }
  for (; i + kLanes <= n; i += kLanes) step(i, chain[0]);
  if (i < n) last(n, n - i, chain[1]);
  for (int k = 0; k < kSums; ++k) {
    Pack<S> all = chain[0][k] + chain[1][k];
    if constexpr (kChains<S> == 4) all = all + (chain[2][k] + chain[3][k]);
    sums[k] = sums[k] + all;
  }
}

// The last `left` of n elements in the last lanes; the lanes before them hold other elements or zeros.
template <class A, class T>
NK_INLINE Pack<A> load_last(const T* p, int64_t n, int64_t left) {
  if (n >= kLanes) return load<A>(p + n - kLanes);
  T buffer[kLanes] = {};
  copy_some(buffer + kLanes - left, p + n - left, left);
  return load<A>(static_cast<const T*>(buffer));
}

// What values are summed in: float32 values in float64, since a result near 0 shows every error of the mean; halves are
// rounded to less than that.
template <class T, class S, bool kCentered>
using SumOf = typename Either<kCentered && sizeof(T) == 4, double, S>::type;

// Adds the sum and the squares of n elements. What is centered later, by without_shift(), is not centered here.
template <class T, class S, bool kCentered>
NK_INLINE void add_moments(const T* p, int64_t n, Pack<S> shift, Pack<SumOf<T, S, kCentered>>& sum, Pack<S>& squares) {
  using Q = SumOf<T, S, kCentered>;
  constexpr bool kWide = sizeof(Q) > sizeof(S);
  Pack<Q> wide[2] = {fill(Q(0)), fill(Q(0))};
  const auto use = [&](Pack<S> d, Pack<S>* to) NK_INLINED {
    if constexpr (kCentered && !kWide) to[0] = to[0] + d;
    constexpr int kSquares = kWide ? 0 : 1;
    to[kSquares] = fma(d, d, to[kSquares]);
  };
  const auto centered = [&](Pack<S> v) NK_INLINED { return kCentered ? v - shift : v; };
  constexpr int kSums = kWide ? 1 : 2;
  Pack<S> sums[kSums] = {};
  add_block<S, kSums>(
      n, sums,
      [&](int64_t i, Pack<S>* to, Pack<S>* other) NK_INLINED {
        if constexpr (kWide) {
          wide[0] = wide[0] + load<Q>(p + i);
          wide[1] = wide[1] + load<Q>(p + i + kLanes);
        }
        const Pair<S> v = load_pair<S>(p + i);
        use(centered(v.a), to);
        use(centered(v.b), other);
      },
      [&](int64_t i, Pack<S>* to) NK_INLINED {
        if constexpr (kWide) wide[0] = wide[0] + load<Q>(p + i);
        use(centered(load<S>(p + i)), to);
      },
      [&](int64_t all, int64_t left, Pack<S>* to) NK_INLINED {
        if constexpr (kWide) wide[1] = wide[1] + last_lanes(load_last<Q>(p, all, left), left);
        use(last_lanes(centered(load_last<S>(p, all, left)), left), to);
      });
  if constexpr (kWide) {
    sum = sum + (wide[0] + wide[1]);
    squares = squares + sums[0];
  } else {
    sum = sum + sums[0];
    squares = squares + sums[1];
  }
}

// A sum of n values relative to the shift, from what add_moments left.
template <class T, class S, bool kCentered>
NK_INLINE double without_shift(double sum, int64_t n, S shift) {
  return sizeof(SumOf<T, S, kCentered>) > sizeof(S) ? sum - double(n) * double(shift) : sum;
}

// An average of a few values all over the run: exact where they are equal.
template <class T, class S>
NK_INLINE S pick_shift(const T* p, int64_t n) {
  if (n < kLanes) return S(value(p));
  if (n < 32 * kLanes) return total(load<S>(p)) / kLanes;
  const int64_t quarter = n / 4;
  const Pack<S> ends = load<S>(p) + load<S>(p + n - kLanes), inner = load<S>(p + quarter) + load<S>(p + 2 * quarter);
  return total(ends + inner) / (4 * kLanes);
}

template <class T, class S, bool kCentered>
void moments_of_runs(const T* x, const Runs& r, bool pick, ShiftedSums<S> s) {
  // Short runs of several lines share a block; each adds its packs to one chain.
  const int64_t packs = (r.length + kLanes - 1) / kLanes, together = packs < 2 * kTerms ? 2 * kTerms / packs : 1;
  for (int64_t run = 0; run < r.count; ++run) {
    if (pick) s.shift[run] = kCentered ? pick_shift<T, S>(x + r.first + run * r.pitch, r.length) : S(0);
    s.sum[run] = s.squares[run] = 0;
  }
  for (int64_t line = 0; line < r.lines; line += together) {
    const int64_t lines = r.lines - line < together ? r.lines - line : together;
    for (int64_t l = 0; l < lines; ++l) {
      for (int64_t run = 0; run < r.count; ++run) {
        const T* p = x + r.first + (line + l) * r.stride + run * r.pitch;
        const Pack<S> shift = fill(s.shift[run]);
        using Q = SumOf<T, S, kCentered>;
        S* lanes = s.lanes + run * (3 * kMaxLanes);
        char* const wide_lanes = reinterpret_cast<char*>(lanes + kMaxLanes);
        Pack<Q> sum = fill(Q(0));
        Pack<S> squares = fill(S(0));
        if (l > 0) {
          squares = load<S>(lanes);
          __builtin_memcpy(&sum, wide_lanes, sizeof(sum));
        }
        if (r.length <= kBlock<S>) {
          add_moments<T, S, kCentered>(p, r.length, shift, sum, squares);
          if (l + 1 < lines) {
            store(lanes, squares);
            __builtin_memcpy(wide_lanes, &sum, sizeof(sum));
            continue;
          }
          const auto all = totals(sum, squares);
          s.sum[run] += without_shift<T, S, kCentered>(all[0], lines * r.length, s.shift[run]);
          s.squares[run] += all[1];
        } else {
          Doubles all = fill(0.0), all_squares = all;
          for (int64_t i = 0; i < r.length; i += kBlock<S>) {
            sum = fill(Q(0));
            squares = fill(S(0));
            add_moments<T, S, kCentered>(p + i, r.length - i < kBlock<S> ? r.length - i : kBlock<S>, shift, sum,
                                         squares);
            all = all + convert<double>(sum);
            all_squares = all_squares + convert<double>(squares);
          }
          s.sum[run] += without_shift<T, S, kCentered>(total(all), r.length, s.shift[run]);
          s.squares[run] += total(all_squares);
        }
      }
    }
  }
}

template <class T, class S>
void moments_runs(const void* data, const Runs& r, bool centered, bool pick, ShiftedSums<S> s) {
  const T* x = static_cast<const T*>(data);
  centered ? moments_of_runs<T, S, true>(x, r, pick, s) : moments_of_runs<T, S, false>(x, r, pick, s);
}

// Calls step(j, n, left, e, lines) for a strip of n columns from j on, where `lines` elements lie c.stride apart from e
// on, a few lines at a time: what a step keeps per column is then loaded and stored once for all of them. Only the last
// `left` of the columns count, where left < kLanes: the others had their turn. With kPairs, pair(j, e, lines) takes two
// packs of columns wherever it can.
template <int kStep, bool kPairs, class Step, class PairStep>
NK_INLINE void for_strips(const Columns& c, Step step, PairStep pair) {
  constexpr int64_t kAll = kLanes;
  for (int64_t line = 0; line < c.lines; line += kStep) {
    const int64_t lines = c.lines - line < kStep ? c.lines - line : kStep, e = c.first + line * c.stride;
    int64_t j = 0;
    if constexpr (kPairs)
      for (; j + 2 * kAll <= c.width; j += 2 * kAll) pair(j, e + j, lines);
    for (; j + kAll <= c.width; j += kAll) step(j, kAll, kAll, e + j, lines);
    if (j == c.width) continue;
    const LastPack last = last_pack(c.width, j);
    step(last.from, last.count, last.left, e + last.from, lines);
  }
  for (int64_t j = 0; j < c.tail; j += kAll)
    step(j, c.tail - j < kAll ? c.tail - j : kAll, kAll, c.first + c.lines * c.stride + j, int64_t(1));
}

// Calls step(line) for the lines of a strip.
template <int kStep, class Step>
NK_INLINE void for_lines_of_strip(int64_t lines, Step step) {
  if (lines == kStep) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < kStep; ++line) step(line);
  } else {
    for (int64_t line = 0; line < lines; ++line) step(line);
  }
}

// The strip below that at p, column j, from memory: the hardware loses track of many lines side by side.
template <int kStep, class T>
NK_INLINE void fetch_strip(const T* p, int64_t j, const Columns& c) {
  if (!c.far || j % (64 / int64_t(sizeof(T))) != 0) return;
  for (int line = 0; line < kStep; ++line) __builtin_prefetch(p + (kStep + line) * c.stride);
}

// As pick_shift, over lines that are spread over the box: of the first column of every group.
template <class T, class S>
NK_INLINE void pick_shifts(const T* x, const Columns& c, int64_t cols, int64_t period, S* shift) {
  const int64_t count = c.lines >= 8 ? 8 : c.lines >= 4 ? 4 : c.lines >= 2 ? 2 : 1, step = c.lines / count * c.stride;
  const int64_t all = period < c.width ? period : c.width;
  // The average of `count` values as a tree.
  const auto average = [&](auto* v, auto share) NK_INLINED {
    for (int64_t half = count / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
    return v[0] * share;
  };
  for (int64_t j = 0; j < all;) {
    const T* p = x + c.first + j;
    if (cols > 1) {
      S v[8];
      for (int64_t i = 0; i < count; ++i) v[i] = S(value(p + i * step));
      const S of_group = average(v, S(1) / S(count));
      for (int64_t i = 0; i < cols && j < all; ++i) shift[j++] = of_group;
    } else {
      const int64_t n = all - j < kLanes ? all - j : int64_t(kLanes);
      Pack<S> v[8];
      for (int64_t i = 0; i < count; ++i) v[i] = load_some<S>(p + i * step, n);
      store_some(shift + j, average(v, fill(S(1) / S(count))), n);
      j += n;
    }
  }
  for (int64_t j = all; j < c.width; ++j) shift[j] = shift[j - all];
}

template <class T, class S, bool kCentered>
void moments_of_columns(const T* x, const Columns& c, bool pick, int64_t cols, int64_t period, ShiftedSums<S> s) {
  using Q = SumOf<T, S, kCentered>;
  constexpr bool kWide = sizeof(Q) > sizeof(S);
  for (int64_t j = 0; j < c.width; ++j) s.sum[j] = s.squares[j] = 0;
  if (pick) {
    for (int64_t j = 0; j < c.width; ++j) s.shift[j] = 0;
    if (kCentered) pick_shifts<T>(x, c, cols, period, s.shift);
  }
  const auto add = [&](double* to, int64_t j, int64_t n, auto sum)
                       NK_INLINED { store_some(to + j, load_some<double>(to + j, n) + convert<double>(sum), n); };
  constexpr int kStep = 8;
  const auto strip = [&](int64_t j, int64_t n, int64_t left, int64_t e, int64_t lines) NK_INLINED {
    fetch_strip<kStep>(x + e, j, c);
    const Pack<S> shift = load_some<S>(s.shift + j, n);
    Pack<Q> sum = fill(Q(0));
    Pack<S> squares = fill(S(0));
    for_lines_of_strip<kStep>(lines, [&](int64_t line) NK_INLINED {
      const Pack<S> v = load_some<S>(x + e + line * c.stride, n), d = v - shift;
      if constexpr (kWide)
        sum = sum + convert<Q>(v);
      else
        sum = sum + d;
      squares = fma(d, d, squares);
    });
    add(s.sum, j, n, left == kLanes ? sum : last_lanes(sum, left));
    add(s.squares, j, n, left == kLanes ? squares : last_lanes(squares, left));
  };
  for_strips<kStep, false>(c, strip, 0);
  if constexpr (kWide) {
    for (int64_t j = 0; j < c.width; ++j)
      s.sum[j] = without_shift<T, S, kCentered>(s.sum[j], c.lines + (j < c.tail), s.shift[j]);
  }
}

template <class T, class S>
void moments_columns(const void* data, const Columns& c, bool centered, bool pick, int64_t cols, int64_t period,
                     ShiftedSums<S> s) {
  const auto of = centered ? moments_of_columns<T, S, true> : moments_of_columns<T, S, false>;
  of(static_cast<const T*>(data), c, pick, cols, period, s);
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
