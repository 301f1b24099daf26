// call_key.h: tensors as C++ sees them through DLPack, and what identifies a call: everything that the checks of a norm
// look at.
#pragma once

#include <Python.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "../core/problem.h"
#include "torch_side.h"

namespace normkern::bind {

// Beyond this size what is saved is a trifle. Without torch's threads only what one thread does on the general path
// too, so that the bits are the same.
constexpr int64_t kMostElements = 1 << 22, kMostOfOneThread = 1 << 14;
constexpr int32_t kMostDims = 8;

struct Operand {
  DlTensor t;
  DType dtype;
  int64_t numel;
};

inline std::optional<DType> dtype_of(const DlTensor& t) {
  if (t.lanes != 1) return std::nullopt;
  if (t.code == kDlFloat && t.bits == 32) return DType::f32;
  if (t.code == kDlFloat && t.bits == 64) return DType::f64;
  if (t.code == kDlFloat && t.bits == 16) return DType::f16;
  if (t.code == kDlBfloat && t.bits == 16) return DType::bf16;
  return std::nullopt;
}

// False, with no exception set, for everything that is no plain tensor in memory.
inline bool look(PyObject* object, Operand& o) {
  PyTypeObject* type = Py_TYPE(object);
  if (type != reinterpret_cast<PyTypeObject*>(torch_side.tensor) &&
      type != reinterpret_cast<PyTypeObject*>(torch_side.parameter))
    return false;
  if (torch_side.exchange->view_object(object, &o.t) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto dtype = dtype_of(o.t);
  if (o.t.device_type != kDlCpu || !dtype || !o.t.data || o.t.ndim > kMostDims) return false;
  o.dtype = *dtype;
  o.numel = 1;
  for (int32_t i = 0; i < o.t.ndim; ++i) o.numel *= o.t.shape[i];
  return o.numel > 0 && o.numel <= (torch_side.run_on_threads ? kMostElements : kMostOfOneThread);
}

inline void* data(const Operand& o) { return static_cast<char*>(o.t.data) + o.t.byte_offset; }

inline bool contiguous(const Operand& o) {
  int64_t expected = 1;
  for (int32_t i = o.t.ndim - 1; i >= 0; expected *= o.t.shape[i--])
    if (o.t.shape[i] != 1 && o.t.strides[i] != expected) return false;
  return true;
}

inline bool same_layout(const Operand& a, const Operand& b) {
  return a.dtype == b.dtype && a.t.ndim == b.t.ndim && std::equal(a.t.shape, a.t.shape + a.t.ndim, b.t.shape) &&
         std::equal(a.t.strides, a.t.strides + a.t.ndim, b.t.strides);
}

// ---- what identifies a call ----

class Key {
 public:
  bool push(int64_t word) {
    if (size_ == words_.size()) return false;
    words_[size_++] = word;
    return true;
  }

  bool push_shape(const Operand& o) {
    bool ok = push(int64_t(o.dtype) << 8 | o.t.ndim);
    for (int32_t i = 0; i < o.t.ndim && ok; ++i) ok = push(o.t.shape[i]);
    return ok;
  }

  bool push_strides(const Operand& o) {
    bool ok = true;
    for (int32_t i = 0; i < o.t.ndim && ok; ++i) ok = push(o.t.strides[i]);
    return ok;
  }

  // Types are told apart: True, 1 and 1.0 are equal to Python but not to the checks.
  bool push_option(PyObject* option) {
    if (option == Py_None) return push(kNone);
    if (PyBool_Check(option)) return push(option == Py_True ? kTrue : kFalse);
    if (PyLong_CheckExact(option)) return push(kInt) && push_int(option);
    if (PyFloat_CheckExact(option)) {
      int64_t bits = 0;
      const double value = PyFloat_AS_DOUBLE(option);
      std::memcpy(&bits, &value, sizeof bits);
      return push(kFloat) && push(bits);
    }
    if (PyUnicode_Check(option)) {
      Py_ssize_t length = 0;
      const char* text = PyUnicode_AsUTF8AndSize(option, &length);
      int64_t words[2] = {};
      if (!text) PyErr_Clear();
      if (!text || length > Py_ssize_t(sizeof words)) return false;
      std::memcpy(words, text, size_t(length));
      return push(kText) && push(words[0]) && push(words[1]);
    }
    const bool tuple = PyTuple_Check(option);
    if (!tuple && !PyList_Check(option)) return false;
    const Py_ssize_t count = tuple ? PyTuple_GET_SIZE(option) : PyList_GET_SIZE(option);
    bool ok = push(kSequence) && push(count);
    for (Py_ssize_t i = 0; i < count && ok; ++i) {
      PyObject* item = tuple ? PyTuple_GET_ITEM(option, i) : PyList_GET_ITEM(option, i);
      ok = PyLong_CheckExact(item) && push_int(item);
    }
    return ok;
  }

  bool operator==(const Key& other) const {
    return size_ == other.size_ && std::equal(words_.begin(), words_.begin() + size_, other.words_.begin());
  }

  size_t hash() const {
    uint64_t h = size_;
    for (size_t i = 0; i < size_; ++i) h = (h ^ uint64_t(words_[i])) * 0x9e3779b97f4a7c15u, h ^= h >> 29;
    return h;
  }

 private:
  enum Tag : int64_t { kNone, kTrue, kFalse, kInt, kFloat, kText, kSequence };

  bool push_int(PyObject* value) {
    int overflow = 0;
    const int64_t word = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0 && push(word);
  }

  std::array<int64_t, 56> words_;
  size_t size_ = 0;
};

struct HashOfKey {
  size_t operator()(const Key& key) const { return key.hash(); }
};

// `arguments`: the name of the norm, the six tensors or None, then options. False: a call that is not for this file.
inline bool key_of(PyObject* const* arguments, Py_ssize_t count, Key& key) {
  Operand x, other;
  PyObject* const* tensors = arguments + 1;
  if (count <= kSlots || !look(tensors[kX], x) || !plain(tensors[kX])) return false;
  if (!key.push_option(arguments[0]) || !key.push_shape(x) || !key.push_strides(x)) return false;
  for (int slot = kWeight; slot < kSlots; ++slot) {
    if (tensors[slot] == Py_None) {
      if (!key.push(-1)) return false;
      continue;
    }
    if (!look(tensors[slot], other) || !plain(tensors[slot])) return false;
    const bool fits = slot == kResidual ? same_layout(other, x) : contiguous(other);
    if (!fits || !key.push_shape(other)) return false;
  }
  for (Py_ssize_t i = 1 + kSlots; i < count; ++i)
    if (!key.push_option(arguments[i])) return false;
  return true;
}

}  // namespace normkern::bind
