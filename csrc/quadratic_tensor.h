// What the quadratic kernels of every device take.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace limpet {

// How anchors and importances are stored: a Dtype's value where they are plain, or one of math/narrow.h.
enum class Storage : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, log8 = 4, fixed16 = 5, split24 = 6 };

// Stand for the narrow formats where a type is asked for.
struct Log8 {};
struct Fixed16 {};
struct Split24 {};

// One parameter of a model: contiguous arrays of `numel` elements each, aligned to their elements.
struct QuadraticTensor {
  const void* theta;       // [numel] theta_dtype
  void* grad;              // [numel] theta_dtype; not touched where only the value is wanted
  const void* anchor;      // [numel] in anchor_storage: a plain type, fixed16 or split24
  const void* importance;  // [numel] in importance_storage: a plain type or log8
  std::int64_t numel;
  Dtype theta_dtype;
  Storage anchor_storage, importance_storage;
};

// What a pass over the tensors does with `grad`.
enum class QuadraticGrad : int { none = 0, add = 1, write = 2 };

}  // namespace limpet
