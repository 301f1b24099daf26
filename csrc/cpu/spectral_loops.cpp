// spectral_loops.cpp: lags, spectra, and the whole way of a map through them. Compiled once per instruction set, with
// NK_ISA naming the namespace; as in norm.cpp, everything is internal but the table.
//
// `precondition` keeps a register's worth of channels side by side and takes a map there and back without leaving the
// cache: real transforms along columns and rows, which are small matrix products, the product with V in between, and
// only those points that are wanted. In the basis cos*cos, cos*sin, sin*cos, sin*sin the product couples two and two:
//   cc' = Ve cc - Vo ss,  ss' = Ve ss - Vo cc,  cs' = Ve cs + Vo sc,  sc' = Ve sc + Vo cs
// with Ve, Vo = (V(w1, w2) +- V(w1, -w2)) / 2.
#include "spectral_loops.h"

#include "registers.h"

namespace normkern::cpu::NK_ISA {
namespace {

// ---- lags ----

// `depth` is a multiple of kLagLanes.
template <int rows, int cols>
NK_INLINE void add_products(const double* taps, const Taps& t, int64_t depth, double* sums) {
  const int64_t kh = rows ? rows : t.rows, kw = cols ? cols : t.cols;
  for (int64_t p1 = 0; p1 < kh; ++p1) {
    for (int64_t p2 = 0; p2 < kw; ++p2) {
      for (int64_t q1 = p1; q1 < kh; ++q1) {
        const int64_t d1 = q1 - p1, first = t.first_lag(d1) - t.first_col(d1);
        for (int64_t q2 = d1 == 0 ? p2 : 0; q2 < kw; ++q2) {
          const double *a = taps + (p1 * kw + p2) * kLagBlock, *b = taps + (q1 * kw + q2) * kLagBlock;
          double* sum = sums + (first + q2 - p2) * kLagLanes;
          double lane[kLagLanes];
          for (int l = 0; l < kLagLanes; ++l) lane[l] = sum[l];
          for (int64_t j = 0; j < depth; j += kLagLanes)
            for (int l = 0; l < kLagLanes; ++l) lane[l] += a[j + l] * b[j + l];
          for (int l = 0; l < kLagLanes; ++l) sum[l] = lane[l];
        }
      }
    }
  }
}

template <class T>
NK_INLINE void lags_of(const LagsArgs& a, int64_t channel, double* scratch) {
  const int64_t count = a.taps.count(), lags = a.taps.lags();
  double *taps = scratch, *sums = scratch + count * kLagBlock;
  const T* weight = static_cast<const T*>(a.weight) + channel * a.depth * count;
  for (int64_t i = 0; i < lags * kLagLanes; ++i) sums[i] = 0;
  for (int64_t j0 = 0; j0 < a.depth; j0 += kLagBlock) {
    const int64_t n = least(kLagBlock, a.depth - j0);
    const int64_t depth = (n + kLagLanes - 1) / kLagLanes * kLagLanes;
    const T* block = weight + j0 * count;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t j = 0; j < n; ++j) taps[p * kLagBlock + j] = double(block[j * count + p]);
      for (int64_t j = n; j < depth; ++j) taps[p * kLagBlock + j] = 0;
    }
    if (a.taps.rows == 3 && a.taps.cols == 3)
      add_products<3, 3>(taps, a.taps, depth, sums);
    else
      add_products<0, 0>(taps, a.taps, depth, sums);
  }
  for (int64_t d = 0; d < lags; ++d) {
    double sum = 0;
    for (int l = 0; l < kLagLanes; ++l) sum += sums[d * kLagLanes + l];
    a.lags[channel * lags + d] = sum;
  }
}

void lags(const LagsArgs& a, int64_t channel, double* scratch) {
  a.dtype == DType::f64 ? lags_of<double>(a, channel, scratch) : lags_of<float>(a, channel, scratch);
}

// ---- V ----

// S / r[0] at least eps; NaN stays NaN.
NK_INLINE double kept(double s, double eps) { return s < eps ? eps : s; }

NK_INLINE float root(float s) { return __builtin_sqrtf(s); }
NK_INLINE double root(double s) { return __builtin_sqrt(s); }

