// tensor.h: torch tensors to a Problem and raw pointers, and the three operators written once for every device.
//
// Only libtorch's stable ABI is in reach: the build sets TORCH_TARGET_VERSION, and any other torch header is then a
// compile error. Users' mistakes are answered in Python; the checks here keep memory safe when an operator is called
// directly. A device supplies static `run(problem, args, x)` for each of the three argument structs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../core/arguments.h"
#include "../core/walk.h"

namespace normkern::bind {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Extents = std::vector<int64_t>;  // batch, rows, keep, cols

// Bits of backward's `needs`.
enum Needs : int64_t { kNeedDx = 1, kNeedDweight = 2, kNeedDbias = 4, kNeedDresidual = 8 };

inline int32_t torch_dtype(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline DType dtype_of(const Tensor& t, const char* name) {
  const int32_t dtype = torch_dtype(t);
  if (dtype == aoti_torch_dtype_float32()) return DType::f32;
  if (dtype == aoti_torch_dtype_float16()) return DType::f16;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float64(), "normkern: ", name,
                  " must be float64, float32, float16 or bfloat16; got dtype code ", dtype);
  return DType::f64;
}

// Allocation goes through the C shim: torch::stable::empty_like and new_empty look their operator up by name and call
// it boxed, about 1 us each.
inline Tensor new_strided(const Tensor& device_of, int64_t dim, const int64_t* sizes, const int64_t* strides,
                          int32_t dtype) {
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(device_of.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device, index, &handle));
  return Tensor(handle);
}

inline Tensor new_vector(const Tensor& device_of, int64_t count, int32_t dtype) {
  const int64_t stride = 1;
  return new_strided(device_of, 1, &count, &stride, dtype);
}

// Same sizes, strides and dtype as x, or nothing at all.
inline Tensor new_like(const Tensor& x, bool wanted = true) {
  if (!wanted) return new_vector(x, 0, torch_dtype(x));
  return new_strided(x, x.dim(), x.sizes().data(), x.strides().data(), torch_dtype(x));
}

inline void* data_or_null(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

// The four extents must multiply to numel; dividing instead of multiplying cannot overflow.
inline Domain domain_of(const Extents& extents, int64_t numel, const char* name) {
  STD_TORCH_CHECK(extents.size() == 4, "normkern: ", name, " must hold batch, rows, keep and cols; got ",
                  extents.size(), " extents");
  int64_t left = numel;
  for (const int64_t extent : extents) {
    STD_TORCH_CHECK(extent > 0 && left % extent == 0, "normkern: the extents of ", name, " must multiply to ", numel,
                    "; got an extent of ", extent);
    left /= extent;
  }
  STD_TORCH_CHECK(left == 1, "normkern: the extents of ", name, " must multiply to ", numel);
  return {extents[0], extents[1], extents[2], extents[3]};
}

// Every element of x lies in [data, data + numel): kernels walk that range in memory order.
inline void check_dense(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t span = 1;
  for (size_t i = 0; i < sizes.size(); ++i) span += (sizes[i] - 1) * strides[i];
  STD_TORCH_CHECK(x.numel() > 0 && span == x.numel(), "normkern: x must be dense and not empty; got ", x.numel(),
                  " elements over a span of ", span);
}

inline void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), "normkern: ", name,
                  " must be on x's device");
}

// t lists the same elements as x in the same memory order. The stride of an extent of 1 says nothing.
inline const void* same_buffer(const Tensor& t, const Tensor& x, const char* name) {
  check_same_device(t, x, name);
  bool same = t.dim() == x.dim() && torch_dtype(t) == torch_dtype(x);
  for (int64_t i = 0; same && i < x.dim(); ++i) {
    same = t.size(i) == x.size(i) && (x.size(i) == 1 || t.stride(i) == x.stride(i));
  }
  STD_TORCH_CHECK(same, "normkern: ", name, " must have x's sizes, strides and dtype");
  return t.const_data_ptr();
}

inline const void* same_buffer(const OptionalTensor& t, const Tensor& x, const char* name) {
  return t ? same_buffer(*t, x, name) : nullptr;
}

