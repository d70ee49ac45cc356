#pragma once

#include <algorithm>
#include <cstdint>

#include "../partition.hpp"
#include "query_tile.hpp"
#include "rows.hpp"

namespace cca::inline CCA_TARGET::detail {

/// Consecutive queries of one head: tiles that take turns on each block of rows. The unit of work of the forward pass.
template <class T>
class query_stack {
  using shape = tile_shape<T>;
  using tile = query_tile<T>;

 public:
  /// Queries of a stack for `length` queries per head over `rows` of context: the more, the less memory traffic. Where
  /// every row is a query, too, some 64 stacks should be there for threads to share; few queries after a long context
  /// are worth as large a stack, since each stack reads all of it. Scratch should stay within half a MiB.
  static std::int64_t lanes_for(std::int64_t length, std::int64_t rows, std::int64_t dim, std::int64_t value_dim) {
    constexpr std::int64_t tasks = 64, budget = std::int64_t{1} << 19;
    const std::int64_t affordable = budget / (tile::size(dim, value_dim) * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t wanted = std::clamp(rows / (tasks * tile::lanes), shape::least_stack, shape::stack);
    const std::int64_t needed = std::max((length + tile::lanes - 1) / tile::lanes, shape::least_stack);
    return tile::lanes * std::clamp<std::int64_t>(std::min(wanted, needed), 1, std::max<std::int64_t>(affordable, 1));
  }

  /// Scratch elements for `lanes` queries of `dim` and values of `value_dim` elements; `staged` where rows are converted.
  static constexpr std::int64_t size(std::int64_t lanes, std::int64_t dim, std::int64_t value_dim, bool staged) {
    return lanes / tile::lanes * tile::size(dim, value_dim) + tile::weights_size() +
           (staged ? shape::block * (dim + value_dim) : 0);
  }

  query_stack(T* scratch, std::int64_t dim, std::int64_t value_dim, std::int64_t count)
      : dim_(dim),
        value_dim_(value_dim),
        tiles_((count + tile::lanes - 1) / tile::lanes),
        count_(count),
        weights_(scratch),
        tile_memory_(weights_ + tile::weights_size()),
        staged_keys_(tile_memory_ + tiles_ * tile::size(dim, value_dim)),
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
    const auto rows = source.rows(b, h / (heads / source.heads));
    // Blocks begin at multiples of their length: what a query gets does not depend on the stack that it is in.
    for (std::int64_t j = total.begin; j < total.end; j += shape::block - j % shape::block) {
      const range block{j, std::min(j + shape::block - j % shape::block, total.end)};
      const auto keys = stage(rows.key + j * rows.key_stride, rows.key_stride, dim_, block.size(), staged_keys_);
      const auto values =
          stage(rows.value + j * rows.value_stride, rows.value_stride, value_dim_, block.size(), staged_values_);
      for (std::int64_t c = 0; c < tiles_; ++c) at(c).absorb({keys, values, block, c == 0}, sees[c], weights_);
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
    return tile(tile_memory_ + c * tile::size(dim_, value_dim_), dim_, value_dim_,
                std::min(tile::lanes, count_ - c * tile::lanes));
  }

  std::int64_t dim_, value_dim_, tiles_, count_;
  T *weights_, *tile_memory_, *staged_keys_, *staged_values_;
};

}  // namespace cca::inline CCA_TARGET::detail
