// fusedopt._C: the only file that knows pybind11. It checks, converts and hands on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/apply.h"
#include "cpu/level.h"
#include "host/plan.h"
#include "host/tensor_access.h"
#include "host/tensor_list.h"
#include "rules/registry.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

using host::Plan;
using host::RuleKeys;
using host::TensorAccess;
using host::TensorView;

template <class F>
auto guarded(F f) {
  try {
    return f();
  } catch (const host::PythonError&) {
    throw py::error_already_set();
  }
}

template <class Rule>
RuleKeys describe_rule(RuleId id) {
  RuleKeys info{id, {}, {}, Rule::kHasStep};
  for (const char* name : Rule::kHyperNames) info.hyper.emplace_back(name);
  for (const char* name : Rule::kStateNames) info.state.emplace_back(name);
  return info;
}

RuleKeys find_rule(const std::string& name) {
#define FUSEDOPT_FIND(Rule) \
  if (name == Rule::kName) return describe_rule<Rule>(RuleId::k##Rule);
  FUSEDOPT_RULES(FUSEDOPT_FIND)
#undef FUSEDOPT_FIND
  throw py::value_error("rule must be one of those that _C.rules() lists, got '" + name + "'");
}

py::dict rules() {
  py::dict all;
#define FUSEDOPT_LIST(Rule)                                                                       \
  {                                                                                               \
    const RuleKeys info = describe_rule<Rule>(RuleId::k##Rule);                                   \
    all[Rule::kName] = py::make_tuple(py::cast(info.hyper), py::cast(info.state), info.has_step); \
  }
  FUSEDOPT_RULES(FUSEDOPT_LIST)
#undef FUSEDOPT_LIST
  return all;
}

int checked_threads(int threads) {
  if (threads < 1)
    throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  return threads;
}

// The memory of a 0-dim CPU tensor that a step writes a figure to.
void* scalar_memory(const py::object& tensor, const char* name, int code, int bits) {
  TensorView view;
  const TensorAccess& access = TensorAccess::instance();
  const bool good = guarded([&] {
    return access.is_plain(tensor.ptr()) && access.read(tensor.ptr(), &view) && view.dl.ndim == 0 &&
           view.dl.device.type == dlpack::kCPU && view.dl.dtype.code == code &&
           view.dl.dtype.bits == bits && view.dl.data != nullptr;
  });
  if (!good)
    throw py::type_error(std::string(name) + " must be a 0-dim CPU tensor of " +
                         (code == dlpack::kFloat ? "float" : "int") + std::to_string(bits));
  return view.dl.data;
}

// What the two ways to a step, Plan.step and Plan.apply, are told of it, and where the figures go.
struct StepArguments {
  StepArguments(bool norm, double max_norm, double clip_value, double grad_scale, bool found_inf,
                bool skip_nonfinite, int threads, const py::object& grad_norm,
                const py::object& skipped_steps) {
    options.norm = norm;
    options.max_norm = max_norm;
    options.clip_value = clip_value;
    options.grad_scale = grad_scale;
    options.found_inf = found_inf;
    options.skip_nonfinite = skip_nonfinite;
    options.threads = checked_threads(threads);
    if (!grad_norm.is_none())
      norm_out = static_cast<float*>(scalar_memory(grad_norm, "grad_norm", dlpack::kFloat, 32));
    if (!skipped_steps.is_none())
      skipped_out =
          static_cast<int64_t*>(scalar_memory(skipped_steps, "skipped_steps", dlpack::kInt, 64));
  }

  void report(const cpu::StepResult& result) const {
    if (options.norm && norm_out != nullptr) *norm_out = static_cast<float>(result.total_norm);
    if (result.skipped && skipped_out != nullptr) *skipped_out += 1;
  }

  cpu::StepOptions options;
  float* norm_out = nullptr;
  int64_t* skipped_out = nullptr;
};

#define FUSEDOPT_STEP_ARGUMENTS                                                                  \
  py::arg("norm"), py::arg("max_norm"), py::arg("clip_value"), py::arg("grad_scale"),            \
      py::arg("found_inf"), py::arg("skip_nonfinite"), py::arg("threads"), py::arg("grad_norm"), \
      py::arg("skipped_steps")

std::string step(Plan& plan, const py::object& groups, const py::object& state,
                 const py::object& host, bool norm, double max_norm, double clip_value,
                 double grad_scale, bool found_inf, bool skip_nonfinite, int threads,
                 const py::object& grad_norm, const py::object& skipped_steps) {
  const StepArguments arguments(norm, max_norm, clip_value, grad_scale, found_inf, skip_nonfinite,
                                threads, grad_norm, skipped_steps);
  cpu::StepResult result;
  const std::string reason = guarded(
      [&] { return plan.step(groups.ptr(), state.ptr(), host.ptr(), arguments.options, &result); });
  if (reason.empty()) arguments.report(result);
  return reason;
}

void apply(Plan& plan, double squared_norm, bool norm, double max_norm, double clip_value,
           double grad_scale, bool found_inf, bool skip_nonfinite, int threads,
           const py::object& grad_norm, const py::object& skipped_steps) {
  StepArguments arguments(norm, max_norm, clip_value, grad_scale, found_inf, skip_nonfinite,
                          threads, grad_norm, skipped_steps);
  arguments.options.squared_norm = squared_norm;
  arguments.report(guarded([&] { return plan.apply(arguments.options); }));
}

py::object describe(const py::object& tensor) {
  TensorView view;
  const TensorAccess& access = TensorAccess::instance();
  if (!guarded([&] { return access.read(tensor.ptr(), &view); })) return py::none();
  const std::vector<int64_t> shape(view.dl.shape, view.dl.shape + view.dl.ndim);
  const std::vector<int64_t> strides(view.dl.strides, view.dl.strides + view.dl.ndim);
  return py::make_tuple(reinterpret_cast<uintptr_t>(view.dl.data) + view.dl.byte_offset,
                        view.dl.device.type, view.dl.device.index, view.dl.dtype.code,
                        view.dl.dtype.bits, py::tuple(py::cast(shape)),
                        py::tuple(py::cast(strides)));
}

py::object grad_pointer(const py::object& param) {
  return guarded([&]() -> py::object {
    const TensorAccess& access = TensorAccess::instance();
    const host::GradRef grad = access.grad(param.ptr());
    TensorView view;
    if (grad.none() || !access.read(grad, &view)) return py::none();
    return py::int_(reinterpret_cast<uintptr_t>(view.dl.data) + view.dl.byte_offset);
  });
}

py::object squared_norm_of(const py::object& tensors, int threads) {
  return guarded([&]() -> py::object {
    const host::TensorList list(tensors.ptr(), false);
    if (!list.reason().empty()) return py::str(list.reason());
    return py::make_tuple(cpu::squared_norm(list.table(), checked_threads(threads)),
                          list.any_float64());
  });
}

std::string scale(const py::object& tensors, double coef, double limit, int threads) {
  return guarded([&] {
    const host::TensorList list(tensors.ptr(), true);
    if (list.reason().empty())
      cpu::scale_gradients(list.table(), coef, limit, checked_threads(threads));
    return list.reason();
  });
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = "none";
  info["cpu_level"] = cpu::level().name;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["tensor_access"] = TensorAccess::instance().name();
  return info;
}

void use_direct(int64_t tensor_offset, uintptr_t to_dlpack, uintptr_t grad, uintptr_t is_neg,
                uintptr_t bump_version, uintptr_t undefined_impl) {
  if (tensor_offset <= 0 || to_dlpack == 0 || grad == 0 || is_neg == 0 || bump_version == 0 ||
      undefined_impl == 0)
    throw py::value_error("use_direct takes a positive offset and addresses that are not null");
  host::DirectFunctions f;
  f.tensor_offset = tensor_offset;
  f.to_dlpack = reinterpret_cast<decltype(f.to_dlpack)>(to_dlpack);
  f.grad = reinterpret_cast<decltype(f.grad)>(grad);
  f.is_neg = reinterpret_cast<decltype(f.is_neg)>(is_neg);
  f.bump_version = reinterpret_cast<decltype(f.bump_version)>(bump_version);
  f.undefined_impl = reinterpret_cast<const void*>(undefined_impl);
  TensorAccess::instance().use_direct(f);
}

}  // namespace
}  // namespace fusedopt

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;  // NOLINT
  m.doc() = "The native part of fusedopt. Private: its interface changes without notice.";

  py::class_<Plan>(m, "Plan")
      .def(py::init([](const std::string& rule) {
             const RuleKeys keys = find_rule(rule);
             return guarded([&] { return new Plan(keys); });
           }),
           py::arg("rule"))
      .def(
          "refresh",
          [](Plan& plan, const py::object& groups, const py::object& state,
             const py::object& host) {
            return guarded([&] { return plan.refresh(groups.ptr(), state.ptr(), host.ptr()); });
          },
          py::arg("param_groups"), py::arg("state"), py::arg("host"))
      .def("step", &step, py::arg("param_groups"), py::arg("state"), py::arg("host"),
           FUSEDOPT_STEP_ARGUMENTS)
      .def("apply", &apply, py::arg("squared_norm"), FUSEDOPT_STEP_ARGUMENTS)
      .def(
          "squared_norm",
          [](Plan& plan, int threads) {
            return guarded([&] { return plan.squared_norm(checked_threads(threads)); });
          },
          py::arg("threads"))
      .def("roll_back", [](Plan& plan) { guarded([&] { plan.roll_back(); }); })
      .def_property_readonly("rows", &Plan::rows)
      .def_property_readonly("flat_rows", &Plan::flat_rows);

  m.def("rules", &rules);
  m.def("build_info", &build_info);
  m.def("describe", &describe, py::arg("tensor"));
  m.def("grad_pointer", &grad_pointer, py::arg("param"));
  m.def(
      "bump_versions",
      [](const py::list& tensors) {
        guarded([&] {
          const TensorAccess& access = TensorAccess::instance();
          std::vector<PyObject*> objects;
          for (const py::handle tensor : tensors) {
            if (!access.is_plain(tensor.ptr()))
              throw py::type_error("tensors must be a list of torch.Tensor");
            objects.push_back(tensor.ptr());
          }
          access.bump_versions(objects);
        });
      },
      py::arg("tensors"));
  m.def("squared_norm", &squared_norm_of, py::arg("tensors"), py::arg("threads"));
  m.def("scale_", &scale, py::arg("tensors"), py::arg("coef"), py::arg("limit"),
        py::arg("threads"));
  m.def("use_direct", &use_direct, py::arg("tensor_offset"), py::arg("to_dlpack"), py::arg("grad"),
        py::arg("is_neg"), py::arg("bump_version"), py::arg("undefined_impl"));
  m.def(
      "use_dlpack",
      [](const py::object& capsule) {
        guarded([&] { TensorAccess::instance().use_dlpack(capsule.ptr()); });
      },
      py::arg("capsule"));
  m.def(
      "use_python",
      [](const py::object& describe) {
        guarded([&] { TensorAccess::instance().use_python(describe.ptr()); });
      },
      py::arg("describe"));
  m.def(
      "set_types",
      [](const py::object& base, const py::object& plain) {
        guarded([&] { TensorAccess::instance().set_types(base.ptr(), plain.ptr()); });
      },
      py::arg("base"), py::arg("plain"));
}
