// The contraction for kernels of 3 x 3 with a step of one, in Winograd's form (winograd.h): per sample 16 products over
// the tiles of 2 x 2 places instead of 9 over all places. They go through the register tile of contraction.h, point by
// point; then the kernel's gradient is put together, squared and added, in vectors of output channels.
#pragma once

#include "cpu/conv_geometry.h"
#include "cpu/winograd.h"

namespace limpet::cpu {
namespace {

constexpr std::int64_t kTaps = 9;

// Whether tiles take less work: a sample costs 16 products a tile, and as much as some 80 to put them together and add
// their squares, against 9 products a place (measured: 16 places are as fast without). Panels that would be mostly
// empty gain nothing.
template <class S>
bool tiles_are_faster(const ConvArgs& args) {
  const auto is = [](const std::int64_t* v, std::int64_t a, std::int64_t b, std::int64_t c) {
    return v[0] == a && v[1] == b && v[2] == c;
  };
  if (!is(args.kernel, 1, 3, 3) || !is(args.stride, 1, 1, 1) || !is(args.dilation, 1, 1, 1) || args.padding[0] != 0)
    return false;
  if (args.in_channels / args.groups < lanes<S> || args.out_channels / args.groups < lanes<S>) return false;
  const std::int64_t places = args.output_size[0] * args.output_size[1] * args.output_size[2];
  return kPoints * output_tiles(args.output_size).count() + 80 < kTaps * places;
}

// What a job computes is one panel of the output channels for some blocks of input channels. It transforms what it
// needs by itself, strip by strip of a picture, or some small pictures at a time: values that went through memory to
// other cores cost more than transforming them again (a half of all time with 64 channels on two threads).
constexpr std::int64_t kStripTiles = 64;
constexpr std::int64_t kRowBlocks = 16;  // of a job

// Workspace: offsets of tiles | per thread: a strip with zeros around it, packed without, panels of inputs, a panel of
// gradients, products, sums of squares.
template <class S>
struct TilesLayout {
  OutputTiles tiles;
  std::int64_t samples;                                        // at a time
  std::int64_t strip, strips;                                  // rows of tiles of a strip, strips of a picture
  std::int64_t rows, across;                                   // of a strip with zeros around it
  std::int64_t sample_inputs, sample_grads;                    // elements of a strip
  std::int64_t offsets, threads, end;                          // in bytes
  std::int64_t packed, inputs, grads, products, sums, thread;  // in bytes; within a thread's part

  explicit TilesLayout(const ConvArgs& args) : tiles(output_tiles(args.output_size)) {
    const auto bytes = [](std::int64_t n, std::int64_t size) { return ceil_div(n * size, 64) * 64; };
    const std::int64_t size = sizeof(S);
    strip = max_of(1, min_of(tiles.down, kStripTiles / max_of(1, tiles.across)));
    strips = ceil_div(tiles.down, strip);
    const std::int64_t count = strip * tiles.across;
    const std::int64_t blocks = min_of(kRowBlocks, ceil_div(args.in_channels / args.groups, kMR));  // of a job, at most
    samples = tiles.frames * strips > 1 ? 1 : max_of(1, min_of(args.samples, kStripTiles / max_of(1, count)));
    rows = 2 * strip + 2;
    across = 2 * tiles.across + 2;
    sample_inputs = ceil_div(blocks * kMR, lanes<S>) * Panel<S>{count, lanes<S>}.size();
    sample_grads = Panel<S>{count, kNR<S>}.size();
    offsets = 0;
    threads = bytes(count, 8);
    packed = bytes(rows * across * lanes<S>, size);
    inputs = packed + bytes(rows * across * lanes<S>, size);
    grads = inputs + bytes(samples * sample_inputs, size);
    products = grads + bytes(samples * sample_grads, size);
    sums = products + bytes(blocks * kPoints * kBlock<S>, size);
    thread = sums + bytes(blocks * kTaps * kBlock<S>, size);
    end = threads + thread * max_of(1, args.threads);
  }
};

// The gradients' values at the points.
template <class S>
void transform_grads(const Picture<S>& picture, const OutputTiles& tiles, std::int64_t point, std::int64_t tile,
                     S* to) {
  using V = Vector<S>;
  const V half = broadcast(static_cast<S>(0.5));
  const auto line = [&](const V& g0, const V& g1, V* at) {
    const V h0 = g0 * half, h1 = g1 * half;
    at[0] = g0;
    at[1] = h0 + h1;
    at[2] = h0 - h1;
    at[3] = g1;
  };
  for (std::int64_t i = 0; i < tiles.down; ++i)
    for (std::int64_t j = 0; j < tiles.across; ++j, to += tile) {
      V upper[4], lower[4];
      line(load(picture.at(2 * i, 2 * j)), load(picture.at(2 * i, 2 * j + 1)), upper);
      line(load(picture.at(2 * i + 1, 2 * j)), load(picture.at(2 * i + 1, 2 * j + 1)), lower);
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        V column[4];
        line(upper[l], lower[l], column);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) store<S>(column[k], to + (4 * k + l) * point);
      }
    }
}

