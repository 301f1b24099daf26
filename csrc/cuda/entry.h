// entry.h: the CUDA kernels as the rest of the project sees them: raw pointers, a Problem, a Plan and a stream.
//
// Every function launches on `stream`, allocates nothing, never waits for the device and returns a cudaError_t
// (as an int: the emulated build has no CUDA runtime). `workspace` holds plan.workspace_bytes, 256-byte aligned,
// with any content.
#pragma once

#include "../core/arguments.h"
#include "../core/plan.h"

namespace normkern::cuda {

int forward(const Problem& p, const Plan& plan, const ForwardArgs& a, void* workspace, void* stream);
int backward(const Problem& p, const Plan& plan, const BackwardArgs& a, void* workspace, void* stream);
int moments(const Problem& p, const Plan& plan, const MomentsArgs& a, void* workspace, void* stream);

// Moves running statistics of a batch or instance norm; needs no workspace.
int update_running(const RunningArgs& a, void* stream);

// Whether the current device can hold the blocks that `plan` needs at the same time. Where it cannot, the caller plans
// again with Strategy::split; the planner knows the chip's size, not what else takes room on it.
int resident(const Problem& p, const Plan& plan, Pass pass, bool& yes);

}  // namespace normkern::cuda
