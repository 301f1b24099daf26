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
  const double batches = double(a.batch), unbiased = a.count / (a.count - 1), keep = 1 - a.momentum;
  const double old_mean = read<double>(Param{a.mean.data, a.mean.dtype}, channel);
  const double old_var = read<double>(Param{a.var.data, a.var.dtype}, channel);
  write(a.mean, channel, keep * old_mean + a.momentum * (mean / batches));
  write(a.var, channel, keep * old_var + a.momentum * (var / batches * unbiased));
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
