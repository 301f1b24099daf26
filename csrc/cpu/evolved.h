// evolved.h: the maps and sums of core/evolved.h on the CPU, as the rest of the project sees them. No torch here.
#pragma once

#include "../core/evolved.h"
#include "entry.h"

namespace normkern::cpu {

// The same bits for the same arguments and thread count.
void evolve(const EvolvedArgs& a, const Threads& threads);

}  // namespace normkern::cpu
