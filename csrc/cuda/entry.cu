// entry.cu: the element type of a call chooses the instance; see entry.h for what the functions promise.
#include "entry.h"

#include "platform.cuh"

namespace normkern::cuda {

// Defined in launch.cuh, one instance per launch_*.cu.
template <class T>
int forward_of(const Problem&, const Plan&, const ForwardArgs&, void* workspace, void* stream);
template <class T>
int backward_of(const Problem&, const Plan&, const BackwardArgs&, void* workspace, void* stream);
template <class T>
int moments_of(const Problem&, const Plan&, const MomentsArgs&, void* workspace, void* stream);
template <class T>
int resident_of(const Problem&, const Plan&, Pass, bool& yes);

namespace {

template <class T>
struct Element {
  using Type = T;
};

template <class Run>
int with_element(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(Element<nk::float32>());
    case DType::f64: return run(Element<nk::float64>());
    case DType::f16: return run(Element<nk::float16>());
    case DType::bf16: return run(Element<nk::bfloat16>());
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace

int forward(const Problem& p, const Plan& plan, const ForwardArgs& a, void* workspace, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return forward_of<typename decltype(element)::Type>(p, plan, a, workspace, stream);
  });
}

int backward(const Problem& p, const Plan& plan, const BackwardArgs& a, void* workspace, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return backward_of<typename decltype(element)::Type>(p, plan, a, workspace, stream);
  });
}

int moments(const Problem& p, const Plan& plan, const MomentsArgs& a, void* workspace, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    return moments_of<typename decltype(element)::Type>(p, plan, a, workspace, stream);
  });
}

int resident(const Problem& p, const Plan& plan, Pass pass, bool& yes) {
  return with_element(p.dtype,
                      [&](auto element) { return resident_of<typename decltype(element)::Type>(p, plan, pass, yes); });
}

}  // namespace normkern::cuda
