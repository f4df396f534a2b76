// Clips gradients in place, in one cooperative launch: squared norm, barrier, scaling.
//
// 4 bytes per float32 element for the norm, and 8 more where something has to be scaled.
#pragma once

#include "cuda/step.cuh"

namespace fusedopt::cuda {

// grad = clamp(grad * factor, -limit, limit) over a dense chunk.
template <class G>
__device__ __noinline__ void scale_dense(void* data, int64_t begin, int count, double factor,
                                         double limit) {
  using T = decltype(widen(G{}));
  constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(G));
  const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  G* grad = global<G>(data) + begin;
  const T f = static_cast<T>(factor), l = static_cast<T>(limit);
  int first = elements_to_alignment(grad);
  if (first > count) first = count;
  const int end = first + (count - first) / kElements * kElements;
#pragma unroll 1
  for (int i = first + me * kElements; i < end; i += threads * kElements) {
    Pack<G, kElements> pack;
    pack.load(grad + i);
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      narrow(scaled_and_clamped(widen(pack.element[e]), f, l), &pack.element[e]);
    pack.store(grad + i);
  }
  const int rest = count - (end - first);
#pragma unroll 1
  for (int i = me; i < rest; i += threads) {
    G* element = grad + (i < first ? i : i + (end - first));
    narrow(scaled_and_clamped(widen(*element), f, l), element);
  }
}

__device__ __forceinline__ void scale_chunk(const Chunk& c, const Layout* layouts, double factor,
                                            double limit) {
  if (c.row->layout != kFlat) {
    const Layout& layout = layouts[c.row->layout];
    const DType dtype = c.row->dtype[kGrad];
    const float f = static_cast<float>(factor), l = static_cast<float>(limit);
    for (int i = static_cast<int>(threadIdx.x); i < c.count; i += static_cast<int>(blockDim.x)) {
      const int64_t at = strided_offset(layout, kGrad, c.begin + i);
      if (dtype == DType::kFloat64)
        store_any(scaled_and_clamped(load_any<double>(dtype, c.grad, at), factor, limit), dtype,
                  c.grad, at);
      else
        store_any(scaled_and_clamped(load_any<float>(dtype, c.grad, at), f, l), dtype, c.grad, at);
    }
    return;
  }
  switch (c.row->dtype[kGrad]) {
    case DType::kFloat32:
      return scale_dense<float>(c.grad, c.begin, c.count, factor, limit);
    case DType::kFloat64:
      return scale_dense<double>(c.grad, c.begin, c.count, factor, limit);
    case DType::kBFloat16:
      return scale_dense<bfloat16>(c.grad, c.begin, c.count, factor, limit);
    case DType::kFloat16:
      return scale_dense<float16>(c.grad, c.begin, c.count, factor, limit);
  }
}

// Rows have gradients alone. With `norm`, squared_norm_out takes the total norm (not its square),
// and a coefficient of 1 writes nothing.
__global__ void __launch_bounds__(kThreads, 4) clip_kernel(const __grid_constant__ StepArgs a) {
  __shared__ double scratch[kThreads];
  const Decision d = decide(a, scratch);
  if (a.squared_norm_out != nullptr && blockIdx.x == 0 && threadIdx.x == 0)
    *a.squared_norm_out = d.total_norm;
  if (a.norm_only || (a.norm && d.factor == 1)) return;
  const int blocks = static_cast<int>(gridDim.x);
  for (int c = a.chunk_count - 1 - static_cast<int>(blockIdx.x); c >= 0; c -= blocks)
    scale_chunk(chunk_of(a, c), a.layouts, d.factor, a.clip_value);
}

}  // namespace fusedopt::cuda
