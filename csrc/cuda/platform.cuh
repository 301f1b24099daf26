// platform.cuh: the machine as kernels see it, and the only header they include from outside core.
//
// It has two halves. nvcc gets the CUDA one, the only place with inline PTX or <<<>>>-like launches; a C++ compiler
// with -DNK_EMULATED gets plain C++ twins from tests/emulator, so the same kernel sources run, and are checked, on a
// CPU. Rules that keep both halves honest:
//   - shared memory only through NK_SHARED and NK_DYNAMIC_SHARED; launches only through launch();
//   - a barrier is reached by every thread of the block, at one source line, with no return before it;
//   - shuffles order nothing: __syncwarp() around shared memory that a warp exchanges;
//   - "last block done" is __syncthreads; thread 0: fence, atomicAdd, fence; __syncthreads;
//   - wait for another block only in a cooperative launch, and only with load_acquire() or grid_sync();
//   - a buffer that a kernel writes is never `const __restrict__` there; every kernel has __launch_bounds__.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef NK_EMULATED
#include "cuda_surface.hpp"  // tests/emulator
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NK_UNROLL _Pragma("unroll")

// NK_SHARED(Spread, partial, [32]): `partial` is a Spread (&)[32] in the block's shared memory, with any content.
// CUDA forbids a __shared__ variable whose type has member initializers, hence the raw storage.
#define NK_SHARED(type, name, dims)                      \
  __shared__ ::nk::RawStorage<type dims> name##_storage; \
  auto& name = *reinterpret_cast<::nk::Same<type dims>*>(&name##_storage)

// NK_DYNAMIC_SHARED(float, tile): `tile` points at the LaunchConfig::shared bytes of the block, 128-byte aligned.
#define NK_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char nk_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(nk_dynamic_shared)

#define NK_DEVICE __device__ __forceinline__

namespace nk {

template <class T>
struct alignas(T) RawStorage {
  unsigned char bytes[sizeof(T)];
};
template <class T>
struct SameType {
  using type = T;
};
template <class T>
using Same = typename SameType<T>::type;

using Stream = cudaStream_t;

struct LaunchConfig {
  dim3 grid = {}, block = {};
  size_t shared = 0;  // dynamic shared memory of a block, in bytes
  dim3 cluster = {};
  bool cooperative = false;  // all blocks resident at once: required by grid_sync
};

inline unsigned volume(const dim3& size) { return size.x * size.y * size.z; }

// A launch as the runtime wants it, with what the kernel must be told beforehand.
class LaunchRequest {
 public:
  template <class Kernel>
  LaunchRequest(const LaunchConfig& config, Stream stream, Kernel kernel) {
    constexpr size_t kSharedWithoutOptIn = 48 * 1024;
    constexpr unsigned kPortableCluster = 8;
    const unsigned cluster_blocks = volume(config.cluster);
    if (config.shared > kSharedWithoutOptIn)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.shared));
    if (error == cudaSuccess && cluster_blocks > kPortableCluster)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    request.gridDim = config.grid;
    request.blockDim = config.block;
    request.dynamicSmemBytes = config.shared;
    request.stream = stream;
    request.attrs = attributes_;
    if (cluster_blocks > 1) {
      cudaLaunchAttribute& cluster = attributes_[request.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = config.cluster.x;
      cluster.val.clusterDim.y = config.cluster.y;
      cluster.val.clusterDim.z = config.cluster.z;
    }
    if (config.cooperative) {
      cudaLaunchAttribute& cooperative = attributes_[request.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
  }
  LaunchRequest(const LaunchRequest&) = delete;
  LaunchRequest& operator=(const LaunchRequest&) = delete;
  // What to return of it all. An error is ours to report: the next CUDA call must not find it.
  int result() const {
    if (error != cudaSuccess) cudaGetLastError();
    return int(error);
  }

  cudaLaunchConfig_t request = {};
  cudaError_t error = cudaSuccess;

 private:
  cudaLaunchAttribute attributes_[2] = {};
};

// Returns a cudaError_t. Arguments are converted to the kernel's own parameter types.
template <class... Parameters, class... Arguments>
int launch(const LaunchConfig& config, Stream stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  LaunchRequest r(config, stream, kernel);
  if (r.error == cudaSuccess) r.error = cudaLaunchKernelEx(&r.request, kernel, static_cast<Parameters>(arguments)...);
  return r.result();
}

// Whether the device can run all blocks of a cooperative launch at once, or a cluster at all. A cudaError_t.
template <class... Parameters>
int can_be_resident(const LaunchConfig& config, void (*kernel)(Parameters...), bool& yes) {
  LaunchRequest r(config, Stream(), kernel);
  int count = 0, device = 0, multiprocessors = 0;
  yes = false;
  if (r.error == cudaSuccess && volume(config.cluster) > 1) {
    r.error = cudaOccupancyMaxActiveClusters(&count, kernel, &r.request);
    yes = r.error == cudaSuccess && count > 0;
  } else if (r.error == cudaSuccess) {
    r.error = cudaGetDevice(&device);
    if (r.error == cudaSuccess)
      r.error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (r.error == cudaSuccess)
      r.error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, int(volume(config.block)), config.shared);
    yes = r.error == cudaSuccess && int64_t(count) * multiprocessors >= int64_t(volume(config.grid));
  }
  return r.result();
}

inline int zero_async(void* data, size_t bytes, Stream stream) { return int(cudaMemsetAsync(data, 0, bytes, stream)); }

// ---- ordering between blocks

NK_DEVICE void fence() { __threadfence(); }

NK_DEVICE unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

NK_DEVICE void add_release(unsigned* address, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// A barrier over the whole grid of a cooperative launch. `arrivals` is one word of global memory whose low 31 bits are
// zero, such as a zeroed word of the workspace. Every crossing adds exactly 2^31 to it (block 0 adds what the others
// leave to be added), so it is ready for the next crossing as it is, and the top bit flips when the last block arrives.
NK_DEVICE void grid_sync(unsigned* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    constexpr unsigned kFlip = 0x80000000u;
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
    fence();  // what this block wrote, and what its barrier made it see, goes before the arrival
    const unsigned before = atomicAdd(arrivals, first ? kFlip - (blocks - 1) : 1u);
    while (((load_acquire(arrivals) ^ before) & kFlip) == 0) {
    }
    fence();
  }
  __syncthreads();
}

// ---- clusters (sm_90 and later; elsewhere a launch with a cluster fails before the kernel runs)

NK_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

// Waits for every thread of the cluster; what they wrote, to distributed shared memory too, is visible after it.
NK_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same shared variable in block `rank` of the cluster. The owner must not exit while others still use it.
template <class T>
NK_DEVICE T* cluster_map(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return rank == 0 ? shared : nullptr;
#endif
}

// ---- asynchronous copies, global to shared memory, 16 bytes each

// Bytes from src_bytes to 16 become zero, and src is not read there. The data is there after copy_async_wait, for the
// thread that copied; for the others after a barrier behind that.
NK_DEVICE void copy_async16(void* shared, const void* global, int src_bytes = 16) {
#if __CUDA_ARCH__ >= 800
  const unsigned destination = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global), "r"(src_bytes)
               : "memory");
#else
  for (int i = 0; i < 16; ++i)
    static_cast<unsigned char*>(shared)[i] = i < src_bytes ? static_cast<const unsigned char*>(global)[i] : 0;
#endif
}

