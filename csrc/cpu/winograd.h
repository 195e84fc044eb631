// Winograd's products for kernels of 3 x 3 (Lavin and Gray 2016, arXiv:1509.09308, section 4): a tile of places takes
// products of transformed values, 16 where 2 x 2 places take 36 directly. Outputs and the kernel's gradient come from
// the same transformed inputs.
#pragma once

#include <type_traits>

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu {
namespace {

constexpr std::int64_t kTaps = 9;  // elements of a kernel
template <class S>
constexpr std::int64_t kBlock = kMR * kNR<S>;  // elements of a register tile

template <class V>
LIMPET_FORMULA V times(double factor, const V& v) {
  using S = std::decay_t<decltype(v[0])>;
  return broadcast(static_cast<S>(factor)) * v;
}

// A form of tiles, in one dimension: of a picture, each of `kOutputs` outputs and seen through `kWindow` inputs, which
// begin `kStep` further on for the next one. What is multiplied at the points: `inputs`' values, and those of the other
// factor with its `count` elements, the kernel turned round or the outputs' gradients. `sums` gives of the products the
// `count` elements of the result, the outputs or the kernel's gradient.
//
// Two outputs by four products, F(2, 3), with the points 0, 1, -1 and infinity.
struct TilesOfTwo {
  static constexpr int kWindow = 4, kStep = 2, kPoints = 4, kOutputs = 2;

  template <class V>
  LIMPET_FORMULA static void inputs(const V* d, V* at) {
    at[0] = d[0] - d[2];
    at[1] = d[1] + d[2];
    at[2] = d[2] - d[1];
    at[3] = d[3] - d[1];
  }
  template <int count, class V>
  LIMPET_FORMULA static void factor(const V* c, V* at) {
    const V even = times(0.5, count == 3 ? c[0] + c[count - 1] : c[0]), odd = times(0.5, c[1]);
    at[0] = c[0];
    at[1] = even + odd;
    at[2] = even - odd;
    at[3] = c[count - 1];
  }
  template <int count, class V>
  LIMPET_FORMULA static void sums(const V* m, V* y) {
    const V sum = m[1] + m[2];
    y[0] = m[0] + sum;
    y[1] = m[1] - m[2];
    if (count == 3) y[count - 1] = sum;
    y[count - 1] += m[3];
  }
};

// Four outputs by six products, F(4, 3), with the points 0, a, -a, b, -b and infinity. With a = 5/8 and b = 3/2 the
// error of tiles of 4 x 4 is 0.8e-6 of the norm where the products of 64 channels are added up; it would be 2e-6 with
// the usual 1 and 2, and is 0.4e-6 for a direct convolution that adds up 64 channels.
struct TilesOfFour {
  static constexpr int kWindow = 6, kStep = 4, kPoints = 6, kOutputs = 4;
  static constexpr double a = 0.625, b = 1.5, aa = a * a, bb = b * b;

  template <class V>
  LIMPET_FORMULA static void inputs(const V* d, V* at) {
    const V even_a = d[4] - times(bb, d[2]), odd_a = times(a, d[3]) - times(a * bb, d[1]);
    const V even_b = d[4] - times(aa, d[2]), odd_b = times(b, d[3]) - times(b * aa, d[1]);
    at[0] = (times(aa * bb, d[0]) - times(aa + bb, d[2])) + d[4];
    at[1] = even_a + odd_a;
    at[2] = even_a - odd_a;
    at[3] = even_b + odd_b;
    at[4] = even_b - odd_b;
    at[5] = (times(aa * bb, d[1]) - times(aa + bb, d[3])) + d[5];
  }
  // Divided at each point by the product of its differences from the others.
  template <int count, class V>
  LIMPET_FORMULA static void factor(const V* c, V* at) {
    constexpr double at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));
    V odd_a = times(at_a * a, c[1]), odd_b = times(at_b * b, c[1]);
    if (count == 4) odd_a += times(at_a * a * aa, c[count - 1]), odd_b += times(at_b * b * bb, c[count - 1]);
    const V even_a = times(at_a, c[0]) + times(at_a * aa, c[2]), even_b = times(at_b, c[0]) + times(at_b * bb, c[2]);
    at[0] = times(1 / (aa * bb), c[0]);
    at[1] = even_a + odd_a;
    at[2] = even_a - odd_a;
    at[3] = even_b + odd_b;
    at[4] = even_b - odd_b;
    at[5] = c[count - 1];
  }
  template <int count, class V>
  LIMPET_FORMULA static void sums(const V* m, V* y) {
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = times(a, difference_a) + times(b, difference_b);
    if (count == 4) y[2] = times(aa, sum_a) + times(bb, sum_b);
    y[count - 1] = count == 4 ? (m[5] + times(a * aa, difference_a)) + times(b * bb, difference_b)
                              : (m[5] + times(aa, sum_a)) + times(bb, sum_b);
  }
};

