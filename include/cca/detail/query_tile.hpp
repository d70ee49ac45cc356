#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "../partition.hpp"
#include "row.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "transpose.hpp"

namespace cca::inline CCA_TARGET::detail {

/// The one table of the kernel's sizes, chosen by measurement.
///  - `vectors`: vectors of queries in a tile, every lane a query.
///  - `rows`: rows of a register block of `vectors` vectors. Its `rows * vectors` accumulators, `vectors` operands and
///    one broadcast fill the registers: 6 x 4 of 32, 6 x 2 of 16.
///  - `single_rows`: rows of a register block of one vector, enough to hide the latency of a multiply-add.
///  - `block`: rows of keys and values absorbed at once. Their weights, `block * lanes`, share the first-level cache
///    with the rows in use; long blocks spread the rescaling of the output over more products.
///  - `least_stack` to `stack`: tiles that take turns on a block while it is in cache, so that memory is read once for all
///    of them; the more the longer the sequence.
template <class T>
struct tile_shape {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr std::int64_t vectors = 4;
#else
  static constexpr std::int64_t vectors = 2;
#endif
  static constexpr std::int64_t rows = 6;
  static constexpr std::int64_t single_rows = 12;
  static constexpr std::int64_t lanes = vectors * width<T>;
  static constexpr std::int64_t block = 128;
  static constexpr std::int64_t least_stack = std::max<std::int64_t>(64 / lanes, 1);
  static constexpr std::int64_t stack = std::max<std::int64_t>(256 / lanes, 1);
};

/// Per lane of a tile, the half-open range of rows that its query sees. A lane without a query sees nothing.
template <class T>
struct lane_ranges {
  static constexpr std::int64_t W = width<T>;
  range lane[tile_shape<T>::lanes] = {};
  range any[tile_shape<T>::vectors] = {};  ///< per vector: the hull of what its queries see
  range all[tile_shape<T>::vectors] = {};  ///< per vector: what every one of its queries sees

  lane_ranges() = default;

  /// `sees(i)` is the range of query `i` in `[0, count)`.
  template <class Sees>
  lane_ranges(std::int64_t count, const Sees& sees) {
    for (std::int64_t i = 0; i < count; ++i) {
      const range seen = sees(i);
      range& any_of = any[i / W];
      range& all_of = all[i / W];
      lane[i] = seen;
      all_of = i % W == 0 ? seen : intersection(all_of, seen);
      any_of = hull(any_of, seen);
    }
  }

  /// The hull of what the queries of all vectors see.
  [[nodiscard]] range seen_by_any() const {
    range total;
    for (const range& r : any) total = hull(total, r);
    return total;
  }

  /// What every query of all vectors sees.
  [[nodiscard]] range seen_by_all() const {
    range total = all[0];
    for (const range& r : all) total = intersection(total, r);
    return total;
  }
};

/// Masks: which lanes of a vector see row `j` of the part that is absorbed. `unmasked` when all do.
struct unmasked {};

template <class T>
struct lane_mask {
  vec<T> begin, end;  // exact: small integers relative to the part

  lane_mask(const range* lanes, range part) {
    alignas(alignment<T>) T b[width<T>];
    alignas(alignment<T>) T e[width<T>];
    for (std::size_t i = 0; i < width<T>; ++i) {
      b[i] = static_cast<T>(std::clamp(lanes[i].begin, part.begin, part.end) - part.begin);
      e[i] = static_cast<T>(std::clamp(lanes[i].end, part.begin, part.end) - part.begin);
    }
    begin = vec<T>::load_aligned(b);
    end = vec<T>::load_aligned(e);
  }

  [[nodiscard]] CCA_INLINE vec<T> select(std::int64_t j, vec<T> seen, vec<T> unseen) const {
    const vec<T> row(static_cast<T>(j));
    return xsimd::select((begin <= row) & (row < end), seen, unseen);
  }
};

/// `sum[r][n] = sum_i a[r * row_stride + i * step] * b[i * b_stride + n * width ..]` for i in `[0, steps)`: the register
/// block of both products of attention. An element of `a` is broadcast to all lanes, a vector of `b` serves all rows.
/// `Guard` is `unmasked`, or a mask whose unseen products are left out rather than multiplied by 0.
/// (The caller's array, not a returned one: g++ 12 keeps it in registers only so, at three times the speed.)
template <std::int64_t R, std::int64_t N, class T, class RowStride, class Step, class Guard>
CCA_INLINE void multiply(vec<T> (&sum)[R][N], const T* a, RowStride row_stride, Step step, const T* b,
                         std::int64_t b_stride, std::int64_t steps, const Guard& guard) {
  unroll<R * N>([&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N] = vec<T>(T(0)); });
  for (std::int64_t i = 0; i < steps; ++i, a += step, b += b_stride) {
    vec<T> operand[N];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { operand[n] = vec<T>::load_aligned(b + n * width<T>); });
    unroll<R>([&](auto r) CCA_INLINE_LAMBDA {
      const vec<T> element(a[r * row_stride]);
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        const vec<T> next = fma<T>(element, operand[n], sum[r][n]);
        if constexpr (std::is_same_v<Guard, unmasked>)
          sum[r][n] = next;
        else
          sum[r][n] = guard.select(i, next, sum[r][n]);
      });
    });
  }
}

/// The stride of neighbours, known to the compiler.
using adjacent = std::integral_constant<std::int64_t, 1>;

