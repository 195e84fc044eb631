// sum_n G_n^2 with G_n = sum_t d[n,t,:]^T a[n,t,:], the diagonal of the empirical Fisher (Kunstner et al. 2019, eq. 3).
#pragma once

#include "math/inline.h"

namespace limpet::math {

// V: a float, a double, or a vector of them.
template <class V>
LIMPET_FORMULA void add_square(V& sum, const V& gradient) {
  sum += gradient * gradient;
}

}  // namespace limpet::math
