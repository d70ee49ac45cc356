#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "../../element.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../context/visible.hpp"
#include "../simd/convert.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../simd/wanted_memory.hpp"
#include "../softmax/lane_softmax.hpp"
#include "../softmax/score_rule.hpp"
#include "multiply_pairs.hpp"
#include "operands.hpp"
#include "pairs.hpp"
#include "sixteen_bit_gradients.hpp"
#include "sixteen_bit_parts.hpp"
#include "staged_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Packs rows of `dim` elements as pairs `[dim / 2][lanes]`, a lane for each of `count` rows, `dim` rounded up to whole
/// units with zeros. `load(i, d, n, to)` writes the n elements of row i from d on.
template <class Element, class Load>
void pack_lanes(std::int64_t count, std::int64_t dim, packed_pair* to, const Load& load) {
  constexpr std::int64_t lanes = sixteen_bit_shape::lanes, pairs = unit_depth / 2;
  alignas(scratch_alignment) packed_pair step[lanes * pairs] = {};
  for (std::int64_t d = 0; d < dim; d += unit_depth) {
    const std::int64_t n = smaller(unit_depth, dim - d);
    if (n < unit_depth) fill(std::begin(step), std::end(step), packed_pair{0});
    for (std::int64_t i = 0; i < count; ++i) load(i, d, n, reinterpret_cast<Element*>(step + i * pairs));
    transpose(step, pairs, to + d / 2 * lanes, lanes, lanes, pairs);
  }
}

/// Products of a matrix unit, which multiplies 16-bit elements as they are and adds in float. What lies between two
/// products, weights and gradients of scores, is rounded to the elements' type, in pairs of rows. Chunks of rows and lanes
/// that a unit takes at once are `unit_height` each; what a block lacks to whole chunks is zeros.
template <class Element>
struct sixteen_bits {
  using number = float;
  using element = Element;
  using shape = sixteen_bit_shape;
  using softmax = lane_softmax<float>;
  using visible_lanes = whole_part::visible_lanes;
  using vector = vec<float>;
  static constexpr std::int64_t W = width<float>, lanes = shape::lanes;
  static constexpr bool balances = is_bfloat16<Element>;  // which has the exponents of floats

  // ------------------------------------------------------------------------------------------------------- operands

  /// Floats that `pack` writes: pairs `[dim / 2][lanes]`.
  static constexpr std::int64_t packed_size(std::int64_t dim) { return whole_units(dim) / 2 * lanes; }

  /// As `vectors::pack`. A power of two, or a zero, does not round.
  static void pack(const Element* rows, std::int64_t stride, std::int64_t count, std::int64_t dim, float factor,
                   float* to) {
    pack_lanes<Element>(count, dim, reinterpret_cast<packed_pair*>(to),
                        [&](std::int64_t i, std::int64_t d, std::int64_t n, Element* row) {
                          if (factor == 1.0f)
                            std::memcpy(static_cast<void*>(row), rows + i * stride + d,
                                        static_cast<std::size_t>(n) * sizeof *row);
                          else
                            scale_row(rows + i * stride + d, n, factor, row);
                        });
  }

  /// Columns from row `j` of a block on, where a chunk begins.
  struct columns_from {
    const column_chunks<Element>* of;
    std::int64_t j;
  };

  /// Keys as rows, values as columns.
  class staged_block {
   public:
    static constexpr std::int64_t size(const tile_form& form, std::int64_t rows, bool) {
      return row_chunks<Element>::size(rows, form.dim) + column_chunks<Element>::size(rows, form.value_dim);
    }

    staged_block(float* scratch, const tile_form& form, std::int64_t rows, bool)
        : form_(form),
          keys_(scratch, form.dim),
          values_(scratch + row_chunks<Element>::size(rows, form.dim), rows, form.value_dim) {}

    void stage(const context_rows<Element, Element>& head, range rows) {
      rows_ = rows;
      keys_.stage({head.key, head.key_stride}, rows);
      values_.stage({head.value, head.value_stride}, rows);
    }

    [[nodiscard]] range rows() const { return rows_; }
    [[nodiscard]] element_rows keys(std::int64_t j) const { return keys_.chunk(j); }
    [[nodiscard]] columns_from value_columns(std::int64_t j) const { return {&values_, j}; }

   private:
    tile_form form_;
    row_chunks<Element> keys_;
    column_chunks<Element> values_;
    range rows_;
  };

  /// Keys as rows and as columns, values as rows.
  class staged_gradient_block {
   public:
    static constexpr std::int64_t size(const tile_form& form, std::int64_t rows, bool) {
      return row_chunks<Element>::size(rows, form.dim) + row_chunks<Element>::size(rows, form.value_dim) +
             column_chunks<Element>::size(rows, form.dim);
    }

