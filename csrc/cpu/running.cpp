// running.cpp: running statistics move towards those of a batch.
#include "layout.h"

namespace normkern::cpu {
namespace {

template <class Next>
void move(const Grad& running, const double* moments, const RunningArgs& a, Next next) {
  with_type(running.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(running.data);
    for (int64_t c = 0; c < a.channels; ++c) {
      double sum = 0;
      for (int64_t b = 0; b < a.batch; ++b) sum += moments[b * a.channels + c];
      from_double(next(to_double(to[c]), sum / double(a.batch)), to[c]);
    }
  });
}

}  // namespace

// A handful of channels: one thread is faster than waking others.
void update_running(const RunningArgs& a) {
  const Running& r = a.running;
  move(r.mean, a.batch_mean, a, [&](double old, double mean) { return r.next_mean(old, mean); });
  move(r.var, a.batch_var, a, [&](double old, double var) { return r.next_var(old, var); });
}

void move_running(const Problem& p, const ForwardArgs& a) {
  if (!a.running.mean.data) return;
  const int64_t channels = p.affine.groups();
  update_running({a.running, a.mean_out, a.var_out, p.stats.groups() / channels, channels});
}

}  // namespace normkern::cpu
