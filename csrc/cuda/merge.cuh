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

}  // namespace normkern::cuda
