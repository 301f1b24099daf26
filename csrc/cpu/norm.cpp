// norm.cpp: the loops over elements. Compiled once per instruction set, with NK_ISA naming the namespace.
//
// Everything here is internal but kTable: an inline function that two of these objects share could be linked from the
// wrong one (cmake checks that none is left). So no standard library, and of core only plain data.
//
// Loops come in three forms, by what follows the affine step (Tail): the common ones are then free of calls.
#include "activate.h"
#include "kernels.h"
#include "parameters.h"
#include "sums.h"

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

  NK_INLINE void advance(int64_t n) {
    at += n;
    left -= n;
    if (lookup.by_element) entry += n;
    if (left != 0) return;
    left = lookup.length;
    if (++run == lookup.runs) {
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

// Calls body(e, n, run, entry, place) for the pieces of the runs that share an entry or have consecutive ones; `place`
// elements were walked before.
template <class Body>
NK_INLINE void for_pieces(const Runs& r, const Lookup& lookup, Body body) {
  Cursor cursor(lookup);
  int64_t place = 0;
  for (int64_t line = 0; line < r.lines; ++line) {
    for (int64_t run = 0; run < r.count; ++run) {
      int64_t e = r.first + line * r.stride + run * r.pitch;
      const int64_t end = e + r.length;
      cursor.seek(e);
      while (e < end) {
        const int64_t n = cursor.left < end - e ? cursor.left : end - e;
        body(e, n, run, cursor.entry, place);
        cursor.advance(n);
        e += n;
        place += n;
      }
    }
  }
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// Calls step(i, pack length, stream) over [0, n) in packs that are written to `to`. Packs may overlap, so a step must
// only depend on its elements; ranges shorter than a pack come as one partial pack.
template <class T, class Step>
NK_INLINE void for_packs(const T* to, int64_t n, bool stream, Step step) {
  if (n < kLanes) return step(0, n, No());
  int64_t i = 0;
  const int64_t past = reinterpret_cast<uintptr_t>(to) % kStreamed<T>;
  // Lines of memory that are written in part go out in part; so no short ranges, unless they are whole.
  if (stream && (n >= 32 * kLanes || (past == 0 && n % kLanes == 0))) {
    if (past) {
      step(0, int64_t(kLanes), No());
      i = (kStreamed<T> - past) / sizeof(T);
    }
    for (; i + kLanes <= n; i += kLanes) step(i, int64_t(kLanes), Yes());
  } else {
    for (; i + kLanes <= n; i += kLanes) step(i, int64_t(kLanes), No());
  }
  if (i < n) step(n - kLanes, int64_t(kLanes), No());
}

template <class Stream, class T, class A>
NK_INLINE void put(T* p, Pack<A> v, int64_t n, Stream) {
  if constexpr (Stream::value)
    stream(p, v);
  else
    store_some(p, v, n);
}

constexpr int64_t kAheadBytes = 2048;  // the hardware's own fetching ends with a page

// What streams has left the caches: the next tile comes while this one goes, or without tiles what lies a little ahead.
template <class Stream, class T>
NK_INLINE void fetch(const T* p, int64_t ahead, Stream) {
  if constexpr (Stream::value) __builtin_prefetch(p + (ahead ? ahead : kAheadBytes / int64_t(sizeof(T))));
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

// Every function copies its Elements: the compiler then knows that no store changes them.

template <class A>
struct Normalize {
  Pack<A> mean, rstd, offset;  // xhat = (x - mean)*rstd + offset

  static NK_INLINE Normalize of(Center<A> c, int64_t run) {
    return {fill(c.mean[run]), fill(c.rstd[run]), fill(-c.low[run] * c.rstd[run])};
  }
  NK_INLINE Pack<A> operator()(Pack<A> x) const { return fma(x - mean, rstd, offset); }
};

// ---- forward ----

template <class T, class A>
void add_runs(const void* x, const void* add, void* total, const Runs& r) {
  const T *a = static_cast<const T*>(x), *b = static_cast<const T*>(add);
  T* to = static_cast<T*>(total);
  const bool whole = r.length == r.pitch;  // all runs of a line at once
  for (int64_t line = 0; line < r.lines; ++line) {
    for (int64_t run = 0; run < (whole ? 1 : r.count); ++run) {
      const int64_t e = r.first + line * r.stride + run * r.pitch;
      for_packs(to + e, whole ? r.count * r.length : r.length, false, [&](int64_t i, int64_t n, auto) NK_INLINED {
        store_some(to + e + i, load_some<A>(a + e + i, n) + load_some<A>(b + e + i, n), n);
      });
    }
  }
}

template <class T, class A>
void map_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    for_pieces(r, lookup, [&](int64_t e, int64_t n, int64_t run, int64_t entry, int64_t) NK_INLINED {
      const T* x = static_cast<const T*>(a.x) + e;
      T* y = static_cast<T*>(a.y) + e;
      if (lookup.by_element) {
        const auto xhat = Normalize<A>::of(center, run);
        const A *weight = a.weight + entry, *bias = a.bias + entry;
        for_packs(y, n, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
          fetch(x + i, a.ahead, stream);
          const Pack<A> z = fma(xhat(load_some<A>(x + i, m)), load_some<A>(weight + i, m), load_some<A>(bias + i, m));
          put(y + i, finish<kTail, T>(a, e + i, m, z), m, stream);
        });
      } else {
        const A factor = center.rstd[run] * a.weight[entry];
        const Pack<A> mean = fill(center.mean[run]), scale = fill(factor),
                      shift = fill(a.bias[entry] - center.low[run] * factor);
        for_packs(y, n, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
          fetch(x + i, a.ahead, stream);
          const Pack<A> z = fma(load_some<A>(x + i, m) - mean, scale, shift);
          put(y + i, finish<kTail, T>(a, e + i, m, z), m, stream);
        });
      }
    });
  });
  if (a.stream) end_stream();
}

