// team.cuh: who holds a unit of elements while it is read once (core/walk.h, Team): lanes of a warp, a block, a
// cluster, or blocks of a cooperative launch. Where each thread of a team sits, and how the team's sums become one.
#pragma once

#include "map.cuh"
#include "merge.cuh"

namespace normkern::cuda {

// A team and its units, as a kernel gets them.
struct Teams {
  Units units;
  Team team;
  FusedMemory memory;
  int block_lines, block_columns, depth;  // Team's functions of these names
  int groups_per_batch;
  FastDiv cols;   // of a group, in a walk by columns
  int64_t count;  // of elements in a group
  int streams;    // tensors that are staged
  Sums* boxes;    // of sub-grids, with their barriers
  unsigned* arrivals;
  int first_block = 0;  // of the first team
};

// Blocks of a team tell each other their sums: each writes a box, all read all boxes in the order of the blocks. There
// are two boxes in turn: who writes one has passed the barrier after its last reader.
class Exchange {
 public:
  NK_DEVICE Exchange(const Teams& f, unsigned char* memory) : f_(f), memory_(memory) {}
  NK_DEVICE int blocks() const { return f_.team.blocks; }
  NK_DEVICE int rank() const { return int(blockIdx.x) % f_.team.blocks; }
  // To be written before a meeting; what block `rank` wrote, after it.
  NK_DEVICE Sums* own() const { return f_.team.cluster ? local(meetings_) : global(meetings_, rank()); }
  NK_DEVICE const Sums* of(int rank) const {
    return f_.team.cluster ? cluster_map(local(meetings_ - 1), rank) : global(meetings_ - 1, rank);
  }
  NK_DEVICE void meet() {
    ++meetings_;
    if (f_.team.cluster)
      cluster_sync();
    else
      meet_blocks(f_.arrivals + blockIdx.x / f_.team.blocks, unsigned(meetings_ * blocks()));
  }
  // Before the end of the kernel: a block of a cluster must not go while others read its boxes.
  NK_DEVICE void part() const {
    if (f_.team.cluster) cluster_sync();
  }

 private:
  NK_DEVICE Sums* local(int meeting) const {
    return reinterpret_cast<Sums*>(memory_ + f_.memory.box) + (meeting & 1) * f_.units.groups;
  }
  NK_DEVICE Sums* global(int meeting, int rank) const {
    const int64_t team = blockIdx.x / f_.team.blocks;
    return f_.boxes + ((team * 2 + (meeting & 1)) * blocks() + rank) * f_.units.groups;
  }

  const Teams& f_;
  unsigned char* const memory_;
  int meetings_ = 0;
};

// The unit of one thread: which, and where. Without elements, for lack of a unit, `lines` is 0.
struct Spot {
  int b = 0, k = 0;
  int lines = 0;  // past the last one of this block
  int end = 0;    // past the last column of this block
  int64_t begin = 0;
};

// One thread's place in its team.
template <class T, int V>
class Seat {
 public:
  using A = Compute<T>;
  using Access = Vec<T, V>;

  NK_DEVICE Seat(const Teams& f, unsigned char* memory) : f_(f), memory_(memory), exchange_(f, memory) {
    const int threads = f.team.threads(), own = int(threadIdx.x) % threads;
    seat_ = int(threadIdx.x) / threads;
    lane_ = own / f.team.width;
    place_ = own - lane_ * f.team.width;
    if (seat_ >= f.team.seats) {  // a thread too many: it knows the unit, and has no line in it
      seat_ = 0;
      lane_ = 1 << 30;
    }
    const int first = int(f.team.first(f.units, team())), end = int(f.team.first(f.units, team() + 1));
    const int count = (end < f.units.count() ? end : int(f.units.count())) - first;
    rounds_ = (count + f.team.seats - 1) / f.team.seats;
    left_ = count - seat_;
    k_ = (first + seat_) / int(f.units.batch);
    b_ = first + seat_ - k_ * int(f.units.batch);
  }

