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

// Operands of 8 bits, four at a time along what is added up: a signed byte of a row times an unsigned one of a lane.

/// Four neighbouring bytes, the first in the lowest bits.
using packed_quad = std::uint32_t;

/// `n` rounded up to whole quads.
[[nodiscard]] constexpr std::int64_t whole_quads(std::int64_t n) { return (n + 3) / 4 * 4; }

/// Rows of keys, signed. `scale` turns the product of row `i` into numbers, `start[i]` is where its sum begins: queries are
/// 128 more than they stand for.
struct byte_keys {
  const std::int8_t* data = nullptr;
  std::int64_t stride = 0;
  const float* scale = nullptr;
  const std::int32_t* start = nullptr;

  [[nodiscard]] constexpr byte_keys from(std::int64_t row) const {
    return {data + row * stride, stride, scale + row, start + row};
  }
};

/// Queries in lanes, `[steps][stride]`, and what turns the product of a lane into numbers.
struct byte_queries {
  const packed_quad* data = nullptr;
  std::int64_t stride = 0, steps = 0;
  const float* scale = nullptr;

  [[nodiscard]] constexpr byte_queries from(std::int64_t lane) const {
    return {data + lane, stride, steps, scale + lane};
  }
};

/// Where `unit * score + exponent[row]` goes, `[row][stride]`, and the largest of it in each lane.
struct byte_scores {
  float* data = nullptr;
  std::int64_t stride = 0;
  float* maximum = nullptr;
  const float* exponent = nullptr;
  float unit = 1;

  [[nodiscard]] constexpr byte_scores from(std::int64_t row, std::int64_t lane) const {
    return {data + row * stride + lane, stride, maximum + lane, exponent + row, unit};
  }
};

/// Columns of values, signed, `[steps][stride]`: a quad holds element `d` of four consecutive values.
struct byte_columns {
  const packed_quad* data = nullptr;
  std::int64_t stride = 0;

  [[nodiscard]] constexpr byte_columns from(std::int64_t d) const { return {data + d, stride}; }
};

/// Weights in lanes, unsigned, four rows in a quad, `[rows / 4][stride]`; and what turns sums of each lane into numbers.
struct byte_weights {
  packed_quad* data = nullptr;
  std::int64_t stride = 0;
  float* share = nullptr;

  [[nodiscard]] constexpr byte_weights from(std::int64_t lane) const { return {data + lane, stride, share + lane}; }
};

/// Where `to * rescale + share * (columns weights)` goes, `[d][stride of the weights]`; `steps` quads are added up.
struct byte_sums {
  float* data = nullptr;
  const float* rescale = nullptr;
  std::int64_t steps = 0;
};

}}}  // namespace cca::CCA_TARGET::detail
