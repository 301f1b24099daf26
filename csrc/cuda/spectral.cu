// spectral.cu: lags of kernels, V from lags, the product of spectra with V, and points of a torus; see spectrum.h.
//
// A thread has a frequency of a channel: it sums S from the lags in float64, 13 of them for 3x3, and applies V to every
// map of the batch. The sums go over a table of waves, so no thread computes a cosine but those that make it.
#include "../core/fast_div.h"
#include "platform.cuh"
#include "spectrum.h"

namespace normkern::cuda {

// Kernels have names of their own here: what the tests ask of norm kernels (16-byte accesses) is not for these.
namespace spectral {

using namespace nk;

constexpr int kSpectralThreads = 256;
constexpr int kLagThreads = 128;

struct Seat {
  int64_t first, step;
};

NK_DEVICE Seat seat() { return {int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int64_t(gridDim.x) * blockDim.x}; }

// ---- waves

// cos and sin of 2 pi i / n. The series end below 1e-17 up to an eighth of the circle, which is all they are asked for;
// the library's functions would take stack memory for angles that never come.
NK_DEVICE void wave(int64_t i, int64_t n, double& cosine, double& sine) {
  constexpr double kTurn = 6.283185307179586476925286766559;
  const int64_t quarter = (8 * i / n + 1) / 2;
  const double x = kTurn * double(4 * i - quarter * n) / double(4 * n), square = x * x;
  double c = 1, s = 1;
  for (int k = 20; k > 0; k -= 2) {
    c = 1 - c * square / double(k * (k - 1));
    s = 1 - s * square / double(k * (k + 1));
  }
  s *= x;
  cosine = quarter % 2 == 0 ? c : -s;
  sine = quarter % 2 == 0 ? s : c;
  if (quarter % 4 == 2 || quarter % 4 == 3) {
    cosine = -cosine;
    sine = -sine;
  }
}

// Tables of cos and sin of the rows, then of the columns.
struct Waves {
  double* table;
  int64_t rows, cols;
};

__global__ void __launch_bounds__(kSpectralThreads) fill_waves(const Waves w) {
  const Seat at = seat();
  for (int64_t i = at.first; i < w.rows + w.cols; i += at.step) {
    const bool row = i < w.rows;
    const int64_t n = row ? w.rows : w.cols, point = row ? i : i - w.rows;
    double* table = w.table + (row ? 0 : 2 * w.rows) + point;
    double cosine, sine;
    wave(point, n, cosine, sine);
    table[0] = cosine;
    table[n] = sine;
  }
}

// ---- lags

struct LagsOf {
  const void* weight;
  double* lags;
  int64_t depth;
  Taps taps;
};

// A block has a channel. Its threads are `per` lags times slices of the input channels; partial sums merge in order.
template <class T>
__global__ void __launch_bounds__(kLagThreads) sum_lags(const LagsOf a) {
  NK_DYNAMIC_SHARED(double, partial);
  const Taps& t = a.taps;
  const int64_t count = t.lags(), taps = t.count(), wide = 2 * t.cols - 1;
  const int per = int(count < kLagThreads ? count : kLagThreads), slices = kLagThreads / per;
  const int lag = int(threadIdx.x) % per, slice = int(threadIdx.x) / per;
  const T* weight = static_cast<const T*>(a.weight) + int64_t(blockIdx.x) * a.depth * taps;
  for (int64_t base = 0; base < count; base += per) {
    const int64_t d = base + lag;
    const bool mine = slice < slices && d < count;
    double sum = 0;
    if (mine) {
      const int64_t d1 = d < t.cols ? 0 : (d - t.cols) / wide + 1;
      const int64_t d2 = d < t.cols ? d : (d - t.cols) % wide + 1 - t.cols;
      const int64_t begin = d2 < 0 ? -d2 : 0, end = d2 < 0 ? t.cols : t.cols - d2;
      for (int64_t j = slice; j < a.depth; j += slices) {
        const T* from = weight + j * taps;
        for (int64_t p1 = 0; p1 < t.rows - d1; ++p1)
          for (int64_t p2 = begin; p2 < end; ++p2)
            sum += double(from[p1 * t.cols + p2]) * double(from[(p1 + d1) * t.cols + p2 + d2]);
      }
      partial[slice * per + lag] = sum;
    }
    __syncthreads();
    if (mine && slice == 0) {
      for (int other = 1; other < slices; ++other) sum += partial[other * per + lag];
      a.lags[int64_t(blockIdx.x) * count + d] = sum;
    }
    __syncthreads();
  }
}

// ---- V

// What a thread needs to know of V.
struct Root {
  Spectrum spectrum;
  const double* waves;

