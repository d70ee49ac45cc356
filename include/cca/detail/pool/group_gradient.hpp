#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <utility>

#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../pooling.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../simd/dot.hpp"
#include "../softmax/row_softmax.hpp"

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

/// The counterpart of `group_pooler`: takes the gradients of a core's key and value back to the rows that were pooled,
/// and to the queries that weighed them. With `dc_k`, `dc_v` the core's gradients and `w` the weights,
///
///     dw_j = dc_k . k_j + dc_v . v_j    dl_j = w_j (dw_j - sum_i w_i dw_i)
///     dk_j += w_j dc_k + scale dl_j q   dv_j += w_j dc_v   dq += scale sum_j dl_j k_j
///
/// The rows are gone through twice, a block at a time, so that a group may be of any size: once for the sums, once for
/// the gradients. Source: arXiv 2412.12465, section 3.1, differentiated.
template <class T>
class group_gradient {
 public:
  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim, bool staged) {
    return 4 * padded<T>(dim) + 2 * padded<T>(value_dim) + 2 * row_block + (staged ? row_block * (dim + value_dim) : 0);
  }

  group_gradient(T* scratch, std::int64_t dim, std::int64_t value_dim, const options& options)
      : dim_(dim),
        value_dim_(value_dim),
        pool_(options.pool),
        scale_(static_cast<T>(softmax_scale(options, dim)) * std::numbers::log2e_v<T>),
        query_(scratch),
        grad_query_(query_ + padded<T>(dim)),
        grad_key_(grad_query_ + padded<T>(dim)),
        maximum_key_(grad_key_ + padded<T>(dim)),
        grad_value_(maximum_key_ + padded<T>(dim)),
        maximum_value_(grad_value_ + padded<T>(value_dim)),
        weights_(maximum_value_ + padded<T>(value_dim)),
        grad_scores_(weights_ + row_block),
        staged_keys_(grad_scores_ + row_block),
        staged_values_(staged_keys_ + row_block * dim) {}

  /// Loads the gradients of the core.
  void begin(const T* grad_key, const T* grad_value) {
    std::fill(query_, weights_, T(0));
    std::copy_n(grad_key, dim_, grad_key_);
    std::copy_n(grad_value, value_dim_, grad_value_);
  }

  /// Adds one of the `count` queries of the group's last token, whose mean weighed the rows.
  template <class Query>
  void add_query(const Query* query, std::int64_t count) {
    add_scaled_row(query, dim_, scale_ / static_cast<T>(count), query_);
  }

  /// Adds to the gradients of the rows `group` of a head, and finds that of the queries' mean.
  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& rows, const gradient_rows<T>& gradients, range group) {
    if (pool_ == pooling::last_query) return through_softmax(rows, gradients, group);
    if (pool_ == pooling::max) return through_maximum(rows, gradients, group);
    const T weight = T(1) / static_cast<T>(group.size());
    for (std::int64_t j = group.begin; j < group.end; ++j) {
      add_scaled_row(grad_key_, dim_, weight, gradients.key_row(j));
      add_scaled_row(grad_value_, value_dim_, weight, gradients.value_row(j));
    }
  }

  /// Adds to the gradient of one of the `count` queries.
  void finish(T* grad_query, std::int64_t count) const {
    add_scaled_row(grad_query_, dim_, scale_ / static_cast<T>(count), grad_query);
  }

 private:
  template <class Key, class Value>
  void through_softmax(const context_rows<Key, Value>& rows, const gradient_rows<T>& gradients, range group) {
    row_softmax<T> softmax;
    T mean = T(0);  // sum_j w_j dw_j
    for_each_block(rows, group, [&](std::int64_t, row_span<T> keys, row_span<T> values, std::int64_t count) {
      score(keys, values, count);
      mean *= softmax.absorb(weights_, count);
      for (std::int64_t j = 0; j < count; ++j) mean += weights_[j] * grad_scores_[j];
    });
    mean *= softmax.inverse_sum();
    for_each_block(rows, group, [&](std::int64_t first, row_span<T> keys, row_span<T> values, std::int64_t count) {
      score(keys, values, count);
      weigh(softmax, count);
      for (std::int64_t j = 0; j < count; ++j) {
        // The query holds scale log2(e): ln(2) makes up for it.
        grad_scores_[j] = std::numbers::ln2_v<T> * weights_[j] * (grad_scores_[j] - mean);
        add_scaled_row(grad_key_, dim_, weights_[j], gradients.key_row(first + j));
        add_scaled_row(query_, dim_, grad_scores_[j], gradients.key_row(first + j));
        add_scaled_row(grad_value_, value_dim_, weights_[j], gradients.value_row(first + j));
      }
      add_weighted_rows(grad_scores_, keys, dim_, count, T(1), grad_query_);
    });
  }

  /// The gradient of an element goes to the first row that has the maximum, a NaN if there is one.
  template <class Key, class Value>
  void through_maximum(const context_rows<Key, Value>& rows, const gradient_rows<T>& gradients, range group) {
    std::fill_n(maximum_key_, dim_, -infinity<T>);
    std::fill_n(maximum_value_, value_dim_, -infinity<T>);
    for_each_block(rows, group, [&](std::int64_t, row_span<T> keys, row_span<T> values, std::int64_t count) {
      raise_to_rows(keys, dim_, count, maximum_key_);
      raise_to_rows(values, value_dim_, count, maximum_value_);
    });
    const auto give = [](const T* row, std::int64_t dim, const T* maximum, T* gradient, T* to) {
      for (std::int64_t d = 0; d < dim; ++d)
        if (row[d] == maximum[d] || row[d] != row[d]) to[d] += std::exchange(gradient[d], T(0));
    };
    for_each_block(rows, group, [&](std::int64_t first, row_span<T> keys, row_span<T> values, std::int64_t count) {
      for (std::int64_t j = 0; j < count; ++j) {
        give(keys.row(j), dim_, maximum_key_, grad_key_, gradients.key_row(first + j));
        give(values.row(j), value_dim_, maximum_value_, grad_value_, gradients.value_row(first + j));
      }
    });
  }

  /// Logits in base 2, and the gradients of the weights.
  void score(row_span<T> keys, row_span<T> values, std::int64_t count) {
    dot_rows(grad_key_, keys, dim_, count, weights_);
    dot_rows(grad_value_, values, value_dim_, count, grad_scores_);
    for (std::int64_t j = 0; j < count; ++j) grad_scores_[j] += weights_[j];
    dot_rows(query_, keys, dim_, count, weights_);
  }

  /// Turns logits into the weights of a softmax that has seen all of them.
  void weigh(const row_softmax<T>& softmax, std::int64_t count) {
    std::fill(weights_ + count, weights_ + row_block, -infinity<T>);
    const vec<T> base(softmax.maximum == -infinity<T> ? T(0) : softmax.maximum), share(softmax.inverse_sum());
    for (std::int64_t j = 0; j < count; j += width<T>)
      (exp2<T>(vec<T>::load_aligned(weights_ + j) - base) * share).store_aligned(weights_ + j);
  }

  /// Calls `f(first row, keys, values, count)` for blocks of rows.
  template <class Key, class Value, class F>
  void for_each_block(const context_rows<Key, Value>& rows, range group, const F& f) {
    for (std::int64_t j = group.begin; j < group.end; j += row_block) {
      const std::int64_t count = std::min(row_block, group.end - j);
      f(j, stage(rows.key + j * rows.key_stride, rows.key_stride, dim_, count, staged_keys_),
        stage(rows.value + j * rows.value_stride, rows.value_stride, value_dim_, count, staged_values_), count);
    }
  }

  std::int64_t dim_, value_dim_;
  pooling pool_;
  T scale_;
  T *query_, *grad_query_, *grad_key_, *maximum_key_, *grad_value_, *maximum_value_, *weights_, *grad_scores_;
  T *staged_keys_, *staged_values_;
};

}}}  // namespace cca::CCA_TARGET::detail
