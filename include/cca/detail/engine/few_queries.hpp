#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../../element.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../context/tasks.hpp"
#include "../product/vectors.hpp"
#include "../simd/dot.hpp"
#include "../softmax/score_rule.hpp"
#include "gathered_rows.hpp"
#include "partial_result.hpp"
#include "query_tile.hpp"
#include "stack.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Queries that share rows, of one head or of several, from which on they ride in lanes: fewer take rows along the dim. Where
/// the two cross was measured (bench/TUNING.md): a vector of lanes takes as long whether it is full or not.
template <class T>
inline constexpr std::int64_t least_in_lanes = width<T> >= 16 ? 10 : 7;

/// The same of queries that share a list of selected rows, in sequences of many such lists.
inline constexpr std::int64_t most_few_of_block = 4;

/// Rows of context that a task of decoding takes in. A long context is cut there whatever the number of threads, so that
/// results do not depend on it.
inline constexpr std::int64_t part_rows = 1024;

/// Where few queries are: the queries `queries` of each of the heads `heads`, of all of the query's, of sequence `b`,
/// one head after the other.
struct few_places {
  std::int64_t b, all_heads;
  range heads, queries;

  [[nodiscard]] std::int64_t count() const { return heads.size() * queries.size(); }
  [[nodiscard]] std::int64_t head(std::int64_t q) const { return heads.begin + q / queries.size(); }
  [[nodiscard]] std::int64_t query(std::int64_t q) const { return queries.begin + q % queries.size(); }
};

/// What few queries have seen, `stride` elements apart.
template <class T>
struct few_results {
  T* first;
  std::int64_t stride, value_dim;

  [[nodiscard]] partial_result<T> operator[](std::int64_t q) const { return {first + q * stride, value_dim}; }
};

/// Of what queries see, all.
inline constexpr range all_rows{0, std::int64_t{1} << 62};

/// A few queries of one sequence whose heads share rows: each row is read from memory once, and the queries take turns
/// while it is in the first-level cache. The unit of work of decoding.
///
/// Cost of a row and query: `(dim + value_dim) / width` multiply-adds and a horizontal sum. Up to about four queries, reading
/// the row's `dim + value_dim` elements takes longer; of more, four share each load of it, and from `least_in_lanes` on they
/// are the lanes of tiles, of which a vector takes as long as one query. Without lanes, the keys of a block are scored while the
/// values of the block before it are added, a slice of the one and a slice of the other in turns: that keeps the processor's
/// own prefetching of both under way, which starts anew where a whole block of keys is followed by one of values.
template <class T>
class few_queries {
  using lane_tile = query_tile<vectors<T>>;
  using lane_stack = stack<lane_tile>;

 public:
  /// Scratch elements; `staged` where rows are converted, `pieces` where a source has some.
  static constexpr std::int64_t size(std::int64_t queries, std::int64_t dim, std::int64_t value_dim, bool staged,
                                     bool pieces) {
    return ranges_size(queries) + queries * (padded<T>(dim) + row_block) + lanes_size(queries, {dim, value_dim}, staged) +
           (staged ? slice_rows(queries, dim, value_dim) * (dim + value_dim) : 0) +
           (pieces ? gathered_rows<T>::size(dim, value_dim) : 0);
  }

  /// `staged` as for `size`.
  few_queries(T* scratch, std::int64_t queries, std::int64_t dim, std::int64_t value_dim, bool staged,
              const score_rule<T>& rule, int headroom)
      : dim_(dim),
        value_dim_(value_dim),
        staged_(staged),
        rule_(&rule),
        headroom_(headroom),
        seen_(reinterpret_cast<range*>(scratch)),
        query_(scratch + ranges_size(queries)),
        scores_(query_ + queries * padded<T>(dim)),
        lanes_(scores_ + queries * row_block),  // in whole vectors from here on
        staged_keys_(lanes_ + lanes_size(queries, {dim, value_dim}, staged)),
        staged_values_(staged_keys_ + slice_rows(queries, dim, value_dim) * dim),
        gathered_(scratch + size(queries, dim, value_dim, staged, false), dim, value_dim) {}

  /// Loads query `q`, `dim` elements.
  template <class Query>
  void load(std::int64_t q, const Query* query) {
    T* to = query_ + q * padded<T>(dim_);
    scale_row(query, dim_, rule_->query_factor(), to);
    fill(to + dim_, to + padded<T>(dim_), T(0));
  }

