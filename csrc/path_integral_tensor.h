// What the path integral kernels of every device take.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace limpet {

// One parameter of a model: contiguous arrays of `numel` elements each, aligned to their elements.
struct PathIntegralTensor {
  void* integral;          // [numel] float32, float64 where theta is; added to
  void* previous;          // [numel] theta_dtype; becomes theta
  const void* theta;       // [numel] theta_dtype
  const void* grad;        // [numel] theta_dtype
  const void* anchor;      // [numel] anchor_dtype; null where the gradient holds no penalty
  const void* importance;  // [numel] importance_dtype; null where the gradient holds no penalty
  std::int64_t numel;
  Dtype theta_dtype, anchor_dtype, importance_dtype;
};

}  // namespace limpet
