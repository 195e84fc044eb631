// Element types as they are stored, and their codes as Python passes them.
#pragma once

#include <cstdint>

namespace limpet {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

// The type a stored element is computed in.
template <class Stored>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class Stored>
using Compute = typename ComputeOf<Stored>::type;

}  // namespace limpet
