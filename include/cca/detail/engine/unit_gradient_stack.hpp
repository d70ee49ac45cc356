#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../../partition.hpp"
#include "../base/turn.hpp"
#include "../context/row_span.hpp"
#include "../context/visible.hpp"
#include "../product/pairs.hpp"
#include "../product/unit_product.hpp"
#include "../product/unit_rows.hpp"
#include "../simd/convert.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "gradient_stack.hpp"
#include "unit_gradient_tile.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The rows of the queries of a stack in pairs of queries, `[queries / 2][dim]`: what gradients of keys and values are
/// summed from. Rows that are not finite are left out, as in `unit_columns_block`.
template <class Element>
class unit_query_rows {
 public:
  /// Elements are kept as well as their pairs.
  static constexpr std::int64_t size(std::int64_t count, std::int64_t dim) { return count * whole_units(dim); }

  unit_query_rows(float* scratch, std::int64_t count, std::int64_t dim)
      : rows_(reinterpret_cast<Element*>(scratch)),
        pairs_(reinterpret_cast<packed_pair*>(scratch) + count / 2 * whole_units(dim)),
        dim_(dim),
        stride_(whole_units(dim)) {}

  [[nodiscard]] Element* row(std::int64_t i) const { return rows_ + i * stride_; }
  [[nodiscard]] row_span<Element> rows(std::int64_t from) const { return {row(from), stride_}; }

