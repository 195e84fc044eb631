// Biases, scales and embeddings: sums of a sample's places, squared, without a matrix product.

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// What a bias's or a scale's gradient sums over a sample's places.
enum class Term {
  grad,     // d
  product,  // d x
  centred,  // d (x - shift[c])
};

// V: an element, or a vector of them.
template <Term term, class V>
LIMPET_FORMULA V add_term(const V& sum, const V& d, const V& x, const V& shift) {
  if constexpr (term == Term::grad) return sum + d;
  if constexpr (term == Term::product) return sum + d * x;
  return sum + d * (x - shift);
}

// A ChannelArgs whose inner places B are the more numerous ones.
template <class Stored>
struct Channels {
  using S = Compute<Stored>;
  S* total;
  const Stored *d, *x;
  const S* shift;
  std::int64_t samples, outer, channels, inner;  // N, A, C, B
  std::int64_t ds[4], xs[4];

  explicit Channels(const ChannelArgs& args)
      : total(static_cast<S*>(args.total)),
        d(static_cast<const Stored*>(args.output_grad)),
        x(static_cast<const Stored*>(args.input)),
        shift(static_cast<const S*>(args.shift)),
        samples(args.sizes[0]),
        channels(args.sizes[2]) {
    const int a = args.sizes[3] == 1 ? 3 : 1, b = 4 - a;
    outer = args.sizes[a];
    inner = args.sizes[b];
    for (int i = 0; i < 4; ++i) {
      const int from = i == 1 ? a : i == 3 ? b : i;
      ds[i] = args.output_grad_strides[from];
      xs[i] = args.input_strides[from];
    }
  }

  // Where a channel of a sample starts.
  const Stored* d_at(std::int64_t n, std::int64_t c) const { return d + n * ds[0] + c * ds[2]; }
  const Stored* x_at(std::int64_t n, std::int64_t c) const { return x + n * xs[0] + c * xs[2]; }
};

constexpr std::int64_t kChannels = 64;  // channels whose sums of squares are kept at a time

// The sum of the terms of `count` neighbouring places, in independent lanes. `vectors`: how many whole ones they are,
// 4 for any number from there on; short rows (the small maps of a deep network) then cost no loop.
template <Term term, int vectors, class Stored>
LIMPET_FORMULA Compute<Stored> sum_terms(const Stored* d, const Stored* x, Compute<Stored> shift, std::int64_t count) {
  using S = Compute<Stored>;
  using V = Vector<S>;
  if constexpr (vectors == 0) {
    S sum = 0;
    for (std::int64_t i = 0; i < count; ++i)
      sum = add_term<term, S>(sum, widen(d[i]), term == Term::grad ? S{} : widen(x[i]), shift);
    return sum;
  }
  const V shifts = broadcast(shift);
  const auto add = [&](const V& sum, std::int64_t at) {
    return add_term<term>(sum, load(d + at), term == Term::grad ? V{} : load(x + at), shifts);
  };
  V sum = {};
  if constexpr (vectors == 4) {
    V sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * lanes<S> <= count; i += 4 * lanes<S>)
      for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], i + k * lanes<S>);
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (; i + lanes<S> <= count; i += lanes<S>) sum = add(sum, i);
  } else {
    for (int k = 0; k < vectors; ++k) sum = add(sum, k * lanes<S>);
  }
  if (const std::int64_t rest = count % lanes<S>)  // the last vector, of which the first values were added before
    sum += keep_last<S>(add(V{}, count - lanes<S>), rest);
  return sum_lanes<S>(sum);
}

// Neighbouring places (convolutions): sample by sample, so that memory is read in order.
template <Term term, int vectors, class Stored>
void places_adjacent(const Channels<Stored>& args, std::int64_t begin, std::int64_t end) {
  using S = Compute<Stored>;
  const std::int64_t d_outer = args.ds[1], x_outer = args.xs[1], outer = args.outer, inner = args.inner;
  for (std::int64_t c0 = begin; c0 < end; c0 += kChannels) {
    const std::int64_t count = min_of(kChannels, end - c0);
    S total[kChannels] = {};
    for (std::int64_t n = 0; n < args.samples; ++n) {
      const Stored* d = args.d_at(n, c0);
      const Stored* x = term == Term::grad ? d : args.x_at(n, c0);
      for (std::int64_t c = 0; c < count; ++c, d += args.ds[2], x += args.xs[2]) {
        const S shift = term == Term::centred ? args.shift[c0 + c] : S{};
        S sum = sum_terms<term, vectors>(d, x, shift, inner);
        for (std::int64_t a = 1; a < outer; ++a)
          sum += sum_terms<term, vectors>(d + a * d_outer, x + a * x_outer, shift, inner);
        math::add_square(total[c], sum);
      }
    }
    for (std::int64_t c = 0; c < count; ++c) args.total[c0 + c] += total[c];
  }
}

