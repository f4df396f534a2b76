// fusedopt._C: the only file that knows pybind11. It checks, converts and hands on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/apply.h"
#include "cpu/level.h"
#include "cpu/threads.h"
#include "cuda/launch.h"
#include "host/cpu_step.h"
#include "host/cuda_step.h"
#include "host/plan.h"
#include "host/repeated_step.h"
#include "host/tensor_access.h"
#include "host/tensor_list.h"
#include "host/triton_step.h"
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
  static_assert(std::size(Rule::kHyperNames) == std::size(Rule::kHyperRanges));
  RuleKeys info{id, {}, {}, {}, Rule::kHasStep};
  info.ranges.assign(std::begin(Rule::kHyperRanges), std::end(Rule::kHyperRanges));
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

// The memory of a 0-dim tensor that a step reads from or writes to; null for None.
template <class T>
T* scalar_memory(const py::object& tensor, const char* name, dlpack::DeviceType device,
                 int* index = nullptr) {
  constexpr int kCode = std::is_floating_point_v<T> ? dlpack::kFloat : dlpack::kInt;
  constexpr int kBits = 8 * sizeof(T);
  if (tensor.is_none()) return nullptr;
  TensorView view;
  const TensorAccess& access = TensorAccess::instance();
  const bool good = guarded([&] {
    return access.is_plain(tensor.ptr()) && access.read(tensor.ptr(), &view) && view.numel() == 1 &&
           view.dl.device.type == device && view.dl.dtype.code == kCode &&
           view.dl.dtype.bits == kBits && view.dl.data != nullptr;
  });
  if (!good || (device == dlpack::kCPU && view.dl.ndim != 0))
    throw py::type_error(std::string(name) + " must be a 0-dim " +
                         (device == dlpack::kCPU ? "CPU" : "CUDA") + " tensor of " +
                         (kCode == dlpack::kFloat ? "float" : "int") + std::to_string(kBits));
  if (index != nullptr) *index = view.dl.device.index;
  return reinterpret_cast<T*>(static_cast<char*>(view.dl.data) + view.dl.byte_offset);
}

// What Plan.step, Plan.apply and Plan.repeated_step are told of a step.
host::CpuStep cpu_step(bool norm, double max_norm, double clip_value, double grad_scale,
                       bool found_inf, bool skip_nonfinite, int threads,
                       const py::object& grad_norm, const py::object& skipped_steps) {
  host::CpuStep step;
  step.options.norm = norm;
  step.options.max_norm = max_norm;
  step.options.clip_value = clip_value;
  step.options.grad_scale = grad_scale;
  step.options.found_inf = found_inf;
  step.options.skip_nonfinite = skip_nonfinite;
  step.options.threads = checked_threads(threads);
  step.norm_out = scalar_memory<float>(grad_norm, "grad_norm", dlpack::kCPU);
  step.skipped_out = scalar_memory<int64_t>(skipped_steps, "skipped_steps", dlpack::kCPU);
  return step;
}

#define FUSEDOPT_STEP_ARGUMENTS                                                                  \
  py::arg("norm"), py::arg("max_norm"), py::arg("clip_value"), py::arg("grad_scale"),            \
      py::arg("found_inf"), py::arg("skip_nonfinite"), py::arg("threads"), py::arg("grad_norm"), \
      py::arg("skipped_steps")

#define FUSEDOPT_CUDA_ARGUMENTS                                                       \
  py::arg("norm"), py::arg("max_norm"), py::arg("clip_value"), py::arg("grad_scale"), \
      py::arg("found_inf"), py::arg("skip_nonfinite"), py::arg("grad_norm"),          \
      py::arg("skipped_steps"), py::arg("stream")

std::string step(Plan& plan, const py::object& groups, const py::object& state,
                 const py::object& host, bool norm, double max_norm, double clip_value,
                 double grad_scale, bool found_inf, bool skip_nonfinite, int threads,
                 const py::object& grad_norm, const py::object& skipped_steps) {
  const host::CpuStep on_cpu = cpu_step(norm, max_norm, clip_value, grad_scale, found_inf,
                                        skip_nonfinite, threads, grad_norm, skipped_steps);
  return guarded([&] {
    return plan.step(groups.ptr(), state.ptr(), host.ptr(), [&] { return on_cpu.run(&plan); });
  });
}

