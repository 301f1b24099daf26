// kernels.h: the loops that exist once per instruction set, as plain data and function pointers.
//
// Only aggregates and declarations: what this header brings into an AVX-512 object must not leave an inline function
// there that the linker could pick for everybody.
#pragma once

#include "../core/problem.h"

namespace normkern::cpu {

// Runs of `length` neighbours: run i of line l starts at first + l*stride + i*pitch. Run i belongs to entry i of the
// per-run arrays, on every line.
struct Runs {
  int64_t first, length, count, pitch, lines, stride;
};

// `lines` lines of `width` elements, then `tail` elements of one more. Column j belongs to entry j of the per-column
// arrays.
struct Columns {
  int64_t first, width, lines, stride, tail;
  bool far;  // too many for the caches
};

// Where an element finds its weight: lines of `runs` runs of `length` elements; `rows` lines make a slice. An entry is
// a run, or with `by_element` an element of the line; the next slice has the next entries.
struct Lookup {
  int64_t rows, runs, length;
  bool by_element;
};

// Sums of x - shift and of its square, in packs of S that are emptied into float64. `lanes` is scratch for runs of
// several lines: 3 * kMaxLanes for every entry.
template <class S>
struct ShiftedSums {
  S *shift, *lanes;
  double *sum, *squares;  // [entries]
};
constexpr int64_t kMaxLanes = 16;
// Such sums in float32 are good where nothing over- or underflowed and the shift was near the mean: the variance is
// within these bounds, and the mean's distance from the shift, squared, at most so many variances.
constexpr double kLeastVar = 1e-30, kMostVar = 1e30, kFarShift = 16;

// How x is normalized. mean + low is the mean to twice the precision of A. Columns have the affine step folded in:
// z = (x - mean)*scale + shift.
template <class A>
struct Center {
  const A *mean, *low, *rstd, *scale, *shift;  // [entries]
};

template <class A>
struct Elements {
  const void *x, *dy, *residual, *dtotal;
  void *y, *dx, *dresidual;
  const A *weight, *bias;  // by Lookup for runs; [lines] for columns if by_line, else in Center
  Act act;
  bool by_line;   // columns: weights change from line to line, not along it
  bool stream;    // results are too large to be found in a cache again
  int64_t ahead;  // runs: elements from a tile to the next one, if x is walked in tiles
  A* kept;        // backward, or null: dz of every element in the order of the walk, from the sums to the slope
  bool in_sums;   // backward of runs: dx is a multiple of dz, and the sums write it
};

// Sums over statistics groups of g and g*xhat, and over weights of dz and dz*xhat; either pair may be null. All add
// to what is there.
struct BackwardSums {
  double *g, *g_xhat;       // [entries]
  double *dbias, *dweight;  // of the entry `origin` of the Lookup, and up
  int64_t origin;
};

// dx = dz*weight*rstd + (x - mean)*rstd*slope + offset
template <class A>
struct Slope {
  const A *slope, *offset;  // [entries]
};

// Mean and variance of every group; D is double or const double.
template <class D>
struct GroupMoments {
  D *mean, *var;
};

// What a Center is made of, where entries are groups.
template <class A>
struct RunCenters {
  A *mean, *low, *rstd;
};

// A is what elements are computed in. All sums end in float64.
template <class A>
struct Kernels {
  int64_t pack_bytes;  // of the elements that these loops take at once
  // With `pick`, s.shift is found among the elements, else it is given. The exact forms sum in float64 throughout.
  void (*moments_runs)(const void* x, const Runs& r, bool centered, bool pick, ShiftedSums<A> s);
  void (*exact_moments_runs)(const void* x, const Runs& r, bool centered, bool pick, ShiftedSums<double> s);
  // Columns of one group, `cols` neighbours, share the shift; groups recur after `period` columns.
  void (*moments_columns)(const void* x, const Columns& c, bool centered, bool pick, int64_t cols, int64_t period,
                          ShiftedSums<A> s);
  void (*exact_moments_columns)(const void* x, const Columns& c, bool centered, bool pick, int64_t cols, int64_t period,
                                ShiftedSums<double> s);
  // Of n groups of `count` elements, a run each: moments and centers from their sums, or false where these are not good
  // enough (see sums.h) and what was written is nothing.
  bool (*centers_of_sums)(int64_t n, const ShiftedSums<A>& s, double count, double eps, bool centered,
                          const GroupMoments<double>& moments, const RunCenters<A>& to);
  // Centers from moments; without means they are 0.
  void (*centers_of_moments)(int64_t n, const GroupMoments<const double>& moments, double eps, const RunCenters<A>& to);
  // From the sums over every group of g, or null for second moments, and of g*xhat.
  void (*slopes_of_sums)(int64_t n, const double* g, const double* g_xhat, double count, const Center<A>& center,
                         A* slope, A* offset);
  // total = x + add, rounded.
  void (*add_runs)(const void* x, const void* add, void* total, const Runs& r);
  void (*map_runs)(const Elements<A>& e, const Runs& r, const Lookup& lookup, Center<A> center);
  void (*map_columns)(const Elements<A>& e, const Columns& c, Center<A> center);
  void (*sums_runs)(const Elements<A>& e, const Runs& r, const Lookup& lookup, Center<A> center, BackwardSums s);
  // Columns sum dz and dz*(x - mean)*rstd only, into s.g and s.g_xhat; if by_line, all four, weights by line.
  void (*sums_columns)(const Elements<A>& e, const Columns& c, Center<A> center, BackwardSums s);
  void (*slope_runs)(const Elements<A>& e, const Runs& r, const Lookup& lookup, Center<A> center, Slope<A> slope);
  void (*slope_columns)(const Elements<A>& e, const Columns& c, Center<A> center, Slope<A> slope);
};

struct KernelTable {
  Kernels<double> f64;
  Kernels<float> f32, f16, bf16;
  // Parameters as floats; every NaN is the same one, see canonical() in layout.h.
  void (*read_floats)(const void* from, DType dtype, int64_t n, float* to);
  // Gradients of parameters, rounded once.
  void (*write_doubles)(const double* from, int64_t n, DType dtype, void* to);
};

namespace baseline {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

// The table chosen at load.
const KernelTable& kernels();

}  // namespace normkern::cpu
