#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../simd/dot.hpp"
#include "../softmax/score_rule.hpp"
#include "observers.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Gradients of one head's keys and values: where row 0 lies, and strides.
template <class T>
struct gradient_rows {
  T* key;
  std::int64_t key_stride;
  T* value;
  std::int64_t value_stride;

  [[nodiscard]] T* key_row(std::int64_t i) const { return key + i * key_stride; }
  [[nodiscard]] T* value_row(std::int64_t i) const { return value + i * value_stride; }
};

/// `sum[d] += row[d] * factor` for d in `[0, dim)`, across element types.
template <class T, class Row>
void add_scaled_row(const Row* row, std::int64_t dim, T factor, T* sum) {
  if constexpr (in_place<T, Row>) return add_weighted_rows(&factor, {row, 0}, dim, 1, T(1), sum);
  constexpr std::int64_t block = 64;
  T converted[block];
  for (std::int64_t d = 0; d < dim; d += block) {
    const std::int64_t count = smaller(block, dim - d);
    convert(row + d, count, converted);
    add_weighted_rows(&factor, {converted, 0}, count, 1, T(1), sum + d);
  }
}

/// A key and a value that are summed, as wide as whole vectors.
template <class T>
struct core_row {
  T *key, *value;
};

/// What a pooling works with, a view of a worker's scratch memory: the mean query and its gradient, a core, its gradient,
/// scores of a block of rows, room for observers, and the block where it is converted. Every row is read once on the way there, twice on the
/// way back: that is bound by reading `group_size * (dim + value_dim)` elements.
template <class T>
class group_rows {
 public:
  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim, bool staged) {
    return 4 * padded<T>(dim) + 2 * padded<T>(value_dim) + 2 * row_block + observer_rows<T>::size(dim) +
           (staged ? row_block * (dim + value_dim) : 0);
  }

  group_rows(T* scratch, std::int64_t key_size, std::int64_t value_size, const score_rule<T>& by)
      : dim(key_size),
        value_dim(value_size),
        rule(by),
        query(scratch),
        grad_query(query + padded<T>(dim)),
        core{grad_query + padded<T>(dim), grad_query + 3 * padded<T>(dim)},
        grad_core{core.key + padded<T>(dim), core.value + padded<T>(value_dim)},
        weights(grad_core.value + padded<T>(value_dim)),
        grad_weights(weights + row_block),
        observer(grad_weights + row_block, dim),
        staged_keys_(grad_weights + row_block + observer_rows<T>::size(dim)),
        staged_values_(staged_keys_ + row_block * dim) {}

  void clear() { fill(query, weights, T(0)); }

  /// Before another try at a core.
  void clear_sums() {
    fill_n(query, padded<T>(dim), T(0));
    fill_n(core.key, padded<T>(dim), T(0));
    fill_n(core.value, padded<T>(value_dim), T(0));
  }

  /// Calls `f(first row, keys, count)` for blocks of the rows `rows` of a head.
  template <class Key, class Value, class F>
  void for_each_key_block(const context_rows<Key, Value>& head, range rows, const F& f) {
    for (std::int64_t j = rows.begin; j < rows.end; j += row_block) {
      const std::int64_t count = smaller(row_block, rows.end - j);
      f(j, staged_keys(head, j, count), count);
    }
  }

  /// Calls `f(first row, keys, values, count)` for the same blocks.
  template <class Key, class Value, class F>
  void for_each_block(const context_rows<Key, Value>& head, range rows, const F& f) {
    for_each_key_block(head, rows, [&](std::int64_t j, row_span<T> keys, std::int64_t count) {
      f(j, keys, staged_values(head, j, count), count);
    });
  }

  /// Makes row `i` of a head the core.
  template <class Key, class Value>
  void take(const context_rows<Key, Value>& head, std::int64_t i) {
    copy_n(staged_keys(head, i, 1).row(0), dim, core.key);
    copy_n(staged_values(head, i, 1).row(0), value_dim, core.value);
  }

  std::int64_t dim, value_dim;
  score_rule<T> rule;
  T *query, *grad_query;
  core_row<T> core, grad_core;
  T *weights, *grad_weights;
  observer_rows<T> observer;
  group_observers<T> observers{};  ///< of the group, for a pooling that asks them
  bool with_entropy = false;  ///< of the weights: whether it is asked for
  T grad_bias = T(0);         ///< its gradient

 private:
  template <class Key, class Value>
  [[nodiscard]] row_span<T> staged_keys(const context_rows<Key, Value>& head, std::int64_t first, std::int64_t count) {
    const context_rows<Key, Value> from = head.from(first);
    return stage_numbers(from.key, from.key_stride, from.key_scales, dim, count, staged_keys_);
  }
  template <class Key, class Value>
  [[nodiscard]] row_span<T> staged_values(const context_rows<Key, Value>& head, std::int64_t first,
                                          std::int64_t count) {
    const context_rows<Key, Value> from = head.from(first);
    return stage_numbers(from.value, from.value_stride, from.value_scales, value_dim, count, staged_values_);
  }

  T *staged_keys_, *staged_values_;
};

}}}  // namespace cca::CCA_TARGET::detail
