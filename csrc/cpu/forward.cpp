// forward.cpp: moments, and the map that follows them.
//
// Where a group, or a batch index of a strided domain, fits the cache, one task reduces and maps it (`fused`).
// Otherwise boxes are reduced to partial Spreads, which merge in the order of the boxes, and mapped in a second pass.
#include "layout.h"

namespace normkern::cpu {
namespace {

constexpr int64_t kFusedBytes = 1 << 20;  // of x that still is in a cache when it is mapped
constexpr int64_t kBlockBytes = 1 << 15;  // of the small groups that are reduced before they are mapped

// The moments of a box: its shifted sums folded into one Spread per group. For second moments the mean is 0.
template <class A>
class BoxMoments {
 public:
  BoxMoments(const Kernels<A>& kernels, const Layout& l, const void* x, bool centered)
      : kernels_(kernels), l_(l), x_(x), centered_(centered) {}

  // `sums` holds 3 * entries_of(box) numbers.
  void add(const Box& box, double* sums, Spread* spreads) const {
    const int64_t n = l_.entries_of(box), span = box.c1 - box.c0;
    const ShiftedSums s = {sums, sums + n, sums + 2 * n};
    std::fill_n(spreads, box.groups(), Spread{});
    if (l_.columns) return add_columns(box, s, spreads);
    if (span <= kMaxSum && (span == l_.stats.cols || box.groups() == 1)) return add_rows(box, s, spreads);
    for (int64_t k = box.k0; k < box.k1; ++k)
      for (int64_t c = box.c0; c < box.c1; c += kMaxSum)
        add_rows({box.b, box.r0, box.r1, k, k + 1, c, std::min(c + kMaxSum, box.c1)}, s, spreads + (k - box.k0));
  }

 private:
  void add_rows(Box box, ShiftedSums s, Spread* spreads) const {
    const int64_t end = box.r1, step = std::max<int64_t>(1, kMaxSum / (box.c1 - box.c0));
    for (; box.r0 < end; box.r0 += step) {
      box.r1 = std::min(end, box.r0 + step);
      const Runs r = l_.runs(box);
      kernels_.moments_runs(x_, r, centered_, s);
      for (int64_t k = 0; k < r.count; ++k)
        spreads[k] = merge(spreads[k], spread(double(r.length * r.lines), s.shift[k], s.sum[k], s.squares[k]));
    }
  }

  void add_columns(Box box, ShiftedSums s, Spread* spreads) const {
    const int64_t cols = l_.stats.cols, groups = box.groups(), end = box.r1;
    const int64_t step = std::max<int64_t>(1, kMaxSum / (l_.width / l_.stats.keep));
    for (; box.r0 < end; box.r0 += step) {
      box.r1 = std::min(end, box.r0 + step);
      const Columns c = l_.lines(box);
      kernels_.moments_columns(x_, c, centered_, cols, groups * cols, s);
      for (int64_t k = 0; k < groups; ++k) {
        int64_t count = 0;
        double sum = 0, squares = 0;
        for (int64_t from = k * cols; from < c.width; from += groups * cols) {
          for (int64_t j = from; j < from + cols; ++j) {
            sum += s.sum[j];
            squares += s.squares[j];
          }
          count += cols * c.lines + std::max<int64_t>(0, std::min(cols, c.tail - from));
        }
        spreads[k] = merge(spreads[k], spread(double(count), s.shift[k * cols], sum, squares));
      }
    }
  }

  Spread spread(double count, double shift, double sum, double squares) const {
    if (!centered_) return {count, 0, squares};
    const double m2 = squares - sum * (sum / count);
    return {count, shift + sum / count, m2 < 0 ? 0 : m2};
  }

  const Kernels<A>& kernels_;
  const Layout& l_;
  const void* x_;
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
        reduce_(kernels, l, a.x, p.moments == Moments::mean_var) {}

  void run() {
    const int64_t wanted = wanted_tasks(l_.stats.numel(), threads_);
    const bool contiguous = l_.stats.rows == 1, only_moments = a_.y == nullptr;
    const int64_t pieces = contiguous ? l_.stats.keep : l_.stats.batch;
    const int64_t bytes = (contiguous ? l_.stats.cols : l_.slice()) * size_of(p_.dtype);
    if (!only_moments) {
      weight_ = std::make_unique<Expanded<A>>(l_, a_.weight, A(1));
      bias_ = std::make_unique<Expanded<A>>(l_, a_.bias, A(0));
      elements_ = {a_.x,    nullptr,         a_.residual,   a_.y,   nullptr,
                   nullptr, weight_->data(), bias_->data(), p_.act, l_.by_line};
    }
    if (p_.moments == Moments::given) return given(wanted);
    if (pieces >= wanted && (bytes <= kFusedBytes || only_moments))
      return fused(wanted, pieces, std::max<int64_t>(1, bytes));
    split(wanted);
  }

