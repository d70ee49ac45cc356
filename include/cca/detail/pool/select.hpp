#pragma once

#include <cstdint>

#include "../base/numbers.hpp"
#include "../simd/dot.hpp"
#include "group_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// `core_k = k_j`, `core_v = v_j` of the token with the largest logit `scale * q . k_j`, the first of equals: the limit
/// of `last_query_pooling` for large scales. Where a logit is NaN, or all are -inf, the core is NaN as it is there.
template <class T>
class select_pooling {
 public:
  static constexpr bool has_weights = false;

  explicit select_pooling(group_rows<T>& group, int = 0) : group_(group) {}

  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& head, range rows) {
    const T before = largest_;
    group_.for_each_key_block(head, rows, [&](std::int64_t first, row_span<T> keys, std::int64_t count) {
      for (std::int64_t j = 0; j < count; ++j) {
        // One row at a time: several are summed in another order, by which equal rows would no longer be equals.
        T score;
        dot_rows(group_.query, keys.from(j), group_.dim, 1, &score);
        if (score <= largest_ || is_nan(largest_)) continue;
        largest_ = score;
        selected_ = first + j;
      }
    });
    if (largest_ > before) group_.take(head, selected_);
  }

  /// What turns the token into the core.
  [[nodiscard]] T share(std::int64_t) const { return largest_ > -infinity<T> ? T(1) : not_a_number<T>; }

  /// `dk_j += dc_k`, `dv_j += dc_v` of the token alone: a small change of a number selects no other. Where the core is
  /// NaN, the gradients of the whole group are.
  template <class Key, class Value>
  void differentiate(const context_rows<Key, Value>& head, const gradient_rows<T>& gradients, range rows) {
    absorb(head, rows);
    const T weight = share(rows.size());
    const range receivers = is_nan(weight) ? rows : range{selected_, selected_ + 1};
    for (std::int64_t j = receivers.begin; j < receivers.end; ++j) {
      add_scaled_row(group_.grad_core.key, group_.dim, weight, gradients.key_row(j));
      add_scaled_row(group_.grad_core.value, group_.value_dim, weight, gradients.value_row(j));
    }
  }

 private:
  group_rows<T>& group_;
  T largest_ = -infinity<T>;  ///< of the scores so far; NaN as soon as one is
  std::int64_t selected_ = 0;
};

}}}  // namespace cca::CCA_TARGET::detail
