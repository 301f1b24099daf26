// backward.cpp: two sums over every statistics group give dx, two over every weight give dweight and dbias.
//
// Both pairs come from one sweep. Tasks add weight gradients to a float64 share of their own, and the shares are added
// up in the order of the tasks. As in forward.cpp, one task does both sweeps where x and dy stay in the cache.
#include <vector>

#include "layout.h"

namespace normkern::cpu {
namespace {

constexpr int64_t kKeptBytes = 1 << 23;  // of dz, for one task
constexpr int64_t kWideRow = 1 << 15;    // elements; shares of longer rows of weights would leave the cache

template <class A>
class Backward {
 public:
  Backward(const Kernels<A>& kernels, const Problem& p, const Layout& l, const BackwardArgs& a, const Threads& threads)
      : kernels_(kernels),
        p_(p),
        l_(l),
        a_(a),
        threads_(threads),
        weight_(l, a.weight, A(1)),
        bias_(l, a.bias, A(0)),
        elements_{a.x,         a.dy,           p.act == Act::none ? nullptr : a.residual,
                  a.dtotal,    nullptr,        a.dx,
                  a.dresidual, weight_.data(), bias_.data(),
                  p.act,       l.by_line,      l.stats.numel() * size_of(p.dtype) >= kStreamBytes,
                  0,           nullptr,        false},
        wants_weights_(a.dweight.data || a.dbias.data),
        wants_sums_(a.dx && p.moments != Moments::given) {}

  void run(int64_t written) {
    elements_.stream = elements_.stream || written >= kStreamBytes;
    const int64_t wanted = wanted_tasks(l_.stats.numel(), threads_);
    if (p_.moments == Moments::given && p_.act == Act::none && !a_.dresidual) {
      const int64_t n = std::max(l_.entries, l_.stats.batch * l_.entries_of_batch());
      zeros_ = buffer<A>(n);
      std::fill_n(zeros_.get(), n, A(0));
    }
    elements_.in_sums = writes_in_sums();
    const Tiles tiles(l_, 2 * size_of(p_.dtype), wanted);
    // Given moments leave no second sweep to find a tile in the cache: memory is then shared out in its own order.
    const bool tiled = wants_sums_ && tiles.balanced(wanted) && !wide_shares();
    tiled ? fused(wanted, tiles) : split(wanted);
    if (wants_weights_) add_shares();
  }

 private:
  // The weights that a task meets, in float64; `first` is an entry, or with columns a group of the affine domain
  // unless weights go by line.
  struct Share {
    int64_t first = 0, count = 0;
    Buffer<double> dbias, dweight;
  };

  // Where rows are very long, tasks share the columns of the weights instead: see Grid.
  bool wide_shares() const { return wants_weights_ && l_.lookup.by_element && l_.stats.cols > kWideRow; }

  void fused(int64_t wanted, const Tiles& tiles) {
    const int64_t entries = tiles.most_entries();
    elements_.ahead = tiles.pitch(2 * size_of(p_.dtype));
    Workspace all(wanted, tiles.keeps, entries);
    Centers<A> centers(l_, wanted * entries);
    shares_.resize(wanted);
    // dz of a tile, where it takes an exponential that need not be computed twice.
    const bool costly = p_.act == Act::silu || p_.act == Act::gelu;
    const int64_t elements = tiles.keeps * l_.stats.count();
    const bool keeps = costly && elements * int64_t(sizeof(A)) <= kKeptBytes;
    parallel(threads_, wanted, [&](int64_t task) {
      const Buffer<A> kept = buffer<A>(keeps ? elements : 0);
      const int64_t begin = Grid::cut(tiles.count(), wanted, task), end = Grid::cut(tiles.count(), wanted, task + 1);
      const Box boxes = tiles.boxes(begin, end);
      open_box(shares_[task], boxes, tiles.box(end - 1).b - boxes.b + 1);
      const auto w = all.of(task);
      for (int64_t i = begin; i < end; ++i) {
        const Box box = tiles.box(i);
        read_moments(box, task * entries, centers);
        const Center<A> center = centers.at(task * entries);
        clear(box, w);
        add_sums(box, center, w, shares_[task], keeps ? kept.get() : nullptr);
        if (l_.columns) {
          fold(box, center, w, shares_[task]);
          finish(box, center, w.sums, w);
        } else {
          const double* g = p_.moments == Moments::mean_var ? w.first : nullptr;
          kernels_.slopes_of_sums(box.groups(), g, w.second, double(l_.stats.count()), center, w.slope, w.offset);
        }
        if (keeps)
          slope(box, center, w, kept.get());
        else
          from_end(l_, box, 2 * size_of(p_.dtype), [&](const Box& part) { slope(part, center, w); });
      }
    });
  }

