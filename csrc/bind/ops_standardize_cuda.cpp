// ops_standardize_cuda.cpp: the operators that standardize many weights, on CUDA.
#include <cuda_runtime_api.h>
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
    const int error = cuda::standardize(a, current_cuda_stream(device));
    STD_TORCH_CHECK(error == cudaSuccess, "normkern: launch failed: ", cudaGetErrorString(cudaError_t(error)));
  }
};

}  // namespace
}  // namespace normkern::bind

STABLE_TORCH_LIBRARY_IMPL(normkern, CUDA, library) {
  normkern::bind::implement_standardize<normkern::bind::StandardizeCuda>(library);
}
