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
// https://arxiv.org/abs/1711.05101; Reddi et al., AMSGrad,
// https://openreview.net/forum?id=ryQu7f-RZ.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

struct AdamW {
  static constexpr const char* kName = "adamw";
  static constexpr const char* kHyperNames[] = {
      "lr", "betas[2]", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"};
  static constexpr Range kHyperRanges[] = {Range::kReal,        Range::kUnit,   Range::kNonNegative,
                                           Range::kNonNegative, Range::kSwitch, Range::kSwitch};
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool kHasStep = true;
  static constexpr int kVariants = 4;  // amsgrad + 2 coupled

  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay;
  };

  static bool is_coupled(const Hyper& h) {
    return h.decoupled_weight_decay == 0 && h.weight_decay != 0;
  }
  static int variant(const Hyper& h) { return (h.amsgrad != 0) + 2 * is_coupled(h); }
  FUSEDOPT_FN static constexpr int states(int variant) { return variant % 2 ? 3 : 2; }

  template <class T>
  struct Scalars {
    T decay;  // what decoupled weight decay leaves of the param
    T l2;     // weight decay in the gradient
    T one_minus_beta1;
    T beta2;
    T one_minus_beta2;
    T one_minus_beta2_high, one_minus_beta2_low;  // the same as a float and the rest
    T step_size;                                  // lr sqrt(1 - beta2^t) / (1 - beta1^t)
    T eps;                                        // eps sqrt(1 - beta2^t)
  };

  // Both bias corrections are taken off the elements:
  //   lr (m / c1) / (sqrt(v / c2) + eps) = (lr sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)).
  FUSEDOPT_FN static Scalars<double> prepare(const Hyper& h, double step, bool /*first*/) {
    const DoubleDouble correction1 = one_minus_power(h.beta1, step);
    const DoubleDouble sqrt_correction2 = square_root(one_minus_power(h.beta2, step));
    const double one_minus_beta2 = 1.0 - h.beta2, high = static_cast<float>(one_minus_beta2);
    return {static_cast<double>(DoubleDouble(1) - exact_product(h.lr, h.weight_decay)),
            h.weight_decay,
            1.0 - h.beta1,
            h.beta2,
            one_minus_beta2,
            high,
            one_minus_beta2 - high,
            static_cast<double>(sqrt_correction2 * h.lr / correction1),
            static_cast<double>(sqrt_correction2 * h.eps)};
  }

  template <int kVariant, class T>
  FUSEDOPT_FN static void update(T& param, T grad, T* state, const Scalars<T>& s) {
    constexpr bool kAmsgrad = kVariant % 2, kCoupled = kVariant / 2;
    // Weight decay: into the gradient, or off the param.
    if constexpr (kCoupled) {
      grad = fma(s.l2, param, grad);
    } else {
      param = param * s.decay;
    }
    // First moment.
    const T exp_avg = fma(s.one_minus_beta1, grad - state[0], state[0]);
    state[0] = exp_avg;
    // Second moment.
    const T weighted = (kCoupled ? s.one_minus_beta2_high : s.one_minus_beta2) * grad;
    T rest = s.beta2 * state[1];
    if constexpr (kCoupled) {
      // The square doubles the rounding of the decayed gradient. The rounding of (1 - beta2) g is
      // given back, so that 3 ULP still hold; not where it would overflow against the square.
      const T lost = fma(s.one_minus_beta2_low, grad, fma(s.one_minus_beta2_high, grad, -weighted));
      const T limit = static_cast<T>(1e18);
      rest = fma(lost, grad > limit || grad < -limit ? T(0) : grad, rest);
    }
    T second = fma(weighted, grad, rest);
    state[1] = second;
    if constexpr (kAmsgrad) {
      // As torch.maximum: a NaN on either side stays.
      second = (state[2] > second || state[2] != state[2]) ? state[2] : second;
      state[2] = second;
    }
    // One square root and one division are left per element.
    param = fma(-s.step_size, exp_avg / (square_root(second) + s.eps), param);
  }
};

}  // namespace fusedopt
