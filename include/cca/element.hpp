#pragma once

#include <cstdint>
#include <type_traits>

#include "detail/base/target.hpp"

// 16-bit elements are those of Eigen, known by name alone.
namespace Eigen {
struct bfloat16;
struct half;
}  // namespace Eigen

namespace cca { inline namespace CCA_TARGET {

/// An element of rows of 8 bits, whose number is `element * scale`: each row has a scale of its own, a float beside it.
/// `quantize` makes such rows. Rows of keys and values may be of it, nothing else.
using q8 = std::int8_t;

/// What elements are computed in: double if any of them is, otherwise float.
template <class... Elements>
using compute_type = std::conditional_t<(std::is_same_v<std::remove_const_t<Elements>, double> || ...), double, float>;

namespace detail {

template <class T>
inline constexpr bool is_bfloat16 = std::is_same_v<T, Eigen::bfloat16>;
template <class T>
inline constexpr bool is_half = std::is_same_v<T, Eigen::half>;

/// Elements that matrix units multiply.
template <class T>
inline constexpr bool is_unit_element = is_bfloat16<T> || is_half<T>;

template <class T>
inline constexpr bool is_q8 = std::is_same_v<std::remove_const_t<T>, q8>;

/// Elements that are numbers by themselves, which cores are kept in and that `cca::dispatch` has kernels for.
template <class T>
inline constexpr bool is_element = std::is_same_v<T, float> || std::is_same_v<T, double> || is_unit_element<T>;

template <class T, class... Elements>
inline constexpr bool all_are = (std::is_same_v<std::remove_const_t<Elements>, T> && ...);

/// What operands of these elements may be multiplied in: 16 bits if all are of the same such type, else what they are
/// computed in.
template <class... Elements>
using product_type =
    std::conditional_t<all_are<Eigen::bfloat16, Elements...>, Eigen::bfloat16,
                       std::conditional_t<all_are<Eigen::half, Elements...>, Eigen::half, compute_type<Elements...>>>;

}  // namespace detail

}}  // namespace cca::CCA_TARGET
