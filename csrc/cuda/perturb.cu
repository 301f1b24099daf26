// perturb.cu: the ascent of core/perturb.h: the norm over all tensors and the step, in one launch.
//
// The blocks of a cooperative launch sum the pieces, then the tensors, then each for itself the norm, with a barrier of
// the grid after the first two; where the device cannot hold them together, these are launches of their own.
//
// The table of tensors comes through the arguments of a launch before, which writes it to the workspace: a copy from
// the host would need memory that stays put until it was made, forever in a CUDA graph, and 4 KB of arguments, which
// every device takes, hold no more than 63 tensors. So a call is two launches, and one more for every 63 tensors.
#include "perturb.h"

#include <cstring>

#include "merge.cuh"
#include "vec.cuh"

namespace normkern::cuda {
namespace ascent {

// Blocks of a multiprocessor: with two, whose threads have half the registers, B200's code would spill.
constexpr int kPerturbThreads = 256, kPerturbBlocks = 1;
constexpr int kWidth = 4;  // elements that a thread takes at a time
constexpr int kStages = 3;

// ---- the table

constexpr int kWords = 509;
static_assert(sizeof(Perturbed) % sizeof(uint64_t) == 0, "the table is made of words");

struct Words {
  uint64_t* to;
  int64_t count;
  uint64_t words[kWords];
};
static_assert(sizeof(Words) <= 4096, "what every device takes as arguments");

__global__ void __launch_bounds__(kPerturbThreads) write_table(const Words w) {
  for (int i = int(threadIdx.x); i < w.count; i += int(blockDim.x)) w.to[i] = w.words[i];
}

// ---- runs of up to kWidth elements

template <class T, class Move>
NK_DEVICE void by_access(const T* at, int n, Move move) {
  constexpr int kAccess = kWidth * sizeof(T) > 16 ? int(16 / sizeof(T)) : kWidth;
  if (n == kWidth && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    NK_UNROLL
    for (int i = 0; i < kWidth; i += kAccess) move(i, std::integral_constant<int, kAccess>());
    return;
  }
  NK_UNROLL
  for (int i = 0; i < kWidth; ++i)
    if (i < n) move(i, std::integral_constant<int, 1>());
}

template <class T>
NK_DEVICE void load_run(const T* from, int n, T (&to)[kWidth]) {
  by_access(from, n, [&](int i, auto access) {
    const Vec<T, access.value> v = load<T, access.value>(from + i);
    NK_UNROLL
    for (int j = 0; j < access.value; ++j) to[i + j] = v.v[j];
  });
}

template <class T>
NK_DEVICE void store_run(T* to, int n, const T (&from)[kWidth]) {
  by_access(to, n, [&](int i, auto access) {
    Vec<T, access.value> v;
    NK_UNROLL
    for (int j = 0; j < access.value; ++j) v.v[j] = from[i + j];
    store<T, access.value>(to + i, v);
  });
}

template <class Use>
NK_DEVICE void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::f32: return use(float());
    case DType::f64: return use(double());
    case DType::f16: return use(float16());
    case DType::bf16: return use(bfloat16());
  }
}

// Zeros behind the last: they add nothing to a sum.
NK_DEVICE void read_run(const void* data, DType dtype, int64_t e, int n, double factor, double (&to)[kWidth]) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T values[kWidth];
    load_run(static_cast<const T*>(data) + e, n, values);
    NK_UNROLL
    for (int i = 0; i < kWidth; ++i) to[i] = i < n ? double(to_float(values[i])) * factor : 0;
  });
}

// ---- the stages

struct Job {
  const Perturbed* tensors;
  const int64_t* starts;
  Sums *sums, *totals;  // of the pieces; of the tensors: T^2 of a layer and the share of the square of the norm
  unsigned* arrivals;
  int64_t piece, pieces;
  int count;
  Ascent rule;
};

