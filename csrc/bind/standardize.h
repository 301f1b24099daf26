// standardize.h: lists of torch tensors to the parts of one standardization, and its two operators written once for
// every device. A device supplies static `run(Standardize<Part>, x)` for both kinds of parts.
#pragma once

#include "../core/standardize.h"
#include "tensor.h"

namespace normkern::bind {

using Tensors = std::vector<Tensor>;

// The first extent of x is the outermost in memory, so every line is contiguous.
template <class Part>
void set_lines(Part& part, const Tensor& x, const Tensor& first) {
  check_dense(x);
  check_same_device(x, first, "every x");
  STD_TORCH_CHECK(torch_dtype(x) == torch_dtype(first), "normkern: every x must have the same dtype");
  STD_TORCH_CHECK(x.dim() > 0, "normkern: x must have a dimension");
  part.groups = x.size(0);
  part.cols = x.numel() / part.groups;
  STD_TORCH_CHECK(part.groups == 1 || x.stride(0) == part.cols, "normkern: x must be dense along its first dimension");
  part.x = x.const_data_ptr();
}

// The weight of x; of size 0: absent.
inline OptionalTensor present(const Tensor& weight) { return weight.numel() ? OptionalTensor(weight) : std::nullopt; }

inline void check_lists(const Tensors& xs, size_t other, const char* name) {
  STD_TORCH_CHECK(!xs.empty() && other == xs.size(), "normkern: ", name, " must have an element for each x; got ",
                  other, " and ", xs.size());
}

template <class Part>
Standardize<Part> standardize_of(const std::vector<Part>& parts, const Tensor& x, double eps) {
  return {parts.data(), int(parts.size()), dtype_of(x, "x"), eps};
}

template <class Device>
std::tuple<Tensors, Tensor, Tensor> standardize(const Tensors& xs, const Tensors& weights, double eps, bool save) {
  check_lists(xs, weights.size(), "weight");
  std::vector<StandardizeForward> parts(xs.size());
  Tensors ys;
  int64_t channels = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    set_lines(parts[i], xs[i], xs[0]);
    channels += parts[i].groups;
    parts[i].weight = param_of(present(weights[i]), xs[i], parts[i].groups, "weight");
    ys.push_back(new_like(xs[i]));
    parts[i].y = ys[i].mutable_data_ptr();
  }
  const Tensor mean = new_vector(xs[0], save ? channels : 0, aoti_torch_dtype_float64());
  const Tensor var = new_vector(xs[0], save ? channels : 0, aoti_torch_dtype_float64());
  auto *mean_out = static_cast<double*>(data_or_null(mean)), *var_out = static_cast<double*>(data_or_null(var));
  for (auto& part : parts) {
    if (!save) break;
    part.mean_out = mean_out;
    part.var_out = var_out;
    mean_out += part.groups;
    var_out += part.groups;
  }
  Device::run(standardize_of(parts, xs[0], eps), xs[0]);
  return {ys, mean, var};
}

// `needs` has kNeedDx and kNeedDweight for every x; what has none of them needs no dy.
template <class Device>
std::tuple<Tensors, Tensors> standardize_backward(const Tensors& dys, const Tensors& xs, const Tensors& weights,
                                                  const Tensor& mean, const Tensor& var, double eps,
                                                  const std::vector<int64_t>& needs) {
  check_lists(xs, dys.size(), "dy");
  check_lists(xs, weights.size(), "weight");
  check_lists(xs, needs.size(), "needs");
  std::vector<StandardizeBackward> parts;
  Tensors dxs, dweights;
  const auto *means = static_cast<const double*>(mean.const_data_ptr()),
             *vars = static_cast<const double*>(var.const_data_ptr());
  int64_t channels = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    StandardizeBackward part;
    set_lines(part, xs[i], xs[0]);
    const OptionalTensor weight = present(weights[i]);
    STD_TORCH_CHECK(!(needs[i] & kNeedDweight) || weight, "normkern: the gradient of an absent weight was asked for");
    dxs.push_back(new_like(xs[i], needs[i] & kNeedDx));
    dweights.push_back(new_vector(xs[i], needs[i] & kNeedDweight ? part.groups : 0, torch_dtype(weights[i])));
    part.mean = means + channels;
    part.var = vars + channels;
    channels += part.groups;
    if (!needs[i]) continue;
    part.dy = same_buffer(dys[i], xs[i], "dy");
    part.weight = param_of(weight, xs[i], part.groups, "weight");
    part.dx = data_or_null(dxs[i]);
    part.dweight = {data_or_null(dweights[i]), dtype_of(dweights[i], "weight")};
    parts.push_back(part);
  }
  for (const Tensor* t : {&mean, &var}) {
    check_same_device(*t, xs[0], "mean and var");
    STD_TORCH_CHECK(torch_dtype(*t) == aoti_torch_dtype_float64() && t->is_contiguous() && t->numel() == channels,
                    "normkern: mean and var must be contiguous float64 with ", channels, " elements");
  }
  if (!parts.empty()) Device::run(standardize_of(parts, xs[0], eps), xs[0]);
  return {dxs, dweights};
}

template <class Device>
void implement_standardize(torch::stable::detail::StableLibrary& library) {
  library.impl("standardize", TORCH_BOX(&standardize<Device>));
  library.impl("standardize_backward", TORCH_BOX(&standardize_backward<Device>));
}

}  // namespace normkern::bind
