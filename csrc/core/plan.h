// plan.h: how a problem is launched, as a value. A pure function of (problem, request, chip): no CUDA call, so
// every row of it can be tested on any machine.
#pragma once

#include <cstdint>

#include "accumulate.h"
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
  bool aligned = true;        // every element buffer starts on a 16-byte boundary
  bool affine_grads = false;  // backward: dweight or dbias is wanted
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
  int vec = 1;    // elements an access moves: 16 bytes' worth, or 1
  int lanes = 0;  // threads that share a group in `fused`
  Launch fused, map;
  Reduce reduce, affine;
  int64_t workspace_bytes = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of device memory, moments and parameters included
};

// ---- geometry that planner, launcher and kernels share

constexpr int kAccessBytes = 16;    // the widest access of a thread
constexpr int kFusedThreads = 512;  // most threads of a block, by kernel: their __launch_bounds__
constexpr int kReduceThreads = 512;
constexpr int kColumnThreads = 256;
constexpr int kMapThreads = 256;
constexpr int64_t kStaticShared = 2048;  // what kernels may use beside dynamic shared memory
constexpr int64_t kAlign = 256;          // of every part of the workspace

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}
constexpr int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

constexpr int64_t compute_size(DType t) { return t == DType::f64 ? 8 : 4; }

// A slot is what one access of one thread covers of a run: an aligned chunk of the buffer, cut off where the run begins
// and ends. A run that does not fill whole chunks may touch one chunk more, depending on where it begins.
constexpr int64_t slots_in_run(int64_t cols, int64_t vec) {
  return cols % vec == 0 ? cols / vec : (cols + vec - 2) / vec + 1;
}
constexpr int64_t slots_in_group(const Domain& d, int64_t vec) { return d.rows * slots_in_run(d.cols, vec); }

// Runs shorter than this are read across groups, by columns: four sectors of device memory, one cache line.
constexpr int64_t kRunBytes = 128;

constexpr Walk walk_of(const Domain& d, DType t) {
  return d.cols * size_of(t) < kRunBytes && d.count() != d.numel() ? Walk::columns : Walk::rows;
}

// The form of a domain that a reduction walks. Short groups side by side are one line of columns.
constexpr Domain reduced(const Domain& domain, DType t) {
  const Domain d = simplify(domain);
  if (d.rows == 1 && walk_of(d, t) == Walk::columns) return {1, 1, d.groups(), d.cols};
  return d;
}

// How a block lies on the lines of a reduction by columns: `width` threads side by side own `columns` neighbouring
// elements of a line, whole groups; `lanes` such rows of threads stand on consecutive lines.
struct Tile {
  int64_t columns = 1, tiles = 1;  // tiles to a line
  int width = 1, lanes = 1;

  constexpr int threads() const { return int(round_up(width * lanes, 32)); }
};

constexpr Tile tile_of(const Domain& d, int vec) {
  const int64_t line = d.keep * d.cols, common = gcd(line, vec);
  const bool whole_lines = common == vec;
  int64_t unit = d.cols;  // a tile is a multiple of it: of whole groups and, where lines allow it, of whole accesses
  if (whole_lines && d.cols / gcd(d.cols, vec) * vec <= kColumnThreads) unit = d.cols / gcd(d.cols, vec) * vec;
  const bool whole_tiles = whole_lines && unit % vec == 0;
  const int64_t most = (whole_tiles ? kColumnThreads : kColumnThreads - vec) / unit * unit;
  Tile tile;
  tile.tiles = ceil_div(line, most);
  tile.columns = clamp(round_up(ceil_div(line, tile.tiles), unit), unit, most);
  tile.tiles = ceil_div(line, tile.columns);
  tile.width = int(whole_tiles ? tile.columns / vec : (tile.columns + vec - 2) / vec + 1);
  // A thread's lines are `lanes` apart; that must keep its place within an access, so that its columns stay the same.
  const int64_t period = vec / common;
  tile.lanes = int(clamp(kColumnThreads / tile.width, 1, round_up(d.rows, period)) / period * period);
  return tile;
}

// ---- the planner

// Blocks that fit on a multiprocessor, as far as threads and shared memory go.
constexpr int64_t resident_blocks(const Gpu& gpu, int threads, int64_t shared) {
  const int64_t by_memory = gpu.smem_per_sm / (shared + kStaticShared), by_threads = 2048 / threads;
  return clamp(by_memory < by_threads ? by_memory : by_threads, 1, 32);
}

constexpr int64_t tickets_of(const Domain& d, const Reduce& reduce, int vec) {
  if (reduce.parts == 1) return 0;
  return reduce.walk == Walk::rows ? d.groups() : d.batch * tile_of(d, vec).tiles;
}
constexpr int64_t ticket_bytes(int64_t tickets) { return round_up(tickets * int64_t(sizeof(unsigned)), kAlign); }

