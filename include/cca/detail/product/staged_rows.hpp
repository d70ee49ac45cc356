#pragma once

#include <cstdint>
#include <cstring>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../simd/convert.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "operands.hpp"
#include "pairs.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// Rows of keys or values in the forms in which matrix units take them, made once per block for all tiles of a stack. Chunks
// begin at multiples of their length, whatever the block; rows of a chunk that the block does not reach are zeros.

/// Rows that a unit scores at once.
inline constexpr std::int64_t chunk_rows = unit_height;

/// The first row of the chunk that holds row `j`.
[[nodiscard]] constexpr std::int64_t chunk_begin(std::int64_t j) { return j - j % chunk_rows; }

/// As they lie, for sums along the dim: where they are if that is a whole number of units, otherwise copied and padded.
template <class Element>
class row_chunks {
 public:
  /// Scratch floats for blocks of `rows` rows.
  static constexpr std::int64_t size(std::int64_t rows, std::int64_t dim) { return rows * whole_units(dim) / 2; }

  row_chunks(float* scratch, std::int64_t dim)
      : copies_(reinterpret_cast<std::uint16_t*>(scratch)), dim_(dim), stride_(whole_units(dim)) {}

  void stage(row_span<Element> rows, range block) {
    rows_ = rows;
    block_ = block;
    for (std::int64_t j = chunk_begin(block.begin); j < block.end; j += chunk_rows)
      if (!in_place(j)) copy(j);
  }

  /// The chunk that begins at row `j`.
  [[nodiscard]] element_rows chunk(std::int64_t j) const {
    if (in_place(j)) return {reinterpret_cast<const std::uint16_t*>(rows_.row(j)), rows_.stride};
    return {copy_of(j), stride_};
  }

 private:
  [[nodiscard]] bool in_place(std::int64_t j) const {
    return dim_ == stride_ && block_.begin <= j && j + chunk_rows <= block_.end;
  }
  [[nodiscard]] std::uint16_t* copy_of(std::int64_t j) const {
    return copies_ + (j - chunk_begin(block_.begin)) * stride_;
  }

  void copy(std::int64_t j) {
    for (std::int64_t i = j; i < j + chunk_rows; ++i) {
      std::uint16_t* to = copy_of(i);
      std::int64_t count = 0;
      if (block_.contains(i)) {
        count = dim_;
        std::memcpy(to, rows_.row(i), static_cast<std::size_t>(dim_) * sizeof *to);
      }
      fill(to + count, to + stride_, std::uint16_t{0});
    }
  }

  std::uint16_t* copies_;
  std::int64_t dim_, stride_;
  row_span<Element> rows_;
  range block_;
};

/// Transposed, a row for each element, for sums along the rows. Rows that hold an infinity or a NaN are left out: times a
/// weight of 0 they would reach queries that do not see them. Whoever multiplies adds them to the lanes that see them.
template <class Element>
class column_chunks {
 public:
  /// Scratch floats for blocks of `rows` rows.
  static constexpr std::int64_t size(std::int64_t rows, std::int64_t dim) {
    const std::int64_t columns = whole_units(dim);
    return rows / 2 * columns + chunk_rows / 2 * columns + columns / 2;
  }

  column_chunks(float* scratch, std::int64_t rows, std::int64_t dim)
      : columns_(reinterpret_cast<packed_pair*>(scratch)),
        interleaved_(columns_ + rows / 2 * whole_units(dim)),
        zeros_(reinterpret_cast<std::uint16_t*>(interleaved_ + chunk_rows / 2 * whole_units(dim))),
        dim_(dim),
        stride_(rows / 2) {
    fill_n(zeros_, whole_units(dim), std::uint16_t{0});
  }

  void stage(row_span<Element> rows, range block) {
    rows_ = rows;
    block_ = block;
    infinite_ = {};
    for (std::int64_t j = chunk_begin(block.begin); j < block.end; j += chunk_rows) transpose_chunk(j);
  }

  /// From row `j` on, where a chunk begins.
  [[nodiscard]] element_rows columns(std::int64_t j) const {
    return {reinterpret_cast<const std::uint16_t*>(column_of(j)), 2 * stride_};
  }

