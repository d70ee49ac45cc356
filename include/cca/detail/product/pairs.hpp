#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../../element.hpp"
#include "../../tensor_view.hpp"
#include "../simd/convert.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "operands.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// How operands get into the forms that matrix units multiply: pairs of neighbours along what is added up.

/// The exponent of infinities and NaNs.
template <class Element>
inline constexpr std::uint16_t largest_exponent = is_bfloat16<Element> ? 0x7f80 : 0x7c00;

/// Whether none of `n` elements is infinite or NaN.
template <class Element>
[[nodiscard]] bool all_finite_elements(const Element* x, std::int64_t n) {
  constexpr std::uint16_t exponent = largest_exponent<Element>;
  std::uint16_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found |= static_cast<std::uint16_t>((bits & exponent) == exponent);
  }
  return found == 0;
}

/// Floats rounded to elements, to nearest and at half a unit away from 0: their bits in the lower half of each lane. NaN
/// stays NaN.
template <class Element>
[[nodiscard]] CCA_INLINE vec<packed_pair> round_to_elements(vec<float> x) {
  if constexpr (is_bfloat16<Element>) {
    const vec<packed_pair> rounded = cast_bits<packed_pair>(x) + vec<packed_pair>(packed_pair{0x8000});
    // The payload of a NaN could carry over, or lie in the bits that go.
    const vec<float> nan(not_a_number<float>);
    return cast_bits<packed_pair>(xsimd::select(x == x, cast_bits<float>(rounded), nan)) >> 16;
  } else {
#if defined(__AVX512F__)
    return _mm512_cvtepu16_epi32(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    // 2^-112 takes a float's exponent to that of a half, denormals included. What is too large becomes infinite there.
    const vec<float> magnitude = xsimd::abs(x);
    const vec<float> bounded = xsimd::select(magnitude > vec<float>(0x1p16f), vec<float>(0x1p16f), magnitude);
    const vec<packed_pair> rounded =
        cast_bits<packed_pair>(bounded * vec<float>(0x1p-112f)) + vec<packed_pair>(packed_pair{0x1000});
    const vec<float> nan = cast_bits<float>(vec<packed_pair>(packed_pair{0x7e00} << 13));
    const vec<packed_pair> bits = cast_bits<packed_pair>(xsimd::select(x == x, cast_bits<float>(rounded), nan)) >> 13;
    return bits | (cast_bits<packed_pair>(x) >> 16 & vec<packed_pair>(packed_pair{0x8000}));
#endif
  }
}

/// The same of two neighbours, as pairs.
template <class Element>
[[nodiscard]] CCA_INLINE vec<packed_pair> round_to_pairs(vec<float> even, vec<float> odd) {
  return round_to_elements<Element>(even) | round_to_elements<Element>(odd) << 16;
}

/// Stores lanes of elements, which are in the lower halves, one after the other.
CCA_INLINE void store_elements(vec<packed_pair> elements, std::uint16_t* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(elements));
#else
  alignas(alignment<packed_pair>) packed_pair lanes[width<packed_pair>];
  elements.store_aligned(lanes);
  for (std::int64_t i = 0; i < width<packed_pair>; ++i) to[i] = static_cast<std::uint16_t>(lanes[i]);
#endif
}

/// The elements of pairs as floats: the odd ones, or the even.
template <class Element>
[[nodiscard]] CCA_INLINE vec<float> elements_of(vec<packed_pair> pairs, bool odd) {
  if constexpr (is_bfloat16<Element>)
    return cast_bits<float>(odd ? pairs & vec<packed_pair>(packed_pair{0xffff0000}) : pairs << 16);
  const vec<packed_pair> element = odd ? pairs >> 16 : pairs & vec<packed_pair>(packed_pair{0xffff});
  const vec<float> magnitude = cast_bits<float>((element & vec<packed_pair>(packed_pair{0x7fff})) << 13);
  // The largest exponent of a half is not that of a float: infinities and NaNs are left as what overflows.
  const vec<float> x = magnitude * vec<float>(0x1p112f);
  const vec<float> nan(not_a_number<float>), infinite(infinity<float>);
  const vec<float> special = xsimd::select(magnitude > vec<float>(0x1p-96f), nan, infinite);
  const vec<float> value = xsimd::select(magnitude < vec<float>(0x1p-96f), x, special);
  return cast_bits<float>(cast_bits<packed_pair>(value) | (element & vec<packed_pair>(packed_pair{0x8000})) << 16);
}

/// One element of a packed_pair as a float: the odd one, or the even.
template <class Element>
[[nodiscard]] float element_of(packed_pair both, bool odd) {
  const auto bits = static_cast<std::uint16_t>(odd ? both >> 16 : both);
  return is_bfloat16<Element> ? float_of_bfloat16(bits) : float_of_half(bits);
}

/// `to[i]` = the pair of `even[i]` and `odd[i]`, for i in `[0, n)`.
inline void interleave(const std::uint16_t* even, const std::uint16_t* odd, std::int64_t n, packed_pair* to) {
  using octet = xsimd::batch<std::uint16_t, transpose_arch>;
  constexpr std::int64_t width = octet::size;
  std::int64_t i = 0;
  for (; i + width <= n; i += width) {
    const octet a = octet::load_unaligned(even + i), b = octet::load_unaligned(odd + i);
    const octet low = xsimd::zip_lo(a, b), high = xsimd::zip_hi(a, b);
    std::memcpy(to + i, &low, sizeof low);
    std::memcpy(to + i + width / 2, &high, sizeof high);
  }
  for (; i < n; ++i) to[i] = packed_pair{even[i]} | packed_pair{odd[i]} << 16;
}

}}}  // namespace cca::CCA_TARGET::detail
