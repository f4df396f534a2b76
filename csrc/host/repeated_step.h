// A step like the one before, without the Python code that found out what that one was.
//
// After a forward and backward pass nothing of that code lies in the cache: it takes 150 us then,
// more than the rest of a step over 300 small tensors. Here is asked whether what it looks at is as
// it was. What a plan reads on each step (tensors, hyperparameters, state) is read as ever.
#pragma once

#include <functional>
#include <vector>

#include "host/python.h"

namespace fusedopt::host {

// What a step was. Python objects are owned by `owner`, a tuple.
struct StepBefore {
  struct Answer {
    PyObject* function;  // without arguments
    PyObject* value;     // what it has returned
  };

  Ref owner;
  PyObject* options;    // a tuple: those of the whole optimizer, as they stand in each group
  Py_ssize_t keys;      // how many all param groups had together
  bool norm;            // whether the total norm was asked for
  PyObject* grad_norm;  // the tensors that take the figures, or None
  PyObject* skipped_steps;
  std::vector<PyObject*> empty;  // dicts that are empty
  std::vector<Answer> answers;   // what is asked last
  // Runs the driver over param_groups and state. False: it cannot serve, and nothing has changed.
  std::function<bool(PyObject* param_groups, PyObject* state)> step;
};

// A function of the __dict__ of an optimizer that does such a step, and returns True. It returns
// False, and has changed nothing, where the step is not like the one before or cannot be served.
Ref repeated_step(StepBefore before);

// The keys of all param groups together.
Py_ssize_t count_keys(PyObject* param_groups);

}  // namespace fusedopt::host
