// problem.h: what a normalization is, without saying how it is computed.
//
// A dense buffer of `numel` elements, in memory order, is viewed as [batch, rows, keep, cols]. A group is one
// (batch, keep): a rows x cols matrix with leading dimension keep*cols. One domain says which elements share
// moments, a second one says which elements share a weight; every norm and both memory layouts are a row of such
// pairs (normkern/problem.py holds the rows).
#pragma once

#include <cstdint>

namespace normkern {

enum class DType : int32_t { f32, f64, f16, bf16 };

// mean_var: x is centred and divided by its standard deviation. second: x is divided by its root mean square.
// given: as mean_var, with moments that come from outside (batch norm in eval mode).
enum class Moments : int32_t { mean_var, second, given };

enum class Act : int32_t { none, relu, silu, gelu, leaky_relu };

constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

struct Domain {
  int64_t batch = 1, rows = 1, keep = 1, cols = 1;

  constexpr int64_t groups() const { return batch * keep; }
  constexpr int64_t count() const { return rows * cols; }  // elements of one group
  constexpr int64_t numel() const { return groups() * count(); }
  constexpr int64_t group_of(int64_t e) const { return e / (rows * keep * cols) * keep + e / cols % keep; }
  // Offset of the run of `cols` neighbours that is row `row` of group `group`.
  constexpr int64_t run(int64_t group, int64_t row) const {
    return ((group / keep * rows + row) * keep + group % keep) * cols;
  }
  constexpr bool operator==(const Domain& o) const {
    return batch == o.batch && rows == o.rows && keep == o.keep && cols == o.cols;
  }
  constexpr bool operator!=(const Domain& o) const { return !(*this == o); }
};

// The same groups in the same order with as few extents above 1 as possible: neighbouring runs become one run.
// Kernels plan on this form; a contiguous group is exactly the one with rows == 1.
constexpr Domain simplify(Domain d) {
  if (d.keep == 1) d = {d.batch, 1, 1, d.rows * d.cols};
  if (d.rows == 1) d = {d.batch * d.keep, 1, 1, d.cols};
  return d;
}

struct Problem {
  Domain stats;   // who shares moments
  Domain affine;  // who shares a weight and a bias
  Moments moments = Moments::mean_var;
  Act act = Act::none;
  DType dtype = DType::f32;  // of x, y, dy, dx, residual
  double eps = 0;

  constexpr bool operator==(const Problem& o) const {
    return stats == o.stats && affine == o.affine && moments == o.moments && act == o.act && dtype == o.dtype &&
           eps == o.eps;
  }
};

}  // namespace normkern
