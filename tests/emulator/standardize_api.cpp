// standardize_api.cpp: the emulated kernels that standardize many tensors, as a C library, for
// tests/emulator/standardize.py; like api.cpp.
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/standardize.h"
#include "emulator.hpp"

namespace {

using namespace normkern;
using emulator::Use;

// Tells the checker of buffers as long as it lives.
class Regions {
 public:
  ~Regions() {
    for (void* data : added_) emulator::drop_region(data);
  }
  void in(const void* data, int64_t count, int64_t size, const char* name) {
    add(const_cast<void*>(data), count, size, Use::In, name);
  }
  void out(void* data, int64_t count, int64_t size, const char* name) {
    if (add(data, count, size, Use::Out, name)) outputs_.push_back(data);
  }
  void require_outputs() const {
    for (void* data : outputs_) emulator::require_written(data);
  }

 private:
  bool add(void* data, int64_t count, int64_t size, Use use, const char* name) {
    if (!data || count == 0) return false;
    emulator::add_region(data, size_t(count * size), use, name, int(size));
    added_.push_back(data);
    return true;
  }
  std::vector<void*> added_, outputs_;
};

template <class Part, class Describe>
int run(const Part* parts, int count, int32_t dtype, double eps, Describe describe) {
  emulator::set_last_error("");
  try {
    Regions regions;
    for (int i = 0; i < count; ++i) describe(regions, parts[i], size_of(DType(dtype)));
    const int error = cuda::standardize(Standardize<Part>{parts, count, DType(dtype), eps}, nullptr);
    if (error) {
      if (!*emulator::last_error()) emulator::set_last_error(("error " + std::to_string(error)).c_str());
      return error;
    }
    regions.require_outputs();
    return 0;
  } catch (const std::exception& error) {
    emulator::set_last_error(error.what());
    return 999;
  }
}

}  // namespace

#define NK_API extern "C" __attribute__((visibility("default")))

NK_API int nk_standardize_sizes(int64_t* sizes) {
  sizes[0] = sizeof(StandardizeForward);
  sizes[1] = sizeof(StandardizeBackward);
  return cuda::kMostParts;
}

NK_API int nk_standardize(const StandardizeForward* parts, int count, int32_t dtype, double eps) {
  return run(parts, count, dtype, eps, [](Regions& r, const StandardizeForward& p, int64_t size) {
    r.in(p.x, p.groups * p.cols, size, "x");
    r.in(p.weight.data, p.groups, size_of(p.weight.dtype), "weight");
    r.out(p.y, p.groups * p.cols, size, "y");
    r.out(p.mean_out, p.groups, sizeof(double), "mean_out");
    r.out(p.var_out, p.groups, sizeof(double), "var_out");
  });
}

NK_API int nk_standardize_backward(const StandardizeBackward* parts, int count, int32_t dtype, double eps) {
  return run(parts, count, dtype, eps, [](Regions& r, const StandardizeBackward& p, int64_t size) {
    r.in(p.dy, p.groups * p.cols, size, "dy");
    r.in(p.x, p.groups * p.cols, size, "x");
    r.in(p.weight.data, p.groups, size_of(p.weight.dtype), "weight");
    r.in(p.mean, p.groups, sizeof(double), "mean");
    r.in(p.var, p.groups, sizeof(double), "var");
    r.out(p.dx, p.groups * p.cols, size, "dx");
    r.out(p.dweight.data, p.groups, size_of(p.dweight.dtype), "dweight");
  });
}
