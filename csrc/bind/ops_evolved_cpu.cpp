// ops_evolved_cpu.cpp: the schemas of the evolved norms' operators in torch.ops.normkern, and what they are on the CPU.
#include "../cpu/evolved.h"
#include "tensor.h"
#include "torch_threads.h"

namespace normkern::bind {
namespace {

void run(const EvolvedArgs& a) { cpu::evolve(a, torch_threads()); }

EvolvedArgs arguments(const Tensor& x, const Tensor& rows, const Extents& domain, int64_t kind) {
  STD_TORCH_CHECK(kind == 0 || kind == 1, "normkern: kind must be 0 or 1; got ", kind);
  check_dense(x);
  EvolvedArgs a;
  a.kind = Evolved(kind);
  a.domain = domain_of(domain, x.numel(), "domain");
  a.dtype = dtype_of(x, "x");
  a.x = x.const_data_ptr();
  check_same_device(rows, x, "rows");
  STD_TORCH_CHECK(dtype_of(rows, "rows") == (a.dtype == DType::f64 ? DType::f64 : DType::f32) && rows.is_contiguous(),
                  "normkern: rows must be contiguous, and float32 but for float64 x");
  a.rows = rows.const_data_ptr();
  return a;
}

void check_rows(const EvolvedArgs& a, const Tensor& rows, int64_t least) {
  STD_TORCH_CHECK(rows.numel() >= least * a.domain.groups(), "normkern: rows must hold ", least, " rows of ",
                  a.domain.groups(), "; got ", rows.numel(), " elements");
}

Tensor evolve(const Tensor& x, const Tensor& rows, const Extents& domain, int64_t kind) {
  EvolvedArgs a = arguments(x, rows, domain, kind);
  check_rows(a, rows, forward_rows(a.kind));
  const Tensor y = new_like(x);
  a.out = y.mutable_data_ptr();
  run(a);
  return y;
}

Tensor evolve_sums(const Tensor& dy, const Tensor& x, const Tensor& rows, const Extents& domain, int64_t kind) {
  EvolvedArgs a = arguments(x, rows, domain, kind);
  check_rows(a, rows, sum_rows(a.kind));
  a.dy = same_buffer(dy, x, "dy");
  const Tensor sums = new_vector(x, sums_of(a.kind) * a.domain.groups(), aoti_torch_dtype_float64());
  a.sums = static_cast<double*>(sums.mutable_data_ptr());
  run(a);
  return sums;
}

Tensor evolve_backward(const Tensor& dy, const Tensor& x, const Tensor& rows, const Extents& domain, int64_t kind) {
  EvolvedArgs a = arguments(x, rows, domain, kind);
  check_rows(a, rows, backward_rows(a.kind));
  a.dy = same_buffer(dy, x, "dy");
  const Tensor dx = new_like(x);
  a.out = dx.mutable_data_ptr();
  run(a);
  return dx;
}

}  // namespace
}  // namespace normkern::bind

// domain is [batch, rows, keep, cols] of the instances, rows a table of coefficients, kind the value of the enum; all
// in core/evolved.h.
STABLE_TORCH_LIBRARY_FRAGMENT(normkern, library) {
  library.def("evolve(Tensor x, Tensor rows, SymInt[] domain, int kind) -> Tensor");
  library.def("evolve_sums(Tensor dy, Tensor x, Tensor rows, SymInt[] domain, int kind) -> Tensor");
  library.def("evolve_backward(Tensor dy, Tensor x, Tensor rows, SymInt[] domain, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(normkern, CPU, library) {
  library.impl("evolve", TORCH_BOX(&normkern::bind::evolve));
  library.impl("evolve_sums", TORCH_BOX(&normkern::bind::evolve_sums));
  library.impl("evolve_backward", TORCH_BOX(&normkern::bind::evolve_backward));
}
