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
#include "../simd/dot.hpp"
#include "../softmax/row_softmax.hpp"
#include "../softmax/score_rule.hpp"
#include "gathered_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Queries, per head, up to which they share rows along the dim (`few_queries`); more of them ride in lanes (`stack`). Where
/// the two cross was measured (bench/TUNING.md): of 8, 10, 12, 14 and 16 queries after 32K keys, `few_queries` takes 0.61,
/// 0.85, 0.92, 1.19 and 1.39 of the time of a stack with AVX-512, 0.74, 0.95, 1.09, 1.34 and 1.48 with AVX2.
inline constexpr std::int64_t most_few_queries = width<float> < 16 ? 10 : 12;

/// The same of queries that share a list of selected rows, in sequences of many such lists.
inline constexpr std::int64_t most_few_of_block = 4;

/// Rows of context that a task of decoding takes in. A long context is cut there whatever the number of threads, so that
/// results do not depend on it.
inline constexpr std::int64_t part_rows = 1024;

/// The attention of one query to a part of its context: enough to merge parts in a fixed order.
template <class T>
class partial_result {
 public:
  static constexpr std::int64_t size(std::int64_t value_dim) { return padded<T>(value_dim) + width<T>; }

  partial_result(T* memory, std::int64_t value_dim) : memory_(memory), value_dim_(value_dim) {}

  void begin() {
    put({});
    fill_n(out(), padded<T>(value_dim_), T(0));
  }

  /// Turns `count` scores into weights, and shrinks what was added before to match.
  void weigh(T* scores, std::int64_t count, T unit, int headroom) {
    row_softmax<T> softmax = get();
    const T rescale = softmax.absorb(scores, count, unit, headroom);
    put(softmax);
    if (rescale != T(1)) scale_row(out(), value_dim_, rescale, out());
  }

  /// Joins another part of the same query's context; of a part that has seen nothing only the sum is looked at.
  void merge(const partial_result& other, T unit) {
    row_softmax<T> whole = get();
    const row_softmax<T> part = other.get();
    if (part.sum == T(0)) return;
    const auto [first, second] = whole.join(part, unit);
    // Vectors, of which no compiler chooses what it makes one operation of.
    for (std::int64_t d = 0; d < value_dim_; d += width<T>) {
      const vec<T> more = vec<T>(second) * vec<T>::load_aligned(other.out() + d);
      fma<T>(vec<T>::load_aligned(out() + d), vec<T>(first), more).store_aligned(out() + d);
    }
    put(whole);
  }

  /// What turns `out` into the mean of the values, where `sink` is seen as well.
  [[nodiscard]] T share(const exponential_sum<T>& sink, T unit, int headroom) const {
    exponential_sum<T> whole = total(unit, headroom);
    if (sink.sum == T(0)) return get().inverse();
    const T own = whole.sum;
    return get().inverse() * (own * whole.join(sink).first * whole.inverse());
  }

  /// What was seen, in base 2.
  [[nodiscard]] exponential_sum<T> total(T unit, int headroom) const {
    const row_softmax<T> softmax = get();
    if (softmax.sum == T(0)) return {};
    return {product(softmax.maximum, unit), detail::ldexp(softmax.sum, headroom)};
  }

  /// The weighted sum of the values.
  [[nodiscard]] T* out() const { return memory_ + width<T>; }

 private:
  [[nodiscard]] row_softmax<T> get() const { return {{memory_[0], memory_[1]}}; }
  void put(const exponential_sum<T>& softmax) {
    memory_[0] = softmax.maximum;
    memory_[1] = softmax.sum;
  }
  T* memory_;
  std::int64_t value_dim_;
};

/// Where few queries are: the queries `queries` of each of the heads `heads`, of all of the query's, of sequence `b`,
/// one head after the other.
struct few_places {
  std::int64_t b, all_heads;
  range heads, queries;

  [[nodiscard]] std::int64_t count() const { return heads.size() * queries.size(); }
  [[nodiscard]] std::int64_t head(std::int64_t q) const { return heads.begin + q / queries.size(); }
  [[nodiscard]] std::int64_t query(std::int64_t q) const { return queries.begin + q % queries.size(); }
};

/// Of what queries see, all.
inline constexpr range all_rows{0, std::int64_t{1} << 62};

