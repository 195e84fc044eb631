// sum_n (sum_t r[n,t,:]^T c[n,t,:])^2: the register tile and the loop over tiles that linear and convolution share.
//
// One side of a tile, the columns, is packed into panels of NR values per place and read as vectors; the other, the
// rows, is read one value at a time through a base pointer per row and a table of offsets per place, so that
// convolution reads its patches where they lie. A tile's products stay in registers over a sample's places, are
// squared there, and only the sum of squares is written: no sample's gradient exists in memory.
//
// Each element of the result is computed by one thread in an order fixed by the shapes alone.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vector.h"
#include "math/fisher.h"

namespace limpet::cpu {
namespace {

// Register tile: MR rows times NV vectors. 32 vector registers hold 6 x 4 sums, 16 hold 6 x 2.
constexpr int kMR = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kNV = 4;
#else
constexpr int kNV = 2;
#endif
template <class S>
constexpr int kNR = kNV * lanes<S>;

constexpr std::int64_t kChunkRows = 512;   // places (samples x T) that are packed together
constexpr std::int64_t kSegment = 1024;    // longest run of places of one sample
constexpr std::int64_t kPacked = 1 << 20;  // elements packed between two barriers: a few MB, so that barriers are rare

LIMPET_FORMULA std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
LIMPET_FORMULA std::int64_t min_of(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
LIMPET_FORMULA std::int64_t max_of(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}

// How the samples' places are cut into chunks. T = 1 makes a chunk one long sum of squares; a sample longer than a
// segment is carried over several chunks.
struct Chunking {
  std::int64_t samples;   // per chunk
  std::int64_t segment;   // places of a sample per chunk
  std::int64_t segments;  // per sample
  std::int64_t rows() const { return samples * segment; }
};

LIMPET_FORMULA Chunking chunking(std::int64_t samples, std::int64_t places) {
  const std::int64_t segments = max_of(1, ceil_div(places, kSegment));
  const std::int64_t segment = ceil_div(places, segments);
  return {segments > 1 ? 1 : max_of(1, min_of(samples, kChunkRows / max_of(1, places))), segment, segments};
}

// Below this many places per sample, reading and writing the sums of squares for every sample would cost more than a
// narrower tile does, whose sums stay in registers beside the products (measured; it needs 32 registers).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr std::int64_t kFewPlaces = 8;
#else
constexpr std::int64_t kFewPlaces = 0;
#endif

template <class S>
struct Tile {
  const S* rows[kMR];           // first sample's row bases
  std::int64_t row_sample;      // from one sample to the next
  const std::int64_t* offsets;  // [places] from a row's base
  const S* columns;             // [samples, places, width]; those that are `listed`, [samples, column_places, width]
  const std::int64_t* listed;   // [places] which of a sample's; only where run_tile is told so
  std::int64_t column_sample;   // from one sample to the next, where they are listed
  std::int64_t width;           // of the panel of columns
  std::int64_t samples, places;
  S* sum;                 // [MR, kNR]: gets the sum of squares; or, if not `squares`, has the product added to it
  std::int64_t sum_step;  // from one row of it to the next
  S* carry;               // [MR, kNR] products of a sample's earlier segments, where there are several
  bool first, last;       // whether this is the sample's first, last segment
  bool squares;           // false: operands are squared already, and the products' sum itself is wanted
};

// The tile's vectors [v0, v0 + NV). `resident`: the sums of squares stay in registers; samples are never carried then.
// The short loops are unrolled by order: left to itself the compiler brings the products to the stack for every sample.
template <bool listed, class S, int MR, int NV, bool resident>
void run_tile(const Tile<S>& tile, int v0) {
  using V = Vector<S>;
  const S* columns = tile.columns + v0 * lanes<S>;
  const auto each = [](const auto& body) {  // body(row, vector)
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) body(r, v);
  };
  const auto carry = [&](int r, int v) { return tile.carry + r * kNR<S> + (v0 + v) * lanes<S>; };
  const auto sum = [&](int r, int v) { return tile.sum + r * tile.sum_step + (v0 + v) * lanes<S>; };
  [[maybe_unused]] V squares[MR][NV] = {};
  for (std::int64_t n = 0; n < tile.samples; ++n) {
    V acc[MR][NV];
    each([&](int r, int v) { acc[r][v] = V{}; });

    const S* rows[MR];
    for (int r = 0; r < MR; ++r) rows[r] = tile.rows[r] + n * tile.row_sample;
    const auto place = [&](std::int64_t t) LIMPET_INLINE {
      const std::int64_t offset = tile.offsets[t];
      V column[NV];
      const S* const at = listed ? columns + tile.listed[t] * tile.width : columns;
      for (int v = 0; v < NV; ++v) column[v] = load(at + v * lanes<S>);
      for (int r = 0; r < MR; ++r) {
        const V row = broadcast(rows[r][offset]);
        for (int v = 0; v < NV; ++v) acc[r][v] += row * column[v];
      }
      if constexpr (!listed) columns += tile.width;
    };
    std::int64_t t = 0;
    for (; t + 4 <= tile.places; t += 4) {
      if (!resident && !tile.squares) {
        const std::int64_t line = t / 4;
        __builtin_prefetch(tile.sum + line / NV * tile.sum_step + line % NV * lanes<S>, 1);
      }
      place(t);
      place(t + 1);
      place(t + 2);
      place(t + 3);
    }
    for (; t < tile.places; ++t) place(t);
    if constexpr (listed) columns += tile.column_sample;

    // Segments are summed apart, which keeps the error of a long sum small.
    if (!resident && !tile.first) each([&](int r, int v) { acc[r][v] += load(carry(r, v)); });
    if constexpr (resident) {
      each([&](int r, int v) { math::add_square(squares[r][v], acc[r][v]); });
    } else if (!tile.last) {
      each([&](int r, int v) { store<S>(acc[r][v], carry(r, v)); });
    } else if (!tile.squares) {
      each([&](int r, int v) { store<S>(load(sum(r, v)) + acc[r][v], sum(r, v)); });
    } else if (n == 0) {
      each([&](int r, int v) { store<S>(acc[r][v] * acc[r][v], sum(r, v)); });
    } else {
      each([&](int r, int v) {
        V total = load(sum(r, v));
        math::add_square(total, acc[r][v]);
        store<S>(total, sum(r, v));
      });
    }
  }
  if constexpr (resident) each([&](int r, int v) { store<S>(squares[r][v], sum(r, v)); });
}

template <bool listed, class S, int NV, bool resident>
void run_tile(const Tile<S>& tile, int rows, int v0) {
  switch (rows) {
    case 1: return run_tile<listed, S, 1, NV, resident>(tile, v0);
    case 2: return run_tile<listed, S, 2, NV, resident>(tile, v0);
    case 3: return run_tile<listed, S, 3, NV, resident>(tile, v0);
    case 4: return run_tile<listed, S, 4, NV, resident>(tile, v0);
    case 5: return run_tile<listed, S, 5, NV, resident>(tile, v0);
    default: return run_tile<listed, S, kMR, NV, resident>(tile, v0);
  }
}

template <bool listed = false, class S>
void run_tile(const Tile<S>& tile, int rows, int vectors) {
  static_assert(kNV == 4 || kNV == 2, "cases below");
  if constexpr (kFewPlaces > 0) {
    if (tile.squares && tile.places < kFewPlaces) {
      for (int v = 0; v < vectors; v += 2) {
        if (v + 2 <= vectors)
          run_tile<listed, S, 2, true>(tile, rows, v);
        else
          run_tile<listed, S, 1, true>(tile, rows, v);
      }
      return;
    }
  }
  switch (vectors) {
    case 1: return run_tile<listed, S, 1, false>(tile, rows, 0);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 2: return run_tile<listed, S, 2, false>(tile, rows, 0);
    case 3: return run_tile<listed, S, 3, false>(tile, rows, 0);
#endif
    default: return run_tile<listed, S, kNV, false>(tile, rows, 0);
  }
}

// The vectors of a panel of columns that starts at `first`.
template <class S>
LIMPET_FORMULA int panel_vectors(std::int64_t columns, std::int64_t first) {
  return static_cast<int>(min_of(kNV, ceil_div(columns - first, lanes<S>)));
}

// Where panel p of `rows` places starts: all panels before it are full.
template <class S>
LIMPET_FORMULA std::int64_t panel_offset(std::int64_t panel, std::int64_t rows) {
  return panel * kNR<S> * rows;
}

template <class S>
LIMPET_FORMULA std::int64_t panels_size(std::int64_t columns, std::int64_t rows) {
  return ceil_div(columns, lanes<S>) * lanes<S> * rows;
}

// Tiles are shared out in runs of a fixed order: each within one packed panel of columns, whose part of the result
// then stays in the cache, and at least two per thread, so that one that was held up can be helped.
LIMPET_FORMULA std::int64_t tile_runs(std::int64_t tiles, std::int64_t column_panels, int threads) {
  return min_of(tiles, column_panels * ceil_div(2 * threads, column_panels));
}

// Threads worth waking for `work` multiplications. Results do not depend on it.
LIMPET_FORMULA int worthwhile(int threads, std::int64_t work) {
  return work < 200000 ? 1 : threads;
}

// A vector of which only the first `readable` elements may be read; the others are anything.
template <class Stored>
LIMPET_FORMULA Vector<Compute<Stored>> load_some(const Stored* from, std::int64_t readable) {
  using S = Compute<Stored>;
  if (readable >= lanes<S>) return load(from);
  alignas(64) S values[lanes<S>] = {};
  for (std::int64_t i = 0; i < readable; ++i) values[i] = widen(from[i]);
  return load(values);
}

// `count` neighbouring values per place into [places, width]. Between `count` and `width` anything may lie: those
// products are not kept. `width`: whole vectors, or kMR.
template <class Stored, class S>
void pack(const Stored* from, std::int64_t step, std::int64_t place_stride, std::int64_t places, std::int64_t count,
          std::int64_t width, bool square, S* to) {
  if (step == 1 && width % lanes<S> == 0 && count == width) {
    for (std::int64_t t = 0; t < places; ++t, from += place_stride, to += width)
      for (std::int64_t v = 0; v < width; v += lanes<S>) {
        const Vector<S> x = load(from + v);
        store<S>(square ? x * x : x, to + v);
      }
    return;
  }
  if (place_stride == 1 && step != 1 && width % lanes<S> == 0) {  // neighbouring places
    for (std::int64_t v = 0; v < width; v += lanes<S>)
      for (std::int64_t block = 0; block < places; block += lanes<S>) {
        // The last block may overlap the one before it.
        const std::int64_t t = max_of(0, min_of(block, places - lanes<S>)), some = min_of(lanes<S>, places - t);
        const Stored* const at = from + v * step + t;
        Vector<S> values[lanes<S>];
        if (v + lanes<S> <= count && some == lanes<S>) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes<S>; ++i) values[i] = load(at + i * step);
        } else {
          for (int i = 0; i < lanes<S>; ++i) {
            const std::int64_t channel = min_of(v + i, count - 1);
            values[i] = load_some(from + channel * step + t, (count - 1 - channel) * step + places - t);
          }
        }
        if (square)
          for (int i = 0; i < lanes<S>; ++i) values[i] *= values[i];
        transpose<S>(values);
        S* const packed = to + t * width + v;
        if (some == lanes<S>) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes<S>; ++i) store<S>(values[i], packed + i * width);
        } else {
          for (std::int64_t i = 0; i < some; ++i) store<S>(values[i], packed + i * width);
        }
      }
    return;
  }
  for (std::int64_t t = 0; t < places; ++t, from += place_stride, to += width) {
    for (std::int64_t i = 0; i < count; ++i) {
      const S x = widen(from[i * step]);
      to[i] = square ? x * x : x;
    }
    for (std::int64_t i = count; i < width; ++i) to[i] = 0;
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

}  // namespace
}  // namespace limpet::cpu
