// gradient_sums.h: the sums of dz and of dz*xhat that dx and the gradients of weights are made of. Included by norm.cpp
// alone.
#pragma once

#include "elements.h"
#include "packs.h"
#include "sums.h"

namespace normkern::cpu::NK_ISA {
namespace {

// Sums of dz and of dz*(x - mean)*rstd.
using TwoSums = Vector<double, 2>;

// What becomes of dx while the sums are made.
enum class Dx { none, stored, streamed };

template <Dx kDx>
struct DxOf {
  static constexpr Dx value = kDx;
};

// Calls sum(dx) with the Dx of the elements as a constant.
template <Tail kTail, class A, class Sum>
NK_INLINE void with_dx(const Elements<A>& a, Sum sum) {
  if constexpr (kTail != Tail::any) {
    if (a.in_sums && a.stream) return sum(DxOf<Dx::streamed>());
    if (a.in_sums) return sum(DxOf<Dx::stored>());
  }
  sum(DxOf<Dx::none>());
}

// Of a piece with one weight.
template <Tail kTail, Dx kDx, class T, class A>
NK_INLINE TwoSums sum_piece(const Elements<A>& a, Center<A> center, int64_t e, int64_t n, int64_t run, int64_t entry,
                            int64_t place) {
  const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
  T* dx = static_cast<T*>(a.dx) + e;
  const A factor = center.rstd[run] * a.weight[entry];
  const Pack<A> mean = fill(center.mean[run]), rstd = fill(center.rstd[run]), scale = fill(factor),
                shift = fill(a.bias[entry] - center.low[run] * factor);
  using Streamed = typename YesIf<kDx == Dx::streamed>::type;
  const auto add = [&](Pack<A> xhat, Pack<A> dz, Pack<A>* to) NK_INLINED {
    to[0] = to[0] + dz;
    to[1] = fma(dz, xhat, to[1]);
  };
  const auto use = [&](Pack<A> xs, Pack<A> dz, Pack<A>* to) NK_INLINED { add((xs - mean) * rstd, dz, to); };
  TwoSums all{};
  for (int64_t start = 0; start < n; start += kBlock<A>) {
    const T *from = x + start, *dfrom = dy + start;
    Pack<A> sums[2] = {fill(A(0)), fill(A(0))};
    const auto dz_at = [&](int64_t i, int64_t m, Pack<A> xs, auto streamed) NK_INLINED {
      const Pack<A> dz = dz_of<kTail, T>(a, e + start + i, m, load_some<A>(dfrom + i, m),
                                         [&]() NK_INLINED { return fma(xs - mean, scale, shift); });
      if constexpr (kDx != Dx::none) put(dx + start + i, dz * scale, m, streamed);
      return keep<kTail>(a, place + start + i, m, dz);
    };
    const auto fetch_both = [&](int64_t i) NK_INLINED {
      if constexpr (kDx != Dx::none) {
        fetch_run(from + i, 0, Streamed());
        fetch_run(dfrom + i, 0, Streamed());
      }
    };
    const auto step = [&](int64_t i, Pack<A>* to) NK_INLINED {
      fetch_both(i);
      const Pack<A> xs = load<A>(from + i);
      use(xs, dz_at(i, kLanes, xs, Streamed()), to);
    };
    add_block<A, 2>(
        n - start < kBlock<A> ? n - start : kBlock<A>, sums,
        [&](int64_t i, Pack<A>* to, Pack<A>* other) NK_INLINED {
          if constexpr (kTail == Tail::none && (kDx == Dx::none || kPaired<T>)) {
            fetch_both(i);
            const Pair<A> xs = load_pair<A>(from + i), dz = load_pair<A>(dfrom + i);
            if constexpr (kDx != Dx::none) put_pair(dx + start + i, {dz.a * scale, dz.b * scale}, Streamed());
            use(xs.a, dz.a, to);
            use(xs.b, dz.b, other);
          } else {
            step(i, to);
            step(i + kLanes, other);
          }
        },
        step,
        [&](int64_t m, int64_t left, Pack<A>* to) NK_INLINED {
          const LastPack last = last_pack(start + m, start + m - left);
          const Pack<A> xs = load_some<A>(x + last.from, last.count);
          const Pack<A> dz = dz_at(last.from - start, last.count, xs, No());
          add(last_lanes((xs - mean) * rstd, last.left), last_lanes(dz, last.left), to);
        });
    all += totals(sums[0], sums[1]);
  }
  return all;
}

// Of every piece. A call of its own: short pieces are mostly what surrounds their few packs, and inlined that goes
// through memory.
template <Tail kTail, Dx kDx, class T, class A>
__attribute__((noinline)) void sum_pieces(const Elements<A>& elements, Center<A> center, const Pieces p, TwoSums* to) {
  const Elements<A> a = elements;
  for (int64_t i = 0; i < p.count; ++i)
    to[i] = sum_piece<kTail, kDx, T>(a, center, p.e + i * p.n, p.n, p.run + i * p.step, p.entry + i, p.place + i * p.n);
}

// Of these rows the sums over weights stay in A, a part of their columns at a time.
constexpr int kBand = kTerms;
constexpr int64_t kBandColumns = 2 * kTerms * kLanes;

template <class A>
struct Band {
  A dbias[kBandColumns + kLanes], dweight[kBandColumns + kLanes];
};

template <class A>
struct Row {
  Normalize<A> normalize;
  Pack<A> g, g_xhat;
};

// The sums of kRows runs that lie `pitch` apart and have the same weights, element by element: at most kBandColumns of
// them. Those over weights go on in `band` from row to row, and to float64 with the last.
template <int kRows, Tail kTail, class T, class A>
NK_INLINE void sum_rows(const Elements<A>& a, Center<A> center, int64_t e, int64_t pitch, int64_t n, int64_t run,
                        int64_t entry, int64_t place, int64_t place_pitch, bool first, bool last, Band<A>& band,
                        const BackwardSums& s) {
  const T *x = static_cast<const T*>(a.x) + e, *dy = static_cast<const T*>(a.dy) + e;
  const A *weight = a.weight + entry, *bias = a.bias + entry;
  Row<A> one{Normalize<A>::of(center, run), {}, {}}, two{Normalize<A>::of(center, run + kRows - 1), {}, {}};
  const auto loop = [&](auto put) NK_INLINED {
    // The m elements at i, of which with `part` only the last `left` count.
    const auto step = [&](int64_t i, int64_t m, int64_t left, auto part) NK_INLINED {
      const Pack<A> w = load_some<A>(weight + i, m);
      const auto dz_and_xhat = [&](Row<A>& row, int64_t k, Pack<A>& xhat) NK_INLINED {
        xhat = row.normalize(load_some<A>(x + k * pitch + i, m));
        Pack<A> dz = dz_of<kTail, T>(a, e + k * pitch + i, m, load_some<A>(dy + k * pitch + i, m),
                                     [&]() NK_INLINED { return fma(xhat, w, load_some<A>(bias + i, m)); });
        keep<kTail>(a, place + k * place_pitch + i, m, dz);
        Pack<A> scaled = dz * w;
        if constexpr (decltype(part)::value) {
          dz = last_lanes(dz, left);
          xhat = last_lanes(xhat, left);
          scaled = last_lanes(scaled, left);
        }
        row.g = row.g + scaled;
        row.g_xhat = fma(scaled, xhat, row.g_xhat);
        return dz;
      };
      Pack<A> xhat;
      Pack<A> sum = dz_and_xhat(one, 0, xhat), sum_xhat = sum * xhat;
      if constexpr (kRows == 2) {
        const Pack<A> dz = dz_and_xhat(two, 1, xhat);
        sum = sum + dz;
        sum_xhat = fma(dz, xhat, sum_xhat);
      }
      put(i, m, left, sum, sum_xhat, part);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) step(i, kLanes, kLanes, No());
    if (i == n) return;
    const LastPack rest = last_pack(n, i);
    step(rest.from, rest.count, rest.left, Yes());
  };
  if (!s.dweight) {
    loop([](int64_t, int64_t, int64_t, Pack<A>, Pack<A>, auto) NK_INLINED {});
  } else if (!last) {
    loop([&](int64_t i, int64_t, int64_t, Pack<A> sum, Pack<A> sum_xhat, auto part) NK_INLINED {
      const bool add = decltype(part)::value || !first;  // before a part lies what this row has put already
      store(band.dbias + i, add ? sum + load<A>(band.dbias + i) : sum);
      store(band.dweight + i, add ? sum_xhat + load<A>(band.dweight + i) : sum_xhat);
    });
  } else {
    double *dbias = s.dbias + (entry - s.origin), *dweight = s.dweight + (entry - s.origin);
    const auto add = [&](const A* so_far, double* to, int64_t i, int64_t m, int64_t left, Pack<A> sum, auto part)
                         NK_INLINED {
                           const Pack<A> before = load<A>(so_far + i);
                           if (!first) sum = sum + (decltype(part)::value ? last_lanes(before, left) : before);
                           store_some(to + i, load_some<double>(to + i, m) + convert<double>(sum), m);
                         };
    loop([&](int64_t i, int64_t m, int64_t left, Pack<A> sum, Pack<A> sum_xhat, auto part) NK_INLINED {
      add(band.dbias, dbias, i, m, left, sum, part);
      add(band.dweight, dweight, i, m, left, sum_xhat, part);
    });
  }
  const auto put_sums = [&](const Row<A>& row, int64_t k) NK_INLINED {
    const auto all = totals(row.g, row.g_xhat);
    s.g[k] += all[0];
    s.g_xhat[k] += all[1];
  };
  if (s.g) {
    put_sums(one, run);
    if constexpr (kRows == 2) put_sums(two, run + 1);
  }
}

// The same of `rows` <= kBand runs of n elements.
template <Tail kTail, class T, class A>
NK_INLINE void sum_band(const Elements<A>& a, Center<A> center, int64_t e, int64_t pitch, int64_t n, int64_t rows,
                        int64_t run, int64_t entry, int64_t place, const BackwardSums& s) {
  Band<A> band;
  for (int64_t start = 0; start < n; start += kBandColumns) {
    const int64_t m = n - start < kBandColumns ? n - start : kBandColumns, part = m / kLanes * kLanes;
    if (part < m) {
      store(band.dbias + part, fill(A(0)));
      store(band.dweight + part, fill(A(0)));
    }
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2)
      sum_rows<2, kTail, T>(a, center, e + row * pitch + start, pitch, m, run + row, entry + start,
                            place + row * n + start, n, row == 0, row + 2 == rows, band, s);
    if (row < rows)
      sum_rows<1, kTail, T>(a, center, e + row * pitch + start, pitch, m, run + row, entry + start,
                            place + row * n + start, n, row == 0, true, band, s);
  }
}

template <class T, class A>
void sums_runs(const Elements<A>& elements, const Runs& r, const Lookup& lookup, Center<A> center, BackwardSums s) {
  const Elements<A> a = elements;
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    if (!lookup.by_element) {
      for_pieces(r, lookup, [&](const Pieces& p) NK_INLINED {
        TwoSums found[kStrip];
        with_dx<kTail>(a, [&](auto dx) NK_INLINED { sum_pieces<kTail, decltype(dx)::value, T>(a, center, p, found); });
        double g = 0, g_xhat = 0;
        for (int64_t i = 0; i < p.count; ++i) {
          const int64_t run = p.run + i * p.step, entry = p.entry + i;
          const double w = a.weight[entry], sum = found[i][0];
          const double sum_xhat = found[i][1] - double(center.low[run]) * double(center.rstd[run]) * sum;
          g += w * sum;
          g_xhat += w * sum_xhat;
          if (s.g && (p.step || i + 1 == p.count)) {
            s.g[run] += g;
            s.g_xhat[run] += g_xhat;
            g = g_xhat = 0;
          }
          if (s.dweight) {
            s.dbias[entry - s.origin] += sum;
            s.dweight[entry - s.origin] += sum_xhat;
          }
        }
      });
      if (a.in_sums && a.stream) end_stream();
      return;
    }
    Cursor cursor(lookup);
    for (int64_t line = 0; line < r.lines; ++line) {
      for (int64_t run = 0; run < r.count;) {
        int64_t e = r.first + line * r.stride + run * r.pitch, place = (line * r.count + run) * r.length;
        cursor.seek(e);
        if (r.pitch == lookup.length && cursor.left >= r.length) {
          int64_t rows = lookup.rows - cursor.row;
          if (rows > r.count - run) rows = r.count - run;
          if (rows > kBand) rows = kBand;
          sum_band<kTail, T>(a, center, e, r.pitch, r.length, rows, run, cursor.entry, place, s);
          cursor.next_rows(rows);
          cursor.at += rows * r.pitch;
          run += rows;
          continue;
        }
        for (const int64_t end = e + r.length; e < end;) {
          const int64_t n = cursor.left < end - e ? cursor.left : end - e;
          sum_band<kTail, T>(a, center, e, 0, n, 1, run, cursor.entry, place, s);
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

// Strip by strip; of bfloat16 two packs of columns at a time, in the order of pairs. dx too, as kDx says.
template <Tail kTail, Dx kDx, class T, class A>
__attribute__((noinline)) void sums_strips(const Elements<A>& elements, const Columns& c, Center<A> center,
                                           BackwardSums s) {
  const Elements<A> a = elements;
  using Streamed = typename YesIf<kDx == Dx::streamed>::type;
  constexpr bool kPairs = kPaired<T> && kTail == Tail::none;
  constexpr int kStep = 8;
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  const auto add = [&](int64_t j, int64_t n, Pack<A> sum, Pack<A> sum_xhat) NK_INLINED {
    store_some(s.g + j, load_some<double>(s.g + j, n) + convert<double>(sum), n);
    store_some(s.g_xhat + j, load_some<double>(s.g_xhat + j, n) + convert<double>(sum_xhat), n);
  };
  const auto strip = [&](int64_t j, int64_t n, int64_t left, int64_t e, int64_t lines) NK_INLINED {
    fetch_strip<kStep>(x + e, j, c);
    fetch_strip<kStep>(dy + e, j, c);
    const Pack<A> mean = load_some<A>(center.mean + j, n), rstd = load_some<A>(center.rstd + j, n);
    Pack<A> sum = fill(A(0)), sum_xhat = sum;
    for_lines_of_strip<kStep>(lines, [&](int64_t line) NK_INLINED {
      const int64_t at = e + line * c.stride;
      const Pack<A> d = load_some<A>(x + at, n) - mean;
      const Pack<A> dz = dz_of<kTail, T>(a, at, n, load_some<A>(dy + at, n), [&]() NK_INLINED {
        return fma(d, load_some<A>(center.scale + j, n), load_some<A>(center.shift + j, n));
      });
      if constexpr (kDx != Dx::none) {
        const Pack<A> through = dz * load_some<A>(center.scale + j, n);
        left == kLanes ? put(dx + at, through, n, Streamed()) : put(dx + at, through, n, No());
      }
      keep<kTail>(a, at - c.first, n, dz);
      sum = sum + dz;
      sum_xhat = fma(dz, d * rstd, sum_xhat);
    });
    add(j, n, left == kLanes ? sum : last_lanes(sum, left), left == kLanes ? sum_xhat : last_lanes(sum_xhat, left));
  };
  const auto pair = [&](int64_t j, int64_t e, int64_t lines) NK_INLINED {
    if constexpr (kPairs) {
      fetch_strip<kStep>(x + e, j, c);
      fetch_strip<kStep>(dy + e, j, c);
      const auto of = [&](const A* vector)
                          NK_INLINED { return in_pair_order(load<A>(vector + j), load<A>(vector + j + kLanes)); };
      const Pair<A> mean = of(center.mean), rstd = of(center.rstd), scale = of(center.scale);
      Pair<A> sum = {fill(A(0)), fill(A(0))}, sum_xhat = sum;
      for_lines_of_strip<kStep>(lines, [&](int64_t line) NK_INLINED {
        const int64_t at = e + line * c.stride;
        const Pair<A> xs = load_pair<A>(x + at), dz = load_pair<A>(dy + at);
        if constexpr (kDx != Dx::none) put_pair(dx + at, {dz.a * scale.a, dz.b * scale.b}, Streamed());
        sum = {sum.a + dz.a, sum.b + dz.b};
        sum_xhat = {fma(dz.a, (xs.a - mean.a) * rstd.a, sum_xhat.a), fma(dz.b, (xs.b - mean.b) * rstd.b, sum_xhat.b)};
      });
      sum = from_pair_order(sum);
      sum_xhat = from_pair_order(sum_xhat);
      add(j, kLanes, sum.a, sum_xhat.a);
      add(j + kLanes, kLanes, sum.b, sum_xhat.b);
    }
  };
  for_strips<kStep, kPairs>(c, strip, pair);
  if (kDx == Dx::streamed) end_stream();
}

template <class T, class A>
void sums_columns(const Elements<A>& a, const Columns& c, Center<A> center, BackwardSums s) {
  if (a.by_line) return sums_lines<T>(a, c, center, s);
  with_tail(a, [&](auto tail) NK_INLINED {
    constexpr Tail kTail = decltype(tail)::value;
    with_dx<kTail>(a, [&](auto dx) NK_INLINED { sums_strips<kTail, decltype(dx)::value, T>(a, c, center, s); });
  });
}

}  // namespace
}  // namespace normkern::cpu::NK_ISA
