// What the optimizer kernels of every device take.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace limpet {

// One parameter of a model: contiguous arrays of `numel` elements each, aligned to their elements. What a step does
// without is null: largest without AMSGrad, second and step for SGD, first too where it has no momentum; anchor and
// importance without a quadratic penalty; integral without a path integral. All tensors of a call are alike in this.
struct OptimTensor {
  void* theta;             // [numel] dtype
  const void* grad;        // [numel] dtype
  void* first;             // [numel] dtype: running mean of the gradient, or momentum
  void* second;            // [numel] dtype: running mean of its square
  void* largest;           // [numel] dtype: the largest `second` so far
  const void* anchor;      // [numel] anchor_dtype
  const void* importance;  // [numel] importance_dtype
  void* integral;          // [numel] compute type of dtype
  float* step;             // []: steps taken
  std::int64_t numel;
  Dtype dtype, anchor_dtype, importance_dtype;
};

// What a step adds to an optimizer's own settings.
struct StepOptions {
  double lr, weight_decay;
  double grad_factor;  // 1, or 1 over the gradient scaler's scale; negative to maximize
  double strength;     // of the quadratic penalty
};

struct AdamWOptions : StepOptions {
  double beta1, beta2, eps;
};

struct SgdOptions : StepOptions {
  double momentum, dampening;
  bool nesterov;
  bool first_step;  // momentum starts as the gradient; what `first` holds is not used
};

}  // namespace limpet
