// lent.h: what _host and _node lend each other. _host has the kernels and knows no torch, so it asks Python; _node is
// built against one torch, and answers without Python in between.
#pragma once

#include <Python.h>

#include <cstdint>

namespace normkern::bind {

// Positions of the tensors in a call and in the argument lists of the two passes; None where there is none. The first
// kGradients may need gradients.
enum Slot { kX, kWeight, kBias, kResidual, kMean, kVar, kSlots };
constexpr int kGradients = 4;
constexpr long kNeedDresidual = 1 << kResidual;  // as in normkern/problem.py

constexpr char kPassesCapsule[] = "normkern._host.passes", kNodeCapsule[] = "normkern._node.lent";

// The passes of a remembered call, `known`, on tensors of Python by Slot. Failures are null, with an exception set.
struct Passes {
  // Different for every remembered call of this process.
  uint64_t (*number)(PyObject* known);
  // How many doubles forward writes to `moments` and backward reads there.
  int64_t (*moments_count)(PyObject* known);
  // Whether the backward pass reads what is in this slot.
  bool (*saves)(PyObject* known, int slot);
  // y; mean and var, where they are not given, move by `momentum`. `moments` may be null.
  PyObject* (*forward)(PyObject* known, PyObject* const* tensors, double* moments, PyObject* momentum);
  // A tuple, the gradients that `needs` asks for, None where not needed; None alone where this kernel cannot make them.
  PyObject* (*backward)(PyObject* known, PyObject* dy, PyObject* const* tensors, const double* moments, long needs);
};

// What to know about a tensor and about this thread, and y with its node in autograd's graph.
struct Lent {
  bool (*plain)(PyObject* tensor);  // neither negated nor conjugated
  bool (*requires_grad)(PyObject* tensor);
  bool (*is_grad_enabled)();
  bool (*watched)();
  PyObject* (*empty_like)(PyObject* tensor);
  PyObject* (*differentiable)(PyObject* known, PyObject* const* tensors, PyObject* momentum);
};

}  // namespace normkern::bind