// V is taken of S / r[0], which is of size 1, so that no range of float is left on the way.
struct Scale {
  double inverse, root;  // 1 / r[0] and r[0]^(-1/2), or 0 and what V is

  static NK_INLINE Scale of(double r0, double eps) {
    if (r0 == 0) return {0, eps == 0 ? 1.0 : 0.0};
    return {1 / r0, 1 / __builtin_sqrt(r0)};
  }
};

// For every column frequency and row d1 of lags, the sums over d2 of m r cos(w2 d2) and of m r sin(w2 d2).
NK_INLINE void sum_columns(const Taps& t, const double* lags, LagWaves waves, int64_t half, double inverse,
                           double* cosine, double* sine) {
  for (int64_t d1 = 0; d1 < t.rows; ++d1) {
    double *c = cosine + d1 * half, *s = sine + d1 * half;
    for (int64_t f = 0; f < half; ++f) c[f] = s[f] = 0;
    for (int64_t d2 = t.first_col(d1); d2 < t.cols; ++d2) {
      const double r = lags[t.first_lag(d1) + d2 - t.first_col(d1)] * inverse * (d1 == 0 && d2 == 0 ? 1 : 2);
      const double *wc = waves.cos + (d2 < 0 ? -d2 : d2) * half, *ws = waves.sin + (d2 < 0 ? -d2 : d2) * half;
      const double odd = d2 < 0 ? -r : r;
      for (int64_t f = 0; f < half; ++f) {
        c[f] += r * wc[f];
        s[f] += odd * ws[f];
      }
    }
  }
}

template <class A>
NK_INLINE void put_roots(const double* s, int64_t n, double eps, A by, A* v) {
  for (int64_t i = 0; i < n; ++i) v[i] = by / root(A(kept(s[i], eps)));
}

template <class A>
void inverse_root(const Spectrum& spectrum, int64_t channel, LagWaves rows, LagWaves cols, A* v, double* lag_scratch) {
  const Taps& t = spectrum.taps;
  const int64_t half = spectrum.half(), h = spectrum.rows, h2 = cosines(h);
  const double *lags = spectrum.lags + channel * t.lags(), eps = spectrum.eps;
  const Scale scale = Scale::of(lags[0], eps);
  double *cosine = lag_scratch, *sine = cosine + t.rows * half;
  double *above = sine + t.rows * half, *below = above + most(half, kVBlock), *odd = below + most(half, kVBlock);
  sum_columns(t, lags, cols, half, scale.inverse, cosine, sine);
  // Rows f1 and h - f1 share their sums. Blocks of either lie together in v, so that roots come in long runs.
  const int64_t block = most(1, kVBlock / half);
  for (int64_t begin = 0; begin < h2; begin += block) {
    const int64_t end = least(begin + block, h2);
    for (int64_t f1 = begin; f1 < end; ++f1) {
      double *up = above + (f1 - begin) * half, *down = below + (end - 1 - f1) * half;
      for (int64_t f = 0; f < half; ++f) {
        up[f] = cosine[f];
        odd[f] = 0;
      }
      for (int64_t d1 = 1; d1 < t.rows; ++d1) {
        const double c = rows.cos[d1 * h2 + f1], s = rows.sin[d1 * h2 + f1];
        const double *cd = cosine + d1 * half, *sd = sine + d1 * half;
        for (int64_t f = 0; f < half; ++f) {
          up[f] += c * cd[f];
          odd[f] += s * sd[f];
        }
      }
      for (int64_t f = 0; f < half; ++f) {
        down[f] = up[f] + odd[f];
        up[f] -= odd[f];
      }
    }
    put_roots(above, (end - begin) * half, eps, A(scale.root), v + begin * half);
    const int64_t mirrored = end - (begin == 0 ? 1 : begin);  // row 0 is its own mirror
    put_roots(below, mirrored * half, eps, A(scale.root), v + (h - end + 1) * half);
  }
}

// ---- matrix products of transforms ----

