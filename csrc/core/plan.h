// plan.h: how a problem is launched, as a value. A pure function of (problem, request, chip): no CUDA call, so
// every row of it can be tested on any machine.
#pragma once

#include <cstdint>

#include "problem.h"

namespace normkern {

// What the planner must know of a chip.
struct Gpu {
  int sms = 132;
  int64_t smem_per_block = 232448;  // largest dynamic shared memory of a block, after opting in
  int64_t smem_per_sm = 233472;
  int64_t l2_bytes = 0;
  int max_cluster = 1;
};

enum class Pass : int32_t { forward, backward, moments };

// automatic lets make_plan choose; a named strategy is taken where the problem allows it, else split.
enum class Strategy : int32_t { automatic, warp, block, split };

struct Request {
  Pass pass = Pass::forward;
  bool aligned = true;         // every element buffer starts on a 16-byte boundary
  bool affine_grads = false;   // backward: dweight or dbias is wanted
  Strategy strategy = Strategy::automatic;
};

// Who walks a group of a reduction: `rows`: threads along the runs of one group; `columns`: neighbouring threads on
// neighbouring groups, for runs too short to fill a vector.
enum class Walk : int32_t { rows, columns };

struct Launch {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared = 0;  // bytes of dynamic shared memory a block
};

struct Reduce {
  Walk walk = Walk::rows;
  int64_t parts = 1;  // partial results a group (rows) or a column (columns) is split into
  Launch launch;
  int64_t workspace_bytes = 0;
};

// strategy warp or block: `fused` does everything that the statistics domain decides in one read; split: `reduce`,
// then `map`. `affine` is the reduction of dweight and dbias where it is a launch of its own.
struct Plan {
  Strategy strategy = Strategy::split;
  int vec = 1;         // elements an access moves: 16 bytes' worth, or 1
  int lanes = 0;       // threads that share a group in `fused`
  Launch fused, map;
  Reduce reduce, affine;
  int64_t workspace_bytes = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of device memory, moments and parameters included
};

}  // namespace normkern
