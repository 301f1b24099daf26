// probe.cu: what the planner wants to know of a chip and no attribute tells. One line of CSV each: what,at,value,unit.
//   nvcc -O3 -std=c++17 -arch=native -o probe bench/probe.cu && ./probe
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace {

#define CHECK(call)                                                                       \
  do {                                                                                    \
    const cudaError_t error = (call);                                                     \
    if (error != cudaSuccess) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error)); \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (false)

__global__ void __launch_bounds__(512) hold(float* out) {
  extern __shared__ float memory[];
  memory[threadIdx.x] = float(threadIdx.x);
  if (out) out[blockIdx.x] = memory[0];
}

// Reads `count` 16-byte words `rounds` times; from the second round on from wherever the caches have kept them.
__global__ void __launch_bounds__(512) read_again(const uint4* from, size_t count, int rounds, unsigned* out) {
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round)
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
      const uint4 word = __ldcg(from + i);
      sum += word.x ^ word.y ^ word.z ^ word.w;
    }
  if (sum == 0x12345678u) *out = sum;
}

__global__ void __launch_bounds__(512) cross_barriers(int times) {
  for (int i = 0; i < times; ++i) cooperative_groups::this_grid().sync();
}

template <class Run>
double best_milliseconds(Run run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < 7; ++i) {
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::min(best, milliseconds);
  }
  return best;
}

void clusters(const cudaDeviceProp& chip) {
  if (chip.major < 9) return;
  CHECK(cudaFuncSetAttribute(hold, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (const int kilobytes : {64, 128, 200})
    for (const int blocks : {2, 4, 8, 16}) {
      CHECK(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, kilobytes * 1024));
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(blocks);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(unsigned(blocks));
      config.blockDim = dim3(512);
      config.dynamicSmemBytes = size_t(kilobytes) * 1024;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int active = 0;
      CHECK(cudaOccupancyMaxActiveClusters(&active, hold, &config));
      std::printf("active clusters of %d blocks,%d kB a block,%d,clusters\n", blocks, kilobytes, active);
    }
}

void reads(const cudaDeviceProp& chip) {
  unsigned* out = nullptr;
  CHECK(cudaMalloc(&out, sizeof *out));
  for (const int megabytes : {8, 12, 16, 20, 24, 28, 32, 40, 48, 60, 120, 480}) {
    const size_t count = (size_t(megabytes) << 20) / sizeof(uint4);
    uint4* from = nullptr;
    CHECK(cudaMalloc(&from, count * sizeof(uint4)));
    CHECK(cudaMemset(from, 1, count * sizeof(uint4)));
    const auto time = [&](int rounds) {
      return best_milliseconds([&] {
        read_again<<<unsigned(4 * chip.multiProcessorCount), 512>>>(from, count, rounds, out);
        CHECK(cudaGetLastError());
      });
    };
    const double milliseconds = time(9) - time(1);
    std::printf("read again,%d MB,%.0f,GB/s\n", megabytes, 8.0 * double(count) * sizeof(uint4) / milliseconds / 1e6);
    CHECK(cudaFree(from));
  }
  CHECK(cudaFree(out));
}

void barriers(const cudaDeviceProp& chip) {
  for (const int blocks : {chip.multiProcessorCount, 2 * chip.multiProcessorCount}) {
    const auto time = [&](int times) {
      void* arguments[] = {&times};
      return best_milliseconds([&] {
        CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(cross_barriers), dim3(unsigned(blocks)), dim3(512),
                                          arguments, 0, nullptr));
      });
    };
    std::printf("grid barrier,%d blocks,%.2f,us\n", blocks, (time(1001) - time(1)));
  }
}

}  // namespace

int main() {
  cudaDeviceProp chip;
  CHECK(cudaGetDeviceProperties(&chip, 0));
  std::printf("what,at,value,unit\n");
  std::printf("multiprocessors,%s,%d,\n", chip.name, chip.multiProcessorCount);
  clusters(chip);
  reads(chip);
  barriers(chip);
  return 0;
}
