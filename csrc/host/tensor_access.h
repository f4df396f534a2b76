// Reads tensors from C++ without a torch header.
//
// Three ways, the fastest that works is used (times on one 2.5 GHz core):
//   direct   25 ns  libtorch's own functions, found by name in the loaded library, called on the
//                   at::Tensor inside the Python object. fusedopt/tensor_access.py finds its offset
//                   and checks all of them against Python's view of real tensors before they are
//                   used. Which function describes a tensor depends on the version: see Reader.
//   dlpack  130 ns  the C table torch.Tensor.__dlpack_c_exchange_api__ (torch >= 2.10)
//   python    5 us  a Python function that returns pointer, dtype, device, shape and strides
//
// All functions need the GIL.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dlpack_abi.h"
#include "core/fetch.h"
#include "host/python.h"

namespace fusedopt::host {

// A borrowed description of a tensor; shape and strides live as long as the tensor is not resized.
struct TensorView {
  dlpack::Tensor dl;

  int64_t size(int d) const { return dl.shape[d]; }
  int64_t stride(int d) const { return dl.strides[d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < dl.ndim; ++d) n *= dl.shape[d];
    return n;
  }
};

// The function of libtorch that describes a tensor: each signature is a member of its own, so that
// none is called as another.
enum class Reader {
  kReadOnly,      // at::toDLPackNonOwning(tensor, out, bool read_only), torch >= 2.14
  kTwoArguments,  // at::toDLPackNonOwning(tensor, out), torch 2.10 to 2.13
  kShim,          // the C functions that code of AOTInductor calls
};

// aoti_torch_get_*: 0, or an error code where libtorch has thrown.
struct ShimFunctions {
  bool (*has_storage)(const void* tensor_impl);  // c10::TensorImpl::has_storage
  int32_t (*dtype)(const void* tensor, int32_t* out);
  int32_t (*device_type)(const void* tensor, int32_t* out);
  int32_t (*device_index)(const void* tensor, int32_t* out);
  int32_t (*dim)(const void* tensor, int64_t* out);
  int32_t (*sizes)(const void* tensor, int64_t** out);
  int32_t (*strides)(const void* tensor, int64_t** out);
  int32_t (*data_ptr)(const void* tensor, void** out);
  // By torch's numbers; all zeros for what is not read.
  static constexpr int kDtypes = 64, kDevices = 32;
  dlpack::DataType dtypes[kDtypes];
  int32_t devices[kDevices];
};

// Addresses of libtorch functions; at::Tensor is passed by address.
// Where in a TensorImpl the pointers to what else a step reads lie, in bytes, for hints alone: 0
// where that was not found.
inline constexpr int64_t kLargestHint = 144;  // far enough from the end of a TensorImpl
struct HintOffsets {
  int64_t storage;  // to the StorageImpl
  int64_t meta;     // to the autograd metadata
  int64_t grad;     // from there to the gradient
};

struct DirectFunctions {
  int64_t tensor_offset;  // of the at::Tensor in the Python object, bytes
  HintOffsets hints;
  const void* undefined_impl;                    // the TensorImpl of "no tensor"
  const void* (*grad)(const void* tensor_impl);  // c10::TensorImpl::grad
  bool (*is_neg)(const void* tensor);            // at::native::is_neg
  void (*bump_version)(const void* tensor);      // torch::autograd::impl::bump_version
  Reader reader;
  // Of the reader alone; the others are null.
  void (*to_dlpack_read_only)(const void* tensor, dlpack::Tensor* out, bool read_only);
  void (*to_dlpack)(const void* tensor, dlpack::Tensor* out);
  ShimFunctions shim;
};

// The gradient of a param: none, a libtorch tensor (direct), or a Python object.
struct GradRef {
  const void* tensor = nullptr;
  Ref object;
  bool none() const { return tensor == nullptr && !object; }
};

class TensorAccess {
 public:
  // Never destroyed: it holds Python references, and the interpreter is gone by then.
  static TensorAccess& instance() { return *instance_; }

  void use_direct(const DirectFunctions& functions);
  void use_dlpack(PyObject* exchange_api_capsule);
  void use_python(PyObject* describe);
  // `base` is torch.Tensor; `plain` are the classes that add no behaviour to it.
  void set_types(PyObject* base, PyObject* plain);
  const char* name() const;
  const char* reader() const;  // null but for the direct way

  // Whether the object is a torch.Tensor or one of the subclasses without behaviour of its own.
  bool is_plain(PyObject* object) const {
    for (int i = 0; i < plain_count_; ++i)
      if (Py_TYPE(object) == plain_types_[i]) return true;
    return false;
  }

