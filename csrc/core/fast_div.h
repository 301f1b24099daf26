// fast_div.h: from an element's offset to its group without a hardware division.
//
// A GPU has no integer division; one by a number known at launch is a multiplication and a shift (Granlund and
// Montgomery 1994). Cursor then steps from element to element without dividing at all.
#pragma once

#include <cstdint>

#include "problem.h"

namespace normkern {

__extension__ typedef unsigned __int128 Wide;

// n / divisor, for n >= 0. Both widths are kept: offsets below 2^31, nearly all, take the cheap one.
class FastDiv {
 public:
  constexpr FastDiv() = default;
  constexpr explicit FastDiv(int64_t divisor) : divisor_(uint64_t(divisor)) {
    while (shift_ < 63 && (uint64_t(1) << shift_) < divisor_) ++shift_;
    const Wide excess = (Wide(1) << shift_) - divisor_;
    magic_ = uint64_t((excess << 64) / divisor_) + 1;
    narrow_magic_ = shift_ < 32 ? uint32_t((excess << 32) / divisor_) + 1 : 0;
    narrow_limit_ = shift_ < 32 ? uint64_t(1) << 31 : 0;
  }

  constexpr int64_t divide(int64_t n) const {
    const uint64_t u = uint64_t(n);
    if (u < narrow_limit_) {
      const uint32_t low = uint32_t(u), high = uint32_t((u * narrow_magic_) >> 32);
      return int64_t((high + low) >> shift_);
    }
    return int64_t((uint64_t((Wide(u) * magic_) >> 64) + u) >> shift_);
  }
  constexpr int64_t divisor() const { return int64_t(divisor_); }

 private:
  uint64_t divisor_ = 1, magic_ = 1, narrow_limit_ = 0;
  uint32_t narrow_magic_ = 1;
  int32_t shift_ = 0;
};

// Cursors look at most this many elements ahead: the widest access.
constexpr int kNear = 8;

constexpr int near(int64_t n) { return n < kNear ? int(n) : kNear; }

// The group of one element and how many steps are left until it changes, cut off at kNear.
struct Cursor {
  int64_t group = 0;
  int run = kNear;   // elements left in this run, this one included
  int keep = kNear;  // groups left before the row ends
  int row = kNear;   // rows left in this batch

  constexpr bool same(int n) const { return run >= n; }  // the next n elements share the group
};

// Finds groups in a domain.
class Indexer {
 public:
  constexpr Indexer() : Indexer(Domain{}) {}
  constexpr explicit Indexer(const Domain& domain) : Indexer(simplify(domain), 0) {}

  constexpr Cursor at(int64_t e) const {
    const int64_t run = cols_.divide(e);
    const int left = near(cols_.divisor() - (e - run * cols_.divisor()));
    if (contiguous_) return {run, left, kNear, kNear};
    const int64_t line = keep_.divide(run), k = run - line * keep_.divisor();
    const int64_t batch = rows_.divide(line), row = line - batch * rows_.divisor();
    return {batch * keep_.divisor() + k, left, near(keep_.divisor() - k), near(rows_.divisor() - row)};
  }

  // To the next element; right for kNear steps after at().
  constexpr void advance(Cursor& c) const {
    if (--c.run > 0) return;
    c.run = near_cols_;
    ++c.group;
    if (contiguous_ || --c.keep > 0) return;
    c.keep = near_keep_;
    if (--c.row > 0)
      c.group -= keep_.divisor();  // the next row of the same groups
    else
      c.row = near_rows_;
  }

  // Whether the next n elements belong to n groups in a row.
  constexpr bool consecutive(const Cursor& c, int n) const { return near_cols_ == 1 && (contiguous_ || c.keep >= n); }

 private:
  constexpr Indexer(const Domain& d, int)
      : cols_(d.cols),
        keep_(d.keep),
        rows_(d.rows),
        near_cols_(near(d.cols)),
        near_keep_(near(d.keep)),
        near_rows_(near(d.rows)),
        contiguous_(d.rows == 1) {}

  FastDiv cols_, keep_, rows_;
  int near_cols_ = 1, near_keep_ = 1, near_rows_ = 1;
  bool contiguous_ = true;
};

}  // namespace normkern
