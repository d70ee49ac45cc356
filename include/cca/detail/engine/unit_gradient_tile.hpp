#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <type_traits>

#include "../../partition.hpp"
#include "../context/row_span.hpp"
#include "../context/visible.hpp"
#include "../product/pairs.hpp"
#include "../product/unit_product.hpp"
#include "../product/unit_rows.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "unit_tile.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Sizes of the backward kernels of matrix units.
struct unit_gradient_shape {
  static constexpr std::int64_t block = 128;  ///< rows whose gradients are summed at once
  static constexpr std::int64_t stack = 4;    ///< tiles whose queries they are summed over
};

/// `factors`, `[row][lane]` elements, and the same in pairs of rows `[row / 2][lane]`: what a tile says of a block.
struct unit_factors {
  std::uint16_t* rows = nullptr;
  packed_pair* pairs = nullptr;
};

/// A tile of queries that goes backward, like `gradient_tile`, for operands of 16 bits and a matrix unit. The weights `P`
/// and the gradients `dS` of the logits are computed in float and rounded to the operands' type for the products that
/// follow. In the notation of `gradient_tile`, `dQ = scale dS^T K` here.
///
/// The tile is a view of scratch memory, `size(form)` floats: queries and gradients of the output in pairs
/// `[dim / 2][lanes]`, gradients of the queries `[dim][lanes]`, log-sum-exp in base 2 and `delta` `[lanes]`.
template <class Element>
class unit_gradient_tile {
  static constexpr std::int64_t W = width<float>;
  using vector = vec<float>;

 public:
  static constexpr std::int64_t lanes = unit_shape::lanes;
  using lane_ranges = detail::lane_ranges<float, lanes>;

  static constexpr std::int64_t size(const tile_form& form) {
    return (whole_units(form.dim) / 2 + whole_units(form.value_dim) / 2 + form.dim + 2) * lanes;
  }

  unit_gradient_tile(float* scratch, const tile_form& form, std::int64_t count)
      : form_(form),
        count_(count),
        query_(reinterpret_cast<packed_pair*>(scratch)),
        grad_out_(query_ + whole_units(form.dim) / 2 * lanes),
        grad_query_(reinterpret_cast<float*>(grad_out_ + whole_units(form.value_dim) / 2 * lanes)),
        lse_(grad_query_ + form.dim * lanes),
        delta_(lse_ + lanes) {}

  [[nodiscard]] std::int64_t count() const { return count_; }

  /// Loads rows of queries and of gradients of the output.
  void begin(row_span<Element> query, row_span<Element> grad_out) {
    const auto pack = [&](row_span<Element> rows, std::int64_t dim, packed_pair* to) {
      pack_lanes<Element>(count_, dim, to, [&](std::int64_t i, std::int64_t d, std::int64_t n, Element* row) {
        std::memcpy(static_cast<void*>(row), rows.row(i) + d, static_cast<std::size_t>(n) * sizeof *row);
      });
    };
    pack(query, form_.dim, query_);
    pack(grad_out, form_.value_dim, grad_out_);
    std::fill(grad_query_, delta_ + lanes, 0.0f);
  }

  /// As `gradient_tile::set`.
  void set(std::int64_t i, float lse, float delta) {
    lse_[i] = lse == -infinity<float> ? 0.0f : lse * std::numbers::log2e_v<float>;
    delta_[i] = delta;
  }