inline Param param_of(const OptionalTensor& t, const Tensor& x, int64_t count, const char* name) {
  if (!t) return {};
  check_same_device(*t, x, name);
  STD_TORCH_CHECK(t->numel() == count && t->is_contiguous(), "normkern: ", name, " must be contiguous with ", count,
                  " elements; got ", t->numel());
  return {t->const_data_ptr(), dtype_of(*t, name)};
}

inline Problem problem_of(const Tensor& x, const Extents& stats, const Extents& affine, int64_t moments, int64_t act,
                          double eps) {
  STD_TORCH_CHECK(moments >= 0 && moments <= int64_t(Moments::given), "normkern: moments must be 0 to 2; got ",
                  moments);
  STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::leaky_relu), "normkern: act must be 0 to 4; got ", act);
  check_dense(x);
  const int64_t numel = x.numel();
  return {domain_of(stats, numel, "stats"),
          domain_of(affine, numel, "affine"),
          Moments(moments),
          Act(act),
          dtype_of(x, "x"),
          eps};
}

// What moments and forward write: float64, one element a statistics group. A second moment has no mean.
struct SavedMoments {
  Tensor mean, var;

  SavedMoments(const Tensor& x, const Problem& p, bool save)
      : mean(new_vector(x, save && p.moments == Moments::mean_var ? p.stats.groups() : 0, aoti_torch_dtype_float64())),
        var(new_vector(x, save && p.moments != Moments::given ? p.stats.groups() : 0, aoti_torch_dtype_float64())) {}
};

// The rest of a forward pass, once `a` has what only some of them take.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> run_forward(const Problem& p, ForwardArgs a, const Tensor& x,
                                               const OptionalTensor& weight, const OptionalTensor& bias, bool save) {
  const Tensor y = new_like(x);
  const SavedMoments saved(x, p, save);
  a.x = x.const_data_ptr();
  a.weight = param_of(weight, x, p.affine.groups(), "weight");
  a.bias = param_of(bias, x, p.affine.groups(), "bias");
  a.y = y.mutable_data_ptr();
  a.mean_out = static_cast<double*>(data_or_null(saved.mean));
  a.var_out = static_cast<double*>(data_or_null(saved.var));
  Device::run(p, a, x);
  return {y, saved.mean, saved.var};
}

// `mean` and `var` are read where moments are given.
inline ForwardArgs forward_args_of(const Problem& p, const Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& mean, const OptionalTensor& var) {
  const bool given = p.moments == Moments::given;
  STD_TORCH_CHECK(!given || (mean && var), "normkern: given moments need mean and var");
  ForwardArgs a;
  a.residual = same_buffer(residual, x, "residual");
  if (given) {
    a.mean = param_of(mean, x, p.stats.groups(), "mean");
    a.var = param_of(var, x, p.stats.groups(), "var");
  }
  return a;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& residual, const OptionalTensor& mean,
                                           const OptionalTensor& var, const Extents& stats, const Extents& affine,
                                           int64_t moments, int64_t act, double eps, bool save) {
  const Problem p = problem_of(x, stats, affine, moments, act, eps);
  return run_forward<Device>(p, forward_args_of(p, x, residual, mean, var), x, weight, bias, save);
}

inline Running running_of(const Tensor& mean, const Tensor& var, const Tensor& x, int64_t channels, int64_t count,
                          double momentum) {
  STD_TORCH_CHECK(count > 1, "normkern: count must be at least 2; got ", count);
  const auto vector = [&](const Tensor& t, const char* name) {
    const DType dtype = param_of(t, x, channels, name).dtype;
    return Grad{t.mutable_data_ptr(), dtype};
  };
  return {vector(mean, "running_mean"), vector(var, "running_var"), double(count), momentum};
}

// The forward pass of a batch norm, every group of which is a channel, moves its running statistics too.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> batch_forward(const Tensor& x, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const OptionalTensor& residual,
                                                 Tensor running_mean, Tensor running_var, const Extents& channels,
                                                 int64_t act, double eps, double momentum) {
  const Problem p = problem_of(x, channels, channels, int64_t(Moments::mean_var), act, eps);
  ForwardArgs a;
  a.residual = same_buffer(residual, x, "residual");
  a.running = running_of(running_mean, running_var, x, p.stats.groups(), p.stats.count(), momentum);
  return run_forward<Device>(p, a, x, weight, bias, true);
}

