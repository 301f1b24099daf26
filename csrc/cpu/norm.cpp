// norm.cpp: the loops over elements. Compiled once per instruction set, with NK_ISA naming the namespace.
//
// Everything here is internal but kTable: an inline function that two of these objects share could be linked from the
// wrong one (cmake checks that none is left). So no standard library, and of core only plain data.
#include "centers.h"
#include "elements.h"
#include "gradient_sums.h"
#include "packs.h"
#include "parameters.h"
#include "sums.h"

namespace normkern::cpu::NK_ISA {
namespace {

// Every function copies its Elements: the compiler then knows that no store changes them.

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

// What belongs to up to kMost columns, in the order of pairs (lanes.h).
template <class A, int kVectors>
struct PairedColumns {
  static constexpr int64_t kMost = 1024;
  A at[kVectors][kMost];

  NK_INLINE void set(int vector, const A* from, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
      const Pair<A> v = in_pair_order(load<A>(from + i), load<A>(from + i + kLanes));
      store(at[vector] + i, v.a);
      store(at[vector] + i + kLanes, v.b);
    }
  }
};

// Lines that are enough to be worth another order of the columns, and whole in it.
NK_INLINE bool pairs_pay(int64_t lines, int64_t width) { return lines >= 8 && width % (2 * kLanes) == 0; }

// A call of its own, as sum_pieces.
template <Tail kTail, class T, class A>
__attribute__((noinline)) void map_pieces(const Elements<A>& elements, Center<A> center, const Pieces p) {
  const Elements<A> a = elements;
  for (int64_t piece = 0; piece < p.count; ++piece) {
    const int64_t e = p.e + piece * p.n, run = p.run + piece * p.step, entry = p.entry + piece;
    const T* x = static_cast<const T*>(a.x) + e;
    T* y = static_cast<T*>(a.y) + e;
    const A factor = center.rstd[run] * a.weight[entry];
    const Pack<A> mean = fill(center.mean[run]), scale = fill(factor),
                  shift = fill(a.bias[entry] - center.low[run] * factor);
    const auto z = [&](Pack<A> xs) NK_INLINED { return fma(xs - mean, scale, shift); };
    for_packs<kPaired<T> && kTail != Tail::any>(
        y, p.n, a.stream,
        [&](int64_t i, int64_t m, auto stream) NK_INLINED {
          fetch_run(x + i, a.ahead, stream);
          put(y + i, finish<kTail, T>(a, e + i, m, z(load_some<A>(x + i, m))), m, stream);
        },
        [&](int64_t i, auto stream) NK_INLINED {
          fetch_run(x + i, a.ahead, stream);
          const Pair<A> xs = load_pair<A>(x + i);
          put_pair(y + i, finish_pair<kTail, T, A>(a, e + i, {z(xs.a), z(xs.b)}), stream);
        });
  }
}

// Whether every run is a line of the same weights.
NK_INLINE bool rows_of_weights(const Runs& r, const Lookup& l) {
  const int64_t slice = l.length * l.rows;
  return l.by_element && l.runs == 1 && r.lines == 1 && r.length == l.length && r.pitch == l.length &&
         r.first % l.length == 0 && r.first / slice == (r.first + (r.count - 1) * r.pitch) / slice;
}

// Of such rows.
NK_INLINE int64_t first_entry(const Runs& r, const Lookup& l) { return r.first / (l.length * l.rows) * l.length; }

template <Tail kTail, class T, class A>
__attribute__((noinline)) void map_paired_rows(const Elements<A>& elements, const Runs& r, const Lookup& l,
                                               Center<A> center) {
  const Elements<A> a = elements;
  const int64_t entry = first_entry(r, l);
  PairedColumns<A, 2> p;
  for (int64_t from = 0; from < r.length; from += p.kMost) {
    const int64_t n = r.length - from < p.kMost ? r.length - from : p.kMost;
    p.set(0, a.weight + entry + from, n);
    p.set(1, a.bias + entry + from, n);
    for (int64_t run = 0; run < r.count; ++run) {
      const int64_t e = r.first + run * r.pitch + from;
      const T* x = static_cast<const T*>(a.x) + e;
      T* y = static_cast<T*>(a.y) + e;
      const auto xhat = Normalize<A>::of(center, run);
      const auto z = [&](int64_t j, Pack<A> v)
                         NK_INLINED { return fma(xhat(v), load<A>(p.at[0] + j), load<A>(p.at[1] + j)); };
      for_pairs(y, n, a.stream, [&](int64_t j, auto streamed) NK_INLINED {
        fetch(x + j, a.ahead, streamed);
        const Pair<A> xs = load_pair<A>(x + j);
        put_pair(y + j, finish_pair<kTail, T, A>(a, e + j, {z(j, xs.a), z(j + kLanes, xs.b)}), streamed);
      });
    }
  }
}

// Rows that are worth taking by two: not one alone, and past the caches only where both are aligned alike and long,
// since two short ones at a time were slower to reach the memory than one after the other.
template <class T>
NK_INLINE bool two_pay(const Runs& r, bool stream) {
  const int64_t bytes = r.length * int64_t(sizeof(T));
  return r.count > 1 && (!stream || (bytes % kRegister == 0 && bytes >= 4096));
}

// Two rows at a time share what is loaded of the weights. Of an odd number the last comes twice.
template <Tail kTail, class T, class A>
__attribute__((noinline)) void map_two_rows(const Elements<A>& elements, const Runs& r, const Lookup& l,
                                            Center<A> center) {
  const Elements<A> a = elements;
  const int64_t entry = first_entry(r, l);
  const A *weight = a.weight + entry, *bias = a.bias + entry;
  for (int64_t run = 0; run < r.count; run += 2) {
    const int64_t other = run + 1 < r.count ? run + 1 : run;
    const int64_t e = r.first + run * r.pitch, step = (other - run) * r.pitch;
    const T* x = static_cast<const T*>(a.x) + e;
    T* y = static_cast<T*>(a.y) + e;
    const auto one = Normalize<A>::of(center, run), two = Normalize<A>::of(center, other);
    for_packs(y, r.length, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
      fetch_run(x + i, a.ahead, stream);
      fetch_run(x + i + step, a.ahead, stream);
      const Pack<A> w = load_some<A>(weight + i, m), b = load_some<A>(bias + i, m);
      const Pack<A> z = fma(one(load_some<A>(x + i, m)), w, b), other_z = fma(two(load_some<A>(x + i + step, m)), w, b);
      put(y + i, finish<kTail, T>(a, e + i, m, z), m, stream);
      put(y + i + step, finish<kTail, T>(a, e + i + step, m, other_z), m, stream);
    });
  }
}

