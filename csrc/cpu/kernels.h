// The loops of the CPU driver, compiled once per instruction-set level (level_*.cpp includes this
// file inside an anonymous namespace, under that level's target options).
//
// Nothing here may have external linkage or instantiate a standard-library template: the linker
// would keep one level's copy for all.

// Widens, narrows and walks blocks of this many elements: five operands of double fit in 24 KiB.
constexpr int kBlock = 512;

// Vectors of float16 that the instruction set converts at once; no compiler finds these
// instructions in a loop over integers. Same results as widen() and narrow(), but for the payload
// of a NaN.
#if defined(FUSEDOPT_AVX512)
constexpr int kHalves = 16;
inline __attribute__((always_inline)) void widen_halves(const float16* from, float* to) {
  __m256i bits;
  memcpy(&bits, from, sizeof bits);
  _mm512_storeu_ps(to, _mm512_cvtph_ps(bits));
}
inline __attribute__((always_inline)) void narrow_halves(const float* from, float16* to) {
  const __m256i bits = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &bits, sizeof bits);
}
#elif defined(FUSEDOPT_F16C)
constexpr int kHalves = 8;
inline __attribute__((always_inline)) void widen_halves(const float16* from, float* to) {
  __m128i bits;
  memcpy(&bits, from, sizeof bits);
  _mm256_storeu_ps(to, _mm256_cvtph_ps(bits));
}
inline __attribute__((always_inline)) void narrow_halves(const float* from, float16* to) {
  const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &bits, sizeof bits);
}
#elif defined(__aarch64__)
constexpr int kHalves = 4;
inline __attribute__((always_inline)) void widen_halves(const float16* from, float* to) {
  float16x4_t bits;
  memcpy(&bits, from, sizeof bits);
  vst1q_f32(to, vcvt_f32_f16(bits));
}
inline __attribute__((always_inline)) void narrow_halves(const float* from, float16* to) {
  const float16x4_t bits = vcvt_f16_f32(vld1q_f32(from));
  memcpy(to, &bits, sizeof bits);
}
#else
constexpr int kHalves = 0;  // element by element
inline void widen_halves(const float16*, float*) {}
inline void narrow_halves(const float*, float16*) {}
#endif

template <class T, class From>
void load_run(const From* __restrict from, int64_t stride, T* __restrict to, int count) {
  if (stride == 1) {
    int i = 0;
    if constexpr (kHalves > 0 && std::is_same_v<From, float16> && std::is_same_v<T, float>)
      for (; i + kHalves <= count; i += kHalves) widen_halves(from + i, to + i);
    for (; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
  } else {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
  }
}

template <class T, class To>
void store_run(const T* __restrict from, To* __restrict to, int64_t stride, int count) {
  if (stride == 1) {
    int i = 0;
    if constexpr (kHalves > 0 && std::is_same_v<To, float16> && std::is_same_v<T, float>)
      for (; i + kHalves <= count; i += kHalves) narrow_halves(from + i, to + i);
    for (; i < count; ++i) narrow(from[i], to + i);
  } else {
    for (int i = 0; i < count; ++i) narrow(from[i], to + i * stride);
  }
}

// Calls f(pointer, dtype tag) with the pointer cast to its storage type.
template <class F>
inline __attribute__((always_inline)) void with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(data));
    case DType::kFloat64:
      return f(static_cast<double*>(data));
    case DType::kBFloat16:
      return f(static_cast<bfloat16*>(data));
    case DType::kFloat16:
      return f(static_cast<float16*>(data));
  }
}

