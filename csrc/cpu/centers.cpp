// centers.cpp: plain loops over groups, which the compiler vectorizes. Where groups are small, as rows of 256, the few
// divisions and roots of each cost as much as its elements if they wait for each other.
#include "centers.h"

namespace normkern::cpu::NK_ISA {
namespace {

// As canonical() in layout.h.
template <class A>
A canonical(A v) {
  return v != v ? A(__builtin_nan("")) : v;
}

// Arguments are plain pointers because the compiler trusts __restrict only there.

template <bool kCentered, class A>
bool of_sums(int64_t n, const A* __restrict shift, const double* __restrict sum, const double* __restrict squares,
             double count, double eps, double* __restrict group_mean, double* __restrict group_var, A* __restrict mean,
             A* __restrict low, A* __restrict rstd) {
  for (int64_t k = 0; k < n; ++k) {
    const double off = kCentered ? sum[k] / count : 0, m2 = kCentered ? squares[k] - sum[k] * off : squares[k];
    const double around = kCentered ? double(shift[k]) + off : 0, var = m2 / count;
    group_mean[k] = around;
    group_var[k] = var;
    mean[k] = A(around);
    low[k] = A(around - double(A(around)));
    rstd[k] = A(1 / __builtin_sqrt(var + eps));
  }
  int64_t bad = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double off = kCentered ? group_mean[k] - double(shift[k]) : 0, var = group_var[k];
    bad |= (var >= kLeastVar ? 0 : 1) | (var <= kMostVar ? 0 : 1) | (off * off <= kFarShift * var ? 0 : 1);
  }
  return bad == 0;
}

template <class A>
void of_means(int64_t n, const double* __restrict group_mean, A* __restrict mean, A* __restrict low) {
  for (int64_t k = 0; k < n; ++k) {
    const A rounded = canonical(A(group_mean[k]));
    mean[k] = rounded;
    low[k] = A(group_mean[k] - double(rounded));
  }
}

template <class A>
void of_vars(int64_t n, const double* __restrict group_var, double eps, A* __restrict rstd) {
  for (int64_t k = 0; k < n; ++k) rstd[k] = canonical(A(1 / __builtin_sqrt(group_var[k] + eps)));
}

// Without kMeans g is not read.
template <bool kMeans, class A>
void slopes(int64_t n, const double* __restrict g, const double* __restrict g_xhat, double count,
            const A* __restrict low, const A* __restrict rstd, A* __restrict slope, A* __restrict offset) {
  for (int64_t k = 0; k < n; ++k) {
    const double r = rstd[k], through = -r * (g_xhat[k] / count);
    slope[k] = A(through);
    offset[k] = A(kMeans ? -r * (g[k] / count) - double(low[k]) * r * through : -double(low[k]) * r * through);
  }
}

template <class A>
bool any_of_sums(int64_t n, const ShiftedSums<A>& s, double count, double eps, bool centered,
                 const GroupMoments<double>& moments, const RunCenters<A>& to) {
  const auto from = centered ? of_sums<true, A> : of_sums<false, A>;
  return from(n, s.shift, s.sum, s.squares, count, eps, moments.mean, moments.var, to.mean, to.low, to.rstd);
}

template <class A>
void any_of_moments(int64_t n, const GroupMoments<const double>& moments, double eps, const RunCenters<A>& to) {
  of_vars(n, moments.var, eps, to.rstd);
  if (moments.mean) return of_means(n, moments.mean, to.mean, to.low);
  for (int64_t k = 0; k < n; ++k) to.mean[k] = to.low[k] = 0;
}

template <class A>
void any_slopes(int64_t n, const double* g, const double* g_xhat, double count, const Center<A>& c, A* slope,
                A* offset) {
  const auto of = g ? slopes<true, A> : slopes<false, A>;
  of(n, g, g_xhat, count, c.low, c.rstd, slope, offset);
}

}  // namespace

bool centers_of_sums(int64_t n, const ShiftedSums<float>& s, double count, double eps, bool centered,
                     const GroupMoments<double>& moments, const RunCenters<float>& to) {
  return any_of_sums(n, s, count, eps, centered, moments, to);
}
bool centers_of_sums(int64_t n, const ShiftedSums<double>& s, double count, double eps, bool centered,
                     const GroupMoments<double>& moments, const RunCenters<double>& to) {
  return any_of_sums(n, s, count, eps, centered, moments, to);
}
void centers_of_moments(int64_t n, const GroupMoments<const double>& moments, double eps, const RunCenters<float>& to) {
  any_of_moments(n, moments, eps, to);
}
void centers_of_moments(int64_t n, const GroupMoments<const double>& moments, double eps,
                        const RunCenters<double>& to) {
  any_of_moments(n, moments, eps, to);
}
void slopes_of_sums(int64_t n, const double* g, const double* g_xhat, double count, const Center<float>& center,
                    float* slope, float* offset) {
  any_slopes(n, g, g_xhat, count, center, slope, offset);
}
void slopes_of_sums(int64_t n, const double* g, const double* g_xhat, double count, const Center<double>& center,
                    double* slope, double* offset) {
  any_slopes(n, g, g_xhat, count, center, slope, offset);
}

}  // namespace normkern::cpu::NK_ISA
