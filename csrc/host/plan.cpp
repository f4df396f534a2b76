#include "host/plan.h"

#include <algorithm>
#include <cstring>

#include "host/layout.h"
#include "host/tensor_list.h"

namespace fusedopt::host {
namespace {

constexpr int kParamsKey = 0, kMaximizeKey = 1, kFirstHyperKey = 2;  // of the group reader
constexpr int kMaxKeys = kFirstHyperKey + kMaxHyper;

// Lets other Python threads run while it lives.
class WithoutGil {
 public:
  explicit WithoutGil(bool* busy) : busy_(busy), thread_(PyEval_SaveThread()) { *busy_ = true; }
  ~WithoutGil() {
    PyEval_RestoreThread(thread_);
    *busy_ = false;
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  bool* busy_;
  PyThreadState* thread_;
};

void choose_variant(RuleId rule, const double* hyper, Row* row) {
  switch (rule) {
#define FUSEDOPT_VARIANT(Rule)                                      \
  case RuleId::k##Rule: {                                           \
    Rule::Hyper h;                                                  \
    std::memcpy(&h, hyper, sizeof h);                               \
    row->variant = static_cast<uint8_t>(Rule::variant(h));          \
    row->states = static_cast<uint8_t>(Rule::states(row->variant)); \
    return;                                                         \
  }
    FUSEDOPT_RULES(FUSEDOPT_VARIANT)
#undef FUSEDOPT_VARIANT
    case RuleId::kCount:
      break;
  }
}

std::string base_name(const std::string& key) { return key.substr(0, key.find('[')); }

std::vector<PyObject*> group_names(const RuleKeys& keys) {
  std::vector<PyObject*> names = {interned("params"), interned("maximize")};
  for (const std::string& key : keys.hyper) names.push_back(interned(base_name(key).c_str()));
  return names;
}

std::vector<PyObject*> state_names(const RuleKeys& keys) {
  std::vector<PyObject*> names;
  for (const std::string& key : keys.state) names.push_back(interned(key.c_str()));
  if (keys.has_step) names.push_back(interned("step"));
  return names;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dl.ndim == b.dl.ndim && std::equal(a.dl.shape, a.dl.shape + a.dl.ndim, b.dl.shape);
}

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.dl.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.size(d));
  return text + "]";
}

bool has_memory(const TensorView& view) { return view.dl.data != nullptr || view.numel() == 0; }

}  // namespace

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

Plan::Plan(const RuleKeys& keys)
    : rule_(keys.id),
      has_step_(keys.has_step),
      state_keys_(state_names(keys)),
      group_reader_(group_names(keys)),
      state_reader_(state_names(keys)) {
  for (const std::string& key : keys.hyper) {
    const size_t bracket = key.find('[');
    const int count = bracket == std::string::npos ? 1 : key[bracket + 1] - '0';
    hyper_keys_.push_back({interned(base_name(key).c_str()), count});
  }
}

std::string Plan::where() const {
  return "param_groups[" + std::to_string(group_index_) + "][\"params\"][" +
         std::to_string(param_index_) + "]";
}

std::string Plan::role(int operand) const {
  if (operand == kParam) return "param";
  if (operand == kGrad) return "grad";
  return PyUnicode_AsUTF8(state_keys_[operand - kState0]);
}

bool Plan::refuse(const std::string& reason) {
  reason_ = reason;
  return false;
}

void Plan::clear() {
  candidates_.clear();
  rows_.clear();
  groups_.clear();
  layouts_.clear();
  params_.clear();
  alive_.clear();
  created_.clear();
  elements_ = 0;
}

void Plan::check_idle() const {
  if (busy_) raise(PyExc_RuntimeError, "step() of this optimizer is running in another thread");
}

void Plan::roll_back() {
  check_idle();
  for (auto it = created_.rbegin(); it != created_.rend(); ++it)
    if (PyDict_DelItem(it->dict.get(), it->key.get()) != 0) PyErr_Clear();  // removed by the user
  clear();
}

std::string Plan::refresh(PyObject* param_groups, PyObject* state, PyObject* host) {
  roll_back();
  if (!PyList_Check(param_groups)) raise(PyExc_TypeError, "param_groups must be a list");
  if (!PyDict_Check(state)) raise(PyExc_TypeError, "state must be a dict");
  host_ = host;
  state_ = state;
  reason_.clear();
  try {
    if (!build(param_groups)) roll_back();
  } catch (...) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    roll_back();
    PyErr_Restore(type, value, trace);
    throw;
  }
  return reason_;
}