template <class Form>
constexpr std::int64_t kPoints = Form::kPoints * Form::kPoints;  // products of a tile

// Transformed values: [panel, point, tile, width], with a vector between points, as steps of whole pages would all fall
// on the same lines of a cache.
template <class S>
struct Panel {
  std::int64_t tiles, width;
  LIMPET_FORMULA constexpr std::int64_t point() const { return tiles * width + lanes<S>; }
  LIMPET_FORMULA std::int64_t size(std::int64_t points) const { return points * point(); }
};

// Tiles of a sample, those at the end of a picture with zeros behind it.
struct TileCounts {
  std::int64_t frames, down, across;  // pictures of a sample, rows of tiles of a picture, tiles of a row
  LIMPET_FORMULA std::int64_t count() const { return frames * down * across; }
};

// How the samples' pictures are cut: into strips of some rows of tiles, or some small pictures at a time.
template <class Form>
struct Strips {
  TileCounts tiles;           // of a sample
  std::int64_t height;        // rows of tiles of a strip
  std::int64_t of_picture;    // strips
  std::int64_t count;         // strips of a sample
  std::int64_t samples;       // at a time
  std::int64_t rows, across;  // places that a strip sees

  // `most`: tiles of a strip, or of the small pictures together; but at least a row.
  Strips(const TileCounts& tiles, std::int64_t num_samples, std::int64_t most)
      : tiles(tiles),
        height(max_of(1, min_of(tiles.down, most / max_of(1, tiles.across)))),
        of_picture(ceil_div(tiles.down, height)),
        count(tiles.frames * of_picture),
        samples(count == 1 ? max_of(1, min_of(num_samples, most / max_of(1, size()))) : 1),
        rows(Form::kStep * (height - 1) + Form::kWindow),
        across(Form::kStep * (tiles.across - 1) + Form::kWindow) {}

  std::int64_t size() const { return height * tiles.across; }  // tiles of a strip, at most
  std::int64_t frame(std::int64_t s) const { return s / of_picture; }
  std::int64_t down(std::int64_t s) const { return s % of_picture * height; }  // rows of tiles above
  TileCounts operator[](std::int64_t s) const { return {1, min_of(height, tiles.down - down(s)), tiles.across}; }
};

// The lanes of a vector are channels: those of one picture, [rows, across, lanes], with zeros around it.
template <class S>
struct Picture {
  S* places;
  std::int64_t rows, across;

  LIMPET_FORMULA S* at(std::int64_t row, std::int64_t column) const {
    return places + (row * across + column) * lanes<S>;
  }
  // The part of a picture whose first place belongs at [row0, column0], zeros around it. Lanes from `count` on are
  // undefined. `packed`: room for as much.
  template <class Stored>
  void fill(const Stored* from, std::int64_t channel_stride, const std::int64_t* size, const std::int64_t* strides,
            std::int64_t count, std::int64_t row0, std::int64_t column0, S* packed) const {
    const std::int64_t first = max_of(0, row0), last = max_of(first, min_of(rows, row0 + size[0]));
    const std::int64_t width = max_of(0, min_of(size[1], across - column0));
    from += (first - row0) * strides[0];
    // Lines shorter than a vector are packed one behind another.
    const bool flat = size[1] < lanes<S> && size[1] <= across && strides[0] == strides[1] * size[1];
    if (flat) pack(from, channel_stride, strides[1], (last - first) * size[1], count, lanes<S>, false, packed);
    const auto clear = [&](std::int64_t row, std::int64_t column, std::int64_t end) {
      for (; column < end; ++column) store<S>(Vector<S>{}, at(row, column));
    };
    for (std::int64_t row = 0; row < rows; ++row) {
      if (row < first || row >= last || width == 0) {
        clear(row, 0, across);
        continue;
      }
      clear(row, 0, column0);
      if (flat)
        for (std::int64_t i = 0; i < width; ++i)
          store<S>(load(packed + ((row - first) * size[1] + i) * lanes<S>), at(row, column0 + i));
      else
        pack(from + (row - first) * strides[0], channel_stride, strides[1], width, count, lanes<S>, false,
             at(row, column0));
      clear(row, column0 + width, across);
    }
  }
};

