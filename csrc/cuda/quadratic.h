// The quadratic penalty over all tensors of a model on a CUDA device. Plain C++: no CUDA header is needed to call it.
//
// Every function only launches on `stream` (a cudaStream_t) of `device`: it allocates nothing, never waits for the
// device, and can be captured into a CUDA graph. The same inputs give the same bits. Throws std::runtime_error when
// CUDA refuses a launch or a dtype is not supported: theta is f32, bf16 or f16 with anchor and importance each any of
// these or a narrow format, or all three are f64. `grad` has theta's dtype.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "quadratic_tensor.h"

namespace limpet::cuda {

// Bytes of device memory, aligned to 8, in which quadratic_value and quadratic_add_grad keep partial sums.
std::int64_t quadratic_workspace_bytes(const QuadraticTensor* tensors, int count);

// value = strength / 2 * sum_i F_i (theta_i - anchor_i)^2, summed in float64.
void quadratic_value(const QuadraticTensor* tensors, int count, double strength,
                     void* value,  // [] value_dtype: f32 or f64, on the device
                     Dtype value_dtype, void* workspace, int device, void* stream);

// The same, and grad_i += strength * F_i (theta_i - anchor_i).
void quadratic_add_grad(const QuadraticTensor* tensors, int count, double strength,
                        void* value,  // [] value_dtype: f32 or f64, on the device
                        Dtype value_dtype, void* workspace, int device, void* stream);

// grad_i = scale * strength * F_i (theta_i - anchor_i): the backward of the value.
void quadratic_grad(const QuadraticTensor* tensors, int count, double strength,
                    const void* scale,  // [] scale_dtype: f32 or f64, on the device
                    Dtype scale_dtype, int device, void* stream);

}  // namespace limpet::cuda
