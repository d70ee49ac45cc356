#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../context/visible.hpp"
#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Sizes of the kernels of matrix units, in rows and lanes of 16-bit elements, as in `tile_shape`.
struct sixteen_bit_shape {
  static constexpr std::int64_t lanes = 64;
  static constexpr std::int64_t block = 256;
  static constexpr std::int64_t least_stack = 1, stack = 8;
  static constexpr std::int64_t budget = std::int64_t{1} << 19;
  static constexpr std::int64_t gradient_block = 128, gradient_stack = 4;
  static constexpr std::int64_t gradient_budget = std::int64_t{1} << 20;
};

/// The part of a block that a tile sees, in whole chunks: a unit multiplies for all lanes at once, and each vector has a
/// mask of its own.
struct whole_part {
  using visible_lanes = lane_ranges<float, sixteen_bit_shape::lanes>;
  static constexpr std::int64_t vectors = sixteen_bit_shape::lanes / width<float>;
  static constexpr std::int64_t first = 0;
  range rows;
  const visible_lanes* seen;
  std::int64_t count;  ///< lanes that have a query

  /// Whether every lane sees every row.
  [[nodiscard]] bool all_seen() const { return intersection(seen->seen_by_all(), rows) == rows; }

  template <class F>
  void with_mask(std::int64_t n, const F& f) const {
    if (intersection(seen->all[n], rows) == rows)
      f(unmasked{});
    else
      f(lane_mask<float>(seen->lane + n * width<float>, rows));
  }
};

}}}  // namespace cca::CCA_TARGET::detail
