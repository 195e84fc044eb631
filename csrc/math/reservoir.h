// Which items a reservoir keeps, and which rows a sample takes: unbiased integers from numbered random bits.
//
// A draw has a number and an index; two consecutive indices share one block of Philox. The 2^63 values of 63 random
// bits are cut into `range` equal runs, and the few that are left over are drawn again with the next attempt.
#pragma once

#include <cstdint>

#include "math/philox.h"

namespace limpet::math {

// What a draw is for, so that those of one seed are independent.
enum class Purpose : std::uint32_t { reservoir = 1, sample = 2, key = 3 };

constexpr std::uint64_t kBits63 = 1ull << 63;

// The block of four words that the draws 2 * pair and 2 * pair + 1 take their bits from.
LIMPET_FORMULA PhiloxWords draw_counter(std::uint64_t number, std::uint32_t index, Purpose purpose,
                                        std::uint32_t attempt) {
  return {{static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(number >> 32), index,
           static_cast<std::uint32_t>(purpose) << 16 | attempt}};
}

LIMPET_FORMULA std::uint64_t bits63(const PhiloxWords& words, bool second) {
  const std::uint64_t high = words.word[second ? 2 : 0], low = words.word[second ? 3 : 1];
  return high << 31 | low >> 1;
}

// The length of each of the equal runs: floor(2^63 / range); range in [1, 2^63).
LIMPET_FORMULA std::uint64_t run_length(std::uint64_t range) {
  return (kBits63 - range) / range + 1;
}

// A uniform integer in [0, range); `words_of(attempt)` gives a draw's block.
template <class WordsOf>
LIMPET_FORMULA std::int64_t bounded(std::uint64_t range, bool second, const WordsOf& words_of) {
  const std::uint64_t run = run_length(range);
  for (std::uint32_t attempt = 0;; ++attempt) {
    const std::uint64_t value = bits63(words_of(attempt), second) / run;
    if (value < range) return static_cast<std::int64_t>(value);
  }
}

// Where item number `item` (from 0) goes: [0, capacity), or -1 where it is passed over (Vitter 1985, algorithm R).
LIMPET_FORMULA std::int64_t reservoir_slot(std::int64_t item, std::int64_t capacity, std::uint64_t seed) {
  if (item < capacity) return item;
  const auto number = static_cast<std::uint64_t>(item);
  const std::int64_t slot = bounded(number + 1, number % 2 == 1, [&](std::uint32_t attempt) {
    return philox(draw_counter(number / 2, 0, Purpose::reservoir, attempt), seed);
  });
  return slot < capacity ? slot : -1;
}

// The place that step `index` of a Fisher-Yates shuffle swaps its own with: uniform in [index, population).
LIMPET_FORMULA std::int64_t shuffle_target(std::int64_t index, std::int64_t population, std::uint64_t seed,
                                           std::uint64_t draw) {
  const auto step = static_cast<std::uint32_t>(index);
  return index + bounded(static_cast<std::uint64_t>(population - index), step % 2 == 1, [&](std::uint32_t attempt) {
           return philox(draw_counter(draw, step / 2, Purpose::sample, attempt), seed);
         });
}

}  // namespace limpet::math
