// self_test.cpp: the emulator's own tests. Good kernels must give the right numbers, and each bad kernel must fail with
// the words that name its fault, whatever the schedule. Built once per mode.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/core/accumulate.h"
#include "../../csrc/cuda/platform.cuh"

using namespace nk;

#if defined(EMULATOR_CHECKED)
constexpr bool kChecked = true, kAsan = false;
#elif defined(__SANITIZE_ADDRESS__)
constexpr bool kChecked = false, kAsan = true;
#else
constexpr bool kChecked = false, kAsan = false;
#endif

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

// ---- the tests

struct Buffers {
  std::vector<int> out = std::vector<int>(256), partial = std::vector<int>(256);
  std::vector<float> x = std::vector<float>(4096), y = std::vector<float>(4096);
  std::vector<double> wide = std::vector<double>(64);
  unsigned flag = 0;

  Buffers() {
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 97);
    using emulator::Use;
    emulator::add_region(out.data(), out.size() * 4, Use::Out, "out", 4);
    emulator::add_region(partial.data(), partial.size() * 4, Use::Out, "partial", 4);
    emulator::add_region(x.data(), x.size() * 4, Use::In, "x", 2);
    emulator::add_region(y.data(), y.size() * 4, Use::Out, "y", 2);
    emulator::add_region(wide.data(), wide.size() * 8, Use::Out, "wide", 8);
    emulator::add_region(&flag, 4, Use::InOut, "flag", 4);
  }
  ~Buffers() {
    for (void* data : {static_cast<void*>(out.data()), static_cast<void*>(partial.data()), static_cast<void*>(x.data()),
                       static_cast<void*>(y.data()), static_cast<void*>(wide.data()), static_cast<void*>(&flag)})
      emulator::drop_region(data);
  }
};

LaunchConfig blocks_of(unsigned blocks, unsigned threads) { return LaunchConfig{dim3(blocks), dim3(threads)}; }
LaunchConfig together(unsigned blocks, unsigned threads) {
  LaunchConfig config = blocks_of(blocks, threads);
  config.cooperative = true;
  return config;
}
LaunchConfig cluster_of(unsigned size, unsigned blocks, unsigned threads) {
  LaunchConfig config = blocks_of(blocks, threads);
  config.cluster = dim3(size);
  return config;
}
LaunchConfig with_shared(size_t bytes) {
  LaunchConfig config = blocks_of(1, 64);
  config.shared = bytes;
  return config;
}

struct Test {
  std::string name;
  std::string words;  // what the error must contain; empty: there must be none
  std::function<int(Buffers&)> launch;
  std::function<bool(const Buffers&)> right = nullptr;
};

