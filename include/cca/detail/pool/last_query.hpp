#pragma once

#include <cstdint>
#include <limits>
#include <numbers>

#include "../base/numbers.hpp"
#include "../softmax/row_softmax.hpp"
#include "group_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// `w = softmax_j(scale * q . k_j)`, `core_k = sum_j w_j k_j`, `core_v = sum_j w_j v_j`, with the scale of `pooling_rule`
/// and the mean `q` of the queries of the group's last token. A group whose logits are all -inf has no core: NaN, not a token of zeros that later queries see.
/// Source: arXiv 2412.12465, section 3.1.
template <class T>
class last_query_pooling {
 public:
  static constexpr bool has_weights = true;

  explicit last_query_pooling(group_rows<T>& group, int headroom = 0) : group_(group), headroom_(headroom) {}

  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& head, range rows) {
    group_.for_each_block(head, rows, [&](std::int64_t, row_span<T> keys, row_span<T> values, std::int64_t count) {
      dot_rows(group_.query, keys, group_.dim, count, group_.weights);
      if (group_.with_entropy) copy_n(group_.weights, count, group_.grad_weights);
      const row_softmax<T> before = softmax_;
      const T rescale = softmax_.absorb(group_.weights, count, unit(), headroom_);
      if (group_.with_entropy) add_depths(before, rescale, count);
      add_weighted_rows(group_.weights, keys, group_.dim, count, rescale, group_.core.key);
      add_weighted_rows(group_.weights, values, group_.value_dim, count, rescale, group_.core.value);
    });
  }

  /// What turns the sums into the core.
  [[nodiscard]] T share(std::int64_t) const { return softmax_.sum == T(0) ? not_a_number<T> : softmax_.inverse(); }

  /// `-sum_j w_j log w_j = log(sum) + sum_j w_j (maximum - l_j)`, two sums without cancellation.
  [[nodiscard]] T entropy(std::int64_t) const {
    if (softmax_.sum == T(0)) return not_a_number<T>;
    return std::numbers::ln2_v<T> * (log2(softmax_.sum) + unit() * depths_ * softmax_.inverse());
  }

  /// With `dc_k`, `dc_v` the core's gradients and `w` the weights,
  ///
  ///     dw_j = dc_k . k_j + dc_v . v_j    dl_j = w_j (dw_j - sum_i w_i dw_i)
  ///     dk_j += w_j dc_k + scale dl_j q   dv_j += w_j dc_v   dq += scale sum_j dl_j k_j
  ///
  /// and with `db` that of the entropy, `dw_j -= db l_j`.
  /// The rows are gone through twice, so that a group may be of any size: for the sums, then for the gradients.
  template <class Key, class Value>
  void differentiate(const context_rows<Key, Value>& head, const gradient_rows<T>& gradients, range rows) {
    T *const weights = group_.weights, *const grads = group_.grad_weights;
    T mean = T(0);  // sum_j w_j dw_j
    group_.for_each_block(head, rows, [&](std::int64_t, row_span<T> keys, row_span<T> values, std::int64_t count) {
      score(keys, values, count);
      mean *= softmax_.absorb(weights, count, unit());
      for (std::int64_t j = 0; j < count; ++j) mean += weights[j] * grads[j];
    });
    mean *= softmax_.inverse();
    group_.for_each_block(
        head, rows, [&](std::int64_t first, row_span<T> keys, row_span<T> values, std::int64_t count) {
          score(keys, values, count);
          softmax_.share(weights, count, unit(), share(count));
          for (std::int64_t j = 0; j < count; ++j) {
            const T grad = grads[j] - mean;
            grads[j] = group_.rule.scale * weights[j] * grad;
            add_scaled_row(group_.grad_core.key, group_.dim, weights[j], gradients.key_row(first + j));
            // The query was multiplied by a part of the scale.
            add_scaled_row(group_.query, group_.dim, group_.rule.score_unit() * weights[j] * grad,
                           gradients.key_row(first + j));
            add_scaled_row(group_.grad_core.value, group_.value_dim, weights[j], gradients.value_row(first + j));
          }
          add_weighted_rows(grads, keys, group_.dim, count, T(1), group_.grad_query);
        });
  }

 private:
  [[nodiscard]] T unit() const { return group_.rule.unit_in_base_2(); }

  /// Scores, and the gradients of the weights.
  void score(row_span<T> keys, row_span<T> values, std::int64_t count) {
    dot_rows(group_.grad_core.key, keys, group_.dim, count, group_.weights);
    dot_rows(group_.grad_core.value, values, group_.value_dim, count, group_.grad_weights);
    for (std::int64_t j = 0; j < count; ++j) group_.grad_weights[j] += group_.weights[j];
    dot_rows(group_.query, keys, group_.dim, count, group_.weights);
    if (group_.grad_bias == T(0)) return;
    for (std::int64_t j = 0; j < count; ++j)  // a token of the weight 0 has no part in the entropy
      if (group_.weights[j] != -infinity<T>)
        group_.grad_weights[j] -= group_.grad_bias * group_.rule.score_unit() * group_.weights[j];
  }

  /// Adds a block to `depths_`: its weights are in `weights`, its scores in `grad_weights`.
  void add_depths(const row_softmax<T>& before, T rescale, std::int64_t count) {
    if (before.sum != T(0)) depths_ = rescale * (depths_ + (softmax_.maximum - before.maximum) * before.sum);
    for (std::int64_t j = 0; j < count; ++j)
      if (group_.weights[j] != T(0)) depths_ += group_.weights[j] * (softmax_.maximum - group_.grad_weights[j]);
  }

  group_rows<T>& group_;
  int headroom_;
  row_softmax<T> softmax_;
  T depths_ = T(0);  // weighted: by how much scores are below the maximum
};

}}}  // namespace cca::CCA_TARGET::detail
