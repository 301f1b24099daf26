// fused.cuh: a whole norm in one read, for groups that fit into the shared memory of a block.
//
// `lanes` threads share a group: 1 to 32 of a warp, several groups to a block, or the whole block. Shared memory only
// extends each thread's registers: a thread reads what it copied itself, so no barrier is needed but the one in the
// sums, and neighbouring threads lie on neighbouring 16 bytes. One kernel serves every size up to the chip's limit.
#pragma once

#include "map.cuh"
#include "merge.cuh"

namespace normkern::cuda {

// The group and the slots of one thread.
struct Seat {
  int lanes, lane, per_block, place;  // place: which of the block's groups

  static NK_DEVICE Seat of(int lanes) {
    const int thread = int(threadIdx.x);
    return {lanes, thread % lanes, int(blockDim.x) / lanes, thread / lanes};
  }
  // Valid in every thread of the group. Lanes without a group must take part.
  NK_DEVICE Sums sum(const Sums& s, int& round) const {
    return lanes <= kWarp ? merge_lanes(s, lanes) : merge_block(s, round);
  }
};

template <class T, int V>
struct FusedForward {
  const T* x;
  T* y;  // null: moments alone
  Runs<V> runs;
  Affine<T> affine;
  double count, eps;
  bool second;
  double *mean_out, *var_out;
  int lanes;
};

template <class T, int V>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_forward(const FusedForward<T, V> f) {
  using A = Compute<T>;
  using Access = Vec<T, V>;
  NK_DYNAMIC_SHARED(Access, staged);
  const Seat seat = Seat::of(f.lanes);
  const int threads = int(blockDim.x);
  int round = 0;
  for (int64_t first = int64_t(blockIdx.x) * seat.per_block; first < f.runs.groups();
       first += int64_t(gridDim.x) * seat.per_block) {
    const int64_t group = first + seat.place, begin = f.runs.begin(group);
    const int slots = group < f.runs.groups() ? int(f.runs.slots()) : 0;
    Access* const mine = staged + threadIdx.x;
    // visit(chunk, access) for each of this thread's slots
    const auto each = [&](auto visit) {
      Access* at = mine;
      for (int slot = seat.lane; slot < slots; slot += seat.lanes, at += threads) {
        const Chunk c = f.runs.chunk(begin, slot);
        if (c.n > 0) visit(c, *at);
      }
    };
    each([&](const Chunk& c, Access& access) { stage_chunk<T, V>(&access, f.x, c); });
    // Any value of the group will do to keep a large mean out of the sums; a second moment must not have one.
    const A shift = slots > 0 && !f.second ? A(to_float(f.x[begin])) : A(0);
    copy_async_commit();
    copy_async_wait<0>();

    A sum = 0, squares = 0;
    each([&](const Chunk& c, const Access& access) {
      A chunk_sum = 0, chunk_squares = 0;
      NK_UNROLL
      for (int i = 0; i < V; ++i) {
        const A d = i < c.n ? A(to_float(access.v[i])) - shift : A(0);
        chunk_sum += d;
        chunk_squares += d * d;
      }
      sum += chunk_sum;
      squares += chunk_squares;
    });
    Sums total = seat.sum({double(sum), double(squares)}, round);
    double mean = 0, var = total.second / f.count;
    if (!f.second) {
      // Once more around a mean that is nearly right: exact sums for the mean's last digits and for the variance.
      mean = double(shift) + total.first / f.count;
      const Normalizer<A> near_mean = Normalizer<A>::of(mean, 1, 0);
      sum = squares = 0;
      each([&](const Chunk& c, const Access& access) {
        A chunk_sum = 0, chunk_squares = 0;
        NK_UNROLL
        for (int i = 0; i < V; ++i) {
          const A d = i < c.n ? (A(to_float(access.v[i])) - near_mean.high) - near_mean.low : A(0);
          chunk_sum += d;
          chunk_squares += d * d;
        }
        sum += chunk_sum;
        squares += chunk_squares;
      });
      total = seat.sum({double(sum), double(squares)}, round);
      const double off = total.first / f.count;
      mean += off;
      var = total.second / f.count - off * off;
      var = var < 0 ? 0 : var;  // NaN stays
    }
    if (slots > 0 && seat.lane == 0) {
      if (f.mean_out) f.mean_out[group] = mean;
      if (f.var_out) f.var_out[group] = var;
    }
    if (!f.y) continue;
    const Normalizer<A> normalizer = Normalizer<A>::of(mean, var, f.eps);
    each([&](const Chunk& c, const Access& access) {
      A v[V];
      widen(access, v);
      NK_UNROLL
      for (int i = 0; i < V; ++i) v[i] = normalizer(v[i]);
      f.affine.apply(f.affine.channels.at(c.e), c, v);
      store_chunk<T, V>(f.y, c, narrow<T, V>(v));
    });
  }
}

template <class T, int V>
struct FusedBackward {
  const T *dy, *x;
  T *dx, *dresidual;  // either may be null
  Runs<V> runs;
  Affine<T> affine;
  Param mean, var;
  double count, eps;
  bool second;
  bool channel_per_group;  // every group has one weight, so its sums are dweight and dbias
  Grad dweight, dbias;     // only then
  int lanes;
};

template <class T, int V>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_backward(const FusedBackward<T, V> f) {
  using A = Compute<T>;
  using Access = Vec<T, V>;
  NK_DYNAMIC_SHARED(Access, staged);
  const Seat seat = Seat::of(f.lanes);
  const int threads = int(blockDim.x);
  int round = 0;
  for (int64_t first = int64_t(blockIdx.x) * seat.per_block; first < f.runs.groups();
       first += int64_t(gridDim.x) * seat.per_block) {
    const int64_t group = first + seat.place, begin = f.runs.begin(group);
    const int slots = group < f.runs.groups() ? int(f.runs.slots()) : 0;
    Access* const mine = staged + threadIdx.x;
    // visit(chunk, x, dy) for each of this thread's slots; x and dy take turns in shared memory
    const auto each = [&](auto visit) {
      Access* at = mine;
      for (int slot = seat.lane; slot < slots; slot += seat.lanes, at += 2 * threads) {
        const Chunk c = f.runs.chunk(begin, slot);
        if (c.n > 0) visit(c, at[0], at[threads]);
      }
    };
    each([&](const Chunk& c, Access& x, Access& dy) {
      stage_chunk<T, V>(&x, f.x, c);
      stage_chunk<T, V>(&dy, f.dy, c);
    });
    copy_async_commit();
    Normalizer<A> normalizer;
    if (slots > 0)
      normalizer = Normalizer<A>::of(f.second ? 0 : read<double>(f.mean, group), read<double>(f.var, group), f.eps);
    copy_async_wait<0>();

    // Both sweeps need these; to keep them in between would cost more than to compute them again.
    const auto terms = [&](const Chunk& c, const Access& x, const Access& dy, A(&xhat)[V], A(&g)[V], bool last) {
      const Cursor channel = f.affine.channels.at(c.e);
      widen(x, xhat);
      NK_UNROLL
      for (int i = 0; i < V; ++i) xhat[i] = normalizer(xhat[i]);
      widen(dy, g);
      f.affine.through_activation(channel, c, xhat, g);
      if (last && f.dresidual) store_chunk<T, V>(f.dresidual, c, narrow<T, V>(g));
      if (last || !f.channel_per_group) f.affine.multiply_weight(channel, c.n, g);
    };
    A sum = 0, product = 0;
    each([&](const Chunk& c, const Access& x, const Access& dy) {
      A xhat[V], g[V], chunk_sum = 0, chunk_product = 0;
      terms(c, x, dy, xhat, g, false);
      NK_UNROLL
      for (int i = 0; i < V; ++i) {
        chunk_sum += i < c.n ? g[i] : A(0);
        chunk_product += i < c.n ? g[i] * xhat[i] : A(0);
      }
      sum += chunk_sum;
      product += chunk_product;
    });
    Sums total = seat.sum({double(sum), double(product)}, round);
    if (f.channel_per_group && slots > 0) {
      if (seat.lane == 0 && f.dweight.data) write(f.dweight, group, total.second);
      if (seat.lane == 0 && f.dbias.data) write(f.dbias, group, total.first);
      const double weight = f.affine.weight.data ? read<double>(f.affine.weight, group) : 1;
      total = {total.first * weight, total.second * weight};
    }
    if (!f.dx && !f.dresidual) continue;
    const A average = f.second ? A(0) : A(total.first / f.count), slope = A(total.second / f.count);
    each([&](const Chunk& c, const Access& x, const Access& dy) {
      A xhat[V], g[V];
      terms(c, x, dy, xhat, g, true);
      if (!f.dx) return;
      NK_UNROLL
      for (int i = 0; i < V; ++i) g[i] = ((g[i] - average) - xhat[i] * slope) * normalizer.rstd;
      store_chunk<T, V>(f.dx, c, narrow<T, V>(g));
    });
  }
}

}  // namespace normkern::cuda
