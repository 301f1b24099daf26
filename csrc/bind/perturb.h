// perturb.h: tensors to the arguments of core/perturb.h, once for every device, which supplies
// `run(tensors, rule, device_of)`.
#pragma once

#include "../core/perturb.h"
#include "tensor.h"

namespace normkern::bind {

using Tensors = std::vector<Tensor>;

inline void check_same_place(const Tensor& t, const Tensor& weight, const char* name) {
  check_same_device(t, weight, name);
  bool same = t.dim() == weight.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i)
    same = t.size(i) == weight.size(i) && (t.size(i) == 1 || t.stride(i) == weight.stride(i));
  STD_TORCH_CHECK(same, "normkern: ", name, " must have its weight's sizes and strides");
}

// Perturbs the weights by the gradients; copies get what they were.
template <class Device>
void perturb(Tensors weights, Tensors copies, Tensors grads, std::vector<double> rho, std::vector<int64_t> transformed,
             int64_t transform, bool maximum, double eta, double grad_scale) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(copies.size() == count && grads.size() == count && rho.size() == count && transformed.size() == count,
                  "normkern: perturb_ needs as many copies, grads, rho and transformed as weights; got ", count,
                  " weights");
  STD_TORCH_CHECK(transform >= 0 && transform <= int64_t(Transform::fisher), "normkern: transform must be 0 to 3; got ",
                  transform);
  std::vector<Perturbed> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &w = weights[i], &copy = copies[i], &grad = grads[i];
    if (w.numel() == 0) continue;
    check_dense(w);
    check_same_device(w, weights[0], "weight");
    check_same_place(copy, w, "copy");
    check_same_place(grad, w, "grad");
    const DType dtype = dtype_of(w, "weight");
    STD_TORCH_CHECK(dtype_of(copy, "copy") == dtype, "normkern: copy must have its weight's dtype");
    tensors.push_back({w.mutable_data_ptr(), copy.mutable_data_ptr(), grad.const_data_ptr(), w.numel(), rho[i], dtype,
                       dtype_of(grad, "grad"), transformed[i] != 0});
  }
  if (tensors.empty()) return;
  const Ascent rule{Transform(transform), maximum, eta, 1 / grad_scale};
  Device::run(tensors, rule, weights[0]);
}

}  // namespace normkern::bind
