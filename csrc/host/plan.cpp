// The life of the table: built, run, cleared or taken back.
#include "host/plan.h"

#include <algorithm>

namespace fusedopt::host {
namespace {

std::vector<PyObject*> state_names(const RuleKeys& keys) {
  std::vector<PyObject*> names;
  for (const std::string& key : keys.state) names.push_back(interned(key.c_str()));
  if (keys.has_step) names.push_back(interned("step"));
  return names;
}

}  // namespace

Plan::Plan(const RuleKeys& keys, dlpack::DeviceType device, bool reads_device_lr)
    : rule_(keys.id),
      device_(device),
      has_step_(keys.has_step),
      state_keys_(state_names(keys)),
      group_reader_(keys.hyper, keys.ranges,
                    reads_device_lr ? std::optional(device) : std::nullopt),
      state_reader_(state_names(keys)) {}

std::string Plan::refresh(PyObject* param_groups, PyObject* state, PyObject* host) {
  enter();
  build_or_take_back(param_groups, state, host);
  if (!reason_.empty()) return reason_;
  hold_grads();
  phase_ = Phase::kTable;
  return "";
}

void Plan::need_table() const {
  if (phase_ != Phase::kTable) raise(PyExc_RuntimeError, "this needs refresh() first");
}

void Plan::roll_back() {
  if (phase_ == Phase::kTable) take_back();
}

size_t Plan::flat_rows() const {
  return static_cast<size_t>(std::count_if(rows_.begin(), rows_.end(),
                                           [](const Row& row) { return row.layout == kFlat; }));
}

// A table that an interrupted step of this thread left behind is dropped; one that another thread
// works on is not ours to touch.
void Plan::enter() {
  const unsigned long self = PyThread_get_thread_ident();
  if (phase_ == Phase::kRunning || (phase_ == Phase::kTable && thread_ != self))
    raise(PyExc_RuntimeError,
          "step() of this optimizer is running already, maybe in another "
          "thread");
  if (phase_ == Phase::kTable) take_back();
  phase_ = Phase::kRunning;
  thread_ = self;
}

void Plan::build_or_take_back(PyObject* param_groups, PyObject* state, PyObject* host) {
  host_ = host;
  state_ = state;
  reason_.clear();
  try {
    if (!PyList_Check(param_groups)) raise(PyExc_TypeError, "param_groups must be a list");
    if (!PyDict_Check(state)) raise(PyExc_TypeError, "state must be a dict");
    if (!build(param_groups)) take_back();
  } catch (...) {
    end_after_error(&Plan::take_back);
    throw;
  }
}

void Plan::end_after_error(void (Plan::*end)()) {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  (this->*end)();
  PyErr_Restore(type, value, trace);
}

void Plan::bump_versions() { TensorAccess::instance().bump_versions(params_); }

void Plan::take_back() {
  for (auto it = changes_.rbegin(); it != changes_.rend(); ++it) {
    const int failed = it->before ? PyDict_SetItem(it->dict.get(), it->key.get(), it->before.get())
                                  : PyDict_DelItem(it->dict.get(), it->key.get());
    if (failed) PyErr_Clear();  // removed by the user
  }
  clear();
}

// The step was done: its state stays.
void Plan::keep() {
  try {
    bump_versions();
    for (const Ref& give_back : give_back_)
      Ref::checked(PyObject_CallObject(give_back.get(), nullptr));
  } catch (...) {
    end_after_error(&Plan::clear);
    throw;
  }
  clear();
}

void Plan::clear() {
  rows_.clear();
  groups_.clear();
  layouts_.clear();
  params_.clear();
  elements_ = 0;
  grads_held_ = false;
  // Objects die here, and code of theirs may run: still kRunning, so that it cannot step.
  candidates_.clear();
  alive_.clear();
  changes_.clear();
  give_back_.clear();
  state_reader_.release();
  phase_ = Phase::kIdle;
}

}  // namespace fusedopt::host
