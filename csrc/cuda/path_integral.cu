// Synaptic Intelligence's path integrals over all tensors of a model: one launch for up to Table::capacity of them.
//
// Memory-bound: 24 bytes an element in float32. The table of pointers is a kernel parameter (a parameter may have
// 32,764 bytes since CUDA 12.1, on sm_70 and newer), so nothing is copied to the device first.

#include "cuda/path_integral.h"

#include "cuda/chunks.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "math/path_integral.h"

namespace limpet::cuda {
namespace {

struct Table {
  static constexpr int capacity = 512;  // tensors in one launch
  void* integral[capacity];
  void* previous[capacity];
  const void* theta[capacity];
  const void* grad[capacity];
  const void* anchor[capacity];
  const void* importance[capacity];
  Chunks<capacity> chunks;

  void set(int at, const PathIntegralTensor& tensor) {
    integral[at] = tensor.integral;
    previous[at] = tensor.previous;
    theta[at] = tensor.theta;
    grad[at] = tensor.grad;
    anchor[at] = tensor.anchor;
    importance[at] = tensor.importance;
  }
};
static_assert(sizeof(Table) + 64 <= 32764, "a kernel's parameters must fit their limit");

// `width` elements at once; anchor and importance are read only with `penalty`.
template <bool penalty, int width, class Theta, class Anchor, class Importance, class S>
__device__ __forceinline__ void step(S* integral, Theta* previous, const Theta* theta, const Theta* grad,
                                     const Anchor* anchor, const Importance* importance, S strength) {
  auto omega = *reinterpret_cast<const Pack<S, width>*>(integral);
  const auto before = *reinterpret_cast<const Pack<Theta, width>*>(previous);
  const auto after = *reinterpret_cast<const Pack<Theta, width>*>(theta);
  const auto grads = *reinterpret_cast<const Pack<Theta, width>*>(grad);
  Pack<Anchor, width> anchors;
  Pack<Importance, width> importances;
  if constexpr (penalty) {
    anchors = *reinterpret_cast<const Pack<Anchor, width>*>(anchor);
    importances = *reinterpret_cast<const Pack<Importance, width>*>(importance);
  }
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const S old = widen(before.element[k]);
    S g = widen(grads.element[k]);
    if constexpr (penalty)
      g = math::without_penalty<S>(g, old, widen(anchors.element[k]), widen(importances.element[k]), strength);
    omega.element[k] = math::path_integral<S>(omega.element[k], widen(after.element[k]), old, g);
  }
  *reinterpret_cast<Pack<S, width>*>(integral) = omega;
  *reinterpret_cast<Pack<Theta, width>*>(previous) = after;
}

template <bool penalty, class Theta, class Anchor, class Importance>
__global__ void __launch_bounds__(kBlockThreads)
    path_integral_kernel(const __grid_constant__ Table table, double strength) {
  using S = typename ComputeOf<Theta>::type;
  constexpr int width = 16 / sizeof(Theta);
  const int block = static_cast<int>(blockIdx.x);
  const int k = table.chunks.tensor_of(block);
  const std::int64_t begin = static_cast<std::int64_t>(block - table.chunks.first_block[k]) * kBlockElements;
  const std::int64_t left = table.chunks.numel[k] - begin;
  const int count = left < kBlockElements ? static_cast<int>(left) : kBlockElements;
  S* integral = static_cast<S*>(table.integral[k]) + begin;
  Theta* previous = static_cast<Theta*>(table.previous[k]) + begin;
  const Theta* theta = static_cast<const Theta*>(table.theta[k]) + begin;
  const Theta* grad = static_cast<const Theta*>(table.grad[k]) + begin;
  const Anchor* anchor = static_cast<const Anchor*>(table.anchor[k]) + begin;
  const Importance* importance = static_cast<const Importance*>(table.importance[k]) + begin;
  const S factor = static_cast<S>(strength);

  const bool wide = aligned(integral, alignof(Pack<S, width>)) && aligned(previous, alignof(Pack<Theta, width>)) &&
                    aligned(theta, alignof(Pack<Theta, width>)) && aligned(grad, alignof(Pack<Theta, width>)) &&
                    (!penalty || (aligned(anchor, alignof(Pack<Anchor, width>)) &&
                                  aligned(importance, alignof(Pack<Importance, width>))));
  const int packed = wide ? count / width * width : 0;
  for (int i = static_cast<int>(threadIdx.x) * width; i < packed; i += kBlockThreads * width)
    step<penalty, width>(integral + i, previous + i, theta + i, grad + i, anchor + i, importance + i, factor);
  for (int i = packed + static_cast<int>(threadIdx.x); i < count; i += kBlockThreads)
    step<penalty, 1>(integral + i, previous + i, theta + i, grad + i, anchor + i, importance + i, factor);
}

using Kernel = void (*)(Table, double);

template <class Theta, class Anchor>
Kernel pick(Dtype importance) {
  switch (importance) {
    case Dtype::f32: return path_integral_kernel<true, Theta, Anchor, float>;
    case Dtype::bf16: return path_integral_kernel<true, Theta, Anchor, __nv_bfloat16>;
    case Dtype::f16: return path_integral_kernel<true, Theta, Anchor, __half>;
    case Dtype::f64: break;
  }
  return nullptr;
}

template <class Theta>
Kernel pick(const PathIntegralTensor& tensor) {
  if (tensor.anchor == nullptr) return path_integral_kernel<false, Theta, Theta, Theta>;
  switch (tensor.anchor_dtype) {
    case Dtype::f32: return pick<Theta, float>(tensor.importance_dtype);
    case Dtype::bf16: return pick<Theta, __nv_bfloat16>(tensor.importance_dtype);
    case Dtype::f16: return pick<Theta, __half>(tensor.importance_dtype);
    case Dtype::f64: break;
  }
  return nullptr;
}

template <>
Kernel pick<double>(const PathIntegralTensor& tensor) {
  if (tensor.anchor == nullptr) return path_integral_kernel<false, double, double, double>;
  return tensor.anchor_dtype == Dtype::f64 && tensor.importance_dtype == Dtype::f64
             ? path_integral_kernel<true, double, double, double>
             : nullptr;
}

Kernel pick(const PathIntegralTensor& tensor) {
  Kernel kernel = nullptr;
  switch (tensor.theta_dtype) {
    case Dtype::f32: kernel = pick<float>(tensor); break;
    case Dtype::f64: kernel = pick<double>(tensor); break;
    case Dtype::bf16: kernel = pick<__nv_bfloat16>(tensor); break;
    case Dtype::f16: kernel = pick<__half>(tensor); break;
  }
  if (kernel == nullptr) throw std::runtime_error("limpet: path_integral: no CUDA kernel for these dtypes");
  return kernel;
}

}  // namespace

void path_integral(const PathIntegralTensor* tensors, int count, double strength, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto pick_kernel = [](const PathIntegralTensor& tensor) { return pick(tensor); };
  launch_tables<Table>(tensors, count, pick_kernel, [&](Kernel kernel, const Table& table) {
    if (table.chunks.blocks == 0) return;
    kernel<<<table.chunks.blocks, kBlockThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, strength);
    LIMPET_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace limpet::cuda
