#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../element.hpp"
#include "../../tensor_view.hpp"
#include "simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// Elements of 16 bits are converted by their bits, those of 8 as integers, many at a time; other types by `static_cast`, one
// after the other. Never by Eigen's own functions: units of different flags would share them, see detail/base/target.hpp.

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

/// To nearest, ties to even; NaN stays NaN with its sign.
CCA_INLINE std::uint16_t bfloat16_of_float(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | 0x7fc0u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/// To nearest, ties to even; NaN stays NaN with its sign. Normal numbers: the exponent moves down to a half's, and half a
/// unit is added. Denormals: the sum with 0.5 has the fraction in its lowest bits.
CCA_INLINE std::uint16_t half_of_float(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  std::uint32_t half = 0x7e00u;
  if (magnitude < 113u << 23)
    half = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - (126u << 23);
  else if (magnitude < 143u << 23)
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  else if (magnitude <= 255u << 23)
    half = 0x7c00u;
  return static_cast<std::uint16_t>(half | sign);
}

/// One element as a number of another type.
template <class To, class From>
[[nodiscard]] CCA_INLINE To element_cast(From x) {
  if constexpr (std::is_same_v<From, To>)
    return x;
  else if constexpr (is_bfloat16<From>)
    return static_cast<To>(float_of_bfloat16(__builtin_bit_cast(std::uint16_t, x)));
  else if constexpr (is_half<From>)
    return static_cast<To>(float_of_half(__builtin_bit_cast(std::uint16_t, x)));
  else if constexpr (is_bfloat16<To>)
    return __builtin_bit_cast(To, bfloat16_of_float(static_cast<float>(x)));
  else if constexpr (is_half<To>)
    return __builtin_bit_cast(To, half_of_float(static_cast<float>(x)));
  else
    return static_cast<To>(x);
}

/// Whether this instruction set converts a vector of these elements of 16 or 8 bits as it is loaded.
template <class Element>
inline constexpr bool widens_in_registers =
#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__))
    is_bfloat16<Element> || is_half<Element> || is_q8<Element>;
#else
    false;
#endif

/// Whether `load_as` makes vectors of `T` of these elements without a detour through memory.
template <class T, class Element>
inline constexpr bool loads_as = std::is_same_v<Element, T> ||
                                 (std::is_same_v<T, float> && widens_in_registers<Element>);

/// `width<T>` elements from `from` on, those of 8 bits without their scale. A bfloat16 takes one shuffle that puts it over
/// zeros: widening and shifting would be two operations, on the units that shuffle and shift.
template <class T, class Element>
CCA_INLINE vec<T> load_as(const Element* from) {
  static_assert(loads_as<T, Element>);
  if constexpr (std::is_same_v<Element, T>) return vec<T>::load_unaligned(from);
#if defined(__AVX512BW__)
  if constexpr (is_q8<Element>)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  [[maybe_unused]] const auto load = [from]() CCA_INLINE_LAMBDA {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  };
  if constexpr (is_bfloat16<Element>) {
    // Word 16 is the first of the upper half, which is zeros.
    const __m512i element = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_or_si512(_mm512_slli_epi32(element, 16), _mm512_set1_epi32(16));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(place, _mm512_zextsi256_si512(load())));
  }
  if constexpr (is_half<Element>) return _mm512_cvtph_ps(load());
#elif defined(__AVX2__) && defined(__F16C__)
  if constexpr (is_q8<Element>)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  [[maybe_unused]] const auto load = [from]() CCA_INLINE_LAMBDA {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  if constexpr (is_bfloat16<Element>) {
    constexpr char z = -1;                                                                  // a zero
    const __m256i place = _mm256_setr_epi8(z, z, 0, 1, z, z, 2, 3, z, z, 4, 5, z, z, 6, 7,  //
                                           z, z, 8, 9, z, z, 10, 11, z, z, 12, 13, z, z, 14, 15);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load()), place));
  }
  if constexpr (is_half<Element>) return _mm256_cvtph_ps(load());
#endif
}

