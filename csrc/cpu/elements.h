// elements.h: runs and columns, element by element, and what comes before and after the affine step of each. Included
// by the loops of norm.cpp.
//
// Loops come in three forms, by what follows the affine step (Tail): the common ones are then free of calls.
#pragma once

#include "activate.h"
#include "kernels.h"
#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

// Walks a range of elements in step with the entries of their weights.
struct Cursor {
  const Lookup& lookup;
  int64_t at = -1, entry = 0, left = 0;  // `left` elements from `at` on share an entry, or have consecutive ones
  int64_t row = 0, run = 0, base = 0;

  explicit Cursor(const Lookup& l) : lookup(l) {}

  NK_INLINE void seek(int64_t e) {
    if (e == at) return;
    const int64_t whole = e / lookup.length, line = whole / lookup.runs, slice = line / lookup.rows;
    const int64_t inside = e - whole * lookup.length;
    at = e;
    run = whole - line * lookup.runs;
    row = line - slice * lookup.rows;
    base = slice * (lookup.by_element ? lookup.length : lookup.runs);
    entry = base + run + (lookup.by_element ? inside : 0);
    left = lookup.length - inside;
  }

  // By n elements; by `count` times as many, where they are all that share an entry.
  NK_INLINE void advance(int64_t n, int64_t count = 1) {
    at += n * count;
    left -= n;
    if (lookup.by_element) entry += n;
    if (left != 0) return;
    left = lookup.length;
    run += count;
    if (run == lookup.runs) {
      run = 0;
      next_rows(1);
    }
    entry = base + run;
  }

  // To the same place of a later row of the slice, or of the next one's first.
  NK_INLINE void next_rows(int64_t n) {
    row += n;
    if (row != lookup.rows) return;
    row = 0;
    const int64_t step = lookup.by_element ? lookup.length : lookup.runs;
    base += step;
    entry += step;
  }
};

// Pieces of runs that share an entry each, side by side and of the same length: piece i begins at e + i*n, belongs to
// run + i*step and has entry + i. Or one piece with consecutive entries. `place` elements were walked before.
struct Pieces {
  int64_t e, n, count, run, step, entry, place;
};

constexpr int64_t kStrip = 64;  // the most of them together

// Calls body(Pieces) for all pieces of the runs.
template <class Body>
NK_INLINE void for_pieces(const Runs& r, const Lookup& lookup, Body body) {
  Cursor cursor(lookup);
  int64_t place = 0;
  const bool shared = !lookup.by_element, one_each = shared && r.length == lookup.length && r.pitch == r.length;
  for (int64_t line = 0; line < r.lines; ++line) {
    for (int64_t run = 0; run < r.count; run += !one_each) {
      int64_t e = r.first + line * r.stride + run * r.pitch;
      const int64_t end = e + (one_each ? r.count - run : 1) * r.length;
      cursor.seek(e);
      while (e < end) {
        const int64_t rest = end - e, n = cursor.left < rest ? cursor.left : rest;
        int64_t count = 1;
        if (shared && n == lookup.length && n < rest) {
          count = rest / n;
          if (count > lookup.runs - cursor.run) count = lookup.runs - cursor.run;
          if (count > kStrip) count = kStrip;
        }
        body(Pieces{e, n, count, run, one_each, cursor.entry, place});
        cursor.advance(n, count);
        e += n * count;
        place += n * count;
        if (one_each) run += count;
      }
    }
  }
}

// ---- what follows the affine step ----

enum class Tail { none, relu, any };

template <Tail kTail>
struct TailOf {
  static constexpr Tail value = kTail;
};

// Calls loop(tail) with the Tail of the elements as a constant.
template <class A, class Loop>
NK_INLINE void with_tail(const Elements<A>& a, Loop loop) {
  if constexpr (sizeof(A) == 4) {
    if (a.act == Act::none && !a.residual && !a.dresidual && !a.dtotal) return loop(TailOf<Tail::none>());
    if (a.act == Act::relu && !a.dtotal) return loop(TailOf<Tail::relu>());
  }
  loop(TailOf<Tail::any>());
}

template <Tail kTail, class T, class A>
NK_INLINE Pack<A> finish(const Elements<A>& a, int64_t e, int64_t n, Pack<A> z) {
  if constexpr (kTail == Tail::none) return z;
  if (a.residual) z = z + load_some<A>(static_cast<const T*>(a.residual) + e, n);
  if constexpr (kTail == Tail::relu) return where_less(z, fill(A(0)), fill(A(0)), z);
  return a.act == Act::none ? z : activate(a.act, z);
}

template <Tail kTail, class T, class A>
NK_INLINE Pair<A> finish_pair(const Elements<A>& a, int64_t e, Pair<A> z) {
  if constexpr (kTail == Tail::none) return z;
  if (a.residual) {
    const Pair<A> residual = load_pair<A>(static_cast<const T*>(a.residual) + e);
    z = {z.a + residual.a, z.b + residual.b};
  }
  const Pack<A> zero = fill(A(0));
  return {where_less(z.a, zero, zero, z.a), where_less(z.b, zero, zero, z.b)};
}

// dz: the gradient of what enters the activation; z is made only where it is needed. The sums keep what is costly.
template <Tail kTail, class T, class A, class Z>
NK_INLINE Pack<A> dz_of(const Elements<A>& a, int64_t e, int64_t n, Pack<A> dy, Z make_z) {
  if constexpr (kTail == Tail::none) return dy;
  if (kTail == Tail::any && a.act == Act::none) return dy;
  Pack<A> z = make_z();
  if (a.residual) z = z + load_some<A>(static_cast<const T*>(a.residual) + e, n);
  if constexpr (kTail == Tail::relu) return where_at_most(z, fill(A(0)), fill(A(0)), dy);
  return dy * activate_slope(a.act, z);
}

template <Tail kTail, class A>
NK_INLINE Pack<A> keep(const Elements<A>& a, int64_t place, int64_t n, Pack<A> dz) {
  if (kTail == Tail::any && a.kept) store_some(a.kept + place, dz, n);
  return dz;
}

template <Tail kTail, class T, class A, class Z>
NK_INLINE Pack<A> dz_again(const Elements<A>& a, int64_t e, int64_t place, int64_t n, Z make_z) {
  if (kTail == Tail::any && a.kept) return load_some<A>(a.kept + place, n);
  return dz_of<kTail, T>(a, e, n, load_some<A>(static_cast<const T*>(a.dy) + e, n), make_z);
}

// dx, once what came past the norm is added to what came through it.
template <Tail kTail, class T, class A>
NK_INLINE Pack<A> past(const Elements<A>& a, int64_t e, int64_t n, Pack<A> dx) {
  if (kTail != Tail::any || !a.dtotal) return dx;
  return dx + load_some<A>(static_cast<const T*>(a.dtotal) + e, n);
}

template <class A>
struct Normalize {
  Pack<A> mean, rstd, offset;  // xhat = (x - mean)*rstd + offset

  static NK_INLINE Normalize of(Center<A> c, int64_t run) {
    return {fill(c.mean[run]), fill(c.rstd[run]), fill(-c.low[run] * c.rstd[run])};
  }
  NK_INLINE Pack<A> operator()(Pack<A> x) const { return fma(x - mean, rstd, offset); }
};

// Calls loop(e, width) for the lines.
template <class Loop>
NK_INLINE void for_lines(const Columns& c, Loop loop) {
  for (int64_t line = 0; line < c.lines; ++line) loop(line, c.first + line * c.stride, c.width);
  if (c.tail) loop(c.lines, c.first + c.lines * c.stride, c.tail);
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
