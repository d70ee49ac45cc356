#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numbers>
#include <type_traits>

#include "../../partition.hpp"
#include "../context/row_span.hpp"
#include "../context/source.hpp"
#include "../context/visible.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../softmax/row_softmax.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A tile of queries that absorbs blocks of keys and values: the online softmax of attention with a query in every lane.
///
/// Cost. A row of keys and values takes each vector of queries `dim + value_dim` multiply-adds, at 0.92 of their peak
/// where the vectors of a tile go together (AVX2: 0.89), and about 4 more for exp2, maximum and sum. At an edge, where
/// vectors go by themselves, each takes some `width / 2` rows in vain, and all at 0.64 of the peak (AVX2: 0.25).
/// A stack of tiles reads its rows once, `lanes / 2` FLOP per byte of floats. With 256 queries a core of 118 GFLOP/s
/// asks memory for 0.9 GB/s; with 64 it asks for 3.7, and loses 7 % at 16K rows and 10 % at 32K.
/// Queries, keys, values and outputs, `2 (dim + value_dim)` elements per token, pass once besides: 1 % of the time of
/// CCA attention at 32K tokens, 19 % of that of a window of 64.
/// So products bound prefill, edges and operands bound short windows and sequences, and reading bounds few queries
/// (`query_rows`). bench/TUNING.md has what this predicts beside what was measured.
///
/// All operations are vertical: lanes never meet, so a NaN stays with the queries that see it.
///
/// The tile is a view of scratch memory, `size(form)` elements aligned to vectors: queries `[dim][lanes]`
/// times `scale * log2(e)`, output `[value_dim][lanes]`, running maximum (of base-2 logits) and sum `[lanes]`.
template <class T>
class query_tile {
  static constexpr std::int64_t W = width<T>;

 public:
  using shape = tile_shape<T>;
  using number = T;
  static constexpr std::int64_t lanes = shape::lanes;

  /// What tiles that take turns on a block share: the block, and memory for its weights and for rows that are converted.
  class shared {
   public:
    static constexpr std::int64_t size(const tile_form& form, bool staged) {
      return shape::block * (lanes + (staged ? form.dim + form.value_dim : 0));
    }

    shared(T* scratch, const tile_form& form)
        : form_(form),
          weights_(scratch),
          staged_keys_(weights_ + shape::block * lanes),
          staged_values_(staged_keys_ + shape::block * form.dim) {}

    /// Takes in the rows `block` of a head.
    template <class Key, class Value>
    void stage(const context_rows<Key, Value>& head, range block) {
      const std::int64_t j = block.begin, count = block.size();
      block_ = {
          detail::stage(head.key + j * head.key_stride, head.key_stride, form_.dim, count, staged_keys_),
          detail::stage(head.value + j * head.value_stride, head.value_stride, form_.value_dim, count, staged_values_),
          block};
    }

    [[nodiscard]] const context_block<T>& block() const { return block_; }
    [[nodiscard]] T* weights() const { return weights_; }

   private:
    tile_form form_;
    T *weights_, *staged_keys_, *staged_values_;
    context_block<T> block_;
  };

  static constexpr std::int64_t size(const tile_form& form) { return (form.dim + form.value_dim + 2) * lanes; }

  query_tile(T* scratch, const tile_form& form, std::int64_t count)
      : dim_(form.dim),
        value_dim_(form.value_dim),
        count_(count),
        query_(scratch),
        out_(query_ + dim_ * lanes),
        maximum_(out_ + value_dim_ * lanes),
        sum_(maximum_ + lanes) {}

  [[nodiscard]] std::int64_t count() const { return count_; }

  /// Loads `count` queries, rows of `dim` elements, and forgets what was absorbed.
  template <class Query>
  void begin(const Query* query, std::int64_t stride, T scale) {
    if (count_ < lanes) std::fill_n(query_, dim_ * lanes, T(0));
    transpose(query, stride, query_, lanes, count_, dim_);
    const vec<T> factor(scale * std::numbers::log2e_v<T>);
    for (std::int64_t i = 0; i < dim_ * lanes; i += W)
      (factor * vec<T>::load_aligned(query_ + i)).store_aligned(query_ + i);
    std::fill_n(out_, value_dim_ * lanes, T(0));
    std::fill_n(maximum_, lanes, -infinity<T>);
    std::fill_n(sum_, lanes, T(0));
  }

  /// Absorbs a block of at most `shape::block` rows. The first tile of a stack asks for the rows that follow.
  void absorb(const shared& memory, const lane_ranges<T>& visible, bool first) {
    context_block<T> block = memory.block();
    block.ask_ahead = first;
    for_each_part<T>(block.rows, visible, count_, [&](auto n, std::int64_t v, range part, const auto& mask) {
      absorb_rows<n()>(v, block.part(part), mask, memory.weights());
    });
  }

  /// Writes `count` rows of `value_dim` elements: the weighted mean of the values, 0 where nothing was seen.
  template <class Out>
  void finish(Out* out, std::int64_t stride) {
    divide_lanes(out_, sum_, lanes, value_dim_);
    transpose(out_, lanes, out, stride, value_dim_, count_);
  }

