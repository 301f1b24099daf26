// ops_perturb_cpu.cpp: the schema of torch.ops.normkern.perturb_, and what it is on the CPU.
#include <torch/csrc/stable/ops.h>

#include "../cpu/perturb.h"
#include "perturb.h"

namespace normkern::bind {
namespace {

void run_on_torch_threads(int64_t tasks, void (*task)(void* state, int64_t index), void* state) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(state, i);
  });
}

struct PerturbCpu {
  static void run(const std::vector<Perturbed>& tensors, const Ascent& rule, const Tensor&) {
    cpu::perturb(tensors, rule, {int64_t(torch::stable::get_num_threads()), run_on_torch_threads});
  }
};

}  // namespace
}  // namespace normkern::bind

// An entry of every list for each weight; transform is the value of the enum in core/perturb.h, maximum is p = inf.
STABLE_TORCH_LIBRARY_FRAGMENT(normkern, library) {
  library.def(
      "perturb_(Tensor(a!)[] weights, Tensor(b!)[] copies, Tensor[] grads, float[] rho, int[] transformed, "
      "int transform, bool maximum, float eta, float grad_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CPU, library) {
  library.impl("perturb_", TORCH_BOX(&normkern::bind::perturb<normkern::bind::PerturbCpu>));
}
