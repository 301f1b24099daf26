// fused.cuh: forward of a whole norm in one read, for units that a team (team.cuh) can hold in shared memory.
//
// Shared memory only extends each thread's registers: a thread reads what it copied itself, so no barrier is needed but
// those in the sums, and neighbouring threads lie on neighbouring 16 bytes. By rows, all elements of a thread belong to
// one group; by columns (C), each of its V columns has a group of its own, the same all the way down the lines.
#pragma once

#include "team.cuh"

namespace normkern::cuda {

// Copies units into shared memory ahead of the computation: one ahead where there are two stages.
template <class T, int V, class Copy>
class Stager {
 public:
  NK_DEVICE Stager(Seat<T, V>& seat, int stages, Copy copy)
      : seat_(seat), copy_(copy), ahead_(stages == 2 ? 1 : 0), left_(seat.rounds()) {
    coming_ = bring(0);
  }
  // The next unit and where its elements are; waits for them.
  NK_DEVICE Spot take(Vec<T, V>*& at) {
    if (!ahead_ && taken_ > 0) coming_ = bring(0);
    const Spot now = coming_;
    const int stage = ahead_ & taken_++;
    at = seat_.staged(stage);
    if (ahead_) {
      coming_ = bring(stage ^ 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    return now;
  }

 private:
  NK_DEVICE Spot bring(int stage) {
    Spot s;
    if (left_-- > 0) {
      s = seat_.next();
      seat_.each(s, seat_.staged(stage), [&](int, const Chunk& c, Vec<T, V>* at) { copy_(c, at); });
    }
    copy_async_commit();
    return s;
  }

  Seat<T, V>& seat_;
  Copy copy_;
  int ahead_, left_, taken_ = 0;
  Spot coming_;
};

template <class T, int V>
struct FusedForward {
  const T *x, *add;  // add may be null, and total then is
  T *y, *total;      // y null: moments alone
  Teams teams;
  Affine<T> affine;
  double eps;
  bool second;
  MomentOutputs outputs;

  // What is normalized.
  NK_DEVICE T element(int64_t e) const { return add ? rounded_sum(x[e], add[e]) : x[e]; }
};

// What one block does.
template <bool C, class T, int V>
NK_DEVICE void forward_units(const FusedForward<T, V>& f, unsigned char* memory) {
  using A = Compute<T>;
  using Access = Vec<T, V>;
  constexpr int N = C ? V : 1;
  Seat<T, V> seat(f.teams, memory);
  Stager stager(seat, f.teams.team.stages, [&](const Chunk& c, Access* at) { stage_chunk<T, V>(at, f.x, c); });
  const double count = double(f.teams.count);

  for (int round = 0; round < seat.rounds(); ++round) {
    Access* at = nullptr;
    const Spot s = stager.take(at);
    Chunk own{0, s.lines > 0 ? 1 : 0};
    if constexpr (C) own = seat.own_columns(s);
    if (f.add) {  // the sum takes the place of x
      seat.each(s, at, [&](int, const Chunk& c, Access* x) {
        const Access sum = rounded_sum(*x, load_chunk<T, V>(f.add, c));
        store<T, V>(x->v, sum);
        store_chunk<T, V>(f.total, c, sum);
      });
    }
    // Any value of the group will do to keep a large mean out of the sums; a second moment must not have one. By
    // columns it is that of the first line, so that all lines of a column have the same.
    A shift[N] = {}, mean[N], rest[N] = {};
    if (!f.second) {
      if constexpr (C) {
        NK_UNROLL
        for (int i = 0; i < V; ++i)
          if (i < own.n) shift[i] = A(to_float(f.element(s.begin + own.e + i)));
      } else if (seat.has_any(s)) {
        shift[0] = A(to_float(at->v[0]));
      }
    }
    int elements = 0;
    A sum[N], squares[N];
    const auto sum_around = [&](const A(&high)[N], const A(&low)[N]) {
      NK_UNROLL
      for (int i = 0; i < N; ++i) sum[i] = squares[i] = 0;
      seat.each(s, at, [&](int, const Chunk& c, const Access* x) {
        A chunk_sum = 0, chunk_squares = 0;
        NK_UNROLL
        for (int i = 0; i < V; ++i) {
          const int j = C ? i : 0;
          const A d = i < c.n ? (A(to_float(x->v[i])) - high[j]) - low[j] : A(0);
          if constexpr (C) {
            sum[j] += d;
            squares[j] += d * d;
          } else {
            chunk_sum += d;
            chunk_squares += d * d;
          }
        }
        sum[0] += chunk_sum;
        squares[0] += chunk_squares;
        elements += c.n;
      });
    };
    Sums total;  // by rows
    const auto total_of = [&](int i) {
      if constexpr (C) return i < own.n ? seat.total(seat.group_of(own.e + i)) : Sums{};
      return total;
    };

    sum_around(shift, rest);
    if constexpr (C) {
      const int lines = s.lines - seat.first_line();
      seat.sum_columns(s, own, sum, squares, [&](int column, const Sums& r) {
        const double from = f.second ? 0 : double(to_float(f.element(s.begin + column)));
        return Sums{r.first + (lines > 0 ? from * lines : 0.0), r.second};
      });
    } else {
      total = seat.sum({double(sum[0]) + double(shift[0]) * elements, double(squares[0])});
    }
    Normalizer<A> normalizer[N];
    const auto finish = [&](int i, double mean, double var) {
      normalizer[i] = Normalizer<A>::of(mean, var, f.eps);
      if (i < own.n && (C ? seat.first_lane() && seat.begins_group(own.e + i) : seat.leads()))
        f.outputs.put(seat.group(s) + (C ? seat.group_of(own.e + i) : 0), mean, var);
    };
    if (f.second) {
      NK_UNROLL
      for (int i = 0; i < N; ++i) finish(i, 0, total_of(i).second / count);
    } else {
      // Once more around a mean that is nearly right: exact sums for the mean's last digits and for the variance.
      NK_UNROLL
      for (int i = 0; i < N; ++i) {
        const Normalizer<A> near = Normalizer<A>::of(total_of(i).first / count, 1, 0);
        mean[i] = near.high;
        rest[i] = near.low;
      }
      sum_around(mean, rest);
      if constexpr (C)
        seat.sum_columns(s, own, sum, squares, [](int, const Sums& r) { return r; });
      else
        total = seat.sum({double(sum[0]), double(squares[0])});
      NK_UNROLL
      for (int i = 0; i < N; ++i) {
        const Sums centred = total_of(i);
        const double off = centred.first / count, exact = double(mean[i]) + (double(rest[i]) + off);
        const double var = centred.second / count - off * off;
        finish(i, exact, var < 0 ? 0 : var);  // NaN stays
      }
    }
    if (!f.y) continue;
    const Cursor base = seat.unit_channel(s, own.e);
    seat.each(s, at, [&](int line, const Chunk& c, const Access* x) {
      A v[V];
      widen(*x, v);
      NK_UNROLL
      for (int i = 0; i < V; ++i) v[i] = normalizer[C ? i : 0](v[i]);
      f.affine.apply(seat.channel(f.affine.channels, base, s, line, c), c, v);
      store_chunk<T, V>(f.y, c, narrow<T, V>(v));
    });
  }
  seat.part();
}

template <class T, int V, bool C>
__global__ void __launch_bounds__(C ? kSlabThreads : kFusedThreads, 1) fused_forward(const FusedForward<T, V> f) {
  NK_DYNAMIC_SHARED(unsigned char, memory);
  forward_units<C>(f, memory);
}

}  // namespace normkern::cuda
