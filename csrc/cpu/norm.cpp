// norm.cpp: the loops over elements. Compiled once per instruction set, with NK_ISA naming the namespace.
//
// Everything here is internal but kTable: an inline function that two of these objects share could be linked from the
// wrong one (cmake checks that none is left). So no standard library, and of core only plain data.
//
// Moments are sums of x - shift and (x - shift)^2 in float64, where shift is itself one of the n values. Then
// (shift - mean)^2 <= n * var: taking n * (mean - shift)^2 off again magnifies the rounding of the sums by 1 + n at
// most, and that only where the first value is the outlier. Callers keep n at a few thousand and merge the rest as
// Spreads. Equal values leave both sums at exactly 0.
#include "activate.h"
#include "kernels.h"

namespace normkern::cpu::NK_ISA {
namespace {

template <class T>
constexpr bool kIsDouble = false;
template <>
constexpr bool kIsDouble<double> = true;

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
      if (++row == lookup.rows) {
        row = 0;
        base += lookup.by_element ? lookup.length : lookup.runs;
      }
    }
    entry = base + run;
  }
};

// Calls body(e, n, run, entry) for the pieces of the runs that share an entry or have consecutive ones.
template <class Body>
NK_INLINE void for_pieces(const Runs& r, const Lookup& lookup, Body body) {
  Cursor cursor(lookup);
  for (int64_t line = 0; line < r.lines; ++line) {
    for (int64_t run = 0; run < r.count; ++run) {
      int64_t e = r.first + line * r.stride + run * r.length;
      const int64_t end = e + r.length;
      cursor.seek(e);
      while (e < end) {
        const int64_t n = cursor.left < end - e ? cursor.left : end - e;
        body(e, n, run, cursor.entry);
        cursor.advance(n);
        e += n;
      }
    }
  }
}

// Calls step(i, pack length) over [0, n) in packs. The last pack may overlap the one before, so a step must only
// depend on its elements; ranges shorter than a pack come as one partial pack.
template <class Step>
NK_INLINE void for_packs(int64_t n, Step step) {
  if (n < kLanes) return step(0, n);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, int64_t(kLanes));
  if (i < n) step(n - kLanes, int64_t(kLanes));
}

template <class A, class T>
NK_INLINE Pack<A> load_some(const T* p, int64_t n) {
  return n == kLanes ? load<A>(p) : load<A>(p, n);
}

template <class T, class A>
NK_INLINE void store_some(T* p, Pack<A> v, int64_t n) {
  n == kLanes ? store(p, v) : store(p, v, n);
}

// Activations of everything but float64 are evaluated in float32.
template <class T>
struct Activation {
  using Type = float;
};
template <>
struct Activation<double> {
  using Type = double;
};
template <class T>
using ActivationType = typename Activation<T>::Type;

template <class T, class A>
NK_INLINE Pack<A> activated(Act act, Pack<A> z) {
  using F = ActivationType<T>;
  return convert<A>(activate(act, convert<F>(z)));
}

template <class T, class A>
NK_INLINE Pack<A> slope_at(Act act, Pack<A> z) {
  using F = ActivationType<T>;
  return convert<A>(activate_slope(act, convert<F>(z)));
}

// ---- moments ----

