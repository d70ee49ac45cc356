#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../cache_shape.hpp"
#include "../detail/base/validate.hpp"
#include "../element.hpp"
#include "../executor.hpp"
#include "../options.hpp"
#include "../tensor_view.hpp"
#include "plain.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace dispatch {

/// What kernels are compiled for.
template <class T>
concept element = detail::is_element<T>;

/// An operand of a call of which another one has elements of type `T`.
template <class T>
using operand = tensor_view<const std::type_identity_t<std::remove_const_t<T>>>;

/// Gradients, and what a call takes of them.
template <class T>
using gradient = tensor_view<compute_type<T>>;
template <class T>
using gradient_operand = operand<compute_type<T>>;

/// Log-sum-exps that a call takes.
template <class T>
using lse_operand = lse_view<const compute_type<T>>;

}  // namespace dispatch

namespace detail {

template <class T, std::size_t Rank>
plain::view<T, Rank> to_plain(const tensor_view<T, Rank>& view) {
  return {view.data, view.extent, view.stride};
}

inline plain::options to_plain(const options& o) {
  return {o.group_size,    o.window,         static_cast<int>(o.pool), static_cast<int>(o.core_heads),
          o.softmax_scale, o.first_position, static_cast<int>(o.unit)};
}

inline plain::cache_shape to_plain(const cache_shape& s) {
  return {s.batch, s.heads, s.kv_heads, s.dim, s.value_dim, s.capacity, s.rewind};
}

template <executor E>
plain::executor to_plain(const E& run) {
  return {concurrency(run), &run,
          [](const void* self, std::int64_t n, const void* task, void (*call)(const void*, std::int64_t)) {
            (*static_cast<const E*>(self))(n, [=](std::int64_t i) { call(task, i); });
          }};
}

/// Log-sum-exps or their gradients. Kernels are compiled for those of the type that is computed in alone; those of another,
/// as `lse_view<>{}` may be, can only say that they are not wanted.
template <class To, class Lse>
plain::view<To, 3> lse_to_plain(const char* name, const lse_view<Lse>& lse) {
  if constexpr (std::is_convertible_v<lse_view<Lse>, lse_view<To>>) {
    return to_plain(lse_view<To>(lse));
  } else {
    if (lse.data != nullptr || lse.extent != std::array<std::int64_t, 3>{})
      refuse(name, "elements of another type", "elements of the type that is computed in");
    return {};
  }
}

/// For operands of elements `Element`, constant or not.
template <class Element>
const auto& kernels() {
  using T = std::remove_const_t<Element>;
  static_assert(dispatch::element<T>, "kernels are compiled for float, double, Eigen::bfloat16 and Eigen::half");
  const plain::architecture& chosen = plain::chosen();
  if constexpr (std::is_same_v<T, float>) return chosen.of_float;
  if constexpr (std::is_same_v<T, double>) return chosen.of_double;
  if constexpr (is_bfloat16<T>) return chosen.of_bfloat16;
  if constexpr (is_half<T>) return chosen.of_half;
}

}  // namespace detail
}}  // namespace cca::CCA_TARGET
