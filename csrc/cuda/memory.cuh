// Loads and stores of 16 bytes, for every dtype.
//
// Pointers that come out of a table are generic to the compiler; told that they point to global
// memory, it emits LDG and STG instead of LD and ST.
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

// What one instruction moves: 16 bytes, or 8 of an operand whose elements are half as wide as those
// of the others.
template <int kBytes>
struct alignas(kBytes) Vector {
  uint32_t word[kBytes / 4];
};

// nvcc takes plain accesses of 16 bytes apart for sm_100 and later; these instructions stay what
// they are. A loop reads an element before it writes it, and no other thread does either, so there
// is nothing that a compiler could put in the wrong order.
__device__ __forceinline__ void load_vector(const void* from, Vector<16>* to) {
#if defined(__CUDA_ARCH__)
  asm("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to->word[0]), "=r"(to->word[1]), "=r"(to->word[2]), "=r"(to->word[3])
      : "l"(__cvta_generic_to_global(from)));
#else
  *to = *static_cast<const Vector<16>*>(from);
#endif
}
__device__ __forceinline__ void load_vector(const void* from, Vector<8>* to) {
#if defined(__CUDA_ARCH__)
  asm("ld.global.v2.b32 {%0, %1}, [%2];"
      : "=r"(to->word[0]), "=r"(to->word[1])
      : "l"(__cvta_generic_to_global(from)));
#else
  *to = *static_cast<const Vector<8>*>(from);
#endif
}
__device__ __forceinline__ void store_vector(const Vector<16>& from, void* to) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(from.word[0]), "r"(from.word[1]),
                 "r"(from.word[2]), "r"(from.word[3]));
#else
  *static_cast<Vector<16>*>(to) = from;
#endif
}
__device__ __forceinline__ void store_vector(const Vector<8>& from, void* to) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(from.word[0]), "r"(from.word[1]));
#else
  *static_cast<Vector<8>*>(to) = from;
#endif
}

// A pointer out of the table, as what it is.
template <class T>
__device__ __forceinline__ T* global(void* p) {
  __builtin_assume(__isGlobal(p));
  return static_cast<T*>(p);
}

// kCount elements of T in registers, moved by one instruction. The address must be aligned to their
// bytes.
template <class T, int kCount>
struct Pack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * kCount;
  union {
    Vector<kBytes> vector;
    T element[kCount];
  };

  __device__ __forceinline__ Pack() {}

  __device__ __forceinline__ void load(const T* from) { load_vector(from, &vector); }
  __device__ __forceinline__ void store(T* to) const { store_vector(vector, to); }
};

// How many elements come before the first address that is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ int elements_to_alignment(const T* p) {
  const uint32_t off = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) % kVectorBytes;
  return static_cast<int>((kVectorBytes - off) % kVectorBytes / sizeof(T));
}

// Whether a Pack of kCount elements can be moved there.
template <int kCount, class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kCount) == 0;
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
