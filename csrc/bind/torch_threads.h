// torch_threads.h: torch's own pool for the CPU kernels, so torch.set_num_threads holds and two pools never compete.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/entry.h"

namespace normkern::bind {

inline void run_on_torch_threads(int64_t tasks, void (*task)(void* state, int64_t index), void* state) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(state, i);
  });
}

inline cpu::Threads torch_threads() { return {int64_t(torch::stable::get_num_threads()), run_on_torch_threads}; }

}  // namespace normkern::bind
