#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../context/visible.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../simd/wanted_memory.hpp"
#include "../softmax/lane_softmax.hpp"
#include "../softmax/score_rule.hpp"
#include "vector_rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// A product is what multiplies. The tiles and stacks of the engine are written over one, which says
//  - what is computed in (`number`), how many queries ride in a tile (`lanes`), how many rows are absorbed at once;
//  - how queries are packed into lanes (`pack`), how rows are staged (`staged_block`), in which parts of a block a
//    tile goes (`for_each_part`), and how weights are stored (`weights`, `factors`);
//  - the three products of attention: `score` and `multiply_rows` (rows times lanes), `add` (columns times weights), and
//    that of `query_rows` (weights times queries).
// Rows that are not finite are left out of a product in which some lanes do not see them, since 0 * inf is NaN, and are
// added to the lanes alone that see them.

/// Products of vectors of floats or doubles. A register block of rows and lanes shares every element of a row, and every
/// vector of lanes; rows are read as they lie, or converted once per block.
template <class T>
struct vectors {
  using number = T;
  using element = T;
  using shape = tile_shape<T>;
  using softmax = lane_softmax<T>;
  using visible_lanes = lane_ranges<T>;
  static constexpr std::int64_t W = width<T>, lanes = shape::lanes;
  static constexpr bool balances = true;  ///< whether queries may carry a part of the scale

  // ------------------------------------------------------------------------------------------------------- operands

  /// Numbers that `pack` writes: `[dim][lanes]`.
  static constexpr std::int64_t packed_size(std::int64_t dim) { return dim * lanes; }

  /// Packs `count` rows of `dim` elements, times `factor`, a row in each lane; 0 in the lanes behind.
  template <class Row>
  static void pack(const Row* rows, std::int64_t stride, std::int64_t count, std::int64_t dim, T factor, T* to) {
    if (count < lanes) fill_n(to, dim * lanes, T(0));
    transpose(rows, stride, to, lanes, count, dim);
    if (factor == T(1)) return;
    for (std::int64_t i = 0; i < dim * lanes; i += W)
      (vec<T>(factor) * vec<T>::load_aligned(to + i)).store_aligned(to + i);
  }

  /// The rows of a block, and whether they are finite, once somebody has asked: all parts of all tiles share the answer.
  struct whole_block {
    row_span<T> rows;
    std::int64_t dim = 0, count = 0;
    mutable std::optional<bool> finite{};

    [[nodiscard]] bool all_finite() const {
      if (!finite) finite = detail::all_finite(rows, dim, count);
      return *finite;
    }
  };

  /// Rows that are summed over, from one of a block on.
  struct columns {
    row_span<T> rows;
    const whole_block* block;
  };

  /// A block of keys and values, for all tiles of a stack: where they lie, or, if `staged`, converted or side by side.
  class staged_block {
   public:
    static constexpr std::int64_t size(const tile_form& form, std::int64_t rows, bool staged) {
      return staged ? rows * (form.dim + form.value_dim) : 0;
    }

    staged_block(T* scratch, const tile_form& form, std::int64_t rows, bool staged)
        : form_(form), staged_(staged), staged_keys_(scratch), staged_values_(scratch + rows * form.dim) {}

    /// Takes in the rows `rows` of a head.
    template <class Key, class Value>
    void stage(const context_rows<Key, Value>& head, range rows) {
      const std::int64_t j = rows.begin, count = rows.size();
      rows_ = rows;
      const context_rows<Key, Value> from = head.from(j);
      keys_ = {stage_numbers(from.key, from.key_stride, from.key_scales, form_.dim, count, staged_keys_, staged_),
               form_.dim, count};
      values_ = {stage_numbers(from.value, from.value_stride, from.value_scales, form_.value_dim, count, staged_values_,
                               staged_),
                 form_.value_dim, count};
    }

    [[nodiscard]] range rows() const { return rows_; }
    /// @{
    /// From row `j` on. The same rows serve products along them and across them.
    [[nodiscard]] row_span<T> keys(std::int64_t j) const { return keys_.rows.from(j - rows_.begin); }
    [[nodiscard]] row_span<T> values(std::int64_t j) const { return values_.rows.from(j - rows_.begin); }
    [[nodiscard]] columns key_columns(std::int64_t j) const { return {keys(j), &keys_}; }
    [[nodiscard]] columns value_columns(std::int64_t j) const { return {values(j), &values_}; }
    /// @}

   private:
    tile_form form_;
    bool staged_;
    T *staged_keys_, *staged_values_;
    whole_block keys_, values_;
    range rows_;
  };

  using staged_gradient_block = staged_block;

  template <class F>
  static void for_each_part(range rows, const visible_lanes& seen, std::int64_t count, const F& f) {
    detail::for_each_part<T>(rows, seen, count, f);
  }

  // -------------------------------------------------------------------------------------------------------- weights

  /// Memory of a forward stack: scores, which become weights where they are.
  class stack_memory {
   public:
    static constexpr std::int64_t size(const tile_form&, std::int64_t) { return (shape::block + 1) * lanes; }