// Walks elements [begin, begin + count) of one operand in the row's order and calls
// f(offset of the run in elements, its stride, index of its first element, its length).
template <class F>
void for_runs(const Layout& layout, int operand, int64_t begin, int count, F f) {
  const int inner = layout.ndim - 1;
  const int64_t* stride = layout.stride[operand];
  int64_t position[kMaxDims];
  int64_t offset = 0;
  int64_t rest = begin;
  for (int d = inner; d >= 0; --d) {
    position[d] = rest % layout.size[d];
    rest /= layout.size[d];
    offset += position[d] * stride[d];
  }
  for (int done = 0; done < count;) {
    const int64_t left = layout.size[inner] - position[inner];
    const int run = static_cast<int>(left < count - done ? left : count - done);
    f(offset, stride[inner], done, run);
    done += run;
    position[inner] += run;
    offset += run * stride[inner];
    for (int d = inner; d > 0 && position[d] == layout.size[d]; --d) {
      offset -= position[d] * stride[d];
      position[d] = 0;
      position[d - 1] += 1;
      offset += stride[d - 1];
    }
  }
}

template <class T>
void load_block(const Row& row, const Layout* layout, int operand, int64_t begin, int count,
                T* to) {
  with_type(row.dtype[operand], row.data[operand], [&](auto* data) {
    if (layout == nullptr) return load_run(data + begin, 1, to, count);
    for_runs(*layout, operand, begin, count, [&](int64_t offset, int64_t stride, int at, int run) {
      load_run(data + offset, stride, to + at, run);
    });
  });
}

template <class T>
void store_block(const Row& row, const Layout* layout, int operand, int64_t begin, int count,
                 const T* from) {
  with_type(row.dtype[operand], row.data[operand], [&](auto* data) {
    if (layout == nullptr) return store_run(from, data + begin, 1, count);
    for_runs(*layout, operand, begin, count, [&](int64_t offset, int64_t stride, int at, int run) {
      store_run(from + at, data + offset, stride, run);
    });
  });
}

// The loop: load, transform the gradient, update, store. The compiler vectorises it; the pointers
// are distinct by the table's contract.
template <class Rule, int kVariant, class T, class P, class G, class S>
void update_run(P* __restrict param, const G* __restrict grad, S* const* states, int64_t count,
                T factor, const typename Rule::template Scalars<T>& scalars) {
  constexpr int kStates = Rule::states(kVariant);
  const typename Rule::template Scalars<T> s = scalars;
  S* __restrict s0 = kStates > 0 ? states[0] : nullptr;
  S* __restrict s1 = kStates > 1 ? states[1] : nullptr;
  S* __restrict s2 = kStates > 2 ? states[2] : nullptr;
#if defined(__clang__)
#pragma clang loop vectorize(enable)
#elif defined(__GNUC__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < count; ++i) {
    T p = widen(param[i]);
    const T g = widen(grad[i]) * factor;
    T state[kMaxStates];
    if constexpr (kStates > 0) state[0] = widen(s0[i]);
    if constexpr (kStates > 1) state[1] = widen(s1[i]);
    if constexpr (kStates > 2) state[2] = widen(s2[i]);
    Rule::template update<kVariant>(p, g, state, s);
    narrow(p, param + i);
    if constexpr (kStates > 0) narrow(state[0], s0 + i);
    if constexpr (kStates > 1) narrow(state[1], s1 + i);
    if constexpr (kStates > 2) narrow(state[2], s2 + i);
  }
}

// The same loop over pairs of bfloat16, which lie at any even address.
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif
typedef uint32_t __attribute__((aligned(2), may_alias)) Word;

