// entry.h: the CPU kernels as the rest of the project sees them. No torch here; threads are lent by the caller.
#pragma once

#include "../core/arguments.h"

namespace normkern::cpu {

// Runs task(state, i) for every i in [0, tasks), in parallel, and returns when all are done. Tasks do not throw.
struct Threads {
  int64_t count = 1;
  void (*run)(int64_t tasks, void (*task)(void* state, int64_t index), void* state) = nullptr;
};

// The same bits for the same problem and thread count. `written` are the bytes of a larger call's results, of which
// these are a part: what does not stay in the caches goes past them.
void forward(const Problem& p, const ForwardArgs& a, const Threads& threads, int64_t written = 0);
void backward(const Problem& p, const BackwardArgs& a, const Threads& threads, int64_t written = 0);
void moments(const Problem& p, const MomentsArgs& a, const Threads& threads);
void update_running(const RunningArgs& a);
// What forward's arguments say of running statistics, by the moments that forward has written.
void move_running(const Problem& p, const ForwardArgs& a);

// "baseline", "avx2" or "avx512" (x86-64), "neon" (aarch64): chosen at load, or by NORMKERN_CPU.
const char* instruction_set();

}  // namespace normkern::cpu
