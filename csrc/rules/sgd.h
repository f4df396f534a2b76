// SGD with momentum, dampening and Nesterov momentum, as torch.optim.SGD.
//
//   g = g + weight_decay p
//   b = momentum b + (1 - dampening) g       (b = g when b is new)
//   p = p - lr b                             (nesterov: p - lr (g + momentum b))
//
// Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kHyperNames[] = {"lr", "momentum", "dampening", "weight_decay",
                                                "nesterov"};
  static constexpr Range kHyperRanges[] = {Range::kReal, Range::kNonNegative, Range::kReal,
                                           Range::kNonNegative, Range::kSwitch};
  static constexpr const char* kStateNames[] = {"momentum_buffer"};
  static constexpr bool kHasStep = false;
  static constexpr int kVariants = 2;  // without and with momentum

  struct Hyper {
    double lr, momentum, dampening, weight_decay, nesterov;
  };

  static int variant(const Hyper& h) { return h.momentum != 0 ? 1 : 0; }
  FUSEDOPT_FN static constexpr int states(int variant) { return variant; }

  template <class T>
  struct Scalars {
    T lr;
    T momentum;
    T one_minus_dampening;
    T weight_decay;
    T has_decay, nesterov, first;  // switches
  };

  FUSEDOPT_FN static Scalars<double> prepare(const Hyper& h, double /*step*/, bool first) {
    return {h.lr,
            h.momentum,
            1.0 - h.dampening,
            h.weight_decay,
            static_cast<double>(h.weight_decay != 0),
            static_cast<double>(h.nesterov != 0),
            static_cast<double>(first)};
  }

  template <int kVariant, class T>
  FUSEDOPT_FN static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    grad = fma(s.weight_decay, select(s.has_decay, param, T(0)), grad);
    if constexpr (kVariant == 1) {
      // Momentum; a new buffer starts as the gradient, undampened.
      const T buffer = fma(s.momentum, select(s.first, T(0), state[0]),
                           select(s.first, grad, s.one_minus_dampening * grad));
      state[0] = buffer;
      grad = fma(s.momentum, select(s.nesterov, buffer, T(0)), select(s.nesterov, grad, buffer));
    }
    param = fma(-s.lr, grad, param);
  }
};

}  // namespace fusedopt