template <class Rule, int kVariant>
void update_run_of_pairs(bfloat16* param, const bfloat16* grad, bfloat16* const* states,
                         int64_t count, float factor,
                         const typename Rule::template Scalars<float>& scalars) {
  constexpr int kStates = Rule::states(kVariant);
  const typename Rule::template Scalars<float> s = scalars;
  Word* __restrict p = reinterpret_cast<Word*>(param);
  const Word* __restrict g = reinterpret_cast<const Word*>(grad);
  Word* __restrict s0 = reinterpret_cast<Word*>(kStates > 0 ? states[0] : nullptr);
  Word* __restrict s1 = reinterpret_cast<Word*>(kStates > 1 ? states[1] : nullptr);
  Word* __restrict s2 = reinterpret_cast<Word*>(kStates > 2 ? states[2] : nullptr);
  const int64_t pairs = count / 2;
#if defined(__clang__)
#pragma clang loop vectorize(enable)
#elif defined(__GNUC__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < pairs; ++i) {
    FloatPair x = widen_pair(p[i]);
    const FloatPair gradient = widen_pair(g[i]);
    FloatPair state[kMaxStates];
    if constexpr (kStates > 0) state[0] = widen_pair(s0[i]);
    if constexpr (kStates > 1) state[1] = widen_pair(s1[i]);
    if constexpr (kStates > 2) state[2] = widen_pair(s2[i]);
    float first[kMaxStates] = {state[0].first, state[1].first, state[2].first};
    float second[kMaxStates] = {state[0].second, state[1].second, state[2].second};
    Rule::template update<kVariant>(x.first, gradient.first * factor, first, s);
    Rule::template update<kVariant>(x.second, gradient.second * factor, second, s);
    p[i] = narrow_pair(x);
    if constexpr (kStates > 0) s0[i] = narrow_pair({first[0], second[0]});
    if constexpr (kStates > 1) s1[i] = narrow_pair({first[1], second[1]});
    if constexpr (kStates > 2) s2[i] = narrow_pair({first[2], second[2]});
  }
  if (count % 2 == 0) return;
  bfloat16* last[kMaxStates] = {};
  for (int k = 0; k < kStates; ++k) last[k] = states[k] + count - 1;
  update_run<Rule, kVariant, float>(param + count - 1, grad + count - 1, last, 1, factor, scalars);
}

// The same loop over tiles of float16 that are converted by whole vectors.
constexpr int kTile = 32;
template <class S>
inline __attribute__((always_inline)) void widen_tile(const S* from, float* to) {
  if constexpr (std::is_same_v<S, float16>) {
    for (int i = 0; i < kTile; i += kHalves) widen_halves(from + i, to + i);
  } else {
    memcpy(to, from, sizeof(float) * kTile);
  }
}
template <class S>
inline __attribute__((always_inline)) void narrow_tile(const float* from, S* to) {
  if constexpr (std::is_same_v<S, float16>) {
    for (int i = 0; i < kTile; i += kHalves) narrow_halves(from + i, to + i);
  } else {
    memcpy(to, from, sizeof(float) * kTile);
  }
}

template <class Rule, int kVariant, class S>
void update_run_of_halves(float16* __restrict param, const float16* __restrict grad,
                          S* const* states, int64_t count, float factor,
                          const typename Rule::template Scalars<float>& scalars) {
  constexpr int kStates = Rule::states(kVariant);
  const typename Rule::template Scalars<float> s = scalars;
  int64_t at = 0;
  for (; at + kTile <= count; at += kTile) {
    alignas(64) float p[kTile], g[kTile], state[kMaxStates][kTile];
    widen_tile(param + at, p);
    widen_tile(grad + at, g);
    for (int k = 0; k < kStates; ++k) widen_tile(states[k] + at, state[k]);
    for (int i = 0; i < kTile; ++i) {
      float x = p[i], values[kMaxStates];
      for (int k = 0; k < kStates; ++k) values[k] = state[k][i];
      Rule::template update<kVariant>(x, g[i] * factor, values, s);
      p[i] = x;
      for (int k = 0; k < kStates; ++k) state[k][i] = values[k];
    }
    narrow_tile(p, param + at);
    for (int k = 0; k < kStates; ++k) narrow_tile(state[k], states[k] + at);
  }
  S* rest[kMaxStates] = {};
  for (int k = 0; k < kStates; ++k) rest[k] = states[k] + at;
  update_run<Rule, kVariant, float>(param + at, grad + at, rest, count - at, factor, scalars);
}

