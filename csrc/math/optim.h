// One step of AdamW (Loshchilov and Hutter 2019) and of SGD with momentum, and its share of the path integral of
// Synaptic Intelligence (Zenke et al. 2017, eq. 3), per element. The order of operations is that of torch's fused
// steps.
//
// V: a float, a double, or a vector of them; S: its scalar.
#pragma once

#include "math/inline.h"

namespace limpet::math {

template <class S>
struct AdamW {
  S keep;           // 1 - lr * weight_decay
  S lerp;           // 1 - beta1, or -beta1 from_grad
  bool from_grad;   // the mean is taken from the gradient's end where that is nearer, and so exact where beta1 is 0
  S beta2, square;  // square: 1 - beta2
  // sqrt(1 - beta2^t) is multiplied into these two, not divided by at each element: divisions are what a step waits
  // for.
  S eps;
  S step;  // -lr / (1 - beta1^t)
};

// beta1_power, correction: beta1^t and sqrt(1 - beta2^t), t the number of this step, from 1.
template <class S>
LIMPET_FORMULA AdamW<S> adamw_settings(double lr, double weight_decay, double beta1, double beta2, double eps,
                                       double beta1_power, double correction) {
  const bool from_grad = beta1 <= 0.5;
  return {static_cast<S>(1 - lr * weight_decay),
          static_cast<S>(from_grad ? -beta1 : 1 - beta1),
          from_grad,
          static_cast<S>(beta2),
          static_cast<S>(1 - beta2),
          static_cast<S>(eps * correction),
          static_cast<S>(-lr * correction / (1 - beta1_power))};
}

// The parameter after the step; `first`, `second` and, with AMSGrad, `largest` move on. root(V) is the square root.
template <bool amsgrad, class V, class S, class Root>
LIMPET_FORMULA V adamw_step(const V& theta, const V& grad, V& first, V& second, V& largest, const AdamW<S>& with,
                            const Root& root) {
  const V nearer = with.from_grad ? grad : first;
  first = nearer + with.lerp * (grad - first);
  second = with.beta2 * second + with.square * grad * grad;
  if constexpr (amsgrad) largest = second <= largest ? largest : second;
  return with.keep * theta + with.step * first / (root(amsgrad ? largest : second) + with.eps);
}

template <class S>
struct Sgd {
  S weight_decay;
  S momentum, fresh;         // the buffer is momentum * buffer + fresh * gradient; fresh: 1 - dampening
  S from_grad, from_buffer;  // and the step follows from_grad * gradient + from_buffer * buffer
  bool first_step;
  S step;  // -lr
};

template <class S>
LIMPET_FORMULA Sgd<S> sgd_settings(double lr, double weight_decay, double momentum, double dampening, bool nesterov,
                                   bool first_step) {
  return {static_cast<S>(weight_decay),
          static_cast<S>(momentum),
          static_cast<S>(first_step ? 1 : 1 - dampening),
          static_cast<S>(nesterov ? 1 : 0),
          static_cast<S>(nesterov ? momentum : 1),
          first_step,
          static_cast<S>(-lr)};
}

// The parameter after the step; `buffer`, where there is momentum, moves on.
template <bool has_momentum, class V, class S>
LIMPET_FORMULA V sgd_step(const V& theta, const V& grad, V& buffer, const Sgd<S>& with) {
  V direction = grad + with.weight_decay * theta;
  if constexpr (has_momentum) {
    buffer = with.momentum * (with.first_step ? V{} : buffer) + with.fresh * direction;
    direction = with.from_grad * direction + with.from_buffer * buffer;
  }
  return theta + with.step * direction;
}

// What the step from `before` to `after` adds to the path integral. A parameter that did not move adds nothing, even
// where its gradient is NaN.
template <class V>
LIMPET_FORMULA V path_share(const V& task_grad, const V& before, const V& after) {
  const V moved = after - before;
  return moved == 0 ? V{} : -task_grad * moved;
}

}  // namespace limpet::math
