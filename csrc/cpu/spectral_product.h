// spectral_product.h: the loops of the convolution between spectra that exist once per instruction set, as plain data
// and function pointers (see kernels.h for why nothing else may be here).
#pragma once

#include "spectral_loops.h"

namespace normkern::cpu {

// A convolution between spectra; see ContractArgs. Channels are those that x has, and `lanes` more or less of y.
template <class A>
struct ContractJob {
  const ContractArgs* args;
  LagWaves rows, cols;  // waves of the taps
  const A* taps;        // [rows][cols][x's channels][padded], of y's channels
  const A* v;           // [frequencies of the whole torus][v_padded]
  int64_t padded, v_padded;
};

template <class A>
struct CorrelateJob {
  const CorrelateArgs* args;
  LagWaves rows, cols;
  const A* v;  // [frequencies][padded]
  int64_t padded;
};

template <class A>
struct ProductKernels {
  int64_t lanes;
  // Elements of A: scratch of a call with so many vectors of y's channels.
  int64_t (*contract_scratch)(const ContractJob<A>& job);
  int64_t (*correlate_scratch)(const CorrelateJob<A>& job);
  // The rows of frequencies that come to row `row` or -`row` of the shorter torus; vectors [begin, end) of y's
  // channels, kProductVectors at most.
  void (*contract)(const ContractJob<A>& job, int64_t row, int64_t begin, int64_t end, A* scratch);
  // Vectors [begin, end) of channels, input channels [first, last), kProductDepth at most.
  void (*correlate)(const CorrelateJob<A>& job, int64_t begin, int64_t end, int64_t first, int64_t last, A* scratch);
};

constexpr int64_t kProductVectors = 3;
constexpr int64_t kContractDepth = 128;  // input channels whose matrix is made at a time: it stays in the L2 cache
constexpr int64_t kProductDepth = 32;

struct ProductTable {
  ProductKernels<float> f32;
  ProductKernels<double> f64;
};

namespace baseline {
extern const ProductTable kProductTable;
}
namespace avx2 {
extern const ProductTable kProductTable;
}
namespace avx512 {
extern const ProductTable kProductTable;
}

}  // namespace normkern::cpu
