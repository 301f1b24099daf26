// ops_standardize_cpu.cpp: the schemas of the operators that standardize many weights, and what they are on the CPU.
#include <torch/csrc/stable/ops.h>

#include "../cpu/standardize.h"
#include "standardize.h"

namespace normkern::bind {
namespace {

void run_on_torch_threads(int64_t tasks, void (*task)(void* state, int64_t index), void* state) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(state, i);
  });
}

struct StandardizeCpu {
  template <class Part>
  static void run(const Standardize<Part>& a, const Tensor&) {
    cpu::standardize(a, {int64_t(torch::stable::get_num_threads()), run_on_torch_threads});
  }
};

}  // namespace
}  // namespace normkern::bind

// Every line of every x is a group with an element of `weight`; absent weights, and what was not asked for, are tensors
// of size 0. mean and var are those of all x, one after the other.
STABLE_TORCH_LIBRARY_FRAGMENT(normkern, library) {
  library.def(
      "standardize(Tensor[] x, Tensor[] weight, float eps, bool save) -> (Tensor[] y, Tensor mean, Tensor var)");
  library.def(
      "standardize_backward(Tensor[] dy, Tensor[] x, Tensor[] weight, Tensor mean, Tensor var, float eps, "
      "SymInt[] needs) -> (Tensor[] dx, Tensor[] dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CPU, library) {
  normkern::bind::implement_standardize<normkern::bind::StandardizeCpu>(library);
}
