// test_cpu.cpp: the CPU kernels against the definition in long double, for every norm, layout, dtype and option.
//
// The whole table runs on one thread, on a pool that runs its tasks backwards, and on real threads. NORMKERN_CPU picks
// the instruction set.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/entry.h"
#include "check.h"
#include "truth.h"

namespace normkern::test {
namespace {

// ---- pools ----

void backwards(int64_t tasks, void (*task)(void*, int64_t), void* state) {
  for (int64_t i = tasks; i-- > 0;) task(state, i);
}

void real_threads(int64_t tasks, void (*task)(void*, int64_t), void* state) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, state, i);
  for (std::thread& t : threads) t.join();
}

#if defined(__SANITIZE_ADDRESS__)
const cpu::Threads kPools[] = {
    {1, nullptr}, {5, backwards}, {3, real_threads}};  // 64 takes the same paths, and minutes
#else
const cpu::Threads kPools[] = {{1, nullptr}, {5, backwards}, {64, backwards}, {3, real_threads}};
#endif

// ---- one case ----

void near(const char* what, const Case& c, const Vector& got, const std::vector<Real>& exact,
          const std::vector<Real>& scale, double computed) {
  for (int64_t i = 0; i < got.size; ++i) {
    // Rounded once to the result's type, plus a few roundings of the type that it is computed in.
    const Real tiny = got.dtype == DType::f16 ? 0x1p-24 : 1e-37;  // float16's last place below 2^-14
    const Real bound = 1.001 * epsilon(got.dtype) * std::fabs(exact[i]) + computed * scale[i] + tiny;
    if (!check(std::fabs(got[i] - exact[i]) <= bound, "%s: %s[%ld] is %.9g, not %.9Lg (bound %.2Lg)", c.name.c_str(),
               what, long(i), got[i], exact[i], bound))
      return;
  }
}

// What elements are computed in: a few roundings of float64 for float64, of float32 for the rest.
double computed_in(const Problem& p) { return p.dtype == DType::f64 ? 64 * 0x1p-53 : 8 * 0x1p-24; }

