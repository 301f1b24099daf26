// ops_spectral_cpu.cpp: the schemas of the spectral operators of torch.ops.normkern, and what they are on the CPU.
#include "../cpu/spectrum.h"
#include "spectral.h"
#include "torch_threads.h"

namespace normkern::bind {
namespace {

void check_listed(const Tensor& t, const Frequencies& list, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous() && t.numel() > 0 && t.size(0) == list.count() && t.size(1) == 2,
                  "normkern: ", name, " must be a contiguous spectrum of ", list.count(), " frequencies");
}

struct SpectralCpu {
  static void run(const LagsArgs& a, const Tensor&) { cpu::lags(a, torch_threads()); }
  static void run(const Spectrum& s, DType dtype, void* v, const Tensor&) {
    cpu::inverse_root(s, dtype, v, torch_threads());
  }
  static void run(const MultiplyArgs& a, const Tensor&) { cpu::multiply(a, torch_threads()); }
  static void run(const PreconditionArgs& a, const Tensor&) {
    STD_TORCH_CHECK(a.spectrum.rows <= cpu::kMaxPreconditionPoints && a.spectrum.cols <= cpu::kMaxPreconditionPoints,
                    "normkern: on the CPU, precondition takes a torus of up to ", cpu::kMaxPreconditionPoints,
                    " points a side; got ", a.spectrum.rows, " and ", a.spectrum.cols);
    cpu::precondition(a, torch_threads());
  }
};

// x [batch, channels, points] to [frequencies, 2, batch, channels]; source as of precondition.
Tensor analyze(const Tensor& x, const Numbers& torus, const Numbers& source) {
  check_numbers(torus, 2, 1, "torus");
  check_numbers(source, 4, 0, "source");
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "normkern: x must be 4-D and not empty");
  MapArgs a;
  a.dtype = real_dtype(x, "x");
  a.batch = x.size(0);
  a.channels = x.size(1);
  a.rows = torus[0];
  a.cols = torus[1];
  a.row_points = points_of(source, 0, x.size(2), torus[0], "source");
  a.col_points = points_of(source, 2, x.size(3), torus[1], "source");
  for (int i = 0; i < 4; ++i) a.strides[i] = x.stride(i);
  const Tensor found = new_dense(x, {Frequencies{a.rows, a.cols}.count(), 2, a.batch, a.channels}, torch_dtype(x));
  a.from = x.const_data_ptr();
  a.to = found.mutable_data_ptr();
  cpu::analyze(a, torch_threads());
  return found;
}

// Back to the points of target, as of precondition.
Tensor synthesize(const Tensor& x, const Numbers& torus, const Numbers& target, double scale, bool channels_last) {
  check_numbers(torus, 2, 1, "torus");
  check_numbers(target, 6, 0, "target");
  check_listed(x, {torus[0], torus[1]}, "x");
  MapArgs a;
  a.dtype = real_dtype(x, "x");
  a.batch = x.size(2);
  a.channels = x.size(3);
  a.rows = torus[0];
  a.cols = torus[1];
  a.row_points = points_of(target, 0, target[2], torus[0], "target");
  a.col_points = points_of(target, 3, target[5], torus[1], "target");
  a.scale = scale;
  const Tensor y =
      new_dense(x, {a.batch, a.channels, a.row_points.count, a.col_points.count}, torch_dtype(x), channels_last);
  for (int i = 0; i < 4; ++i) a.strides[i] = y.stride(i);
  a.from = x.const_data_ptr();
  a.to = y.mutable_data_ptr();
  cpu::synthesize(a, torch_threads());
  return y;
}

template <class Args>
Args product_args(const Tensor& x, const Tensor& lags, const Numbers& taps, const Numbers& torus, const Numbers& stride,
                  double eps) {
  Args a;
  a.spectrum = spectrum_of(lags, taps, torus, eps);
  check_numbers(stride, 2, 1, "stride");
  STD_TORCH_CHECK(torus[0] % stride[0] == 0 && torus[1] % stride[1] == 0, "normkern: stride must divide the torus");
  a.dtype = real_dtype(x, "x");
  a.stride_rows = stride[0];
  a.stride_cols = stride[1];
  return a;
}

