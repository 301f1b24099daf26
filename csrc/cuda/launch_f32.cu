// launch_f32.cu: every kernel for float32.
#include "launch.cuh"

NK_INSTANTIATE(nk::float32)
