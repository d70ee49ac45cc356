#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>
#include <string>
#include <utility>

#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/source.hpp"
#include "detail/simd/dot.hpp"
#include "detail/softmax/row_softmax.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// `maximum[d] = max_j rows[j][d]`, of what it holds and `count` rows. A NaN enters and stays.
template <class T>
void raise_to_rows(row_span<T> rows, std::int64_t dim, std::int64_t count, T* maximum) {
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t d = 0; d < dim; ++d) {
      const T x = rows.row(j)[d];
      if (!(x <= maximum[d]) && maximum[d] == maximum[d]) maximum[d] = x;
    }
}

/// `sum[d] += row[d] * factor` for d in `[0, dim)`, across element types.
template <class T, class Row>
void add_scaled_row(const Row* row, std::int64_t dim, T factor, T* sum) {
  if constexpr (in_place<T, Row>) return add_weighted_rows(&factor, {row, 0}, dim, 1, T(1), sum);
  constexpr std::int64_t block = 64;
  T converted[block];
  for (std::int64_t d = 0; d < dim; d += block) {
    const std::int64_t count = std::min(block, dim - d);
    convert(row + d, count, converted);
    add_weighted_rows(&factor, {converted, 0}, count, 1, T(1), sum + d);
  }
}

/// Pools a group of one head: `begin`, the queries of its last token, its rows in one or more pieces, `finish`. Every row
/// is read once: this is bound by reading `group_size * (dim + value_dim)` elements.
template <class T>
class group_pooler {
 public:
  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim, bool staged) {
    return padded<T>(dim) + row_block + dim + value_dim + (staged ? row_block * (dim + value_dim) : 0);
  }

  group_pooler(T* scratch, std::int64_t dim, std::int64_t value_dim, const options& options)
      : dim_(dim),
        value_dim_(value_dim),
        pool_(options.pool),
        scale_(static_cast<T>(softmax_scale(options, dim)) * std::numbers::log2e_v<T>),
        query_(scratch),
        weights_(query_ + padded<T>(dim)),
        core_key_(weights_ + row_block),
        core_value_(core_key_ + dim),
        staged_keys_(core_value_ + value_dim),
        staged_values_(staged_keys_ + row_block * dim) {}

  void begin() {
    const T nothing = pool_ == pooling::max ? -infinity<T> : T(0);
    std::fill_n(core_key_, dim_, nothing);
    std::fill_n(core_value_, value_dim_, nothing);
    std::fill_n(query_, padded<T>(dim_), T(0));
    softmax_ = {};
  }

  /// Adds one of the `count` queries of the group's last token; their mean weighs the rows.
  template <class Query>
  void add_query(const Query* query, std::int64_t count) {
    add_scaled_row(query, dim_, scale_ / static_cast<T>(count), query_);
  }

  /// Takes in the rows `piece` of a head.
  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& rows, range piece) {
    for (std::int64_t j = piece.begin; j < piece.end; j += row_block) {
      const std::int64_t count = std::min(row_block, piece.end - j);
      const auto keys = stage(rows.key + j * rows.key_stride, rows.key_stride, dim_, count, staged_keys_);
      const auto values =
          stage(rows.value + j * rows.value_stride, rows.value_stride, value_dim_, count, staged_values_);
      if (pool_ == pooling::max) {
        raise_to_rows(keys, dim_, count, core_key_);
        raise_to_rows(values, value_dim_, count, core_value_);
      } else {
        const T rescale = weigh(keys, count);
        add_weighted_rows(weights_, keys, dim_, count, rescale, core_key_);
        add_weighted_rows(weights_, values, value_dim_, count, rescale, core_value_);
      }
    }
  }

  /// Writes the core's rows.
  template <class CoreKey, class CoreValue>
  void finish(CoreKey* core_key, CoreValue* core_value) const {
    const T factor = pool_ == pooling::max ? T(1) : softmax_.inverse_sum();
    scale_row(core_key_, dim_, factor, core_key);
    scale_row(core_value_, value_dim_, factor, core_value);
  }

 private:
  /// The weights of `count` rows; returns the factor for what was added before.
  T weigh(row_span<T> keys, std::int64_t count) {
    if (pool_ == pooling::last_query) {
      dot_rows(query_, keys, dim_, count, weights_);
      return softmax_.absorb(weights_, count);
    }
    std::fill_n(weights_, count, T(1));
    softmax_.sum += static_cast<T>(count);
    return T(1);
  }

  std::int64_t dim_, value_dim_;
  pooling pool_;
  T scale_;
  T *query_, *weights_, *core_key_, *core_value_, *staged_keys_, *staged_values_;
  row_softmax<T> softmax_;
};

/// Tokens that a task of pooling takes in: enough to be worth a task, few enough to balance.
inline constexpr std::int64_t pool_task_tokens = 1024;

