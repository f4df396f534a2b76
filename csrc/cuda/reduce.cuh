// Sums over a block and over the grid, in a fixed order: the same bits on each run on the same GPU.
#pragma once

#include "cuda/memory.cuh"
#include "cuda/step.h"

namespace fusedopt::cuda {

// The sum of each thread's value, returned to all threads of the block. blockDim.x is a power of
// two, at most kThreads. `scratch` is shared memory of kThreads doubles.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  const int me = static_cast<int>(threadIdx.x);
  __syncthreads();  // scratch may still be read from the sum before
  scratch[me] = value;
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (me < half) scratch[me] += scratch[me + half];
  }
  __syncthreads();
  return scratch[0];
}

template <class G, class F>
__device__ __noinline__ double squares_of(void* data, int64_t begin, int count, F square) {
  const G* grad = global<G>(data) + begin;
  constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(G));
  constexpr int kUnroll = 4;  // loads in flight before the first use: 64 bytes a thread
  const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int head = elements_to_alignment(grad);
  if (head > count) head = count;
  const int vectors = (count - head) / kElements;
  double sum = 0;
  if (me < head) sum += square(grad[me]);
  const G* body = grad + head;
  int v = me;
#pragma unroll 1
  for (; v + (kUnroll - 1) * threads < vectors; v += kUnroll * threads) {
    Pack<G, kElements> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) pack[u].load(body + (v + u * threads) * kElements);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum += square(pack[u].element[e]);
    }
  }
#pragma unroll 1
  for (; v < vectors; v += threads) {
    Pack<G, kElements> pack;
    pack.load(body + v * kElements);
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum += square(pack.element[e]);
  }
  const int tail = head + vectors * kElements;
  if (tail + me < count) sum += square(grad[tail + me]);
  return sum;
}

// This thread's share of the sum of squares of elements [begin, begin + count) of a gradient, in
// double: exact squares of every 16- and 32-bit value, no overflow.
__device__ __forceinline__ double squares(const Chunk& chunk, const Layout* layouts) {
  const Row& row = *chunk.row;
  void* const grad = chunk.grad;
  const int64_t begin = chunk.begin;
  const int count = chunk.count;
  const auto square = [](auto x) {
    const double wide = widen(x);
    return wide * wide;
  };
  if (row.layout != kFlat) {
    double sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const int64_t at = strided_offset(layouts[row.layout], kGrad, begin + i);
      sum += square(load_any<double>(row.dtype[kGrad], grad, at));
    }
    return sum;
  }
  switch (row.dtype[kGrad]) {
    case DType::kFloat32:
      return squares_of<float>(grad, begin, count, square);
    case DType::kFloat64:
      return squares_of<double>(grad, begin, count, square);
    case DType::kBFloat16:
      return squares_of<bfloat16>(grad, begin, count, square);
    case DType::kFloat16:
      return squares_of<float16>(grad, begin, count, square);
  }
  return 0;
}

}  // namespace fusedopt::cuda
