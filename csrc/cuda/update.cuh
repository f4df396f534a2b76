// The update of one chunk: load, transform the gradient, rule, store.
//
// Bytes per element are those of docs/cpu.md: 28 for AdamW in float32. To keep the memory busy, a
// thread has two vectors of each of four operands in flight, 128 bytes, and an SM with 512 threads
// 64 KiB. An H100 moves 5 % more bytes a second so than with twice the threads and one vector each
// (docs/cuda.md).
#pragma once

#include "core/dispatch.h"
#include "cuda/memory.cuh"
#include "cuda/step.h"
#include "rules/registry.h"

namespace fusedopt::cuda {

// What a chunk's elements need beside themselves, in maths of type T.
template <class Rule, class T>
struct Prepared {
  typename Rule::template Scalars<T> scalars;
  T factor, limit;  // grad = clamp(grad * factor, -limit, limit)

  __device__ __forceinline__ T transform(T grad) const {
    return scaled_and_clamped(grad, factor, limit);
  }
};

template <class Rule>
struct PreparedPair {
  Prepared<Rule, float> f32;
  Prepared<Rule, double> f64;

  template <class T>
  __device__ __forceinline__ const Prepared<Rule, T>& get() const {
    if constexpr (std::is_same_v<T, double>) {
      return f64;
    } else {
      return f32;
    }
  }
};

// The dense chunk of a row whose dtypes have a loop of their own (core/dispatch.h).
template <class Rule, int kVariant, class P, class S>
struct DenseChunk {
  using T = decltype(widen(P{}));
  static constexpr int kStates = Rule::states(kVariant);
  // Elements that a thread moves of each operand at once: 16 bytes of the widest, so that a warp's
  // accesses to every operand lie side by side.
  static constexpr int kWidest = sizeof(P) > sizeof(S) || kStates == 0 ? sizeof(P) : sizeof(S);
  static constexpr int kElements = kVectorBytes / kWidest;
  // Vectors of each operand that are loaded before the first is used.
  static constexpr int kUnroll = kStates == 0 ? 4 : 2;

  P* param;
  const P* grad;
  S* state[kMaxStates];

  struct Vectors {
    Pack<P, kElements> param, grad;
    Pack<S, kElements> state[kMaxStates];
  };

  // Elements before the first address that is aligned in all operands; -1 where there is none.
  __device__ __forceinline__ int head() const {
    int n = elements_to_alignment(param);
    if constexpr (kStates > 0 && sizeof(S) > sizeof(P)) n = elements_to_alignment(state[0]);
    bool good = is_aligned<kElements>(param + n) && is_aligned<kElements>(grad + n);
#pragma unroll
    for (int k = 0; k < kStates; ++k) good = good && is_aligned<kElements>(state[k] + n);
    return good ? n : -1;
  }

  // kCount vectors of each operand, a stride of the block's threads apart.
  template <int kCount>
  __device__ __forceinline__ void vectors(int at, const Prepared<Rule, T>& prepared) const {
    const int stride = static_cast<int>(blockDim.x) * kElements;
    Vectors loaded[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = at + u * stride;
      Vectors& v = loaded[u];
      v.param.load(param + i);
      v.grad.load(grad + i);
#pragma unroll
      for (int k = 0; k < kStates; ++k) v.state[k].load(state[k] + i);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = at + u * stride;
      Vectors& v = loaded[u];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        T x = widen(v.param.element[e]);
        T values[kMaxStates];
#pragma unroll
        for (int k = 0; k < kStates; ++k) values[k] = widen(v.state[k].element[e]);
        const T g = prepared.transform(widen(v.grad.element[e]));
        Rule::template update<kVariant>(x, g, values, prepared.scalars);
        narrow(x, &v.param.element[e]);
#pragma unroll
        for (int k = 0; k < kStates; ++k) narrow(values[k], &v.state[k].element[e]);
      }
#pragma unroll
      for (int k = 0; k < kStates; ++k) v.state[k].store(state[k] + i);
      v.param.store(param + i);
    }
  }

  __device__ __forceinline__ void one(int i, const Prepared<Rule, T>& prepared) const {
    T x = widen(param[i]);
    T values[kMaxStates];
#pragma unroll
    for (int k = 0; k < kStates; ++k) values[k] = widen(state[k][i]);
    Rule::template update<kVariant>(x, prepared.transform(widen(grad[i])), values,
                                    prepared.scalars);
    narrow(x, param + i);
#pragma unroll
    for (int k = 0; k < kStates; ++k) narrow(values[k], state[k] + i);
  }

