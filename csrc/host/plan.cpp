#include "host/plan.h"

#include <algorithm>
#include <cstring>

#include "host/layout.h"
#include "host/tensor_list.h"

namespace fusedopt::host {
namespace {

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dl.ndim == b.dl.ndim && std::equal(a.dl.shape, a.dl.shape + a.dl.ndim, b.dl.shape);
}

// Lets other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(thread_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* thread_;
};

struct Busy {
  explicit Busy(bool* flag) : flag(flag) { *flag = true; }
  ~Busy() { *flag = false; }
  bool* flag;
};

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.dl.ndim; ++d)
    text += (d ? ", " : "") + std::to_string(view.size(d));
  return text + "]";
}

}  // namespace

int active_states(RuleId rule, const double* hyper) {
  switch (rule) {
#define FUSEDOPT_STATES(Rule)           \
  case RuleId::k##Rule: {               \
    Rule::Hyper h;                      \
    std::memcpy(&h, hyper, sizeof h);   \
    return Rule::states(h);             \
  }
    FUSEDOPT_RULES(FUSEDOPT_STATES)
#undef FUSEDOPT_STATES
    case RuleId::kCount:
      break;
  }
  return 0;
}

void StateIndex::build(PyObject* state, size_t params) {
  size_t capacity = 16;
  while (capacity < 2 * (params + static_cast<size_t>(PyDict_GET_SIZE(state)))) capacity *= 2;
  slots_.assign(capacity, Slot{});
  mask_ = capacity - 1;
  PyObject *param, *entry;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &entry);) find(param).state = entry;
}

StateIndex::Slot& StateIndex::find(PyObject* param) {
  // Objects are 16-byte aligned; the multiplier spreads neighbours.
  size_t at = (reinterpret_cast<uintptr_t>(param) >> 4) * 0x9E3779B97F4A7C15u >> 20;
  for (;; ++at) {
    Slot& slot = slots_[at & mask_];
    if (slot.param == param) return slot;
    if (slot.param == nullptr) {
      slot.param = param;
      return slot;
    }
  }
}

Plan::Plan(RuleId rule, bool has_step, std::vector<std::string> hyper_keys,
           std::vector<std::string> state_keys)
    : rule_(rule), has_step_(has_step) {
  for (const std::string& text : hyper_keys) {
    const size_t bracket = text.find('[');
    const int count = bracket == std::string::npos ? 1 : text[bracket + 1] - '0';
    hyper_keys_.push_back({interned(text.substr(0, bracket).c_str()), count});
  }
  for (const std::string& text : state_keys) state_keys_.push_back(interned(text.c_str()));
}

std::string Plan::where() const {
  return "param_groups[" + std::to_string(group_index_) + "][\"params\"][" +
         std::to_string(param_index_) + "]";
}

void Plan::clear() {
  rows_.clear();
  groups_.clear();
  layouts_.clear();
  params_.clear();
  alive_.clear();
  created_.clear();
  elements_ = 0;
}

void Plan::roll_back() {
  for (auto it = created_.rbegin(); it != created_.rend(); ++it)
    if (PyDict_DelItem(it->dict.get(), it->key.get()) != 0) PyErr_Clear();  // removed by the user
  clear();
}

std::string Plan::refresh(PyObject* param_groups, PyObject* state, PyObject* host) {
  if (busy_) raise(PyExc_RuntimeError, "step() of this optimizer is running in another thread");
  roll_back();
  host_ = host;
  state_ = state;
  try {
    std::string reason = build(param_groups, state);
    if (!reason.empty()) roll_back();
    return reason;
  } catch (...) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    roll_back();
    PyErr_Restore(type, value, trace);
    throw;
  }
}

