#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <type_traits>

#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/turn.hpp"
#include "../context/row_span.hpp"
#include "../context/visible.hpp"
#include "../simd/dot.hpp"
#include "gradient_tile.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A source, and where the gradients of its rows are summed: views of the extents of its keys and values.
template <class Source, class T>
struct source_gradient {
  Source source;
  tensor_view<T> key, value;
};

template <class Source, class T>
source_gradient(Source, tensor_view<T>, tensor_view<T>) -> source_gradient<Source, T>;

/// Which pairs of `tiles` tiles of lanes and the rows of a block count: the tiles' ranges, of rows that are counted from
/// `first`.
template <class T>
struct block_pairs {
  static constexpr std::int64_t W = width<T>, vectors = tile_shape<T>::vectors;

  const lane_ranges<T>* visible;
  std::int64_t tiles, first;
  bool all;  ///< every lane sees every row

  /// The lanes of the vectors that see one of `rows` of the block, and of those between them.
  [[nodiscard]] range lanes(range rows) const {
    if (all) return {0, tiles * vectors * W};
    range total;
    for (std::int64_t v = 0; v < tiles * vectors; ++v)
      if (!intersection(visible[v / vectors].any[v % vectors], shifted(rows, first)).empty())
        total = hull(total, {v * W, (v + 1) * W});
    return total;
  }

  [[nodiscard]] unmasked guard_from(std::int64_t, std::int64_t) const { return {}; }
};

/// The same where pairs that do not count have to be left out, not multiplied by 0.
template <class T>
struct guarded_pairs : block_pairs<T> {
  std::int64_t row = 0, lane = 0;

  [[nodiscard]] guarded_pairs guard_from(std::int64_t j, std::int64_t i) const { return {*this, j, i}; }

  [[nodiscard]] vec<T> guard(std::int64_t r, std::int64_t i, vec<T> with, vec<T> without) const {
    constexpr std::int64_t lanes = tile_shape<T>::lanes;
    const std::int64_t at = lane + i;
    return this->visible[at / lanes].lane[at % lanes].contains(this->first + row + r) ? with : without;
  }
};

/// `to[j][d] += sum_i factors[j * stride + i] * rows[i][d]` for `count` rows of `dim` elements: what rows of keys or
/// values get from the queries, `rows`, which are padded with zeros to whole vectors.
template <class T, class Pairs>
void add_products(const T* factors, std::int64_t stride, row_span<T> rows, T* to, std::int64_t to_stride,
                  std::int64_t count, std::int64_t dim, const Pairs& pairs) {
  using shape = tile_shape<T>;
  constexpr std::int64_t W = width<T>;
  for_row_blocks<shape::vectors>(padded<T>(dim) / W, [&](auto n, std::int64_t v) {
    constexpr std::int64_t N = n();
    // Guards are rare: one kernel will do.
    constexpr std::int64_t most = std::is_same_v<Pairs, block_pairs<T>> ? shape::template rows_of<N> : 1;
    for_row_blocks<most>(count, [&](auto r, std::int64_t j) CCA_INLINE_LAMBDA {
      constexpr std::int64_t R = r();
      const range lanes = pairs.lanes({j, j + R});
      vec<T> sum[R][N];
      multiply(sum, factors + j * stride + lanes.begin, stride, adjacent{}, rows.row(lanes.begin) + v * W, rows.stride,
               lanes.size(), pairs.guard_from(j, lanes.begin));
      unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA {
        const std::int64_t d = (v + i % N) * W;
        T* t = to + (j + i / N) * to_stride + d;
        if (d + W <= dim)
          (vec<T>::load_unaligned(t) + sum[i / N][i % N]).store_unaligned(t);
        else
          store_partial(t, load_partial(t, dim - d) + sum[i / N][i % N], dim - d);
      });
    });
  });
}

/// Consecutive queries of one head that go backward together: tiles that take turns on each block of rows, whose
/// gradients are then summed over the queries of all. The unit of work of the backward pass.
///
/// Cost of a pair of a query and a row: five products, `3 dim + 2 value_dim` multiply-adds, where the forward pass has
/// two; and one exp2. Per block and stack, its rows of keys and values and of their gradients are read and the latter
/// written: a stack of 128 queries pays 640 multiply-adds for every four bytes of that.
template <class T>
class gradient_stack {
  using shape = tile_shape<T>;
  using tile = gradient_tile<T>;
  static constexpr std::int64_t W = width<T>;

