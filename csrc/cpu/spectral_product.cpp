// spectral_product.cpp: a convolution between spectra: at every frequency a small complex matrix, made of the taps
// where it is used and never stored. Compiled once per instruction set, with NK_ISA naming the namespace.
//
// A(f1, f2) and A(-f1, f2) are made together, from B[t2] = sum over t1 of w[t1, t2] e^(i w1 t1):
//   A(+-f1, f2) = (C -+ D) + i (G +- E),  C = sum cos(w2 t2) Re B,  D = sum sin Im B,  E = sum cos Im B,  G = sum sin
//   Re B
#include "spectral_product.h"

#include "registers.h"

namespace normkern::cpu::NK_ISA {
namespace {

// ---- complex matrix products ----

// Scalars m[r][j], real parts `imaginary` before the imaginary ones.
template <class A>
struct Scalars {
  const A* at;
  int64_t row, col, imaginary;
};

// out[r][q] = sum_j m[r][j] in[j][q], or with the conjugate of m; q counts vectors. Imaginary parts of in and out lie
// in_imaginary and out_imaginary behind.
template <class A, int R, int Q, bool conjugate>
NK_INLINE void tile(Scalars<A> m, int64_t depth, const A* in, int64_t in_imaginary, int64_t in_j, A* out,
                    int64_t out_imaginary, int64_t out_r) {
  constexpr int64_t L = kWidth<A>;
  Vec<A> re[R][Q], im[R][Q];
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) re[r][q] = im[r][q] = Vec<A>{};
  for (int64_t j = 0; j < depth; ++j) {
    const A *a = in + j * in_j, *scalar = m.at + j * m.col;
    Vec<A> x[Q];
    for (int q = 0; q < Q; ++q) x[q] = get(a + q * L);
    for (int r = 0; r < R; ++r) {
      const A p = scalar[r * m.row], s = scalar[r * m.row + m.imaginary];
      for (int q = 0; q < Q; ++q) re[r][q] += p * x[q];
      for (int q = 0; q < Q; ++q) im[r][q] = conjugate ? im[r][q] - s * x[q] : im[r][q] + s * x[q];
    }
    for (int q = 0; q < Q; ++q) x[q] = get(a + in_imaginary + q * L);
    for (int r = 0; r < R; ++r) {
      const A p = scalar[r * m.row], s = scalar[r * m.row + m.imaginary];
      for (int q = 0; q < Q; ++q) im[r][q] += p * x[q];
      for (int q = 0; q < Q; ++q) re[r][q] = conjugate ? re[r][q] + s * x[q] : re[r][q] - s * x[q];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < Q; ++q) {
      put(out + r * out_r + q * L, re[r][q]);
      put(out + out_imaginary + r * out_r + q * L, im[r][q]);
    }
  }
}

template <class A, int Q, bool conjugate>
NK_INLINE void band(Scalars<A> m, int64_t rows, int64_t depth, const A* in, int64_t in_imaginary, A* out,
                    int64_t out_imaginary) {
  constexpr int64_t line = Q * kWidth<A>;
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2, m.at += 2 * m.row)
    tile<A, 2, Q, conjugate>(m, depth, in, in_imaginary, line, out + r * line, out_imaginary, line);
  if (r < rows) tile<A, 1, Q, conjugate>(m, depth, in, in_imaginary, line, out + r * line, out_imaginary, line);
}

// Lines of in and out are of `vectors` vectors, and follow one another.
template <bool conjugate, class A>
void product(Scalars<A> m, int64_t rows, int64_t depth, const A* in, int64_t in_imaginary, A* out,
             int64_t out_imaginary, int64_t vectors) {
  if (vectors == 3) return band<A, 3, conjugate>(m, rows, depth, in, in_imaginary, out, out_imaginary);
  if (vectors == 2) return band<A, 2, conjugate>(m, rows, depth, in, in_imaginary, out, out_imaginary);
  band<A, 1, conjugate>(m, rows, depth, in, in_imaginary, out, out_imaginary);
}

// Frequencies of the whole torus and of the one that is shorter by the strides.
template <class Args>
struct Tori {
  Frequencies whole, folded;

  explicit Tori(const Args& a)
      : whole{a.spectrum.rows, a.spectrum.cols},
        folded{a.spectrum.rows / a.stride_rows, a.spectrum.cols / a.stride_cols} {}

  NK_INLINE Frequencies::At fold(int64_t f1, int64_t f2) const { return folded.at(f1 % folded.rows, f2 % folded.cols); }
};

