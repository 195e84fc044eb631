// The quadratic penalty over all tensors of a model: one launch for up to Table::capacity of them.
//
// Memory-bound: theta, anchor and importance are read once, grad read and written once; 20 bytes an element in float32.
// The table of pointers is a kernel parameter (a parameter may have 32,764 bytes since CUDA 12.1, on sm_70 and newer),
// so nothing is copied to the device first. A block takes one chunk of one tensor and leaves its sum in the workspace;
// one more block adds the sums in order, so that the value is the same bit for bit on every run.

#include "cuda/quadratic.h"

#include "cuda/chunks.cuh"
#include "cuda/launch.cuh"
#include "cuda/narrow.cuh"
#include "cuda/vector.cuh"
#include "math/quadratic.h"

namespace limpet::cuda {
namespace {

static_assert(kBlockElements % math::kNarrowBlock == 0, "a block of threads must begin with a narrow block");

struct Table {
  static constexpr int capacity = 640;  // tensors in one launch
  const void* theta[capacity];
  void* grad[capacity];
  const void* anchor[capacity];
  const void* importance[capacity];
  unsigned char importance_storage[capacity];
  Chunks<capacity> chunks;

  void set(int at, const QuadraticTensor& tensor) {
    theta[at] = tensor.theta;
    grad[at] = tensor.grad;
    anchor[at] = tensor.anchor;
    importance[at] = tensor.importance;
    importance_storage[at] = static_cast<unsigned char>(tensor.importance_storage);
  }
};
static_assert(sizeof(Table) + 64 <= 32764, "a kernel's parameters must fit their limit");

using Grad = QuadraticGrad;

// The sum of all threads' values, in thread 0; the order of additions is fixed.
__device__ double block_sum(double value) {
  __shared__ double warps[kBlockThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kBlockThreads / 32 ? warps[threadIdx.x] : 0.0;
    for (int offset = kBlockThreads / 64; offset > 0; offset /= 2)
      value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// `width` elements at once; returns sum F (theta - anchor)^2 of them.
template <Grad mode, int width, class Theta, class Anchor, class S>
__device__ __forceinline__ S step(const Theta* theta, Theta* grad, const Reader<Anchor>& anchor,
                                  const ImportanceReader& importance, int i, S factor) {
  const auto t = load_pack<width>(theta + i);
  Pack<Theta, width> g;
  if constexpr (mode == Grad::add) g = load_pack<width>(grad + i);
  S a[width], f[width];
  anchor.template load<width>(i, a);
  importance.load<width>(i, f);
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

template <Grad mode, class Theta, class Anchor>
__global__ void __launch_bounds__(kBlockThreads)
    quadratic_kernel(const __grid_constant__ Table table, double strength,
                     const void* scale,  // [] float or double; null for 1
                     bool scale_is_double,
                     double* partial) {  // [chunks]; not touched by Grad::write
  using S = typename ComputeOf<Theta>::type;
  constexpr int width = 16 / sizeof(Theta);
  const int block = static_cast<int>(blockIdx.x);
  const int k = table.chunks.tensor_of(block);
  const std::int64_t numel = table.chunks.numel[k];
  const std::int64_t begin = static_cast<std::int64_t>(block - table.chunks.first_block[k]) * kBlockElements;
  const int count = numel - begin < kBlockElements ? static_cast<int>(numel - begin) : kBlockElements;
  const Theta* theta = static_cast<const Theta*>(table.theta[k]) + begin;
  Theta* grad = static_cast<Theta*>(table.grad[k]) + begin;
  const Reader<Anchor> anchor(table.anchor[k], numel, begin);
  const ImportanceReader importance{table.importance[k], numel, begin,
                                    static_cast<Storage>(table.importance_storage[k])};

  if (scale != nullptr)
    strength *= scale_is_double ? *static_cast<const double*>(scale) : double{*static_cast<const float*>(scale)};
  const S factor = static_cast<S>(strength);

  const bool wide = aligned(theta, alignof(Pack<Theta, width>)) && anchor.template wide<width>() &&
                    importance.wide<S, width>() && (mode == Grad::none || aligned(grad, alignof(Pack<Theta, width>)));
  const int packed = wide ? count / width * width : 0;
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x) * width; i < packed; i += kBlockThreads * width)
    sum += static_cast<double>(step<mode, width>(theta, grad, anchor, importance, i, factor));
  for (int i = packed + static_cast<int>(threadIdx.x); i < count; i += kBlockThreads)
    sum += static_cast<double>(step<mode, 1>(theta, grad, anchor, importance, i, factor));

  if constexpr (mode != Grad::write) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kBlockThreads) sum_kernel(const double* partial,  // [chunks]
                                                            std::int64_t chunks, double factor,
                                                            void* value,  // [] float or double
                                                            bool value_is_double) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < chunks; i += kBlockThreads) sum += partial[i];
  sum = factor * block_sum(sum);
  if (threadIdx.x != 0) return;
  if (value_is_double) {
    *static_cast<double*>(value) = sum;
  } else {
    *static_cast<float*>(value) = static_cast<float>(sum);
  }
}

using Kernel = void (*)(Table, double, const void*, bool, double*);

template <Grad mode, class Theta>
Kernel pick(Storage anchor) {
  switch (anchor) {
    case Storage::f32: return quadratic_kernel<mode, Theta, float>;
    case Storage::bf16: return quadratic_kernel<mode, Theta, __nv_bfloat16>;
    case Storage::f16: return quadratic_kernel<mode, Theta, __half>;
    case Storage::fixed16: return quadratic_kernel<mode, Theta, Fixed16>;
    case Storage::split24: return quadratic_kernel<mode, Theta, Split24>;
    default: return nullptr;
  }
}

template <Grad mode>
Kernel pick(const QuadraticTensor& tensor) {
  const Storage importance = tensor.importance_storage;
  Kernel kernel = nullptr;
  if (tensor.theta_dtype == Dtype::f64) {
    if (tensor.anchor_storage == Storage::f64 && importance == Storage::f64)
      kernel = quadratic_kernel<mode, double, double>;
  } else if (importance == Storage::f32 || importance == Storage::bf16 || importance == Storage::f16 ||
             importance == Storage::log8) {
    kernel = tensor.theta_dtype == Dtype::f32    ? pick<mode, float>(tensor.anchor_storage)
             : tensor.theta_dtype == Dtype::bf16 ? pick<mode, __nv_bfloat16>(tensor.anchor_storage)
                                                 : pick<mode, __half>(tensor.anchor_storage);
  }
  if (kernel == nullptr) throw std::runtime_error("limpet: quadratic: no CUDA kernel for these dtypes");
  return kernel;
}

struct Scale {
  const void* pointer = nullptr;
  bool is_double = false;
};

// Launches the tensors; returns the number of partial sums.
template <Grad mode>
std::int64_t launch(const QuadraticTensor* tensors, int count, double strength, Scale scale, double* partial,
                    cudaStream_t stream) {
  std::int64_t done = 0;
  launch_tables<Table>(tensors, count, pick<mode>, [&](Kernel kernel, const Table& table) {
    if (table.chunks.blocks == 0) return;
    double* here = partial == nullptr ? nullptr : partial + done;
    kernel<<<table.chunks.blocks, kBlockThreads, 0, stream>>>(table, strength, scale.pointer, scale.is_double, here);
    LIMPET_CUDA_CHECK(cudaGetLastError());
    done += table.chunks.blocks;
  });
  return done;
}

template <Grad mode>
void value_and_grad(const QuadraticTensor* tensors, int count, double strength, void* value, Dtype value_dtype,
                    void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  double* partial = static_cast<double*>(workspace);
  const std::int64_t chunks = launch<mode>(tensors, count, strength, {}, partial, queue);
  sum_kernel<<<1, kBlockThreads, 0, queue>>>(partial, chunks, 0.5 * strength, value, value_dtype == Dtype::f64);
  LIMPET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

std::int64_t quadratic_workspace_bytes(const QuadraticTensor* tensors, int count) {
  std::int64_t chunks = 0;
  for (int k = 0; k < count; ++k) chunks += (tensors[k].numel + kBlockElements - 1) / kBlockElements;
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
