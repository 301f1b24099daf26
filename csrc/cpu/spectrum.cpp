// spectrum.cpp: what the loops of spectral_loops.cpp need (tables of waves, scratch) and how they are shared out.
#include "spectrum.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "spectral_loops.h"
#include "spectral_product.h"

namespace normkern::cpu {
namespace {

struct Tables {
  const SpectralTable* spectral;
  const ProductTable* product;
};

const Tables& tables() {
  static const Tables chosen = [] {
#if defined(__x86_64__)
    if (!std::strcmp(instruction_set(), "avx512")) return Tables{&avx512::kSpectralTable, &avx512::kProductTable};
    if (!std::strcmp(instruction_set(), "avx2")) return Tables{&avx2::kSpectralTable, &avx2::kProductTable};
#endif
    return Tables{&baseline::kSpectralTable, &baseline::kProductTable};
  }();
  return chosen;
}

const SpectralTable& table() { return *tables().spectral; }

template <class A>
const SpectralKernels<A>& kernels() {
  if constexpr (std::is_same_v<A, double>)
    return table().f64;
  else
    return table().f32;
}

template <class A>
const ProductKernels<A>& products() {
  if constexpr (std::is_same_v<A, double>)
    return tables().product->f64;
  else
    return tables().product->f32;
}

// Runs task(begin, end) over parts of [0, count), at most one for each thread, `grain` or more in each.
template <class Task>
void share_out(const Threads& threads, int64_t count, int64_t grain, Task task) {
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  const int64_t parts = threads.run ? std::min(threads.count, most) : 1;
  if (parts <= 1) return task(int64_t(0), count);
  struct State {
    Task* task;
    int64_t count, parts;
  } state{&task, count, parts};
  threads.run(
      parts,
      [](void* data, int64_t i) {
        const State& s = *static_cast<State*>(data);
        (*s.task)(s.count* i / s.parts, s.count * (i + 1) / s.parts);
      },
      &state);
}

constexpr int64_t kGrain = 1 << 14;  // values that are worth a thread

// cos and sin of 2 pi i / n for i in [0, n), each from an angle of an eighth of the circle at most.
struct Circle {
  std::vector<double> cos, sin;

  explicit Circle(int64_t n) : cos(size_t(n)), sin(size_t(n)) {
    constexpr double kTurn = 6.283185307179586476925286766559;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t quarter = (8 * i / n + 1) / 2;  // the nearest quarter of the circle, and the angle from there
      const double rest = kTurn * double(4 * i - quarter * n) / double(4 * n);
      const double c = std::cos(rest), s = std::sin(rest);
      const double cosines[] = {c, -s, -c, s}, sines[] = {s, c, -s, -c};
      cos[size_t(i)] = cosines[quarter % 4];
      sin[size_t(i)] = sines[quarter % 4];
    }
  }
};

// Waves of the lags along one axis.
class Waves {
 public:
  Waves(const Circle& circle, int64_t points, int64_t taps, int64_t dilation)
      : cos_(size_t(taps * cosines(points))), sin_(cos_.size()) {
    const int64_t half = cosines(points), step = dilation % points;
    for (int64_t d = 0; d < taps; ++d) {
      for (int64_t f = 0; f < half; ++f) {
        const int64_t i = d % points * step % points * f % points;
        cos_[size_t(d * half + f)] = circle.cos[size_t(i)];
        sin_[size_t(d * half + f)] = circle.sin[size_t(i)];
      }
    }
  }
  LagWaves view() const { return {cos_.data(), sin_.data()}; }

 private:
  std::vector<double> cos_, sin_;
};

// The points of an axis in pairs t and n - t.
struct Folds {
  std::vector<int64_t> t, left, right;

