#pragma once

#include <cstdint>

#include "../base/target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Two neighbouring 16-bit elements, the first in the lower half: what matrix units multiply and add at once.
using packed_pair = std::uint32_t;

/// Rows, lanes and elements that a unit takes at a time: twice a tile of AMX, 16 rows of 64 bytes, either way.
inline constexpr std::int64_t unit_height = 32;
inline constexpr std::int64_t unit_depth = 32;

/// `n` rounded up to what a unit takes at a time.
[[nodiscard]] constexpr std::int64_t whole_units(std::int64_t n) {
  return (n + unit_height - 1) / unit_height * unit_height;
}

/// Rows of elements, as they lie in memory. What is added along the row has zeros up to whole units.
struct element_rows {
  const std::uint16_t* data = nullptr;
  std::int64_t stride = 0;

  [[nodiscard]] const std::uint16_t* row(std::int64_t i) const { return data + i * stride; }
};

/// Rows of pairs, one pair per lane; zeros up to whole units, as above.
struct pair_rows {
  const packed_pair* data = nullptr;
  std::int64_t stride = 0;
};

}}}  // namespace cca::CCA_TARGET::detail