// `places` of one sample, `d_step` and `x_step` apart, of neighbouring channels. Unrolled where it is a constant: the
// sums are then loaded and stored once for all of them.
template <Term term, class Stored>
LIMPET_FORMULA void add_places(const Stored* d, const Stored* x, const Compute<Stored>* shift, std::int64_t d_step,
                               std::int64_t x_step, std::int64_t places, std::int64_t count, Compute<Stored>* sums) {
  using S = Compute<Stored>;
  using V = Vector<S>;
  std::int64_t c = 0;
  for (; c + lanes<S> <= count; c += lanes<S>) {
    const V shifts = term == Term::centred ? load(shift + c) : V{};
    V sum = load(sums + c);
    for (std::int64_t t = 0; t < places; ++t)
      sum = add_term<term>(sum, load(d + t * d_step + c), term == Term::grad ? V{} : load(x + t * x_step + c), shifts);
    store<S>(sum, sums + c);
  }
  for (; c < count; ++c)
    for (std::int64_t t = 0; t < places; ++t)
      sums[c] =
          add_term<term, S>(sums[c], widen(d[t * d_step + c]), term == Term::grad ? S{} : widen(x[t * x_step + c]),
                            term == Term::centred ? shift[c] : S{});
}

// Neighbouring channels (linear layers, channels-last images), and any other strides.
template <Term term, class Stored>
void channels_adjacent(const Channels<Stored>& args, std::int64_t begin, std::int64_t end) {
  using S = Compute<Stored>;
  constexpr std::int64_t block = 8 * kChannels;
  const bool adjacent = args.ds[2] == 1 && (term == Term::grad || args.xs[2] == 1);
  for (std::int64_t c0 = begin; c0 < end; c0 += block) {
    const std::int64_t count = min_of(block, end - c0);
    S total[block] = {};
    for (std::int64_t n = 0; n < args.samples; ++n) {
      alignas(64) S sums[block] = {};
      for (std::int64_t a = 0; a < args.outer; ++a) {
        const Stored* d = args.d_at(n, c0) + a * args.ds[1];
        const Stored* x = term == Term::grad ? d : args.x_at(n, c0) + a * args.xs[1];
        const std::int64_t d_step = args.ds[3], x_step = args.xs[3];
        const S* const shift = term == Term::centred ? args.shift + c0 : nullptr;
        if (adjacent) {
          std::int64_t b = 0;
          for (; b + 4 <= args.inner; b += 4, d += 4 * d_step, x += 4 * x_step)
            add_places<term>(d, x, shift, d_step, x_step, 4, count, sums);
          add_places<term>(d, x, shift, d_step, x_step, args.inner - b, count, sums);
        } else {
          for (std::int64_t b = 0; b < args.inner; ++b, d += d_step, x += x_step)
            for (std::int64_t c = 0; c < count; ++c)
              sums[c] = add_term<term, S>(sums[c], widen(d[c * args.ds[2]]),
                                          term == Term::grad ? S{} : widen(x[c * args.xs[2]]),
                                          term == Term::centred ? shift[c] : S{});
        }
      }
      for (std::int64_t c = 0; c < count; ++c) math::add_square(total[c], sums[c]);
    }
    for (std::int64_t c = 0; c < count; ++c) args.total[c0 + c] += total[c];
  }
}

