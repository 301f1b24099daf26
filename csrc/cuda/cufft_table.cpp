// cufft_table.cpp: cuFFT's entry points, and the cache of its plans.
#include "cufft_table.h"

#include <dlfcn.h>

#include <list>
#include <string>

// The declarations are written by hand; where the real ones are at hand, they are held against them.
#if __has_include(<cufft.h>)
#include <cufft.h>

#include <type_traits>
static_assert(std::is_same_v<cufftHandle, int> && sizeof(cufftResult) == sizeof(int));
static_assert(std::is_same_v<decltype(&cufftMakePlanMany64),
                             cufftResult (*)(cufftHandle, int, long long*, long long*, long long, long long, long long*,
                                             long long, long long, cufftType, long long, size_t*)>);
static_assert(std::is_same_v<decltype(&cufftExecR2C), cufftResult (*)(cufftHandle, cufftReal*, cufftComplex*)>);
static_assert(CUFFT_R2C == 0x2a && CUFFT_C2R == 0x2c && CUFFT_D2Z == 0x6a && CUFFT_Z2D == 0x6c);
#endif

namespace normkern::cuda {
namespace {

enum Type : int { kR2C = 0x2a, kC2R = 0x2c, kD2Z = 0x6a, kZ2D = 0x6c };

struct Loaded {
  CufftTable table = {};
  std::string why;
};

template <class F>
bool find(void* library, const char* name, F& entry, std::string& why) {
  entry = reinterpret_cast<F>(dlsym(library, name));
  if (!entry) why = std::string("libcufft has no ") + name;
  return entry != nullptr;
}

Loaded load() {
  Loaded loaded;
  void* library = nullptr;
  // The one that torch has loaded, before any other: 12 comes with CUDA 13, 11 with CUDA 12.
  for (const int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})
    for (const char* name : {"libcufft.so.12", "libcufft.so.11"})
      if (!library) library = dlopen(name, mode);
  if (!library) {
    loaded.why = "libcufft.so.12 and libcufft.so.11 were not found (a CUDA build of PyTorch brings one)";
    return loaded;
  }
  CufftTable& t = loaded.table;
  std::string& why = loaded.why;
  (void)(find(library, "cufftCreate", t.create, why) && find(library, "cufftDestroy", t.destroy, why) &&
         find(library, "cufftSetStream", t.set_stream, why) &&
         find(library, "cufftSetAutoAllocation", t.set_auto_allocation, why) &&
         find(library, "cufftSetWorkArea", t.set_work_area, why) &&
         find(library, "cufftMakePlanMany64", t.make_plan, why) && find(library, "cufftExecR2C", t.exec_r2c, why) &&
         find(library, "cufftExecC2R", t.exec_c2r, why) && find(library, "cufftExecD2Z", t.exec_d2z, why) &&
         find(library, "cufftExecZ2D", t.exec_z2d, why));
  return loaded;
}

struct Entry {
  Fft fft;
  int plan;
  size_t bytes;
  bool captured;
};

// Never destroyed: at the end of the process the driver may be gone before it.
struct Cache {
  std::mutex mutex;
  std::list<Entry> entries;  // the latest used first
};

Cache& cache() {
  static Cache* const all = new Cache;
  return *all;
}

int make(const CufftTable& t, const Fft& fft, int& plan, size_t& bytes) {
  int error = t.create(&plan);
  if (error) return error;
  // The work area comes from torch's allocator, for each call.
  error = t.set_auto_allocation(plan, 0);
  long long n[] = {fft.rows, fft.cols};
  const long long real = fft.rows * fft.cols, complex = fft.rows * (fft.cols / 2 + 1);
  const int type = fft.wide ? (fft.inverse ? kZ2D : kD2Z) : (fft.inverse ? kC2R : kR2C);
  const long long in = fft.inverse ? complex : real, out = fft.inverse ? real : complex;
  if (!error) error = t.make_plan(plan, 2, n, nullptr, 1, in, nullptr, 1, out, type, fft.batch, &bytes);
  if (error) t.destroy(plan);
  return error;
}

}  // namespace

const CufftTable* cufft(const char** why) {
  static const Loaded loaded = load();
  if (why) *why = loaded.why.c_str();
  return loaded.why.empty() ? &loaded.table : nullptr;
}

FftPlan::FftPlan(const Fft& fft, bool captured) : lock_(cache().mutex), fft_(fft) {
  const CufftTable* t = cufft(nullptr);
  std::list<Entry>& entries = cache().entries;
  for (auto it = entries.begin(); it != entries.end(); ++it) {
    if (!(it->fft == fft)) continue;
    entries.splice(entries.begin(), entries, it);
    it->captured |= captured;
    plan_ = it->plan;
    bytes_ = it->bytes;
    return;
  }
  error_ = make(*t, fft, plan_, bytes_);
  if (error_) return;
  entries.push_front({fft, plan_, bytes_, captured});
  if (entries.size() <= kMaxFftPlans) return;
  for (auto it = entries.end(); it != entries.begin();) {
    --it;
    if (it->captured || it == entries.begin()) continue;
    t->destroy(it->plan);
    entries.erase(it);
    break;
  }
}

int FftPlan::run(void* in, void* out, void* work, void* stream) const {
  const CufftTable& t = *cufft(nullptr);
  int error = t.set_stream(plan_, stream);
  if (!error) error = t.set_work_area(plan_, work);
  if (error) return error;
  if (fft_.inverse)
    return fft_.wide ? t.exec_z2d(plan_, in, static_cast<double*>(out))
                     : t.exec_c2r(plan_, in, static_cast<float*>(out));
  return fft_.wide ? t.exec_d2z(plan_, static_cast<double*>(in), out) : t.exec_r2c(plan_, static_cast<float*>(in), out);
}

size_t fft_plans() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().entries.size();
}

}  // namespace normkern::cuda
