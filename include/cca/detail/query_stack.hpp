#pragma once

#include <algorithm>
#include <cstdint>

#include "../executor.hpp"
#include "../tensor_view.hpp"
#include "query_tile.hpp"
#include "rows.hpp"
#include "scratch.hpp"

namespace cca::inline CCA_TARGET::detail {

/// One kind of context: rows of keys and values, and which of them a query sees. `sees(b, h, i)` is the half-open range
/// of rows for query `i` of query head `h`. Query heads share the heads of `key` and `value` evenly.
template <class Key, class Value, class Sees>
struct source {
  tensor_view<const Key> key;      // [batch, heads, rows, dim]
  tensor_view<const Value> value;  // [batch, heads, rows, value_dim]
  Sees sees;
};

template <class Key, class Value, class Sees>
source(tensor_view<Key>, tensor_view<Value>, Sees)
    -> source<std::remove_const_t<Key>, std::remove_const_t<Value>, Sees>;

/// Consecutive queries of one head: tiles that take turns on each block of rows. The unit of work of the forward pass.
template <class T>
class query_stack {
  using shape = tile_shape<T>;
  using tile = query_tile<T>;

 public:
  static constexpr std::int64_t lanes = shape::stack * tile::lanes;

  /// Scratch elements for queries of `dim` and values of `value_dim` elements; `staged` where rows are converted.
  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim, bool staged) {
    return shape::stack * tile::size(dim, value_dim) + tile::weights_size() +
           (staged ? shape::block * (dim + value_dim) : 0);
  }

  query_stack(T* scratch, std::int64_t dim, std::int64_t value_dim, std::int64_t count)
      : dim_(dim),
        value_dim_(value_dim),
        tiles_((count + tile::lanes - 1) / tile::lanes),
        count_(count),
        memory_(scratch),
        weights_(memory_ + shape::stack * tile::size(dim, value_dim)),
        staged_keys_(weights_ + tile::weights_size()),
        staged_values_(staged_keys_ + shape::block * dim) {}

  /// Loads the queries, rows of `dim` elements, and forgets what was absorbed.
  template <class Query>
  void begin(const Query* query, std::int64_t stride, T scale) {
    for (std::int64_t c = 0; c < tiles_; ++c) at(c).begin(query + c * tile::lanes * stride, stride, scale);
  }

  /// Absorbs what the queries see of a source: they are those of query head `h` of `heads` from `first` on.
  template <class Source>
  void absorb(const Source& source, std::int64_t b, std::int64_t h, std::int64_t heads, std::int64_t first) {
    lane_ranges<T> sees[shape::stack];
    range total;
    for (std::int64_t c = 0; c < tiles_; ++c) {
      const std::int64_t offset = first + c * tile::lanes;
      sees[c] = lane_ranges<T>(at(c).count(), [&](std::int64_t i) { return source.sees(b, h, offset + i); });
      total = hull(total, sees[c].seen_by_any());
    }
    const std::int64_t kv_head = h / (heads / source.key.heads());
    for (std::int64_t j = total.begin; j < total.end; j += shape::block) {
      const range block{j, std::min(j + shape::block, total.end)};
      const auto keys = stage(source.key.row(b, kv_head, j), source.key.stride[2], dim_, block.size(), staged_keys_);
      const auto values =
          stage(source.value.row(b, kv_head, j), source.value.stride[2], value_dim_, block.size(), staged_values_);
      for (std::int64_t c = 0; c < tiles_; ++c) at(c).absorb(keys, values, block, sees[c], weights_);
    }
  }

  /// Writes the output rows, and where `lse` is wanted the log-sum-exps, one every `lse_stride` elements.
  template <class Out, class Lse>
  void finish(Out* out, std::int64_t stride, Lse* lse, std::int64_t lse_stride) {
    for (std::int64_t c = 0; c < tiles_; ++c) at(c).finish(out + c * tile::lanes * stride, stride);
    for (std::int64_t i = 0; lse != nullptr && i < count_; ++i)
      lse[i * lse_stride] = static_cast<Lse>(at(i / tile::lanes).lse(i % tile::lanes));
  }

 private:
  [[nodiscard]] tile at(std::int64_t c) const {
    return tile(memory_ + c * tile::size(dim_, value_dim_), dim_, value_dim_,
                std::min(tile::lanes, count_ - c * tile::lanes));
  }

  std::int64_t dim_, value_dim_, tiles_, count_;
  T *memory_, *weights_, *staged_keys_, *staged_values_;
};

/// Attention of every query over all sources in one softmax. A task is a stack of queries; later queries see more, so
/// those of a head are begun last first, and threads finish together.
template <class T, class Query, class Out, class Lse, executor E, class... Source>
void attend_sources(tensor_view<const Query> query, tensor_view<Out> out, lse_view<Lse> lse, T scale, const E& run,
                    const worker_scratch<T>& scratch, const Source&... sources) {
  const std::int64_t heads = query.heads(), lanes = query_stack<T>::lanes;
  const std::int64_t stacks = (query.length() + lanes - 1) / lanes;
  run_tasks(run, scratch.workers(), query.batch() * heads * stacks, [&](std::int64_t worker, std::int64_t task) {
    const std::int64_t b = task / stacks / heads, h = task / stacks % heads;
    const std::int64_t first = (stacks - 1 - task % stacks) * lanes;
    query_stack<T> stack(scratch[worker], query.dim(), out.dim(), std::min(lanes, query.length() - first));
    stack.begin(query.row(b, h, first), query.stride[2], scale);
    (stack.absorb(sources, b, h, heads, first), ...);
    stack.finish(out.row(b, h, first), out.stride[2], lse.data ? lse.row(b, h, first) : nullptr, lse.stride[2]);
  });
}

}  // namespace cca::inline CCA_TARGET::detail
