// evolved.h: the norms whose map is not affine, element by element: EvoNorm-S0 and EvoNorm-B0 (Liu et al. 2020).
//
// Their moments come from the programs that all norms share. What is left is a map with a few coefficients for each
// instance (a channel of a sample), its gradient, and the sums over each instance that the other gradients consist of:
//   s0:  y = x*s * scale + bias, s = 1/(1 + exp(-v*x))
//   b0:  y = x/d * scale + bias, d = max(left, v*x + right)
#pragma once

#include <cstdint>

#include "problem.h"

namespace normkern {

enum class Evolved : int32_t { s0, b0 };

// Rows of [rows][instances] tables, in the order of the kernels' arguments. A gradient is that of the map, plus
// (x - mean)*slope + offset for what x did to the moments.
//   s0 forward: v, scale, bias                  sums: dy, dy*x*s, dy*x^2*s*(1 - s)
//   s0 backward: v, scale, slope, mean, offset
//   b0 forward: left, v, right, scale, bias     sums: dy, dy*x/d, then of dy*x/d^2 where d is left, where it is not,
//   b0 backward: left, v, right, scale, slope, mean, offset            and of that times x where it is not
constexpr int kMaxEvolvedRows = 7, kMaxEvolvedSums = 5;

constexpr int forward_rows(Evolved kind) { return kind == Evolved::s0 ? 3 : 5; }
constexpr int backward_rows(Evolved kind) { return kind == Evolved::s0 ? 5 : 7; }
constexpr int sum_rows(Evolved kind) { return kind == Evolved::s0 ? 1 : 3; }  // the first rows are all that sums need
constexpr int sums_of(Evolved kind) { return kind == Evolved::s0 ? 3 : 5; }

// Null means absent. Buffers are dense and in the memory order of x, whose instances are the groups of `domain`.
struct EvolvedArgs {
  Evolved kind = Evolved::s0;
  Domain domain;
  DType dtype = DType::f32;    // of x, dy and out
  const void* x = nullptr;     // [numel]
  const void* dy = nullptr;    // [numel]; null: forward
  const void* rows = nullptr;  // [rows][groups], float32, or float64 for float64
  void* out = nullptr;         // [numel]: y, or dx
  double* sums = nullptr;      // [sums_of(kind)][groups]; null: the map
};

}  // namespace normkern
