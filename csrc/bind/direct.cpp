// direct.cpp: small calls on the CPU, from Python objects to the kernel, past torch's dispatcher.
//
// A call of a microsecond's work spends ten in checks and in the dispatcher. So a call that Python has checked once is
// remembered by everything the checks look at: sizes, strides, dtypes and options. The next one like it is recognized
// here and runs at once. Tensors are seen through DLPack's exchange table, so nothing of torch is known; whatever is
// out of the ordinary (another device, a subclass, a view with a pending negation) is not recognized, and Python
// goes its usual way. normkern/direct.py decides when coming here is lawful at all.
#include "direct.h"

#include <exception>
#include <memory>
#include <unordered_map>

#include "../cpu/entry.h"
#include "call_key.h"

namespace normkern::bind {
namespace {

constexpr size_t kMostCalls = 4096;
constexpr long kNeedDresidual = 1 << 3;  // as in normkern/problem.py

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// C++ exceptions, of which only a lack of memory can occur, must not reach the interpreter.
template <FastFunction function>
PyObject* guarded(PyObject* self, PyObject* const* in, Py_ssize_t count) noexcept {
  try {
    return function(self, in, count);
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_MemoryError, "normkern: %s", error.what());
  }
}

template <FastFunction function>
PyCFunction fast() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<function>));
}

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

// ---- a call that was checked ----

struct Known {
  PyObject_HEAD PyObject* problem;  // the same as normkern.problem.Problem
  Problem p;
  int32_t ndim;
  int64_t shape[kMostDims], strides[kMostDims];  // of x
};

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

  // Memory for the moments of forward: a bytearray, since a tensor costs as much as the rest of the call.
  double* moments(PyObject* object, int64_t count) {
    if (PyByteArray_Check(object) && PyByteArray_GET_SIZE(object) == count * Py_ssize_t(sizeof(double)))
      return reinterpret_cast<double*>(PyByteArray_AS_STRING(object));
    return fail("moments"), nullptr;
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

PyObject* new_like(PyObject* tensor) { return PyObject_CallOneArg(torch_side.empty_like, tensor); }

bool arity(const char* name, Py_ssize_t got, Py_ssize_t wanted) {
  if (got == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments; got %zd", name, wanted, got);
  return false;
}

int64_t moments_count(const Problem& p) {
  if (p.moments == Moments::given) return 0;
  return p.stats.groups() * (p.moments == Moments::mean_var ? 2 : 1);
}

// y, from `in`: the tensors by Slot, moments, momentum.
//
// `mean` and `var` are the moments where they are given, and otherwise running statistics to be moved by `momentum`.
// `moments`, None or a bytearray, receives the means, where there are any, and then the variances.
PyObject* forward(const Known& known, PyObject* const (&in)[kSlots + 2]) {
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
                 PyFloat_AsDouble(in[kSlots + 1])};
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
  double* moments = nullptr;
  if (in[kSlots] != Py_None) {
    moments = operands.moments(in[kSlots], moments_count(p));
  } else if (moves) {
    own.reset(new double[size_t(moments_count(p))]);
    moments = own.get();
  }
  if (operands.failed() || !a.x) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "normkern: no x");
  if (moments) {
    a.mean_out = p.moments == Moments::mean_var ? moments : nullptr;
    a.var_out = p.moments == Moments::mean_var ? moments + p.stats.groups() : moments;
  }
  PyObject* y = new_like(in[kX]);
  if (!y) return nullptr;
  a.y = operands.data_of_buffer(y, "y");
  if (!a.y) return Py_DECREF(y), nullptr;
  unlocked(p, [&] { cpu::forward(p, a, threads()); });
  cpu::move_running(p, a);
  return y;
}

