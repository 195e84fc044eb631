// Keys by which a reservoir chooses: of each group it keeps the items with the smallest.
//
// A key is a 63-bit integer: the item's random bits themselves, or, where items have weights, the bits of a positive
// float64 exponential of rate `weight` (Efraimidis and Spirakis 2006), which are ordered as the numbers are. Only
// operations that IEEE 754 rounds in one way are used, one by one: keys are the same on every device.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/inline.h"

namespace limpet::math {

constexpr std::int64_t kMostBits = 0x7FFFFFFFFFFFFFFF;
constexpr std::int64_t kInfinity = 0x7FF0000000000000;  // the bits of one
constexpr std::int64_t kOne = 0x3FF0000000000000, kRootHalf = 0x3FE6A09E667F3BCD, kFraction = 0x000FFFFFFFFFFFFF;
constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
constexpr double kLog[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                           2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                           1.479819860511658591e-01};  // FreeBSD's log

template <class To, class From>
LIMPET_FORMULA To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// -log(1 - bits / 2^63): standard exponential, to the last places both near 0 and far out. Vectors or single numbers;
// `real` converts Int to Real.
template <class Real, class Int, class Convert>
LIMPET_FORMULA Real exponential(const Int& bits, const Convert& real) {
  // 1 - u = 2^exponent (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); where u is small, f is -u itself.
  const Real rest = (real(kMostBits - bits) + 1.0) * 0x1p-63;
  const Int shifted = same_bits<Int>(rest) + (kOne - kRootHalf);
  const Real mantissa = same_bits<Real>(static_cast<Int>((shifted & kFraction) + kRootHalf));
  const auto small = bits < (1ll << 61);
  const Real f = small ? real(bits) * -0x1p-63 : mantissa - 1.0;
  const Real exponent = small ? real(bits) * 0.0 : real((shifted >> 52) - 1023);
  const Real half_square = 0.5 * f * f, s = f / (2.0 + f), z = s * s, w = z * z;
  const Real odd = z * (kLog[0] + w * (kLog[2] + w * (kLog[4] + w * kLog[6])));
  const Real even = w * (kLog[1] + w * (kLog[3] + w * kLog[5]));
  const Real log = s * (half_square + (even + odd)) + exponent * kLn2Low - half_square + f + exponent * kLn2High;
  return 0.0 - log;
}

// The key of an item of this weight, at least 0. Weight 0 is the limit of ever smaller ones: behind all other items,
// among each other uniform.
template <class Real, class Int, class Convert>
LIMPET_FORMULA Int weighted_key(const Int& bits, const Real& weight, const Convert& real) {
  const Int key = same_bits<Int>(static_cast<Real>(exponential<Real>(bits, real) / weight));
  return weight > 0.0 ? key : kInfinity + (bits >> 11);
}

}  // namespace limpet::math