template <class T, class A>
void map_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    if constexpr (kTail != Tail::any) {
      if (rows_of_weights(r, lookup)) {
        if constexpr (kPaired<T>)
          if (pairs_pay(r.count, r.length)) return map_paired_rows<kTail, T>(a, r, lookup, center);
        if (two_pay<T>(r, a.stream)) return map_two_rows<kTail, T>(a, r, lookup, center);
      }
    }
    for_pieces(r, lookup, [&](const Pieces& p) NK_INLINED {
      if (!lookup.by_element) return map_pieces<kTail, T>(a, center, p);
      const T* x = static_cast<const T*>(a.x) + p.e;
      T* y = static_cast<T*>(a.y) + p.e;
      const auto xhat = Normalize<A>::of(center, p.run);
      const A *weight = a.weight + p.entry, *bias = a.bias + p.entry;
      for_packs(y, p.n, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
        fetch_run(x + i, a.ahead, stream);
        const Pack<A> z = fma(xhat(load_some<A>(x + i, m)), load_some<A>(weight + i, m), load_some<A>(bias + i, m));
        put(y + i, finish<kTail, T>(a, p.e + i, m, z), m, stream);
      });
    });
  });
  if (a.stream) end_stream();
}

template <Tail kTail, class T, class A>
NK_INLINE void map_paired_columns(const Elements<A>& a, const Columns& c, const Center<A>& center) {
  PairedColumns<A, 3> p;
  for (int64_t from = 0; from < c.width; from += p.kMost) {
    const int64_t n = c.width - from < p.kMost ? c.width - from : p.kMost;
    p.set(0, center.mean + from, n);
    p.set(1, center.scale + from, n);
    p.set(2, center.shift + from, n);
    const auto z = [&](int64_t j, Pack<A> x)
                       NK_INLINED { return fma(x - load<A>(p.at[0] + j), load<A>(p.at[1] + j), load<A>(p.at[2] + j)); };
    for_lines(c, [&](int64_t, int64_t line, int64_t) NK_INLINED {
      const int64_t e = line + from;
      const T* x = static_cast<const T*>(a.x) + e;
      T* y = static_cast<T*>(a.y) + e;
      for_pairs(y, n, a.stream, [&](int64_t j, auto streamed) NK_INLINED {
        fetch(x + j, 0, streamed);
        const Pair<A> xs = load_pair<A>(x + j);
        put_pair(y + j, finish_pair<kTail, T, A>(a, e + j, {z(j, xs.a), z(j + kLanes, xs.b)}), streamed);
      });
    });
  }
}

