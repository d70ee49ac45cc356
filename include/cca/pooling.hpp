#pragma once

#include <cstdint>

#include "call.hpp"
#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/pool/pooler.hpp"
#include "element.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Operands and options of `pool`.
template <class Query, class Key, class Value, class Sink>
void require_pool(const inputs<Query, Key, Value, Sink>& in, const options& options) {
  require_options<product_type<Query, Key, Value>>(options);
  require_operand("query", in.query);
  require_key_value("key", "value", in.query, in.key, in.value);
  require_query_for_every_key(in.query, in.key, options);
  if (options.group_size < 1) refuse("options.group_size", to_string(options.group_size), "at least 1");
  require_unset(options, &options::window, "every complete group is pooled");
  require_unset(options, &options::unit, "pooling reads more than it multiplies");
  require_unset(options, &options::softcap, "the weights of pooling have none");
  if (!uses_query(options.pool))
    require_unset(options, &options::softmax_scale, "the mean and the maximum have no weights");
  if (given(in.sink_logits)) refuse("sink_logits", to_string(in.sink_logits.extent), "none: they join attention");
}

/// Workers of pooling all complete groups. `attention` pools those that some query sees, which are fewer: a workspace for
/// these workers serves both.
template <class Key>
std::int64_t pool_workers(const tensor_view<Key>& key, const options& options, const execution& run) {
  if (options.group_size == 0) return 1;
  const std::int64_t groups = partition{options.group_size}.group_count(key.length());
  return worker_count(run, pool_tasks(key.batch(), key.heads(), groups, options.group_size).size());
}

/// Cores of every complete group, of these names.
template <class Inputs, class Cores>
void require_cores(const char* key_name, const char* value_name, const Inputs& in, const Cores& cores,
                   const options& options) {
  const std::int64_t heads = core_head_count(options, in.query.heads(), in.key.heads());
  const std::int64_t groups = partition{options.group_size, options.window}.group_count(in.key.length());
  require_extents(key_name, cores.key, {in.key.batch(), heads, groups, in.key.dim()});
  require_extents(value_name, cores.value, {in.key.batch(), heads, groups, in.value.dim()});
}

}  // namespace detail

/// Pools every complete group of keys and values into a core token (globality-aware pooling).
///
/// @param in  query, key and value, read whole but for the tokens of an incomplete last group. With `last_query` and
///   `select` pooling one query per group is read, with `mean` and `max` none.
/// @param to  written whole: `[batch, core heads, floor(length / group_size), dim]` and the same with the value's dim. The
///   core heads are the query's, or the key's with `core_heads::per_kv_head`, `mean` and `max`.
///   A group whose logits are all -inf, which nothing can weigh, has a core of NaN. With `select` pooling a core is one of
///   the tokens, to the bit where its elements are of the same type.
/// @param options  `group_size`, `pool`, `core_heads`, `softmax_scale` and `pooling_scale` are used.
/// @param run  an executor, or `{executor, workspace}`; results are the same for any.
/// @throws std::invalid_argument  before anything is written, naming the argument.
/// Source: arXiv 2412.12465, section 3.1, equation of the core token.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          detail::written CoreKey = Key, detail::written CoreValue = Value>
void pool(const inputs<Query, Key, Value, Sink>& in, const cores<CoreKey, CoreValue>& to, const options& options,
          const execution& run = {}) {
  using T = compute_type<Query, Key, Value>;
  detail::require_pool(in, options);
  detail::require_output("core_key", to.key);
  detail::require_output("core_value", to.value);
  detail::require_cores("core_key", "core_value", in, to, options);
  detail::require_apart({{"core_key", to.key}, {"core_value", to.value}},
                        {{"query", in.query}, {"key", in.key}, {"value", in.value}});

  const std::int64_t workers = detail::pool_workers(in.key, options, run);
  const std::int64_t size = detail::group_rows<T>::size(in.key.dim(), in.value.dim(), !detail::in_place<T, Key, Value>);
  detail::scratch memory(run.workspace(), detail::worker_scratch<T>::bytes(workers, size), "workspace_size");
  detail::pool_views<T>(in.query, in.key, in.value, to.key, to.value, options, run,
                        detail::worker_scratch<T>(memory, workers, size));
}

/// Pools views.
template <detail::not_inputs Query, class Key, class Value, class CoreKey, class CoreValue>
void pool(const Query& query, const Key& key, const Value& value, const CoreKey& core_key, const CoreValue& core_value,
          const options& options, const execution& run = {}) {
  if constexpr (detail::check_views<Query, Key, Value, CoreKey, CoreValue>())
    pool(inputs{query, key, value}, cores{core_key, core_value}, options, run);
}

}}  // namespace cca::CCA_TARGET
