#pragma once

#include <cstdint>

#include "../base/numbers.hpp"
#include "../simd/dot.hpp"
#include "../softmax/row_softmax.hpp"
#include "group_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// `core_k = k_j`, `core_v = v_j` of the token with the largest score, the first of equals. Where a score is NaN, or none is
/// above `Scores::least`, the core is NaN.
template <class T, class Scores>
class selecting_pooling {
 public:
  static constexpr bool has_weights = false;

  explicit selecting_pooling(group_rows<T>& group, int = 0) : group_(group) {}

  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& head, range rows) {
    const T before = largest_;
    group_.for_each_key_block(head, rows, [&](std::int64_t first, row_span<T> keys, std::int64_t count) {
      Scores::score(group_, keys, count, group_.weights);
      for (std::int64_t j = 0; j < count; ++j) {
        const T score = group_.weights[j];
        if (score <= largest_ || is_nan(largest_)) continue;
        largest_ = score;
        selected_ = first + j;
      }
    });
    if (largest_ > before) group_.take(head, selected_);
  }

  /// What turns the token into the core.
  [[nodiscard]] T share(std::int64_t) const { return largest_ > Scores::least ? T(1) : not_a_number<T>; }

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
  T largest_ = Scores::least;  ///< of the scores so far; NaN as soon as one is
  std::int64_t selected_ = 0;
};

/// `scale * q . k_j`: what selects the token of the largest weight of `last_query_pooling`, its limit for large scales.
template <class T>
struct logits_of_last_query {
  static constexpr T least = -infinity<T>;

  static void score(const group_rows<T>& group, row_span<T> keys, std::int64_t count, T* scores) {
    // One row at a time: several are summed in another order, by which equal rows would no longer be equals.
    for (std::int64_t j = 0; j < count; ++j) dot_rows(group.query, keys.from(j), group.dim, 1, scores + j);
  }
};

/// The sum of the observers' weights. It may be 0, where all are too small for a number; the first token is selected then.
template <class T>
struct masses_of_observers {
  static constexpr T least = T(-1);

  /// Observers are added one after the other in their order, whichever are scored side by side.
  static void score(const group_rows<T>& group, row_span<T> keys, std::int64_t count, T* masses) {
    const group_observers<T>& observers = group.observers;
    fill_n(masses, count, T(0));
    for (std::int64_t i = 0; i < observers.count(); i += observers_at_once) {
      const std::int64_t some = smaller(observers_at_once, observers.count() - i);
      for (std::int64_t q = 0; q < some; ++q)
        group.observer.load(observers.all, observers.b, observers.head(i + q), observers.observer(i + q), group.dim,
                            group.rule.query_factor(), q);
      group.observer.score(some, keys, group.dim, count);
      for (std::int64_t q = 0; q < some; ++q) {
        const auto [maximum, inverse] =
            observers.all.sum(observers.b, observers.head(i + q), observers.observer(i + q));
        T* const weights = group.observer.scores + q * row_block;
        row_softmax<T>{{maximum}}.share(weights, count, group.rule.unit_in_base_2(), inverse);
        for (std::int64_t j = 0; j < count; ++j) masses[j] += weights[j];
      }
    }
  }
};

template <class T>
using select_pooling = selecting_pooling<T, logits_of_last_query<T>>;
template <class T>
using select_by_mass_pooling = selecting_pooling<T, masses_of_observers<T>>;

}}}  // namespace cca::CCA_TARGET::detail
