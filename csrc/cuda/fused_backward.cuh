// fused_backward.cuh: backward in one read of x and dy: dx, dresidual, dweight and dbias in one launch.
//
// The sums of dweight and dbias fall out of the first sweep, as sums of a group, a line or a column of the unit
// (core/walk.h, Weights). A team adds them up while it walks units of the same channels and leaves one row of them in
// the workspace; the last team to leave one adds the rows, in the order of the teams.
#pragma once

#include "fused.cuh"

namespace normkern::cuda {

template <class A>
struct WeightSums {
  WeightRows shape;
  A* rows;  // [shape.rows][2][channels]: sums for dbias and for dweight
  unsigned* tickets;
  int64_t channels;
  Grad dweight, dbias;

  NK_DEVICE A* row(int64_t index) const { return rows + index * 2 * channels; }
  NK_DEVICE Sums sum_of(int64_t channel, int64_t from, int64_t to, int64_t step) const {
    Sums s;
    for (int64_t index = from; index < to; index += step)
      s = merge(s, Sums{double(row(index)[channel]), double(row(index)[channels + channel])});
    return s;
  }
  NK_DEVICE void put_row(int64_t index, int64_t channel, const Sums& s) const {
    row(index)[channel] = A(s.first);
    row(index)[channels + channel] = A(s.second);
  }

  // One of `count` blocks that have left a row, `mine`, for `n` channels from `first` on. `set` tells these from
  // others.
  NK_DEVICE void finish(int64_t set, int64_t mine, int64_t count, int64_t first, int64_t n) const {
    constexpr int kCell = WeightRows::kCell;
    unsigned* const ticket = tickets + set * shape.tickets_each();
    int64_t step = 1;
    if (shape.cells()) {
      const int64_t cell = mine / kCell, begin = cell * kCell, left = count - begin, rows = left < kCell ? left : kCell;
      if (!arrive_last(ticket + 1 + cell, rows)) return;
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        put_row(begin, first + i, sum_of(first + i, begin, begin + rows, 1));
      step = kCell;
    }
    if (!arrive_last(ticket, (count + step - 1) / step)) return;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Sums s = sum_of(first + i, 0, count, step);
      if (dweight.data) write(dweight, first + i, s.second);
      if (dbias.data) write(dbias, first + i, s.first);
    }
  }
};

// The sums of the columns of rows, for every seat, in shared memory: column c at place c % V * pitch + c / V, so that
// neighbouring threads, whose columns are V apart, lie on neighbouring banks.
template <class A, int V>
struct ColumnSums {
  A* first;
  int pitch;

  NK_DEVICE int size() const { return pitch * V; }  // of one of the two numbers
  NK_DEVICE A& at(unsigned column) const { return first[column % V * pitch + column / V]; }
  NK_DEVICE void add(unsigned column, A g, A product) const {
    A* const place = &at(column);
    place[0] += g;
    place[size()] += product;
  }
};

template <class T, int V>
struct FusedBackward {
  const T *dy, *x, *dtotal;  // dtotal may be null
  T *dx, *dresidual;         // either may be null
  Teams teams;
  Affine<T> affine;
  Param mean, var;
  double eps;
  bool second;
  WeightSums<Compute<T>> weights;
};

