// accumulate.h: sums that keep their precision. Nothing here computes E[x^2] - mean^2.
//
// A thread pushes chunks into ShiftedMoments, relative to the first value it met, so that a large mean costs no
// digits; threads, blocks and chunks then merge as Spread in float64, in a fixed order.
#pragma once

#include <cstdint>

namespace normkern {

// Count, mean and sum of squared deviations of a set.
struct Spread {
  double count = 0, mean = 0, m2 = 0;
};

// Chan, Golub and LeVeque 1979. A set with count 0 changes nothing, whatever its other fields hold.
constexpr Spread merge(const Spread& a, const Spread& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Two plain sums: of g and g*xhat over a statistics group, or of dy and dy*xhat over an affine group;
// for a second moment, `first` is the sum of squares.
struct Sums {
  double first = 0, second = 0;
};

constexpr Sums merge(const Sums& a, const Sums& b) { return {a.first + b.first, a.second + b.second}; }

// Moments of the values one thread meets, in compute type A, relative to the first of them.
template <class A>
struct ShiftedMoments {
  A shift = 0, mean = 0, m2 = 0, count = 0;  // mean is relative to shift

  // One chunk of at most N values: its own mean and centred squares, then one merge, so the division is per chunk.
  template <int N>
  constexpr void push(const A (&v)[N], int n = N) {
    if (n == 0) return;
    if (count == 0) shift = v[0];
    A sum = 0;
    for (int i = 0; i < N; ++i)
      if (i < n) sum += v[i] - shift;
    const A chunk = sum / A(n);
    A squares = 0;
    for (int i = 0; i < N; ++i)
      if (i < n) squares += (v[i] - shift - chunk) * (v[i] - shift - chunk);
    const A total = count + A(n), delta = chunk - mean, share = A(n) / total;
    mean += delta * share;
    m2 += squares + delta * delta * count * share;
    count = total;
  }
  constexpr Spread spread() const { return {double(count), double(shift) + double(mean), double(m2)}; }
};

}  // namespace normkern
