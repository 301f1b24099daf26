// host.cpp: the torch-free Python module _host: geometry, plans and facts of the build as plain values, so that
// Python sees the very plan that the launcher uses.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include <type_traits>

#include "../core/plan.h"
#include "../cpu/entry.h"
#include "build_info.h"
#include "direct.h"

namespace py = pybind11;
using namespace normkern;

namespace {

template <class Record, class Value>
struct Field {
  const char* name;
  Value Record::* member;
};
template <class Record, class Value>
Field(const char*, Value Record::*) -> Field<Record, Value>;

// For an enum, any int with an enumerator's value will do, so the enums of normkern.problem fit as they are.
template <class Value>
Value from_python(const char* name, const py::object& value) {
  try {
    if constexpr (std::is_enum_v<Value>) {
      const py::object known = py::cast(Value(value.cast<int32_t>()));  // ValueError where no enumerator has it
      return known.cast<Value>();
    } else {
      return value.cast<Value>();
    }
  } catch (const py::cast_error&) {
    throw py::type_error(std::string(name) + " cannot be " + std::string(py::repr(value)));
  }
}

template <class Value>
py::str text(const Value& value) {
  const py::object object = py::cast(value);
  if constexpr (std::is_enum_v<Value>) {
    return py::str("{}.{}").format(py::type::of(object).attr("__name__"), object.attr("name"));
  } else {
    return py::repr(object);
  }
}

template <class Record, class... Values>
Record make_record(const char* name, const py::args& args, const py::kwargs& kwargs,
                   const Field<Record, Values>&... fields) {
  Record record{};
  size_t position = 0, taken = args.size();
  const auto take = [&](const auto& field) {
    using Value = std::decay_t<decltype(record.*field.member)>;
    const bool named = kwargs.contains(field.name);
    if (position < args.size()) {
      if (named) throw py::type_error(std::string(name) + ": " + field.name + " given twice");
      record.*field.member = from_python<Value>(field.name, args[position]);
    } else if (named) {
      record.*field.member = from_python<Value>(field.name, kwargs[field.name]);
    }
    ++position;
    taken += named;
  };
  (take(fields), ...);
  if (args.size() > sizeof...(fields) || taken != args.size() + kwargs.size())
    throw py::type_error(std::string(name) + ": fields are " + ((std::string(fields.name) + " ") + ...));
  return record;
}

// A plain struct as Python sees it, from one list of its fields: keyword constructor, read-only attributes, equality,
// hash and a repr that shows every field.
template <class Record, class... Values>
py::class_<Record> bind_record(py::module_& m, const char* name, Field<Record, Values>... fields) {
  py::class_<Record> type(m, name);
  type.def(py::init([=](const py::args& args, const py::kwargs& kwargs) {
    return make_record<Record>(name, args, kwargs, fields...);
  }));
  (type.def_readonly(fields.name, fields.member), ...);
  const auto repr = [=](const Record& record) {
    py::list parts;
    (parts.append(py::str("{}={}").format(fields.name, text(record.*fields.member))), ...);
    return py::str("{}({})").format(name, py::str(", ").attr("join")(parts));
  };
  type.def("__repr__", repr);
  type.def("__hash__", [=](const Record& record) { return py::hash(repr(record)); });
  type.def("__eq__", [=](const Record& a, const py::object& other) {
    if (!py::isinstance<Record>(other)) return false;
    const auto& b = other.cast<const Record&>();
    return (py::cast(a.*fields.member).equal(py::cast(b.*fields.member)) && ...);
  });
  return type;
}

template <class Enum>
void bind_enum(py::module_& m, const char* name, std::initializer_list<std::pair<const char*, Enum>> values) {
  py::native_enum<Enum> type(m, name, "enum.IntEnum");
  for (const auto& [label, value] : values) type.value(label, value);
  type.finalize();
}

void bind_enums(py::module_& m) {
  bind_enum<DType>(m, "DType", {{"f32", DType::f32}, {"f64", DType::f64}, {"f16", DType::f16}, {"bf16", DType::bf16}});
  bind_enum<Moments>(m, "Moments",
                     {{"mean_var", Moments::mean_var}, {"second", Moments::second}, {"given", Moments::given}});
  bind_enum<Act>(m, "Act",
                 {{"none", Act::none},
                  {"relu", Act::relu},
                  {"silu", Act::silu},
                  {"gelu", Act::gelu},
                  {"leaky_relu", Act::leaky_relu}});
  bind_enum<Pass>(m, "Pass", {{"forward", Pass::forward}, {"backward", Pass::backward}, {"moments", Pass::moments}});
  bind_enum<Strategy>(m, "Strategy",
                      {{"automatic", Strategy::automatic},
                       {"warp", Strategy::warp},
                       {"block", Strategy::block},
                       {"cluster", Strategy::cluster},
                       {"subgrid", Strategy::subgrid},
                       {"split", Strategy::split}});
  bind_enum<Weights>(
      m, "Weights",
      {{"none", Weights::none}, {"group", Weights::group}, {"line", Weights::line}, {"column", Weights::column}});
  bind_enum<Walk>(m, "Walk", {{"rows", Walk::rows}, {"columns", Walk::columns}});
}

bool positive(const Domain& d) { return d.batch > 0 && d.rows > 0 && d.keep > 0 && d.cols > 0; }

// An index from Python may be anything; the constexpr geometry trusts its arguments.
void check_index(int64_t index, int64_t count, const char* what) {
  if (index < 0 || index >= count)
    throw py::index_error(std::string(what) + " " + std::to_string(index) + " is not in 0 to " + std::to_string(count));
}

void bind_geometry(py::module_& m) {
  bind_record(m, "Domain", Field{"batch", &Domain::batch}, Field{"rows", &Domain::rows}, Field{"keep", &Domain::keep},
              Field{"cols", &Domain::cols})
      .def("groups", &Domain::groups)
      .def("count", &Domain::count)
      .def("numel", &Domain::numel)
      .def("simplify", &simplify)
      .def(
          "group_of",
          [](const Domain& d, int64_t element) {
            check_index(element, positive(d) ? d.numel() : 0, "element");
            return d.group_of(element);
          },
          py::arg("element"))
      .def(
          "run",
          [](const Domain& d, int64_t group, int64_t row) {
            check_index(group, positive(d) ? d.groups() : 0, "group");
            check_index(row, d.rows, "row");
            return d.run(group, row);
          },
          py::arg("group"), py::arg("row"));
  bind_record(m, "Problem", Field{"stats", &Problem::stats}, Field{"affine", &Problem::affine},
              Field{"moments", &Problem::moments}, Field{"act", &Problem::act}, Field{"dtype", &Problem::dtype},
              Field{"eps", &Problem::eps});
}

Plan checked_plan(const Problem& p, const Request& request, const Gpu& gpu) {
  if (!positive(p.stats) || !positive(p.affine) || p.stats.numel() != p.affine.numel())
    throw py::value_error("make_plan: stats and affine must cover the same elements, at least one");
  return make_plan(p, request, gpu);
}

void bind_plans(py::module_& m) {
  bind_record(m, "Gpu", Field{"sms", &Gpu::sms}, Field{"smem_per_block", &Gpu::smem_per_block},
              Field{"smem_per_sm", &Gpu::smem_per_sm}, Field{"l2_bytes", &Gpu::l2_bytes},
              Field{"max_cluster", &Gpu::max_cluster});
  bind_record(m, "Request", Field{"pass_", &Request::pass}, Field{"aligned", &Request::aligned},
              Field{"affine_grads", &Request::affine_grads}, Field{"strategy", &Request::strategy},
              Field{"add", &Request::add}, Field{"mask", &Request::mask});
  bind_record(m, "Launch", Field{"blocks", &Launch::blocks}, Field{"threads", &Launch::threads},
              Field{"shared", &Launch::shared});
  bind_record(m, "Reduce", Field{"walk", &Reduce::walk}, Field{"parts", &Reduce::parts},
              Field{"launch", &Reduce::launch}, Field{"workspace_bytes", &Reduce::workspace_bytes});
  bind_record(m, "Team", Field{"walk", &Team::walk}, Field{"weights", &Team::weights},
              Field{"weight_sums", &Team::weight_sums}, Field{"blocks", &Team::blocks},
              Field{"by_lines", &Team::by_lines}, Field{"cluster", &Team::cluster}, Field{"width", &Team::width},
              Field{"lanes", &Team::lanes}, Field{"seats", &Team::seats}, Field{"stages", &Team::stages},
              Field{"columns", &Team::columns}, Field{"teams", &Team::teams});
  bind_record(m, "Plan", Field{"strategy", &Plan::strategy}, Field{"vec", &Plan::vec}, Field{"team", &Plan::team},
              Field{"fused", &Plan::fused}, Field{"map", &Plan::map}, Field{"reduce", &Plan::reduce},
              Field{"affine", &Plan::affine}, Field{"workspace_bytes", &Plan::workspace_bytes},
              Field{"bytes_read", &Plan::bytes_read}, Field{"bytes_written", &Plan::bytes_written});
  m.def("make_plan", &checked_plan, py::arg("problem"), py::arg("request"), py::arg("gpu"));
}

py::list words(const char* separated) { return py::str(separated).attr("split")(";"); }

// What the build knew; None or an empty list where a part was not built.
py::dict build_info() {
  py::dict info;
  info["version"] = NK_VERSION;
  info["compiler"] = NK_COMPILER;
  info["build_type"] = NK_BUILD_TYPE;
  info["instruction_sets"] = words(NK_INSTRUCTION_SETS);
  info["torch"] = NK_TORCH_VERSION;
  info["torch_target"] = NK_TORCH_TARGET;
  info["cuda"] = *NK_CUDA_VERSION ? py::object(py::str(NK_CUDA_VERSION)) : py::none();
  info["cuda_architectures"] = *NK_CUDA_ARCHITECTURES ? words(NK_CUDA_ARCHITECTURES) : py::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Geometry, launch plans, facts of the build and small calls on the CPU, without torch.";
  bind_enums(m);
  bind_geometry(m);
  bind_plans(m);
  m.attr("build_info") = build_info();
  m.def("cpu_instruction_set", &cpu::instruction_set);
  if (bind::add_direct(m.ptr()) != 0) throw py::error_already_set();
}
