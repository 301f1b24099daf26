// launch_f64.cu: every kernel for float64.
#include "launch.cuh"
#include "standardize.cuh"

NK_INSTANTIATE(nk::float64)
NK_INSTANTIATE_STANDARDIZE(nk::float64)
