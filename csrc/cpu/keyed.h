// What the two halves of a keyed reservoir share: the filter, which draws every item's key and lets few through
// (keyed.cpp, once per instruction set), and the index, which places those (keyed_index.cpp, once).
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace limpet::cpu {

// What is known of a group: a key above `bound` is passed over.
struct KeyedCell {
  std::int64_t value, bound;
  std::int64_t heap = -1;  // where the index keeps its rows; -1 where the cell is free
};

// Groups by their values, with open addressing.
struct KeyedBounds {
  const KeyedCell* cells;
  int bits;  // 2^bits cells, at least one of them free

  // The place of a group's cell, or of the free one where it belongs.
  LIMPET_FORMULA std::uint64_t find(std::int64_t value) const {
    std::uint64_t at = static_cast<std::uint64_t>(value) * 0x9E3779B97F4A7C15ull >> (64 - bits);
    while (cells[at].heap >= 0 && cells[at].value != value) at = (at + 1) & ((1ull << bits) - 1);
    return at;
  }
  LIMPET_FORMULA std::int64_t bound(std::int64_t value) const {
    const KeyedCell& cell = cells[find(value)];
    return cell.heap >= 0 ? cell.bound : INT64_MAX;
  }
};

// `count` items of a stream, from number `first` on.
struct KeyedItems {
  const std::int64_t* group;  // [count]; null where all are of group 0
  const double* weight;       // [count]; null where keys are plain bits
  std::int64_t first, count;
  std::uint64_t seed;
};

struct KeyedCandidate {
  std::int64_t place, key;  // place in [0, count)
};

}  // namespace limpet::cpu
