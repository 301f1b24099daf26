// launch_f16.cu: every kernel for float16.
#include "launch.cuh"

NK_INSTANTIATE(nk::float16)
