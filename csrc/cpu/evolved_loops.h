// evolved_loops.h: the loops of the evolved norms that exist once per instruction set, as plain data and function
// pointers (see kernels.h for why nothing else may be here).
#pragma once

#include <cstdint>

namespace normkern::cpu {

// [batch, rows, keep, cols] as in core/problem.h; `table` is core/evolved.h's rows, `sums` likewise.
template <class A>
struct EvolvedJob {
  const void *x, *dy;
  void* out;
  const A* table;
  double* sums;
  int64_t batch, rows, keep, cols, groups;
};

// With cols == 1, groups are the columns of the lines [begin, end) of one batch index; else groups are [begin, end).
// Sums are written for groups and added to for lines.
template <class A>
struct EvolvedLoops {
  void (*map_groups)(const EvolvedJob<A>& job, int64_t begin, int64_t end);
  void (*slope_groups)(const EvolvedJob<A>& job, int64_t begin, int64_t end);
  void (*sum_groups)(const EvolvedJob<A>& job, int64_t begin, int64_t end);
  void (*map_lines)(const EvolvedJob<A>& job, int64_t batch, int64_t begin, int64_t end);
  void (*slope_lines)(const EvolvedJob<A>& job, int64_t batch, int64_t begin, int64_t end);
  void (*sum_lines)(const EvolvedJob<A>& job, int64_t batch, int64_t begin, int64_t end, double* sums, int64_t pitch);
};

// By kind.
struct EvolvedTable {
  EvolvedLoops<double> f64[2];
  EvolvedLoops<float> f32[2], f16[2], bf16[2];
};

namespace baseline {
extern const EvolvedTable kEvolvedTable;
}
namespace avx2 {
extern const EvolvedTable kEvolvedTable;
}
namespace avx512 {
extern const EvolvedTable kEvolvedTable;
}

}  // namespace normkern::cpu
