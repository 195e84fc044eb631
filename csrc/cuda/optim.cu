// One optimizer step over all tensors of a call: one launch for up to Table::capacity of them, and for AdamW one more
// that counts the step.
//
// Memory-bound: parameter, gradient, moments, anchor, importance and integral are each read and written once. The table
// of pointers is a kernel parameter, as in quadratic.cu; a block takes one chunk of one tensor.

#include "cuda/optim.h"

#include "cuda/chunks.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "math/optim.h"
#include "math/quadratic.h"

namespace limpet::cuda {
namespace {

struct Table {
  static constexpr int capacity = 300;  // tensors in one launch
  OptimTensor tensor[capacity];
  Chunks<capacity> chunks;

  void set(int at, const OptimTensor& from) { tensor[at] = from; }
};
static_assert(sizeof(Table) + 256 <= 32764, "a kernel's parameters must fit their limit");

__device__ __forceinline__ float square_root(float x) {
  return __fsqrt_rn(x);
}
__device__ __forceinline__ double square_root(double x) {
  return __dsqrt_rn(x);
}

__device__ bool skipped(const DeviceScalars& scalars) {
  return scalars.found_inf != nullptr && *scalars.found_inf != 0;
}

__device__ double learning_rate(const DeviceScalars& scalars, double lr) {
  return scalars.lr == nullptr ? lr : *scalars.lr;
}

// `width` elements from `array` on, element `i` first, as what is computed.
template <int width, class Stored, class S>
__device__ __forceinline__ void read(const void* array, std::int64_t i, S (&to)[width]) {
  const auto pack = *reinterpret_cast<const Pack<Stored, width>*>(static_cast<const Stored*>(array) + i);
#pragma unroll
  for (int k = 0; k < width; ++k) to[k] = static_cast<S>(widen(pack.element[k]));
}

template <int width, class S>
__device__ __forceinline__ void read_any(const void* array, Dtype dtype, std::int64_t i, S (&to)[width]) {
  switch (dtype) {
    case Dtype::f32: return read<width, float>(array, i, to);
    case Dtype::bf16: return read<width, __nv_bfloat16>(array, i, to);
    case Dtype::f16: return read<width, __half>(array, i, to);
    case Dtype::f64: return read<width, double>(array, i, to);
  }
}

template <int width, class Stored, class S>
__device__ __forceinline__ void write(const S (&from)[width], void* array, std::int64_t i) {
  Pack<Stored, width> pack;
#pragma unroll
  for (int k = 0; k < width; ++k) narrow(from[k], &pack.element[k]);
  *reinterpret_cast<Pack<Stored, width>*>(static_cast<Stored*>(array) + i) = pack;
}

template <class Theta, bool amsgrad>
struct AdamWRule {
  using Options = AdamWOptions;
  using S = Compute<Theta>;
  math::AdamW<S> with;

  static __device__ AdamWRule make(const Options& options, const OptimTensor& tensor, double lr) {
    const double t = *tensor.step;
    return {math::adamw_settings<S>(lr, options.weight_decay, options.beta1, options.beta2, options.eps,
                                    pow(options.beta1, t), sqrt(1 - pow(options.beta2, t)))};
  }

  template <int width>
  __device__ __forceinline__ void operator()(const OptimTensor& tensor, std::int64_t i, const S (&grad)[width],
                                             S (&theta)[width]) const {
    S first[width], second[width], largest[width] = {};
    read<width, Theta>(tensor.first, i, first);
    read<width, Theta>(tensor.second, i, second);
    if constexpr (amsgrad) read<width, Theta>(tensor.largest, i, largest);
    const auto root = [](const S& x) { return square_root(x); };
#pragma unroll
    for (int k = 0; k < width; ++k)
      theta[k] = math::adamw_step<amsgrad>(theta[k], grad[k], first[k], second[k], largest[k], with, root);
    write<width, Theta>(first, tensor.first, i);
    write<width, Theta>(second, tensor.second, i);
    if constexpr (amsgrad) write<width, Theta>(largest, tensor.largest, i);
  }
};

template <class Theta, bool has_momentum>
struct SgdRule {
  using Options = SgdOptions;
  using S = Compute<Theta>;
  math::Sgd<S> with;

