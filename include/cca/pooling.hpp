#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>

#include "detail/row.hpp"
#include "detail/scratch.hpp"
#include "executor.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

namespace cca::inline CCA_TARGET {
namespace detail {

/// Pools single groups of one head. Every row of keys and values is read once, from memory, per key/value head: this is
/// bound by reading `group_size * (dim + value_dim)` elements per group.
template <class T, class Query, class Key, class Value>
class group_pooler {
 public:
  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim) {
    return padded<T>(dim) + row_block + dim + value_dim + (in_place<T, Key, Value> ? 0 : row_block * (dim + value_dim));
  }

  group_pooler(tensor_view<const Query> query, tensor_view<const Key> key, tensor_view<const Value> value,
               const options& options, T* scratch)
      : query_(query),
        key_(key),
        value_(value),
        pool_(options.pool),
        scale_(static_cast<T>(softmax_scale(options, key.dim())) * std::numbers::log2e_v<T>),
        last_query_(scratch),
        weights_(last_query_ + padded<T>(key.dim())),
        core_key_(weights_ + row_block),
        core_value_(core_key_ + key.dim()),
        staged_keys_(core_value_ + value.dim()),
        staged_values_(staged_keys_ + (in_place<T, Key, Value> ? 0 : row_block * key.dim())) {}

  /// Pools the tokens `group` of batch entry `b` for core head `h` of `heads`; `core_key` and `core_value` are rows.
  template <class CoreKey, class CoreValue>
  void pool(std::int64_t b, std::int64_t h, std::int64_t heads, range group, CoreKey* core_key, CoreValue* core_value) {
    const std::int64_t kv_head = h / (heads / key_.heads());
    if (pool_ == pooling::last_query) load_last_query(b, h, heads, group.end - 1);
    const T nothing = pool_ == pooling::max ? -infinity<T> : T(0);
    std::fill_n(core_key_, key_.dim(), nothing);
    std::fill_n(core_value_, value_.dim(), nothing);
    row_softmax<T> softmax;
    for (std::int64_t j = group.begin; j < group.end; j += row_block) {
      const std::int64_t count = std::min(row_block, group.end - j);
      const auto keys = stage(key_.row(b, kv_head, j), key_.stride[2], key_.dim(), count, staged_keys_);
      const auto values = stage(value_.row(b, kv_head, j), value_.stride[2], value_.dim(), count, staged_values_);
      if (pool_ == pooling::max) {
        raise_to_rows(keys, key_.dim(), count, core_key_);
        raise_to_rows(values, value_.dim(), count, core_value_);
      } else {
        const T rescale = weigh(keys, count, softmax);
        add_weighted_rows(weights_, keys, key_.dim(), count, rescale, core_key_);
        add_weighted_rows(weights_, values, value_.dim(), count, rescale, core_value_);
      }
    }
    const T factor = pool_ == pooling::max ? T(1) : softmax.inverse_sum();
    for (std::int64_t d = 0; d < key_.dim(); ++d) core_key[d] = static_cast<CoreKey>(core_key_[d] * factor);
    for (std::int64_t d = 0; d < value_.dim(); ++d) core_value[d] = static_cast<CoreValue>(core_value_[d] * factor);
  }

 private:
  /// The scaled query of the group's last token; for a core shared by query heads, their mean.
  void load_last_query(std::int64_t b, std::int64_t h, std::int64_t heads, std::int64_t token) {
    const std::int64_t sharing = query_.heads() / heads;
    std::fill_n(last_query_, padded<T>(key_.dim()), T(0));
    for (std::int64_t i = h * sharing; i < (h + 1) * sharing; ++i) {
      const Query* q = query_.row(b, i, token);
      for (std::int64_t d = 0; d < key_.dim(); ++d) last_query_[d] += static_cast<T>(q[d]);
    }
    const T factor = scale_ / static_cast<T>(sharing);
    for (std::int64_t d = 0; d < key_.dim(); ++d) last_query_[d] *= factor;
  }

  /// The weights of `count` rows; returns the factor for what was added before.
  T weigh(row_span<T> keys, std::int64_t count, row_softmax<T>& softmax) {
    if (pool_ == pooling::last_query) {
      dot_rows(last_query_, keys, key_.dim(), count, weights_);
      return softmax.absorb(weights_, count);
    }
    std::fill_n(weights_, count, T(1));
    softmax.sum += static_cast<T>(count);
    return T(1);
  }

