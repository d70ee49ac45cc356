#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <type_traits>

#include "../../partition.hpp"
#include "../context/row_span.hpp"
#include "../context/visible.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A tile of queries that goes backward over blocks of keys and values, with a query in every lane as in `query_tile`:
/// from the log-sum-exp of the forward pass it computes the weights `P` of a block again, with them the gradients `dS` of
/// its logits, and adds to the gradients of the queries. With `dO` the gradient of the output and
/// `delta = sum_d out dO - (gradient of lse)`:
///
///     P = exp(S - lse)    dP = V dO^T    dS = P (dP - delta)    dQ = scale dS^T K
///
/// The block's own gradients, sums over queries, are left to whoever owns the rows: `gradient_stack`.
///
/// The tile is a view of scratch memory, `size(dim, value_dim)` elements aligned to vectors: queries `[dim][lanes]`
/// times `scale * log2(e)`, gradients of the output `[value_dim][lanes]` and of the queries `[dim][lanes]`, log-sum-exp
/// in base 2 and `delta` `[lanes]`.
template <class T>
class gradient_tile {
  using shape = tile_shape<T>;
  static constexpr std::int64_t W = width<T>;

 public:
  static constexpr std::int64_t lanes = shape::lanes;

  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim) {
    return (2 * dim + value_dim + 2) * lanes;
  }

  gradient_tile(T* scratch, std::int64_t dim, std::int64_t value_dim, std::int64_t count)
      : dim_(dim),
        value_dim_(value_dim),
        count_(count),
        query_(scratch),
        grad_out_(query_ + dim * lanes),
        grad_query_(grad_out_ + value_dim * lanes),
        lse_(grad_query_ + dim * lanes),
        delta_(lse_ + lanes) {}

  [[nodiscard]] std::int64_t count() const { return count_; }

  /// Loads rows of queries, times `scale * log2(e)`, and of gradients of the output.
  void begin(row_span<T> query, row_span<T> grad_out) {
    std::fill_n(query_, size(dim_, value_dim_), T(0));
    transpose(query.data, query.stride, query_, lanes, count_, dim_);
    transpose(grad_out.data, grad_out.stride, grad_out_, lanes, count_, value_dim_);
  }

  /// The natural log-sum-exp of query `i`, and its `delta`. One that saw nothing, or only logits of -inf, has the
  /// log-sum-exp -inf: 0 in its place makes its weights 0, where -inf - -inf were NaN.
  void set(std::int64_t i, T lse, T delta) {
    lse_[i] = lse == -infinity<T> ? T(0) : lse * std::numbers::log2e_v<T>;
    delta_[i] = delta;
  }

  /// Goes over a block of rows: `weights[j * stride + i] = P` and `grad_scores[j * stride + i] = ln(2) dS` for the pairs of a
  /// row and a lane that sees it. Pairs in the same parts that see nothing get 0; others are not written.
  void absorb(const context_block<T>& block, const lane_ranges<T>& visible, T* weights, T* grad_scores,
              std::int64_t stride) {
    for_each_part<T>(block.rows, visible, count_, [&](auto n, std::int64_t v, range part, const auto& mask) {
      const std::int64_t at = (part.begin - block.rows.begin) * stride + v * W;
      absorb_rows<n()>(v * W, block.part(part), mask, weights + at, grad_scores + at, stride);
    });
  }

  /// Writes `count` rows of `dim` elements: the gradients of the queries.
  void finish(T* grad_query, std::int64_t stride, T scale) {
    const vec<T> factor(scale * std::numbers::log2e_v<T>);
    for (T* g = grad_query_; g < lse_; g += W) (factor * vec<T>::load_aligned(g)).store_aligned(g);
    transpose(grad_query_, lanes, grad_query, stride, dim_, count_);
  }

 private:
  template <std::int64_t N, class Mask>
  void absorb_rows(std::int64_t lane, const context_block<T>& block, const Mask& mask, T* weights, T* grad_scores,
                   std::int64_t stride) {
    const std::int64_t count = block.rows.size();
    score<N>(block.keys, dim_, count, query_ + lane, weights, stride);
    score<N>(block.values, value_dim_, count, grad_out_ + lane, grad_scores, stride);
    differentiate<N>(lane, count, mask, weights, grad_scores, stride);
    if constexpr (!std::is_same_v<Mask, unmasked>)
      // 0 * inf is NaN: a gradient of 0 does not keep an unseen key out.
      if (!all_finite(block.keys, dim_, count)) return add_keys<N>(lane, block.keys, count, mask, grad_scores, stride);
    add_keys<N>(lane, block.keys, count, unmasked{}, grad_scores, stride);
  }

  /// `to[j][lane] = rows[j] . vectors[lane]`.
  template <std::int64_t N>
  void score(row_span<T> rows, std::int64_t dim, std::int64_t count, const T* vectors, T* to, std::int64_t stride) {
    for_row_blocks<shape::template rows_of<N>>(count, [&](auto R, std::int64_t j) CCA_INLINE_LAMBDA {
      vec<T> sum[R()][N];
      multiply(sum, rows.row(j), rows.stride, adjacent{}, vectors, lanes, dim, unmasked{});
      unroll<R() * N>(
          [&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N].store_aligned(to + (j + i / N) * stride + i % N * W); });
    });
  }

  /// Turns logits into `P` and `dP` into `ln(2) dS`: the factor makes up for the log2(e) in the queries, which `dS` is
  /// multiplied with.
  template <std::int64_t N, class Mask>
  void differentiate(std::int64_t lane, std::int64_t count, const Mask& mask, T* weights, T* grad_scores,
                     std::int64_t stride) {
    vec<T> lse[N], delta[N];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      lse[n] = vec<T>::load_aligned(lse_ + lane + n * W);
      delta[n] = vec<T>::load_aligned(delta_ + lane + n * W);
    });
    for (std::int64_t j = 0; j < count; ++j)
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        T *w = weights + j * stride + n * W, *s = grad_scores + j * stride + n * W;
        vec<T> weight = exp2<T>(vec<T>::load_aligned(w) - lse[n]);
        vec<T> grad_score = weight * vec<T>(std::numbers::ln2_v<T>) * (vec<T>::load_aligned(s) - delta[n]);
        if constexpr (!std::is_same_v<Mask, unmasked>) {
          weight = mask.select(j, weight, vec<T>(T(0)));
          grad_score = mask.select(j, grad_score, vec<T>(T(0)));
        }
        weight.store_aligned(w);
        grad_score.store_aligned(s);
      });
  }

  /// `grad_query += keys^T grad_scores`.
  template <std::int64_t N, class Guard>
  void add_keys(std::int64_t lane, row_span<T> keys, std::int64_t count, const Guard& guard, const T* grad_scores,
                std::int64_t stride) {
    for_row_blocks<shape::template rows_of<N>>(dim_, [&](auto R, std::int64_t d) CCA_INLINE_LAMBDA {
      vec<T> sum[R()][N];
      multiply(sum, keys.data + d, adjacent{}, keys.stride, grad_scores, stride, count, guard);
      unroll<R() * N>([&](auto i) CCA_INLINE_LAMBDA {
        T* g = grad_query_ + (d + i / N) * lanes + lane + i % N * W;
        (vec<T>::load_aligned(g) + sum[i / N][i % N]).store_aligned(g);
      });
    });
  }

  std::int64_t dim_, value_dim_, count_;
  T *query_, *grad_out_, *grad_query_, *lse_, *delta_;
};

}}}  // namespace cca::CCA_TARGET::detail