  static __device__ SgdRule make(const Options& options, const OptimTensor&, double lr) {
    return {math::sgd_settings<S>(lr, options.weight_decay, options.momentum, options.dampening, options.nesterov,
                                  options.first_step)};
  }

  template <int width>
  __device__ __forceinline__ void operator()(const OptimTensor& tensor, std::int64_t i, const S (&grad)[width],
                                             S (&theta)[width]) const {
    S buffer[width] = {};
    if constexpr (has_momentum) read<width, Theta>(tensor.first, i, buffer);
#pragma unroll
    for (int k = 0; k < width; ++k) theta[k] = math::sgd_step<has_momentum>(theta[k], grad[k], buffer[k], with);
    if constexpr (has_momentum) write<width, Theta>(buffer, tensor.first, i);
  }
};

// `width` elements from i on.
template <bool has_quadratic, bool has_integral, int width, class Theta, class Rule>
__device__ __forceinline__ void step_elements(const OptimTensor& tensor, std::int64_t i, const Rule& rule,
                                              Compute<Theta> grad_factor, Compute<Theta> strength) {
  using S = Compute<Theta>;
  S before[width], task_grad[width], grad[width], after[width];
  read<width, Theta>(tensor.theta, i, before);
  read<width, Theta>(tensor.grad, i, task_grad);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    task_grad[k] *= grad_factor;
    grad[k] = task_grad[k];
    after[k] = before[k];
  }
  if constexpr (has_quadratic) {
    S anchor[width], importance[width];
    read_any(tensor.anchor, tensor.anchor_dtype, i, anchor);
    read_any(tensor.importance, tensor.importance_dtype, i, importance);
#pragma unroll
    for (int k = 0; k < width; ++k)
      grad[k] += strength * math::quadratic_term<S>(before[k], anchor[k], importance[k]).weighted;
  }
  rule(tensor, i, grad, after);
  write<width, Theta>(after, tensor.theta, i);
  if constexpr (has_integral) {  // by what is stored: a narrow parameter moves by whole units in its last place
    S integral[width];
    read<width, S>(tensor.integral, i, integral);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      Theta stored;
      narrow(after[k], &stored);
      integral[k] += math::path_share<S>(task_grad[k], before[k], widen(stored));
    }
    write<width, S>(integral, tensor.integral, i);
  }
}

template <bool has_quadratic, bool has_integral, class Theta, class Rule>
__global__ void __launch_bounds__(kBlockThreads)
    step_kernel(const __grid_constant__ Table table, const typename Rule::Options options,
                const DeviceScalars scalars) {
  if (skipped(scalars)) return;
  using S = Compute<Theta>;
  constexpr int width = 16 / sizeof(S);
  const int block = static_cast<int>(blockIdx.x);
  const int k = table.chunks.tensor_of(block);
  const OptimTensor& tensor = table.tensor[k];
  const std::int64_t begin = static_cast<std::int64_t>(block - table.chunks.first_block[k]) * kBlockElements;
  const std::int64_t end = tensor.numel - begin < kBlockElements ? tensor.numel : begin + kBlockElements;
  __shared__ Rule rule;  // powers in float64 take a while: one thread computes them
  if (threadIdx.x == 0) rule = Rule::make(options, tensor, learning_rate(scalars, options.lr));
  __syncthreads();
  const double scale = scalars.grad_scale == nullptr ? 1.0 : *scalars.grad_scale;
  const S grad_factor = static_cast<S>(options.grad_factor / scale), strength = static_cast<S>(options.strength);

  // Tensors of torch's allocator are aligned to 512 bytes, views of them to their elements only.
  std::uintptr_t misaligned = 0;
  for (const void* array : {static_cast<const void*>(tensor.theta), tensor.grad, static_cast<const void*>(tensor.first),
                            static_cast<const void*>(tensor.second), static_cast<const void*>(tensor.largest),
                            tensor.anchor, tensor.importance, static_cast<const void*>(tensor.integral)})
    misaligned |= reinterpret_cast<std::uintptr_t>(array) % 16;
  const std::int64_t packed = misaligned == 0 ? begin + (end - begin) / width * width : begin;
  for (std::int64_t i = begin + static_cast<std::int64_t>(threadIdx.x) * width; i < packed; i += kBlockThreads * width)
    step_elements<has_quadratic, has_integral, width, Theta>(tensor, i, rule, grad_factor, strength);
  for (std::int64_t i = packed + threadIdx.x; i < end; i += kBlockThreads)
    step_elements<has_quadratic, has_integral, 1, Theta>(tensor, i, rule, grad_factor, strength);
}

