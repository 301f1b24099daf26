// merge.cuh: partial results of threads and blocks into one, in an order that depends on nothing but their place, so
// that two runs give the same bits.
#pragma once

#include "../core/accumulate.h"
#include "platform.cuh"

namespace normkern::cuda {

using namespace nk;

constexpr int kWarp = 32;

// Stores a struct that a function returned. The emulator's checker does not see `memory = call()`: the compiler marks
// no store there.
template <class R>
NK_DEVICE void put(R& memory, const R& value) {
  memory = value;
}

NK_DEVICE Sums from_lane(const Sums& s, int other) {
  return {__shfl_xor_sync(0xffffffffu, s.first, other), __shfl_xor_sync(0xffffffffu, s.second, other)};
}
NK_DEVICE Spread from_lane(const Spread& s, int other) {
  return {__shfl_xor_sync(0xffffffffu, s.count, other), __shfl_xor_sync(0xffffffffu, s.mean, other),
          __shfl_xor_sync(0xffffffffu, s.m2, other)};
}

// Merges `lanes` neighbouring lanes, a power of two up to 32; valid in each of them, with the same bits. All lanes of
// the warp must take part.
template <class R>
NK_DEVICE R merge_lanes(R r, int lanes) {
  for (int other = lanes / 2; other > 0; other /= 2) {
    const R far = from_lane(r, other);
    r = threadIdx.x & unsigned(other) ? merge(far, r) : merge(r, far);
  }
  return r;
}

// Merges a whole block, of whole warps; valid in every thread. `round` counts the calls of a kernel: two buffers in
// turn make one barrier a call enough, since who writes a buffer has passed the barrier after its last reader.
template <class R>
NK_DEVICE R merge_block(R r, int& round) {
  NK_SHARED(R, warps, [2][kWarp]);
  auto& mine = warps[round++ & 1];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, count = int(blockDim.x) / kWarp;
  r = merge_lanes(r, kWarp);
  if (lane == 0) mine[warp] = r;
  __syncthreads();
  return merge_lanes(lane < count ? mine[lane] : R{}, kWarp);
}

// Several threads work on each column of a tile, one piece of it each; valid in `merged[column]` after the call.
// piece(column, from, to) merges pieces from to to of `pieces`.
template <class R, class Piece>
NK_DEVICE void merge_columns(R* merged, int columns, int64_t pieces, Piece piece) {
  const int threads = int(blockDim.x), team = threads / columns > 1 ? threads / columns : 1;
  const int member = team > 1 ? int(threadIdx.x) / columns : 0, start = int(threadIdx.x) - member * columns;
  if (member < team)
    for (int column = start; column < columns; column += threads)
      put(merged[member * columns + column], piece(column, pieces * member / team, pieces * (member + 1) / team));
  for (int left = team; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (member + half < left) {
      R& mine = merged[member * columns + start];
      put(mine, merge(mine, merged[(member + half) * columns + start]));
    }
    left = half;
  }
  __syncthreads();
}

// Whether this block is the last of `blocks` to come here; what the others wrote before is then visible to all of its
// threads. `ticket` starts at zero.
NK_DEVICE bool arrive_last(unsigned* ticket, int64_t blocks) {
  NK_SHARED(bool, last, [1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    last[0] = atomicAdd(ticket, 1u) == unsigned(blocks - 1);
    fence();
  }
  __syncthreads();
  return last[0];
}

// A barrier among some blocks of a cooperative launch. `arrivals` starts at zero; `target` is what it comes to when all
// of them have arrived, this time and every time before.
NK_DEVICE void meet_blocks(unsigned* arrivals, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    atomicAdd(arrivals, 1u);
    while (int(load_acquire(arrivals) - target) < 0) {
    }
    fence();  // load_acquire orders the same
  }
  __syncthreads();
}

}  // namespace normkern::cuda
