// The quadratic penalty over all tensors of a model: one launch for up to kTensors of them, of any sizes.
//
// Memory-bound: theta, anchor and importance are read once, grad read and written once; 20 bytes an element in float32.
// The table of pointers is a kernel parameter (a parameter may have 32,764 bytes since CUDA 12.1, on sm_70 and newer),
// so nothing is copied to the device first. A block takes one chunk of one tensor and leaves its sum in the workspace;
// one more block adds the sums in order, so that the value is the same bit for bit on every run.

#include "cuda/quadratic.h"

#include <cstddef>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/narrow.cuh"
#include "cuda/vector.cuh"
#include "math/quadratic.h"

namespace limpet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8192;   // elements a block takes: 32 a thread
constexpr int kTensors = 640;  // tensors in one launch
static_assert(kChunk % math::kNarrowBlock == 0, "a chunk must begin with a block");

struct Table {
  const void* theta[kTensors];
  void* grad[kTensors];
  const void* anchor[kTensors];
  const void* importance[kTensors];
  std::int64_t numel[kTensors];
  int first_chunk[kTensors];  // ascending
  int count;
};
static_assert(sizeof(Table) + 64 <= 32764, "a kernel's parameters must fit their limit");

using Grad = QuadraticGrad;

// The sum of all threads' values, in thread 0; the order of additions is fixed.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0.0;
    for (int offset = kThreads / 64; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The last tensor whose first chunk is not behind `chunk`.
__device__ int tensor_of(const Table& table, int chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// `width` elements at once; returns sum F (theta - anchor)^2 of them.
template <Grad mode, int width, class Theta, class Anchor, class Importance, class S>
__device__ __forceinline__ S step(const Theta* theta, Theta* grad, const Reader<Anchor>& anchor,
                                  const Reader<Importance>& importance, int i, S factor) {
  const auto t = load_pack<width>(theta + i);
  S a[width], f[width];
  anchor.template load<width>(i, a);
  importance.template load<width>(i, f);
  Pack<Theta, width> g;
  if constexpr (mode == Grad::add) g = load_pack<width>(grad + i);
  S sum = 0;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const auto term = math::quadratic_term<S>(widen(t.element[k]), a[k], f[k]);
    sum += term.value;
    if constexpr (mode == Grad::add) narrow(widen(g.element[k]) + factor * term.weighted, &g.element[k]);
    if constexpr (mode == Grad::write) narrow(factor * term.weighted, &g.element[k]);
  }
  if constexpr (mode != Grad::none) *reinterpret_cast<Pack<Theta, width>*>(grad + i) = g;
  return sum;
}

template <Grad mode, class Theta, class Anchor, class Importance>
__global__ void __launch_bounds__(kThreads) quadratic_kernel(const __grid_constant__ Table table, double strength,
                                                             const void* scale,  // [] float or double; null for 1
                                                             bool scale_is_double,
                                                             double* partial) {  // [chunks]; not touched by Grad::write
  using S = typename ComputeOf<Theta>::type;
  constexpr int width = 16 / sizeof(Theta);
  const int k = tensor_of(table, static_cast<int>(blockIdx.x));
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x - table.first_chunk[k]) * kChunk;
  const std::int64_t left = table.numel[k] - begin;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  const Theta* theta = static_cast<const Theta*>(table.theta[k]) + begin;
  Theta* grad = static_cast<Theta*>(table.grad[k]) + begin;
  const Reader<Anchor> anchor(table.anchor[k], table.numel[k], begin);
  const Reader<Importance> importance(table.importance[k], table.numel[k], begin);

  if (scale != nullptr)
    strength *= scale_is_double ? *static_cast<const double*>(scale) : double{*static_cast<const float*>(scale)};
  const S factor = static_cast<S>(strength);

  const bool wide = aligned(theta, alignof(Pack<Theta, width>)) && anchor.template wide<width>() &&
                    importance.template wide<width>() &&
                    (mode == Grad::none || aligned(grad, alignof(Pack<Theta, width>)));
  const int packed = wide ? count / width * width : 0;
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x) * width; i < packed; i += kThreads * width)
    sum += static_cast<double>(step<mode, width>(theta, grad, anchor, importance, i, factor));
  for (int i = packed + static_cast<int>(threadIdx.x); i < count; i += kThreads)
    sum += static_cast<double>(step<mode, 1>(theta, grad, anchor, importance, i, factor));

  if constexpr (mode != Grad::write) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const double* partial,  // [chunks]
                                                       std::int64_t chunks, double factor,
                                                       void* value,  // [] float or double
                                                       bool value_is_double) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[i];
  sum = factor * block_sum(sum);
  if (threadIdx.x != 0) return;
  if (value_is_double) {
    *static_cast<double*>(value) = sum;
  } else {
    *static_cast<float*>(value) = static_cast<float>(sum);
  }
}

using Kernel = void (*)(Table, double, const void*, bool, double*);

