// strength/2 * sum_i F_i (theta_i - anchor_i)^2 and its gradient (Kirkpatrick et al. 2017, eq. 3), per element.
#pragma once

#include "math/inline.h"

namespace limpet::math {

template <class V>
struct QuadraticTerm {
  V weighted;  // F (theta - anchor): the gradient, but for the strength
  V value;     // F (theta - anchor)^2: the penalty, but for strength / 2
};

// V: a float, a double, or a vector of them.
template <class V>
LIMPET_FORMULA QuadraticTerm<V> quadratic_term(const V& theta, const V& anchor, const V& importance) {
  const V difference = theta - anchor;
  const V weighted = importance * difference;
  return {weighted, weighted * difference};
}

}  // namespace limpet::math