  Folds(int64_t n, const Points& points) {
    std::vector<int64_t> at(size_t(n), -1);
    for (int64_t i = 0; i < points.count; ++i) at[size_t((points.first + i * points.step) % n)] = i;
    for (int64_t a = 0; a <= n / 2; ++a) {
      const int64_t b = n - a;
      const int64_t one = at[size_t(a)], other = a == 0 || a == b ? -1 : at[size_t(b)];
      if (one < 0 && other < 0) continue;
      t.push_back(a);
      left.push_back(one);
      right.push_back(other);
    }
  }
  int64_t count() const { return int64_t(t.size()); }
};

template <class A>
class Transform {
 public:
  Transform(int64_t n, const Points& source, const Points& target, int64_t taps, int64_t dilation)
      : n_(n), circle_(n), waves_(circle_, n, taps, dilation), in_(n, source), out_(n, target) {
    fill(cos_in_, circle_.cos, 0, cosines(n), in_, false);
    fill(sin_in_, circle_.sin, 1, sines(n), in_, false);
    fill(cos_out_, circle_.cos, 0, cosines(n), out_, true);
    fill(sin_out_, circle_.sin, 1, sines(n), out_, true);
  }

  AxisTransform<A> view() const {
    return {n_,           in_.count(),      in_.left.data(),   in_.right.data(), cos_in_.data(),  sin_in_.data(),
            out_.count(), out_.left.data(), out_.right.data(), cos_out_.data(),  sin_out_.data(), waves_.view()};
  }

 private:
  void fill(std::vector<A>& matrix, const std::vector<double>& wave, int64_t first, int64_t count, const Folds& folds,
            bool by_fold) {
    matrix.resize(size_t(count * folds.count()));
    for (int64_t f = 0; f < count; ++f)
      for (int64_t t = 0; t < folds.count(); ++t)
        matrix[size_t(by_fold ? t * count + f : f * folds.count() + t)] =
            A(wave[size_t((first + f) * folds.t[size_t(t)] % n_)]);
  }

  int64_t n_;
  Circle circle_;
  Waves waves_;
  Folds in_, out_;
  std::vector<A> cos_in_, sin_in_, cos_out_, sin_out_;
};

template <class A>
void precondition_of(const PreconditionArgs& a, const Threads& threads) {
  const Spectrum& s = a.spectrum;
  const Taps& taps = s.taps;
  const Transform<A> rows(s.rows, a.source_rows, a.target_rows, taps.rows, taps.dilation_rows);
  const Transform<A> cols(s.cols, a.source_cols, a.target_cols, taps.cols, taps.dilation_cols);
  const PreconditionJob<A> job{&a, rows.view(), cols.view()};
  const SpectralKernels<A>& k = kernels<A>();
  const int64_t blocks = (s.channels + k.lanes - 1) / k.lanes;
  // A unit is one map of one block of channels; a part with few of them still finds V once for each block it meets.
  share_out(threads, blocks * a.batch, kGrain / (s.rows * s.cols * k.lanes) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(k.scratch(job)));
    std::vector<double> lag_scratch(static_cast<size_t>(k.lag_scratch(job)));
    while (begin < end) {
      const int64_t block = begin / a.batch, first = begin - block * a.batch;
      const int64_t last = std::min(a.batch, first + end - begin);
      k.precondition(job, block * k.lanes, first, last, scratch.data(), lag_scratch.data());
      begin += last - first;
    }
  });
}

// One side of precondition: the map of `a` at its points and the spectrum, with nothing in between.
template <class A>
void map_of(const MapArgs& a, bool forward, const Threads& threads) {
  PreconditionArgs p;
  p.spectrum.channels = a.channels;
  p.batch = a.batch;
  p.x = a.from;
  p.y = a.to;
  (forward ? p.source_rows : p.target_rows) = a.row_points;
  (forward ? p.source_cols : p.target_cols) = a.col_points;
  std::copy_n(a.strides, 4, forward ? p.x_strides : p.y_strides);
  const Transform<A> rows(a.rows, p.source_rows, p.target_rows, 1, 1);
  const Transform<A> cols(a.cols, p.source_cols, p.target_cols, 1, 1);
  const PreconditionJob<A> job{&p, rows.view(), cols.view()};
  const SpectralKernels<A>& k = kernels<A>();
  const int64_t blocks = (a.channels + k.lanes - 1) / k.lanes;
  share_out(threads, blocks * a.batch, kGrain / (a.rows * a.cols * k.lanes) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(k.scratch(job)));
    while (begin < end) {
      const int64_t block = begin / a.batch, first = begin - block * a.batch;
      const int64_t last = std::min(a.batch, first + end - begin);
      if (forward)
        k.analyze(job, block * k.lanes, first, last, scratch.data());
      else
        k.synthesize(job, block * k.lanes, first, last, A(a.scale), scratch.data());
      begin += last - first;
    }
  });
}

