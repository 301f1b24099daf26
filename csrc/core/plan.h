// plan.h: how a problem is launched, as a value. A pure function of (problem, request, chip): no CUDA call, so
// every row of it can be tested on any machine.
#pragma once

#include <cstdint>

#include "accumulate.h"
#include "problem.h"
#include "walk.h"

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

// Who holds a group while it is read once: a warp or part of one, a block, a cluster of blocks, or a sub-grid: blocks
// of a cooperative launch. split reads twice and takes any size. automatic lets make_plan choose; a named strategy is
// taken where the problem and the chip allow it, else split.
enum class Strategy : int32_t { automatic, warp, block, cluster, subgrid, split };

struct Request {
  Pass pass = Pass::forward;
  bool aligned = true;        // every element buffer starts on a 16-byte boundary
  bool affine_grads = false;  // backward: dweight or dbias is wanted
  Strategy strategy = Strategy::automatic;
  bool add = false;   // forward: of x + add; backward: dx + dtotal
  bool mask = false;  // forward: leaves a mask; backward: reads it
};

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

// strategy split: `reduce`, then `map`; any other: `fused` does everything that the statistics domain decides in one
// read, dweight and dbias too unless `affine`, their reduction, is a launch of its own.
struct Plan {
  Strategy strategy = Strategy::split;
  int vec = 1;  // elements an access moves: 16 bytes' worth, or 1
  Team team;
  Launch fused, map;
  Reduce reduce, affine;
  int64_t workspace_bytes = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of device memory, moments and parameters included
};

constexpr int64_t kStaticShared = 2048;  // what kernels may use beside dynamic shared memory
constexpr int64_t kAlign = 256;          // of every part of the workspace

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

// ---- fused plans. Every k...Bytes and the limits beside them are from a byte count on paper: untuned.

constexpr int64_t kWarpBytes = 4096;         // of a group that a warp takes
constexpr int64_t kRowBytes = 32 * 1024;     // staged by a block for a row whose elements all have weights of their own
constexpr int64_t kShareBytes = 128 * 1024;  // staged by a block for other groups
constexpr int64_t kSmallShareBytes = 16 * 1024;  // so little is not shared out further, however idle the chip is
constexpr int64_t kSlabBytes = 128, kNarrowSlabBytes = 64;  // of a line that a block owns in a walk by columns
constexpr int kPortableCluster = 8, kLargestCluster = 16;

constexpr int streams_of(Pass pass) { return pass == Pass::backward ? 2 : 1; }

// Rows of threads and their width for `lines` lines of `slots` slots: the pair that leaves the fewest threads idle.
constexpr void lay_out(Team& team, int64_t lines, int64_t slots, int64_t threads) {
  if (slots <= 32) {
    team.width = int(power_of_two_from(slots));
    team.lanes = int(threads / team.width);
    return;
  }
  int64_t best = INT64_MAX;
  for (int64_t lanes = 1; lanes <= threads / 32 && lanes <= lines; ++lanes) {
    const int64_t width = threads / lanes / 32 * 32;
    const int64_t cost = ceil_div(lines, lanes) * ceil_div(slots, width) * lanes * width * 512 / (lanes * width + 64);
    if (cost >= best) continue;
    best = cost;
    team.width = int(width);
    team.lanes = int(lanes);
  }
}

// Runs in which a team of this strategy walks groups, and what has a weight of its own there.
constexpr Walk fused_walk(const Problem& p, Strategy strategy) {
  const Domain d = simplify(p.stats);
  const bool narrow = d.cols * size_of(p.dtype) < kRunBytes || weights_of(p) == Weights::column;
  return d.rows > 1 && d.cols <= kSlabColumns && narrow && strategy != Strategy::warp ? Walk::columns : Walk::rows;
}

constexpr Weights fused_weights(const Problem& p, Strategy strategy) {
  const Weights weights = weights_of(p);
  const bool mixed = simplify(p.stats).rows > 1 && fused_walk(p, strategy) == Walk::rows;
  return weights == Weights::column && mixed ? Weights::none : weights;
}