// With relu after a residual, and its mask, last. Running statistics, if given, are those of a batch norm and move.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_forward(const Tensor& any_x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, const Tensor& any_residual,
                                                          const OptionalTensor& mean, const OptionalTensor& var,
                                                          OptionalTensor running_mean, OptionalTensor running_var,
                                                          const Extents& stats, const Extents& affine, int64_t moments,
                                                          double eps, double momentum) {
  const Problem p = problem_of(any_x, stats, affine, moments, int64_t(Act::relu), eps);
  // Only whole accesses write masks.
  const Tensor x = Device::at_a_boundary(any_x), residual = Device::at_a_boundary(any_residual);
  ForwardArgs a = forward_args_of(p, x, residual, mean, var);
  if (running_mean && running_var) {
    STD_TORCH_CHECK(p.moments == Moments::mean_var && p.stats == p.affine,
                    "normkern: running statistics that move are of a batch norm");
    a.running = running_of(*running_mean, *running_var, x, p.stats.groups(), p.stats.count(), momentum);
  }
  const Tensor mask = new_vector(x, mask_bytes(p), aoti_torch_dtype_uint8());
  a.mask_out = static_cast<unsigned char*>(mask.mutable_data_ptr());
  const auto [y, mean_out, var_out] = run_forward<Device>(p, a, x, weight, bias, true);
  return {y, mean_out, var_out, mask};
}

// The norm of x + add, and that sum, second.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& add, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, const Extents& stats,
                                                       const Extents& affine, int64_t moments, double eps, bool save) {
  const Problem p = problem_of(x, stats, affine, moments, int64_t(Act::none), eps);
  STD_TORCH_CHECK(p.moments != Moments::given, "normkern: the moments of a sum are computed, not given");
  const Tensor total = new_like(x);
  ForwardArgs a;
  a.add = same_buffer(add, x, "add");
  a.total = total.mutable_data_ptr();
  const auto [y, mean, var] = run_forward<Device>(p, a, x, weight, bias, save);
  return {y, total, mean, var};
}

// The rest of a backward pass, once `a` has what only some of them take.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Problem& p, BackwardArgs a, const Tensor& dy,
                                                        const Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, const OptionalTensor& mean,
                                                        const OptionalTensor& var, int64_t needs) {
  STD_TORCH_CHECK(var && (mean || p.moments == Moments::second), "normkern: backward needs the moments of forward");

  // A gradient has its parameter's dtype; without the parameter there is none to ask for.
  const auto parameter_gradient = [&](const OptionalTensor& of, int64_t bit, const char* name) {
    STD_TORCH_CHECK(!(needs & bit) || of, "normkern: the gradient of an absent ", name, " was asked for");
    return new_vector(x, needs & bit ? p.affine.groups() : 0, torch_dtype(of ? *of : x));
  };
  const Tensor dx = new_like(x, needs & kNeedDx), dresidual = new_like(x, needs & kNeedDresidual);
  const Tensor dweight = parameter_gradient(weight, kNeedDweight, "weight");
  const Tensor dbias = parameter_gradient(bias, kNeedDbias, "bias");

  a.dy = same_buffer(dy, x, "dy");
  a.x = x.const_data_ptr();
  a.weight = param_of(weight, x, p.affine.groups(), "weight");
  a.bias = param_of(bias, x, p.affine.groups(), "bias");
  a.mean = param_of(p.moments == Moments::second ? std::nullopt : mean, x, p.stats.groups(), "mean");
  a.var = param_of(var, x, p.stats.groups(), "var");
  a.dx = data_or_null(dx);
  a.dweight = {data_or_null(dweight), dtype_of(dweight, "weight")};
  a.dbias = {data_or_null(dbias), dtype_of(dbias, "bias")};
  a.dresidual = data_or_null(dresidual);
  if (needs) Device::run(p, a, x);
  return {dx, dweight, dbias, dresidual};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                                    const OptionalTensor& mean, const OptionalTensor& var,
                                                    const Extents& stats, const Extents& affine, int64_t moments,
                                                    int64_t act, double eps, int64_t needs) {
  const Problem p = problem_of(x, stats, affine, moments, act, eps);
  BackwardArgs a;
  if (residual && torch_dtype(*residual) == aoti_torch_dtype_uint8()) {
    check_same_device(*residual, x, "mask");
    STD_TORCH_CHECK(
        Device::kMasks && p.act == Act::relu && residual->is_contiguous() && residual->numel() == mask_bytes(p),
        "normkern: a mask must be what masked_forward left; got ", residual->numel(), " bytes");
    a.mask = static_cast<const unsigned char*>(residual->const_data_ptr());
  } else {
    a.residual = same_buffer(residual, x, "residual");
  }
  return run_backward<Device>(p, a, dy, x, weight, bias, mean, var, needs);
}