// Calls loop(e, width) for the lines.
template <class Loop>
NK_INLINE void for_lines(const Columns& c, Loop loop) {
  for (int64_t line = 0; line < c.lines; ++line) loop(line, c.first + line * c.stride, c.width);
  if (c.tail) loop(c.lines, c.first + c.lines * c.stride, c.tail);
}

template <class T, class A>
void map_columns(const Elements<A>& elements, const Columns& c, Center<A> center) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    for_lines(c, [&](int64_t line, int64_t e, int64_t width) NK_INLINED {
      const T* x = static_cast<const T*>(a.x) + e;
      T* y = static_cast<T*>(a.y) + e;
      const auto z = [&](int64_t j, int64_t n) NK_INLINED {
        return fma(load_some<A>(x + j, n) - load_some<A>(center.mean + j, n), load_some<A>(center.scale + j, n),
                   load_some<A>(center.shift + j, n));
      };
      if (a.by_line) {
        const Pack<A> weight = fill(a.weight[line]), bias = fill(a.bias[line]);
        for_packs(y, width, a.stream, [&](int64_t j, int64_t n, auto stream) NK_INLINED {
          fetch(x + j, 0, stream);
          put(y + j, finish<kTail, T>(a, e + j, n, fma(z(j, n), weight, bias)), n, stream);
        });
      } else {
        for_packs(y, width, a.stream, [&](int64_t j, int64_t n, auto stream) NK_INLINED {
          fetch(x + j, 0, stream);
          put(y + j, finish<kTail, T>(a, e + j, n, z(j, n)), n, stream);
        });
      }
    });
  });
  if (a.stream) end_stream();
}

// ---- backward: sums ----

// Pieces with one weight: sums of dz and dz*xhat.
template <Tail kTail, class T, class A>
NK_INLINE void sum_piece(const Elements<A>& a, Center<A> center, int64_t e, int64_t n, int64_t run, int64_t entry,
                         int64_t place, double& all, double& all_xhat) {
  const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
  const A factor = center.rstd[run] * a.weight[entry];
  const Pack<A> mean = fill(center.mean[run]), rstd = fill(center.rstd[run]), scale = fill(factor),
                shift = fill(a.bias[entry] - center.low[run] * factor);
  const auto use = [&](Pack<A> xs, Pack<A> dz, Pack<A>* to) NK_INLINED {
    to[0] = to[0] + dz;
    to[1] = fma(dz, (xs - mean) * rstd, to[1]);
  };
  Doubles sum = fill(0.0), sum_xhat = sum;
  for (int64_t start = 0; start < n; start += kBlock<A>) {
    const T *from = x + start, *dfrom = dy + start;
    Pack<A> sums[2] = {fill(A(0)), fill(A(0))};
    add_block<A, 2>(
        n - start < kBlock<A> ? n - start : kBlock<A>, sums,
        [&](int64_t i, Pack<A>* to) NK_INLINED {
          const Pack<A> xs = load<A>(from + i);
          const Pack<A> dz = dz_of<kTail, T>(a, e + start + i, kLanes, load<A>(dfrom + i),
                                             [&]() NK_INLINED { return fma(xs - mean, scale, shift); });
          use(xs, keep<kTail>(a, place + start + i, kLanes, dz), to);
        },
        [&](int64_t m, int64_t left, Pack<A>* to) NK_INLINED {
          const Pack<A> xs = load<A>(from + m - left, left);
          const Pack<A> dz = dz_of<kTail, T>(a, e + start + m - left, left, load<A>(dfrom + m - left, left),
                                             [&]() NK_INLINED { return fma(xs - mean, scale, shift); });
          use(xs, keep<kTail>(a, place + start + m - left, left, dz), to);
        });
    sum = sum + convert<double>(sums[0]);
    sum_xhat = sum_xhat + convert<double>(sums[1]);
  }
  all = total(sum);
  all_xhat = total(sum_xhat) - double(center.low[run]) * double(center.rstd[run]) * all;
}