/// `n` elements, 0 <= n < width, and zeros; nothing behind them is read.
template <class T, class Element>
CCA_INLINE vec<T> load_as(const Element* from, std::int64_t n) {
  if constexpr (std::is_same_v<Element, T>) {
    return load_partial(from, n);
  } else {
    std::conditional_t<is_q8<Element>, q8, std::uint16_t> bits[width<T>] = {};  // zeros of any type
    std::memcpy(bits, from, static_cast<std::size_t>(n) * sizeof *bits);
    return load_as<T>(reinterpret_cast<const Element*>(bits));
  }
}

/// `to[i] = from[i]` for i in `[0, count)`, across element types, those of 8 bits without their scale. Exact where `To` is
/// wider; otherwise rounded to nearest.
template <class From, class To>
void convert(const From* from, std::int64_t count, To* to) {
  std::int64_t i = 0;
  if constexpr (std::is_same_v<To, From> && std::is_floating_point_v<To>) {
    for (; i + width<To> <= count; i += width<To>) vec<To>::load_unaligned(from + i).store_unaligned(to + i);
  } else if constexpr (std::is_same_v<To, float> && widens_in_registers<From>) {
    for (; i + width<To> <= count; i += width<To>) load_as<To>(from + i).store_unaligned(to + i);
  } else if constexpr (std::is_same_v<To, float> && (is_bfloat16<From> || is_half<From>)) {
    // As many at a time as compilers make vectors of even at -O2.
    constexpr std::int64_t block = 16;
    for (; i + block <= count; i += block) {
      std::uint16_t bits[block];
      std::memcpy(bits, from + i, sizeof bits);
      for (std::int64_t j = 0; j < block; ++j)
        to[i + j] = is_bfloat16<From> ? float_of_bfloat16(bits[j]) : float_of_half(bits[j]);
    }
  } else if constexpr (is_q8<From>) {
    constexpr std::int64_t block = 16;
    for (; i + block <= count; i += block)
      for (std::int64_t j = 0; j < block; ++j) to[i + j] = static_cast<To>(from[i + j]);
  }
  for (; i < count; ++i) to[i] = element_cast<To>(from[i]);
}

/// The greatest magnitude of an element that `round_to_q8` makes: -128 would have no counterpart.
inline constexpr float largest_q8 = 127;

/// Makes a row one of 8 bits, `to[d]` the nearest to `from[d] / scale`, ties to even, and returns its scale, with which
/// its largest element is 127. The scale of a row of zeros is 0; that of a row with an infinity or a NaN is NaN.
template <class From>
[[nodiscard]] float round_to_q8(const From* from, std::int64_t dim, q8* to) {
  constexpr std::uint32_t sign = 0x80000000u, infinity_bits = 0x7f800000u;
  const auto number = [from](std::int64_t d) CCA_INLINE_LAMBDA { return element_cast<float>(from[d]); };
  std::uint32_t largest = 0;  // of the magnitudes, whose bits are in their order, NaN behind infinity
  for (std::int64_t d = 0; d < dim; ++d) {
    const std::uint32_t magnitude = __builtin_bit_cast(std::uint32_t, number(d)) & ~sign;
    largest = magnitude > largest ? magnitude : largest;
  }
  float scale = __builtin_bit_cast(float, largest) / largest_q8;
  if (scale * largest_q8 > largest_finite<float>)  // of the largest numbers: rounded up, and no longer finite
    scale = __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, scale) - 1);
  const bool zeros = largest >= infinity_bits || scale == 0;
  for (std::int64_t d = 0; d < dim; ++d) {
    // A sum with 1.5 * 2^23 has the nearest whole number in its lowest bits. Scales below the normal numbers are
    // rounded so far that a quotient may be larger than 127.
    const float quotient = zeros ? 0 : number(d) / scale;
    const float bounded = quotient > largest_q8 ? largest_q8 : quotient < -largest_q8 ? -largest_q8 : quotient;
    const auto bits = __builtin_bit_cast(std::uint32_t, bounded + 0x1.8p23f);
    to[d] = static_cast<q8>(static_cast<std::uint8_t>(bits & 0xffu));
  }
  return largest >= infinity_bits ? __builtin_bit_cast(float, 0x7fc00000u) : scale;
}

}}}  // namespace cca::CCA_TARGET::detail
