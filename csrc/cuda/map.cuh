// map.cuh: an element from its group: the formulas of forward and backward, and the kernels that apply them to a whole
// buffer once the per-group numbers are known.
#pragma once

#include "../core/act.h"
#include "vec.cuh"

namespace normkern::cuda {

// A float64 mean in two parts of compute type, so that (x - high) - low loses nothing where mean >> std.
template <class A>
struct Normalizer {
  A high = 0, low = 0, rstd = 0;

  static NK_DEVICE Normalizer of(double mean, double var, double eps) {
    const A high = A(mean);
    const double rest = mean - double(high);
    return {high, rest == rest ? A(rest) : A(0), A(1 / sqrt(var + eps))};  // an infinite mean has no low part
  }
  NK_DEVICE A operator()(A x) const { return ((x - high) - low) * rstd; }
};

// The same per group, [stats.groups()] each. high and low are null for a second moment.
template <class A>
struct MomentArrays {
  A *high = nullptr, *low = nullptr, *rstd = nullptr;

  NK_DEVICE void put(int64_t group, const Normalizer<A>& n) const {
    if (high) high[group] = n.high;
    if (low) low[group] = n.low;
    if (rstd) rstd[group] = n.rstd;
  }
};

// What a forward pass leaves of the moments. One thread of the grid puts those of a group, once.
struct MomentOutputs {
  double *mean = nullptr, *var = nullptr;  // [stats.groups()]; either may be null
  Running running;                         // where every group is a channel

  NK_DEVICE void put(int64_t group, double group_mean, double group_var) const {
    if (mean) mean[group] = group_mean;
    if (var) var[group] = group_var;
    if (running.mean.data) move_channel(running, group, group_mean, group_var);
  }
};

// Averages of g and g*xhat, [stats.groups()] each; g is null for a second moment, both for given moments.
template <class A>
struct AverageArrays {
  A *g = nullptr, *gx = nullptr;
};

// x becomes xhat.
template <int V, class A>
NK_DEVICE void normalize(const MomentArrays<A>& moments, const Indexer& stats, const Cursor& at, int n, A (&x)[V]) {
  A value[V];
  if (moments.high) {
    gather<V>(moments.high, stats, at, n, value);
    NK_UNROLL
    for (int i = 0; i < V; ++i) x[i] -= value[i];
    gather<V>(moments.low, stats, at, n, value);
    NK_UNROLL
    for (int i = 0; i < V; ++i) x[i] -= value[i];
  }
  gather<V>(moments.rstd, stats, at, n, value);
  NK_UNROLL
  for (int i = 0; i < V; ++i) x[i] *= value[i];
}

// What follows the normalized value.
template <class T>
struct Affine {
  using A = Compute<T>;

  static constexpr unsigned kMasked = kAccessBytes / sizeof(T);  // elements to a byte of a mask

  Param weight, bias;
  const T* residual = nullptr;
  Act act = Act::none;
  Indexer channels;
  const unsigned char* mask = nullptr;  // backward: of relu, in place of the residual
  unsigned char* mask_out = nullptr;

  // xhat becomes z, what enters the activation.
  template <int V>
  NK_DEVICE void scale_and_shift(const Cursor& at, const Chunk& c, A (&z)[V]) const {
    A value[V];
    multiply_weight(at, c.n, z);
    if (bias.data) {
      gather<V>(bias, channels, at, c.n, value);
      NK_UNROLL
      for (int i = 0; i < V; ++i) z[i] += value[i];
    }
    add_to<T, V>(residual, c, z);
  }

  template <int V>
  NK_DEVICE void multiply_weight(const Cursor& at, int n, A (&z)[V]) const {
    if (!weight.data) return;
    A value[V];
    gather<V>(weight, channels, at, n, value);
    NK_UNROLL
    for (int i = 0; i < V; ++i) z[i] *= value[i];
  }

  // xhat becomes y.
  template <int V>
  NK_DEVICE void apply(const Cursor& at, const Chunk& c, A (&z)[V]) const {
    scale_and_shift(at, c, z);
    if (act == Act::none) return;
    if (mask_out) {
      unsigned bits = 0;
      NK_UNROLL
      for (int i = 0; i < V; ++i) bits |= unsigned(activate_slope(act, z[i]) != 0) << i;
      mask_out[uint64_t(c.e) / kMasked] = static_cast<unsigned char>(bits);
    }
    NK_UNROLL
    for (int i = 0; i < V; ++i) z[i] = activate(act, z[i]);
  }

