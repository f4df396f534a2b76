// Brings operands of different strides into one order of elements.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/table.h"
#include "host/tensor_access.h"

namespace fusedopt::host {

// Row-major without gaps, strides of size-1 dims included.
inline bool all_contiguous(const TensorView* const* views, int count) {
  const TensorView& first = *views[0];
  int64_t expected = 1;
  for (int d = first.dl.ndim - 1; d >= 0; --d) {
    for (int k = 0; k < count; ++k)
      if (views[k]->stride(d) != expected) return false;
    expected *= first.size(d);
  }
  return true;
}

// As torch's in-place operators: a dim of stride 0 surely overlaps.
inline bool overlaps_itself(const TensorView& view) {
  for (int d = 0; d < view.dl.ndim; ++d)
    if (view.size(d) > 1 && view.stride(d) == 0) return true;
  return false;
}

// The dims of the param from the largest stride to the smallest, so that a dense param is walked in
// storage order; size-1 dims dropped, dims that all operands walk as one merged. Needs numel > 0.
inline Layout merged_layout(const TensorView* const* views, int count) {
  const TensorView& param = *views[kParam];
  int order[kMaxDims];
  int dims = 0;
  for (int d = 0; d < param.dl.ndim; ++d)
    if (param.size(d) != 1) order[dims++] = d;
  std::stable_sort(order, order + dims,
                   [&](int a, int b) { return param.stride(a) > param.stride(b); });
  Layout out;
  for (int i = 0; i < dims; ++i) {
    const int d = order[i];
    bool merges = out.ndim > 0;
    for (int k = 0; merges && k < count; ++k)
      merges = out.stride[k][out.ndim - 1] == views[k]->stride(d) * param.size(d);
    const int at = merges ? out.ndim - 1 : out.ndim++;
    out.size[at] = (merges ? out.size[at] : 1) * param.size(d);
    for (int k = 0; k < count; ++k) out.stride[k][at] = views[k]->stride(d);
  }
  if (out.ndim == 0) {  // one element
    out.ndim = 1;
    out.size[0] = 1;
    for (int k = 0; k < count; ++k) out.stride[k][0] = 1;
  }
  return out;
}

inline bool is_flat(const Layout& layout, int count) {
  if (layout.ndim != 1) return false;
  for (int k = 0; k < count; ++k)
    if (layout.stride[k][0] != 1) return false;
  return true;
}

}  // namespace fusedopt::host