// A function without arguments, and what it has returned.
using Answer = std::pair<py::function, py::object>;

#define FUSEDOPT_REPEATED_ARGUMENTS                                                           \
  py::arg("host"), py::arg("options"), py::arg("keys"), py::arg("norm"), py::arg("max_norm"), \
      py::arg("clip_value"), py::arg("skip_nonfinite"), py::arg("grad_norm"),                 \
      py::arg("skipped_steps"), py::arg("empty"), py::arg("answers")

// See host/repeated_step.h. `owned`: what `step` uses.
py::object repeated_step(std::function<bool(PyObject*, PyObject*)> step, const py::tuple& owned,
                         const py::tuple& options, Py_ssize_t keys, bool norm,
                         const py::object& grad_norm, const py::object& skipped_steps,
                         const std::vector<py::dict>& empty, const std::vector<Answer>& answers) {
  if (options.size() != host::kOptions)
    throw py::value_error("options must be a tuple of " + std::to_string(host::kOptions));
  host::StepBefore before{};
  before.step = std::move(step);
  before.options = options.ptr();
  before.keys = keys;
  before.norm = norm;
  before.grad_norm = grad_norm.ptr();
  before.skipped_steps = skipped_steps.ptr();
  for (const py::dict& dict : empty) before.empty.push_back(dict.ptr());
  for (const auto& [function, value] : answers)
    before.answers.push_back({function.ptr(), value.ptr()});
  const py::tuple all = py::make_tuple(owned, options, grad_norm, skipped_steps, empty, answers);
  before.owner = host::Ref::borrow(all.ptr());
  return guarded([&] {
    const host::Ref function = host::repeated_step(std::move(before));
    return py::reinterpret_borrow<py::object>(function.get());
  });
}

template <class P>
P* checked_plan(const py::object& plan) {
  P* const pointer = plan.cast<P*>();
  if (pointer == nullptr) throw py::type_error("plan must not be None");
  return pointer;
}

// `num_threads` is a function without arguments.
py::object cpu_repeated_step(const py::object& plan, const py::object& host,
                             const py::tuple& options, Py_ssize_t keys, bool norm, double max_norm,
                             double clip_value, bool skip_nonfinite, const py::object& grad_norm,
                             const py::object& skipped_steps, const std::vector<py::dict>& empty,
                             const std::vector<Answer>& answers, const py::function& num_threads) {
  host::CpuStep on_cpu =
      cpu_step(norm, max_norm, clip_value, 1.0, false, skip_nonfinite, 1, grad_norm, skipped_steps);
  auto step = [on_cpu, plan = checked_plan<Plan>(plan), host = host.ptr(),
               num_threads = num_threads.ptr()](PyObject* groups, PyObject* state) mutable {
    const host::Ref threads = host::Ref::checked(PyObject_CallNoArgs(num_threads));
    on_cpu.options.threads = static_cast<int>(PyLong_AsLong(threads.get()));
    if (PyErr_Occurred()) throw host::PythonError{};
    if (on_cpu.options.threads < 1)
      host::raise(PyExc_ValueError, "num_threads must return at least 1");
    return plan->step(groups, state, host, [&] { return on_cpu.run(plan); }).empty();
  };
  return repeated_step(std::move(step), py::make_tuple(plan, host, num_threads), options, keys,
                       norm, grad_norm, skipped_steps, empty, answers);
}

void apply(Plan& plan, double squared_norm, bool norm, double max_norm, double clip_value,
           double grad_scale, bool found_inf, bool skip_nonfinite, int threads,
           const py::object& grad_norm, const py::object& skipped_steps) {
  host::CpuStep on_cpu = cpu_step(norm, max_norm, clip_value, grad_scale, found_inf, skip_nonfinite,
                                  threads, grad_norm, skipped_steps);
  on_cpu.options.squared_norm = squared_norm;
  guarded([&] { plan.apply([&] { return on_cpu.run(&plan); }); });
}

// A plan for tensors on one CUDA device, and the driver that runs it.
struct CudaPlan {
  explicit CudaPlan(const RuleKeys& keys) : plan(keys, host::kCudaDevice, true) {}

  Plan plan;
  host::CudaDriver driver;
};

