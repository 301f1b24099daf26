// test_streams.cpp: results that go past the caches have the same bits as those that do not, whatever the alignment.
#include <cmath>
#include <cstring>
#include <vector>

#include "../cpu/layout.h"
#include "check.h"

namespace normkern::test {
namespace {

constexpr int64_t kMuch = int64_t(1) << 30;  // bytes written elsewhere in the same call

template <class T>
struct Buffer {
  std::vector<T> all;
  int64_t shift;  // results begin so many elements behind an aligned address

  Buffer(int64_t n, int64_t shift) : all(size_t(n + shift + 64)), shift(shift) {}
  T* data() {
    T* const aligned = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(all.data()) + 63) / 64 * 64);
    return aligned + shift;
  }
};

template <class T>
void same(Buffer<T>& a, Buffer<T>& b, int64_t n, const char* what, const Problem& p) {
  check(std::memcmp(a.data(), b.data(), size_t(n) * sizeof(T)) == 0, "type %d, lines of %ld, act %d, shift %ld: %s",
        int(p.dtype), long(p.stats.cols), int(p.act), long(a.shift), what);
}

template <class T>
void run(const Problem& p, int64_t shift, bool with_residual) {
  const int64_t n = p.stats.numel(), channels = p.affine.groups(), groups = p.stats.groups();
  Buffer<T> x(n, 0), dy(n, 0), residual(n, 0);
  for (int64_t i = 0; i < n; ++i) {
    cpu::from_double(float(std::sin(double(i))) + 1, x.data()[i]);
    cpu::from_double(float(std::cos(3.0 * double(i))), dy.data()[i]);
    cpu::from_double(float(std::cos(double(i))), residual.data()[i]);
  }
  const std::vector<float> weight(size_t(channels), 1.5f), bias(size_t(channels), -0.25f);
  Buffer<T> y[2] = {{n, shift}, {n, shift}}, dx[2] = {{n, shift}, {n, shift}}, dz[2] = {{n, shift}, {n, shift}};
  Buffer<double> dweight[2] = {{channels, 0}, {channels, 0}}, dbias[2] = {{channels, 0}, {channels, 0}};
  // Without dresidual, which there is only with a residual, one sweep may make dx and the sums.
  const bool with_dz = p.act != Act::none && with_residual;
  for (int streamed : {0, 1}) {
    std::vector<double> mean(size_t(groups), 0.5), var(size_t(groups), 2.0);
    ForwardArgs f;
    f.x = x.data();
    f.weight = {weight.data(), DType::f32};
    f.bias = {bias.data(), DType::f32};
    if (with_residual) f.residual = residual.data();
    f.y = y[streamed].data();
    BackwardArgs b;
    b.dy = dy.data();
    b.x = x.data();
    b.weight = f.weight;
    b.bias = f.bias;
    b.residual = f.residual;
    b.dx = dx[streamed].data();
    if (with_dz) b.dresidual = dz[streamed].data();
    b.dweight = {dweight[streamed].data(), DType::f64};
    b.dbias = {dbias[streamed].data(), DType::f64};
    b.mean = {mean.data(), DType::f64};
    b.var = {var.data(), DType::f64};
    if (p.moments == Moments::given) {
      f.mean = b.mean;
      f.var = b.var;
    } else {
      f.mean_out = mean.data();
      f.var_out = var.data();
    }
    cpu::forward(p, f, {}, streamed ? kMuch : 0);
    cpu::backward(p, b, {}, streamed ? kMuch : 0);
  }
  same(y[0], y[1], n, "y", p);
  same(dx[0], dx[1], n, "dx", p);
  if (with_dz) same(dz[0], dz[1], n, "dresidual", p);
  same(dweight[0], dweight[1], channels, "dweight", p);
  same(dbias[0], dbias[1], channels, "dbias", p);
}

}  // namespace
}  // namespace normkern::test

int main() {
  using namespace normkern;
  for (DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
    cpu::with_type(dtype, [&](auto type) {
      for (int64_t cols : {64, 100, 513, 1024}) {
        const Domain layer = {9, 1, 1, cols}, by_column = {1, 9, cols, 1}, batch = {1, 3, 4, cols},
                     last = {1, 12, cols, 1};
        for (const auto& [stats, affine] : {std::pair<Domain, Domain>{layer, by_column}, {batch, batch}, {last, last}})
          for (Moments moments : {Moments::mean_var, Moments::given})
            for (Act act : {Act::none, Act::relu, Act::silu})
              for (int64_t shift : {0, 1, 8, 20})
                for (bool residual : {false, true})
                  test::run<decltype(type)>({stats, affine, moments, act, dtype, 1e-5}, shift, residual);
      }
    });
  }
  return test::report("test_streams");
}