// The gradients that `needs` asks for, a tuple (dx, dweight, dbias, dresidual), None where not needed; None alone where
// an operand does not fit (dy laid out otherwise, or a saved tensor that a hook has changed). `tensors` are by Slot;
// moments are `moments` of forward, or `mean` and `var` as given.
PyObject* backward(const Known& known, PyObject* dy, PyObject* const* tensors, PyObject* forwards_moments, long needs) {
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
  } else if (const double* moments = operands.moments(forwards_moments, moments_count(p))) {
    if (p.moments == Moments::mean_var) a.mean = {moments, DType::f64};
    a.var = {p.moments == Moments::mean_var ? moments + p.stats.groups() : moments, DType::f64};
  }
  if (operands.failed() || !a.dy || negated(dy) || !a.x || !a.var.data ||
      (!a.mean.data && p.moments != Moments::second))
    return unfit();
  PyObject* const like[] = {tensors[kX], tensors[kWeight], tensors[kBias], tensors[kX]};
  Operand made[4];
  void* out[4] = {};
  PyObject* result = PyTuple_New(4);
  for (int i = 0; result && i < 4; ++i) {
    PyObject* gradient = Py_None;
    if (needs >> i & 1 && like[i] != Py_None) {
      gradient = new_like(like[i]);
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
PyTypeObject* known_type = nullptr;

using Table = std::unordered_map<Key, PyObject*, HashOfKey>;

Table& table() {
  static auto* calls = new Table;  // never destroyed: at exit the interpreter is gone before it would be
  return *calls;
}

void forget_all() {
  Table old;
  old.swap(table());
  for (auto& [key, known] : old) Py_DECREF(known);
}

// ---- the module's functions ----

PyObject* set_up(PyObject*, PyObject* args) {
  PyObject *tensor, *parameter, *empty_like, *is_neg, *is_grad_enabled, *watchers, *allowed, *apply, *same_buffer,
      *slow;
  unsigned long long thread_count, run_on_threads;
  if (!PyArg_ParseTuple(args, "OOOOOO!OOOOKK", &tensor, &parameter, &empty_like, &is_neg, &is_grad_enabled,
                        &PyTuple_Type, &watchers, &allowed, &apply, &same_buffer, &slow, &thread_count,
                        &run_on_threads))
    return nullptr;
  if (!PyType_Check(tensor) || !PyType_Check(parameter)) {
    PyErr_SetString(PyExc_TypeError, "set_up: the first two arguments must be types");
    return nullptr;
  }
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  const auto* exchange =
      capsule ? static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
  Py_XDECREF(capsule);  // the table itself lives as long as the process
  PyErr_Clear();
  if (!exchange || exchange->major != kDlMajor || !exchange->view_object) Py_RETURN_FALSE;
  for (PyObject* lent :
       {tensor, parameter, empty_like, is_neg, is_grad_enabled, watchers, allowed, apply, same_buffer, slow})
    Py_INCREF(lent);
  torch_side = {tensor,
                parameter,
                empty_like,
                is_neg,
                is_grad_enabled,
                watchers,
                allowed,
                apply,
                same_buffer,
                slow,
                exchange,
                reinterpret_cast<int64_t (*)()>(thread_count),
                reinterpret_cast<decltype(TorchSide::run_on_threads)>(run_on_threads)};
  Py_RETURN_TRUE;
}

// What a function of no arguments answers as true or false; -1 with an exception set.
int answer(PyObject* function) {
  PyObject* said = PyObject_CallNoArgs(function);
  const int truth = said ? PyObject_IsTrue(said) : -1;
  Py_XDECREF(said);
  return truth;
}

int requires_grad(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  if (tensor == Py_None) return 0;
  PyObject* said = PyObject_GetAttr(tensor, name);
  const int truth = said ? PyObject_IsTrue(said) : -1;
  Py_XDECREF(said);
  return truth;
}

// Whether something watches or transforms what happens now; -1 with an exception set.
int watched() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_side.watchers); ++i)
    if (const int watches = answer(PyTuple_GET_ITEM(torch_side.watchers, i)); watches != 0) return watches;
  return 0;
}

// Whether nothing stands against running a recognized call here; -1 with an exception set.
int lawful(PyObject* const* tensors) {
  if (const int watches = watched(); watches != 0) return watches < 0 ? -1 : 0;
  for (int slot : {kMean, kVar}) {
    const int learned = requires_grad(tensors[slot]);
    if (learned != 0) return learned < 0 ? -1 : 0;
  }
  PyObject* said = PyObject_CallOneArg(torch_side.allowed, tensors[kX]);
  const int truth = said ? PyObject_IsTrue(said) : -1;
  Py_XDECREF(said);
  return truth;
}

