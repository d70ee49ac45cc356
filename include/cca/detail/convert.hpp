#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../tensor_view.hpp"
#include "simd.hpp"

namespace cca::inline CCA_TARGET::detail {

// 16-bit elements are converted by their bits, many at a time; other types by `static_cast`, one after the other.

/// Elements converted at a time: a constant, so that compilers make vectors of the loops below even at -O2.
inline constexpr std::int64_t convert_block = 16;

/// The upper half of a float.
CCA_INLINE float float_of_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

/// Without branches. Normal numbers, infinities and NaNs: the exponent moves up to a float's, and the product with a power
/// of two moves it down by what is too much, infinities and NaNs staying. Denormals: the fraction fills the low bits of
/// 0.5, from which 0.5 is taken.
CCA_INLINE float float_of_half(std::uint16_t bits) {
  const auto as_float = [](std::uint32_t x) {
    float f;
    std::memcpy(&f, &x, sizeof f);
    return f;
  };
  const std::uint32_t wide = std::uint32_t{bits} << 16, sign = wide & 0x80000000u, twice = wide + wide;
  const float normal = as_float((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float denormal = as_float((twice >> 17) | (126u << 23)) - 0.5f;
  const float magnitude = twice < (1u << 27) ? denormal : normal;
  std::uint32_t result;
  std::memcpy(&result, &magnitude, sizeof result);
  return as_float(result | sign);
}

/// `to[i] = from[i]` for i in `[0, convert_block)`.
template <class From>
CCA_INLINE void convert_block_of(const From* from, float* to) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if constexpr (is_bfloat16<From>)
    _mm512_storeu_si512(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  else
    _mm512_storeu_ps(to, _mm512_cvtph_ps(bits));
#else
  std::uint16_t bits[convert_block];
  std::memcpy(bits, from, sizeof bits);
#if defined(__F16C__)
  if constexpr (is_half<From>) {
    for (std::int64_t i = 0; i < convert_block; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    return;
  }
#endif
  for (std::int64_t i = 0; i < convert_block; ++i)
    to[i] = is_bfloat16<From> ? float_of_bfloat16(bits[i]) : float_of_half(bits[i]);
#endif
}

/// `to[i] = from[i]` for i in `[0, count)`, across element types. Exact where `To` is wider; otherwise rounded to nearest.
template <class From, class To>
void convert(const From* from, std::int64_t count, To* to) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<To, float> && (is_bfloat16<From> || is_half<From>))
    for (; i + convert_block <= count; i += convert_block) convert_block_of(from + i, to + i);
  for (; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace cca::inline CCA_TARGET::detail
