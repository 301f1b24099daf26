// spectral_loops.h: the spectral loops that exist once per instruction set, as plain data and function pointers (see
// kernels.h for why nothing else may be here).
#pragma once

#include "../core/spectrum.h"

namespace normkern::cpu {

// cos and sin of (2 pi f d dilation / n), for the frequencies f of an axis and the lags d along it, [taps][n/2 + 1].
struct LagWaves {
  const double *cos, *sin;
};

// The real transforms of one axis of n points, folded: x[t] + x[n - t] and x[t] - x[n - t] carry the cosines and the
// sines, so a matrix has a quarter of the entries. Only folds that hold a source or target point are listed.
template <class A>
struct AxisTransform {
  int64_t points;                         // n
  int64_t folds;                          // of the source
  const int64_t *fold_left, *fold_right;  // source points at t and at n - t; -1: none
  const A *cos_in, *sin_in;               // [n/2 + 1][folds], [(n - 1)/2][folds]
  int64_t unfolds;                        // of the target
  const int64_t *unfold_left, *unfold_right;
  const A *cos_out, *sin_out;  // [unfolds][n/2 + 1], [unfolds][(n - 1)/2]
  LagWaves waves;
};

template <class A>
struct PreconditionJob {
  const PreconditionArgs* args;
  AxisTransform<A> rows, cols;
};

template <class A>
struct SpectralKernels {
  int64_t lanes;  // channels that precondition takes at a time
  // Scratch of precondition, in elements of A, and in doubles.
  int64_t (*scratch)(const PreconditionJob<A>& job);
  int64_t (*lag_scratch)(const PreconditionJob<A>& job);
  // Maps [begin, end) of channels [channel, channel + lanes), those there are.
  void (*precondition)(const PreconditionJob<A>& job, int64_t channel, int64_t begin, int64_t end, A* scratch,
                       double* lag_scratch);
  // The same maps to their spectra and back; points of the job that are not asked for are none. See MapArgs.
  void (*analyze)(const PreconditionJob<A>& job, int64_t channel, int64_t begin, int64_t end, A* scratch);
  void (*synthesize)(const PreconditionJob<A>& job, int64_t channel, int64_t begin, int64_t end, A scale, A* scratch);
  // V of one channel, [rows][cols/2 + 1]; lag_scratch holds root_scratch(s) doubles.
  void (*inverse_root)(const Spectrum& s, int64_t channel, LagWaves rows, LagWaves cols, A* v, double* lag_scratch);
};

struct SpectralTable {
  SpectralKernels<float> f32;
  SpectralKernels<double> f64;
  // Lags of one channel; scratch holds taps.count() * kLagBlock + taps.lags() * kLagLanes doubles.
  void (*lags)(const LagsArgs& a, int64_t channel, double* scratch);
};

constexpr int64_t kLagBlock = 64;  // input channels at a time: their taps stay in the L1 cache
constexpr int64_t kLagLanes = 8;
constexpr int64_t kVBlock = 512;  // frequencies of V at a time

constexpr int64_t root_scratch(const Spectrum& s) {
  return 2 * s.taps.rows * s.half() + 3 * (s.half() > kVBlock ? s.half() : kVBlock);
}

namespace baseline {
extern const SpectralTable kSpectralTable;
}
namespace avx2 {
extern const SpectralTable kSpectralTable;
}
namespace avx512 {
extern const SpectralTable kSpectralTable;
}

}  // namespace normkern::cpu
