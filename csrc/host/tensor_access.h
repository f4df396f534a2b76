// Reads tensors from C++ without a torch header.
//
// Three ways, the fastest that works is used (times on one 2.5 GHz core):
//   direct   25 ns  libtorch's own functions, found by name in the loaded library, called on the
//                   at::Tensor inside the Python object. fusedopt/_access.py finds its offset and
//                   checks every function against Python's view of real tensors before it is used.
//   dlpack  130 ns  the C table torch.Tensor.__dlpack_c_exchange_api__ (torch >= 2.10)
//   python    5 us  a Python function that returns pointer, dtype, device, shape and strides
//
// All functions need the GIL.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dlpack_abi.h"
#include "host/python.h"

namespace fusedopt::host {

// A borrowed description of a tensor; shape and strides live as long as the tensor or, read through
// Python, as long as this view.
struct TensorView {
  dlpack::Tensor dl{};
  std::vector<int64_t> owned;

  int64_t size(int d) const { return dl.shape[d]; }
  int64_t stride(int d) const { return dl.strides[d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < dl.ndim; ++d) n *= dl.shape[d];
    return n;
  }
};

// Addresses of libtorch functions; at::Tensor is passed by address.
struct DirectFunctions {
  int64_t tensor_offset;  // of the at::Tensor in the Python object, bytes
  void (*to_dlpack)(const void* tensor, dlpack::Tensor* out);  // at::toDLPackNonOwning
  const void* (*grad)(const void* tensor_impl);                // c10::TensorImpl::grad
  void (*bump_version)(const void* tensor);                    // torch::autograd::impl::bump_version
  const void* undefined_impl;                                  // the TensorImpl of "no tensor"
};

// The gradient of a param: none, a libtorch tensor (direct), or a Python object.
struct GradRef {
  const void* tensor = nullptr;
  Ref object;
  bool none() const { return tensor == nullptr && !object; }
};

class TensorAccess {
 public:
  static TensorAccess& instance();

  void use_direct(const DirectFunctions& functions);
  void use_dlpack(PyObject* exchange_api_capsule);
  void use_python(PyObject* describe);
  // `base` is torch.Tensor; `plain` are the classes that add no behaviour to it.
  void set_types(PyObject* base, PyObject* plain);
  const char* name() const;

  // Whether the object is a torch.Tensor or one of the subclasses without behaviour of its own.
  bool is_plain(PyObject* object) const;

  bool is_tensor(PyObject* object) const;

  // False, without a Python error, where the tensor has no plain strided memory to describe.
  // Raises TypeError for what is no tensor.
  bool read(PyObject* tensor, TensorView* out) const;
  bool read(const GradRef& grad, TensorView* out) const;
  GradRef grad(PyObject* param) const;
  void bump_versions(const std::vector<PyObject*>& tensors) const;

 private:
  enum class Way { kPython, kDlpack, kDirect };
  const void* tensor_in(PyObject* object) const;
  void check_tensor(PyObject* object) const;

  Way way_ = Way::kPython;
  DirectFunctions direct_{};
  const dlpack::ExchangeApi* api_ = nullptr;
  Ref describe_;
  PyTypeObject* base_type_ = nullptr;
  std::vector<PyTypeObject*> plain_types_;
};

}  // namespace fusedopt::host
