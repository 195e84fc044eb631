// What the quadratic kernels of every device take.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace limpet {

// One parameter of a model: contiguous arrays of `numel` elements each, aligned to their elements.
struct QuadraticTensor {
  const void* theta;       // [numel] theta_dtype
  void* grad;              // [numel] theta_dtype; not touched where only the value is wanted
  const void* anchor;      // [numel] anchor_dtype
  const void* importance;  // [numel] importance_dtype
  std::int64_t numel;
  Dtype theta_dtype, anchor_dtype, importance_dtype;
};

// What a pass over the tensors does with `grad`.
enum class QuadraticGrad : int { none = 0, add = 1, write = 2 };

}  // namespace limpet
