// arguments.h: the pointers of one call. Null means absent. All buffers are dense and in the memory order of x.
#pragma once

#include <cstdint>

#include "problem.h"

namespace normkern {

// A per-group or per-channel vector whose dtype is chosen at run time: parameters need not have the input's dtype.
struct Param {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

struct Grad {
  void* data = nullptr;
  DType dtype = DType::f32;
};

// Running statistics: running = (1 - momentum) * running + momentum * moment, where a variance counts as
// count / (count - 1) times itself.
struct Running {
  Grad mean, var;                                  // [channels], read and written; null if nothing moves
  double keep = 1, mean_share = 0, var_share = 0;  // of the old value, of a mean, of a biased variance

  Running() = default;
  // `count` elements are behind each moment.
  constexpr Running(const Grad& mean, const Grad& var, double count, double momentum)
      : mean(mean), var(var), keep(1 - momentum), mean_share(momentum), var_share(momentum * (count / (count - 1))) {}

  constexpr double next_mean(double old, double batch_mean) const { return batch_mean * mean_share + old * keep; }
  constexpr double next_var(double old, double batch_var) const { return batch_var * var_share + old * keep; }
};

// y = act((x - mean) / sqrt(var + eps) * weight + bias + residual). With `add`, which given moments exclude, x + add
// rounded to the dtype of x takes the place of x, and `total` gets it.
struct ForwardArgs {
  const void* x = nullptr;         // [numel]
  const void* add = nullptr;       // [numel]
  Param weight, bias;              // [affine.groups()]
  const void* residual = nullptr;  // [numel]
  Param mean, var;                 // [stats.groups()], read only where moments are given
  void* y = nullptr;               // [numel]
  void* total = nullptr;           // [numel], if `add`
  double* mean_out = nullptr;      // [stats.groups()], mean_var only
  double* var_out = nullptr;       // [stats.groups()], biased variance, or the second moment
  Running running;                 // mean_var only; on CUDA every statistics group must be a channel
  // [mask_bytes()], CUDA and relu only: a bit for each element, whether its gradient passes. A byte has those of a
  // whole access, its first element's lowest; other bits say nothing.
  unsigned char* mask_out = nullptr;
};

// Whether one thread could move a running statistic that another one reads as a weight or a bias.
inline bool moves_parameters(const ForwardArgs& a, int64_t channels) {
  const auto meet = [channels](const Grad& moved, const Param& read) {
    const auto first = reinterpret_cast<uintptr_t>(moved.data), second = reinterpret_cast<uintptr_t>(read.data);
    return first && second && first < second + uintptr_t(channels * size_of(read.dtype)) &&
           second < first + uintptr_t(channels * size_of(moved.dtype));
  };
  const Running& r = a.running;
  return meet(r.mean, a.weight) || meet(r.mean, a.bias) || meet(r.var, a.weight) || meet(r.var, a.bias);
}

// dx is the gradient that comes through y, plus `dtotal`, which reached x past the norm.
struct BackwardArgs {
  const void* dy = nullptr;        // [numel]
  const void* dtotal = nullptr;    // [numel], excluded by given moments
  const void* x = nullptr;         // [numel]
  Param weight, bias;              // [affine.groups()]; bias and residual only matter under an activation
  const void* residual = nullptr;  // [numel]
  Param mean, var;                 // [stats.groups()], what forward wrote or was given
  void* dx = nullptr;              // [numel]
  Grad dweight, dbias;             // [affine.groups()]
  void* dresidual = nullptr;       // [numel]
  // In place of the residual, what forward left as mask_out.
  const unsigned char* mask = nullptr;
};

struct MomentsArgs {
  const void* x = nullptr;     // [numel]
  double* mean_out = nullptr;  // [stats.groups()], null for Moments::second
  double* var_out = nullptr;   // [stats.groups()]
};

// Moves running statistics by moments that are there already.
struct RunningArgs {
  Running running;
  const double* batch_mean = nullptr;  // [batch * channels]; of several batches the average counts
  const double* batch_var = nullptr;   // [batch * channels], biased
  int64_t batch = 1, channels = 0;
};

}  // namespace normkern
