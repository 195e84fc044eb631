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

inline std::int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return 4;
    case Dtype::f64: return 8;
    case Dtype::bf16:
    case Dtype::f16: return 2;
  }
  return 0;
}

}  // namespace limpet
