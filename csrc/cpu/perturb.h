// perturb.h: the ascent of core/perturb.h on the CPU, as the rest of the project sees it. No torch here.
#pragma once

#include <vector>

#include "../core/perturb.h"
#include "entry.h"

namespace normkern::cpu {

// The same bits whatever the threads.
void perturb(const std::vector<Perturbed>& tensors, const Ascent& rule, const Threads& threads);

}  // namespace normkern::cpu
