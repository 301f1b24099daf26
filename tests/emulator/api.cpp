// api.cpp: the emulated kernels as a C library, for tests/emulator/backend.py. Each call makes the plan as the binding
// does, lends a poisoned workspace, tells the checker of every buffer, runs, and looks whether all of the output was
// written. 0, or an error with nk_last_error().
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/entry.h"
#include "emulator.hpp"

namespace {

using namespace normkern;
using emulator::Use;

constexpr int kUnknownError = 999;
constexpr unsigned char kPoison = 0xff;

// The buffers of one call, as the checker knows them.
class Buffers {
 public:
  ~Buffers() {
    for (void* data : added_) emulator::drop_region(data);
  }
  void in(const void* data, int64_t count, int64_t size, const char* name) {
    add(const_cast<void*>(data), count, size, Use::In, name);
  }
  void out(void* data, int64_t count, int64_t size, const char* name) {
    if (!data) return;
    add(data, count, size, Use::Out, name);
    outputs_.push_back(data);
  }
  void in(const Param& param, int64_t count, const char* name) { in(param.data, count, size_of(param.dtype), name); }
  void out(const Grad& grad, int64_t count, const char* name) { out(grad.data, count, size_of(grad.dtype), name); }
  void changed(const Grad& grad, int64_t count, const char* name) {
    add(grad.data, count, size_of(grad.dtype), Use::InOut, name);
  }
  void workspace(void* data, int64_t bytes) { add(data, bytes, 1, Use::Out, "workspace", 4); }
  void require_outputs() const {
    for (void* data : outputs_) emulator::require_written(data);
  }

 private:
  std::vector<void*> added_, outputs_;

  void add(void* data, int64_t count, int64_t size, Use use, const char* name, int grain = 0) {
    if (!data || count == 0) return;
    emulator::add_region(data, size_t(count * size), use, name, grain ? grain : int(size));
    added_.push_back(data);
  }
};

// As large as the plan says and not a byte more: the bytes behind it must stay as they are.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(size_t(bytes)) {
    if (posix_memalign(&data_, 256, bytes_ + kGuard)) abort();
    std::memset(data_, kPoison, bytes_ + kGuard);
  }
  ~Workspace() { free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }
  bool overrun() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (static_cast<unsigned char*>(data_)[bytes_ + i] != kPoison) return true;
    return false;
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kGuard = 0;  // AddressSanitizer has its own
#else
  static constexpr size_t kGuard = 256;
#endif
  size_t bytes_;
  void* data_ = nullptr;
};

template <class Args>
int run(const Problem& p, Request request, const Gpu& gpu, Pass pass, const Args& args, Buffers& buffers,
        Plan* plan_out, int (*entry)(const Problem&, const Plan&, const Args&, void*, void*)) {
  emulator::set_last_error("");
  try {
    request.pass = pass;
    emulator::options.sms = gpu.sms;
    emulator::options.shared_limit = gpu.smem_per_block;
    emulator::options.shared_per_sm = gpu.smem_per_sm;
    Plan plan = make_plan(p, request, gpu);
    bool fits = true;
    if (const int error = cuda::resident(p, plan, pass, fits)) return error;
    if (!fits) {
      request.strategy = Strategy::split;
      plan = make_plan(p, request, gpu);
    }
    if (plan_out) *plan_out = plan;
    Workspace workspace(plan.workspace_bytes);
    buffers.workspace(workspace.data(), plan.workspace_bytes);
    const int error = entry(p, plan, args, workspace.data(), nullptr);
    if (error) {
      if (!*emulator::last_error()) emulator::set_last_error(("error " + std::to_string(error)).c_str());
      return error;
    }
    if (workspace.overrun()) throw std::runtime_error("a kernel wrote past the end of the workspace");
    buffers.require_outputs();
    return 0;
  } catch (const std::exception& error) {
    emulator::set_last_error(error.what());
    return kUnknownError;
  }
}

}  // namespace

#define NK_API extern "C" __attribute__((visibility("default")))

NK_API const char* nk_last_error() { return emulator::last_error(); }

NK_API void nk_options(uint64_t seed, int resident_clusters, int yield_percent, int preempt_ppm) {
  emulator::options.seed = seed;
  emulator::options.resident_clusters = resident_clusters;
  emulator::options.yield_percent = yield_percent;
  emulator::options.preempt_ppm = preempt_ppm;
}

// What holds places on the chip beside the kernels: multiprocessors, and room that large clusters would need.
NK_API void nk_occupy(int64_t busy_sms, int largest_cluster) {
  emulator::options.busy_sms = busy_sms;
  emulator::options.largest_cluster = largest_cluster;
}