    staged_gradient_block(float* scratch, const tile_form& form, std::int64_t rows, bool)
        : keys_(scratch, form.dim),
          values_(scratch + row_chunks<Element>::size(rows, form.dim), form.value_dim),
          columns_(
              scratch + row_chunks<Element>::size(rows, form.dim) + row_chunks<Element>::size(rows, form.value_dim),
              rows, form.dim) {}

    void stage(const context_rows<Element, Element>& head, range rows) {
      rows_ = rows;
      keys_.stage({head.key, head.key_stride}, rows);
      values_.stage({head.value, head.value_stride}, rows);
      columns_.stage({head.key, head.key_stride}, rows);
    }

    [[nodiscard]] range rows() const { return rows_; }
    [[nodiscard]] const row_chunks<Element>& keys(std::int64_t) const { return keys_; }
    [[nodiscard]] const row_chunks<Element>& values(std::int64_t) const { return values_; }
    [[nodiscard]] columns_from key_columns(std::int64_t j) const { return {&columns_, j}; }

   private:
    row_chunks<Element> keys_, values_;
    column_chunks<Element> columns_;
    range rows_;
  };

  template <class F>
  static void for_each_part(range rows, const visible_lanes& seen, std::int64_t count, const F& f) {
    const range some = intersection(rows, seen.seen_by_any());
    if (some.empty()) return;
    const std::int64_t begin = chunk_begin(some.begin);
    f(whole_part{{begin, begin + whole_units(some.end - begin)}, &seen, count});
  }

  // -------------------------------------------------------------------------------------------------------- weights

  /// Memory of a forward stack: scores `[block][lanes]`, weights in pairs of rows, and a block's share of the output
  /// `[value_dim][lanes]`.
  class stack_memory {
   public:
    static constexpr std::int64_t size(const tile_form& form, std::int64_t) {
      return (1 + shape::block + shape::block / 2 + whole_units(form.value_dim)) * lanes;
    }

    stack_memory(float* scratch, const tile_form& form, std::int64_t)
        : unit(form.unit),
          products(scratch),
          weights(reinterpret_cast<packed_pair*>(scratch + whole_units(form.value_dim) * lanes)),
          maximum_(products + (whole_units(form.value_dim) + shape::block / 2) * lanes),
          registers_(form.unit) {}

    [[nodiscard]] score_block<float> scores(const whole_part&) const { return {maximum_ + lanes, lanes, maximum_}; }

    matrix_unit unit;
    float* products;
    packed_pair* weights;

   private:
    float* maximum_;
    tile_registers registers_;
  };

  /// The weights of a part.
  struct weights {
    static constexpr std::int64_t rows_at_once = 2;
    static constexpr bool exact = false;
    packed_pair* at;

    weights(const stack_memory& memory, const staged_block&, const whole_part&, const score_block<float>&)
        : at(memory.weights) {}

    static CCA_INLINE vector exp2(vector x, const exp2_range<float>& range) { return exp2_rounded(x, range); }
    [[nodiscard]] CCA_INLINE vector put(std::int64_t j, std::int64_t n, const vector (&weight)[2]) const {
      const vec<packed_pair> both = round_to_pairs<Element>(weight[0], weight[1]);
      both.store_aligned(at + j / 2 * lanes + n * W);
      return elements_of<Element>(both, false) + elements_of<Element>(both, true);
    }
  };

  using gradient_memory = sixteen_bit_gradients<Element>;

  /// `P` and `dS` of a part.
  struct factors {
    static constexpr std::int64_t rows_at_once = 2;
    std::uint16_t *weights, *grad_scores;
    std::int64_t stride;
    packed_pair* at;

    factors(const gradient_memory& memory, const whole_part& part, range rows, std::int64_t c)
        : weights(memory.weights() + memory.place(part, rows, c)),
          grad_scores(memory.grad_scores() + memory.place(part, rows, c)),
          stride(memory.stride()),
          at(memory.pairs()) {}

    static CCA_INLINE vector exp2(vector x) { return exp2_rounded(x); }
    CCA_INLINE void put(std::int64_t j, std::int64_t n, const vector (&weight)[2],
                        const vector (&grad_score)[2]) const {
      vec<packed_pair> both[2];
      unroll<2>([&](auto r) CCA_INLINE_LAMBDA {
        both[r] = round_to_elements<Element>(grad_score[r]);
        store_elements(round_to_elements<Element>(weight[r]), weights + (j + r) * stride + n * W);
        store_elements(both[r], grad_scores + (j + r) * stride + n * W);
      });
      (both[0] | both[1] << 16).store_aligned(at + j / 2 * lanes + n * W);
    }
  };

