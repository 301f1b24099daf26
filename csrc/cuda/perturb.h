// perturb.h: the ascent of core/perturb.h on CUDA, as the rest of the project sees it. As in entry.h, it launches on
// `stream`, allocates nothing, never waits and returns a cudaError_t.
#pragma once

#include <vector>

#include "../core/perturb.h"

namespace normkern::cuda {

// How the tensors are cut for a chip of so many multiprocessors, and where things lie in the workspace, in bytes.
struct PerturbPlan {
  int64_t piece = 0, pieces = 0, blocks = 0;
  int64_t starts = 0, tensors = 0, sums = 0, totals = 0, workspace_bytes = 0;
};
PerturbPlan plan_perturb(const std::vector<Perturbed>& tensors, int sms);

// `workspace` holds plan.workspace_bytes, 256-byte aligned, with any content.
int perturb(const std::vector<Perturbed>& tensors, const Ascent& rule, const PerturbPlan& plan, void* workspace,
            void* stream);

}  // namespace normkern::cuda
