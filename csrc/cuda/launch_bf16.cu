// launch_bf16.cu: every kernel for bfloat16.
#include "launch.cuh"

NK_INSTANTIATE(nk::bfloat16)