// All blocks of a tensor read its count of steps, so it is raised by a launch before theirs.
__global__ void __launch_bounds__(Table::capacity)
    count_kernel(const __grid_constant__ Table table, const DeviceScalars scalars) {
  if (skipped(scalars)) return;
  if (static_cast<int>(threadIdx.x) < table.chunks.count) *table.tensor[threadIdx.x].step += 1;
}

template <class Options>
using Kernel = void (*)(Table, Options, DeviceScalars);

template <class Theta, class Rule>
Kernel<typename Rule::Options> pick(const OptimTensor& tensor) {
  if (tensor.anchor != nullptr)
    return tensor.integral != nullptr ? step_kernel<true, true, Theta, Rule> : step_kernel<true, false, Theta, Rule>;
  return tensor.integral != nullptr ? step_kernel<false, true, Theta, Rule> : step_kernel<false, false, Theta, Rule>;
}

template <template <class, bool> class Rule, bool flag>
auto pick(const OptimTensor& tensor) {
  switch (tensor.dtype) {
    case Dtype::f32: return pick<float, Rule<float, flag>>(tensor);
    case Dtype::f64: return pick<double, Rule<double, flag>>(tensor);
    case Dtype::bf16: return pick<__nv_bfloat16, Rule<__nv_bfloat16, flag>>(tensor);
    case Dtype::f16: break;
  }
  return pick<__half, Rule<__half, flag>>(tensor);
}

// All tensors are alike in what they have.
template <class Options, class Pick>
void launch(const OptimTensor* tensors, int count, const Options& options, const DeviceScalars& scalars,
            const Pick& pick_kernel, cudaStream_t stream) {
  launch_tables<Table>(tensors, count, pick_kernel, [&](Kernel<Options> kernel, const Table& table) {
    if (tensors[0].step != nullptr) {
      count_kernel<<<1, Table::capacity, 0, stream>>>(table, scalars);
      LIMPET_CUDA_CHECK(cudaGetLastError());
    }
    if (table.chunks.blocks == 0) return;
    kernel<<<table.chunks.blocks, kBlockThreads, 0, stream>>>(table, options, scalars);
    LIMPET_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace

void adamw_step(const OptimTensor* tensors, int count, const AdamWOptions& options, const DeviceScalars& scalars,
                int device, void* stream) {
  const DeviceGuard guard(device);
  const auto pick_kernel = [](const OptimTensor& tensor) {
    return tensor.largest != nullptr ? pick<AdamWRule, true>(tensor) : pick<AdamWRule, false>(tensor);
  };
  launch(tensors, count, options, scalars, pick_kernel, static_cast<cudaStream_t>(stream));
}

void sgd_step(const OptimTensor* tensors, int count, const SgdOptions& options, const DeviceScalars& scalars,
              int device, void* stream) {
  const DeviceGuard guard(device);
  const auto pick_kernel = [](const OptimTensor& tensor) {
    return tensor.first != nullptr ? pick<SgdRule, true>(tensor) : pick<SgdRule, false>(tensor);
  };
  launch(tensors, count, options, scalars, pick_kernel, static_cast<cudaStream_t>(stream));
}

}  // namespace limpet::cuda
