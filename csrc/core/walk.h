// walk.h: how threads lie on a domain: the geometry that planner, launchers and kernels share.
#pragma once

#include <cstdint>

#include "problem.h"

namespace normkern {

// Who walks a group: `rows`: threads along the runs of one group; `columns`: neighbouring threads on neighbouring
// groups, for runs too short to fill a vector.
enum class Walk : int32_t { rows, columns };

constexpr int kAccessBytes = 16;       // the widest access of a thread
constexpr int kFusedThreads = 512;     // most threads of a block, by kernel: their __launch_bounds__
constexpr int kBackwardThreads = 384;  // of fused: it keeps more in registers
constexpr int kSlabThreads = 256;      // fused, by columns
constexpr int kReduceThreads = 512;
constexpr int kColumnThreads = 256;
constexpr int kMapThreads = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }
constexpr int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Of a mask (arguments.h).
constexpr int64_t mask_bytes(const Problem& p) { return ceil_div(p.stats.numel(), kAccessBytes / size_of(p.dtype)); }

constexpr int64_t compute_size(DType t) { return t == DType::f64 ? 8 : 4; }

// A slot is what one access of one thread covers of a run: an aligned chunk of the buffer, cut off where the run begins
// and ends. A run that does not fill whole chunks may touch one chunk more, depending on where it begins.
constexpr int64_t slots_in_run(int64_t cols, int64_t vec) {
  return cols % vec == 0 ? cols / vec : (cols + vec - 2) / vec + 1;
}
constexpr int64_t slots_in_group(const Domain& d, int64_t vec) { return d.rows * slots_in_run(d.cols, vec); }

// Runs shorter than this are read across groups, by columns: four sectors of device memory, one cache line.
constexpr int64_t kRunBytes = 128;

constexpr Walk walk_of(const Domain& d, DType t) {
  return d.cols * size_of(t) < kRunBytes && d.count() != d.numel() ? Walk::columns : Walk::rows;
}

// The form of a domain that a reduction walks. Short groups side by side are one line of columns.
constexpr Domain reduced(const Domain& domain, DType t) {
  const Domain d = simplify(domain);
  if (d.rows == 1 && walk_of(d, t) == Walk::columns) return {1, 1, d.groups(), d.cols};
  return d;
}

// How a block lies on the lines of a walk by columns: `width` threads side by side own `columns` neighbouring elements
// of a line, whole groups; `lanes` such rows of threads stand on consecutive lines.
struct Tile {
  int64_t columns = 1, tiles = 1;  // tiles to a line
  int width = 1, lanes = 1;

  constexpr int threads() const { return int(round_up(width * lanes, 32)); }
};

// Groups up to this many columns leave room for all the lanes that an unaligned line needs.
constexpr int kSlabColumns = kSlabThreads - 8;

// At most `columns` columns, unless one group is wider, and `threads` threads.
constexpr Tile tile_of(const Domain& d, int vec, int64_t columns = kColumnThreads, int threads = kColumnThreads) {
  const int64_t line = d.keep * d.cols, common = gcd(line, vec);
  const bool whole_lines = common == vec;
  int64_t unit = d.cols;  // a tile is a multiple of it: of whole groups and, where lines allow it, of whole accesses
  if (whole_lines && d.cols / gcd(d.cols, vec) * vec <= kColumnThreads) unit = d.cols / gcd(d.cols, vec) * vec;
  const bool whole_tiles = whole_lines && unit % vec == 0;
  const int64_t room = whole_tiles ? columns : columns - vec;
  const int64_t widest = room < unit ? unit : room / unit * unit;
  Tile tile;
  tile.tiles = ceil_div(line, widest);
  tile.columns = clamp(round_up(ceil_div(line, tile.tiles), unit), unit, widest);
  tile.tiles = ceil_div(line, tile.columns);
  tile.width = int(whole_tiles ? tile.columns / vec : (tile.columns + vec - 2) / vec + 1);
  // A thread's lines are `lanes` apart; that must keep its place within an access, so that its columns stay the same.
  const int64_t period = vec / common;
  tile.lanes = int(clamp(threads / tile.width, 1, round_up(d.rows, period)) / period * period);
  return tile;
}