// The arguments of a CUDA step: scalars on the device, so that no step waits for it.
struct CudaArguments {
  CudaArguments(bool norm, double max_norm, double clip_value, const py::object& grad_scale,
                const py::object& found_inf, bool skip_nonfinite, const py::object& grad_norm,
                const py::object& skipped_steps, uintptr_t stream) {
    options.norm = norm;
    options.max_norm = max_norm;
    options.clip_value = clip_value;
    options.skip_nonfinite = skip_nonfinite;
    options.stream = stream;
    options.grad_scale = memory<float>(grad_scale, "grad_scale");
    options.found_inf = memory<float>(found_inf, "found_inf");
    options.grad_norm = memory<float>(grad_norm, "grad_norm");
    options.skipped_steps = memory<int64_t>(skipped_steps, "skipped_steps");
  }

  template <class T>
  T* memory(const py::object& tensor, const char* name) {
    int index = 0;
    T* data = scalar_memory<T>(tensor, name, host::kCudaDevice, &index);
    if (data != nullptr) devices.push_back({index, name});
    return data;
  }

  // The first tensor on another device than the params; null where there is none.
  const char* misplaced(const Plan& plan) const {
    for (const auto& [index, name] : devices)
      if (plan.rows() > 0 && index != plan.device_index()) return name;
    return nullptr;
  }

  bool run(CudaPlan* p) const {
    if (const char* name = misplaced(p->plan))
      host::raise(PyExc_ValueError, std::string(name) + " must be on the params' device");
    return p->driver.step(&p->plan, options);
  }

  host::CudaOptions options;
  std::vector<std::pair<int, const char*>> devices;
};

std::string cuda_step(CudaPlan& p, const py::object& groups, const py::object& state,
                      const py::object& host, bool norm, double max_norm, double clip_value,
                      const py::object& grad_scale, const py::object& found_inf,
                      bool skip_nonfinite, const py::object& grad_norm,
                      const py::object& skipped_steps, uintptr_t stream) {
  const CudaArguments arguments(norm, max_norm, clip_value, grad_scale, found_inf, skip_nonfinite,
                                grad_norm, skipped_steps, stream);
  return guarded([&] {
    return p.plan.step(groups.ptr(), state.ptr(), host.ptr(), [&] { return arguments.run(&p); });
  });
}

// A step like the one before on its stream. False as Plan.step's reasons, and where the params have
// gone to another device or have no gradients.
bool repeat_on_cuda(CudaPlan* p, const CudaArguments& arguments, PyObject* groups, PyObject* state,
                    PyObject* host) {
  bool served = true;
  const std::string reason = p->plan.step(groups, state, host, [&] {
    served = p->plan.rows() > 0 && arguments.misplaced(p->plan) == nullptr;
    return !served || arguments.run(p);  // what is not served is taken back
  });
  return served && reason.empty();
}

// `after` is called after each step, whether it fails or not: a function without arguments, or
// None.
py::object cuda_repeated_step(const py::object& plan, const py::object& host,
                              const py::tuple& options, Py_ssize_t keys, bool norm, double max_norm,
                              double clip_value, bool skip_nonfinite, const py::object& grad_norm,
                              const py::object& skipped_steps, const std::vector<py::dict>& empty,
                              const std::vector<Answer>& answers, uintptr_t stream,
                              const py::object& after) {
  const CudaArguments arguments(norm, max_norm, clip_value, py::none(), py::none(), skip_nonfinite,
                                grad_norm, skipped_steps, stream);
  auto step = [arguments, p = checked_plan<CudaPlan>(plan), host = host.ptr(),
               after = after.is_none() ? nullptr : after.ptr()](PyObject* groups, PyObject* state) {
    bool served = false;
    try {
      served = repeat_on_cuda(p, arguments, groups, state, host);
    } catch (...) {
      PyObject *type, *value, *trace;
      PyErr_Fetch(&type, &value, &trace);
      if (after != nullptr) Py_XDECREF(PyObject_CallNoArgs(after));
      PyErr_Restore(type, value, trace);  // the first error is the one to see
      throw;
    }
    if (after != nullptr) host::Ref::checked(PyObject_CallNoArgs(after));
    return served;
  };
  return repeated_step(std::move(step), py::make_tuple(plan, host, after), options, keys, norm,
                       grad_norm, skipped_steps, empty, answers);
}

