#pragma once

#include <cstdint>
#include <utility>

#include "../../element.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "source.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Bytes of a key and a value, and of their scales where they have some.
template <class Element>
constexpr std::int64_t row_bytes(std::int64_t dim, std::int64_t value_dim) {
  constexpr std::int64_t scales = is_q8<Element> ? 2 * sizeof(float) : 0;
  return (dim + value_dim) * static_cast<std::int64_t>(sizeof(Element)) + scales;
}

/// Rows of keys and values of all heads of a sequence, `[head][capacity][dim]` each, and of rows of 8 bits the scales,
/// `[head][capacity]`. A row beyond what was written holds nothing yet.
template <class Element>
class row_store {
 public:
  row_store() = default;
  row_store(std::int64_t heads, std::int64_t dim, std::int64_t value_dim)
      : heads_(heads), dim_(dim), value_dim_(value_dim) {}

  [[nodiscard]] std::int64_t heads() const { return heads_; }
  [[nodiscard]] std::int64_t capacity() const { return capacity_; }
  [[nodiscard]] std::size_t bytes() const {
    return keys_.bytes() + values_.bytes() + key_scales_.bytes() + value_scales_.bytes();
  }

  [[nodiscard]] Element* key(std::int64_t head, std::int64_t row) const {
    return reinterpret_cast<Element*>(keys_.data()) + (head * capacity_ + row) * dim_;
  }
  [[nodiscard]] Element* value(std::int64_t head, std::int64_t row) const {
    return reinterpret_cast<Element*>(values_.data()) + (head * capacity_ + row) * value_dim_;
  }

  /// @{
  /// The scale of a row of 8 bits; of others there are none, null.
  [[nodiscard]] float* key_scale(std::int64_t head, std::int64_t row) const { return scale(key_scales_, head, row); }
  [[nodiscard]] float* value_scale(std::int64_t head, std::int64_t row) const {
    return scale(value_scales_, head, row);
  }
  /// @}

  /// The rows of a head from row `first` on.
  [[nodiscard]] context_rows<Element, Element> rows(std::int64_t head, std::int64_t first) const {
    context_rows<Element, Element> rows{key(head, first), dim_, value(head, first), value_dim_};
    if constexpr (is_q8<Element>) {
      rows.key_scales = {key_scale(head, first), 1};
      rows.value_scales = {value_scale(head, first), 1};
    }
    return rows;
  }

  /// Makes room for `count` rows, at least doubling but not beyond `limit`, and keeps what is there. Nothing has changed when
  /// memory is not to be had.
  void reserve(std::int64_t count, std::int64_t limit) {
    if (count <= capacity_) return;
    row_store grown(heads_, dim_, value_dim_);
    grown.capacity_ = larger(count, smaller(2 * capacity_, limit));
    grown.keys_ = aligned_memory(scratch_bytes<Element>(heads_ * grown.capacity_ * dim_));
    grown.values_ = aligned_memory(scratch_bytes<Element>(heads_ * grown.capacity_ * value_dim_));
    for (aligned_memory* scales : {&grown.key_scales_, &grown.value_scales_})
      if (is_q8<Element>) *scales = aligned_memory(scratch_bytes<float>(heads_ * grown.capacity_));
    for (std::int64_t h = 0; h < heads_ && capacity_ > 0; ++h) grown.copy_rows(h, 0, rows(h, 0), capacity_);
    *this = std::move(grown);
  }

  /// Overwrites `count` rows of a head from row `first` on.
  template <class Key, class Value>
  void copy_rows(std::int64_t head, std::int64_t first, const context_rows<Key, Value>& from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      copy_n(from.key + i * from.key_stride, dim_, key(head, first + i));
      copy_n(from.value + i * from.value_stride, value_dim_, value(head, first + i));
      if constexpr (is_q8<Element>) {
        *key_scale(head, first + i) = from.key_scales[i];
        *value_scale(head, first + i) = from.value_scales[i];
      }
    }
  }

 private:
  [[nodiscard]] float* scale(const aligned_memory& scales, std::int64_t head, std::int64_t row) const {
    return is_q8<Element> ? reinterpret_cast<float*>(scales.data()) + head * capacity_ + row : nullptr;
  }

  std::int64_t heads_ = 0, dim_ = 0, value_dim_ = 0, capacity_ = 0;
  aligned_memory keys_, values_, key_scales_, value_scales_;
};

/// The newest tokens' rows in a ring, of the tokens from `first` on: token t lies in row `(t - first) % capacity`. While
/// the capacity grows nothing has wrapped around yet, so that every token keeps its row.
template <class Element>
class row_ring : public row_store<Element> {
 public:
  row_ring(std::int64_t heads, std::int64_t dim, std::int64_t value_dim, std::int64_t first)
      : row_store<Element>(heads, dim, value_dim), first_(first) {}

  /// Consecutive tokens as they lie: token t of the first piece in row `row + t - first.begin`, of the second piece in row
  /// `t - second.begin`.
  struct pieces {
    range first, second;
    std::int64_t row = 0;
  };

  [[nodiscard]] pieces find(range tokens) const {
    if (tokens.empty()) return {};
    const std::int64_t row = (tokens.begin - first_) % this->capacity();
    const std::int64_t wrap = smaller(tokens.end, tokens.begin + this->capacity() - row);
    return {{tokens.begin, wrap}, {wrap, tokens.end}, row};
  }

  /// Overwrites the rows of `tokens`, of which `from(head)` are the rows.
  template <class From>
  void write(range tokens, const From& from) {
    const pieces at = find(tokens);
    for (std::int64_t h = 0; h < this->heads(); ++h) {
      const auto rows = from(h);
      this->copy_rows(h, at.row, rows, at.first.size());
      this->copy_rows(h, 0, rows.from(at.first.size()), at.second.size());
    }
  }

 private:
  std::int64_t first_;
};

}}}  // namespace cca::CCA_TARGET::detail