 private:
  void given(int64_t wanted) {
    Centers<A> centers(l_.stats.batch * l_.entries_of_batch());
    with_type(a_.mean.dtype, [&](auto mean_type) {
      with_type(a_.var.dtype, [&](auto var_type) {
        const auto* mean = static_cast<const decltype(mean_type)*>(a_.mean.data);
        const auto* var = static_cast<const decltype(var_type)*>(a_.var.data);
        for (int64_t b = 0; b < l_.stats.batch; ++b)
          set_centers(l_, l_.whole(b), p_.eps, b * l_.entries_of_batch(), centers, [&](int64_t k) {
            const int64_t group = b * l_.stats.keep + k;
            return Spread{1, to_double(mean[group]), to_double(var[group])};
          });
      });
    });
    map_all(Grid(l_, wanted, false), centers);
  }

  void fused(int64_t wanted, int64_t pieces, int64_t bytes) {
    const bool contiguous = l_.stats.rows == 1;
    const int64_t step = contiguous ? std::max<int64_t>(1, std::min(ceil_div(pieces, wanted), kBlockBytes / bytes)) : 1;
    const int64_t entries = contiguous ? step : l_.entries_of_batch(), groups = contiguous ? step : l_.stats.keep;
    const auto sums = buffer<double>(wanted * entries * 3);
    const auto spreads = buffer<Spread>(wanted * groups);
    Centers<A> centers(wanted * entries);
    parallel(threads_, wanted, [&](int64_t task) {
      const int64_t end = Grid::cut(pieces, wanted, task + 1);
      for (int64_t i = Grid::cut(pieces, wanted, task); i < end; i += step) {
        Box box = l_.whole(contiguous ? 0 : i);
        if (contiguous) box.k0 = i, box.k1 = std::min(end, i + step);
        reduce_.add(box, sums.get() + task * entries * 3, spreads.get() + task * groups);
        finish(box, spreads.get() + task * groups, task * entries, centers);
        if (a_.y) map(box, centers.at(task * entries));
      }
    });
  }

  void split(int64_t wanted) {
    const Grid grid(l_, wanted, false);
    const int64_t most = grid.box_groups(), tasks = grid.count();
    const auto partials = buffer<Spread>(tasks * most);
    parallel(threads_, tasks, [&](int64_t task) {
      Spread* to = partials.get() + task * most;
      const auto sums = buffer<double>(3 * l_.entries_of(grid.box(task, 0)));
      for (int64_t b = grid.first_batch(task); b < grid.last_batch(task); ++b) {
        const Box box = grid.box(task, b);
        reduce_.add(box, sums.get(), to);
        to += box.groups();
      }
    });
    Centers<A> centers(l_.stats.batch * l_.entries_of_batch());
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
    set_centers(l_, box, p_.eps, first, centers, [&](int64_t k) {
      const int64_t group = box.b * l_.stats.keep + box.k0 + k;
      const Spread s = {1, spreads[k].mean, spreads[k].m2 / spreads[k].count};
      if (a_.mean_out && p_.moments == Moments::mean_var) a_.mean_out[group] = s.mean;
      if (a_.var_out) a_.var_out[group] = s.m2;
      return s;
    });
  }

  void map_all(const Grid& grid, const Centers<A>& centers) {
    parallel(threads_, grid.count(), [&](int64_t task) {
      for (int64_t b = grid.first_batch(task); b < grid.last_batch(task); ++b) {
        const Box box = grid.box(task, b);
        map(box, centers.at(b * l_.entries_of_batch() + l_.first_entry(box)));
      }
    });
  }

  void map(const Box& box, Center<A> center) const {
    Elements<A> e = elements_;
    if (!l_.columns) return kernels_.map_runs(e, l_.runs(box), l_.lookup, center);
    e.weight += l_.first_weight(box);
    e.bias += l_.first_weight(box);
    kernels_.map_columns(e, l_.lines(box), center);
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

void forward(const Problem& p, const ForwardArgs& a, const Threads& threads) {
  if (p.stats.numel() == 0) return;
  const Layout l(p, a.weight.data || a.bias.data);
  const KernelTable& table = kernels();
  switch (p.dtype) {
    case DType::f32: return Forward<double>(table.f32, p, l, a, threads).run();
    case DType::f64: return Forward<double>(table.f64, p, l, a, threads).run();
    case DType::f16: return Forward<float>(table.f16, p, l, a, threads).run();
    case DType::bf16: return Forward<float>(table.bf16, p, l, a, threads).run();
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
