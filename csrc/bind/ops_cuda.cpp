// ops_cuda.cpp: the operators of torch.ops.normkern on CUDA: plan, allocate the workspace, launch, check.
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "../cuda/entry.h"
#include "torch_cuda.h"

namespace normkern::bind {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cannot read the device's attributes");
  return value;
}

Gpu describe(int device) {
  Gpu gpu;
  gpu.sms = attribute(cudaDevAttrMultiProcessorCount, device);
  gpu.smem_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.smem_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  gpu.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  // Beyond the portable 8, resident() asks the device before a launch.
  gpu.max_cluster = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 ? kLargestCluster : 1;
  return gpu;
}

const Gpu& gpu_of(int device) {
  static const std::vector<Gpu> gpus = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cannot count the devices");
    std::vector<Gpu> all;
    for (int i = 0; i < count; ++i) all.push_back(describe(i));
    return all;
  }();
  return gpus.at(device);
}

// Tests send every problem through every strategy with NORMKERN_STRATEGY.
Strategy requested_strategy() {
  const char* name = std::getenv("NORMKERN_STRATEGY");
  if (!name || !*name) return Strategy::automatic;
  constexpr std::pair<const char*, Strategy> known[] = {{"warp", Strategy::warp},
                                                        {"block", Strategy::block},
                                                        {"cluster", Strategy::cluster},
                                                        {"subgrid", Strategy::subgrid},
                                                        {"split", Strategy::split}};
  for (const auto& [label, strategy] : known)
    if (!std::strcmp(name, label)) return strategy;
  STD_TORCH_CHECK(false, "normkern: NORMKERN_STRATEGY must be warp, block, cluster, subgrid or split; got ", name);
  return Strategy::automatic;
}

// A plan whose blocks find room on the device as it is now, or one that needs none at once.
Plan plan_for(const Problem& p, Request request, int device) {
  Gpu gpu = gpu_of(device);
  gpu.sms = ours_of(gpu.sms);
  const Plan plan = make_plan(p, request, gpu);
  bool fits = true;
  check(cuda::resident(p, plan, request.pass, fits), "cannot ask the device for room");
  if (fits) return plan;
  request.strategy = Strategy::split;
  return make_plan(p, request, gpu);
}

bool aligned(std::initializer_list<const void*> buffers) {
  for (const void* buffer : buffers)
    if (reinterpret_cast<uintptr_t>(buffer) % 16 != 0) return false;
  return true;
}

Request request_of(const ForwardArgs& a) {
  return {Pass::forward,
          aligned({a.x, a.add, a.residual, a.y, a.total}),
          false,
          requested_strategy(),
          a.add != nullptr,
          a.mask_out != nullptr};
}

Request request_of(const BackwardArgs& a) {
  return {Pass::backward,
          aligned({a.dy, a.dtotal, a.x, a.residual, a.dx, a.dresidual}),
          a.dweight.data || a.dbias.data,
          requested_strategy(),
          a.dtotal != nullptr,
          a.mask != nullptr};
}

Request request_of(const MomentsArgs& a) { return {Pass::moments, aligned({a.x}), false, requested_strategy()}; }

void check_apart(const Problem& p, const ForwardArgs& a) {
  STD_TORCH_CHECK(!moves_parameters(a, p.affine.groups()),
                  "batch_norm: unsupported operation: running_mean or running_var, which are written to, and weight or "
                  "bias refer to a single memory location; clone() them first");
}
template <class Args>
void check_apart(const Problem&, const Args&) {}

struct Cuda {
  static constexpr bool kMasks = true;

  // t, or a copy of it on a 16-byte boundary.
  static Tensor at_a_boundary(const Tensor& t) {
    if (aligned({t.const_data_ptr()})) return t;
    const int device = t.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor copy = new_like(t);
    const size_t bytes = size_t(t.numel() * size_of(dtype_of(t, "x")));
    check(cudaMemcpyAsync(copy.mutable_data_ptr(), t.const_data_ptr(), bytes, cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(current_cuda_stream(device))),
          "cannot copy to a 16-byte boundary");
    return copy;
  }

  template <class Args>
  static void run(const Problem& p, const Args& a, const Tensor& x) {
    check_apart(p, a);
    const int device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Plan plan = plan_for(p, request_of(a), device);
    // From torch's caching allocator: it may be handed out again at once, but only to later work on this stream.
    const Tensor workspace = new_vector(x, plan.workspace_bytes, aoti_torch_dtype_uint8());
    check(launch(p, plan, a, data_or_null(workspace), current_cuda_stream(device)), "launch failed");
  }

  static void run(const RunningArgs& a, const Tensor& of) {
    const int device = of.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check(cuda::update_running(a, current_cuda_stream(device)), "launch failed");
  }

  static int launch(const Problem& p, const Plan& plan, const ForwardArgs& a, void* workspace, void* stream) {
    return cuda::forward(p, plan, a, workspace, stream);
  }
  static int launch(const Problem& p, const Plan& plan, const BackwardArgs& a, void* workspace, void* stream) {
    return cuda::backward(p, plan, a, workspace, stream);
  }
  static int launch(const Problem& p, const Plan& plan, const MomentsArgs& a, void* workspace, void* stream) {
    return cuda::moments(p, plan, a, workspace, stream);
  }
};

}  // namespace
}  // namespace normkern::bind

STABLE_TORCH_LIBRARY_IMPL(normkern, CUDA, library) {
  normkern::bind::implement<normkern::bind::Cuda>(library);
  library.impl("masked_forward", TORCH_BOX(&normkern::bind::masked_forward<normkern::bind::Cuda>));
  library.impl("update_running", TORCH_BOX(&normkern::bind::update_running<normkern::bind::Cuda>));
}
