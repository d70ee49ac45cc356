#pragma once

#include <cstdint>

#include "../../element.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../context/visible.hpp"
#include "../simd/convert.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../simd/wanted_memory.hpp"
#include "../softmax/scaled_softmax.hpp"
#include "../softmax/score_rule.hpp"
#include "byte_rows.hpp"
#include "operands.hpp"
#include "sixteen_bit_parts.hpp"
#include "staged_bytes.hpp"
#include "vnni.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Sizes of the kernels of integers, as in `tile_shape`. Stacks are as large as second-level cache allows, for long and short
/// sequences: rounding a row costs as much as some ten queries of its products.
struct eight_bit_shape {
  static constexpr std::int64_t lanes = sixteen_bit_shape::lanes;
  static constexpr std::int64_t block = 256;
  static constexpr std::int64_t stack = 24, least_stack = stack;
  static constexpr std::int64_t budget = std::int64_t{3} << 18;
};

/// Products of integers of 8 bits, of operands of any type that are rounded to them: queries, keys and values row by row, the
/// weights of a block relative to the largest in their lane. The softmax is of floats.
///
/// Scores: `sum (q + 128) k = sum q k + 128 sum k`, for the unit multiplies unsigned bytes by signed ones; each row's share
/// of the 128 is where its sum begins. `s = q_scale k_scale sum q k`. Values: `sum p v = sum (p v_scale) bytes`: weights
/// take the scales of values in, so that nothing which a query does not see, a token to come least of all, has a say in how
/// what it sees is rounded.
struct eight_bits {
  using number = float;
  using shape = eight_bit_shape;
  using softmax = scaled_softmax;
  using visible_lanes = whole_part::visible_lanes;
  using vector = vec<float>;
  static constexpr std::int64_t W = width<float>, lanes = shape::lanes;
  static constexpr bool balances = true;

  // ------------------------------------------------------------------------------------------------------- operands

  /// Floats that `pack` writes: quads `[dim / 4][lanes]`, and a scale for each lane. Elements of a step are packed at once.
  static constexpr std::int64_t step = 64;
  static constexpr std::int64_t packed_size(std::int64_t dim) { return (quads_of(dim) + 1) * lanes; }

  /// As `vectors::pack`. A query that is not finite has the scale NaN.
  template <class Row>
  static void pack(const Row* rows, std::int64_t stride, std::int64_t count, std::int64_t dim, float factor,
                   float* to) {
    auto* quads = reinterpret_cast<packed_quad*>(to);
    float *const scales = to + quads_of(dim) * lanes, factors[lanes];
    fill_n(scales, lanes, 0.0f);
    for (std::int64_t i = 0; i < count; ++i) {
      prefetch_row(row_span<Row>{rows, stride}, i + 8, dim);
      const byte_scale scale = scale_of(rows + i * stride, dim, 0x1p-100f);
      factors[i] = scale.factor();
      scales[i] = scale.finite ? scale.scale * factor : not_a_number<float>;
    }
    alignas(scratch_alignment) packed_quad part[lanes * step / 4] = {};
    for (std::int64_t d = 0; d < dim; d += step, quads += step / 4 * lanes) {
      if (dim - d < step) fill_n(part, lanes * step / 4, packed_quad{0});
      for (std::int64_t i = 0; i < count; ++i)
        if (factors[i] != 0.0f)  // it is finite: others stay zeros
          put_bytes(rows + i * stride + d, smaller(step, dim - d), factors[i],
                    reinterpret_cast<std::int8_t*>(part + i * (step / 4)));
      transpose(part, step / 4, quads, lanes, lanes, step / 4);
      for (std::int64_t i = 0; i < step / 4 * lanes; i += W)
        (vec<packed_quad>::load_aligned(quads + i) ^ vec<packed_quad>(packed_quad{0x80808080}))
            .store_aligned(quads + i);
    }
  }

  using staged_block = staged_bytes;

  template <class F>
  static void for_each_part(range rows, const visible_lanes& seen, std::int64_t count, const F& f) {
    const range some = intersection(rows, seen.seen_by_any());
    if (some.empty()) return;
    const std::int64_t begin = staged_bytes::quad_begin(some.begin);
    f(whole_part{{begin, begin + whole_quads(some.end - begin)}, &seen, count});
  }

  // -------------------------------------------------------------------------------------------------------- weights

  /// Memory of a forward stack: scores `[block][lanes]` and their maxima, weights in quads of rows, and their shares.
  class stack_memory {
   public:
    static constexpr std::int64_t size(const tile_form&, std::int64_t) {
      return (2 + shape::block + shape::block / 4) * lanes;
    }

    stack_memory(float* scratch, const tile_form&, std::int64_t) : scratch_(scratch) {}

    [[nodiscard]] score_block<float> scores(const whole_part&) const { return {scratch_ + 2 * lanes, lanes, scratch_}; }
    [[nodiscard]] byte_weights weights() const {
      return {reinterpret_cast<packed_quad*>(scratch_ + (2 + shape::block) * lanes), lanes, scratch_ + lanes};
    }

   private:
    float* scratch_;
  };

  /// The weights of a part.
  struct weights {
    static constexpr std::int64_t rows_at_once = 4;
    byte_weights at;
    scaled_rows rows;

    weights(const stack_memory& memory, const staged_block& block, const whole_part& part, const score_block<float>&)
        : at(memory.weights()), rows(block.value_scales(part.rows.begin)) {}

