#pragma once

#include <type_traits>

#include "../../element.hpp"
#include "../../options.hpp"
#include "sixteen_bits.hpp"
#include "vectors.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Calls `f(std::type_identity<Product>)` with what multiplies operands whose `product_type` is `Element` on this unit.
/// `AsStored` says that all rows are of this type; only then can a unit take them.
template <class Element, bool AsStored = true, class F>
decltype(auto) with_product([[maybe_unused]] matrix_unit unit, const F& f) {
  if constexpr (is_unit_element<Element> && AsStored)
    if (unit != matrix_unit::none) return f(std::type_identity<sixteen_bits<Element>>{});
  return f(std::type_identity<vectors<compute_type<Element>>>{});
}

}}}  // namespace cca::CCA_TARGET::detail