  /// Calls `f(j, row j)` for every row of `rows` that is left out.
  template <class F>
  void for_each_infinite(range rows, const F& f) const {
    const range some = intersection(rows, infinite_);
    for (std::int64_t j = some.begin; j < some.end; ++j)
      if (!all_finite_elements(rows_.row(j), dim_)) f(j, rows_.row(j));
  }

 private:
  [[nodiscard]] packed_pair* column_of(std::int64_t j) const { return columns_ + (j - chunk_begin(block_.begin)) / 2; }

  /// The row to be multiplied in place of row `j`.
  [[nodiscard]] const std::uint16_t* finite_row(std::int64_t j) {
    if (!block_.contains(j)) return zeros_;
    if (all_finite_elements(rows_.row(j), dim_)) return reinterpret_cast<const std::uint16_t*>(rows_.row(j));
    infinite_ = hull(infinite_, {j, j + 1});
    return zeros_;
  }

  void transpose_chunk(std::int64_t j) {
    for (std::int64_t i = 0; i < chunk_rows; i += 2)
      interleave(finite_row(j + i), finite_row(j + i + 1), dim_, interleaved_ + i / 2 * dim_);
    transpose(interleaved_, dim_, column_of(j), stride_, chunk_rows / 2, dim_);
  }

  packed_pair *columns_, *interleaved_;
  std::uint16_t* zeros_;
  std::int64_t dim_, stride_;
  row_span<Element> rows_;
  range block_, infinite_;
};

/// The rows of the queries of a stack in pairs of queries, `[queries / 2][dim]`: what gradients of keys and values are
/// summed from. Rows that are not finite are left out, as in `column_chunks`.
template <class Element>
class paired_rows {
 public:
  /// Elements are kept as well as their pairs.
  static constexpr std::int64_t size(std::int64_t count, std::int64_t dim) { return count * whole_units(dim); }

  paired_rows(float* scratch, std::int64_t count, std::int64_t dim)
      : rows_(reinterpret_cast<Element*>(scratch)),
        pairs_(reinterpret_cast<packed_pair*>(scratch) + count / 2 * whole_units(dim)),
        count_(count),
        dim_(dim),
        stride_(whole_units(dim)) {}

  [[nodiscard]] Element* row(std::int64_t i) const { return rows_ + i * stride_; }

  [[nodiscard]] std::int64_t dim() const { return dim_; }

  /// Takes in `count` rows, `row_of(i)`; zeros follow.
  template <class Row>
  void load(std::int64_t count, const Row& row_of) {
    infinite_ = {};
    std::memset(static_cast<void*>(rows_), 0, static_cast<std::size_t>(count_ * stride_) * sizeof *rows_);
    for (std::int64_t i = 0; i < count; ++i) {
      convert(row_of(i), dim_, row(i));
      if (!all_finite_elements(row(i), dim_)) infinite_ = hull(infinite_, {i, i + 1});
    }
    for (std::int64_t i = 0; i < count_; i += 2) {
      packed_pair* to = pairs_ + i / 2 * stride_;
      interleave(reinterpret_cast<const std::uint16_t*>(row(i)), reinterpret_cast<const std::uint16_t*>(row(i + 1)),
                 stride_, to);
      for (const std::int64_t odd : {0, 1})
        if (infinite_.contains(i + odd) && !all_finite_elements(row(i + odd), dim_))
          for (std::int64_t d = 0; d < stride_; ++d) to[d] &= odd != 0 ? packed_pair{0xffff} : packed_pair{0xffff0000};
    }
  }

  /// From query `i` on, an even number.
  [[nodiscard]] pair_rows pairs(std::int64_t i) const { return {pairs_ + i / 2 * stride_, stride_}; }

  /// Calls `f(i, row i)` for the rows that are left out.
  template <class F>
  void for_each_infinite(const F& f) const {
    for (std::int64_t i = infinite_.begin; i < infinite_.end; ++i)
      if (!all_finite_elements(row(i), dim_)) f(i, row(i));
  }

 private:
  Element* rows_;
  packed_pair* pairs_;
  std::int64_t count_, dim_, stride_;
  range infinite_;
};

}}}  // namespace cca::CCA_TARGET::detail
