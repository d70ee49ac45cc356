#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <numbers>
#include <type_traits>
#include <utility>

#include "../../partition.hpp"
#include "../base/scratch.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../context/visible.hpp"
#include "../product/pairs.hpp"
#include "../product/unit_product.hpp"
#include "../product/unit_rows.hpp"
#include "../simd/convert.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../softmax/row_softmax.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Sizes of the kernels of matrix units, in rows and lanes of 16-bit elements.
struct unit_shape {
  static constexpr std::int64_t lanes = 64;
  static constexpr std::int64_t block = 256;  ///< rows whose weights are kept before they multiply values
  static constexpr std::int64_t least_stack = 1, stack = 8;
};

/// A block of keys and values for the tiles of a stack, and the memory that they share.
template <class Element>
class unit_block {
  static constexpr std::int64_t block = unit_shape::block, lanes = unit_shape::lanes;

 public:
  /// Scratch floats, whether or not rows have to be converted: a unit takes them as they are.
  static constexpr std::int64_t size(const tile_form& form, bool) {
    return (chunk_rows + block / 2 + whole_units(form.value_dim)) * lanes +
           unit_rows_block<Element>::size(block, form.dim) + unit_columns_block<Element>::size(block, form.value_dim);
  }

  unit_block(float* scratch, const tile_form& form)
      : registers_(form.unit),
        form_(form),
        scores_(scratch),
        weights_(reinterpret_cast<packed_pair*>(scores_ + chunk_rows * lanes)),
        products_(reinterpret_cast<float*>(weights_ + block / 2 * lanes)),
        keys_(products_ + whole_units(form.value_dim) * lanes, form.dim),
        values_(products_ + whole_units(form.value_dim) * lanes + unit_rows_block<Element>::size(block, form.dim),
                block, form.value_dim) {}

  /// Takes in the rows `rows` of a head, within one block.
  void stage(const context_rows<Element, Element>& head, range rows) {
    head_ = head;
    rows_ = rows;
    keys_.stage({head.key, head.key_stride}, rows);
    values_.stage({head.value, head.value_stride}, rows);
  }

  [[nodiscard]] range rows() const { return rows_; }
  [[nodiscard]] const unit_rows_block<Element>& keys() const { return keys_; }
  [[nodiscard]] const unit_columns_block<Element>& values() const { return values_; }

  /// @{
  /// Memory for logits `[chunk][lanes]`, for weights `[block / 2][lanes]` in pairs of rows, and for the block's share of the
  /// output `[value dim][lanes]`.
  [[nodiscard]] float* scores() const { return scores_; }
  [[nodiscard]] packed_pair* weights() const { return weights_; }
  [[nodiscard]] float* products() const { return products_; }
  /// @}

  /// Asks for the memory of the chunk that begins a block behind row `j`.
  void ask_ahead(std::int64_t j) const {
    const row_span<Element> keys{head_.key, head_.key_stride}, values{head_.value, head_.value_stride};
    for (std::int64_t i = j + block; i < j + block + chunk_rows; ++i) {
      prefetch_row(keys, i, form_.dim);
      prefetch_row(values, i, form_.value_dim);
    }
  }

 private:
  tile_registers registers_;
  tile_form form_;
  float* scores_;
  packed_pair* weights_;
  float* products_;
  unit_rows_block<Element> keys_;
  unit_columns_block<Element> values_;
  context_rows<Element, Element> head_{};
  range rows_;
};

/// Packs rows of `dim` elements as pairs `[dim / 2][lanes]`, a lane for each of `count` rows, `dim` rounded up to whole
/// units with zeros. `load(i, d, n, to)` writes the n elements of row i from d on.
template <class Element, class Load>
void pack_lanes(std::int64_t count, std::int64_t dim, packed_pair* to, const Load& load) {
  constexpr std::int64_t lanes = unit_shape::lanes, pairs = unit_depth / 2;
  alignas(scratch_alignment) packed_pair step[lanes * pairs] = {};
  for (std::int64_t d = 0; d < dim; d += unit_depth) {
    const std::int64_t n = std::min(unit_depth, dim - d);
    if (n < unit_depth) std::fill(std::begin(step), std::end(step), packed_pair{0});
    for (std::int64_t i = 0; i < count; ++i) load(i, d, n, reinterpret_cast<Element*>(step + i * pairs));
    transpose(step, pairs, to + d / 2 * lanes, lanes, lanes, pairs);
  }
}

