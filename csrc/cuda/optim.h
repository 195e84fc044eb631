// Optimizer steps over all tensors of a call on a CUDA device. Plain C++: no CUDA header is needed to call it.
//
// Every function only launches on `stream` (a cudaStream_t) of `device`: it allocates nothing, never waits for the
// device, and can be captured into a CUDA graph. The same inputs give the same bits. Arrays, step counts and scalars
// lie on the device. Throws std::runtime_error when CUDA refuses a launch. theta is f32, bf16 or f16 with anchor and
// importance each any of these, or all three are f64.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "optim_tensor.h"

namespace limpet::cuda {

// Numbers that only the device knows, as a learning rate in a captured graph; null where the options hold them.
struct DeviceScalars {
  const double* lr;         // []: instead of the options' learning rate
  const float* grad_scale;  // []: divides the options' factor of the gradient
  const float* found_inf;   // []: where it is not zero, nothing happens
};

void adamw_step(const OptimTensor* tensors, int count, const AdamWOptions& options, const DeviceScalars& scalars,
                int device, void* stream);
void sgd_step(const OptimTensor* tensors, int count, const SgdOptions& options, const DeviceScalars& scalars,
              int device, void* stream);

}  // namespace limpet::cuda