  /// The natural log-sum-exp of the scores of query `i`, -inf where nothing was seen.
  [[nodiscard]] T lse(std::int64_t i) const { return row_softmax<T>{maximum_[i], sum_[i]}.lse(); }

 private:
  /// `N` vectors of lanes from vector `v` on absorb the rows.
  template <std::int64_t N, class Mask>
  void absorb_rows(std::int64_t v, const context_block<T>& block, const Mask& mask, T* weights) {
    const std::int64_t lane = v * W, count = block.rows.size();
    const auto maximum = score<N>(lane, block, mask, weights);
    const auto rescale = weigh<N>(lane, maximum, count, weights);
    if constexpr (!std::is_same_v<Mask, unmasked>)
      // 0 * inf is NaN: a weight of 0 does not keep an unseen value out.
      if (!all_finite(block.values, value_dim_, count))
        return add_values<N>(lane, block.values, count, mask, weights, rescale);
    add_values<N>(lane, block.values, count, unmasked{}, weights, rescale);
  }

  /// `weights[j] = logits of row j`, -inf where unseen; returns the raised maximum.
  template <std::int64_t N, class Mask>
  std::array<vec<T>, N> score(std::int64_t lane, const context_block<T>& block, const Mask& mask, T* weights) {
    const row_span<T> keys = block.keys, values = block.values;
    std::array<vec<T>, N> maximum;
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { maximum[n] = vec<T>::load_aligned(maximum_ + lane + n * W); });
    for_row_blocks<shape::template rows_of<N>>(block.rows.size(), [&](auto rows, std::int64_t j) CCA_INLINE_LAMBDA {
      // Spread over the block: memory answers while the products run. Vectors by themselves leave it to the first.
      const std::int64_t ahead = (N > 1 || lane == 0) && block.ask_ahead ? rows() : 0;
      for (std::int64_t r = j + shape::block; r < j + shape::block + ahead; ++r) {
        prefetch_row(keys, r, dim_);
        prefetch_row(values, r, value_dim_);
      }
      vec<T> logits[rows()][N];
      multiply(logits, keys.row(j), keys.stride, adjacent{}, query_ + lane, lanes, dim_, unmasked{});
      unroll<rows()>([&](auto r) CCA_INLINE_LAMBDA {
        unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
          vec<T> logit = logits[r][n];
          if constexpr (!std::is_same_v<Mask, unmasked>) logit = mask.select(j + r, logit, vec<T>(-infinity<T>));
          logit.store_aligned(weights + ((j + r) * N + n) * W);
          maximum[n] = xsimd::max(maximum[n], logit);
        });
      });
    });
    return maximum;
  }

  /// Turns logits into weights relative to the raised maximum, adds them to the running sum, and returns by how much
  /// what was absorbed before has to shrink.
  template <std::int64_t N>
  std::array<vec<T>, N> weigh(std::int64_t lane, const std::array<vec<T>, N>& maximum, std::int64_t count, T* weights) {
    std::array<vec<T>, N> base, rescale, sum;
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      T* m = maximum_ + lane + n * W;
      // A lane that has seen nothing has the maximum -inf; -inf - 0 is -inf where -inf - -inf were NaN.
      base[n] = xsimd::select(maximum[n] == vec<T>(-infinity<T>), vec<T>(T(0)), maximum[n]);
      rescale[n] = exp2<T>(vec<T>::load_aligned(m) - base[n]);
      maximum[n].store_aligned(m);
      sum[n] = vec<T>(T(0));
    });
    for (std::int64_t j = 0; j < count; ++j)
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        T* w = weights + (j * N + n) * W;
        const vec<T> weight = exp2<T>(vec<T>::load_aligned(w) - base[n]);
        weight.store_aligned(w);
        sum[n] += weight;
      });
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      T* s = sum_ + lane + n * W;
      fma<T>(vec<T>::load_aligned(s), rescale[n], sum[n]).store_aligned(s);
    });
    return rescale;
  }

  /// `out = out * rescale + values^T weights`. The block is summed by itself first: sums over long rows stay accurate.
  template <std::int64_t N, class Guard>
  void add_values(std::int64_t lane, row_span<T> values, std::int64_t count, const Guard& guard, const T* weights,
                  const std::array<vec<T>, N>& rescale) {
    for_row_blocks<shape::template rows_of<N>>(value_dim_, [&](auto rows, std::int64_t d) CCA_INLINE_LAMBDA {
      vec<T> sum[rows()][N];
      multiply(sum, values.data + d, adjacent{}, values.stride, weights, N * W, count, guard);
      unroll<rows()>([&](auto r) CCA_INLINE_LAMBDA {
        unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
          T* o = out_ + (d + r) * lanes + lane + n * W;
          fma<T>(vec<T>::load_aligned(o), rescale[n], sum[r][n]).store_aligned(o);
        });
      });
    });
  }

  std::int64_t dim_, value_dim_, count_;
  T *query_, *out_, *maximum_, *sum_;
};

}}}  // namespace cca::CCA_TARGET::detail
