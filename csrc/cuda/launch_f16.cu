// launch_f16.cu: every kernel for float16.
#include "launch.cuh"
#include "standardize.cuh"

NK_INSTANTIATE(nk::float16)
NK_INSTANTIATE_STANDARDIZE(nk::float16)
