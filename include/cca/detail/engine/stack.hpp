#pragma once

#include <algorithm>
#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/tasks.hpp"
#include "../context/visible.hpp"
#include "../simd/simd.hpp"
#include "../simd/wanted_memory.hpp"
#include "../softmax/score_shift.hpp"
#include "gathered_rows.hpp"
#include "query_tile.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Which queries a stack holds: the first `count` of these lanes; `heads` are all of the query.
struct stack_queries {
  lane_queries lanes;
  std::int64_t heads, count;
};

/// Rows of a head that are expected behind those that a stack sees.
template <class Rows>
struct expected_rows {
  Rows rows;
  range some{};
  bool only = false;  ///< the stack's own rows are in a cache: the stack before has asked for them
};
template <class Rows>
expected_rows(Rows, range = {}) -> expected_rows<Rows>;

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
  /// Scratch elements for `count` queries; `staged` where rows are converted or put side by side, `pieces` where a source has some.
  static constexpr std::int64_t size(std::int64_t count, const tile_form& form, bool staged, bool pieces) {
    const std::int64_t tiles = (count + lanes - 1) / lanes;
    return tiles * Tile::size(form) + Tile::stack_memory::size(form, tiles) +
           Tile::staged_block::size(form, block_rows, staged) +
           (pieces && !Tile::backward ? gathered_rows<T>::size(form.dim, form.value_dim) : 0);
  }

  /// `staged` as for `size`.
  stack(T* scratch, const tile_call<T>& call, const stack_queries& queries, bool staged)
      : call_(call),
        queries_(queries),
        tiles_((queries.count + lanes - 1) / lanes),
        tile_memory_(scratch),
        memory_(tile_memory_ + tiles_ * Tile::size(call.form), call.form, tiles_),
        block_(tile_memory_ + tiles_ * Tile::size(call.form) + Tile::stack_memory::size(call.form, tiles_), call.form,
               block_rows, staged),
        gathered_(tile_memory_ + size(queries.count, call.form, staged, false), call.form.dim, call.form.value_dim) {
    call_.wanted = &wanted_;
  }
  stack(const stack&) = delete;  // its tiles refer to it
  stack& operator=(const stack&) = delete;

  /// Rows that a stack sees and the next finds in the second-level cache.
  [[nodiscard]] static constexpr std::int64_t kept_rows(const tile_form& form) {
    return tile_shape<T>::budget / ((form.dim + form.value_dim) * static_cast<std::int64_t>(sizeof(T)));
  }

  /// Says which stack the same worker takes next. What that reads and this one does not, and `out`, which this one writes,
  /// are asked for while the products run.
  template <class Query, class Out>
  void expect(const stack_queries& next, tensor_view<Query> query, tensor_view<Out> out) {
    next_ = next;
    last_ = queries_.lanes.first + queries_.count == query.length(queries_.lanes.b);
    operands_[0] = {next.lanes.row(query), next.lanes.stride(query), call_.form.dim, {0, next.count}};
    operands_[1] = {queries_.lanes.row(out), queries_.lanes.stride(out), call_.form.value_dim, {0, queries_.count}};
  }

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
    const std::int64_t b = queries_.lanes.b, head = queries_.lanes.head;
    if (source.length(b) == 0) return;
    const bool gathers = !Tile::backward && !call_.rule->shifts();
    const auto terms = source.terms(b, head);
    gathered_.for_each_piece(
        source, b, queries_.lanes.heads(queries_.count), queries_.lanes.queries(queries_.count),
        source.rows(b, head / (queries_.heads / source.heads)), gathers,
        [](std::int64_t, std::int64_t) { return false; },
        [&](const auto& rows, range piece, std::int64_t next, bool whole) {
          visible_lanes seen[Tile::most];
          see(source, piece, whole, seen);
          absorb_rows(rows, terms, seen,
                      source.in_pieces() ? expected_rows{rows, {next, next + block_rows}} : expected(source, seen), after, sums);
        });
  }

  /// Absorbs the rows of a head that are seen, of which tile `c` sees `seen[c]`. The rest is as above.
  template <class Rows, class Terms, class After>
  void absorb_rows(const Rows& rows, const Terms& terms, const visible_lanes* seen, const expected_rows<Rows>& next,
                   const After& after, const shift_sums<T>& sums = {}) {
    const range any = seen_by_any(seen);
    const T slope = call_.rule->slope(queries_.lanes.b, queries_.lanes.head);
    for (std::int64_t j = any.begin; j < any.end; j += block_rows - j % block_rows) {
      const std::int64_t end = smaller(j + block_rows - j % block_rows, any.end);
      block_.stage(rows, {j, end});
      want_behind(rows, any, next);
      for (std::int64_t c = 0; c < tiles_; ++c)
        at(c).absorb(memory_, block_, seen[c], c,
                     score_place{terms, slope, queries_.lanes.first + c * lanes, block_.rows(), sums});
      after(block_.rows(), seen);
    }
  }

  [[nodiscard]] typename Tile::stack_memory& memory() { return memory_; }
  [[nodiscard]] std::int64_t tiles() const { return tiles_; }

 private:
  /// What each tile sees of a piece.
  template <class Source>
  void see(const Source& source, range piece, bool whole, visible_lanes* seen) const {
    for (std::int64_t c = 0; c < tiles_; ++c) {
      const std::int64_t count = at(c).count();
      seen[c] = {count, [&](range* lane) {
                   if (whole)
                     std::fill_n(lane, count, piece);
                   else
                     visible(source, queries_.lanes.from(c * lanes), count, piece, lane);
                   at(c).leave_out(lane);
                 }};
      // A lane without a query would add 0 times the NaN that its weight may be: it is left out like one that sees nothing.
      if (Tile::backward && count % width<T> != 0) seen[c].all[count / width<T>] = {};
    }
  }
  [[nodiscard]] range seen_by_any(const visible_lanes* seen) const {
    range any;
    for (std::int64_t c = 0; c < tiles_; ++c) any = hull(any, seen[c].seen_by_any());
    return any;
  }

  /// What the next stack sees of a source and this one, which sees `seen`, does not; where caches do not keep what this one
  /// sees, what it begins with.
  template <class Source>
  [[nodiscard]] auto expected(const Source& source, const visible_lanes* seen) const {
    const lane_queries& of = next_.lanes;
    const std::int64_t heads = queries_.heads / source.heads;
    expected_rows of_next{source.rows(of.b, of.head / heads)};
    if (next_.count == 0 || source.length(of.b) == 0) return of_next;
    const range own = seen_by_any(seen), queries = of.queries(next_.count), all{0, source.length(of.b)};
    range first, last;
    source.visible(of.b, of.head, {queries.begin, queries.begin + 1}, all, &first);
    source.visible(of.b, of.head, {queries.end - 1, queries.end}, all, &last);
    of_next.some = hull(first, last);
    of_next.only = !last_ && own.size() <= kept_rows(call_.form);
    const bool shared = of.b == queries_.lanes.b && of.head / heads == queries_.lanes.head / heads;
    if (shared && (of_next.only || of_next.some.begin < own.begin))
      of_next.some.end = smaller(of_next.some.end, own.begin);
    of_next.some.end = smaller(of_next.some.end, of_next.some.begin + kept_rows(call_.form));
    return of_next;
  }

  /// Wants what follows the block in work, of the rows `any` that are seen: those of the next block, and behind the last what is
  /// expected next; all of that with the first block where a cache has the stack's own rows.
  template <class Rows>
  void want_behind(const Rows& rows, range any, const expected_rows<Rows>& next) {
    const range block = block_.rows();
    if (next.only && block.begin != any.begin) return;
    if (!next.only) {
      wanted_.clear();
      want(rows, {block.end, smaller(block.end + block_rows, any.end)});
    }
    if (next.only || block.end == any.end) {
      want(next.rows, next.some);
      for (memory_rows& of : operands_) wanted_.want(std::exchange(of, {}));
    }
    wanted_.pace(asks(next.only ? any : block), Tile::product::add_asks);
  }

  /// How often the products of rows and lanes ask while they go over some rows, at least: where there are two, as backward, each
  /// once for a register block, otherwise for each line of its rows.
  [[nodiscard]] std::int64_t asks(range rows) const {
    const std::int64_t vectors = (queries_.count + width<T> - 1) / width<T>;
    using shape = tile_shape<T>;
    constexpr std::int64_t full = shape::rows * shape::vectors;
    return rows.size() * vectors / (vectors >= shape::vectors ? full : shape::single_rows) *
           (Tile::backward ? 2 : call_.form.dim / line<T>);
  }

  /// Wants the rows `some` of a head.
  template <class Key, class Value>
  void want(const context_rows<Key, Value>& rows, range some) {
    wanted_.want({rows.key, rows.key_stride, call_.form.dim, some});
    wanted_.want({rows.value, rows.value_stride, call_.form.value_dim, some});
  }

  /// What each of the queries sees of a piece.
  template <class Source>
  static void visible(const Source& source, const lane_queries& of, std::int64_t count, range piece, range* lane) {
    const range queries = of.queries(count);
    for (std::int64_t h = of.heads(count).begin; h < of.heads(count).end; ++h, lane += queries.size())
      source.visible(of.b, h, queries, piece, lane);
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
  gathered_rows<T> gathered_;
  wanted_memory wanted_;
  stack_queries next_{};
  bool last_ = false;  ///< whether these are the last queries of their head, whose rows nobody has seen before
  memory_rows operands_[2];  ///< the next queries, and the outputs of these
};

}}}  // namespace cca::CCA_TARGET::detail
