// From param_groups and state to the rows of the table.
#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "host/layout.h"
#include "host/plan.h"

namespace fusedopt::host {
namespace {

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

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dl.ndim == b.dl.ndim && std::equal(a.dl.shape, a.dl.shape + a.dl.ndim, b.dl.shape);
}

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int d = 0; d < view.dl.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.size(d));
  return text + "]";
}

// Entries of a vector past its end that are asked for before they are written.
constexpr size_t kRoomAhead = 8;

// A garbage collection runs finalizers: Python code.
class WithoutGarbageCollection {
 public:
  WithoutGarbageCollection() : was_on_(PyGC_Disable()) {}
  ~WithoutGarbageCollection() {
    if (was_on_) PyGC_Enable();
  }
  WithoutGarbageCollection(const WithoutGarbageCollection&) = delete;
  WithoutGarbageCollection& operator=(const WithoutGarbageCollection&) = delete;

 private:
  int was_on_;
};

}  // namespace

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

bool Plan::build(PyObject* param_groups) {
  const Ref all = Ref::checked(PyList_AsTuple(param_groups));
  const size_t count = static_cast<size_t>(PyTuple_GET_SIZE(all.get()));
  std::vector<Ref> lists;
  lists.reserve(count);
  groups_.resize(count);
  group_reader_.begin();
  for (size_t g = 0; g < count; ++g) {
    PyObject* group = PyTuple_GET_ITEM(all.get(), static_cast<Py_ssize_t>(g));
    lists.push_back(group_reader_.read(group, g, &groups_[g]));
  }
  size_t total = 0;
  for (const Ref& list : lists) total += static_cast<size_t>(PySequence_Fast_GET_SIZE(list.get()));
  index_.build(state_, total);
  steps_.reset(total);
  candidates_.reserve(total + kRoomAhead);
  rows_.reserve(total + kRoomAhead);
  params_.reserve(total);
  find_candidates(lists);
  if (!find_states()) return false;
  for (size_t c = 0; c < candidates_.size(); ++c) {
    group_index_ = candidates_[c].group;
    param_index_ = candidates_[c].index;
    if (!add_row(&candidates_[c])) return false;
  }
  if (group_reader_.must_fetch(rows_, device_index_)) {
    hold_grads();
    group_reader_.fetch(rows_, device_index_, host_, &groups_);
  }
  return true;
}

// After a model's forward and backward pass nothing of a small tensor is in the cache: some 54
// lines of memory for one param of AdamW, 0.2 us each for a step that reads them one after the
// other. So each loop asks for what a later one reads, a few tensors ahead and spread between the
// work, since a core has some 24 lines under way and drops the hints for any more.
void Plan::find_candidates(const std::vector<Ref>& lists) {
  constexpr Py_ssize_t kAhead = 5;
  const TensorAccess& access = TensorAccess::instance();
  for (size_t g = 0; g < lists.size(); ++g) {
    group_index_ = g;
    PyObject** params = PySequence_Fast_ITEMS(lists[g].get());
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(lists[g].get());
    for (Py_ssize_t j = 0; j < count; ++j) {
      const auto plain = [&](Py_ssize_t at) { return at < count && access.is_plain(params[at]); };
      if (j + 3 * kAhead < count) access.prefetch_object(params[j + 3 * kAhead]);
      if (plain(j + 2 * kAhead)) access.prefetch_impl(params[j + 2 * kAhead]);
      if (plain(j + kAhead)) access.prefetch_grad(params[j + kAhead]);
      fetch_for_write(candidates_.data() + candidates_.size() + kRoomAhead);
      param_index_ = static_cast<size_t>(j);
      if (!access.is_tensor(params[j]))
        raise(PyExc_TypeError, where() + " must be a torch.Tensor, got " + repr(params[j]));
      GradRef grad = access.grad(params[j]);
      if (!grad.none())
        candidates_.push_back({Ref::borrow(params[j]), std::move(grad), g, param_index_, {}, {}});
    }
  }
}

bool Plan::find_states() {
  constexpr size_t kAhead = 6;
  const size_t count = candidates_.size();
  // The values of the last few dicts, borrowed: they are looked at when they have come. No Python
  // code runs in this loop.
  PyObject* read[kAhead][kMaxStates + 1];
  const auto keep = [&](size_t c) {
    Candidate& candidate = candidates_[c];
    if (!candidate.entry) return;
    for (size_t k = 0; k < state_keys_.size(); ++k)
      candidate.state[k] = Ref::borrow(read[c % kAhead][k]);
  };
  for (size_t c = 0; c < count; ++c) {
    if (c >= kAhead) keep(c - kAhead);
    if (c + 2 * kAhead < count) fetch(index_.find(candidates_[c + 2 * kAhead].param.get()).state);
    if (c + kAhead < count) {
      PyObject* entry = index_.find(candidates_[c + kAhead].param.get()).state;
      if (entry != nullptr && PyDict_Check(entry)) {
        const void* keys = reinterpret_cast<PyDictObject*>(entry)->ma_keys;
        for (int line = 0; line < 3; ++line) fetch(static_cast<const char*>(keys) + 64 * line);
      }
    }
    Candidate& candidate = candidates_[c];
    group_index_ = candidate.group;
    param_index_ = candidate.index;
    StateIndex::Slot& slot = index_.find(candidate.param.get());
    if (slot.visited) return refuse(where() + " appears twice among the params");
    slot.visited = true;
    if (slot.state == nullptr) continue;
    if (!PyDict_Check(slot.state))
      raise(PyExc_TypeError, "the state of " + where() + " must be a dict");
    candidate.entry = Ref::borrow(slot.state);
    state_reader_.read(slot.state, read[c % kAhead]);
    for (size_t k = 0; k < state_keys_.size(); ++k) fetch(read[c % kAhead][k]);
  }
  for (size_t c = count < kAhead ? 0 : count - kAhead; c < count; ++c) keep(c);
  return true;
}

