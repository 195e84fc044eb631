// Philox 4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (2011).
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace limpet::math {

constexpr std::uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  std::uint32_t word[4];
};

LIMPET_FORMULA PhiloxWords philox(PhiloxWords counter, std::uint64_t key) {
  std::uint32_t low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t a = static_cast<std::uint64_t>(counter.word[0]) * kPhiloxFactor0;
    const std::uint64_t b = static_cast<std::uint64_t>(counter.word[2]) * kPhiloxFactor1;
    counter = {{static_cast<std::uint32_t>(b >> 32) ^ counter.word[1] ^ low, static_cast<std::uint32_t>(b),
                static_cast<std::uint32_t>(a >> 32) ^ counter.word[3] ^ high, static_cast<std::uint32_t>(a)}};
    low += kPhiloxWeyl0;
    high += kPhiloxWeyl1;
  }
  return counter;
}

}  // namespace limpet::math
