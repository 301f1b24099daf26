// reduce.cuh: one result for every group of a domain, whatever its size.
//
// Two questions, answered apart. What is accumulated: MomentsOf or GradientsOf. Who walks a group (plan.h, Walk):
// `rows`, blocks along the runs of one group; `columns`, threads that own neighbouring elements of a line and go down
// the lines. Where several blocks share a group or a column, each leaves a partial result, and the last one to finish
// merges them in block order, not in order of arrival, so the same input gives the same bits.
#pragma once

#include "map.cuh"
#include "merge.cuh"

namespace normkern::cuda {

// Count, mean and centred squares of x; or its squares alone. Squares are taken in compute type: deviations above 1e19
// overflow float32 (and bfloat16), and such a group is normalized to zero.
template <class T, int V>
struct MomentsOf {
  using A = Compute<T>;
  using Result = Spread;
  using Column = ShiftedMoments<A>;  // one element of a line, in shared memory
  using Loaded = Vec<T, V>;

  const T *x, *add;  // add may be null, and total then is
  T* total;
  bool second;
  double eps;
  MomentOutputs outputs;
  MomentArrays<A> arrays;

  // Every element is loaded once, so this is also where the sum is stored.
  NK_DEVICE Loaded load(const Chunk& c) const {
    const Loaded loaded = load_chunk<T, V>(x, c);
    if (!add) return loaded;
    const Loaded sum = rounded_sum(loaded, load_chunk<T, V>(add, c));
    store_chunk<T, V, false>(total, c, sum);  // map reads it
    return sum;
  }
  NK_DEVICE Cursor own(int64_t) const { return {}; }

  struct Along {
    ShiftedMoments<A> moments;
    NK_DEVICE Result result() const { return moments.spread(); }
  };
  NK_DEVICE void push(Along& state, const Cursor&, const Chunk& c, const Loaded& loaded) const {
    A v[V];
    widen(loaded, v);
    if (second) {
      A sum = 0;
      NK_UNROLL
      for (int i = 0; i < V; ++i) sum += v[i] * v[i];  // zero beyond the chunk
      state.moments.m2 += sum;
      state.moments.count += A(c.n);
    } else if (c.n == V) {
      state.moments.push(v);
    } else {
      state.moments.push(v, c.n);
    }
  }

  // V columns that share their count, and so the division of Welford's update.
  struct Across {
    A count = 0, shift[V] = {}, mean[V] = {}, m2[V] = {};
    NK_DEVICE Column column(int i) const { return {shift[i], mean[i], m2[i], count}; }
  };
  NK_DEVICE void push(Across& state, const Cursor&, const Chunk&, const Loaded& loaded) const {
    A v[V];
    widen(loaded, v);
    if (second) {
      NK_UNROLL
      for (int i = 0; i < V; ++i) state.m2[i] += v[i] * v[i];
      state.count += 1;
      return;
    }
    if (state.count == 0) {
      NK_UNROLL
      for (int i = 0; i < V; ++i) state.shift[i] = v[i];
    }
    state.count += 1;
    const A share = 1 / state.count;
    NK_UNROLL
    for (int i = 0; i < V; ++i) {
      const A d = v[i] - state.shift[i], delta = d - state.mean[i];
      state.mean[i] += delta * share;
      state.m2[i] += delta * (d - state.mean[i]);
    }
  }

  static NK_DEVICE Result result(const Column& column) { return column.spread(); }

  NK_DEVICE void finish(int64_t group, const Result& r) const {
    const double mean = second ? 0 : r.mean, var = r.m2 / r.count;
    outputs.put(group, mean, var);
    arrays.put(group, Normalizer<A>::of(mean, var, eps));
  }
};

// Sums of g and g*xhat over a statistics group, or of dz and dz*xhat over an affine group.
template <class T, int V>
struct GradientsOf {
  using A = Compute<T>;
  using Result = Sums;
  struct Column {
    A first, second;
  };
  struct Loaded {
    Vec<T, V> dy, x;
  };

  const T *dy, *x;
  Indexer stats;
  MomentArrays<A> moments;
  Affine<T> affine;
  bool walks_stats, walks_affine;  // the walked domain is the one of the moments, of the weights, or both
  // Results. Averages that come from affine sums are weighted at the end, others element by element.
  int64_t count;  // of a statistics group
  AverageArrays<A> averages;
  Grad dweight, dbias;