void run(Case c) {
  const Problem& p = c.p;
  const int64_t numel = p.stats.numel(), groups = p.stats.groups(), weights = p.affine.groups();
  const Truth t = truth(c);
  const double computed = computed_in(p);
  const std::string name = c.name;
  const bool given = p.moments == Moments::given, second = p.moments == Moments::second;
  for (const cpu::Threads& threads : kPools) {
    c.name = name + " on " + std::to_string(threads.count) + " threads";
    Vector y(p.dtype, numel), mean(DType::f64, groups), var(DType::f64, groups), mean2 = mean, var2 = var;
    ForwardArgs f;
    f.x = c.x.data();
    f.weight = {c.weight.data(), c.weight.dtype};
    f.bias = {c.bias.data(), c.bias.dtype};
    f.residual = c.residual.data();
    f.mean = {c.mean.data(), c.mean.dtype};
    f.var = {c.var.data(), c.var.dtype};
    f.y = y.data();
    f.mean_out = given || second ? nullptr : static_cast<double*>(mean.data());
    f.var_out = given ? nullptr : static_cast<double*>(var.data());
    cpu::forward(p, f, threads);
    near("y", c, y, t.y, t.y_scale, computed);
    if (!given) {
      cpu::moments(
          p, {c.x.data(), second ? nullptr : static_cast<double*>(mean2.data()), static_cast<double*>(var2.data())},
          threads);
      // moments() knows no weights, so it may take another walk than forward().
      for (int64_t g = 0; g < groups; ++g) {
        // Float32 sums are of 16 terms at most, of values within 4 standard deviations or so (forward.cpp).
        const bool wide = p.dtype == DType::f64;
        const Real mean_bound = (wide ? 1e-12 : 2e-7) * std::sqrt(t.var[g]) + 1e-15 * std::fabs(t.mean[g]);
        const Real var_bound = (wide ? 1e-11 : 1e-6) * t.var[g] + 1e-26 * t.mean[g] * t.mean[g];
        for (const Vector* m : {&mean, &mean2})
          check(second || std::fabs((*m)[g] - t.mean[g]) <= mean_bound, "%s: mean[%ld]", c.name.c_str(), long(g));
        for (const Vector* v : {&var, &var2})
          check(std::fabs((*v)[g] - t.var[g]) <= var_bound, "%s: var[%ld]", c.name.c_str(), long(g));
      }
    }
    if (!c.dy.size) continue;

    bool jumps = false;
    for (int64_t e = 0; e < numel; ++e) jumps = jumps || near_jump(c, t, e);
    if (jumps) continue;
    const auto backward = [&](Vector& dx, Vector& dweight, Vector& dbias, Vector& dresidual) {
      BackwardArgs b;
      b.dy = c.dy.data();
      b.x = c.x.data();
      b.weight = f.weight;
      b.bias = f.bias;
      b.residual = f.residual;
      b.mean = given ? f.mean : Param{second ? nullptr : mean.data(), DType::f64};
      b.var = given ? f.var : Param{var.data(), DType::f64};
      b.dx = dx.data();
      b.dweight = {dweight.data(), dweight.dtype};
      b.dbias = {dbias.data(), dbias.dtype};
      b.dresidual = dresidual.data();
      cpu::backward(p, b, threads);
    };
    const DType dweight_type = c.weight.size ? c.weight.dtype : DType::f64,
                dbias_type = c.bias.size ? c.bias.dtype : DType::f64;
    Vector dx(p.dtype, numel), dweight(dweight_type, weights), dbias(dbias_type, weights), dz(p.dtype, numel), none;
    backward(dx, dweight, dbias, dz);
    near("dx", c, dx, t.dx, t.dx_scale, computed);
    near("dresidual", c, dz, t.dz, t.dz_scale, computed);
    near("dweight", c, dweight, t.dweight, t.dweight_scale, computed);
    near("dbias", c, dbias, t.dbias, t.dbias_scale, computed);
    // Without dresidual dx may be made in the same sweep as the sums.
    Vector dx3(p.dtype, numel), dweight3(dweight_type, weights), dbias3(dbias_type, weights);
    backward(dx3, dweight3, dbias3, none);
    near("dx without dresidual", c, dx3, t.dx, t.dx_scale, computed);
    near("dweight without dresidual", c, dweight3, t.dweight, t.dweight_scale, computed);
    near("dbias without dresidual", c, dbias3, t.dbias, t.dbias_scale, computed);
    // Each result alone, with the same bits.
    Vector dx1(p.dtype, numel), dweight1(dweight_type, weights), dbias1(dbias_type, weights), dz1(p.dtype, numel);
    backward(dx1, none, none, none);
    backward(none, dweight1, none, none);
    backward(none, none, dbias1, none);
    backward(none, none, none, dz1);
    check(dz1.bytes == dz.bytes, "%s: dresidual alone", c.name.c_str());
    // With no weight gradients and no weights a call may take another walk: then only nearly the same.
    near("dx alone", c, dx1, t.dx, t.dx_scale, computed);
    near("dweight alone", c, dweight1, t.dweight, t.dweight_scale, computed);
    near("dbias alone", c, dbias1, t.dbias, t.dbias_scale, computed);
    Vector dx2(p.dtype, numel), dweight2(dweight_type, weights), dbias2(dbias_type, weights), dz2(p.dtype, numel);
    backward(dx2, dweight2, dbias2, dz2);
    check(dx2.bytes == dx.bytes && dweight2.bytes == dweight.bytes && dbias2.bytes == dbias.bytes,
          "%s: same bits twice", c.name.c_str());
  }
}

// ---- the table ----

struct Geometry {
  const char* name;
  Domain stats, affine;
  Moments moments = Moments::mean_var;
};