  // All threads of the block together.
  __device__ __forceinline__ void update(int count, const Prepared<Rule, T>& in_memory) const {
    const Prepared<Rule, T> prepared = in_memory;  // in registers
    const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int stride = threads * kElements;
    int first = head();
    const bool mismatched = first < 0;  // operands that are never aligned together
    if (mismatched || first > count) first = count;
    const int end = first + (count - first) / kElements * kElements;
    int i = first + me * kElements;
#pragma unroll 1
    for (; i + (kUnroll - 1) * stride < end; i += kUnroll * stride) vectors<kUnroll>(i, prepared);
#pragma unroll 1
    for (; i < end; i += stride) vectors<1>(i, prepared);
    // What lies before and behind the vectors: [0, first) and [end, count).
    const int rest = count - (end - first);
#pragma unroll 1
    for (int i = me; i < rest; i += threads) one(i < first ? i : i + (end - first), prepared);
  }
};

template <class Rule, int kVariant, class P, class S>
__device__ __noinline__ void update_dense(const Row* row, void* grad, int64_t begin, int count,
                                          const PreparedPair<Rule>* prepared) {
  using Dense = DenseChunk<Rule, kVariant, P, S>;
  Dense dense;
  dense.param = global<P>(row->data[kParam]) + begin;
  dense.grad = global<P>(grad) + begin;
#pragma unroll
  for (int k = 0; k < Dense::kStates; ++k)
    dense.state[k] = global<S>(row->data[kState0 + k]) + begin;
  dense.update(count, prepared->template get<typename Dense::T>());
}

// Any dtypes, any layout (null: flat): element by element.
template <class Rule, int kVariant, class T>
__device__ __noinline__ void update_any(const Row* row, void* grad, int64_t begin, int count,
                                        const Layout* layout, const PreparedPair<Rule>* pair) {
  constexpr int kStates = Rule::states(kVariant);
  const Prepared<Rule, T>& prepared = pair->template get<T>();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const auto at = [&](int operand) {
      return layout == nullptr ? begin + i : strided_offset(*layout, operand, begin + i);
    };
    T x = load_any<T>(row->dtype[kParam], row->data[kParam], at(kParam));
    const T g = prepared.transform(load_any<T>(row->dtype[kGrad], grad, at(kGrad)));
    T values[kMaxStates];
#pragma unroll
    for (int k = kState0; k < kState0 + kStates; ++k)
      values[k - kState0] = load_any<T>(row->dtype[k], row->data[k], at(k));
    Rule::template update<kVariant>(x, g, values, prepared.scalars);
    store_any(x, row->dtype[kParam], row->data[kParam], at(kParam));
#pragma unroll
    for (int k = kState0; k < kState0 + kStates; ++k)
      store_any(values[k - kState0], row->dtype[k], row->data[k], at(k));
  }
}

template <class Rule, int kVariant = 0>
__device__ __forceinline__ void update_chunk(const Chunk& c, const Layout* layouts,
                                             const PreparedPair<Rule>* prepared) {
  if constexpr (kVariant < Rule::kVariants) {
    if (c.row->variant != kVariant) return update_chunk<Rule, kVariant + 1>(c, layouts, prepared);
    const Layout* layout = c.row->layout == kFlat ? nullptr : &layouts[c.row->layout];
    switch (c.row->loop) {
#define FUSEDOPT_CASE(index, P, S)                                                        \
  case index:                                                                             \
    if constexpr (Rule::states(kVariant) > 0 || P == S)                                   \
      update_dense<Rule, kVariant, typename Storage<P>::type, typename Storage<S>::type>( \
          c.row, c.grad, c.begin, c.count, prepared);                                     \
    return;
      FUSEDOPT_FUSED_DTYPES(FUSEDOPT_CASE)
#undef FUSEDOPT_CASE
      case kAnyDouble:
        return update_any<Rule, kVariant, double>(c.row, c.grad, c.begin, c.count, layout,
                                                  prepared);
      default:
        return update_any<Rule, kVariant, float>(c.row, c.grad, c.begin, c.count, layout, prepared);
    }
  }
}

}  // namespace fusedopt::cuda