  /// Lets the queries, at `places`, absorb the rows `part` of what they see of a source, counted from its first.
  template <class Source>
  void absorb(const Source& source, const few_places& places, range part, const few_results<T>& results) {
    const range heads = places.heads;
    const std::int64_t sharing = places.all_heads / source.heads;  // they divide `heads`, a group
    const std::int64_t together = gcd(sharing, places.all_heads / source.piece_heads);
    for (std::int64_t h = heads.begin; h < heads.end; h += together) {
      const few_places some{places.b, places.all_heads, {h, h + together}, places.queries};
      const range of = shifted({0, some.count()}, (h - heads.begin) * places.queries.size());
      if (of.size() >= least_in_lanes<T> && (together == 1 || !rule_->shifts()))  // a tile has one slope, and a row one bias
        for (range lanes = of; !lanes.empty(); lanes.begin += most_in_lanes)
          absorb_in_lanes(source, some, of, intersection(lanes, {lanes.begin, lanes.begin + most_in_lanes}), part, results);
      else
        for_each_seen(source, some, of, part, [&](const auto& head, range rows, std::int64_t) {
          absorb_rows(head, rows, of, results, [&](std::int64_t q, range block) {
            const std::int64_t head_of = some.head(q - of.begin);
            return score_place{source.terms(places.b, head_of), rule_->slope(places.b, head_of), some.query(q - of.begin),
                               block, shift_sums<T>{}};
          });
        });
    }
  }

 private:
  /// Calls `f(head, rows, next)` for the rows of a head that the queries `of`, at `places`, which share them, see some of,
  /// of the part. Their `seen_` says which; behind the rows those from `next` on are expected.
  template <class Source, class F>
  void for_each_seen(const Source& source, const few_places& places, range of, range part, const F& f) {
    std::int64_t before = 0;  // rows of the pieces before
    const auto outside = [&](std::int64_t waiting, std::int64_t size) {
      return before + waiting >= part.end || before + waiting + size <= part.begin;
    };
    gathered_.for_each_piece(
        source, places.b, places.heads, places.queries,
        source.rows(places.b, places.heads.begin / (places.all_heads / source.heads)), !rule_->shifts(), outside,
        [&](const auto& head, range piece, std::int64_t next, bool whole) {
          range total;
          for (std::int64_t q = of.begin; q < of.end; q += places.queries.size()) {
            if (whole)
              std::fill_n(seen_ + q, places.queries.size(), piece);
            else
              source.visible(places.b, places.head(q - of.begin), places.queries, piece, seen_ + q);
          }
          for (std::int64_t q = of.begin; q < of.end; ++q) total = hull(total, seen_[q]);
          const range rows = intersection(shifted(part, total.begin - before), total);
          before += total.size();
          if (!rows.empty()) f(head, rows, rows.end < total.end ? rows.end : next);
        });
  }

  /// Lets the queries `lanes`, of those `of` at `places`, absorb a part of what they see, in the lanes of tiles.
  template <class Source>
  void absorb_in_lanes(const Source& source, const few_places& places, range of, range lanes, range part,
                       const few_results<T>& results) {
    const tile_form form{dim_, value_dim_};
    const std::int64_t head = places.head(lanes.begin - of.begin);
    lane_stack stack(lanes_, {form, rule_, headroom_},
                     {{places.b, head, places.query(lanes.begin - of.begin)}, places.all_heads, lanes.size()}, staged_);
    stack.for_each_tile([&](lane_tile tile, std::int64_t first) {
      tile.begin(query_ + (lanes.begin + first) * padded<T>(dim_), padded<T>(dim_), T(1));
    });
    for_each_seen(source, places, of, part, [&](const auto& rows_of_head, range rows, std::int64_t next) {
      typename lane_tile::visible_lanes seen[lane_tile::most];
      stack.for_each_tile([&](lane_tile tile, std::int64_t first) {
        seen[first / lane_tile::lanes] = {tile.count(), [&](range* lane) {
                                            for (std::int64_t i = 0; i < tile.count(); ++i)
                                              lane[i] = intersection(seen_[lanes.begin + first + i], rows);
                                          }};
      });
      const expected_rows behind{rows_of_head, {next, next + lane_tile::block_rows}};
      stack.absorb_rows(rows_of_head, source.terms(places.b, head), seen, behind, nothing_after_blocks{});
    });
    const std::int64_t size = partial_result<T>::size(value_dim_);
    T* const sums = lanes_ + lane_stack::size(lanes.size(), form, staged_, false);
    stack.for_each_tile([&](lane_tile tile, std::int64_t first) {
      for (std::int64_t i = 0; i < tile.count(); ++i) partial_result<T>(sums + i * size, value_dim_).begin();
      tile.write_sums(partial_result<T>(sums, value_dim_).out(), size);
      for (std::int64_t i = 0; i < tile.count(); ++i) {
        partial_result<T> some(sums + i * size, value_dim_);
        some.put(tile.weights(i));
        results[lanes.begin + first + i].merge(some, rule_->unit_in_base_2());
      }
    });
  }

