// Turns an optimizer's param_groups and state into the tensor table, anew on each step.
//
// Nothing is remembered of a tensor: frameworks swap p.data, replace state tensors and group dicts,
// and reallocate gradients, and each of these changes the next table. What makes this affordable is
// TensorAccess: a whole param costs about 0.2 us.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/table.h"
#include "cpu/apply.h"
#include "host/dict_reader.h"
#include "host/tensor_access.h"
#include "rules/registry.h"

namespace fusedopt::host {

// Finds the state dict of a param by identity, without calling Tensor.__hash__ (0.4 us).
class StateIndex {
 public:
  struct Slot {
    PyObject* param = nullptr;
    PyObject* state = nullptr;  // borrowed from the optimizer's state; null where there is none
    bool visited = false;       // the param has been met in a group of this step
  };

  void build(PyObject* state, size_t params);
  Slot& find(PyObject* param);

 private:
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

// The keys of a rule, as the registry lists them.
struct RuleKeys {
  RuleId id;
  std::vector<std::string> hyper;  // "betas[2]" is a pair
  std::vector<std::string> state;
  bool has_step;
};

class Plan {
 public:
  explicit Plan(const RuleKeys& keys);

  // Builds the table. `host` is called for what is rare: new_state(param, key) for state that is
  // missing; resolve(tensor, role, group, index) for a plain tensor in place of a complex, sparse
  // or otherwise odd one, or None; normalise_step(state) to replace state["step"] by a 0-dim
  // float32 CPU tensor. Returns "" or the reason why the native drivers cannot serve these tensors.
  // On a reason or an exception nothing has changed.
  std::string refresh(PyObject* param_groups, PyObject* state, PyObject* host);

  // Runs the step over the table and clears it; a skipped step undoes the state that refresh
  // created.
  cpu::StepResult apply(const cpu::StepOptions& options);
  double squared_norm(int threads);

  // Drops the table, and the state that was created for it.
  void roll_back();

  size_t rows() const { return rows_.size(); }
  size_t flat_rows() const;

 private:
  struct Operands {
    TensorView view[kOperands];
    Ref grad;  // the Python object of the gradient, where it was needed
  };
  struct HyperKey {
    PyObject* name;
    int count;
  };
  // A param that has a gradient in this step, on its way to becoming a row.
  struct Candidate {
    PyObject* param;
    GradRef grad;
    size_t group, index;
    StateIndex::Slot* slot;
    Ref state[kMaxStates + 1];  // as state_keys_; null where missing
  };
  struct Created {
    Ref dict;
    Ref key;
  };

  void clear();
  void check_idle() const;
  bool build(PyObject* param_groups);
  void read_group(PyObject* const* values, size_t index);
  void find_candidates(const std::vector<Ref>& lists);
  bool find_states();
  void prefetch(size_t candidate) const;
  bool add_row(Candidate* candidate);
  bool read_operand(PyObject* object, int operand, TensorView* view, DType* dtype);
  bool read_grad(PyObject* param, GradRef grad, Operands* operands, DType* dtype);
  bool read_state(const Candidate& candidate, Operands* operands, Row* row);
  PyObject* create(PyObject* state, PyObject* param, PyObject* key);
  void read_step(PyObject* step, PyObject* state, PyObject* param, Row* row);
  bool place(const Operands& operands, int count, Row* row);
  Ref resolve(PyObject* tensor, int operand);
  std::string where() const;
  std::string role(int operand) const;
  bool refuse(const std::string& reason);
  void own_tensors();

  const RuleId rule_;
  const bool has_step_;
  std::vector<HyperKey> hyper_keys_;
  std::vector<PyObject*> state_keys_;  // the state tensors, then "step" if the rule has one
  DictReader group_reader_;            // "params", "maximize", the hyperparameters
  DictReader state_reader_;

  std::vector<Candidate> candidates_;
  std::vector<Row> rows_;
  std::vector<Group> groups_;
  std::vector<Layout> layouts_;
  std::vector<PyObject*> params_;  // of the rows, borrowed from the param groups
  std::vector<Ref> alive_;         // temporaries, and gradients while the GIL is released
  std::vector<Created> created_;
  StateIndex index_;
  int64_t elements_ = 0;
  bool busy_ = false;  // the GIL is released inside apply

  // While refresh runs.
  PyObject* host_ = nullptr;
  PyObject* state_ = nullptr;
  size_t group_index_ = 0;
  size_t param_index_ = 0;
  std::string reason_;
};

}  // namespace fusedopt::host
