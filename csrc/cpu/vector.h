// Vectors of the translation unit's instruction set, and loads and stores that convert from and to storage types.
//
// GCC's and clang's vector types keep one source for every width; only float16 needs an intrinsic. Everything has
// internal linkage: each instruction set gets its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "dtype.h"
#include "math/inline.h"

#if defined(__AVX512F__)
#define LIMPET_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LIMPET_VECTOR_BYTES 32
#else
#define LIMPET_VECTOR_BYTES 16
#endif

// For lambdas of inner loops, which compilers may leave out of line.
#define LIMPET_INLINE __attribute__((always_inline))

namespace limpet::cpu {
namespace {

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
};
template <>
struct VectorOf<std::uint32_t> {
  typedef std::uint32_t type __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
};
template <>
struct VectorOf<std::uint64_t> {
  typedef std::uint64_t type __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
};
template <class S>
using Vector = typename VectorOf<S>::type;

template <class S>
constexpr int lanes = LIMPET_VECTOR_BYTES / static_cast<int>(sizeof(S));

// --- one element -----------------------------------------------------------------------------------------------------

template <class To, class From>
LIMPET_FORMULA To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

LIMPET_FORMULA float widen(float x) {
  return x;
}
LIMPET_FORMULA double widen(double x) {
  return x;
}
LIMPET_FORMULA float widen(BFloat16 x) {
  return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
LIMPET_FORMULA float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal, exactly.
  const float scaled = bits_as<float>(magnitude << 13) * bits_as<float>(239u << 23);
  return bits_as<float>(sign | bits_as<std::uint32_t>(scaled));
#endif
}

LIMPET_FORMULA void narrow(float x, float* to) {
  *to = x;
}
LIMPET_FORMULA void narrow(double x, double* to) {
  *to = x;
}
LIMPET_FORMULA void narrow(float x, BFloat16* to) {  // round to nearest even; NaN stays NaN
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  to->bits = (bits & 0x7fffffffu) > 0x7f800000u
                 ? 0x7fc0u
                 : static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
LIMPET_FORMULA void narrow(float x, Half* to) {  // round to nearest even; NaN stays NaN
#if defined(__F16C__)
  to->bits = static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or above
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the unit round at 2^-24
    result = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = static_cast<std::uint16_t>(sign | result);
#endif
}

// --- a vector of elements --------------------------------------------------------------------------------------------

LIMPET_FORMULA Vector<float> load(const float* from) {
  Vector<float> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
LIMPET_FORMULA Vector<double> load(const double* from) {
  Vector<double> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
LIMPET_FORMULA Vector<float> load(const BFloat16* from) {
  typedef std::uint16_t Narrow __attribute__((vector_size(LIMPET_VECTOR_BYTES / 2)));
  typedef std::uint32_t Wide __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
  Narrow bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits_as<Vector<float>>(__builtin_convertvector(bits, Wide) << 16);
}
LIMPET_FORMULA Vector<float> load(const Half* from) {
#if defined(__AVX512F__)
  return bits_as<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return bits_as<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vector<float> v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = widen(from[i]);
  return v;
#endif
}

template <class S>
LIMPET_FORMULA void store(const Vector<S>& v, S* to) {
  std::memcpy(to, &v, sizeof(v));
}
LIMPET_FORMULA void store(const Vector<float>& v, BFloat16* to) {
  typedef std::uint16_t Narrow __attribute__((vector_size(LIMPET_VECTOR_BYTES / 2)));
  typedef std::uint32_t Wide __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
  const Wide bits = bits_as<Wide>(v);
  const Wide rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Wide is_nan = bits_as<Wide>((bits & 0x7fffffffu) > 0x7f800000u);
  const Narrow result = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0u & is_nan), Narrow);
  std::memcpy(to, &result, sizeof(result));
}
LIMPET_FORMULA void store(const Vector<float>& v, Half* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < lanes<float>; ++i) narrow(v[i], to + i);
#endif
}

// The last elements of an array, fewer than a vector of type S has, with zeros behind them.
template <class Stored, class S = Compute<Stored>>
struct Padded {
  Stored elements[lanes<S>] = {};

  LIMPET_FORMULA Padded(const Stored* from, std::int64_t count) {
    std::memcpy(elements, from, static_cast<std::size_t>(count) * sizeof(Stored));
  }
  LIMPET_FORMULA void copy_to(Stored* to, std::int64_t count) const {
    std::memcpy(to, elements, static_cast<std::size_t>(count) * sizeof(Stored));
  }
};

template <class S>
LIMPET_FORMULA Vector<S> broadcast(S x) {
  return x - Vector<S>{};
}

template <class S, int count>
struct Lanes {
  typedef S type __attribute__((vector_size(count * sizeof(S))));
};

// The sum of the lanes, halves upon each other.
template <class S, int count = lanes<S>>
LIMPET_FORMULA S sum_lanes(const typename Lanes<S, count>::type& v) {
  if constexpr (count == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<S, count / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return sum_lanes<S, count / 2>(halves[0] + halves[1]);
  }
}

// The last `count` lanes, zeros in the others; NaN does not pass.
template <class S>
LIMPET_FORMULA Vector<S> keep_last(const Vector<S>& v, std::int64_t count) {
  using Mask = decltype(v < v);
  Mask lane;
  for (int i = 0; i < lanes<S>; ++i) lane[i] = i;
  return bits_as<Vector<S>>(bits_as<Mask>(v) & (lane >= lanes<S> - static_cast<int>(count)));
}

// Vectors a and b with their lanes `half` apart exchanged: blocks of `half` lanes are transposed, two by two.
template <class S, int half, int... lane>
LIMPET_FORMULA void exchange(Vector<S>& a, Vector<S>& b, std::integer_sequence<int, lane...>) {
#if __has_builtin(__builtin_shufflevector)
  const Vector<S> first = __builtin_shufflevector(a, b, (lane & half ? lanes<S> + lane - half : lane)...);
  b = __builtin_shufflevector(a, b, (lane & half ? lanes<S> + lane : lane + half)...);
#else  // GCC before 12
  using Mask = decltype(a < b);
  const Vector<S> first = __builtin_shuffle(a, b, Mask{(lane & half ? lanes<S> + lane - half : lane)...});
  b = __builtin_shuffle(a, b, Mask{(lane & half ? lanes<S> + lane : lane + half)...});
#endif
  a = first;
}

// Transposes lanes vectors of lanes values.
template <class S, int half = lanes<S> / 2>
LIMPET_FORMULA void transpose(Vector<S>* square) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<S>; ++i)
    if (!(i & half)) exchange<S, half>(square[i], square[i + half], std::make_integer_sequence<int, lanes<S>>{});
  if constexpr (half > 1) transpose<S, half / 2>(square);
}

// The sums of the lanes of lanes vectors, each as sum_lanes gives it.
template <class S, int half = lanes<S> / 2>
LIMPET_FORMULA Vector<S> sums_of_lanes(Vector<S>* v) {
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i) {
    exchange<S, half>(v[i], v[i + half], std::make_integer_sequence<int, lanes<S>>{});
    v[i] += v[i + half];
  }
  if constexpr (half > 1) sums_of_lanes<S, half / 2>(v);
  return v[0];
}

// Calls body(Stored{}) with the type that `dtype` stores.
template <class Body>
LIMPET_FORMULA void dispatch(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32: return body(float{});
    case Dtype::f64: return body(double{});
    case Dtype::bf16: return body(BFloat16{});
    case Dtype::f16: return body(Half{});
  }
}

}  // namespace
}  // namespace limpet::cpu
