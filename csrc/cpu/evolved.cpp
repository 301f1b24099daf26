// evolved.cpp: how the loops of evolved_loops.cpp are shared out.
//
// Where instances are runs of memory each task takes some of them; channels-last, each takes lines of the samples.
// Sums over parts of a sample merge in the order of the parts.
#include "evolved.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "evolved_loops.h"

namespace normkern::cpu {
namespace {

constexpr int64_t kGrain = 1 << 13;  // elements that are worth a thread

const EvolvedTable& table() {
#if defined(__x86_64__)
  static const EvolvedTable* const chosen = [] {
    if (!std::strcmp(instruction_set(), "avx512")) return &avx512::kEvolvedTable;
    return std::strcmp(instruction_set(), "avx2") ? &baseline::kEvolvedTable : &avx2::kEvolvedTable;
  }();
  return *chosen;
#else
  return baseline::kEvolvedTable;
#endif
}

template <class Task>
void parallel(const Threads& threads, int64_t tasks, Task task) {
  if (tasks == 1 || !threads.run) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  threads.run(tasks, [](void* state, int64_t i) { (*static_cast<Task*>(state))(i); }, &task);
}

template <class A>
void run(const EvolvedLoops<A>& loops, const EvolvedArgs& a, const Threads& threads) {
  Domain d = simplify(a.domain);
  if (d.rows == 1 && d.cols == 1) d = {1, 1, d.batch * d.keep, 1};  // an instance is one element
  const EvolvedJob<A> job = {a.x,    a.dy,   a.out,     static_cast<const A*>(a.rows), a.sums, d.batch, d.rows,
                             d.keep, d.cols, d.groups()};
  const int64_t wanted = std::max<int64_t>(1, std::min(threads.count, d.numel() / kGrain));
  if (d.cols > 1) {
    const int64_t tasks = std::min(wanted, d.groups());
    const auto loop = a.sums ? loops.sum_groups : a.dy ? loops.slope_groups : loops.map_groups;
    return parallel(threads, tasks,
                    [&](int64_t i) { loop(job, d.groups() * i / tasks, d.groups() * (i + 1) / tasks); });
  }
  // Whole samples where there are enough of them, else parts of each.
  const int64_t parts = d.batch >= wanted ? 1 : std::min((wanted + d.batch - 1) / d.batch, d.rows);
  const int64_t tasks = d.batch >= wanted ? wanted : d.batch * parts;
  const auto for_parts = [&](int64_t i, auto use) {
    if (parts > 1) return use(i / parts, i % parts);
    for (int64_t b = d.batch * i / tasks; b < d.batch * (i + 1) / tasks; ++b) use(b, int64_t(0));
  };
  if (!a.sums) {
    const auto loop = a.dy ? loops.slope_lines : loops.map_lines;
    return parallel(threads, tasks, [&](int64_t i) {
      for_parts(i, [&](int64_t b, int64_t part) { loop(job, b, d.rows * part / parts, d.rows * (part + 1) / parts); });
    });
  }
  const int64_t sums = sums_of(a.kind), groups = d.groups();
  std::vector<double> partial(size_t(sums * groups * parts), 0.0);
  parallel(threads, tasks, [&](int64_t i) {
    for_parts(i, [&](int64_t b, int64_t part) {
      loops.sum_lines(job, b, d.rows * part / parts, d.rows * (part + 1) / parts,
                      partial.data() + (part * sums * groups + b * d.keep), groups);
    });
  });
  for (int64_t k = 0; k < sums * groups; ++k) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[size_t(part * sums * groups + k)];
    a.sums[k] = sum;
  }
}

}  // namespace

void evolve(const EvolvedArgs& a, const Threads& threads) {
  const auto kind = size_t(a.kind);
  switch (a.dtype) {
    case DType::f32: return run(table().f32[kind], a, threads);
    case DType::f64: return run(table().f64[kind], a, threads);
    case DType::f16: return run(table().f16[kind], a, threads);
    case DType::bf16: return run(table().bf16[kind], a, threads);
  }
}

}  // namespace normkern::cpu
