#pragma once

#include <cstdint>

#include "../../options.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../simd/dot.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// Queries that say what tokens are worth while they see them raw: `pooling::select_by_mass`. An observer's softmax goes
// over its sink tokens and the raw tokens behind them. What follows needs no more of it than its maximum and its sum.
//
// A group's observers are queries of `partition::raw_queries`, which end before the first query that sees its core: so
// the core knows of no token that this query does not see, and tokens to come change nothing.

/// Where the observers are, and how many: observer `i` is the query at `i * stride` of its sequence.
struct observer_grid {
  std::int64_t stride;

  explicit observer_grid(const options& options) : stride(observer_stride(options)) {}

  [[nodiscard]] std::int64_t position(std::int64_t i) const { return i * stride; }
  /// Observers before a position.
  [[nodiscard]] std::int64_t count(std::int64_t position) const { return (position + stride - 1) / stride; }
  [[nodiscard]] range within(range positions) const { return {count(positions.begin), count(positions.end)}; }
};

/// Of an observer's softmax: the largest score, and 1 over the sum of the weights relative to it.
template <class T>
struct observer_sum {
  T maximum, inverse;
};

/// The observers of a call, whatever keeps them: `load(b, h, i, factor, to)` writes the query of observer `i` of head `h`
/// times a factor, `sum(b, h, i)` is its `observer_sum`, `length(b)` the positions that are known. Refers to it.
template <class T>
class observers_ref {
 public:
  observers_ref() = default;
  template <class Observers>
  explicit observers_ref(const Observers& observers)
      : observers_(&observers),
        load_([](const void* of, std::int64_t b, std::int64_t h, std::int64_t i, T factor, T* to) {
          static_cast<const Observers*>(of)->load(b, h, i, factor, to);
        }),
        sum_([](const void* of, std::int64_t b, std::int64_t h, std::int64_t i) {
          return static_cast<const Observers*>(of)->sum(b, h, i);
        }),
        length_([](const void* of, std::int64_t b) { return static_cast<const Observers*>(of)->length(b); }) {}

  void load(std::int64_t b, std::int64_t h, std::int64_t i, T factor, T* to) const {
    load_(observers_, b, h, i, factor, to);
  }
  [[nodiscard]] observer_sum<T> sum(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return sum_(observers_, b, h, i);
  }
  [[nodiscard]] std::int64_t length(std::int64_t b) const { return length_(observers_, b); }

 private:
  const void* observers_ = nullptr;
  void (*load_)(const void*, std::int64_t, std::int64_t, std::int64_t, T, T*) = nullptr;
  observer_sum<T> (*sum_)(const void*, std::int64_t, std::int64_t, std::int64_t) = nullptr;
  std::int64_t (*length_)(const void*, std::int64_t) = nullptr;
};

/// Those of a group: of the query heads that share its core, the same of each.
template <class T>
struct group_observers {
  observers_ref<T> all{};
  std::int64_t b = 0;
  range heads{}, each{};

  [[nodiscard]] std::int64_t count() const { return heads.size() * each.size(); }
  [[nodiscard]] std::int64_t head(std::int64_t i) const { return heads.begin + i / each.size(); }
  [[nodiscard]] std::int64_t observer(std::int64_t i) const { return each.begin + i % each.size(); }
};

/// As many are scored side by side: a load of a key serves all of them.
inline constexpr std::int64_t observers_at_once = 4;

/// Room for them, a part of a worker's scratch memory: their queries, as wide as whole vectors, and their scores of a block
/// of rows.
template <class T>
struct observer_rows {
  T *queries, *scores;

  static constexpr std::int64_t size(std::int64_t dim) { return observers_at_once * (padded<T>(dim) + row_block); }

  observer_rows(T* scratch, std::int64_t dim)
      : queries(scratch), scores(scratch + observers_at_once * padded<T>(dim)) {}

  /// Loads observer `i` of a head.
  template <class Observers>
  void load(const Observers& from, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t dim, T factor,
            std::int64_t place) const {
    T* const to = queries + place * padded<T>(dim);
    from.load(b, h, i, factor, to);
    fill_n(to + dim, padded<T>(dim) - dim, T(0));
  }

  /// Scores of the first `some` queries and `rows` keys, query by query `row_block` apart, from `place` on in each. A score
  /// is the same to the bit whichever others are computed beside it.
  void score(std::int64_t some, row_span<T> keys, std::int64_t dim, std::int64_t rows, std::int64_t place = 0) const {
    if (some == observers_at_once)
      return dot_shared_rows<observers_at_once>(queries, padded<T>(dim), keys, dim, rows, scores + place, row_block,
                                               rows_ahead<T>(dim));
    for (std::int64_t q = 0; q < some; ++q)
      dot_rows(queries + q * padded<T>(dim), keys, dim, rows, scores + q * row_block + place);
  }
};

}}}  // namespace cca::CCA_TARGET::detail