  void split(int64_t wanted) {
    const Grid grid(l_, wanted, wants_weights_);
    const int64_t most = grid.box_groups(), tasks = grid.count(), batch_entries = l_.entries_of_batch();
    Centers<A> centers(l_, l_.stats.batch * batch_entries);
    for (int64_t b = 0; b < l_.stats.batch; ++b) read_moments(l_.whole(b), b * batch_entries, centers);
    const int64_t box_entries = std::max(most, l_.columns ? l_.width : 0);
    Workspace all(tasks, most, box_entries);
    shares_.resize(tasks);
    parallel(threads_, tasks, [&](int64_t task) {
      const int64_t first = grid.first_batch(task);
      const Box box = grid.box(task, first);
      open_box(shares_[task], box, grid.last_batch(task) - first);
      auto w = all.of(task);
      for (int64_t b = first; b < grid.last_batch(task); ++b) {
        Box at = box;
        at.b = b;
        const Center<A> center = centers.at(b * batch_entries + l_.first_entry(box));
        if (!wants_sums_) {
          sum_and_slope(at, center, w, shares_[task]);
          continue;
        }
        sum(at, center, w, shares_[task]);
        w.sums += box.groups();
      }
    });
    if (!wants_sums_) return;
    // Every task merges the groups that it needs, in the order of the boxes: cheaper than another round of tasks.
    Workspace merged(tasks, most, box_entries);
    parallel(threads_, tasks, [&](int64_t task) {
      const int64_t per_batch = grid.rows * grid.keeps * grid.cols;
      const int64_t first = task / per_batch * per_batch + task / grid.cols % grid.keeps * grid.cols;
      const auto w = merged.of(task);
      int64_t offset = 0;
      for (int64_t b = grid.first_batch(task); b < grid.last_batch(task); ++b) {
        const Box box = grid.box(task, b);
        for (int64_t k = 0; k < box.groups(); ++k) {
          Sums s;
          for (int64_t r = 0; r < grid.rows; ++r)
            for (int64_t c = 0; c < grid.cols; ++c)
              s = merge(s, all.of(first + r * grid.keeps * grid.cols + c).sums[offset + k]);
          w.sums[k] = s;
        }
        offset += box.groups();
        const Center<A> center = centers.at(b * batch_entries + l_.first_entry(box));
        finish(box, center, w.sums, w);
        slope(box, center, w);
      }
    });
  }

  // Scratch of one task: sums of its groups, then two numbers for each of its entries, for either sweep.
  struct Scratch {
    Sums* sums;
    double *first, *second;
    A *slope, *offset;
  };

  struct Workspace {
    int64_t groups, entries;
    Buffer<Sums> sums;
    Buffer<double> numbers;
    Buffer<A> slopes;
    Workspace(int64_t tasks, int64_t g, int64_t e)
        : groups(g),
          entries(e),
          sums(buffer<Sums>(tasks * g)),
          numbers(buffer<double>(tasks * e * 2)),
          slopes(buffer<A>(tasks * e * 2)) {}
    Scratch of(int64_t task) const {
      double* n = numbers.get() + task * entries * 2;
      A* m = slopes.get() + task * entries * 2;
      return {sums.get() + task * groups, n, n + entries, m, m + entries};
    }
  };

