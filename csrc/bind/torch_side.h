// torch_side.h: what calls are recognized and run by, lent by Python once; and the questions about torch that come up
// in every call, answered by _node where it is there, and by Python's functions otherwise.
#pragma once

#include <Python.h>

#include "dlpack.h"
#include "lent.h"

namespace normkern::bind {

struct TorchSide {
  PyObject *tensor = nullptr, *parameter = nullptr;  // types: these two exactly, no other subclass
  PyObject *empty_like = nullptr, *is_neg = nullptr, *is_grad_enabled = nullptr;
  PyObject* watchers = nullptr;  // a tuple of functions, each of which says whether something looks at this call
  PyObject* allowed = nullptr;   // whether this backend runs a call on that tensor
  // What that depends on, so that it is not asked where nothing is out of the ordinary: the variables of forward_ad and
  // of normkern.backends, and this backend, or None where it does not run at all.
  PyObject *forward_ad = nullptr, *backends = nullptr, *native = nullptr;
  PyObject* same_buffer = nullptr;  // of dy and x: dy laid out as x
  const DlExchange* exchange = nullptr;
  int64_t (*thread_count)() = nullptr;
  void (*run_on_threads)(int64_t tasks, void (*task)(void*, int64_t), void* state) = nullptr;
  const Lent* lent = nullptr;
};
inline TorchSide torch_side;

// Each of these: 0 or 1, or -1 with an exception set.

inline int truth(PyObject* answer) {
  const int said = answer ? PyObject_IsTrue(answer) : -1;
  Py_XDECREF(answer);
  return said;
}

inline int is_grad_enabled() {
  return torch_side.lent ? torch_side.lent->is_grad_enabled() : truth(PyObject_CallNoArgs(torch_side.is_grad_enabled));
}

inline int requires_grad(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  if (tensor == Py_None) return 0;
  return torch_side.lent ? torch_side.lent->requires_grad(tensor) : truth(PyObject_GetAttr(tensor, name));
}

// Whether something watches or transforms what happens now.
inline int watched() {
  if (torch_side.lent) return torch_side.lent->watched();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_side.watchers); ++i)
    if (const int watches = truth(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch_side.watchers, i))); watches != 0)
      return watches;
  return 0;
}

// Whether no forward-mode level is open, no backend is asked for, and this one is the first of all.
inline bool nothing_asked() {
  static PyObject *const level = PyUnicode_InternFromString("_current_level"),
                         *const forced = PyUnicode_InternFromString("_forced_anywhere"),
                         *const environment = PyUnicode_InternFromString("_environment"),
                         *const all = PyUnicode_InternFromString("BACKENDS");
  PyObject* at_level = PyDict_GetItemWithError(torch_side.forward_ad, level);
  if (!at_level || !PyLong_CheckExact(at_level) || PyLong_AsLong(at_level) >= 0) return false;
  PyObject* list = PyDict_GetItemWithError(torch_side.backends, forced);
  if (!list || !PyList_CheckExact(list) || PyList_GET_SIZE(list) != 0) return false;
  if (PyDict_GetItemWithError(torch_side.backends, environment) != Py_None) return false;
  PyObject *known = PyDict_GetItemWithError(torch_side.backends, all), *name, *first;
  Py_ssize_t place = 0;
  return known && PyDict_CheckExact(known) && PyDict_Next(known, &place, &name, &first) && first == torch_side.native;
}

// Whether a backend was forced that is not this one, or calls are transformed where only Python can tell.
inline int allowed(PyObject* x) {
  if (nothing_asked()) return 1;
  PyErr_Clear();
  return truth(PyObject_CallOneArg(torch_side.allowed, x));
}

// Whether this is no view that stands for the negative of its memory, which DLPack does not show. Never -1.
inline bool plain(PyObject* tensor) {
  if (torch_side.lent) return torch_side.lent->plain(tensor);
  const int negated = truth(PyObject_CallOneArg(torch_side.is_neg, tensor));
  if (negated < 0) PyErr_Clear();
  return negated == 0;
}

inline PyObject* empty_like(PyObject* tensor) {
  return torch_side.lent ? torch_side.lent->empty_like(tensor) : PyObject_CallOneArg(torch_side.empty_like, tensor);
}

}  // namespace normkern::bind
