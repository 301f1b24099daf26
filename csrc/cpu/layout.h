// layout.h: how a problem is walked: in runs or in columns, box by box, with the weights in a form to match.
//
// A statistics group with long runs is walked run by run. Where runs are short (channels-last) whole lines are walked,
// with one entry of every per-group vector per column of the line. A box is the part of one batch index that a thread
// takes at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "../core/accumulate.h"
#include "../core/arguments.h"
#include "../core/half.h"
#include "entry.h"
#include "kernels.h"
#include "types.h"

namespace normkern::cpu {

constexpr int64_t kShortRun = 32;          // shorter runs are walked by columns
constexpr int64_t kMinLine = 64;           // shorter lines are repeated into one longer line
constexpr int64_t kMaxColumns = 4096;      // columns of a box: their vectors stay in the L2 cache
constexpr int64_t kMaxSum = 1 << 16;       // elements of one shifted sum (sums.h)
constexpr int64_t kTileBytes = 1 << 18;    // of x, or of x and dy, that one task walks twice at a time
constexpr int64_t kFarBytes = 1 << 20;     // larger ones are not in the L2 cache
constexpr int64_t kStreamBytes = 1 << 24;  // larger results go past the caches
constexpr int64_t kGrain = 1 << 14;        // elements that are worth a thread

template <class T>
using Buffer = std::unique_ptr<T[]>;

// Uninitialized.
template <class T>
Buffer<T> buffer(int64_t n) {
  return Buffer<T>(new T[n]);
}

template <class Task>
void parallel(const Threads& threads, int64_t tasks, Task&& task) {
  if (tasks == 1 || !threads.run) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  using State = std::remove_reference_t<Task>;
  threads.run(tasks, [](void* state, int64_t i) { (*static_cast<State*>(state))(i); }, &task);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [r0, r1), groups [k0, k1) and columns [c0, c1) of batch index b. With columns, rows are lines of `width`.
struct Box {
  int64_t b, r0, r1, k0, k1, c0, c1;
  int64_t groups() const { return k1 - k0; }
};

struct Layout {
  Domain stats;   // simplified, and a contiguous one as one batch of many `keep`
  Domain affine;  // simplified
  bool columns = false;
  bool by_line = false;  // columns: a weight for each line or several, as for layer norm over outer dimensions
  int64_t line = 0;      // elements of a line of stats
  int64_t width = 0;     // columns: elements of the lines walked, a multiple of `line`
  int64_t rows = 0;      // rows of a batch index, or with columns its whole walked lines
  int64_t tail = 0;      // columns: elements after the last whole line
  Lookup lookup{};       // runs: where weights are
  int64_t entries = 0;   // weights in the form that kernels read
  bool far = false;      // x comes from memory

  Layout(const Problem& p, bool has_affine);

  Box whole(int64_t b) const { return {b, 0, rows, 0, stats.keep, 0, stats.cols}; }
  int64_t slice() const { return stats.rows * line; }
  // Entries of per-group vectors: of one box, of one batch index.
  int64_t entries_of(const Box& x) const {
    return columns ? (x.groups() == stats.keep ? width : x.groups() * stats.cols) : x.groups();
  }
  int64_t entries_of_batch() const { return columns ? width : stats.keep; }
  int64_t first_entry(const Box& x) const { return columns ? x.k0 * stats.cols : x.k0; }
  // Neighbouring entries with one weight.
  int64_t entries_per_weight() const {
    if (columns) return by_line ? affine.cols / line : affine.cols;
    return lookup.by_element ? affine.cols : 1;
  }
  int64_t first_weight(const Box& x) const { return by_line ? x.r0 : first_entry(x); }

  Runs runs(const Box& x) const {
    return {((x.b * stats.rows + x.r0) * stats.keep + x.k0) * stats.cols + x.c0,
            x.c1 - x.c0,
            x.groups(),
            stats.cols,
            x.r1 - x.r0,
            line};
  }
  Columns lines(const Box& x) const {
    const bool last = x.r1 == rows;
    return {x.b * slice() + x.r0 * width + x.k0 * stats.cols, entries_of(x), x.r1 - x.r0, width, last ? tail : 0, far};
  }
};

inline Layout::Layout(const Problem& p, bool has_affine) : stats(simplify(p.stats)), affine(simplify(p.affine)) {
  if (stats.rows == 1) stats = {1, 1, stats.batch, stats.cols};
  line = stats.keep * stats.cols;
  far = p.stats.numel() * size_of(p.dtype) >= kFarBytes;
  const bool same_line =
      affine.batch == 1 && affine.rows > 1 && affine.keep * affine.cols == line && stats.cols % affine.cols == 0;
  const int64_t period = affine.rows == 1 ? affine.numel() : affine.keep * affine.cols;
  by_line = has_affine && !same_line && stats.rows > 1 && stats.cols < kShortRun && affine.cols % line == 0 &&
            period == slice() && (affine.rows == 1 || affine.batch == 1);
  columns = stats.rows > 1 && (same_line || by_line || !has_affine) &&
            (stats.cols < kShortRun || (has_affine && affine.cols < kShortRun && line <= kMaxColumns));
  if (columns) {
    width = by_line ? line : line * std::min(stats.rows, line < kMinLine ? ceil_div(kMinLine, line) : 1);
    rows = slice() / width;
    tail = slice() - rows * width;
    entries = by_line ? stats.rows : width;
    return;
  }
  rows = stats.rows;
  if (!has_affine) {
    lookup = {1, 1, stats.numel(), false};
    entries = 1;
  } else if (affine.rows == 1 && affine.cols == 1) {
    lookup = {1, 1, stats.numel(), true};
    entries = stats.numel();
  } else if (affine.rows > 1 && affine.cols < kShortRun) {
    lookup = {affine.rows, 1, affine.keep * affine.cols, true};
    entries = affine.batch * lookup.length;
  } else {
    lookup = {affine.rows, affine.keep, affine.cols, false};
    entries = affine.groups();
  }
}

// Calls use(part) for the parts of a box that was just read from its start to its end, from the last to the first: what
// is left of it in the cache is used before it goes. Columns came no sooner that way.
template <class Use>
void from_end(const Layout& l, const Box& box, int64_t bytes_per_element, Use use) {
  const int64_t row = bytes_per_element * box.groups() * (box.c1 - box.c0);
  if (l.columns || (box.r1 - box.r0) * row < kFarBytes) return use(box);
  const auto parts = [](int64_t from, int64_t to, int64_t bytes_each, auto part) {
    const int64_t step = std::max<int64_t>(1, kTileBytes / bytes_each);
    for (int64_t end = to; end > from; end -= step) part(std::max(from, end - step), end);
  };
  Box part = box;
  if (box.r1 - box.r0 > 1) {
    parts(box.r0, box.r1, row, [&](int64_t r0, int64_t r1) {
      part.r0 = r0;
      part.r1 = r1;
      use(part);
    });
  } else {
    parts(box.c0, box.c1, bytes_per_element * box.groups(), [&](int64_t c0, int64_t c1) {
      part.c0 = c0;
      part.c1 = c1;
      use(part);
    });
  }
}

// Boxes for about `wanted` threads: split where it costs least first. With `share_weights`, tasks rather take the same
// columns of many groups than many columns of one: weight gradients then need less room.
struct Grid {
  const Layout& layout;
  int64_t batches = 1, rows = 1, keeps = 1, cols = 1;

  Grid(const Layout& l, int64_t wanted, bool share_weights) : layout(l) {
    const auto split = [&](int64_t extent) {
      const int64_t parts = std::max<int64_t>(1, std::min(extent, wanted));
      wanted = ceil_div(wanted, parts);
      return parts;
    };
    batches = split(l.stats.batch);
    if (l.columns) {
      keeps = l.width == l.line ? std::min(l.stats.keep, ceil_div(l.width, kMaxColumns)) : 1;
      wanted = ceil_div(wanted, keeps);
      rows = split(l.rows);
      if (l.width == l.line) keeps = std::min({l.stats.keep, keeps * wanted, std::max(keeps, l.width / kMinLine)});
      return;
    }
    rows = split(l.stats.rows);
    if (share_weights && l.stats.rows == 1 && l.lookup.by_element) cols = split(l.stats.cols / kMaxColumns);
    keeps = split(l.stats.keep);
    if (cols == 1) cols = split(l.stats.cols / kMaxColumns);
  }

  int64_t count() const { return batches * rows * keeps * cols; }
  static int64_t cut(int64_t extent, int64_t parts, int64_t i) {
    return extent / parts * i + std::min(i, extent % parts);
  }
  int64_t first_batch(int64_t task) const { return cut(layout.stats.batch, batches, task / (rows * keeps * cols)); }
  int64_t last_batch(int64_t task) const { return cut(layout.stats.batch, batches, task / (rows * keeps * cols) + 1); }
  Box box(int64_t task, int64_t b) const {
    const int64_t c = task % cols, k = task / cols % keeps, r = task / (cols * keeps) % rows;
    return {b,
            cut(layout.rows, rows, r),
            cut(layout.rows, rows, r + 1),
            cut(layout.stats.keep, keeps, k),
            cut(layout.stats.keep, keeps, k + 1),
            cut(layout.stats.cols, cols, c),
            cut(layout.stats.cols, cols, c + 1)};
  }
  int64_t box_groups() const { return ceil_div(layout.stats.batch, batches) * ceil_div(layout.stats.keep, keeps); }
  int64_t most_entries() const { return layout.columns ? layout.width : ceil_div(layout.stats.keep, keeps); }
};

// Whole groups, as many as fit the cache, that one task walks twice: x is then read from memory once. With columns a
// tile is a batch index.
struct Tiles {
  const Layout& layout;
  int64_t keeps, per_batch;

  Tiles(const Layout& l, int64_t bytes_per_element, int64_t wanted) : layout(l), keeps(l.stats.keep) {
    if (!l.columns) {
      const int64_t bytes = std::max<int64_t>(1, l.stats.count() * bytes_per_element);
      keeps = std::max<int64_t>(1, std::min(kTileBytes / bytes, l.stats.groups() / wanted));
      keeps = std::min(keeps, l.stats.keep);
      // As many for every task.
      if (l.stats.batch % wanted != 0)
        keeps = ceil_div(l.stats.keep, ceil_div(ceil_div(l.stats.keep, keeps), wanted) * wanted);
    }
    per_batch = ceil_div(l.stats.keep, keeps);
  }
  int64_t count() const { return layout.stats.batch * per_batch; }
  // Every task gets about as much.
  bool balanced(int64_t wanted) const { return count() % wanted == 0 || count() >= 4 * wanted; }
  Box box(int64_t i) const {
    Box x = layout.whole(i / per_batch);
    x.k0 = i % per_batch * keeps;
    x.k1 = std::min(layout.stats.keep, x.k0 + keeps);
    return x;
  }
  // The union of the tiles [i, j): with more than one batch index, all groups.
  Box boxes(int64_t i, int64_t j) const {
    Box x = box(i);
    if (i / per_batch == (j - 1) / per_batch)
      x.k1 = box(j - 1).k1;
    else
      x.k0 = 0, x.k1 = layout.stats.keep;
    return x;
  }
  int64_t most_entries() const { return layout.columns ? layout.width : keeps; }
  // Elements from a tile to the next one, if both find room in the cache.
  int64_t pitch(int64_t bytes_per_element) const {
    const bool large = keeps * layout.stats.count() * bytes_per_element >= kFarBytes;
    return layout.columns || per_batch == 1 || large ? 0 : keeps * layout.stats.cols;
  }
};

inline int64_t wanted_tasks(int64_t numel, const Threads& threads) {
  return std::max<int64_t>(1, std::min(threads.count, numel / kGrain));
}

// ---- parameters ----

inline double to_double(float v) { return v; }
inline double to_double(double v) { return v; }
inline double to_double(f16 v) { return to_float(v); }
inline double to_double(bf16 v) { return to_float(v); }
inline void from_double(double v, float& to) { to = float(v); }
inline void from_double(double v, double& to) { to = v; }
inline void from_double(double v, f16& to) { to = to_f16(v); }
inline void from_double(double v, bf16& to) { to = to_bf16(v); }

inline double element(Param from, int64_t i) {
  double v = 0;
  with_type(from.dtype, [&](auto type) { v = to_double(static_cast<const decltype(type)*>(from.data)[i]); });
  return v;
}

// n elements from `first` on: the caller's own where they are doubles already. Of none, null.
class AsDoubles {
 public:
  AsDoubles(Param from, int64_t first, int64_t n) {
    if (!from.data) return;
    if (from.dtype == DType::f64) {
      data_ = static_cast<const double*>(from.data) + first;
      return;
    }
    owned_ = buffer<double>(n);
    data_ = owned_.get();
    with_type(from.dtype, [&](auto type) {
      const auto* values = static_cast<const decltype(type)*>(from.data) + first;
      for (int64_t i = 0; i < n; ++i) owned_[i] = to_double(values[i]);
    });
  }
  const double* data() const { return data_; }

 private:
  Buffer<double> owned_;
  const double* data_ = nullptr;
};

template <class A>
constexpr DType kDTypeOf = sizeof(A) == 8 ? DType::f64 : DType::f32;

// NaNs of some devices have all bits set; rounding such a float32 to bfloat16 would carry into its sign and make a
// zero.
template <class A>
A canonical(A v) {
  return v != v ? std::numeric_limits<A>::quiet_NaN() : v;
}

// Weights or biases with an entry for each that the kernels read: the caller's own where they already are that.
template <class A>
class Expanded {
 public:
  Expanded(const Layout& l, Param param, A missing) {
    if (param.data && param.dtype == kDTypeOf<A> && l.entries == l.affine.groups() && l.entries_per_weight() == 1) {
      data_ = static_cast<const A*>(param.data);
      if (std::none_of(data_, data_ + l.entries, [](A v) { return v != v; })) return;
    }
    owned_ = buffer<A>(l.entries);
    A* const to = owned_.get();
    data_ = to;
    if (!param.data) {
      std::fill_n(to, l.entries, missing);
      return;
    }
    const int64_t groups = l.affine.groups(), per_weight = l.entries_per_weight(), period = groups * per_weight;
    // What is read lies behind what is made of it, until the last is written.
    A* const values = to + (period - groups);
    read(param, groups, values);
    for (int64_t g = 0; g < groups && per_weight > 1; ++g) std::fill_n(to + g * per_weight, per_weight, values[g]);
    for (int64_t i = period; i < l.entries; i += period) std::copy_n(to, std::min(period, l.entries - i), to + i);
  }
  const A* data() const { return data_; }

 private:
  static void read(Param from, int64_t n, A* to) {
    if constexpr (sizeof(A) == 4) return kernels().read_floats(from.data, from.dtype, n, to);
    with_type(from.dtype, [&](auto type) {
      const auto* values = static_cast<const decltype(type)*>(from.data);
      for (int64_t i = 0; i < n; ++i) to[i] = canonical(A(to_double(values[i])));
    });
  }

  Buffer<A> owned_;
  const A* data_ = nullptr;
};

// The elements as the loops over a box take them: with columns, weights begin at its first entry.
template <class A>
Elements<A> at_box(Elements<A> e, const Layout& l, const Box& box) {
  if (l.columns) {
    e.weight += l.first_weight(box);
    e.bias += l.first_weight(box);
  }
  return e;
}

// Vectors that say how x is normalized, with an entry per group or per column.
template <class A>
class Centers {
 public:
  Centers(const Layout& l, int64_t n) : columns_(l.columns), n_(n), vectors_(buffer<A>(n * (columns_ ? 5 : 3))) {}
  Center<A> at(int64_t i) const {
    const A* v = vectors_.get() + i;
    return {v, v + n_, v + 2 * n_, columns_ ? v + 3 * n_ : nullptr, columns_ ? v + 4 * n_ : nullptr};
  }

  RunCenters<A> runs_at(int64_t i) {
    A* v = vectors_.get() + i;
    return {v, v + n_, v + 2 * n_};
  }

  // Sets the entries of a box, from `first` on: moments_of(k) is called once for each of its groups and returns a
  // Spread of count 1, that is mean and variance. `weight` and `bias` are those of columns.
  template <class MomentsOf>
  void set(const Layout& l, const Box& x, double eps, int64_t first, const Elements<A>& e, MomentsOf moments_of) {
    A *mean = vectors_.get() + first, *low = mean + n_, *rstd = low + n_;
    const int64_t cols = columns_ ? l.stats.cols : 1;
    for (int64_t k = 0; k < x.groups(); ++k) {
      const Spread s = moments_of(k);
      const A m = canonical(A(s.mean)), rest = A(s.mean - double(m)), r = canonical(A(1 / std::sqrt(s.m2 + eps)));
      for (int64_t j = k * cols; j < (k + 1) * cols; ++j) {
        mean[j] = m;
        low[j] = rest;
        rstd[j] = r;
      }
    }
    if (columns_) finish_columns(l, x, first, e);
  }

  // The same from moments as they are in memory; without means these are 0.
  void read(const Kernels<A>& kernels, const Layout& l, const Box& x, double eps, int64_t first, const Elements<A>& e,
            Param mean, Param var) {
    const int64_t n = x.groups(), group = x.b * l.stats.keep + x.k0;
    const AsDoubles means(mean, group, n), vars(var, group, n);
    if (columns_ && l.stats.cols > 1)
      return set(l, x, eps, first, e,
                 [&](int64_t k) { return Spread{1, means.data() ? means.data()[k] : 0, vars.data()[k]}; });
    kernels.centers_of_moments(n, {means.data(), vars.data()}, eps, runs_at(first));
    if (columns_) finish_columns(l, x, first, e);
  }

 private:
  // The columns after those of the first groups, and the affine step.
  void finish_columns(const Layout& l, const Box& x, int64_t first, const Elements<A>& e) {
    A *mean = vectors_.get() + first, *low = mean + n_, *rstd = low + n_;
    const int64_t n = x.groups() * l.stats.cols, all = l.entries_of(x);
    for (int64_t j = n; j < all; ++j) {
      mean[j] = mean[j - n];
      low[j] = low[j - n];
      rstd[j] = rstd[j - n];
    }
    A *scale = rstd + n_, *shift = scale + n_;
    for (int64_t j = 0; j < all; ++j) {
      scale[j] = l.by_line ? rstd[j] : rstd[j] * e.weight[j];
      shift[j] = (l.by_line ? 0 : e.bias[j]) - low[j] * scale[j];
    }
  }

  bool columns_;
  int64_t n_;
  Buffer<A> vectors_;
};

}  // namespace normkern::cpu
