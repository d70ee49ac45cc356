#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/visible.hpp"
#include "../simd/simd.hpp"
#include "../softmax/score_shift.hpp"
#include "query_tile.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Which queries a stack holds: `count` of head `head` of `heads` of sequence `b`, from `first` on.
struct stack_queries {
  std::int64_t b, head, heads, first, count;
};

/// What follows a block in a stack that leaves nothing behind with its rows.
struct nothing_after_blocks {
  template <class Visible>
  void operator()(range, const Visible*) const {}
};

/// Consecutive queries of one head: tiles that take turns on each block of rows while it is in cache. The unit of work of
/// both passes; `Tile` says which.
template <class Tile>
class stack {
  using T = typename Tile::number;
  using visible_lanes = typename Tile::visible_lanes;
  static constexpr std::int64_t lanes = Tile::lanes, block_rows = Tile::block_rows;

 public:
  /// Scratch elements for `count` queries; `staged` where rows are converted.
  static constexpr std::int64_t size(std::int64_t count, const tile_form& form, bool staged) {
    const std::int64_t tiles = (count + lanes - 1) / lanes;
    return tiles * Tile::size(form) + Tile::stack_memory::size(form, tiles) +
           Tile::staged_block::size(form, block_rows, staged);
  }

  stack(T* scratch, const tile_call<T>& call, const stack_queries& queries)
      : call_(call),
        queries_(queries),
        tiles_((queries.count + lanes - 1) / lanes),
        tile_memory_(scratch),
        memory_(tile_memory_ + tiles_ * Tile::size(call.form), call.form, tiles_),
        block_(tile_memory_ + tiles_ * Tile::size(call.form) + Tile::stack_memory::size(call.form, tiles_), call.form,
               block_rows) {}

  /// Calls `f(tile, first)` for the tiles, of which query 0 is query `first` of the stack.
  template <class F>
  void for_each_tile(const F& f) {
    for (std::int64_t c = 0; c < tiles_; ++c) f(at(c), c * lanes);
  }

  /// Absorbs what the queries see of a source, and calls `after(rows, seen)` for each block of its rows when all tiles have,
  /// `seen` being the `visible` of every tile. Blocks begin at multiples of their length: what a query gets does not
  /// depend on the stack that it is in. `sums` are for the gradients of what shifts scores.
  template <class Source, class After>
  void absorb(const Source& source, const After& after, const shift_sums<T>& sums = {}) {
    if (source.length(queries_.b) == 0) return;
    source.for_each_piece(queries_.b, queries_.head, {queries_.first, queries_.first + queries_.count},
                          [&](range piece) { absorb_piece(source, piece, after, sums); });
  }

  [[nodiscard]] typename Tile::stack_memory& memory() { return memory_; }
  [[nodiscard]] std::int64_t tiles() const { return tiles_; }

 private:
  template <class Source, class After>
  void absorb_piece(const Source& source, range piece, const After& after, const shift_sums<T>& sums) {
    visible_lanes seen[Tile::most];
    range any;
    for (std::int64_t c = 0; c < tiles_; ++c) {
      const std::int64_t first = queries_.first + c * lanes, count = at(c).count();
      seen[c] = {count, [&](range* lane) {
                   source.visible(queries_.b, queries_.head, {first, first + count}, piece, lane);
                   at(c).leave_out(lane);
                 }};
      // A lane without a query would add 0 times the NaN that its weight may be: it is left out like one that sees nothing.
      if (Tile::backward && count % width<T> != 0) seen[c].all[count / width<T>] = {};
      any = hull(any, seen[c].seen_by_any());
    }
    const auto rows = source.rows(queries_.b, queries_.head / (queries_.heads / source.heads));
    const auto terms = source.terms(queries_.b, queries_.head);
    const T slope = call_.rule->slope(queries_.b, queries_.head);
    for (std::int64_t j = any.begin; j < any.end; j += block_rows - j % block_rows) {
      block_.stage(rows, {j, smaller(j + block_rows - j % block_rows, any.end)});
      for (std::int64_t c = 0; c < tiles_; ++c)
        at(c).absorb(memory_, block_, seen[c], c,
                     score_place{terms, slope, queries_.first + c * lanes, block_.rows(), sums});
      after(block_.rows(), seen);
    }
  }

  [[nodiscard]] Tile at(std::int64_t c) const {
    return Tile(tile_memory_ + c * Tile::size(call_.form), call_, smaller(lanes, queries_.count - c * lanes));
  }

  tile_call<T> call_;
  stack_queries queries_;
  std::int64_t tiles_;
  T* tile_memory_;
  typename Tile::stack_memory memory_;
  typename Tile::staged_block block_;
};

}}}  // namespace cca::CCA_TARGET::detail
