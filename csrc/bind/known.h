// known.h: a call that was checked and remembered, and its two passes on tensors of Python.
#pragma once

#include "call_key.h"

namespace normkern::bind {

struct Known {
  PyObject_HEAD PyObject* problem;  // the same as normkern.problem.Problem
  Problem p;
  uint64_t number;  // of no other remembered call
  int32_t ndim;
  int64_t shape[kMostDims], strides[kMostDims];  // of x
};

inline PyTypeObject* known_type = nullptr;

// Makes known_type; -1 with a Python exception set if that fails.
int make_known_type();

// Of `problem`, which is p, on tensors laid out as x. Null with a Python exception set if that fails.
PyObject* make_known(PyObject* problem, const Problem& p, const Operand& x);

// How many doubles the moments of a forward pass are; none where they are given.
int64_t moments_count(const Problem& p);

// Whether backward reads what is in this slot.
bool saves(const Problem& p, int slot);

// y; null with a Python exception set. `tensors` are by Slot: mean and var are the moments where they are given, and
// otherwise running statistics to be moved by `momentum`. `moments`, which may be null, receives the means, where there
// are any, and then the variances.
PyObject* forward(const Known& known, PyObject* const* tensors, double* moments, PyObject* momentum);

// The gradients that `needs` asks for, a tuple (dx, dweight, dbias, dresidual), None where not needed; None alone where
// an operand does not fit (a saved tensor that a hook has changed, say). `moments` are those of forward.
PyObject* backward(const Known& known, PyObject* dy, PyObject* const* tensors, const double* moments, long needs);

}  // namespace normkern::bind
