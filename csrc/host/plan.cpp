// The life of the table: built, run, cleared or taken back.
#include "host/plan.h"

#include <algorithm>

namespace fusedopt::host {
namespace {

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

std::vector<PyObject*> state_names(const RuleKeys& keys) {
  std::vector<PyObject*> names;
  for (const std::string& key : keys.state) names.push_back(interned(key.c_str()));
  if (keys.has_step) names.push_back(interned("step"));
  return names;
}

}  // namespace

Plan::Plan(const RuleKeys& keys)
    : rule_(keys.id),
      has_step_(keys.has_step),
      state_keys_(state_names(keys)),
      group_reader_(keys.hyper),
      state_reader_(state_names(keys)) {}

std::string Plan::step(PyObject* param_groups, PyObject* state, PyObject* host,
                       const cpu::StepOptions& options, cpu::StepResult* result) {
  enter();
  build_or_roll_back(param_groups, state, host);
  if (reason_.empty()) *result = run(options);
  return reason_;
}

std::string Plan::refresh(PyObject* param_groups, PyObject* state, PyObject* host) {
  enter();
  build_or_roll_back(param_groups, state, host);
  if (!reason_.empty()) return reason_;
  hold_grads();
  phase_ = Phase::kTable;
  return "";
}

double Plan::squared_norm(int threads) {
  if (phase_ != Phase::kTable) raise(PyExc_RuntimeError, "squared_norm() needs refresh() first");
  return cpu::squared_norm({rows_, groups_, layouts_}, threads);
}

cpu::StepResult Plan::apply(const cpu::StepOptions& options) {
  if (phase_ != Phase::kTable) raise(PyExc_RuntimeError, "apply() needs refresh() first");
  phase_ = Phase::kRunning;
  return run(options);
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

void Plan::build_or_roll_back(PyObject* param_groups, PyObject* state, PyObject* host) {
  host_ = host;
  state_ = state;
  reason_.clear();
  try {
    if (!PyList_Check(param_groups)) raise(PyExc_TypeError, "param_groups must be a list");
    if (!PyDict_Check(state)) raise(PyExc_TypeError, "state must be a dict");
    if (!build(param_groups)) take_back();
  } catch (...) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    take_back();
    PyErr_Restore(type, value, trace);
    throw;
  }
}

cpu::StepResult Plan::run(const cpu::StepOptions& options) {
  // A short step keeps the GIL: to hold its gradients would cost more than the step.
  constexpr int64_t kLongStep = 1 << 20, kLongRow = 1 << 14;
  const int64_t rows = static_cast<int64_t>(rows_.size());
  const cpu::TableView table{rows_, groups_, layouts_};
  cpu::StepResult result;
  if (elements_ >= kLongStep && elements_ / rows >= kLongRow) {
    hold_grads();
    const WithoutGil unlocked;
    result = cpu::apply(rule_, table, options);
  } else {
    result = cpu::apply(rule_, table, options);
  }
  if (result.skipped) {
    take_back();
    return result;
  }
  TensorAccess::instance().bump_versions(params_);
  clear();
  return result;
}

void Plan::take_back() {
  for (auto it = created_.rbegin(); it != created_.rend(); ++it)
    if (PyDict_DelItem(it->dict.get(), it->key.get()) != 0) PyErr_Clear();  // removed by the user
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
  created_.clear();
  phase_ = Phase::kIdle;
}

}  // namespace fusedopt::host
