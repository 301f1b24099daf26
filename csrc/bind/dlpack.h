// dlpack.h: what this project uses of the DLPack exchange table (version 1), by which a C function sees a tensor's
// memory without the framework's headers. https://dmlc.github.io/dlpack: the layouts below are that standard's.
#pragma once

#include <cstdint>

namespace normkern::bind {

struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Fills `view`, which lives no longer than the object; -1 with a Python exception where it cannot. May be null.
  int (*view_object)(void* object, DlTensor* view);
  void* current_stream;
};

constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlFloat = 2, kDlBfloat = 4;
constexpr uint32_t kDlMajor = 1;

}  // namespace normkern::bind