  /// Lets the queries `queries` absorb what they see of the rows `rows` of a head. `place(q, some)` is the `score_place` of a
  /// query and some of the rows.
  template <class Key, class Value, class Place>
  void absorb_rows(const context_rows<Key, Value>& head, range rows, range queries, const few_results<T>& results,
                   const Place& place) {
    const std::int64_t step = slice_rows(queries.size(), dim_, value_dim_);
    const row_span<Key> keys{head.key, head.key_stride};
    const row_span<Value> values{head.value, head.value_stride};
    range weighted;  // the block before
    for (std::int64_t j = rows.begin; j < rows.end || !weighted.empty(); j += row_block) {
      const range block = intersection({j, j + row_block}, rows);
      for (std::int64_t i = 0; i < row_block; i += step) {
        add(values, intersection(shifted({i, i + step}, weighted.begin), weighted), weighted.begin, queries, results);
        score(keys, intersection({j + i, j + i + step}, block), j, queries);
      }
      for (std::int64_t q = queries.begin; q < queries.end; ++q) weigh(head, q, block, j, results[q], place);
      weighted = block;
    }
  }

  /// Queries that share the loads of rows.
  static constexpr std::int64_t queries_sharing = 4;

  /// Rows of keys, or of values, that are read before it is the others' turn: about 4 KiB of them as they are computed
  /// with, for more queries than share a load 8 KiB, which these take turns on. (Sums are rounded where a slice ends, so
  /// 16 bits have the slices of floats.)
  static constexpr std::int64_t slice_rows(std::int64_t queries, std::int64_t dim, std::int64_t value_dim) {
    constexpr std::int64_t n = sums_at_a_time<T>;
    return std::clamp(halves_ahead(queries) / 2 * rows_ahead<T>(larger(dim, value_dim)) / n * n, n, row_block);
  }

  /// How far ahead memory is asked for, in halves of 4 KiB: a slice, and half of one more where a few go through it side by
  /// side. Every query asks, since a core that waits for as many lines as it can keep in mind drops what it is asked for.
  static constexpr std::int64_t halves_ahead(std::int64_t n) { return n > queries_sharing ? 4 : n > 1 ? 3 : 2; }

  /// Queries that ride in lanes at a time.
  static constexpr std::int64_t most_in_lanes = lane_tile::most * lane_tile::lanes;

  /// Scratch elements of tiles, and of what one of them has absorbed.
  static constexpr std::int64_t lanes_size(std::int64_t queries, const tile_form& form, bool staged) {
    if (queries < least_in_lanes<T>) return 0;
    return lane_stack::size(smaller(queries, most_in_lanes), form, staged, false) +
           lane_tile::lanes * partial_result<T>::size(form.value_dim);
  }

  /// Elements that hold the ranges, in whole cache lines.
  static constexpr std::int64_t ranges_size(std::int64_t queries) {
    return static_cast<std::int64_t>(scratch_bytes<range>(queries) / sizeof(T));
  }

  /// Calls `f` with the rows `slice` of `rows`, and how many rows ahead memory is asked for. One query reads them as they lie
  /// and converts them in registers; for several of them they are converted once, and what follows is asked for here.
  template <class Element, class F>
  static void with_rows(row_span<Element> rows, std::int64_t dim, range slice, range queries,
                        [[maybe_unused]] T* staged, const F& f) {
    const row_span<Element> some = rows.from(slice.begin);
    if constexpr (loads_as<T, Element>)
      if (in_place<T, Element> || queries.size() == 1)
        return f(some, halves_ahead(queries.size()) * rows_ahead<Element>(dim) / 2);
    if constexpr (!in_place<T, Element>) {
      for (std::int64_t i = 0; i < slice.size(); ++i) prefetch_row(some, i + rows_ahead<Element>(dim), dim);
      f(stage(some.data, some.stride, dim, slice.size(), staged), std::int64_t{0});
    }
  }

