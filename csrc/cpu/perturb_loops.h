// perturb_loops.h: the loops of the ascent that exist once per instruction set, as plain data and function pointers
// (see kernels.h for why nothing else may be here).
#pragma once

#include "../core/perturb.h"

namespace normkern::cpu {

// Over the elements [begin, end) of a tensor. move() also keeps what they were; a rate of 0 leaves them alone.
struct PerturbLoops {
  Sums (*sum)(const Perturbed& tensor, const Ascent& rule, int64_t begin, int64_t end);
  void (*move)(const Perturbed& tensor, const Ascent& rule, int64_t begin, int64_t end, double layer, double rate);
};

namespace baseline {
extern const PerturbLoops kPerturbLoops;
}
namespace avx2 {
extern const PerturbLoops kPerturbLoops;
}
namespace avx512 {
extern const PerturbLoops kPerturbLoops;
}

}  // namespace normkern::cpu