// out[r][q] = sum_j m[r][j] in[j][q], where q counts vectors: those of in lie in_q apart, of out out_q.
template <class A, int R, int Q>
NK_INLINE void tile(const A* m, int64_t ldm, int64_t depth, const A* in, int64_t in_j, int64_t in_q, A* out,
                    int64_t out_r, int64_t out_q) {
  Vec<A> sum[R][Q];
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) sum[r][q] = Vec<A>{};
  for (int64_t j = 0; j < depth; ++j) {
    Vec<A> x[Q];
    for (int q = 0; q < Q; ++q) x[q] = get(in + j * in_j + q * in_q);
    for (int r = 0; r < R; ++r) {
      const A factor = m[r * ldm + j];
      for (int q = 0; q < Q; ++q) sum[r][q] += factor * x[q];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) put(out + r * out_r + q * out_q, sum[r][q]);
}

template <class A, int Q>
NK_INLINE void band(const A* m, int64_t rows, int64_t depth, const A* in, int64_t in_j, int64_t in_q, A* out,
                    int64_t out_r, int64_t out_q) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    tile<A, 4, Q>(m + r * depth, depth, depth, in, in_j, in_q, out + r * out_r, out_r, out_q);
  const A* rest = m + r * depth;
  out += r * out_r;
  // Few sums at a time would wait for each other: the rest goes at once.
  if (rows - r == 3) tile<A, 3, Q>(rest, depth, depth, in, in_j, in_q, out, out_r, out_q);
  if (rows - r == 2) tile<A, 2, Q>(rest, depth, depth, in, in_j, in_q, out, out_r, out_q);
  if (rows - r == 1) tile<A, 1, Q>(rest, depth, depth, in, in_j, in_q, out, out_r, out_q);
}

// m is [rows][depth].
template <class A>
void product(const A* m, int64_t rows, int64_t depth, const A* in, int64_t in_j, int64_t in_q, A* out, int64_t out_r,
             int64_t out_q, int64_t count) {
  int64_t q = 0;
  for (; q + 3 <= count; q += 3) band<A, 3>(m, rows, depth, in + q * in_q, in_j, in_q, out + q * out_q, out_r, out_q);
  if (count - q == 2) band<A, 2>(m, rows, depth, in + q * in_q, in_j, in_q, out + q * out_q, out_r, out_q);
  if (count - q == 1) band<A, 1>(m, rows, depth, in + q * in_q, in_j, in_q, out + q * out_q, out_r, out_q);
}

constexpr int64_t kLines = 12;  // lines that are transformed together: their folds stay in the L1 cache

// ---- a map there and back ----

template <class A>
class Preconditioning {
 public:
  static constexpr int64_t L = kWidth<A>;

  Preconditioning(const PreconditionJob<A>& job, A* scratch, double* lag_scratch)
      : job_(job), a_(*job.args), rows_(job.rows), cols_(job.cols), lag_scratch_(lag_scratch) {
    const int64_t h = rows_.points, w = cols_.points, h2 = cosines(h), w2 = cosines(w);
    even_v_ = scratch;
    odd_v_ = even_v_ + h2 * w2 * L;
    lines_ = odd_v_ + h2 * w2 * L;
    spectrum_ = lines_ + most(a_.source_rows.count, a_.target_rows.count) * w * L;
    folds_ = spectrum_ + h * w * L;
  }

  static int64_t scratch(const PreconditionJob<A>& job) {
    const int64_t h = job.rows.points, w = job.cols.points, most_points = most(h, w);
    return L * (2 * cosines(h) * cosines(w) + most(job.args->source_rows.count, job.args->target_rows.count) * w +
                h * w + 2 * kLines * cosines(most_points));
  }

  static int64_t lag_scratch(const PreconditionJob<A>& job) {
    const Taps& t = job.args->spectrum.taps;
    return L * (2 * t.rows * cosines(job.cols.points) + t.lags());
  }

  void run(int64_t channel, int64_t begin, int64_t end) {
    channel_ = channel;
    present_ = least(L, a_.spectrum.channels - channel);
    make_v();
    for (int64_t n = begin; n < end; ++n) {
      analyze_columns(static_cast<const A*>(a_.x) + n * a_.x_strides[0] + channel * a_.x_strides[1]);
      analyze_rows();
      multiply();
      synthesize_rows();
      synthesize_columns(static_cast<A*>(a_.y) + n * a_.y_strides[0] + channel * a_.y_strides[1]);
    }
  }

