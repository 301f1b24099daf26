// ops_spectral_cpu.cpp: the schemas of the spectral operators of torch.ops.normkern, and what they are on the CPU.
#include <torch/csrc/stable/ops.h>

#include "../cpu/spectrum.h"
#include "spectral.h"

namespace normkern::bind {
namespace {

void run_on_torch_threads(int64_t tasks, void (*task)(void* state, int64_t index), void* state) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(state, i);
  });
}

struct SpectralCpu {
  static cpu::Threads threads() { return {int64_t(torch::stable::get_num_threads()), run_on_torch_threads}; }
  static void run(const LagsArgs& a, const Tensor&) { cpu::lags(a, threads()); }
  static void run(const Spectrum& s, DType dtype, void* v, const Tensor&) { cpu::inverse_root(s, dtype, v, threads()); }
  static void run(const MultiplyArgs& a, const Tensor&) { cpu::multiply(a, threads()); }
  static void run(const PreconditionArgs& a, const Tensor&) {
    STD_TORCH_CHECK(a.spectrum.rows <= cpu::kMaxPreconditionPoints && a.spectrum.cols <= cpu::kMaxPreconditionPoints,
                    "normkern: on the CPU, precondition takes a torus of up to ", cpu::kMaxPreconditionPoints,
                    " points a side; got ", a.spectrum.rows, " and ", a.spectrum.cols);
    cpu::precondition(a, threads());
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