// One reduction of `domain`. A thread of the columns walk keeps `values` numbers per element; a result is a Spread
// or a Sums.
constexpr Reduce plan_reduce(const Domain& domain, DType t, int vec, int values, int64_t result_bytes, const Gpu& gpu) {
  const Domain d = reduced(domain, t);
  Reduce reduce;
  reduce.walk = walk_of(d, t);
  int64_t partials = 0;
  if (reduce.walk == Walk::rows) {
    const int64_t slots = slots_in_group(d, vec), loads = 4, waves = 8;
    reduce.launch.threads = int(clamp(round_up(ceil_div(slots, loads), 32), 32, kReduceThreads));
    const int64_t wanted = ceil_div(waves * gpu.sms, d.groups());
    reduce.parts = clamp(wanted, 1, ceil_div(slots, reduce.launch.threads * loads));
    reduce.parts = ceil_div(slots, ceil_div(slots, reduce.parts));
    reduce.launch.blocks = clamp(d.groups() * reduce.parts, 1, 32 * waves * gpu.sms);
    partials = d.groups() * reduce.parts;
  } else {
    const Tile tile = tile_of(d, vec);
    const int64_t across = d.batch * tile.tiles, lines = 8, waves = 4;
    reduce.launch.threads = tile.threads();
    reduce.parts = clamp(ceil_div(waves * gpu.sms, across), 1, ceil_div(d.rows, tile.lanes * lines));
    reduce.parts = ceil_div(d.rows, ceil_div(d.rows, reduce.parts));
    reduce.launch.blocks = clamp(across * reduce.parts, 1, 32 * waves * gpu.sms);
    const int64_t state = tile.lanes * tile.width * vec * values * compute_size(t);
    const int64_t merged = tile.threads() > tile.columns ? tile.threads() : tile.columns;
    reduce.launch.shared = round_up(state, kAccessBytes) + merged * result_bytes;
    partials = d.batch * reduce.parts * d.keep * d.cols;
  }
  if (reduce.parts > 1)
    reduce.workspace_bytes = ticket_bytes(tickets_of(d, reduce, vec)) + round_up(partials * result_bytes, kAlign);
  return reduce;
}

constexpr int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Warp: 1 to 32 threads a group, several groups a block; block: a block a group. `streams` tensors are staged in
// shared memory, one access of each thread after the other, so that a thread reads only what it wrote.
constexpr Plan plan_fused(const Plan& plan, const Domain& d, DType t, int streams, Strategy strategy, const Gpu& gpu) {
  Plan fused = plan;
  const int64_t slots = slots_in_group(d, plan.vec);
  fused.strategy = strategy;
  if (strategy == Strategy::warp) {
    // Eight lanes side by side fill a cache line; beyond that a lane takes four accesses, all in flight.
    const int64_t lanes = slots <= 8 ? slots : clamp(ceil_div(slots, 4), 8, 32);
    fused.lanes = power_of_two_from(lanes);
    fused.fused.threads = 128;
  } else {
    fused.fused.threads = int(clamp(round_up(ceil_div(slots, 4), 32), 64, kFusedThreads));
    fused.lanes = fused.fused.threads;
  }
  const int64_t per_block = fused.fused.threads / fused.lanes, access = plan.vec * size_of(t);
  fused.fused.shared = round_up(ceil_div(slots, fused.lanes) * fused.fused.threads * access * streams, kAccessBytes);
  const int64_t resident = resident_blocks(gpu, fused.fused.threads, fused.fused.shared);
  fused.fused.blocks = clamp(ceil_div(d.groups(), per_block), 1, resident * gpu.sms);
  return fused;
}

// The parts of the workspace, as offsets. Tickets and partials of each reduction come first; then per-group arrays in
// compute type: the mean in two parts and 1/std, which `map` and `affine` read, and the two averages of backward.
struct Workspace {
  int64_t reduce = 0, affine = 0, arrays = 0, array_bytes = 0, bytes = 0;
};

constexpr int kMomentArrays = 3, kAverageArrays = 2;

constexpr Workspace workspace_of(const Problem& p, const Plan& plan, Pass pass) {
  const bool split = plan.strategy == Strategy::split && pass != Pass::moments;
  const bool affine = plan.affine.launch.blocks > 0;
  Workspace w;
  w.affine = w.reduce + plan.reduce.workspace_bytes;
  w.arrays = w.affine + plan.affine.workspace_bytes;
  w.array_bytes = round_up(p.stats.groups() * compute_size(p.dtype), kAlign);
  const bool averages = split && pass == Pass::backward;
  w.bytes = w.arrays + w.array_bytes * ((split || affine ? kMomentArrays : 0) + (averages ? kAverageArrays : 0));
  return w;
}

