// ops_perturb_cuda.cpp: torch.ops.normkern.perturb_ on CUDA: plan, allocate the workspace, launch, check.
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/perturb.h"
#include "perturb.h"
#include "torch_cuda.h"

namespace normkern::bind {
namespace {

struct PerturbCuda {
  static void run(const std::vector<Perturbed>& tensors, const Ascent& rule, const Tensor& of) {
    const int device = of.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    int sms = 0;
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cannot read the device's attributes");
    const cuda::PerturbPlan plan = cuda::plan_perturb(tensors, ours_of(sms));
    // From torch's caching allocator: it may be handed out again at once, but only to later work on this stream.
    const Tensor workspace = new_vector(of, plan.workspace_bytes, aoti_torch_dtype_uint8());
    check(cuda::perturb(tensors, rule, plan, workspace.mutable_data_ptr(), current_cuda_stream(device)),
          "launch failed");
  }
};

}  // namespace
}  // namespace normkern::bind

STABLE_TORCH_LIBRARY_IMPL(normkern, CUDA, library) {
  library.impl("perturb_", TORCH_BOX(&normkern::bind::perturb<normkern::bind::PerturbCuda>));
}
