// launch_f32.cu: every kernel for float32.
#include "launch.cuh"
#include "standardize.cuh"

NK_INSTANTIATE(nk::float32)
NK_INSTANTIATE_STANDARDIZE(nk::float32)
