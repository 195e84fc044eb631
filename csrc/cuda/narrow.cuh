// Readers: anchors and importances in the type they are computed in, however they are stored.
#pragma once

#include <cstdint>

#include "cuda/chunks.cuh"
#include "cuda/vector.cuh"
#include "math/narrow.h"
#include "quadratic_tensor.h"

namespace limpet::cuda {
namespace {

template <int width, class Stored>
__device__ __forceinline__ Pack<Stored, width> load_pack(const Stored* from) {
  return *reinterpret_cast<const Pack<Stored, width>*>(from);
}

// A bfloat16's bits as the upper half of a float32's.
__device__ __forceinline__ std::uint32_t upper(std::uint16_t bits) {
  return static_cast<std::uint32_t>(bits) << 16;
}

// Elements of a tensor from its element `begin` on, a multiple of kNarrowBlock. load<width>(i, to) reads `width` of
// them, which lie in one block and, where width > 1, at an address for which wide<width>() has been asked.
template <class Stored>
struct Reader {
  const Stored* data;

  __device__ Reader(const void* stored, std::int64_t, std::int64_t begin)
      : data(static_cast<const Stored*>(stored) + begin) {}
  template <int width>
  __device__ bool wide() const {
    return aligned(data, alignof(Pack<Stored, width>));
  }
  template <int width, class S>
  __device__ __forceinline__ void load(int i, S* to) const {
    const auto pack = load_pack<width>(data + i);
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = widen(pack.element[k]);
  }
};

template <>
struct Reader<Log8> {
  const std::uint8_t* codes;
  const std::uint16_t* tops;

  __device__ Reader(const void* stored, std::int64_t numel, std::int64_t begin)
      : codes(static_cast<const std::uint8_t*>(stored) + begin),
        tops(reinterpret_cast<const std::uint16_t*>(static_cast<const char*>(stored) + math::narrow_padded(numel)) +
             begin / math::kNarrowBlock) {}
  template <int width>
  __device__ bool wide() const {
    return aligned(codes, alignof(Pack<std::uint8_t, width>));
  }
  template <int width>
  __device__ __forceinline__ void load(int i, float* to) const {
    const auto pack = load_pack<width>(codes + i);
    const std::uint32_t top = upper(tops[i / static_cast<int>(math::kNarrowBlock)]);
#pragma unroll
    for (int k = 0; k < width; ++k)
      to[k] = __uint_as_float(math::log8_bits(static_cast<std::uint32_t>(pack.element[k]), top));
  }
};

template <>
struct Reader<Fixed16> {
  const std::int16_t* codes;
  const std::uint16_t* scales;

  __device__ Reader(const void* stored, std::int64_t numel, std::int64_t begin)
      : codes(static_cast<const std::int16_t*>(stored) + begin),
        scales(
            reinterpret_cast<const std::uint16_t*>(static_cast<const char*>(stored) + math::narrow_padded(2 * numel)) +
            begin / math::kNarrowBlock) {}
  template <int width>
  __device__ bool wide() const {
    return aligned(codes, alignof(Pack<std::int16_t, width>));
  }
  template <int width>
  __device__ __forceinline__ void load(int i, float* to) const {
    const auto pack = load_pack<width>(codes + i);
    const float scale = __uint_as_float(upper(scales[i / static_cast<int>(math::kNarrowBlock)]));
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = static_cast<float>(pack.element[k]) * scale;
  }
};

template <>
struct Reader<Split24> {
  const std::uint16_t* high;
  const std::uint8_t* low;

  __device__ Reader(const void* stored, std::int64_t numel, std::int64_t begin)
      : high(static_cast<const std::uint16_t*>(stored) + begin),
        low(static_cast<const std::uint8_t*>(stored) + math::narrow_padded(2 * numel) + begin) {}
  template <int width>
  __device__ bool wide() const {
    return aligned(high, alignof(Pack<std::uint16_t, width>)) && aligned(low, alignof(Pack<std::uint8_t, width>));
  }
  template <int width>
  __device__ __forceinline__ void load(int i, float* to) const {
    const auto upper_bits = load_pack<width>(high + i);
    const auto lower_bits = load_pack<width>(low + i);
#pragma unroll
    for (int k = 0; k < width; ++k)
      to[k] = __uint_as_float(math::split24_bits(static_cast<std::uint32_t>(upper_bits.element[k]),
                                                 static_cast<std::uint32_t>(lower_bits.element[k])));
  }
};

// The same for importances whose format is looked up at each load: a quarter of the kernels to compile. Loads wait for
// what they convert, so this one is to come after all others.
struct ImportanceReader {
  const void* stored;
  std::int64_t numel, begin;
  Storage storage;

  template <class Body>
  __device__ __forceinline__ auto with_reader(const Body& body) const {
    switch (storage) {
      case Storage::bf16: return body(Reader<__nv_bfloat16>(stored, numel, begin));
      case Storage::f16: return body(Reader<__half>(stored, numel, begin));
      case Storage::log8: return body(Reader<Log8>(stored, numel, begin));
      default: return body(Reader<float>(stored, numel, begin));
    }
  }
  template <class S, int width>
  __device__ bool wide() const {
    if constexpr (sizeof(S) == 8) return Reader<double>(stored, numel, begin).wide<width>();
    return with_reader([](const auto& reader) { return reader.template wide<width>(); });
  }
  template <int width>
  __device__ __forceinline__ void load(int i, float* to) const {
    with_reader([&](const auto& reader) { reader.template load<width>(i, to); });
  }
  template <int width>
  __device__ __forceinline__ void load(int i, double* to) const {  // beside float64 all is float64
    Reader<double>(stored, numel, begin).load<width>(i, to);
  }
};

}  // namespace
}  // namespace limpet::cuda