template <class T, class A>
void map_columns(const Elements<A>& elements, const Columns& c, Center<A> center) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    if constexpr (kPaired<T> && kTail != Tail::any)
      if (!a.by_line && c.tail == 0 && pairs_pay(c.lines, c.width)) return map_paired_columns<kTail, T>(a, c, center);
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

// ---- backward: dx ----

// dx and dresidual, pack by pack.
template <Tail kTail, class T, class A>
struct Through {
  const Elements<A>& a;
  const Pack<A> mean, rstd, slope, offset;

  NK_INLINE Through(const Elements<A>& elements, const Center<A>& center, const Slope<A>& slopes, int64_t run)
      : a(elements),
        mean(fill(center.mean[run])),
        rstd(fill(center.rstd[run])),
        slope(fill(slopes.slope[run])),
        offset(fill(slopes.offset[run])) {}

  // Where dx is not wanted, dresidual is; their buffers are aligned alike.
  NK_INLINE const T* to(int64_t e) const { return static_cast<const T*>(a.dx ? a.dx : a.dresidual) + e; }

  NK_INLINE Pack<A> of(Pack<A> d, Pack<A> dz, Pack<A> scale) const {
    return fma(d * rstd, slope, fma(dz, scale, offset));
  }

  template <class Stream>
  NK_INLINE void write(int64_t e, int64_t n, Pack<A> d, Pack<A> dz, Pack<A> scale, Stream stream) const {
    if (kTail != Tail::none && a.dresidual) put(static_cast<T*>(a.dresidual) + e, dz, n, stream);
    if (kTail == Tail::none || a.dx)
      put(static_cast<T*>(a.dx) + e, past<kTail, T>(a, e, n, of(d, dz, scale)), n, stream);
  }
};

template <Tail kTail, class T, class A>
__attribute__((noinline)) void slope_pieces(const Elements<A>& elements, Center<A> center, Slope<A> slopes,
                                            const Pieces p) {
  const Elements<A> a = elements;
  for (int64_t piece = 0; piece < p.count; ++piece) {
    const int64_t e = p.e + piece * p.n, run = p.run + piece * p.step, entry = p.entry + piece;
    const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
    const Through<kTail, T, A> through(a, center, slopes, run);
    const A factor = center.rstd[run] * a.weight[entry];
    const Pack<A> scale = fill(factor), shift = fill(a.bias[entry] - center.low[run] * factor);
    for_packs<kPaired<T> && kTail == Tail::none>(
        through.to(e), p.n, a.stream,
        [&](int64_t i, int64_t m, auto stream) NK_INLINED {
          fetch_run(x + i, a.ahead, stream);
          fetch_run(dy + i, a.ahead, stream);
          const Pack<A> d = load_some<A>(x + i, m) - through.mean;
          const Pack<A> dz = dz_again<kTail, T>(a, e + i, p.place + piece * p.n + i, m,
                                                [&]() NK_INLINED { return fma(d, scale, shift); });
          through.write(e + i, m, d, dz, scale, stream);
        },
        [&](int64_t i, auto stream) NK_INLINED {
          fetch_run(x + i, a.ahead, stream);
          fetch_run(dy + i, a.ahead, stream);
          const Pair<A> xs = load_pair<A>(x + i), dz = load_pair<A>(dy + i);
          put_pair(static_cast<T*>(a.dx) + e + i,
                   {through.of(xs.a - through.mean, dz.a, scale), through.of(xs.b - through.mean, dz.b, scale)},
                   stream);
        });
  }
}

template <class T, class A>
__attribute__((noinline)) void slope_paired_rows(const Elements<A>& elements, const Runs& r, const Lookup& l,
                                                 Center<A> center, Slope<A> slopes) {
  const Elements<A> a = elements;
  const int64_t entry = first_entry(r, l);
  PairedColumns<A, 1> weight;
  for (int64_t from = 0; from < r.length; from += weight.kMost) {
    const int64_t n = r.length - from < weight.kMost ? r.length - from : weight.kMost;
    weight.set(0, a.weight + entry + from, n);
    for (int64_t run = 0; run < r.count; ++run) {
      const int64_t e = r.first + run * r.pitch + from;
      const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
      T* dx = static_cast<T*>(a.dx) + e;
      const Through<Tail::none, T, A> through(a, center, slopes, run);
      const auto of = [&](int64_t j, Pack<A> v, Pack<A> dz) NK_INLINED {
        return through.of(v - through.mean, dz, load<A>(weight.at[0] + j) * through.rstd);
      };
      for_pairs(dx, n, a.stream, [&](int64_t j, auto streamed) NK_INLINED {
        fetch(x + j, a.ahead, streamed);
        fetch(dy + j, a.ahead, streamed);
        const Pair<A> xs = load_pair<A>(x + j), dz = load_pair<A>(dy + j);
        put_pair(dx + j, {of(j, xs.a, dz.a), of(j + kLanes, xs.b, dz.b)}, streamed);
      });
    }
  }
}

