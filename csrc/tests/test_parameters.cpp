// test_parameters.cpp: vectors of parameters on their way into the kernels' floats, and gradients on their way out.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../cpu/layout.h"
#include "check.h"

namespace normkern::test {
namespace {

using cpu::from_double;
using cpu::to_double;

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

// Among them ties of both half types, what lies just beside a tie (two roundings would make a tie of it), and values
// that overflow or are subnormal.
std::vector<double> values() {
  std::vector<double> v = {0.0,    -0.0, 1e-30,    65519.9,   65520, 3.4e38, 1e39,
                           5.9e-8, 3e-8, INFINITY, -INFINITY, NAN,   -NAN};
  for (double tie : {1 + std::ldexp(1, -8), 1 + std::ldexp(3, -8), 1 + std::ldexp(1, -11), 1 + std::ldexp(3, -11)})
    for (double beside : {0.0, std::ldexp(1, -40), -std::ldexp(1, -40)})
      for (double sign : {1.0, -1.0}) v.push_back(sign * (tie + beside));
  for (int i = 0; i < 300; ++i) v.push_back(std::ldexp(std::sin(i + 1.0), i % 40 - 20));
  return v;
}

template <class T>
void there_and_back(DType dtype) {
  const std::vector<double> all = values();
  const double untouched = 77;
  for (size_t n = 0; n <= all.size(); n += n < 70 ? 1 : 63) {
    std::vector<T> stored(n + 1), written(n + 1);
    from_double(untouched, written[n]);
    for (size_t i = 0; i < n; ++i) from_double(all[i], stored[i]);
    std::vector<float> read(n + 1, float(untouched));
    cpu::kernels().read_floats(stored.data(), dtype, int64_t(n), read.data());
    cpu::kernels().write_doubles(all.data(), int64_t(n), dtype, written.data());
    for (size_t i = 0; i < n; ++i) {
      check(same(read[i], float(to_double(stored[i]))), "type %d: %g read as %g", int(dtype), to_double(stored[i]),
            read[i]);
      check(same(to_double(written[i]), to_double(stored[i])), "type %d: %a written as %a, not %a", int(dtype), all[i],
            to_double(written[i]), to_double(stored[i]));
    }
    check(read[n] == untouched && to_double(written[n]) == untouched, "type %d: written behind the end", int(dtype));
  }
}

// Rounded to bfloat16 as it is, such a NaN would become a zero.
template <class T>
void full_nan(DType dtype) {
  T full;
  std::memset(&full, 0xff, sizeof(full));
  const std::vector<T> stored(20, full);
  std::vector<float> read(20);
  cpu::kernels().read_floats(stored.data(), dtype, 20, read.data());
  for (float v : read) check(bits_of(v) == 0x7fc00000, "type %d: nan read as %08x", int(dtype), bits_of(v));
  std::vector<double> gradients(20);
  std::memset(gradients.data(), 0xff, 20 * sizeof(double));
  std::vector<T> written(20);
  cpu::kernels().write_doubles(gradients.data(), 20, dtype, written.data());
  for (T v : written) check(std::isnan(to_double(v)), "type %d: nan written as %g", int(dtype), to_double(v));
}

}  // namespace
}  // namespace normkern::test

int main() {
  using namespace normkern;
  for (DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
    cpu::with_type(dtype, [&](auto type) {
      test::there_and_back<decltype(type)>(dtype);
      test::full_nan<decltype(type)>(dtype);
    });
  return test::report("test_parameters");
}
