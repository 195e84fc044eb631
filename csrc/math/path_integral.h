// One optimizer step's share of Synaptic Intelligence's path integral (Zenke et al. 2017, eq. 3), per element.
#pragma once

#include "math/inline.h"
#include "math/quadratic.h"

namespace limpet::math {

// The loss's own gradient at `theta`, where `grad` also holds that of strength / 2 * F (theta - anchor)^2.
// V: a float, a double, or a vector of them.
template <class V>
LIMPET_FORMULA V without_penalty(const V& grad, const V& theta, const V& anchor, const V& importance,
                                 const V& strength) {
  return grad - strength * quadratic_term<V>(theta, anchor, importance).weighted;
}

// integral - grad (theta - previous). What did not move adds nothing: its gradient is replaced by zero, since a product
// would let the NaN of a skipped step through.
template <class V>
LIMPET_FORMULA V path_integral(const V& integral, const V& theta, const V& previous, const V& grad) {
  const V zero{};
  const V moved = theta - previous;
  return integral - (moved == zero ? zero : grad) * moved;
}

}  // namespace limpet::math