bool Plan::build(PyObject* param_groups) {
  const TensorAccess& access = TensorAccess::instance();
  const size_t count = static_cast<size_t>(PyList_GET_SIZE(param_groups));
  std::vector<Ref> lists;
  lists.reserve(count);
  groups_.resize(count);
  size_t total = 0;
  for (size_t g = 0; g < count; ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(g));
    PyObject* values[kMaxKeys] = {};
    if (PyDict_Check(group)) group_reader_.read(group, values);
    if (values[kParamsKey] == nullptr)
      raise(PyExc_KeyError, "param_groups[" + std::to_string(g) + "] has no \"params\"");
    lists.push_back(Ref::checked(PySequence_Fast(values[kParamsKey], "\"params\" must be a list")));
    total += static_cast<size_t>(PySequence_Fast_GET_SIZE(lists.back().get()));
    read_group(values, g);
  }
  index_.build(state_, total);
  candidates_.reserve(total);
  rows_.reserve(total);
  params_.reserve(total);
  find_candidates(lists);
  if (!find_states()) return false;
  for (size_t c = 0; c < candidates_.size(); ++c) {
    prefetch(c);
    group_index_ = candidates_[c].group;
    param_index_ = candidates_[c].index;
    if (!add_row(&candidates_[c])) return false;
  }
  return true;
}

// After a model's forward and backward pass nothing of a small tensor is in the cache, and a step
// over many of them waits for memory: one object after the other, unless it asks ahead.
void Plan::find_candidates(const std::vector<Ref>& lists) {
  constexpr Py_ssize_t kAhead = 8;
  const TensorAccess& access = TensorAccess::instance();
  for (size_t g = 0; g < lists.size(); ++g) {
    group_index_ = g;
    PyObject** params = PySequence_Fast_ITEMS(lists[g].get());
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(lists[g].get());
    for (Py_ssize_t j = 0; j < count; ++j) {
      if (j + 2 * kAhead < count) access.prefetch_object(params[j + 2 * kAhead]);
      if (j + kAhead < count && access.is_plain(params[j + kAhead]))
        access.prefetch_impl(params[j + kAhead]);
      param_index_ = static_cast<size_t>(j);
      if (!access.is_tensor(params[j]))
        raise(PyExc_TypeError, where() + " must be a torch.Tensor, got " + repr(params[j]));
      GradRef grad = access.grad(params[j]);
      if (!grad.none())
        candidates_.push_back({params[j], std::move(grad), g, param_index_, nullptr, {}});
    }
  }
}

bool Plan::find_states() {
  constexpr size_t kAhead = 8;
  for (size_t c = 0; c < candidates_.size(); ++c) {
    if (c + kAhead < candidates_.size()) {
      StateIndex::Slot* ahead = &index_.find(candidates_[c + kAhead].param);
      if (ahead->state != nullptr) __builtin_prefetch(ahead->state);
    }
    Candidate& candidate = candidates_[c];
    group_index_ = candidate.group;
    param_index_ = candidate.index;
    candidate.slot = &index_.find(candidate.param);
    if (candidate.slot->visited) return refuse(where() + " appears twice among the params");
    candidate.slot->visited = true;
    PyObject* state = candidate.slot->state;
    if (state == nullptr) continue;
    if (!PyDict_Check(state)) raise(PyExc_TypeError, "the state of " + where() + " must be a dict");
    PyObject* values[kMaxStates + 1];
    state_reader_.read(state, values);
    for (size_t k = 0; k < state_keys_.size(); ++k) candidate.state[k] = Ref::borrow(values[k]);
  }
  return true;
}

void Plan::prefetch(size_t c) const {
  constexpr size_t kAhead = 3;
  const TensorAccess& access = TensorAccess::instance();
  if (c + 2 * kAhead < candidates_.size()) {
    const Candidate& far = candidates_[c + 2 * kAhead];
    access.prefetch_impl(far.grad);
    for (const Ref& tensor : far.state) access.prefetch_object(tensor.get());
  }
  if (c + kAhead < candidates_.size()) {
    for (const Ref& tensor : candidates_[c + kAhead].state)
      if (tensor && access.is_plain(tensor.get())) access.prefetch_impl(tensor.get());
  }
}