// dx has dtotal, the gradient that reached x past the norm, added to it.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_backward(const Tensor& dy, const Tensor& dtotal, const Tensor& x,
                                                const OptionalTensor& weight, const OptionalTensor& bias,
                                                const OptionalTensor& mean, const OptionalTensor& var,
                                                const Extents& stats, const Extents& affine, int64_t moments,
                                                double eps, int64_t needs) {
  const Problem p = problem_of(x, stats, affine, moments, int64_t(Act::none), eps);
  STD_TORCH_CHECK(p.moments != Moments::given, "normkern: the moments of a sum are computed, not given");
  STD_TORCH_CHECK(!(needs & kNeedDresidual), "normkern: a sum has no residual");
  BackwardArgs a;
  a.dtotal = same_buffer(dtotal, x, "dtotal");
  const auto [dx, dweight, dbias, none] = run_backward<Device>(p, a, dy, x, weight, bias, mean, var, needs);
  return {dx, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor> moments(const Tensor& x, const Extents& stats, int64_t moments) {
  const Problem p = problem_of(x, stats, stats, moments, int64_t(Act::none), 0);
  STD_TORCH_CHECK(p.moments != Moments::given, "normkern: given moments are not computed");
  const SavedMoments saved(x, p, true);
  MomentsArgs a;
  a.x = x.const_data_ptr();
  a.mean_out = static_cast<double*>(data_or_null(saved.mean));
  a.var_out = static_cast<double*>(data_or_null(saved.var));
  Device::run(p, a, x);
  return {saved.mean, saved.var};
}

// mean and var are float64 with a whole number of batches of running_mean.numel() channels each.
template <class Device>
void update_running(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var, int64_t count,
                    double momentum) {
  const auto moments = [&](const Tensor& t, const char* name) {
    check_same_device(t, running_mean, name);
    STD_TORCH_CHECK(torch_dtype(t) == aoti_torch_dtype_float64() && t.is_contiguous() && t.numel() == mean.numel(),
                    "normkern: ", name, " must be contiguous float64 with ", mean.numel(), " elements");
    return static_cast<const double*>(t.const_data_ptr());
  };
  const int64_t channels = running_mean.numel();
  STD_TORCH_CHECK(channels > 0 && mean.numel() > 0 && mean.numel() % channels == 0,
                  "normkern: mean must hold batches of ", channels, " channels; got ", mean.numel(), " elements");
  RunningArgs a;
  a.running = running_of(running_mean, running_var, running_mean, channels, count, momentum);
  a.batch_mean = moments(mean, "mean");
  a.batch_var = moments(var, "var");
  a.batch = mean.numel() / channels;
  a.channels = channels;
  Device::run(a, running_mean);
}

template <class Device>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("forward", TORCH_BOX(&forward<Device>));
  library.impl("batch_forward", TORCH_BOX(&batch_forward<Device>));
  library.impl("backward", TORCH_BOX(&backward<Device>));
  library.impl("moments", TORCH_BOX(&moments<Device>));
  library.impl("add_forward", TORCH_BOX(&add_forward<Device>));
  library.impl("add_backward", TORCH_BOX(&add_backward<Device>));
}

}  // namespace normkern::bind
