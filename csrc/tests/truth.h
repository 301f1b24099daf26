// truth.h: vectors of any dtype, and a norm by its definition in long double, with the size of the terms that every
// result is made of. Included by test_cpu.cpp alone.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "../core/half.h"
#include "../core/problem.h"

namespace normkern::test {
namespace {

using Real = long double;

double get(const void* data, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::f16: return to_float(static_cast<const f16*>(data)[i]);
    case DType::bf16: return to_float(static_cast<const bf16*>(data)[i]);
  }
  return 0;
}

void put(void* data, DType t, int64_t i, double v) {
  switch (t) {
    case DType::f32: static_cast<float*>(data)[i] = float(v); break;
    case DType::f64: static_cast<double*>(data)[i] = v; break;
    case DType::f16: static_cast<f16*>(data)[i] = to_f16(v); break;
    case DType::bf16: static_cast<bf16*>(data)[i] = to_bf16(v); break;
  }
}

double epsilon(DType t) {
  switch (t) {
    case DType::f32: return 0x1p-24;
    case DType::f64: return 0x1p-53;
    case DType::f16: return 0x1p-11;
    case DType::bf16: return 0x1p-8;
  }
  return 0;
}

// A vector of any dtype, exactly as long as it says so that a sanitizer sees every step beyond it.
struct Vector {
  DType dtype = DType::f32;
  int64_t size = 0;
  std::vector<char> bytes;
  Vector() = default;
  Vector(DType t, int64_t n, double fill = NAN) : dtype(t), size(n), bytes(n * size_of(t)) {
    for (int64_t i = 0; i < n; ++i) put(bytes.data(), t, i, fill);
    bytes.shrink_to_fit();
  }
  double operator[](int64_t i) const { return get(bytes.data(), dtype, i); }
  void set(int64_t i, double v) { put(bytes.data(), dtype, i, v); }
  const void* data() const { return size ? bytes.data() : nullptr; }
  void* data() { return size ? bytes.data() : nullptr; }
};

// ---- the definition ----

Real activated(Act act, Real z) {
  switch (act) {
    case Act::none: return z;
    case Act::relu: return z < 0 ? 0 : z;
    case Act::silu: return z / (1 + std::exp(-z));
    case Act::gelu: return z * std::erfc(-z / std::sqrt(Real(2))) / 2;
    case Act::leaky_relu: return z < 0 ? z * Real(0.01) : z;
  }
  return z;
}

Real slope(Act act, Real z) {
  switch (act) {
    case Act::none: return 1;
    case Act::relu: return z > 0;
    case Act::silu: {
      const Real s = 1 / (1 + std::exp(-z));
      return s * (1 + z * (1 - s));
    }
    case Act::gelu:
      return std::erfc(-z / std::sqrt(Real(2))) / 2 + z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(Real(-1)));
    case Act::leaky_relu: return z > 0 ? 1 : Real(0.01);
  }
  return 1;
}

struct Case {
  Problem p;
  Vector x, dy, weight, bias, residual, mean, var;
  std::string name;
};

struct Truth {
  std::vector<Real> mean, var, y, y_scale, dx, dx_scale, dz, dz_scale, dweight, dweight_scale, dbias, dbias_scale;
};

