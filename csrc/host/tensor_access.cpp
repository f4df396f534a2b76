#include "host/tensor_access.h"

#include <exception>

namespace fusedopt::host {

TensorAccess* const TensorAccess::instance_ = new TensorAccess;

void TensorAccess::use_direct(const DirectFunctions& functions) {
  direct_ = functions;
  way_ = Way::kDirect;
}

void TensorAccess::use_dlpack(PyObject* capsule) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule, dlpack::kExchangeApiCapsule));
  if (api == nullptr) throw PythonError{};
  if (api->header.version.major != dlpack::kMajorVersion || api->borrow == nullptr)
    raise(PyExc_RuntimeError, "the DLPack exchange API of this torch is of another version");
  api_ = api;
  way_ = Way::kDlpack;
}

void TensorAccess::use_python(PyObject* describe) {
  describe_ = Ref::borrow(describe);
  way_ = Way::kPython;
}

void TensorAccess::set_types(PyObject* base, PyObject* plain) {
  const Ref types = Ref::checked(PySequence_Tuple(plain));
  if (!PyType_Check(base)) raise(PyExc_TypeError, "base must be a class");
  const int listed = PySequence_Contains(types.get(), base);
  if (listed < 0) throw PythonError{};
  if (listed == 0) raise(PyExc_ValueError, "plain must hold base, too");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types.get()); ++i) {
    PyObject* type = PyTuple_GET_ITEM(types.get(), i);
    if (!PyType_Check(type) || !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type),
                                                 reinterpret_cast<PyTypeObject*>(base)))
      raise(PyExc_TypeError, "plain must hold subclasses of base");
  }
  if (PyTuple_GET_SIZE(types.get()) > kMaxPlainTypes)
    raise(PyExc_ValueError, "plain must hold at most " + std::to_string(kMaxPlainTypes));
  // Held for ever: the classes of torch live as long as the process.
  Py_INCREF(base);
  base_type_ = reinterpret_cast<PyTypeObject*>(base);
  plain_count_ = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types.get()); ++i) {
    PyObject* type = PyTuple_GET_ITEM(types.get(), i);
    Py_INCREF(type);
    plain_types_[plain_count_++] = reinterpret_cast<PyTypeObject*>(type);
  }
}

const char* TensorAccess::name() const {
  switch (way_) {
    case Way::kDirect:
      return "direct";
    case Way::kDlpack:
      return "dlpack";
    case Way::kPython:
      break;
  }
  return "python";
}

const char* TensorAccess::reader() const {
  if (way_ != Way::kDirect) return nullptr;
  switch (direct_.reader) {
    case Reader::kReadOnly:
      return "read_only";
    case Reader::kTwoArguments:
      return "two_arguments";
    case Reader::kShim:
      break;
  }
  return "shim";
}

bool TensorAccess::read_direct(const void* tensor, TensorView* out) const {
  try {
    switch (direct_.reader) {
      case Reader::kReadOnly:
        direct_.to_dlpack_read_only(tensor, &out->dl, false);
        break;
      case Reader::kTwoArguments:
        direct_.to_dlpack(tensor, &out->dl);
        break;
      case Reader::kShim:
        if (!read_shim(tensor, &out->dl)) return false;
        break;
    }
    return !direct_.is_neg(tensor);
  } catch (const std::exception&) {
    return false;  // a sparse or otherwise indescribable tensor: the caller resolves it
  }
}