// Any dtypes, any layout, any transform: operand by operand through blocks that stay in L1.
template <class Rule, int kVariant, class T>
void update_blocks(const Row& row, const Layout* layout, int64_t begin, int64_t count,
                   const GradTransform& transform, const ScalarsPair<Rule>& scalars) {
  constexpr int kStates = Rule::states(kVariant);
  alignas(64) T block[kOperands][kBlock];
  T* states[kMaxStates] = {block[kState0], block[kState0 + 1], block[kState0 + 2]};
  const T factor = static_cast<T>(transform.factor);
  const T limit = static_cast<T>(transform.limit);
  for (int64_t at = begin; at < begin + count; at += kBlock) {
    const int n = static_cast<int>(begin + count - at < kBlock ? begin + count - at : kBlock);
    for (int operand = 0; operand < kState0 + kStates; ++operand)
      load_block(row, layout, operand, at, n, block[operand]);
    T* grad = block[kGrad];
    for (int i = 0; i < n; ++i) {  // written so that a NaN passes both comparisons
      const T g = grad[i] * factor;
      const T low = g < -limit ? -limit : g;
      grad[i] = low > limit ? limit : low;
    }
    update_run<Rule, kVariant, T>(block[kParam], block[kGrad], states, n, T(1),
                                  scalars.template get<T>());
    store_block(row, layout, kParam, at, n, block[kParam]);
    for (int operand = kState0; operand < kState0 + kStates; ++operand)
      store_block(row, layout, operand, at, n, block[operand]);
  }
}

template <class Rule, int kVariant, DType kParamDType, DType kStateDType>
void update_fused(const Row& row, int64_t begin, int64_t count, const GradTransform& transform,
                  const ScalarsPair<Rule>& scalars) {
  using P = typename Storage<kParamDType>::type;
  using S = typename Storage<kStateDType>::type;
  using T = decltype(widen(P{}));
  constexpr int kStates = Rule::states(kVariant);
  S* states[kMaxStates] = {};
  for (int k = 0; k < kStates; ++k) states[k] = static_cast<S*>(row.data[kState0 + k]) + begin;
  P* param = static_cast<P*>(row.data[kParam]) + begin;
  const P* grad = static_cast<const P*>(row.data[kGrad]) + begin;
  const T factor = static_cast<T>(transform.factor);
  if constexpr (kPairs && kParamDType == DType::kBFloat16 && kStateDType == kParamDType) {
    update_run_of_pairs<Rule, kVariant>(param, grad, states, count, factor, scalars.f32);
  } else if constexpr (kHalves > 0 && kParamDType == DType::kFloat16) {
    update_run_of_halves<Rule, kVariant>(param, grad, states, count, factor, scalars.f32);
  } else {
    update_run<Rule, kVariant, T>(param, grad, states, count, factor, scalars.template get<T>());
  }
}

template <class Rule, int kVariant>
void update_variant(const Row& row, const Layout* layout, int64_t begin, int64_t count,
                    const GradTransform& transform, const ScalarsPair<Rule>& scalars) {
  if (!transform.clamp) {
    switch (row.loop) {
#define FUSEDOPT_CASE(index, P, S) \
  case index:                      \
    return update_fused<Rule, kVariant, P, S>(row, begin, count, transform, scalars);
      FUSEDOPT_FUSED_DTYPES(FUSEDOPT_CASE)
#undef FUSEDOPT_CASE
      default:
        break;
    }
  }
  if (row.loop == kAnyDouble || row.dtype[kParam] == DType::kFloat64)
    return update_blocks<Rule, kVariant, double>(row, layout, begin, count, transform, scalars);
  update_blocks<Rule, kVariant, float>(row, layout, begin, count, transform, scalars);
}

template <class Rule, int kVariant = 0>
void update_chunk(const Row& row, const Layout* layout, int64_t begin, int64_t count,
                  const GradTransform& transform, const void* scalars) {
  if constexpr (kVariant < Rule::kVariants) {
    if (row.variant == kVariant)
      return update_variant<Rule, kVariant>(row, layout, begin, count, transform,
                                            *static_cast<const ScalarsPair<Rule>*>(scalars));
    update_chunk<Rule, kVariant + 1>(row, layout, begin, count, transform, scalars);
  }
}

// Sums of squares in double: exact squares of every 16- and 32-bit value, no overflow, and one
// order of addition on every machine (eight lanes, four accumulators).
constexpr int kLanes = 8;
using f64x8 = double __attribute__((vector_size(64)));
using f32x8 = float __attribute__((vector_size(32)));
using u32x8 = uint32_t __attribute__((vector_size(32)));