/// A tile of queries that absorbs blocks of keys and values: the online softmax of attention with a query in every lane.
///
/// Cost of a row of keys and values for all lanes: `dim + value_dim` multiply-adds per vector, one exp2, a maximum and a
/// sum; it reads the row once. Per block, `value_dim` vectors of output are rescaled. All operations are vertical: lanes
/// never meet, so a NaN stays with the queries that see it.
///
/// The tile is a view of scratch memory, `size(dim, value_dim)` elements aligned to vectors: queries `[dim][lanes]`
/// times `scale * log2(e)`, output `[value_dim][lanes]`, running maximum (of base-2 logits) and sum `[lanes]`.
template <class T>
class query_tile {
  using shape = tile_shape<T>;
  static constexpr std::int64_t W = width<T>;

 public:
  static constexpr std::int64_t lanes = shape::lanes;

  static constexpr std::int64_t size(std::int64_t dim, std::int64_t value_dim) { return (dim + value_dim + 2) * lanes; }
  /// Scratch elements for the weights of a block; tiles that take turns share them.
  static constexpr std::int64_t weights_size() { return shape::block * lanes; }

  query_tile(T* scratch, std::int64_t dim, std::int64_t value_dim, std::int64_t count)
      : dim_(dim),
        value_dim_(value_dim),
        count_(count),
        query_(scratch),
        out_(query_ + dim * lanes),
        maximum_(out_ + value_dim * lanes),
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

  /// Absorbs at most `shape::block` rows.
  void absorb(const context_block<T>& block, const lane_ranges<T>& sees, T* weights) {
    // Only where every lane sees every row do all vectors go together; at the edges each goes by its own range. So it
    // does in all of a block that is mostly edge: rescaling the output for few rows costs more than it saves.
    range common = count_ > lanes - W ? intersection(block.rows, sees.seen_by_all()) : range{};
    const range seen = intersection(block.rows, sees.seen_by_any());
    if (2 * common.size() <= seen.size()) common = {block.rows.end, block.rows.end};
    const auto edge = [&](range rows) {
      for (std::int64_t v = 0; v * W < count_; ++v) {
        const range part = intersection(rows, sees.any[v]);
        if (!part.empty()) absorb_edge(v, block.part(part), sees, weights);
      }
    };
    edge({block.rows.begin, common.begin});
    if (!common.empty()) absorb_rows<shape::vectors>(0, block.part(common), unmasked{}, weights);
    edge({common.end, block.rows.end});
  }

  /// Writes `count` rows of `value_dim` elements: the weighted mean of the values, 0 where nothing was seen.
  template <class Out>
  void finish(Out* out, std::int64_t stride) {
    for (std::int64_t i = 0; i < lanes; i += W) {
      const vec<T> sum = vec<T>::load_aligned(sum_ + i);
      const vec<T> inverse = xsimd::select(sum == vec<T>(T(0)), vec<T>(T(0)), vec<T>(T(1)) / sum);
      for (T* o = out_ + i; o < maximum_; o += lanes) (inverse * vec<T>::load_aligned(o)).store_aligned(o);
    }
    transpose(out_, lanes, out, stride, value_dim_, count_);
  }

  /// The natural log-sum-exp of the scores of query `i`, -inf where nothing was seen.
  [[nodiscard]] T lse(std::int64_t i) const { return row_softmax<T>{maximum_[i], sum_[i]}.lse(); }

 private:
  void absorb_edge(std::int64_t v, const context_block<T>& block, const lane_ranges<T>& sees, T* weights) {
    if ((v + 1) * W <= count_ && intersection(block.rows, sees.all[v]) == block.rows)
      absorb_rows<1>(v, block, unmasked{}, weights);
    else
      absorb_rows<1>(v, block, lane_mask<T>(sees.lane + v * W, block.rows), weights);
  }

  /// `N` vectors of lanes from vector `v` on absorb the rows.
  template <std::int64_t N, class Mask>
  void absorb_rows(std::int64_t v, const context_block<T>& block, const Mask& mask, T* weights) {
    const std::int64_t lane = v * W, count = block.rows.size();
    const auto maximum = score<N>(lane, block, mask, weights);
    const auto rescale = weigh<N>(lane, maximum, count, weights);
    if constexpr (!std::is_same_v<Mask, unmasked>)
      // 0 * inf is NaN: a weight of 0 does not keep an unseen value out.
      if (!all_finite(block.values, count)) return add_values<N>(lane, block.values, count, mask, weights, rescale);
    add_values<N>(lane, block.values, count, unmasked{}, weights, rescale);
  }

  template <std::int64_t N>
  static constexpr std::int64_t rows_of = N == 1 ? shape::single_rows : shape::rows;

  /// `weights[j] = logits of row j`, -inf where unseen; returns the raised maximum.
  template <std::int64_t N, class Mask>
  std::array<vec<T>, N> score(std::int64_t lane, const context_block<T>& block, const Mask& mask, T* weights) {
    const row_span<T> keys = block.keys, values = block.values;
    std::array<vec<T>, N> maximum;
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { maximum[n] = vec<T>::load_aligned(maximum_ + lane + n * W); });
    for_row_blocks<rows_of<N>>(block.rows.size(), [&](auto rows, std::int64_t j) CCA_INLINE_LAMBDA {
      // Spread over the block: memory answers while the products run.
      for (std::int64_t r = j + shape::block; N > 1 && block.ask_ahead && r < j + shape::block + rows(); ++r) {
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
    for_row_blocks<rows_of<N>>(value_dim_, [&](auto rows, std::int64_t d) CCA_INLINE_LAMBDA {
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

  [[nodiscard]] bool all_finite(row_span<T> values, std::int64_t count) const {
    for (std::int64_t j = 0; j < count; ++j)
      if (!cca::detail::all_finite(values.row(j), value_dim_)) return false;
    return true;
  }

  std::int64_t dim_, value_dim_, count_;
  T *query_, *out_, *maximum_, *sum_;
};

}  // namespace cca::inline CCA_TARGET::detail