// ---- fused kernels

// What has a weight of its own in the units of a fused kernel: a group, a line or a column. The sums of dweight and
// dbias are then theirs, too. none: anything else.
enum class Weights : int32_t { none, group, line, column };

// Shorter runs than this are no lines of a fused kernel: too little of every access would be used.
constexpr int64_t kLineBytes = 64;

constexpr Weights weights_of(const Problem& p) {
  if (p.moments == Moments::given) return Weights::none;
  const Domain d = simplify(p.stats), a = simplify(p.affine);
  if (d == a) return Weights::group;
  if (a == simplify(Domain{1, d.batch * d.rows, d.keep * d.cols, 1})) return Weights::column;
  const bool runs = d.rows == 1 && (a.batch == 1 || a.rows == 1) && a.cols * size_of(p.dtype) >= kLineBytes;
  if (runs && d.cols % a.cols == 0 && a.groups() % (d.cols / a.cols) == 0) return Weights::line;
  return Weights::none;
}

// A unit is what a team of threads or blocks holds at once: `lines` lines of `columns` elements, `pitch` apart: a
// group, or (walk by columns) groups side by side. Unit k * batch + b begins at b * outer + k * inner, and units of one
// k have the same channels.
struct Units {
  int64_t batch = 1, beside = 1, outer = 0, inner = 0;
  int64_t lines = 1, pitch = 0, columns = 1;
  int64_t span = 1;    // of the units side by side: the last one may be narrower
  int64_t groups = 1;  // in a unit

  constexpr int64_t count() const { return batch * beside; }
  constexpr bool aligned(int64_t vec) const { return outer % vec == 0 && inner % vec == 0 && pitch % vec == 0; }
};

constexpr Units units_of(const Problem& p, Walk walk, Weights weights, int64_t columns) {
  const Domain d = simplify(p.stats);
  const int64_t line = d.keep * d.cols;
  if (walk == Walk::columns)
    return {d.batch, ceil_div(line, columns), d.rows * line, columns, d.rows, line, columns, line, columns / d.cols};
  if (d.rows > 1) return {d.batch, d.keep, d.rows * line, d.cols, d.rows, line, d.cols, line, 1};
  if (weights == Weights::line) {
    const Domain a = simplify(p.affine);
    const int64_t lines = d.cols / a.cols, beside = a.groups() / lines, span = beside * d.cols;
    return {d.batch / beside, beside, span, d.cols, lines, a.cols, a.cols, span, 1};
  }
  if (weights == Weights::column) return {d.batch, 1, d.cols, d.cols, 1, d.cols, d.cols, d.cols, 1};
  return {1, d.batch, d.numel(), d.cols, 1, d.cols, d.cols, d.numel(), 1};
}

// Who holds a unit, and how a block's threads lie on its share of it.
struct Team {
  Walk walk = Walk::rows;
  Weights weights = Weights::none;
  bool weight_sums = false;  // dweight and dbias are added up on the way
  int blocks = 1;            // that share a unit
  bool by_lines = false;     // they share out its lines; else its columns
  bool cluster = false;      // they are a cluster and meet in distributed shared memory; else in global memory
  int width = 0;             // threads of a block side by side on a line
  int lanes = 0;             // such rows of threads, on different lines
  int seats = 1;             // units that a block holds side by side, with width * lanes threads each
  int stages = 1;            // units on the chip at a time; the second is on its way while the first is computed
  int64_t columns = 0;       // of a unit
  int64_t teams = 0;         // each walks a range of neighbouring units, all of about the same length

