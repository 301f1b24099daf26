// evolved_loops.cpp: the maps and sums of core/evolved.h on packs. Compiled once per instruction set, as norm.cpp.
#include "evolved_loops.h"

#include "exponential.h"
#include "lanes.h"

namespace normkern::cpu::NK_ISA {
namespace {

constexpr int kTerms = 16;  // additions in float32 between two in float64

template <class A>
NK_INLINE Pack<A> sigmoid(Pack<A> z) {
  return fill(A(1)) / (fill(A(1)) + exp_lanes(fill(A(0)) - z));
}

// c are the coefficients in the order of core/evolved.h.
struct S0 {
  static constexpr int kForward = 3, kBackward = 5, kSumRows = 1, kSums = 3;

  template <class A>
  static NK_INLINE Pack<A> forward(Pack<A> x, const Pack<A>* c) {
    return fma(x * sigmoid(c[0] * x), c[1], c[2]);
  }
  template <class A>
  static NK_INLINE Pack<A> backward(Pack<A> x, Pack<A> dy, const Pack<A>* c) {
    const Pack<A> z = c[0] * x, s = sigmoid(z);
    const Pack<A> through_moments = fma(x - c[3], c[2], c[4]);
    return fma(dy * c[1], s * fma(z, fill(A(1)) - s, fill(A(1))), through_moments);
  }
  template <class A>
  static NK_INLINE void sum(Pack<A> x, Pack<A> dy, const Pack<A>* c, Pack<A>* sums) {
    const Pack<A> s = sigmoid(c[0] * x), gated = dy * (x * s);
    sums[0] = sums[0] + dy;
    sums[1] = sums[1] + gated;
    sums[2] = fma(gated, x * (fill(A(1)) - s), sums[2]);
  }
};

struct B0 {
  static constexpr int kForward = 5, kBackward = 7, kSumRows = 3, kSums = 5;

