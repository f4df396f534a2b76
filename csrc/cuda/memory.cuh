// Loads and stores of 16 bytes, for every dtype.
//
// Pointers that come out of a table are generic to the compiler; told that they point to global
// memory, it emits LDG.E.128 and STG.E.128 instead of LD and ST.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/table.h"

namespace fusedopt::cuda {

// A chunk of a row: elements [begin, begin + count).
struct Chunk {
  const Row* row;
  void* grad;
  int64_t begin;
  int count;
};

constexpr int kVectorBytes = 16;

struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

// A pointer out of the table, as what it is.
template <class T>
__device__ __forceinline__ T* global(void* p) {
  __builtin_assume(__isGlobal(p));
  return static_cast<T*>(p);
}

// kCount elements of T in registers, moved 16 bytes at a time. The address must be aligned to 16.
template <class T, int kCount>
struct Pack {
  static constexpr int kVectors = static_cast<int>(sizeof(T)) * kCount / kVectorBytes;
  static_assert(kVectors >= 1 && kVectors * kVectorBytes == static_cast<int>(sizeof(T)) * kCount);
  union {
    Vector vector[kVectors];
    T element[kCount];
  };

  __device__ __forceinline__ Pack() {}

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vector[v] = reinterpret_cast<const Vector*>(from)[v];
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(to)[v] = vector[v];
  }
};

// How many elements come before the first address that is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ int elements_to_alignment(const T* p) {
  const uint32_t off = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) % kVectorBytes;
  return static_cast<int>((kVectorBytes - off) % kVectorBytes / sizeof(T));
}

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

// One element of any dtype, widened to T.
template <class T>
__device__ __forceinline__ T load_any(DType dtype, void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<T>(global<float>(data)[i]);
    case DType::kFloat64:
      return static_cast<T>(global<double>(data)[i]);
    case DType::kBFloat16:
      return static_cast<T>(widen(global<bfloat16>(data)[i]));
    case DType::kFloat16:
      return static_cast<T>(widen(global<float16>(data)[i]));
  }
  return T(0);
}

template <class T>
__device__ __forceinline__ void store_any(T value, DType dtype, void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return narrow(value, global<float>(data) + i);
    case DType::kFloat64:
      return narrow(value, global<double>(data) + i);
    case DType::kBFloat16:
      return narrow(value, global<bfloat16>(data) + i);
    case DType::kFloat16:
      return narrow(value, global<float16>(data) + i);
  }
}

// clamp(grad * factor, -limit, limit); a NaN passes both comparisons.
template <class T>
__device__ __forceinline__ T scaled_and_clamped(T grad, T factor, T limit) {
  const T g = grad * factor;
  const T low = g < -limit ? -limit : g;
  return low > limit ? limit : low;
}

// The offset of element i of a strided operand, in elements.
__device__ __forceinline__ int64_t strided_offset(const Layout& layout, int operand, int64_t i) {
  int64_t offset = 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    offset += i % layout.size[d] * layout.stride[operand][d];
    i /= layout.size[d];
  }
  return offset;
}

}  // namespace fusedopt::cuda