  // y holds the spectrum.
  void analyze(int64_t channel, int64_t begin, int64_t end) {
    present_ = least(L, a_.spectrum.channels - channel);
    for (int64_t n = begin; n < end; ++n) {
      analyze_columns(static_cast<const A*>(a_.x) + n * a_.x_strides[0] + channel * a_.x_strides[1]);
      analyze_rows();
      A* to = static_cast<A*>(a_.y) + n * a_.spectrum.channels + channel;
      for_all_frequencies([&](int64_t e, const At& at, A times) {
        (void)times;
        const Vec<A> cc = get(at.cc), cs = get(at.cs), sc = get(at.sc), ss = get(at.ss);
        put_complex(to, e, cc - ss, -(sc + cs));
        if (at.opposite >= 0) put_complex(to, at.opposite, cc + ss, sc - cs);
      });
    }
  }

  // x holds the spectrum.
  void synthesize(int64_t channel, int64_t begin, int64_t end, A scale) {
    present_ = least(L, a_.spectrum.channels - channel);
    for (int64_t n = begin; n < end; ++n) {
      const A* from = static_cast<const A*>(a_.x) + n * a_.spectrum.channels + channel;
      for_all_frequencies([&](int64_t e, const At& at, A times) {
        const A by = scale * times;
        const Complex z = get_complex(from, e);
        const Complex o = at.opposite < 0 ? Complex{} : get_complex(from, at.opposite);
        put(at.cc, by * (z.re + o.re));
        put(at.ss, by * (o.re - z.re));
        put(at.sc, by * (o.im - z.im));
        put(at.cs, -by * (z.im + o.im));
      });
      synthesize_rows();
      synthesize_columns(static_cast<A*>(a_.y) + n * a_.y_strides[0] + channel * a_.y_strides[1]);
    }
  }

 private:
  // Where the real spectrum has a frequency (f1, f2), with -f1 where the list has that apart. Waves that there are not
  // (sines of 0 and of half of the points) lead to a place that holds zeros to read and takes what is written.
  struct At {
    A *cc, *cs, *sc, *ss;
    int64_t opposite;  // -1: none
  };
  struct Complex {
    Vec<A> re{}, im{};
  };

  template <class Visit>
  NK_INLINE void for_all_frequencies(Visit visit) {
    const int64_t h = rows_.points, w = cols_.points, h2 = cosines(h), w2 = cosines(w);
    const Frequencies list{h, w};
    A nowhere[L];
    for (int64_t f1 = 0; f1 < h2; ++f1) {
      const bool row = f1 > 0 && 2 * f1 < h;
      for (int64_t f2 = 0; f2 < w2; ++f2) {
        const bool col = f2 > 0 && 2 * f2 < w;
        put(static_cast<A*>(nowhere), Vec<A>{});
        A *c = spectrum_ + f1 * w * L, *s = spectrum_ + (h2 + f1 - 1) * w * L;
        const At at{c + f2 * L, col ? c + (w2 + f2 - 1) * L : nowhere, row ? s + f2 * L : nowhere,
                    row && col ? s + (w2 + f2 - 1) * L : nowhere, row && col ? list.at(h - f1, f2).index : -1};
        visit(f1 * w2 + f2, at, A(list.own_mirror(f1, f2) ? 1 : 2));
      }
    }
  }

  NK_INLINE void put_complex(A* to, int64_t e, Vec<A> re, Vec<A> im) const {
    const int64_t plane = a_.batch * a_.spectrum.channels;
    A* at = to + 2 * e * plane;
    if (present_ == L) {
      put(at, re);
      put(at + plane, im);
      return;
    }
    for (int64_t l = 0; l < present_; ++l) {
      at[l] = re[l];
      at[plane + l] = im[l];
    }
  }

  NK_INLINE Complex get_complex(const A* from, int64_t e) const {
    const int64_t plane = a_.batch * a_.spectrum.channels;
    const A* at = from + 2 * e * plane;
    Complex z;
    if (present_ == L) return {get(at), get(at + plane)};
    for (int64_t l = 0; l < present_; ++l) {
      z.re[l] = at[l];
      z.im[l] = at[plane + l];
    }
    return z;
  }

