// standardize.h: many tensors standardized in one call. Each is [groups, cols], contiguous; every line of it is a
// group, with a weight of its own.
#pragma once

#include "arguments.h"

namespace normkern {

// Longer lines fill a device by themselves: they are for a call of their own.
constexpr int64_t kMostLineBytes = 40 * 1024;

struct StandardizeForward {
  int64_t groups = 0, cols = 0;
  const void* x = nullptr;     // [groups, cols]
  Param weight;                // [groups]
  void* y = nullptr;           // [groups, cols]
  double* mean_out = nullptr;  // [groups]
  double* var_out = nullptr;   // [groups], biased
};

struct StandardizeBackward {
  int64_t groups = 0, cols = 0;
  const void *dy = nullptr, *x = nullptr;        // [groups, cols]
  Param weight;                                  // [groups]
  const double *mean = nullptr, *var = nullptr;  // [groups]
  void* dx = nullptr;                            // [groups, cols], or null
  Grad dweight;                                  // [groups], or null
};

// `count` tensors of one dtype; Part is one of the above. Their moments lie in two vectors, tensor after tensor.
template <class Part>
struct Standardize {
  const Part* parts = nullptr;
  int count = 0;
  DType dtype = DType::f32;
  double eps = 0;
};

}  // namespace normkern
