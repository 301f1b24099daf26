// forward.cpp: moments, and the map that follows them.
//
// A tile is as many groups as fit the cache; one task reduces and maps it (`fused`), so x comes from memory once.
// Where there are fewer groups than threads, or where lines of many short runs are walked whole, boxes are reduced to
// partial Spreads, which merge in the order of the boxes, and mapped in a second pass.
#include "layout.h"

namespace normkern::cpu {
namespace {

// The moments of a box: its shifted sums folded into one Spread per group. For second moments the mean is 0.
template <class A>
class BoxMoments {
 public:
  // Where one task keeps the sums of boxes of up to `entries` entries; `exact` is made when it is first needed.
  struct Scratch {
    int64_t numbers;
    Buffer<A> quick;
    Buffer<double> wide, exact;
    Buffer<Spread> found;
    GroupMoments<double> moments;
    bool summed = false;  // the sums of the box that add() is asked about are there
    Scratch(const Layout& l, int64_t entries)
        : numbers(entries * (1 + lanes(l))),
          quick(buffer<A>(numbers)),
          wide(buffer<double>(entries * 4)),
          found(buffer<Spread>(entries)),
          moments{wide.get() + 2 * entries, wide.get() + 3 * entries} {}
    ShiftedSums<A> sums(int64_t n) const { return {quick.get(), quick.get() + n, wide.get(), wide.get() + n}; }
    static int64_t lanes(const Layout& l) { return l.columns || l.stats.rows == 1 ? 0 : 3 * kMaxLanes; }
  };

  BoxMoments(const Kernels<A>& kernels, const Layout& l, const void* x, DType dtype, bool centered)
      : kernels_(kernels), l_(l), x_(x), dtype_(dtype), centered_(centered) {}

  // Centers of the groups of a box, and their moments in the scratch, at once. False where that cannot be; if the sums
  // were not good, they are what add() goes on from.
  bool center(const Box& box, double eps, Scratch& scratch, const RunCenters<A>& to) const {
    scratch.summed = false;
    const int64_t count = l_.stats.count();
    if (l_.columns || count > kMaxSum || !fills_lanes()) return false;
    const ShiftedSums<A> sums = scratch.sums(box.groups());
    run(kernels_.moments_runs, kernels_.moments_columns, box, true, sums);
    scratch.summed = true;
    return kernels_.centers_of_sums(box.groups(), sums, double(count), eps, centered_, scratch.moments, to);
  }

  void add(const Box& box, Scratch& scratch, Spread* spreads) const {
    std::fill_n(spreads, box.groups(), Spread{});
    const int64_t per_row = l_.columns ? l_.width / l_.stats.keep : box.c1 - box.c0;
    const int64_t step = std::max<int64_t>(1, kMaxSum / per_row);
    for (Box part = box; part.r0 < box.r1; part.r0 = part.r1) {
      part.r1 = std::min(box.r1, part.r0 + step);
      for (part.c0 = box.c0; part.c0 < box.c1; part.c0 = part.c1) {
        part.c1 = l_.columns ? box.c1 : std::min(box.c1, part.c0 + kMaxSum);
        add_part(part, scratch, spreads);
      }
    }
  }

 private:
  // Runs too short for all lanes of a pack make long sums in the others.
  bool fills_lanes() const { return l_.columns || l_.stats.rows == 1 || l_.stats.cols >= kMaxLanes; }

  // Whether float32 sums around this shift are good.
  bool good(const Spread& s, double shift) const {
    const double off = s.mean - shift;
    return s.m2 >= kLeastVar * s.count && s.m2 <= kMostVar * s.count &&
           (!centered_ || off * off * s.count <= kFarShift * s.m2);
  }

