#pragma once

#include <cstdint>
#include <type_traits>

#include "../../call.hpp"
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
#include "observers.hpp"
#include "observing.hpp"
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
    case pooling::select_by_mass:
      return f.template operator()<select_by_mass_pooling<T>>();
    case pooling::last_query:
      break;
  }
  return f.template operator()<last_query_pooling<T>>();
}

/// Tokens that a task of pooling takes in: enough to be worth a task, few enough to balance.
inline constexpr std::int64_t pool_task_tokens = 1024;

/// Whose groups are pooled.
struct pool_heads {
  sequences all;
  std::int64_t query_heads, kv_heads, core_heads;
};

/// Groups that a task of pooling takes in.
inline std::int64_t groups_per_task(std::int64_t group_size) { return pool_task_tokens / group_size; }

/// Scratch of pooling: that of each worker, `group_rows::size` elements, the table of the tasks, and what observers found
/// out, with the table of where each sequence's begin.
template <class T>
struct pool_memory {
  worker_scratch<T> workers;
  sequence_tasks* table = nullptr;
  observer_sum<T>* sums = nullptr;
  std::int64_t* first_sums = nullptr;
};

/// How much of it there is.
template <class T>
struct pool_plan {
  std::int64_t workers, size, table_size;
  std::int64_t sums = 0;  ///< observers of all heads, of all sequences

  [[nodiscard]] std::size_t bytes() const {
    return worker_scratch<T>::bytes(workers, size) + scratch_bytes<sequence_tasks>(table_size) +
           scratch_bytes<observer_sum<T>>(sums) + scratch_bytes<std::int64_t>(first_sums());
  }
  [[nodiscard]] pool_memory<T> take(scratch& memory) const {
    const worker_scratch<T> scratch(memory, workers, size);
    auto* const table = memory.take<sequence_tasks>(table_size);
    auto* const all_sums = memory.take<observer_sum<T>>(sums);
    return {scratch, table, all_sums, memory.take<std::int64_t>(first_sums())};
  }

 private:
  [[nodiscard]] std::int64_t first_sums() const { return sums > 0 ? table_size : 0; }
};

