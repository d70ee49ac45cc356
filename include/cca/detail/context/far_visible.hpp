#pragma once

#include <algorithm>
#include <cstdint>

#include "../../call.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "source.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Whether a far context selects rows.
template <class Far>
bool selects(const Far& context) {
  return context.selected.blocks.data != nullptr;
}

/// Whether its rows come and go.
template <class Far>
bool comes_and_goes(const Far& context) {
  return context.visible_from.data != nullptr || context.visible_until.data != nullptr;
}

template <class Inputs, class Far>
piece_form pieces_of(const Inputs& in, const Far& context) {
  if (!selects(context)) return {comes_and_goes(context)};
  piece_form pieces{true, context.selected.block_queries, in.query.heads()};
  for (const std::int64_t heads : {in.key.heads(), context.key.heads(), context.selected.blocks.heads()})
    if (heads > 0) pieces.across = gcd(pieces.across, in.query.heads() / heads);
  return pieces;
}

/// Of each sequence, the far rows that a query sees, at most.
template <class Far>
auto most_far_rows(const Far& context) {
  return [key = context.key, selected = context.selected](std::int64_t b) {
    const std::int64_t most = selected.blocks.dim(), length = key.length(b);
    if (selected.blocks.data == nullptr || most > length / selected.block_rows) return length;
    return most * selected.block_rows;
  };
}

/// Who sees the rows of a far context, in pieces (`sees_pieces`). Queries that ask together share a list of selected
/// rows.
template <class Far, class First>
class far_visible {
 public:
  std::int64_t heads = 1;

  /// `first(b)` is the position of query 0 of sequence `b`.
  far_visible(const Far& context, std::int64_t query_heads, const First& first)
      : context_(context), query_heads_(query_heads), first_(first) {
    for (const std::int64_t more :
         {heads_of(context.visible_from), heads_of(context.visible_until), heads_of(context.selected.blocks)})
      if (more > 0) heads = heads / gcd(heads, more) * more;
  }

  [[nodiscard]] std::int64_t most(std::int64_t b) const { return most_far_rows(context_)(b); }

  [[nodiscard]] range next(std::int64_t b, std::int64_t h, range queries, std::int64_t from) const {
    if (selects(context_)) return next_selected(b, h, queries.begin, from);
    if (comes_and_goes(context_)) return next_run(b, h, shifted(queries, first_(b)), from);
    return {from, from == 0 ? context_.key.length(b) : from};
  }

  void ranges(std::int64_t b, std::int64_t h, range queries, range piece, range* seen) const {
    range run = piece;
    const lifetimes of = comes_and_goes(context_) ? lifetimes_of(b, h) : lifetimes{};
    for (std::int64_t i = queries.begin; i < queries.end; ++i, ++seen) {
      // Later queries see nothing before what earlier ones saw, and no less behind it.
      if (of.given()) run = of.seen_at(first_(b) + i, {run.begin, piece.end});
      *seen = run;
      if (context_.seen.data != nullptr) seen->end = smaller(seen->end, *context_.seen.row(b, h, i));
      if (seen->empty()) *seen = {};
    }
  }

  /// Never where there is one piece, for whose copy no memory is planned (`pieces_of`).
  [[nodiscard]] bool whole(std::int64_t b, range sharing, range queries, range piece) const {
    if (!selects(context_) && !comes_and_goes(context_)) return false;
    const range positions = shifted(queries, first_(b));
    const lifetimes of = comes_and_goes(context_) ? lifetimes_of(b, sharing.begin) : lifetimes{};
    if (of.among(positions, piece.begin) != positions || of.among(positions, piece.end - 1) != positions) return false;
    if (context_.seen.data == nullptr) return true;
    for (std::int64_t h = sharing.begin; h < sharing.end; ++h)
      for (std::int64_t i = queries.begin; i < queries.end; ++i)
        if (*context_.seen.row(b, h, i) < piece.end) return false;
    return true;
  }

 private:
  /// When the far rows of a head are visible; null: from the first position on, or for good.
  struct lifetimes {
    const std::int64_t *from = nullptr, *until = nullptr;
    std::int64_t from_stride = 0, until_stride = 0;

    [[nodiscard]] bool given() const { return from != nullptr || until != nullptr; }

    /// The positions among these whose queries see row `j`.
    [[nodiscard]] range among(range positions, std::int64_t j) const {
      if (from != nullptr) positions.begin = std::clamp(from[j * from_stride], positions.begin, positions.end);
      if (until != nullptr) positions.end = std::clamp(until[j * until_stride], positions.begin, positions.end);
      return positions;
    }

    /// The rows of a piece, or of what is left of it, that the query at `t` sees.
    [[nodiscard]] range seen_at(std::int64_t t, range rows) const {
      const auto first = [&](range some, const auto& holds) {  // of those that come first
        while (some.size() > 0) {
          const std::int64_t middle = some.begin + some.size() / 2;
          (holds(middle) ? some.begin : some.end) = holds(middle) ? middle + 1 : middle;
        }
        return some.begin;
      };
      if (until != nullptr) rows.begin = first(rows, [&](std::int64_t j) { return until[j * until_stride] <= t; });
      if (from != nullptr) rows.end = first(rows, [&](std::int64_t j) { return from[j * from_stride] <= t; });
      return rows;
    }
  };

  template <class View>
  static std::int64_t heads_of(const View& view) {
    return view.data != nullptr ? view.heads() : 1;
  }

  [[nodiscard]] lifetimes lifetimes_of(std::int64_t b, std::int64_t h) const {
    const auto &from = context_.visible_from, &until = context_.visible_until;
    return {shared_row(from, b, h, query_heads_), shared_row(until, b, h, query_heads_), from.stride[2], until.stride[2]};
  }

  /// Neighbouring rows that some query at these positions sees, as long as both bounds, among the positions, never
  /// decrease: then each query sees one range of them. What happens before or behind the positions does not end a
  /// piece.
  [[nodiscard]] range next_run(std::int64_t b, std::int64_t h, range positions, std::int64_t from) const {
    const lifetimes of = lifetimes_of(b, h);
    const std::int64_t length = context_.key.length(b);
    range life;
    while (from < length && (life = of.among(positions, from)).empty()) ++from;
    std::int64_t end = from;
    for (range next = life; end < length; life = next) {
      next = of.among(positions, end);
      if (next.empty() || next.begin < life.begin || next.end < life.end) break;
      ++end;
    }
    return {from, end};
  }

  /// Neighbouring blocks of the list of query `i`.
  [[nodiscard]] range next_selected(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t from) const {
    const auto& [blocks, block_rows, block_queries] = context_.selected;
    const std::int64_t* const list =
        blocks.row(blocks.batch() == 1 ? 0 : b, h / (query_heads_ / blocks.heads()), i / block_queries);
    const std::int64_t* const end = list + blocks.dim();
    const std::int64_t least = from / block_rows + (from % block_rows == 0 ? 0 : 1);
    const std::int64_t* next =
        std::partition_point(list, end, [least](std::int64_t block) { return 0 <= block && block < least; });
    if (next == end || *next < 0) return {from, from};
    const std::int64_t first = *next;
    std::int64_t count = 1;
    while (++next != end && *next == first + count) ++count;
    return {first * block_rows, smaller((first + count - 1) * block_rows, context_.key.length(b) - block_rows) + block_rows};
  }

  Far context_;
  std::int64_t query_heads_;
  First first_;
};

}}}  // namespace cca::CCA_TARGET::detail
