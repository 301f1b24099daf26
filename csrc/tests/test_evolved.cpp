// test_evolved.cpp: the evolved norms' maps and sums against plain loops, in every layout, shared by several threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu/evolved.h"
#include "check.h"

namespace {

using namespace normkern;

// One after the other: what is tested is how the work is cut, which goes by the count.
void in_turn(int64_t tasks, void (*task)(void*, int64_t), void* state) {
  for (int64_t i = tasks; i-- > 0;) task(state, i);
}

double number(int64_t i) { return std::sin(double(i) * 12.9898) * 1.5; }

struct Table {
  Evolved kind;
  std::vector<double> rows;  // [7][groups], as core/evolved.h has them for backward; forward has bias in place of slope
  int64_t groups;
  double at(int row, int64_t g) const { return rows[size_t(row * groups + g)]; }
};

double forward(const Table& t, double x, int64_t g) {
  if (t.kind == Evolved::s0) return x / (1 + std::exp(-t.at(0, g) * x)) * t.at(1, g) + t.at(2, g);
  return x / std::max(t.at(0, g), t.at(1, g) * x + t.at(2, g)) * t.at(3, g) + t.at(4, g);
}

double backward(const Table& t, double x, double dy, int64_t g) {
  if (t.kind == Evolved::s0) {
    const double s = 1 / (1 + std::exp(-t.at(0, g) * x));
    return dy * t.at(1, g) * (s + t.at(0, g) * x * s * (1 - s)) + (x - t.at(3, g)) * t.at(2, g) + t.at(4, g);
  }
  const double right = t.at(1, g) * x + t.at(2, g), d = std::max(t.at(0, g), right);
  const double slope = 1 / d - (right > t.at(0, g) ? t.at(1, g) * x / (d * d) : 0);
  return dy * t.at(3, g) * slope + (x - t.at(5, g)) * t.at(4, g) + t.at(6, g);
}

std::vector<double> terms(const Table& t, double x, double dy, int64_t g) {
  if (t.kind == Evolved::s0) {
    const double s = 1 / (1 + std::exp(-t.at(0, g) * x));
    return {dy, dy * x * s, dy * x * x * s * (1 - s)};
  }
  const double right = t.at(1, g) * x + t.at(2, g), d = std::max(t.at(0, g), right), steep = dy * x / (d * d);
  const bool at_right = right > t.at(0, g);
  return {dy, dy * x / d, at_right ? 0 : steep, at_right ? steep : 0, at_right ? steep * x : 0};
}

template <class T>
void compare(Evolved kind, DType dtype, const Domain& d, int64_t threads, double bound) {
  const int64_t n = d.numel(), groups = d.groups();
  Table table{kind, std::vector<double>(size_t(7 * groups)), groups};
  std::vector<T> rows(table.rows.size()), x(static_cast<size_t>(n)), dy(x), out(x);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = T(std::abs(number(int64_t(i) + 7)) + 0.1);  // roots are positive
    table.rows[i] = double(rows[i]);
  }
  for (int64_t i = 0; i < n; ++i) x[size_t(i)] = T(number(i)), dy[size_t(i)] = T(number(3 * i + 1));
  EvolvedArgs a;
  a.kind = kind;
  a.domain = d;
  a.dtype = dtype;
  a.x = x.data();
  a.rows = rows.data();
  a.out = out.data();
  const cpu::Threads pool{threads, in_turn};
  cpu::evolve(a, pool);
  bool good = true;
  for (int64_t i = 0; i < n; ++i) {
    const double want = forward(table, double(x[size_t(i)]), d.group_of(i));
    good = good && std::abs(double(out[size_t(i)]) - want) <= bound * (1 + std::abs(want));
  }
  test::check(good, "%s of kind %d, domain %d %d %d %d, %d threads, %d bytes an element", "y", int(kind), int(d.batch),
              int(d.rows), int(d.keep), int(d.cols), int(threads), int(sizeof(T)));
  a.dy = dy.data();
  cpu::evolve(a, pool);
  for (int64_t i = 0; i < n; ++i) {
    const double want = backward(table, double(x[size_t(i)]), double(dy[size_t(i)]), d.group_of(i));
    good = good && std::abs(double(out[size_t(i)]) - want) <= 8 * bound * (1 + std::abs(want));
  }
  test::check(good, "%s of kind %d, domain %d %d %d %d, %d threads, %d bytes an element", "dx", int(kind), int(d.batch),
              int(d.rows), int(d.keep), int(d.cols), int(threads), int(sizeof(T)));
  const size_t count = size_t(sums_of(kind));
  std::vector<double> sums(count * size_t(groups)), want(sums), size(sums);
  a.sums = sums.data();
  cpu::evolve(a, pool);
  for (int64_t i = 0; i < n; ++i) {
    const auto v = terms(table, double(x[size_t(i)]), double(dy[size_t(i)]), d.group_of(i));
    for (size_t k = 0; k < count; ++k) {
      want[k * size_t(groups) + size_t(d.group_of(i))] += v[k];
      size[k * size_t(groups) + size_t(d.group_of(i))] += std::abs(v[k]);
    }
  }
  for (size_t k = 0; k < sums.size(); ++k) good = good && std::abs(sums[k] - want[k]) <= 8 * bound * (size[k] + 1e-30);
  test::check(good, "%s of kind %d, domain %d %d %d %d, %d threads, %d bytes an element", "sums", int(kind),
              int(d.batch), int(d.rows), int(d.keep), int(d.cols), int(threads), int(sizeof(T)));
}

}  // namespace

int main() {
  const Domain domains[] = {{6, 1, 1, 49},  {3, 1, 1, 1},     {2, 20, 3, 1}, {1, 9000, 5, 1},
                            {3, 65, 34, 1}, {1, 2000, 33, 1}, {2, 7, 3, 5},  {40, 1, 1, 700},
                            {1, 1, 77, 1},  {2, 4, 2, 19},    {5, 1, 1, 7},  {1, 1, 1, 100000}};
  for (const Evolved kind : {Evolved::s0, Evolved::b0}) {
    for (const Domain& d : domains) {
      for (const int64_t threads : {1, 3, 8}) {
        compare<float>(kind, DType::f32, d, threads, 1e-6);
        compare<double>(kind, DType::f64, d, threads, 1e-14);
      }
    }
  }
  return normkern::test::report("test_evolved");
}