/// Whose groups are pooled.
struct pool_heads {
  std::int64_t batch, query_heads, kv_heads, core_heads;
};

/// Groups that a task of pooling takes.
inline std::int64_t groups_per_task(std::int64_t group_size) {
  return std::max<std::int64_t>(pool_task_tokens / group_size, 1);
}

/// Tasks of pooling `groups` groups of each of `heads` heads of all sequences.
inline std::int64_t pool_task_count(std::int64_t heads, std::int64_t groups, std::int64_t group_size) {
  const std::int64_t per_task = groups_per_task(group_size);
  return heads * ((groups + per_task - 1) / per_task);
}

/// Calls `f(worker, b, kv_head, core head, group)` for the groups `[groups.begin, groups.end)` of every sequence and core
/// head. The heads that share a group take turns while its rows are in cache, never at once.
template <executor E, class F>
void for_each_group(const pool_heads& heads, range groups, std::int64_t group_size, const E& run, std::int64_t workers,
                    const F& f) {
  if (heads.core_heads == 0) return;
  const std::int64_t per_task = groups_per_task(group_size), tasks = pool_task_count(1, groups.size(), group_size);
  run_tasks(run, workers, heads.batch * heads.kv_heads * tasks, [&](std::int64_t worker, std::int64_t i) {
    const std::int64_t b = i / tasks / heads.kv_heads, kv_head = i / tasks % heads.kv_heads;
    const std::int64_t first = groups.begin + i % tasks * per_task, cores = heads.core_heads / heads.kv_heads;
    for (std::int64_t c = first; c < std::min(groups.end, first + per_task); ++c)
      for (std::int64_t h = kv_head * cores; h < (kv_head + 1) * cores; ++h) f(worker, b, kv_head, h, c);
  });
}

/// Pools the groups `[groups.begin, groups.end)` of every sequence and core head. `absorb(pooler, b, kv_head, tokens)`
/// feeds a group's rows, `query(b, h, token)` is a row of queries, `core(b, h, group)` the pair of rows to write. Scratch
/// is of `group_pooler::size` elements a worker.
template <class T, class Absorb, class Query, class Core, executor E>
void pool_groups(const pool_heads& heads, range groups, std::int64_t dim, std::int64_t value_dim,
                 const options& options, const Absorb& absorb, const Query& query, const Core& core, const E& run,
                 const worker_scratch<T>& scratch) {
  const partition partition{options.group_size, options.window};
  for_each_group(heads, groups, options.group_size, run, scratch.workers(),
                 [&](std::int64_t worker, std::int64_t b, std::int64_t kv_head, std::int64_t h, std::int64_t c) {
                   group_pooler<T> pooler(scratch[worker], dim, value_dim, options);
                   pooler.begin();
                   const std::int64_t sharing = heads.query_heads / heads.core_heads;
                   for (std::int64_t q = h * sharing; options.pool == pooling::last_query && q < (h + 1) * sharing; ++q)
                     pooler.add_query(query(b, q, partition.group(c).end - 1), sharing);
                   absorb(pooler, b, kv_head, partition.group(c));
                   const auto [key, value] = core(b, h, c);
                   pooler.finish(key, value);
                 });
}

/// The first `core_key.length()` groups of views.
template <class T, class Query, class Key, class Value, class CoreKey, class CoreValue, executor E>
void pool_views(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<CoreKey> core_key,
                tensor_view<CoreValue> core_value, const options& options, const E& run,
                const worker_scratch<T>& scratch) {
  const auto absorb = [&](group_pooler<T>& pooler, std::int64_t b, std::int64_t kv_head, range tokens) {
    pooler.absorb(rows_of(key, value, b, kv_head), tokens);
  };
  const auto last = [&](std::int64_t b, std::int64_t h, std::int64_t token) { return query.row(b, h, token); };
  const auto core = [&](std::int64_t b, std::int64_t h, std::int64_t c) {
    return std::pair(core_key.row(b, h, c), core_value.row(b, h, c));
  };
  pool_groups<T>({key.batch(), query.heads(), key.heads(), core_key.heads()}, {0, core_key.length()}, key.dim(),
                 value.dim(), options, absorb, last, core, run, scratch);
}

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
  return worker_count(run, pool_task_count(key.batch() * key.heads(), groups, options.group_size));
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
  const std::int64_t size = detail::group_pooler<T>::size(key.dim(), value.dim(), !detail::in_place<T, Key, Value>);
  detail::scratch memory(workspace, detail::worker_scratch<T>::bytes(workers, size));
  detail::pool_views<T>(query, key, value, core_key, core_value, options, run,
                        detail::worker_scratch<T>(memory, workers, size));
}

}}  // namespace cca::CCA_TARGET