template <class T, int V, bool C>
__global__ void __launch_bounds__(C ? kSlabThreads : kBackwardThreads, 1) fused_backward(const FusedBackward<T, V> f) {
  using A = Compute<T>;
  using Access = Vec<T, V>;
  constexpr int N = C ? V : 1;
  NK_DYNAMIC_SHARED(unsigned char, memory);
  const Units& units = f.teams.units;
  const Team& team = f.teams.team;
  const Weights kind = team.weights;
  const bool by_line = !C && team.weight_sums && kind == Weights::line;
  const int threads = int(blockDim.x), thread = int(threadIdx.x);
  Seat<T, V> seat(f.teams, memory);
  Stager stager(seat, team.stages, [&](const Chunk& c, Access* at) {
    stage_chunk<T, V>(at, f.x, c);
    stage_chunk<T, V>(at + threads, f.dy, c);
  });
  const double count = double(f.teams.count);
  // Weighted at the end where all elements of a sum have the same weight, else element by element.
  const bool late = kind == Weights::group || by_line || (C && kind == Weights::column);
  const bool own_columns = !C && team.weight_sums && kind == Weights::column;
  const bool slab_columns = C && team.weight_sums && kind == Weights::column;
  const auto weight_of = [&](int64_t channel) {
    return f.affine.weight.data ? read<double>(f.affine.weight, channel) : 1.0;
  };

  // What is added up over units: of lines, or of columns (both by the threads that found them), or of seats' columns.
  const int pieces = int(team.pieces());
  Sums* const lines = reinterpret_cast<Sums*>(memory + f.teams.memory.lines);  // [lines][pieces], of one unit
  Sums* const held = reinterpret_cast<Sums*>(memory + f.teams.memory.sums);
  const int width = f.teams.block_columns, pitch = (width + V - 1) / V;
  ColumnSums<A, V> seat_columns{reinterpret_cast<A*>(held) + seat.seat() * 2 * pitch * V, pitch};
  const int holds = by_line ? int(units.lines) : slab_columns ? int(units.columns) : 0;
  const auto start_afresh = [&] {
    for (int i = thread; i < holds; i += threads) put(held[i], Sums{});
  };
  start_afresh();
  if (own_columns) {
    for (int i = thread; i < team.seats * 2 * pitch * V; i += threads) reinterpret_cast<A*>(held)[i] = 0;
    __syncthreads();
  }

  int set = 0;  // the k whose sums are held
  const auto leave = [&] {
    const int64_t first_team = team.team_of(units, set * units.batch);
    const int64_t here = seat.team() - first_team, end = (set + 1) * units.batch;
    const int64_t rows = team.team_of(units, end - 1) - first_team + 1;
    if (own_columns) {
      __syncthreads();
      const int64_t first = seat.first_column(), left = units.columns - first, n = left < width ? left : width;
      for (int64_t i = thread; i < n; i += threads) {
        Sums s;
        for (int other = 0; other < team.seats; ++other) {
          const ColumnSums<A, V> columns{reinterpret_cast<A*>(held) + other * 2 * pitch * V, pitch};
          const A* const place = &columns.at(unsigned(i));
          s = merge(s, Sums{double(place[0]), double(place[columns.size()])});
        }
        f.weights.put_row(here, first + i, s);
      }
      f.weights.finish(seat.rank(), here, rows, first, n > 0 ? n : 0);
    } else if (holds > 0) {
      const int64_t first = set * holds, left = f.weights.channels - first, n = left < holds ? left : holds;
      const int64_t mine = here * team.blocks + seat.rank();
      for (int64_t i = thread; i < n; i += threads) f.weights.put_row(mine, first + i, held[i]);
      f.weights.finish(set, mine, rows * team.blocks, first, n);
      start_afresh();
    }
  };

  for (int round = 0; round < seat.rounds(); ++round) {
    Access* at = nullptr;
    const Spot s = stager.take(at);
    if (holds > 0 && s.k != set) {
      if (round > 0) leave();
      set = s.k;
    }
    Chunk own{0, s.lines > 0 ? 1 : 0};
    if constexpr (C) own = seat.own_columns(s);
    Normalizer<A> normalizer[N];
    NK_UNROLL
    for (int i = 0; i < N; ++i) {
      const int64_t group = seat.group(s) + (C ? seat.group_of(own.e + (i < own.n ? i : 0)) : 0);
      if (i < own.n)
        normalizer[i] =
            Normalizer<A>::of(f.second ? 0 : read<double>(f.mean, group), read<double>(f.var, group), f.eps);
    }

    // Both sweeps need these; to keep them in between would cost more than to compute them again.
    const auto terms = [&](const Cursor& channel, const Chunk& c, const Access* x, A(&xhat)[V], A(&g)[V]) {
      widen(x[0], xhat);
      NK_UNROLL
      for (int i = 0; i < V; ++i) xhat[i] = normalizer[C ? i : 0](xhat[i]);
      widen(x[threads], g);
      f.affine.through_activation(channel, c, xhat, g);
    };
    const Cursor base = seat.unit_channel(s, own.e);
    A sum[N] = {}, product[N] = {};
    const auto add_chunk = [&](int line, const Chunk& c, const Access* x) {
      const Cursor channel = seat.channel(f.affine.channels, base, s, line, c);
      A xhat[V], g[V], chunk_sum = 0, chunk_product = 0;
      terms(channel, c, x, xhat, g);
      if (own_columns) {
        const unsigned column = unsigned(c.e - s.begin) - unsigned(seat.first_column());
        NK_UNROLL
        for (int i = 0; i < V; ++i)
          if (i < c.n) seat_columns.add(column + unsigned(i), g[i], g[i] * xhat[i]);
      }
      if (!late) f.affine.multiply_weight(channel, c.n, g);
      NK_UNROLL
      for (int i = 0; i < V; ++i) {
        const A one = i < c.n ? g[i] : A(0), other = i < c.n ? g[i] * xhat[i] : A(0);
        if constexpr (C) {
          sum[i] += one;
          product[i] += other;
        } else {
          chunk_sum += one;
          chunk_product += other;
        }
      }
      sum[0] += chunk_sum;
      product[0] += chunk_product;
    };
    const auto end_line = [&](int line) {
      if (!by_line) return;
      const int together = team.width < kWarp ? team.width : kWarp;
      const Sums r = merge_lanes(Sums{double(sum[0]), double(product[0])}, together);
      if (line < units.lines && seat.place() % together == 0) put(lines[line * pieces + seat.place() / kWarp], r);
      sum[0] = product[0] = 0;
    };
    seat.each(s, at, add_chunk, end_line);

    A average[N], slope[N];
    if constexpr (C) {
      seat.sum_columns(s, own, sum, product, [&](int column, const Sums& r) {
        if (kind != Weights::column) return r;
        if (slab_columns) put(held[column], merge(held[column], r));
        const double weight = weight_of(s.k * units.columns + column);
        return Sums{r.first * weight, r.second * weight};
      });
    } else {
      Sums total{double(sum[0]), double(product[0])};
      if (by_line) {
        __syncthreads();
        total = {};
        for (int line = thread; line < units.lines; line += threads) {
          Sums r;
          for (int piece = 0; piece < pieces; ++piece) r = merge(r, lines[line * pieces + piece]);
          put(held[line], merge(held[line], r));
          const double weight = weight_of(s.k * units.lines + line);
          total = merge(total, Sums{r.first * weight, r.second * weight});
        }
      }
      if (own_columns) __syncwarp();  // a column may be another lane's next time
      total = seat.sum(total);
      if (kind == Weights::group && s.lines > 0) {
        const int64_t group = seat.group(s);
        if (seat.leads() && f.weights.dweight.data) write(f.weights.dweight, group, total.second);
        if (seat.leads() && f.weights.dbias.data) write(f.weights.dbias, group, total.first);
        const double weight = weight_of(group);
        total = {total.first * weight, total.second * weight};
      }
      average[0] = f.second ? A(0) : A(total.first / count);
      slope[0] = A(total.second / count);
    }
    if constexpr (C) {
      NK_UNROLL
      for (int i = 0; i < V; ++i) {
        average[i] = slope[i] = 0;
        if (i >= own.n) continue;
        const int in_unit = seat.group_of(own.e + i);
        const int64_t group = seat.group(s) + in_unit;
        Sums total = seat.total(in_unit);
        if (kind == Weights::group) {
          if (seat.first_lane() && seat.begins_group(own.e + i)) {
            if (f.weights.dweight.data) write(f.weights.dweight, group, total.second);
            if (f.weights.dbias.data) write(f.weights.dbias, group, total.first);
          }
          const double weight = weight_of(group);
          total = {total.first * weight, total.second * weight};
        }
        average[i] = f.second ? A(0) : A(total.first / count);
        slope[i] = A(total.second / count);
      }
    }
    if (!f.dx && !f.dresidual) continue;
    seat.each(s, at, [&](int line, const Chunk& c, const Access* x) {
      const Cursor channel = seat.channel(f.affine.channels, base, s, line, c);
      A xhat[V], g[V];
      terms(channel, c, x, xhat, g);
      if (f.dresidual) store_chunk<T, V>(f.dresidual, c, narrow<T, V>(g));
      if (!f.dx) return;
      f.affine.multiply_weight(channel, c.n, g);
      NK_UNROLL
      for (int i = 0; i < V; ++i) {
        const int j = C ? i : 0;
        g[i] = ((g[i] - average[j]) - xhat[i] * slope[j]) * normalizer[j].rstd;
      }
      add_to<T, V>(f.dtotal, c, g);
      store_chunk<T, V>(f.dx, c, narrow<T, V>(g));
    });
  }
  if (seat.rounds() > 0 && (own_columns || holds > 0)) leave();
  seat.part();
}

}  // namespace normkern::cuda
