// The state of a param on its way to a row: read, made where it is missing, brought into a form
// that a driver takes.
#include "host/plan.h"

namespace fusedopt::host {

bool Plan::read_state(Candidate* candidate, Operands* operands, Row* row) {
  if (row->states == 0 && !has_step_) return true;
  if (!candidate->entry) {
    candidate->entry = Ref::checked(PyDict_New());
    hold_grads();
    if (PyObject_SetItem(state_, candidate->param.get(), candidate->entry.get()) != 0)
      throw PythonError{};
    changes_.push_back({Ref::borrow(state_), Ref::borrow(candidate->param.get()), {}});
  }
  for (int k = 0; k < row->states; ++k) {
    Ref& tensor = candidate->state[k];
    ask_ahead(candidate, kState0 + k);
    if (!tensor || tensor.get() == Py_None) {
      create(candidate, k);
      row->first = 1;
    }
    const int operand = kState0 + k;
    TensorView* view = &operands->view[operand];
    if (read_plain(tensor.get(), view, &row->dtype[operand])) continue;
    make_dense(candidate, k);
    if (!read_operand(tensor.get(), operand, view, &row->dtype[operand])) return false;
  }
  if (has_step_) read_step(candidate, row);
  return true;
}

void Plan::set(Candidate* candidate, size_t key, Ref value, Ref before) {
  PyObject* name = state_keys_[key];
  if (PyDict_SetItem(candidate->entry.get(), name, value.get()) != 0) throw PythonError{};
  changes_.push_back({Ref::borrow(candidate->entry.get()), Ref::borrow(name), std::move(before)});
  candidate->state[key] = std::move(value);
}

void Plan::create(Candidate* candidate, size_t key) {
  hold_grads();
  Ref value = Ref::checked(
      PyObject_CallMethod(host_, "new_state", "OO", candidate->param.get(), state_keys_[key]));
  set(candidate, key, std::move(value), {});
}

// torch.optim.SGD keeps a sparse momentum_buffer for sparse gradients.
void Plan::make_dense(Candidate* candidate, size_t key) {
  hold_grads();
  PyObject* tensor = candidate->state[key].get();
  Ref dense = Ref::checked(PyObject_CallMethod(
      host_, "dense_state", "Osnn", tensor, role(kState0 + static_cast<int>(key)).c_str(),
      static_cast<Py_ssize_t>(group_index_), static_cast<Py_ssize_t>(param_index_)));
  if (dense.get() != Py_None) set(candidate, key, std::move(dense), Ref::borrow(tensor));
}

// Whether a driver can count in this tensor where it lies.
bool Plan::is_count(PyObject* step, TensorView* view) const {
  const TensorAccess& access = TensorAccess::instance();
  return access.is_plain(step) && access.read(step, view) && view->numel() == 1 &&
         view->dl.device.type == device_ && view->dl.device.index == device_index_ &&
         view->dl.dtype.code == dlpack::kFloat && view->dl.dtype.bits == 32 &&
         view->dl.data != nullptr;
}

Ref Plan::borrow_step(Candidate* candidate) {
  hold_grads();
  PyObject* const pair = PyObject_CallMethod(host_, "borrow_step", "OO", candidate->param.get(),
                                             candidate->entry.get());
  if (pair != nullptr) return Ref::own(pair);
  for (PyObject* type : {PyExc_TypeError, PyExc_ValueError}) {
    if (!PyErr_ExceptionMatches(type)) continue;
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    const Ref owned[] = {Ref::own(kind), Ref::own(value), Ref::own(trace)};
    PyErr_Format(type, "the step of %s: %S", where().c_str(), value);
    break;
  }
  throw PythonError{};
}

// Two params whose state has one step tensor (checkpoints of optimizers with one count for a group
// are loaded so) would count it twice in a step; on a GPU, whose threads count side by side, once
// or twice. The later one is given a count of its own.
void Plan::own_step(Candidate* candidate) {
  hold_grads();
  const size_t key = state_keys_.size() - 1;
  PyObject* const shared = candidate->state[key].get();
  Ref own = Ref::checked(PyObject_CallMethod(host_, "own_step", "O", shared));
  if (own.get() != Py_None) set(candidate, key, std::move(own), Ref::borrow(shared));
}

void Plan::read_step(Candidate* candidate, Row* row) {
  const size_t key = state_keys_.size() - 1;
  Ref& step = candidate->state[key];
  TensorView view;
  ask_ahead(candidate, kState0 + static_cast<int>(key));
  if (!step) create(candidate, key);
  const TensorAccess& access = TensorAccess::instance();
  const auto address = [&] { return static_cast<char*>(view.dl.data) + view.dl.byte_offset; };
  bool counts = is_count(step.get(), &view);
  if (counts || (access.is_tensor(step.get()) && access.read(step.get(), &view))) {
    if (view.dl.data != nullptr && !steps_.add(address())) {
      own_step(candidate);
      counts = is_count(step.get(), &view);
    }
  }
  if (!counts) {
    const Ref pair = borrow_step(candidate);
    if (!PyTuple_Check(pair.get()) || PyTuple_GET_SIZE(pair.get()) != 2 ||
        !PyCallable_Check(PyTuple_GET_ITEM(pair.get(), 1)))
      raise(PyExc_TypeError,
            "borrow_step must return a tensor and a function, got " + repr(pair.get()));
    step = Ref::borrow(PyTuple_GET_ITEM(pair.get(), 0));
    if (!is_count(step.get(), &view))
      raise(PyExc_TypeError,
            "the step of " + where() + " must be a number or a one-element tensor");
    give_back_.push_back(Ref::borrow(PyTuple_GET_ITEM(pair.get(), 1)));
  }
  row->step = reinterpret_cast<float*>(address());
  if (device_ == dlpack::kCPU && !(*row->step >= 0))
    raise(PyExc_ValueError,
          "the step of " + where() + " must be a number >= 0, got " + std::to_string(*row->step));
}

}  // namespace fusedopt::host