const std::vector<Test>& tests() {
  static const std::vector<Test> all = {
      {"partial warp", "", [](Buffers& b) { return launch(blocks_of(1, 48), nullptr, partial_warp, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 8 && b.out[1] == int(0xaaaaaaaa) && b.out[65] == 0xaaaa; }},
      {"half warps", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, half_warps, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 120 * 16 * 16 && b.out[16] == 376; }},
      {"votes", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, votes, b.out.data()); },
       [](const Buffers& b) { return b.out[3] == 1 + 2 + 8 * 32 + 512 * 31; }},
      {"a struct with initializers", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, spread_in_shared, b.wide.data()); },
       [](const Buffers& b) { return b.wide[0] == 15.5 && b.wide[1] == 85.25; }},
      {"grid_sync", "",
       [](Buffers& b) {
         return launch(together(5, 40), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data());
       },
       [](const Buffers& b) { return b.out[0] == 200 && b.out[1] == 205 && b.out[2] == 210; }},
      {"grid_sync, word not zeroed", "was not zeroed",
       [](Buffers& b) {
         b.flag = 3;
         return launch(together(5, 40), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data());
       }},
      {"grid_sync without a cooperative launch", "without a cooperative launch",
       [](Buffers& b) {
         return launch(blocks_of(5, 40), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data());
       }},
      {"cooperative grid too large", "cannot be resident at once",
       [](Buffers& b) {
         return launch(together(132 * 2 + 1, 1024), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data());
       }},
      {"acquire and release", "",
       [](Buffers& b) {
         return launch(together(2, 64), nullptr, flag_between_blocks, &b.flag, b.partial.data(), b.out.data());
       },
       [](const Buffers& b) { return b.out[63] == 7; }},
      {"acquire and release by a warp", "",
       [](Buffers& b) {
         return launch(together(2, 32), nullptr, warp_flag_between_blocks, &b.flag, b.partial.data(), b.out.data());
       },
       [](const Buffers& b) { return b.out[31] == 7; }},
      {"last block sums", "",
       [](Buffers& b) {
         return launch(blocks_of(4, 64), nullptr, last_block_sums<Ticket::right>, &b.flag, b.partial.data(),
                       b.out.data());
       },
       [](const Buffers& b) { return b.out[63] == 6; }},
      {"100000 bytes of dynamic shared memory", "",
       [](Buffers& b) { return launch(with_shared(100000), nullptr, fill_dynamic, b.y.data(), 25000); },
       [](const Buffers& b) { return b.y[0] == 24999.f; }},
      {"asynchronous copies", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_pipeline<true>, b.x.data(), b.y.data(), 8); },
       [](const Buffers& b) {
         float sum = 0;
         for (size_t t = 0; t < 8; ++t) sum += b.x[t * 128 + 127];
         return b.y[0] == sum;
       }},
      {"asynchronous copy of 8 bytes", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_with_zeros, b.x.data(), b.y.data()); },
       [](const Buffers& b) { return b.y[5] == b.x[21]; }},
      {"__syncwarp", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, warp_exchange<true>, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 31; }},
      {"__syncwarp of half a warp", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, half_warp_exchange<true>, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 15 && b.out[31] == 16; }},
      {"neighbouring flags", "",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, block_flags, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 1 && b.out[1] == 0; }},
      {"distributed shared memory", "",
       [](Buffers& b) { return launch(cluster_of(2, 4, 32), nullptr, cluster_neighbor<true>, b.y.data()); },
       [](const Buffers& b) { return b.y[0] == 2.f && b.y[1] == 1.f && b.y[2] == 2.f; }},
      {"vector of float", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, square<float>, b.x.data(), b.y.data()); },
       [](const Buffers& b) { return b.y[96] == 96.f * 96.f && b.y[97] == 0.f; }},
      {"vector of half", "",
       [](Buffers& b) {
         const auto x = reinterpret_cast<const __half*>(b.x.data());
         return launch(blocks_of(1, 32), nullptr, square<__half>, x, reinterpret_cast<__half*>(b.y.data()));
       },
       [](const Buffers& b) { return b.y[0] == 0.f; }},

      // Found in every mode.
      {"absent lane", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, absent_lane, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == -1 && b.out[16] == 5; }},
      {"lane outside the mask", "calls with mask 7fffffff",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, lane_outside_mask, b.out.data()); }},
      {"shuffle in a branch", "divergent warp collective",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, shuffle_in_a_branch, b.out.data()); }},
      {"barrier in a branch", "exited",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, barrier_in_a_branch, b.out.data()); }},
      {"two barriers", "divergent barrier",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, two_barriers, b.out.data()); }},
      {"early return", "exited", [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, early_return, b.out.data()); }},
      {"dynamic shared memory too large", "too much for a block",
       [](Buffers& b) { return launch(with_shared(300000), nullptr, fill_dynamic, b.y.data(), 75000); }},
      {"dynamic shared memory missing", "the launch gave none",
       [](Buffers& b) { return launch(with_shared(0), nullptr, fill_dynamic, b.y.data(), 4); }},
      {"static shared memory too large", "static shared memory",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, too_much_static, b.y.data()); }},
      {"block too large", "cannot have 2000 threads",
       [](Buffers& b) { return launch(blocks_of(1, 2000), nullptr, votes, b.out.data()); }},
      {"empty grid", "bad grid size", [](Buffers& b) { return launch(blocks_of(0, 32), nullptr, votes, b.out.data()); }},
      {"cluster does not divide the grid", "bad cluster size",
       [](Buffers& b) { return launch(cluster_of(2, 3, 32), nullptr, cluster_neighbor<true>, b.y.data()); }},
      {"cluster too large", "bad cluster size",
       [](Buffers& b) { return launch(cluster_of(32, 32, 32), nullptr, cluster_neighbor<true>, b.y.data()); }},
      {"misaligned vector", "misaligned 16-byte access",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, misaligned, b.x.data(), b.y.data()); }},
      {"copies pending at the end", "have not landed",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, pending_copy, b.x.data()); }},
      {"endless wait", "waits for ever",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, endless_wait, &b.flag); }},
  };
  return all;
}