constexpr int64_t kTogether = 16;  // channels: a line of the cache is written as a whole

// V of all channels at every frequency of the list, in lines of whole vectors.
template <class A>
struct ListedV {
  std::vector<A> v;
  int64_t padded;

  ListedV(const Spectrum& s, LagWaves rows, LagWaves cols, int64_t lanes, const Threads& threads)
      : padded((s.channels + lanes - 1) / lanes * lanes) {
    const Frequencies list{s.rows, s.cols};
    const int64_t plane = s.rows * s.half();
    v.resize(size_t(list.count() * padded));
    share_out(threads, (s.channels + kTogether - 1) / kTogether, kGrain / (plane * kTogether) + 1,
              [&](int64_t begin, int64_t end) {
                std::vector<A> found(size_t(plane * kTogether));
                std::vector<double> scratch(static_cast<size_t>(root_scratch(s)));
                for (int64_t block = begin; block < end; ++block) {
                  const int64_t first = block * kTogether, count = std::min(kTogether, s.channels - first);
                  for (int64_t k = 0; k < count; ++k)
                    kernels<A>().inverse_root(s, first + k, rows, cols, found.data() + k * plane, scratch.data());
                  for (int64_t f1 = 0; f1 < s.rows; ++f1) {
                    for (int64_t f2 = 0; f2 < s.half(); ++f2) {
                      const Frequencies::At at = list.at(f1, f2);
                      A* to = v.data() + at.index * padded + first;
                      for (int64_t k = 0; k < count; ++k) to[k] = found[size_t(k * plane + f1 * s.half() + f2)];
                    }
                  }
                }
              });
  }
};

template <class A>
void contract_of(const ContractArgs& a, const Threads& threads) {
  const Spectrum& s = a.spectrum;
  const Circle row_circle(s.rows), col_circle(s.cols);
  const Waves rows(row_circle, s.rows, s.taps.rows, s.taps.dilation_rows);
  const Waves cols(col_circle, s.cols, s.taps.cols, s.taps.dilation_cols);
  const ProductKernels<A>& k = products<A>();
  const ListedV<A> v(s, rows.view(), cols.view(), k.lanes, threads);
  const int64_t inputs = a.transposed ? s.channels : a.depth, outputs = a.transposed ? a.depth : s.channels;
  const int64_t vectors = (outputs + k.lanes - 1) / k.lanes, padded = vectors * k.lanes, count = s.taps.count();
  std::vector<A> taps(size_t(count * inputs * padded));
  for (int64_t first = 0; first < outputs; first += kTogether) {
    const int64_t last = std::min(outputs, first + kTogether);
    for (int64_t i = 0; i < inputs; ++i) {
      const A* from = static_cast<const A*>(a.weight) + (a.transposed ? i * a.depth : i) * count;
      const int64_t step = a.transposed ? count : a.depth * count;
      for (int64_t t = 0; t < count; ++t)
        for (int64_t o = first; o < last; ++o) taps[size_t((t * inputs + i) * padded + o)] = from[o * step + t];
    }
  }
  const Frequencies whole{s.rows, s.cols}, folded{s.rows / a.stride_rows, s.cols / a.stride_cols};
  // Aliases and parts of the inputs are added up.
  std::fill_n(static_cast<A*>(a.y), (a.transposed ? whole : folded).count() * 2 * a.batch * outputs, A(0));
  const ContractJob<A> job{&a, rows.view(), cols.view(), taps.data(), v.v.data(), padded, v.padded};
  const int64_t blocks = (vectors + kProductVectors - 1) / kProductVectors, lines = cosines(folded.rows);
  share_out(threads, blocks * lines, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(k.contract_scratch(job)));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / lines;
      k.contract(job, unit % lines, vectors * block / blocks, vectors * (block + 1) / blocks, scratch.data());
    }
  });
}

