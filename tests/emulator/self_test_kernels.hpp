// self_test_kernels.hpp: kernels for the emulator's own tests: some that are right, and some with one fault each.
#pragma once

#include "../../csrc/core/accumulate.h"
#include "../../csrc/cuda/platform.cuh"

using namespace nk;

constexpr unsigned kAll = 0xffffffffu;

// ---- kernels that are right

__global__ void partial_warp(int* out) {  // 48 threads: half of the second warp does not exist
  const int shifted = __shfl_down_sync(kAll, int(threadIdx.x), 8);
  const unsigned odd = __ballot_sync(kAll, threadIdx.x & 1);
  out[threadIdx.x * 2] = shifted;
  out[threadIdx.x * 2 + 1] = int(odd);
}

__global__ void half_warps(int* out) {  // two masks in one warp, one of them used more often
  const bool low = threadIdx.x < 16;
  const unsigned mask = low ? 0xffffu : 0xffff0000u;
  int sum = int(threadIdx.x);
  for (int round = 0; round < (low ? 3 : 1); ++round)
    for (int bit = 8; bit; bit >>= 1) sum += __shfl_xor_sync(mask, sum, bit, 16);
  out[threadIdx.x] = sum;
}

__global__ void votes(int* out) {
  const int lane = int(threadIdx.x);
  out[lane] = __any_sync(kAll, lane == 7) + 2 * __all_sync(kAll, lane < 32) + 4 * __all_sync(kAll, lane < 31) +
              8 * int(__reduce_add_sync(kAll, 1u)) + 512 * int(__reduce_max_sync(kAll, unsigned(lane))) +
              __shfl_up_sync(kAll, 0, 1);
}

__global__ void spread_in_shared(double* out) {  // a type whose members have initializers
  NK_SHARED(normkern::Spread, partial, [32]);
  partial[threadIdx.x] = normkern::Spread{1.0, double(threadIdx.x), 0.0};
  __syncthreads();
  if (threadIdx.x == 0) {
    normkern::Spread all = partial[0];
    for (unsigned i = 1; i < blockDim.x; ++i) all = normkern::merge(all, partial[i]);
    out[0] = all.mean;
    out[1] = all.m2 / all.count;
  }
}

__global__ void grid_sum(unsigned* barrier, int* partial, int* out) {
  NK_SHARED(int, count, [1]);
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    atomicAdd(&count[0], 1);
    __syncthreads();
    if (threadIdx.x == 0) partial[blockIdx.x] = count[0] + round;
    grid_sync(barrier);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      int sum = 0;
      for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
      out[round] = sum;
    }
    grid_sync(barrier);
  }
}

__global__ void flag_between_blocks(unsigned* flag, int* data, int* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 7;
    __syncthreads();
    if (threadIdx.x == 0) add_release(flag, 1u);
  } else {
    if (threadIdx.x == 0)
      while (load_acquire(flag) == 0) {
      }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  }
}

__global__ void warp_flag_between_blocks(unsigned* flag, int* data, int* out) {  // the same with __syncwarp only
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 7;
    __syncwarp();
    if (threadIdx.x == 0) add_release(flag, 1u);
  } else {
    if (threadIdx.x == 0)
      while (load_acquire(flag) == 0) {
      }
    __syncwarp();
    out[threadIdx.x] = data[threadIdx.x];
  }
}

enum class Ticket { right, no_fence_before, no_fence_after, no_barrier, not_atomic };
template <Ticket how>
__global__ void last_block_sums(unsigned* ticket, int* partial, int* out) {
  NK_SHARED(bool, last, [1]);
  partial[blockIdx.x * blockDim.x + threadIdx.x] = int(blockIdx.x);
  if (how != Ticket::no_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (how != Ticket::no_fence_before) fence();
    if (how == Ticket::not_atomic) {
      last[0] = (*ticket)++ == gridDim.x - 1;
    } else {
      last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    if (how != Ticket::no_fence_after) fence();
  }
  __syncthreads();
  if (!last[0]) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i * blockDim.x + threadIdx.x];
  out[threadIdx.x] = sum;
}

__global__ void fill_dynamic(float* out, int n) {
  NK_DYNAMIC_SHARED(float, tile);
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) tile[i] = float(i);
  __syncthreads();
  if (threadIdx.x == 0) *out = tile[n - 1];
}

template <bool second_barrier>
__global__ void copy_pipeline(const float* x, float* out, int tiles) {  // double-buffered asynchronous copies
  NK_SHARED(float, buffer, [2][128]);
  const int own = int(threadIdx.x) * 4;
  float sum = 0;
  copy_async16(&buffer[0][own], x + own);
  copy_async_commit();
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) copy_async16(&buffer[(t + 1) & 1][own], x + (t + 1) * 128 + own);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    sum += buffer[t & 1][127 - threadIdx.x];
    if (second_barrier) __syncthreads();
  }
  copy_async_wait<0>();
  out[threadIdx.x] = sum;
}

__global__ void copy_without_wait(const float* x, float* out) {
  NK_SHARED(float, buffer, [128]);
  copy_async16(&buffer[threadIdx.x * 4], x + threadIdx.x * 4, 8);
  copy_async_commit();
  out[threadIdx.x] = buffer[threadIdx.x * 4];
  copy_async_wait<0>();
}