  // Ve and Vo of the channels, with the weights of the inverse transform.
  void make_v() {
    const Taps& t = a_.spectrum.taps;
    const int64_t h = rows_.points, w = cols_.points, h2 = cosines(h), w2 = cosines(w), count = t.lags();
    double *lags = lag_scratch_, *cosine = lags + count * L, *sine = cosine + t.rows * w2 * L;
    A scale[L];
    for (int64_t l = 0; l < L; ++l) {
      const double* from = a_.spectrum.lags + (channel_ + l) * count;
      const Scale s = l < present_ ? Scale::of(from[0], a_.spectrum.eps) : Scale{0, 0};
      scale[l] = A(s.root / (2 * double(h) * double(w)));
      for (int64_t d = 0; d < count; ++d) lags[d * L + l] = l < present_ ? from[d] * s.inverse * (d == 0 ? 1 : 2) : 0;
    }
    for (int64_t d1 = 0; d1 < t.rows; ++d1) {
      for (int64_t f = 0; f < w2; ++f) {
        double c[L] = {}, s[L] = {};
        for (int64_t d2 = t.first_col(d1); d2 < t.cols; ++d2) {
          const double* r = lags + (t.first_lag(d1) + d2 - t.first_col(d1)) * L;
          const double wc = cols_.waves.cos[(d2 < 0 ? -d2 : d2) * w2 + f];
          const double ws = cols_.waves.sin[(d2 < 0 ? -d2 : d2) * w2 + f] * (d2 < 0 ? -1 : 1);
          for (int64_t l = 0; l < L; ++l) {
            c[l] += wc * r[l];
            s[l] += ws * r[l];
          }
        }
        for (int64_t l = 0; l < L; ++l) {
          cosine[(d1 * w2 + f) * L + l] = c[l];
          sine[(d1 * w2 + f) * L + l] = s[l];
        }
      }
    }
    for (int64_t f1 = 0; f1 < h2; ++f1) {
      for (int64_t f2 = 0; f2 < w2; ++f2) {
        double even[L], odd[L] = {};
        for (int64_t l = 0; l < L; ++l) even[l] = cosine[f2 * L + l];
        for (int64_t d1 = 1; d1 < t.rows; ++d1) {
          const double c = rows_.waves.cos[d1 * h2 + f1], s = rows_.waves.sin[d1 * h2 + f1];
          for (int64_t l = 0; l < L; ++l) {
            even[l] += c * cosine[(d1 * w2 + f2) * L + l];
            odd[l] += s * sine[(d1 * w2 + f2) * L + l];
          }
        }
        const A times = A((f1 == 0 || 2 * f1 == h ? 1 : 2) * (f2 == 0 || 2 * f2 == w ? 1 : 2));
        A *ve = even_v_ + (f1 * w2 + f2) * L, *vo = odd_v_ + (f1 * w2 + f2) * L;
        for (int64_t l = 0; l < L; ++l) {
          const A above = scale[l] * times / root(A(kept(even[l] - odd[l], a_.spectrum.eps)));
          const A below = scale[l] * times / root(A(kept(even[l] + odd[l], a_.spectrum.eps)));
          ve[l] = above + below;
          vo[l] = above - below;
        }
      }
    }
    // Lanes without a channel, and channels of zeros, are 0 and not 0 / 0.
    for (int64_t l = 0; l < L; ++l)
      if (scale[l] == 0)
        for (int64_t i = l; i < h2 * w2 * L; i += L) even_v_[i] = odd_v_[i] = 0;
  }

  NK_INLINE Vec<A> read(const A* p) const {
    const int64_t stride = a_.x_strides[1];
    if (stride == 1 && present_ == L) return get(p);
    A v[L] = {};
    if (present_ == L)
      for (int64_t l = 0; l < L; ++l) v[l] = p[l * stride];
    else
      for (int64_t l = 0; l < present_; ++l) v[l] = p[l * stride];
    return get(static_cast<const A*>(v));
  }

  NK_INLINE void write(A* p, Vec<A> v) const {
    const int64_t stride = a_.y_strides[1];
    if (stride == 1 && present_ == L) return put(p, v);
    A lanes[L];
    put(static_cast<A*>(lanes), v);
    for (int64_t l = 0; l < present_; ++l) p[l * stride] = lanes[l];
  }