  NK_DEVICE int rounds() const { return rounds_; }
  NK_DEVICE int rank() const { return exchange_.rank(); }
  NK_DEVICE int team() const { return (int(blockIdx.x) - f_.first_block) / f_.team.blocks; }
  NK_DEVICE int seat() const { return seat_; }
  NK_DEVICE int place() const { return place_; }
  NK_DEVICE int first_line() const { return f_.team.by_lines ? rank() * f_.block_lines : 0; }
  NK_DEVICE int first_column() const { return f_.team.by_lines ? 0 : rank() * f_.block_columns; }
  NK_DEVICE bool first_lane() const { return lane_ == 0 && rank() == 0; }
  NK_DEVICE bool leads() const { return first_lane() && place_ == 0; }  // its seat
  NK_DEVICE int64_t group(const Spot& s) const { return int64_t(s.b) * f_.groups_per_batch + s.k * f_.units.groups; }
  NK_DEVICE void part() const { exchange_.part(); }

  // The next unit of this seat.
  NK_DEVICE Spot next() {
    const Units& u = f_.units;
    Spot s;
    if (left_ > 0) {
      s.b = b_;
      s.k = k_;
      s.begin = b_ * u.outer + k_ * u.inner;
      const int64_t left = u.span - k_ * u.inner;
      const int columns = int(u.columns < left ? u.columns : left);
      const int lines = first_line() + f_.block_lines, end = first_column() + f_.block_columns;
      s.lines = lines < u.lines ? lines : int(u.lines);
      s.end = end < columns ? end : columns;
    }
    left_ -= f_.team.seats;
    for (b_ += f_.team.seats; b_ >= u.batch; b_ -= int(u.batch)) ++k_;
    return s;
  }

  // The staged copy of this thread's first access.
  NK_DEVICE Access* staged(int stage) const {
    return reinterpret_cast<Access*>(memory_) + stage * f_.depth * f_.streams * int(blockDim.x) + threadIdx.x;
  }

  // visit(line, chunk, at) for each access of this thread: at[0] is the staged x, at[blockDim.x] what comes after it.
  // line_end(line) after every line, at once in all lanes of a warp; beyond the last line for some of them.
  template <class Visit, class LineEnd>
  NK_DEVICE void each(const Spot& s, Access* at, Visit visit, LineEnd line_end) const {
    const int step = f_.team.width * V, stride = f_.streams * int(blockDim.x), left = first_column();
    for (int first = first_line(); first < s.lines; first += f_.team.lanes) {
      const int line = first + lane_;
      if (line < s.lines && left < s.end) {
        const int64_t begin = s.begin + line * f_.units.pitch + left, end = begin + (s.end - left);
        for (int64_t e = (begin & ~int64_t(V - 1)) + place_ * V; e < end; e += step, at += stride)
          visit(line, clip<V>(e, begin, end), at);
      }
      line_end(line);
    }
  }
  template <class Visit>
  NK_DEVICE void each(const Spot& s, Access* at, Visit visit) const {
    each(s, at, visit, [](int) {});
  }

  // Whether this thread has any access to make; the first is then at its first staged place.
  NK_DEVICE bool has_any(const Spot& s) const {
    const int line = first_line() + lane_, left = first_column();
    const int64_t begin = s.begin + line * f_.units.pitch + left;
    return line < s.lines && left < s.end && (begin & ~int64_t(V - 1)) + place_ * V < begin + (s.end - left);
  }

  // The columns of this thread in a walk by columns, the same in all of its lines: e is the first, counted from the
  // start of a line.
  NK_DEVICE Chunk own_columns(const Spot& s) const {
    const int line = first_line() + lane_;
    const int64_t begin = s.begin + line * f_.units.pitch;
    if (line >= s.lines) return {0, 0};
    Chunk c = clip<V>((begin & ~int64_t(V - 1)) + place_ * V, begin, begin + s.end);
    c.e -= begin;
    return c;
  }