    stack_memory(T* scratch, const tile_form&, std::int64_t) : maximum_(scratch), scores_(scratch + lanes) {}

    template <class Part>
    [[nodiscard]] score_block<T> scores(const Part&) const {
      return {scores_, Part::vectors * W, maximum_};
    }

   private:
    T *maximum_, *scores_;
  };

  /// The weights of a part, in the place of its scores.
  struct weights {
    static constexpr std::int64_t rows_at_once = 1;
    static constexpr bool exact = true;
    score_block<T> at;

    template <class Part>
    weights(const stack_memory&, const staged_block&, const Part&, const score_block<T>& scores) : at(scores) {}

    static CCA_INLINE vec<T> exp2(vec<T> x, const exp2_range<T>& range) { return detail::exp2<T>(x, range); }
    CCA_INLINE void put(std::int64_t j, std::int64_t n, const vec<T> (&weight)[1]) const {
      weight[0].store_aligned(at.at(j, n));
    }
  };

  using query_rows = vector_rows<T>;

  /// Memory of a backward stack: the rows of its queries and of the gradients of their outputs, and for a block of rows
  /// `P` and `dS`, `[row][lane of the stack]`, in the place of the scores and of `dP`.
  class gradient_memory {
    static constexpr std::int64_t block = shape::gradient_block;

   public:
    static constexpr std::int64_t size(const tile_form& form, std::int64_t tiles) {
      return tiles * lanes * (padded<T>(form.dim) + padded<T>(form.value_dim) + 2 * block);
    }

    gradient_memory(T* scratch, const tile_form& form, std::int64_t tiles)
        : stride_(tiles * lanes),
          weights_(scratch),
          grad_scores_(weights_ + block * stride_),
          query(grad_scores_ + block * stride_, stride_, form.dim),
          grad_out(query.row(stride_), stride_, form.value_dim) {}

    /// @{
    /// Of a part of tile `c`: scores, which become weights, and the gradients of weights, which become those of scores.
    template <class Part>
    [[nodiscard]] score_block<T> scores(const Part& part, range rows, std::int64_t c) const {
      return {weights_ + (part.rows.begin - rows.begin) * stride_ + c * lanes + part.first * W, stride_};
    }
    template <class Part>
    [[nodiscard]] score_block<T> grad_weights(const Part& part, range rows, std::int64_t c) const {
      return {grad_scores_ + (part.rows.begin - rows.begin) * stride_ + c * lanes + part.first * W, stride_};
    }
    /// @}

    /// What tile `c` leaves of the rows `rows` of a block where it sees none.
    void clear(range rows, std::int64_t c) const {
      for (std::int64_t j = 0; j < rows.size(); ++j)
        for (T* of : {weights_, grad_scores_}) fill_n(of + j * stride_ + c * lanes, lanes, T(0));
    }

    /// `dK += dS Q` and `dV += P dO` for the rows `rows` of a block.
    void add_to_rows(range rows, const visible_lanes* seen, T* grad_key, std::int64_t key_stride, T* grad_value,
                     std::int64_t value_stride) const {
      query.add_to(grad_scores_, rows, seen, grad_key, key_stride);
      grad_out.add_to(weights_, rows, seen, grad_value, value_stride);
    }

   private:
    std::int64_t stride_;
    T *weights_, *grad_scores_;

   public:
    query_rows query, grad_out;
  };

  /// `P` and `dS` of a part, in the place of the scores and of `dP`.
  struct factors {
    static constexpr std::int64_t rows_at_once = 1;
    score_block<T> weights, at;

    template <class Part>
    factors(const gradient_memory& memory, const Part& part, range rows, std::int64_t c)
        : weights(memory.scores(part, rows, c)), at(memory.grad_weights(part, rows, c)) {}

    static CCA_INLINE vec<T> exp2(vec<T> x) { return detail::exp2<T>(x); }
    CCA_INLINE void put(std::int64_t j, std::int64_t n, const vec<T> (&weight)[1],
                        const vec<T> (&grad_score)[1]) const {
      weight[0].store_aligned(weights.at(j, n));
      grad_score[0].store_aligned(at.at(j, n));
    }
  };

  // ------------------------------------------------------------------------------------------------------- products

