// cuda_surface.hpp: the emulated half of csrc/cuda/platform.cuh: the CUDA names that kernels may use, in plain C++.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator.hpp"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#undef __grid_constant__
#undef __cluster_dims__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "use NK_SHARED or NK_DYNAMIC_SHARED");
#define __constant__ static_assert(false, "constant memory is not emulated");
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __cluster_dims__(...)
#define __restrict__ __restrict

#define NK_UNROLL
#define NK_DEVICE inline
#define NK_SHARED(type, name, dims)                                            \
  auto& name = *static_cast<::nk::Same<type dims>*>(::emulator::static_shared( \
      []() -> const void* {                                                    \
        static const char key = 0;                                             \
        return &key;                                                           \
      }(),                                                                     \
      sizeof(::nk::Same<type dims>), #name, ::nk::grain_of<type>()))
#define NK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulator::dynamic_shared())

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_size)
#define gridDim (::emulator::current->grid_size)
constexpr int warpSize = 32;

// ---- warps and blocks

inline void __syncthreads(NK_SITE) { ::emulator::block_barrier(site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, NK_SITE) { ::emulator::warp_barrier(mask, site); }

namespace emulator {
// The lane that a shuffle within segments of `width` lanes reads: its own where `segment_lane` is outside.
inline int shuffle_source(int segment_lane, int width) {
  const int lane = current->lane, first = lane & ~(width - 1);
  return segment_lane < 0 || segment_lane >= width ? lane : first + segment_lane;
}
inline int segment_lane(int width) { return current->lane & (width - 1); }
}  // namespace emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, NK_SITE) {
  return ::emulator::shuffle(mask, value, ::emulator::shuffle_source(source & (width - 1), width), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, NK_SITE) {
  const int source = ::emulator::segment_lane(width) ^ bits;
  return ::emulator::shuffle(mask, value, ::emulator::shuffle_source(source, width), site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, NK_SITE) {
  const int source = ::emulator::segment_lane(width) + int(delta);
  return ::emulator::shuffle(mask, value, ::emulator::shuffle_source(source, width), site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, NK_SITE) {
  const int source = ::emulator::segment_lane(width) - int(delta);
  return ::emulator::shuffle(mask, value, ::emulator::shuffle_source(source, width), site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, NK_SITE) {
  return ::emulator::ballot(mask, predicate != 0, site);
}
inline int __any_sync(uint32_t mask, int predicate, NK_SITE) {
  return ::emulator::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, NK_SITE) {
  return ::emulator::ballot(mask, predicate == 0, site) == 0;
}
inline unsigned __reduce_add_sync(uint32_t mask, unsigned value, NK_SITE) {
  return unsigned(::emulator::reduce(mask, value, ::emulator::Reduction::add, site));
}
inline unsigned __reduce_min_sync(uint32_t mask, unsigned value, NK_SITE) {
  return unsigned(::emulator::reduce(mask, value, ::emulator::Reduction::min, site));
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned value, NK_SITE) {
  return unsigned(::emulator::reduce(mask, value, ::emulator::Reduction::max, site));
}

inline void __threadfence() { ::emulator::fence(); }

template <class T>
T atomicAdd(T* address, T value) {
  return ::emulator::read_modify_write(address, [=](T before) { return T(before + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return ::emulator::read_modify_write(address, [=](T before) { return before < value ? value : before; });
}
template <class T>
T atomicMin(T* address, T value) {
  return ::emulator::read_modify_write(address, [=](T before) { return value < before ? value : before; });
}
template <class T>
T atomicExch(T* address, T value) {
  return ::emulator::read_modify_write(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return ::emulator::read_modify_write(address, [=](T before) { return before == expected ? value : before; });
}

// ---- arithmetic

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __expf(float a) { return std::exp(a); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// ---- the wrappers of platform.cuh

namespace nk {

template <class T>
struct SameType {
  using type = T;
};
template <class T>
using Same = typename SameType<T>::type;

// What two threads may write side by side in shared memory of this type; members of a struct count as 4 bytes.
template <class T>
constexpr int grain_of() {
  return alignof(T) < 4 || std::is_same<T, double>::value ? int(alignof(T)) : 4;
}

using Stream = void*;
using LaunchConfig = ::emulator::LaunchConfig;

template <class... Parameters, class... Arguments>
int launch(const LaunchConfig& config, Stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return ::emulator::launch(config, kernel, std::forward<Arguments>(arguments)...);
}

template <class... Parameters>
int can_be_resident(const LaunchConfig& config, void (*)(Parameters...), bool& yes) {
  yes = ::emulator::can_be_resident(config);
  return 0;
}

int zero_async(void* data, size_t bytes, Stream stream);

inline void fence() { ::emulator::fence(); }

inline unsigned load_acquire(const unsigned* address) { return ::emulator::load_acquire(address); }

inline void add_release(unsigned* address, unsigned value) {
  ::emulator::fence();
  ::emulator::read_modify_write(address, [=](unsigned before) { return before + value; });
}

inline void grid_sync(unsigned* arrivals, NK_SITE) {
  if (load_acquire(arrivals) & 0x7fffffffu) ::emulator::fail("grid_sync: the arrivals word was not zeroed");
  ::emulator::grid_barrier(site);
}

inline int cluster_rank() { return ::emulator::current->cluster_rank; }
inline void cluster_sync(NK_SITE) { ::emulator::cluster_barrier(site); }
template <class T>
T* cluster_map(T* shared, int rank) {
  return static_cast<T*>(::emulator::map_to_rank(shared, rank));
}

inline void copy_async16(void* shared, const void* global, int src_bytes = 16) {
  ::emulator::copy_async(shared, global, 16, src_bytes);
}
inline void copy_async_commit() { ::emulator::copy_async_commit(); }
template <int pending>
void copy_async_wait() {
  ::emulator::copy_async_wait(pending);
}

template <class V, class T>
V load_evict_first(const T* from) {
  return *reinterpret_cast<const V*>(from);
}
template <class V, class T>
void store_evict_first(T* to, const V& value) {
  *reinterpret_cast<V*>(to) = value;
}

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) ::emulator::fail("misaligned %zu-byte access", bytes);
}

}  // namespace nk
