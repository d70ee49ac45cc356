#pragma once

#include <cmath>
#include <cstdint>

#include "../base/numbers.hpp"
#include "group_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// `core_k = sum_j k_j / g`, `core_v = sum_j v_j / g`: an ablation of the paper.
template <class T>
class mean_pooling {
 public:
  static constexpr bool has_weights = true;

  explicit mean_pooling(group_rows<T>& group, int headroom = 0)
      : group_(group), weight_(detail::ldexp(T(1), -headroom)) {}

  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& head, range rows) {
    group_.for_each_block(head, rows, [&](std::int64_t, row_span<T> keys, row_span<T> values, std::int64_t count) {
      fill_n(group_.weights, count, weight_);
      add_weighted_rows(group_.weights, keys, group_.dim, count, T(1), group_.core.key);
      add_weighted_rows(group_.weights, values, group_.value_dim, count, T(1), group_.core.value);
    });
  }

  /// What turns the sums into the core of a group of `size` tokens.
  [[nodiscard]] T share(std::int64_t size) const { return T(1) / (weight_ * static_cast<T>(size)); }

  /// That of the weights, the logarithm of their number: no token has a part in it.
  [[nodiscard]] T entropy(std::int64_t size) const { return static_cast<T>(detail::log(static_cast<double>(size))); }

  /// `dk_j += dc_k / g`, `dv_j += dc_v / g`.
  template <class Key, class Value>
  void differentiate(const context_rows<Key, Value>&, const gradient_rows<T>& gradients, range rows) {
    const T weight = T(1) / static_cast<T>(rows.size());
    for (std::int64_t j = rows.begin; j < rows.end; ++j) {
      add_scaled_row(group_.grad_core.key, group_.dim, weight, gradients.key_row(j));
      add_scaled_row(group_.grad_core.value, group_.value_dim, weight, gradients.value_row(j));
    }
  }

 private:
  group_rows<T>& group_;
  T weight_;
};

}}}  // namespace cca::CCA_TARGET::detail