  bool is_tensor(PyObject* object) const {
    return is_plain(object) ||
           (base_type_ != nullptr && PyType_IsSubtype(Py_TYPE(object), base_type_));
  }

  // False, without a Python error, where the tensor has no plain strided memory to describe, or
  // memory that holds the negated values (Tensor.is_neg).
  // Raises TypeError for what is no tensor.
  bool read(PyObject* tensor, TensorView* out) const {
    check_tensor(tensor);
    return way_ == Way::kDirect ? read_direct(tensor_in(tensor), out) : read_object(tensor, out);
  }
  bool read(const GradRef& grad, TensorView* out) const {
    return grad.tensor != nullptr ? read_direct(grad.tensor, out) : read(grad.object.get(), out);
  }
  GradRef grad(PyObject* param) const;
  static Ref grad_object(PyObject* param);
  // Hints, each of which reads what the one before has brought, a few tensors earlier: the Python
  // object; the TensorImpl that it points to; its storage, its version counter, and the place of
  // its gradient.
  void prefetch_object(PyObject* tensor) const { fetch(tensor); }
  void prefetch_impl(PyObject* tensor) const {
    if (way_ == Way::kDirect) prefetch_lines(impl_of(tensor_in(tensor)), kImplBytes);
  }
  void prefetch_impl(const GradRef& grad) const {
    if (grad.tensor != nullptr) prefetch_lines(impl_of(grad.tensor), kImplBytes);
  }
  void prefetch_storage(PyObject* tensor) const {
    if (way_ == Way::kDirect) prefetch_storage_of(impl_of(tensor_in(tensor)));
  }
  void prefetch_storage(const GradRef& grad) const {
    if (grad.tensor != nullptr) prefetch_storage_of(impl_of(grad.tensor));
  }
  void prefetch_grad(PyObject* param) const {
    if (way_ != Way::kDirect || direct_.hints.meta == 0) return;
    fetch(word(impl_of(tensor_in(param)), direct_.hints.meta) + direct_.hints.grad);
  }
  void prefetch_version(PyObject* param) const {
    if (way_ != Way::kDirect || direct_.hints.storage == 0) return;
    fetch_for_write(word(impl_of(tensor_in(param)), direct_.hints.storage + kVersionAfterStorage));
  }

  void bump_versions(const std::vector<PyObject*>& tensors) const;

 private:
  static TensorAccess* const instance_;
  enum class Way { kPython, kDlpack, kDirect };
  const void* tensor_in(PyObject* object) const {
    return reinterpret_cast<const char*>(object) + direct_.tensor_offset;
  }
  void check_tensor(PyObject* object) const {
    if (!is_tensor(object)) raise(PyExc_TypeError, "expected a torch.Tensor, got " + repr(object));
  }
  // In each torch that was looked at. Where it is not so, hints go astray.
  static constexpr int kImplBytes = 176, kStorageBytes = 64;
  static constexpr int64_t kVersionAfterStorage = 3 * sizeof(void*);
  static const char* word(const char* base, int64_t offset) {
    return *reinterpret_cast<const char* const*>(base + offset);
  }
  static const char* impl_of(const void* tensor) {
    return *static_cast<const char* const*>(tensor);
  }
  static void prefetch_lines(const char* from, int bytes) {
    for (int at = 0; at < bytes; at += 64) fetch(from + at);
    fetch(from + bytes - 1);  // it need not begin at a line
  }
  void prefetch_storage_of(const char* impl) const {
    if (direct_.hints.storage != 0)
      prefetch_lines(word(impl, direct_.hints.storage), kStorageBytes);
  }
  bool read_direct(const void* tensor, TensorView* out) const;
  bool read_shim(const void* tensor, dlpack::Tensor* out) const;
  bool read_object(PyObject* tensor, TensorView* out) const;

  Way way_ = Way::kPython;
  DirectFunctions direct_{};
  const dlpack::ExchangeApi* api_ = nullptr;
  Ref describe_;
  // Shapes and strides read by the python way, in a ring: a row is read at once, so that they are
  // used before their place is taken again.
  static constexpr int kShapes = 64;
  mutable std::vector<int64_t> shapes_[kShapes];
  mutable int next_shape_ = 0;
  PyTypeObject* base_type_ = nullptr;
  static constexpr int kMaxPlainTypes = 8;
  int plain_count_ = 0;
  PyTypeObject* plain_types_[kMaxPlainTypes] = {};
};

}  // namespace fusedopt::host
