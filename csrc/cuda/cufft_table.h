// cufft_table.h: cuFFT without a dependency at build or link time. Its few entry points are taken, on first use, from
// the library that this process has loaded already (torch's), or else from the system's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace normkern::cuda {

struct CufftTable {
  int (*create)(int* plan);
  int (*destroy)(int plan);
  int (*set_stream)(int plan, void* stream);
  int (*set_auto_allocation)(int plan, int on);
  int (*set_work_area)(int plan, void* area);
  int (*make_plan)(int plan, int rank, long long* n, long long* inembed, long long istride, long long idist,
                   long long* onembed, long long ostride, long long odist, int type, long long batch, size_t* bytes);
  int (*exec_r2c)(int plan, float* in, void* out);
  int (*exec_c2r)(int plan, void* in, float* out);
  int (*exec_d2z)(int plan, double* in, void* out);
  int (*exec_z2d)(int plan, void* in, double* out);
};

// Null where there is no cuFFT; then *why is a sentence that says so.
const CufftTable* cufft(const char** why);

// A 2-D transform of `batch` dense maps: real to one-sided complex, or back (unscaled).
struct Fft {
  int device = 0;
  int64_t rows = 0, cols = 0, batch = 0;
  bool wide = false, inverse = false;

  constexpr bool operator==(const Fft& o) const {
    return device == o.device && rows == o.rows && cols == o.cols && batch == o.batch && wide == o.wide &&
           inverse == o.inverse;
  }
};

constexpr size_t kMaxFftPlans = 128;

// A plan from the cache, or a new one. Plans hold a stream and a work area while they are enqueued, so the cache is
// locked as long as this object lives. Of more than kMaxFftPlans the one that was used longest ago is destroyed, but
// never one that was used while a stream was captured (`captured`): a graph may run it again.
class FftPlan {
 public:
  FftPlan(const Fft& fft, bool captured);
  FftPlan(const FftPlan&) = delete;
  FftPlan& operator=(const FftPlan&) = delete;

  int error() const { return error_; }  // of cuFFT; 0: none
  size_t work_bytes() const { return bytes_; }
  // In and out must differ. An inverse transform overwrites its input.
  int run(void* in, void* out, void* work, void* stream) const;

 private:
  std::unique_lock<std::mutex> lock_;
  Fft fft_;
  int plan_ = 0, error_ = 0;
  size_t bytes_ = 0;
};

size_t fft_plans();  // in the cache now

}  // namespace normkern::cuda
