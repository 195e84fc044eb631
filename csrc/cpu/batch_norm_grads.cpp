// The gradients of a batch normalisation by running statistics, of each sample alone, in one pass over its memory: at
// the input, d factor[c]; of the weight but for 1 / standard deviation, sum_t d (x - mean[c]); of the bias, sum_t d.

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// The places of a channel of a sample.
template <class S>
struct Line {
  const S *d, *x;  // x: null where the weight's gradient is not wanted
  S* scaled;       // d factor
  std::int64_t places;
  S mean, factor;

  // The sums' lanes, of a vector of places or more.
  template <bool has_input>
  void sums(Vector<S>& of_weight, Vector<S>& of_bias) const {
    using V = Vector<S>;
    constexpr int several = 4;  // sums side by side, so that an addition need not wait for the one before
    const V means = broadcast(mean), factors = broadcast(factor);
    V weights[several] = {}, biases[several] = {};
    const auto at = [&](std::int64_t i, V& w, V& b) LIMPET_INLINE {
      const V grad = load(d + i);
      b += grad;
      if constexpr (has_input) w += grad * (load(x + i) - means);
      store<S>(grad * factors, scaled + i);
    };
    std::int64_t i = 0;
    for (; i + several * lanes<S> <= places; i += several * lanes<S>)
      for (int k = 0; k < several; ++k) at(i + k * lanes<S>, weights[k], biases[k]);
    for (; i + lanes<S> <= places; i += lanes<S>) at(i, weights[0], biases[0]);
    of_weight = (weights[0] + weights[1]) + (weights[2] + weights[3]);
    of_bias = (biases[0] + biases[1]) + (biases[2] + biases[3]);
    if (const std::int64_t rest = places - i) {
      V last[2] = {};  // the last vector, of which the first values were added before
      at(places - lanes<S>, last[0], last[1]);
      of_weight += keep_last<S>(last[0], rest);
      of_bias += keep_last<S>(last[1], rest);
    }
  }

  // Of fewer places.
  template <bool has_input>
  void sums(S& of_weight, S& of_bias) const {
    of_weight = of_bias = 0;
    for (std::int64_t i = 0; i < places; ++i) {
      of_bias += d[i];
      if constexpr (has_input) of_weight += d[i] * (x[i] - mean);
      scaled[i] = d[i] * factor;
    }
  }
};

template <bool has_input, class S>
void add_lines(const BatchNormGradsArgs& args, std::int64_t first, std::int64_t end) {
  const auto line = [&](std::int64_t i) {
    const std::int64_t c = i % args.channels, at = i * args.places;
    return Line<S>{
        static_cast<const S*>(args.output_grad) + at, has_input ? static_cast<const S*>(args.input) + at : nullptr,
        static_cast<S*>(args.input_grad) + at,        args.places,
        static_cast<const S*>(args.mean)[c],          static_cast<const S*>(args.factor)[c]};
  };
  S* const of_weight = static_cast<S*>(args.weight_grads);
  S* const of_bias = static_cast<S*>(args.bias_grads);
  const bool few = args.places < lanes<S>;
  std::int64_t i = first;
  for (; !few && i + lanes<S> <= end; i += lanes<S>) {  // a vector of lines: adding up the lanes took half of the time
    Vector<S> weights[lanes<S>], biases[lanes<S>];
    for (int k = 0; k < lanes<S>; ++k) line(i + k).template sums<has_input>(weights[k], biases[k]);
    if (has_input) store<S>(sums_of_lanes<S>(weights), of_weight + i);
    store<S>(sums_of_lanes<S>(biases), of_bias + i);
  }
  for (; i < end; ++i) {
    S w, b;
    if (few) {
      line(i).template sums<has_input>(w, b);
    } else {
      Vector<S> weights, biases;
      line(i).template sums<has_input>(weights, biases);
      w = sum_lanes<S>(weights), b = sum_lanes<S>(biases);
    }
    if (has_input) of_weight[i] = w;
    of_bias[i] = b;
  }
}

template <class S>
void add_lines(const BatchNormGradsArgs& args) {
  const std::int64_t lines = args.samples * args.channels;
  const int threads = worthwhile(args.threads, lines * args.places);
  const std::int64_t jobs = min_of(lines, 4 * threads);
  parallel_for(threads, jobs, [&](std::int64_t job, int) {
    const std::int64_t first = lines * job / jobs, end = lines * (job + 1) / jobs;
    args.weight_grads ? add_lines<true, S>(args, first, end) : add_lines<false, S>(args, first, end);
  });
}

void batch_norm_grads(const BatchNormGradsArgs& args) {
  args.dtype == Dtype::f64 ? add_lines<double>(args) : add_lines<float>(args);
}

}  // namespace

void fill_batch_norm_grads(Kernels& kernels) {
  kernels.batch_norm_grads = batch_norm_grads;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