  // ------------------------------------------------------------------------------------------------------- products

  /// As `vectors::score`.
  static void score(const stack_memory& memory, const staged_block& block, const whole_part& part,
                    const tile_form& form, const score_rule<float>&, const float* packed, const score_block<float> to,
                    wanted_memory& wanted) {
    for (std::int64_t j = part.rows.begin; j < part.rows.end; j += chunk_rows) {
      for (std::int64_t i = 0; i < chunk_rows; ++i) wanted.ask();
      multiply<Element>(memory.unit, block.keys(j), {reinterpret_cast<const packed_pair*>(packed), lanes},
                        to.at(j - part.rows.begin, 0), lanes, chunk_rows, lanes, form.dim);
    }
    if (part.all_seen()) return mask_scores<whole_part::vectors>(part, to, 0, unmasked{});
    for (std::int64_t n = 0; n < whole_part::vectors; ++n)
      part.with_mask(n, [&](const auto& mask) { mask_scores<1>(part, to, n, mask); });
  }

  /// As `vectors::multiply_rows`.
  static void multiply_rows(const whole_part& part, const row_chunks<Element>& rows, std::int64_t dim,
                            const float* packed, matrix_unit unit, const score_block<float>& to, wanted_memory& wanted) {
    for (std::int64_t j = part.rows.begin; j < part.rows.end; j += chunk_rows) {
      for (std::int64_t i = 0; i < chunk_rows; ++i) wanted.ask();
      multiply<Element>(unit, rows.chunk(j), {reinterpret_cast<const packed_pair*>(packed), lanes},
                        to.at(j - part.rows.begin, 0), lanes, chunk_rows, lanes, dim);
    }
  }

  /// As `vectors::add`, of weights in pairs of rows.
  static constexpr bool add_asks = false;
  template <class Memory>
  static void add(const Memory& memory, const whole_part& part, const columns_from& columns, std::int64_t dim,
                  const packed_pair* weights, const float* rescale, float* sum, const wanted_memory&) {
    multiply<Element>(memory.unit, columns.of->columns(columns.j), {weights, lanes}, memory.products, lanes, dim, lanes,
                      part.rows.size());
    vector factor[extent(whole_part::vectors)];
    unroll<whole_part::vectors>([&](auto n) CCA_INLINE_LAMBDA {
      factor[n] = rescale != nullptr ? vector::load_aligned(rescale + n * W) : vector(1.0f);
    });
    for (std::int64_t d = 0; d < dim; ++d)  // row by row: columns share cache sets
      unroll<whole_part::vectors>([&](auto n) CCA_INLINE_LAMBDA {
        const std::int64_t i = d * lanes + n * W;
        fma<float>(vector::load_aligned(sum + i), factor[n], vector::load_aligned(memory.products + i))
            .store_aligned(sum + i);
      });
    columns.of->for_each_infinite(part.rows, [&](std::int64_t j, const Element* row) {
      const std::int64_t i = j - part.rows.begin;
      for (std::int64_t lane = 0; lane < part.count; ++lane)
        if (part.seen->lane[lane].contains(j)) {
          const float weight = element_of<Element>(weights[i / 2 * lanes + lane], i % 2 != 0);
          for (std::int64_t d = 0; d < dim; ++d) sum[d * lanes + lane] += weight * element_cast<float>(row[d]);
        }
    });
  }

 private:
  /// Hides what `N` vectors from `n` on do not see, and finds their maxima.
  template <std::int64_t N, class Mask>
  static void mask_scores(const whole_part& part, const score_block<float> to, std::int64_t n, const Mask& mask) {
    const vector none(-infinity<float>);
    vector maximum[extent(N)];
    unroll<N>([&](auto i) CCA_INLINE_LAMBDA { maximum[i] = none; });
    for (std::int64_t j = 0; j < part.rows.size(); ++j)
      unroll<N>([&](auto i) CCA_INLINE_LAMBDA {
        const vector x = mask.select(j, vector::load_aligned(to.at(j, n + i)), none);
        if constexpr (!std::is_same_v<Mask, unmasked>) x.store_aligned(to.at(j, n + i));
        maximum[i] = (xsimd::max)(maximum[i], x);
      });
    unroll<N>([&](auto i) CCA_INLINE_LAMBDA { maximum[i].store_aligned(to.maximum + (n + i) * W); });
  }
};

}}}  // namespace cca::CCA_TARGET::detail
