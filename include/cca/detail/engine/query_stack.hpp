#pragma once

#include <algorithm>
#include <cstdint>

#include "../../partition.hpp"
#include "../context/visible.hpp"
#include "../simd/register_block.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Consecutive queries of one head: tiles that take turns on each block of rows. The unit of work of the forward pass.
template <class Tile>
class query_stack {
  using shape = typename Tile::shape;
  using T = typename Tile::number;
  using shared = typename Tile::shared;

 public:
  /// Queries of a stack for `length` queries per head over `rows` of context: the more, the less memory traffic. Where
  /// every row is a query, too, some 64 stacks should be there for threads to share; few queries after a long context
  /// are worth as large a stack, since each stack reads all of it. Scratch should stay within half a MiB.
  static std::int64_t lanes_for(std::int64_t length, std::int64_t rows, const tile_form& form) {
    constexpr std::int64_t tasks = 64, budget = std::int64_t{1} << 19;
    const std::int64_t affordable = budget / (Tile::size(form) * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t wanted = std::clamp(rows / (tasks * Tile::lanes), shape::least_stack, shape::stack);
    const std::int64_t needed = std::max((length + Tile::lanes - 1) / Tile::lanes, shape::least_stack);
    return Tile::lanes * std::clamp<std::int64_t>(std::min(wanted, needed), 1, std::max<std::int64_t>(affordable, 1));
  }

  /// Scratch elements for `lanes` queries; `staged` where rows are converted.
  static constexpr std::int64_t size(std::int64_t lanes, const tile_form& form, bool staged) {
    return lanes / Tile::lanes * Tile::size(form) + shared::size(form, staged);
  }

  query_stack(T* scratch, const tile_form& form, std::int64_t count)
      : form_(form),
        tiles_((count + Tile::lanes - 1) / Tile::lanes),
        count_(count),
        tile_memory_(scratch),
        shared_(scratch + tiles_ * Tile::size(form), form) {}

  /// Loads the queries, rows of `dim` elements, and forgets what was absorbed.
  template <class Query>
  void begin(const Query* query, std::int64_t stride, T scale) {
    for (std::int64_t c = 0; c < tiles_; ++c) at(c).begin(query + c * Tile::lanes * stride, stride, scale);
  }

  /// Absorbs what the queries see of a source: they are those of query head `h` of `heads` from `first` on.
  template <class Source>
  void absorb(const Source& source, std::int64_t b, std::int64_t h, std::int64_t heads, std::int64_t first) {
    lane_ranges<T, Tile::lanes> visible[shape::stack];
    range total;
    for (std::int64_t c = 0; c < tiles_; ++c) {
      const std::int64_t offset = first + c * Tile::lanes;
      visible[c] = {at(c).count(), [&](std::int64_t i) { return source.visible(b, h, offset + i); }};
      total = hull(total, visible[c].seen_by_any());
    }
    const auto rows = source.rows(b, h / (heads / source.heads));
    // Blocks begin at multiples of their length: what a query gets does not depend on the stack that it is in.
    for (std::int64_t j = total.begin; j < total.end; j += shape::block - j % shape::block) {
      shared_.stage(rows, {j, std::min(j + shape::block - j % shape::block, total.end)});
      for (std::int64_t c = 0; c < tiles_; ++c) at(c).absorb(shared_, visible[c], c == 0);
    }
  }

  /// Writes the output rows, and where `lse` is wanted the log-sum-exps, one every `lse_stride` elements.
  template <class Out, class Lse>
  void finish(Out* out, std::int64_t stride, Lse* lse, std::int64_t lse_stride) {
    for (std::int64_t c = 0; c < tiles_; ++c) at(c).finish(out + c * Tile::lanes * stride, stride);
    for (std::int64_t i = 0; lse != nullptr && i < count_; ++i)
      lse[i * lse_stride] = static_cast<Lse>(at(i / Tile::lanes).lse(i % Tile::lanes));
  }

 private:
  [[nodiscard]] Tile at(std::int64_t c) const {
    return Tile(tile_memory_ + c * Tile::size(form_), form_, std::min(Tile::lanes, count_ - c * Tile::lanes));
  }

  tile_form form_;
  std::int64_t tiles_, count_;
  T* tile_memory_;
  shared shared_;
};

}}}  // namespace cca::CCA_TARGET::detail
