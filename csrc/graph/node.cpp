// node.cpp: the Python module _node, autograd's node of a remembered call, without Python between the engine and the
// kernels.
//
// Autograd's nodes are not in torch's stable ABI, so this module loads under the very torch that it was built against;
// without it calls that need a graph are not recognized. Nothing is computed here: _host lends the kernels.
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/profiler/api.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <type_traits>

#include "../bind/lent.h"

namespace normkern::graph {
namespace {

using bind::kGradients;
using bind::kSlots;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

const bind::Passes* passes = nullptr;
PyObject* slow = nullptr;  // of known, moments, needs, dy and the tensors by slot: gradients that always work

using Tensors = std::array<at::Tensor, kSlots>;

const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

// Owned references to the tensors as Python has them.
class Wrapped {
 public:
  explicit Wrapped(const Tensors& tensors) {
    for (int slot = 0; slot < kSlots; ++slot)
      objects_[slot] = tensors[slot].defined() ? THPVariable_Wrap(tensors[slot]) : Py_NewRef(Py_None);
  }
  Wrapped(const Wrapped&) = delete;
  ~Wrapped() {
    for (PyObject* object : objects_) Py_XDECREF(object);
  }
  PyObject* const* data() const { return objects_.data(); }

 private:
  std::array<PyObject*, kSlots> objects_{};
};

bool watched() {
  const auto included = [](c10::DispatchKey key) { return c10::impl::tls_is_dispatch_key_included(key); };
  return included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) || included(c10::DispatchKey::Tracer) ||
         c10::impl::TorchDispatchModeTLS::stack_len() > 0 || torch::profiler::impl::profilerEnabled();
}

// Everything that the gradients depend on beside dy.
struct Saved {
  PyObject* known;     // borrowed
  Tensors tensors;     // by slot, undefined where there is none
  at::Tensor moments;  // of forward, float64; undefined where they were given
  long needs;
};

// By the kernels, or by Python where they have to be differentiable again or something watches.
variable_list gradients(const Saved& saved, const at::Tensor& dy) {
  const bool general = at::GradMode::is_enabled() || watched();
  const pybind11::gil_scoped_acquire gil;
  const Wrapped tensors(saved.tensors);
  const auto own = [](PyObject* object) { return pybind11::reinterpret_steal<pybind11::object>(object); };
  const pybind11::object gradient = own(THPVariable_Wrap(dy));
  pybind11::object found = pybind11::none();
  if (!general)
    found =
        own(passes->backward(saved.known, gradient.ptr(), tensors.data(),
                             saved.moments.defined() ? saved.moments.const_data_ptr<double>() : nullptr, saved.needs));
  if (found && found.is_none()) {
    const pybind11::object moments =
        own(saved.moments.defined() ? THPVariable_Wrap(saved.moments) : Py_NewRef(Py_None));
    const pybind11::object needs = own(PyLong_FromLong(saved.needs));
    PyObject* arguments[4 + kSlots] = {saved.known, moments.ptr(), needs.ptr(), gradient.ptr()};
    std::copy_n(tensors.data(), kSlots, arguments + 4);
    found = own(PyObject_Vectorcall(slow, arguments, std::size(arguments), nullptr));
  }
  if (!found) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
  variable_list result(kGradients);
  for (int slot = 0; slot < kGradients; ++slot)
    if (PyObject* made = PyTuple_GET_ITEM(found.ptr(), slot); made != Py_None) result[size_t(slot)] = tensor_of(made);
  return result;
}

// The same from what compiled autograd can keep in a graph: numbers, and the tensors there are.
std::vector<c10::IValue> packed(const Saved& saved) {
  std::vector<c10::IValue> values = {int64_t(reinterpret_cast<uintptr_t>(saved.known)), int64_t(saved.needs), 0};
  int64_t present = 0;
  for (int slot = 0; slot <= kSlots; ++slot) {
    const at::Tensor& tensor = slot < kSlots ? saved.tensors[size_t(slot)] : saved.moments;
    if (!tensor.defined()) continue;
    present |= 1 << slot;
    values.emplace_back(tensor);
  }
  values[2] = present;
  return values;
}

variable_list gradients_of_packed(const variable_list& grads, const std::vector<c10::IValue>& values) {
  Saved saved = {reinterpret_cast<PyObject*>(uintptr_t(values[0].toInt())), {}, {}, long(values[1].toInt())};
  auto next = values.begin() + 3;
  for (int slot = 0; slot <= kSlots; ++slot)
    if (values[2].toInt() >> slot & 1)
      (slot < kSlots ? saved.tensors[size_t(slot)] : saved.moments) = (next++)->toTensor();
  return grads[0].defined() ? gradients(saved, grads[0]) : variable_list(kGradients);
}

struct NormBackward : torch::autograd::Node {
  NormBackward(PyObject* known, at::Tensor moments)
      : known_(Py_NewRef(known), getPyInterpreter()), moments_(std::move(moments)) {}

  std::string name() const override { return "NormBackward"; }

  void save(int slot, const at::Tensor& tensor) { saved_[size_t(slot)] = SavedVariable(tensor, /*is_output=*/false); }

  variable_list apply(variable_list&& grads) override {
    return grads[0].defined() ? gradients(unpacked(), grads[0]) : variable_list(kGradients);
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : saved_) saved.reset_data();
    moments_.reset();
  }

