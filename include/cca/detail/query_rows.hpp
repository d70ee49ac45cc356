#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <utility>

#include "../partition.hpp"
#include "row.hpp"
#include "rows.hpp"
#include "source.hpp"

namespace cca::inline CCA_TARGET::detail {

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
    std::fill_n(out(), value_dim_, T(0));
  }

  /// Adds `count` rows: their logits in base 2, which turn into weights, and their values.
  void absorb(T* logits, row_span<T> values, std::int64_t count) {
    row_softmax<T> softmax = get();
    const T rescale = softmax.absorb(logits, count);
    put(softmax);
    add_weighted_rows(logits, values, value_dim_, count, rescale, out());
  }

  /// Joins another part of the same query's context; of a part that has seen nothing only the sum is looked at.
  void merge(const partial_result& other) {
    const row_softmax<T> a = get(), b = other.get();
    if (b.sum == T(0)) return;
    const T maximum = std::max(a.maximum, b.maximum);
    const T share_a = std::exp2(a.maximum - maximum), share_b = std::exp2(b.maximum - maximum);
    for (std::int64_t d = 0; d < value_dim_; ++d) out()[d] = out()[d] * share_a + other.out()[d] * share_b;
    put({maximum, a.sum * share_a + b.sum * share_b});
  }

  template <class Out>
  void finish(Out* to) const {
    scale_row(out(), value_dim_, get().inverse_sum(), to);
  }

  [[nodiscard]] T lse() const { return get().lse(); }

 private:
  [[nodiscard]] row_softmax<T> get() const { return {memory_[0], memory_[1]}; }
  void put(row_softmax<T> softmax) {
    memory_[0] = softmax.maximum;
    memory_[1] = softmax.sum;
  }
  [[nodiscard]] T* out() const { return memory_ + width<T>; }

  T* memory_;
  std::int64_t value_dim_;
};

/// A few queries of one sequence whose heads share rows: each block of rows is read from memory once, and the queries
/// take turns while it is in cache. The unit of work of decoding.
///
/// Cost of a row and query: `(dim + value_dim) / width` multiply-adds and a horizontal sum. Where few queries share a
/// row, reading its `dim + value_dim` elements takes longer.
template <class T>
class query_rows {
 public:
  static constexpr std::int64_t size(std::int64_t queries, std::int64_t dim, std::int64_t value_dim, bool staged) {
    return queries * padded<T>(dim) + row_block + (staged ? row_block * (dim + value_dim) : 0);
  }

  query_rows(T* scratch, std::int64_t queries, std::int64_t dim, std::int64_t value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        query_(scratch),
        logits_(query_ + queries * padded<T>(dim)),
        staged_keys_(logits_ + row_block),
        staged_values_(staged_keys_ + row_block * dim) {}

  /// Loads query `q`, `dim` elements.
  template <class Query>
  void load(std::int64_t q, const Query* query, T scale) {
    T* to = query_ + q * padded<T>(dim_);
    scale_row(query, dim_, scale * std::numbers::log2e_v<T>, to);
    std::fill(to + dim_, to + padded<T>(dim_), T(0));
  }

  /// Lets query `q` absorb the rows `seen` of a block of at most `row_block`, of which `keys` and `values` are the first.
  void absorb(std::int64_t q, row_span<T> keys, row_span<T> values, range seen, partial_result<T> result) {
    dot_rows(query_ + q * padded<T>(dim_), keys.from(seen.begin), dim_, seen.size(), logits_);
    result.absorb(logits_, values.from(seen.begin), seen.size());
  }

  /// The rows `block` of a head.
  template <class Key, class Value>
  [[nodiscard]] std::pair<row_span<T>, row_span<T>> block_of(const context_rows<Key, Value>& rows, range block) {
    return {stage(rows.key + block.begin * rows.key_stride, rows.key_stride, dim_, block.size(), staged_keys_),
            stage(rows.value + block.begin * rows.value_stride, rows.value_stride, value_dim_, block.size(),
                  staged_values_)};
  }

 private:
  std::int64_t dim_, value_dim_;
  T *query_, *logits_, *staged_keys_, *staged_values_;
};

}  // namespace cca::inline CCA_TARGET::detail
