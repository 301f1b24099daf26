// centers.h: what the loops over runs need of every group, for many groups at once (see kernels.h for why nothing
// else may be here). Compiled once per instruction set, with NK_ISA naming the namespace.
#pragma once

#include "kernels.h"

namespace normkern::cpu::NK_ISA {

bool centers_of_sums(int64_t n, const ShiftedSums<float>& s, double count, double eps, bool centered,
                     const GroupMoments<double>& moments, const RunCenters<float>& to);
bool centers_of_sums(int64_t n, const ShiftedSums<double>& s, double count, double eps, bool centered,
                     const GroupMoments<double>& moments, const RunCenters<double>& to);
void centers_of_moments(int64_t n, const GroupMoments<const double>& moments, double eps, const RunCenters<float>& to);
void centers_of_moments(int64_t n, const GroupMoments<const double>& moments, double eps, const RunCenters<double>& to);
void slopes_of_sums(int64_t n, const double* g, const double* g_xhat, double count, const Center<float>& center,
                    float* slope, float* offset);
void slopes_of_sums(int64_t n, const double* g, const double* g_xhat, double count, const Center<double>& center,
                    double* slope, double* offset);

}  // namespace normkern::cpu::NK_ISA
