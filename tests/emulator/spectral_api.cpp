// spectral_api.cpp: the emulated spectral kernels as a C library, for tests/emulator/spectral.py; like api.cpp. The
// transforms in between are the caller's: cuFFT is not emulated.
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/spectrum.h"
#include "emulator.hpp"

namespace {

using namespace normkern;
using emulator::Use;

// Tells the checker of a buffer as long as it lives.
class Region {
 public:
  Region(const void* data, int64_t count, int64_t size, Use use, const char* name) : data_(const_cast<void*>(data)) {
    emulator::add_region(data_, size_t(count * size), use, name, int(size));
  }
  ~Region() { emulator::drop_region(data_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  void require_written() const { emulator::require_written(data_); }

 private:
  void* data_;
};

template <class Body>
int guarded(Body body) {
  emulator::set_last_error("");
  try {
    const int error = body();
    if (error && !*emulator::last_error()) emulator::set_last_error(("error " + std::to_string(error)).c_str());
    return error;
  } catch (const std::exception& error) {
    emulator::set_last_error(error.what());
    return 999;
  }
}

Region lags_of(const Spectrum& s) {
  return Region(s.lags, s.channels * s.taps.lags(), sizeof(double), Use::In, "lags");
}

// The table of waves is made as the binding makes it, by its kernel.
template <class Body>
int with_waves(const Spectrum& s, Body body) {
  std::vector<double> waves(size_t(cuda::wave_count(s)));
  const Region region(waves.data(), int64_t(waves.size()), sizeof(double), Use::Out, "waves");
  const int error = cuda::make_waves(s, waves.data(), nullptr);
  if (error) return error;
  region.require_written();
  return body(static_cast<const double*>(waves.data()));
}

int64_t spectrum_count(const MultiplyArgs& a, bool folded) {
  const Spectrum& s = a.spectrum;
  const int64_t maps = a.batch * s.channels;
  return folded ? maps * (s.rows / a.stride_rows) * cosines(s.cols / a.stride_cols) * 2 : maps * s.rows * s.half() * 2;
}

}  // namespace

#define NK_API extern "C" __attribute__((visibility("default")))

NK_API int nk_spectral_sizes(int64_t* sizes, int room) {
  const int64_t all[] = {sizeof(Taps),     sizeof(Points),       sizeof(LagsArgs),
                         sizeof(Spectrum), sizeof(MultiplyArgs), sizeof(PointsArgs)};
  const int count = int(sizeof all / sizeof all[0]);
  for (int i = 0; i < count && i < room; ++i) sizes[i] = all[i];
  return count;
}

NK_API int nk_spectral_lags(const LagsArgs* a) {
  return guarded([&] {
    const Region weight(a->weight, a->channels * a->depth * a->taps.count(), size_of(a->dtype), Use::In, "weight");
    const Region lags(a->lags, a->channels * a->taps.lags(), sizeof(double), Use::Out, "lags");
    const int error = cuda::lags(*a, nullptr);
    if (!error) lags.require_written();
    return error;
  });
}

NK_API int nk_spectral_root(const Spectrum* s, DType dtype, void* v) {
  return guarded([&] {
    const Region lags = lags_of(*s);
    const Region out(v, s->channels * s->rows * s->half(), size_of(dtype), Use::Out, "v");
    return with_waves(*s, [&](const double* waves) {
      const int error = cuda::inverse_root(*s, dtype, waves, v, nullptr);
      if (!error) out.require_written();
      return error;
    });
  });
}

// In place where y is x.
NK_API int nk_spectral_multiply(const MultiplyArgs* a, double scale) {
  return guarded([&] {
    const bool in_place = a->x == a->y;
    const Region lags = lags_of(a->spectrum);
    const Region x(a->x, spectrum_count(*a, false), size_of(a->dtype), in_place ? Use::InOut : Use::In, "x");
    const auto multiply = [&](const double* waves) { return cuda::multiply(*a, waves, scale, nullptr); };
    if (in_place) return with_waves(a->spectrum, multiply);
    const Region y(a->y, spectrum_count(*a, true), size_of(a->dtype), Use::Out, "y");
    const int error = with_waves(a->spectrum, multiply);
    if (!error) y.require_written();
    return error;
  });
}

// `count` values of the map lie behind its pointer.
NK_API int nk_spectral_points(const PointsArgs* a, int64_t count, int embeds) {
  return guarded([&] {
    const int64_t torus = a->batch * a->channels * a->rows * a->cols;
    const Region from(a->from, embeds ? count : torus, size_of(a->dtype), Use::In, "from");
    const Region to(a->to, embeds ? torus : count, size_of(a->dtype), Use::Out, "to");
    const int error = embeds ? cuda::embed(*a, nullptr) : cuda::crop(*a, nullptr);
    if (!error) to.require_written();
    return error;
  });
}