template <class T>
void moments_runs(const void* data, const Runs& r, bool centered, ShiftedSums s) {
  const T* x = static_cast<const T*>(data);
  for (int64_t line = 0; line < r.lines; ++line) {
    for (int64_t run = 0; run < r.count; ++run) {
      const T* p = x + r.first + line * r.stride + run * r.length;
      if (line == 0) {
        s.shift[run] = centered ? value(p) : 0;
        s.sum[run] = s.squares[run] = 0;
      }
      const double shift = s.shift[run];
      const Doubles from = fill(shift);
      // Two packs at a time, for two independent chains of additions.
      Doubles sum0 = fill(0.0), sum1 = sum0, squares0 = sum0, squares1 = sum0;
      int64_t i = 0;
      for (; i + 2 * kLanes <= r.length; i += 2 * kLanes) {
        const Doubles a = load<double>(p + i) - from, b = load<double>(p + i + kLanes) - from;
        sum0 = sum0 + a;
        squares0 = squares0 + a * a;
        sum1 = sum1 + b;
        squares1 = squares1 + b * b;
      }
      if (i + kLanes <= r.length) {
        const Doubles a = load<double>(p + i) - from;
        sum0 = sum0 + a;
        squares0 = squares0 + a * a;
        i += kLanes;
      }
      double sum = total(sum0 + sum1), squares = total(squares0 + squares1);
      if (i < r.length) {
        double rest[kLanes];
        store(rest, load<double>(p + i, r.length - i) - from);
        for (int64_t j = 0; j < r.length - i; ++j) {
          sum += rest[j];
          squares += rest[j] * rest[j];
        }
      }
      s.sum[run] += sum;
      s.squares[run] += squares;
    }
  }
}

// Calls step(j, n, e, lines) for a strip of columns, where `lines` elements lie c.stride apart from e on, a few lines
// at a time: what a step keeps per column is then loaded and stored once for all of them.
template <int kStep, class Step>
NK_INLINE void for_strips(const Columns& c, Step step) {
  for (int64_t line = 0; line < c.lines; line += kStep) {
    const int64_t lines = c.lines - line < kStep ? c.lines - line : kStep, e = c.first + line * c.stride;
    for (int64_t j = 0; j < c.width; j += kLanes)
      step(j, c.width - j < kLanes ? c.width - j : int64_t(kLanes), e + j, lines);
  }
  for (int64_t j = 0; j < c.tail; j += kLanes)
    step(j, c.tail - j < kLanes ? c.tail - j : int64_t(kLanes), c.first + c.lines * c.stride + j, int64_t(1));
}

template <class T>
void moments_columns(const void* data, const Columns& c, bool centered, int64_t cols, int64_t period, ShiftedSums s) {
  const T* x = static_cast<const T*>(data);
  for (int64_t j = 0, in_group = 0, group = 0; j < c.width; ++j) {
    s.shift[j] = centered ? value(x + c.first + group) : 0;
    s.sum[j] = s.squares[j] = 0;
    if (++in_group == cols) {
      in_group = 0;
      group = group + cols == period ? 0 : group + cols;
    }
  }
  for_strips<8>(c, [&](int64_t j, int64_t n, int64_t e, int64_t lines) NK_INLINED {
    const Doubles shift = load_some<double>(s.shift + j, n);
    Doubles sum = fill(0.0), squares = sum;
    for (int64_t line = 0; line < lines; ++line) {
      const Doubles d = load_some<double>(x + e + line * c.stride, n) - shift;
      sum = sum + d;
      squares = squares + d * d;
    }
    store_some(s.sum + j, load_some<double>(s.sum + j, n) + sum, n);
    store_some(s.squares + j, load_some<double>(s.squares + j, n) + squares, n);
  });
}

// ---- what one element needs, for a pack of them ----

// Mean and rstd of a pack: the same for all lanes, or of consecutive columns.
template <class A>
struct CenterPack {
  Pack<A> mean, low, rstd;

  static NK_INLINE CenterPack of(Center<A> c, int64_t entry) {
    CenterPack r{fill(c.mean[entry]), fill(A(0)), fill(c.rstd[entry])};
    if constexpr (!kIsDouble<A>) r.low = fill(c.low[entry]);
    return r;
  }
  static NK_INLINE CenterPack columns(Center<A> c, int64_t j, int64_t n) {
    CenterPack r{load_some<A>(c.mean + j, n), fill(A(0)), load_some<A>(c.rstd + j, n)};
    if constexpr (!kIsDouble<A>) r.low = load_some<A>(c.low + j, n);
    return r;
  }
  NK_INLINE Pack<A> xhat(Pack<A> x) const {
    if constexpr (kIsDouble<A>) return (x - mean) * rstd;
    return ((x - mean) - low) * rstd;
  }
};