// Adds the squares of the kernel's gradient of one input channel and a vector of output channels.
template <class S>
LIMPET_FORMULA void add_squares_of_kernel(const S* products, std::int64_t point, S* sums, std::int64_t tap) {
  using V = Vector<S>;
  const auto line = [](const V& m0, const V& m1, const V& m2, const V& m3, V* to, int step) {
    const V sum = m1 + m2;
    to[0] = m0 + sum;
    to[step] = m1 - m2;
    to[2 * step] = sum + m3;
  };
  V half[12];  // [3, 4]
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l)
    line(load(products + l * point), load(products + (4 + l) * point), load(products + (8 + l) * point),
         load(products + (12 + l) * point), half + l, 4);
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    V gradient[3];
    line(half[4 * k], half[4 * k + 1], half[4 * k + 2], half[4 * k + 3], gradient, 1);
#pragma GCC unroll 3
    for (int l = 0; l < 3; ++l) {
      V sum = load(sums + (3 * k + l) * tap);
      math::add_square(sum, gradient[l]);
      store<S>(sum, sums + (3 * k + l) * tap);
    }
  }
}

// total [columns, ...] += sums [count, width] transposed, for `columns` of the width.
template <class S>
void add_transposed(const S* sums, std::int64_t width, std::int64_t count, std::int64_t columns, S* total,
                    std::int64_t stride) {
  for (std::int64_t column = 0; column < columns; column += lanes<S>)
    for (std::int64_t first = 0; first < count; first += lanes<S>) {
      const std::int64_t some = min_of(lanes<S>, count - first), height = min_of(lanes<S>, columns - column);
      Vector<S> square[lanes<S>];
      for (std::int64_t i = 0; i < lanes<S>; ++i)
        square[i] = load(sums + (first + min_of(i, some - 1)) * width + column);
      transpose<S>(square);
      for (std::int64_t c = 0; c < height; ++c) {
        S* const to = total + (column + c) * stride + first;
        if (some == lanes<S>)
          store<S>(load(to) + square[c], to);
        else
          for (std::int64_t i = 0; i < some; ++i) to[i] += square[c][i];
      }
    }
}