  void add_part(const Box& part, Scratch& scratch, Spread* spreads) const {
    const int64_t n = l_.entries_of(part), groups = part.groups(), cols = l_.columns ? l_.stats.cols : 1;
    const ShiftedSums<A> quick = scratch.sums(n);
    double* sum = quick.sum;
    if (!scratch.summed) run(kernels_.moments_runs, kernels_.moments_columns, part, true, quick);
    bool all_good = fills_lanes();
    Spread* found = scratch.found.get();
    for (int64_t k = 0; k < groups; ++k) {
      const double shift = quick.shift[k * cols];
      found[k] = spread(part, k, shift, sum);
      all_good = all_good && good(found[k], shift);
    }
    if (all_good) {
      for (int64_t k = 0; k < groups; ++k) spreads[k] = merge(spreads[k], found[k]);
      return;
    }
    // Once more in float64, from the mean that was found or, if none was, from a value.
    if (!scratch.exact) scratch.exact = buffer<double>(scratch.numbers);
    ShiftedSums<double> exact = {scratch.exact.get(), scratch.exact.get() + n, sum, sum + n};
    for (int64_t k = 0; k < groups; ++k) {
      double shift = found[k].mean;
      if (!std::isfinite(shift)) shift = element({x_, dtype_}, first_of(part, k));
      for (int64_t j = k * cols; j < (k + 1) * cols; ++j) exact.shift[j] = shift;
    }
    for (int64_t j = groups * cols; j < n; ++j) exact.shift[j] = exact.shift[j - groups * cols];
    run(kernels_.exact_moments_runs, kernels_.exact_moments_columns, part, false, exact);
    for (int64_t k = 0; k < groups; ++k) spreads[k] = merge(spreads[k], spread(part, k, exact.shift[k * cols], sum));
  }

  int64_t first_of(const Box& part, int64_t k) const {
    return (l_.columns ? l_.lines(part).first : l_.runs(part).first) + k * l_.stats.cols;
  }

  template <class OfRuns, class OfColumns, class S>
  void run(OfRuns of_runs, OfColumns of_columns, const Box& part, bool pick, ShiftedSums<S> s) const {
    if (l_.columns)
      of_columns(x_, l_.lines(part), centered_, pick, l_.stats.cols, part.groups() * l_.stats.cols, s);
    else
      of_runs(x_, l_.runs(part), centered_, pick, s);
  }

  // Of group k of a part, from the sums of its entries.
  Spread spread(const Box& part, int64_t k, double shift, const double* sums) const {
    const int64_t n = l_.entries_of(part), cols = l_.stats.cols;
    double count = 0, sum = 0, squares = 0;
    if (!l_.columns) {
      count = double((part.c1 - part.c0) * (part.r1 - part.r0));
      sum = sums[k];
      squares = sums[n + k];
    } else {
      const Columns c = l_.lines(part);
      for (int64_t from = k * cols; from < c.width; from += part.groups() * cols) {
        for (int64_t j = from; j < from + cols; ++j) {
          sum += sums[j];
          squares += sums[n + j];
        }
        count += double(cols * c.lines + std::max<int64_t>(0, std::min(cols, c.tail - from)));
      }
    }
    if (!centered_) return {count, 0, squares};
    const double mean = sum / count, m2 = squares - sum * mean;
    return {count, shift + mean, m2 < 0 ? 0 : m2};
  }

  const Kernels<A>& kernels_;
  const Layout& l_;
  const void* x_;
  DType dtype_;
  bool centered_;
};

template <class A>
class Forward {
 public:
  Forward(const Kernels<A>& kernels, const Problem& p, const Layout& l, const ForwardArgs& a, const Threads& threads)
      : kernels_(kernels),
        p_(p),
        l_(l),
        a_(a),
        threads_(threads),
        reduce_(kernels, l, a.add ? a.total : a.x, p.dtype, p.moments == Moments::mean_var) {}