  template <class A>
  NK_DEVICE A at(int64_t channel, int64_t f1, int64_t f2) const {
    const Spectrum& s = spectrum;
    const Taps& t = s.taps;
    const double* r = s.lags + channel * t.lags();
    const double r0 = r[0];
    if (r0 == 0) return s.eps == 0 ? A(1 / r0) : A(0);
    const double *row_cos = waves, *row_sin = row_cos + s.rows, *col_cos = row_sin + s.rows,
                 *col_sin = col_cos + s.cols;
    const int64_t down = t.dilation_rows % s.rows * f1 % s.rows, right = t.dilation_cols % s.cols * f2 % s.cols;
    const int64_t far_left = (s.cols - (t.cols - 1) * right % s.cols) % s.cols;
    double sum = -r[0];
    int64_t d = 0;
    for (int64_t d1 = 0, p1 = 0; d1 < t.rows; ++d1) {
      double cosine = 0, sine = 0;
      int64_t p2 = d1 == 0 ? 0 : far_left;
      for (int64_t d2 = t.first_col(d1); d2 < t.cols; ++d2, ++d) {
        cosine += r[d] * col_cos[p2];
        sine += r[d] * col_sin[p2];
        p2 += right;
        if (p2 >= s.cols) p2 -= s.cols;
      }
      sum += 2 * (cosine * row_cos[p1] - sine * row_sin[p1]);
      p1 += down;
      if (p1 >= s.rows) p1 -= s.rows;
    }
    const double relative = sum / r0, kept = relative < s.eps ? s.eps : relative;
    return A(1 / sqrt(r0)) / A(sqrt(A(kept)));
  }
};

template <class A>
struct RootMap {
  Root root;
  A* v;
  FastDiv plane, half;
  int64_t count;
};

template <class A>
__global__ void __launch_bounds__(kSpectralThreads) write_roots(const RootMap<A> m) {
  const Seat at = seat();
  for (int64_t i = at.first; i < m.count; i += at.step) {
    const int64_t channel = m.plane.divide(i), e = i - channel * m.plane.divisor();
    const int64_t f1 = m.half.divide(e);
    m.v[i] = m.root.template at<A>(channel, f1, e - f1 * m.half.divisor());
  }
}

// ---- spectra

template <class A>
struct Product {
  Root root;
  const A* x;
  A* y;
  FastDiv plane, half;  // of y
  int64_t count;        // frequencies of y, all channels
  int64_t batch, first_row, first_col, stride_rows, stride_cols;
  double scale;
};

template <class A>
__global__ void __launch_bounds__(kSpectralThreads) multiply_spectrum(const Product<A> m) {
  const Spectrum& s = m.root.spectrum;
  const int64_t plane = m.plane.divisor(), half = m.half.divisor(), x_half = s.half(), x_plane = s.rows * x_half;
  const int64_t h = s.rows / m.stride_rows, w = s.cols / m.stride_cols;
  const double *row_cos = m.root.waves, *row_sin = row_cos + s.rows;
  const double *col_cos = row_sin + s.rows, *col_sin = col_cos + s.cols;
  const Seat at = seat();
  for (int64_t i = at.first; i < m.count; i += at.step) {
    const int64_t channel = m.plane.divide(i), e = i - channel * plane;
    const int64_t f1 = m.half.divide(e), f2 = e - f1 * half;
    A* y = m.y + 2 * i;
    for (int64_t g1 = f1; g1 < s.rows; g1 += h) {
      for (int64_t g2 = f2; g2 < s.cols; g2 += w) {
        const bool mirrored = g2 >= x_half;  // stored as the conjugate of the opposite frequency
        const int64_t r = mirrored && g1 > 0 ? s.rows - g1 : g1, c = mirrored ? s.cols - g2 : g2;
        const double v = m.scale * double(m.root.template at<A>(channel, r, c));
        const int64_t p1 = m.first_row * g1 % s.rows, p2 = m.first_col * g2 % s.cols;
        const double turn = row_cos[p1] * col_cos[p2] - row_sin[p1] * col_sin[p2];
        const double lift = row_sin[p1] * col_cos[p2] + row_cos[p1] * col_sin[p2];
        const A real = A(v * turn), imaginary = A(v * lift), sign = A(mirrored ? -1 : 1);
        const A* x = m.x + 2 * (channel * x_plane + r * x_half + c);
        const bool first = g1 == f1 && g2 == f2;
        for (int64_t n = 0; n < m.batch; ++n) {
          const Vec<A, 2> from = load<A, 2>(x + 2 * n * s.channels * x_plane);
          const A re = from.v[0], im = sign * from.v[1];
          Vec<A, 2> to = {};
          if (!first) to = load<A, 2>(y + 2 * n * s.channels * plane);
          to.v[0] += real * re - imaginary * im;
          to.v[1] += real * im + imaginary * re;
          store<A, 2>(y + 2 * n * s.channels * plane, to);
        }
      }
    }
  }
}

// ---- points

template <class T>
struct Moved {
  const T* from;
  T* to;
  int64_t count;
  FastDiv cols, rows, channels;  // of what is written
  Points row_points, col_points;
  FastDiv row_step, col_step;
  int64_t torus_rows, torus_cols;
  int64_t strides[4];
};

// The index of a point of the torus among those of the axis, or -1.
NK_DEVICE int64_t index_of(int64_t at, const Points& points, const FastDiv& step) {
  if (at < points.first) return -1;
  const int64_t i = step.divide(at - points.first);
  return i < points.count && points.first + i * points.step == at ? i : -1;
}

template <class T>
__global__ void __launch_bounds__(kSpectralThreads) embed_points(const Moved<T> m) {
  const Seat at = seat();
  for (int64_t i = at.first; i < m.count; i += at.step) {
    const int64_t line = m.cols.divide(i), map = m.rows.divide(line), n = m.channels.divide(map);
    const int64_t row = index_of(line - map * m.rows.divisor(), m.row_points, m.row_step);
    const int64_t col = index_of(i - line * m.cols.divisor(), m.col_points, m.col_step);
    T value = T(0);
    if (row >= 0 && col >= 0)
      value = m.from[n * m.strides[0] + (map - n * m.channels.divisor()) * m.strides[1] + row * m.strides[2] +
                     col * m.strides[3]];
    m.to[i] = value;
  }
}

template <class T>
__global__ void __launch_bounds__(kSpectralThreads) crop_points(const Moved<T> m) {
  const Seat at = seat();
  for (int64_t i = at.first; i < m.count; i += at.step) {
    const int64_t line = m.cols.divide(i), map = m.rows.divide(line), n = m.channels.divide(map);
    const int64_t row = line - map * m.rows.divisor(), col = i - line * m.cols.divisor();
    const int64_t there = (map * m.torus_rows + m.row_points.first + row * m.row_points.step) * m.torus_cols +
                          m.col_points.first + col * m.col_points.step;
    m.to[n * m.strides[0] + (map - n * m.channels.divisor()) * m.strides[1] + row * m.strides[2] + col * m.strides[3]] =
        m.from[there];
  }
}

// ---- launches

LaunchConfig over(int64_t count) {
  constexpr int64_t kMost = 1 << 16;
  const int64_t blocks = (count + kSpectralThreads - 1) / kSpectralThreads;
  LaunchConfig config;
  config.grid = dim3(unsigned(blocks < kMost ? blocks : kMost));
  config.block = dim3(kSpectralThreads);
  return config;
}

template <class A>
int inverse_root_of(const Spectrum& s, const double* waves, void* v, Stream stream) {
  const int64_t plane = s.rows * s.half();
  const RootMap<A> map{{s, waves}, static_cast<A*>(v), FastDiv(plane), FastDiv(s.half()), s.channels * plane};
  return launch(over(map.count), stream, write_roots<A>, map);
}

template <class A>
int multiply_of(const MultiplyArgs& a, const double* waves, double scale, Stream stream) {
  const Spectrum& s = a.spectrum;
  const int64_t half = cosines(s.cols / a.stride_cols), plane = s.rows / a.stride_rows * half;
  const Product<A> product{{s, waves},
                           static_cast<const A*>(a.x),
                           static_cast<A*>(a.y),
                           FastDiv(plane),
                           FastDiv(half),
                           s.channels * plane,
                           a.batch,
                           a.first_row,
                           a.first_col,
                           a.stride_rows,
                           a.stride_cols,
                           scale / double(a.stride_rows * a.stride_cols)};
  return launch(over(product.count), stream, multiply_spectrum<A>, product);
}

template <class T>
Moved<T> moved(const PointsArgs& a, int64_t rows, int64_t cols) {
  Moved<T> m{static_cast<const T*>(a.from),
             static_cast<T*>(a.to),
             a.batch * a.channels * rows * cols,
             FastDiv(cols),
             FastDiv(rows),
             FastDiv(a.channels),
             a.row_points,
             a.col_points,
             FastDiv(a.row_points.step),
             FastDiv(a.col_points.step),
             a.rows,
             a.cols,
             {}};
  for (int i = 0; i < 4; ++i) m.strides[i] = a.strides[i];
  return m;
}

template <class T>
int embed_of(const PointsArgs& a, Stream stream) {
  const Moved<T> m = moved<T>(a, a.rows, a.cols);
  return launch(over(m.count), stream, embed_points<T>, m);
}

template <class T>
int crop_of(const PointsArgs& a, Stream stream) {
  const Moved<T> m = moved<T>(a, a.row_points.count, a.col_points.count);
  return launch(over(m.count), stream, crop_points<T>, m);
}

}  // namespace spectral

int make_waves(const Spectrum& s, double* waves, void* stream) {
  const spectral::Waves w{waves, s.rows, s.cols};
  return nk::launch(spectral::over(s.rows + s.cols), nk::Stream(stream), spectral::fill_waves, w);
}

int lags(const LagsArgs& a, void* stream) {
  const spectral::LagsOf args{a.weight, a.lags, a.depth, a.taps};
  nk::LaunchConfig config;
  config.grid = dim3(unsigned(a.channels));
  config.block = dim3(spectral::kLagThreads);
  config.shared = spectral::kLagThreads * sizeof(double);
  if (a.dtype == DType::f64) return nk::launch(config, nk::Stream(stream), spectral::sum_lags<double>, args);
  return nk::launch(config, nk::Stream(stream), spectral::sum_lags<float>, args);
}

int inverse_root(const Spectrum& s, DType dtype, const double* waves, void* v, void* stream) {
  if (dtype == DType::f64) return spectral::inverse_root_of<double>(s, waves, v, nk::Stream(stream));
  return spectral::inverse_root_of<float>(s, waves, v, nk::Stream(stream));
}

int multiply(const MultiplyArgs& a, const double* waves, double scale, void* stream) {
  if (a.dtype == DType::f64) return spectral::multiply_of<double>(a, waves, scale, nk::Stream(stream));
  return spectral::multiply_of<float>(a, waves, scale, nk::Stream(stream));
}

int embed(const PointsArgs& a, void* stream) {
  if (a.dtype == DType::f64) return spectral::embed_of<double>(a, nk::Stream(stream));
  return spectral::embed_of<float>(a, nk::Stream(stream));
}

int crop(const PointsArgs& a, void* stream) {
  if (a.dtype == DType::f64) return spectral::crop_of<double>(a, nk::Stream(stream));
  return spectral::crop_of<float>(a, nk::Stream(stream));
}

}  // namespace normkern::cuda
