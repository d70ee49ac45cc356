#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "mass.hpp"

namespace policies {

/// Dynamic Group Attention: what matters stays raw, the rest is pooled. Zhang et al., Curse of High Dimensionality
/// Issue in Transformer for Long-context Modeling, arXiv 2505.22107. The tokens of greatest importance are *focal*;
/// the others are taken in groups of m in their order, and a group becomes one row, weighted by the importance of its
/// tokens. Until a query may see all of a group, it sees the group's tokens themselves, the *complementary* rows.
///
/// As far rows: first all tokens, of which those of a group are visible up to the group's last position, then the
/// pooled rows, visible from the next position on.
template <class T>
class dynamic_groups {
 public:
  /// @param importance  `[key/value heads][tokens]`, at least 0: what `add_mass` makes of the latest queries, for one
  /// @param focal  tokens that stay raw; those behind the last complete group do so, too
  dynamic_groups(view<const T> key, view<const T> value, const rows<double>& importance, std::int64_t focal,
                 std::int64_t group_size)
      : length_(key.length()),
        size_(group_size),
        groups_((length_ - std::min(focal, length_)) / group_size),
        key_(key.heads(), length_ + groups_, key.dim()),
        value_(key.heads(), length_ + groups_, value.dim()),
        from_(key.heads(), length_ + groups_, 1),
        until_(from_),
        member_(key.heads(), groups_ * group_size, 1),
        weight_(key.heads(), groups_ * group_size, 1) {
    for (std::int64_t h = 0; h < key.heads(); ++h) {
      for (std::int64_t j = 0; j < length_; ++j) {
        std::copy_n(key.row(0, h, j), key.dim(), key_.row(h, j));
        std::copy_n(value.row(0, h, j), value.dim(), value_.row(h, j));
        *from_.row(h, j) = j;
      }
      std::fill_n(until_.row(h, 0), until_.length, cca::unlimited);
      group(h, importance.row(h, 0), focal);
      pool(h);
    }
  }

  /// For `attend_far` and `attend_far_gradient`.
  [[nodiscard]] cca::far_context<T> context() const {
    cca::far_context<T> all{.key = key_.view(), .value = value_.view()};
    all.visible_from = from_.numbers();
    all.visible_until = until_.numbers();
    return all;
  }

  /// Rows of the far context, and a place for their gradients.
  [[nodiscard]] rows<T> rows_like_keys() const { return {key_.heads, key_.length, key_.dim}; }
  [[nodiscard]] rows<T> rows_like_values() const { return {value_.heads, value_.length, value_.dim}; }

  /// The gradient of the tokens from that of the far rows, keys or values: a pooled row's goes to its tokens by their
  /// weights, which are taken as given. The first rows of `grad` are those of the tokens afterwards.
  void to_tokens(rows<T>& grad) const {
    for (std::int64_t h = 0; h < grad.heads; ++h)
      for (std::int64_t i = 0; i < member_.length; ++i)
        for (std::int64_t d = 0; d < grad.dim; ++d)
          grad.row(h, *member_.row(h, i))[d] +=
              static_cast<T>(*weight_.row(h, i)) * grad.row(h, length_ + i / size_)[d];
  }

  /// Rows that the query at position t sees.
  [[nodiscard]] std::int64_t seen(std::int64_t h, std::int64_t t) const {
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < from_.length; ++j) count += *from_.row(h, j) <= t && t < *until_.row(h, j);
    return count;
  }

 private:
  /// Which tokens are in which group, and from when on it stands for them.
  void group(std::int64_t h, const double* importance, std::int64_t focal) {
    const auto raw = places_of_largest(importance, length_, focal);
    std::int64_t filled = 0;
    for (std::int64_t j = 0; j < length_ && filled < member_.length; ++j)
      if (!std::binary_search(raw.begin(), raw.end(), j)) {
        *member_.row(h, filled) = j;
        *weight_.row(h, filled++) = importance[j];
      }
    for (std::int64_t i = 0; i < member_.length; ++i) {
      const std::int64_t c = i / size_, next = *member_.row(h, (c + 1) * size_ - 1) + 1;
      *until_.row(h, *member_.row(h, i)) = *from_.row(h, length_ + c) = next;
    }
  }

  /// Makes the weights of a group's tokens sum to 1, equal ones where none has any importance, and its row.
  void pool(std::int64_t h) {
    for (std::int64_t c = 0; c < groups_; ++c) {
      double* const weight = weight_.row(h, c * size_);
      double sum = 0;
      for (std::int64_t i = 0; i < size_; ++i) sum += weight[i];
      for (std::int64_t i = 0; i < size_; ++i) {
        weight[i] = sum > 0 ? weight[i] / sum : 1 / static_cast<double>(size_);
        const std::int64_t j = *member_.row(h, c * size_ + i);
        for (std::int64_t d = 0; d < key_.dim; ++d)
          key_.row(h, length_ + c)[d] += static_cast<T>(weight[i]) * key_.row(h, j)[d];
        for (std::int64_t d = 0; d < value_.dim; ++d)
          value_.row(h, length_ + c)[d] += static_cast<T>(weight[i]) * value_.row(h, j)[d];
      }
    }
  }

  std::int64_t length_, size_, groups_;
  rows<T> key_, value_;
  rows<std::int64_t> from_, until_, member_;
  rows<double> weight_;
};

}  // namespace policies