  /// `S = K Q^T` of a part: scores, unseen ones -inf, and the maximum of each lane. Asks for memory that is `wanted` on the way.
  template <class Part>
  static void score(const stack_memory&, const staged_block& block, const Part& part, const tile_form& form,
                    const score_rule<T>&, const T* packed, const score_block<T>& to, wanted_memory& wanted) {
    constexpr std::int64_t N = Part::vectors;
    const row_span<T> keys = block.keys(part.rows.begin);
    fill_n(to.maximum, N * W, -infinity<T>);  // in memory: registers are for the products
    for_row_blocks_again<shape::template rows_of<N>>(part.rows.size(), [&](auto rows, std::int64_t j) CCA_INLINE_LAMBDA {
      constexpr std::int64_t R = rows();
      vec<T> sum[extent(R)][extent(N)];
      unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N] = vec<T>(T(0)); });
      for (std::int64_t d = 0; d < form.dim; d += line<T>) {
        wanted.ask();
        accumulate(sum, keys.row(j) + d, keys.stride, adjacent{}, packed + part.first * W + d * lanes, lanes,
                   smaller(line<T>, form.dim - d));
      }
      if (!part.all_seen())
        unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA {
          sum[i / N][i % N] = part.mask.select(j + i / N, sum[i / N][i % N], vec<T>(-infinity<T>));
        });
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        vec<T> maximum = vec<T>::load_aligned(to.maximum + n * W);
        unroll<R>([&](auto r) CCA_INLINE_LAMBDA {
          sum[r][n].store_aligned(to.at(j + r, n));
          maximum = (xsimd::max)(maximum, sum[r][n]);
        });
        maximum.store_aligned(to.maximum + n * W);
      });
    });
  }

  /// `to = rows packed` of a part, `dim` elements each. Asks for memory that is `wanted`.
  template <class Part>
  static void multiply_rows(const Part& part, row_span<T> rows, std::int64_t dim, const T* packed, matrix_unit,
                            const score_block<T> to, wanted_memory& wanted) {
    constexpr std::int64_t N = Part::vectors;
    for_row_blocks_again<shape::template rows_of<N>>(part.rows.size(), [&](auto r, std::int64_t j) CCA_INLINE_LAMBDA {
      vec<T> sum[extent(r())][extent(N)];
      wanted.ask();
      multiply(sum, rows.row(j), rows.stride, adjacent{}, packed + part.first * W, lanes, dim);
      unroll<r() * N>([&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N].store_aligned(to.at(j + i / N, i % N)); });
    });
  }

  /// `sum = sum * rescale + columns^T weights` of a part, `[dim][lanes]`; without `rescale`, 1. The part is summed by
  /// itself first: sums over long rows stay accurate. Asks for memory that is `wanted`, most where it is in a hurry.
  static constexpr bool add_asks = true;
  template <class Memory, class Part>
  static void add(const Memory&, const Part& part, const columns& from, std::int64_t dim, const score_block<T> weights,
                  const T* rescale, T* sum, wanted_memory& wanted) {
    constexpr std::int64_t N = Part::vectors;
    const range all{0, part.rows.size()};
    if (part.all_seen() || from.block->all_finite()) {
      const std::int64_t at_once = wanted.hurried() ? line<T> : all.end;
      return add_runs<N, shape::template rows_of<N>>(part.first, unmasked{}, from.rows, dim, weights, rescale, sum,
                                                     [&](const auto& run, const auto&) CCA_INLINE_LAMBDA {
                                                       for (std::int64_t j = 0; j < all.end; j += at_once) {
                                                         wanted.ask();
                                                         run({j, smaller(j + at_once, all.end)});
                                                       }
                                                     });
    }
    if constexpr (N == 1)  // it hides something; few rows at a time, since it is rare
      add_runs<1, 2>(part.first, part.mask, from.rows, dim, weights, rescale, sum,
                     [&](const auto& run, const auto& row) CCA_INLINE_LAMBDA {
                       for_each_finite_run(from.rows, dim, all, run, row);
                     });
  }

 private:
  /// Of `N` vectors from `first` on, `Rows` dims at a time. `for_each_run(run, row)` calls `run(rows)` for ranges of rows that
  /// are multiplied for all lanes, and `row(j)` for those that are added to the lanes alone that see them, in order: so no
  /// other sum changes by a bit.
  template <std::int64_t N, std::int64_t Rows, class Mask, class Runs>
  static CCA_INLINE void add_runs(std::int64_t first, const Mask mask, row_span<T> columns, std::int64_t dim,
                       const score_block<T> weights, const T* rescale, T* sum, const Runs& for_each_run) {
    T* to = sum + first * W;
    vec<T> factor[extent(N)];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      factor[n] = rescale != nullptr ? vec<T>::load_aligned(rescale + (first + n) * W) : vec<T>(T(1));
    });
    for_row_blocks<Rows>(dim, [&](auto r, std::int64_t d) CCA_INLINE_LAMBDA {
      constexpr std::int64_t R = r();
      vec<T> products[extent(R)][extent(N)];
      unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA { products[i / N][i % N] = vec<T>(T(0)); });
      const auto run = [&](range rows) CCA_INLINE_LAMBDA {
        accumulate(products, columns.row(rows.begin) + d, adjacent{}, columns.stride, weights.at(rows.begin, 0),
                   weights.stride, rows.size());
      };
      const auto row = [&](std::int64_t j) CCA_INLINE_LAMBDA {
        unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA {
          vec<T>& product = products[i / N][i % N];
          const vec<T> value(columns.row(j)[d + i / N]), weight = vec<T>::load_aligned(weights.at(j, i % N));
          product = mask.select(j, fma<T>(value, weight, product), product);
        });
      };
      for_each_run(run, row);
      unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA {
        T* o = to + (d + i / N) * lanes + i % N * W;
        fma<T>(vec<T>::load_aligned(o), factor[i % N], products[i / N][i % N]).store_aligned(o);
      });
    });
  }
};

}}}  // namespace cca::CCA_TARGET::detail