void cuda_squared_norm(CudaPlan& p, const py::object& out, uintptr_t stream) {
  CudaArguments arguments(true, 0, 0, py::none(), py::none(), false, py::none(), py::none(),
                          stream);
  arguments.options.norm_only = true;
  arguments.options.squared_norm_out = arguments.memory<double>(out, "out");
  if (arguments.options.squared_norm_out == nullptr) throw py::type_error("out must be a tensor");
  guarded([&] {
    p.plan.need_table();
    arguments.run(&p);
  });
}

void cuda_apply(CudaPlan& p, const py::object& squared_norm, bool norm, double max_norm,
                double clip_value, const py::object& grad_scale, const py::object& found_inf,
                bool skip_nonfinite, const py::object& grad_norm, const py::object& skipped_steps,
                uintptr_t stream) {
  CudaArguments arguments(norm, max_norm, clip_value, grad_scale, found_inf, skip_nonfinite,
                          grad_norm, skipped_steps, stream);
  arguments.options.squared_norm = arguments.memory<double>(squared_norm, "squared_norm");
  guarded([&] { p.plan.apply([&] { return arguments.run(&p); }); });
}

// A plan for tensors on one device, and the table that Triton kernels read.
struct TritonPlan {
  TritonPlan(const RuleKeys& keys, dlpack::DeviceType device, int chunk)
      : plan(keys, device, true), driver(chunk) {}

  Plan plan;
  host::TritonDriver driver;
};

// What plans for tensors on a device have in common.
template <class P>
py::class_<P> device_plan(py::module_& m, const char* name) {
  return py::class_<P>(m, name, py::module_local())
      .def(
          "refresh",
          [](P& p, const py::object& groups, const py::object& state, const py::object& host) {
            return guarded([&] { return p.plan.refresh(groups.ptr(), state.ptr(), host.ptr()); });
          },
          py::arg("param_groups"), py::arg("state"), py::arg("host"))
      .def("roll_back", [](P& p) { guarded([&] { p.plan.roll_back(); }); })
      .def_property_readonly("rows", [](const P& p) { return p.plan.rows(); })
      .def_property_readonly("uploads", [](const P& p) { return p.driver.uploads(); });
}

// Clips a list of gradients in place, or with norm_only takes their total norm; `total_norm` is a
// 0-dim float64 tensor that takes it.
std::string cuda_clip(host::CudaDriver& driver, const py::object& tensors, const py::object& host,
                      bool norm, bool norm_only, double max_norm, double clip_value,
                      const py::object& total_norm, uintptr_t stream) {
  host::CudaOptions options;
  options.norm = norm;
  options.norm_only = norm_only;
  options.max_norm = max_norm;
  options.clip_value = clip_value;
  options.stream = stream;
  int index = 0;
  options.squared_norm_out =
      scalar_memory<double>(total_norm, "total_norm", host::kCudaDevice, &index);
  return guarded([&] {
    const host::TensorList list(tensors.ptr(), !norm_only, host::kCudaDevice);
    if (!list.reason().empty()) return list.reason();
    if (list.table().rows.empty()) return std::string("no elements");
    if (!total_norm.is_none() && index != list.device_index())
      host::raise(PyExc_ValueError, "total_norm must be on the tensors' device");
    driver.clip({list.table(), list.device_index(), host.ptr(), [] {}}, options);
    return std::string();
  });
}

py::object describe(const py::object& tensor) {
  TensorView view{};  // a function that is not what its name says may leave it as it is
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
    TensorView view{};
    if (grad.none() || !access.read(grad, &view)) return py::none();
    return py::int_(reinterpret_cast<uintptr_t>(view.dl.data) + view.dl.byte_offset);
  });
}

py::object squared_norm_of(const py::object& tensors, int threads) {
  return guarded([&]() -> py::object {
    const host::TensorList list(tensors.ptr(), false, dlpack::kCPU);
    if (!list.reason().empty()) return py::str(list.reason());
    return py::float_(cpu::squared_norm(list.table(), checked_threads(threads)));
  });
}

