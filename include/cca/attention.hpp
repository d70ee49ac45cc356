#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>

#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/source.hpp"
#include "detail/engine/forward.hpp"
#include "detail/product/choose_unit.hpp"
#include "detail/softmax/score_rule.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {

/// Far context that any compressor made: `attend` puts it before the window in one softmax.
template <class Key, class Value>
struct far_context {
  tensor_view<Key> key;               ///< `[batch, far heads, far length, dim]`
  tensor_view<Value> value;           ///< `[batch, far heads, far length, value dim]`
  lse_view<const std::int64_t> seen;  ///< `[batch, query heads, query length]`: the query sees far rows `[0, seen)`
};

/// Counts may be mutable.
template <class Key, class Value, class Count>
far_context(tensor_view<Key>, tensor_view<Value>, lse_view<Count>) -> far_context<Key, Value>;

namespace detail {

/// The tokens that query `i` sees raw.
template <class Query, class Key, class Value>
auto raw_source(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, const options& options) {
  const partition partition{options.group_size, options.window};
  const std::int64_t first = first_position(options, query.length(), key.length()), length = key.length();
  return view_source(key, value, [partition, first, length](std::int64_t, std::int64_t, std::int64_t i) {
    return intersection(partition.raw(first + i), {0, length});
  });
}

/// The engine for these queries and sources of `rows`, of whose heads `head_groups` is the greatest common divisor.
/// `Element` is the operands' `product_type`.
template <class Element, class Query, executor E>
forward<Element> plan(const tensor_view<Query>& query, std::int64_t value_dim, std::int64_t head_groups,
                      std::initializer_list<std::int64_t> rows, bool staged, matrix_unit unit, const E& run) {
  std::int64_t parts = 0;
  for (const std::int64_t count : rows) parts += forward<Element>::count_parts(count);
  return {query.batch(), query.heads(), query.length(), tile_form{query.dim(), value_dim, chosen_unit<Element>(unit)},
          head_groups,   parts,         staged,         concurrency(run)};
}

template <class Query, class Key, class Value, class FarKey, class FarValue, executor E>
auto attend_plan(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
                 const far_context<FarKey, FarValue>& context, matrix_unit unit, const E& run) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  return plan<product_type<Query, Key, Value, FarKey, FarValue>>(
      query, value.dim(), std::gcd(key.heads(), context.key.heads()), {context.key.length(), key.length()},
      !in_place<T, Key, Value, FarKey, FarValue>, unit, run);
}

/// Operands and options of local and dense attention.
template <class Query, class Key, class Value>
void require_raw(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
                 const options& options) {
  require_options<compute_type<Query, Key, Value>>(options);
  require_unit<product_type<Query, Key, Value>>(options);
  require_positions(options);
  require_operand("query", query);
  require_key_value("key", "value", query, key, value);
  require_unused(options.pool == pooling::last_query, "options.pool", "none: nothing is pooled");
  require_unused(options.core_heads == core_heads::per_query_head, "options.core_heads", "none: nothing is pooled");
}

/// What dense attention has no use for.
inline void require_dense(const options& options) {
  require_unused(options.group_size == 1, "options.group_size", "1: dense attention has no groups");
  require_unused(options.window == unlimited, "options.window", "none: dense attention has no window");
}

/// Operands and options of `attend`.
template <class Query, class Key, class Value, class FarKey, class FarValue>
void require_attend(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
                    const far_context<FarKey, FarValue>& context, const options& options) {
  require_options<compute_type<Query, Key, Value, FarKey, FarValue>>(options);
  require_unit<product_type<Query, Key, Value, FarKey, FarValue>>(options);
  require_grouping(options);
  require_positions(options);
  require_operand("query", query);
  require_key_value("key", "value", query, key, value);
  require_key_value("far.key", "far.value", query, context.key, context.value);
  if (context.value.dim() != value.dim())
    refuse("far.value", "dim " + std::to_string(context.value.dim()), "the value's dim " + std::to_string(value.dim()));
  require_operand("far.seen", context.seen);
  require_extents("far.seen", context.seen, {query.batch(), query.heads(), query.length()});
  require_seen(context.seen, context.key.length());
  require_unused(options.pool == pooling::last_query, "options.pool", "none: the caller pools");
  require_unused(options.core_heads == core_heads::per_query_head, "options.core_heads", "none: the caller pools");
}

/// The raw part of the context alone: local and dense attention.
template <class Query, class Key, class Value, class Out, class Lse, executor E>
void attend_raw(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                lse_view<Lse> lse, const options& options, const E& run, std::span<std::byte> workspace) {
  using T = compute_type<Query, Key, Value>;
  require_raw(query, key, value, options);
  require_results(query, value.dim(), out, lse);

  const auto forward = plan<product_type<Query, Key, Value>>(query, value.dim(), key.heads(), {key.length()},
                                                             !in_place<T, Key, Value>, options.unit, run);
  scratch memory(workspace, forward.bytes());
  forward(query, out, lse, make_score_rule<T>(options, key.dim()), run, memory, raw_source(query, key, value, options));
}

