// test_plan.cpp: fast division, cursors and launch plans against brute force, at run time and at compile time.
#include <initializer_list>
#include <random>
#include <vector>

#include "../core/fast_div.h"
#include "../core/plan.h"
#include "check.h"

namespace normkern::test {
namespace {

constexpr Gpu kH200 = {132, 232448, 233472, 60 << 20, 16};

// The planner is constexpr, so that an undefined operation in it does not compile.
constexpr Plan kLayerNorm = make_plan(
    Problem{{16384, 1, 1, 4096}, {1, 16384, 4096, 1}, Moments::mean_var, Act::none, DType::bf16}, Request{}, kH200);
static_assert(kLayerNorm.strategy == Strategy::block && kLayerNorm.vec == 8 && kLayerNorm.workspace_bytes == 0,
              "one read");
static_assert(FastDiv(7).divide(48) == 6 && FastDiv(7).divide(49) == 7, "division at compile time");

void fast_division() {
  std::vector<int64_t> divisors, numbers = {0, 1};
  for (int64_t d = 1; d <= 300; ++d) divisors.push_back(d);
  for (int bit = 0; bit < 63; ++bit)
    for (int64_t near : {-1, 0, 1}) {
      const int64_t value = (int64_t(1) << bit) + near;
      if (value > 0) divisors.push_back(value), numbers.push_back(value);
    }
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) numbers.push_back(int64_t(random() >> (1 + i % 62)));
  for (int64_t d : divisors) {
    const FastDiv fast(d);
    check(fast.divisor() == d, "divisor %ld", long(d));
    for (int64_t n : numbers) check(fast.divide(n) == n / d, "%ld / %ld", long(n), long(d));
    for (int64_t multiple : {d, 2 * (d >> 1), (INT64_MAX / d) * d})
      for (int64_t n : {multiple - 1, multiple})
        if (n >= 0) check(fast.divide(n) == n / d, "%ld / %ld", long(n), long(d));
  }
}

void cursors() {
  const int64_t extents[] = {1, 2, 3, 9};
  for (int64_t batch : extents)
    for (int64_t rows : extents)
      for (int64_t keep : extents)
        for (int64_t cols : extents) {
          const Domain d = {batch, rows, keep, cols};
          const Indexer indexer(d);
          for (int64_t e = 0; e < d.numel(); ++e) {
            Cursor c = indexer.at(e);
            bool consecutive = true;
            int same = 0;
            for (int i = 0; i < kNear && e + i < d.numel(); ++i) {
              const int64_t group = d.group_of(e + i);
              check(c.group == group, "group %d after %ld", i, long(e));
              consecutive = consecutive && group == d.group_of(e) + i;
              if (same == i && group == d.group_of(e)) ++same;
              if (indexer.consecutive(indexer.at(e), i + 1)) check(consecutive, "consecutive %ld", long(e));
              indexer.advance(c);
            }
            for (int n = 1; n <= same; ++n)
              if (indexer.at(e).run >= n) check(indexer.at(e).same(n), "same %ld", long(e));
            check(indexer.at(e).run <= same || e + kNear > d.numel(), "a run ends where the group does");
          }
        }
}

void slots() {
  for (int64_t vec : {1, 2, 4, 8})
    for (int64_t cols = 1; cols < 70; ++cols) {
      int64_t most = 0;
      for (int64_t begin = 0; begin < vec * cols; begin += cols)
        most = (begin + cols - 1) / vec - begin / vec + 1 > most ? (begin + cols - 1) / vec - begin / vec + 1 : most;
      check(slots_in_run(cols, vec) >= most, "slots of %ld by %ld", long(cols), long(vec));
      check(slots_in_run(cols, vec) <= most + 1, "no more slots than needed");
    }
}

// Every element of a problem belongs to exactly one unit, line and column, and to one block of its team.
void units() {
  const Gpu chips[] = {kH200, {5, 232448, 49152, 1 << 20, 8}};
  const Domain pairs[][2] = {
      {{7, 1, 1, 203}, {1, 7, 203, 1}},     {{6, 1, 1, 4096}, {1, 6, 4096, 1}}, {{12, 1, 1, 320}, {1, 2, 60, 32}},
      {{12, 1, 1, 3 * 49}, {1, 2, 18, 49}}, {{2, 35, 6, 10}, {1, 70, 60, 1}},   {{2, 64, 3, 5}, {1, 128, 15, 1}},
      {{1, 9, 31, 49}, {1, 9, 31, 49}},     {{1, 70, 24, 1}, {1, 70, 24, 1}},   {{1, 40, 5, 300}, {1, 40, 5, 300}},
      {{3, 30, 2, 128}, {1, 90, 256, 1}},   {{8, 1, 1, 200}, {1, 2, 4, 200}},   {{3, 7, 11, 1}, {1, 3, 7, 11}}};
  for (const Gpu& gpu : chips)
    for (const auto& pair : pairs)
      for (DType t : {DType::f32, DType::bf16})
        for (Pass pass : {Pass::forward, Pass::backward})
          for (Strategy s : {Strategy::warp, Strategy::block, Strategy::cluster, Strategy::subgrid}) {
            const Problem p = {pair[0], pair[1], Moments::mean_var, Act::none, t, 1e-5};
            const Plan plan = make_plan(p, {pass, true, pass == Pass::backward, s}, gpu);
            if (plan.strategy == Strategy::split) continue;
            const Plan masked = make_plan(p, {pass, true, pass == Pass::backward, s, false, true}, gpu);
            check(masked.strategy == plan.strategy || masked.strategy == Strategy::split, "split is the way out");
            const bool whole = pass == Pass::forward && masked.strategy == plan.strategy;
            const Team& team = plan.team;
            const Units u = units_of(p, team.walk, team.weights, team.columns);
            const Domain d = simplify(p.stats);
            std::vector<int> seen(size_t(d.numel()), 0);
            const int64_t lines = team.block_lines(u), columns = team.block_columns(u, plan.vec);
            for (int64_t unit = 0; unit < u.count(); ++unit)
              for (int rank = 0; rank < team.blocks; ++rank) {
                const int64_t b = unit % u.batch, k = unit / u.batch;
                const int64_t wide = least(u.columns, u.span - k * u.inner);
                const int64_t line = team.by_lines ? rank * lines : 0, column = team.by_lines ? 0 : rank * columns;
                int64_t accesses = 0;
                for (int64_t l = line; l < least(line + lines, u.lines); ++l) {
                  const int64_t begin = b * u.outer + k * u.inner + l * u.pitch;
                  for (int64_t c = column; c < least(column + columns, wide); ++c) ++seen[size_t(begin + c)];
                  const int64_t first = begin + column, end = begin + least(column + columns, wide);
                  check(!whole || (first % plan.vec == 0 && end % plan.vec == 0), "a byte of the mask has one writer");
                  if (end > first) accesses = most(accesses, ceil_div(end, plan.vec) - first / plan.vec);
                }
                check(accesses <= team.slots(u, plan.vec), "accesses of a line: %ld", long(accesses));
              }
            for (const int times : seen) check(times == 1, "an element is in %d shares", times);
            check(team.depth(u, plan.vec) * team.threads() >= lines * team.slots(u, plan.vec), "room for every access");
            check(team.teams * team.blocks == plan.fused.blocks, "every team has its blocks");
            check(team.first(u, 0) == 0 && team.first(u, team.teams) >= u.count(), "teams cover the units");
            for (int64_t one = 0; one < team.teams; ++one) {
              const int64_t first = team.first(u, one), past = least(team.first(u, one + 1), u.count());
              check(first < past, "every team has a unit");
              check(team.team_of(u, first) == one && team.team_of(u, past - 1) == one, "team of unit %ld", long(first));
            }
            const WeightRows rows = weight_rows(u, team);
            for (int64_t k = 0; k < u.beside; ++k) {
              const int64_t touching = team.team_of(u, (k + 1) * u.batch - 1) - team.team_of(u, k * u.batch) + 1;
              check(rows.rows == 0 || touching * rows.copies <= rows.rows, "a row for every team");
            }
            check(weight_rows(u, team).rows <= 2 * most(gpu.sms, team.blocks), "rows of sums: %ld",
                  long(weight_rows(u, team).rows));
          }
}

// Every column of every line belongs to exactly one place of one tile, the same for all lines of a lane.
void tiles() {
  for (int vec : {1, 2, 4, 8})
    for (int64_t keep : {1, 2, 3, 7, 32, 63, 320, 1000})
      for (int64_t cols : {1, 2, 3, 5, 8, 10, 20, 30, 49, 63})
        for (int64_t rows : {1, 2, 7, 100}) {
          const Domain d = {2, rows, keep, cols};
          const Tile tile = tile_of(d, vec);
          const int64_t line = keep * cols;
          check(tile.columns % cols == 0 && tile.columns <= kColumnThreads, "whole groups: %ld", long(tile.columns));
          check(tile.tiles * tile.columns >= line && (tile.tiles - 1) * tile.columns < line, "tiles cover a line");
          check(tile.lanes >= 1 && tile.width * tile.lanes <= kColumnThreads && tile.threads() <= kColumnThreads,
                "threads");
          check(tile.lanes * line % vec == 0, "a lane keeps its place within an access");
          for (int64_t row = 0; row < d.batch * rows; ++row)
            for (int64_t t = 0; t < tile.tiles; ++t) {
              const int64_t begin = row * line + t * tile.columns;
              const int64_t end = begin + tile.columns < (row + 1) * line ? begin + tile.columns : (row + 1) * line;
              if (!check(end - begin / vec * vec <= tile.width * vec, "width covers a tile wherever it begins")) return;
            }
        }
}

int64_t partials(const Problem& p, const Domain& domain, const Reduce& r) {
  const Domain d = reduced(domain, p.dtype);
  return r.parts == 1 ? 0 : r.parts * (r.walk == Walk::rows ? d.groups() : d.batch * d.keep * d.cols);
}

void plans() {
  const Gpu chips[] = {kH200, {4, 49152, 65536, 1 << 20, 1}, {58, 101376, 102400, 48 << 20, 1}};
  const Domain pairs[][2] = {{{1, 1, 1, 1}, {1, 1, 1, 1}},
                             {{1, 1, 1, 100000000}, {1, 1, 100000000, 1}},
                             {{1000000, 1, 1, 8}, {1, 1000000, 8, 1}},
                             {{4, 1, 1, 1000003}, {1, 4, 1000003, 1}},
                             {{2, 4096, 32, 10}, {1, 8192, 320, 1}},
                             {{64, 1, 1, 40960}, {1, 2, 320, 4096}},
                             {{1, 256, 64, 12544}, {1, 256, 64, 12544}},
                             {{1, 3211264, 64, 1}, {1, 3211264, 64, 1}},
                             {{1, 1000000, 3, 1}, {1, 1000000, 3, 1}},
                             {{1, 1, 1000003, 1}, {1, 1, 1000003, 1}},
                             {{1, 256, 2048, 49}, {1, 256, 2048, 49}}};
  for (const Gpu& gpu : chips)
    for (const auto& pair : pairs)
      for (DType t : {DType::f32, DType::f64, DType::f16, DType::bf16})
        for (Moments m : {Moments::mean_var, Moments::second, Moments::given})
          for (Pass pass : {Pass::forward, Pass::backward, Pass::moments})
            for (Strategy s : {Strategy::automatic, Strategy::warp, Strategy::block, Strategy::cluster,
                               Strategy::subgrid, Strategy::split})
              for (bool aligned : {true, false}) {
                if (pass == Pass::moments && m == Moments::given) continue;
                const Problem p = {pair[0], pair[1], m, Act::none, t, 1e-5};
                const Plan plan = make_plan(p, {pass, aligned, pass == Pass::backward, s}, gpu);
                for (const Launch& l : {plan.fused, plan.map, plan.reduce.launch, plan.affine.launch}) {
                  check(l.blocks >= 0 && l.blocks < INT32_MAX && l.threads <= 1024 && l.threads % 32 == 0,
                        "launch shape");
                  check(l.shared + kStaticShared <= gpu.smem_per_block, "shared memory");
                  check((l.blocks == 0) == (l.threads == 0), "a launch or none");
                }
                check(plan.vec == (aligned ? 16 / size_of(t) : 1), "vec");
                check((plan.fused.blocks > 0) == (plan.strategy != Strategy::split), "one strategy");
                check(s == Strategy::automatic || plan.strategy == s || plan.strategy == Strategy::split,
                      "as asked, or split");
                const Workspace w = workspace_of(p, plan, pass);
                check(w.bytes == plan.workspace_bytes && w.affine % kAlign == 0 && w.arrays % kAlign == 0, "workspace");
                const int64_t result = pass == Pass::backward ? int64_t(sizeof(Sums)) : int64_t(sizeof(Spread));
                check(w.affine - w.reduce >= partials(p, p.stats, plan.reduce) * result,
                      "room for the partials of reduce");
                check(w.arrays - w.affine >= partials(p, p.affine, plan.affine) * result,
                      "room for the partials of affine");
                const int64_t tensor = p.stats.numel() * size_of(t);
                check(plan.bytes_read >= tensor && (pass == Pass::moments || plan.bytes_written >= tensor),
                      "byte floor");
              }
}

}  // namespace
}  // namespace normkern::test

int main() {
  normkern::test::fast_division();
  normkern::test::cursors();
  normkern::test::slots();
  normkern::test::tiles();
  normkern::test::units();
  normkern::test::plans();
  return normkern::test::report("test_plan");
}
