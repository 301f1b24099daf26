// ops_standardize_cpu.cpp: the schemas of the operators that standardize many weights, and what they are on the CPU.
#include "../cpu/standardize.h"
#include "standardize.h"
#include "torch_threads.h"

namespace normkern::bind {
namespace {

struct StandardizeCpu {
  template <class Part>
  static void run(const Standardize<Part>& a, const Tensor&) {
    cpu::standardize(a, torch_threads());
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
