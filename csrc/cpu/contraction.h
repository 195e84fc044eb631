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

constexpr std::int64_t kChunkRows = 512;     // places (samples x T) that are packed together
constexpr std::int64_t kSegment = 1024;      // longest run of places of one sample
constexpr std::int64_t kBlockPanels = 16;    // row panels that share a column panel while it is in the L2 cache

LIMPET_FORMULA std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
LIMPET_FORMULA std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
LIMPET_FORMULA std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

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

template <class S>
struct Tile {
  const S* rows[kMR];             // first sample's row bases
  std::int64_t row_sample;        // from one sample to the next
  const std::int64_t* offsets;    // [places] from a row's base
  const S* columns;               // [samples, places, NV * lanes]
  std::int64_t samples, places;
  S* sum;                         // [MR, kNR]: the squares are added here
  S* carry;                       // [MR, kNR] products of a sample's earlier segments, or null
  bool first, last;               // whether this is the sample's first, last segment
  bool squares;                   // false: operands are squared already, and the sum itself is added
};

template <class S, int MR, int NV>
void run_tile(const Tile<S>& tile) {
  using V = Vector<S>;
  constexpr int width = NV * lanes<S>;
  const S* columns = tile.columns;
  for (std::int64_t n = 0; n < tile.samples; ++n) {
    V acc[MR][NV];
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v)
        acc[r][v] = tile.first ? V{} : load(tile.carry + r * kNR<S> + v * lanes<S>);

    const S* rows[MR];
    for (int r = 0; r < MR; ++r) rows[r] = tile.rows[r] + n * tile.row_sample;
    for (std::int64_t t = 0; t < tile.places; ++t, columns += width) {
      const std::int64_t offset = tile.offsets[t];
      V column[NV];
      for (int v = 0; v < NV; ++v) column[v] = load(columns + v * lanes<S>);
      for (int r = 0; r < MR; ++r) {
        const V row = broadcast(rows[r][offset]);
        for (int v = 0; v < NV; ++v) acc[r][v] += row * column[v];
      }
    }

    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) {
        S* const to = (tile.last ? tile.sum : tile.carry) + r * kNR<S> + v * lanes<S>;
        V sum = acc[r][v];
        if (tile.last) {
          sum = load(to);
          if (tile.squares)
            math::add_square(sum, acc[r][v]);
          else
            sum += acc[r][v];
        }
        store<S>(sum, to);
      }
  }
}

template <class S, int NV>
void run_tile(const Tile<S>& tile, int rows) {
  switch (rows) {
    case 1: return run_tile<S, 1, NV>(tile);
    case 2: return run_tile<S, 2, NV>(tile);
    case 3: return run_tile<S, 3, NV>(tile);
    case 4: return run_tile<S, 4, NV>(tile);
    case 5: return run_tile<S, 5, NV>(tile);
    default: return run_tile<S, kMR, NV>(tile);
  }
}

template <class S>
void run_tile(const Tile<S>& tile, int rows, int vectors) {
  static_assert(kNV == 4 || kNV == 2, "cases below");
  switch (vectors) {
    case 1: return run_tile<S, 1>(tile, rows);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 2: return run_tile<S, 2>(tile, rows);
    case 3: return run_tile<S, 3>(tile, rows);
#endif
    default: return run_tile<S, kNV>(tile, rows);
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

// How the row panels and column panels of one chunk are cut into jobs for threads.
struct Grid {
  std::int64_t row_panels, column_panels, block, row_blocks, column_groups;
  std::int64_t jobs() const { return row_blocks * column_groups; }
};

template <class S>
LIMPET_FORMULA Grid grid(std::int64_t rows, std::int64_t columns, int threads) {
  const std::int64_t row_panels = ceil_div(rows, kMR), column_panels = ceil_div(columns, kNR<S>);
  const std::int64_t wanted = threads > 1 ? 8 * threads : 1;
  const std::int64_t block = max_of(1, min_of(kBlockPanels, row_panels / wanted));
  const std::int64_t row_blocks = ceil_div(row_panels, block);
  return {row_panels, column_panels, block, row_blocks, min_of(column_panels, ceil_div(wanted, row_blocks))};
}

// Threads worth waking for `work` multiplications. Results do not depend on it.
LIMPET_FORMULA int worthwhile(int threads, std::int64_t work) { return work < 200000 ? 1 : threads; }

}  // namespace
}  // namespace limpet::cpu