 public:
  /// Queries of a stack: as many as their scratch has place within half a MiB, half of a second-level cache.
  static std::int64_t lanes_for(std::int64_t length, const tile_form& form) {
    constexpr std::int64_t budget = std::int64_t{1} << 19;
    const std::int64_t needed = (length + tile::lanes - 1) / tile::lanes;
    std::int64_t tiles = std::clamp<std::int64_t>(needed, 1, shape::gradient_stack);
    while (tiles > 1 && size(tiles * tile::lanes, form, false) * static_cast<std::int64_t>(sizeof(T)) > budget) --tiles;
    return tiles * tile::lanes;
  }

  /// Scratch elements for `lanes` queries; `staged` where rows are converted.
  static constexpr std::int64_t size(std::int64_t lanes, const tile_form& form, bool staged) {
    const auto [dim, value_dim, unit] = form;
    return lanes / tile::lanes * tile::size(dim, value_dim) + lanes * (padded<T>(dim) + padded<T>(value_dim)) +
           2 * shape::gradient_block * lanes + (staged ? shape::gradient_block * (dim + value_dim) : 0);
  }

  gradient_stack(T* scratch, const tile_form& form, std::int64_t count)
      : dim_(form.dim),
        value_dim_(form.value_dim),
        tiles_((count + tile::lanes - 1) / tile::lanes),
        count_(count),
        lanes_(tiles_ * tile::lanes),
        weights_(scratch),
        grad_scores_(weights_ + shape::gradient_block * lanes_),
        query_(grad_scores_ + shape::gradient_block * lanes_),
        grad_out_(query_ + lanes_ * padded<T>(dim_)),
        tile_memory_(grad_out_ + lanes_ * padded<T>(value_dim_)),
        staged_keys_(tile_memory_ + tiles_ * tile::size(dim_, value_dim_)),
        staged_values_(staged_keys_ + shape::gradient_block * dim_) {}

  /// Loads the queries of head `h` of sequence `b` from `first` on.
  template <class Results>
  void begin(const Results& results, std::int64_t b, std::int64_t h, std::int64_t first, T scale) {
    std::fill(query_, tile_memory_, T(0));
    for (std::int64_t i = 0; i < count_; ++i) {
      scale_row(results.query.row(b, h, first + i), dim_, scale * std::numbers::log2e_v<T>,
                query_ + i * padded<T>(dim_));
      scale_row(results.grad_out.row(b, h, first + i), value_dim_, T(1), grad_out_ + i * padded<T>(value_dim_));
    }
    for (std::int64_t c = 0; c < tiles_; ++c)
      at(c).begin(queries().from(c * tile::lanes), grad_outs().from(c * tile::lanes));
    for (std::int64_t i = 0; i < count_; ++i) {
      T delta = dot(results.out.row(b, h, first + i), grad_out_ + i * padded<T>(value_dim_));
      if (results.grad_lse.data != nullptr) delta -= static_cast<T>(*results.grad_lse.row(b, h, first + i));
      at(i / tile::lanes).set(i % tile::lanes, static_cast<T>(*results.lse.row(b, h, first + i)), delta);
    }
    finite_ = all_finite(queries(), dim_, count_) && all_finite(grad_outs(), value_dim_, count_);
  }

