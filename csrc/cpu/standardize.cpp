// standardize.cpp: the lines of all tensors as one long row of elements, of which every task takes a stretch. What it
// takes of a tensor is a problem of its own, for the programs of forward.cpp and backward.cpp.
#include "standardize.h"

#include "layout.h"

namespace normkern::cpu {
namespace {

int64_t numel(const StandardizeForward& part) { return part.groups * part.cols; }
int64_t numel(const StandardizeBackward& part) { return part.groups * part.cols; }

template <class T>
T* advance(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + bytes) : nullptr;
}

template <class Vector>
Vector advance_vector(const Vector& v, int64_t count) {
  return {advance(v.data, count * size_of(v.dtype)), v.dtype};
}

// The lines of p, from line `first` of a tensor on.
void run(const Problem& p, const StandardizeForward& part, int64_t first, int64_t all_bytes) {
  const int64_t offset = first * part.cols * size_of(p.dtype);
  ForwardArgs a;
  a.x = advance(part.x, offset);
  a.weight = advance_vector(part.weight, first);
  a.y = advance(part.y, offset);
  if (part.mean_out) a.mean_out = part.mean_out + first;
  if (part.var_out) a.var_out = part.var_out + first;
  forward(p, a, Threads{}, all_bytes);
}

void run(const Problem& p, const StandardizeBackward& part, int64_t first, int64_t all_bytes) {
  const int64_t offset = first * part.cols * size_of(p.dtype);
  BackwardArgs a;
  a.dy = advance(part.dy, offset);
  a.x = advance(part.x, offset);
  a.weight = advance_vector(part.weight, first);
  a.mean = {part.mean + first, DType::f64};
  a.var = {part.var + first, DType::f64};
  a.dx = advance(part.dx, offset);
  a.dweight = advance_vector(part.dweight, first);
  backward(p, a, Threads{}, all_bytes);
}

template <class Part>
void over_all(const Standardize<Part>& a, const Threads& threads) {
  int64_t all = 0;
  for (int i = 0; i < a.count; ++i) all += numel(a.parts[i]);
  const int64_t tasks = wanted_tasks(all, threads);
  parallel(threads, tasks, [&](int64_t task) {
    // A line belongs to the task that has its first element.
    const int64_t begin = Grid::cut(all, tasks, task), end = Grid::cut(all, tasks, task + 1);
    int64_t start = 0;
    for (int i = 0; i < a.count && start < end; start += numel(a.parts[i++])) {
      const Part& part = a.parts[i];
      if (numel(part) == 0 || start + numel(part) <= begin) continue;
      const int64_t first = begin > start ? ceil_div(begin - start, part.cols) : 0;
      const int64_t past = std::min(part.groups, ceil_div(end - start, part.cols));
      if (first >= past) continue;
      const Domain lines = {past - first, 1, 1, part.cols};
      run(Problem{lines, lines, Moments::mean_var, Act::none, a.dtype, a.eps}, part, first, all * size_of(a.dtype));
    }
  });
}

}  // namespace

void standardize(const Standardize<StandardizeForward>& a, const Threads& threads) { over_all(a, threads); }
void standardize(const Standardize<StandardizeBackward>& a, const Threads& threads) { over_all(a, threads); }

}  // namespace normkern::cpu
