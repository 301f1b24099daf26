// standardize.h: weight standardization of many tensors on CUDA, in one launch for every kMostParts of them.
#pragma once

#include "../core/standardize.h"

namespace normkern::cuda {

// The tensors of one launch. Their pointers go with it as arguments, of which old drivers take 4 KB: so nothing has to
// be copied to the device first, and a CUDA graph keeps them.
constexpr int kMostParts = 56;

// On `stream`, without a workspace; a cudaError_t. No line may be longer than kMostLineBytes.
int standardize(const Standardize<StandardizeForward>& a, void* stream);
int standardize(const Standardize<StandardizeBackward>& a, void* stream);

}  // namespace normkern::cuda