/// A tile of queries like `query_tile`, for operands of 16 bits and a matrix unit: the same vertical softmax in float
/// between two products of the unit. A lane is a query, here too.
///
/// Logits come unscaled from the unit: the scale and log2(e) join the subtraction of the base in one multiply-add. Weights
/// are rounded to the operands' type, in pairs of rows.
///
/// The base of the weights is the maximum of the first rows that a lane visible, and is raised only when the maximum has grown
/// `slack` above it, by a whole number: powers of two change no bit of what was added before, and once a lane has seen a
/// chunk or two it hardly ever has to. What one lane sees never changes a bit of another.
///
/// Two sums are kept: that of the weights makes the log-sum-exp, that of the rounded weights, which multiply the values, is
/// what the output is divided by. So rows of equal values, and those that one key dominates, come out exactly.
///
/// The tile is a view of scratch memory, `size(form)` floats: queries in pairs `[dim / 2][lanes]`, output
/// `[value_dim][lanes]`; base, both sums, those of the block, the factor by which the block shrinks what was added before,
/// and the scale times log2(e) `[lanes]`.
template <class Element>
class unit_tile {
  static constexpr std::int64_t W = width<float>, chunk = chunk_rows;
  using vector = vec<float>;
  using lane_ranges = detail::lane_ranges<float, unit_shape::lanes>;

 public:
  using shape = unit_shape;
  using number = float;
  using shared = unit_block<Element>;
  static constexpr std::int64_t lanes = unit_shape::lanes;
  static constexpr float slack = 8;

  static constexpr std::int64_t size(const tile_form& form) {
    return (whole_units(form.dim) / 2 + form.value_dim + 7) * lanes;
  }

  unit_tile(float* scratch, const tile_form& form, std::int64_t count)
      : form_(form),
        count_(count),
        query_(reinterpret_cast<packed_pair*>(scratch)),
        out_(scratch + whole_units(form.dim) / 2 * lanes),
        base_(out_ + form.value_dim * lanes),
        sum_(base_ + lanes),
        multiplied_(sum_ + lanes),
        block_sum_(multiplied_ + lanes),
        block_multiplied_(block_sum_ + lanes),
        rescale_(block_multiplied_ + lanes),
        scale_(rescale_ + lanes) {}

  [[nodiscard]] std::int64_t count() const { return count_; }

  /// Loads `count` queries, rows of `dim` elements, and forgets what was absorbed.
  void begin(const Element* query, std::int64_t stride, float scale) {
    // The scale's size is for later; a sign, or a zero, does not round.
    const float sign = scale < 0 ? -1.0f : scale > 0 ? 1.0f : 0.0f;
    std::fill_n(scale_, lanes, sign == 0 ? 1.0f : std::abs(scale) * std::numbers::log2e_v<float>);
    pack_lanes<Element>(count_, form_.dim, query_, [&](std::int64_t i, std::int64_t d, std::int64_t n, Element* to) {
      if (sign == 1)
        std::memcpy(static_cast<void*>(to), query + i * stride + d, static_cast<std::size_t>(n) * sizeof *to);
      else
        scale_row(query + i * stride + d, n, sign, to);
    });
    std::fill(out_, base_, 0.0f);
    std::fill(base_, sum_, -infinity<float>);
    std::fill(sum_, block_sum_, 0.0f);
  }

  /// Absorbs what the queries see of a block. The first tile of a stack asks for the rows behind it.
  void absorb(const shared& block, const lane_ranges& visible, bool first) {
    const range rows = intersection(block.rows(), visible.seen_by_any());
    if (rows.empty()) return;
    const std::int64_t begin = chunk_begin(rows.begin);
    std::fill_n(rescale_, lanes, 1.0f);
    std::fill_n(block_sum_, 2 * lanes, 0.0f);
    for (std::int64_t j = begin; j < rows.end; j += chunk) {
      if (first) block.ask_ahead(j);
      multiply<Element>(form_.unit, block.keys().chunk(j), {query_, lanes}, block.scores(), lanes, chunk, lanes,
                        form_.dim);
      for (std::int64_t lane = 0; lane < lanes; lane += W) weigh(block, {j, j + chunk}, (j - begin) / 2, lane, visible);
    }
    add_values(block, begin, rows.end);
    block.values().for_each_infinite(rows, [&](std::int64_t j, const Element* value) {
      add_infinite(block.weights() + (j - begin) / 2 * lanes, (j - begin) % 2 != 0, value, j, visible);
    });
  }

  /// Writes `count` rows of `value_dim` elements: the weighted mean of the values, 0 where nothing was seen.
  template <class Out>
  void finish(Out* out, std::int64_t stride) {
    divide_lanes(out_, multiplied_, lanes, form_.value_dim);
    transpose(out_, lanes, out, stride, form_.value_dim, count_);
  }

  /// The natural log-sum-exp of the scores of query `i`, -inf where nothing was seen.
  [[nodiscard]] float lse(std::int64_t i) const { return row_softmax<float>{base_[i], sum_[i]}.lse(); }