  // With given moments one sweep is enough, if what goes past the caches is made of whole lines of memory. Strips of
  // columns are written that way only where they are as wide as these, and what stays in the caches only as pairs.
  bool writes_in_sums() const {
    if (p_.moments != Moments::given || !wants_weights_ || !a_.dx || a_.dresidual || size_of(p_.dtype) == 8)
      return false;
    if (l_.by_line || l_.lookup.by_element || (p_.act != Act::none && p_.act != Act::relu)) return false;
    constexpr int64_t kLine = 64;
    const auto whole = [](int64_t bytes) { return bytes % kLine == 0; };
    const bool pairs = p_.dtype == DType::bf16 && p_.act == Act::none;
    if (l_.columns && !(elements_.stream ? kernels_.pack_bytes * (pairs ? 2 : 1) >= kLine : pairs)) return false;
    const int64_t run = l_.columns ? l_.width : l_.stats.cols;
    return !elements_.stream || (whole(reinterpret_cast<intptr_t>(a_.dx)) && whole(run * size_of(p_.dtype)));
  }

  // Where dx needs no sums, both sweeps go over a few rows at a time, or are one.
  void sum_and_slope(const Box& box, const Center<A>& center, const Scratch& w, const Share& share) const {
    if (elements_.in_sums) return sum(box, center, w, share);
    const int64_t row = 2 * size_of(p_.dtype) * (l_.columns ? l_.entries_of(box) : box.groups() * l_.stats.cols);
    const int64_t step = std::max<int64_t>(1, kTileBytes / row);
    clear(box, w);
    finish(box, center, w.sums, w);
    for (Box part = box; part.r0 < box.r1; part.r0 = part.r1) {
      part.r1 = std::min(box.r1, part.r0 + step);
      if (wants_weights_) add_sums(part, center, w, share);
      slope(part, center, w);
    }
    if (wants_weights_) fold(box, center, w, share);
  }

  void read_moments(const Box& box, int64_t first, Centers<A>& centers) const {
    const Param mean = p_.moments == Moments::second ? Param() : a_.mean;
    centers.read(kernels_, l_, box, p_.eps, first, elements(box), mean, a_.var);
  }

  // ---- shares of weight gradients ----

  int64_t entry_of(int64_t e) const {
    const Lookup& l = l_.lookup;
    const int64_t run = e / l.length, slice = run / l.runs / l.rows;
    return l.by_element ? slice * l.length + e % l.length : slice * l.runs + run % l.runs;
  }

  // Room for the weights of the elements e0 to e1.
  void open(Share& share, int64_t e0, int64_t e1) const {
    if (!wants_weights_) return;
    int64_t first = 0, last = l_.columns && !l_.by_line ? l_.affine.groups() - 1 : l_.entries - 1;
    if (!l_.columns) {
      const Lookup& l = l_.lookup;
      const int64_t line = l.runs * l.length, per_slice = l.by_element ? l.length : l.runs;
      const bool in_order = l.rows == 1 || e0 / line == e1 / line;
      first = in_order ? entry_of(e0) : e0 / (line * l.rows) * per_slice;
      last = in_order ? entry_of(e1) : e1 / (line * l.rows) * per_slice + per_slice - 1;
    }
    reserve(share, first, last);
  }

  // The same for a box, for which all batches and all rows, or all groups of a contiguous domain, may use the same.
  void open_box(Share& share, const Box& box, int64_t batches) const {
    if (!wants_weights_) return;
    if (l_.by_line) return reserve(share, box.r0, box.r1 - 1);
    if (l_.columns)
      return reserve(share, box.k0 * l_.stats.cols / l_.affine.cols, (box.k1 * l_.stats.cols - 1) / l_.affine.cols);
    const Runs r = l_.runs(box);
    const int64_t line = l_.lookup.runs * l_.lookup.length;
    const bool one_slice = l_.affine.batch == 1 && l_.lookup.rows > 1;
    // Every run begins at the same place of a line of weights.
    if (l_.stats.rows == 1 && one_slice && l_.stats.cols % line == 0)
      return open(share, r.first, r.first + r.length - 1);
    const int64_t last_of_line = r.first + (r.count - 1) * l_.stats.cols + r.length - 1;
    if (one_slice && l_.line % line == 0) return open(share, r.first, last_of_line);
    open(share, r.first, last_of_line + (batches - 1) * l_.slice() + (r.lines - 1) * r.stride);
  }