/// The far part `[0, seen)` of a caller's rows or of cores.
template <class Key, class Value, class Seen>
auto far_source(tensor_view<Key> key, tensor_view<Value> value, Seen seen) {
  return view_source(key, value, [seen](std::int64_t b, std::int64_t h, std::int64_t i) {
    return range{0, seen(b, h, i)};
  });
}

/// A caller's far rows.
template <class Key, class Value>
auto seen_source(const far_context<Key, Value>& context) {
  return far_source(context.key, context.value, [seen = context.seen](std::int64_t b, std::int64_t h, std::int64_t i) {
    return *seen.row(b, h, i);
  });
}

/// Cores.
template <class T>
auto core_source(tensor_view<T> key, tensor_view<T> value, const options& options) {
  return far_source(key, value,
                    [partition = partition{options.group_size, options.window}](
                        std::int64_t, std::int64_t, std::int64_t t) { return partition.core_count(t); });
}

/// Calls `f(std::type_identity<Core>)`, where `Core` is what cores are kept in: what is computed in or, for a matrix unit,
/// what it multiplies. `Element` is the operands' `product_type`.
template <class Element, class F>
decltype(auto) with_core_type(matrix_unit unit, const F& f) {
  if constexpr (is_unit_element<Element>)
    if (chosen_unit<Element>(unit) != matrix_unit::none) return f(std::type_identity<Element>{});
  return f(std::type_identity<compute_type<Element>>{});
}

/// Scratch for the cores that some query of CCA attention visible.
template <class Core>
struct core_plan {
  std::int64_t cores, core_heads, core_key_size, core_value_size;

  template <class Query, class Key, class Value>
  core_plan(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
            const options& options)
      : cores(partition{options.group_size, options.window}.core_count(key.length() - 1)),
        core_heads(core_head_count(options, query.heads(), key.heads())),
        core_key_size(element_count<Core>(key.batch(), core_heads, cores, key.dim())),
        core_value_size(element_count<Core>(key.batch(), core_heads, cores, value.dim())) {}

  [[nodiscard]] std::size_t bytes() const {
    return scratch_bytes<Core>(core_key_size) + scratch_bytes<Core>(core_value_size);
  }
};

/// Scratch of CCA attention: the cores, what pools them, and what attends to them.
template <class Element, class Core>
struct cca_plan : core_plan<Core> {
  using T = compute_type<Element>;
  std::int64_t workers, pooler_size;
  detail::forward<Element> forward;

  template <class Query, class Key, class Value, executor E>
  cca_plan(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
           const options& options, const E& run)
      : core_plan<Core>(query, key, value, options),
        workers(pool_workers(key, options, run)),
        pooler_size(group_rows<T>::size(key.dim(), value.dim(), !in_place<T, Key, Value>)),
        forward(plan<Element>(query, value.dim(), key.heads(), {this->cores, key.length()},
                              !in_place<T, Key, Value, Core>, options.unit, run)) {}

  [[nodiscard]] std::size_t bytes() const {
    return core_plan<Core>::bytes() + worker_scratch<T>::bytes(workers, pooler_size) + forward.bytes();
  }
};

}  // namespace detail

/// Bytes of workspace that every entry point but `attend` is content with for these operands, options and executor.
template <class Query, class Key, class Value, executor E = serial_executor>
[[nodiscard]] std::size_t workspace_size(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                                         const options& options, const E& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  detail::require_options<compute_type<Element>>(options);
  detail::require_unit<Element>(options);
  detail::require_sizes("query", query);
  detail::require_sizes("key", key);
  detail::require_sizes("value", value);
  return detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    return detail::cca_plan<Element, Core>(query, key, value, options, run).bytes() + detail::scratch_alignment;
  });
}

/// The same for `attend`, whose far context may be larger than the cores. Of its options only the unit matters.
template <class Query, class Key, class Value, class FarKey, class FarValue, executor E = serial_executor>
[[nodiscard]] std::size_t workspace_size(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                                         far_context<FarKey, FarValue> context, const E& run = {},
                                         matrix_unit unit = matrix_unit::none) {
  detail::require_sizes("query", query);
  detail::require_sizes("key", key);
  detail::require_sizes("value", value);
  detail::require_sizes("far.key", context.key);
  return detail::attend_plan(query, key, value, context, unit, run).bytes() + detail::scratch_alignment;
}