  // x to lines of column spectra, [source rows][w].
  void analyze_columns(const A* x) {
    const int64_t w = cols_.points, count = a_.source_rows.count, folds = cols_.folds;
    const int64_t step = a_.x_strides[3];
    A *even = folds_, *odd = folds_ + kLines * folds * L;
    for (int64_t i0 = 0; i0 < count; i0 += kLines) {
      const int64_t n = least(kLines, count - i0);
      for (int64_t i = 0; i < n; ++i) {
        const A* row = x + (i0 + i) * a_.x_strides[2];
        for (int64_t t = 0; t < folds; ++t) {
          const int64_t left = cols_.fold_left[t], right = cols_.fold_right[t];
          const Vec<A> a = left < 0 ? Vec<A>{} : read(row + left * step);
          const Vec<A> b = right < 0 ? Vec<A>{} : read(row + right * step);
          put(even + (i * folds + t) * L, a + b);
          put(odd + (i * folds + t) * L, a - b);
        }
      }
      A* out = lines_ + i0 * w * L;
      product(cols_.cos_in, cosines(w), folds, even, L, folds * L, out, L, w * L, n);
      product(cols_.sin_in, sines(w), folds, odd, L, folds * L, out + cosines(w) * L, L, w * L, n);
    }
  }

  // Lines to the whole real spectrum, [h][w].
  void analyze_rows() {
    const int64_t h = rows_.points, w = cols_.points, folds = rows_.folds;
    A *even = folds_, *odd = folds_ + folds * kLines * L;
    for (int64_t j0 = 0; j0 < w; j0 += kLines) {
      const int64_t n = least(kLines, w - j0);
      for (int64_t t = 0; t < folds; ++t) {
        const int64_t left = rows_.fold_left[t], right = rows_.fold_right[t];
        for (int64_t j = 0; j < n; ++j) {
          const Vec<A> a = left < 0 ? Vec<A>{} : get(lines_ + (left * w + j0 + j) * L);
          const Vec<A> b = right < 0 ? Vec<A>{} : get(lines_ + (right * w + j0 + j) * L);
          put(even + (t * kLines + j) * L, a + b);
          put(odd + (t * kLines + j) * L, a - b);
        }
      }
      A* out = spectrum_ + j0 * L;
      product(rows_.cos_in, cosines(h), folds, even, kLines * L, L, out, w * L, L, n);
      product(rows_.sin_in, sines(h), folds, odd, kLines * L, L, out + cosines(h) * w * L, w * L, L, n);
    }
  }

  void multiply() {
    const int64_t h = rows_.points, w = cols_.points, h2 = cosines(h), w2 = cosines(w);
    for (int64_t f1 = 0; f1 < h2; ++f1) {
      const bool has_sine = f1 > 0 && 2 * f1 < h;
      A *c = spectrum_ + f1 * w * L, *s = spectrum_ + (h2 + f1 - 1) * w * L;
      const A *ve = even_v_ + f1 * w2 * L, *vo = odd_v_ + f1 * w2 * L;
      for (int64_t f2 = 0; f2 < w2; ++f2) {
        const Vec<A> e = get(ve + f2 * L), o = get(vo + f2 * L);
        A *cc = c + f2 * L, *sc = s + f2 * L;
        if (f2 == 0 || 2 * f2 == w) {
          put(cc, e * get(cc));
          if (has_sine) put(sc, e * get(sc));
          continue;
        }
        A *cs = c + (w2 + f2 - 1) * L, *ss = s + (w2 + f2 - 1) * L;
        if (!has_sine) {
          put(cc, e * get(cc));
          put(cs, e * get(cs));
          continue;
        }
        const Vec<A> a = get(cc), b = get(cs), p = get(sc), q = get(ss);
        put(cc, e * a - o * q);
        put(ss, e * q - o * a);
        put(cs, e * b + o * p);
        put(sc, e * p + o * b);
      }
    }
  }

