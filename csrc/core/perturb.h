// perturb.h: the ascent of sharpness-aware minimization over many tensors at once: the tensors, the rule, and its
// arithmetic.
//
//   p = 2:  e = rho T^2 g / (||T g||_2 + 1e-16)        p = inf:  e = rho T sign(g)
//
// T is diagonal: 1, |w| + eta, ||w of the tensor||_2 (1 + eta), or (1 + eta g^2)^(-1/2) (Foret et al. 2021; Kwon et al.
// 2021; Mueller et al. 2023, section 2). All of it is float64, in which squares of float32 neither overflow nor vanish:
// loss scales and late training go far both ways.
//
// Tensors are cut into pieces. Sums of pieces make those of their tensor, and these the norm, always in one order.
#pragma once

#include <math.h>

#include "accumulate.h"
#include "arguments.h"
#include "parts.h"

namespace normkern {

enum class Transform : int32_t { none, element, layer, fisher };

struct Ascent {
  Transform transform = Transform::none;
  bool maximum = false;  // p = inf
  double eta = 0;
  double grad_factor = 1;  // times this, grad is the gradient
};

// w += e, and `copy` gets what w was. All three are dense, in one order of memory.
struct Perturbed {
  void *weight = nullptr, *copy = nullptr;
  const void* grad = nullptr;
  int64_t count = 0;
  double rho = 0;
  DType dtype = DType::f32, grad_dtype = DType::f32;  // of weight and copy; of grad
  bool transformed = true;                            // T is 1 otherwise
};

constexpr Transform transform_of(const Ascent& a, const Perturbed& t) {
  return t.transformed ? a.transform : Transform::none;
}

// Whether the norm depends on w.
constexpr bool needs_weight(Transform transform) {
  return transform == Transform::element || transform == Transform::layer;
}

// T of an element; `layer` is that of its tensor, which no element tells.
constexpr double factor_of(Transform transform, double eta, double w, double g, double layer) {
  switch (transform) {
    case Transform::none: break;
    case Transform::element: return (w < 0 ? -w : w) + eta;
    case Transform::layer: return layer;
    case Transform::fisher: return 1 / sqrt(1 + eta * g * g);
  }
  return 1;
}

// What an element adds to the square of ||w||, where T asks for that, and to the square of ||T g||, before `layer`.
constexpr Sums squares(Transform transform, double eta, double w, double g) {
  const double scaled = factor_of(transform, eta, w, g, 1) * g;
  return {transform == Transform::layer ? w * w : 0, scaled * scaled};
}

// From the sums of a whole tensor: its `layer`, and with that its share of the square of ||T g||.
constexpr Sums settled(Transform transform, double eta, const Sums& s) {
  const double layer = transform == Transform::layer ? sqrt(s.first) * (1 + eta) : 1;
  return {layer, layer * layer * s.second};
}

// Nothing is added where any gradient, and so the norm, is not finite.
constexpr bool climbs(double norm) { return norm - norm == 0; }

// What e of every element has in common.
constexpr double rate(const Ascent& a, double rho, double norm) { return a.maximum ? rho : rho / (norm + 1e-16); }

constexpr double step_of(Transform transform, bool maximum, double eta, double w, double g, double layer) {
  const double factor = factor_of(transform, eta, w, g, layer);
  if (maximum) return g > 0 ? factor : g < 0 ? -factor : 0;
  return factor * factor * g;
}

// ---- pieces: tensor i has the pieces starts[i] to starts[i + 1] - 1, of `piece` elements but the last

// Fills starts, of count + 1 entries; returns how many pieces there are.
inline int64_t cut(const Perturbed* tensors, int64_t count, int64_t piece, int64_t* starts) {
  starts[0] = 0;
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + (tensors[i].count + piece - 1) / piece;
  return starts[count];
}

struct Piece {
  int tensor;
  int64_t begin, end;
};

constexpr Piece piece_at(const Perturbed* tensors, const int64_t* starts, int count, int64_t piece, int64_t index) {
  const int tensor = part_of(starts, count, index);
  const int64_t begin = (index - starts[tensor]) * piece, rest = tensors[tensor].count - begin;
  return {tensor, begin, begin + (rest < piece ? rest : piece)};
}

}  // namespace normkern