// ---- y = A x ----

template <class A>
class Contracting {
 public:
  static constexpr int64_t L = kWidth<A>;

  Contracting(const ContractJob<A>& job, int64_t begin, int64_t end, A* scratch)
      : job_(job), a_(*job.args), tori_(a_), vectors_(end - begin), width_(vectors_ * L), first_(begin * L) {
    inputs_ = a_.transposed ? a_.spectrum.channels : a_.depth;
    outputs_ = a_.transposed ? a_.depth : a_.spectrum.channels;
    sign_ = a_.transposed ? A(-1) : A(1);
    const int64_t panel = kContractDepth * width_;
    sums_ = scratch;
    plus_ = sums_ + 2 * a_.spectrum.taps.cols * panel;
    minus_ = plus_ + 2 * panel;
    x_ = minus_ + 2 * panel;
    y_ = x_ + 2 * a_.batch * kContractDepth;
  }

  static int64_t scratch(const ContractJob<A>& job) {
    const ContractArgs& a = *job.args;
    const int64_t width = kProductVectors * L;
    return (2 * a.spectrum.taps.cols + 4) * kContractDepth * width + 2 * a.batch * (kContractDepth + width);
  }

  void run(int64_t row) {
    const int64_t h = tori_.whole.rows, w = tori_.whole.cols, short_h = tori_.folded.rows;
    for (int64_t f1 = 0; f1 < cosines(h); ++f1) {
      const int64_t to = f1 % short_h;
      if (to != row && short_h - to != row) continue;
      for (input_ = 0; input_ < inputs_; input_ += kContractDepth) {
        depth_ = least(kContractDepth, inputs_ - input_);
        sum_rows(f1);
        for (int64_t f2 = 0; f2 < cosines(w); ++f2) {
          make_panels(f2);
          multiply(f1, f2, plus_);
          if (f1 > 0 && 2 * f1 < h && f2 > 0 && 2 * f2 < w) multiply(h - f1, f2, minus_);
        }
      }
    }
  }

 private:
  // B: [tap columns][2][depth][width].
  void sum_rows(int64_t f1) {
    const Taps& t = a_.spectrum.taps;
    const int64_t half = cosines(tori_.whole.rows), panel = depth_ * width_, plane = inputs_ * job_.padded;
    for (int64_t t2 = 0; t2 < t.cols; ++t2) {
      for (int64_t c = 0; c < depth_; ++c) {
        const A* taps = job_.taps + t2 * plane + (input_ + c) * job_.padded + first_;
        A* to = sums_ + 2 * t2 * panel + c * width_;
        for (int64_t q = 0; q < width_; q += L) {
          Vec<A> re{}, im{};
          for (int64_t t1 = 0; t1 < t.rows; ++t1) {
            const Vec<A> w = get(taps + t1 * t.cols * plane + q);
            re += A(job_.rows.cos[t1 * half + f1]) * w;
            im += sign_ * A(job_.rows.sin[t1 * half + f1]) * w;
          }
          put(to + q, re);
          put(to + panel + q, im);
        }
      }
    }
  }

  void make_panels(int64_t f2) {
    const int64_t half = cosines(tori_.whole.cols), panel = depth_ * width_, taps = a_.spectrum.taps.cols;
    for (int64_t i = 0; i < panel; i += L) {
      Vec<A> c = get(sums_ + i), e = get(sums_ + panel + i), d{}, g{};
      for (int64_t t2 = 1; t2 < taps; ++t2) {
        const A wc = A(job_.cols.cos[t2 * half + f2]), ws = sign_ * A(job_.cols.sin[t2 * half + f2]);
        const Vec<A> re = get(sums_ + 2 * t2 * panel + i), im = get(sums_ + (2 * t2 + 1) * panel + i);
        c += wc * re;
        d += ws * im;
        e += wc * im;
        g += ws * re;
      }
      put(plus_ + i, c - d);
      put(plus_ + panel + i, g + e);
      put(minus_ + i, c + d);
      put(minus_ + panel + i, g - e);
    }
  }