template <class T, class A>
void slope_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center, Slope<A> slopes) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    if constexpr (kPaired<T> && kTail == Tail::none)
      if (rows_of_weights(r, lookup) && pairs_pay(r.count, r.length))
        return slope_paired_rows<T>(a, r, lookup, center, slopes);
    for_pieces(r, lookup, [&](const Pieces& p) NK_INLINED {
      if (!lookup.by_element) return slope_pieces<kTail, T>(a, center, slopes, p);
      const T *x = static_cast<const T*>(a.x) + p.e, *dy = static_cast<const T*>(a.dy) + p.e;
      const Through<kTail, T, A> through(a, center, slopes, p.run);
      const auto xhat = Normalize<A>::of(center, p.run);
      const A *weight = a.weight + p.entry, *bias = a.bias + p.entry;
      for_packs(through.to(p.e), p.n, a.stream, [&](int64_t i, int64_t m, auto stream) NK_INLINED {
        fetch_run(x + i, a.ahead, stream);
        fetch_run(dy + i, a.ahead, stream);
        const Pack<A> xs = load_some<A>(x + i, m), w = load_some<A>(weight + i, m);
        const Pack<A> dz = dz_again<kTail, T>(a, p.e + i, p.place + i, m,
                                              [&]() NK_INLINED { return fma(xhat(xs), w, load_some<A>(bias + i, m)); });
        through.write(p.e + i, m, xs - through.mean, dz, w * through.rstd, stream);
      });
    });
  });
  if (a.stream) end_stream();
}

template <class T, class A>
__attribute__((noinline)) void slope_paired_columns(const Elements<A>& elements, const Columns& c, Center<A> center,
                                                    Slope<A> slopes) {
  const Elements<A> a = elements;
  PairedColumns<A, 5> p;
  for (int64_t from = 0; from < c.width; from += p.kMost) {
    const int64_t n = c.width - from < p.kMost ? c.width - from : p.kMost;
    p.set(0, center.mean + from, n);
    p.set(1, center.rstd + from, n);
    p.set(2, slopes.slope + from, n);
    p.set(3, center.scale + from, n);
    p.set(4, slopes.offset + from, n);
    const auto of = [&](int64_t j, Pack<A> x, Pack<A> dz) NK_INLINED {
      const Pack<A> xhat = (x - load<A>(p.at[0] + j)) * load<A>(p.at[1] + j);
      return fma(xhat, load<A>(p.at[2] + j), fma(dz, load<A>(p.at[3] + j), load<A>(p.at[4] + j)));
    };
    for_lines(c, [&](int64_t, int64_t line, int64_t) NK_INLINED {
      const int64_t e = line + from;
      const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
      T* dx = static_cast<T*>(a.dx) + e;
      for_pairs(dx, n, a.stream, [&](int64_t j, auto streamed) NK_INLINED {
        fetch(x + j, 0, streamed);
        fetch(dy + j, 0, streamed);
        const Pair<A> xs = load_pair<A>(x + j), dz = load_pair<A>(dy + j);
        put_pair(dx + j, {of(j, xs.a, dz.a), of(j + kLanes, xs.b, dz.b)}, streamed);
      });
    });
  }
}

template <class T, class A>
void slope_columns(const Elements<A>& elements, const Columns& c, Center<A> center, Slope<A> slopes) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    if constexpr (kPaired<T> && kTail == Tail::none)
      if (!a.by_line && c.tail == 0 && pairs_pay(c.lines, c.width))
        return slope_paired_columns<T>(a, c, center, slopes);
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
constexpr Kernels<A> kKernels = {int64_t(kLanes * sizeof(T)),
                                 moments_runs<T, A>,
                                 moments_runs<T, double>,
                                 moments_columns<T, A>,
                                 moments_columns<T, double>,
                                 centers_of_sums,
                                 centers_of_moments,
                                 slopes_of_sums,
                                 add_runs<T, A>,
                                 map_runs<T, A>,
                                 map_columns<T, A>,
                                 sums_runs<T, A>,
                                 sums_columns<T, A>,
                                 slope_runs<T, A>,
                                 slope_columns<T, A>};

}  // namespace

extern const KernelTable kTable = {kKernels<double, double>,
                                   kKernels<float, float>,
                                   kKernels<f16, float>,
                                   kKernels<bf16, float>,
                                   read_floats,
                                   write_doubles};

}  // namespace normkern::cpu::NK_ISA
