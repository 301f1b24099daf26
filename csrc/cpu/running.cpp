// running.cpp: running statistics move towards those of a batch.
#include "layout.h"

namespace normkern::cpu {
namespace {

void move(const Grad& running, const double* moments, const RunningArgs& a, double take) {
  with_type(running.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(running.data);
    for (int64_t c = 0; c < a.channels; ++c) {
      double sum = 0;
      for (int64_t b = 0; b < a.batch; ++b) sum += moments[b * a.channels + c];
      from_double(sum / double(a.batch) * take + to_double(to[c]) * (1 - a.momentum), to[c]);
    }
  });
}

}  // namespace

// A handful of channels: one thread is faster than waking others.
void update_running(const RunningArgs& a) {
  move(a.mean, a.batch_mean, a, a.momentum);
  move(a.var, a.batch_var, a, a.momentum * (a.count / (a.count - 1)));
}

}  // namespace normkern::cpu
