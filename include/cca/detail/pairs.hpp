#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../tensor_view.hpp"
#include "simd.hpp"
#include "transpose.hpp"
#include "unit_product.hpp"

namespace cca::inline CCA_TARGET::detail {

// How operands get into the forms that matrix units multiply: pairs of neighbours along what is added up.

/// The bits of an element type of 16 bits.
template <class Element>
struct element_bits {
  static constexpr bool bfloat = is_bfloat16<Element>;
  static constexpr std::uint16_t exponent = bfloat ? 0x7f80 : 0x7c00;  ///< all of it: infinities and NaNs
  /// A float times this, its lowest bits cut off and shifted to the end, is the element.
  static constexpr float factor = bfloat ? 1.0f : 0x1p-112f;
  static constexpr int shift = bfloat ? 16 : 13;
  static constexpr std::int32_t half_unit = 1 << (shift - 1);
  static constexpr std::int32_t nan = std::int32_t{0x7fff} << shift;
};

template <class Element>
[[nodiscard]] inline std::uint16_t bits_of(const Element* x) {
  static_assert(sizeof(Element) == 2);
  std::uint16_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return bits;
}

/// Whether none of `n` elements is infinite or NaN.
template <class Element>
[[nodiscard]] bool all_finite_elements(const Element* x, std::int64_t n) {
  constexpr std::uint16_t exponent = element_bits<Element>::exponent;
  std::uint16_t found = 0;
  for (std::int64_t i = 0; i < n; ++i) found |= static_cast<std::uint16_t>((bits_of(x + i) & exponent) == exponent);
  return found == 0;
}

/// Weights of two neighbouring rows as pairs of elements, rounded to nearest (a half upwards). A weight is 0 or more, or
/// NaN, which it stays: of the larger numbers that are no weights, the unsigned minimum makes the largest NaN.
template <class Element>
[[nodiscard]] CCA_INLINE vec<std::uint32_t> pair_weights(vec<float> even, vec<float> odd) {
  using bits = element_bits<Element>;
  const auto rounded = [](vec<float> x) CCA_INLINE_LAMBDA {
    if constexpr (bits::factor != 1.0f) x = x * vec<float>(bits::factor);
    const vec<std::uint32_t> limit(static_cast<std::uint32_t>(bits::nan - bits::half_unit));
    return xsimd::min(cast_bits<std::uint32_t>(x), limit) + vec<std::uint32_t>(std::uint32_t{bits::half_unit});
  };
  const vec<std::uint32_t> low = rounded(even) >> bits::shift;
  const vec<std::uint32_t> high = (rounded(odd) >> bits::shift) << 16;
  return low | high;
}

/// The halves of pairs as floats: the even row, or the odd one.
template <class Element>
[[nodiscard]] CCA_INLINE vec<float> weights_of(vec<std::uint32_t> pairs, bool odd) {
  using bits = element_bits<Element>;
  const vec<std::uint32_t> element = odd ? pairs >> 16 : pairs & vec<std::uint32_t>(0xffffu);
  const vec<float> scaled = cast_bits<float>(element << bits::shift);
  if constexpr (bits::bfloat) return scaled;
  // The largest exponent of a half is not that of a float: a NaN has to be made.
  const vec<float> nan(std::numeric_limits<float>::quiet_NaN());
  return xsimd::select(scaled > vec<float>(0x1p-96f), nan, scaled * vec<float>(1 / bits::factor));
}

/// `to[i]` = the pair of `even[i]` and `odd[i]`, for i in `[0, n)`.
inline void interleave(const std::uint16_t* even, const std::uint16_t* odd, std::int64_t n, pair* to) {
  using octet = xsimd::batch<std::uint16_t, transpose_arch>;
  constexpr std::int64_t width = octet::size;
  std::int64_t i = 0;
  for (; i + width <= n; i += width) {
    const octet a = octet::load_unaligned(even + i), b = octet::load_unaligned(odd + i);
    const octet low = xsimd::zip_lo(a, b), high = xsimd::zip_hi(a, b);
    std::memcpy(to + i, &low, sizeof low);
    std::memcpy(to + i + width / 2, &high, sizeof high);
  }
  for (; i < n; ++i) to[i] = pair{even[i]} | pair{odd[i]} << 16;
}

}  // namespace cca::inline CCA_TARGET::detail