  /// Goes over what the queries, those of head `h` of `heads` from `first` on, see of a source, and adds to the
  /// gradients of its rows in turn. `offset` is what `turn` counts the source's first row as.
  template <class Source>
  void absorb(const source_gradient<Source, T>& gradient, std::int64_t b, std::int64_t h, std::int64_t heads,
              std::int64_t first, std::int64_t offset, turn& turn) {
    const Source& source = gradient.source;
    lane_ranges<T> visible[shape::gradient_stack];
    range any, all;
    for (std::int64_t c = 0; c < tiles_; ++c) {
      const std::int64_t start = first + c * tile::lanes;
      visible[c] = lane_ranges<T>(at(c).count(), [&](std::int64_t i) { return source.visible(b, h, start + i); });
      // A lane without a query would add 0 times the NaN that its weight may be: it is left out like one that sees nothing.
      if (at(c).count() % W != 0) visible[c].all[at(c).count() / W] = {};
      any = hull(any, visible[c].seen_by_any());
      all = c == 0 ? visible[c].seen_by_all() : intersection(all, visible[c].seen_by_all());
    }
    const std::int64_t head = h / (heads / source.heads);
    const auto rows = source.rows(b, head);
    for (std::int64_t j = any.begin; j < any.end; j += shape::gradient_block) {
      const range block{j, std::min(j + shape::gradient_block, any.end)};
      const block_pairs<T> pairs{visible, tiles_, j, intersection(block, all) == block};
      if (!pairs.all) std::fill(weights_, query_, T(0));
      const auto keys = stage(rows.key + j * rows.key_stride, rows.key_stride, dim_, block.size(), staged_keys_);
      const auto values =
          stage(rows.value + j * rows.value_stride, rows.value_stride, value_dim_, block.size(), staged_values_);
      for (std::int64_t c = 0; c < tiles_; ++c)
        at(c).absorb({keys, values, block}, visible[c], weights_ + c * tile::lanes, grad_scores_ + c * tile::lanes,
                     lanes_);
      turn.await(offset + block.end);
      if (pairs.all || finite_)
        add_to_rows(gradient.key.row(b, head, j), gradient.key.stride[2], gradient.value.row(b, head, j),
                    gradient.value.stride[2], block.size(), pairs);
      else
        add_to_rows(gradient.key.row(b, head, j), gradient.key.stride[2], gradient.value.row(b, head, j),
                    gradient.value.stride[2], block.size(), guarded_pairs<T>{pairs});
      turn.pass(offset + block.end);
    }
    turn.pass(offset + source.length);
  }

  /// Writes the gradients of the queries.
  void finish(T* grad_query, std::int64_t stride, T scale) {
    for (std::int64_t c = 0; c < tiles_; ++c) at(c).finish(grad_query + c * tile::lanes * stride, stride, scale);
  }

 private:
  /// `grad_key += grad_scores query` and `grad_value += weights grad_out`, for `count` rows.
  template <class Pairs>
  void add_to_rows(T* grad_key, std::int64_t key_stride, T* grad_value, std::int64_t value_stride, std::int64_t count,
                   const Pairs& pairs) {
    add_products(grad_scores_, lanes_, queries(), grad_key, key_stride, count, dim_, pairs);
    add_products(weights_, lanes_, grad_outs(), grad_value, value_stride, count, value_dim_, pairs);
  }

  /// `out . grad_out` of one query, in pieces that are converted where they have to be: so the sum has one order for every
  /// type.
  template <class Out>
  [[nodiscard]] T dot(const Out* out, const T* grad_out) const {
    constexpr std::int64_t piece = 64;
    T sum = T(0);
    for (std::int64_t d = 0; d < value_dim_; d += piece) {
      const std::int64_t count = std::min(piece, value_dim_ - d);
      T converted[piece], more;
      dot_rows(grad_out + d, stage(out + d, 0, count, 1, converted), count, 1, &more);
      sum += more;
    }
    return sum;
  }

  [[nodiscard]] row_span<T> queries() const { return {query_, padded<T>(dim_)}; }
  [[nodiscard]] row_span<T> grad_outs() const { return {grad_out_, padded<T>(value_dim_)}; }

  [[nodiscard]] tile at(std::int64_t c) const {
    return tile(tile_memory_ + c * tile::size(dim_, value_dim_), dim_, value_dim_,
                std::min(tile::lanes, count_ - c * tile::lanes));
  }

  std::int64_t dim_, value_dim_, tiles_, count_, lanes_;
  T *weights_, *grad_scores_, *query_, *grad_out_, *tile_memory_, *staged_keys_, *staged_values_;
  bool finite_ = true;
};

}}}  // namespace cca::CCA_TARGET::detail