  // The weights of a chunk, without a division where the walk says which they are. `base` is unit_channel's.
  NK_DEVICE Cursor channel(const Indexer& channels, const Cursor& base, const Spot& s, int line, const Chunk& c) const {
    Cursor at = base;
    switch (f_.team.weights) {
      case Weights::none: return channels.at(c.e);
      case Weights::line: at.group += line; break;
      case Weights::column:
        if (f_.team.walk == Walk::rows) at.group = c.e - s.begin;
        break;
      default: break;
    }
    return at;
  }
  // What is the same in all of a thread's chunks of a unit; `column`: its first, in a walk by columns.
  NK_DEVICE Cursor unit_channel(const Spot& s, int64_t column) const {
    Cursor at;
    switch (f_.team.weights) {
      case Weights::line: at.group = int64_t(s.k) * f_.units.lines; break;
      case Weights::column:
        at.group = int64_t(s.k) * f_.units.columns + column;
        at.run = 1;
        break;
      case Weights::group: {
        at.group = group(s);
        if (f_.team.walk == Walk::rows) break;
        const int inside = group_of(column);
        at.group += inside;
        at.run = near((inside + 1) * f_.cols.divisor() - column);
        break;
      }
      default: break;
    }
    return at;
  }

  // One sum of a group, valid in every thread of its team. Threads without a unit must take part.
  NK_DEVICE Sums sum(const Sums& s) {
    if (f_.team.threads() <= kWarp) return merge_lanes(s, f_.team.threads());
    const Sums mine = merge_block(s, round_);
    if (exchange_.blocks() == 1) return mine;
    if (threadIdx.x == 0) put(exchange_.own()[0], mine);
    exchange_.meet();
    Sums all;
    for (int rank = int(threadIdx.x); rank < exchange_.blocks(); rank += int(blockDim.x))
      all = merge(all, exchange_.of(rank)[0]);
    return merge_block(all, round_);
  }

  // Sums of every group of a unit, from V columns of each thread: total(group) then has them. merged(column, sums) is
  // told the sums of each column over this block, once, and returns what the group gets.
  template <class Merged>
  NK_DEVICE void sum_columns(const Spot& s, const Chunk& own, const A (&first)[V], const A (&second)[V],
                             Merged merged) {
    using Pair = Vec<A, 2>;
    Pair* const lanes = reinterpret_cast<Pair*>(memory_ + f_.memory.lanes);
    Sums* const columns = reinterpret_cast<Sums*>(memory_ + f_.memory.merged);
    Sums* const totals = reinterpret_cast<Sums*>(memory_ + f_.memory.totals);
    const int pitch = f_.team.width * V, cols = int(f_.cols.divisor()), groups = s.end / cols;
    NK_UNROLL
    for (int i = 0; i < V; ++i)
      if (i < own.n) put(lanes[lane_ * pitch + own.e + i], Pair{{first[i], second[i]}});
    __syncthreads();
    const int lines = s.lines - first_line(), standing = lines < f_.team.lanes ? lines : f_.team.lanes;
    merge_columns(columns, s.end, standing > 0 ? standing : 0, [&](int column, int64_t from, int64_t to) {
      Sums r;
      for (int64_t lane = from; lane < to; ++lane) {
        const Pair pair = lanes[lane * pitch + column];
        r = merge(r, Sums{double(pair.v[0]), double(pair.v[1])});
      }
      return r;
    });
    for (int column = int(threadIdx.x); column < s.end; column += int(blockDim.x))
      put(columns[column], merged(column, columns[column]));
    __syncthreads();
    const bool alone = exchange_.blocks() == 1;
    Sums* const to = alone ? totals : exchange_.own();
    for (int group = int(threadIdx.x); group < groups; group += int(blockDim.x)) {
      Sums r;
      for (int i = 0; i < cols; ++i) r = merge(r, columns[group * cols + i]);
      put(to[group], r);
    }
    if (alone) {
      __syncthreads();
      return;
    }
    exchange_.meet();
    merge_columns(totals, groups, exchange_.blocks(), [&](int group, int64_t from, int64_t to) {
      Sums r;
      for (int64_t rank = from; rank < to; ++rank) r = merge(r, exchange_.of(int(rank))[group]);
      return r;
    });
  }
  NK_DEVICE int group_of(int64_t column) const { return int(f_.cols.divide(column)); }
  NK_DEVICE bool begins_group(int64_t column) const { return column == group_of(column) * f_.cols.divisor(); }
  NK_DEVICE Sums total(int group) const { return reinterpret_cast<const Sums*>(memory_ + f_.memory.totals)[group]; }

 private:
  const Teams& f_;
  unsigned char* const memory_;
  Exchange exchange_;
  int seat_, lane_, place_, rounds_, left_, k_, b_, round_ = 0;
};

}  // namespace normkern::cuda
