// Everything about a gated lateral but its matrix products, in one pass forward and one backward.
//
// A line is what shares its way of reading the bias: a row of channels, or one channel's places. Each element is
// computed alone; the bias's gradient is summed over lines in an order fixed by the shapes.

#include "math/gated_lateral.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/vector.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

constexpr std::int64_t kRunElements = 16384;  // of consecutive lines that one thread takes at a time
constexpr std::int64_t kRunLines = 64;        // at most, as they are summed in the compute type one after another

template <class S>
LIMPET_FORMULA math::Gate<Vector<S>> gate(const Vector<S>& z) {
  return math::gate<S, Vector<S>, Vector<typename math::ExpConstants<S>::Bits>>(z);
}

// The bias at element i of a line: each its own, or the same for all.
template <class Stored>
struct Along {
  const Stored* bias;
  LIMPET_FORMULA auto at(std::int64_t i) const { return load(bias + i); }
  LIMPET_FORMULA auto first(std::int64_t count) const { return load(Padded<Stored>(bias, count).elements); }
};

template <class Stored>
struct Same {
  Vector<Compute<Stored>> bias;
  LIMPET_FORMULA auto at(std::int64_t) const { return bias; }
  LIMPET_FORMULA auto first(std::int64_t) const { return bias; }
};

// The sum of a line's logit gradients: each element added to its own sum, or all to one.
template <class S>
struct SumAlong {
  S* sums;  // or null
  LIMPET_FORMULA void add(std::int64_t i, const Vector<S>& values) const {
    if (sums != nullptr) store(load(sums + i) + values, sums + i);
  }
  LIMPET_FORMULA void add_first(const Vector<S>& values, std::int64_t count) const {
    if (sums == nullptr) return;
    for (std::int64_t i = 0; i < count; ++i) sums[i] += values[i];
  }
};

template <class S>
struct SumAll {
  double total = 0.0;
  Vector<S> recent{};
  int vectors = 0;

  LIMPET_FORMULA void add(std::int64_t, const Vector<S>& values) {
    recent += values;
    if (++vectors == 64) flush();
  }
  LIMPET_FORMULA void add_first(const Vector<S>& values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) total += static_cast<double>(values[i]);
  }
  LIMPET_FORMULA double flush() {
    total += static_cast<double>(sum_lanes<S>(recent));
    recent = Vector<S>{};
    vectors = 0;
    return total;
  }
};

// --- one line --------------------------------------------------------------------------------------------------------

// The last vector of a line overlaps the one before; its product was read first, as y may lie where the product does.
template <class Stored, class Bias>
void forward_line(Stored* y, const Stored* x, const Stored* h, const Stored* product, const Bias& bias,
                  std::int64_t length) {
  using S = Compute<Stored>;
  constexpr std::int64_t width = lanes<S>;
  if (length < width) {
    const Padded<Stored, S> xs(x, length), hs(h, length), products(product, length);
    Padded<Stored, S> ys(x, 0);
    const auto g = gate<S>(load(products.elements) + bias.first(length));
    store(math::blend(load(xs.elements), load(hs.elements), g), ys.elements);
    ys.copy_to(y, length);
    return;
  }
  const auto step = [&](std::int64_t i, const Vector<S>& z) {
    store(math::blend(load(x + i), load(h + i), gate<S>(z + bias.at(i))), y + i);
  };
  const Vector<S> last = load(product + length - width);
  std::int64_t i = 0;
  for (; i + width <= length; i += width) step(i, load(product + i));
  if (i < length) step(length - width, last);
}

template <class Stored>
struct Gradients {
  Stored *x, *h, *z;  // each may be null
  LIMPET_FORMULA Gradients from(std::int64_t i) const {
    return {x == nullptr ? x : x + i, h == nullptr ? h : h + i, z == nullptr ? z : z + i};
  }
};

template <class Stored, class Bias, class Sum>
void backward_line(const Gradients<Stored>& to, const Stored* grad, const Stored* x, const Stored* h,
                   const Stored* product, const Bias& bias, Sum& sum, std::int64_t length) {
  using S = Compute<Stored>;
  constexpr std::int64_t width = lanes<S>;
  if (length < width) {
    const Padded<Stored, S> grads(grad, length), xs(x, length), hs(h, length), products(product, length);
    const auto g = gate<S>(load(products.elements) + bias.first(length));
    const auto d = math::blend_grad(load(grads.elements), load(xs.elements), load(hs.elements), g);
    Padded<Stored, S> out(x, 0);
    const auto write = [&](const Vector<S>& values, Stored* target) {
      if (target == nullptr) return;
      store(values, out.elements);
      out.copy_to(target, length);
    };
    write(d.x, to.x), write(d.h, to.h), write(d.z, to.z);
    sum.add_first(d.z, length);
    return;
  }
  const auto step = [&](std::int64_t i) {
    const auto g = gate<S>(load(product + i) + bias.at(i));
    const auto d = math::blend_grad(load(grad + i), load(x + i), load(h + i), g);
    if (to.x != nullptr) store(d.x, to.x + i);
    if (to.h != nullptr) store(d.h, to.h + i);
    if (to.z != nullptr) store(d.z, to.z + i);
    return d.z;
  };
  std::int64_t i = 0;
  for (; i + width <= length; i += width) sum.add(i, step(i));
  if (i < length) sum.add(length - width, keep_last<S>(step(length - width), length - i));
}

// --- all lines -------------------------------------------------------------------------------------------------------

struct Lines {
  std::int64_t count, length, each;  // `each`: lines of a run