  void reserve(Share& share, int64_t first, int64_t last) const {
    share.first = first;
    share.count = last - first + 1;
    share.dbias = buffer<double>(share.count);
    share.dweight = buffer<double>(share.count);
    std::fill_n(share.dbias.get(), share.count, 0.0);
    std::fill_n(share.dweight.get(), share.count, 0.0);
  }

  void add_shares() {
    const int64_t groups = l_.affine.groups();
    const int64_t per_weight = l_.columns && !l_.by_line ? 1 : l_.entries_per_weight();
    int64_t work = 0;
    for (const Share& s : shares_) work += s.count;
    const int64_t parts = std::min(groups, wanted_tasks(work, threads_));
    parallel(threads_, parts, [&](int64_t part) {
      const int64_t g0 = Grid::cut(groups, parts, part), g1 = Grid::cut(groups, parts, part + 1);
      const Buffer<double> dbias = buffer<double>(g1 - g0), dweight = buffer<double>(g1 - g0);
      std::fill_n(dbias.get(), g1 - g0, 0.0);
      std::fill_n(dweight.get(), g1 - g0, 0.0);
      for (const Share& s : shares_) {
        const int64_t end = std::min(g1 * per_weight, s.first + s.count);
        int64_t e = std::max(g0 * per_weight, s.first);
        if (per_weight == 1) {
          for (; e < end; ++e) {
            dbias[e - g0] += s.dbias[e - s.first];
            dweight[e - g0] += s.dweight[e - s.first];
          }
        }
        for (int64_t g = e / per_weight - g0; e < end; ++g) {
          for (const int64_t last = std::min(end, (g0 + g + 1) * per_weight); e < last; ++e) {
            dbias[g] += s.dbias[e - s.first];
            dweight[g] += s.dweight[e - s.first];
          }
        }
      }
      const auto write = [&](Grad grad, const Buffer<double>& from) {
        if (grad.data)
          kernels().write_doubles(from.get(), g1 - g0, grad.dtype,
                                  static_cast<char*>(grad.data) + g0 * int64_t(size_of(grad.dtype)));
      };
      write(a_.dbias, dbias);
      write(a_.dweight, dweight);
    });
  }

  // ---- the two sweeps over a box ----

  Elements<A> elements(const Box& box) const { return at_box(elements_, l_, box); }

  void sum(const Box& box, Center<A> center, const Scratch& w, const Share& share) const {
    clear(box, w);
    add_sums(box, center, w, share);
    fold(box, center, w, share);
  }

  void clear(const Box& box, const Scratch& w) const {
    const int64_t n = l_.entries_of(box);
    std::fill_n(w.first, n, 0.0);
    std::fill_n(w.second, n, 0.0);
  }

  void add_sums(const Box& box, Center<A> center, const Scratch& w, const Share& share, A* kept = nullptr) const {
    Elements<A> e = elements(box);
    e.kept = kept;
    e.dtotal = nullptr;
    if (!l_.columns) {
      const BackwardSums s = {wants_sums_ ? w.first : nullptr, w.second, share.dbias.get(), share.dweight.get(),
                              share.first};
      return kernels_.sums_runs(e, l_.runs(box), l_.lookup, center, s);
    }
    BackwardSums s = {w.first, w.second, nullptr, nullptr, 0};
    if (l_.by_line && wants_weights_) {
      s.dbias = share.dbias.get() + (box.r0 - share.first);
      s.dweight = share.dweight.get() + (box.r0 - share.first);
    }
    kernels_.sums_columns(e, l_.lines(box), center, s);
  }

