// spectrum.h: the spectral kernels as the rest of the project sees them. As in entry.h, every function launches on
// `stream`, allocates nothing, never waits and returns a cudaError_t.
#pragma once

#include "../core/spectrum.h"

namespace normkern::cuda {

// Doubles of the table of waves of a torus: cos and sin of every point of an axis.
constexpr int64_t wave_count(const Spectrum& s) { return 2 * (s.rows + s.cols); }

int lags(const LagsArgs& a, void* stream);
int make_waves(const Spectrum& s, double* waves, void* stream);
// V of every channel, [channels, rows, cols/2 + 1].
int inverse_root(const Spectrum& s, DType dtype, const double* waves, void* v, void* stream);
// V is evaluated where it is used, once for all maps of a channel; `scale` is a factor of the result.
int multiply(const MultiplyArgs& a, const double* waves, double scale, void* stream);
// The map to the torus, 0 elsewhere; the torus to the map.
int embed(const PointsArgs& a, void* stream);
int crop(const PointsArgs& a, void* stream);

}  // namespace normkern::cuda
