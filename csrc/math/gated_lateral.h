// The gated lateral connection between two columns, per element: y = x g + h (1 - g), g = sigmoid(z).
//
// S: float or double; V: an S or a vector of them.
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace limpet::math {

template <class S>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = std::uint32_t;
  static constexpr float largest = 86.5f;  // exp of what is beyond is taken for exp of this: 4e37, and 2.7e-38
  static constexpr float round = 12582912.0f + 127.0f;  // adding it leaves the exponent's bits of 2^n in the last ones
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n times the upper part is exact
  static constexpr int mantissa_bits = 23, degree = 7;
};
template <>
struct ExpConstants<double> {
  using Bits = std::uint64_t;
  static constexpr double largest = 708.0;
  static constexpr double round = 6755399441055744.0 + 1023.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int mantissa_bits = 52, degree = 13;
};

// 1 / k!: the truncated series errs by a tenth of a unit in the last place where |x| <= ln(2) / 2.
template <class S>
constexpr S inverse_factorial(int k) {
  double product = 1.0;
  for (int i = 2; i <= k; ++i) product *= i;
  return static_cast<S>(1.0 / product);
}

// sum_{k <= degree} x^k / k!
template <class S, int k, class V>
LIMPET_FORMULA V exp_series(const V& x) {
  if constexpr (k == ExpConstants<S>::degree) {
    constexpr S last = inverse_factorial<S>(k);
    return last + V{};
  } else {
    constexpr S coefficient = inverse_factorial<S>(k);
    return coefficient + x * exp_series<S, k + 1, V>(x);
  }
}

// exp(x), of the largest or the least number that has one in the normal range where x is beyond; NaN stays NaN.
template <class S, class V, class Bits>
LIMPET_FORMULA V exp_bounded(const V& x) {
  using C = ExpConstants<S>;
  constexpr S log2_e = static_cast<S>(1.44269504088896340736);
  const V largest = C::largest + V{}, least = -largest;
  const V above = x < least ? least : x, bounded = above > largest ? largest : above;
  const V shifted = bounded * log2_e + C::round;
  const V n = shifted - C::round;
  const V rest = (bounded - n * C::ln2_high) - n * C::ln2_low;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = bits << C::mantissa_bits;
  V scale;  // 2^n
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return exp_series<S, 0, V>(rest) * scale;
}

template <class V>
struct Gate {
  V open, closed;  // g and 1 - g
};

// Both keep their relative precision, however far the gate is open or closed.
template <class S, class V, class Bits>
LIMPET_FORMULA Gate<V> gate(const V& z) {
  const V e = exp_bounded<S, V, Bits>(-z);
  const V open = static_cast<S>(1) / (static_cast<S>(1) + e);
  return {open, e * open};
}

template <class V>
LIMPET_FORMULA V blend(const V& x, const V& h, const Gate<V>& g) {
  return x * g.open + h * g.closed;
}

template <class V>
struct BlendGrad {
  V x, h, z;  // the gradient at h without what comes through the gate
};

template <class V>
LIMPET_FORMULA BlendGrad<V> blend_grad(const V& grad, const V& x, const V& h, const Gate<V>& g) {
  const V at_x = grad * g.open;
  return {at_x, grad * g.closed, at_x * g.closed * (x - h)};
}

}  // namespace limpet::math
