// perturb_api.cpp: the emulated ascent as a C library, for tests/emulator/perturb.py; like api.cpp.
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/perturb.h"
#include "emulator.hpp"

namespace {

using namespace normkern;
using emulator::Use;

// Tells the checker of buffers as long as it lives. Outputs must be written.
class Buffers {
 public:
  ~Buffers() {
    for (void* data : added_) emulator::drop_region(data);
  }
  void add(const void* data, int64_t bytes, Use use, const char* name, int grain) {
    added_.push_back(const_cast<void*>(data));
    emulator::add_region(added_.back(), size_t(bytes), use, name, grain);
  }

 private:
  std::vector<void*> added_;
};

int run(const std::vector<Perturbed>& tensors, const Ascent& rule, int sms) {
  emulator::options.sms = sms;
  const cuda::PerturbPlan plan = cuda::plan_perturb(tensors, sms);
  // Not a word more than the plan says, and filled with what is no number and no address.
  std::vector<uint64_t> workspace(size_t((plan.workspace_bytes + 7) / 8), ~uint64_t(0));
  Buffers buffers;
  buffers.add(workspace.data(), plan.workspace_bytes, Use::Out, "workspace", 4);
  for (const Perturbed& t : tensors) {
    const int64_t size = size_of(t.dtype), grad_size = size_of(t.grad_dtype);
    buffers.add(t.weight, t.count * size, Use::InOut, "weight", int(size));
    buffers.add(t.copy, t.count * size, Use::Out, "copy", int(size));
    buffers.add(t.grad, t.count * grad_size, Use::In, "grad", int(grad_size));
  }
  const int error = cuda::perturb(tensors, rule, plan, workspace.data(), nullptr);
  if (!error)
    for (const Perturbed& t : tensors) emulator::require_written(t.copy);
  return error;
}

}  // namespace

#define NK_API extern "C" __attribute__((visibility("default")))

NK_API int nk_perturb_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Perturbed);
  sizes[1] = sizeof(Ascent);
  return 2;
}

// Tensors must not be empty.
NK_API int nk_perturb(const Perturbed* tensors, int64_t count, const Ascent* rule, int sms) {
  emulator::set_last_error("");
  try {
    const int error = run(std::vector<Perturbed>(tensors, tensors + count), *rule, sms);
    if (error && !*emulator::last_error()) emulator::set_last_error(("error " + std::to_string(error)).c_str());
    return error;
  } catch (const std::exception& error) {
    emulator::set_last_error(error.what());
    return 999;
  }
}