template <class T, class A>
NK_INLINE void map_pack(const Elements<A>& a, int64_t e, int64_t n, const CenterPack<A>& c, Pack<A> weight,
                        Pack<A> bias) {
  Pack<A> z = c.xhat(load_some<A>(static_cast<const T*>(a.x) + e, n)) * weight + bias;
  if (a.residual) z = z + load_some<A>(static_cast<const T*>(a.residual) + e, n);
  if (a.act != Act::none) z = activated<T>(a.act, z);
  store_some(static_cast<T*>(a.y) + e, z, n);
}

// dz: the gradient of what enters the activation.
template <class T, class A>
NK_INLINE Pack<A> dz_pack(const Elements<A>& a, int64_t e, int64_t n, Pack<A> xhat, Pack<A> weight, const A* bias) {
  Pack<A> dz = load_some<A>(static_cast<const T*>(a.dy) + e, n);
  if (a.act == Act::none) return dz;
  Pack<A> z = xhat * weight + load_some<A>(bias, n);
  if (a.residual) z = z + load_some<A>(static_cast<const T*>(a.residual) + e, n);
  return dz * slope_at<T>(a.act, z);
}

// Every function copies its Elements: the compiler then knows that no store changes them.

// ---- forward ----

template <class T, class A>
void map_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center) {
  const Elements<A> a = elements;
  for_pieces(r, lookup, [&](int64_t e, int64_t n, int64_t run, int64_t entry) NK_INLINED {
    const auto c = CenterPack<A>::of(center, run);
    if (lookup.by_element) {
      const A *weight = a.weight + entry, *bias = a.bias + entry;
      for_packs(n, [&](int64_t i, int64_t m) NK_INLINED {
        map_pack<T>(a, e + i, m, c, load_some<A>(weight + i, m), load_some<A>(bias + i, m));
      });
    } else {
      const Pack<A> weight = fill(a.weight[entry]), bias = fill(a.bias[entry]);
      for_packs(n, [&](int64_t i, int64_t m) NK_INLINED { map_pack<T>(a, e + i, m, c, weight, bias); });
    }
  });
}

template <class T, class A>
void map_columns(const Elements<A>& elements, const Columns& c, Center<A> center) {
  const Elements<A> a = elements;
  for (int64_t line = 0; line <= c.lines; ++line) {
    const int64_t e = c.first + line * c.stride;
    if (a.by_line) {
      if (line == c.lines) return;  // such lines have no tail
      const Pack<A> weight = fill(a.weight[line]), bias = fill(a.bias[line]);
      for_packs(c.width, [&](int64_t j, int64_t n) NK_INLINED {
        map_pack<T>(a, e + j, n, CenterPack<A>::columns(center, j, n), weight, bias);
      });
      continue;
    }
    for_packs(line < c.lines ? c.width : c.tail, [&](int64_t j, int64_t n) NK_INLINED {
      map_pack<T>(a, e + j, n, CenterPack<A>::columns(center, j, n), load_some<A>(a.weight + j, n),
                  load_some<A>(a.bias + j, n));
    });
  }
}

// ---- backward ----

