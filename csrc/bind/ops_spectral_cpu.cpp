// ops_spectral_cpu.cpp: the schemas of the spectral operators of torch.ops.normkern, and what they are on the CPU.
#include "../cpu/spectrum.h"
#include "spectral.h"
#include "torch_threads.h"

namespace normkern::bind {
namespace {

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
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CPU, library) {
  normkern::bind::implement_spectral<normkern::bind::SpectralCpu>(library);
}