NK_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's newest groups are still on their way.
template <int pending>
NK_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- raw words behind load and store

template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// A value that no one reads again soon: first to leave the caches.
template <class V, class T>
NK_DEVICE V load_evict_first(const T* from) {
  using Word = typename WordOf<sizeof(V)>::type;
  V value;
  *reinterpret_cast<Word*>(&value) = __ldcs(reinterpret_cast<const Word*>(from));
  return value;
}

template <class V, class T>
NK_DEVICE void store_evict_first(T* to, const V& value) {
  using Word = typename WordOf<sizeof(V)>::type;
  __stcs(reinterpret_cast<Word*>(to), *reinterpret_cast<const Word*>(&value));
}

NK_DEVICE void check_aligned(const void*, size_t) {}

}  // namespace nk
#endif  // NK_EMULATED

// ---- the same in both halves

namespace nk {

using float32 = float;
using float64 = double;
using float16 = __half;
using bfloat16 = __nv_bfloat16;

// N neighbours, moved by one access of 2 to 16 bytes. The address must be a multiple of that size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "no access is wider than 16 bytes");
  T v[N];
};

template <class T, int N>
NK_DEVICE Vec<T, N> load(const T* from) {
  check_aligned(from, sizeof(Vec<T, N>));
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <class T, int N>
NK_DEVICE void store(T* to, const Vec<T, N>& value) {
  check_aligned(to, sizeof(Vec<T, N>));
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

template <class T, int N>
NK_DEVICE Vec<T, N> load_stream(const T* from) {
  check_aligned(from, sizeof(Vec<T, N>));
  return load_evict_first<Vec<T, N>>(from);
}

template <class T, int N>
NK_DEVICE void store_stream(T* to, const Vec<T, N>& value) {
  check_aligned(to, sizeof(Vec<T, N>));
  store_evict_first(to, value);
}

// What arithmetic on T is done in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

NK_DEVICE float to_float(float value) { return value; }
NK_DEVICE double to_float(double value) { return value; }
NK_DEVICE float to_float(__half value) { return __half2float(value); }
NK_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// One rounding, to nearest even, from float or double.
template <class T>
struct Rounded;
template <>
struct Rounded<float> {
  static NK_DEVICE float from(double value) { return float(value); }
  static NK_DEVICE float from(float value) { return value; }
};
template <>
struct Rounded<double> {
  static NK_DEVICE double from(double value) { return value; }
};
template <>
struct Rounded<__half> {
  static NK_DEVICE __half from(float value) { return __float2half_rn(value); }
  static NK_DEVICE __half from(double value) { return __double2half(value); }
};
template <>
struct Rounded<__nv_bfloat16> {
  static NK_DEVICE __nv_bfloat16 from(float value) { return __float2bfloat16_rn(value); }
  static NK_DEVICE __nv_bfloat16 from(double value) { return __double2bfloat16(value); }
};

template <class T, class A>
NK_DEVICE T from_float(A value) {
  return Rounded<T>::from(value);
}

}  // namespace nk