// With every result the size of the terms that it is made of: what rounding errors are measured against.
Truth truth(const Case& c) {
  const Domain &s = c.p.stats, &a = c.p.affine;
  const int64_t numel = s.numel();
  Truth t;
  t.mean.assign(s.groups(), 0);
  t.var.assign(s.groups(), 0);
  if (c.p.moments == Moments::given) {
    for (int64_t g = 0; g < s.groups(); ++g) t.mean[g] = c.mean[g], t.var[g] = c.var[g];
  } else {
    if (c.p.moments == Moments::mean_var)
      for (int64_t e = 0; e < numel; ++e) t.mean[s.group_of(e)] += Real(c.x[e]) / s.count();
    for (int64_t e = 0; e < numel; ++e) {
      const Real d = c.x[e] - t.mean[s.group_of(e)];
      t.var[s.group_of(e)] += d * d / s.count();
    }
  }
  std::vector<Real> sum_g(s.groups()), sum_gx(s.groups()), g_scale(s.groups()), gx_scale(s.groups());
  for (auto* v : {&t.y, &t.y_scale, &t.dx, &t.dx_scale, &t.dz, &t.dz_scale}) v->resize(numel);
  for (auto* v : {&t.dweight, &t.dweight_scale, &t.dbias, &t.dbias_scale}) v->assign(a.groups(), 0);
  const auto at = [](const Vector& v, int64_t i, Real missing) { return v.size ? Real(v[i]) : missing; };
  const auto xhat_of = [&](int64_t e) {
    const int64_t g = s.group_of(e);
    return (c.x[e] - t.mean[g]) / std::sqrt(t.var[g] + c.p.eps);
  };
  // A float64 mean of float64 data is only good to its own last place; for all other types it is good to a fraction of
  // float32's, of the standard deviation. Either only shows where x is near the mean.
  const auto size_of_xhat = [&](int64_t e) {
    const int64_t g = s.group_of(e);
    return std::fabs(xhat_of(e)) +
           (c.p.dtype == DType::f64 ? 1 + std::fabs(t.mean[g]) / std::sqrt(t.var[g] + c.p.eps) : 0.25);
  };
  for (int64_t e = 0; e < numel; ++e) {
    const int64_t g = s.group_of(e), w = a.group_of(e);
    const Real xhat = xhat_of(e), size = size_of_xhat(e), weight = at(c.weight, w, 1), bias = at(c.bias, w, 0),
               residual = at(c.residual, e, 0);
    const Real z = xhat * weight + bias + residual;
    t.y[e] = activated(c.p.act, z);
    t.y_scale[e] = std::fabs(size * weight) + std::fabs(bias) + std::fabs(residual);
    if (!c.dy.size) continue;
    const Real dz = c.dy[e] * slope(c.p.act, z);
    t.dz[e] = dz;
    // A slope moves by at most its second derivative (below 1) times the error of z.
    t.dz_scale[e] = std::fabs(c.dy[e]) * (c.p.act == Act::none ? 1 : 1 + t.y_scale[e]);
    t.dbias[w] += dz;
    t.dweight[w] += dz * xhat;
    t.dbias_scale[w] += t.dz_scale[e];
    t.dweight_scale[w] += t.dz_scale[e] * (size + 1);
    sum_g[g] += dz * weight;
    sum_gx[g] += dz * weight * xhat;
    g_scale[g] += t.dz_scale[e] * std::fabs(weight);
    gx_scale[g] += t.dz_scale[e] * std::fabs(weight) * (size + 1);
  }
  for (int64_t e = 0; e < numel && c.dy.size; ++e) {
    const int64_t g = s.group_of(e);
    const Real weight = at(c.weight, a.group_of(e), 1), rstd = 1 / std::sqrt(t.var[g] + c.p.eps), xhat = xhat_of(e),
               n = s.count();
    const bool centered = c.p.moments == Moments::mean_var, given = c.p.moments == Moments::given;
    t.dx[e] = rstd * (t.dz[e] * weight - (centered ? sum_g[g] / n : 0) - (given ? 0 : xhat * sum_gx[g] / n));
    t.dx_scale[e] = rstd * (t.dz_scale[e] * std::fabs(weight) + (centered ? g_scale[g] / n : 0) +
                            (given ? 0 : (size_of_xhat(e) + 1) * gx_scale[g] / n));
  }
  return t;
}

// Relu and its kin jump: where z is within rounding of 0 either side of the jump is right.
bool near_jump(const Case& c, const Truth& t, int64_t e) {
  const Real z = t.y[e] < 0 ? t.y[e] * 100 : t.y[e];
  return (c.p.act == Act::relu || c.p.act == Act::leaky_relu) && std::fabs(z) < 1e-5 * (t.y_scale[e] + 1e-30);
}

}  // namespace
}  // namespace normkern::test