// Whether a team could add up dweight and dbias on its way.
constexpr bool sums_weights(const Problem& p, const Request& request, Strategy strategy) {
  const Weights weights = fused_weights(p, strategy);
  if (request.pass != Pass::backward || !request.affine_grads) return false;
  return weights != Weights::none && !(weights == Weights::line && strategy == Strategy::warp);
}

// `blocks` share a unit, whose lines (walk by columns) are `slab` bytes long.
constexpr Plan plan_fused(const Problem& p, const Request& request, int vec, Strategy strategy, int blocks,
                          int64_t slab, bool sums, const Gpu& gpu) {
  const Domain d = simplify(p.stats);
  const Weights weights = fused_weights(p, strategy);
  const int64_t size = size_of(p.dtype);
  const int streams = streams_of(request.pass);
  const int64_t limit = request.pass == Pass::backward ? kBackwardThreads : kFusedThreads;
  Plan plan;
  plan.strategy = strategy;
  plan.vec = vec;
  Team& team = plan.team;
  team.walk = fused_walk(p, strategy);
  team.weights = weights;
  team.weight_sums = sums;
  team.blocks = blocks;
  team.cluster = strategy == Strategy::cluster;
  int64_t threads = 0;
  if (team.walk == Walk::columns) {
    const Tile tile = tile_of(d, vec, slab / size, kSlabThreads);
    team.columns = tile.columns;
    team.width = tile.width;
    team.lanes = tile.lanes;
    team.by_lines = true;
    threads = tile.threads();
  }
  const Units units = units_of(p, team.walk, weights, team.columns);
  team.columns = units.columns;
  if (team.walk == Walk::rows) {
    team.by_lines = d.rows > 1 && d.rows >= 2 * blocks;
    const int64_t lines = team.block_lines(units), slots = team.slots(units, vec), all = lines * slots;
    if (strategy == Strategy::warp) {
      // Eight lanes side by side fill a cache line; beyond that a lane takes four accesses, all in flight.
      const int64_t seat = power_of_two_from(all <= 8 ? all : clamp(ceil_div(all, 4), 8, 32));
      team.width = int(least(power_of_two_from(slots), seat));
      team.lanes = int(seat / team.width);
      threads = sums && weights == Weights::column ? kBackwardThreads : 128;
      // Sums of columns lie in shared memory beside the elements, for every seat.
      while (threads > 128 && threads / seat * units.columns * (2 * compute_size(p.dtype) + 4 * size) > 96 * 1024)
        threads /= 2;
      team.seats = int(threads / seat);
    } else {
      lay_out(team, lines, slots, clamp(round_up(ceil_div(all, 4), 32), 64, limit));
      threads = team.threads();
    }
  }
  plan.fused.threads = int(threads);
  // Few blocks that walk many units must have the next one on its way.
  const bool rows = sums && weights != Weights::group;
  if (rows && weights == Weights::column && blocks == 1) team.stages = 2;
  plan.fused.shared = fused_memory(units, team, p.dtype, vec, streams, plan.fused.threads).bytes;
  if (team.stages == 2 && plan.fused.shared + kStaticShared > gpu.smem_per_block) {
    team.stages = 1;
    plan.fused.shared = fused_memory(units, team, p.dtype, vec, streams, plan.fused.threads).bytes;
  }

  // Blocks walk neighbouring units, as many as fill the chip; each leaves sums of weights behind, so their number is
  // bounded where there are such sums.
  const int64_t room = resident_blocks(gpu, plan.fused.threads, plan.fused.shared) * gpu.sms;
  int64_t teams = most(room / blocks, 1);
  const int64_t bound = 2 * int64_t(gpu.sms);
  if (rows && units.beside == 1) {
    // What they leave behind, two numbers written and read, is at most a quarter of what they read.
    const int64_t quarter = 3 * units.batch * size / (16 * compute_size(p.dtype));
    teams = least(teams, most(least(bound / blocks, most(quarter, gpu.sms / 4)), 1));
  }
  team.teams = least(teams, ceil_div(units.count(), team.seats));
  if (rows && units.beside > 1) {
    const int64_t shortest = ceil_div(units.batch, most(bound / blocks - 1, 1));
    team.teams = least(team.teams, most(units.count() / shortest, 1));
  }
  plan.fused.blocks = team.teams * blocks;
  return plan;
}