// Sizes of the structs, in the order of backend.py's mirrors: a mirror that has fallen behind shows at once.
NK_API int nk_sizes(int64_t* sizes, int room) {
  const int64_t all[] = {sizeof(Domain),      sizeof(Problem),      sizeof(Param),       sizeof(Grad),
                         sizeof(ForwardArgs), sizeof(BackwardArgs), sizeof(MomentsArgs), sizeof(Gpu),
                         sizeof(Request),     sizeof(Launch),       sizeof(Reduce),      sizeof(Team),
                         sizeof(Plan),        sizeof(Running),      sizeof(RunningArgs)};
  const int count = int(sizeof all / sizeof all[0]);
  for (int i = 0; i < count && i < room; ++i) sizes[i] = all[i];
  return count;
}

NK_API int nk_forward(const Problem* p, const Request* request, const Gpu* gpu, const ForwardArgs* a, Plan* plan) {
  const int64_t numel = p->stats.numel(), groups = p->stats.groups(), channels = p->affine.groups();
  const int64_t size = size_of(p->dtype);
  Buffers buffers;
  buffers.in(a->x, numel, size, "x");
  buffers.in(a->add, numel, size, "add");
  buffers.in(a->weight, channels, "weight");
  buffers.in(a->bias, channels, "bias");
  buffers.in(a->residual, numel, size, "residual");
  buffers.in(a->mean, groups, "mean");
  buffers.in(a->var, groups, "var");
  buffers.out(a->y, numel, size, "y");
  buffers.out(a->total, numel, size, "total");
  buffers.out(a->mean_out, groups, sizeof(double), "mean_out");
  buffers.out(a->var_out, groups, sizeof(double), "var_out");
  buffers.changed(a->running.mean, channels, "running_mean");
  buffers.changed(a->running.var, channels, "running_var");
  buffers.out(a->mask_out, mask_bytes(*p), 1, "mask");
  if (moves_parameters(*a, channels)) {
    emulator::set_last_error("running statistics are weight or bias");
    return kUnknownError;
  }
  return run(*p, *request, *gpu, Pass::forward, *a, buffers, plan, cuda::forward);
}

NK_API int nk_backward(const Problem* p, const Request* request, const Gpu* gpu, const BackwardArgs* a, Plan* plan) {
  const int64_t numel = p->stats.numel(), groups = p->stats.groups(), channels = p->affine.groups();
  const int64_t size = size_of(p->dtype);
  Buffers buffers;
  buffers.in(a->dy, numel, size, "dy");
  buffers.in(a->dtotal, numel, size, "dtotal");
  buffers.in(a->x, numel, size, "x");
  buffers.in(a->weight, channels, "weight");
  buffers.in(a->bias, channels, "bias");
  buffers.in(a->residual, numel, size, "residual");
  buffers.in(a->mean, groups, "mean");
  buffers.in(a->var, groups, "var");
  buffers.out(a->dx, numel, size, "dx");
  buffers.out(a->dweight, channels, "dweight");
  buffers.out(a->dbias, channels, "dbias");
  buffers.out(a->dresidual, numel, size, "dresidual");
  buffers.in(a->mask, mask_bytes(*p), 1, "mask");
  return run(*p, *request, *gpu, Pass::backward, *a, buffers, plan, cuda::backward);
}

NK_API int nk_moments(const Problem* p, const Request* request, const Gpu* gpu, const MomentsArgs* a, Plan* plan) {
  const int64_t numel = p->stats.numel(), groups = p->stats.groups();
  Buffers buffers;
  buffers.in(a->x, numel, size_of(p->dtype), "x");
  buffers.out(a->mean_out, groups, sizeof(double), "mean_out");
  buffers.out(a->var_out, groups, sizeof(double), "var_out");
  return run(*p, *request, *gpu, Pass::moments, *a, buffers, plan, cuda::moments);
}

NK_API int nk_update_running(const RunningArgs* a) {
  emulator::set_last_error("");
  const int64_t channels = a->channels, moments = a->batch * channels, size = int64_t(sizeof(double));
  Buffers buffers;
  buffers.in(a->batch_mean, moments, size, "batch_mean");
  buffers.in(a->batch_var, moments, size, "batch_var");
  buffers.changed(a->running.mean, channels, "running_mean");
  buffers.changed(a->running.var, channels, "running_var");
  try {
    return cuda::update_running(*a, nullptr);
  } catch (const std::exception& error) {
    emulator::set_last_error(error.what());
    return kUnknownError;
  }
}
