// launch_bf16.cu: every kernel for bfloat16.
#include "launch.cuh"
#include "standardize.cuh"

NK_INSTANTIATE(nk::bfloat16)
NK_INSTANTIATE_STANDARDIZE(nk::bfloat16)
