// Formats narrower than 16-bit floats in which a quadratic's importances and anchors are stored, per element.
//
// log8: importances, 8 bits. A block's largest value, cut to bfloat16, is its top; a code lies (255 - code)^2 * 2^12
//   below it on the scale of float32's bits, which is a logarithm in straight pieces. Code 0 is 0. The steps are finest
//   at the top, whose values make nearly all of a penalty's gradient, and reach 31.5 octaves down.
// fixed16: anchors, 16 bits. A signed integer times the block's scale, a bfloat16: 15 bits times 8, exact in float32.
// split24: anchors, 16 + 8 bits. The upper 24 bits of the float32: a bfloat16, and 8 more bits of the mantissa.
//
// In memory: all codes (or bfloat16s), zeros up to a multiple of 16 bytes, then the blocks' bfloat16s (or the 8 bits).
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace limpet::math {

constexpr std::int64_t kNarrowBlock = 1024;  // elements that share a top or a scale

LIMPET_FORMULA std::int64_t narrow_padded(std::int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// U: a 32-bit unsigned integer, or a vector of them. Each returns the bits of a float32.
template <class U>
LIMPET_FORMULA U log8_bits(const U& code, const U& top) {
  const U depth = 255u - code;
  return code != 0u ? top - (depth * depth << 12) : code;
}

template <class U>
LIMPET_FORMULA U split24_bits(const U& high, const U& low) {
  return high << 16 | low << 8;
}

}  // namespace limpet::math
