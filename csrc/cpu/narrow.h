// Readers: anchors and importances as vectors of the type they are computed in, however they are stored.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/vector.h"
#include "math/narrow.h"
#include "quadratic_tensor.h"

namespace limpet::cpu {
namespace {

typedef std::uint32_t Bits __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
typedef std::int32_t Integers __attribute__((vector_size(LIMPET_VECTOR_BYTES)));

// As many stored integers as a vector of floats has lanes, widened. The intrinsics are single instructions, of which
// GCC before 13 makes four to dozens when it is asked to convert vectors.
#if defined(__AVX512F__)
LIMPET_FORMULA Bits load_bits(const std::uint8_t* from) {
  return bits_as<Bits>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
LIMPET_FORMULA Bits load_bits(const std::uint16_t* from) {
  return bits_as<Bits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
LIMPET_FORMULA Integers load_integers(const std::int16_t* from) {
  return bits_as<Integers>(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
#elif defined(__AVX2__)
LIMPET_FORMULA Bits load_bits(const std::uint8_t* from) {
  return bits_as<Bits>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
LIMPET_FORMULA Bits load_bits(const std::uint16_t* from) {
  return bits_as<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
LIMPET_FORMULA Integers load_integers(const std::int16_t* from) {
  return bits_as<Integers>(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
#else
template <class Wide, class Integer>
LIMPET_FORMULA Wide load_converted(const Integer* from) {
  typedef Integer Narrow __attribute__((vector_size(lanes<float> * sizeof(Integer))));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Wide);
}
LIMPET_FORMULA Bits load_bits(const std::uint8_t* from) {
  return load_converted<Bits>(from);
}
LIMPET_FORMULA Bits load_bits(const std::uint16_t* from) {
  return load_converted<Bits>(from);
}
LIMPET_FORMULA Integers load_integers(const std::int16_t* from) {
  return load_converted<Integers>(from);
}
#endif

// Elements from `begin` on: load(i) reads a whole vector at element i of the tensor, load_some(i, count) its first
// elements and zeros. A reader of a narrow format must not be asked for elements of another block than begin's.
template <class Stored>
struct Reader {
  static constexpr bool blocks = false;
  const Stored* data;

  LIMPET_FORMULA Reader(const void* stored, std::int64_t, std::int64_t) : data(static_cast<const Stored*>(stored)) {}
  LIMPET_FORMULA auto load(std::int64_t i) const { return cpu::load(data + i); }
  LIMPET_FORMULA auto load_some(std::int64_t i, std::int64_t count) const {
    return cpu::load(Padded<Stored>(data + i, count).elements);
  }
};

template <>
struct Reader<Log8> {
  static constexpr bool blocks = true;
  const std::uint8_t* codes;
  Bits top;

  LIMPET_FORMULA Reader(const void* stored, std::int64_t numel, std::int64_t begin)
      : codes(static_cast<const std::uint8_t*>(stored)) {
    BFloat16 first;
    std::memcpy(&first, codes + math::narrow_padded(numel) + begin / math::kNarrowBlock * 2, 2);
    top = (static_cast<std::uint32_t>(first.bits) << 16) + Bits{};
  }
  LIMPET_FORMULA Vector<float> decode(const std::uint8_t* from) const {
    return bits_as<Vector<float>>(math::log8_bits(load_bits(from), top));
  }
  LIMPET_FORMULA Vector<float> load(std::int64_t i) const { return decode(codes + i); }
  LIMPET_FORMULA Vector<float> load_some(std::int64_t i, std::int64_t count) const {
    return decode(Padded<std::uint8_t>(codes + i, count).elements);
  }
};

template <>
struct Reader<Fixed16> {
  static constexpr bool blocks = true;
  const std::int16_t* codes;
  Vector<float> scale;

  LIMPET_FORMULA Reader(const void* stored, std::int64_t numel, std::int64_t begin)
      : codes(static_cast<const std::int16_t*>(stored)) {
    BFloat16 first;
    std::memcpy(&first, codes + math::narrow_padded(2 * numel) / 2 + begin / math::kNarrowBlock, 2);
    scale = broadcast(widen(first));
  }
  LIMPET_FORMULA Vector<float> decode(const std::int16_t* from) const {
    return __builtin_convertvector(load_integers(from), Vector<float>) * scale;
  }
  LIMPET_FORMULA Vector<float> load(std::int64_t i) const { return decode(codes + i); }
  LIMPET_FORMULA Vector<float> load_some(std::int64_t i, std::int64_t count) const {
    return decode(Padded<std::int16_t>(codes + i, count).elements);
  }
};

template <>
struct Reader<Split24> {
  static constexpr bool blocks = false;
  const std::uint16_t* high;
  const std::uint8_t* low;

  LIMPET_FORMULA Reader(const void* stored, std::int64_t numel, std::int64_t)
      : high(static_cast<const std::uint16_t*>(stored)),
        low(static_cast<const std::uint8_t*>(stored) + math::narrow_padded(2 * numel)) {}
  LIMPET_FORMULA static Vector<float> decode(const std::uint16_t* high, const std::uint8_t* low) {
    return bits_as<Vector<float>>(math::split24_bits(load_bits(high), load_bits(low)));
  }
  LIMPET_FORMULA Vector<float> load(std::int64_t i) const { return decode(high + i, low + i); }
  LIMPET_FORMULA Vector<float> load_some(std::int64_t i, std::int64_t count) const {
    return decode(Padded<std::uint16_t>(high + i, count).elements, Padded<std::uint8_t>(low + i, count).elements);
  }
};

}  // namespace
}  // namespace limpet::cpu