std::vector<Geometry> geometries(int64_t n, int64_t c, int64_t s, int64_t g) {
  const int64_t per = c / g;
  return {{"layer", {n * s, 1, 1, c}, {1, n * s, c, 1}},
          {"rms", {n * s, 1, 1, c}, {1, n * s, c, 1}, Moments::second},
          {"group nchw", {n * g, 1, 1, per * s}, {1, n, c, s}},
          {"group nhwc", {n, s, g, per}, {1, n * s, c, 1}},
          {"group nhwc second", {n, s, g, per}, {1, n * s, c, 1}, Moments::second},
          {"instance nchw", {n * c, 1, 1, s}, {1, n, c, s}},
          {"instance nhwc", {n, s, c, 1}, {1, n * s, c, 1}},
          {"batch nchw", {1, n, c, s}, {1, n, c, s}},
          {"batch nhwc", {1, n * s, c, 1}, {1, n * s, c, 1}},
          {"batch nchw eval", {1, n, c, s}, {1, n, c, s}, Moments::given},
          {"batch nhwc eval", {1, n * s, c, 1}, {1, n * s, c, 1}, Moments::given},
          {"weight", {c, 1, 1, n * s}, {c, 1, 1, n * s}},
          // Not in the table of norms: domains that no fast walk was made for.
          {"transposed layer", {1, c, n, s}, {1, 1, c, n * s}},
          {"transposed layers", {n, c, s, 1}, {1, n, c, s}},
          {"transposed pairs", {n, c * g, s, 1}, {1, n, c, g * s}},
          {"weights across groups", {n, s, c, 1}, {1, n * s, g, per}},
          {"one group", {1, n, 1, c * s}, {1, n, c, s}}};
}

std::mt19937_64 random_bits(7);

Vector normal_vector(DType t, int64_t n, double mean = 0, double sd = 1) {
  std::normal_distribution<double> normal(mean, sd);
  Vector v(t, n, 0);
  for (int64_t i = 0; i < n; ++i) v.set(i, normal(random_bits));
  return v;
}

// `options` picks what is present and in which types.
Case make(const Geometry& g, DType dtype, unsigned options, Act act, double mean = 0) {
  constexpr DType kTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};
  Case c;
  c.p = {g.stats, g.affine, g.moments, act, dtype, options % 3 ? 1e-5 : 0.1};
  const int64_t numel = g.stats.numel();
  c.x = normal_vector(dtype, numel, mean, 1 + options % 2);
  c.dy = normal_vector(dtype, numel);
  if (options & 1) c.weight = normal_vector(kTypes[options / 4 % 4], g.affine.groups(), 1, 0.3);
  if (options & 2) c.bias = normal_vector(kTypes[options / 16 % 4], g.affine.groups());
  if (options & 64) c.residual = normal_vector(dtype, numel);
  if (g.moments == Moments::given) {
    c.mean = normal_vector(kTypes[options % 4], g.stats.groups(), mean);
    c.var = Vector(kTypes[options / 2 % 4], g.stats.groups(), 0);
    for (int64_t i = 0; i < c.var.size; ++i) c.var.set(i, 0.5 + i % 3);
  }
  const Domain &s = g.stats, &a = g.affine;
  char text[200];
  std::snprintf(text, sizeof(text), "%s [%ld %ld %ld %ld] [%ld %ld %ld %ld] dtype %d act %d options %u", g.name,
                long(s.batch), long(s.rows), long(s.keep), long(s.cols), long(a.batch), long(a.rows), long(a.keep),
                long(a.cols), int(dtype), int(act), options);
  c.name = text;
  return c;
}

void table() {
  struct Shape {
    int64_t n, c, s, g;
  };
  const Shape shapes[] = {{1, 1, 1, 1},      {2, 3, 1, 3},    {1, 6, 5, 2},     {3, 8, 4, 4},    {2, 12, 49, 3},
                          {2, 65, 7, 5},     {1, 40, 33, 4},  {5, 32, 100, 32}, {2, 150, 33, 2}, {2, 64, 577, 2},
                          {1, 4100, 17, 41}, {4, 3, 6000, 1}, {1, 2, 70001, 1}};
  unsigned turn = 0;
  for (const Shape& shape : shapes)
    for (const Geometry& g : geometries(shape.n, shape.c, shape.s, shape.g))
      for (DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
        // Large shapes take every fourth dtype in turn, small ones all of them with every activation.
        const bool large = g.stats.numel() > 20000;
        if (large && (turn + int(dtype)) % 4 != 0) continue;
        for (Act act : {Act::none, Act::relu, Act::silu, Act::gelu, Act::leaky_relu}) {
          ++turn;
          if (large && turn % 7 != 0) continue;
          run(make(g, dtype, turn * 7 % 128, act));
        }
        if (!large) run(make(g, dtype, 3, Act::none, 20));
        if (large && turn % 2) run(make(g, dtype, turn % 128, Act::none));
      }
  // Rows and columns in pairs, more of them than are set up at once; rows also with weights of each of two batches,
  // across tiles.
  const Geometry pairs[] = {{"rows", {16, 1, 1, 1120}, {1, 16, 1120, 1}},
                            {"rows of two batches", {300, 1, 1, 1120}, {2, 150, 1120, 1}},
                            {"columns", {1, 21, 1120, 1}, {1, 21, 1120, 1}},
                            {"columns, given", {1, 21, 1120, 1}, {1, 21, 1120, 1}, Moments::given},
                            {"columns of groups", {2, 21, 35, 32}, {1, 42, 1120, 1}}};
  for (const Geometry& g : pairs)
    for (Act act : {Act::none, Act::relu})
      for (unsigned options : {3u, 67u}) run(make(g, DType::bf16, options, act));
  // Groups that are mapped from their end, since the cache does not hold them.
  const Geometry large[] = {{"large groups", {1, 6, 3, 50000}, {1, 6, 3, 50000}},
                            {"large runs", {2, 1, 1, 300000}, {1, 1, 2, 300000}}};
  for (const Geometry& g : large) run(make(g, DType::f32, 3, Act::none));
}