template <class T, class A>
void sums_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center, BackwardSums s) {
  const Elements<A> a = elements;
  for_pieces(r, lookup, [&](int64_t e, int64_t n, int64_t run, int64_t entry) NK_INLINED {
    const auto c = CenterPack<A>::of(center, run);
    const T* x = static_cast<const T*>(a.x) + e;
    Doubles sum = fill(0.0), sum_xhat = sum;
    if (lookup.by_element) {
      const A *weight = a.weight + entry, *bias = a.bias + entry;
      double* dbias = s.dweight ? s.dbias + (entry - s.origin) : nullptr;
      double* dweight = s.dweight ? s.dweight + (entry - s.origin) : nullptr;
      const auto step = [&](int64_t i, int64_t m) NK_INLINED {
        const Pack<A> xhat = c.xhat(load_some<A>(x + i, m)), w = load_some<A>(weight + i, m);
        const Pack<A> dz = dz_pack<T>(a, e + i, m, xhat, w, bias + i), g = dz * w;
        if (s.dweight) {
          const Doubles wide = convert<double>(dz);
          store_some(dbias + i, load_some<double>(dbias + i, m) + wide, m);
          store_some(dweight + i, load_some<double>(dweight + i, m) + wide * convert<double>(xhat), m);
        }
        const Doubles wide = convert<double>(g);
        sum = sum + wide;
        sum_xhat = sum_xhat + wide * convert<double>(xhat);
      };
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) step(i, int64_t(kLanes));
      if (i < n) step(i, n - i);
      if (s.g) {
        s.g[run] += total(sum);
        s.g_xhat[run] += total(sum_xhat);
      }
    } else {
      const Pack<A> weight = fill(a.weight[entry]);
      A bias[kLanes];
      store(bias, fill(a.bias[entry]));
      const auto step = [&](int64_t i, int64_t m) NK_INLINED {
        const Pack<A> xhat = c.xhat(load_some<A>(x + i, m));
        const Doubles dz = convert<double>(dz_pack<T>(a, e + i, m, xhat, weight, bias));
        sum = sum + dz;
        sum_xhat = sum_xhat + dz * convert<double>(xhat);
      };
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) step(i, int64_t(kLanes));
      if (i < n) step(i, n - i);
      const double all = total(sum), all_xhat = total(sum_xhat), w = a.weight[entry];
      if (s.g) {
        s.g[run] += w * all;
        s.g_xhat[run] += w * all_xhat;
      }
      if (s.dweight) {
        s.dbias[entry - s.origin] += all;
        s.dweight[entry - s.origin] += all_xhat;
      }
    }
  });
}