/// A few queries of one sequence whose heads share rows: each row is read from memory once, and the queries take turns
/// while it is in the first-level cache. The unit of work of decoding.
///
/// Cost of a row and query: `(dim + value_dim) / width` multiply-adds and a horizontal sum. Up to about four queries, reading
/// the row's `dim + value_dim` elements takes longer; of more, four share each load of it. The keys of a block are scored
/// while the values of the block before it are added, a slice of the one and a slice of the other in turns: that keeps
/// the processor's own prefetching of both under way, which starts anew where a whole block of keys is followed by one of
/// values.
template <class T>
class few_queries {
 public:
  /// Scratch elements; `staged` where rows are converted, `pieces` where a source has some.
  static constexpr std::int64_t size(std::int64_t queries, std::int64_t dim, std::int64_t value_dim, bool staged,
                                     bool pieces) {
    return ranges_size(queries) + queries * (padded<T>(dim) + row_block) +
           (staged ? slice_rows(dim, value_dim) * (dim + value_dim) : 0) +
           (pieces ? gathered_rows<T>::size(dim, value_dim) : 0);
  }

  /// `staged` as for `size`.
  few_queries(T* scratch, std::int64_t queries, std::int64_t dim, std::int64_t value_dim, bool staged,
              const score_rule<T>& rule, int headroom)
      : dim_(dim),
        value_dim_(value_dim),
        rule_(&rule),
        headroom_(headroom),
        seen_(reinterpret_cast<range*>(scratch)),
        query_(scratch + ranges_size(queries)),
        scores_(query_ + queries * padded<T>(dim)),
        staged_keys_(scores_ + queries * row_block),
        staged_values_(staged_keys_ + slice_rows(dim, value_dim) * dim),
        gathered_(scratch + size(queries, dim, value_dim, staged, false), dim, value_dim) {}

  /// Loads query `q`, `dim` elements.
  template <class Query>
  void load(std::int64_t q, const Query* query) {
    T* to = query_ + q * padded<T>(dim_);
    scale_row(query, dim_, rule_->query_factor(), to);
    fill(to + dim_, to + padded<T>(dim_), T(0));
  }

  /// Lets the queries, which are at `places`, absorb the rows `part` of what they see of a source, counted from its
  /// first. `result(q)` is a `partial_result`.
  template <class Source, class Result>
  void absorb(const Source& source, const few_places& places, range part, const Result& result) {
    const range heads = places.heads, queries = places.queries;
    const std::int64_t b = places.b, sharing = places.all_heads / source.heads;  // they divide `heads`, a group
    const std::int64_t together = gcd(sharing, places.all_heads / source.piece_heads);
    const auto place = [&](std::int64_t q, range some) {
      const std::int64_t h = places.head(q);
      return score_place{source.terms(places.b, h), rule_->slope(places.b, h), places.query(q), some, shift_sums<T>{}};
    };
    for (std::int64_t h = heads.begin; h < heads.end; h += together) {
      const range of = {(h - heads.begin) * queries.size(), (h - heads.begin + together) * queries.size()};
      std::int64_t before = 0;  // rows of the pieces before
      const auto outside = [&](std::int64_t waiting, std::int64_t size) {
        return before + waiting >= part.end || before + waiting + size <= part.begin;
      };
      gathered_.for_each_piece(
          source, b, {h, h + together}, queries, source.rows(b, h / sharing), !rule_->shifts(), outside,
          [&](const auto& head, range piece, std::int64_t, bool whole) {
            range total;
            for (std::int64_t q = of.begin; q < of.end; q += places.queries.size()) {
              if (whole)
                std::fill_n(seen_ + q, places.queries.size(), piece);
              else
                source.visible(places.b, places.head(q), places.queries, piece, seen_ + q);
            }
            for (std::int64_t q = of.begin; q < of.end; ++q) total = hull(total, seen_[q]);
            const range rows = intersection(shifted(part, total.begin - before), total);
            before += total.size();
            if (!rows.empty()) absorb_rows(head, rows, of, result, place);
          });
    }
  }

 private:
  /// Lets the queries `queries` absorb what they see of the rows `rows` of a head. `result(q)` is a `partial_result`,
  /// `place(q, some)` the `score_place` of a query and some of the rows.
  template <class Key, class Value, class Result, class Place>
  void absorb_rows(const context_rows<Key, Value>& head, range rows, range queries, const Result& result,
                   const Place& place) {
    const std::int64_t step = slice_rows(dim_, value_dim_);
    const row_span<Key> keys{head.key, head.key_stride};
    const row_span<Value> values{head.value, head.value_stride};
    range weighted;  // the block before
    for (std::int64_t j = rows.begin; j < rows.end || !weighted.empty(); j += row_block) {
      const range block = intersection({j, j + row_block}, rows);
      for (std::int64_t i = 0; i < row_block; i += step) {
        add(values, intersection(shifted({i, i + step}, weighted.begin), weighted), weighted.begin, queries, result);
        score(keys, intersection({j + i, j + i + step}, block), j, queries);
      }
      for (std::int64_t q = queries.begin; q < queries.end; ++q) weigh(head, q, block, j, result(q), place);
      weighted = block;
    }
  }