// ---- exact properties ----

// Relative L2 error of y and dx at an offset, against the same rounded input.
void offsets() {
  for (const Geometry& g : geometries(2, 64, 196, 8)) {
    if (g.moments != Moments::mean_var) continue;
    double base[2] = {};
    for (double offset : {0.0, 1e2, 1e4}) {
      const Case c = make(g, DType::f32, 1, Act::none, offset);
      const Truth t = truth(c);
      const int64_t numel = g.stats.numel(), groups = g.stats.groups();
      Vector y(DType::f32, numel), dx(DType::f32, numel), mean(DType::f64, groups), var(DType::f64, groups);
      ForwardArgs f;
      f.x = c.x.data();
      f.weight = {c.weight.data(), c.weight.dtype};
      f.y = y.data();
      f.mean_out = static_cast<double*>(mean.data());
      f.var_out = static_cast<double*>(var.data());
      cpu::forward(c.p, f, kPools[1]);
      BackwardArgs b;
      b.dy = c.dy.data();
      b.x = c.x.data();
      b.weight = f.weight;
      b.mean = {mean.data(), DType::f64};
      b.var = {var.data(), DType::f64};
      b.dx = dx.data();
      cpu::backward(c.p, b, kPools[1]);
      const auto error = [&](const Vector& got, const std::vector<Real>& exact) {
        Real off = 0, all = 0;
        for (int64_t i = 0; i < numel; ++i)
          off += (got[i] - exact[i]) * (got[i] - exact[i]), all += exact[i] * exact[i];
        return double(std::sqrt(off / all));
      };
      const double errors[2] = {error(y, t.y), error(dx, t.dx)};
      for (int i = 0; i < 2; ++i) {
        if (offset == 0) base[i] = errors[i];
        check(errors[i] <= 1e-7 && errors[i] <= 2 * base[i], "%s: error %g of %s at mean/std %g", g.name, errors[i],
              i ? "dx" : "y", offset);
      }
    }
  }
}

void exact_properties() {
  for (const Geometry& g : geometries(2, 12, 40, 3)) {
    if (g.moments != Moments::mean_var) continue;
    const int64_t numel = g.stats.numel(), groups = g.stats.groups();
    for (DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
      for (const cpu::Threads& threads : kPools) {
        // Equal values: no variance at all, and y is the bias.
        Case c = make(g, dtype, 3, Act::none);
        c.bias.dtype == dtype ? void() : void(c.bias = normal_vector(dtype, g.affine.groups()));
        c.x = Vector(dtype, numel, 1234.56789);
        Vector y(dtype, numel), mean(DType::f64, groups), var(DType::f64, groups);
        ForwardArgs f;
        f.x = c.x.data();
        f.weight = {c.weight.data(), c.weight.dtype};
        f.bias = {c.bias.data(), c.bias.dtype};
        f.y = y.data();
        f.mean_out = static_cast<double*>(mean.data());
        f.var_out = static_cast<double*>(var.data());
        cpu::forward(c.p, f, threads);
        for (int64_t i = 0; i < groups; ++i)
          check(mean[i] == c.x[0] && var[i] == 0, "%s: moments of equal values", c.name.c_str());
        for (int64_t e = 0; e < numel; ++e)
          check(y[e] == c.bias[g.affine.group_of(e)], "%s: y of equal values", c.name.c_str());

        // A NaN or an infinity spoils its own group, and no other.
        for (double bad : {double(NAN), double(INFINITY)}) {
          c.x = normal_vector(dtype, numel);
          const int64_t where = numel / 2 + 1, spoilt = g.stats.group_of(where);
          c.x.set(where, bad);
          f.x = c.x.data();
          cpu::forward(c.p, f, threads);
          for (int64_t e = 0; e < numel; ++e)
            check(std::isnan(y[e]) == (g.stats.group_of(e) == spoilt), "%s: %g spoils its group", c.name.c_str(), bad);
        }
      }
    }
    // Squares far beyond float32.
    Case c = make(g, DType::f32, 0, Act::none);
    for (int64_t e = 0; e < numel; ++e) c.x.set(e, c.x[e] * 1e30);
    Vector y(DType::f32, numel);
    ForwardArgs f;
    f.x = c.x.data();
    f.y = y.data();
    cpu::forward(c.p, f, kPools[0]);
    const Truth t = truth(c);
    near("y at 1e30", c, y, t.y, t.y_scale, computed_in(c.p));
  }
}