/// Calls `f(worker, b, kv_head, core head, group)` for the groups `[groups(b).begin, groups(b).end)` of every sequence and
/// core head. The heads that share a group take turns while its rows are in cache, never at once.
template <class T, class Groups, executor E, class F>
void for_each_group(const pool_heads& heads, const Groups& groups, std::int64_t group_size, const E& run,
                    const pool_memory<T>& memory, const F& f) {
  if (heads.core_heads == 0) return;
  const task_list tasks(
      heads.all, memory.table, heads.kv_heads, [&](std::int64_t b) { return groups(b).size(); },
      [&](std::int64_t) { return groups_per_task(group_size); });
  const std::int64_t cores = heads.core_heads / heads.kv_heads;
  run_tasks(run, memory.workers.workers(), tasks.size(), [&](std::int64_t worker, std::int64_t i) {
    const task task = tasks[i];
    const std::int64_t first = groups(task.b).begin;
    for (std::int64_t c = task.items.begin; c < task.items.end; ++c)
      for (std::int64_t h = task.head * cores; h < (task.head + 1) * cores; ++h)
        f(worker, task.b, task.head, h, first + c);
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

/// Those of group `c` that its sequence has.
template <class T>
group_observers<T> observers_of_group(const observers_ref<T>& all, const pool_heads& heads, const options& options,
                                      std::int64_t b, std::int64_t h, std::int64_t c) {
  const std::int64_t sharing = heads.query_heads / heads.core_heads;
  const range known = intersection(partition_of(options).raw_queries(c), {0, all.length(b)});
  return {all, b, {h * sharing, (h + 1) * sharing}, observer_grid(options).within(known)};
}

/// Where a core goes; a null `bias` means that it has none. Rows of 8 bits have scales.
template <class Key, class Value, class Bias>
struct core_place {
  Key* key;
  Value* value;
  Bias* bias;
  float *key_scale = nullptr, *value_scale = nullptr;
};

template <class Key, class Value, class Bias, class... Scale>
core_place(Key*, Value*, Bias*, Scale*...) -> core_place<Key, Value, Bias>;

/// Where a row of a core is written: rows of 8 bits are rounded when they are whole, and wait in `whole`.
template <class T, class Row>
auto* unrounded([[maybe_unused]] Row* row, [[maybe_unused]] T* whole) {
  if constexpr (is_q8<Row>)
    return whole;
  else
    return row;
}

/// What a pooling says of a group: what turns its sums into the core, and the entropy of its weights where that is asked for.
template <class T>
struct pooled {
  T share, entropy = T(0);
};

/// Pools the groups `[groups(b).begin, groups(b).end)` of every sequence and core head.
/// `absorb(pooling, b, kv_head, tokens)` feeds a group's rows, `query(b, h, token)` is a row of queries,
/// `core(b, h, group)` the `core_place` to write; `observers` are for a pooling that asks them.
template <class T, class Groups, class Absorb, class Query, class Core, executor E>
void pool_groups(const pool_heads& heads, const Groups& groups, std::int64_t dim, std::int64_t value_dim,
                 const options& options, const Absorb& absorb, const Query& query, const Core& core, const E& run,
                 const pool_memory<T>& memory, const observers_ref<T>& observers = {}) {
  const partition partition = partition_of(options);
  const score_rule<T> rule = pooling_rule<T>(options, dim);
  const auto pool_group = [&](std::int64_t worker, std::int64_t b, std::int64_t kv_head, std::int64_t h, std::int64_t c) {
    const range tokens = partition.group(c);
    group_rows<T> group(memory.workers[worker], dim, value_dim, rule);
    const auto place = core(b, h, c);
    auto* const key = unrounded(place.key, group.grad_core.key);
    auto* const value = unrounded(place.value, group.grad_core.value);
    auto* const bias = place.bias;
    group.with_entropy = bias != nullptr;
    if (observes(options.pool)) group.observers = observers_of_group(observers, heads, options, b, h, c);
    // A mean of finite rows is finite: where it is not, it may have overflowed on the way, and is taken again.
    for (const int headroom : {0, most_headroom}) {
      group.clear_sums();
      if (uses_last_query(options.pool))
        load_mean_query(group, h, heads.query_heads / heads.core_heads,
                        [&](std::int64_t q) { return query(b, q, tokens.end - 1); });
      const auto [share, entropy] = with_pooling<T>(options.pool, [&]<class Pooling>() {
        Pooling pooling(group, headroom);
        absorb(pooling, b, kv_head, tokens);
        pooled<T> result{pooling.share(tokens.size())};
        if constexpr (Pooling::has_weights)
          if (group.with_entropy) result.entropy = pooling.entropy(tokens.size());
        return result;
      });
      if (headroom == 0) {
        scale_row(group.core.key, dim, share, key);
        scale_row(group.core.value, value_dim, share, value);
        if (bias != nullptr) *bias = static_cast<std::remove_reference_t<decltype(*bias)>>(entropy);
      }
      const bool finite_key = replace_infinite(group.core.key, 1, dim, share, key);
      if (replace_infinite(group.core.value, 1, value_dim, share, value) && finite_key) break;
    }
    if constexpr (is_q8<std::remove_reference_t<decltype(*place.key)>>) {
      *place.key_scale = round_to_q8(key, dim, place.key);
      *place.value_scale = round_to_q8(value, value_dim, place.value);
    }
  };
  for_each_group(heads, groups, options.group_size, run, memory, pool_group);
}

/// All rows of each sequence of a view.
template <class View>
auto all_rows_of(const View& view) {
  return [view](std::int64_t b) { return range{0, view.length(b)}; };
}

/// The observers of views, and in scratch memory what they find out.
template <class T, class Query>
struct view_observers {
  tensor_view<Query> query;
  observer_grid grid;
  sequence_offsets first;
  observer_sum<T>* sums;

  view_observers(const tensor_view<Query>& of, const options& options, const pool_memory<T>& memory)
      : query(of),
        grid(options),
        first({of.batch(), !of.has_lengths()}, memory.first_sums,
              [&](std::int64_t b) { return of.heads() * grid.count(of.length(b)); }),
        sums(memory.sums) {}

  [[nodiscard]] std::int64_t length(std::int64_t b) const { return query.length(b); }
  void load(std::int64_t b, std::int64_t h, std::int64_t i, T factor, T* to) const {
    scale_row(query.row(b, h, grid.position(i)), query.dim(), factor, to);
  }
  [[nodiscard]] observer_sum<T>& sum(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return sums[first[b] + h * grid.count(query.length(b)) + i];
  }
};

/// Calls `f(observers)` with those of views, for a pooling that asks them when they have found out what they give.
template <class T, class Query, class Key, class Value, executor E, class F>
void with_observers(const tensor_view<Query>& query, const row_views<Key, Value>& rows, const options& options,
                    const E& run, const pool_memory<T>& memory, const F& f) {
  if (!observes(options.pool)) return f(observers_ref<T>{});
  const view_observers<T, Query> observers(query, options, memory);
  const score_rule<T> rule = pooling_rule<T>(options, query.dim());
  observe<T>(
      {query.batch(), !query.has_lengths()}, query.heads(), rows.key.heads(),
      [&](std::int64_t b) { return range{0, observers.grid.count(query.length(b))}; }, options, observers,
      [&](auto& to, std::int64_t b, std::int64_t kv_head, range tokens) {
        to.absorb(rows_of(rows, b, kv_head), tokens);
      },
      run, memory.workers.workers(), memory.table,
      [&](std::int64_t worker) {
        return group_rows<T>(memory.workers[worker], query.dim(), rows.value.dim(), rule);
      },
      [&](std::int64_t b, std::int64_t h, std::int64_t i, const observer_sum<T>& sum) { observers.sum(b, h, i) = sum; });
  f(observers_ref<T>(observers));
}

/// The first `to.key.length(b)` groups of each sequence of views, and where there are data for it the biases of the cores.
template <class T, class Query, class Key, class Value, class CoreKey, class CoreValue, executor E>
void pool_views(tensor_view<Query> query, const row_views<Key, Value>& rows, const cores<CoreKey, CoreValue>& to,
                tensor_view<T, 3> core_bias, const options& options, const E& run, const pool_memory<T>& memory) {
  const tensor_view<const Key>& key = rows.key;
  const auto absorb = [&](auto& pooling, std::int64_t b, std::int64_t kv_head, range tokens) {
    pooling.absorb(rows_of(rows, b, kv_head), tokens);
  };
  const auto last = [&](std::int64_t b, std::int64_t h, std::int64_t token) { return query.row(b, h, token); };
  const auto core = [&](std::int64_t b, std::int64_t h, std::int64_t c) {
    return core_place{to.key.row(b, h, c), to.value.row(b, h, c),
                      core_bias.data == nullptr ? nullptr : core_bias.row(b, h, c)};
  };
  with_observers(query, rows, options, run, memory, [&](const observers_ref<T>& observers) {
    pool_groups<T>({{key.batch(), !key.has_lengths()}, query.heads(), key.heads(), to.key.heads()}, all_rows_of(to.key),
                   key.dim(), rows.value.dim(), options, absorb, last, core, run, memory, observers);
  });
}

/// Adds what the gradients of the cores of the groups `[groups(b).begin, groups(b).end)` of every sequence, and where they
/// are given of their biases, say of the tokens that were pooled, and of the queries that weighed them.
/// `rows(b, kv_head)` are the keys and values, `grad_rows(b, kv_head)` their gradients, `query_row(b, h, token)` a row of
/// queries and `grad_query_row(b, h, token)` its gradient, `grad_core(b, h, group)` the `core_place` to read. Row 0 of `rows` and of
/// `grad_rows` is token `first(b)`.
template <class T, class Groups, class First, class Rows, class GradRows, class Query, class GradQuery, class GradCore,
          executor E>
void add_group_gradients(const pool_heads& heads, const Groups& groups, const First& first, std::int64_t dim,
                         std::int64_t value_dim, const options& options, const Rows& rows, const GradRows& grad_rows,
                         const Query& query_row, const GradQuery& grad_query_row, const GradCore& grad_core, const E& run,
                         const pool_memory<T>& memory, const observers_ref<T>& observers = {}) {
  const partition partition = partition_of(options);
  const score_rule<T> forward_rule = pooling_rule<T>(options, dim);
  const auto differentiate = [&](std::int64_t worker, std::int64_t b, std::int64_t kv_head, std::int64_t h,
                                 std::int64_t c) {
    const range tokens = partition.group(c);
    const std::int64_t sharing = heads.query_heads / heads.core_heads;
    group_rows<T> group(memory.workers[worker], dim, value_dim, forward_rule);
    group.clear();
    const auto grad = grad_core(b, h, c);
    copy_n(grad.key, dim, group.grad_core.key);
    copy_n(grad.value, value_dim, group.grad_core.value);
    if (grad.bias != nullptr) group.grad_bias = *grad.bias;
    if (observes(options.pool)) group.observers = observers_of_group(observers, heads, options, b, h, c);
    if (uses_last_query(options.pool))
      load_mean_query(group, h, sharing, [&](std::int64_t q) { return query_row(b, q, tokens.end - 1); });
    with_pooling<T>(options.pool, [&]<class Pooling>() {
      Pooling(group).differentiate(rows(b, kv_head), grad_rows(b, kv_head), shifted(tokens, -first(b)));
    });
    for (std::int64_t q = h * sharing; uses_last_query(options.pool) && q < (h + 1) * sharing; ++q)
      add_scaled_row(group.grad_query, dim, T(1) / static_cast<T>(sharing), grad_query_row(b, q, tokens.end - 1));
  };
  for_each_group(heads, groups, options.group_size, run, memory, differentiate);
}

/// The same of all groups of views that have gradients.
template <class Query, class Key, class Value, class T, executor E>
void add_pool_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                       tensor_view<const T> grad_core_key, tensor_view<const T> grad_core_value,
                       tensor_view<const T, 3> grad_core_bias, tensor_view<T> grad_query, tensor_view<T> grad_key,
                       tensor_view<T> grad_value, const options& options, const E& run, const pool_memory<T>& memory) {
  const row_views<std::remove_const_t<Key>, std::remove_const_t<Value>> all_rows{key, value};
  with_observers(query, all_rows, options, run, memory, [&](const observers_ref<T>& observers) {
    add_group_gradients<T>(
        {{key.batch(), !key.has_lengths()}, query.heads(), key.heads(), grad_core_key.heads()},
        all_rows_of(grad_core_key), [](std::int64_t) { return std::int64_t{0}; }, key.dim(), value.dim(), options,
        [&](std::int64_t b, std::int64_t h) { return rows_of(key, value, b, h); },
        [&](std::int64_t b, std::int64_t h) {
          return gradient_rows<T>{grad_key.row(b, h, 0), grad_key.stride[2], grad_value.row(b, h, 0),
                                  grad_value.stride[2]};
        },
        [&](std::int64_t b, std::int64_t h, std::int64_t token) { return query.row(b, h, token); },
        [&](std::int64_t b, std::int64_t h, std::int64_t token) { return grad_query.row(b, h, token); },
        [&](std::int64_t b, std::int64_t h, std::int64_t c) {
          return core_place{grad_core_key.row(b, h, c), grad_core_value.row(b, h, c),
                            grad_core_bias.data == nullptr ? nullptr : grad_core_bias.row(b, h, c)};
        },
        run, memory, observers);
  });
}

}}}  // namespace cca::CCA_TARGET::detail
