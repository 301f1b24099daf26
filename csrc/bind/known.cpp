// known.cpp: forward and backward of a call that was checked, from Python objects to the kernels and back.
#include "known.h"

#include <memory>

#include "../cpu/entry.h"

namespace normkern::bind {
namespace {

cpu::Threads threads() {
  if (!torch_side.run_on_threads) return {};
  return {torch_side.thread_count(), torch_side.run_on_threads};
}

// Runs a kernel; other Python threads go on meanwhile where that is worth it.
template <class Kernel>
void unlocked(const Problem& p, Kernel kernel) {
  struct Release {
    PyThreadState* state;
    explicit Release(bool wanted) : state(wanted ? PyEval_SaveThread() : nullptr) {}
    ~Release() {
      if (state) PyEval_RestoreThread(state);
    }
  } release(p.stats.numel() > kMostOfOneThread);
  kernel();
}

// The operands of one pass. They fit by the key that found the call, but nothing keeps Python from passing others.
class Operands {
 public:
  explicit Operands(const Known& known) : known_(known) {}

  // A tensor that is laid out as x was.
  const Operand* buffer(PyObject* object, const char* name) {
    Operand* o = take(object, name);
    if (!o) return nullptr;
    const bool fits = o->dtype == known_.p.dtype && o->t.ndim == known_.ndim &&
                      std::equal(known_.shape, known_.shape + known_.ndim, o->t.shape) &&
                      std::equal(known_.strides, known_.strides + known_.ndim, o->t.strides);
    return fits ? o : fail(name);
  }

  void* data_of_buffer(PyObject* object, const char* name) {
    const Operand* o = object == Py_None ? nullptr : buffer(object, name);
    return o ? data(*o) : nullptr;
  }

  const Operand* vector(PyObject* object, const char* name, int64_t count) {
    Operand* o = take(object, name);
    if (!o) return nullptr;
    return o->numel == count && contiguous(*o) ? o : fail(name);
  }

  Param param(PyObject* object, const char* name, int64_t count) {
    if (object == Py_None) return {};
    const Operand* o = vector(object, name, count);
    return o ? Param{data(*o), o->dtype} : Param{};
  }

  bool failed() const { return failed_; }

 private:
  Operand* take(PyObject* object, const char* name) {
    if (look(object, operands_[used_])) return &operands_[used_++];
    return fail(name);
  }

  Operand* fail(const char* name) {
    if (!failed_) PyErr_Format(PyExc_ValueError, "normkern: %s does not fit the call that was remembered", name);
    failed_ = true;
    return nullptr;
  }

  const Known& known_;
  std::array<Operand, 12> operands_;
  size_t used_ = 0;
  bool failed_ = false;
};

// As backward, of a dy that is laid out as x; gradients by the kernel alone.
PyObject* dense_backward(const Known& known, PyObject* dy, PyObject* const* tensors, const double* moments,
                         long needs) {
  const Problem& p = known.p;
  Operands operands(known);
  const auto unfit = [] {
    PyErr_Clear();
    Py_RETURN_NONE;
  };
  BackwardArgs a;
  a.dy = operands.data_of_buffer(dy, "dy");
  a.x = operands.data_of_buffer(tensors[kX], "x");
  a.weight = operands.param(tensors[kWeight], "weight", p.affine.groups());
  a.bias = operands.param(tensors[kBias], "bias", p.affine.groups());
  a.residual = operands.data_of_buffer(tensors[kResidual], "residual");
  if (p.moments == Moments::given) {
    a.mean = operands.param(tensors[kMean], "mean", p.stats.groups());
    a.var = operands.param(tensors[kVar], "var", p.stats.groups());
  } else if (moments) {
    if (p.moments == Moments::mean_var) a.mean = {moments, DType::f64};
    a.var = {p.moments == Moments::mean_var ? moments + p.stats.groups() : moments, DType::f64};
  }
  if (operands.failed() || !a.dy || !plain(dy) || !a.x || !a.var.data || (!a.mean.data && p.moments != Moments::second))
    return unfit();
  PyObject* const like[kGradients] = {tensors[kX], tensors[kWeight], tensors[kBias], tensors[kX]};
  Operand made[kGradients];
  void* out[kGradients] = {};
  PyObject* result = PyTuple_New(kGradients);
  for (int i = 0; result && i < kGradients; ++i) {
    PyObject* gradient = Py_None;
    if (needs >> i & 1 && like[i] != Py_None) {
      gradient = empty_like(like[i]);
      if (!gradient) return Py_DECREF(result), nullptr;
      if (!look(gradient, made[i])) return Py_DECREF(gradient), Py_DECREF(result), unfit();
      out[i] = data(made[i]);
    } else {
      Py_INCREF(gradient);
    }
    PyTuple_SET_ITEM(result, i, gradient);
  }
  if (!result) return nullptr;
  a.dx = out[0];
  a.dweight = {out[1], a.weight.dtype};
  a.dbias = {out[2], a.bias.dtype};
  a.dresidual = out[3];
  unlocked(p, [&] { cpu::backward(p, a, threads()); });
  return result;
}

PyObject* problem_of(PyObject* self, void*) { return Py_NewRef(reinterpret_cast<Known*>(self)->problem); }

PyObject* strides_of(PyObject* self, void*) {
  const Known& known = *reinterpret_cast<Known*>(self);
  PyObject* strides = PyTuple_New(known.ndim);
  for (int32_t i = 0; strides && i < known.ndim; ++i)
    PyTuple_SET_ITEM(strides, i, PyLong_FromLongLong(known.strides[i]));
  return strides;
}

void release(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(reinterpret_cast<Known*>(self)->problem);
  type->tp_free(self);
  Py_DECREF(type);
}

PyGetSetDef known_attributes[] = {
    {"problem", problem_of, nullptr, "The problem, as Python knows it.", nullptr},
    {"strides", strides_of, nullptr, "The strides of x.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot known_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(release)},
    {Py_tp_getset, known_attributes},
    {0, nullptr},
};

PyType_Spec known_spec = {"normkern._host.Known", sizeof(Known), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, known_slots};

}  // namespace

int make_known_type() {
  known_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&known_spec));
  return known_type ? 0 : -1;
}

