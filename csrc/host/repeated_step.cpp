#include "host/repeated_step.h"

#include <exception>
#include <new>
#include <utility>

#include "host/group_reader.h"
#include "host/tensor_access.h"

namespace fusedopt::host {
namespace {

constexpr char kCapsule[] = "fusedopt.StepBefore";

// Names in the __dict__ of an optimizer, and in a param group.
struct Names {
  PyObject* groups = interned("param_groups");
  PyObject* state = interned("state");
  PyObject* defaults = interned("defaults");
  PyObject* params = interned("params");
  PyObject* process_group = interned("process_group");
  PyObject* grad_norm = interned("_norm_tensor");
  PyObject* skipped_steps = interned("_skipped_tensor");
  PyObject* absent[2] = {interned("grad_scale"), interned("found_inf")};
  PyObject* hooks[2] = {interned("_optimizer_step_pre_hooks"),
                        interned("_optimizer_step_post_hooks")};
  PyObject* options[kOptions];

  Names() {
    for (int k = 0; k < kOptions; ++k) options[k] = interned(kOptionNames[k]);
  }
};

const Names& names() {
  static const Names* const all = new Names;
  return *all;
}

// Borrowed; null where there is none.
PyObject* item(PyObject* dict, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(dict, name);
  if (value == nullptr && PyErr_Occurred()) throw PythonError{};
  return value;
}

bool none(PyObject* value) { return value == nullptr || value == Py_None; }

bool is_empty(PyObject* dict) {
  return dict != nullptr && PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0;
}

bool is_same(const StepBefore::Answer& before) {
  const Ref value = Ref::checked(PyObject_CallNoArgs(before.function));
  const int same = PyObject_RichCompareBool(value.get(), before.value, Py_EQ);
  if (same < 0) throw PythonError{};
  return same != 0;
}

bool has_options(PyObject* group, PyObject* options) {
  for (int k = 0; k < kOptions; ++k)
    if (item(group, names().options[k]) != PyTuple_GET_ITEM(options, k)) return false;
  return true;
}

// The first param decides whether a step is one without values (FakeTensorMode).
bool starts_with_plain_param(PyObject* group) {
  PyObject* params = item(group, names().params);
  return params != nullptr && PyList_Check(params) && PyList_GET_SIZE(params) > 0 &&
         TensorAccess::instance().is_plain(PyList_GET_ITEM(params, 0));
}

bool is_like(const StepBefore& before, PyObject* attributes) {
  for (PyObject* name : names().absent)
    if (!none(item(attributes, name))) return false;
  for (PyObject* name : names().hooks)
    if (!is_empty(item(attributes, name))) return false;
  for (PyObject* dict : before.empty)
    if (!is_empty(dict)) return false;
  if ((before.norm && item(attributes, names().grad_norm) != before.grad_norm) ||
      item(attributes, names().skipped_steps) != before.skipped_steps)
    return false;
  PyObject* defaults = item(attributes, names().defaults);
  if (defaults == nullptr || !PyDict_Check(defaults) ||
      !none(item(defaults, names().process_group)))
    return false;
  PyObject* groups = item(attributes, names().groups);
  if (groups == nullptr || !PyList_Check(groups) || PyList_GET_SIZE(groups) == 0 ||
      item(attributes, names().state) == nullptr)
    return false;
  PyObject* first = PyList_GET_ITEM(groups, 0);
  if (!PyDict_Check(first) || !has_options(first, before.options) ||
      !starts_with_plain_param(first) || count_keys(groups) != before.keys)
    return false;
  for (const StepBefore::Answer& answer : before.answers)
    if (!is_same(answer)) return false;
  return true;
}

bool run(const StepBefore& before, PyObject* attributes) {
  if (!PyDict_Check(attributes))
    raise(PyExc_TypeError, "a repeated step takes the __dict__ of an optimizer");
  if (!is_like(before, attributes)) return false;
  const Ref groups = Ref::borrow(item(attributes, names().groups));
  const Ref state = Ref::borrow(item(attributes, names().state));
  if (!groups || !state) return false;  // a function of `answers` has taken them away
  return before.step(groups.get(), state.get());
}

// A plain C function: a dispatcher would read many lines of memory more.
PyObject* call(PyObject* capsule, PyObject* attributes) {
  const auto* before = static_cast<StepBefore*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (before == nullptr) return nullptr;
  try {
    return PyBool_FromLong(run(*before, attributes));
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef method = {"repeated_step", &call, METH_O,
                      "Does a step of the optimizer with this __dict__; False where it cannot."};

}  // namespace

Ref repeated_step(StepBefore before) {
  auto* owned = new StepBefore(std::move(before));
  PyObject* capsule = PyCapsule_New(owned, kCapsule, [](PyObject* self) {
    delete static_cast<StepBefore*>(PyCapsule_GetPointer(self, kCapsule));
  });
  if (capsule == nullptr) delete owned;
  const Ref self = Ref::checked(capsule);
  return Ref::checked(PyCFunction_New(&method, self.get()));
}

Py_ssize_t count_keys(PyObject* param_groups) {
  Py_ssize_t keys = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups, g);
    if (PyDict_Check(group)) keys += PyDict_GET_SIZE(group);
  }
  return keys;
}

}  // namespace fusedopt::host
