// One step of Synaptic Intelligence's path integrals over all tensors of a model in one pass.
//
// Each element is computed alone, in its parameter's compute type, so no result depends on the number of threads.

#include "math/path_integral.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/vector.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// One vector of elements; anchor and importance are read only with `penalty`.
template <bool penalty, class Theta, class Anchor, class Importance, class S = Compute<Theta>>
LIMPET_FORMULA void step(S* integral, Theta* previous, const Theta* theta, const Theta* grad,
                         [[maybe_unused]] const Anchor* anchor, [[maybe_unused]] const Importance* importance,
                         [[maybe_unused]] const Vector<S>& strength) {
  const Vector<S> before = load(previous);
  Vector<S> g = load(grad);
  if constexpr (penalty) g = math::without_penalty<Vector<S>>(g, before, load(anchor), load(importance), strength);
  store(math::path_integral<Vector<S>>(load(integral), load(theta), before, g), integral);
  std::memcpy(previous, theta, lanes<S> * sizeof(Theta));
}

template <bool penalty, class Theta, class Anchor, class Importance>
void chunk(const PathIntegralTensor& tensor, std::int64_t begin, std::int64_t end, double strength) {
  using S = Compute<Theta>;
  S* integral = static_cast<S*>(tensor.integral);
  Theta* previous = static_cast<Theta*>(tensor.previous);
  const Theta* theta = static_cast<const Theta*>(tensor.theta);
  const Theta* grad = static_cast<const Theta*>(tensor.grad);
  const Anchor* anchor = static_cast<const Anchor*>(tensor.anchor);
  const Importance* importance = static_cast<const Importance*>(tensor.importance);
  const Vector<S> factor = broadcast(static_cast<S>(strength));

  std::int64_t i = begin;
  for (; i + lanes<S> <= end; i += lanes<S>) {
    const std::int64_t at = penalty ? i : 0;
    step<penalty>(integral + i, previous + i, theta + i, grad + i, anchor + at, importance + at, factor);
  }
  if (i == end) return;
  const std::int64_t rest = end - i;
  Padded<S> integrals(integral + i, rest);
  Padded<Theta> before(previous + i, rest), after(theta + i, rest), grads(grad + i, rest);
  if constexpr (penalty) {
    const Padded<Anchor, S> anchors(anchor + i, rest);
    const Padded<Importance, S> importances(importance + i, rest);
    step<penalty>(integrals.elements, before.elements, after.elements, grads.elements, anchors.elements,
                  importances.elements, factor);
  } else {
    step<penalty>(integrals.elements, before.elements, after.elements, grads.elements, anchor, importance, factor);
  }
  integrals.copy_to(integral + i, rest);
  before.copy_to(previous + i, rest);
}

using Chunk = void (*)(const PathIntegralTensor&, std::int64_t, std::int64_t, double);

template <class Theta, class Anchor>
Chunk pick(Dtype importance) {
  switch (importance) {
    case Dtype::f32: return chunk<true, Theta, Anchor, float>;
    case Dtype::bf16: return chunk<true, Theta, Anchor, BFloat16>;
    case Dtype::f16: return chunk<true, Theta, Anchor, Half>;
    case Dtype::f64: break;
  }
  return nullptr;
}

template <class Theta>
Chunk pick(const PathIntegralTensor& tensor) {
  if (tensor.anchor == nullptr) return chunk<false, Theta, Theta, Theta>;
  switch (tensor.anchor_dtype) {
    case Dtype::f32: return pick<Theta, float>(tensor.importance_dtype);
    case Dtype::bf16: return pick<Theta, BFloat16>(tensor.importance_dtype);
    case Dtype::f16: return pick<Theta, Half>(tensor.importance_dtype);
    case Dtype::f64: break;
  }
  return nullptr;
}

template <>
Chunk pick<double>(const PathIntegralTensor& tensor) {
  if (tensor.anchor == nullptr) return chunk<false, double, double, double>;
  return tensor.anchor_dtype == Dtype::f64 && tensor.importance_dtype == Dtype::f64
             ? chunk<true, double, double, double>
             : nullptr;
}

Chunk pick(const PathIntegralTensor& tensor) {
  switch (tensor.theta_dtype) {
    case Dtype::f32: return pick<float>(tensor);
    case Dtype::f64: return pick<double>(tensor);
    case Dtype::bf16: return pick<BFloat16>(tensor);
    case Dtype::f16: return pick<Half>(tensor);
  }
  return nullptr;
}

void path_integral(const PathIntegralTensor* tensors, std::int64_t count, double strength, int threads) {
  for_each_chunk(tensors, count, threads,
                 [&](std::int64_t, const PathIntegralTensor& tensor, std::int64_t begin, std::int64_t end) {
                   pick(tensor)(tensor, begin, end, strength);
                 });
}

}  // namespace

void fill_path_integral(Kernels& kernels) {
  kernels.path_integral = path_integral;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
