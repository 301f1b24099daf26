// perturb.cpp: the ascent of core/perturb.h in two sweeps over all tensors: the norm, and the step.
#include "perturb.h"

#include <cmath>
#include <cstring>

#include "layout.h"
#include "perturb_loops.h"

namespace normkern::cpu {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements of a tensor that one thread takes at a time

const PerturbLoops& loops() {
#if defined(__x86_64__)
  static const PerturbLoops* const chosen = [] {
    if (!std::strcmp(instruction_set(), "avx512")) return &avx512::kPerturbLoops;
    return std::strcmp(instruction_set(), "avx2") ? &baseline::kPerturbLoops : &avx2::kPerturbLoops;
  }();
  return *chosen;
#else
  return baseline::kPerturbLoops;
#endif
}

}  // namespace

void perturb(const std::vector<Perturbed>& tensors, const Ascent& rule, const Threads& threads) {
  const int count = int(tensors.size());
  std::vector<int64_t> starts(tensors.size() + 1);
  const int64_t pieces = cut(tensors.data(), count, kPiece, starts.data());
  int64_t elements = 0;
  for (const Perturbed& t : tensors) elements += t.count;
  // A norm layer's few numbers are not worth another thread's waking.
  const Threads alone, &use = elements < 2 * kGrain ? alone : threads;
  const auto at = [&](int64_t piece) { return piece_at(tensors.data(), starts.data(), count, kPiece, piece); };

  std::vector<Sums> sums(size_t(pieces), Sums{});
  parallel(use, pieces, [&](int64_t piece) {
    const Piece p = at(piece);
    sums[size_t(piece)] = loops().sum(tensors[size_t(p.tensor)], rule, p.begin, p.end);
  });
  std::vector<double> layers(tensors.size());
  double square = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Sums own;
    for (int64_t piece = starts[i]; piece < starts[i + 1]; ++piece) own = merge(own, sums[size_t(piece)]);
    own = settled(transform_of(rule, tensors[i]), rule.eta, own);
    layers[i] = own.first;
    square += own.second;
  }
  const double norm = std::sqrt(square);
  parallel(use, pieces, [&](int64_t piece) {
    const Piece p = at(piece);
    const Perturbed& t = tensors[size_t(p.tensor)];
    loops().move(t, rule, p.begin, p.end, layers[size_t(p.tensor)], climbs(norm) ? rate(rule, t.rho, norm) : 0);
  });
}

}  // namespace normkern::cpu
