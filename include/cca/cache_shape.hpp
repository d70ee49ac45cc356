#pragma once

#include <cstdint>
#include <type_traits>

#include "call.hpp"
#include "detail/base/numbers.hpp"
#include "detail/base/target.hpp"
#include "detail/base/validate.hpp"
#include "options.hpp"

namespace cca { inline namespace CCA_TARGET {

/// What a cache holds, fixed at its construction.
struct cache_shape {
  std::int64_t batch = 1;      ///< sequences
  std::int64_t heads = 0;      ///< query heads
  std::int64_t kv_heads = 0;   ///< key/value heads, a divisor of `heads`
  std::int64_t dim = 0;        ///< of queries and keys
  std::int64_t value_dim = 0;  ///< of values; 0 means `dim`
  std::int64_t capacity = 0;   ///< tokens per sequence for which memory is taken at once; 0: as they come
  std::int64_t rewind = 0;     ///< tokens that `truncate` can take back, see there; at two raw entries each

  /// Of every member.
  friend bool operator==(const cache_shape&, const cache_shape&) = default;
};

namespace detail {

/// Whether a cache may keep these elements; if not, the compiler's message says which it may.
template <class Element, class Core>
constexpr bool check_cache_elements() {
  static_assert(
      std::is_same_v<Element, double> || !std::is_same_v<Core, double>,
      "cca: cores are computed in float unless keys and values are double: as double they would hold no more. "
      "Core is float, Eigen::bfloat16 or Eigen::half, or double beside double");
  return check_rows<Element, Core>();
}

/// The most elements that memory could hold.
inline constexpr long double max_elements = 0x1p58L;

/// Elements of a tensor, where their number may not fit 64 bits.
[[nodiscard]] inline long double elements(std::int64_t heads, std::int64_t rows, std::int64_t dim) {
  return static_cast<long double>(heads) * static_cast<long double>(rows) * static_cast<long double>(dim);
}

/// Elements of the keys or values of `tokens` tokens, at most.
[[nodiscard]] inline long double elements(const cache_shape& shape, std::int64_t tokens) {
  return elements(shape.heads, tokens, larger(shape.dim, shape.value_dim));
}

/// The shape with its defaults filled in; refuses one that makes no sense.
[[nodiscard]] inline cache_shape complete(cache_shape shape) {
  const auto least = [](const char* name, std::int64_t got, std::int64_t wanted) {
    if (got < wanted) refuse(name, {got}, {"at least ", wanted});
  };
  least("shape.batch", shape.batch, 0);
  least("shape.heads", shape.heads, 1);
  least("shape.kv_heads", shape.kv_heads, 1);
  require_heads("shape.kv_heads", shape.kv_heads, shape.heads);
  least("shape.dim", shape.dim, 1);
  least("shape.value_dim", shape.value_dim, 0);
  least("shape.capacity", shape.capacity, 0);
  least("shape.rewind", shape.rewind, 0);
  if (shape.value_dim == 0) shape.value_dim = shape.dim;
  if (elements(shape, larger<std::int64_t>(shape.capacity, 1)) > max_elements)
    refuse("shape.capacity", {shape.capacity, " tokens"}, {"a cache below 2^58 elements"});
  return shape;
}

}  // namespace detail
}}  // namespace cca::CCA_TARGET
