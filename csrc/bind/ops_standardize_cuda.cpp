// ops_standardize_cuda.cpp: the operators that standardize many weights, on CUDA.
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/standardize.h"
#include "standardize.h"
#include "torch_cuda.h"

namespace normkern::bind {
namespace {

struct StandardizeCuda {
  template <class Part>
  static void run(const Standardize<Part>& a, const Tensor& x) {
    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cuda::standardize(a, current_cuda_stream(device)), "launch failed");
  }
};

}  // namespace
}  // namespace normkern::bind

STABLE_TORCH_LIBRARY_IMPL(normkern, CUDA, library) {
  normkern::bind::implement_standardize<normkern::bind::StandardizeCuda>(library);
}
