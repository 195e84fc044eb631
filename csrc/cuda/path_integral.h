// One step of Synaptic Intelligence's path integrals over all tensors of a model on a CUDA device. Plain C++.
#pragma once

#include "path_integral_tensor.h"

namespace limpet::cuda {

// integral -= (grad - strength F (previous - anchor)) (theta - previous) where theta moved; previous = theta.
//
// Only launches on `stream` (a cudaStream_t) of `device`: it allocates nothing there, never waits for the device, and
// can be captured into a CUDA graph. The same inputs give the same bits. Throws std::runtime_error when CUDA refuses a
// launch or a dtype is not supported: theta is f32, bf16 or f16 with anchor and importance each any of these, or all
// three are f64. All tensors have an anchor and an importance, or none has.
void path_integral(const PathIntegralTensor* tensors, int count, double strength, int device, void* stream);

}  // namespace limpet::cuda