// kRows runs that lie `pitch` apart and have the same weights, element by element.
template <int kRows, Tail kTail, class T, class A>
NK_INLINE void sum_rows(const Elements<A>& a, Center<A> center, int64_t e, int64_t pitch, int64_t n, int64_t run,
                        int64_t entry, int64_t place, const BackwardSums& s) {
  const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
  const A *weight = a.weight + entry, *bias = a.bias + entry;
  double* dbias = s.dweight ? s.dbias + (entry - s.origin) : nullptr;
  double* dweight = s.dweight ? s.dweight + (entry - s.origin) : nullptr;
  Normalize<A> normalize[kRows];
  for (int k = 0; k < kRows; ++k) normalize[k] = Normalize<A>::of(center, run + k);
  double all[kRows] = {}, all_xhat[kRows] = {};
  for (int64_t start = 0; start < n; start += 2 * kTerms * kLanes) {
    const int64_t end = n - start < 2 * kTerms * kLanes ? n : start + 2 * kTerms * kLanes;
    Pack<A> g[kRows], g_xhat[kRows];
    for (int k = 0; k < kRows; ++k) g[k] = g_xhat[k] = fill(A(0));
    const auto step = [&](int64_t i, int64_t m) NK_INLINED {
      const Pack<A> w = load_some<A>(weight + i, m);
      Pack<A> sum = fill(A(0)), sum_xhat = sum;
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const Pack<A> xhat = normalize[k](load_some<A>(x + k * pitch + i, m));
        const Pack<A> dz = dz_of<kTail, T>(a, e + k * pitch + i, m, load_some<A>(dy + k * pitch + i, m),
                                           [&]() NK_INLINED { return fma(xhat, w, load_some<A>(bias + i, m)); });
        keep<kTail>(a, place + k * n + i, m, dz);
        const Pack<A> scaled = dz * w;
        sum = sum + dz;
        sum_xhat = fma(dz, xhat, sum_xhat);
        g[k] = g[k] + scaled;
        g_xhat[k] = fma(scaled, xhat, g_xhat[k]);
      }
      if (!dweight) return;
      store_some(dbias + i, load_some<double>(dbias + i, m) + convert<double>(sum), m);
      store_some(dweight + i, load_some<double>(dweight + i, m) + convert<double>(sum_xhat), m);
    };
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) step(i, int64_t(kLanes));
    if (i < end) step(i, end - i);
    for (int k = 0; k < kRows; ++k) {
      all[k] += total(convert<double>(g[k]));
      all_xhat[k] += total(convert<double>(g_xhat[k]));
    }
  }
  for (int k = 0; k < kRows && s.g; ++k) {
    s.g[run + k] += all[k];
    s.g_xhat[run + k] += all_xhat[k];
  }
}

template <class T, class A>
void sums_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center, BackwardSums s) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    if (!lookup.by_element) {
      return for_pieces(r, lookup, [&](int64_t e, int64_t n, int64_t run, int64_t entry, int64_t place) NK_INLINED {
        double all, all_xhat;
        sum_piece<kTail, T>(a, center, e, n, run, entry, place, all, all_xhat);
        const double w = a.weight[entry];
        if (s.g) {
          s.g[run] += w * all;
          s.g_xhat[run] += w * all_xhat;
        }
        if (s.dweight) {
          s.dbias[entry - s.origin] += all;
          s.dweight[entry - s.origin] += all_xhat;
        }
      });
    }
    constexpr int kRows = 2;
    Cursor cursor(lookup);
    for (int64_t line = 0; line < r.lines; ++line) {
      for (int64_t run = 0; run < r.count;) {
        int64_t e = r.first + line * r.stride + run * r.pitch, place = (line * r.count + run) * r.length;
        cursor.seek(e);
        if (run + kRows <= r.count && r.pitch == lookup.length && cursor.left >= r.length &&
            cursor.row + kRows <= lookup.rows) {
          sum_rows<kRows, kTail, T>(a, center, e, r.pitch, r.length, run, cursor.entry, place, s);
          cursor.next_rows(kRows);
          cursor.at += kRows * r.pitch;
          run += kRows;
          continue;
        }
        for (const int64_t end = e + r.length; e < end;) {
          const int64_t n = cursor.left < end - e ? cursor.left : end - e;
          sum_rows<1, kTail, T>(a, center, e, 0, n, run, cursor.entry, place, s);
          cursor.advance(n);
          e += n;
          place += n;
        }
        ++run;
      }
    }
  });
}