  // The spectrum to lines of column spectra, [target rows][w].
  void synthesize_rows() {
    const int64_t h = rows_.points, w = cols_.points, unfolds = rows_.unfolds;
    A *even = folds_, *odd = folds_ + unfolds * kLines * L;
    for (int64_t j0 = 0; j0 < w; j0 += kLines) {
      const int64_t n = least(kLines, w - j0);
      const A* in = spectrum_ + j0 * L;
      product(rows_.cos_out, unfolds, cosines(h), in, w * L, L, even, kLines * L, L, n);
      product(rows_.sin_out, unfolds, sines(h), in + cosines(h) * w * L, w * L, L, odd, kLines * L, L, n);
      for (int64_t t = 0; t < unfolds; ++t) {
        const int64_t left = rows_.unfold_left[t], right = rows_.unfold_right[t];
        for (int64_t j = 0; j < n; ++j) {
          const Vec<A> a = get(even + (t * kLines + j) * L), b = get(odd + (t * kLines + j) * L);
          if (left >= 0) put(lines_ + (left * w + j0 + j) * L, a + b);
          if (right >= 0) put(lines_ + (right * w + j0 + j) * L, a - b);
        }
      }
    }
  }

  void synthesize_columns(A* y) {
    const int64_t w = cols_.points, count = a_.target_rows.count, unfolds = cols_.unfolds;
    const int64_t step = a_.y_strides[3];
    A *even = folds_, *odd = folds_ + kLines * unfolds * L;
    for (int64_t i0 = 0; i0 < count; i0 += kLines) {
      const int64_t n = least(kLines, count - i0);
      const A* in = lines_ + i0 * w * L;
      product(cols_.cos_out, unfolds, cosines(w), in, L, w * L, even, L, unfolds * L, n);
      product(cols_.sin_out, unfolds, sines(w), in + cosines(w) * L, L, w * L, odd, L, unfolds * L, n);
      for (int64_t i = 0; i < n; ++i) {
        A* row = y + (i0 + i) * a_.y_strides[2];
        for (int64_t t = 0; t < unfolds; ++t) {
          const int64_t left = cols_.unfold_left[t], right = cols_.unfold_right[t];
          const Vec<A> a = get(even + (i * unfolds + t) * L), b = get(odd + (i * unfolds + t) * L);
          if (left >= 0) write(row + left * step, a + b);
          if (right >= 0) write(row + right * step, a - b);
        }
      }
    }
  }

  const PreconditionJob<A>& job_;
  const PreconditionArgs& a_;
  const AxisTransform<A>&rows_, &cols_;
  int64_t channel_ = 0, present_ = 0;
  double* lag_scratch_;
  A *even_v_, *odd_v_;  // [h/2 + 1][w/2 + 1]
  A* lines_;            // [source or target rows][w]
  A* spectrum_;         // [h][w]: cosines, then sines, in both directions
  A* folds_;
};

template <class A>
int64_t scratch(const PreconditionJob<A>& job) {
  return Preconditioning<A>::scratch(job);
}

template <class A>
int64_t lag_scratch(const PreconditionJob<A>& job) {
  return Preconditioning<A>::lag_scratch(job);
}

template <class A>
void precondition(const PreconditionJob<A>& job, int64_t channel, int64_t begin, int64_t end, A* scratch,
                  double* lag_scratch) {
  Preconditioning<A>(job, scratch, lag_scratch).run(channel, begin, end);
}

template <class A>
void analyze(const PreconditionJob<A>& job, int64_t channel, int64_t begin, int64_t end, A* scratch) {
  Preconditioning<A>(job, scratch, nullptr).analyze(channel, begin, end);
}

template <class A>
void synthesize(const PreconditionJob<A>& job, int64_t channel, int64_t begin, int64_t end, A scale, A* scratch) {
  Preconditioning<A>(job, scratch, nullptr).synthesize(channel, begin, end, scale);
}

template <class A>
constexpr SpectralKernels<A> kKernels = {kWidth<A>,  scratch<A>,    lag_scratch<A>, precondition<A>,
                                         analyze<A>, synthesize<A>, inverse_root<A>};

}  // namespace

extern const SpectralTable kSpectralTable;
const SpectralTable kSpectralTable = {kKernels<float>, kKernels<double>, lags};

}  // namespace normkern::cpu::NK_ISA