/// Core Context Aware attention: the query at position t sees the cores of all groups before its window and the raw
/// tokens from there to t, in one softmax.
///
/// @param query  `[batch, query heads, length, dim]`
/// @param key  `[batch, heads, length, dim]`, `heads` a divisor of the query's; as attention sees them, with RoPE applied
/// @param value  `[batch, heads, length, value dim]`
/// @param out  `[batch, query heads, length, value dim]`, written whole; overlaps no operand
/// @param lse  natural log-sum-exp of each query's scores, `[batch, query heads, length]`, written whole;
///   `lse_view<>{}` when not wanted
/// @param options  all are used, but `first_position`: there is a query for every key
/// @param run  executor; the results are bitwise the same for any
/// @param workspace  at least `workspace_size` bytes, or empty: then memory for the cores is allocated
/// @throws std::invalid_argument  before anything is written, naming the argument, what it got and what it wants
/// Source: arXiv 2412.12465, section 3.3 (fused CCA attention).
template <class Query, class Key, class Value, class Out, class Lse, executor E = serial_executor>
void attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
               lse_view<Lse> lse, const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  using T = compute_type<Element>;
  detail::require_pooling_operands(query, key, value, options);
  detail::require_results(query, value.dim(), out, lse);
  detail::require_grouping(options);

  detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    const detail::cca_plan<Element, Core> plan(query, key, value, options, run);
    detail::scratch memory(workspace, plan.bytes());
    const auto cores = [&](std::int64_t size, std::int64_t dim) {
      return bhsd(memory.take<Core>(size), key.batch(), plan.core_heads, plan.cores, dim);
    };
    const auto core_key = cores(plan.core_key_size, key.dim()), core_value = cores(plan.core_value_size, value.dim());
    detail::pool_views<T>(query, key, value, core_key, core_value, options, run,
                          detail::worker_scratch<T>(memory, plan.workers, plan.pooler_size));
    plan.forward(query, out, lse, detail::make_score_rule<T>(options, key.dim()), run, memory,
                 detail::core_source(core_key, core_value, options), detail::raw_source(query, key, value, options));
  });
}

/// Without log-sum-exps.
template <class Query, class Key, class Value, class Out, executor E = serial_executor>
void attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
               const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  attention(query, key, value, out, lse_view<>{}, options, run, workspace);
}

/// Sliding-window attention: the raw part of CCA attention alone (locality-preserving attention). With `group_size` 1
/// the query at t sees the `window` tokens `[t + 1 - window, t + 1)`, otherwise the window reaches back to the start of
/// a group, as beside cores.
///
/// Queries may be fewer than keys: they are the last ones, or start at `options.first_position`. Other parameters and
/// errors as for `attention`. Source: arXiv 2412.12465, section 3.2.
template <class Query, class Key, class Value, class Out, class Lse, executor E = serial_executor>
void local_attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                     lse_view<Lse> lse, const options& options, const E& run = {},
                     std::span<std::byte> workspace = {}) {
  detail::require_grouping(options);
  detail::attend_raw(query, key, value, out, lse, options, run, workspace);
}

/// Without log-sum-exps.
template <class Query, class Key, class Value, class Out, executor E = serial_executor>
void local_attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                     const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  local_attention(query, key, value, out, lse_view<>{}, options, run, workspace);
}

/// Causal attention to every token at or before the query's position. Queries may be fewer than keys, as for
/// `local_attention`; other parameters and errors as for `attention`.
template <class Query, class Key, class Value, class Out, class Lse, executor E = serial_executor>
void dense_attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                     lse_view<Lse> lse, const options& options = {}, const E& run = {},
                     std::span<std::byte> workspace = {}) {
  detail::require_dense(options);
  detail::attend_raw(query, key, value, out, lse, options, run, workspace);
}

/// Without log-sum-exps.
template <class Query, class Key, class Value, class Out, executor E = serial_executor>
void dense_attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                     const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  dense_attention(query, key, value, out, lse_view<>{}, options, run, workspace);
}

/// One softmax over far context that the caller made, by any compressor, and the raw window: query i of head h sees the
/// far rows `[0, far.seen(b, h, i))` and the tokens of `local_attention` with the same options. An empty key and value
/// leave the far context alone.
///
/// `far_context` has heads that divide the query's; every `seen` lies in `[0, far length]`. Other parameters and errors as for
/// `local_attention`.
template <class Query, class Key, class Value, class FarKey, class FarValue, class Out, class Lse,
          executor E = serial_executor>
void attend(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
            far_context<FarKey, FarValue> context, tensor_view<Out> out, lse_view<Lse> lse, const options& options,
            const E& run = {}, std::span<std::byte> workspace = {}) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  detail::require_attend(query, key, value, context, options);
  detail::require_results(query, value.dim(), out, lse);

  const auto forward = detail::attend_plan(query, key, value, context, options.unit, run);
  detail::scratch memory(workspace, forward.bytes());
  forward(query, out, lse, detail::make_score_rule<T>(options, key.dim()), run, memory, detail::seen_source(context),
          detail::raw_source(query, key, value, options));
}

/// Without log-sum-exps.
template <class Query, class Key, class Value, class FarKey, class FarValue, class Out, executor E = serial_executor>
void attend(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
            far_context<FarKey, FarValue> context, tensor_view<Out> out, const options& options, const E& run = {},
            std::span<std::byte> workspace = {}) {
  attend(query, key, value, context, out, lse_view<>{}, options, run, workspace);
}

}}  // namespace cca::CCA_TARGET