// run(call, momentum) -> y; None for a call that is not known, or not to be run here.
PyObject* run(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (!arity("run", count, 2)) return nullptr;
  if (!torch_side.exchange || !PyTuple_CheckExact(in[0])) Py_RETURN_NONE;
  PyObject* const* call = &PyTuple_GET_ITEM(in[0], 0);
  Key key;
  if (!key_of(call, PyTuple_GET_SIZE(in[0]), key)) Py_RETURN_NONE;
  const auto found = table().find(key);
  if (found == table().end()) Py_RETURN_NONE;
  PyObject* const* tensors = call + 1;
  const int may = lawful(tensors);
  if (may < 0) return nullptr;
  if (may == 0) Py_RETURN_NONE;
  int graph = answer(torch_side.is_grad_enabled);
  if (graph > 0) {
    graph = 0;
    for (int slot : {kX, kWeight, kBias, kResidual})
      if (graph == 0) graph = requires_grad(tensors[slot]);
  }
  if (graph < 0) return nullptr;
  PyObject* known = Py_NewRef(found->second);  // the table may change while Python runs
  PyObject* y = nullptr;
  if (graph) {
    // As few arguments as there can be: autograd looks at every one of them.
    PyObject* rest = PyTuple_Pack(4, known, tensors[kMean], tensors[kVar], in[1]);
    PyObject* const arguments[] = {rest, tensors[kX], tensors[kWeight], tensors[kBias], tensors[kResidual]};
    const size_t used = tensors[kResidual] != Py_None ? 5 : tensors[kBias] != Py_None ? 4 : 3;
    if (rest) y = PyObject_Vectorcall(torch_side.apply, arguments, used, nullptr);
    Py_XDECREF(rest);
  } else {
    PyObject* const plain[] = {tensors[kX],    tensors[kWeight], tensors[kBias], tensors[kResidual],
                               tensors[kMean], tensors[kVar],    Py_None,        in[1]};
    y = forward(*reinterpret_cast<Known*>(known), plain);
  }
  Py_DECREF(known);
  return y;
}

// differentiable_forward(ctx, (known, mean, var, momentum), x, weight, bias=None, residual=None) -> y: what the
// autograd.Function does. ctx gets what backward needs: tensors to save, and `known`, the pair of Known and moments.
PyObject* differentiable_forward(PyObject*, PyObject* const* in, Py_ssize_t count) {
  static PyObject* const save = PyUnicode_InternFromString("to_save");  // what ctx.save_for_backward assigns
  static PyObject* const attribute = PyUnicode_InternFromString("known");
  if (count < 4 || count > 6 || !PyTuple_CheckExact(in[1]) || PyTuple_GET_SIZE(in[1]) != 4 ||
      Py_TYPE(PyTuple_GET_ITEM(in[1], 0)) != known_type)
    return PyErr_Format(PyExc_TypeError, "differentiable_forward: arguments are not those of run");
  PyObject* known = PyTuple_GET_ITEM(in[1], 0);
  PyObject *mean = PyTuple_GET_ITEM(in[1], 1), *var = PyTuple_GET_ITEM(in[1], 2);
  PyObject *bias = count > 4 ? in[4] : Py_None, *residual = count > 5 ? in[5] : Py_None;
  const Problem& p = reinterpret_cast<Known*>(known)->p;
  const Py_ssize_t room = moments_count(p) * Py_ssize_t(sizeof(double));
  PyObject* moments = room ? PyByteArray_FromStringAndSize(nullptr, room) : Py_NewRef(Py_None);
  if (!moments) return nullptr;
  PyObject* const plain[] = {in[2], in[3], bias, residual, mean, var, moments, PyTuple_GET_ITEM(in[1], 3)};
  PyObject* y = forward(*reinterpret_cast<Known*>(known), plain);
  PyObject* pair = y ? PyTuple_Pack(2, known, moments) : nullptr;
  Py_DECREF(moments);
  // The backward pass sees the residual again only where an activation follows.
  if (p.act == Act::none) residual = Py_None;
  const bool given = p.moments == Moments::given;
  PyObject* saved = !pair   ? nullptr
                    : given ? PyTuple_Pack(6, in[2], in[3], bias, residual, mean, var)
                            : PyTuple_Pack(4, in[2], in[3], bias, residual);
  if (!saved || PyObject_SetAttr(in[0], save, saved) != 0 || PyObject_SetAttr(in[0], attribute, pair) != 0) Py_CLEAR(y);
  Py_XDECREF(saved);
  Py_XDECREF(pair);
  return y;
}

