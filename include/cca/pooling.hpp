#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/pool/pooler.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Operands of pooling and of CCA attention: a query for every key.
template <class Query, class Key, class Value>
void require_pooling_operands(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                              const options& options) {
  require_options<compute_type<Query, Key, Value>>(options);
  require_unit<product_type<Query, Key, Value>>(options);
  require_operand("query", query);
  require_key_value("key", "value", query, key, value);
  if (query.length() != key.length())
    refuse(
        "query", std::to_string(query.length()) + " queries",
        "a query for each of the " + std::to_string(key.length()) + " keys, since a group is pooled with its last one");
  if (options.first_position.value_or(0) != 0)
    refuse("options.first_position", std::to_string(*options.first_position),
           "0 or none: there is a query for every key");
}

/// Operands and options of `pool`.
template <class Query, class Key, class Value>
void require_pool(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, const options& options) {
  require_pooling_operands(query, key, value, options);
  require_unused(options.window == unlimited, "options.window", "none: every complete group is pooled");
  require_unused(options.unit == matrix_unit::none, "options.unit", "none: pooling reads more than it multiplies");
  require_unused(options.pool == pooling::last_query || !options.softmax_scale, "options.softmax_scale",
                 "none: the mean and the maximum have no weights");
}

/// Workers of pooling all complete groups. `attention` pools those that some query sees, which are fewer: a workspace for
/// these workers serves both.
template <class Key, executor E>
std::int64_t pool_workers(const tensor_view<Key>& key, const options& options, const E& run) {
  const std::int64_t groups = partition{options.group_size}.group_count(key.length());
  return worker_count(run, pool_tasks(key.batch(), key.heads(), groups, options.group_size).size());
}

/// Extents of the core keys and values of every complete group.
template <class Query, class Key, class Value>
std::array<std::array<std::int64_t, 4>, 2> core_extents(tensor_view<Query> query, tensor_view<Key> key,
                                                        tensor_view<Value> value, const options& options) {
  const std::int64_t heads = core_head_count(options, query.heads(), key.heads());
  const std::int64_t groups = partition{options.group_size}.group_count(key.length());
  return {{{key.batch(), heads, groups, key.dim()}, {key.batch(), heads, groups, value.dim()}}};
}

}  // namespace detail

/// Pools every complete group of keys and values into a core token (globality-aware pooling).
///
/// @param query,key,value  `[batch, heads, length, dim]`, read whole but for the tokens of an incomplete last group.
///   With `last_query` pooling one query per group is read, with `mean` and `max` none.
/// @param core_key,core_value  written whole: `[batch, cores, floor(length / group_size), dim]` and the same with the
///   value's dim. `cores` is the query's heads, or the key's with `core_heads::per_kv_head`, `mean` and `max`.
/// @param options  `group_size`, `pool`, `cores` and `softmax_scale` are used.
/// @param run  executor; results are the same for any.
/// @param workspace  at least `workspace_size` bytes, or empty: then memory is allocated.
/// @throws std::invalid_argument  before anything is written, naming the argument.
/// Source: arXiv 2412.12465, section 3.1, equation of the core token.
template <class Query, class Key, class Value, class CoreKey, class CoreValue, executor E = serial_executor>
void pool(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<CoreKey> core_key,
          tensor_view<CoreValue> core_value, const options& options, const E& run = {},
          std::span<std::byte> workspace = {}) {
  using T = compute_type<Query, Key, Value>;
  detail::require_pool(query, key, value, options);
  const auto [key_extents, value_extents] = detail::core_extents(query, key, value, options);
  detail::require_output("core_key", core_key);
  detail::require_output("core_value", core_value);
  detail::require_extents("core_key", core_key, key_extents);
  detail::require_extents("core_value", core_value, value_extents);

  const std::int64_t workers = detail::pool_workers(key, options, run);
  const std::int64_t size = detail::group_rows<T>::size(key.dim(), value.dim(), !detail::in_place<T, Key, Value>);
  detail::scratch memory(workspace, detail::worker_scratch<T>::bytes(workers, size));
  detail::pool_views<T>(query, key, value, core_key, core_value, options, run,
                        detail::worker_scratch<T>(memory, workers, size));
}

}}  // namespace cca::CCA_TARGET
