#pragma once

#include <cstdint>
#include <utility>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "source.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Rows of keys and values of all heads of a sequence, `[head][capacity][dim]` each. A row beyond what was written holds
/// nothing yet.
template <class Element>
class row_store {
 public:
  row_store() = default;
  row_store(std::int64_t heads, std::int64_t dim, std::int64_t value_dim)
      : heads_(heads), dim_(dim), value_dim_(value_dim) {}

  [[nodiscard]] std::int64_t heads() const { return heads_; }
  [[nodiscard]] std::int64_t capacity() const { return capacity_; }
  [[nodiscard]] std::size_t bytes() const { return keys_.bytes() + values_.bytes(); }

  [[nodiscard]] Element* key(std::int64_t head, std::int64_t row) const {
    return reinterpret_cast<Element*>(keys_.data()) + (head * capacity_ + row) * dim_;
  }
  [[nodiscard]] Element* value(std::int64_t head, std::int64_t row) const {
    return reinterpret_cast<Element*>(values_.data()) + (head * capacity_ + row) * value_dim_;
  }

  /// The rows of a head from row `first` on.
  [[nodiscard]] context_rows<Element, Element> rows(std::int64_t head, std::int64_t first) const {
    return {key(head, first), dim_, value(head, first), value_dim_};
  }

  /// Makes room for `count` rows, at least doubling but not beyond `limit`, and keeps what is there. Nothing has changed when
  /// memory is not to be had.
  void reserve(std::int64_t count, std::int64_t limit) {
    if (count <= capacity_) return;
    row_store grown(heads_, dim_, value_dim_);
    grown.capacity_ = larger(count, smaller(2 * capacity_, limit));
    grown.keys_ = aligned_memory(scratch_bytes<Element>(heads_ * grown.capacity_ * dim_));
    grown.values_ = aligned_memory(scratch_bytes<Element>(heads_ * grown.capacity_ * value_dim_));
    for (std::int64_t h = 0; h < heads_ && capacity_ > 0; ++h) grown.copy_rows(h, 0, rows(h, 0), capacity_);
    *this = std::move(grown);
  }

  /// Overwrites `count` rows of a head from row `first` on.
  template <class Key, class Value>
  void copy_rows(std::int64_t head, std::int64_t first, const context_rows<Key, Value>& from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      copy_n(from.key + i * from.key_stride, dim_, key(head, first + i));
      copy_n(from.value + i * from.value_stride, value_dim_, value(head, first + i));
    }
  }

 private:
  std::int64_t heads_ = 0, dim_ = 0, value_dim_ = 0, capacity_ = 0;
  aligned_memory keys_, values_;
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
      auto rows = from(h);
      this->copy_rows(h, at.row, rows, at.first.size());
      rows.key += at.first.size() * rows.key_stride;
      rows.value += at.first.size() * rows.value_stride;
      this->copy_rows(h, 0, rows, at.second.size());
    }
  }

 private:
  std::int64_t first_;
};

}}}  // namespace cca::CCA_TARGET::detail