 private:
  /// Turns the logits of a chunk into weights for a vector of lanes, pairs from `first` on of those of the block.
  void weigh(const shared& block, range rows, std::int64_t first, std::int64_t lane, const lane_ranges& visible) {
    packed_pair* weights = block.weights() + first * lanes + lane;
    const float* scores = block.scores() + lane;
    const range any = visible.any[lane / W], all = visible.all[lane / W];
    if (intersection(any, rows).empty()) {
      for (std::int64_t i = 0; i < chunk / 2; ++i) std::fill_n(weights + i * lanes, W, packed_pair{0});
      return;
    }
    if (intersection(all, rows) != rows) hide(block.scores() + lane, lane_mask<float>(visible.lane + lane, rows));
    vector maximum(-infinity<float>);
    // A NaN is not taken for a maximum, it shows in its weight.
    for (std::int64_t i = 0; i < chunk; ++i) {
      const vector logit = vector::load_aligned(scores + i * lanes);
      maximum = xsimd::select(logit > maximum, logit, maximum);
    }
    const vector scale = vector::load_aligned(scale_ + lane);
    raise(block.weights() + lane, first, lane, maximum * scale);

    const vector base = vector::load_aligned(base_ + lane);
    const vector offset = xsimd::select(base == vector(-infinity<float>), vector(0.0f), -base);
    vector sum(0.0f), multiplied(0.0f);
    for (std::int64_t i = 0; i < chunk; i += 2) {
      const vector a = exp2_rounded(fma<float>(vector::load_aligned(scores + i * lanes), scale, offset));
      const vector b = exp2_rounded(fma<float>(vector::load_aligned(scores + (i + 1) * lanes), scale, offset));
      const vec<packed_pair> both = round_to_pairs<Element>(a, b);
      both.store_aligned(weights + i / 2 * lanes);
      sum += a + b;
      multiplied += elements_of<Element>(both, false) + elements_of<Element>(both, true);
    }
    for (const auto& [to, more] : {std::pair(block_sum_, sum), std::pair(block_multiplied_, multiplied)})
      (vector::load_aligned(to + lane) + more).store_aligned(to + lane);
  }

  /// Sets the logits of what is not seen to -inf.
  static void hide(float* scores, const lane_mask<float>& mask) {
    for (std::int64_t i = 0; i < chunk; ++i)
      mask.select(i, vector::load_aligned(scores + i * lanes), vector(-infinity<float>))
          .store_aligned(scores + i * lanes);
  }

  /// Raises the base of the lanes whose maximum has outgrown it, and shrinks to match what they added before: `pairs`
  /// weights of this block among it.
  void raise(packed_pair* weights, std::int64_t pairs, std::int64_t lane, vector maximum) {
    const vector base = vector::load_aligned(base_ + lane), none(-infinity<float>);
    const auto outgrown = maximum > base + vector(slack);
    if (!xsimd::any(outgrown)) return;
    const vector next = xsimd::select(base == none, maximum, base + xsimd::ceil(maximum - base));
    const vector raised = xsimd::select(outgrown, next, base);
    const vector factor = xsimd::select(outgrown, exp2_rounded(base - raised), vector(1.0f));
    raised.store_aligned(base_ + lane);
    for (float* of : {block_sum_, block_multiplied_, rescale_})
      (vector::load_aligned(of + lane) * factor).store_aligned(of + lane);
    if (!xsimd::any(outgrown & (base != none))) return;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const auto old = vec<packed_pair>::load_aligned(weights + i * lanes);
      round_to_pairs<Element>(elements_of<Element>(old, false) * factor, elements_of<Element>(old, true) * factor)
          .store_aligned(weights + i * lanes);
    }
  }

  /// `out = out * rescale + values^T weights`, for the rows `[begin, end)` of the block.
  void add_values(const shared& block, std::int64_t begin, std::int64_t end) {
    const std::int64_t depth = whole_units(end - begin);
    multiply<Element>(form_.unit, block.values().columns(begin), {block.weights(), lanes}, block.products(), lanes,
                      form_.value_dim, lanes, depth);
    for (std::int64_t lane = 0; lane < lanes; lane += W) {
      const vector rescale = vector::load_aligned(rescale_ + lane);
      for (const auto& [sum, more] : {std::pair(sum_, block_sum_), std::pair(multiplied_, block_multiplied_)})
        fma<float>(vector::load_aligned(sum + lane), rescale, vector::load_aligned(more + lane))
            .store_aligned(sum + lane);
      for (std::int64_t d = 0; d < form_.value_dim; ++d) {
        float* o = out_ + d * lanes + lane;
        fma<float>(vector::load_aligned(o), rescale, vector::load_aligned(block.products() + d * lanes + lane))
            .store_aligned(o);
      }
    }
  }

  /// Adds row `j` of values that are not finite, by its weights, to the lanes alone that see it.
  void add_infinite(const packed_pair* weights, bool odd, const Element* value, std::int64_t j,
                    const lane_ranges& visible) {
    for (std::int64_t lane = 0; lane < count_; ++lane)
      if (visible.lane[lane].contains(j)) {
        const float weight = element_of<Element>(weights[lane], odd);
        for (std::int64_t d = 0; d < form_.value_dim; ++d)
          out_[d * lanes + lane] += weight * static_cast<float>(value[d]);
      }
  }

  tile_form form_;
  std::int64_t count_;
  packed_pair* query_;
  float *out_, *base_, *sum_, *multiplied_, *block_sum_, *block_multiplied_, *rescale_, *scale_;
};

}}}  // namespace cca::CCA_TARGET::detail
