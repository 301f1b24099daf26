// launch_f64.cu: every kernel for float64.
#include "launch.cuh"

NK_INSTANTIATE(nk::float64)
