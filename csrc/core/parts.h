// parts.h: many tensors walked as one: which of them an index belongs to.
#pragma once

#include <cstdint>

namespace normkern {

// Part i covers the indices starts[i] to starts[i + 1] - 1, and may cover none; starts has count + 1 entries.
constexpr int part_of(const int64_t* starts, int count, int64_t index) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (starts[middle] <= index)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace normkern