std::string Plan::build(PyObject* param_groups, PyObject* state) {
  static PyObject* const params_key = interned("params");
  const TensorAccess& access = TensorAccess::instance();
  if (!PyList_Check(param_groups)) raise(PyExc_TypeError, "param_groups must be a list");
  if (!PyDict_Check(state)) raise(PyExc_TypeError, "state must be a dict");

  size_t total = 0;
  std::vector<Ref> param_lists;
  param_lists.reserve(PyList_GET_SIZE(param_groups));
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    PyObject* params =
        PyDict_Check(group) ? PyDict_GetItemWithError(group, params_key) : nullptr;
    if (params == nullptr)
      raise(PyExc_KeyError, "param_groups[" + std::to_string(g) + "] has no \"params\"");
    param_lists.push_back(Ref::checked(PySequence_Fast(params, "\"params\" must be a list")));
    total += static_cast<size_t>(PySequence_Fast_GET_SIZE(param_lists.back().get()));
  }
  index_.build(state, total);
  rows_.reserve(total);
  params_.reserve(total);
  groups_.resize(param_lists.size());

  for (size_t g = 0; g < param_lists.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(g));
    group_index_ = g;
    bool read = false;
    for (Py_ssize_t j = 0; j < PySequence_Fast_GET_SIZE(param_lists[g].get()); ++j) {
      PyObject* param = PySequence_Fast_GET_ITEM(param_lists[g].get(), j);
      param_index_ = static_cast<size_t>(j);
      if (!access.is_tensor(param))
        raise(PyExc_TypeError, where() + " must be a torch.Tensor, got " + repr(param));
      GradRef grad = access.grad(param);
      if (grad.none()) continue;
      if (!read) {
        read_group(group, g);
        read = true;
      }
      std::string reason = add_row(param, std::move(grad), g);
      if (!reason.empty()) return reason;
    }
  }
  return "";
}

void Plan::read_group(PyObject* group, size_t index) {
  static PyObject* const maximize_key = interned("maximize");
  const auto number = [&](PyObject* value, PyObject* name) -> double {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (value == Py_False || value == Py_None) return 0;
    if (value == Py_True) return 1;
    const auto refuse = [&](const char* what) {
      PyErr_Clear();
      raise(PyExc_TypeError, "param_groups[" + std::to_string(index) + "][" + repr(name) +
                                 "] must be " + what + ", got " + repr(value));
    };
    if (PyNumber_Check(value) == 0) refuse("a number or a one-element tensor");
    const Ref as_float = Ref::own(PyNumber_Float(value));
    if (!as_float) refuse("a number or a one-element tensor");
    return PyFloat_AS_DOUBLE(as_float.get());
  };
  const auto item = [&](PyObject* name) {
    PyObject* value = PyDict_GetItemWithError(group, name);
    if (value == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
      throw PythonError{};
    }
    return value;
  };
  Group& out = groups_[index];
  int slot = 0;
  std::fill(std::begin(out.hyper), std::end(out.hyper), 0.0);
  for (const HyperKey& hyper : hyper_keys_) {
    PyObject* value = item(hyper.name);
    if (hyper.count == 1) {
      out.hyper[slot++] = number(value, hyper.name);
      continue;
    }
    const Ref items = Ref::own(PySequence_Fast(value, ""));
    if (!items || PySequence_Fast_GET_SIZE(items.get()) != hyper.count) {
      PyErr_Clear();
      raise(PyExc_TypeError, "param_groups[" + std::to_string(index) + "][" + repr(hyper.name) +
                                 "] must be " + std::to_string(hyper.count) + " numbers, got " +
                                 repr(value));
    }
    for (int i = 0; i < hyper.count; ++i)
      out.hyper[slot++] = number(PySequence_Fast_GET_ITEM(items.get(), i), hyper.name);
  }
  out.maximize = number(item(maximize_key), maximize_key) != 0;
}

std::string Plan::read_operand(PyObject* object, const char* role, TensorView* view, DType* dtype) {
  const TensorAccess& access = TensorAccess::instance();
  if (access.is_plain(object) && access.read(object, view) && floating_dtype(view->dl, dtype) &&
      (view->dl.data != nullptr || view->numel() == 0))
    return "";
  Ref plain = Ref::checked(PyObject_CallMethod(host_, "resolve", "Osnn", object, role,
                                               static_cast<Py_ssize_t>(group_index_),
                                               static_cast<Py_ssize_t>(param_index_)));
  if (plain.get() == Py_None || !access.read(plain.get(), view) ||
      !floating_dtype(view->dl, dtype) || (view->dl.data == nullptr && view->numel() != 0))
    return "the " + std::string(role) + " of " + where() +
           " is not a dense tensor of float32, float64, bfloat16 or float16 in memory";
  alive_.push_back(std::move(plain));
  return "";
}

