#pragma once

#include <type_traits>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../base/processor.hpp"
#include "../base/target.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Whether this processor multiplies such elements with the unit.
template <class Element>
[[nodiscard]] bool has_unit(matrix_unit unit) {
  const matrix_units& units = present_units();
  if (unit == matrix_unit::amx) return is_bfloat16<Element> ? units.amx_bf16 : is_half<Element> && units.amx_fp16;
  return unit == matrix_unit::avx512_bf16 && is_bfloat16<Element> && units.avx512_bf16;
}

/// The unit that `wanted` means for operands whose `product_type` is `Element`: never `best`.
template <class Element>
[[nodiscard]] matrix_unit chosen_unit(matrix_unit wanted) {
  if (wanted != matrix_unit::best) return wanted;
  for (const matrix_unit unit : {matrix_unit::amx, matrix_unit::avx512_bf16})
    if (has_unit<Element>(unit)) return unit;
  return matrix_unit::none;
}

}  // namespace detail

/// The unit that `matrix_unit::best` means for operands of these elements on this processor.
template <class Element>
[[nodiscard]] matrix_unit best_unit() {
  return detail::chosen_unit<std::remove_const_t<Element>>(matrix_unit::best);
}

}}  // namespace cca::CCA_TARGET
