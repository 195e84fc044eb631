// Winograd's products for kernels of 3 x 3 with a step of one: a tile of 4 x 4 inputs and its 2 x 2 outputs take 16
// products of transformed values instead of 36. Both the outputs F(2x2, 3x3) and the kernel's gradient F(3x3, 2x2) come
// from the same transformed inputs (Lavin and Gray 2016, arXiv:1509.09308, section 4; points 0, 1, -1, infinity).
//
// In one dimension, with inputs d0..d3, kernel w0..w2 and outputs' gradients g0, g1:
//   inputs   d0 - d2, d1 + d2, d2 - d1, d3 - d1
//   kernel   w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2        gradients  g0, (g0 + g1) / 2, (g0 - g1) / 2, g1
// and of the products m0..m3
//   outputs  m0 + m1 + m2, m1 - m2 + m3                            kernel's gradient  m0 + m1 + m2, m1 - m2, m1 + m2 +
//   m3
#pragma once

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu {
namespace {

constexpr std::int64_t kTaps = 9;         // elements of a kernel
constexpr std::int64_t kPoints = 16;      // products of a tile
constexpr std::int64_t kStripTiles = 64;  // a strip of a picture has as many, or a row of them
template <class S>
constexpr std::int64_t kBlock = kMR * kNR<S>;  // elements of a register tile

// Transformed values: [panel, point, tile, width], with a vector between points, as steps of whole pages would all fall
// on the same lines of a cache.
template <class S>
struct Panel {
  std::int64_t tiles, width;
  LIMPET_FORMULA std::int64_t point() const { return tiles * width + lanes<S>; }
  LIMPET_FORMULA std::int64_t size() const { return kPoints * point(); }
};

// Tiles of the outputs, those of a picture's last row and column with zeros behind its end.
struct OutputTiles {
  std::int64_t frames, down, across;  // pictures of a sample, rows of tiles of a picture, tiles of a row
  LIMPET_FORMULA std::int64_t count() const { return frames * down * across; }
};

inline OutputTiles output_tiles(const std::int64_t* size) {
  return {size[0], (size[1] + 1) / 2, (size[2] + 1) / 2};
}

// How the samples' pictures are cut: into strips of some rows of tiles, or some small pictures at a time.
struct Strips {
  OutputTiles tiles;          // of a sample
  std::int64_t height;        // rows of tiles of a strip
  std::int64_t of_picture;    // strips
  std::int64_t count;         // strips of a sample
  std::int64_t samples;       // at a time
  std::int64_t rows, across;  // places of a strip with zeros around it

  Strips(const OutputTiles& tiles, std::int64_t num_samples)
      : tiles(tiles),
        height(max_of(1, min_of(tiles.down, kStripTiles / max_of(1, tiles.across)))),
        of_picture(ceil_div(tiles.down, height)),
        count(tiles.frames * of_picture),
        samples(count == 1 ? max_of(1, min_of(num_samples, kStripTiles / max_of(1, size()))) : 1),
        rows(2 * height + 2),
        across(2 * tiles.across + 2) {}

  std::int64_t size() const { return height * tiles.across; }  // tiles of a strip, at most
  std::int64_t frame(std::int64_t s) const { return s / of_picture; }
  std::int64_t down(std::int64_t s) const { return s % of_picture * height; }  // rows of tiles above
  OutputTiles operator[](std::int64_t s) const { return {1, min_of(height, tiles.down - down(s)), tiles.across}; }
};

template <class V>
LIMPET_FORMULA void transform_inputs(V d[4][4]) {
  const auto line = [](V& d0, V& d1, V& d2, V& d3) {
    const V first = d0 - d2, sum = d1 + d2, difference = d2 - d1;
    d3 = d3 - d1;
    d0 = first;
    d1 = sum;
    d2 = difference;
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) line(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) line(d[0][j], d[1][j], d[2][j], d[3][j]);
}

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

// The transformed inputs of a picture's tiles: point f of tile t goes to `to` + f * point + t * tile.
template <class S>
void transform_picture(const Picture<S>& picture, const OutputTiles& tiles, std::int64_t point, std::int64_t tile,
                       S* to) {
  for (std::int64_t i = 0; i < tiles.down; ++i)
    for (std::int64_t j = 0; j < tiles.across; ++j, to += tile) {
      Vector<S> d[4][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) d[k][l] = load(picture.at(2 * i + k, 2 * j + l));
      transform_inputs(d);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) store<S>(d[k][l], to + (4 * k + l) * point);
    }
}

// What is multiplied at all points: rows and columns, over places that are taken a run at a time.
template <class S>
struct PointProducts {
  const S* rows;                    // the first at the first point
  std::int64_t row_point, row_run;  // from one point, one run of places to the next
  const std::int64_t *row_offsets, *place_offsets;
  const S* columns;  // [points, places, vectors], points `column_point` apart
  std::int64_t column_point;
  std::int64_t num_rows, places, run;
  int vectors;
  bool add;     // to the products that are there
  S* products;  // [points, blocks of kMR rows, kMR, kNR]

  std::int64_t blocks() const { return ceil_div(num_rows, kMR); }
};

template <class S>
void multiply(const PointProducts<S>& p) {
  Tile<S> tile;
  tile.offsets = p.place_offsets;
  tile.samples = 1;
  tile.row_sample = 0;
  tile.width = p.vectors * lanes<S>;
  tile.sum = p.products;  // only fetched ahead
  tile.sum_step = kNR<S>;
  tile.squares = false;
  tile.last = false;  // products are left where a sample's next segment would find them
  for (std::int64_t f = 0; f < kPoints; ++f)
    for (std::int64_t first = 0, run = 0; first < p.places; first += p.run, ++run) {
      tile.places = min_of(p.run, p.places - first);
      tile.columns = p.columns + f * p.column_point + first * tile.width;
      tile.first = first == 0 && !p.add;
      tile.carry = p.products + f * p.blocks() * kBlock<S>;
      const S* const rows = p.rows + f * p.row_point + run * p.row_run;
      for (std::int64_t row = 0; row < p.num_rows; row += kMR, tile.carry += kBlock<S>) {
        for (int r = 0; r < kMR; ++r) tile.rows[r] = rows + p.row_offsets[row + r];
        run_tile(tile, static_cast<int>(min_of(kMR, p.num_rows - row)), p.vectors);
      }
    }
}

}  // namespace
}  // namespace limpet::cpu