PyObject* make_known(PyObject* problem, const Problem& p, const Operand& x) {
  static uint64_t count = 0;
  auto* known = reinterpret_cast<Known*>(known_type->tp_alloc(known_type, 0));
  if (!known) return nullptr;
  known->problem = Py_NewRef(problem);
  known->p = p;
  known->number = count++;
  known->ndim = x.t.ndim;
  std::copy_n(x.t.shape, x.t.ndim, known->shape);
  std::copy_n(x.t.strides, x.t.ndim, known->strides);
  return reinterpret_cast<PyObject*>(known);
}

int64_t moments_count(const Problem& p) {
  if (p.moments == Moments::given) return 0;
  return p.stats.groups() * (p.moments == Moments::mean_var ? 2 : 1);
}

bool saves(const Problem& p, int slot) {
  if (slot == kResidual) return p.act != Act::none;
  return slot < kResidual || p.moments == Moments::given;
}

PyObject* forward(const Known& known, PyObject* const* in, double* moments, PyObject* momentum) {
  const Problem& p = known.p;
  Operands operands(known);
  ForwardArgs a;
  a.x = operands.data_of_buffer(in[kX], "x");
  a.weight = operands.param(in[kWeight], "weight", p.affine.groups());
  a.bias = operands.param(in[kBias], "bias", p.affine.groups());
  a.residual = operands.data_of_buffer(in[kResidual], "residual");
  const bool given = p.moments == Moments::given, moves = !given && in[kMean] != Py_None;
  if (moves) {
    const int64_t channels = p.affine.groups();
    const Param mean = operands.param(in[kMean], "mean", channels), var = operands.param(in[kVar], "var", channels);
    a.running = {{const_cast<void*>(mean.data), mean.dtype},
                 {const_cast<void*>(var.data), var.dtype},
                 double(p.stats.count()),
                 PyFloat_AsDouble(momentum)};
    if (!operands.failed() && (PyErr_Occurred() || !var.data || p.stats.count() < 2 || p.moments != Moments::mean_var))
      return PyErr_Occurred() ? nullptr : (PyErr_SetString(PyExc_ValueError, "normkern: nothing to move"), nullptr);
  } else if (given) {
    a.mean = operands.param(in[kMean], "mean", p.stats.groups());
    a.var = operands.param(in[kVar], "var", p.stats.groups());
    if (!operands.failed() && (!a.mean.data || !a.var.data)) {
      PyErr_SetString(PyExc_ValueError, "normkern: given moments need mean and var");
      return nullptr;
    }
  }
  std::unique_ptr<double[]> own;
  if (!moments && moves) {
    own.reset(new double[size_t(moments_count(p))]);
    moments = own.get();
  }
  if (operands.failed() || !a.x) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "normkern: no x");
  if (moments) {
    a.mean_out = p.moments == Moments::mean_var ? moments : nullptr;
    a.var_out = p.moments == Moments::mean_var ? moments + p.stats.groups() : moments;
  }
  PyObject* y = empty_like(in[kX]);
  if (!y) return nullptr;
  a.y = operands.data_of_buffer(y, "y");
  if (!a.y) return Py_DECREF(y), nullptr;
  unlocked(p, [&] { cpu::forward(p, a, threads()); });
  cpu::move_running(p, a);
  return y;
}

PyObject* backward(const Known& known, PyObject* dy, PyObject* const* tensors, const double* moments, long needs) {
  // Without an activation the residual's gradient is dy as it came.
  const bool passes_on = known.p.act == Act::none && needs & kNeedDresidual;
  if (passes_on) needs &= ~kNeedDresidual;
  PyObject* found = dense_backward(known, dy, tensors, moments, needs);
  if (found == Py_None) {
    Py_DECREF(found);
    PyObject* dense = PyObject_CallFunctionObjArgs(torch_side.same_buffer, dy, tensors[kX], nullptr);
    found = dense ? dense_backward(known, dense, tensors, moments, needs) : nullptr;
    Py_XDECREF(dense);
  }
  if (found && found != Py_None && passes_on) {
    Py_DECREF(PyTuple_GET_ITEM(found, kResidual));  // None, in a tuple that is still ours alone
    PyTuple_SET_ITEM(found, kResidual, Py_NewRef(dy));
  }
  return found;
}

}  // namespace normkern::bind