// Halfway between two results of bfloat16 the even one is right: with mean 0 and variance 1 y is x + 2^-8, and x steps
// by 2^-7.
void ties() {
  for (const Geometry& g : geometries(2, 64, 100, 8)) {
    if (g.moments != Moments::given) continue;
    Case c = make(g, DType::bf16, 3, Act::none);
    c.p.eps = 0;
    c.weight = Vector(DType::f32, g.affine.groups(), 1);
    c.bias = Vector(DType::f32, g.affine.groups(), 0x1p-8);
    c.mean = Vector(DType::f32, g.stats.groups(), 0);
    c.var = Vector(DType::f32, g.stats.groups(), 1);
    const int64_t numel = g.stats.numel();
    for (int64_t e = 0; e < numel; ++e) c.x.set(e, (e % 2 ? -1 : 1) * (1 + double(e % 127) * 0x1p-7));
    Vector y(DType::bf16, numel), one(DType::bf16, 1);
    ForwardArgs f;
    f.x = c.x.data();
    f.weight = {c.weight.data(), DType::f32};
    f.bias = {c.bias.data(), DType::f32};
    f.mean = {c.mean.data(), DType::f32};
    f.var = {c.var.data(), DType::f32};
    f.y = y.data();
    cpu::forward(c.p, f, kPools[0]);
    for (int64_t e = 0; e < numel; ++e) {
      one.set(0, c.x[e] + 0x1p-8);
      if (!check(y[e] == one[0], "%s: y[%ld] is %g, not %g", c.name.c_str(), long(e), y[e], one[0])) break;
    }
  }
}

// The norm of a sum is that of what torch adds up, with the same bits; dtotal is added to dx before the one rounding.
void sums() {
  for (const auto& [n, c, s, g] : {std::array<int64_t, 4>{1, 1, 1, 1}, {2, 12, 49, 3}, {1, 4100, 17, 41}})
    for (const Geometry& geometry : geometries(n, c, s, g))
      for (DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
        if (geometry.moments == Moments::given) continue;
        Case whole = make(geometry, dtype, 3, Act::none);
        const Problem& p = whole.p;
        const int64_t numel = p.stats.numel();
        const bool second = p.moments == Moments::second;
        const Vector x = normal_vector(dtype, numel, 100), add = normal_vector(dtype, numel, -95),
                     dtotal = normal_vector(dtype, numel);
        for (int64_t i = 0; i < numel; ++i)  // half types are added in float32 and rounded once more
          whole.x.set(i, dtype == DType::f64 ? x[i] + add[i] : double(float(x[i]) + float(add[i])));
        Truth t = truth(whole);
        for (int64_t i = 0; i < numel; ++i) t.dx[i] += dtotal[i], t.dx_scale[i] += std::fabs(dtotal[i]);
        for (const cpu::Threads& threads : kPools) {
          Vector total(dtype, numel), y(dtype, numel), y_of_whole = y, dx = y, var(DType::f64, p.stats.groups()),
                                                       mean = var;
          ForwardArgs f;
          f.x = whole.x.data();
          f.weight = {whole.weight.data(), whole.weight.dtype};
          f.y = y_of_whole.data();
          cpu::forward(p, f, threads);
          f.x = x.data();
          f.add = add.data();
          f.total = total.data();
          f.y = y.data();
          f.mean_out = second ? nullptr : static_cast<double*>(mean.data());
          f.var_out = static_cast<double*>(var.data());
          cpu::forward(p, f, threads);
          check(total.bytes == whole.x.bytes, "%s: the sum", whole.name.c_str());
          check(y.bytes == y_of_whole.bytes, "%s: the norm of a sum", whole.name.c_str());
          BackwardArgs b;
          b.dy = whole.dy.data();
          b.dtotal = dtotal.data();
          b.x = total.data();
          b.weight = f.weight;
          b.mean = {second ? nullptr : mean.data(), DType::f64};
          b.var = {var.data(), DType::f64};
          b.dx = dx.data();
          cpu::backward(p, b, threads);
          near("dx + dtotal", whole, dx, t.dx, t.dx_scale, computed_in(p));
        }
      }
}