  NK_INLINE void multiply(int64_t f1, int64_t f2, const A* panel) {
    const int64_t n = a_.batch, whole = tori_.whole.at(f1, f2).index;
    const Frequencies::At folded = tori_.fold(f1, f2);
    const A *x = static_cast<const A*>(a_.x), *v = job_.v + whole * job_.v_padded;
    const A sign = folded.mirrored ? A(-1) : A(1);
    Scalars<A> scalars{x + whole * 2 * n * inputs_ + input_, inputs_, 1, n * inputs_};
    if (a_.transposed) {
      const A* from = x + folded.index * 2 * n * inputs_ + input_;
      for (int64_t i = 0; i < 2 * n; ++i) {
        const A times = i < n ? A(1) : sign;
        for (int64_t c = 0; c < depth_; ++c) x_[i * depth_ + c] = times * v[input_ + c] * from[i * inputs_ + c];
      }
      scalars = {x_, depth_, 1, n * depth_};
    }
    product<false>(scalars, n, depth_, panel, depth_ * width_, y_, n * width_, vectors_);
    const int64_t present = least(width_, outputs_ - first_);
    A* to = static_cast<A*>(a_.y) + (a_.transposed ? whole : folded.index) * 2 * n * outputs_ + first_;
    if (a_.transposed) {
      for (int64_t i = 0; i < 2 * n; ++i)
        for (int64_t k = 0; k < present; ++k) to[i * outputs_ + k] += y_[i * width_ + k];
      return;
    }
    // A frequency of the shorter torus that is its own mirror also gets what the opposite one would bring.
    const int64_t short_h = tori_.folded.rows, short_w = tori_.folded.cols;
    const bool twice = tori_.folded.own_mirror(f1 % short_h, f2 % short_w) && !tori_.whole.own_mirror(f1, f2);
    const A by = twice ? A(2) : A(1);
    for (int64_t i = 0; i < 2 * n; ++i) {
      const A times = i < n ? by : by * sign;
      A* line = to + i * outputs_;
      for (int64_t k = 0; k < present; ++k) line[k] += times * v[first_ + k] * y_[i * width_ + k];
    }
  }

  const ContractJob<A>& job_;
  const ContractArgs& a_;
  const Tori<ContractArgs> tori_;
  const int64_t vectors_, width_, first_;  // of y's channels
  int64_t inputs_, outputs_;
  int64_t input_ = 0, depth_ = 0;  // the part of the inputs that is at work: see kContractDepth
  A sign_;
  A* sums_;           // [tap columns][2][depth][width]
  A *plus_, *minus_;  // A(+-f1, f2): [2][depth][width]
  A *x_, *y_;         // [2][batch][depth], [2][batch][width]
};

// ---- the gradient of the taps ----

template <class A>
class Correlating {
 public:
  static constexpr int64_t L = kWidth<A>;

  Correlating(const CorrelateJob<A>& job, int64_t begin, int64_t end, int64_t first, int64_t last, A* scratch)
      : job_(job),
        a_(*job.args),
        tori_(a_),
        vectors_(end - begin),
        width_(vectors_ * L),
        first_channel_(begin * L),
        first_(first),
        count_(last - first) {
    const int64_t panel = count_ * width_;
    taps_ = scratch;
    sums_ = taps_ + a_.spectrum.taps.count() * panel;
    plus_ = sums_ + 2 * a_.spectrum.taps.cols * panel;
    minus_ = plus_ + 2 * panel;
    dy_ = minus_ + 2 * panel;
  }

  static int64_t scratch(const CorrelateJob<A>& job) {
    const CorrelateArgs& a = *job.args;
    const Taps& t = a.spectrum.taps;
    return kProductVectors * L * ((t.count() + 2 * t.cols + 4) * least(kProductDepth, a.depth) + 2 * a.batch);
  }

  void run() {
    const Taps& t = a_.spectrum.taps;
    const int64_t h = tori_.whole.rows, w = tori_.whole.cols, panel = count_ * width_, half = cosines(h);
    for (int64_t i = 0; i < t.count() * panel; ++i) taps_[i] = 0;
    for (int64_t f1 = 0; f1 < half; ++f1) {
      for (int64_t i = 0; i < 2 * t.cols * panel; ++i) sums_[i] = 0;
      for (int64_t f2 = 0; f2 < cosines(w); ++f2) {
        multiply(f1, f2, plus_);
        if (f1 > 0 && 2 * f1 < h && f2 > 0 && 2 * f2 < w)
          multiply(h - f1, f2, minus_);
        else
          for (int64_t i = 0; i < 2 * panel; ++i) minus_[i] = 0;
        add_columns(f2);
      }
      for (int64_t t1 = 0; t1 < t.rows; ++t1) {
        const A c = A(job_.rows.cos[t1 * half + f1]), s = A(job_.rows.sin[t1 * half + f1]);
        for (int64_t t2 = 0; t2 < t.cols; ++t2) {
          A* to = taps_ + (t1 * t.cols + t2) * panel;
          const A *re = sums_ + 2 * t2 * panel, *im = re + panel;
          for (int64_t i = 0; i < panel; i += L) put(to + i, get(to + i) + c * get(re + i) + s * get(im + i));
        }
      }
    }
    const int64_t present = least(width_, a_.spectrum.channels - first_channel_);
    A* to = static_cast<A*>(a_.dweight);
    for (int64_t k = 0; k < present; ++k)
      for (int64_t c = 0; c < count_; ++c)
        for (int64_t tap = 0; tap < t.count(); ++tap)
          to[((first_channel_ + k) * a_.depth + first_ + c) * t.count() + tap] = taps_[tap * panel + c * width_ + k];
  }