template <Grad mode, class Theta, class Anchor>
Kernel pick(Storage importance) {
  switch (importance) {
    case Storage::f32: return quadratic_kernel<mode, Theta, Anchor, float>;
    case Storage::bf16: return quadratic_kernel<mode, Theta, Anchor, __nv_bfloat16>;
    case Storage::f16: return quadratic_kernel<mode, Theta, Anchor, __half>;
    case Storage::log8: return quadratic_kernel<mode, Theta, Anchor, Log8>;
    default: return nullptr;
  }
}

template <Grad mode, class Theta>
Kernel pick(Storage anchor, Storage importance) {
  switch (anchor) {
    case Storage::f32: return pick<mode, Theta, float>(importance);
    case Storage::bf16: return pick<mode, Theta, __nv_bfloat16>(importance);
    case Storage::f16: return pick<mode, Theta, __half>(importance);
    case Storage::fixed16: return pick<mode, Theta, Fixed16>(importance);
    case Storage::split24: return pick<mode, Theta, Split24>(importance);
    default: return nullptr;
  }
}

template <Grad mode>
Kernel pick(const QuadraticTensor& tensor) {
  switch (tensor.theta_dtype) {
    case Dtype::f32: return pick<mode, float>(tensor.anchor_storage, tensor.importance_storage);
    case Dtype::bf16: return pick<mode, __nv_bfloat16>(tensor.anchor_storage, tensor.importance_storage);
    case Dtype::f16: return pick<mode, __half>(tensor.anchor_storage, tensor.importance_storage);
    case Dtype::f64:
      return tensor.anchor_storage == Storage::f64 && tensor.importance_storage == Storage::f64
                 ? quadratic_kernel<mode, double, double, double>
                 : nullptr;
  }
  return nullptr;
}

std::int64_t chunks_of(const QuadraticTensor& tensor) {
  return (tensor.numel + kChunk - 1) / kChunk;
}

struct Scale {
  const void* pointer = nullptr;
  bool is_double = false;
};

// Launches the tensors in their order, those of one kernel together; returns the number of partial sums.
template <Grad mode>
std::int64_t launch(const QuadraticTensor* tensors, int count, double strength, Scale scale, double* partial,
                    cudaStream_t stream) {
  std::vector<Kernel> kernels(static_cast<std::size_t>(count));
  for (int k = 0; k < count; ++k) {
    kernels[k] = pick<mode>(tensors[k]);
    if (kernels[k] == nullptr) throw std::runtime_error("limpet: quadratic: no CUDA kernel for these dtypes");
  }
  std::int64_t done = 0;
  std::vector<bool> launched(static_cast<std::size_t>(count), false);
  for (int first = 0; first < count; ++first) {
    if (launched[first]) continue;
    Table table;
    table.count = 0;
    int chunks = 0;
    for (int k = first; k < count && table.count < kTensors; ++k) {
      if (launched[k] || kernels[k] != kernels[first]) continue;
      launched[k] = true;
      if (tensors[k].numel == 0) continue;
      const int at = table.count++;
      table.theta[at] = tensors[k].theta;
      table.grad[at] = tensors[k].grad;
      table.anchor[at] = tensors[k].anchor;
      table.importance[at] = tensors[k].importance;
      table.numel[at] = tensors[k].numel;
      table.first_chunk[at] = chunks;
      chunks += static_cast<int>(chunks_of(tensors[k]));
    }
    if (chunks == 0) continue;
    double* here = partial == nullptr ? nullptr : partial + done;
    kernels[first]<<<chunks, kThreads, 0, stream>>>(table, strength, scale.pointer, scale.is_double, here);
    LIMPET_CUDA_CHECK(cudaGetLastError());
    done += chunks;
  }
  return done;
}

template <Grad mode>
void value_and_grad(const QuadraticTensor* tensors, int count, double strength, void* value, Dtype value_dtype,
                    void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  double* partial = static_cast<double*>(workspace);
  const std::int64_t chunks = launch<mode>(tensors, count, strength, {}, partial, queue);
  sum_kernel<<<1, kThreads, 0, queue>>>(partial, chunks, 0.5 * strength, value, value_dtype == Dtype::f64);
  LIMPET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

std::int64_t quadratic_workspace_bytes(const QuadraticTensor* tensors, int count) {
  std::int64_t chunks = 0;
  for (int k = 0; k < count; ++k) chunks += chunks_of(tensors[k]);
  return chunks * static_cast<std::int64_t>(sizeof(double));
}

void quadratic_value(const QuadraticTensor* tensors, int count, double strength, void* value, Dtype value_dtype,
                     void* workspace, int device, void* stream) {
  value_and_grad<Grad::none>(tensors, count, strength, value, value_dtype, workspace, device, stream);
}

void quadratic_add_grad(const QuadraticTensor* tensors, int count, double strength, void* value, Dtype value_dtype,
                        void* workspace, int device, void* stream) {
  value_and_grad<Grad::add>(tensors, count, strength, value, value_dtype, workspace, device, stream);
}

void quadratic_grad(const QuadraticTensor* tensors, int count, double strength, const void* scale, Dtype scale_dtype,
                    int device, void* stream) {
  const DeviceGuard guard(device);
  launch<Grad::write>(tensors, count, strength, {scale, scale_dtype == Dtype::f64}, nullptr,
                      static_cast<cudaStream_t>(stream));
}

}  // namespace limpet::cuda
