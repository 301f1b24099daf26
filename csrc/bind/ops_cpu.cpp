// ops_cpu.cpp: the schemas of torch.ops.normkern, and its operators on the CPU.
#include "../cpu/entry.h"
#include "tensor.h"
#include "torch_threads.h"

namespace normkern::bind {
namespace {

struct Cpu {
  static constexpr bool kMasks = false;
  static void run(const Problem& p, const ForwardArgs& a, const Tensor&) {
    cpu::forward(p, a, torch_threads());
    cpu::move_running(p, a);
  }
  static void run(const Problem& p, const BackwardArgs& a, const Tensor&) { cpu::backward(p, a, torch_threads()); }
  static void run(const Problem& p, const MomentsArgs& a, const Tensor&) { cpu::moments(p, a, torch_threads()); }
  static void run(const RunningArgs& a, const Tensor&) { cpu::update_running(a); }
};

}  // namespace
}  // namespace normkern::bind

// The same pool for calls that do not come through the dispatcher (direct.cpp), which links no torch.
extern "C" {
__attribute__((visibility("default"))) int64_t normkern_thread_count() {
  return int64_t(torch::stable::get_num_threads());
}
__attribute__((visibility("default"))) void normkern_run_on_threads(int64_t tasks, void (*task)(void*, int64_t),
                                                                    void* state) {
  normkern::bind::run_on_torch_threads(tasks, task, state);
}
}

// stats and affine are [batch, rows, keep, cols]; moments and act are the values of the enums in core/problem.h.
// What was not asked for comes back as a tensor of size 0. A mask (core/arguments.h) is uint8; backward takes it in the
// place of the residual.
STABLE_TORCH_LIBRARY(normkern, library) {
  library.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, "
      "SymInt[] stats, SymInt[] affine, int moments, int act, float eps, bool save) "
      "-> (Tensor y, Tensor mean, Tensor var)");
  library.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? var, "
      "SymInt[] stats, SymInt[] affine, int moments, int act, float eps, int needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  library.def(
      "masked_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor residual, Tensor? mean, Tensor? var, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, SymInt[] stats, SymInt[] affine, int moments, float eps, "
      "float momentum) -> (Tensor y, Tensor mean, Tensor var, Tensor mask)");
  library.def(
      "add_forward(Tensor x, Tensor add, Tensor? weight, Tensor? bias, SymInt[] stats, SymInt[] affine, int moments, "
      "float eps, bool save) -> (Tensor y, Tensor total, Tensor mean, Tensor var)");
  library.def(
      "add_backward(Tensor dy, Tensor dtotal, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "SymInt[] stats, SymInt[] affine, int moments, float eps, int needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  library.def(
      "batch_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, SymInt[] channels, int act, float eps, float momentum) "
      "-> (Tensor y, Tensor mean, Tensor var)");
  library.def("moments(Tensor x, SymInt[] stats, int moments) -> (Tensor mean, Tensor var)");
  library.def(
      "update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, SymInt count, "
      "float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CPU, library) {
  normkern::bind::implement<normkern::bind::Cpu>(library);
  library.impl("update_running", TORCH_BOX(&normkern::bind::update_running<normkern::bind::Cpu>));
}
