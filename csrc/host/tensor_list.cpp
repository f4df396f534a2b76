#include "host/tensor_list.h"

#include <algorithm>

#include "host/layout.h"

namespace fusedopt::host {

bool floating_dtype(const dlpack::Tensor& dl, DType* dtype) {
  struct Known {
    uint8_t code, bits;
    DType dtype;
  };
  static constexpr Known kKnown[] = {{dlpack::kFloat, 32, DType::kFloat32},
                                     {dlpack::kFloat, 64, DType::kFloat64},
                                     {dlpack::kBfloat, 16, DType::kBFloat16},
                                     {dlpack::kFloat, 16, DType::kFloat16}};
  for (const Known& known : kKnown) {
    if (dl.dtype.code == known.code && dl.dtype.bits == known.bits && dl.dtype.lanes == 1) {
      *dtype = known.dtype;
      return true;
    }
  }
  return false;
}

TensorList::TensorList(PyObject* tensors, bool written, dlpack::DeviceType device)
    : device_(device) {
  const Ref list = Ref::checked(PySequence_Fast(tensors, "tensors must be a list"));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list.get()) && reason_.empty(); ++i)
    reason_ = add(PySequence_Fast_GET_ITEM(list.get(), i), written);
}

std::string TensorList::add(PyObject* tensor, bool written) {
  const TensorAccess& access = TensorAccess::instance();
  TensorView view;
  Row row{};
  if (!access.is_plain(tensor) || !access.read(tensor, &view) ||
      !floating_dtype(view.dl, &row.dtype[kGrad]) || view.dl.device.type != device_)
    return "not a dense tensor of float32, float64, bfloat16 or float16 on the device";
  row.numel = view.numel();
  if (row.numel == 0) return "";
  if (!rows_.empty() && view.dl.device.index != device_index_) return "tensors on several devices";
  device_index_ = view.dl.device.index;
  if (view.dl.data == nullptr) return "a tensor without memory";
  if (written && overlaps_itself(view)) return "an expanded tensor";
  row.data[kGrad] = static_cast<char*>(view.dl.data) + view.dl.byte_offset;
  row.layout = kFlat;
  const TensorView* views[] = {&view};
  if (!all_contiguous(views, 1)) {
    Layout layout = merged_layout(views, 1);
    if (!is_flat(layout, 1)) {
      std::copy_n(layout.stride[0], layout.ndim, layout.stride[kGrad]);
      row.layout = static_cast<int32_t>(layouts_.size());
      layouts_.push_back(layout);
    }
  }
  rows_.push_back(row);
  return "";
}

}  // namespace fusedopt::host