std::string scale(const py::object& tensors, double coef, double limit, int threads) {
  return guarded([&] {
    const host::TensorList list(tensors.ptr(), true, dlpack::kCPU);
    if (list.reason().empty())
      cpu::scale_gradients(list.table(), coef, limit, checked_threads(threads));
    return list.reason();
  });
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = cuda::archs();
  info["cuda_device_type"] = host::kCudaDevice == dlpack::kCPU ? "cpu" : "cuda";
  info["cpu_level"] = cpu::level().name;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["tensor_access"] = TensorAccess::instance().name();
  const char* reader = TensorAccess::instance().reader();
  if (reader != nullptr) info["tensor_reader"] = reader;
  return info;
}

using Addresses = std::map<std::string, uintptr_t>;

template <class F>
void take(const Addresses& functions, const char* name, F** member) {
  const auto found = functions.find(name);
  if (found == functions.end() || found->second == 0)
    throw py::value_error(std::string("use_direct needs the address of ") + name);
  *member = reinterpret_cast<F*>(found->second);
}

// dtypes: DLPack's (code, bits) by torch's number; devices: DLPack's type by torch's number.
void take_shim(const Addresses& functions, const std::map<int, std::pair<int, int>>& dtypes,
               const std::map<int, int>& devices, host::ShimFunctions* shim) {
  take(functions, "has_storage", &shim->has_storage);
  take(functions, "dtype", &shim->dtype);
  take(functions, "device_type", &shim->device_type);
  take(functions, "device_index", &shim->device_index);
  take(functions, "dim", &shim->dim);
  take(functions, "sizes", &shim->sizes);
  take(functions, "strides", &shim->strides);
  take(functions, "data_ptr", &shim->data_ptr);
  for (const auto& [number, type] : dtypes) {
    if (number < 0 || number >= host::ShimFunctions::kDtypes)
      throw py::value_error("use_direct got the dtype " + std::to_string(number));
    const auto [code, bits] = type;
    shim->dtypes[number] = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  }
  for (const auto& [number, type] : devices) {
    if (number < 0 || number >= host::ShimFunctions::kDevices)
      throw py::value_error("use_direct got the device type " + std::to_string(number));
    shim->devices[number] = type;
  }
}