PyObject* Plan::state_tensor(PyObject* state, int k, PyObject* param, uint8_t* first) {
  PyObject* found = PyDict_GetItemWithError(state, state_keys_[k]);
  if (found == nullptr && PyErr_Occurred()) throw PythonError{};
  if (found != nullptr && found != Py_None) return found;
  const Ref tensor = Ref::checked(
      PyObject_CallMethod(host_, "new_state", "OO", param, state_keys_[k]));
  if (PyDict_SetItem(state, state_keys_[k], tensor.get()) != 0) throw PythonError{};
  created_.push_back({Ref::borrow(state), Ref::borrow(state_keys_[k])});
  *first = 1;
  return tensor.get();  // the dict holds it
}

void Plan::read_step(PyObject* state, PyObject* param, Row* row) {
  static PyObject* const step_key = interned("step");
  const TensorAccess& access = TensorAccess::instance();
  PyObject* step = PyDict_GetItemWithError(state, step_key);
  if (step == nullptr && PyErr_Occurred()) throw PythonError{};
  if (step == nullptr) {
    const Ref created = Ref::checked(PyObject_CallMethod(host_, "new_state", "OO", param, step_key));
    if (PyDict_SetItem(state, step_key, created.get()) != 0) throw PythonError{};
    created_.push_back({Ref::borrow(state), Ref::borrow(step_key)});
    step = created.get();
  }
  TensorView view;
  const auto good = [&] {
    return access.is_plain(step) && access.read(step, &view) && view.dl.ndim == 0 &&
           view.dl.device.type == dlpack::kCPU && view.dl.dtype.code == dlpack::kFloat &&
           view.dl.dtype.bits == 32 && view.dl.data != nullptr;
  };
  if (!good()) {
    Ref::checked(PyObject_CallMethod(host_, "normalise_step", "O", state));
    step = PyDict_GetItemWithError(state, step_key);
    if (step == nullptr || !good())
      raise(PyExc_TypeError, "the step of " + where() + " must be a number or a one-element tensor");
  }
  row->step = static_cast<float*>(view.dl.data);
}

std::string Plan::add_row(PyObject* param, GradRef grad, size_t group) {
  const TensorAccess& access = TensorAccess::instance();
  static PyObject* const grad_name = interned("grad");
  Row row{};
  row.group = static_cast<int32_t>(group);
  row.states = static_cast<uint8_t>(active_states(rule_, groups_[group].hyper));
  const int count = kState0 + row.states;

  Operands operands;
  operands.object[kParam] = param;
  std::string reason = read_operand(param, "param", &operands.view[kParam], &row.dtype[kParam]);
  if (!reason.empty()) return reason;
  // A gradient that libtorch can describe needs no Python object.
  operands.object[kGrad] = nullptr;
  const bool described = grad.tensor != nullptr && access.is_plain(param) &&
                         access.read(grad, &operands.view[kGrad]) &&
                         floating_dtype(operands.view[kGrad].dl, &row.dtype[kGrad]) &&
                         (operands.view[kGrad].dl.data != nullptr ||
                          operands.view[kGrad].numel() == 0);
  if (!described) {
    Ref object = grad.object ? std::move(grad.object)
                             : Ref::checked(PyObject_GetAttr(param, grad_name));
    reason = read_operand(object.get(), "grad", &operands.view[kGrad], &row.dtype[kGrad]);
    if (!reason.empty()) return reason;
    operands.object[kGrad] = object.get();
    alive_.push_back(std::move(object));
  }

  StateIndex::Slot* slot = &index_.find(param);
  if (slot->visited) return where() + " appears twice among the params";
  slot->visited = true;
  if (row.states > 0 || has_step_) {
    if (slot->state == nullptr) {
      const Ref fresh = Ref::checked(PyDict_New());
      if (PyObject_SetItem(state_, param, fresh.get()) != 0) throw PythonError{};
      created_.push_back({Ref::borrow(state_), Ref::borrow(param)});
      slot->state = fresh.get();
    }
    if (!PyDict_Check(slot->state))
      raise(PyExc_TypeError, "the state of " + where() + " must be a dict");
    for (int k = 0; k < row.states; ++k) {
      PyObject* tensor = state_tensor(slot->state, k, param, &row.first);
      operands.object[kState0 + k] = tensor;
      const char* name = PyUnicode_AsUTF8(state_keys_[k]);
      reason = read_operand(tensor, name, &operands.view[kState0 + k], &row.dtype[kState0 + k]);
      if (!reason.empty()) return reason;
    }
    if (has_step_) read_step(slot->state, param, &row);
  }

  for (int k = 0; k < count; ++k) {
    const TensorView& view = operands.view[k];
    if (view.dl.device.type != dlpack::kCPU) return where() + " is not on the CPU";
    if (!same_shape(view, operands.view[kParam])) {
      const std::string role =
          k == kGrad ? "grad" : k == kParam ? "param" : PyUnicode_AsUTF8(state_keys_[k - kState0]);
      raise(PyExc_ValueError, "the " + role + " of " + where() + " has shape " + shape_text(view) +
                                  ", expected " + shape_text(operands.view[kParam]));
    }
    row.data[k] = static_cast<char*>(view.dl.data) + view.dl.byte_offset;
  }
  row.numel = operands.view[kParam].numel();
  reason = lay_out(&operands, count, &row, param);
  if (!reason.empty()) return reason;
  elements_ += row.numel;
  rows_.push_back(row);
  params_.push_back(param);
  return "";
}

