#pragma once

#include <cstdint>

#include "call.hpp"
#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/row_span.hpp"
#include "detail/context/tasks.hpp"
#include "detail/pool/group_rows.hpp"
#include "detail/pool/pooler.hpp"
#include "element.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Operands and options of `pool`.
inline void require_pool(const input_views& in, const options& options) {
  require_operand(in.query);
  require_key_value(in.query, in);
  require_query_for_every_key(in.query, in.key, options);
  if (options.group_size < 1) refuse("options.group_size", {options.group_size}, {"at least 1"});
  if (!observes(options.pool)) require_unset(options, &options::window, "every complete group is pooled");
  if (observes(options.pool) && options.window == unlimited)
    refuse("options.window", {"unlimited"}, {"a window: the queries of one say which token of a group is selected"});
  require_causal(options, "a group is pooled with its last query");
  require_unset(options, &options::unit, "pooling reads more than it multiplies");
  require_unset(options, &options::softcap, "the weights of pooling have none");
  require_unset(options, &options::core_bias, "attention adds it");
  if (!uses_query(options.pool))
    require_unset(options, &options::softmax_scale, "the mean and the maximum have no weights");
  require_none(in.sink_logits, "they join attention");
  require_none(in.alibi_slopes, "the weights of pooling know no distance");
  require_none(in.key_bias, "the weights of pooling have none");
}

/// Scratch of pooling all complete groups. `attention` pools those that some query sees, which are fewer: a workspace for
/// this many workers serves both. `T` is what is computed in.
template <class T, class Query, class Key, class Value, class Sink>
pool_plan<T> plan_pooling(const inputs<Query, Key, Value, Sink>& in, const options& options, const execution& run) {
  const sequences all{in.key.batch(), !in.key.has_lengths()};
  const partition partition = partition_of(options);
  std::int64_t tasks =
      options.group_size == 0
          ? 0
          : task_list::size(
                all, in.key.heads(), [&](std::int64_t b) { return partition.group_count(in.key.length(b)); },
                [&](std::int64_t) { return groups_per_task(options.group_size); });
  std::int64_t sums = 0;
  if (observes(options.pool) && pools(options)) {
    const auto observers = [&](std::int64_t b) { return observer_grid(options).count(in.key.length(b)); };
    tasks = larger(tasks, observing_tasks(all, in.query.heads(), observers));
    for (std::int64_t b = 0; b < all.distinct(); ++b)
      sums += element_count<observer_sum<T>>(all.copies(), in.query.heads(), observers(b));
  }
  return {worker_count(run, tasks), group_rows<T>::size(in.key.dim(), in.value.dim(), !in_place<T, Key, Value>),
          all.table_size(), sums};
}

/// Cores of every complete group.
inline void require_cores(const input_views& in, const named_view& key, const named_view& value,
                          const options& options) {
  const std::int64_t heads = core_head_count(options, in.query.heads(), in.key.heads());
  const auto groups = [partition = partition_of(options)](std::int64_t length) { return partition.group_count(length); };
  require_shape(key, heads, in.key.dim(), in.key, groups);
  require_shape(value, heads, in.value.dim(), in.key, groups);
}

}  // namespace detail

/// Pools every complete group of keys and values into a core token (globality-aware pooling).
///
/// @param in  query, key and value, read whole but for the tokens of an incomplete last group. With `last_query` and
///   `select` pooling one query per group is read, with `mean` and `max` none. With `select_by_mass` the queries that observe
///   are read and every key; for a group near the end those of its observers that are there choose, and where none is the
///   first token is selected. No query sees such a core in `attention`.
/// @param to  written whole: `[batch, core heads, floor((length - sink_tokens) / group_size), dim]` and the same with the
///   value's dim. The core heads are the query's, or the key's with `core_heads::per_kv_head`, `mean` and `max`. Where the
///   keys have lengths per sequence, so have the cores: `floor((length(b) - sink_tokens) / group_size)`, in any layout; what
///   is padding is not written.
///   A group whose logits are all -inf, which nothing can weigh, has a core of NaN, but with `select_by_mass`. With `select`
///   and `select_by_mass` pooling a core is one of the tokens, to the bit where its elements are of the same type.
/// @param options  `group_size`, `sink_tokens`, `pool`, `core_heads`, `softmax_scale` and `pooling_scale` are used, and with
///   `select_by_mass` the `window`, which it needs.
/// @param run  an executor, or `{executor, workspace}`; results are the same for any.
/// @throws std::invalid_argument  before anything is written, naming the argument.
/// Source: arXiv 2412.12465, section 3.1, equation of the core token.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          detail::written CoreKey = Key, detail::written CoreValue = Value>
void pool(const inputs<Query, Key, Value, Sink>& in, const cores<CoreKey, CoreValue>& to, const options& options,
          const execution& run = {}) {
  using T = compute_type<Query, Key, Value>;
  const auto views = detail::named(in);
  const detail::output_view core_key("core_key", to.key), core_value("core_value", to.value);
  detail::require_options<detail::product_type<Query, Key, Value>>(options);
  detail::require_pool(views, options);
  detail::require_output(core_key);
  detail::require_output(core_value);
  detail::require_cores(views, core_key, core_value, options);
  detail::require_apart({core_key, core_value},
                        {views.query, views.key, views.value, views.key_scales, views.value_scales});

  const auto plan = detail::plan_pooling<T>(in, options, run);
  detail::scratch memory(run.workspace(), plan.bytes(), "workspace_size");
  detail::pool_views<T>(in.query, detail::row_views_of(in), to, tensor_view<T, 3>{}, options, run, plan.take(memory));
}

/// Pools views.
template <detail::not_inputs Query, class Key, class Value, class CoreKey, class CoreValue>
void pool(const Query& query, const Key& key, const Value& value, const CoreKey& core_key, const CoreValue& core_value,
          const options& options, const execution& run = {}) {
  if constexpr (detail::check_views<Query, Key, Value, CoreKey, CoreValue>())
    pool(inputs{query, key, value}, cores{core_key, core_value}, options, run);
}

}}  // namespace cca::CCA_TARGET