  /// Queries that share the loads of rows.
  static constexpr std::int64_t queries_sharing = 4;

  /// Rows of keys, or of values, that are read before it is the others' turn: about 4 KiB of them as they are computed
  /// with. (Sums are rounded where a slice ends, so 16 bits have the slices of floats.)
  static constexpr std::int64_t slice_rows(std::int64_t dim, std::int64_t value_dim) {
    constexpr std::int64_t n = sums_at_a_time<T>;
    return std::clamp(rows_ahead<T>(larger(dim, value_dim)) / n * n, n, row_block);
  }

  /// Elements that hold the ranges, in whole cache lines.
  static constexpr std::int64_t ranges_size(std::int64_t queries) {
    return static_cast<std::int64_t>(scratch_bytes<range>(queries) / sizeof(T));
  }

  /// Calls `f` with the rows `slice` of `rows`. One query reads them as they lie and converts them in registers; for
  /// several of them they are converted once, and what follows is asked for here.
  template <class Element, class F>
  static void with_rows(row_span<Element> rows, std::int64_t dim, range slice, range queries,
                        [[maybe_unused]] T* staged, const F& f) {
    const row_span<Element> some = rows.from(slice.begin);
    if constexpr (loads_as<T, Element>)
      if (in_place<T, Element> || queries.size() == 1) return f(some);
    if constexpr (!in_place<T, Element>) {
      for (std::int64_t i = 0; i < slice.size(); ++i) prefetch_row(some, i + rows_ahead<Element>(dim), dim);
      f(stage(some.data, some.stride, dim, slice.size(), staged));
    }
  }

  /// The scores of the rows `slice` of a block that begins at row `first`.
  template <class Element>
  void score(row_span<Element> rows, range slice, std::int64_t first, range queries) {
    if (slice.empty()) return;
    with_rows(rows, dim_, slice, queries, staged_keys_, [&](const auto& keys) {
      for_each_sharing(slice, queries, [&](auto n, std::int64_t q, range some) {
        const T* query = query_ + q * padded<T>(dim_);
        const auto from = keys.from(some.begin - slice.begin);
        if constexpr (n() == 1)
          dot_rows(query, from, dim_, some.size(), scores_of(q) + some.begin - first);
        else
          dot_shared_rows<n()>(query, padded<T>(dim_), from, dim_, some.size(), scores_of(q) + some.begin - first,
                               row_block);
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
  template <class Element, class Result>
  void add(row_span<Element> rows, range slice, std::int64_t first, range queries, const Result& result) {
    if (slice.empty()) return;
    with_rows(rows, value_dim_, slice, queries, staged_values_, [&](const auto& values) {
      for_each_sharing(slice, queries, [&](auto n, std::int64_t q, range some) {
        const T* weights = scores_of(q) + some.begin - first;
        const auto from = values.from(some.begin - slice.begin);
        if constexpr (n() == 1)
          add_weighted_rows(weights, from, value_dim_, some.size(), T(1), result(q).out());
        else
          add_shared_rows<n()>(weights, row_block, from, value_dim_, some.size(),
                               [&](std::int64_t i) { return result(q + i).out(); });
      });
    });
  }

  /// Calls `f(constant n, q, some)` for the rows `some` of `rows` that the queries `[q, q + n)` see. Those that see the same of
  /// them go together, otherwise each goes by itself: to the bit it gets the same, whatever its neighbours see.
  template <class F>
  void for_each_sharing(range rows, range queries, const F& f) const {
    for_row_blocks<queries_sharing>(queries.size(), [&](auto n, std::int64_t i) {
      const std::int64_t q = queries.begin + i;
      const auto of = [&](std::int64_t k) { return intersection(seen_[q + k], rows); };
      bool same = true;
      for (std::int64_t k = 1; k < n(); ++k) same &= of(k) == of(0);
      if (same && !of(0).empty()) return f(n, q, of(0));
      for (std::int64_t k = 0; !same && k < n(); ++k)
        if (!of(k).empty()) f(std::integral_constant<std::int64_t, 1>{}, q + k, of(k));
    });
  }

  [[nodiscard]] T* scores_of(std::int64_t q) const { return scores_ + q * row_block; }

  std::int64_t dim_, value_dim_;
  const score_rule<T>* rule_;
  int headroom_;
  range* seen_;  // per query
  T *query_, *scores_, *staged_keys_, *staged_values_;
  gathered_rows<T> gathered_;
};

}}}  // namespace cca::CCA_TARGET::detail
