// The few helpers for the Python C API that the host code needs.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>
#include <utility>

namespace fusedopt::host {

// Thrown when a Python error is set; the bindings hand that error on.
struct PythonError {};

// Owns one reference.
class Ref {
 public:
  Ref() = default;
  static Ref own(PyObject* object) { return Ref(object); }
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  static Ref checked(PyObject* object) {
    if (object == nullptr) throw PythonError{};
    return Ref(object);
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// Lets other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(thread_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* thread_;
};

inline PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw PythonError{};
  return name;
}

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError{};
}

inline std::string repr(PyObject* object) {
  const Ref text = Ref::checked(PyObject_Repr(object));
  const char* bytes = PyUnicode_AsUTF8(text.get());
  if (bytes == nullptr) throw PythonError{};
  return bytes;
}

}  // namespace fusedopt::host