  /// The scores of the rows `slice` of a block that begins at row `first`.
  template <class Element>
  void score(row_span<Element> rows, range slice, std::int64_t first, range queries) {
    if (slice.empty()) return;
    with_rows(rows, dim_, slice, queries, staged_keys_, [&](const auto& keys, std::int64_t ahead) {
      for_each_sharing(slice, queries, [&](auto n, std::int64_t q, range some) {
        const T* query = query_ + q * padded<T>(dim_);
        T* scores = scores_of(q) + some.begin - first;
        const auto from = keys.from(some.begin - slice.begin);
        if constexpr (n() == 1)
          dot_rows(query, from, dim_, some.size(), scores, ahead);
        else
          dot_shared_rows<n()>(query, padded<T>(dim_), from, dim_, some.size(), scores, row_block, ahead);
      });
    });
  }

  /// Turns the scores of the rows `block`, which begins at row `first`, into weights. The scales of rows of 8 bits are
  /// factors of both: elements are multiplied without them.
  template <class Key, class Value, class Place>
  void weigh(const context_rows<Key, Value>& head, std::int64_t q, range block, std::int64_t first,
             partial_result<T> result, const Place& place) {
    const range seen = shifted(intersection(seen_[q], block), -first);
    if (seen.empty()) return;
    T* scores = scores_of(q);
    multiply_by_scales<Key>(head.key_scales.from(first), seen, scores);
    fill_n(scores, seen.begin, T(0));
    rule_->apply(scores, seen.end, [&] { return place(q, range{first, first + seen.end}); });
    fill_n(scores, seen.begin, -infinity<T>);
    result.weigh(scores, seen.end, rule_->unit_in_base_2(), headroom_);
    multiply_by_scales<Value>(head.value_scales.from(first), seen, scores);
  }

  /// Adds the values of the rows `slice` of a block that begins at row `first`.
  template <class Element>
  void add(row_span<Element> rows, range slice, std::int64_t first, range queries, const few_results<T>& results) {
    if (slice.empty()) return;
    with_rows(rows, value_dim_, slice, queries, staged_values_, [&](const auto& values, std::int64_t ahead) {
      for_each_sharing(slice, queries, [&](auto n, std::int64_t q, range some) {
        const T* weights = scores_of(q) + some.begin - first;
        const auto from = values.from(some.begin - slice.begin);
        if constexpr (n() == 1)
          add_weighted_rows(weights, from, value_dim_, some.size(), T(1), results[q].out(), ahead);
        else
          with_vectors(queries, from, [&](auto vectors) {
            const auto out = [&](std::int64_t i) { return results[q + i].out(); };
            add_shared_rows<n(), vectors()>(weights, row_block, from, value_dim_, some.size(), out, ahead);
          });
      });
    });
  }

  /// Calls `f(constant n)` with how many vectors of a row are summed at a time: where more queries than share a load take turns,
  /// products bound it.
  template <class Element, class F>
  static void with_vectors(range queries, row_span<Element>, const F& f) {
    if (queries.size() > queries_sharing)
      f(std::integral_constant<std::int64_t, shared_vectors<T, Element>>{});
    else
      f(std::integral_constant<std::int64_t, vectors_asked<T, Element>>{});
  }

  /// Calls `f(constant n, q, some)` for the rows `some` of `rows` that the queries `[q, q + n)` see. Those that see the same of
  /// them go together, otherwise each goes by itself: to the bit it gets the same, whatever its neighbours see.
  template <class F>
  void for_each_sharing(range rows, range queries, const F& f) const {
    const auto share = [&](auto n, std::int64_t q) {
      const auto of = [&](std::int64_t k) { return intersection(seen_[q + k], rows); };
      bool same = true;
      for (std::int64_t k = 1; k < n(); ++k) same &= of(k) == of(0);
      if (same && !of(0).empty()) return f(n, q, of(0));
      for (std::int64_t k = 0; !same && k < n(); ++k)
        if (!of(k).empty()) f(std::integral_constant<std::int64_t, 1>{}, q + k, of(k));
    };
    std::int64_t q = queries.begin;
    for (; q + queries_sharing <= queries.end; q += queries_sharing)
      share(std::integral_constant<std::int64_t, queries_sharing>{}, q);
    for_constants<queries_sharing - 1>([&](auto i) {  // not 2 and 1 for 3, which would take longer than 4
      if (queries.end - q == i + 1) share(std::integral_constant<std::int64_t, i + 1>{}, q);
    });
  }

  [[nodiscard]] T* scores_of(std::int64_t q) const { return scores_ + q * row_block; }

  std::int64_t dim_, value_dim_;
  bool staged_;
  const score_rule<T>* rule_;
  int headroom_;
  range* seen_;  // per query
  T *query_, *scores_, *lanes_, *staged_keys_, *staged_values_;
  gathered_rows<T> gathered_;
};

}}}  // namespace cca::CCA_TARGET::detail