  // From the entries of a box to its groups, and with columns to the weights.
  void fold(const Box& box, Center<A> center, const Scratch& w, const Share& share) const {
    const int64_t n = l_.entries_of(box), groups = box.groups();
    if (!l_.columns) {
      for (int64_t k = 0; k < groups; ++k) w.sums[k] = {w.first[k], w.second[k]};
      return;
    }
    const A* weight = elements(box).weight;
    // What the sums of columns leave out of xhat.
    for (int64_t j = 0; j < n && !l_.by_line; ++j)
      w.second[j] -= double(center.low[j]) * double(center.rstd[j]) * w.first[j];
    const int64_t cols = l_.stats.cols;
    std::fill_n(w.sums, groups, Sums{});
    for (int64_t j = 0; j < n;) {
      for (int64_t k = 0; k < groups; ++k)
        for (int64_t c = 0; c < cols; ++c, ++j) {
          const double factor = l_.by_line ? 1 : double(weight[j]);  // by line it is in the sums already
          w.sums[k] = merge(w.sums[k], Sums{factor * w.first[j], factor * w.second[j]});
        }
    }
    if (!wants_weights_ || l_.by_line) return;
    for (int64_t j = 0; j < n;) {
      for (int64_t g = 0; g < share.count; ++g)
        for (int64_t c = 0; c < l_.affine.cols; ++c, ++j) {
          share.dbias[g] += w.first[j];
          share.dweight[g] += w.second[j];
        }
    }
  }

  // What dx needs of the means over the group of g and g*xhat, for every entry.
  void finish(const Box& box, const Center<A>& center, const Sums* sums, const Scratch& w) const {
    const int64_t cols = l_.columns ? l_.stats.cols : 1, n = l_.entries_of(box);
    const double count = double(l_.stats.count());
    const bool mean_var = p_.moments == Moments::mean_var;
    for (int64_t j = 0; j < n;) {
      for (int64_t k = 0; k < box.groups(); ++k) {
        const double mean_g = wants_sums_ && mean_var ? sums[k].first / count : 0;
        const double mean_g_xhat = wants_sums_ ? sums[k].second / count : 0;
        const double rstd = center.rstd[j], slope = -rstd * mean_g_xhat;
        std::fill_n(w.slope + j, cols, A(slope));
        std::fill_n(w.offset + j, cols, A(-rstd * mean_g - double(center.low[j]) * rstd * slope));
        j += cols;
      }
    }
  }

  void slope(const Box& box, const Center<A>& center, const Scratch& w, A* kept = nullptr) const {
    if (!a_.dx && !a_.dresidual) return;
    Elements<A> e = elements(box);
    e.kept = kept;
    if (zeros_) {
      e.x = a_.dy;
      e.y = a_.dx;
      e.bias = zeros_.get();
      const Center<A> scaled = {zeros_.get(), zeros_.get(), center.rstd, center.scale, zeros_.get()};
      return l_.columns ? kernels_.map_columns(e, l_.lines(box), scaled)
                        : kernels_.map_runs(e, l_.runs(box), l_.lookup, scaled);
    }
    if (l_.columns) return kernels_.slope_columns(e, l_.lines(box), center, {w.slope, w.offset});
    kernels_.slope_runs(e, l_.runs(box), l_.lookup, center, {w.slope, w.offset});
  }

  const Kernels<A>& kernels_;
  const Problem& p_;
  const Layout& l_;
  const BackwardArgs& a_;
  const Threads& threads_;
  Expanded<A> weight_, bias_;
  Elements<A> elements_;
  bool wants_weights_, wants_sums_;
  Buffer<A> zeros_;  // where dx is a multiple of dy: the mean and bias of the map that makes it
  std::vector<Share> shares_;
};

}  // namespace

void backward(const Problem& p, const BackwardArgs& a, const Threads& threads, int64_t written) {
  if (p.stats.numel() == 0) return;
  const Layout l(p, a.weight.data || a.bias.data || a.dweight.data || a.dbias.data);
  const KernelTable& table = kernels();
  switch (p.dtype) {
    case DType::f32: return Backward<float>(table.f32, p, l, a, threads).run(written);
    case DType::f64: return Backward<double>(table.f64, p, l, a, threads).run(written);
    case DType::f16: return Backward<float>(table.f16, p, l, a, threads).run(written);
    case DType::bf16: return Backward<float>(table.bf16, p, l, a, threads).run(written);
  }
}

}  // namespace normkern::cpu
