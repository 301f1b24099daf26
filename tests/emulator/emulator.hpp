// emulator.hpp: runs CUDA kernels that were compiled as C++ on the CPU. Every CUDA thread is a fiber; one OS thread
// runs them all, in an order that a seed decides. Kernels never include this: csrc/cuda/platform.cuh does, through
// cuda_surface.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>  // dim3, the vector types, half and bfloat16: CUDA's headers carry host versions of all of them
#include <cuda_fp16.h>

namespace emulator {

// Where in the kernel source a call stands, for reports: taken from the caller by default arguments.
struct Site {
  const char* file;
  int line;
};
#define NK_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// What the running CUDA thread can see of itself.
struct ThreadView {
  uint3 thread, block;
  dim3 block_size, grid_size, cluster_size;
  int lane, cluster_rank;
};
extern ThreadView* current;  // null outside a kernel

struct LaunchConfig {
  dim3 grid = {}, block = {};
  size_t shared = 0;
  dim3 cluster = {};
  bool cooperative = false;
};

struct Options {
  uint64_t seed = 0;              // 0: first in, first out; 1: last in, first out; otherwise a random order
  int resident_clusters = 4;      // at most so many run interleaved (random orders only; cooperative: all)
  int yield_percent = 25;         // chance of a switch at an atomic (random orders only)
  int preempt_ppm = 0;            // chance in a million of a switch at any memory access (checked build only)
  int64_t sms = 132;              // multiprocessors: how many blocks of a cooperative launch can be resident
  int64_t shared_limit = 232448;  // shared memory of a block, after opting in
  int64_t shared_per_sm = 233472;
  int64_t busy_sms = 0;      // multiprocessors that others hold, which the planner cannot know
  int largest_cluster = 16;  // blocks of a cluster that this chip can place
};
extern Options options;

// A find: the message names the kernel, the thread and the place. Ends the kernel that runs now.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The kernel of a launch and its arguments; `body(arguments)` is what one thread runs.
struct Call {
  const void* kernel;
  void (*body)(void* arguments);
  void* arguments;
  size_t argument_bytes;
};

// Runs a grid to its end; throws std::runtime_error with the find, if there is one.
void run(const LaunchConfig& config, const Call& call);
// Whether all blocks of a cooperative launch, or one cluster, find room at the same time.
bool can_be_resident(const LaunchConfig& config);
void set_last_error(const char* message);
const char* last_error();
long long switches();  // fiber switches so far

// Tells the checker of a buffer in global memory. Out: not initialized yet. The smallest unit that two threads may
// write without a race is `grain` bytes: 1, 2, 4 or 8.
enum class Use { In, Out, InOut };
void add_region(void* data, size_t bytes, Use use, const char* name, int grain);
void drop_region(void* data);
// Throws std::runtime_error if a byte of the region has not been written since it was added.
void require_written(void* data);
// cudaMemset to zero.
void zero(void* data, size_t bytes);

void block_barrier(Site site);
void cluster_barrier(Site site);
void grid_barrier(Site site);
void warp_barrier(uint32_t mask, Site site);
// `value` becomes what lane `source` brought; poison, if that lane did not take part.
void shuffle_bytes(uint32_t mask, void* value, size_t bytes, int source, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
enum class Reduction { add, min, max };
int64_t reduce(uint32_t mask, int64_t value, Reduction how, Site site);

// Static shared memory is found by the address of a variable that is unique to the declaration.
void* static_shared(const void* key, size_t bytes, const char* name, int grain);
void* dynamic_shared();
void* map_to_rank(void* shared, int rank);

void fence();
void atomic_begin(void* address, size_t bytes);
unsigned load_acquire(const unsigned* address);  // lets others run: it stands in loops that wait for another thread
void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int pending);

template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic<T>::value, "CUDA shuffles numbers of up to 8 bytes");
  shuffle_bytes(mask, &value, sizeof value, source, site);
  return value;
}

// The access itself is not instrumented: atomic_begin has told the checker what it is.
template <class T, class Change>
__attribute__((noinline, no_sanitize("thread"))) T read_modify_write(T* address, Change change) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics: the result would depend on the order");
  if (reinterpret_cast<uintptr_t>(address) % alignof(T)) fail("misaligned atomic");
  atomic_begin(address, sizeof(T));
  const T before = *address;
  *address = change(before);
  return before;
}

template <class... Parameters, class... Arguments>
int launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Bound {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } bound{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  const auto body = [](void* state) {
    auto own = static_cast<Bound*>(state)->arguments;  // parameters are each thread's own
    std::apply(static_cast<Bound*>(state)->kernel, own);
  };
  try {
    run(config, Call{reinterpret_cast<const void*>(kernel), body, &bound, sizeof bound});
    return 0;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return 999;  // cudaErrorUnknown
  }
}

}  // namespace emulator
