// perturb_loops.cpp: the ascent of core/perturb.h over a run of elements. Compiled once per instruction set.
//
// Chunks are widened to float64 beside each other in the first cache; on them the loops are plain, and the compiler's
// to vectorize.
#include "perturb_loops.h"

#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "types.h"

namespace normkern::cpu::NK_ISA {
namespace {

constexpr int kChunk = 512;
constexpr int kSums = 16;  // running sums side by side
static_assert(kChunk % kSums == 0 && kChunk % kLanes == 0, "chunks are whole");

using Chunk = double[kChunk];

// Zeros behind the last: they add nothing to a sum.
void read(const void* from, DType dtype, int64_t first, int64_t n, Chunk& to) {
  with_type(dtype, [&](auto type) NK_INLINED {
    const auto* source = static_cast<const decltype(type)*>(from) + first;
    int64_t i = 0;
    for (; i < n; i += kLanes) store(to + i, load_some<double>(source + i, n - i < kLanes ? n - i : int64_t(kLanes)));
    for (; i % kSums; i += kLanes) store(to + i, fill(0.0));
  });
}

void write(const Chunk& from, void* to, DType dtype, int64_t first, int64_t n) {
  with_type(dtype, [&](auto type) NK_INLINED {
    using T = decltype(type);
    using Near = std::conditional_t<sizeof(T) == 8, double, float>;
    T* target = static_cast<T*>(to) + first;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Pack<Near> values = convert<Near>(load<double>(static_cast<const double*>(from) + i));
      store_some(target + i, values, n - i < kLanes ? n - i : int64_t(kLanes));
    }
  });
}

template <Transform kTransform>
using Kind = std::integral_constant<Transform, kTransform>;

template <class Use>
NK_INLINE void with_transform(Transform transform, Use use) {
  switch (transform) {
    case Transform::none: return use(Kind<Transform::none>());
    case Transform::element: return use(Kind<Transform::element>());
    case Transform::layer: return use(Kind<Transform::layer>());
    case Transform::fisher: return use(Kind<Transform::fisher>());
  }
}

void multiply(Chunk& g, double factor) {
  if (factor == 1) return;
  for (double& value : g) value *= factor;
}

Sums sum(const Perturbed& t, const Ascent& rule, int64_t begin, int64_t end) {
  const Transform transform = transform_of(rule, t);
  const double eta = rule.eta;
  Chunk w = {}, g = {};
  double first[kSums] = {}, second[kSums] = {};
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = end - at < kChunk ? end - at : int64_t(kChunk);
    read(t.grad, t.grad_dtype, at, n, g);
    multiply(g, rule.grad_factor);
    if (needs_weight(transform)) read(t.weight, t.dtype, at, n, w);
    with_transform(transform, [&](auto kind) NK_INLINED {
      for (int64_t i = 0; i < n; i += kSums)
        for (int j = 0; j < kSums; ++j) {
          const Sums s = squares(kind.value, eta, w[i + j], g[i + j]);
          first[j] += s.first;
          second[j] += s.second;
        }
    });
  }
  Sums all;
  for (int j = 0; j < kSums; ++j) all = merge(all, Sums{first[j], second[j]});
  return all;
}

void move(const Perturbed& t, const Ascent& rule, int64_t begin, int64_t end, double layer, double rate) {
  const int64_t size = size_of(t.dtype);
  const auto keep = [&](int64_t at, int64_t n) {
    std::memcpy(static_cast<char*>(t.copy) + at * size, static_cast<const char*>(t.weight) + at * size,
                size_t(n * size));
  };
  if (rate == 0) return keep(begin, end - begin);
  const double eta = rule.eta;
  Chunk w, g;
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = end - at < kChunk ? end - at : int64_t(kChunk);
    keep(at, n);
    read(t.grad, t.grad_dtype, at, n, g);
    multiply(g, rule.grad_factor);
    read(t.weight, t.dtype, at, n, w);
    with_transform(transform_of(rule, t), [&](auto kind) NK_INLINED {
      if (rule.maximum)
        for (int64_t i = 0; i < n; ++i) w[i] += rate * step_of(kind.value, true, eta, w[i], g[i], layer);
      else
        for (int64_t i = 0; i < n; ++i) w[i] += rate * step_of(kind.value, false, eta, w[i], g[i], layer);
    });
    write(w, t.weight, t.dtype, at, n);
  }
}

}  // namespace

const PerturbLoops kPerturbLoops = {sum, move};

}  // namespace normkern::cpu::NK_ISA
