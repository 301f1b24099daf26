// torch_cuda.h: torch's current CUDA stream, without linking to the CUDA half of libtorch; CUDA's errors as torch's.
//
// The symbol is looked up at run time, so this library links against, and loads under, a CPU build of torch. A weak
// reference would not do: linkers that pass --as-needed drop libtorch, and the reference silently stays null.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdlib>

#include "../core/plan.h"
#include "tensor.h"

namespace normkern::bind {

inline void check(int error, const char* doing) {
  STD_TORCH_CHECK(error == cudaSuccess, "normkern: ", doing, ": ", cudaGetErrorString(cudaError_t(error)));
}

// Of so many multiprocessors, those that are not left to others, such as collectives that run beside:
// NORMKERN_SM_MARGIN.
inline int ours_of(int multiprocessors) {
  static const int margin = [] {
    const char* text = std::getenv("NORMKERN_SM_MARGIN");
    return text ? std::atoi(text) : 0;
  }();
  return int(clamp(int64_t(multiprocessors) - margin, 1, multiprocessors));
}

inline void* current_cuda_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // finds it, never loads it
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter, "normkern: this process has no CUDA build of PyTorch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

}  // namespace normkern::bind