  NK_DEVICE Loaded load(const Chunk& c) const { return {load_chunk<T, V>(dy, c), load_chunk<T, V>(x, c)}; }
  NK_DEVICE Cursor own(int64_t e) const { return walks_stats ? stats.at(e) : affine.channels.at(e); }

  NK_DEVICE void terms(const Cursor& own, const Chunk& c, const Loaded& loaded, A (&first)[V], A (&second)[V]) const {
    const Cursor channel = walks_affine ? own : affine.channels.at(c.e);
    widen(loaded.x, second);
    normalize<V>(moments, stats, walks_stats ? own : stats.at(c.e), c.n, second);
    widen(loaded.dy, first);
    affine.through_activation(channel, c, second, first);
    if (!walks_affine) affine.multiply_weight(channel, c.n, first);
    NK_UNROLL
    for (int i = 0; i < V; ++i) {
      first[i] = i < c.n ? first[i] : A(0);
      second[i] = i < c.n ? first[i] * second[i] : A(0);
    }
  }

  struct Along {
    A first = 0, second = 0;
    NK_DEVICE Result result() const { return {double(first), double(second)}; }
  };
  NK_DEVICE void push(Along& state, const Cursor& own, const Chunk& c, const Loaded& loaded) const {
    A first[V], second[V];
    terms(own, c, loaded, first, second);
    NK_UNROLL
    for (int i = 1; i < V; ++i) {
      first[0] += first[i];
      second[0] += second[i];
    }
    state.first += first[0];
    state.second += second[0];
  }

  struct Across {
    A first[V] = {}, second[V] = {};
    NK_DEVICE Column column(int i) const { return {first[i], second[i]}; }
  };
  NK_DEVICE void push(Across& state, const Cursor& own, const Chunk& c, const Loaded& loaded) const {
    A first[V], second[V];
    terms(own, c, loaded, first, second);
    NK_UNROLL
    for (int i = 0; i < V; ++i) {
      state.first[i] += first[i];
      state.second[i] += second[i];
    }
  }

  static NK_DEVICE Result result(const Column& column) { return {double(column.first), double(column.second)}; }

