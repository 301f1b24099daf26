// direct.cpp: small calls on the CPU, from Python objects to the kernel, past torch's dispatcher.
//
// A call of a microsecond's work spends ten in checks and in the dispatcher. So a call that Python has checked once is
// remembered by everything the checks look at: sizes, strides, dtypes and options. The next one like it is recognized
// here and runs at once. Tensors are seen through DLPack's exchange table, so nothing of torch is known; whatever is
// out of the ordinary (another device, a subclass, a view with a pending negation) is not recognized, and Python
// goes its usual way. normkern/direct.py decides when coming here is lawful at all.
#include "direct.h"

#include <exception>
#include <unordered_map>

#include "known.h"

namespace normkern::bind {
namespace {

constexpr size_t kMostCalls = 4096;

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// C++ exceptions, of which only a lack of memory can occur, must not reach the interpreter, nor _node.
template <class Call>
auto caught(Call call) noexcept -> decltype(call()) {
  try {
    return call();
  } catch (const std::exception& error) {
    PyErr_Format(PyExc_MemoryError, "normkern: %s", error.what());
    return {};
  }
}

template <FastFunction function>
PyObject* guarded(PyObject* self, PyObject* const* in, Py_ssize_t count) noexcept {
  return caught([&] { return function(self, in, count); });
}

template <FastFunction function>
PyCFunction fast() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<function>));
}

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
  PyObject *tensor, *parameter, *empty_like, *is_neg, *is_grad_enabled, *watchers, *allowed, *forward_ad, *backends;
  PyObject *native, *same_buffer;
  unsigned long long thread_count, run_on_threads;
  if (!PyArg_ParseTuple(args, "OOOOOO!OO!O!OOKK", &tensor, &parameter, &empty_like, &is_neg, &is_grad_enabled,
                        &PyTuple_Type, &watchers, &allowed, &PyDict_Type, &forward_ad, &PyDict_Type, &backends, &native,
                        &same_buffer, &thread_count, &run_on_threads))
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
  for (PyObject* object : {tensor, parameter, empty_like, is_neg, is_grad_enabled, watchers, allowed, forward_ad,
                           backends, native, same_buffer})
    Py_INCREF(object);
  torch_side = {tensor,
                parameter,
                empty_like,
                is_neg,
                is_grad_enabled,
                watchers,
                allowed,
                forward_ad,
                backends,
                native,
                same_buffer,
                exchange,
                reinterpret_cast<int64_t (*)()>(thread_count),
                reinterpret_cast<decltype(TorchSide::run_on_threads)>(run_on_threads),
                nullptr};
  Py_RETURN_TRUE;
}

PyObject* lend(PyObject*, PyObject* capsule) {
  const Lent* lent = nullptr;
  if (capsule != Py_None && !(lent = static_cast<const Lent*>(PyCapsule_GetPointer(capsule, kNodeCapsule))))
    return nullptr;
  torch_side.lent = lent;
  Py_RETURN_NONE;
}

const Known& known_of(PyObject* object) { return *reinterpret_cast<Known*>(object); }

constexpr Passes passes = {
    [](PyObject* known) { return known_of(known).number; },
    [](PyObject* known) { return moments_count(known_of(known).p); },
    [](PyObject* known, int slot) { return saves(known_of(known).p, slot); },
    [](PyObject* known, PyObject* const* tensors, double* moments, PyObject* momentum) {
      return caught([&] { return forward(known_of(known), tensors, moments, momentum); });
    },
    [](PyObject* known, PyObject* dy, PyObject* const* tensors, const double* moments, long needs) {
      return caught([&] { return backward(known_of(known), dy, tensors, moments, needs); });
    },
};

// Whether nothing stands against running a recognized call here; -1 with an exception set.
int lawful(PyObject* const* tensors) {
  if (const int watches = watched(); watches != 0) return watches < 0 ? -1 : 0;
  for (int slot : {kMean, kVar}) {
    const int learned = requires_grad(tensors[slot]);
    if (learned != 0) return learned < 0 ? -1 : 0;
  }
  return allowed(tensors[kX]);
}

// run(call, momentum) -> y; None for a call that is not known, or not to be run here.
PyObject* run(PyObject*, PyObject* const* in, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "run takes 2 arguments; got %zd", count);
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
  int graph = is_grad_enabled();
  if (graph > 0) {
    graph = 0;
    for (int slot = kX; slot < kGradients && graph == 0; ++slot) graph = requires_grad(tensors[slot]);
  }
  if (graph < 0) return nullptr;
  if (graph && !torch_side.lent) Py_RETURN_NONE;
  PyObject* known = Py_NewRef(found->second);  // the table may change while Python runs
  PyObject* y = graph ? torch_side.lent->differentiable(known, tensors, in[1])
                      : forward(known_of(known), tensors, nullptr, in[1]);
  Py_DECREF(known);
  return y;
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
  PyObject* known = make_known(problem, p, x);
  if (!known) return nullptr;
  if (table().size() >= kMostCalls) forget_all();
  PyObject*& place = table()[key];
  Py_XDECREF(place);
  place = known;
  Py_RETURN_TRUE;
} catch (const std::exception& error) {
  return PyErr_Format(PyExc_MemoryError, "normkern: %s", error.what());
}

PyObject* forget(PyObject*, PyObject*) {
  forget_all();
  Py_RETURN_NONE;
}

PyObject* count_known(PyObject*, PyObject*) { return PyLong_FromSize_t(table().size()); }

PyMethodDef functions[] = {
    {"set_up", set_up, METH_VARARGS,
     "set_up(Tensor, Parameter, empty_like, is_neg, is_grad_enabled, watchers, allowed, forward_ad, backends, native, "
     "same_buffer, thread_count, run_on_threads): what calls are recognized and run by; False if that cannot be."},
    {"run", fast<run>(), METH_FASTCALL,
     "run((name, x, weight, bias, residual, mean, var, *options), momentum) -> y or None"},
    {"lend", lend, METH_O, "lend(capsule or None): what _node answers instead of Python's functions."},
    {"remember", remember, METH_VARARGS,
     "remember(call, problem, stats, affine, moments, act, eps): False for a call that is never known."},
    {"forget", forget, METH_NOARGS, "Forget all calls."},
    {"known", count_known, METH_NOARGS, "How many calls are remembered."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_direct(PyObject* module) {
  if (make_known_type() != 0) return -1;
  PyObject* capsule = PyCapsule_New(const_cast<Passes*>(&passes), kPassesCapsule, nullptr);
  if (!capsule || PyModule_AddObjectRef(module, "passes", capsule) != 0) return Py_XDECREF(capsule), -1;
  Py_DECREF(capsule);
  return PyModule_AddFunctions(module, functions);
}

}  // namespace normkern::bind
