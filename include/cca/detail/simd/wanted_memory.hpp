#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Rows in memory that nothing is read of: they may lie outside of any array.
struct memory_rows {
  std::uintptr_t first = 0, stride = 0;  ///< the address of the first, bytes from one to the next
  std::int64_t count = 0, bytes = 0;     ///< `bytes` of each

  memory_rows() = default;
  /// The rows `rows` of `dim` elements, of which row 0 lies at `data`.
  template <class T>
  memory_rows(const T* data, std::int64_t stride_, std::int64_t dim, range rows)
      : first(place_in_memory(data, rows.begin, stride_, 0)),
        stride(static_cast<std::uintptr_t>(stride_) * sizeof(T)),
        count(rows.size()),
        bytes(dim * static_cast<std::int64_t>(sizeof(T))) {}
};

/// Memory that is wanted soon: a queue of rows, for which products ask a few lines at a time. Memory answers while they run, and
/// no more is asked for than a core keeps in mind. Without it a window of 64 over 32K tokens took 1.3 times as long.
class wanted_memory {
 public:
  /// Forgets what was not asked for.
  void clear() { count_ = next_ = left_ = bytes_ = 0; }

  /// Appends rows. What a full queue has no place for is not asked for.
  void want(memory_rows rows) {
    if (rows.count <= 0 || rows.bytes <= 0 || count_ == most) return;
    if (rows.stride == static_cast<std::uintptr_t>(rows.bytes)) rows.bytes *= std::exchange(rows.count, 1);  // a long one
    rows.bytes = (rows.bytes + 63) / 64 * 64;
    bytes_ += rows.bytes * rows.count;
    rows_[count_++] = rows;
  }

  /// Begins to ask for what was appended. `asks` calls of `ask` are enough for all, if a core keeps that many lines in mind.
  /// Where each would have to ask for more than `least` lines, and there are `others` who can ask, too, they ask as often.
  void pace(std::int64_t asks, bool others) {
    const std::int64_t lines = (bytes_ + left_) / 64;
    hurried_ = others && lines > least * asks;
    pace_ = std::clamp<std::int64_t>(lines / larger<std::int64_t>(hurried_ ? 2 * asks : asks, 1) + 1, least, 32);
    if (left_ == 0) begin_row();
  }
  /// Whether the others ask.
  [[nodiscard]] bool hurried() const { return hurried_; }

  /// Asks for lines in the order in which they lie in memory: what a processor brings unasked is what follows. (Inline: for
  /// g++ a function that only asks for memory does nothing, and its calls go.)
  CCA_INLINE void ask() {
    next_lines([](std::uintptr_t address) CCA_INLINE_LAMBDA { prefetch(address); });
  }

  /// Calls `f(address)` for the lines that `ask` asks for.
  template <class F>
  CCA_INLINE void next_lines(const F& f) {
    for (std::int64_t i = 0; i < pace_ && left_ > 0; ++i) {
      f(at_);
      at_ += 64;
      left_ -= 64;
      if (left_ == 0) begin_row();
    }
  }

 private:
  static constexpr std::int64_t most = 8;   ///< those of two sources, queries and outputs
  static constexpr std::int64_t least = 4;  ///< lines of an `ask`

  CCA_INLINE void begin_row() {
    if (next_ == count_) return;
    memory_rows& rows = rows_[next_];
    at_ = rows.first;
    left_ = rows.bytes;
    bytes_ -= left_;
    rows.first += rows.stride;
    if (--rows.count == 0) ++next_;
  }

  memory_rows rows_[most];
  std::int64_t count_ = 0, next_ = 0;       ///< entries, and the one that the next row is of
  std::uintptr_t at_ = 0;                   ///< the next line
  std::int64_t left_ = 0, bytes_ = 0;       ///< bytes of its row that are not asked for yet, and behind the row
  std::int64_t pace_ = least;               ///< lines of an `ask`
  bool hurried_ = false;
};

}}}  // namespace cca::CCA_TARGET::detail