// The order matters: the functions below print what libtorch throws, so a sparse tensor, which has
// no storage, and one on a device without memory are turned away before they are asked for it.
bool TensorAccess::read_shim(const void* tensor, dlpack::Tensor* out) const {
  const ShimFunctions& shim = direct_.shim;
  if (!shim.has_storage(*static_cast<const void* const*>(tensor))) return false;
  int32_t dtype = 0, device = 0, index = 0;
  if (shim.dtype(tensor, &dtype) != 0 || shim.device_type(tensor, &device) != 0) return false;
  if (dtype < 0 || dtype >= ShimFunctions::kDtypes || device < 0 ||
      device >= ShimFunctions::kDevices)
    return false;
  out->dtype = shim.dtypes[dtype];
  if (out->dtype.lanes == 0 || shim.devices[device] == 0) return false;
  int64_t dim = 0;
  if (shim.device_index(tensor, &index) != 0 || shim.dim(tensor, &dim) != 0 ||
      shim.sizes(tensor, &out->shape) != 0 || shim.strides(tensor, &out->strides) != 0 ||
      shim.data_ptr(tensor, &out->data) != 0)
    return false;
  out->device = {shim.devices[device], index < 0 ? 0 : index};
  out->ndim = static_cast<int32_t>(dim);
  out->byte_offset = 0;
  return true;
}

bool TensorAccess::read_object(PyObject* tensor, TensorView* out) const {
  if (way_ == Way::kDlpack) {
    if (api_->borrow(tensor, &out->dl) != 0) {
      PyErr_Clear();  // as above
      return false;
    }
    static PyObject* const is_neg = interned("is_neg");
    return Ref::checked(PyObject_CallMethodNoArgs(tensor, is_neg)).get() == Py_False;
  }
  if (!describe_) raise(PyExc_RuntimeError, "fusedopt was imported without its tensor access");
  const Ref described = Ref::checked(PyObject_CallOneArg(describe_.get(), tensor));
  if (described.get() == Py_None) return false;
  unsigned long long data;
  int device_type, device_index, code, bits;
  PyObject *shape, *strides;
  if (!PyArg_ParseTuple(described.get(), "KiiiiO!O!", &data, &device_type, &device_index, &code,
                        &bits, &PyTuple_Type, &shape, &PyTuple_Type, &strides))
    throw PythonError{};
  const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
  std::vector<int64_t>& sizes = shapes_[next_shape_];
  next_shape_ = (next_shape_ + 1) % kShapes;
  sizes.resize(2 * ndim);
  for (Py_ssize_t d = 0; d < ndim; ++d) {
    sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
    sizes[ndim + d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, d));
  }
  if (PyErr_Occurred()) throw PythonError{};
  out->dl = {reinterpret_cast<void*>(data),
             {device_type, device_index},
             static_cast<int32_t>(ndim),
             {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1},
             sizes.data(),
             sizes.data() + ndim,
             0};
  return true;
}

GradRef TensorAccess::grad(PyObject* param) const {
  check_tensor(param);
  GradRef result;
  if (way_ == Way::kDirect) {
    const void* impl = *static_cast<const void* const*>(tensor_in(param));
    const void* tensor = direct_.grad(impl);
    if (*static_cast<const void* const*>(tensor) != direct_.undefined_impl) result.tensor = tensor;
    return result;
  }
  Ref object = grad_object(param);
  if (object.get() != Py_None) result.object = std::move(object);
  return result;
}

Ref TensorAccess::grad_object(PyObject* param) {
  static PyObject* const name = interned("grad");
  return Ref::checked(PyObject_GetAttr(param, name));
}

void TensorAccess::bump_versions(const std::vector<PyObject*>& tensors) const {
  if (way_ == Way::kDirect) {
    for (PyObject* tensor : tensors) direct_.bump_version(tensor_in(tensor));
    return;
  }
  static PyObject* const increment = [] {
    const Ref module = Ref::checked(PyImport_ImportModule("torch.autograd.graph"));
    PyObject* function = PyObject_GetAttrString(module.get(), "increment_version");
    if (function == nullptr) throw PythonError{};
    return function;
  }();
  const Ref list = Ref::checked(PyList_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    Py_INCREF(tensors[i]);
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), tensors[i]);
  }
  Ref::checked(PyObject_CallOneArg(increment, list.get()));
}

}  // namespace fusedopt::host