// Weights by line: xhat is (x - mean)*scale + shift.
template <class T, class A>
void sums_lines(const Elements<A>& elements, const Columns& c, Center<A> center, BackwardSums s) {
  const Elements<A> a = elements;
  for (int64_t line = 0; line < c.lines; ++line) {
    const Pack<A> weight = fill(a.weight[line]), bias = fill(a.bias[line]);
    Doubles all = fill(0.0), all_xhat = all;
    for (int64_t j = 0; j < c.width; j += kLanes) {
      const int64_t n = c.width - j < kLanes ? c.width - j : int64_t(kLanes), e = c.first + line * c.stride + j;
      const Pack<A> xhat = fma(load_some<A>(static_cast<const T*>(a.x) + e, n) - load_some<A>(center.mean + j, n),
                               load_some<A>(center.scale + j, n), load_some<A>(center.shift + j, n));
      const Pack<A> dz = dz_of<Tail::any, T>(a, e, n, load_some<A>(static_cast<const T*>(a.dy) + e, n),
                                             [&]() NK_INLINED { return fma(xhat, weight, bias); });
      keep<Tail::any>(a, e - c.first, n, dz);
      const Doubles wide = convert<double>(dz), wide_xhat = convert<double>(xhat), g = convert<double>(dz * weight);
      all = all + wide;
      all_xhat = fma(wide, wide_xhat, all_xhat);
      store_some(s.g + j, load_some<double>(s.g + j, n) + g, n);
      store_some(s.g_xhat + j, fma(g, wide_xhat, load_some<double>(s.g_xhat + j, n)), n);
    }
    if (s.dweight) {
      s.dbias[line] += total(all);
      s.dweight[line] += total(all_xhat);
    }
  }
}

template <class T, class A>
void sums_columns(const Elements<A>& elements, const Columns& c, Center<A> center, BackwardSums s) {
  if (elements.by_line) return sums_lines<T>(elements, c, center, s);
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    constexpr int kStep = 8;
    for_strips<kStep>(c, [&](int64_t j, int64_t n, int64_t e, int64_t lines) NK_INLINED {
      fetch_strip<kStep>(static_cast<const T*>(a.x) + e, j, c);
      fetch_strip<kStep>(static_cast<const T*>(a.dy) + e, j, c);
      const Pack<A> mean = load_some<A>(center.mean + j, n), rstd = load_some<A>(center.rstd + j, n);
      Pack<A> sum = fill(A(0)), sum_xhat = sum;
      const auto step = [&](int64_t line) NK_INLINED {
        const int64_t at = e + line * c.stride;
        const Pack<A> d = load_some<A>(static_cast<const T*>(a.x) + at, n) - mean;
        const Pack<A> dz = dz_of<kTail, T>(
            a, at, n, load_some<A>(static_cast<const T*>(a.dy) + at, n),
            [&]() NK_INLINED { return fma(d, load_some<A>(center.scale + j, n), load_some<A>(center.shift + j, n)); });
        keep<kTail>(a, at - c.first, n, dz);
        sum = sum + dz;
        sum_xhat = fma(dz, d * rstd, sum_xhat);
      };
      if (lines == kStep) {
#pragma GCC unroll 8
        for (int64_t line = 0; line < kStep; ++line) step(line);
      } else {
        for (int64_t line = 0; line < lines; ++line) step(line);
      }
      store_some(s.g + j, load_some<double>(s.g + j, n) + convert<double>(sum), n);
      store_some(s.g_xhat + j, load_some<double>(s.g_xhat + j, n) + convert<double>(sum_xhat), n);
    });
  });
}

// ---- backward: dx ----

