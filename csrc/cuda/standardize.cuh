// standardize.cuh: many tensors standardized in one launch. A block finds the tensor that it belongs to, and is then a
// team of the fused kernels on it: the lines of a tensor are groups with a weight of their own. Included once per type
// (launch_*.cu), as launch.cuh.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../core/parts.h"
#include "fused_backward.cuh"
#include "standardize.h"

namespace normkern::cuda {

constexpr int kStandardizeThreads = 128;
constexpr int64_t kWarpLineBytes = 2048;  // of a line that a warp takes; from a byte count on paper: untuned

// The lines of a tensor as the units of one-block teams.
constexpr Units units_of_lines(int64_t groups, int64_t cols) {
  return {1, groups, groups * cols, cols, 1, cols, cols, groups * cols, 1};
}
constexpr Team team_of_lines(int64_t groups, int64_t cols, int64_t size) {
  Team team;
  team.weights = Weights::group;
  team.width = cols * size <= kWarpLineBytes ? kWarp : kStandardizeThreads;
  team.lanes = 1;
  team.seats = kStandardizeThreads / team.width;
  team.columns = cols;
  team.teams = ceil_div(groups, team.seats);
  return team;
}

// One tensor of a launch; its groups' moments begin at `first` of their vectors.
struct Lines {
  int groups, cols, first;
  DType weight_type;
  const void *x, *weight;
};
struct ForwardLines {
  Lines lines;
  void* y;
};
struct BackwardLines {
  Lines lines;
  const void* dy;
  void *dx, *dweight;
};

// The arguments of a launch: the blocks of tensor i are starts[i] to starts[i + 1] - 1.
template <class Of, class Moment>
struct Batch {
  int count;
  int64_t starts[kMostParts + 1];
  Of tensors[kMostParts];
  double eps;
  Moment *mean, *var;
};
using ForwardBatch = Batch<ForwardLines, double>;
using BackwardBatch = Batch<BackwardLines, const double>;
static_assert(sizeof(ForwardBatch) <= 4096 && sizeof(BackwardBatch) <= 4096, "what old drivers take");

template <class T>
NK_DEVICE Teams teams_of(const Lines& lines, int64_t first_block, int streams) {
  Teams teams{};
  teams.units = units_of_lines(lines.groups, lines.cols);
  teams.team = team_of_lines(lines.groups, lines.cols, sizeof(T));
  teams.block_lines = 1;
  teams.block_columns = lines.cols;
  teams.groups_per_batch = lines.groups;
  teams.count = lines.cols;
  teams.streams = streams;
  teams.first_block = int(first_block);
  return teams;
}

template <class T, int V>
__global__ void __launch_bounds__(kStandardizeThreads, 4) standardize_forward(const ForwardBatch batch) {
  NK_DYNAMIC_SHARED(unsigned char, memory);
  const int index = part_of(batch.starts, batch.count, blockIdx.x);
  const ForwardLines& of = batch.tensors[index];
  FusedForward<T, V> f{};
  f.x = static_cast<const T*>(of.lines.x);
  f.y = static_cast<T*>(of.y);
  f.teams = teams_of<T>(of.lines, batch.starts[index], 1);
  f.affine.weight = {of.lines.weight, of.lines.weight_type};
  f.eps = batch.eps;
  f.outputs.mean = batch.mean ? batch.mean + of.lines.first : nullptr;
  f.outputs.var = batch.var ? batch.var + of.lines.first : nullptr;
  forward_units<false>(f, memory);
}

template <class T, int V>
__global__ void __launch_bounds__(kStandardizeThreads, 4) standardize_backward(const BackwardBatch batch) {
  NK_DYNAMIC_SHARED(unsigned char, memory);
  const int index = part_of(batch.starts, batch.count, blockIdx.x);
  const BackwardLines& of = batch.tensors[index];
  FusedBackward<T, V> f{};
  f.dy = static_cast<const T*>(of.dy);
  f.x = static_cast<const T*>(of.lines.x);
  f.dx = static_cast<T*>(of.dx);
  f.teams = teams_of<T>(of.lines, batch.starts[index], 2);
  f.affine.weight = {of.lines.weight, of.lines.weight_type};
  f.mean = {batch.mean + of.lines.first, DType::f64};
  f.var = {batch.var + of.lines.first, DType::f64};
  f.eps = batch.eps;
  f.weights.dweight = {of.dweight, of.lines.weight_type};
  backward_units<false>(f, memory);
}

// ---- from the tensors of a call to launches

template <class Part>
Lines lines_of(const Part& part, int64_t first) {
  return {int(part.groups), int(part.cols), int(first), part.weight.dtype, part.x, part.weight.data};
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0; }
inline bool aligned(const StandardizeForward& part) { return aligned(part.x) && aligned(part.y); }
inline bool aligned(const StandardizeBackward& part) { return aligned(part.x) && aligned(part.dy) && aligned(part.dx); }

constexpr int streams_of(const StandardizeForward&) { return 1; }
constexpr int streams_of(const StandardizeBackward&) { return 2; }

// Tensors `from` to `to` - 1 of a call, in one launch.
template <class T, int V, class Part>
int launch_some(const Standardize<Part>& a, int from, int to, void* stream) {
  constexpr bool forward = std::is_same_v<Part, StandardizeForward>;
  std::conditional_t<forward, ForwardBatch, BackwardBatch> batch{};
  size_t shared = 0;
  int64_t blocks = 0;
  if constexpr (forward) {
    batch.mean = a.parts[0].mean_out;
    batch.var = a.parts[0].var_out;
  } else {
    batch.mean = a.parts[0].mean;
    batch.var = a.parts[0].var;
  }
  batch.eps = a.eps;
  for (int i = from; i < to; ++i) {
    const Part& part = a.parts[i];
    auto& tensor = batch.tensors[i - from];
    if constexpr (forward) {
      tensor = {lines_of(part, batch.mean ? part.mean_out - batch.mean : 0), part.y};
    } else {
      tensor = {lines_of(part, part.mean - batch.mean), part.dy, part.dx, part.dweight.data};
    }
    const Units units = units_of_lines(part.groups, part.cols);
    const Team team = team_of_lines(part.groups, part.cols, sizeof(T));
    const auto bytes = fused_memory(units, team, a.dtype, V, streams_of(part), kStandardizeThreads).bytes;
    shared = size_t(bytes) > shared ? size_t(bytes) : shared;
    batch.starts[i - from] = blocks;
    blocks += team.teams;
  }
  batch.count = to - from;
  batch.starts[batch.count] = blocks;
  if (blocks > INT32_MAX) return 1;  // cudaErrorInvalidValue
  LaunchConfig config;
  config.grid = dim3(unsigned(blocks));
  config.block = dim3(kStandardizeThreads);
  config.shared = shared;
  if constexpr (forward)
    return launch(config, Stream(stream), standardize_forward<T, V>, batch);
  else
    return launch(config, Stream(stream), standardize_backward<T, V>, batch);
}

template <class T, class Part>
int standardize_of(const Standardize<Part>& a, void* stream) {
  for (int from = 0; from < a.count; from += kMostParts) {
    const int to = int(least(a.count, from + kMostParts));
    const bool whole = std::all_of(a.parts + from, a.parts + to, [](const Part& part) { return aligned(part); });
    constexpr int kFull = int(kAccessBytes / sizeof(T));
    const int error = whole ? launch_some<T, kFull>(a, from, to, stream) : launch_some<T, 1>(a, from, to, stream);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace normkern::cuda

// In launch_*.cu, beside NK_INSTANTIATE.
#define NK_INSTANTIATE_STANDARDIZE(T)                                             \
  namespace normkern::cuda {                                                      \
  template int standardize_of<T>(const Standardize<StandardizeForward>&, void*);  \
  template int standardize_of<T>(const Standardize<StandardizeBackward>&, void*); \
  }
