// What the reservoir kernels of every device take.
#pragma once

#include <cstdint>

namespace limpet {

// One field of the items: rows of `row_bytes` bytes without gaps, in the buffer and in the batch.
struct RowField {
  void* stored;  // [capacity, row_bytes]
  void* batch;   // [count, row_bytes]
  std::int64_t row_bytes;
  void* ahead = nullptr;  // [ahead, row_bytes]: new rows to be copied in front of gathered ones
};

// A batch of `count` items that follow the `*seen` items before it.
struct ReservoirBatch {
  const RowField* fields;
  int num_fields;
  std::int64_t* items;  // [capacity] the number of the item in each slot, -1 in those that are free
  std::int64_t* seen;   // [1] raised by count
  std::int64_t capacity, count;
  std::uint64_t seed;
};

}  // namespace limpet