  explicit Lines(const GatedLateralArgs& args)
      : count(args.places == 1 ? args.samples : args.samples * args.channels),
        length(args.places == 1 ? args.channels : args.places),
        each(length * kRunLines <= kRunElements ? kRunLines
             : length < kRunElements            ? kRunElements / length
                                                : 1) {}
  std::int64_t runs() const { return (count + each - 1) / each; }

  // Calls body(run, first line, last line), the last one not included. The first thread takes the first lines, as it
  // does in the products around a pass: they are in its core's cache then, 4 % of a lateral of 256 x 256.
  template <class Body>
  void for_each_run(int threads, const Body& body) const {
    parallel_shares(runs() > 1 ? threads : 1, [&](std::int64_t share, std::int64_t shares) {
      for (std::int64_t run = share * runs() / shares; run < (share + 1) * runs() / shares; ++run)
        body(run, run * each, (run + 1) * each < count ? (run + 1) * each : count);
    });
  }
};

template <class Stored>
Same<Stored> channel_bias(const GatedLateralArgs& args, std::int64_t line) {
  using S = Compute<Stored>;
  return {args.bias == nullptr ? Vector<S>{}
                               : broadcast(widen(static_cast<const Stored*>(args.bias)[line % args.channels]))};
}

void forward(const GatedLateralArgs& args) {
  dispatch(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    Stored* y = static_cast<Stored*>(args.y);
    const Stored* x = static_cast<const Stored*>(args.x);
    const Stored* h = static_cast<const Stored*>(args.h);
    const Stored* product = static_cast<const Stored*>(args.product);
    const Lines lines(args);
    lines.for_each_run(args.threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
      for (std::int64_t line = first; line < last; ++line) {
        const std::int64_t at = line * lines.length;
        if (args.places == 1 && args.bias != nullptr)
          forward_line(y + at, x + at, h + at, product + at, Along<Stored>{static_cast<const Stored*>(args.bias)},
                       lines.length);
        else
          forward_line(y + at, x + at, h + at, product + at, channel_bias<Stored>(args, line), lines.length);
      }
    });
  });
}

// bias_grad[c] = sum_k partial[k][c], in the order of k; in float64, so that rounding does not grow with k.
template <class Stored, class Partial>
void sum_partial(const Partial* partial, std::int64_t count, std::int64_t channels, Stored* bias_grad, int threads) {
  constexpr std::int64_t block = 64;
  parallel_for(count * channels < kRunElements ? 1 : threads, (channels + block - 1) / block,
               [&](std::int64_t index, int) {
                 const std::int64_t first = index * block;
                 const std::int64_t width = first + block < channels ? block : channels - first;
                 double totals[block] = {};
                 for (std::int64_t k = 0; k < count; ++k)
                   for (std::int64_t c = 0; c < width; ++c)
                     totals[c] += static_cast<double>(partial[k * channels + first + c]);
                 for (std::int64_t c = 0; c < width; ++c)
                   narrow(static_cast<Compute<Stored>>(totals[c]), bias_grad + first + c);
               });
}

std::int64_t workspace(const GatedLateralArgs& args) {
  const Lines lines(args);
  const std::int64_t sums = args.places == 1 ? lines.runs() * args.channels : lines.count;
  return sums * static_cast<std::int64_t>(sizeof(double));
}

void backward(const GatedLateralArgs& args) {
  dispatch(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using S = Compute<Stored>;
    const Gradients<Stored> to{static_cast<Stored*>(args.x_grad), static_cast<Stored*>(args.h_grad),
                               static_cast<Stored*>(args.logit_grad)};
    const Stored* grad = static_cast<const Stored*>(args.grad);
    const Stored* x = static_cast<const Stored*>(args.x);
    const Stored* h = static_cast<const Stored*>(args.h);
    const Stored* product = static_cast<const Stored*>(args.product);
    Stored* bias_grad = static_cast<Stored*>(args.bias_grad);
    const Lines lines(args);
    const bool along = args.places == 1;
    lines.for_each_run(args.threads, [&](std::int64_t run, std::int64_t first, std::int64_t last) {
      SumAlong<S> rows{bias_grad != nullptr && along ? static_cast<S*>(args.workspace) + run * lines.length : nullptr};
      if (rows.sums != nullptr)
        for (std::int64_t i = 0; i < lines.length; ++i) rows.sums[i] = 0;
      for (std::int64_t line = first; line < last; ++line) {
        const std::int64_t at = line * lines.length;
        const auto pass = [&](const auto& bias, auto& sum) {
          backward_line(to.from(at), grad + at, x + at, h + at, product + at, bias, sum, lines.length);
        };
        if (along) {
          if (args.bias != nullptr)
            pass(Along<Stored>{static_cast<const Stored*>(args.bias)}, rows);
          else
            pass(Same<Stored>{}, rows);
        } else {
          SumAll<S> places;
          pass(channel_bias<Stored>(args, line), places);
          if (bias_grad != nullptr) static_cast<double*>(args.workspace)[line] = places.flush();
        }
      }
    });
    if (bias_grad == nullptr) return;
    if (along)
      sum_partial(static_cast<const S*>(args.workspace), lines.runs(), args.channels, bias_grad, args.threads);
    else
      sum_partial(static_cast<const double*>(args.workspace), args.samples, args.channels, bias_grad, args.threads);
  });
}

}  // namespace

void fill_gated_lateral(Kernels& kernels) {
  kernels.gated_lateral = forward;
  kernels.gated_lateral_workspace = workspace;
  kernels.gated_lateral_backward = backward;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