template <class Stored>
void contract_tiles(const ConvArgs& args) {
  using S = Compute<Stored>;
  const TilesLayout<S> layout(args);
  const OutputTiles& tiles = layout.tiles;
  char* const workspace = static_cast<char*>(args.workspace);
  std::int64_t* const offsets = reinterpret_cast<std::int64_t*>(workspace + layout.offsets);
  for (std::int64_t t = 0; t < layout.strip * tiles.across; ++t) offsets[t] = t * lanes<S>;

  const std::int64_t channels = args.in_channels / args.groups, columns = args.out_channels / args.groups;
  const std::int64_t grad_panels = ceil_div(columns, kNR<S>), row_blocks = ceil_div(channels, kMR);
  const int threads = worthwhile(args.threads, args.samples * kPoints * tiles.count() * channels * args.out_channels);
  const std::int64_t column_panels = args.groups * grad_panels;
  const std::int64_t row_groups =
      max_of(ceil_div(row_blocks, kRowBlocks), min_of(row_blocks, ceil_div(threads, column_panels)));
  const std::int64_t strips = tiles.frames * layout.strips;  // of a sample
  const std::int64_t *const xs = args.input_strides, *const ds = args.output_grad_strides;

  parallel_for(threads, column_panels * row_groups, [&](std::int64_t job, int worker) {
    const std::int64_t part = job % row_groups, q = job / row_groups % grad_panels, g = job / row_groups / grad_panels;
    const std::int64_t block0 = row_blocks * part / row_groups, blocks = row_blocks * (part + 1) / row_groups - block0;
    const std::int64_t row0 = block0 * kMR, rows = min_of(blocks * kMR, channels - row0);
    const std::int64_t column0 = q * kNR<S>, some = min_of(kNR<S>, columns - column0);
    const int vectors = panel_vectors<S>(columns, column0);
    const auto height_of = [&](std::int64_t block) { return static_cast<int>(min_of(kMR, rows - block * kMR)); };
    char* const scratch = workspace + layout.threads + layout.thread * worker;
    const Picture<S> picture{reinterpret_cast<S*>(scratch), layout.rows, layout.across};
    S* const packed = reinterpret_cast<S*>(scratch + layout.packed);
    S* const inputs = reinterpret_cast<S*>(scratch + layout.inputs);
    S* const grads = reinterpret_cast<S*>(scratch + layout.grads);
    S* const products = reinterpret_cast<S*>(scratch + layout.products);  // [point, block, row, column]
    S* const sums = reinterpret_cast<S*>(scratch + layout.sums);          // [block, row, tap, column]
    for (std::int64_t i = 0; i < blocks * kTaps * kBlock<S>; ++i) sums[i] = 0;

    for (std::int64_t n0 = 0; n0 < args.samples; n0 += layout.samples)
      for (std::int64_t s = 0; s < strips; ++s) {
        const std::int64_t frame = s / layout.strips, down = s % layout.strips * layout.strip;
        const std::int64_t samples = min_of(layout.samples, args.samples - n0);
        const OutputTiles strip{1, min_of(layout.strip, tiles.down - down), tiles.across};
        const Panel<S> input_panel{strip.count(), lanes<S>}, grad_panel{strip.count(), vectors * lanes<S>};
        std::int64_t row_offsets[kRowBlocks * kMR];
        for (std::int64_t i = 0; i < blocks * kMR; ++i) {
          const std::int64_t c = min_of(i, rows - 1);
          row_offsets[i] = c / lanes<S> * input_panel.size() + c % lanes<S>;
        }
        for (std::int64_t n = 0; n < samples; ++n) {
          const Stored* const x =
              static_cast<const Stored*>(args.input) + (n0 + n) * xs[0] + (g * channels + row0) * xs[1] + frame * xs[2];
          for (std::int64_t c = 0; c < rows; c += lanes<S>) {
            picture.fill(x + c * xs[1], xs[1], args.input_size + 1, xs + 3, min_of(lanes<S>, rows - c),
                         args.padding[1] - 2 * down, args.padding[2], packed);
            transform_picture<S>(picture, strip, input_panel.point(), lanes<S>,
                                 inputs + n * layout.sample_inputs + c / lanes<S> * input_panel.size());
          }
          const Stored* const d = static_cast<const Stored*>(args.output_grad) + (n0 + n) * ds[0] +
                                  (g * columns + column0) * ds[1] + frame * ds[2];
          for (std::int64_t c = 0; c < some; c += lanes<S>) {
            picture.fill(d + c * ds[1], ds[1], args.output_size + 1, ds + 3, min_of(lanes<S>, some - c), -2 * down, 0,
                         packed);
            transform_grads<S>(picture, strip, grad_panel.point(), grad_panel.width,
                               grads + n * layout.sample_grads + c);
          }
        }

        // With few tiles a block's products and sums stay in the first cache, with many a point's gradients.
        const std::int64_t together = strips > 1 || 2 * strip.count() > kStripTiles ? blocks : 1;
        for (std::int64_t first = 0; first < blocks; first += together)
          for (std::int64_t n = 0; n < samples; ++n) {
            Tile<S> tile;
            tile.offsets = offsets;
            tile.samples = 1;
            tile.row_sample = 0;
            tile.places = strip.count();
            tile.width = grad_panel.width;
            tile.sum = products;
            tile.sum_step = kNR<S>;
            tile.squares = false;
            tile.first = s == 0;
            tile.last = false;
            tile.carry = products;
            for (int f = 0; f < kPoints; ++f) {
              tile.columns = grads + n * layout.sample_grads + f * grad_panel.point();
              const S* const point = inputs + n * layout.sample_inputs + f * input_panel.point();
              const std::int64_t* at = row_offsets + first * kMR;
              for (std::int64_t block = first; block < first + together; ++block, tile.carry += kBlock<S>) {
                for (int r = 0; r < kMR; ++r) tile.rows[r] = point + *at++;
                run_tile(tile, height_of(block), vectors);
              }
            }
            if (s + 1 < strips) continue;
            for (std::int64_t block = first; block < first + together; ++block)
              for (int r = 0; r < height_of(block); ++r)
                for (int v = 0; v < vectors; ++v)
                  add_squares_of_kernel(products + (block - first) * kBlock<S> + r * kNR<S> + v * lanes<S>,
                                        together * kBlock<S>, sums + (block * kMR + r) * kTaps * kNR<S> + v * lanes<S>,
                                        kNR<S>);
          }
      }
    add_transposed(sums, kNR<S>, rows * kTaps, some,
                   static_cast<S*>(args.total) + ((g * columns + column0) * channels + row0) * kTaps, channels * kTaps);
  });
}

}  // namespace
}  // namespace limpet::cpu
