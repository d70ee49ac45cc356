#pragma once

#include <cstdint>

#include "../base/numbers.hpp"
#include "group_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// `core_k = max_j k_j`, `core_v = max_j v_j`, element by element: an ablation of the paper. A NaN enters and stays.
template <class T>
class max_pooling {
 public:
  static constexpr bool has_weights = false;

  explicit max_pooling(group_rows<T>& group, int = 0) : group_(group) {
    fill_n(group.core.key, group.dim, -infinity<T>);
    fill_n(group.core.value, group.value_dim, -infinity<T>);
  }

  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& head, range rows) {
    group_.for_each_block(head, rows, [&](std::int64_t, row_span<T> keys, row_span<T> values, std::int64_t count) {
      raise(keys, group_.dim, count, group_.core.key);
      raise(values, group_.value_dim, count, group_.core.value);
    });
  }

  [[nodiscard]] T share(std::int64_t) const { return T(1); }

  /// The gradient of an element goes to the first row that has the maximum, a NaN if there is one.
  template <class Key, class Value>
  void differentiate(const context_rows<Key, Value>& head, const gradient_rows<T>& gradients, range rows) {
    absorb(head, rows);
    const auto give = [](const T* row, std::int64_t dim, const T* maximum, T* gradient, T* to) {
      for (std::int64_t d = 0; d < dim; ++d)
        if (row[d] == maximum[d] || row[d] != row[d]) to[d] += exchange(gradient[d], T(0));
    };
    group_.for_each_block(
        head, rows, [&](std::int64_t first, row_span<T> keys, row_span<T> values, std::int64_t count) {
          for (std::int64_t j = 0; j < count; ++j) {
            give(keys.row(j), group_.dim, group_.core.key, group_.grad_core.key, gradients.key_row(first + j));
            give(values.row(j), group_.value_dim, group_.core.value, group_.grad_core.value,
                 gradients.value_row(first + j));
          }
        });
  }

 private:
  static void raise(row_span<T> rows, std::int64_t dim, std::int64_t count, T* maximum) {
    for (std::int64_t j = 0; j < count; ++j)
      for (std::int64_t d = 0; d < dim; ++d) {
        const T x = rows.row(j)[d];
        if (!(x <= maximum[d]) && maximum[d] == maximum[d]) maximum[d] = x;
      }
  }

  group_rows<T>& group_;
};

}}}  // namespace cca::CCA_TARGET::detail