  /// When all rows are written: `count` of them, followed by zeros up to `lanes`.
  void pack(std::int64_t count, std::int64_t lanes) {
    infinite_ = {};
    std::memset(static_cast<void*>(row(count)), 0, static_cast<std::size_t>((lanes - count) * stride_) * sizeof *rows_);
    for (std::int64_t i = 0; i < count; ++i)
      if (!all_finite_elements(row(i), dim_)) infinite_ = hull(infinite_, {i, i + 1});
    for (std::int64_t i = 0; i < lanes; i += 2) {
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
  std::int64_t dim_, stride_;
  range infinite_;
};

/// Queries of one head that go backward together, like `gradient_stack`, for a matrix unit.
template <class Element>
class unit_gradient_stack {
  using shape = unit_gradient_shape;
  using tile = unit_gradient_tile<Element>;
  static constexpr std::int64_t block = shape::block;

 public:
  /// Queries of a stack: as many as their scratch has place within a MiB.
  static std::int64_t lanes_for(std::int64_t length, const tile_form& form) {
    constexpr std::int64_t budget = std::int64_t{1} << 20;
    const std::int64_t needed = (length + tile::lanes - 1) / tile::lanes;
    std::int64_t tiles = std::clamp<std::int64_t>(needed, 1, shape::stack);
    while (tiles > 1 && size(tiles * tile::lanes, form, false) * static_cast<std::int64_t>(sizeof(float)) > budget)
      --tiles;
    return tiles * tile::lanes;
  }

  /// Scratch floats for `lanes` queries.
  static constexpr std::int64_t size(std::int64_t lanes, const tile_form& form, bool) {
    const std::int64_t dim = whole_units(form.dim), value_dim = whole_units(form.value_dim);
    return lanes / tile::lanes * tile::size(form) + unit_query_rows<Element>::size(lanes, form.dim) +
           unit_query_rows<Element>::size(lanes, form.value_dim) + 2 * chunk_rows * tile::lanes +
           2 * block * lanes / 2 + block / 2 * tile::lanes + std::max(block, tile::lanes) * std::max(dim, value_dim) +
           unit_rows_block<Element>::size(block, form.dim) + unit_rows_block<Element>::size(block, form.value_dim) +
           unit_columns_block<Element>::size(block, form.dim);
  }

  // NOLINTNEXTLINE(readability-non-const-parameter): `memory` gives it out
  unit_gradient_stack(float* scratch, const tile_form& form, std::int64_t count)
      : unit_gradient_stack(memory{scratch}, form, count, (count + tile::lanes - 1) / tile::lanes * tile::lanes) {}

  /// Loads the queries of head `h` of sequence `b` from `first` on.
  template <class Results>
  void begin(const Results& results, std::int64_t b, std::int64_t h, std::int64_t first, float scale) {
    scale_ = scale;
    for (std::int64_t i = 0; i < count_; ++i) {
      std::copy_n(results.query.row(b, h, first + i), form_.dim, query_.row(i));
      convert(results.grad_out.row(b, h, first + i), form_.value_dim, grad_out_.row(i));
      std::fill(query_.row(i) + form_.dim, query_.row(i + 1), Element(0));
      std::fill(grad_out_.row(i) + form_.value_dim, grad_out_.row(i + 1), Element(0));
    }
    query_.pack(count_, lanes_);
    grad_out_.pack(count_, lanes_);
    for (std::int64_t c = 0; c < lanes_ / tile::lanes; ++c)
      at(c).begin(query_.rows(c * tile::lanes), grad_out_.rows(c * tile::lanes));
    for (std::int64_t i = 0; i < count_; ++i) {
      const auto* out = results.out.row(b, h, first + i);
      const Element* grad_out = grad_out_.row(i);
      float delta = 0;
      for (std::int64_t d = 0; d < form_.value_dim; ++d)
        delta += static_cast<float>(out[d]) * static_cast<float>(grad_out[d]);
      if (results.grad_lse.data != nullptr) delta -= static_cast<float>(*results.grad_lse.row(b, h, first + i));
      at(i / tile::lanes).set(i % tile::lanes, static_cast<float>(*results.lse.row(b, h, first + i)), delta);
    }
  }

  /// As `gradient_stack::absorb`.
  template <class Source>
  void absorb(const source_gradient<Source, float>& gradient, std::int64_t b, std::int64_t h, std::int64_t heads,
              std::int64_t first, std::int64_t offset, turn& turn) {
    const Source& source = gradient.source;
    lane_ranges visible[shape::stack];
    range any;
    for (std::int64_t c = 0; c < lanes_ / tile::lanes; ++c) {
      const std::int64_t start = first + c * tile::lanes, count = at(c).count();
      visible[c] = {count, [&](std::int64_t i) { return source.visible(b, h, start + i); }};
      // A lane without a query is left out like one that sees nothing: its weight may be NaN.
      if (count % width<float> != 0) visible[c].all[count / width<float>] = {};
      any = hull(any, visible[c].seen_by_any());
    }
    const std::int64_t head = h / (heads / source.heads);
    const auto rows = source.rows(b, head);
    for (std::int64_t j = any.begin; j < any.end; j += block - j % block) {
      const range part{j, std::min(j + block - j % block, any.end)};
      keys_.stage({rows.key, rows.key_stride}, part);
      values_.stage({rows.value, rows.value_stride}, part);
      columns_.stage({rows.key, rows.key_stride}, part);
      const range seeing = absorb_block(part, visible);
      turn.await(offset + part.end);
      add_to_rows(query_, grad_scores_, scale_, form_.dim, gradient.key.row(b, head, 0), gradient.key.stride[2], part,
                  seeing, visible);
      add_to_rows(grad_out_, weights_, 1.0f, form_.value_dim, gradient.value.row(b, head, 0), gradient.value.stride[2],
                  part, seeing, visible);
      turn.pass(offset + part.end);
    }
    turn.pass(offset + source.length);
  }

  /// Writes the gradients of the queries.
  void finish(float* grad_query, std::int64_t stride, float scale) {
    for (std::int64_t c = 0; c < lanes_ / tile::lanes; ++c)
      at(c).finish(grad_query + c * tile::lanes * stride, stride, scale);
  }

 private:
  using lane_ranges = typename tile::lane_ranges;

  /// Gives out scratch memory.
  struct memory {
    float* next;
    float* take(std::int64_t count) { return std::exchange(next, next + count); }
  };

  unit_gradient_stack(memory scratch, const tile_form& form, std::int64_t count, std::int64_t lanes)
      : registers_(form.unit),
        form_(form),
        count_(count),
        lanes_(lanes),
        tile_memory_(scratch.take(lanes / tile::lanes * tile::size(form))),
        query_(scratch.take(unit_query_rows<Element>::size(lanes, form.dim)), lanes, form.dim),
        grad_out_(scratch.take(unit_query_rows<Element>::size(lanes, form.value_dim)), lanes, form.value_dim),
        scores_(scratch.take(2 * chunk_rows * tile::lanes)),
        weights_(reinterpret_cast<std::uint16_t*>(scratch.take(block * lanes / 2))),
        grad_scores_(reinterpret_cast<std::uint16_t*>(scratch.take(block * lanes / 2))),
        grad_score_pairs_(reinterpret_cast<packed_pair*>(scratch.take(block / 2 * tile::lanes))),
        products_(
            scratch.take(std::max(block, tile::lanes) * std::max(whole_units(form.dim), whole_units(form.value_dim)))),
        keys_(scratch.take(unit_rows_block<Element>::size(block, form.dim)), form.dim),
        values_(scratch.take(unit_rows_block<Element>::size(block, form.value_dim)), form.value_dim),
        columns_(scratch.take(unit_columns_block<Element>::size(block, form.dim)), block, form.dim) {}

  /// The tiles go over a block of rows; returns the lanes of the tiles that see some of it.
  range absorb_block(range part, const lane_ranges* visible) {
    const std::int64_t begin = chunk_begin(part.begin);
    range seeing;
    for (std::int64_t c = 0; c < lanes_ / tile::lanes; ++c) {
      const range seen = intersection(part, visible[c].seen_by_any());
      if (seen.empty()) continue;
      // Tiles in between that see nothing have weights of 0, not of the block before.
      seeing = hull(seeing, {c * tile::lanes, (c + 1) * tile::lanes});
    }
    for (std::int64_t c = seeing.begin / tile::lanes; c < seeing.end / tile::lanes; ++c) {
      for (std::int64_t j = begin; j < part.end; j += chunk_rows) {
        const std::int64_t to = (j - begin) * lanes_ + c * tile::lanes;
        at(c).absorb(keys_.chunk(j), values_.chunk(j), j, visible[c], scale_, scores_, weights_ + to,
                     {grad_scores_ + to, grad_score_pairs_ + (j - begin) / 2 * tile::lanes}, lanes_);
      }
      at(c).add_keys(columns_.columns(begin), grad_score_pairs_, whole_units(part.end - begin), products_);
      columns_.for_each_infinite(part, [&](std::int64_t j, const Element* key) {
        at(c).add_infinite(grad_score_pairs_ + (j - begin) / 2 * tile::lanes, (j - begin) % 2 != 0, key, j, visible[c]);
      });
    }
    return seeing;
  }

  /// `to[j] += scale * sum_i factors[j][i] * of[i]` for the rows `part` and the lanes `seeing`.
  void add_to_rows(const unit_query_rows<Element>& of, const std::uint16_t* factors, float scale, std::int64_t dim,
                   float* to, std::int64_t stride, range part, range seeing, const lane_ranges* visible) {
    if (seeing.empty()) return;
    const std::int64_t begin = chunk_begin(part.begin), row_size = whole_units(dim);
    multiply<Element>(form_.unit, {factors + seeing.begin, lanes_}, of.pairs(seeing.begin), products_, row_size,
                      whole_units(part.end - begin), dim, seeing.size());
    for (std::int64_t j = part.begin; j < part.end; ++j)
      add_weighted_rows(&scale, {products_ + (j - begin) * row_size, 0}, dim, 1, 1.0f, to + j * stride);
    of.for_each_infinite([&](std::int64_t i, const Element* row) {
      for (std::int64_t j = part.begin; j < part.end; ++j)
        if (visible[i / tile::lanes].lane[i % tile::lanes].contains(j)) {
          const float factor = scale * element_of<Element>(factors[(j - begin) * lanes_ + i], false);
          for (std::int64_t d = 0; d < dim; ++d) to[j * stride + d] += factor * static_cast<float>(row[d]);
        }
    });
  }

  [[nodiscard]] tile at(std::int64_t c) const {
    return tile(tile_memory_ + c * tile::size(form_), form_, std::min(tile::lanes, count_ - c * tile::lanes));
  }

  tile_registers registers_;
  tile_form form_;
  std::int64_t count_, lanes_;
  float scale_ = 1;
  float* tile_memory_;
  unit_query_rows<Element> query_, grad_out_;
  float* scores_;
  std::uint16_t *weights_, *grad_scores_;
  packed_pair* grad_score_pairs_;
  float* products_;
  unit_rows_block<Element> keys_, values_;
  unit_columns_block<Element> columns_;
};

}}}  // namespace cca::CCA_TARGET::detail
