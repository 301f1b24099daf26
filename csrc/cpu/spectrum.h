// spectrum.h: lags, spectra and preconditioned maps on the CPU, as the rest of the project sees them. No torch here.
#pragma once

#include "../core/spectrum.h"
#include "entry.h"

namespace normkern::cpu {

// A torus with a longer side is left to an FFT: a product with a matrix of the transform grows with the side.
constexpr int64_t kMaxPreconditionPoints = 96;

void lags(const LagsArgs& a, const Threads& threads);

// V of every channel, [channels, rows, cols/2 + 1], in f32 or f64.
void inverse_root(const Spectrum& s, DType dtype, void* v, const Threads& threads);

void multiply(const MultiplyArgs& a, const Threads& threads);

// Neither side of the torus may be longer than kMaxPreconditionPoints. Source and target points are distinct.
void precondition(const PreconditionArgs& a, const Threads& threads);

// Maps to spectra and back; sides as for precondition.
void analyze(const MapArgs& a, const Threads& threads);
void synthesize(const MapArgs& a, const Threads& threads);

void contract(const ContractArgs& a, const Threads& threads);
void correlate(const CorrelateArgs& a, const Threads& threads);

}  // namespace normkern::cpu