// Found by the access checker.
const std::vector<Test>& checker_tests() {
  static const auto ticket = [](auto kernel) {
    return [kernel](Buffers& b) {
      return launch(blocks_of(4, 64), nullptr, kernel, &b.flag, b.partial.data(), b.out.data());
    };
  };
  static const std::vector<Test> all = {
      {"ticket: no fence before", "race: read of partial", ticket(last_block_sums<Ticket::no_fence_before>)},
      {"ticket: no fence after", "race: read of partial", ticket(last_block_sums<Ticket::no_fence_after>)},
      {"ticket: no barrier", "race: read of partial", ticket(last_block_sums<Ticket::no_barrier>)},
      {"ticket: not atomic", "race: read of flag", ticket(last_block_sums<Ticket::not_atomic>)},
      {"release without a fence", "race: read of partial",
       [](Buffers& b) {
         return launch(together(2, 32), nullptr, flag_without_release, &b.flag, b.partial.data(), b.out.data());
       }},
      {"no __syncthreads", "slot",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, block_exchange_without_barrier, b.out.data()); }},
      {"no __syncthreads, struct", "partial",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, spread_without_barrier, b.wide.data()); }},
      {"no __syncwarp", "slot",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, warp_exchange<false>, b.out.data()); }},
      {"__syncwarp of the wrong half", "slot",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, half_warp_exchange<false>, b.out.data()); }},
      {"two blocks write one place", "race: write of out",
       [](Buffers& b) { return launch(blocks_of(2, 1), nullptr, same_output, b.out.data()); }},
      {"copy over what others read", "buffer",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_pipeline<false>, b.x.data(), b.y.data(), 8); }},
      {"read before the copy landed", "uninitialized read of buffer",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_without_wait, b.x.data(), b.y.data()); }},
      {"unwritten shared memory", "uninitialized read of slot",
       [](Buffers& b) { return launch(blocks_of(1, 4), nullptr, unwritten_shared, b.y.data()); }},
      {"unwritten global memory", "uninitialized read of y",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, read_and_write, b.y.data(), b.y.data(), 9L); }},
      {"write past the end", "past the start of y",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, touch, b.y.data(), 4096L); }},
      {"read before the start", "out of bounds: 4-byte read",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, read_and_write, b.x.data(), b.y.data(), -1L); }},
      {"read far away", "out of bounds",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, read_and_write, b.x.data(), b.y.data(), 1L << 30); }},
      {"shared memory past the end", "past the start of slot",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, shared_past_the_end, b.y.data()); }},
      {"write to an input", "write to read-only x",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, write_input, b.x.data()); }},
      {"owner of distributed shared memory exits", "",
       [](Buffers& b) {
         const int error = launch(cluster_of(2, 2, 32), nullptr, cluster_neighbor<false>, b.y.data());
         const std::string text = emulator::last_error();
         const bool named = text.find("has exited") != std::string::npos || text.find("out of bounds") == 0;
         return error && named ? 0 : 1;
       }},
  };
  return all;
}

int failures = 0;

void report(bool ok, uint64_t seed, const std::string& name, const std::string& text) {
  if (ok) return;
  ++failures;
  printf("FAIL seed %d: %s: %s\n", int(seed), name.c_str(), text.empty() ? "no error" : text.c_str());
}

void run_test(const Test& test, uint64_t seed) {
  emulator::options.seed = seed;
  Buffers buffers;
  emulator::set_last_error("");
  const int error = test.launch(buffers);
  const std::string text = emulator::last_error();
  if (!test.words.empty()) {
    report(error && text.find(test.words) != std::string::npos, seed, test.name, text);
  } else {
    report(!error && (!test.right || test.right(buffers)), seed, test.name, error ? text : "wrong result");
  }
}

// AddressSanitizer ends the process, so each of its finds gets a process of its own.
void run_fatal(const Test& test, const char* words) {
  int ends[2];
  if (pipe(ends)) abort();
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    Buffers buffers;
    test.launch(buffers);
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) text.append(part, size_t(got));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool died = !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  report(died && text.find(words) != std::string::npos, 0, test.name, text.substr(0, 300));
}

// Reports name the kernel, the file, the line and both threads.
void check_report() {
  emulator::options.seed = 0;
  Buffers buffers;
  launch(blocks_of(2, 1), nullptr, same_output, buffers.out.data());
  const std::string text = emulator::last_error();
  for (const char* words : {"kernel same_output", "at self_test.cpp:", "with the write by block (0,0,0) thread (0,0,0)",
                            ", block (1,0,0) thread (0,0,0)", "no barrier or fence orders them"})
    report(text.find(words) != std::string::npos, 0, std::string("the report says '") + words + "'", text);
}

// Memory that no one wrote is known by its address.
void check_written() {
  Buffers buffers;
  launch(blocks_of(1, 4), nullptr, same_output, buffers.out.data());
  launch(blocks_of(1, 1), nullptr, touch, buffers.y.data(), 0L);
  try {
    emulator::require_written(buffers.y.data());
    report(false, 0, "unwritten output", "");
  } catch (const std::exception& error) {
    report(std::string(error.what()) == "y + 4 bytes was never written", 0, "unwritten output", error.what());
  }
}

int main() {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    for (const Test& test : tests()) run_test(test, seed);
    if (kChecked)
      for (const Test& test : checker_tests()) run_test(test, seed);
  }
  if (kChecked) {
    check_report();
    check_written();
  }
  if (kAsan) {
    for (const Test& test : checker_tests())
      if (test.words == "past the start of y" || test.words == "past the start of slot" || test.name == "read before the start")
        run_fatal(test, "heap-buffer-overflow");
  }
  printf("%zu tests, %d failures, %lld switches\n", tests().size() + (kChecked ? checker_tests().size() : 0), failures,
         emulator::switches());
  return failures != 0;
}
