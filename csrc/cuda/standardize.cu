// standardize.cu: the element type of a call chooses the instance; see standardize.h for what the functions promise.
#include "standardize.h"

#include "platform.cuh"

namespace normkern::cuda {

// Defined in standardize.cuh, one instance per launch_*.cu.
template <class T, class Part>
int standardize_of(const Standardize<Part>& a, void* stream);

namespace {

template <class Part>
int run(const Standardize<Part>& a, void* stream) {
  constexpr int kInvalidValue = 1;
  constexpr int64_t kMostGroups = 1 << 30;  // kernels count in int
  for (int i = 0; i < a.count; ++i) {
    const Part& part = a.parts[i];
    if (part.groups > kMostGroups || part.cols * size_of(a.dtype) > kMostLineBytes) return kInvalidValue;
  }
  switch (a.dtype) {
    case DType::f32: return standardize_of<nk::float32>(a, stream);
    case DType::f64: return standardize_of<nk::float64>(a, stream);
    case DType::f16: return standardize_of<nk::float16>(a, stream);
    case DType::bf16: return standardize_of<nk::bfloat16>(a, stream);
  }
  return kInvalidValue;
}

}  // namespace

int standardize(const Standardize<StandardizeForward>& a, void* stream) { return run(a, stream); }
int standardize(const Standardize<StandardizeBackward>& a, void* stream) { return run(a, stream); }

}  // namespace normkern::cuda