// The gradients of run's arguments, or None where the kernel cannot make them. `wanted` says of which.
PyObject* quick_gradients(PyObject* dy, PyObject* pair, PyObject* saved, PyObject* wanted) {
  if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2 || Py_TYPE(PyTuple_GET_ITEM(pair, 0)) != known_type ||
      !PyTuple_CheckExact(saved) || !PyTuple_CheckExact(wanted))
    return Py_NewRef(Py_None);
  const Known& known = *reinterpret_cast<Known*>(PyTuple_GET_ITEM(pair, 0));
  const Problem& p = known.p;
  const bool given = p.moments == Moments::given;
  const Py_ssize_t count = PyTuple_GET_SIZE(wanted);
  if (PyTuple_GET_SIZE(saved) != (given ? 6 : 4) || count < 3 || count > 5) return Py_NewRef(Py_None);
  long needs = 0;
  for (Py_ssize_t i = 1; i < count; ++i) needs |= long(PyTuple_GET_ITEM(wanted, i) == Py_True) << (i - 1);
  // Without an activation the residual's gradient is dy as it came.
  const bool passes_on = p.act == Act::none && needs & kNeedDresidual;
  if (passes_on) needs &= ~long(kNeedDresidual);
  PyObject* tensors[kSlots];
  for (int slot = kX; slot < kSlots; ++slot)
    tensors[slot] = slot < kMean || given ? PyTuple_GET_ITEM(saved, slot) : Py_None;
  PyObject* moments = PyTuple_GET_ITEM(pair, 1);
  PyObject* found = backward(known, dy, tensors, moments, needs);
  if (found == Py_None) {
    Py_DECREF(found);
    PyObject* dense = PyObject_CallFunctionObjArgs(torch_side.same_buffer, dy, tensors[kX], nullptr);
    found = dense ? backward(known, dense, tensors, moments, needs) : nullptr;
    Py_XDECREF(dense);
  }
  if (!found || found == Py_None) return found;
  PyObject* result = PyTuple_New(count);
  for (Py_ssize_t i = 0; result && i < count; ++i) {
    PyObject* gradient = i == 0 ? Py_None : i == 4 && passes_on ? dy : PyTuple_GET_ITEM(found, i - 1);
    PyTuple_SET_ITEM(result, i, Py_NewRef(gradient));
  }
  Py_DECREF(found);
  return result;
}

// differentiable_backward(ctx, dy) -> the gradients of run's arguments: what autograd calls for a node of
// differentiable_forward. What has to be differentiable itself, or cannot be made here, Python makes.
PyObject* differentiable_backward(PyObject*, PyObject* const* in, Py_ssize_t count) {
  static PyObject* const names[] = {PyUnicode_InternFromString("known"), PyUnicode_InternFromString("saved_tensors"),
                                    PyUnicode_InternFromString("needs_input_grad")};
  if (!arity("differentiable_backward", count, 2)) return nullptr;
  int general = answer(torch_side.is_grad_enabled);
  if (general == 0) general = watched();
  if (general < 0) return nullptr;
  if (general == 0) {
    PyObject* found = nullptr;
    PyObject *pair = PyObject_GetAttr(in[0], names[0]), *saved = nullptr, *wanted = nullptr;
    if (pair) saved = PyObject_GetAttr(in[0], names[1]);
    if (saved) wanted = PyObject_GetAttr(in[0], names[2]);
    if (wanted) found = quick_gradients(in[1], pair, saved, wanted);
    Py_XDECREF(pair);
    Py_XDECREF(saved);
    Py_XDECREF(wanted);
    if (found != Py_None) return found;
    Py_DECREF(found);
  }
  return PyObject_CallFunctionObjArgs(torch_side.slow, in[0], in[1], nullptr);
}