template <Term term, class Stored>
void channel(const Channels<Stored>& args, int threads) {
  const bool places = args.inner > 1 && args.ds[3] == 1 && (term == Term::grad || args.xs[3] == 1);
  const std::int64_t elements = args.samples * args.outer * args.channels * args.inner;
  if (elements == 0) return;
  // Channels are cut at multiples of 16, so that a thread's stores do not share a cache line with another's;
  // neighbouring ones no finer than there are threads, as each part of them reads its piece of every place.
  const std::int64_t parts = places ? 2 * threads : threads;
  const std::int64_t step = 16 * ceil_div(args.channels, 16 * max_of(1, parts));
  parallel_for(worthwhile(threads, elements), ceil_div(args.channels, step), [&](std::int64_t i, int) {
    const std::int64_t begin = i * step, end = min_of(args.channels, begin + step);
    if (!places) return channels_adjacent<term>(args, begin, end);
    switch (min_of(4, args.inner / lanes<Compute<Stored>>)) {
      case 0: return places_adjacent<term, 0>(args, begin, end);
      case 1: return places_adjacent<term, 1>(args, begin, end);
      case 2: return places_adjacent<term, 2>(args, begin, end);
      case 3: return places_adjacent<term, 3>(args, begin, end);
      default: return places_adjacent<term, 4>(args, begin, end);
    }
  });
}

void sum_grad_squared_channel(const ChannelArgs& args) {
  dispatch(args.dtype, [&](auto stored) {
    const Channels<decltype(stored)> channels(args);
    if (!args.input)
      channel<Term::grad>(channels, args.threads);
    else if (!args.shift)
      channel<Term::product>(channels, args.threads);
    else
      channel<Term::centred>(channels, args.threads);
  });
}

// Equal indices of a sample must be summed before squaring. Each place names the first place with its index
// (`leader`), its row is added to the leader's in scratch, and the leaders' rows are squared. Threads share out the
// width, so no row has two writers.
template <class Stored>
void embedding(const EmbeddingArgs& args) {
  using S = Compute<Stored>;
  const std::int64_t samples = args.samples, places = args.places;
  if (!samples || !places || !args.width) return;
  std::int64_t* const leader = new std::int64_t[static_cast<std::size_t>(samples * places)];
  std::int64_t* const seen = new std::int64_t[static_cast<std::size_t>(args.num_embeddings)];
  for (std::int64_t v = 0; v < args.num_embeddings; ++v) seen[v] = -1;
  for (std::int64_t n = 0; n < samples; ++n)
    for (std::int64_t t = 0; t < places; ++t) {
      const std::int64_t at = n * places + t, index = args.indices[at];
      if (seen[index] < n * places) seen[index] = at;
      leader[at] = seen[index] - n * places;
    }
  delete[] seen;

  constexpr std::int64_t block = 64;
  const std::int64_t* const ds = args.output_grad_strides;
  const Stored* const d = static_cast<const Stored*>(args.output_grad);
  parallel_for(worthwhile(args.threads, samples * places * args.width), ceil_div(args.width, block),
               [&](std::int64_t i, int) {
                 const std::int64_t e0 = i * block, count = min_of(block, args.width - e0);
                 S* const scratch = new S[static_cast<std::size_t>(places * block)];
                 for (std::int64_t n = 0; n < samples; ++n) {
                   const std::int64_t* const leaders = leader + n * places;
                   for (std::int64_t t = 0; t < places; ++t) {
                     const Stored* const from = d + n * ds[0] + t * ds[1] + e0 * ds[2];
                     S* const to = scratch + leaders[t] * block;
                     if (leaders[t] == t)
                       for (std::int64_t e = 0; e < count; ++e) to[e] = widen(from[e * ds[2]]);
                     else
                       for (std::int64_t e = 0; e < count; ++e) to[e] += widen(from[e * ds[2]]);
                   }
                   for (std::int64_t t = 0; t < places; ++t) {
                     const std::int64_t index = args.indices[n * places + t];
                     if (leaders[t] != t || index == args.padding_idx) continue;
                     S* const to = static_cast<S*>(args.total) + index * args.width + e0;
                     for (std::int64_t e = 0; e < count; ++e) math::add_square(to[e], scratch[t * block + e]);
                   }
                 }
                 delete[] scratch;
               });
  delete[] leader;
}

void sum_grad_squared_embedding(const EmbeddingArgs& args) {
  dispatch(args.dtype, [&](auto stored) { embedding<decltype(stored)>(args); });
}

}  // namespace

void fill_fisher_rows(Kernels& kernels) {
  kernels.sum_grad_squared_channel = sum_grad_squared_channel;
  kernels.sum_grad_squared_embedding = sum_grad_squared_embedding;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