  /// Computes `P` and `dS` of a chunk of keys and values that begins at row `j`. `weights` and `grad_scores` are those of the
  /// chunk, whose rows are `stride` lanes apart; the pairs of weights are not asked for.
  void absorb(element_rows keys, element_rows values, std::int64_t j, const lane_ranges& visible, float scale,
              float* scores, std::uint16_t* weights, const unit_factors& grad_scores, std::int64_t stride) const {
    const range rows{j, j + chunk_rows};
    if (intersection(rows, visible.seen_by_any()).empty()) {
      for (std::int64_t i = 0; i < chunk_rows; ++i) {
        std::fill_n(weights + i * stride, lanes, std::uint16_t{0});
        std::fill_n(grad_scores.rows + i * stride, lanes, std::uint16_t{0});
      }
      std::fill_n(grad_scores.pairs, chunk_rows / 2 * lanes, packed_pair{0});
      return;
    }
    float* grad_weights = scores + chunk_rows * lanes;
    multiply<Element>(form_.unit, keys, {query_, lanes}, scores, lanes, chunk_rows, lanes, form_.dim);
    multiply<Element>(form_.unit, values, {grad_out_, lanes}, grad_weights, lanes, chunk_rows, lanes, form_.value_dim);
    for (std::int64_t lane = 0; lane < lanes; lane += W) {
      const unit_factors to{grad_scores.rows + lane, grad_scores.pairs + lane};
      if (intersection(visible.all[lane / W], rows) == rows)
        differentiate(scores, lane, unmasked{}, scale, weights + lane, to, stride);
      else
        differentiate(scores, lane, lane_mask<float>(visible.lane + lane, rows), scale, weights + lane, to, stride);
    }
  }

  /// `grad_query += keys^T grad_scores`, over `rows` rows.
  void add_keys(element_rows columns, const packed_pair* grad_scores, std::int64_t rows, float* products) {
    multiply<Element>(form_.unit, columns, {grad_scores, lanes}, products, lanes, form_.dim, lanes, rows);
    for (std::int64_t i = 0; i < form_.dim * lanes; i += W)
      (vector::load_aligned(grad_query_ + i) + vector::load_aligned(products + i)).store_aligned(grad_query_ + i);
  }

  /// The same of row `j` alone, whose key is not finite, for the lanes that see it.
  void add_infinite(const packed_pair* grad_scores, bool odd, const Element* key, std::int64_t j,
                    const lane_ranges& visible) {
    for (std::int64_t lane = 0; lane < count_; ++lane)
      if (visible.lane[lane].contains(j)) {
        const float grad_score = element_of<Element>(grad_scores[lane], odd);
        for (std::int64_t d = 0; d < form_.dim; ++d)
          grad_query_[d * lanes + lane] += grad_score * static_cast<float>(key[d]);
      }
  }

  /// Writes `count` rows of `dim` elements: the gradients of the queries.
  void finish(float* grad_query, std::int64_t stride, float scale) {
    for (float* g = grad_query_; g < lse_; g += W) (vector(scale) * vector::load_aligned(g)).store_aligned(g);
    transpose(grad_query_, lanes, grad_query, stride, form_.dim, count_);
  }

 private:
  /// `P = exp(S - lse)` and `dS = P (dP - delta)` for a vector of lanes, 0 where nothing is seen.
  template <class Mask>
  void differentiate(const float* scores, std::int64_t lane, const Mask& mask, float scale, std::uint16_t* weights,
                     const unit_factors& grad_scores, std::int64_t stride) const {
    const vector factor(scale * std::numbers::log2e_v<float>), lse = vector::load_aligned(lse_ + lane);
    const vector delta = vector::load_aligned(delta_ + lane), none(0.0f);
    const float* grad_weights = scores + chunk_rows * lanes;
    for (std::int64_t i = 0; i < chunk_rows; i += 2) {
      vec<packed_pair> both[2];
      unroll<2>([&](auto odd) CCA_INLINE_LAMBDA {
        const std::int64_t at = (i + odd) * lanes + lane;
        vector weight = exp2_rounded(fma<float>(vector::load_aligned(scores + at), factor, -lse));
        vector grad_score = weight * (vector::load_aligned(grad_weights + at) - delta);
        if constexpr (!std::is_same_v<Mask, unmasked>) {
          weight = mask.select(i + odd, weight, none);
          grad_score = mask.select(i + odd, grad_score, none);
        }
        both[odd] = round_to_elements<Element>(grad_score);
        store_elements(round_to_elements<Element>(weight), weights + (i + odd) * stride);
        store_elements(both[odd], grad_scores.rows + (i + odd) * stride);
      });
      (both[0] | both[1] << 16).store_aligned(grad_scores.pairs + i / 2 * lanes);
    }
  }

  tile_form form_;
  std::int64_t count_;
  packed_pair *query_, *grad_out_;
  float *grad_query_, *lse_, *delta_;
};

}}}  // namespace cca::CCA_TARGET::detail
