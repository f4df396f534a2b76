#include "host/group_reader.h"

#include <algorithm>

#include "host/tensor_access.h"
#include "host/tensor_list.h"

namespace fusedopt::host {
namespace {

constexpr int kParamsKey = 0, kMaximizeKey = 1, kFirstHyperKey = 2;  // of the reader
constexpr int kMaxKeys = kFirstHyperKey + kMaxHyper;

std::string base_name(const std::string& key) { return key.substr(0, key.find('[')); }

std::vector<PyObject*> names(const std::vector<std::string>& hyper_keys) {
  std::vector<PyObject*> all = {interned("params"), interned("maximize")};
  for (const std::string& key : hyper_keys) all.push_back(interned(base_name(key).c_str()));
  return all;
}

}  // namespace

GroupReader::GroupReader(const std::vector<std::string>& hyper_keys,
                         std::optional<dlpack::DeviceType> on_device)
    : on_device_(on_device), reader_(names(hyper_keys)) {
  for (const std::string& key : hyper_keys) {
    const size_t bracket = key.find('[');
    const int count = bracket == std::string::npos ? 1 : key[bracket + 1] - '0';
    keys_.push_back({interned(base_name(key).c_str()), count});
  }
}

bool GroupReader::take_address(PyObject* lr, size_t index, Group* out) {
  const TensorAccess& access = TensorAccess::instance();
  TensorView view;
  if (!on_device_ || !access.is_plain(lr) || !access.read(lr, &view) || view.numel() != 1 ||
      view.dl.device.type != *on_device_ || !floating_dtype(view.dl, &out->lr_dtype))
    return false;
  out->lr = static_cast<char*>(view.dl.data) + view.dl.byte_offset;
  on_devices_.push_back({Ref::borrow(lr), index, view.dl.device.index});
  return true;
}

bool GroupReader::fetches(const OnDevice& lr, const std::vector<Row>& rows, int device) const {
  return lr.device != device && std::any_of(rows.begin(), rows.end(), [&](const Row& row) {
           return static_cast<size_t>(row.group) == lr.group;
         });
}

bool GroupReader::must_fetch(const std::vector<Row>& rows, int device) const {
  return std::any_of(on_devices_.begin(), on_devices_.end(),
                     [&](const OnDevice& lr) { return fetches(lr, rows, device); });
}

void GroupReader::fetch(const std::vector<Row>& rows, int device, PyObject* host,
                        std::vector<Group>* groups) const {
  for (const OnDevice& lr : on_devices_) {
    if (!fetches(lr, rows, device)) continue;
    const Ref value = Ref::checked(PyObject_CallMethod(host, "fetch_lr", "On", lr.lr.get(),
                                                       static_cast<Py_ssize_t>(lr.group)));
    Group& group = (*groups)[lr.group];
    group.hyper[0] = PyFloat_AsDouble(value.get());
    if (PyErr_Occurred()) throw PythonError{};
    group.lr = nullptr;
  }
}

Ref GroupReader::read(PyObject* group, size_t index, Group* out) {
  const auto where = [&] { return "param_groups[" + std::to_string(index) + "]"; };
  const auto refuse = [&](PyObject* name, const std::string& what, PyObject* value) {
    PyErr_Clear();
    raise(PyExc_TypeError,
          where() + "[" + repr(name) + "] must be " + what + ", got " + repr(value));
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

  PyObject* borrowed[kMaxKeys] = {};
  if (PyDict_Check(group)) reader_.read(group, borrowed);
  // To read a tensor lr, Python code runs, and the group may change under it.
  Ref values[kMaxKeys];
  for (size_t k = 0; k < kFirstHyperKey + keys_.size(); ++k) values[k] = Ref::borrow(borrowed[k]);
  if (!values[kParamsKey]) raise(PyExc_KeyError, where() + " has no \"params\"");

  std::fill(std::begin(out->hyper), std::end(out->hyper), 0.0);
  out->lr = nullptr;
  int slot = 0;
  for (size_t k = 0; k < keys_.size(); ++k) {
    const Key& key = keys_[k];
    PyObject* value = values[kFirstHyperKey + k].get();
    if (value == nullptr) {
      PyErr_SetObject(PyExc_KeyError, key.name);
      throw PythonError{};
    }
    if (k == 0 && take_address(value, index, out)) {
      ++slot;
      continue;
    }
    if (key.count == 1) {
      out->hyper[slot++] = number(value, key.name);
      continue;
    }
    const Ref items = Ref::own(PySequence_Tuple(value));
    if (!items || PyTuple_GET_SIZE(items.get()) != key.count)
      refuse(key.name, std::to_string(key.count) + " numbers", value);
    for (int i = 0; i < key.count; ++i)
      out->hyper[slot++] = number(PyTuple_GET_ITEM(items.get(), i), key.name);
  }
  const int maximize = values[kMaximizeKey] ? PyObject_IsTrue(values[kMaximizeKey].get()) : 0;
  if (maximize < 0) throw PythonError{};
  out->maximize = maximize == 1;
  return Ref::checked(PySequence_Fast(values[kParamsKey].get(), "\"params\" must be a list"));
}

}  // namespace fusedopt::host
