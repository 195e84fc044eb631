// Storage types on the device: their conversions, and loads and stores of several elements at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace limpet::cuda {
namespace {

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}

__device__ __forceinline__ void narrow(float x, float* to) {
  *to = x;
}
__device__ __forceinline__ void narrow(double x, double* to) {
  *to = x;
}
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void narrow(float x, __half* to) {
  *to = __float2half_rn(x);
}

// `width` elements that are read and written by as few instructions as there are: 16 bytes each where they fill them.
template <class Stored, int width>
struct alignas(sizeof(Stored) * width < 16 ? sizeof(Stored) * width : 16) Pack {
  Stored element[width];
};

}  // namespace
}  // namespace limpet::cuda