// Of the candidates ahead, the memory of one operand: called when that operand of this one is read.
void Plan::ask_ahead(const Candidate* candidate, int operand) const {
  constexpr std::ptrdiff_t kAhead = 2;
  const TensorAccess& access = TensorAccess::instance();
  const std::ptrdiff_t left = candidates_.data() + candidates_.size() - candidate;
  if (operand >= kState0) {
    const auto tensor = [&](std::ptrdiff_t ahead) -> PyObject* {
      PyObject* state = ahead < left ? candidate[ahead].state[operand - kState0].get() : nullptr;
      return state != nullptr && access.is_plain(state) ? state : nullptr;
    };
    if (PyObject* far = tensor(2 * kAhead)) access.prefetch_impl(far);
    if (PyObject* near = tensor(kAhead)) access.prefetch_storage(near);
    return;
  }
  if (operand == kGrad) {
    if (2 * kAhead < left) access.prefetch_impl(candidate[2 * kAhead].grad);
    if (kAhead < left) access.prefetch_storage(candidate[kAhead].grad);
    return;
  }
  if (kAhead < left && access.is_plain(candidate[kAhead].param.get())) {
    access.prefetch_storage(candidate[kAhead].param.get());
    access.prefetch_version(candidate[kAhead].param.get());
  }
}

// Until here no Python code has run since the gradients were found.
void Plan::hold_grads() {
  if (grads_held_) return;
  grads_held_ = true;
  const WithoutGarbageCollection guard;
  for (Candidate& candidate : candidates_) {
    if (candidate.grad.tensor == nullptr) continue;
    candidate.grad.object = TensorAccess::grad_object(candidate.param.get());
    candidate.grad.tensor = nullptr;
  }
}

Ref Plan::resolve(PyObject* tensor, int operand) {
  hold_grads();
  return Ref::checked(PyObject_CallMethod(host_, "resolve", "OsnnO", tensor, role(operand).c_str(),
                                          static_cast<Py_ssize_t>(group_index_),
                                          static_cast<Py_ssize_t>(param_index_), param_));
}

bool Plan::add_row(Candidate* candidate) {
  param_ = candidate->param.get();
  Row row{};
  row.group = static_cast<int32_t>(candidate->group);
  choose_variant(rule_, groups_[candidate->group].hyper, &row);
  Operands operands;
  TensorView* view = operands.view;
  fetch_for_write(rows_.data() + rows_.size() + kRoomAhead);
  ask_ahead(candidate, kParam);
  if (!read_operand(candidate->param.get(), kParam, &view[kParam], &row.dtype[kParam]) ||
      !on_device(view[kParam]) || !read_grad(candidate, &view[kGrad], &row.dtype[kGrad]) ||
      !read_state(candidate, &operands, &row) || !place(operands, kState0 + row.states, &row))
    return false;
  row.loop = choose_loop(row);
  elements_ += row.numel;
  rows_.push_back(row);
  params_.push_back(candidate->param.get());
  return true;
}

bool Plan::read_operand(PyObject* object, int operand, TensorView* view, DType* dtype) {
  if (read_plain(object, view, dtype)) return true;
  const TensorAccess& access = TensorAccess::instance();
  Ref plain = resolve(object, operand);
  if (plain.get() == Py_None || !access.read(plain.get(), view) ||
      !floating_dtype(view->dl, dtype) || !has_memory(*view))
    return refuse("the " + role(operand) + " of " + where() +
                  " is not a dense tensor of float32, float64, bfloat16 or float16 in memory");
  alive_.push_back(std::move(plain));
  return true;
}

bool Plan::read_grad(Candidate* candidate, TensorView* view, DType* dtype) {
  const TensorAccess& access = TensorAccess::instance();
  GradRef& grad = candidate->grad;
  ask_ahead(candidate, kGrad);
  // A gradient that libtorch can describe needs no Python object.
  if (grad.tensor != nullptr && access.is_plain(candidate->param.get()) &&
      access.read(grad, view) && floating_dtype(view->dl, dtype) && has_memory(*view))
    return true;
  hold_grads();
  return read_operand(grad.object.get(), kGrad, view, dtype);
}

bool Plan::on_device(const TensorView& view) {
  if (view.dl.device.type != device_)
    return refuse(where() + (device_ == dlpack::kCPU ? " is not on the CPU" : " is not on a GPU"));
  if (rows_.empty()) device_index_ = view.dl.device.index;
  if (view.dl.device.index != device_index_)
    return refuse(where() + " is on another device than the params before it");
  return true;
}

// Checks the operands against each other, and finds the order in which to walk them.
bool Plan::place(const Operands& operands, int count, Row* row) {
  const TensorView* views[kOperands];
  for (int k = 0; k < count; ++k) {
    const TensorView& view = operands.view[k];
    views[k] = &view;
    if (!on_device(view)) return false;
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

}  // namespace fusedopt::host