// A transform of one dimension along both: read(k, l), of [size, size], to write(k, l, value), of [points, points].
template <int size, int points, class V, class Read, class Line, class Write>
LIMPET_FORMULA void along_both(const Read& read, const Line& line, const Write& write) {
  V lines[size][points];
#pragma GCC unroll 6
  for (int k = 0; k < size; ++k) {
    V from[size];
#pragma GCC unroll 6
    for (int l = 0; l < size; ++l) from[l] = read(k, l);
    line(from, lines[k]);
  }
#pragma GCC unroll 6
  for (int l = 0; l < points; ++l) {
    V from[size], to[points];
#pragma GCC unroll 6
    for (int k = 0; k < size; ++k) from[k] = lines[k][l];
    line(from, to);
#pragma GCC unroll 6
    for (int k = 0; k < points; ++k) write(k, l, to[k]);
  }
}

// The values of a picture's tiles, `step` places apart: point f of tile t goes to `to` + f * point + t * tile.
template <int size, int points, class S, class Line>
LIMPET_FORMULA void transform_tiles(const Picture<S>& picture, const TileCounts& tiles, int step, const Line& line,
                                    std::int64_t point, std::int64_t tile, S* to) {
  for (std::int64_t i = 0; i < tiles.down; ++i)
    for (std::int64_t j = 0; j < tiles.across; ++j, to += tile)
      along_both<size, points, Vector<S>>(
          [&](int k, int l) LIMPET_INLINE { return load(picture.at(step * i + k, step * j + l)); }, line,
          [&](int k, int l, const Vector<S>& value) LIMPET_INLINE { store<S>(value, to + (points * k + l) * point); });
}

// The inputs' values.
template <class Form, class S>
void transform_picture(const Picture<S>& picture, const TileCounts& tiles, std::int64_t point, std::int64_t tile,
                       S* to) {
  using V = Vector<S>;
  transform_tiles<Form::kWindow, Form::kPoints>(
      picture, tiles, Form::kStep, [](const V* d, V* at) LIMPET_INLINE { Form::inputs(d, at); }, point, tile, to);
}

// What is multiplied at all `points`: rows and columns, over places that are taken a run at a time.
template <class S>
struct PointProducts {
  std::int64_t points;
  const S* rows;                    // the first at the first point
  std::int64_t row_point, row_run;  // from one point, one run of places to the next
  const std::int64_t *row_offsets, *place_offsets;
  const S* columns;           // panels of [points, places, width], as Panel has them
  std::int64_t column_panel;  // from one panel to the next
  std::int64_t num_rows, num_columns, places, run;
  bool add;     // to the products that are there
  S* products;  // [points, panels, blocks of kMR rows, kMR, kNR]

  std::int64_t blocks() const { return ceil_div(num_rows, kMR); }
  std::int64_t panels() const { return ceil_div(num_columns, kNR<S>); }
  std::int64_t point() const { return panels() * blocks() * kBlock<S>; }  // products of a point
};

// Point by point, so that a point's operands are still in the cache when the next panel needs them.
template <class S>
void multiply(const PointProducts<S>& p) {
  Tile<S> tile;
  tile.offsets = p.place_offsets;
  tile.samples = 1;
  tile.row_sample = 0;
  tile.sum = p.products;  // only fetched ahead
  tile.sum_step = kNR<S>;
  tile.squares = false;
  tile.last = false;  // products are left where a sample's next segment would find them
  for (std::int64_t f = 0; f < p.points; ++f)
    for (std::int64_t q = 0; q < p.panels(); ++q) {
      const int vectors = panel_vectors<S>(p.num_columns, q * kNR<S>);
      tile.width = vectors * lanes<S>;
      const S* const columns = p.columns + q * p.column_panel + f * Panel<S>{p.places, tile.width}.point();
      for (std::int64_t first = 0, run = 0; first < p.places; first += p.run, ++run) {
        tile.places = min_of(p.run, p.places - first);
        tile.columns = columns + first * tile.width;
        tile.first = first == 0 && !p.add;
        tile.carry = p.products + f * p.point() + q * p.blocks() * kBlock<S>;
        const S* const rows = p.rows + f * p.row_point + run * p.row_run;
        for (std::int64_t row = 0; row < p.num_rows; row += kMR, tile.carry += kBlock<S>) {
          for (int r = 0; r < kMR; ++r) tile.rows[r] = rows + p.row_offsets[row + r];
          run_tile(tile, static_cast<int>(min_of(kMR, p.num_rows - row)), vectors);
        }
      }
    }
}

}  // namespace
}  // namespace limpet::cpu
