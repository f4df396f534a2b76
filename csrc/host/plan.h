// Turns an optimizer's param_groups and state into the tensor table, anew on each step.
//
// Nothing is remembered of a tensor: frameworks swap p.data, replace state tensors and group dicts,
// and reallocate gradients, and each of these changes the next table. What makes this affordable is
// TensorAccess: a whole param costs about 0.2 us.
//
// Other Python threads, and code that runs when an object dies, may do the same at any time that
// the GIL is not held or Python code runs. The table keeps its tensors alive: params and states
// from the start, gradients (whose Python objects would have to be made first) from hold_grads()
// on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/table.h"
#include "host/address_set.h"
#include "host/device_table.h"
#include "host/dict_reader.h"
#include "host/group_reader.h"
#include "host/state_index.h"
#include "host/tensor_access.h"
#include "host/tensor_list.h"
#include "rules/registry.h"

namespace fusedopt::host {

// The keys of a rule, as the registry lists them.
struct RuleKeys {
  RuleId id;
  std::vector<std::string> hyper;  // "betas[2]" is a pair
  std::vector<Range> ranges;       // of each
  std::vector<std::string> state;
  bool has_step;
};

class Plan {
 public:
  // A plan takes tensors of one kind of device. Its driver may read a tensor lr where it lies.
  Plan(const RuleKeys& keys, dlpack::DeviceType device, bool reads_device_lr);

  // One step: builds the table, and calls run(), which hands it to a driver and returns whether the
  // step was skipped. `host` is called for what is rare: new_state(param, key) for state that is
  // missing; resolve(tensor, role, group, index, param) for a plain tensor in place of a complex,
  // sparse or otherwise odd one, or None; dense_state(tensor, role, group, index) for a dense copy,
  // to be kept, of a sparse state tensor, or None for any other; borrow_step(param, state) for a
  // float32 tensor to count in where state["step"] is none on the device, and a function to call
  // after the step that brings the count back; own_step(step) for a copy of a count that another
  // param has, too, or None to leave it; fetch_lr(lr, group) for the value of a tensor lr on
  // another device. Returns "" or the reason why the native drivers cannot serve these tensors; on
  // a reason or an exception nothing has changed.
  template <class Run>
  std::string step(PyObject* param_groups, PyObject* state, PyObject* host, Run run) {
    enter();
    build_or_take_back(param_groups, state, host);
    if (reason_.empty()) finish(run);
    return reason_;
  }

  // The same in parts, for a norm that is reduced over ranks: refresh builds the table, apply runs
  // over it and clears it, roll_back clears it and takes back the state that refresh created.
  std::string refresh(PyObject* param_groups, PyObject* state, PyObject* host);
  template <class Run>
  void apply(Run run) {
    need_table();
    phase_ = Phase::kRunning;
    finish(run);
  }
  void roll_back();

  // For run(), and between refresh and apply.
  RuleId rule() const { return rule_; }
  TableView table() const { return {rows_, groups_, layouts_}; }
  int64_t elements() const { return elements_; }
  int device_index() const { return device_index_; }  // of all tensors
  bool has_created_state() const { return !changes_.empty(); }
  TableSource source() {
    return {table(), device_index_, host_, [this] { hold_grads(); }};
  }
  void need_table() const;
  // From here on Python code may run, in this thread or another, and drop a gradient.
  void hold_grads();

  size_t rows() const { return rows_.size(); }
  size_t flat_rows() const;

 private:
  struct Operands {
    TensorView view[kOperands];
  };
  // A param that has a gradient in this step, on its way to becoming a row.
  struct Candidate {
    Ref param;
    GradRef grad;
    size_t group, index;
    Ref entry;                  // the param's state dict
    Ref state[kMaxStates + 1];  // as state_keys_; null where missing
  };
  // An entry of a dict that was set for this step, and what stood there before: null for nothing.
  struct Change {
    Ref dict;
    Ref key;
    Ref before;
  };
  enum class Phase { kIdle, kTable, kRunning };  // kTable: between refresh and apply

  // plan.cpp: the table's life.
  void enter();
  void build_or_take_back(PyObject* param_groups, PyObject* state, PyObject* host);
  void end_after_error(void (Plan::*end)());
  void take_back();
  void keep();
  void bump_versions();
  void clear();

  template <class Run>
  void finish(Run run) {
    bool skipped = false;
    try {
      skipped = run();
    } catch (...) {
      end_after_error(&Plan::take_back);
      throw;
    }
    if (skipped) {
      take_back();
    } else {
      keep();
    }
  }

  // plan_rows.cpp: from tensors to rows.
  bool build(PyObject* param_groups);
  void find_candidates(const std::vector<Ref>& lists);
  bool find_states();
  void ask_ahead(const Candidate* candidate, int operand) const;
  bool add_row(Candidate* candidate);
  // What needs no Python: a plain tensor in memory, of a dtype that the drivers know.
  static bool has_memory(const TensorView& view) {
    return view.dl.data != nullptr || view.numel() == 0;
  }
  static bool read_plain(PyObject* object, TensorView* view, DType* dtype) {
    const TensorAccess& access = TensorAccess::instance();
    return access.is_plain(object) && access.read(object, view) &&
           floating_dtype(view->dl, dtype) && has_memory(*view);
  }
  bool read_operand(PyObject* object, int operand, TensorView* view, DType* dtype);
  bool read_grad(Candidate* candidate, TensorView* view, DType* dtype);
  bool on_device(const TensorView& view);
  bool place(const Operands& operands, int count, Row* row);
  Ref resolve(PyObject* tensor, int operand);
  std::string where() const;
  std::string role(int operand) const;
  bool refuse(const std::string& reason);

  // plan_state.cpp: the state of a param.
  bool read_state(Candidate* candidate, Operands* operands, Row* row);
  void read_step(Candidate* candidate, Row* row);
  Ref borrow_step(Candidate* candidate);
  bool is_count(PyObject* step, TensorView* view) const;
  void own_step(Candidate* candidate);
  void make_dense(Candidate* candidate, size_t key);
  void create(Candidate* candidate, size_t key);
  void set(Candidate* candidate, size_t key, Ref value, Ref before);

  const RuleId rule_;
  const dlpack::DeviceType device_;
  const bool has_step_;
  std::vector<PyObject*> state_keys_;  // the state tensors, then "step" if the rule has one
  GroupReader group_reader_;
  DictReader state_reader_;

  // The table.
  std::vector<Row> rows_;
  std::vector<Group> groups_;
  std::vector<Layout> layouts_;
  int64_t elements_ = 0;
  int device_index_ = 0;

  // What it was made of, and keeps alive.
  std::vector<Candidate> candidates_;
  std::vector<Ref> alive_;         // plain tensors that resolve() made
  std::vector<PyObject*> params_;  // of the rows, owned by the candidates
  std::vector<Change> changes_;
  std::vector<Ref> give_back_;  // functions that bring borrowed step counts back
  bool grads_held_ = false;

  Phase phase_ = Phase::kIdle;
  unsigned long thread_ = 0;  // that is in refresh, apply, or between them

  // While the table is built.
  StateIndex index_;
  AddressSet steps_;  // of the rows so far
  PyObject* host_ = nullptr;
  PyObject* state_ = nullptr;
  PyObject* param_ = nullptr;
  size_t group_index_ = 0;
  size_t param_index_ = 0;
  std::string reason_;
};

}  // namespace fusedopt::host