void Plan::read_group(PyObject* const* values, size_t index) {
  const auto refuse = [&](PyObject* name, const std::string& what, PyObject* value) {
    PyErr_Clear();
    raise(PyExc_TypeError, "param_groups[" + std::to_string(index) + "][" + repr(name) +
                               "] must be " + what + ", got " + repr(value));
  };
  const auto number = [&](PyObject* value, PyObject* name) -> double {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (value == Py_False || value == Py_None) return 0;
    if (value == Py_True) return 1;
    const bool text = PyUnicode_Check(value) || PyBytes_Check(value);
    const Ref as_float = Ref::own(text ? nullptr : PyNumber_Float(value));
    if (!as_float) refuse(name, "a number or a one-element tensor", value);
    return PyFloat_AS_DOUBLE(as_float.get());
  };
  Group& out = groups_[index];
  std::fill(std::begin(out.hyper), std::end(out.hyper), 0.0);
  int slot = 0;
  for (size_t k = 0; k < hyper_keys_.size(); ++k) {
    const HyperKey& key = hyper_keys_[k];
    PyObject* value = values[kFirstHyperKey + k];
    if (value == nullptr) {
      PyErr_SetObject(PyExc_KeyError, key.name);
      throw PythonError{};
    }
    if (key.count == 1) {
      out.hyper[slot++] = number(value, key.name);
      continue;
    }
    const Ref items = Ref::own(PySequence_Fast(value, ""));
    if (!items || PySequence_Fast_GET_SIZE(items.get()) != key.count)
      refuse(key.name, std::to_string(key.count) + " numbers", value);
    for (int i = 0; i < key.count; ++i)
      out.hyper[slot++] = number(PySequence_Fast_GET_ITEM(items.get(), i), key.name);
  }
  PyObject* maximize = values[kMaximizeKey];
  out.maximize = maximize != nullptr && PyObject_IsTrue(maximize) == 1;
}

Ref Plan::resolve(PyObject* tensor, int operand) {
  return Ref::checked(PyObject_CallMethod(host_, "resolve", "Osnn", tensor, role(operand).c_str(),
                                          static_cast<Py_ssize_t>(group_index_),
                                          static_cast<Py_ssize_t>(param_index_)));
}

bool Plan::read_operand(PyObject* object, int operand, TensorView* view, DType* dtype) {
  const TensorAccess& access = TensorAccess::instance();
  if (access.is_plain(object) && access.read(object, view) && floating_dtype(view->dl, dtype) &&
      has_memory(*view))
    return true;
  Ref plain = resolve(object, operand);
  if (plain.get() == Py_None || !access.read(plain.get(), view) ||
      !floating_dtype(view->dl, dtype) || !has_memory(*view))
    return refuse("the " + role(operand) + " of " + where() +
                  " is not a dense tensor of float32, float64, bfloat16 or float16 in memory");
  alive_.push_back(std::move(plain));
  return true;
}

bool Plan::read_grad(PyObject* param, GradRef grad, Operands* operands, DType* dtype) {
  const TensorAccess& access = TensorAccess::instance();
  TensorView* view = &operands->view[kGrad];
  // A gradient that libtorch can describe needs no Python object.
  if (grad.tensor != nullptr && access.is_plain(param) && access.read(grad, view) &&
      floating_dtype(view->dl, dtype) && has_memory(*view))
    return true;
  operands->grad = grad.object ? std::move(grad.object) : TensorAccess::grad_object(param);
  return read_operand(operands->grad.get(), kGrad, view, dtype);
}

PyObject* Plan::create(PyObject* state, PyObject* param, PyObject* key) {
  const Ref value = Ref::checked(PyObject_CallMethod(host_, "new_state", "OO", param, key));
  if (PyDict_SetItem(state, key, value.get()) != 0) throw PythonError{};
  created_.push_back({Ref::borrow(state), Ref::borrow(key)});
  return value.get();  // the dict holds it
}

bool Plan::read_state(const Candidate& candidate, Operands* operands, Row* row) {
  if (row->states == 0 && !has_step_) return true;
  PyObject* state = candidate.slot->state;
  if (state == nullptr) {
    const Ref fresh = Ref::checked(PyDict_New());
    if (PyObject_SetItem(state_, candidate.param, fresh.get()) != 0) throw PythonError{};
    created_.push_back({Ref::borrow(state_), Ref::borrow(candidate.param)});
    state = candidate.slot->state = fresh.get();
  }
  for (int k = 0; k < row->states; ++k) {
    PyObject* tensor = candidate.state[k].get();
    if (tensor == nullptr || tensor == Py_None) {
      tensor = create(state, candidate.param, state_keys_[k]);
      row->first = 1;
    }
    const int operand = kState0 + k;
    if (!read_operand(tensor, operand, &operands->view[operand], &row->dtype[operand]))
      return false;
  }
  if (has_step_)
    read_step(candidate.state[state_keys_.size() - 1].get(), state, candidate.param, row);
  return true;
}

