// standardize.h: weight standardization of many tensors on the CPU, in one parallel loop.
#pragma once

#include "../core/standardize.h"
#include "entry.h"

namespace normkern::cpu {

// The same bits as a call for each tensor, whatever the thread count.
void standardize(const Standardize<StandardizeForward>& a, const Threads& threads);
void standardize(const Standardize<StandardizeBackward>& a, const Threads& threads);

}  // namespace normkern::cpu