  constexpr int threads() const { return width * lanes; }
  // The first unit of a team, a multiple of the seats; that of team `teams` is past the last unit.
  constexpr int64_t first(const Units& u, int64_t team) const {
    return team * ceil_div(u.count(), seats) / teams * seats;
  }
  constexpr int64_t team_of(const Units& u, int64_t unit) const {
    return ((unit / seats + 1) * teams - 1) / ceil_div(u.count(), seats);
  }
  constexpr int64_t block_lines(const Units& u) const { return by_lines ? ceil_div(u.lines, blocks) : u.lines; }
  // A multiple of the access, so that every share begins where the unit does within an access.
  constexpr int64_t block_columns(const Units& u, int64_t vec) const {
    return by_lines || blocks == 1 ? u.columns : round_up(ceil_div(u.columns, blocks), vec);
  }
  constexpr int64_t slots(const Units& u, int64_t vec) const {
    const int64_t wide = block_columns(u, vec);
    return u.aligned(vec) ? ceil_div(wide, vec) : (wide + vec - 2) / vec + 1;
  }
  // Accesses of one thread to its unit.
  constexpr int64_t depth(const Units& u, int64_t vec) const {
    return ceil_div(block_lines(u), lanes) * ceil_div(slots(u, vec), width);
  }
  // Pieces in which the sums of a line arrive: one of each warp, or part of a warp, that walks it.
  constexpr int64_t pieces() const { return ceil_div(width, 32); }
};

// The dynamic shared memory of a fused kernel, as offsets; the staged elements come first.
struct FusedMemory {
  int64_t box = 0, lanes = 0, merged = 0, totals = 0, lines = 0, sums = 0, bytes = 0;
};

constexpr int64_t kSumsBytes = 16;  // two float64

constexpr FusedMemory fused_memory(const Units& u, const Team& t, DType dtype, int vec, int streams, int threads) {
  const int64_t pair = 2 * compute_size(dtype);
  const bool columns = t.walk == Walk::columns;
  FusedMemory m;
  m.box = round_up(t.depth(u, vec) * threads * vec * size_of(dtype) * streams * t.stages, kAccessBytes);
  m.lanes = m.box + (t.cluster ? 2 * u.groups * kSumsBytes : 0);
  m.merged = m.lanes + (columns ? round_up(int64_t(t.threads()) * vec * pair, kAccessBytes) : 0);
  m.totals = m.merged + (columns ? most(threads, u.columns) * kSumsBytes : 0);
  m.lines = m.totals + (columns ? most(threads, u.groups) * kSumsBytes : 0);
  const bool by_line = t.weight_sums && t.weights == Weights::line;
  const bool by_column = t.weight_sums && t.weights == Weights::column;
  m.sums = m.lines + (by_line ? u.lines * t.pieces() * kSumsBytes : 0);
  m.bytes = m.sums;
  if (by_line) m.bytes += u.lines * kSumsBytes;
  if (by_column && columns) m.bytes += u.columns * kSumsBytes;
  if (by_column && !columns) m.bytes += round_up(t.seats * round_up(t.block_columns(u, vec), vec) * pair, kAccessBytes);
  return m;
}

// The partial sums of dweight and dbias in the workspace: a row for each of the teams that meet the same channels, and
// for each block of theirs, where all of them do. Rows are merged in two rounds if there are many, `kCell` by `kCell`.
struct WeightRows {
  static constexpr int kCell = 16;

  int64_t rows = 0, copies = 1, ranks = 1, tickets = 0;

  constexpr bool cells() const { return rows > 2 * kCell; }
  constexpr int64_t tickets_each() const { return 1 + (cells() ? ceil_div(rows, kCell) : 0); }
};

constexpr WeightRows weight_rows(const Units& u, const Team& t) {
  WeightRows w;
  if (!t.weight_sums || t.weights == Weights::group) return w;  // a group has one sum, and writes it
  const int64_t shortest = u.count() / t.seats / t.teams * t.seats;
  const int64_t touching = shortest == 0 ? t.teams : (u.batch + shortest - 2) / shortest + 1;  // by `batch` neighbours
  const bool own = t.walk == Walk::rows && t.weights == Weights::column;
  w.copies = own ? 1 : t.blocks;
  w.ranks = own ? t.blocks : 1;
  w.rows = least(touching, t.teams) * w.copies;
  w.tickets = u.beside * w.ranks * w.tickets_each();
  return w;
}

}  // namespace normkern