  // Compiled autograd keeps a graph by these. The number stands for the call's address too: while a graph of that
  // number runs, the node that asked for it keeps the call alive.
  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    args.collect(passes->number(known()));
    for (const SavedVariable& saved : saved_) args.collect(saved, /*is_output=*/false);
    args.collect(moments_);
  }

  // The graph calls gradients_of_packed as it is; nothing looks inside.
  variable_list apply_with_saved(const variable_list& grads, torch::autograd::SwapSavedVariables& swap) override {
    namespace compiled = torch::dynamo::autograd;
    for (SavedVariable& saved : saved_) swap.before(saved);
    swap.before(moments_);
    const std::vector<c10::IValue> values = packed(unpacked());
    std::vector<at::TypePtr> types;
    for (const c10::IValue& value : values)
      types.push_back(value.isTensor() ? at::TypePtr(at::TensorType::get()) : value.type());
    const auto& compiler = compiled::getPyCompilerInterface();
    const auto function = compiler->bind_function(swap.get_py_compiler(), name(), gradients_of_packed, types,
                                                  /*is_custom_function=*/true, /*is_traceable=*/false);
    const auto edges = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    variable_list found =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads, values, edges);
    for (SavedVariable& saved : saved_) swap.after(saved);
    swap.after(moments_);
    return found;
  }

 private:
  PyObject* known() const { return known_.ptr(getPyInterpreter()); }

  Saved unpacked() {
    std::lock_guard<std::mutex> lock(mutex_);
    Saved result = {known(), {}, moments_, 0};
    for (int slot = 0; slot < kSlots; ++slot) result.tensors[size_t(slot)] = saved_[size_t(slot)].unpack();
    for (int slot = 0; slot < kGradients; ++slot)
      result.needs |= long(task_should_compute_output(size_t(slot))) << slot;
    return result;
  }

  c10::SafePyObject known_;
  std::array<SavedVariable, kSlots> saved_;
  at::Tensor moments_;
};

// torch's pointer to a node has been one or the other.
template <class Pointer>
Pointer make_node(PyObject* known, at::Tensor moments) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(new NormBackward(known, std::move(moments)), [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<NormBackward>(known, std::move(moments));
}

PyObject* differentiable(PyObject* known, PyObject* const* tensors, PyObject* momentum) {
  HANDLE_TH_ERRORS
  Tensors own;
  for (int slot = 0; slot < kSlots; ++slot)
    if (tensors[slot] != Py_None) own[slot] = tensor_of(tensors[slot]);
  at::Tensor moments;
  if (const int64_t count = passes->moments_count(known))
    moments = at::detail::empty_cpu({count}, at::TensorOptions().dtype(at::kDouble));
  PyObject* y =
      passes->forward(known, tensors, moments.defined() ? moments.mutable_data_ptr<double>() : nullptr, momentum);
  if (!y) return nullptr;
  auto node = make_node<decltype(torch::autograd::Edge::function)>(known, std::move(moments));
  auto& backward = static_cast<NormBackward&>(*node);
  const pybind11::object owned = pybind11::reinterpret_steal<pybind11::object>(y);
  node->set_next_edges(
      torch::autograd::collect_next_edges(own[bind::kX], own[bind::kWeight], own[bind::kBias], own[bind::kResidual]));
  for (int slot = 0; slot < kSlots; ++slot)
    if (own[slot].defined() && passes->saves(known, slot)) backward.save(slot, own[slot]);
  torch::autograd::set_history(tensor_of(y), node);
  return Py_NewRef(y);
  END_HANDLE_TH_ERRORS
}

// Of a dense tensor on the CPU. Nothing watches this call, so the dispatcher would only take time.
PyObject* empty_like(PyObject* tensor) {
  HANDLE_TH_ERRORS
  const at::Tensor& like = tensor_of(tensor);
  return THPVariable_Wrap(at::detail::empty_strided_cpu(like.sizes(), like.strides(), like.options()));
  END_HANDLE_TH_ERRORS
}

constexpr bind::Lent lent = {
    [](PyObject* tensor) { return !tensor_of(tensor).is_neg() && !tensor_of(tensor).is_conj(); },
    [](PyObject* tensor) { return tensor_of(tensor).requires_grad(); },
    [] { return at::GradMode::is_enabled(); },
    watched,
    empty_like,
    differentiable,
};

// lend(passes, slow) -> a capsule with Lent; passes is a capsule of _host.
PyObject* lend(PyObject*, PyObject* arguments) {
  PyObject *capsule, *function;
  if (!PyArg_ParseTuple(arguments, "OO", &capsule, &function)) return nullptr;
  const auto* given = static_cast<const bind::Passes*>(PyCapsule_GetPointer(capsule, bind::kPassesCapsule));
  if (!given) return nullptr;
  passes = given;
  Py_XSETREF(slow, Py_NewRef(function));
  return PyCapsule_New(const_cast<bind::Lent*>(&lent), bind::kNodeCapsule, nullptr);
}

PyMethodDef functions[] = {
    {"lend", lend, METH_VARARGS, "lend(passes, slow): takes the kernels of _host and gives what _host asks for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_node",
                          "Autograd's node of a remembered call, for one version of torch.",
                          -1,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace normkern::graph

PyMODINIT_FUNC PyInit__node() { return PyModule_Create(&normkern::graph::definition); }