void use_direct(const std::string& reader, int64_t tensor_offset, uintptr_t undefined_impl,
                const Addresses& functions, const std::map<int, std::pair<int, int>>& dtypes,
                const std::map<int, int>& devices, const std::array<int64_t, 3>& hints) {
  if (tensor_offset <= 0 || undefined_impl == 0)
    throw py::value_error("use_direct takes a positive offset and an address that is not null");
  for (const int64_t hint : hints)
    if (hint < 0 || hint > host::kLargestHint)
      throw py::value_error("use_direct takes hints of 0 to " + std::to_string(host::kLargestHint));
  host::DirectFunctions f{};
  f.tensor_offset = tensor_offset;
  f.hints = {hints[0], hints[1], hints[2]};
  f.undefined_impl = reinterpret_cast<const void*>(undefined_impl);
  take(functions, "grad", &f.grad);
  take(functions, "is_neg", &f.is_neg);
  take(functions, "bump_version", &f.bump_version);
  if (reader == "read_only") {
    f.reader = host::Reader::kReadOnly;
    take(functions, "to_dlpack_read_only", &f.to_dlpack_read_only);
  } else if (reader == "two_arguments") {
    f.reader = host::Reader::kTwoArguments;
    take(functions, "to_dlpack", &f.to_dlpack);
  } else if (reader == "shim") {
    f.reader = host::Reader::kShim;
    take_shim(functions, dtypes, devices, &f.shim);
  } else {
    throw py::value_error("reader must be read_only, two_arguments or shim, got '" + reader + "'");
  }
  TensorAccess::instance().use_direct(f);
}

}  // namespace
}  // namespace fusedopt

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;  // NOLINT
  m.doc() = "The native part of fusedopt. Private: its interface changes without notice.";

  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init([](const std::string& rule) {
             const RuleKeys keys = find_rule(rule);
             return guarded([&] { return new Plan(keys, dlpack::kCPU, false); });
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
      .def("repeated_step", &cpu_repeated_step, FUSEDOPT_REPEATED_ARGUMENTS, py::arg("num_threads"))
      .def(
          "squared_norm",
          [](Plan& plan, int threads) {
            return guarded([&] {
              plan.need_table();
              return cpu::squared_norm(plan.table(), checked_threads(threads));
            });
          },
          py::arg("threads"))
      .def("roll_back", [](Plan& plan) { guarded([&] { plan.roll_back(); }); })
      .def_property_readonly("rows", &Plan::rows)
      .def_property_readonly("flat_rows", &Plan::flat_rows);

  device_plan<CudaPlan>(m, "CudaPlan")
      .def(py::init([](const std::string& rule) {
             const RuleKeys keys = find_rule(rule);
             return guarded([&] { return new CudaPlan(keys); });
           }),
           py::arg("rule"))
      .def("step", &cuda_step, py::arg("param_groups"), py::arg("state"), py::arg("host"),
           FUSEDOPT_CUDA_ARGUMENTS)
      .def("repeated_step", &cuda_repeated_step, FUSEDOPT_REPEATED_ARGUMENTS, py::arg("stream"),
           py::arg("after"))
      .def("squared_norm", &cuda_squared_norm, py::arg("out"), py::arg("stream"))
      .def("apply", &cuda_apply, py::arg("squared_norm"), FUSEDOPT_CUDA_ARGUMENTS);

  device_plan<TritonPlan>(m, "TritonPlan")
      .def(py::init([](const std::string& rule, int device_type, int chunk) {
             const RuleKeys keys = find_rule(rule);
             if (chunk < 1 || (chunk & (chunk - 1)) != 0)
               throw py::value_error("chunk must be a power of two, got " + std::to_string(chunk));
             const auto device = static_cast<dlpack::DeviceType>(device_type);
             return guarded([&] { return new TritonPlan(keys, device, chunk); });
           }),
           py::arg("rule"), py::arg("device_type"), py::arg("chunk"))
      .def(
          "step",
          [](TritonPlan& p, const py::object& groups, const py::object& state,
             const py::object& host) {
            return guarded([&] {
              return p.plan.step(groups.ptr(), state.ptr(), host.ptr(),
                                 [&] { return p.driver.launch(&p.plan); });
            });
          },
          py::arg("param_groups"), py::arg("state"), py::arg("host"))
      .def("launch",
           [](TritonPlan& p) {
             guarded([&] {
               p.plan.need_table();
               p.driver.launch(&p.plan);
             });
           })
      .def("apply", [](TritonPlan& p) {
        guarded([&] { p.plan.apply([&] { return p.driver.launch(&p.plan); }); });
      });

  py::class_<host::CudaDriver>(m, "CudaClip", py::module_local())
      .def(py::init<>())
      .def("run", &cuda_clip, py::arg("tensors"), py::arg("host"), py::arg("norm"),
           py::arg("norm_only"), py::arg("max_norm"), py::arg("clip_value"), py::arg("total_norm"),
           py::arg("stream"));

  m.def("cuda_unavailable", &cuda::unavailable);
  m.def("cuda_capabilities", [] {
    std::vector<int> all;
    if (const std::string error = cuda::capabilities(&all); !error.empty())
      throw std::runtime_error(error);
    return all;
  });
  m.def(
      "cuda_unserved",
      [](const std::string& rule, int device) {
        const RuleId id = find_rule(rule).id;
        const py::gil_scoped_release unlocked;
        return cuda::unserved(id, device);
      },
      py::arg("rule"), py::arg("device"));
  m.def("cuda_clip_unserved", &cuda::unserved_clip, py::arg("device"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cuda_launches", &cuda::launches);
  m.def(
      "cuda_set_geometry",
      [](int blocks, int threads) {
        const std::string error = cuda::set_geometry(blocks, threads);
        if (!error.empty()) throw py::value_error(error);
      },
      py::arg("blocks"), py::arg("threads"));
  m.def("rules", &rules);
  m.def("build_info", &build_info);
  m.def(
      "count_keys", [](const py::list& groups) { return host::count_keys(groups.ptr()); },
      py::arg("param_groups"));
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
  m.def(
      "limit_threads", [](int threads) { cpu::thread_limit = checked_threads(threads); },
      py::arg("threads"));
  m.def("use_direct", &use_direct, py::arg("reader"), py::arg("tensor_offset"),
        py::arg("undefined_impl"), py::arg("functions"), py::arg("dtypes"), py::arg("devices"),
        py::arg("hints"));
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