void Plan::read_step(PyObject* step, PyObject* state, PyObject* param, Row* row) {
  const TensorAccess& access = TensorAccess::instance();
  PyObject* key = state_keys_.back();
  TensorView view;
  const auto good = [&] {
    return access.is_plain(step) && access.read(step, &view) && view.dl.ndim == 0 &&
           view.dl.device.type == dlpack::kCPU && view.dl.dtype.code == dlpack::kFloat &&
           view.dl.dtype.bits == 32 && view.dl.data != nullptr;
  };
  if (step == nullptr) step = create(state, param, key);
  if (!good()) {
    Ref::checked(PyObject_CallMethod(host_, "normalise_step", "O", state));
    step = PyDict_GetItemWithError(state, key);
    if (step == nullptr || !good())
      raise(PyExc_TypeError,
            "the step of " + where() + " must be a number or a one-element tensor");
  }
  row->step = static_cast<float*>(view.dl.data);
  if (!(*row->step >= 0))
    raise(PyExc_ValueError,
          "the step of " + where() + " must be a number >= 0, got " + std::to_string(*row->step));
}

bool Plan::add_row(Candidate* candidate) {
  PyObject* param = candidate->param;
  Row row{};
  row.group = static_cast<int32_t>(candidate->group);
  choose_variant(rule_, groups_[candidate->group].hyper, &row);
  Operands operands;
  if (!read_operand(param, kParam, &operands.view[kParam], &row.dtype[kParam]) ||
      !read_grad(param, std::move(candidate->grad), &operands, &row.dtype[kGrad]) ||
      !read_state(*candidate, &operands, &row) || !place(operands, kState0 + row.states, &row))
    return false;
  if (operands.grad) alive_.push_back(std::move(operands.grad));
  elements_ += row.numel;
  rows_.push_back(row);
  params_.push_back(param);
  return true;
}

// Checks the operands against each other, and finds the order in which to walk them.
bool Plan::place(const Operands& operands, int count, Row* row) {
  const TensorView* views[kOperands];
  for (int k = 0; k < count; ++k) {
    const TensorView& view = operands.view[k];
    views[k] = &view;
    if (view.dl.device.type != dlpack::kCPU) return refuse(where() + " is not on the CPU");
    if (!same_shape(view, operands.view[kParam]))
      raise(PyExc_ValueError, "the " + role(k) + " of " + where() + " has shape " +
                                  shape_text(view) + ", expected " +
                                  shape_text(operands.view[kParam]));
  }
  row->numel = views[kParam]->numel();
  row->layout = kFlat;
  const bool contiguous = row->numel == 0 || all_contiguous(views, count);
  for (int k = 0; k < count; ++k)
    row->data[k] = static_cast<char*>(views[k]->dl.data) + views[k]->dl.byte_offset;
  if (contiguous) return true;
  for (int k = 0; k < count; ++k)
    if (k != kGrad && overlaps_itself(*views[k]))
      raise(PyExc_RuntimeError, "the " + role(k) + " of " + where() +
                                    " is expanded: more than one element refers to a single "
                                    "memory location; clone() it first");
  const Layout layout = merged_layout(views, count);
  if (is_flat(layout, count)) return true;
  row->layout = static_cast<int32_t>(layouts_.size());
  layouts_.push_back(layout);
  return true;
}

size_t Plan::flat_rows() const {
  return static_cast<size_t>(std::count_if(rows_.begin(), rows_.end(),
                                           [](const Row& row) { return row.layout == kFlat; }));
}

// While other Python threads run, they may drop gradients and replace state: hold what is used.
void Plan::own_tensors() {
  for (PyObject* param : params_) {
    alive_.push_back(Ref::borrow(param));
    alive_.push_back(TensorAccess::grad_object(param));
    PyObject* state = index_.find(param).state;
    if (state != nullptr) alive_.push_back(Ref::checked(PyDict_Copy(state)));
  }
}

double Plan::squared_norm(int threads) {
  check_idle();
  return cpu::squared_norm({rows_, groups_, layouts_}, threads);
}

cpu::StepResult Plan::apply(const cpu::StepOptions& options) {
  // A short step keeps the GIL: owning the tensors would cost more than the step.
  constexpr int64_t kLongStep = 1 << 20, kLongRow = 1 << 14;
  check_idle();
  const int64_t rows = static_cast<int64_t>(rows_.size());
  const cpu::TableView table{rows_, groups_, layouts_};
  cpu::StepResult result;
  if (elements_ >= kLongStep && elements_ / rows >= kLongRow) {
    own_tensors();
    const WithoutGil unlocked(&busy_);
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
