#pragma once

#include <cstdint>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../context/visible.hpp"
#include "../simd/convert.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "amx.hpp"
#include "multiply_pairs.hpp"
#include "operands.hpp"
#include "pairs.hpp"
#include "sixteen_bit_parts.hpp"
#include "staged_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Memory of a backward stack: the rows of its queries and of the gradients of their outputs; for a block of rows `P` and
/// `dS` as elements `[row][lane of the stack]`, and `dS` of one tile in pairs of rows.
template <class Element>
class sixteen_bit_gradients {
  using visible_lanes = whole_part::visible_lanes;
  static constexpr std::int64_t lanes = sixteen_bit_shape::lanes, block = sixteen_bit_shape::gradient_block;

 public:
  static constexpr std::int64_t size(const tile_form& form, std::int64_t tiles) {
    return paired_rows<Element>::size(tiles * lanes, form.dim) +
           paired_rows<Element>::size(tiles * lanes, form.value_dim) + 2 * block * lanes + block * tiles * lanes +
           block / 2 * lanes + products_size(form);
  }

  sixteen_bit_gradients(float* scratch, const tile_form& form, std::int64_t tiles)
      : query(scratch, tiles * lanes, form.dim),
        grad_out(scratch + paired_rows<Element>::size(tiles * lanes, form.dim), tiles * lanes, form.value_dim),
        unit(form.unit),
        products(scratch + paired_rows<Element>::size(tiles * lanes, form.dim) +
                 paired_rows<Element>::size(tiles * lanes, form.value_dim)),
        stride_(tiles * lanes),
        scores_(products + products_size(form)),
        pairs_(reinterpret_cast<packed_pair*>(scores_ + 2 * block * lanes)),
        weights_(reinterpret_cast<std::uint16_t*>(pairs_ + block / 2 * lanes)),
        grad_scores_(weights_ + block * stride_),
        registers_(form.unit) {}

  /// @{
  /// As in `vectors`.
  [[nodiscard]] score_block<float> scores(const whole_part&, range, std::int64_t) const { return {scores_, lanes}; }
  [[nodiscard]] score_block<float> grad_weights(const whole_part&, range, std::int64_t) const {
    return {scores_ + block * lanes, lanes};
  }
  void clear(range rows, std::int64_t c) const {
    for (std::int64_t j = 0; j < whole_units(rows.end - chunk_begin(rows.begin)); ++j)
      for (std::uint16_t* of : {weights_, grad_scores_})
        fill_n(of + j * stride_ + c * lanes, lanes, std::uint16_t{0});
  }
  void add_to_rows(range rows, const visible_lanes* seen, float* grad_key, std::int64_t key_stride, float* grad_value,
                   std::int64_t value_stride) const {
    add_to(query, grad_scores_, rows, seen, grad_key, key_stride);
    add_to(grad_out, weights_, rows, seen, grad_value, value_stride);
  }
  /// @}

  /// Elements of `P` or `dS` of a part of tile `c`, and the pairs of the tile.
  [[nodiscard]] std::int64_t place(const whole_part& part, range rows, std::int64_t c) const {
    return (part.rows.begin - chunk_begin(rows.begin)) * stride_ + c * lanes;
  }
  [[nodiscard]] std::uint16_t* weights() const { return weights_; }
  [[nodiscard]] std::uint16_t* grad_scores() const { return grad_scores_; }
  [[nodiscard]] packed_pair* pairs() const { return pairs_; }
  [[nodiscard]] std::int64_t stride() const { return stride_; }

  paired_rows<Element> query, grad_out;
  matrix_unit unit;
  float* products;

 private:
  static constexpr std::int64_t products_size(const tile_form& form) {
    return larger(block, lanes) * larger(whole_units(form.dim), whole_units(form.value_dim));
  }

  /// `to[j] += sum_i factors[j][i] * of[i]` for the rows `rows` of a block.
  void add_to(const paired_rows<Element>& of, const std::uint16_t* factors, range rows, const visible_lanes* seen,
              float* to, std::int64_t to_stride) const {
    range seeing;
    for (std::int64_t c = 0; c < stride_ / lanes; ++c)
      if (!intersection(rows, seen[c].seen_by_any()).empty()) seeing = hull(seeing, {c * lanes, (c + 1) * lanes});
    if (seeing.empty()) return;
    const std::int64_t begin = chunk_begin(rows.begin), dim = of.dim(), row_size = whole_units(dim);
    multiply<Element>(unit, {factors + seeing.begin, stride_}, of.pairs(seeing.begin), products, row_size,
                      whole_units(rows.end - begin), dim, seeing.size());
    const float one = 1.0f;
    for (std::int64_t j = rows.begin; j < rows.end; ++j)
      add_weighted_rows(&one, row_span<float>{products + (j - begin) * row_size, 0}, dim, 1, 1.0f,
                        to + (j - rows.begin) * to_stride);
    of.for_each_infinite([&](std::int64_t i, const Element* row) {
      for (std::int64_t j = rows.begin; j < rows.end; ++j)
        if (seen[i / lanes].lane[i % lanes].contains(j)) {
          const float factor = element_of<Element>(factors[(j - begin) * stride_ + i], false);
          for (std::int64_t d = 0; d < dim; ++d)
            to[(j - rows.begin) * to_stride + d] += factor * element_cast<float>(row[d]);
        }
    });
  }

  std::int64_t stride_;
  float* scores_;
  packed_pair* pairs_;
  std::uint16_t *weights_, *grad_scores_;
  tile_registers registers_;
};

}}}  // namespace cca::CCA_TARGET::detail