// See ContractArgs.
Tensor contract(const Tensor& x, const Tensor& weight, const Tensor& lags, const Numbers& dilation,
                const Numbers& torus, const Numbers& stride, double eps, bool transposed) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.is_contiguous() && weight.numel() > 0 && torch_dtype(weight) == torch_dtype(x),
      "normkern: weight must be contiguous, 4-D, not empty and of the dtype of x");
  check_numbers(dilation, 2, 1, "dilation");
  auto a = product_args<ContractArgs>(x, lags, {weight.size(2), weight.size(3), dilation[0], dilation[1]}, torus,
                                      stride, eps);
  a.depth = weight.size(1);
  a.transposed = transposed;
  const Frequencies whole{torus[0], torus[1]}, folded{torus[0] / stride[0], torus[1] / stride[1]};
  check_listed(x, transposed ? folded : whole, "x");
  STD_TORCH_CHECK(a.spectrum.channels == weight.size(0) && x.size(3) == weight.size(transposed ? 0 : 1),
                  "normkern: weight must have a row for each row of lags, and x the channels of weight");
  a.batch = x.size(2);
  const Tensor y =
      new_dense(x, {(transposed ? whole : folded).count(), 2, a.batch, transposed ? a.depth : a.spectrum.channels},
                torch_dtype(x));
  a.weight = weight.const_data_ptr();
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  cpu::contract(a, torch_threads());
  return y;
}

// See CorrelateArgs.
Tensor correlate(const Tensor& x, const Tensor& dy, const Tensor& lags, const Numbers& taps, const Numbers& torus,
                 const Numbers& stride, double eps) {
  auto a = product_args<CorrelateArgs>(x, lags, taps, torus, stride, eps);
  check_listed(x, {torus[0], torus[1]}, "x");
  check_listed(dy, {torus[0] / stride[0], torus[1] / stride[1]}, "dy");
  STD_TORCH_CHECK(torch_dtype(dy) == torch_dtype(x) && dy.size(2) == x.size(2) && dy.size(3) == a.spectrum.channels,
                  "normkern: dy must have the dtype and batch of x and a channel for each row of lags");
  a.batch = x.size(2);
  a.depth = x.size(3);
  const Tensor dweight = new_dense(x, {a.spectrum.channels, a.depth, taps[0], taps[1]}, torch_dtype(x));
  a.x = x.const_data_ptr();
  a.dy = dy.const_data_ptr();
  a.dweight = dweight.mutable_data_ptr();
  cpu::correlate(a, torch_threads());
  return dweight;
}

}  // namespace
}  // namespace normkern::bind

STABLE_TORCH_LIBRARY_FRAGMENT(normkern, library) {
  library.def("lags(Tensor weight) -> Tensor");
  library.def("inverse_root(Tensor lags, SymInt[] taps, SymInt[] torus, float eps, bool wide) -> Tensor");
  library.def(
      "spectral_multiply(Tensor x, Tensor lags, SymInt[] taps, SymInt[] torus, SymInt[] fold, float eps) -> Tensor");
  library.def(
      "precondition(Tensor x, Tensor lags, SymInt[] taps, SymInt[] torus, SymInt[] source, SymInt[] target, float eps) "
      "-> Tensor");
  library.def("spectral_analyze(Tensor x, SymInt[] torus, SymInt[] source) -> Tensor");
  library.def(
      "spectral_synthesize(Tensor x, SymInt[] torus, SymInt[] target, float scale, bool channels_last) -> Tensor");
  library.def(
      "spectral_contract(Tensor x, Tensor weight, Tensor lags, SymInt[] dilation, SymInt[] torus, SymInt[] stride, "
      "float eps, bool transposed) -> Tensor");
  library.def(
      "spectral_correlate(Tensor x, Tensor dy, Tensor lags, SymInt[] taps, SymInt[] torus, SymInt[] stride, float eps) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CPU, library) {
  normkern::bind::implement_spectral<normkern::bind::SpectralCpu>(library);
  library.impl("spectral_analyze", TORCH_BOX(&normkern::bind::analyze));
  library.impl("spectral_synthesize", TORCH_BOX(&normkern::bind::synthesize));
  library.impl("spectral_contract", TORCH_BOX(&normkern::bind::contract));
  library.impl("spectral_correlate", TORCH_BOX(&normkern::bind::correlate));
}
