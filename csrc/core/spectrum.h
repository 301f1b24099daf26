// spectrum.h: the power spectrum of an output channel of a convolution, from the lags of its kernel.
//
// On a torus of h x w points the kernels a_j (j: input channels) of one output channel have the power spectrum
//   S(w1, w2) = sum_j |F a_j|^2 = sum over lags d of r[d] cos(w1 d1 + w2 d2),  r[d] = sum_j sum_p a_j[p] a_j[p + d]
// (Wiener and Khinchin), exact for every torus, also one on which the lags wrap. r[-d] = r[d], so half the plane of
// lags is kept: first row 0 with columns 0 and up, then the rows below with all their columns. Both signs of w2 come
// from two sums,
//   S(w1, +-w2) = E -+ O,  E = sum m r cos(w1 d1) cos(w2 d2),  O = sum m r sin(w1 d1) sin(w2 d2),
// with m = 1 at d = 0 and 2 elsewhere.
#pragma once

#include <cstdint>

#include "problem.h"

namespace normkern {

// The taps of a kernel.
struct Taps {
  int64_t rows = 1, cols = 1, dilation_rows = 1, dilation_cols = 1;

  constexpr int64_t count() const { return rows * cols; }
  constexpr int64_t lags() const { return cols + (rows - 1) * (2 * cols - 1); }
  // Lags of row d1 run over columns first_col(d1) .. cols - 1 from here.
  constexpr int64_t first_lag(int64_t d1) const { return d1 == 0 ? 0 : cols + (d1 - 1) * (2 * cols - 1); }
  constexpr int64_t first_col(int64_t d1) const { return d1 == 0 ? 0 : 1 - cols; }
};

// The points of one axis of the torus that a tensor holds: first, first + step, ...
struct Points {
  int64_t first = 0, step = 1, count = 0;
};

// Real spectrum of an axis of n points: cosines 0 .. n/2, then sines 1 .. (n-1)/2.
constexpr int64_t cosines(int64_t n) { return n / 2 + 1; }
constexpr int64_t sines(int64_t n) { return (n - 1) / 2; }

// Sums of products of a kernel with itself: weight [channels, depth, taps] to lags [channels, lags].
struct LagsArgs {
  const void* weight = nullptr;
  DType dtype = DType::f32;
  int64_t channels = 0, depth = 0;
  Taps taps;
  double* lags = nullptr;
};

// What turns lags into V = S^(-1/2). S is kept at eps * r[0] or more; a channel of zeros (r[0] = 0) gets V = 0, but for
// eps = 0, where a null of the spectrum makes V infinite.
struct Spectrum {
  const double* lags = nullptr;  // [channels, taps.lags()]
  int64_t channels = 0;
  Taps taps;
  int64_t rows = 0, cols = 0;  // of the torus
  double eps = 0;

  constexpr int64_t half() const { return cosines(cols); }  // columns of a one-sided spectrum
};

// Multiplies one-sided spectra by V and folds them: where an axis has `stride` > 1, what comes out is the spectrum of
// every stride-th point from `first` on, stride times shorter. Strides divide the torus.
struct MultiplyArgs {
  Spectrum spectrum;
  DType dtype = DType::f32;  // f32 or f64: of the real and imaginary parts
  int64_t batch = 0;
  int64_t first_row = 0, first_col = 0, stride_rows = 1, stride_cols = 1;
  const void* x = nullptr;  // [batch, channels, rows, cols/2 + 1] complex
  void* y = nullptr;  // [batch, channels, rows/stride_rows, cols/stride_cols/2 + 1] complex; may be x if not folded
};

// y = the points `target` of the circular convolution with v = F^-1 V of what x holds at the points `source`.
struct PreconditionArgs {
  Spectrum spectrum;
  DType dtype = DType::f32;  // f32 or f64, of x and y
  int64_t batch = 0;
  Points source_rows, source_cols, target_rows, target_cols;
  const void* x = nullptr;
  void* y = nullptr;
  int64_t x_strides[4] = {}, y_strides[4] = {};  // of [batch, channels, rows, cols], in elements
};

// The frequencies of a real map, one of every conjugate pair: rows 0 .. rows/2 with columns 0 .. cols/2, then the rows
// -1, -2, ... that are no mirror of a row, with the columns that are no mirror of a column.
struct Frequencies {
  int64_t rows = 1, cols = 1;  // of the torus

  struct At {
    int64_t index;
    bool mirrored;  // the list has the opposite frequency, whose value is the conjugate
  };

  constexpr int64_t count() const { return cosines(rows) * cosines(cols) + sines(rows) * sines(cols); }
  constexpr bool own_mirror(int64_t f1, int64_t f2) const { return 2 * f1 % rows == 0 && 2 * f2 % cols == 0; }
  // f1 in [0, rows), f2 in [0, cols).
  constexpr At at(int64_t f1, int64_t f2) const {
    bool mirrored = 2 * f2 > cols;
    if (mirrored) {
      f1 = f1 == 0 ? 0 : rows - f1;
      f2 = cols - f2;
    }
    if (2 * f1 > rows && (f2 == 0 || 2 * f2 == cols)) {
      f1 = rows - f1;
      mirrored = !mirrored;
    }
    if (2 * f1 <= rows) return {f1 * cosines(cols) + f2, mirrored};
    return {cosines(rows) * cosines(cols) + (rows - f1 - 1) * sines(cols) + f2 - 1, mirrored};
  }
};

// A map and its spectrum [frequencies, 2 (real, imaginary), batch, channels], X(f) = sum over points of x e^(-i w.p)
// and back, x(p) = scale * sum over all frequencies of X e^(i w.p), at the points that the map holds.
struct MapArgs {
  DType dtype = DType::f32;  // f32 or f64
  int64_t batch = 0, channels = 0;
  int64_t rows = 0, cols = 0;  // of the torus
  Points row_points, col_points;
  int64_t strides[4] = {};  // of the map, in elements
  const void* from = nullptr;
  void* to = nullptr;
  double scale = 1;
};

// The preconditioned convolution between two spectra as of MapArgs. y(g) = sum over the aliases f of g of V(f) A(f)
// x(f), A_kc(f) = sum over taps of w_kc[t] e^(i w.t): x is on the whole torus, y on one that is shorter by the strides,
// which divide it. Transposed: x, on the shorter torus, is the gradient of y, and y(f) = A(f)^H V(f) x(g(f)).
struct ContractArgs {
  Spectrum spectrum;  // its channels are those of the shorter torus
  DType dtype = DType::f32;
  int64_t batch = 0, depth = 0;  // depth: channels on the whole torus
  int64_t stride_rows = 1, stride_cols = 1;
  bool transposed = false;
  const void* weight = nullptr;  // [channels, depth, taps rows, taps cols]
  const void* x = nullptr;
  void* y = nullptr;
};

// The gradient of the taps of such a convolution, from x (whole torus) and that of its result.
struct CorrelateArgs {
  Spectrum spectrum;
  DType dtype = DType::f32;
  int64_t batch = 0, depth = 0, stride_rows = 1, stride_cols = 1;
  const void* x = nullptr;
  const void* dy = nullptr;
  void* dweight = nullptr;  // [channels, depth, taps rows, taps cols]
};

// Moves points between a map and the whole torus, which is dense: [batch, channels, rows, cols].
struct PointsArgs {
  DType dtype = DType::f32;
  int64_t batch = 0, channels = 0, rows = 0, cols = 0;
  Points row_points, col_points;
  const void* from = nullptr;
  void* to = nullptr;
  int64_t strides[4] = {};  // of the map, in elements
};

}  // namespace normkern
