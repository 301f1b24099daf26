// ops_perturb_cpu.cpp: the schema of torch.ops.normkern.perturb_, and what it is on the CPU.
#include "../cpu/perturb.h"
#include "perturb.h"
#include "torch_threads.h"

namespace normkern::bind {
namespace {

struct PerturbCpu {
  static void run(const std::vector<Perturbed>& tensors, const Ascent& rule, const Tensor&) {
    cpu::perturb(tensors, rule, torch_threads());
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