// Whether every access of a forward pass is whole but the buffer's last, so that each byte of a mask has one writer.
constexpr bool can_mask(const Problem& p, const Plan& plan) {
  const Team& t = plan.team;
  if (plan.vec * size_of(p.dtype) != kAccessBytes) return false;
  return plan.strategy == Strategy::split || units_of(p, t.walk, t.weights, t.columns).aligned(plan.vec);
}

// Whether the chip has room for a fused plan and each block of a team a share of every unit.
constexpr bool fits(const Problem& p, const Request& request, const Plan& plan, const Gpu& gpu) {
  const Team& t = plan.team;
  if (request.mask && request.pass == Pass::forward && !can_mask(p, plan)) return false;
  if (plan.fused.shared + kStaticShared > gpu.smem_per_block) return false;
  const Units u = units_of(p, t.walk, t.weights, t.columns);
  if (most(u.count() + t.seats, 2 * most(u.lines, u.columns)) > INT32_MAX) return false;  // kernels count in int
  if (t.blocks > 1 && (t.by_lines ? u.lines : u.columns / plan.vec) < t.blocks) return false;
  if (plan.strategy == Strategy::cluster) return t.blocks <= gpu.max_cluster;
  const int64_t room = resident_blocks(gpu, plan.fused.threads, plan.fused.shared) * gpu.sms;
  return plan.strategy != Strategy::subgrid || plan.fused.blocks <= room;
}

// With the sums of the weights in the same launch if they fit; split if nothing does.
constexpr Plan try_fused(const Problem& p, const Request& request, int vec, Strategy strategy, int blocks, int64_t slab,
                         const Gpu& gpu) {
  const bool sums = sums_weights(p, request, strategy);
  const Plan plan = plan_fused(p, request, vec, strategy, blocks, slab, sums, gpu);
  if (fits(p, request, plan, gpu)) return plan;
  if (sums) {
    const Plan apart = plan_fused(p, request, vec, strategy, blocks, slab, false, gpu);
    if (fits(p, request, apart, gpu)) return apart;
  }
  Plan split;
  split.vec = vec;
  return split;
}

// As few blocks a team as hold a unit, then as many as the chip has left.
constexpr Plan try_subgrid(const Problem& p, const Request& request, int vec, int64_t least_blocks, const Gpu& gpu) {
  const bool possible = sums_weights(p, request, Strategy::subgrid);
  const auto with = [&](int64_t blocks, bool sums) {
    return plan_fused(p, request, vec, Strategy::subgrid, int(blocks), kNarrowSlabBytes, sums, gpu);
  };
  const int64_t sms = gpu.sms, room = 32 * sms;
  for (int apart = possible ? 0 : 1; apart < 2; ++apart)
    for (int64_t blocks = most(least_blocks, 2); blocks <= room; blocks += 1 + blocks / 32) {
      const bool sums = apart == 0;
      const Plan plan = with(blocks, sums);
      if (!fits(p, request, plan, gpu)) continue;
      if (plan.fused.blocks >= sms) return plan;
      const Plan wider = with(sms / (plan.fused.blocks / blocks), sums);
      return fits(p, request, wider, gpu) ? wider : plan;
    }
  Plan split;
  split.vec = vec;
  return split;
}

// The parts of the workspace, as offsets. For fused plans: tickets and barriers, what the blocks of sub-grids tell each
// other, and rows of sums for the weights. Then tickets and partials of each reduction; then per-group arrays in
// compute type: the mean in two parts and 1/std, which `map` and `affine` read, and the two averages of backward.
struct Workspace {
  int64_t boxes = 0, rows = 0, reduce = 0, affine = 0, arrays = 0, array_bytes = 0, bytes = 0;
};

