// Biases, scales and embeddings: sums of a sample's places, squared, without a matrix product.

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// sum over b of d[b] * x[b] for neighbouring elements (x null: of d[b]), in independent lanes.
template <class Stored>
Compute<Stored> dot(const Stored* d, const Stored* x, std::int64_t count) {
  using S = Compute<Stored>;
  Vector<S> sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * lanes<S> <= count; i += 4 * lanes<S>)
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = i + k * lanes<S>;
      sums[k] += x ? load(d + at) * load(x + at) : load(d + at);
    }
  const Vector<S> lane_sums = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  S sum = 0;
  for (int lane = 0; lane < lanes<S>; ++lane) sum += lane_sums[lane];
  for (; i < count; ++i) sum += x ? widen(d[i]) * widen(x[i]) : widen(d[i]);
  return sum;
}

// [N, A, C, B] with B neighbouring (convolutions): a channel at a time.
template <class Stored>
void channels_first(const ChannelArgs& args, std::int64_t begin, std::int64_t end) {
  using S = Compute<Stored>;
  const std::int64_t *const ds = args.output_grad_strides, *const xs = args.input_strides;
  const Stored* const d = static_cast<const Stored*>(args.output_grad);
  const Stored* const x = static_cast<const Stored*>(args.input);
  for (std::int64_t c = begin; c < end; ++c) {
    S total = 0;
    for (std::int64_t n = 0; n < args.sizes[0]; ++n) {
      S sum = 0;
      for (std::int64_t a = 0; a < args.sizes[1]; ++a)
        sum += dot(d + n * ds[0] + a * ds[1] + c * ds[2], x ? x + n * xs[0] + a * xs[1] + c * xs[2] : nullptr,
                   args.sizes[3]);
      math::add_square(total, sum);
    }
    static_cast<S*>(args.total)[c] += total;
  }
}

// Any strides: a block of channels at a time, place after place (neighbouring channels for linear layers).
template <class Stored>
void channels_last(const ChannelArgs& args, std::int64_t begin, std::int64_t end) {
  using S = Compute<Stored>;
  constexpr std::int64_t block = 256;
  const std::int64_t *const ds = args.output_grad_strides, *const xs = args.input_strides;
  const Stored* const d = static_cast<const Stored*>(args.output_grad);
  const Stored* const x = static_cast<const Stored*>(args.input);
  for (std::int64_t c0 = begin; c0 < end; c0 += block) {
    const std::int64_t count = min_of(block, end - c0);
    S total[block] = {};
    for (std::int64_t n = 0; n < args.sizes[0]; ++n) {
      S sum[block] = {};
      for (std::int64_t a = 0; a < args.sizes[1]; ++a)
        for (std::int64_t b = 0; b < args.sizes[3]; ++b) {
          const Stored* const dp = d + n * ds[0] + a * ds[1] + c0 * ds[2] + b * ds[3];
          const Stored* const xp = x ? x + n * xs[0] + a * xs[1] + c0 * xs[2] + b * xs[3] : nullptr;
          if (ds[2] == 1 && (!x || xs[2] == 1)) {
            if (x)
              for (std::int64_t c = 0; c < count; ++c) sum[c] += widen(dp[c]) * widen(xp[c]);
            else
              for (std::int64_t c = 0; c < count; ++c) sum[c] += widen(dp[c]);
          } else {
            for (std::int64_t c = 0; c < count; ++c)
              sum[c] += x ? widen(dp[c * ds[2]]) * widen(xp[c * xs[2]]) : widen(dp[c * ds[2]]);
          }
        }
      for (std::int64_t c = 0; c < count; ++c) math::add_square(total[c], sum[c]);
    }
    for (std::int64_t c = 0; c < count; ++c) static_cast<S*>(args.total)[c0 + c] += total[c];
  }
}

template <class Stored>
void channel(const ChannelArgs& args) {
  const std::int64_t channels = args.sizes[2];
  const std::int64_t elements = args.sizes[0] * args.sizes[1] * channels * args.sizes[3];
  const bool rows =
      args.sizes[3] > 1 && args.output_grad_strides[3] == 1 && (!args.input || args.input_strides[3] == 1);
  // Channels are cut at multiples of 16, so that a thread's stores do not share a cache line with another's.
  const std::int64_t step = 16 * max_of(1, channels / 16 / (8 * max_of(1, args.threads)));
  parallel_for(worthwhile(args.threads, elements), ceil_div(channels, step), [&](std::int64_t i, int) {
    const std::int64_t begin = i * step, end = min_of(channels, begin + step);
    if (rows)
      channels_first<Stored>(args, begin, end);
    else
      channels_last<Stored>(args, begin, end);
  });
}

void sum_grad_squared_channel(const ChannelArgs& args) {
  dispatch(args.dtype, [&](auto stored) { channel<decltype(stored)>(args); });
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