// Calls use(element, n) for the runs of this thread.
template <class Use>
NK_DEVICE void for_runs(const Piece& p, Use use) {
  for (int64_t e = p.begin + int(threadIdx.x) * kWidth; e < p.end; e += int(blockDim.x) * kWidth)
    use(e, p.end - e < kWidth ? int(p.end - e) : kWidth);
}

NK_DEVICE void sum_pieces(const Job& job, int& round) {
  for (int64_t index = blockIdx.x; index < job.pieces; index += gridDim.x) {
    const Piece p = piece_at(job.tensors, job.starts, job.count, job.piece, index);
    const Perturbed t = job.tensors[p.tensor];
    const Transform transform = transform_of(job.rule, t);
    Sums own;
    for_runs(p, [&](int64_t e, int n) {
      double g[kWidth], w[kWidth] = {};
      read_run(t.grad, t.grad_dtype, e, n, job.rule.grad_factor, g);
      if (needs_weight(transform)) read_run(t.weight, t.dtype, e, n, 1, w);
      NK_UNROLL
      for (int i = 0; i < kWidth; ++i) own = merge(own, squares(transform, job.rule.eta, w[i], g[i]));
    });
    own = merge_block(own, round);
    if (threadIdx.x == 0) put(job.sums[index], own);
  }
}

NK_DEVICE void sum_tensors(const Job& job) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  for (int64_t i = int64_t(blockIdx.x) * warps + warp; i < job.count; i += int64_t(gridDim.x) * warps) {
    Sums own;
    for (int64_t piece = job.starts[i] + lane; piece < job.starts[i + 1]; piece += kWarp)
      own = merge(own, job.sums[piece]);
    own = merge_lanes(own, kWarp);
    if (lane == 0) put(job.totals[i], settled(transform_of(job.rule, job.tensors[i]), job.rule.eta, own));
  }
}

template <class T>
NK_DEVICE void move_run(const Perturbed& t, const Ascent& rule, int64_t e, int n, double layer, double rate) {
  T* weight = static_cast<T*>(t.weight) + e;
  T w[kWidth];
  load_run(static_cast<const T*>(weight), n, w);
  store_run(static_cast<T*>(t.copy) + e, n, w);
  if (rate == 0) return;
  const Transform transform = transform_of(rule, t);
  double g[kWidth];
  read_run(t.grad, t.grad_dtype, e, n, rule.grad_factor, g);
  NK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const double value = i < n ? double(to_float(w[i])) : 0;
    w[i] = from_float<T>(value + rate * step_of(transform, rule.maximum, rule.eta, value, g[i], layer));
  }
  store_run(weight, n, w);
}

// The last piece first: it is in the caches still.
NK_DEVICE void move_pieces(const Job& job, int& round) {
  Sums own;
  for (int i = int(threadIdx.x); i < job.count; i += int(blockDim.x)) own = merge(own, job.totals[i]);
  const double norm = sqrt(merge_block(own, round).second);
  const int64_t rounds = (job.pieces - 1 - blockIdx.x) / gridDim.x;
  for (int64_t index = blockIdx.x + rounds * gridDim.x; index >= 0; index -= gridDim.x) {
    const Piece p = piece_at(job.tensors, job.starts, job.count, job.piece, index);
    const Perturbed t = job.tensors[p.tensor];
    const double layer = job.totals[p.tensor].first, common = climbs(norm) ? rate(job.rule, t.rho, norm) : 0;
    for_runs(p, [&](int64_t e, int n) {
      with_type(t.dtype, [&](auto type) { move_run<decltype(type)>(t, job.rule, e, n, layer, common); });
    });
  }
}

__global__ void __launch_bounds__(kPerturbThreads, kPerturbBlocks)
    perturb_tensors(const Job job, int first_stage, int last_stage) {
  int round = 0;
  for (int stage = first_stage;; ++stage) {
    if (stage == 0) sum_pieces(job, round);
    if (stage == 1) sum_tensors(job);
    if (stage == 2) move_pieces(job, round);
    if (stage == last_stage) break;
    grid_sync(job.arrivals);
  }
}

