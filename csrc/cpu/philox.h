// Philox for consecutive counters, one block to each 64-bit lane of a vector.
#pragma once

#include <cstdint>

#include "cpu/vector.h"
#include "math/philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace limpet::cpu {
namespace {

typedef std::uint64_t Words __attribute__((vector_size(LIMPET_VECTOR_BYTES)));  // a word in each lane's lower half
constexpr int kBlocks = LIMPET_VECTOR_BYTES / 8;

// The products of the lanes' lower halves. (Compilers take 64-bit products for this, three times as many.)
LIMPET_FORMULA Words multiply(Words a, Words b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Whether any lane is not zero.
LIMPET_FORMULA bool any(Words lanes) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(lanes);
  return _mm512_test_epi64_mask(bits, bits) != 0;
#elif defined(__AVX2__)
  const __m256i bits = reinterpret_cast<__m256i>(lanes);
  return _mm256_testz_si256(bits, bits) == 0;
#else
  std::uint64_t all = 0;
  for (int k = 0; k < kBlocks; ++k) all |= lanes[k];
  return all != 0;
#endif
}

// The four words of each lane's block; the lanes' upper halves hold rests of products.
struct PhiloxBlocks {
  Words word[4];
};

LIMPET_FORMULA PhiloxBlocks philox(PhiloxBlocks counter, std::uint64_t key) {
  std::uint32_t low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  const Words factor0 = Words{} + math::kPhiloxFactor0, factor1 = Words{} + math::kPhiloxFactor1;
#pragma GCC unroll 10
  for (int round = 0; round < math::kPhiloxRounds; ++round) {
    const Words a = multiply(counter.word[0], factor0), b = multiply(counter.word[2], factor1);
    counter = {{(b >> 32) ^ counter.word[1] ^ low, b, (a >> 32) ^ counter.word[3] ^ high, a}};
    low += math::kPhiloxWeyl0;
    high += math::kPhiloxWeyl1;
  }
  return counter;
}

}  // namespace
}  // namespace limpet::cpu
