#pragma once

#include <algorithm>
#include <cstdint>

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
  void clear() { count_ = next_ = band_ = left_ = bytes_ = 0; }

  /// Appends rows. What a full queue has no place for is not asked for.
  void want(memory_rows rows) {
    if (rows.count <= 0 || rows.bytes <= 0 || count_ == most) return;
    rows.bytes = (rows.bytes + 63) / 64 * 64;
    bytes_ += rows.bytes * rows.count;
    rows_[count_++] = rows;
  }

  /// Begins to ask for what was appended. `asks` calls of `ask` are enough for all, if a core keeps that many lines in mind.
  void pace(std::int64_t asks) {
    const std::int64_t lines = (bytes_ + left_ * band_) / 64;
    pace_ = std::clamp<std::int64_t>(lines / larger<std::int64_t>(asks, 1) + 1, 4, 32);
    if (band_ == 0) begin_band();
  }

  /// Asks for a line of each row of a band: side by side they were asked for faster than line after line of a row. (Inline: for
  /// g++ a function that only asks for memory does nothing, and its calls go.)
  CCA_INLINE void ask() {
    next_lines([](std::uintptr_t address) CCA_INLINE_LAMBDA { prefetch(address); });
  }

  /// Calls `f(address)` for the lines that `ask` asks for.
  template <class F>
  CCA_INLINE void next_lines(const F& f) {
    if (band_ == 0) return;
    std::uintptr_t at = at_;
    for (std::int64_t i = 0; i < band_; i += together)
      unroll<together>([&](auto) CCA_INLINE_LAMBDA { f(at), at += stride_; });
    at_ += 64;
    left_ -= 64;
    if (left_ <= 0) begin_band();
  }

 private:
  static constexpr std::int64_t most = 8;      ///< those of two sources, queries and outputs
  static constexpr std::int64_t together = 4;  ///< rows of a loop's step, and of a band a multiple: some behind are asked for, too

  CCA_INLINE void begin_band() {
    band_ = 0;
    if (next_ == count_) return;
    memory_rows& rows = rows_[next_];
    at_ = rows.first;
    stride_ = rows.stride;
    left_ = rows.bytes;
    const std::int64_t bands = (rows.count + pace_ - 1) / pace_;
    band_ = ((rows.count + bands - 1) / bands + together - 1) / together * together;
    rows.first += rows.stride * static_cast<std::uintptr_t>(band_);
    bytes_ -= left_ * smaller(band_, rows.count);
    if ((rows.count -= band_) <= 0) ++next_;
  }

  memory_rows rows_[most];
  std::int64_t count_ = 0, next_ = 0;    ///< entries, and the one that the next band is of
  std::uintptr_t at_ = 0, stride_ = 0;   ///< the line of the band's first row, bytes from row to row
  std::int64_t band_ = 0, left_ = 0;     ///< rows of the band, bytes of each that are not asked for yet
  std::int64_t bytes_ = 0, pace_ = 8;    ///< bytes behind the band, lines of an `ask`
};

}}}  // namespace cca::CCA_TARGET::detail
