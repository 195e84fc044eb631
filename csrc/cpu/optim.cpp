// One optimizer step over all tensors of a call in one pass, with the gradient of a quadratic penalty and the path
// integral on the way: parameter, gradient, moments, anchor, importance and integral are each read and written once.
//
// Every element is computed on its own, so the result does not depend on the number of threads. float32 parameters and
// narrower are computed in float32, float64 ones in float64.

#include "math/optim.h"

#include <cmath>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/vector.h"
#include "math/quadratic.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

constexpr std::int64_t kBlock = 1024;  // elements of narrow anchors and importances that are widened at a time

LIMPET_FORMULA Vector<float> square_root(const Vector<float>& x) {
#if defined(__AVX512F__)
  return bits_as<Vector<float>>(_mm512_sqrt_ps(bits_as<__m512>(x)));
#elif defined(__AVX2__)
  return bits_as<Vector<float>>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#elif defined(__SSE2__)
  return bits_as<Vector<float>>(_mm_sqrt_ps(bits_as<__m128>(x)));
#else
  Vector<float> root;
  for (int i = 0; i < lanes<float>; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}
LIMPET_FORMULA Vector<double> square_root(const Vector<double>& x) {
#if defined(__AVX512F__)
  return bits_as<Vector<double>>(_mm512_sqrt_pd(bits_as<__m512d>(x)));
#elif defined(__AVX2__)
  return bits_as<Vector<double>>(_mm256_sqrt_pd(bits_as<__m256d>(x)));
#elif defined(__SSE2__)
  return bits_as<Vector<double>>(_mm_sqrt_pd(bits_as<__m128d>(x)));
#else
  Vector<double> root;
  for (int i = 0; i < lanes<double>; ++i) root[i] = __builtin_sqrt(x[i]);
  return root;
#endif
}

// The arrays of one parameter from some element on; anchor and importance are as wide as what is computed.
template <class Theta>
struct Streams {
  using S = Compute<Theta>;
  Theta* theta;
  const Theta* grad;
  Theta *first, *second, *largest;
  const S *anchor, *importance;
  S* integral;
};

template <class Theta, bool amsgrad>
struct AdamWRule {
  math::AdamW<Compute<Theta>> with;

  template <class V>
  LIMPET_FORMULA V operator()(const V& theta, const V& grad, const Streams<Theta>& at, std::int64_t i) const {
    V first = load(at.first + i), second = load(at.second + i), largest = {};
    if constexpr (amsgrad) largest = load(at.largest + i);
    const auto root = [](const V& x) LIMPET_INLINE { return square_root(x); };
    const V next = math::adamw_step<amsgrad>(theta, grad, first, second, largest, with, root);
    store(first, at.first + i);
    store(second, at.second + i);
    if constexpr (amsgrad) store(largest, at.largest + i);
    return next;
  }
};

template <class Theta, bool has_momentum>
struct SgdRule {
  math::Sgd<Compute<Theta>> with;

  template <class V>
  LIMPET_FORMULA V operator()(const V& theta, const V& grad, const Streams<Theta>& at, std::int64_t i) const {
    V buffer = {};
    if constexpr (has_momentum) buffer = load(at.first + i);
    const V next = math::sgd_step<has_momentum>(theta, grad, buffer, with);
    if constexpr (has_momentum) store(buffer, at.first + i);
    return next;
  }
};

// The elements from i on that one vector holds.
template <bool has_quadratic, bool has_integral, class Theta, class Rule>
LIMPET_FORMULA void step_vector(const Streams<Theta>& at, std::int64_t i, const Rule& rule, Compute<Theta> grad_factor,
                                Compute<Theta> strength) {
  using V = Vector<Compute<Theta>>;
  const V theta = load(at.theta + i);
  const V task_grad = grad_factor * load(at.grad + i);
  V grad = task_grad;
  if constexpr (has_quadratic)
    grad += strength * math::quadratic_term<V>(theta, load(at.anchor + i), load(at.importance + i)).weighted;
  store(rule(theta, grad, at, i), at.theta + i);
  if constexpr (has_integral)  // by what is stored: a narrow parameter moves by whole units in its last place
    store(load(at.integral + i) + math::path_share<V>(task_grad, theta, load(at.theta + i)), at.integral + i);
}

// Fewer elements than a vector holds, through copies of them. The rule is a copy here and below: an array might overlay
// the caller's, for all that the compiler knows, and every store would have its settings loaded again.
template <bool has_quadratic, bool has_integral, class Theta, class Rule>
void step_rest(const Streams<Theta>& at, std::int64_t i, std::int64_t count, Rule rule, Compute<Theta> grad_factor,
               Compute<Theta> strength) {
  constexpr int width = lanes<Compute<Theta>>;
  Theta narrow[5][width] = {};
  Compute<Theta> wide[3][width] = {};
  const auto in = [&](auto* to, const auto* from) {
    if (from != nullptr) std::memcpy(to, from + i, static_cast<std::size_t>(count) * sizeof(*to));
  };
  const auto out = [&](const auto* from, auto* to) {
    if (to != nullptr) std::memcpy(to + i, from, static_cast<std::size_t>(count) * sizeof(*to));
  };
  in(narrow[0], at.theta);
  in(narrow[1], at.grad);
  in(narrow[2], at.first);
  in(narrow[3], at.second);
  in(narrow[4], at.largest);
  in(wide[0], at.anchor);
  in(wide[1], at.importance);
  in(wide[2], at.integral);
  const Streams<Theta> copies = {narrow[0], narrow[1], narrow[2], narrow[3], narrow[4], wide[0], wide[1], wide[2]};
  step_vector<has_quadratic, has_integral>(copies, 0, rule, grad_factor, strength);
  out(narrow[0], at.theta);
  out(narrow[2], at.first);
  out(narrow[3], at.second);
  out(narrow[4], at.largest);
  out(wide[2], at.integral);
}

// `count` elements of `from`, from `begin` on, as S: where they lie, or widened into `scratch`.
template <class S>
const S* widened(const void* from, Dtype dtype, std::int64_t begin, std::int64_t count, S* scratch) {
  const S* result = nullptr;
  dispatch(dtype, [&](auto stored) {
    using Stored = decltype(stored);
    const Stored* at = static_cast<const Stored*>(from) + begin;
    if constexpr (std::is_same_v<Stored, S>) {
      result = at;
    } else if constexpr (std::is_same_v<Compute<Stored>, S>) {
      std::int64_t i = 0;
      for (; i + lanes<S> <= count; i += lanes<S>) store(load(at + i), scratch + i);
      for (; i < count; ++i) scratch[i] = widen(at[i]);
      result = scratch;
    }
  });
  return result;
}

template <bool has_quadratic, bool has_integral, class Theta, class Rule>
void step_chunk(const OptimTensor& tensor, std::int64_t begin, std::int64_t end, const StepOptions& options,
                Rule rule) {
  using S = Compute<Theta>;
  const S grad_factor = static_cast<S>(options.grad_factor), strength = static_cast<S>(options.strength);
  const auto at = [&](void* array) { return array == nullptr ? nullptr : static_cast<Theta*>(array) + begin; };
  S anchors[has_quadratic ? kBlock : 1], importances[has_quadratic ? kBlock : 1];
  const std::int64_t stride = has_quadratic ? kBlock : end - begin;
  for (std::int64_t count; begin < end; begin += count) {
    count = end - begin < stride ? end - begin : stride;
    Streams<Theta> here = {at(tensor.theta),
                           static_cast<const Theta*>(tensor.grad) + begin,
                           at(tensor.first),
                           at(tensor.second),
                           at(tensor.largest),
                           nullptr,
                           nullptr,
                           has_integral ? static_cast<S*>(tensor.integral) + begin : nullptr};
    if constexpr (has_quadratic) {
      here.anchor = widened(tensor.anchor, tensor.anchor_dtype, begin, count, anchors);
      here.importance = widened(tensor.importance, tensor.importance_dtype, begin, count, importances);
    }
    std::int64_t i = 0;
    for (; i + lanes<S> <= count; i += lanes<S>)
      step_vector<has_quadratic, has_integral>(here, i, rule, grad_factor, strength);
    if (i < count) step_rest<has_quadratic, has_integral>(here, i, count - i, rule, grad_factor, strength);
  }
}

template <class Theta, class Rule>
void step_chunk(const OptimTensor& tensor, std::int64_t begin, std::int64_t end, const StepOptions& options,
                const Rule& rule) {
  const auto step =
      tensor.anchor != nullptr
          ? (tensor.integral != nullptr ? step_chunk<true, true, Theta, Rule> : step_chunk<true, false, Theta, Rule>)
          : (tensor.integral != nullptr ? step_chunk<false, true, Theta, Rule> : step_chunk<false, false, Theta, Rule>);
  step(tensor, begin, end, options, rule);
}

void adamw(const OptimTensor* tensors, std::int64_t count, const AdamWOptions& options, int threads) {
  for (std::int64_t k = 0; k < count; ++k) *tensors[k].step += 1;
  for_each_chunk(
      tensors, count, threads, [&](std::int64_t, const OptimTensor& tensor, std::int64_t begin, std::int64_t end) {
        const double t = *tensor.step;
        const double power = ::pow(options.beta1, t), correction = ::sqrt(1 - ::pow(options.beta2, t));
        dispatch(tensor.dtype, [&](auto stored) {
          using Theta = decltype(stored);
          const auto with = math::adamw_settings<Compute<Theta>>(options.lr, options.weight_decay, options.beta1,
                                                                 options.beta2, options.eps, power, correction);
          if (tensor.largest != nullptr) {
            step_chunk<Theta>(tensor, begin, end, options, AdamWRule<Theta, true>{with});
          } else {
            step_chunk<Theta>(tensor, begin, end, options, AdamWRule<Theta, false>{with});
          }
        });
      });
}

void sgd(const OptimTensor* tensors, std::int64_t count, const SgdOptions& options, int threads) {
  for_each_chunk(
      tensors, count, threads, [&](std::int64_t, const OptimTensor& tensor, std::int64_t begin, std::int64_t end) {
        dispatch(tensor.dtype, [&](auto stored) {
          using Theta = decltype(stored);
          const auto with = math::sgd_settings<Compute<Theta>>(options.lr, options.weight_decay, options.momentum,
                                                               options.dampening, options.nesterov, options.first_step);
          if (tensor.first != nullptr) {
            step_chunk<Theta>(tensor, begin, end, options, SgdRule<Theta, true>{with});
          } else {
            step_chunk<Theta>(tensor, begin, end, options, SgdRule<Theta, false>{with});
          }
        });
      });
}

}  // namespace

void fill_optim(Kernels& kernels) {
  kernels.adamw_step = adamw;
  kernels.sgd_step = sgd;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
