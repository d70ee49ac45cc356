#pragma once

#include <cstdint>
#include <utility>

#include "../../executor.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../context/tasks.hpp"
#include "group_rows.hpp"
#include "last_query.hpp"
#include "max.hpp"
#include "mean.hpp"
#include "select.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The list of poolings: calls `f.template operator()<Pooling>()`.
template <class T, class F>
decltype(auto) with_pooling(pooling pool, const F& f) {
  switch (pool) {
    case pooling::mean:
      return f.template operator()<mean_pooling<T>>();
    case pooling::max:
      return f.template operator()<max_pooling<T>>();
    case pooling::select:
      return f.template operator()<select_pooling<T>>();
    case pooling::last_query:
      break;
  }
  return f.template operator()<last_query_pooling<T>>();
}

/// Tokens that a task of pooling takes in: enough to be worth a task, few enough to balance.
inline constexpr std::int64_t pool_task_tokens = 1024;

/// Whose groups are pooled.
struct pool_heads {
  std::int64_t batch, query_heads, kv_heads, core_heads;
};

/// Tasks of pooling `groups` groups of every head.
inline task_list pool_tasks(std::int64_t batch, std::int64_t kv_heads, std::int64_t groups, std::int64_t group_size) {
  return {batch, kv_heads, groups, pool_task_tokens / group_size};
}

/// Calls `f(worker, b, kv_head, core head, group)` for the groups `[groups.begin, groups.end)` of every sequence and core
/// head. The heads that share a group take turns while its rows are in cache, never at once.
template <executor E, class F>
void for_each_group(const pool_heads& heads, range groups, std::int64_t group_size, const E& run, std::int64_t workers,
                    const F& f) {
  if (heads.core_heads == 0) return;
  const task_list tasks = pool_tasks(heads.batch, heads.kv_heads, groups.size(), group_size);
  const std::int64_t cores = heads.core_heads / heads.kv_heads;
  run_tasks(run, workers, tasks.size(), [&](std::int64_t worker, std::int64_t i) {
    const task task = tasks[i];
    for (std::int64_t c = task.items.begin; c < task.items.end; ++c)
      for (std::int64_t h = task.head * cores; h < (task.head + 1) * cores; ++h)
        f(worker, task.b, task.head, h, groups.begin + c);
  });
}

/// The scores that weigh the tokens of a group.
template <class T>
score_rule<T> pooling_rule(const options& options, std::int64_t dim) {
  return score_rule<T>{static_cast<T>(pooling_scale(options, dim))}.balanced();
}

/// The mean of the queries of a group's last token that share a core, times what scores want.
template <class T, class Query>
void load_mean_query(group_rows<T>& group, std::int64_t h, std::int64_t sharing, const Query& query) {
  for (std::int64_t q = h * sharing; q < (h + 1) * sharing; ++q)
    add_scaled_row(query(q), group.dim, group.rule.query_factor() / static_cast<T>(sharing), group.query);
}

/// Pools the groups `[groups.begin, groups.end)` of every sequence and core head. `absorb(pooling, b, kv_head, tokens)`
/// feeds a group's rows, `query(b, h, token)` is a row of queries, `core(b, h, group)` the pair of rows to write. Scratch
/// is of `group_rows::size` elements a worker.
template <class T, class Absorb, class Query, class Core, executor E>
void pool_groups(const pool_heads& heads, range groups, std::int64_t dim, std::int64_t value_dim,
                 const options& options, const Absorb& absorb, const Query& query, const Core& core, const E& run,
                 const worker_scratch<T>& scratch) {
  const partition partition{options.group_size, options.window};
  const score_rule<T> rule = pooling_rule<T>(options, dim);
  const auto pool_group = [&]<class Pooling>(std::int64_t worker, std::int64_t b, std::int64_t kv_head, std::int64_t h,
                                             std::int64_t c) {
    const range tokens = partition.group(c);
    group_rows<T> group(scratch[worker], dim, value_dim, rule);
    const auto [key, value] = core(b, h, c);
    // A mean of finite rows is finite: where it is not, it may have overflowed on the way, and is taken again.
    for (const int headroom : {0, most_headroom}) {
      group.clear();
      Pooling pooling(group, headroom);
      if (uses_query(options.pool))
        load_mean_query(group, h, heads.query_heads / heads.core_heads,
                        [&](std::int64_t q) { return query(b, q, tokens.end - 1); });
      absorb(pooling, b, kv_head, tokens);
      const T share = pooling.share(tokens.size());
      if (headroom == 0) {
        scale_row(group.core.key, dim, share, key);
        scale_row(group.core.value, value_dim, share, value);
      }
      const bool finite_key = replace_infinite(group.core.key, 1, dim, share, key);
      if (replace_infinite(group.core.value, 1, value_dim, share, value) && finite_key) break;
    }
  };
  with_pooling<T>(options.pool, [&]<class Pooling>() {
    for_each_group(heads, groups, options.group_size, run, scratch.workers(),
                   [&](auto... where) { pool_group.template operator()<Pooling>(where...); });
  });
}