  // dy becomes dz, the gradient before the activation.
  template <int V>
  NK_DEVICE void through_activation(const Cursor& at, const Chunk& c, const A (&xhat)[V], A (&dy)[V]) const {
    if (act == Act::none) return;
    if (mask) {
      const unsigned bits = unsigned(mask[uint64_t(c.e) / kMasked]) >> (uint64_t(c.e) % kMasked);
      NK_UNROLL
      for (int i = 0; i < V; ++i) dy[i] *= bits >> i & 1 ? A(1) : A(0);
      return;
    }
    A z[V];
    NK_UNROLL
    for (int i = 0; i < V; ++i) z[i] = xhat[i];
    scale_and_shift(at, c, z);
    NK_UNROLL
    for (int i = 0; i < V; ++i) dy[i] *= activate_slope(act, z[i]);
  }
};

// ---- kernels

template <class T>
struct MapForward {
  const T* x;
  T* y;
  int64_t numel;
  Indexer stats;
  MomentArrays<Compute<T>> moments;
  Affine<T> affine;
};

// From the end to the start: the reduction before read the buffer the other way, and what it read last is in the cache.
template <class T, int V>
__global__ void __launch_bounds__(kMapThreads, 2) map_forward(const MapForward<T> m) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = (m.numel + V - 1) / V - 1 - (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  const auto chunk_at = [&](int64_t at) { return at < 0 ? Chunk{0, 0} : clip<V>(at * V, 0, m.numel); };
  Vec<T, V> next = load_chunk<T, V>(m.x, chunk_at(i));
  for (; i >= 0; i -= step) {
    const Vec<T, V> now = next;
    next = load_chunk<T, V>(m.x, chunk_at(i - step));
    const Chunk c = chunk_at(i);
    Compute<T> v[V];
    widen(now, v);
    normalize<V>(m.moments, m.stats, m.stats.at(c.e), c.n, v);
    m.affine.apply(m.affine.channels.at(c.e), c, v);
    store_chunk<T, V>(m.y, c, narrow<T, V>(v));
  }
}

template <class T>
struct MapBackward {
  const T *dy, *x, *dtotal;  // x is null where nothing depends on it, dtotal may be null
  T *dx, *dresidual;
  int64_t numel;
  Indexer stats;
  MomentArrays<Compute<T>> moments;
  AverageArrays<Compute<T>> averages;
  Affine<T> affine;
};

template <class T, int V>
__global__ void __launch_bounds__(kMapThreads, 2) map_backward(const MapBackward<T> m) {
  using A = Compute<T>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = (m.numel + V - 1) / V - 1 - (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
  for (; i >= 0; i -= step) {
    const Chunk c = clip<V>(i * V, 0, m.numel);
    const Vec<T, V> dy = load_chunk<T, V>(m.dy, c), x = load_chunk<T, V>(m.x, {c.e, m.x ? c.n : 0});
    const Cursor group = m.stats.at(c.e), channel = m.affine.channels.at(c.e);
    A xhat[V], g[V], value[V];
    widen(x, xhat);
    if (m.x) normalize<V>(m.moments, m.stats, group, c.n, xhat);
    widen(dy, g);
    m.affine.through_activation(channel, c, xhat, g);
    if (m.dresidual) store_chunk<T, V>(m.dresidual, c, narrow<T, V>(g));
    if (!m.dx) continue;
    m.affine.multiply_weight(channel, c.n, g);
    if (m.averages.g) {
      gather<V>(m.averages.g, m.stats, group, c.n, value);
      NK_UNROLL
      for (int j = 0; j < V; ++j) g[j] -= value[j];
    }
    if (m.averages.gx) {
      gather<V>(m.averages.gx, m.stats, group, c.n, value);
      NK_UNROLL
      for (int j = 0; j < V; ++j) g[j] -= xhat[j] * value[j];
    }
    gather<V>(m.moments.rstd, m.stats, group, c.n, value);
    NK_UNROLL
    for (int j = 0; j < V; ++j) g[j] *= value[j];
    add_to<T, V>(m.dtotal, c, g);
    store_chunk<T, V>(m.dx, c, narrow<T, V>(g));
  }
}

template <class A>
struct Prepare {
  Param mean, var;
  int64_t groups;
  double eps;
  MomentArrays<A> moments;
  unsigned* tickets[2];  // zeroed for the reductions that follow
  int64_t counts[2];
};

template <class A>
__global__ void __launch_bounds__(kMapThreads, 2) prepare(const Prepare<A> p) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < p.groups; i += step) {
    const double mean = p.mean.data ? read<double>(p.mean, i) : 0;
    p.moments.put(i, Normalizer<A>::of(mean, read<double>(p.var, i), p.eps));
  }
  NK_UNROLL
  for (int k = 0; k < 2; ++k)
    for (int64_t i = first; i < p.counts[k]; i += step) p.tickets[k][i] = 0;
}

}  // namespace normkern::cuda
