// absent_dtypes.cpp: stands in for the element types that a build leaves out (NORMKERN_EMULATOR_DTYPES), so that the
// rest links.
#include "../../csrc/cuda/entry.h"
#include "../../csrc/cuda/standardize.h"
#include "cuda_surface.hpp"

namespace normkern::cuda {

constexpr int kNotSupported = 801;

template <class T>
int forward_of(const Problem&, const Plan&, const ForwardArgs&, void*, void*) {
  return kNotSupported;
}
template <class T>
int backward_of(const Problem&, const Plan&, const BackwardArgs&, void*, void*) {
  return kNotSupported;
}
template <class T>
int moments_of(const Problem&, const Plan&, const MomentsArgs&, void*, void*) {
  return kNotSupported;
}
template <class T>
int resident_of(const Problem&, const Plan&, Pass, bool&) {
  return kNotSupported;
}

template <class T, class Part>
int standardize_of(const Standardize<Part>&, void*) {
  return kNotSupported;
}

#define NK_ABSENT(T)                                                                           \
  template int forward_of<T>(const Problem&, const Plan&, const ForwardArgs&, void*, void*);   \
  template int backward_of<T>(const Problem&, const Plan&, const BackwardArgs&, void*, void*); \
  template int moments_of<T>(const Problem&, const Plan&, const MomentsArgs&, void*, void*);   \
  template int resident_of<T>(const Problem&, const Plan&, Pass, bool&);                       \
  template int standardize_of<T>(const Standardize<StandardizeForward>&, void*);               \
  template int standardize_of<T>(const Standardize<StandardizeBackward>&, void*);

#ifdef NK_ABSENT_F32
NK_ABSENT(float)
#endif
#ifdef NK_ABSENT_F64
NK_ABSENT(double)
#endif
#ifdef NK_ABSENT_F16
NK_ABSENT(__half)
#endif
#ifdef NK_ABSENT_BF16
NK_ABSENT(__nv_bfloat16)
#endif

}  // namespace normkern::cuda
