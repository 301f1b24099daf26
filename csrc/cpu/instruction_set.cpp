// instruction_set.cpp: which build of norm.cpp runs, decided once, when first asked.
#include <cstdlib>
#include <cstring>

#include "entry.h"
#include "kernels.h"

namespace normkern::cpu {
namespace {

struct Choice {
  const char* name;
  const KernelTable* table;
};

#if defined(__x86_64__) && !defined(NK_ONE_INSTRUCTION_SET)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// NORMKERN_CPU lowers the choice; a set that this CPU lacks, or an unknown name, changes nothing.
Choice choose() {
#if defined(__x86_64__) && !defined(NK_ONE_INSTRUCTION_SET)
  const char* wanted = std::getenv("NORMKERN_CPU");
  const auto may_be = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
  const bool lowest = wanted && std::strcmp(wanted, "baseline") == 0;
  // Every CPU with AVX2 has F16C.
  if (!lowest && has_avx512() && (may_be("avx512") || !may_be("avx2"))) return {"avx512", &avx512::kTable};
  if (!lowest && has_avx2()) return {"avx2", &avx2::kTable};
  return {"baseline", &baseline::kTable};
#elif defined(__aarch64__)
  return {"neon", &baseline::kTable};
#else
  return {"baseline", &baseline::kTable};
#endif
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const KernelTable& kernels() { return *chosen().table; }
const char* instruction_set() { return chosen().name; }

}  // namespace normkern::cpu
