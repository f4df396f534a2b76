// A table of plain tensors, for the clip functions that work outside of an optimizer.
#pragma once

#include <string>
#include <vector>

#include "core/table.h"
#include "cpu/apply.h"
#include "host/tensor_access.h"

namespace fusedopt::host {

class TensorList {
 public:
  // Takes a list of tensors on one device of a kind. `reason` says why the native driver cannot
  // serve them, or is empty. With `written`, tensors that overlap themselves are a reason too.
  TensorList(PyObject* tensors, bool written, dlpack::DeviceType device);

  const std::string& reason() const { return reason_; }
  TableView table() const { return {rows_, groups_, layouts_}; }
  int device_index() const { return device_index_; }

 private:
  std::string add(PyObject* tensor, bool written);

  const dlpack::DeviceType device_;
  int device_index_ = 0;
  std::string reason_;
  std::vector<Row> rows_;
  std::vector<Group> groups_;
  std::vector<Layout> layouts_;
};

// The storage dtype of a described tensor, false where it is not a real floating-point one.
bool floating_dtype(const dlpack::Tensor& dl, DType* dtype);

}  // namespace fusedopt::host