template <class A>
void correlate_of(const CorrelateArgs& a, const Threads& threads) {
  const Spectrum& s = a.spectrum;
  const Circle row_circle(s.rows), col_circle(s.cols);
  const Waves rows(row_circle, s.rows, s.taps.rows, s.taps.dilation_rows);
  const Waves cols(col_circle, s.cols, s.taps.cols, s.taps.dilation_cols);
  const ProductKernels<A>& k = products<A>();
  const ListedV<A> v(s, rows.view(), cols.view(), k.lanes, threads);
  const CorrelateJob<A> job{&a, rows.view(), cols.view(), v.v.data(), v.padded};
  const int64_t vectors = v.padded / k.lanes, blocks = (vectors + kProductVectors - 1) / kProductVectors;
  const int64_t parts = (a.depth + kProductDepth - 1) / kProductDepth;
  share_out(threads, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(k.correlate_scratch(job)));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / parts, part = unit % parts;
      k.correlate(job, vectors * block / blocks, vectors * (block + 1) / blocks, a.depth * part / parts,
                  a.depth * (part + 1) / parts, scratch.data());
    }
  });
}

template <class A>
struct Complex {
  A re, im;
};

// Adds up the aliases of every frequency that is kept, each turned by the offset of the first point.
template <class A>
class Fold {
 public:
  explicit Fold(const MultiplyArgs& a)
      : a_(a), rows_(a.spectrum.rows), cols_(a.spectrum.cols), row_waves_(rows_), col_waves_(cols_) {}

  void run(const A* v, const Complex<A>* x, Complex<A>* y) const {
    const int64_t h = rows_ / a_.stride_rows, w = cols_ / a_.stride_cols, half = cosines(w), full_half = cosines(cols_);
    const double share = 1 / double(a_.stride_rows * a_.stride_cols);
    for (int64_t f1 = 0; f1 < h; ++f1) {
      for (int64_t f2 = 0; f2 < half; ++f2) {
        double re = 0, im = 0;
        for (int64_t g1 = f1; g1 < rows_; g1 += h) {
          for (int64_t g2 = f2; g2 < cols_; g2 += w) {
            const bool mirrored = g2 >= full_half;  // stored as the conjugate of the opposite frequency
            const int64_t r = mirrored ? (rows_ - g1) % rows_ : g1, c = mirrored ? cols_ - g2 : g2;
            const int64_t e = r * full_half + c, p1 = a_.first_row * g1 % rows_, p2 = a_.first_col * g2 % cols_;
            const double c1 = row_waves_.cos[size_t(p1)], s1 = row_waves_.sin[size_t(p1)];
            const double c2 = col_waves_.cos[size_t(p2)], s2 = col_waves_.sin[size_t(p2)];
            const double turn = c1 * c2 - s1 * s2, lift = s1 * c2 + c1 * s2;
            const double a = double(x[e].re) * v[e], b = double(x[e].im) * (mirrored ? -1 : 1) * v[e];
            re += turn * a - lift * b;
            im += turn * b + lift * a;
          }
        }
        y[f1 * half + f2] = {A(share * re), A(share * im)};
      }
    }
  }

 private:
  const MultiplyArgs& a_;
  int64_t rows_, cols_;
  Circle row_waves_, col_waves_;
};