 private:
  // The gradient of A(f1, f2).
  NK_INLINE void multiply(int64_t f1, int64_t f2, A* to) {
    const int64_t n = a_.batch, channels = a_.spectrum.channels, whole = tori_.whole.at(f1, f2).index;
    const Frequencies::At folded = tori_.fold(f1, f2);
    const int64_t present = least(width_, channels - first_channel_);
    const A* v = job_.v + whole * job_.padded + first_channel_;
    const A* dy = static_cast<const A*>(a_.dy) + folded.index * 2 * n * channels + first_channel_;
    const A by = A((tori_.whole.own_mirror(f1, f2) ? 1 : 2) / (double(tori_.whole.rows) * double(tori_.whole.cols)));
    for (int64_t i = 0; i < 2 * n; ++i) {
      const A times = i >= n && folded.mirrored ? -by : by;
      for (int64_t k = 0; k < present; ++k) dy_[i * width_ + k] = times * v[k] * dy[i * channels + k];
      for (int64_t k = present; k < width_; ++k) dy_[i * width_ + k] = 0;
    }
    const A* x = static_cast<const A*>(a_.x) + whole * 2 * n * a_.depth + first_;
    product<true>(Scalars<A>{x, 1, a_.depth, n * a_.depth}, count_, n, dy_, n * width_, to, count_ * width_, vectors_);
  }

  void add_columns(int64_t f2) {
    const int64_t panel = count_ * width_, half = cosines(tori_.whole.cols), taps = a_.spectrum.taps.cols;
    for (int64_t i = 0; i < panel; i += L) {
      const Vec<A> p = get(plus_ + i), q = get(plus_ + panel + i), r = get(minus_ + i), s = get(minus_ + panel + i);
      const Vec<A> c = p + r, d = r - p, e = q - s, g = q + s;
      for (int64_t t2 = 0; t2 < taps; ++t2) {
        const A wc = A(job_.cols.cos[t2 * half + f2]), ws = A(job_.cols.sin[t2 * half + f2]);
        A *re = sums_ + 2 * t2 * panel + i, *im = re + panel;
        put(re, get(re) + wc * c + ws * g);
        put(im, get(im) + wc * e + ws * d);
      }
    }
  }

  const CorrelateJob<A>& job_;
  const CorrelateArgs& a_;
  const Tori<CorrelateArgs> tori_;
  const int64_t vectors_, width_, first_channel_, first_, count_;
  A* taps_;           // [taps][inputs][width]
  A* sums_;           // [tap columns][2][inputs][width]
  A *plus_, *minus_;  // [2][inputs][width]
  A* dy_;             // [2][batch][width]
};

template <class A>
int64_t contract_scratch(const ContractJob<A>& job) {
  return Contracting<A>::scratch(job);
}

template <class A>
int64_t correlate_scratch(const CorrelateJob<A>& job) {
  return Correlating<A>::scratch(job);
}

template <class A>
void contract(const ContractJob<A>& job, int64_t row, int64_t begin, int64_t end, A* scratch) {
  Contracting<A>(job, begin, end, scratch).run(row);
}

template <class A>
void correlate(const CorrelateJob<A>& job, int64_t begin, int64_t end, int64_t first, int64_t last, A* scratch) {
  Correlating<A>(job, begin, end, first, last, scratch).run();
}

template <class A>
constexpr ProductKernels<A> kKernels = {kWidth<A>, contract_scratch<A>, correlate_scratch<A>, contract<A>,
                                        correlate<A>};

}  // namespace

extern const ProductTable kProductTable;
const ProductTable kProductTable = {kKernels<float>, kKernels<double>};

}  // namespace normkern::cpu::NK_ISA