__global__ void copy_with_zeros(const float* x, float* out) {
  NK_SHARED(float, buffer, [128]);
  copy_async16(&buffer[threadIdx.x * 4], x + threadIdx.x * 4, 8);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = buffer[threadIdx.x * 4 + 1] + buffer[threadIdx.x * 4 + 2];
}

template <bool barrier>
__global__ void warp_exchange(int* out) {
  NK_SHARED(int, slot, [32]);
  slot[threadIdx.x] = int(threadIdx.x);
  if (barrier) __syncwarp();
  out[threadIdx.x] = slot[31 - threadIdx.x];
}

template <bool barrier>
__global__ void half_warp_exchange(int* out) {  // the lanes of a partial mask order each other, and no one else
  NK_SHARED(int, slot, [32]);
  const unsigned mask = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  slot[threadIdx.x] = int(threadIdx.x);
  __syncwarp(mask);
  out[threadIdx.x] = slot[barrier ? threadIdx.x ^ 15 : 31 - threadIdx.x];
}

__global__ void block_flags(int* out) {  // neighbouring bytes are not the same place
  NK_SHARED(bool, flag, [64]);
  flag[threadIdx.x] = threadIdx.x % 3 == 0;
  __syncthreads();
  out[threadIdx.x] = flag[63 - threadIdx.x];
}

template <bool stay>
__global__ void cluster_neighbor(float* out) {
  NK_SHARED(float, value, [1]);
  if (threadIdx.x == 0) value[0] = float(cluster_rank() + 1);
  cluster_sync();
  if (stay || cluster_rank() == 1) {
    const float* other = cluster_map(&value[0], cluster_rank() ^ 1);
    for (int i = 0; i < 50; ++i) __syncwarp();
    if (threadIdx.x == 0) out[blockIdx.x] = *other;
  }
  if (stay) cluster_sync();
}

template <class T>
__global__ void square(const T* x, T* y) {
  constexpr int kWidth = 16 / sizeof(T);
  Vec<T, kWidth> v = load_stream<T, kWidth>(x + threadIdx.x * kWidth);
  for (int i = 0; i < kWidth; ++i) v.v[i] = from_float<T>(to_float(v.v[i]) * to_float(v.v[i]));
  store_stream<T, kWidth>(y + threadIdx.x * kWidth, v);
}

// ---- kernels that are wrong

__global__ void block_exchange_without_barrier(int* out) {
  NK_SHARED(int, slot, [64]);
  slot[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = slot[63 - threadIdx.x];
}

__global__ void spread_without_barrier(double* out) {
  NK_SHARED(normkern::Spread, partial, [64]);
  partial[threadIdx.x] = normkern::Spread{1.0, 2.0, 0.0};
  const normkern::Spread other = partial[63 - threadIdx.x];
  out[threadIdx.x] = other.mean;
}

__global__ void same_output(int* out) { out[0] = int(blockIdx.x); }

__global__ void flag_without_release(unsigned* flag, int* data, int* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 7;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(flag, 1u);
  } else {
    if (threadIdx.x == 0)
      while (load_acquire(flag) == 0) {
      }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  }
}

__global__ void unwritten_shared(float* out) {
  NK_SHARED(float, slot, [4]);
  if (threadIdx.x < 3) slot[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = slot[threadIdx.x];
}

__global__ void absent_lane(int* out) {
  int value = 5;
  if (threadIdx.x < 16) value = __shfl_sync(0xffffu, value, 20);
  out[threadIdx.x] = value;
}

__global__ void lane_outside_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, 1, 1); }
__global__ void shuffle_in_a_branch(int* out) {
  int value = 1;
  if (threadIdx.x < 9) value = __shfl_xor_sync(kAll, value, 1);
  out[threadIdx.x] = value;
  value = __shfl_xor_sync(kAll, value, 2);
}

__global__ void barrier_in_a_branch(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  }
}
__global__ void two_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}
__global__ void early_return(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void endless_wait(unsigned* flag) {
  while (load_acquire(flag) == 0) {
  }
}
__global__ void touch(float* out, long at) { out[at] = 1.f; }
__global__ void read_and_write(const float* x, float* out, long at) { out[0] = x[at]; }
__global__ void write_input(const float* x) { const_cast<float*>(x)[0] = 1.f; }
__global__ void misaligned(const float* x, float* out) { store<float, 4>(out, load<float, 4>(x + 1)); }
__global__ void pending_copy(const float* x) {
  NK_SHARED(float, buffer, [4]);
  copy_async16(buffer, x);
  copy_async_commit();
}
__global__ void shared_past_the_end(float* out) {
  NK_SHARED(float, slot, [32]);
  slot[threadIdx.x + 1] = 1.f;
  __syncthreads();
  out[threadIdx.x] = slot[threadIdx.x];
}
__global__ void too_much_static(float* out) {
  NK_SHARED(float, slot, [12289]);
  slot[threadIdx.x] = 1.f;
  out[threadIdx.x] = slot[threadIdx.x];
}
