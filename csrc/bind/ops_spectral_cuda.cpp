// ops_spectral_cuda.cpp: the spectral operators of torch.ops.normkern on CUDA: workspace, plans, launches, checks.
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../cuda/cufft_table.h"
#include "../cuda/spectrum.h"
#include "spectral.h"
#include "torch_cuda.h"

namespace normkern::bind {
namespace {

// A device and its current stream, for one call.
class Call {
 public:
  explicit Call(const Tensor& x) : x_(x), device_(x.get_device_index()), guard_(device_) {
    stream_ = current_cuda_stream(device_);
  }
  int device() const { return device_; }
  void* stream() const { return stream_; }

  // From torch's caching allocator: it may be handed out again at once, but only to later work on this stream.
  Tensor bytes(int64_t count) const { return new_vector(x_, count, aoti_torch_dtype_uint8()); }

  Tensor waves(const Spectrum& s) const {
    const Tensor table = new_vector(x_, cuda::wave_count(s), aoti_torch_dtype_float64());
    check(cuda::make_waves(s, static_cast<double*>(table.mutable_data_ptr()), stream_), "launch failed");
    return table;
  }

  bool captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream_), &status), "cannot ask for a capture");
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  const Tensor& x_;
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

const double* doubles(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

void transform(const Call& call, const cuda::Fft& fft, void* in, void* out) {
  const cuda::FftPlan plan(fft, call.captured());
  STD_TORCH_CHECK(plan.error() == 0, "normkern: cuFFT error ", plan.error(), " while planning a ", fft.rows, " x ",
                  fft.cols, " transform (in a capture of a CUDA graph, plans must be there: warm up first)");
  const Tensor work = call.bytes(int64_t(plan.work_bytes()));
  const int error = plan.run(in, out, data_or_null(work), call.stream());
  STD_TORCH_CHECK(error == 0, "normkern: cuFFT error ", error, " in a ", fft.rows, " x ", fft.cols, " transform");
}

bool whole(const PreconditionArgs& a) {
  const Spectrum& s = a.spectrum;
  const int64_t dense[] = {s.channels * s.rows * s.cols, s.rows * s.cols, s.cols, 1};
  bool same = a.source_rows.count == s.rows && a.source_cols.count == s.cols;
  for (int i = 0; i < 4; ++i) same = same && a.x_strides[i] == dense[i];
  return same;
}

PointsArgs points_of(const PreconditionArgs& a, const int64_t (&strides)[4]) {
  PointsArgs p;
  p.dtype = a.dtype;
  p.batch = a.batch;
  p.channels = a.spectrum.channels;
  p.rows = a.spectrum.rows;
  p.cols = a.spectrum.cols;
  for (int i = 0; i < 4; ++i) p.strides[i] = strides[i];
  return p;
}

struct SpectralCuda {
  static void run(const LagsArgs& a, const Tensor& weight) {
    const Call call(weight);
    check(cuda::lags(a, call.stream()), "launch failed");
  }

  static void run(const Spectrum& s, DType dtype, void* v, const Tensor& lags) {
    const Call call(lags);
    const Tensor waves = call.waves(s);
    check(cuda::inverse_root(s, dtype, doubles(waves), v, call.stream()), "launch failed");
  }

  static void run(const MultiplyArgs& a, const Tensor& x) {
    const Call call(x);
    const Tensor waves = call.waves(a.spectrum);
    check(cuda::multiply(a, doubles(waves), 1, call.stream()), "launch failed");
  }

  static void run(const PreconditionArgs& a, const Tensor& x) {
    const char* why = nullptr;
    STD_TORCH_CHECK(cuda::cufft(&why), "normkern: precondition needs cuFFT: ", why);
    const Call call(x);
    const Spectrum& s = a.spectrum;
    const int64_t maps = a.batch * s.channels, size = size_of(a.dtype);
    const bool wide = a.dtype == DType::f64;
    Tensor torus;
    void* in = const_cast<void*>(a.x);  // cuFFT does not write to the input of a forward transform
    if (!whole(a)) {
      torus = call.bytes(maps * s.rows * s.cols * size);
      PointsArgs p = points_of(a, a.x_strides);
      p.row_points = a.source_rows;
      p.col_points = a.source_cols;
      p.from = a.x;
      p.to = in = torus.mutable_data_ptr();
      check(cuda::embed(p, call.stream()), "launch failed");
    }
    const Tensor spectrum = call.bytes(maps * s.rows * s.half() * 2 * size);
    transform(call, {call.device(), s.rows, s.cols, maps, wide, false}, in, spectrum.mutable_data_ptr());

    // Strides that divide the torus fold the spectrum: the inverse transform is shorter by them.
    const Tensor waves = call.waves(s);
    MultiplyArgs m;
    m.spectrum = s;
    m.dtype = a.dtype;
    m.batch = a.batch;
    if (s.rows % a.target_rows.step == 0 && a.target_rows.step > 1) {
      m.stride_rows = a.target_rows.step;
      m.first_row = a.target_rows.first;
    }
    if (s.cols % a.target_cols.step == 0 && a.target_cols.step > 1) {
      m.stride_cols = a.target_cols.step;
      m.first_col = a.target_cols.first;
    }
    const int64_t rows = s.rows / m.stride_rows, cols = s.cols / m.stride_cols;
    const bool folds = m.stride_rows > 1 || m.stride_cols > 1;
    const Tensor folded = folds ? call.bytes(maps * rows * cosines(cols) * 2 * size) : spectrum;
    m.x = spectrum.const_data_ptr();
    m.y = folded.mutable_data_ptr();
    check(cuda::multiply(m, doubles(waves), 1 / (double(rows) * double(cols)), call.stream()), "launch failed");

    const Tensor back = call.bytes(maps * rows * cols * size);
    transform(call, {call.device(), rows, cols, maps, wide, true}, folded.mutable_data_ptr(), back.mutable_data_ptr());
    PointsArgs p = points_of(a, a.y_strides);
    p.rows = rows;
    p.cols = cols;
    p.row_points = m.stride_rows > 1 ? Points{0, 1, a.target_rows.count} : a.target_rows;
    p.col_points = m.stride_cols > 1 ? Points{0, 1, a.target_cols.count} : a.target_cols;
    p.from = back.const_data_ptr();
    p.to = a.y;
    check(cuda::crop(p, call.stream()), "launch failed");
  }
};

// Empty where precondition can run on CUDA tensors of this process.
std::string cufft_why_not() {
  const char* why = nullptr;
  return cuda::cufft(&why) ? "" : why;
}

int64_t cufft_plans() { return int64_t(cuda::fft_plans()); }

}  // namespace
}  // namespace normkern::bind

STABLE_TORCH_LIBRARY_FRAGMENT(normkern, library) {
  library.def("cufft_why_not() -> str");
  library.def("cufft_plans() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CompositeExplicitAutograd, library) {
  library.impl("cufft_why_not", TORCH_BOX(&normkern::bind::cufft_why_not));
  library.impl("cufft_plans", TORCH_BOX(&normkern::bind::cufft_plans));
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CUDA, library) {
  normkern::bind::implement_spectral<normkern::bind::SpectralCuda>(library);
}
