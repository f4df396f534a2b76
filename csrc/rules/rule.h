// The contract of a rule: the maths of one element, and nothing else.
//
// A rule knows no memory, no dtype and no thread; drivers load, store, clip, unscale and skip. The
// same header is compiled into the CPU and the CUDA driver. To add an optimizer, write a struct
// like AdamW (adamw.h), and add it to registry.h:
//
// clang-format off
//   struct MyRule {
//     static constexpr const char* kName;            // as the Python class names it
//     static constexpr const char* kHyperNames[];    // keys of the param group; "betas[2]": a pair
//     static constexpr const char* kStateNames[];    // keys of the state, at most kMaxStates
//     static constexpr bool kHasStep;                // whether the state has a step count
//     static constexpr Range kHyperRanges[];         // what each of them may be
//     struct Hyper { double lr, ...; };              // in the order of kHyperNames, lr first
//     static constexpr int kVariants;                // loops that are compiled apart
//     static int variant(const Hyper&);              // which one, from 0 to kVariants - 1
//     // FUSEDOPT_FN: run by a GPU, too
//     FUSEDOPT_FN static constexpr int states(int variant);  // how many states it uses
//     template <class T> struct Scalars { T ...; };  // what each element uses; members of T alone
//     FUSEDOPT_FN static Scalars<double> prepare(const Hyper&, double step, bool first);  // a tensor
//     template <int kVariant, class T>               // one element, in registers
//     FUSEDOPT_FN static void update(T& param, T grad, T* state, const Scalars<T>&);
//   };
// clang-format on
//
// T is float, or double for float64 params. `step` counts from 1; `first` says that the state was
// created for this step. Use fma() where a fused multiply-add is meant: contraction is switched
// off, so that CPU and CUDA agree bit for bit. Switch a term off by choosing its operand,
// select(on, param, 0): multiplying with zero would make a NaN of an infinity, and a choice between
// two computed values keeps g++ from vectorising the loop.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/double_double.h"
#include "core/dtype.h"

namespace fusedopt {

// What a hyperparameter may be: any number but NaN; >= 0; in [0, 1); a switch, where None is off.
enum class Range : uint8_t { kReal, kNonNegative, kUnit, kSwitch };

FUSEDOPT_FN float fma(float a, float b, float c) { return fmaf(a, b, c); }
FUSEDOPT_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }
FUSEDOPT_FN float square_root(float x) { return sqrtf(x); }
FUSEDOPT_FN double square_root(double x) { return ::sqrt(x); }

// A switch of type T, 1 or 0: a comparison in the width of the data vectorises, a bool does not.
template <class T>
FUSEDOPT_FN T select(T on, T yes, T no) {
  return on != T(0) ? yes : no;
}

}  // namespace fusedopt