/// The first `core_key.length()` groups of views.
template <class T, class Query, class Key, class Value, class CoreKey, class CoreValue, executor E>
void pool_views(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<CoreKey> core_key,
                tensor_view<CoreValue> core_value, const options& options, const E& run,
                const worker_scratch<T>& scratch) {
  const auto absorb = [&](auto& pooling, std::int64_t b, std::int64_t kv_head, range tokens) {
    pooling.absorb(rows_of(key, value, b, kv_head), tokens);
  };
  const auto last = [&](std::int64_t b, std::int64_t h, std::int64_t token) { return query.row(b, h, token); };
  const auto core = [&](std::int64_t b, std::int64_t h, std::int64_t c) {
    return std::pair(core_key.row(b, h, c), core_value.row(b, h, c));
  };
  pool_groups<T>({key.batch(), query.heads(), key.heads(), core_key.heads()}, {0, core_key.length()}, key.dim(),
                 value.dim(), options, absorb, last, core, run, scratch);
}

/// Adds what the gradients of cores say of the tokens that were pooled, and of the queries that weighed them.
template <class Query, class Key, class Value, class T, executor E>
void add_pool_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                       tensor_view<const T> grad_core_key, tensor_view<const T> grad_core_value,
                       tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                       const options& options, const E& run, const worker_scratch<T>& scratch) {
  const partition partition{options.group_size, options.window};
  const score_rule<T> rule = pooling_rule<T>(options, key.dim());
  const pool_heads heads{key.batch(), query.heads(), key.heads(), grad_core_key.heads()};
  const auto differentiate = [&]<class Pooling>(std::int64_t worker, std::int64_t b, std::int64_t kv_head,
                                                std::int64_t h, std::int64_t c) {
    const range tokens = partition.group(c);
    const std::int64_t sharing = heads.query_heads / heads.core_heads;
    group_rows<T> group(scratch[worker], key.dim(), value.dim(), rule);
    group.clear();
    copy_n(grad_core_key.row(b, h, c), key.dim(), group.grad_core.key);
    copy_n(grad_core_value.row(b, h, c), value.dim(), group.grad_core.value);
    if (uses_query(options.pool))
      load_mean_query(group, h, sharing, [&](std::int64_t q) { return query.row(b, q, tokens.end - 1); });
    Pooling(group).differentiate(
        rows_of(key, value, b, kv_head),
        {grad_key.row(b, kv_head, 0), grad_key.stride[2], grad_value.row(b, kv_head, 0), grad_value.stride[2]}, tokens);
    for (std::int64_t q = h * sharing; uses_query(options.pool) && q < (h + 1) * sharing; ++q)
      add_scaled_row(group.grad_query, key.dim(), T(1) / static_cast<T>(sharing), grad_query.row(b, q, tokens.end - 1));
  };
  with_pooling<T>(options.pool, [&]<class Pooling>() {
    for_each_group(heads, {0, grad_core_key.length()}, options.group_size, run, scratch.workers(),
                   [&](auto... where) { differentiate.template operator()<Pooling>(where...); });
  });
}

}}}  // namespace cca::CCA_TARGET::detail
