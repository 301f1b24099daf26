// running.cu: running statistics, moved by the moments of a batch.
#include "entry.h"
#include "vec.cuh"

namespace normkern::cuda {
namespace {

using namespace nk;

// One thread a channel: batches are added in their order, in float64, and the result is rounded once.
__global__ void __launch_bounds__(kMapThreads, 2) move_running(const RunningArgs a) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= a.channels) return;
  double mean = 0, var = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    mean += a.batch_mean[b * a.channels + channel];
    var += a.batch_var[b * a.channels + channel];
  }
  move_channel(a.running, channel, mean / double(a.batch), var / double(a.batch));
}

}  // namespace

int update_running(const RunningArgs& a, void* stream) {
  if (a.channels == 0) return 0;
  LaunchConfig config;
  config.grid = dim3(unsigned(ceil_div(a.channels, kMapThreads)));
  config.block = dim3(kMapThreads);
  return launch(config, Stream(stream), move_running, a);
}

}  // namespace normkern::cuda
