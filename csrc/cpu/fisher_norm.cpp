// sum_n (sum_t d[n,t,:] (x[n,t,:] - mean[n,t]) rstd[n,t])^2 for the factor of a layer normalisation, and
// sum_n (sum_t d[n,t,:])^2 for its bias beside it: gradient and input are read once, and nothing normalised is written.

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

constexpr std::int64_t kBlock = 256;  // channels whose sums are kept at a time

// The sums of a sample's places so far, of `count` neighbouring channels.
template <class S>
struct Sums {
  alignas(64) S factor[kBlock] = {};
  alignas(64) S bias[kBlock] = {};
};

// So many places of channels [c0, c0 + count). Unrolled where `places` is a constant: the sums are then loaded and
// stored once for all of them.
template <class Stored>
LIMPET_FORMULA void add_places(const NormArgs& args, std::int64_t n, std::int64_t t, std::int64_t places,
                               std::int64_t c0, std::int64_t count, Sums<Compute<Stored>>& sums) {
  using S = Compute<Stored>;
  using V = Vector<S>;
  const std::int64_t *const ds = args.output_grad_strides, *const xs = args.input_strides,
                            *const ms = args.mean_strides;
  const Stored* const d = static_cast<const Stored*>(args.output_grad) + n * ds[0] + t * ds[1] + c0;
  const Stored* const x = static_cast<const Stored*>(args.input) + n * xs[0] + t * xs[1] + c0;
  const S* const mean = static_cast<const S*>(args.mean) + n * ms[0] + t * ms[1];
  const S* const rstd = static_cast<const S*>(args.rstd) + n * ms[0] + t * ms[1];
  const auto add = [&](auto& factor, auto& bias, const auto& grad, const auto& value, std::int64_t k) {
    factor += grad * ((value - mean[k * ms[1]]) * rstd[k * ms[1]]);
    bias += grad;
  };
  std::int64_t c = 0;
  for (; c + lanes<S> <= count; c += lanes<S>) {
    V factor = load(sums.factor + c), bias = load(sums.bias + c);
    for (std::int64_t k = 0; k < places; ++k) add(factor, bias, load(d + k * ds[1] + c), load(x + k * xs[1] + c), k);
    store<S>(factor, sums.factor + c);
    store<S>(bias, sums.bias + c);
  }
  for (; c < count; ++c)
    for (std::int64_t k = 0; k < places; ++k)
      add(sums.factor[c], sums.bias[c], widen(d[k * ds[1] + c]), widen(x[k * xs[1] + c]), k);
}

template <class Stored>
void add_channels(const NormArgs& args, std::int64_t c0, std::int64_t count) {
  using S = Compute<Stored>;
  Sums<S> total;
  for (std::int64_t n = 0; n < args.samples; ++n) {
    Sums<S> sums;
    std::int64_t t = 0;
    for (; t + 4 <= args.places; t += 4) add_places<Stored>(args, n, t, 4, c0, count, sums);
    add_places<Stored>(args, n, t, args.places - t, c0, count, sums);
    for (std::int64_t c = 0; c < count; ++c) {
      math::add_square(total.factor[c], sums.factor[c]);
      math::add_square(total.bias[c], sums.bias[c]);
    }
  }
  for (std::int64_t c = 0; c < count; ++c) {
    static_cast<S*>(args.total)[c0 + c] += total.factor[c];
    if (args.bias_total) static_cast<S*>(args.bias_total)[c0 + c] += total.bias[c];
  }
}

void sum_grad_squared_norm(const NormArgs& args) {
  // Cut at multiples of 16, so that two threads share no cache line.
  const int threads = worthwhile(args.threads, 4 * args.samples * args.places * args.channels);
  const std::int64_t step = min_of(kBlock, 16 * ceil_div(args.channels, 16 * threads));
  if (args.channels)
    parallel_for(threads, ceil_div(args.channels, step), [&](std::int64_t i, int) {
      const std::int64_t c0 = i * step, count = min_of(step, args.channels - c0);
      dispatch(args.dtype, [&](auto stored) { add_channels<decltype(stored)>(args, c0, count); });
    });
}

}  // namespace

void fill_fisher_norm(Kernels& kernels) {
  kernels.sum_grad_squared_norm = sum_grad_squared_norm;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
