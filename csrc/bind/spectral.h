// spectral.h: torch tensors to the arguments of the spectral programs, written once for every device.
//
// taps holds rows, cols and their dilations; torus its two sides; source [first, step] and target [first, step, count]
// of rows, then of columns; fold the first point and the stride of rows, then of columns. Lags are float64.
#pragma once

#include "../core/spectrum.h"
#include "tensor.h"

namespace normkern::bind {

using Numbers = std::vector<int64_t>;

inline void check_numbers(const Numbers& numbers, size_t count, int64_t least, const char* name) {
  bool right = numbers.size() == count;
  for (const int64_t number : numbers) right = right && number >= least && number < (int64_t(1) << 31);
  STD_TORCH_CHECK(right, "normkern: ", name, " must hold ", count, " numbers of at least ", least);
}

inline Taps taps_of(const Numbers& taps) {
  check_numbers(taps, 4, 1, "taps");
  return {taps[0], taps[1], taps[2], taps[3]};
}

inline Spectrum spectrum_of(const Tensor& lags, const Numbers& taps, const Numbers& torus, double eps) {
  check_numbers(torus, 2, 1, "torus");
  Spectrum s;
  s.taps = taps_of(taps);
  STD_TORCH_CHECK(
      dtype_of(lags, "lags") == DType::f64 && lags.is_contiguous() && lags.dim() == 2 && lags.size(1) == s.taps.lags(),
      "normkern: lags must be contiguous, float64 and of shape (channels, ", s.taps.lags(), ")");
  STD_TORCH_CHECK(eps >= 0, "normkern: eps must be at least 0; got ", eps);
  s.lags = static_cast<const double*>(lags.const_data_ptr());
  s.channels = lags.size(0);
  s.rows = torus[0];
  s.cols = torus[1];
  s.eps = eps;
  return s;
}

inline DType real_dtype(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, "normkern: ", name, " must be float32 or float64");
  return dtype;
}

inline Tensor new_dense(const Tensor& device_of, const std::vector<int64_t>& sizes, int32_t dtype,
                        bool channels_last = false) {
  const size_t dim = sizes.size();
  std::vector<int64_t> strides(dim, 1);
  if (channels_last) {
    strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  } else {
    for (size_t i = dim - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  }
  return new_strided(device_of, int64_t(dim), sizes.data(), strides.data(), dtype);
}

template <class Device>
Tensor lags(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.numel() > 0,
                  "normkern: weight must be contiguous, 4-D and not empty");
  LagsArgs a;
  a.weight = weight.const_data_ptr();
  a.dtype = real_dtype(weight, "weight");
  a.channels = weight.size(0);
  a.depth = weight.size(1);
  a.taps = {weight.size(2), weight.size(3), 1, 1};
  const Tensor found = new_dense(weight, {a.channels, a.taps.lags()}, aoti_torch_dtype_float64());
  a.lags = static_cast<double*>(found.mutable_data_ptr());
  Device::run(a, weight);
  return found;
}

template <class Device>
Tensor inverse_root(const Tensor& lags, const Numbers& taps, const Numbers& torus, double eps, bool wide) {
  const Spectrum s = spectrum_of(lags, taps, torus, eps);
  const Tensor v =
      new_dense(lags, {s.channels, s.rows, s.half()}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (v.numel()) Device::run(s, wide ? DType::f64 : DType::f32, v.mutable_data_ptr(), lags);
  return v;
}

// x is the view of a one-sided complex spectrum as pairs of real numbers: [batch, channels, rows, cols/2 + 1, 2].
template <class Device>
Tensor multiply(const Tensor& x, const Tensor& lags, const Numbers& taps, const Numbers& torus, const Numbers& fold,
                double eps) {
  MultiplyArgs a;
  a.spectrum = spectrum_of(lags, taps, torus, eps);
  const Spectrum& s = a.spectrum;
  check_same_device(lags, x, "lags");
  check_numbers(fold, 4, 0, "fold");
  STD_TORCH_CHECK(fold[1] > 0 && fold[3] > 0 && s.rows % fold[1] == 0 && s.cols % fold[3] == 0,
                  "normkern: the strides of fold must divide the torus");
  STD_TORCH_CHECK(x.dim() == 5 && x.is_contiguous() && x.size(1) == s.channels && x.size(2) == s.rows &&
                      x.size(3) == s.half() && x.size(4) == 2,
                  "normkern: x must be a contiguous one-sided spectrum of the torus");
  a.dtype = real_dtype(x, "x");
  a.batch = x.size(0);
  a.first_row = fold[0];
  a.stride_rows = fold[1];
  a.first_col = fold[2];
  a.stride_cols = fold[3];
  const Tensor y =
      new_dense(x, {a.batch, s.channels, s.rows / a.stride_rows, cosines(s.cols / a.stride_cols), 2}, torch_dtype(x));
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  if (y.numel()) Device::run(a, x);
  return y;
}

inline Points points_of(const Numbers& numbers, size_t at, int64_t count, int64_t side, const char* name) {
  const Points p{numbers[at], numbers[at + 1], count};
  STD_TORCH_CHECK(p.step > 0 && p.count > 0 && p.first + (p.count - 1) * p.step < side, "normkern: the points of ",
                  name, " must lie on the torus");
  return p;
}

template <class Device>
Tensor precondition(const Tensor& x, const Tensor& lags, const Numbers& taps, const Numbers& torus,
                    const Numbers& source, const Numbers& target, double eps) {
  PreconditionArgs a;
  a.spectrum = spectrum_of(lags, taps, torus, eps);
  check_same_device(lags, x, "lags");
  check_numbers(source, 4, 0, "source");
  check_numbers(target, 6, 0, "target");
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.size(1) == a.spectrum.channels,
                  "normkern: x must be 4-D, not empty, with a channel for each row of lags");
  a.dtype = real_dtype(x, "x");
  a.batch = x.size(0);
  a.source_rows = points_of(source, 0, x.size(2), torus[0], "source");
  a.source_cols = points_of(source, 2, x.size(3), torus[1], "source");
  a.target_rows = points_of(target, 0, target[2], torus[0], "target");
  a.target_cols = points_of(target, 3, target[5], torus[1], "target");
  const bool channels_last = x.stride(1) == 1 && x.size(1) > 1;
  const Tensor y =
      new_dense(x, {a.batch, x.size(1), a.target_rows.count, a.target_cols.count}, torch_dtype(x), channels_last);
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    a.x_strides[i] = x.stride(i);
    a.y_strides[i] = y.stride(i);
  }
  Device::run(a, x);
  return y;
}

template <class Device>
void implement_spectral(torch::stable::detail::StableLibrary& library) {
  library.impl("lags", TORCH_BOX(&lags<Device>));
  library.impl("inverse_root", TORCH_BOX(&inverse_root<Device>));
  library.impl("spectral_multiply", TORCH_BOX(&multiply<Device>));
  library.impl("precondition", TORCH_BOX(&precondition<Device>));
}

}  // namespace normkern::bind