PyObject* remember(PyObject*, PyObject* args) try {
  PyObject *call, *problem;
  long long s[4], w[4];
  int moments, act;
  double eps;
  if (!PyArg_ParseTuple(args, "O!O(LLLL)(LLLL)iid", &PyTuple_Type, &call, &problem, &s[0], &s[1], &s[2], &s[3], &w[0],
                        &w[1], &w[2], &w[3], &moments, &act, &eps))
    return nullptr;
  Key key;
  Operand x;
  PyObject* const* arguments = &PyTuple_GET_ITEM(call, 0);
  if (!torch_side.exchange || !key_of(arguments, PyTuple_GET_SIZE(call), key) || !look(arguments[1], x))
    Py_RETURN_FALSE;
  const Problem p = {{s[0], s[1], s[2], s[3]}, {w[0], w[1], w[2], w[3]}, Moments(moments), Act(act), x.dtype, eps};
  for (const Domain& d : {p.stats, p.affine}) {
    if (d.batch < 1 || d.rows < 1 || d.keep < 1 || d.cols < 1 || d.numel() != x.numel || moments < 0 || act < 0 ||
        p.moments > Moments::given || p.act > Act::leaky_relu) {
      PyErr_SetString(PyExc_ValueError, "remember: the problem does not cover x");
      return nullptr;
    }
  }
  auto* known = reinterpret_cast<Known*>(known_type->tp_alloc(known_type, 0));
  if (!known) return nullptr;
  known->problem = Py_NewRef(problem);
  known->p = p;
  known->ndim = x.t.ndim;
  std::copy_n(x.t.shape, x.t.ndim, known->shape);
  std::copy_n(x.t.strides, x.t.ndim, known->strides);
  if (table().size() >= kMostCalls) forget_all();
  PyObject*& place = table()[key];
  Py_XDECREF(place);
  place = reinterpret_cast<PyObject*>(known);
  Py_RETURN_TRUE;
} catch (const std::exception& error) {
  return PyErr_Format(PyExc_MemoryError, "normkern: %s", error.what());
}

PyObject* method(PyObject*, PyObject* function) { return PyInstanceMethod_New(function); }

PyObject* forget(PyObject*, PyObject*) {
  forget_all();
  Py_RETURN_NONE;
}

PyObject* count_known(PyObject*, PyObject*) { return PyLong_FromSize_t(table().size()); }

PyMethodDef functions[] = {
    {"set_up", set_up, METH_VARARGS,
     "set_up(Tensor, Parameter, empty_like, is_neg, is_grad_enabled, watchers, allowed, apply, same_buffer, slow, "
     "thread_count, run_on_threads): what calls are recognized and run by; False if that cannot be."},
    {"run", fast<run>(), METH_FASTCALL,
     "run((name, x, weight, bias, residual, mean, var, *options), momentum) -> y or None"},
    {"differentiable_forward", fast<differentiable_forward>(), METH_FASTCALL,
     "differentiable_forward(ctx, (known, mean, var, momentum), x, weight, bias=None, residual=None) -> y"},
    {"differentiable_backward", fast<differentiable_backward>(), METH_FASTCALL,
     "differentiable_backward(ctx, dy) -> the gradients of the arguments after ctx"},
    {"method", method, METH_O, "method(function): a function written in C as a method, for a class to have."},
    {"remember", remember, METH_VARARGS,
     "remember(call, problem, stats, affine, moments, act, eps): False for a call that is never known."},
    {"forget", forget, METH_NOARGS, "Forget all calls."},
    {"known", count_known, METH_NOARGS, "How many calls are remembered."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_direct(PyObject* module) {
  known_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&known_spec));
  if (!known_type) return -1;
  return PyModule_AddFunctions(module, functions);
}

}  // namespace normkern::bind
