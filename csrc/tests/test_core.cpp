// test_core.cpp: domains, accumulators and half types against brute force.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../core/accumulate.h"
#include "../core/half.h"
#include "../core/parts.h"
#include "../core/problem.h"
#include "check.h"

namespace normkern::test {
namespace {

void domains() {
  const int64_t extents[] = {1, 2, 3, 5};
  for (int64_t batch : extents)
    for (int64_t rows : extents)
      for (int64_t keep : extents)
        for (int64_t cols : extents) {
          const Domain d = {batch, rows, keep, cols}, s = simplify(d);
          check(d.numel() == batch * rows * keep * cols && d.groups() == batch * keep && d.count() == rows * cols,
                "extents");
          check(s.groups() == d.groups() && s.count() == d.count(), "simplify keeps groups");
          check((s.rows == 1) == (rows == 1 || keep == 1), "contiguous means rows == 1");
          check(simplify(s) == s, "simplify twice");
          std::vector<int> seen(d.numel());
          int64_t e = 0;
          for (int64_t b = 0; b < batch; ++b)
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t k = 0; k < keep; ++k)
                for (int64_t c = 0; c < cols; ++c, ++e) {
                  check(d.group_of(e) == b * keep + k, "group_of(%ld)", long(e));
                  check(s.group_of(e) == d.group_of(e), "simplified group_of(%ld)", long(e));
                  check(d.run(b * keep + k, r) + c == e, "run");
                  ++seen[d.run(b * keep + k, r) + c];
                }
          for (int n : seen) check(n == 1, "runs cover every element once");
        }
}

// Mean and sum of squared deviations in long double, two sweeps.
struct Exact {
  long double mean = 0, m2 = 0;
  explicit Exact(const std::vector<double>& v) {
    for (double x : v) mean += x;
    mean /= v.size();
    for (double x : v) m2 += (x - mean) * (x - mean);
  }
};

Spread spread_of(const std::vector<double>& v, size_t from, size_t to) {
  Spread s;
  for (size_t i = from; i < to; ++i) s = merge(s, Spread{1, v[i], 0});
  return s;
}

template <class A>
Spread shifted_spread(const std::vector<double>& v) {
  // Four threads of interleaved chunks of 8, as a kernel would walk them, then merged in order.
  Spread all;
  for (size_t thread = 0; thread < 4; ++thread) {
    ShiftedMoments<A> m;
    for (size_t i = thread * 8; i < v.size(); i += 32) {
      A chunk[8] = {};
      const int n = int(std::min<size_t>(8, v.size() - i));
      for (int j = 0; j < n; ++j) chunk[j] = A(v[i + j]);
      m.push(chunk, n);
    }
    all = merge(all, m.spread());
  }
  return all;
}

void accumulators() {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  for (double offset : {0.0, 1.0, 1e2, 1e4, -1e6}) {
    for (size_t n : {1u, 2u, 7u, 8u, 9u, 33u, 1000u, 4096u}) {
      std::vector<double> v(n);
      for (double& x : v) x = float(offset + normal(random));
      const Exact exact(v);
      const double sd = std::sqrt(double(exact.m2 / n)) + 1e-300;
      const Spread split = merge(merge(spread_of(v, 0, n / 3), Spread{}), spread_of(v, n / 3, n));
      check(split.count == double(n), "count");
      check(std::fabs(split.mean - exact.mean) <= 1e-13 * (std::fabs(offset) + sd), "Spread mean, offset %g n %zu",
            offset, n);
      // A deviation of size sd is itself known to 1e-16 * offset.
      const double slack = 1e-13 + 1e-15 * std::fabs(offset) / sd;
      check(n == 1 ? split.m2 == 0 : std::fabs(split.m2 - exact.m2) <= slack * n * exact.m2,
            "Spread m2, offset %g n %zu", offset, n);

      const Spread f = shifted_spread<float>(v), d = shifted_spread<double>(v);
      check(std::fabs(f.mean - exact.mean) <= 1e-6 * sd,
            "float ShiftedMoments mean is offset-proof: offset %g n %zu off by %g sd", offset, n,
            std::fabs(double(f.mean - exact.mean)) / sd);
      check(n == 1 || std::fabs(f.m2 - exact.m2) <= 1e-5 * exact.m2, "float ShiftedMoments m2, offset %g n %zu", offset,
            n);
      check(n == 1 || std::fabs(d.m2 - exact.m2) <= slack * n * exact.m2, "double ShiftedMoments m2, offset %g n %zu",
            offset, n);
    }
  }
  // A first value far from all others must not be what the rest is lost against.
  std::vector<double> outlier(256, 0);
  for (size_t i = 0; i < outlier.size(); ++i) outlier[i] = i == 0 ? 1e4 : float(normal(random));
  const Exact exact(outlier);
  const Spread s = shifted_spread<float>(outlier);
  check(std::fabs(s.m2 - exact.m2) <= 1e-5 * exact.m2, "outlier first: m2");
  check(std::fabs(s.mean - exact.mean) <= 1e-6 * std::sqrt(double(exact.m2 / 256)), "outlier first: mean");
  // Equal values: no variance, and the mean is the value.
  const Spread same = shifted_spread<float>(std::vector<double>(100, float(0.1)));
  check(same.m2 == 0 && same.mean == float(0.1) && same.count == 100, "equal values");
  // Empty sets change nothing, whatever they hold.
  const Spread some = {3, 2.5, 4};
  for (const Spread& m : {merge(some, Spread{0, NAN, NAN}), merge(Spread{0, NAN, NAN}, some)})
    check(m.count == 3 && m.mean == 2.5 && m.m2 == 4, "merge with an empty set");
  ShiftedMoments<float> none;
  const float v[4] = {1, 2, 3, 4};
  none.push(v, 0);
  check(none.spread().count == 0, "an empty chunk");
  const Sums sums = merge(Sums{1, 2}, Sums{10, 20});
  check(sums.first == 11 && sums.second == 22, "Sums");
}

double f16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint64_t bits64(double v) {
  uint64_t u;
  std::memcpy(&u, &v, 8);
  return u;
}

// Every finite half and the points around the midpoint to its successor, through float and double.
template <class H, class ToHalf>
void halves(const char* name, double (*value_of)(uint16_t), ToHalf to_half, uint16_t infinity) {
  const auto agree = [&](double v, uint16_t expected) {
    check(to_half(v).bits == expected, "%s of the double %a: %04x, expected %04x", name, v, to_half(v).bits, expected);
    check(to_half(-v).bits == (expected | 0x8000), "%s of the double %a", name, -v);
    if (double(float(v)) != v) return;
    check(to_half(float(v)).bits == expected, "%s of the float %a", name, v);
    check(to_half(float(-v)).bits == (expected | 0x8000), "%s of the float %a", name, -v);
  };
  for (int bits = 0; bits < infinity; ++bits) {
    const double v = value_of(uint16_t(bits));
    check(bits64(to_float(H{uint16_t(bits)})) == bits64(v), "%s %04x to float", name, bits);
    check(bits64(to_float(H{uint16_t(bits | 0x8000)})) == bits64(-v), "%s -%04x to float", name, bits);
    // The successor of the largest finite value, for rounding, is what it would be with one more exponent.
    const double next = bits + 1 == infinity ? v + (v - value_of(uint16_t(bits - 1))) : value_of(uint16_t(bits + 1));
    const double middle = (v + next) / 2, even = (bits & 1) ? bits + 1 : bits;
    agree(v, uint16_t(bits));
    agree(middle, uint16_t(even));
    agree(std::nextafter(middle, 0), uint16_t(bits));
    agree(std::nextafter(middle, INFINITY), uint16_t(bits + 1));
    agree(std::nextafterf(float(middle), 0), uint16_t(double(float(middle)) == middle ? bits : even));
    agree(std::nextafterf(float(middle), INFINITY), uint16_t(double(float(middle)) == middle ? bits + 1 : even));
  }
  check(to_half(INFINITY).bits == infinity && to_half(-INFINITY).bits == (infinity | 0x8000), "%s infinity", name);
  check(to_half(1e39).bits == infinity && to_half(3e38f * 2).bits == infinity, "%s overflow", name);
  for (uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    const float back = to_float(to_half(float_of(nan)));
    check(back != back && (bits_of(back) & 0x400000), "%s keeps NaN %08x, quiet", name, nan);
    const double wide = float_of(nan);
    check(std::isnan(to_float(to_half(wide))), "%s keeps double NaN", name);
  }
}

void half_types() {
  halves<f16>("f16", f16_value, [](auto v) { return to_f16(v); }, 0x7c00);
  halves<bf16>(
      "bf16", [](uint16_t bits) { return double(float_of(uint32_t(bits) << 16)); }, [](auto v) { return to_bf16(v); },
      0x7f80);
  for (int bits = 0x7c01; bits < 0x8000; ++bits) check(std::isnan(to_float(f16{uint16_t(bits)})), "f16 NaN %04x", bits);
}

// Every index of every part, also next to parts that cover none.
void parts() {
  const std::vector<std::vector<int64_t>> sizes = {{1}, {3, 1, 4}, {0, 2, 0, 0, 5, 0}, {1 << 20, 1, 1 << 20}};
  for (const auto& each : sizes) {
    std::vector<int64_t> starts = {0};
    for (int64_t size : each) starts.push_back(starts.back() + size);
    for (int part = 0; part < int(each.size()); ++part)
      for (int64_t i : {starts[part], starts[part] + each[part] / 2, starts[part + 1] - 1})
        if (each[part]) check(part_of(starts.data(), int(each.size()), i) == part, "part of %lld", (long long)i);
  }
}

}  // namespace
}  // namespace normkern::test

int main() {
  normkern::test::domains();
  normkern::test::accumulators();
  normkern::test::half_types();
  normkern::test::parts();
  return normkern::test::report("test_core");
}