  static void raise_to_rows(row_span<T> rows, std::int64_t dim, std::int64_t count, T* maximum) {
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t d = 0; d < dim; ++d) {
        const T x = rows.row(j)[d];
        if (!(x <= maximum[d]) && maximum[d] == maximum[d]) maximum[d] = x;  // a NaN enters and stays
      }
  }

  tensor_view<const Query> query_;
  tensor_view<const Key> key_;
  tensor_view<const Value> value_;
  pooling pool_;
  T scale_;
  T *last_query_, *weights_, *core_key_, *core_value_, *staged_keys_, *staged_values_;
};

/// Tokens that a task of pooling takes in: enough to be worth a task, few enough to balance.
inline constexpr std::int64_t pool_task_tokens = 1024;

/// Pools the first `core_key.length()` groups with scratch of `group_pooler::size` elements a worker.
template <class T, class Query, class Key, class Value, class CoreKey, class CoreValue, executor E>
void pool_groups(tensor_view<const Query> query, tensor_view<const Key> key, tensor_view<const Value> value,
                 tensor_view<CoreKey> core_key, tensor_view<CoreValue> core_value, const options& options, const E& run,
                 const worker_scratch<T>& scratch) {
  const partition partition{options.group_size, options.window};
  const std::int64_t groups = core_key.length(), heads = core_key.heads(), kv_heads = key.heads();
  const std::int64_t per_task = std::max<std::int64_t>(pool_task_tokens / options.group_size, 1);
  const std::int64_t tasks = (groups + per_task - 1) / per_task;
  run_tasks(run, scratch.workers(), core_key.batch() * kv_heads * tasks, [&](std::int64_t worker, std::int64_t i) {
    group_pooler<T, Query, Key, Value> pooler(query, key, value, options, scratch[worker]);
    const std::int64_t b = i / tasks / kv_heads, kv_head = i / tasks % kv_heads, first = i % tasks * per_task;
    // The heads that share a group take turns while its rows are in cache.
    for (std::int64_t c = first; c < std::min(groups, first + per_task); ++c)
      for (std::int64_t h = kv_head * heads / kv_heads; h < (kv_head + 1) * heads / kv_heads; ++h)
        pooler.pool(b, h, heads, partition.group(c), core_key.row(b, h, c), core_value.row(b, h, c));
  });
}

/// Operands of pooling and of CCA attention: a query for every key.
template <class Query, class Key, class Value>
void require_pooling_operands(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                              const options& options) {
  require_options(options);
  require_operand("query", query);
  require_key_value("key", "value", query, key, value);
  require(
      query.length() == key.length(), "query", std::to_string(query.length()) + " queries",
      "a query for each of the " + std::to_string(key.length()) + " keys, since a group is pooled with its last one");
  require(options.first_position.value_or(0) == 0, "options.first_position", std::to_string(*options.first_position),
          "0 or none: there is a query for every key");
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
  using pooler =
      detail::group_pooler<T, std::remove_const_t<Query>, std::remove_const_t<Key>, std::remove_const_t<Value>>;
  detail::require_pooling_operands(query, key, value, options);
  detail::require_unused(options.window == unlimited, "options.window", "none: every complete group is pooled");
  const std::int64_t heads = detail::core_head_count(options, query.heads(), key.heads());
  const std::int64_t groups = partition{options.group_size}.group_count(key.length());
  detail::require_output("core_key", core_key);
  detail::require_output("core_value", core_value);
  detail::require_extents("core_key", core_key, {key.batch(), heads, groups, key.dim()});
  detail::require_extents("core_value", core_value, {key.batch(), heads, groups, value.dim()});

  const std::int64_t workers = detail::concurrency(run), size = pooler::size(key.dim(), value.dim());
  detail::scratch memory(workspace, detail::worker_scratch<T>::bytes(workers, size));
  detail::pool_groups<T, std::remove_const_t<Query>, std::remove_const_t<Key>, std::remove_const_t<Value>>(
      query, key, value, core_key, core_value, options, run, detail::worker_scratch<T>(memory, workers, size));
}

}  // namespace cca::inline CCA_TARGET