inline __attribute__((always_inline)) f64x8 to_double(f32x8 x) {
#if defined(FUSEDOPT_AVX512)
  return (f64x8)_mm512_cvtps_pd((__m256)x);  // g++ would convert halves
#else
  return __builtin_convertvector(x, f64x8);
#endif
}

inline __attribute__((always_inline)) f64x8 square(f64x8 x) { return x * x; }

// Adds the squares of 4 kLanes elements to the four sums; spelled in vectors, because g++ would
// insert lane by lane.
inline __attribute__((always_inline)) void add_squares(const double* from, f64x8* sums) {
  for (int a = 0; a < 4; ++a) {
    f64x8 x;
    memcpy(&x, from + a * kLanes, sizeof x);
    sums[a] += square(x);
  }
}

inline __attribute__((always_inline)) void add_squares(const float* from, f64x8* sums) {
  for (int a = 0; a < 4; ++a) {
    f32x8 x;
    memcpy(&x, from + a * kLanes, sizeof x);
    sums[a] += square(to_double(x));
  }
}

// Pairs again: the first of each to one sum, the second to another.
inline __attribute__((always_inline)) void add_squares(const bfloat16* from, f64x8* sums) {
  for (int a = 0; a < 4; a += 2) {
    u32x8 words;
    memcpy(&words, from + a * kLanes, sizeof words);
    sums[a] += square(to_double((f32x8)(words << 16)));
    sums[a + 1] += square(to_double((f32x8)(words & 0xffff0000u)));
  }
}

inline __attribute__((always_inline)) void add_squares(const float16* from, f64x8* sums) {
  float wide[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) wide[i] = widen(from[i]);
  add_squares(wide, sums);
}

template <class G>
double squares_run(const G* grad, int64_t count) {
  constexpr int kStep = 4 * kLanes;
  f64x8 sums[4] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) add_squares(grad + i, sums);
  const f64x8 all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = ((all[0] + all[1]) + (all[2] + all[3])) + ((all[4] + all[5]) + (all[6] + all[7]));
  for (; i < count; ++i) sum += static_cast<double>(widen(grad[i])) * widen(grad[i]);
  return sum;
}

// Aligned, because 300 tensors of 16 elements took 20 to 28 us by where the linker put it; 23 here.
__attribute__((aligned(64))) double squares_chunk(const Row& row, const Layout* layout,
                                                  int64_t begin, int64_t count) {
  double sum = 0;
  if (layout == nullptr) {
    with_type(row.dtype[kGrad], row.data[kGrad],
              [&](auto* data) { sum = squares_run(data + begin, count); });
    return sum;
  }
  alignas(64) double block[kBlock];
  for (int64_t at = begin; at < begin + count; at += kBlock) {
    const int n = static_cast<int>(begin + count - at < kBlock ? begin + count - at : kBlock);
    load_block(row, layout, kGrad, at, n, block);
    sum += squares_run(block, n);
  }
  return sum;
}

// grad *= coef, for the stand-alone clip functions; grad = clamp(grad, -limit, limit).
void scale_chunk(const Row& row, const Layout* layout, int64_t begin, int64_t count, double coef,
                 double limit) {
  const auto scale = [&](auto zero) {
    using T = decltype(zero);
    alignas(64) T block[kBlock];
    const T factor = static_cast<T>(coef), high = static_cast<T>(limit);
    for (int64_t at = begin; at < begin + count; at += kBlock) {
      const int n = static_cast<int>(begin + count - at < kBlock ? begin + count - at : kBlock);
      load_block(row, layout, kGrad, at, n, block);
      for (int i = 0; i < n; ++i) {
        const T g = block[i] * factor;
        const T low = g < -high ? -high : g;
        block[i] = low > high ? high : low;
      }
      store_block(row, layout, kGrad, at, n, block);
    }
  };
  if (row.dtype[kGrad] == DType::kFloat64) return scale(0.0);
  scale(0.0F);
}