  void run(int64_t written) {
    const int64_t wanted = wanted_tasks(l_.stats.numel(), threads_), bytes = l_.stats.numel() * size_of(p_.dtype);
    if (a_.y) {
      weight_ = std::make_unique<Expanded<A>>(l_, a_.weight, A(1));
      bias_ = std::make_unique<Expanded<A>>(l_, a_.bias, A(0));
      elements_.x = a_.add ? a_.total : a_.x;
      elements_.residual = a_.residual;
      elements_.y = a_.y;
      elements_.weight = weight_->data();
      elements_.bias = bias_->data();
      elements_.act = p_.act;
      elements_.by_line = l_.by_line;
      elements_.stream = std::max(bytes, written) >= kStreamBytes;
    }
    if (p_.moments == Moments::given) return given(wanted);
    const Tiles tiles(l_, size_of(p_.dtype), wanted);
    tiles.balanced(wanted) ? fused(wanted, tiles) : split(wanted);
  }

 private:
  void given(int64_t wanted) {
    Centers<A> centers(l_, l_.stats.batch * l_.entries_of_batch());
    for (int64_t b = 0; b < l_.stats.batch; ++b) {
      const Box box = l_.whole(b);
      centers.read(kernels_, l_, box, p_.eps, b * l_.entries_of_batch(), elements(box), a_.mean, a_.var);
    }
    map_all(Grid(l_, wanted, false), centers);
  }

  void fused(int64_t wanted, const Tiles& tiles) {
    const int64_t entries = tiles.most_entries();
    elements_.ahead = tiles.pitch(size_of(p_.dtype));
    const auto spreads = buffer<Spread>(wanted * tiles.keeps);
    Centers<A> centers(l_, wanted * entries);
    parallel(threads_, wanted, [&](int64_t task) {
      typename BoxMoments<A>::Scratch scratch(l_, entries);
      Spread* found = spreads.get() + task * tiles.keeps;
      const int64_t end = Grid::cut(tiles.count(), wanted, task + 1);
      for (int64_t i = Grid::cut(tiles.count(), wanted, task); i < end; ++i) {
        const Box box = tiles.box(i);
        add(box);
        if (reduce_.center(box, p_.eps, scratch, centers.runs_at(task * entries))) {
          write(box, scratch.moments);
        } else {
          reduce_.add(box, scratch, found);
          finish(box, found, task * entries, centers);
        }
        if (a_.y) from_end(l_, box, size_of(p_.dtype), [&](const Box& part) { map(part, centers.at(task * entries)); });
      }
    });
  }

  void split(int64_t wanted) {
    const Grid grid(l_, wanted, false);
    const int64_t most = grid.box_groups(), tasks = grid.count();
    const auto partials = buffer<Spread>(tasks * most);
    parallel(threads_, tasks, [&](int64_t task) {
      Spread* to = partials.get() + task * most;
      typename BoxMoments<A>::Scratch scratch(l_, grid.most_entries());
      for (int64_t b = grid.first_batch(task); b < grid.last_batch(task); ++b) {
        const Box box = grid.box(task, b);
        add(box);
        reduce_.add(box, scratch, to);
        to += box.groups();
      }
    });
    Centers<A> centers(l_, l_.stats.batch * l_.entries_of_batch());
    // Boxes of the same groups merge in order, whoever reduced them.
    parallel(threads_, grid.batches * grid.keeps, [&](int64_t i) {
      const int64_t first = i / grid.keeps * (grid.rows * grid.keeps * grid.cols) + i % grid.keeps * grid.cols;
      const auto merged = buffer<Spread>(most);
      int64_t offset = 0;
      for (int64_t b = grid.first_batch(first); b < grid.last_batch(first); ++b) {
        const Box box = grid.box(first, b);
        for (int64_t k = 0; k < box.groups(); ++k) {
          Spread s;
          for (int64_t r = 0; r < grid.rows; ++r)
            for (int64_t c = 0; c < grid.cols; ++c)
              s = merge(s, partials[(first + r * grid.keeps * grid.cols + c) * most + offset + k]);
          merged[k] = s;
        }
        offset += box.groups();
        finish(box, merged.get(), b * l_.entries_of_batch() + l_.first_entry(box), centers);
      }
    });
    if (a_.y) map_all(grid, centers);
  }

