// types.h: a dtype chosen at run time as a C++ type.
#pragma once

#include "../core/half.h"
#include "../core/problem.h"

namespace normkern::cpu {

// Calls use(T()). Inlined, and with that no function that objects of several instruction sets could share.
template <class Use>
inline __attribute__((always_inline)) void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::f32: return use(float());
    case DType::f64: return use(double());
    case DType::f16: return use(f16());
    case DType::bf16: return use(bf16());
  }
}

}  // namespace normkern::cpu