template <class A>
void multiply_of(const MultiplyArgs& a, const Threads& threads) {
  const Spectrum& s = a.spectrum;
  const Circle row_circle(s.rows), col_circle(s.cols);
  const Waves rows(row_circle, s.rows, s.taps.rows, s.taps.dilation_rows);
  const Waves cols(col_circle, s.cols, s.taps.cols, s.taps.dilation_cols);
  const bool folds = a.stride_rows > 1 || a.stride_cols > 1;
  const Fold<A> fold(a);
  const int64_t plane = s.rows * s.half();
  const int64_t folded = s.rows / a.stride_rows * cosines(s.cols / a.stride_cols);
  const auto* x = static_cast<const Complex<A>*>(a.x);
  auto* y = static_cast<Complex<A>*>(a.y);
  share_out(threads, s.channels, (1 << 14) / (plane * a.batch) + 1, [&](int64_t begin, int64_t end) {
    std::vector<A> v(static_cast<size_t>(plane));
    std::vector<double> scratch(static_cast<size_t>(root_scratch(s)));
    for (int64_t k = begin; k < end; ++k) {
      kernels<A>().inverse_root(s, k, rows.view(), cols.view(), v.data(), scratch.data());
      for (int64_t n = 0; n < a.batch; ++n) {
        const int64_t map = n * s.channels + k;
        const Complex<A>* from = x + map * plane;
        Complex<A>* to = y + map * (folds ? folded : plane);
        if (folds)
          fold.run(v.data(), from, to);
        else
          for (int64_t e = 0; e < plane; ++e) to[e] = {from[e].re * v[size_t(e)], from[e].im * v[size_t(e)]};
      }
    }
  });
}

}  // namespace

void lags(const LagsArgs& a, const Threads& threads) {
  const int64_t products = a.depth * a.taps.count() * a.taps.count() / 2;
  share_out(threads, a.channels, (1 << 15) / (products + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(size_t(a.taps.count() * kLagBlock + a.taps.lags() * kLagLanes));
    for (int64_t k = begin; k < end; ++k) table().lags(a, k, scratch.data());
  });
}

void inverse_root(const Spectrum& s, DType dtype, void* v, const Threads& threads) {
  const Circle row_circle(s.rows), col_circle(s.cols);
  const Waves rows(row_circle, s.rows, s.taps.rows, s.taps.dilation_rows);
  const Waves cols(col_circle, s.cols, s.taps.cols, s.taps.dilation_cols);
  const int64_t plane = s.rows * s.half();
  share_out(threads, s.channels, (1 << 13) / plane + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>(root_scratch(s)));
    for (int64_t k = begin; k < end; ++k) {
      if (dtype == DType::f64)
        table().f64.inverse_root(s, k, rows.view(), cols.view(), static_cast<double*>(v) + k * plane, scratch.data());
      else
        table().f32.inverse_root(s, k, rows.view(), cols.view(), static_cast<float*>(v) + k * plane, scratch.data());
    }
  });
}

void multiply(const MultiplyArgs& a, const Threads& threads) {
  a.dtype == DType::f64 ? multiply_of<double>(a, threads) : multiply_of<float>(a, threads);
}

void analyze(const MapArgs& a, const Threads& threads) {
  a.dtype == DType::f64 ? map_of<double>(a, true, threads) : map_of<float>(a, true, threads);
}

void synthesize(const MapArgs& a, const Threads& threads) {
  a.dtype == DType::f64 ? map_of<double>(a, false, threads) : map_of<float>(a, false, threads);
}

void contract(const ContractArgs& a, const Threads& threads) {
  a.dtype == DType::f64 ? contract_of<double>(a, threads) : contract_of<float>(a, threads);
}

void correlate(const CorrelateArgs& a, const Threads& threads) {
  a.dtype == DType::f64 ? correlate_of<double>(a, threads) : correlate_of<float>(a, threads);
}

void precondition(const PreconditionArgs& a, const Threads& threads) {
  a.dtype == DType::f64 ? precondition_of<double>(a, threads) : precondition_of<float>(a, threads);
}

}  // namespace normkern::cpu