// The first value of a chunk is what its sums are relative to: it must not matter which one it is.
void outlier_first() {
  for (double outlier : {1e4, 1e8, 1e15}) {
    Case c = make({"outlier", {1, 1, 1, 200000}, {1, 1, 1, 200000}}, DType::f64, 0, Act::none);
    c.x.set(0, outlier);
    const Truth t = truth(c);
    for (const cpu::Threads& threads : kPools) {
      double mean = 0, var = 0;
      cpu::moments(c.p, {c.x.data(), &mean, &var}, threads);
      check(std::fabs(var - t.var[0]) <= 1e-10 * t.var[0], "outlier %g: var", outlier);
      check(std::fabs(mean - t.mean[0]) <= 1e-13 * std::sqrt(t.var[0]), "outlier %g: mean", outlier);
    }
  }
}

// A task may meet a short tile before a long one, and sums of either in float64: here the second of two tasks, with
// tiles of 4 groups and of 1.
void short_tile_first() {
  Case c = make({"short tile first", {3, 200, 5, 40}, {1, 600, 200, 1}}, DType::f32, 0, Act::none);
  c.x = Vector(DType::f32, c.x.size, 0.1);
  const cpu::Threads two = {2, backwards};
  Vector mean(DType::f64, 15), var(DType::f64, 15), y(DType::f32, c.x.size);
  ForwardArgs f;
  f.x = c.x.data();
  f.y = y.data();
  f.mean_out = static_cast<double*>(mean.data());
  f.var_out = static_cast<double*>(var.data());
  cpu::forward(c.p, f, two);
  for (int64_t g = 0; g < 15; ++g) check(mean[g] == c.x[0] && var[g] == 0, "%s: group %ld", c.name.c_str(), long(g));
}

// Results of half types are the correctly rounded ones but for near ties.
void correctly_rounded() {
  for (const Geometry& g : geometries(4, 64, 100, 8)) {
    for (DType dtype : {DType::f16, DType::bf16}) {
      Case c = make(g, dtype, 3, Act::none, 0.5);
      const Truth t = truth(c);
      const int64_t numel = g.stats.numel();
      Vector y(dtype, numel), one(dtype, 1);
      ForwardArgs f;
      f.x = c.x.data();
      f.weight = {c.weight.data(), c.weight.dtype};
      f.bias = {c.bias.data(), c.bias.dtype};
      f.mean = {c.mean.data(), c.mean.dtype};
      f.var = {c.var.data(), c.var.dtype};
      f.y = y.data();
      cpu::forward(c.p, f, kPools[0]);
      int64_t wrong = 0;
      for (int64_t e = 0; e < numel; ++e) {
        one.set(0, double(t.y[e]));
        wrong += one[0] != y[e];
      }
      check(wrong <= numel / 1000, "%s: %ld of %ld not correctly rounded", c.name.c_str(), long(wrong), long(numel));
    }
  }
}

}  // namespace
}  // namespace normkern::test

int main() {
  std::printf("instruction set: %s\n", normkern::cpu::instruction_set());
  normkern::test::exact_properties();
  normkern::test::outlier_first();
  normkern::test::short_tile_first();
  normkern::test::offsets();
  normkern::test::correctly_rounded();
  normkern::test::ties();
  normkern::test::sums();
  normkern::test::table();
  return normkern::test::report("test_cpu");
}
