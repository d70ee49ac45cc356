#pragma once

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

/// Memory that is wanted soon: a queue, of which the products ask for a few lines at a time. Memory answers while they run, and
/// no more is asked for than a core keeps in mind. A window of 64 over 32K tokens took 1.3 times as long where nothing was
/// asked for.
class wanted_memory {
 public:
  void clear() { count_ = next_ = left_ = 0; }

  void want(memory_rows rows) {
    if (rows.count <= 0 || rows.bytes <= 0 || count_ == most) return;
    if (rows.stride == static_cast<std::uintptr_t>(rows.bytes)) {  // one long row
      rows.bytes *= rows.count;
      rows.count = 1;
    }
    rows_[count_++] = rows;
    if (left_ <= 0) begin_row();
  }

  /// Asks for the next lines. (Inline: for g++ a function that only asks for memory does nothing, and its calls go.)
  CCA_INLINE void ask() {
    unroll<2>([&](auto) CCA_INLINE_LAMBDA {
      if (left_ <= 0) return;
      unroll<lines>([&](auto i) CCA_INLINE_LAMBDA { prefetch(at_ + i() * 64); });
      at_ += lines * 64;
      left_ -= lines * 64;
      if (left_ <= 0) begin_row();
    });
  }

 private:
  static constexpr std::int64_t most = 8;  ///< entries: those of a stack's sources, queries and outputs
  static constexpr std::int64_t lines = 4;

  CCA_INLINE void begin_row() {
    if (next_ == count_) return;
    memory_rows& rows = rows_[next_];
    at_ = rows.first;
    left_ = rows.bytes;
    rows.first += rows.stride;
    if (--rows.count == 0) ++next_;
  }

  memory_rows rows_[most];
  std::int64_t count_ = 0, next_ = 0;
  std::uintptr_t at_ = 0;
  std::int64_t left_ = 0;  ///< bytes of the row that is asked for
};

}}}  // namespace cca::CCA_TARGET::detail