  NK_DEVICE void finish(int64_t group, const Result& r) const {
    const double weight = walks_affine && affine.weight.data ? read<double>(affine.weight, group) : 1;
    if (averages.g) averages.g[group] = A(r.first * weight / double(count));
    if (averages.gx) averages.gx[group] = A(r.second * weight / double(count));
    if (dweight.data) write(dweight, group, r.second);
    if (dbias.data) write(dbias, group, r.first);
  }
};

// Where blocks that share a group or a column meet; both null if none do.
template <class R>
struct Meeting {
  R* partials = nullptr;
  unsigned* tickets = nullptr;
  int64_t parts = 1;
};

template <class T, int V, class Op>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_rows(const Runs<V> runs, const Op op, const Meeting<typename Op::Result> meeting) {
  using Result = typename Op::Result;
  const int64_t parts = meeting.parts, per_part = (runs.slots() + parts - 1) / parts;
  int round = 0;
  for (int64_t item = blockIdx.x; item < runs.groups() * parts; item += gridDim.x) {
    const int64_t group = item / parts, first = (item - group * parts) * per_part, begin = runs.begin(group);
    const int64_t last = first + per_part < runs.slots() ? first + per_part : runs.slots();
    const auto chunk_at = [&](int64_t slot) { return slot < last ? runs.chunk(begin, slot) : Chunk{0, 0}; };
    const Cursor own{group};
    typename Op::Along state;
    int64_t slot = first + threadIdx.x;
    Chunk chunk = chunk_at(slot);
    auto loaded = op.load(chunk);
    while (slot < last) {
      slot += blockDim.x;
      const Chunk next = chunk_at(slot);
      const auto coming = op.load(next);  // on its way while this one is added
      if (chunk.n > 0) op.push(state, own, chunk, loaded);
      chunk = next;
      loaded = coming;
    }
    Result result = merge_block(state.result(), round);
    if (parts > 1) {
      if (threadIdx.x == 0) meeting.partials[item] = result;
      if (!arrive_last(meeting.tickets + group, parts)) continue;
      result = {};
      for (int64_t part = threadIdx.x; part < parts; part += blockDim.x)
        result = merge(result, meeting.partials[group * parts + part]);
      result = merge_block(result, round);
    }
    if (threadIdx.x == 0) op.finish(group, result);
  }
}

template <class T, int V, class Op>
__global__ void __launch_bounds__(kColumnThreads, 2)
    reduce_columns(const Domain d, const Tile tile, const Op op, const Meeting<typename Op::Result> meeting) {
  using Result = typename Op::Result;
  using Column = typename Op::Column;
  NK_DYNAMIC_SHARED(unsigned char, memory);
  const int64_t line = d.keep * d.cols, parts = meeting.parts, per_part = (d.rows + parts - 1) / parts;
  const int pitch = tile.width * V, lane = int(threadIdx.x) / tile.width, place = int(threadIdx.x) % tile.width;
  Column* const lanes = reinterpret_cast<Column*>(memory);  // [tile.lanes][pitch]
  Result* const merged = reinterpret_cast<Result*>(
      memory + (size_t(tile.lanes) * pitch * sizeof(Column) + kAccessBytes - 1) / kAccessBytes * kAccessBytes);

  for (int64_t item = blockIdx.x; item < d.batch * parts * tile.tiles; item += gridDim.x) {
    const int64_t strip = item / tile.tiles, batch = strip / parts, part = strip - batch * parts;
    const int64_t left = (item - strip * tile.tiles) * tile.columns;
    const int columns = int(tile.columns < line - left ? tile.columns : line - left);
    const int64_t first = part * per_part, last = first + per_part < d.rows ? first + per_part : d.rows;
    const int64_t corner = (batch * d.rows + first) * line + left;
    // A lane's lines begin at the same place within an access, so a thread's columns never change.
    const auto offset_of = [&](int64_t l) { return int((corner + l * line) & (V - 1)); };

    if (lane < tile.lanes) {
      const int64_t begin = corner + lane * line, step = tile.lanes * line;
      const Chunk top = clip<V>((begin & ~int64_t(V - 1)) + place * V, begin, begin + columns);
      typename Op::Across state;
      int64_t row = first + lane;
      if (row < last && top.n > 0) {
        const Cursor own = op.own(top.e);
        Chunk chunk = top;
        auto loaded = op.load(chunk);
        while (row < last) {
          row += tile.lanes;
          const Chunk next{chunk.e + step, top.n};
          const auto coming = op.load({next.e, row < last ? next.n : 0});
          op.push(state, own, chunk, loaded);
          chunk = next;
          loaded = coming;
        }
      }
      Column* const mine = lanes + lane * pitch + (top.e - begin) + offset_of(lane);
      NK_UNROLL
      for (int i = 0; i < V; ++i)
        if (i < top.n) put(mine[i], state.column(i));
    }
    __syncthreads();
    merge_columns(merged, columns, tile.lanes, [&](int column, int64_t from, int64_t to) {
      Result r;
      for (int64_t l = from; l < to; ++l) r = merge(r, Op::result(lanes[l * pitch + column + offset_of(l)]));
      return r;
    });

    if (parts > 1) {
      for (int column = int(threadIdx.x); column < columns; column += int(blockDim.x))
        meeting.partials[strip * line + left + column] = merged[column];
      if (!arrive_last(meeting.tickets + batch * tile.tiles + left / tile.columns, parts)) continue;
      merge_columns(merged, columns, parts, [&](int column, int64_t from, int64_t to) {
        Result r;
        for (int64_t p = from; p < to; ++p) r = merge(r, meeting.partials[(batch * parts + p) * line + left + column]);
        return r;
      });
    }
    const int cols = int(d.cols);
    for (int group = int(threadIdx.x); group < columns / cols; group += int(blockDim.x)) {
      Result r = merged[group * cols];
      for (int i = 1; i < cols; ++i) r = merge(r, merged[group * cols + i]);
      op.finish(batch * d.keep + left / d.cols + group, r);
    }
  }
}

}  // namespace normkern::cuda
