// The quadratic penalty over all tensors of a model in one pass: value, or value and gradient.
//
// Elements are cut into chunks of a fixed size whose sums are added in order, so the value does not depend on the
// number of threads. Terms are float32 products (float64 for float64 parameters) summed in float64.

#include "math/quadratic.h"
#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/narrow.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

static_assert(kChunk % math::kNarrowBlock == 0, "a block must not lie in two chunks");

template <class S>
struct DoubleVector {  // as many doubles as a Vector<S> has lanes
  typedef double type __attribute__((vector_size(lanes<S> * 8)));
};

template <QuadraticGrad mode, class Theta>
LIMPET_FORMULA void update(const Vector<Compute<Theta>>& weighted, const Vector<Compute<Theta>>& factor, Theta* grad) {
  if constexpr (mode == QuadraticGrad::add) store(load(grad) + factor * weighted, grad);
  if constexpr (mode == QuadraticGrad::write) store(factor * weighted, grad);
}

template <QuadraticGrad mode, class Theta, class Anchor, class Importance>
double chunk(const QuadraticTensor& tensor, std::int64_t begin, std::int64_t end, double factor) {
  using S = Compute<Theta>;
  constexpr int width = lanes<S>;
  using Sum = typename DoubleVector<S>::type;
  const Theta* theta = static_cast<const Theta*>(tensor.theta);
  Theta* grad = static_cast<Theta*>(tensor.grad);
  constexpr bool blocks = Reader<Anchor>::blocks || Reader<Importance>::blocks;
  constexpr std::int64_t run = blocks ? math::kNarrowBlock : kChunk;  // elements that one reader serves
  const Reader<Theta> params(theta, tensor.numel, 0);
  const Vector<S> factors = broadcast(static_cast<S>(factor));

  Sum sums = {};
  for (std::int64_t from = begin; from < end; from += run) {
    const std::int64_t to = from + run < end ? from + run : end;
    const Reader<Anchor> anchor(tensor.anchor, tensor.numel, from);
    const Reader<Importance> importance(tensor.importance, tensor.numel, from);
    std::int64_t i = from;
    for (; i + width <= to; i += width) {
      const auto term = math::quadratic_term<Vector<S>>(params.load(i), anchor.load(i), importance.load(i));
      sums += __builtin_convertvector(term.value, Sum);
      update<mode>(term.weighted, factors, grad + i);
    }
    if (i < to) {  // the importance of padding is zero, and so are its terms
      const std::int64_t rest = to - i;
      const auto term = math::quadratic_term<Vector<S>>(params.load_some(i, rest), anchor.load_some(i, rest),
                                                        importance.load_some(i, rest));
      sums += __builtin_convertvector(term.value, Sum);
      if constexpr (mode != QuadraticGrad::none) {
        Padded<Theta> grads(grad + i, rest);
        update<mode>(term.weighted, factors, grads.elements);
        grads.copy_to(grad + i, rest);
      }
    }
  }
  double sum = 0;
  for (int lane = 0; lane < width; ++lane) sum += sums[lane];
  return sum;
}

using Chunk = double (*)(const QuadraticTensor&, std::int64_t, std::int64_t, double);

template <QuadraticGrad mode, class Theta, class Anchor>
Chunk pick(Storage importance) {
  switch (importance) {
    case Storage::f32: return chunk<mode, Theta, Anchor, float>;
    case Storage::bf16: return chunk<mode, Theta, Anchor, BFloat16>;
    case Storage::f16: return chunk<mode, Theta, Anchor, Half>;
    case Storage::log8: return chunk<mode, Theta, Anchor, Log8>;
    default: return nullptr;
  }
}

template <QuadraticGrad mode, class Theta>
Chunk pick(Storage anchor, Storage importance) {
  switch (anchor) {
    case Storage::f32: return pick<mode, Theta, float>(importance);
    case Storage::bf16: return pick<mode, Theta, BFloat16>(importance);
    case Storage::f16: return pick<mode, Theta, Half>(importance);
    case Storage::fixed16: return pick<mode, Theta, Fixed16>(importance);
    case Storage::split24: return pick<mode, Theta, Split24>(importance);
    default: return nullptr;
  }
}

template <QuadraticGrad mode>
Chunk pick(const QuadraticTensor& tensor) {
  switch (tensor.theta_dtype) {
    case Dtype::f32: return pick<mode, float>(tensor.anchor_storage, tensor.importance_storage);
    case Dtype::bf16: return pick<mode, BFloat16>(tensor.anchor_storage, tensor.importance_storage);
    case Dtype::f16: return pick<mode, Half>(tensor.anchor_storage, tensor.importance_storage);
    case Dtype::f64:
      return tensor.anchor_storage == Storage::f64 && tensor.importance_storage == Storage::f64
                 ? chunk<mode, double, double, double>
                 : nullptr;
  }
  return nullptr;
}

Chunk pick(QuadraticGrad mode, const QuadraticTensor& tensor) {
  switch (mode) {
    case QuadraticGrad::none: return pick<QuadraticGrad::none>(tensor);
    case QuadraticGrad::add: return pick<QuadraticGrad::add>(tensor);
    case QuadraticGrad::write: return pick<QuadraticGrad::write>(tensor);
  }
  return nullptr;
}

double quadratic(const QuadraticTensor* tensors, std::int64_t count, QuadraticGrad mode, double factor, int threads) {
  const std::int64_t chunks = count_chunks(tensors, count);
  double* partial = new double[static_cast<std::size_t>(chunks)];
  for_each_chunk(tensors, count, threads,
                 [&](std::int64_t c, const QuadraticTensor& tensor, std::int64_t begin, std::int64_t end) {
                   partial[c] = pick(mode, tensor)(tensor, begin, end, factor);
                 });
  double value = 0;
  for (std::int64_t c = 0; c < chunks; ++c) value += partial[c];
  delete[] partial;
  return value;
}

}  // namespace

void fill_quadratic(Kernels& kernels) {
  kernels.quadratic = quadratic;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