constexpr int kMomentArrays = 3, kAverageArrays = 2;

constexpr Workspace workspace_of(const Problem& p, const Plan& plan, Pass pass) {
  const bool split = plan.strategy == Strategy::split && pass != Pass::moments;
  const bool affine = plan.affine.launch.blocks > 0;
  Workspace w;
  if (plan.strategy != Strategy::split) {
    const Team& t = plan.team;
    const Units u = units_of(p, t.walk, t.weights, t.columns);
    const WeightRows rows = weight_rows(u, t);
    const int64_t teams = plan.strategy == Strategy::subgrid ? t.teams : 0;
    w.boxes = ticket_bytes(rows.tickets + teams);
    w.rows = w.boxes + round_up(teams * 2 * t.blocks * u.groups * kSumsBytes, kAlign);
    w.reduce = w.rows + round_up(rows.rows * p.affine.groups() * 2 * compute_size(p.dtype), kAlign);
  }
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

// The fused plan for a named strategy, or the best by size and number of groups; split where there is none.
constexpr Plan choose_fused(const Problem& p, const Request& request, int vec, const Gpu& gpu) {
  Plan split;
  split.vec = vec;
  if (p.moments == Moments::given || request.strategy == Strategy::split) return split;
  const Domain d = simplify(p.stats);
  const int64_t size = size_of(p.dtype), streams = streams_of(request.pass), staged = d.count() * size * streams;
  const auto with = [&](Strategy strategy, int blocks, int64_t slab = kSlabBytes) {
    return try_fused(p, request, vec, strategy, blocks, slab, gpu);
  };
  // A few blocks even where one would do, if they were asked for.
  const int64_t asked = clamp(slots_in_group(d, vec) / 16, 2, 6);
  switch (request.strategy) {
    case Strategy::warp:
    case Strategy::block: return with(request.strategy, 1);
    case Strategy::cluster: {
      int blocks = int(power_of_two_from(asked));
      Plan plan = with(Strategy::cluster, blocks);
      while (blocks > 2 && plan.strategy == Strategy::split) plan = with(Strategy::cluster, blocks /= 2);
      for (blocks = kPortableCluster; blocks <= kLargestCluster && plan.strategy == Strategy::split; blocks *= 2)
        plan = with(Strategy::cluster, blocks);
      return plan;
    }
    case Strategy::subgrid: {
      Plan plan = try_subgrid(p, request, vec, asked, gpu);
      return plan.strategy == Strategy::split ? try_subgrid(p, request, vec, 2, gpu) : plan;
    }
    default: break;
  }
  const Weights weights = weights_of(p);
  const bool by_line = weights == Weights::line && request.pass == Pass::backward && request.affine_grads;
  const bool warp = d.rows == 1 && d.count() * size <= kWarpBytes && (!by_line || d.count() * size < 1024);
  if (warp) {
    const Plan plan = with(Strategy::warp, 1);
    if (plan.strategy == Strategy::warp) return plan;
  }
  // Lines too short to fill accesses are read whole by `split`, whatever group their elements belong to.
  if (d.rows > 1 && d.keep * d.cols * size < kNarrowSlabBytes) return split;

  const bool row = weights == Weights::column && d.rows == 1;
  const int64_t wanted = 7 * int64_t(gpu.sms) / 4, share_limit = row ? kRowBytes : kShareBytes;
  Plan widest = split;
  for (int blocks = 1; blocks <= kPortableCluster && blocks <= gpu.max_cluster; blocks *= 2) {
    const Plan plan = with(blocks == 1 ? Strategy::block : Strategy::cluster, blocks);
    if (plan.strategy == Strategy::split) continue;
    widest = plan;
    const Units u = units_of(p, plan.team.walk, plan.team.weights, plan.team.columns);
    const int64_t share = staged * u.groups / blocks;
    // Teams are few where their sums for the weights would cost too much: then each has more blocks.
    const bool filled = plan.fused.blocks >= gpu.sms || plan.team.teams * plan.team.seats >= u.count();
    const bool enough = share <= kSmallShareBytes || u.count() * blocks >= wanted;
    if (share <= share_limit && filled && enough) return plan;
  }
  const int64_t tensor = d.numel() * size;
  constexpr int64_t kSubgridTensorBytes = 16 << 20;  // below, barriers cost more than idle multiprocessors
  if (widest.strategy != Strategy::split && (widest.fused.blocks * 2 >= gpu.sms || tensor < kSubgridTensorBytes))
    return widest;
  for (int blocks = kPortableCluster; blocks <= kLargestCluster && widest.strategy == Strategy::split; blocks *= 2)
    widest = with(Strategy::cluster, blocks, kNarrowSlabBytes);
  if (widest.strategy != Strategy::split && tensor < kSubgridTensorBytes) return widest;
  const int64_t slab = d.rows > 1 ? most(kNarrowSlabBytes / (d.cols * size), 1) : 1;
  const Plan plan = try_subgrid(p, request, vec, ceil_div(staged * slab, gpu.smem_per_block), gpu);
  return plan.strategy == Strategy::split ? widest : plan;
}

// The bytes a plan moves, a mask but no residual or running statistics, weight and bias counted in the dtype of x.
constexpr void count_bytes(const Problem& p, const Request& request, Plan& plan) {
  const int64_t tensor = p.stats.numel() * size_of(p.dtype), params = 2 * p.affine.groups() * size_of(p.dtype);
  const int64_t moments = 2 * p.stats.groups() * int64_t(sizeof(double));
  const int64_t array = p.stats.groups() * compute_size(p.dtype);
  const bool split = plan.strategy == Strategy::split, backward = request.pass == Pass::backward;
  const bool given = p.moments == Moments::given, affine = plan.affine.launch.blocks > 0;
  const int64_t mask = request.mask ? mask_bytes(p) : 0;
  const auto reduction = [&](const Reduce& r) {
    plan.bytes_read += (backward ? 2 * tensor + mask : tensor) + r.workspace_bytes;
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
  if (!split) {
    const int64_t side = workspace_of(p, plan, request.pass).reduce;
    plan.bytes_read += side;
    plan.bytes_written += side;
  }
  const bool needs_x = !backward || !given || (p.act != Act::none && !request.mask);
  plan.bytes_read += (backward ? 1 + int64_t(needs_x) : 1) * tensor + params;
  plan.bytes_written += tensor;
  (backward ? plan.bytes_read : plan.bytes_written) += mask;
  if (request.add) {
    plan.bytes_read += tensor;
    if (!backward) plan.bytes_written += tensor;
  }
  if (backward || given) plan.bytes_read += moments;
  if (!backward && !given) plan.bytes_written += moments;
  if (backward && request.affine_grads) plan.bytes_written += params;
  const int64_t arrays = (split || affine ? kMomentArrays : 0) + (split && backward && !given ? kAverageArrays : 0);
  plan.bytes_read += arrays * array;
  plan.bytes_written += arrays * array;
}

constexpr Plan make_plan(const Problem& p, const Request& request, const Gpu& gpu) {
  const bool backward = request.pass == Pass::backward, moments = request.pass == Pass::moments;
  Plan plan = choose_fused(p, request, request.aligned ? int(kAccessBytes / size_of(p.dtype)) : 1, gpu);
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
  }
  const bool sums = plan.strategy == Strategy::split ? sums_shared(p) : plan.team.weight_sums;
  if (backward && request.affine_grads && !sums) plan.affine = reduction(p.affine);
  plan.workspace_bytes = workspace_of(p, plan, request.pass).bytes;
  count_bytes(p, request, plan);
  return plan;
}

}  // namespace normkern