template <class T, class A>
void sums_lines(const Elements<A>& elements, const Columns& c, Center<A> center, BackwardSums s) {
  const Elements<A> a = elements;
  for (int64_t line = 0; line < c.lines; ++line) {
    const Pack<A> weight = fill(a.weight[line]);
    A bias[kLanes];
    store(bias, fill(a.bias[line]));
    Doubles all = fill(0.0), all_xhat = all;
    for (int64_t j = 0; j < c.width; j += kLanes) {
      const int64_t n = c.width - j < kLanes ? c.width - j : int64_t(kLanes), e = c.first + line * c.stride + j;
      const Pack<A> xhat = CenterPack<A>::columns(center, j, n).xhat(load_some<A>(static_cast<const T*>(a.x) + e, n));
      const Pack<A> dz = dz_pack<T>(a, e, n, xhat, weight, bias);
      const Doubles wide = convert<double>(dz), wide_xhat = convert<double>(xhat), g = convert<double>(dz * weight);
      all = all + wide;
      all_xhat = all_xhat + wide * wide_xhat;
      store_some(s.g + j, load_some<double>(s.g + j, n) + g, n);
      store_some(s.g_xhat + j, load_some<double>(s.g_xhat + j, n) + g * wide_xhat, n);
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
  for_strips<4>(c, [&](int64_t j, int64_t n, int64_t e, int64_t lines) NK_INLINED {
    const auto pack = CenterPack<A>::columns(center, j, n);
    const Pack<A> weight = load_some<A>(a.weight + j, n);
    Doubles sum = fill(0.0), sum_xhat = sum;
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t at = e + line * c.stride;
      const Pack<A> xhat = pack.xhat(load_some<A>(static_cast<const T*>(a.x) + at, n));
      const Doubles dz = convert<double>(dz_pack<T>(a, at, n, xhat, weight, a.bias + j));
      sum = sum + dz;
      sum_xhat = sum_xhat + dz * convert<double>(xhat);
    }
    store_some(s.g + j, load_some<double>(s.g + j, n) + sum, n);
    store_some(s.g_xhat + j, load_some<double>(s.g_xhat + j, n) + sum_xhat, n);
  });
}

template <class T, class A>
NK_INLINE void slope_pack(const Elements<A>& a, int64_t e, int64_t n, const CenterPack<A>& c, Pack<A> weight,
                          const A* bias, Pack<A> mean_g, Pack<A> mean_g_xhat) {
  const Pack<A> xhat = c.xhat(load_some<A>(static_cast<const T*>(a.x) + e, n));
  const Pack<A> dz = dz_pack<T>(a, e, n, xhat, weight, bias);
  if (a.dresidual) store_some(static_cast<T*>(a.dresidual) + e, dz, n);
  if (a.dx) store_some(static_cast<T*>(a.dx) + e, ((dz * weight - mean_g) - xhat * mean_g_xhat) * c.rstd, n);
}

template <class T, class A>
void slope_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center, Slope<A> slope) {
  const Elements<A> a = elements;
  for_pieces(r, lookup, [&](int64_t e, int64_t n, int64_t run, int64_t entry) NK_INLINED {
    const auto c = CenterPack<A>::of(center, run);
    const Pack<A> mean_g = fill(slope.mean_g[run]), mean_g_xhat = fill(slope.mean_g_xhat[run]);
    if (lookup.by_element) {
      const A *weight = a.weight + entry, *bias = a.bias + entry;
      for_packs(n, [&](int64_t i, int64_t m) NK_INLINED {
        slope_pack<T>(a, e + i, m, c, load_some<A>(weight + i, m), bias + i, mean_g, mean_g_xhat);
      });
    } else {
      const Pack<A> weight = fill(a.weight[entry]);
      A bias[kLanes];
      store(bias, fill(a.bias[entry]));
      for_packs(n, [&](int64_t i, int64_t m)
                       NK_INLINED { slope_pack<T>(a, e + i, m, c, weight, bias, mean_g, mean_g_xhat); });
    }
  });
}

template <class T, class A>
void slope_columns(const Elements<A>& elements, const Columns& c, Center<A> center, Slope<A> slope) {
  const Elements<A> a = elements;
  for (int64_t line = 0; line <= c.lines; ++line) {
    const int64_t e = c.first + line * c.stride;
    if (a.by_line) {
      if (line == c.lines) return;
      const Pack<A> weight = fill(a.weight[line]);
      A bias[kLanes];
      store(bias, fill(a.bias[line]));
      for_packs(c.width, [&](int64_t j, int64_t n) NK_INLINED {
        slope_pack<T>(a, e + j, n, CenterPack<A>::columns(center, j, n), weight, bias,
                      load_some<A>(slope.mean_g + j, n), load_some<A>(slope.mean_g_xhat + j, n));
      });
      continue;
    }
    for_packs(line < c.lines ? c.width : c.tail, [&](int64_t j, int64_t n) NK_INLINED {
      slope_pack<T>(a, e + j, n, CenterPack<A>::columns(center, j, n), load_some<A>(a.weight + j, n), a.bias + j,
                    load_some<A>(slope.mean_g + j, n), load_some<A>(slope.mean_g_xhat + j, n));
    });
  }
}

template <class T, class A>
constexpr Kernels<A> kKernels = {moments_runs<T>, moments_columns<T>, map_runs<T, A>,   map_columns<T, A>,
                                 sums_runs<T, A>, sums_columns<T, A>, slope_runs<T, A>, slope_columns<T, A>};

}  // namespace

extern const KernelTable kTable = {kKernels<double, double>, kKernels<float, double>, kKernels<f16, float>,
                                   kKernels<bf16, float>};

}  // namespace normkern::cpu::NK_ISA
