// vec.cuh: how kernels move data: aligned chunks of the buffer, whatever the run they belong to, and vectors of
// per-group values next to them.
#pragma once

#include "../core/arguments.h"
#include "../core/fast_div.h"
#include "../core/plan.h"
#include "platform.cuh"

namespace normkern::cuda {

using namespace nk;

// n neighbours from e on. n == V: one aligned access; fewer: one by one; none: outside.
struct Chunk {
  int64_t e;
  int n;
};

template <int V>
NK_DEVICE Chunk clip(int64_t aligned, int64_t begin, int64_t end) {
  const int64_t from = aligned > begin ? aligned : begin, to = aligned + V < end ? aligned + V : end;
  return {from, to > from ? int(to - from) : 0};
}

// The first n of the result are the chunk; the rest is zero.
template <class T, int V>
NK_DEVICE Vec<T, V> load_chunk(const T* data, const Chunk& c) {
  if (c.n == V) return load<T, V>(data + c.e);
  Vec<T, V> value;
  NK_UNROLL
  for (int i = 0; i < V; ++i) value.v[i] = i < c.n ? data[c.e + i] : from_float<T>(0.0f);
  return value;
}

// kStream: what no later kernel reads soon.
template <class T, int V, bool kStream = true>
NK_DEVICE void store_chunk(T* data, const Chunk& c, const Vec<T, V>& value) {
  if (c.n == V) return kStream ? store_stream<T, V>(data + c.e, value) : store<T, V>(data + c.e, value);
  NK_UNROLL
  for (int i = 0; i < V; ++i)
    if (i < c.n) data[c.e + i] = value.v[i];
}

// Into shared memory, in the background where the chunk is whole.
template <class T, int V>
NK_DEVICE void stage_chunk(Vec<T, V>* to, const T* data, const Chunk& c) {
  if constexpr (sizeof(Vec<T, V>) == kAccessBytes) {
    if (c.n == V) return copy_async16(to, data + c.e);
  }
  if (c.n > 0) store<T, V>(to->v, load_chunk<T, V>(data, c));
}

template <class T>
NK_DEVICE T rounded_sum(T a, T b) {
  return from_float<T>(to_float(a) + to_float(b));
}

template <class T, int V>
NK_DEVICE Vec<T, V> rounded_sum(const Vec<T, V>& a, const Vec<T, V>& b) {
  Vec<T, V> sum;
  NK_UNROLL
  for (int i = 0; i < V; ++i) sum.v[i] = rounded_sum(a.v[i], b.v[i]);
  return sum;
}

template <class T, int V>
NK_DEVICE void widen(const Vec<T, V>& from, Compute<T> (&to)[V]) {
  NK_UNROLL
  for (int i = 0; i < V; ++i) to[i] = to_float(from.v[i]);
}

template <class T, int V>
NK_DEVICE Vec<T, V> narrow(const Compute<T> (&from)[V]) {
  Vec<T, V> to;
  NK_UNROLL
  for (int i = 0; i < V; ++i) to.v[i] = from_float<T>(from[i]);
  return to;
}

// Adds a chunk of `data`, if there is any, to values.
template <class T, int V>
NK_DEVICE void add_to(const T* data, const Chunk& c, Compute<T> (&values)[V]) {
  if (!data) return;
  Compute<T> more[V];
  widen(load_chunk<T, V>(data, c), more);
  NK_UNROLL
  for (int i = 0; i < V; ++i) values[i] += more[i];
}

// Walks one group along its runs, slot by slot (plan.h).
template <int V>
class Runs {
 public:
  explicit Runs(const Domain& d) : domain_(d), per_run_(slots_in_run(d.cols, V)), slots_(slots_in_group(d, V)) {}

  NK_DEVICE int64_t slots() const { return slots_; }
  NK_DEVICE int64_t groups() const { return domain_.groups(); }
  NK_DEVICE int64_t begin(int64_t group) const { return domain_.run(group, 0); }

  NK_DEVICE Chunk chunk(int64_t group_begin, int64_t slot) const {
    int64_t begin = group_begin;
    if (domain_.rows > 1) {
      const int64_t row = per_run_.divide(slot);
      slot -= row * per_run_.divisor();
      begin += row * domain_.keep * domain_.cols;
    }
    return clip<V>((begin & ~int64_t(V - 1)) + slot * V, begin, begin + domain_.cols);
  }

 private:
  Domain domain_;
  FastDiv per_run_;
  int64_t slots_;
};

// ---- values per group beside the elements of a chunk

template <class A>
NK_DEVICE A read(const Param& p, int64_t i) {
  switch (p.dtype) {
    case DType::f32: return A(static_cast<const float*>(p.data)[i]);
    case DType::f64: return A(static_cast<const double*>(p.data)[i]);
    case DType::f16: return A(to_float(static_cast<const float16*>(p.data)[i]));
    case DType::bf16: return A(to_float(static_cast<const bfloat16*>(p.data)[i]));
  }
  return A(0);
}

NK_DEVICE void write(const Grad& g, int64_t i, double value) {
  switch (g.dtype) {
    case DType::f32: static_cast<float*>(g.data)[i] = from_float<float>(value); break;
    case DType::f64: static_cast<double*>(g.data)[i] = value; break;
    case DType::f16: static_cast<float16*>(g.data)[i] = from_float<float16>(value); break;
    case DType::bf16: static_cast<bfloat16*>(g.data)[i] = from_float<bfloat16>(value); break;
  }
}

// Moves the running statistics of one channel.
NK_DEVICE void move_channel(const Running& r, int64_t channel, double mean, double var) {
  const auto old = [channel](const Grad& of) { return read<double>(Param{of.data, of.dtype}, channel); };
  write(r.mean, channel, r.next_mean(old(r.mean), mean));
  write(r.var, channel, r.next_var(old(r.var), var));
}

// out[i] = the value of the group of element i of the chunk; anything for i >= n.
template <int V, class P, class A>
NK_DEVICE void gather(const P* values, const Indexer& indexer, Cursor at, int n, A (&out)[V]) {
  if (at.same(n)) {
    const A one = A(to_float(values[at.group]));
    NK_UNROLL
    for (int i = 0; i < V; ++i) out[i] = one;
    return;
  }
  constexpr int kPiece = sizeof(P) * V > 16 ? int(16 / sizeof(P)) : V;
  const P* first = values + at.group;
  if (n == V && indexer.consecutive(at, V) && reinterpret_cast<uintptr_t>(first) % (sizeof(P) * kPiece) == 0) {
    NK_UNROLL
    for (int i = 0; i < V; i += kPiece) {
      const Vec<P, kPiece> piece = load<P, kPiece>(first + i);
      NK_UNROLL
      for (int j = 0; j < kPiece; ++j) out[i + j] = A(to_float(piece.v[j]));
    }
    return;
  }
  NK_UNROLL
  for (int i = 0; i < V; ++i) {
    out[i] = i < n ? A(to_float(values[at.group])) : A(0);
    indexer.advance(at);
  }
}

template <int V, class A>
NK_DEVICE void gather(const Param& p, const Indexer& indexer, const Cursor& at, int n, A (&out)[V]) {
  switch (p.dtype) {
    case DType::f32: return gather<V>(static_cast<const float*>(p.data), indexer, at, n, out);
    case DType::f64: return gather<V>(static_cast<const double*>(p.data), indexer, at, n, out);
    case DType::f16: return gather<V>(static_cast<const float16*>(p.data), indexer, at, n, out);
    case DType::bf16: return gather<V>(static_cast<const bfloat16*>(p.data), indexer, at, n, out);
  }
}

}  // namespace normkern::cuda