// Batch norm: the sums that dx needs are dweight and dbias, too, so no reduction of their own is launched.
constexpr bool sums_shared(const Problem& p) {
  return p.moments != Moments::given && simplify(p.stats) == simplify(p.affine);
}

constexpr Strategy choose_strategy(const Problem& p, const Request& request, int vec, const Gpu& gpu) {
  if (p.moments == Moments::given || request.strategy == Strategy::split) return Strategy::split;
  const Domain d = simplify(p.stats);
  const int streams = request.pass == Pass::backward ? 2 : 1;
  const int64_t limit = gpu.smem_per_block - kStaticShared;
  Plan plan;
  plan.vec = vec;
  const bool warp = plan_fused(plan, d, p.dtype, streams, Strategy::warp, gpu).fused.shared <= limit;
  const bool block = plan_fused(plan, d, p.dtype, streams, Strategy::block, gpu).fused.shared <= limit;
  if (request.strategy == Strategy::warp) return warp ? Strategy::warp : Strategy::split;
  if (request.strategy == Strategy::block) return block ? Strategy::block : Strategy::split;
  constexpr int64_t kWarpBytes = 4096, kFusedRunBytes = 64;  // to be tuned on a GPU
  if (d.rows > 1 && d.cols * size_of(p.dtype) < kFusedRunBytes) return Strategy::split;
  if (warp && d.count() * size_of(p.dtype) <= kWarpBytes) return Strategy::warp;
  return block ? Strategy::block : Strategy::split;
}

// The bytes a plan moves, residual left out, weight and bias counted in the dtype of x.
constexpr void count_bytes(const Problem& p, const Request& request, Plan& plan) {
  const int64_t tensor = p.stats.numel() * size_of(p.dtype), params = 2 * p.affine.groups() * size_of(p.dtype);
  const int64_t moments = 2 * p.stats.groups() * int64_t(sizeof(double));
  const int64_t array = p.stats.groups() * compute_size(p.dtype);
  const bool split = plan.strategy == Strategy::split, backward = request.pass == Pass::backward;
  const bool given = p.moments == Moments::given, affine = plan.affine.launch.blocks > 0;
  const auto reduction = [&](const Reduce& r) {
    const int64_t streams = backward ? 2 : 1;
    plan.bytes_read += streams * tensor + r.workspace_bytes;
    plan.bytes_written += r.workspace_bytes;
  };
  if (request.pass == Pass::moments) {
    if (split) reduction(plan.reduce);
    if (!split) plan.bytes_read += tensor;
    plan.bytes_written += moments;
    return;
  }
  if (plan.reduce.launch.blocks > 0) reduction(plan.reduce);
  if (affine) reduction(plan.affine);
  const bool needs_x = !backward || !given || p.act != Act::none;
  plan.bytes_read += (backward ? 1 + int64_t(needs_x) : 1) * tensor + params;
  plan.bytes_written += tensor;
  if (backward || given) plan.bytes_read += moments;
  if (!backward && !given) plan.bytes_written += moments;
  if (backward && request.affine_grads) plan.bytes_written += params;
  const int64_t arrays = (split || affine ? kMomentArrays : 0) + (split && backward && !given ? kAverageArrays : 0);
  plan.bytes_read += arrays * array;
  plan.bytes_written += arrays * array;
}

constexpr Plan make_plan(const Problem& p, const Request& request, const Gpu& gpu) {
  const bool backward = request.pass == Pass::backward, moments = request.pass == Pass::moments;
  Plan plan;
  plan.vec = request.aligned ? int(kAccessBytes / size_of(p.dtype)) : 1;
  plan.strategy = choose_strategy(p, request, plan.vec, gpu);
  constexpr int kMomentValues = 4, kSumValues = 2;  // of ShiftedMoments, and of two sums
  const auto reduction = [&](const Domain& d) {
    return backward ? plan_reduce(d, p.dtype, plan.vec, kSumValues, sizeof(Sums), gpu)
                    : plan_reduce(d, p.dtype, plan.vec, kMomentValues, sizeof(Spread), gpu);
  };
  if (plan.strategy == Strategy::split) {
    if (p.moments != Moments::given) plan.reduce = reduction(p.stats);
    if (!moments) {
      plan.map.threads = kMapThreads;
      const int64_t chunks = ceil_div(p.stats.numel(), plan.vec);
      plan.map.blocks = clamp(ceil_div(chunks, kMapThreads), 1, 8 * gpu.sms);
    }
  } else {
    plan = plan_fused(plan, simplify(p.stats), p.dtype, backward ? 2 : 1, plan.strategy, gpu);
  }
  if (backward && request.affine_grads && !sums_shared(p)) plan.affine = reduction(p.affine);
  plan.workspace_bytes = workspace_of(p, plan, request.pass).bytes;
  count_bytes(p, request, plan);
  return plan;
}

}  // namespace normkern
