#pragma once

#include <type_traits>

#include "../../element.hpp"
#include "../../options.hpp"
#include "eight_bits.hpp"
#include "sixteen_bits.hpp"
#include "vectors.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Calls `f(std::type_identity<Product>)` with what multiplies operands whose `product_type` is `Element` on this unit where
/// gradients are asked for. `AsStored` says that all rows are of this type; only then can a unit of 16 bits take them.
template <class Element, bool AsStored = true, class F>
decltype(auto) with_gradient_product([[maybe_unused]] matrix_unit unit, const F& f) {
  if constexpr (is_unit_element<Element> && AsStored)
    if (unit != matrix_unit::none) return f(std::type_identity<sixteen_bits<Element>>{});
  return f(std::type_identity<vectors<compute_type<Element>>>{});
}

/// The same for attention itself: integers take rows of any type, and have no gradients.
template <class Element, bool AsStored = true, class F>
decltype(auto) with_product(matrix_unit unit, const F& f) {
  if constexpr (std::is_same_v<compute_type<Element>, float>)
    if (unit == matrix_unit::vnni) return f(std::type_identity<eight_bits>{});
  return with_gradient_product<Element, AsStored>(unit, f);
}

}}}  // namespace cca::CCA_TARGET::detail
