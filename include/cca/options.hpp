#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "detail/base/target.hpp"
#include "partition.hpp"

namespace cca { inline namespace CCA_TARGET {

/// How a group becomes a core token. Source: arXiv 2412.12465, section 3.1; `mean` and `max` (elementwise) are the
/// paper's ablations.
enum class pooling {
  last_query,  ///< weights `softmax_j(scale * q_last . k_j)`, `q_last` the query of the group's last token
  mean,
  max
};

/// Under grouped-query attention, who has cores of its own. `mean` and `max` pooling do not depend on the query, so
/// their cores are always per key/value head.
enum class core_heads {
  per_query_head,  ///< as in the authors' code
  per_kv_head  ///< weights by the mean of the query heads that share the key/value head: that many times fewer cores
};

/// What multiplies operands of 16 bits. By default nothing but the vectors of floats, exactly as if floats were stored. A
/// matrix unit is much faster; it multiplies the elements as they are stored and adds in float, so that what lies between
/// two products, the cores and the weights of the softmax, is rounded to the operands' 16 bits, and denormals of bfloat16
/// are taken for zeros. The softmax itself is computed in float.
enum class matrix_unit {
  none,         ///< products of floats
  best,         ///< the fastest of those below that the processor has and the operating system allows, otherwise `none`
  avx512_bf16,  ///< for bfloat16
  amx           ///< tiles, for bfloat16, and on processors that have them for half
};

/// Settings of every entry point. The defaults mean plain causal attention.
struct options {
  std::int64_t group_size = 1;         ///< tokens per core, g >= 1
  std::int64_t window = unlimited;     ///< tokens that stay raw, s >= 1; counts the current one
  pooling pool = pooling::last_query;  ///< see `pooling`
  /// see `core_heads`
  cca::core_heads core_heads = cca::core_heads::per_query_head;
  std::optional<double> softmax_scale{};         ///< default `1 / sqrt(dim)` of query and key
  std::optional<std::int64_t> first_position{};  ///< position of query 0; default: the last query is the last key
  matrix_unit unit = matrix_unit::none;          ///< for operands that are all bfloat16 or all half, see `matrix_unit`
};

namespace detail {

inline double softmax_scale(const options& options, std::int64_t dim) {
  return options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
}

/// Position of query 0. `query_length` queries end with the last of `key_length` keys unless the caller says otherwise.
inline std::int64_t first_position(const options& options, std::int64_t query_length, std::int64_t key_length) {
  return options.first_position.value_or(key_length - query_length);
}

/// Whose cores there are, see `core_heads`.
inline std::int64_t core_head_count(const options& options, std::int64_t query_heads, std::int64_t kv_heads) {
  const bool per_query = options.pool == pooling::last_query && options.core_heads == cca::core_heads::per_query_head;
  return per_query ? query_heads : kv_heads;
}

}  // namespace detail
}}  // namespace cca::CCA_TARGET
