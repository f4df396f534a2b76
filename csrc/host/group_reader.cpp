#include "host/group_reader.h"

#include <algorithm>
#include <cmath>

#include "host/tensor_access.h"
#include "host/tensor_list.h"

namespace fusedopt::host {
namespace {

// Of the reader.
constexpr int kParamsKey = 0, kMaximizeKey = 1, kOptionKey = 2;
constexpr int kFirstHyperKey = kOptionKey + kOptions;
constexpr int kMaxKeys = kFirstHyperKey + kMaxHyper;

std::string base_name(const std::string& key) { return key.substr(0, key.find('[')); }

std::vector<PyObject*> names(const std::vector<std::string>& hyper_keys) {
  std::vector<PyObject*> all = {interned("params"), interned("maximize")};
  for (const char* name : kOptionNames) all.push_back(interned(name));
  for (const std::string& key : hyper_keys) all.push_back(interned(base_name(key).c_str()));
  return all;
}

// What a number should be, or "" where it is right.
const char* expected(Range range, double value) {
  switch (range) {
    case Range::kReal:
      return std::isnan(value) ? "a number" : "";
    case Range::kNonNegative:
      return value >= 0 ? "" : ">= 0";
    case Range::kUnit:
      return value >= 0 && value < 1 ? "" : "in [0, 1)";
    case Range::kSwitch:
      break;
  }
  return "";
}

}  // namespace

GroupReader::GroupReader(const std::vector<std::string>& hyper_keys,
                         const std::vector<Range>& ranges,
                         std::optional<dlpack::DeviceType> on_device)
    : on_device_(on_device), reader_(names(hyper_keys)) {
  for (size_t k = 0; k < hyper_keys.size(); ++k) {
    const std::string& key = hyper_keys[k];
    const size_t bracket = key.find('[');
    const int count = bracket == std::string::npos ? 1 : key[bracket + 1] - '0';
    keys_.push_back({interned(base_name(key).c_str()), count, ranges[k]});
  }
}

void GroupReader::compare_options(PyObject* const* values, size_t index) {
  for (int k = 0; k < kOptions; ++k) {
    Ref& known = options_[k];
    if (index == 0) known = Ref();
    if (values[k] == nullptr || values[k] == known.get()) continue;
    if (!known) {
      known = Ref::borrow(values[k]);
      continue;
    }
    const int same = PyObject_RichCompareBool(values[k], known.get(), Py_EQ);
    if (same < 0) throw PythonError{};
    const std::string name = kOptionNames[k];
    if (same == 0)
      raise(PyExc_ValueError, "param_groups[" + std::to_string(index) + "][\"" + name + "\"] is " +
                                  repr(values[k]) + " and that of a group before it is " +
                                  repr(known.get()) + ": " + name +
                                  " is an option of the whole optimizer, and must be the same in "
                                  "all groups");
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
  const auto unchecked = [&](PyObject* value, const Key& key) -> double {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    if (value == Py_False || (value == Py_None && key.range == Range::kSwitch)) return 0;
    if (value == Py_True) return 1;
    const bool text = PyUnicode_Check(value) || PyBytes_Check(value);
    const Ref as_float = Ref::own(text ? nullptr : PyNumber_Float(value));
    if (!as_float) refuse(key.name, "a number or a one-element tensor", value);
    return PyFloat_AS_DOUBLE(as_float.get());
  };
  const auto number = [&](PyObject* value, const Key& key) -> double {
    const double result = unchecked(value, key);
    const char* right = expected(key.range, result);
    if (*right != '\0')
      raise(PyExc_ValueError,
            where() + "[" + repr(key.name) + "] must be " + right + ", got " + repr(value));
    return result;
  };

  PyObject* borrowed[kMaxKeys] = {};
  if (PyDict_Check(group)) reader_.read(group, borrowed);
  // To read a tensor lr, Python code runs, and the group may change under it.
  Ref values[kMaxKeys];
  for (size_t k = 0; k < kFirstHyperKey + keys_.size(); ++k) values[k] = Ref::borrow(borrowed[k]);
  if (!values[kParamsKey]) raise(PyExc_KeyError, where() + " has no \"params\"");
  compare_options(borrowed + kOptionKey, index);
  reader_.release();

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
      out->hyper[slot++] = number(value, key);
      continue;
    }
    const Ref items = Ref::own(PySequence_Tuple(value));
    if (!items || PyTuple_GET_SIZE(items.get()) != key.count)
      refuse(key.name, std::to_string(key.count) + " numbers", value);
    for (int i = 0; i < key.count; ++i)
      out->hyper[slot++] = number(PyTuple_GET_ITEM(items.get(), i), key);
  }
  const int maximize = values[kMaximizeKey] ? PyObject_IsTrue(values[kMaximizeKey].get()) : 0;
  if (maximize < 0) throw PythonError{};
  out->maximize = maximize == 1;
  return Ref::checked(PySequence_Fast(values[kParamsKey].get(), "\"params\" must be a list"));
}

}  // namespace fusedopt::host