LaunchConfig config_of(int64_t blocks) {
  LaunchConfig config;
  config.grid = dim3(unsigned(blocks));
  config.block = dim3(kPerturbThreads);
  return config;
}

// The beginning of the workspace: arrivals, starts, tensors.
std::vector<uint64_t> table_of(const std::vector<Perturbed>& tensors, const PerturbPlan& plan) {
  std::vector<uint64_t> table(size_t(plan.sums) / sizeof(uint64_t));
  cut(tensors.data(), int64_t(tensors.size()), plan.piece,
      reinterpret_cast<int64_t*>(table.data() + plan.starts / int64_t(sizeof(uint64_t))));
  std::memcpy(table.data() + plan.tensors / int64_t(sizeof(uint64_t)), tensors.data(),
              tensors.size() * sizeof(Perturbed));
  return table;
}

int write(const std::vector<uint64_t>& table, void* to, Stream stream) {
  const int64_t size = int64_t(table.size());
  for (int64_t first = 0; first < size; first += kWords) {
    Words w;
    w.to = static_cast<uint64_t*>(to) + first;
    w.count = size - first < kWords ? size - first : int64_t(kWords);
    std::memcpy(w.words, table.data() + first, size_t(w.count) * sizeof(uint64_t));
    if (const int error = launch(config_of(1), stream, write_table, w)) return error;
  }
  return 0;
}

int climb(const Job& job, int64_t blocks, Stream stream) {
  LaunchConfig config = config_of(blocks);
  config.cooperative = true;
  bool together = false;
  if (const int error = can_be_resident(config, perturb_tensors, together)) return error;
  if (together) return launch(config, stream, perturb_tensors, job, 0, kStages - 1);
  config.cooperative = false;
  for (int stage = 0; stage < kStages; ++stage)
    if (const int error = launch(config, stream, perturb_tensors, job, stage, stage)) return error;
  return 0;
}

}  // namespace ascent

PerturbPlan plan_perturb(const std::vector<Perturbed>& tensors, int sms) {
  const int64_t count = int64_t(tensors.size()), most = int64_t(sms) * ascent::kPerturbBlocks;
  const int64_t step = ascent::kPerturbThreads * ascent::kWidth;  // all threads have something to do
  int64_t elements = 0;
  for (const Perturbed& t : tensors) elements += t.count;
  PerturbPlan plan;
  plan.piece = step * clamp(ceil_div(elements, most * step), 1, int64_t(1) << 40);
  std::vector<int64_t> starts(tensors.size() + 1);
  plan.pieces = cut(tensors.data(), count, plan.piece, starts.data());
  plan.blocks = clamp(plan.pieces, 1, most);
  plan.starts = sizeof(uint64_t);
  plan.tensors = plan.starts + (count + 1) * int64_t(sizeof(int64_t));
  plan.sums = plan.tensors + count * int64_t(sizeof(Perturbed));
  plan.totals = plan.sums + plan.pieces * int64_t(sizeof(Sums));
  plan.workspace_bytes = plan.totals + count * int64_t(sizeof(Sums));
  return plan;
}

int perturb(const std::vector<Perturbed>& tensors, const Ascent& rule, const PerturbPlan& plan, void* workspace,
            void* stream) {
  char* const base = static_cast<char*>(workspace);
  if (const int error = ascent::write(ascent::table_of(tensors, plan), workspace, Stream(stream))) return error;
  const ascent::Job job{reinterpret_cast<const Perturbed*>(base + plan.tensors),
                        reinterpret_cast<const int64_t*>(base + plan.starts),
                        reinterpret_cast<Sums*>(base + plan.sums),
                        reinterpret_cast<Sums*>(base + plan.totals),
                        reinterpret_cast<unsigned*>(base),
                        plan.piece,
                        plan.pieces,
                        int(tensors.size()),
                        rule};
  return ascent::climb(job, plan.blocks, Stream(stream));
}

}  // namespace normkern::cuda
