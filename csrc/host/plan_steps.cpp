// Step counts that are shared.
#include "host/plan.h"

namespace fusedopt::host {

// Two params whose state has one step tensor (checkpoints of optimizers with one count for a group
// are loaded so) would count it twice in a step; on a GPU, whose threads count side by side, once
// or twice. The later one is given a count of its own.
void Plan::own_step(Candidate* candidate, Row* row) {
  hold_grads();
  PyObject* entry = candidate->entry.get();
  Ref::checked(PyObject_CallMethod(host_, "own_step", "OO", candidate->param.get(), entry));
  PyObject* own = PyDict_GetItemWithError(entry, state_keys_.back());
  if (own == nullptr) raise(PyExc_KeyError, "the step of " + where() + " was removed");
  candidate->state[state_keys_.size() - 1] = Ref::borrow(own);
  read_step(candidate, row);
  if (!steps_.add(row->step)) raise(PyExc_RuntimeError, "the step of " + where() + " is shared");
}

}  // namespace fusedopt::host
