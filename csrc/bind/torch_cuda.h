// torch_cuda.h: torch's current CUDA stream, without linking to the CUDA half of libtorch.
//
// The symbol is looked up at run time, so this library links against, and loads under, a CPU build of torch. A weak
// reference would not do: linkers that pass --as-needed drop libtorch, and the reference silently stays null.
#pragma once

#include <dlfcn.h>

#include "tensor.h"

namespace normkern::bind {

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
