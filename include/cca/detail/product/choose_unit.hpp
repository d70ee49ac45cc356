#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../base/numbers.hpp"
#include "../base/processor.hpp"
#include "../base/target.hpp"

#if defined(CCA_MATRIX_UNITS)
#include <immintrin.h>
#endif

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Whether this processor multiplies such elements with the unit.
template <class Element>
[[nodiscard]] bool has_unit(matrix_unit unit) {
  const matrix_units& units = present_units();
  if (unit == matrix_unit::vnni)
    return std::is_same_v<compute_type<Element>, float> && (units.avx512_vnni || units.avx_vnni);
  if (unit == matrix_unit::amx) return is_bfloat16<Element> ? units.amx_bf16 : is_half<Element> && units.amx_fp16;
  return unit == matrix_unit::avx512_bf16 && is_bfloat16<Element> && units.avx512_bf16;
}

/// The unit with the most multiply-adds that the processor has for such elements, faster than floats or not.
template <class Element>
[[nodiscard]] matrix_unit present_unit() {
  for (const matrix_unit unit : {matrix_unit::amx, matrix_unit::avx512_bf16})
    if (has_unit<Element>(unit)) return unit;
  return matrix_unit::none;
}

#if defined(CCA_MATRIX_UNITS)

/// The time of `steps` multiply-adds in each of 16 registers, of pairs of bfloat16 or of floats.
template <bool Pairs>
__attribute__((target("avx512f,avx512bw,avx512bf16"))) std::int64_t multiply_add_time(std::int64_t steps) {
  __m512 sum[16];
#pragma GCC unroll 16
  for (__m512& of : sum) of = _mm512_setzero_ps();
  __m512 factor = _mm512_set1_ps(1.0f);
  const auto begin = std::chrono::steady_clock::now();
  for (std::int64_t i = 0; i < steps; ++i) {
    asm volatile("" : "+v"(factor));
#pragma GCC unroll 16
    for (__m512& of : sum)
      of = Pairs ? _mm512_dpbf16_ps(of, reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(factor))
                 : _mm512_fmadd_ps(factor, factor, of);
  }
#pragma GCC unroll 16
  for (const __m512& of : sum) asm volatile("" : : "v"(of));
  return (std::chrono::steady_clock::now() - begin).count();
}

/// Whether AVX-512 BF16, which is there, multiplies faster than vectors of floats. AMD's do, at twice the speed. Intel's
/// first ones take as long for a pair as for two floats or longer: what is not known is measured once, in a tenth of a
/// millisecond.
inline bool avx512_bf16_pays() {
  static const bool pays = [] {
    constexpr unsigned amd = 0x68747541;  // "Auth", the first word of the vendor's name
    if (cpuid(0, 0).ebx == amd) return true;
    constexpr std::int64_t steps = 500;
    std::int64_t pairs = (std::numeric_limits<std::int64_t>::max)(), floats = pairs;
    for (int i = 0; i < 5; ++i) {
      pairs = smaller(pairs, multiply_add_time<true>(steps));
      floats = smaller(floats, multiply_add_time<false>(steps));
    }
    return 5 * pairs < 9 * floats;  // a pair is two multiply-adds, and rounding between products costs some
  }();
  return pays;
}

#else

inline bool avx512_bf16_pays() { return false; }

#endif

/// The unit that `wanted` means for operands whose `product_type` is `Element`: never `best`.
template <class Element>
[[nodiscard]] matrix_unit chosen_unit(matrix_unit wanted) {
  if (wanted != matrix_unit::best) return wanted;
  const matrix_unit unit = present_unit<Element>();
  return unit == matrix_unit::avx512_bf16 && !avx512_bf16_pays() ? matrix_unit::none : unit;
}

}  // namespace detail

/// The unit that `matrix_unit::best` means for operands of these elements on this processor.
template <class Element>
[[nodiscard]] matrix_unit best_unit() {
  return detail::chosen_unit<std::remove_const_t<Element>>(matrix_unit::best);
}

}}  // namespace cca::CCA_TARGET