template <class T, class A>
void slope_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center, Slope<A> slopes) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    for_pieces(r, lookup, [&](int64_t e, int64_t n, int64_t run, int64_t entry, int64_t place) NK_INLINED {
      const T* x = static_cast<const T*>(a.x) + e;
      T *dx = static_cast<T*>(a.dx) + e, *dresidual = static_cast<T*>(a.dresidual) + e;
      const Pack<A> mean = fill(center.mean[run]), rstd = fill(center.rstd[run]), slope = fill(slopes.slope[run]),
                    offset = fill(slopes.offset[run]);
      const auto write = [&](int64_t i, int64_t m, Pack<A> d, Pack<A> dz, Pack<A> scale, auto stream) NK_INLINED {
        if (kTail != Tail::none && a.dresidual) put(dresidual + i, dz, m, stream);
        if (kTail == Tail::none || a.dx)
          put(dx + i, past<kTail, T>(a, e + i, m, fma(d * rstd, slope, fma(dz, scale, offset))), m, stream);
      };
      // Where dx is not wanted, dresidual is; their buffers are aligned alike.
      const T* to = a.dx ? dx : dresidual;
      if (lookup.by_element) {
        const auto xhat = Normalize<A>::of(center, run);
        const A *weight = a.weight + entry, *bias = a.bias + entry;
        for_packs(to, n, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
          fetch(x + i, a.ahead, stream);
          fetch(static_cast<const T*>(a.dy) + e + i, a.ahead, stream);
          const Pack<A> xs = load_some<A>(x + i, m), w = load_some<A>(weight + i, m);
          const Pack<A> dz = dz_again<kTail, T>(
              a, e + i, place + i, m, [&]() NK_INLINED { return fma(xhat(xs), w, load_some<A>(bias + i, m)); });
          write(i, m, xs - mean, dz, w * rstd, stream);
        });
      } else {
        const A factor = center.rstd[run] * a.weight[entry];
        const Pack<A> scale = fill(factor), shift = fill(a.bias[entry] - center.low[run] * factor);
        for_packs(to, n, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
          fetch(x + i, a.ahead, stream);
          fetch(static_cast<const T*>(a.dy) + e + i, a.ahead, stream);
          const Pack<A> d = load_some<A>(x + i, m) - mean;
          const Pack<A> dz =
              dz_again<kTail, T>(a, e + i, place + i, m, [&]() NK_INLINED { return fma(d, scale, shift); });
          write(i, m, d, dz, scale, stream);
        });
      }
    });
  });
  if (a.stream) end_stream();
}

template <class T, class A>
void slope_columns(const Elements<A>& elements, const Columns& c, Center<A> center, Slope<A> slopes) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    for_lines(c, [&](int64_t line, int64_t e, int64_t width) NK_INLINED {
      const T* x = static_cast<const T*>(a.x) + e;
      T *dx = static_cast<T*>(a.dx) + e, *dresidual = static_cast<T*>(a.dresidual) + e;
      const Pack<A> weight = fill(a.by_line ? a.weight[line] : A(1)), bias = fill(a.by_line ? a.bias[line] : A(0));
      for_packs(a.dx ? dx : dresidual, width, a.stream, [&](int64_t j, int64_t n, auto stream) NK_INLINED {
        fetch(x + j, 0, stream);
        fetch(static_cast<const T*>(a.dy) + e + j, 0, stream);
        const Pack<A> d = load_some<A>(x + j, n) - load_some<A>(center.mean + j, n),
                      scale = load_some<A>(center.scale + j, n);
        Pack<A> dz = dz_again<kTail, T>(a, e + j, e + j - c.first, n, [&]() NK_INLINED {
          const Pack<A> z = fma(d, scale, load_some<A>(center.shift + j, n));
          return a.by_line ? fma(z, weight, bias) : z;
        });
        if (kTail != Tail::none && a.dresidual) put(dresidual + j, dz, n, stream);
        if (kTail != Tail::none && !a.dx) return;
        if (a.by_line) dz = dz * weight;
        const Pack<A> t = d * load_some<A>(center.rstd + j, n), offset = load_some<A>(slopes.offset + j, n);
        const Pack<A> through = fma(t, load_some<A>(slopes.slope + j, n), fma(dz, scale, offset));
        put(dx + j, past<kTail, T>(a, e + j, n, through), n, stream);
      });
    });
  });
  if (a.stream) end_stream();
}

template <class T, class A>
constexpr Kernels<A> kKernels = {moments_runs<T, A>,         moments_runs<T, double>, moments_columns<T, A>,
                                 moments_columns<T, double>, add_runs<T, A>,          map_runs<T, A>,
                                 map_columns<T, A>,          sums_runs<T, A>,         sums_columns<T, A>,
                                 slope_runs<T, A>,           slope_columns<T, A>};

}  // namespace

extern const KernelTable kTable = {kKernels<double, double>,
                                   kKernels<float, float>,
                                   kKernels<f16, float>,
                                   kKernels<bf16, float>,
                                   read_floats,
                                   write_doubles};

}  // namespace normkern::cpu::NK_ISA