  template <class A>
  static NK_INLINE Pack<A> forward(Pack<A> x, const Pack<A>* c) {
    const Pack<A> right = fma(c[1], x, c[2]);
    return fma(x / where_less(c[0], right, right, c[0]), c[3], c[4]);
  }
  template <class A>
  static NK_INLINE Pack<A> backward(Pack<A> x, Pack<A> dy, const Pack<A>* c) {
    const Pack<A> right = fma(c[1], x, c[2]), inverse = fill(A(1)) / where_less(c[0], right, right, c[0]);
    const Pack<A> through_moments = fma(x - c[5], c[4], c[6]);
    // d = v*x + right has the derivative v.
    const Pack<A> rate = where_less(c[0], right, c[1], fill(A(0)));
    return fma(dy * c[3] * inverse, fill(A(1)) - rate * x * inverse, through_moments);
  }
  template <class A>
  static NK_INLINE void sum(Pack<A> x, Pack<A> dy, const Pack<A>* c, Pack<A>* sums) {
    const Pack<A> right = fma(c[1], x, c[2]), inverse = fill(A(1)) / where_less(c[0], right, right, c[0]);
    const Pack<A> ratio = dy * x * inverse, steep = ratio * inverse, zero = fill(A(0));
    const Pack<A> at_right = where_less(c[0], right, steep, zero);
    sums[0] = sums[0] + dy;
    sums[1] = sums[1] + ratio;
    sums[2] = sums[2] + (steep - at_right);
    sums[3] = sums[3] + at_right;
    sums[4] = fma(at_right, x, sums[4]);
  }
};

// Calls step(first element, n) for the runs of the groups [begin, end), after start(group).
template <class A, class Start, class Step>
NK_INLINE void for_runs(const EvolvedJob<A>& job, int64_t begin, int64_t end, Start start, Step step) {
  for (int64_t group = begin; group < end; ++group) {
    start(group);
    for (int64_t row = 0; row < job.rows; ++row)
      step(((group / job.keep * job.rows + row) * job.keep + group % job.keep) * job.cols);
  }
}

template <class Kind, class T, class A, bool kBackward>
void map_groups(const EvolvedJob<A>& shared, int64_t begin, int64_t end) {
  const EvolvedJob<A> job = shared;
  constexpr int kRows = kBackward ? Kind::kBackward : Kind::kForward;
  Pack<A> c[kRows];
  for_runs(
      job, begin, end,
      [&](int64_t group) NK_INLINED {
        for (int i = 0; i < kRows; ++i) c[i] = fill(job.table[i * job.groups + group]);
      },
      [&](int64_t first) NK_INLINED {
        const T *x = static_cast<const T*>(job.x) + first, *dy = static_cast<const T*>(job.dy) + first;
        T* out = static_cast<T*>(job.out) + first;
        const auto step = [&](int64_t i, int64_t n) NK_INLINED {
          const Pack<A> v = load_some<A>(x + i, n);
          if constexpr (kBackward)
            store_some(out + i, Kind::backward(v, load_some<A>(dy + i, n), c), n);
          else
            store_some(out + i, Kind::forward(v, c), n);
        };
        if (job.cols < kLanes) return step(0, job.cols);
        int64_t i = 0;
        for (; i + kLanes <= job.cols; i += kLanes) step(i, int64_t(kLanes));
        if (i < job.cols) step(job.cols - kLanes, int64_t(kLanes));  // once more is the same again
      });
}

template <class Kind, class T, class A>
void sum_groups(const EvolvedJob<A>& shared, int64_t begin, int64_t end) {
  const EvolvedJob<A> job = shared;
  Pack<A> c[Kind::kSumRows];
  for (int64_t group = begin; group < end; ++group) {
    double totals[Kind::kSums] = {};
    for_runs(
        job, group, group + 1,
        [&](int64_t g) NK_INLINED {
          for (int i = 0; i < Kind::kSumRows; ++i) c[i] = fill(job.table[i * job.groups + g]);
        },
        [&](int64_t first) NK_INLINED {
          const T *x = static_cast<const T*>(job.x) + first, *dy = static_cast<const T*>(job.dy) + first;
          for (int64_t i = 0; i < job.cols;) {
            Pack<A> sums[Kind::kSums];
            for (int k = 0; k < Kind::kSums; ++k) sums[k] = fill(A(0));
            int64_t stop = i + kTerms * kLanes;
            if (stop > job.cols) stop = job.cols;
            for (; i + kLanes <= stop; i += kLanes) Kind::sum(load<A>(x + i), load<A>(dy + i), c, sums);
            if (i < stop) {  // lanes past the end have x = dy = 0 and add nothing
              Kind::sum(load<A>(x + i, stop - i), load<A>(dy + i, stop - i), c, sums);
              i = stop;
            }
            for (int k = 0; k < Kind::kSums; ++k) totals[k] += total(convert<double>(sums[k]));
          }
        });
    for (int k = 0; k < Kind::kSums; ++k) job.sums[k * job.groups + group] = totals[k];
  }
}

// Calls step(column, n, coefficients) for strips of columns.
template <int kRows, class A, class Step>
NK_INLINE void for_strips(const EvolvedJob<A>& job, int64_t batch, Step step) {
  for (int64_t j = 0; j < job.keep; j += kLanes) {
    const int64_t n = job.keep - j < kLanes ? job.keep - j : int64_t(kLanes);
    Pack<A> c[kRows];
    for (int i = 0; i < kRows; ++i) c[i] = load_some<A>(job.table + i * job.groups + batch * job.keep + j, n);
    step(j, n, c);
  }
}

constexpr int64_t kLinesAtATime = 16;  // lines of a strip: coefficients are loaded once for all of them

template <class Kind, class T, class A, bool kBackward>
void map_lines(const EvolvedJob<A>& shared, int64_t batch, int64_t begin, int64_t end) {
  const EvolvedJob<A> job = shared;
  constexpr int kRows = kBackward ? Kind::kBackward : Kind::kForward;
  for (int64_t line = begin; line < end; line += kLinesAtATime) {
    const int64_t lines = end - line < kLinesAtATime ? end - line : kLinesAtATime;
    for_strips<kRows>(job, batch, [&](int64_t j, int64_t n, const Pack<A>* c) NK_INLINED {
      for (int64_t l = 0; l < lines; ++l) {
        const int64_t e = (batch * job.rows + line + l) * job.keep + j;
        const Pack<A> v = load_some<A>(static_cast<const T*>(job.x) + e, n);
        if constexpr (kBackward)
          store_some(static_cast<T*>(job.out) + e,
                     Kind::backward(v, load_some<A>(static_cast<const T*>(job.dy) + e, n), c), n);
        else
          store_some(static_cast<T*>(job.out) + e, Kind::forward(v, c), n);
      }
    });
  }
}

template <class Kind, class T, class A>
void sum_lines(const EvolvedJob<A>& shared, int64_t batch, int64_t begin, int64_t end, double* to, int64_t pitch) {
  const EvolvedJob<A> job = shared;
  for (int64_t line = begin; line < end; line += kLinesAtATime) {
    const int64_t lines = end - line < kLinesAtATime ? end - line : kLinesAtATime;
    for_strips<Kind::kSumRows>(job, batch, [&](int64_t j, int64_t n, const Pack<A>* c) NK_INLINED {
      Pack<A> sums[Kind::kSums];
      for (int k = 0; k < Kind::kSums; ++k) sums[k] = fill(A(0));
      for (int64_t l = 0; l < lines; ++l) {
        const int64_t e = (batch * job.rows + line + l) * job.keep + j;
        Kind::sum(load_some<A>(static_cast<const T*>(job.x) + e, n), load_some<A>(static_cast<const T*>(job.dy) + e, n),
                  c, sums);
      }
      for (int k = 0; k < Kind::kSums; ++k) {
        double* at = to + k * pitch + j;
        store_some(at, load_some<double>(static_cast<const double*>(at), n) + convert<double>(sums[k]), n);
      }
    });
  }
}

template <class Kind, class T, class A>
constexpr EvolvedLoops<A> loops() {
  return {map_groups<Kind, T, A, false>, map_groups<Kind, T, A, true>, sum_groups<Kind, T, A>,
          map_lines<Kind, T, A, false>,  map_lines<Kind, T, A, true>,  sum_lines<Kind, T, A>};
}

}  // namespace

extern const EvolvedTable kEvolvedTable;
const EvolvedTable kEvolvedTable = {{loops<S0, double, double>(), loops<B0, double, double>()},
                                    {loops<S0, float, float>(), loops<B0, float, float>()},
                                    {loops<S0, f16, float>(), loops<B0, f16, float>()},
                                    {loops<S0, bf16, float>(), loops<B0, bf16, float>()}};

}  // namespace normkern::cpu::NK_ISA