    CCA_INLINE void put(std::int64_t j, std::int64_t n, const vector (&weight)[4]) const {
      (bits(weight[0]) | bits(weight[1]) << 8 | bits(weight[2]) << 16 | bits(weight[3]) << 24)
          .store_aligned(at.data + j / 4 * lanes + n * W);
    }
    CCA_INLINE void put_share(std::int64_t n, vector share) const { share.store_aligned(at.share + n * W); }

   private:
    /// A weight to nearest, up to 255.
    static CCA_INLINE vec<packed_quad> bits(vector weight) {
#if defined(__AVX512F__)
      return static_cast<__m512i>(_mm512_maskz_cvtps_epi32(0xffff, weight));
#else
      return cast_bits<packed_quad>(weight + vector(0x1.8p23f)) & vec<packed_quad>(packed_quad{0xff});
#endif
    }
  };

  // ------------------------------------------------------------------------------------------------------- products

  /// As `vectors::score`, but for what the scores are where the rule does not shape them, see `scaled_softmax`; and nothing is
  /// asked for.
  static void score(const stack_memory&, const staged_block& block, const whole_part& part, const tile_form& form,
                    const score_rule<float>& rule, const float* packed, const score_block<float> to, wanted_memory&) {
    const bool finite = !block.has_infinite_keys(part.rows), shaped = rule.shapes();
    const float unit = shaped ? 1.0f : rule.unit_in_base_2();
    const byte_queries queries{reinterpret_cast<const packed_quad*>(packed), lanes, whole_quads(form.dim) / 4,
                               packed + quads_of(form.dim) * lanes};
    const auto score_rows = [&](range rows, float* scores, float* maxima) {
      static constexpr float none[shape::block] = {};
      const float* exponents = shaped ? none : block.value_scales(rows.begin).exponent;
      score_bytes(block.keys(rows.begin), queries, {scores, lanes, maxima, exponents, unit}, rows.size());
    };
    fill_n(to.maximum, lanes, -infinity<float>);
    // Rows that all see have maxima as they are scored, others when it is hidden who does not see them.
    range common = finite ? intersection(part.rows, part.seen->seen_by_all()) : range{};
    if (common.empty()) common = {part.rows.end, part.rows.end};
    score_rows(common, to.at(common.begin - part.rows.begin, 0), to.maximum);
    for (const range edge : {range{part.rows.begin, common.begin}, range{common.end, part.rows.end}}) {
      if (edge.empty()) continue;
      const score_block<float> scores{to.at(edge.begin - part.rows.begin, 0), lanes, to.maximum};
      alignas(scratch_alignment) float of_all[lanes];
      fill_n(of_all, lanes, 0.0f);
      score_rows(edge, scores.data, of_all);
      if (!finite) score_infinite(block, part, queries, to, unit);
      hide_unseen(part, edge, scores);
    }
  }

  /// As `vectors::add`.
  static constexpr bool add_asks = false;
  static void add(const stack_memory&, const whole_part& part, const staged_bytes::columns_from& columns,
                  std::int64_t dim, const byte_weights& weights, const float* rescale, float* sum,
                  const wanted_memory&) {
    const std::int64_t begin = columns.j;
    const staged_bytes& block = *columns.of;
    add_bytes(block.columns(begin), weights, {sum, rescale, part.rows.size() / 4}, dim);
    block.for_each_infinite_value(part.rows, [&](std::int64_t j, std::int64_t d, float x) {
      const std::int64_t i = j - begin;
      const float value = x * (255.0f * block.value_scales(j - j % 4).inverse[j % 4]);
      for (std::int64_t lane = 0; lane < part.count; ++lane)
        if (part.seen->lane[lane].contains(j)) {
          const packed_quad weight = weights.data[i / 4 * lanes + lane] >> i % 4 * 8 & 0xff;
          sum[d * lanes + lane] += static_cast<float>(weight) * weights.share[lane] * value;
        }
    });
  }

 private:
  /// Quads of a row, in whole steps.
  static constexpr std::int64_t quads_of(std::int64_t dim) { return (dim + step - 1) / step * (step / 4); }

  /// Raises the maxima to those of what is seen of these rows.
  static void hide_unseen(const whole_part& part, range rows, const score_block<float>& scores) {
    constexpr std::int64_t N = smaller<std::int64_t>(whole_part::vectors, 4);  // as many as registers hold
    for (std::int64_t n = 0; n < whole_part::vectors; n += N) {
      lane_mask<float> masks[extent(N)];
      for (std::int64_t i = 0; i < N; ++i) masks[i] = {part.seen->lane + (n + i) * W, rows};
      raise_maxima<N>(scores, rows.size(), n, masks, [](vector x, std::int64_t) { return x; });
    }
  }

  /// Adds the scores of keys that are not finite, times `unit`, by what queries are rounded to.
  static void score_infinite(const staged_block& block, const whole_part& part, const byte_queries& queries,
                             const score_block<float>& to, float unit) {
    block.for_each_infinite_key(part.rows, [&](std::int64_t j, std::int64_t d, float x) {
      float* const scores = to.at(j - part.rows.begin, 0);
      for (std::int64_t lane = 0; lane < part.count; ++lane) {
        const packed_quad byte = queries.data[d / 4 * lanes + lane] >> d % 4 * 8 & 0xff;
        scores[lane] += unit * ((static_cast<float>(byte) - 128.0f) * queries.scale[lane] * x);
      }
    });
  }
};

}}}  // namespace cca::CCA_TARGET::detail
