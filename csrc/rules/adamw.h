// Adam and AdamW.
//
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2            (amsgrad: the largest v so far is used below)
//   p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Weight decay is decoupled, p = p (1 - lr weight_decay) before the update (AdamW), or added to the
// gradient, g = g + weight_decay p (Adam).
//
// Kingma and Ba, Adam, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, AdamW,
// https://arxiv.org/abs/1711.05101; Reddi et al., AMSGrad, https://openreview.net/forum?id=ryQu7f-RZ.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct AdamW {
  static constexpr const char* kName = "adamw";
  static constexpr const char* kHyperNames[] = {"lr",           "betas[2]", "eps",
                                                "weight_decay", "amsgrad",  "decoupled_weight_decay"};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kHasStep = true;
  static constexpr int kMinStates = 2;

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay;
  };

  static int states(const Hyper& h) { return h.amsgrad != 0 ? 3 : 2; }

  template <class T>
  struct Scalars {
    T decay;            // what decoupled weight decay leaves of the param
    T l2;               // weight decay in the gradient
    T one_minus_beta1;
    T beta2;
    T one_minus_beta2;
    T step_size;        // lr / (1 - beta1^t)
    T inv_sqrt_correction2;
    T eps;
    T coupled;          // switch: weight decay goes into the gradient
  };

  // Bias corrections are taken in double: 1 - 0.999 in float is off by 2e-5 of itself.
  template <class T>
  static Scalars<T> prepare(const Hyper& h, double step, bool /*first*/) {
    const bool coupled = h.decoupled_weight_decay == 0 && h.weight_decay != 0;
    const double correction1 = 1.0 - std::pow(h.beta1, step);
    const double correction2 = 1.0 - std::pow(h.beta2, step);
    return {static_cast<T>(coupled ? 1.0 : 1.0 - h.lr * h.weight_decay),
            static_cast<T>(h.weight_decay),
            static_cast<T>(1.0 - h.beta1),
            static_cast<T>(h.beta2),
            static_cast<T>(1.0 - h.beta2),
            static_cast<T>(h.lr / correction1),
            static_cast<T>(1.0 / std::sqrt(correction2)),
            static_cast<T>(h.eps),
            static_cast<T>(coupled)};
  }

  template <int kStates, class T>
  FUSEDOPT_FN static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    // Weight decay: into the gradient, or off the param.
    grad = fma(s.l2, select(s.coupled, param, T(0)), grad);
    const T decayed = param * s.decay;
    // First and second moment.
    const T exp_avg = fma(s.one_minus_beta1, grad - state[0], state[0]);
    const T exp_avg_sq = fma(s.one_minus_beta2 * grad, grad, s.beta2 * state[1]);
    state[0] = exp_avg;
    state[1] = exp_avg_sq;
    T second = exp_avg_sq;
    if constexpr (kStates == 3) {
      // As torch.maximum: a NaN on either side stays.
      second = (state[2] > exp_avg_sq || state[2] != state[2]) ? state[2] : exp_avg_sq;
      state[2] = second;
    }
    // One square root and one division are left per element.
    const T denom = fma(square_root(second), s.inv_sqrt_correction2, s.eps);
    param = fma(-s.step_size, exp_avg / denom, decayed);
  }
};

}  // namespace fusedopt