std::string Plan::lay_out(Operands* operands, int count, Row* row, PyObject* param) {
  row->layout = kFlat;
  if (row->numel == 0) return "";
  const TensorView* views[kOperands];
  for (int k = 0; k < count; ++k) views[k] = &operands->view[k];
  if (all_contiguous(views, count)) return "";
  if (!same_strides(*views[kParam], *views[kGrad])) {
    // A lazily negated gradient has strides of its own; only Python sees the negation.
    static PyObject* const grad_name = interned("grad");
    if (operands->object[kGrad] == nullptr) {
      Ref object = Ref::checked(PyObject_GetAttr(param, grad_name));
      Ref plain = Ref::checked(PyObject_CallMethod(host_, "resolve", "Osnn", object.get(), "grad",
                                                   static_cast<Py_ssize_t>(group_index_),
                                                   static_cast<Py_ssize_t>(param_index_)));
      if (!TensorAccess::instance().read(plain.get(), &operands->view[kGrad]))
        return "the grad of " + where() + " cannot be described";
      row->data[kGrad] = static_cast<char*>(operands->view[kGrad].dl.data) +
                         operands->view[kGrad].dl.byte_offset;
      alive_.push_back(std::move(plain));
    }
  }
  for (int k = 0; k < count; ++k)
    if (k != kGrad && overlaps_itself(*views[k]))
      raise(PyExc_RuntimeError,
            "the " + std::string(k == kParam ? "param" : "state") + " of " + where() +
                " is expanded: more than one element refers to a single memory location; "
                "clone() it first");
  Layout layout = merged_layout(views, count);
  if (is_flat(layout, count)) return "";
  row->layout = static_cast<int32_t>(layouts_.size());
  layouts_.push_back(layout);
  return "";
}

size_t Plan::flat_rows() const {
  return static_cast<size_t>(std::count_if(rows_.begin(), rows_.end(),
                                           [](const Row& row) { return row.layout == kFlat; }));
}

// While other Python threads run, they may drop gradients and replace state: hold what is used.
void Plan::own_tensors() {
  static PyObject* const grad_name = interned("grad");
  for (PyObject* param : params_) {
    alive_.push_back(Ref::borrow(param));
    alive_.push_back(Ref::checked(PyObject_GetAttr(param, grad_name)));
    PyObject* state = index_.find(param).state;
    if (state != nullptr) alive_.push_back(Ref::checked(PyDict_Copy(state)));
  }
}

double Plan::squared_norm(int threads) {
  return cpu::squared_norm({rows_, groups_, layouts_}, threads);
}

cpu::StepResult Plan::apply(const cpu::StepOptions& options) {
  // A short step keeps the GIL: owning the tensors would cost more than the step.
  constexpr int64_t kLongStep = 1 << 20, kLongRow = 1 << 14;
  const bool release = elements_ >= kLongStep &&
                       elements_ / static_cast<int64_t>(rows_.size()) >= kLongRow;
  const cpu::TableView table{rows_, groups_, layouts_};
  cpu::StepResult result;
  if (release) {
    own_tensors();
    const WithoutGil unlocked;
    const Busy busy(&busy_);
    result = cpu::apply(rule_, table, options);
  } else {
    result = cpu::apply(rule_, table, options);
  }
  if (result.skipped) {
    roll_back();
    return result;
  }
  TensorAccess::instance().bump_versions(params_);
  clear();
  return result;
}

}  // namespace fusedopt::host