  // Moments to the caller and to the entries of `centers` from `first` on.
  void finish(const Box& box, const Spread* spreads, int64_t first, Centers<A>& centers) {
    const auto moments_of = [&](int64_t k) {
      const int64_t group = box.b * l_.stats.keep + box.k0 + k;
      const Spread s = {1, spreads[k].mean, spreads[k].m2 / spreads[k].count};
      if (a_.mean_out && p_.moments == Moments::mean_var) a_.mean_out[group] = s.mean;
      if (a_.var_out) a_.var_out[group] = s.m2;
      return s;
    };
    if (a_.y) return centers.set(l_, box, p_.eps, first, elements(box), moments_of);
    for (int64_t k = 0; k < box.groups(); ++k) moments_of(k);
  }

  void write(const Box& box, const GroupMoments<double>& moments) const {
    const int64_t first = box.b * l_.stats.keep + box.k0, n = box.groups();
    if (a_.mean_out && p_.moments == Moments::mean_var) std::copy_n(moments.mean, n, a_.mean_out + first);
    if (a_.var_out) std::copy_n(moments.var, n, a_.var_out + first);
  }

  void map_all(const Grid& grid, const Centers<A>& centers) {
    parallel(threads_, grid.count(), [&](int64_t task) {
      for (int64_t b = grid.first_batch(task); b < grid.last_batch(task); ++b) {
        const Box box = grid.box(task, b);
        map(box, centers.at(b * l_.entries_of_batch() + l_.first_entry(box)));
      }
    });
  }

  Elements<A> elements(const Box& box) const { return at_box(elements_, l_, box); }

  // x + add of a box becomes what is reduced, from the cache.
  void add(const Box& box) const {
    if (!a_.add) return;
    if (!l_.columns) return kernels_.add_runs(a_.x, a_.add, a_.total, l_.runs(box));
    const Columns c = l_.lines(box);
    kernels_.add_runs(a_.x, a_.add, a_.total, {c.first, c.width, 1, c.width, c.lines, c.stride});
    if (c.tail > 0) kernels_.add_runs(a_.x, a_.add, a_.total, {c.first + c.lines * c.stride, c.tail, 1, c.tail, 1, 0});
  }

  void map(const Box& box, Center<A> center) const {
    if (l_.columns) return kernels_.map_columns(elements(box), l_.lines(box), center);
    kernels_.map_runs(elements_, l_.runs(box), l_.lookup, center);
  }

  const Kernels<A>& kernels_;
  const Problem& p_;
  const Layout& l_;
  const ForwardArgs& a_;
  const Threads& threads_;
  BoxMoments<A> reduce_;
  std::unique_ptr<Expanded<A>> weight_, bias_;
  Elements<A> elements_{};
};

}  // namespace

void forward(const Problem& p, const ForwardArgs& a, const Threads& threads, int64_t written) {
  if (p.stats.numel() == 0) return;
  const Layout l(p, a.weight.data || a.bias.data);
  const KernelTable& table = kernels();
  switch (p.dtype) {
    case DType::f32: return Forward<float>(table.f32, p, l, a, threads).run(written);
    case DType::f64: return Forward<double>(table.f64, p, l, a, threads).run(written);
    case DType::f16: return Forward<float>(table.f16, p, l, a, threads).run(written);
    case DType::bf16: return Forward<float>(table.bf16, p, l, a, threads).run(written);
  }
}

void moments(const Problem& p, const MomentsArgs& a, const Threads& threads) {
  ForwardArgs f;
  f.x = a.x;
  f.mean_out = a.mean_out;
  f.var_out = a.var_out;
  forward(p, f, threads);
}

}  // namespace normkern::cpu
