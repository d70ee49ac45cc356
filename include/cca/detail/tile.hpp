#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../options.hpp"
#include "../partition.hpp"
#include "simd.hpp"

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

  /// Backward: rows whose gradients are summed at once, and tiles whose queries they are summed over.
  static constexpr std::int64_t gradient_block = 64;
  static constexpr std::int64_t gradient_stack = std::max<std::int64_t>(128 / lanes, 1);

  /// Rows of a register block of `N` vectors.
  template <std::int64_t N>
  static constexpr std::int64_t rows_of = N == 1 ? single_rows : rows;
};

/// What a tile is made for: the dims of its rows, and the unit that multiplies them.
struct tile_form {
  std::int64_t dim, value_dim;
  matrix_unit unit = matrix_unit::none;
};

/// Per lane of a tile, the half-open range of rows that its query sees. A lane without a query sees nothing.
template <class T, std::int64_t Lanes = tile_shape<T>::lanes>
struct lane_ranges {
  static constexpr std::int64_t W = width<T>;
  range lane[Lanes] = {};
  range any[Lanes / W] = {};  ///< per vector: the hull of what its queries see
  range all[Lanes / W] = {};  ///< per vector: what every one of its queries sees

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

  /// As a guard of `multiply` over rows.
  [[nodiscard]] CCA_INLINE vec<T> guard(std::int64_t, std::int64_t j, vec<T> seen, vec<T> unseen) const {
    return select(j, seen, unseen);
  }
};

/// Calls `f(constant vectors, first vector, part, mask)` for parts of the rows `block` that together hold all that the
/// `count` queries see of it, a part being a half-open range for some vectors of lanes.
///
/// Only where every lane sees every row do all vectors go together, unmasked; at the edges each goes by its own range.
/// So it does in all of a block that is mostly edge: what is done once per part costs more there than is saved.
template <class T, class F>
CCA_INLINE void for_each_part(range block, const lane_ranges<T>& sees, std::int64_t count, const F& f) {
  using shape = tile_shape<T>;
  constexpr std::int64_t W = width<T>;
  range common = count > shape::lanes - W ? intersection(block, sees.seen_by_all()) : range{};
  const range seen = intersection(block, sees.seen_by_any());
  if (2 * common.size() <= seen.size()) common = {block.end, block.end};
  const auto edge = [&](range rows) {
    for (std::int64_t v = 0; v * W < count; ++v) {
      const range part = intersection(rows, sees.any[v]);
      if (part.empty()) continue;
      constexpr std::integral_constant<std::int64_t, 1> one{};
      if ((v + 1) * W <= count && intersection(part, sees.all[v]) == part)
        f(one, v, part, unmasked{});
      else
        f(one, v, part, lane_mask<T>(sees.lane + v * W, part));
    }
  };
  edge({block.begin, common.begin});
  if (!common.empty()) f(std::integral_constant<std::int64_t, shape::vectors>{}, std::int64_t{0}, common, unmasked{});
  edge({common.end, block.end});
}

/// `sum[r][n] = sum_i a[r * row_stride + i * step] * b[i * b_stride + n * width ..]` for i in `[0, steps)`: the register
/// block of both products of attention. An element of `a` is broadcast to all lanes, a vector of `b` serves all rows.
/// `Guard` is `unmasked`, or has `guard(r, i, with, without)`: unseen products are left out rather than multiplied by 0.
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
          sum[r][n] = guard.guard(r, i, next, sum[r][n]);
      });
    });
  }
}

/// Divides `[rows][lanes]` sums by the lanes' sums of weights, where 0 stays 0.
template <class T>
void divide_lanes(T* out, const T* sums, std::int64_t lanes, std::int64_t rows) {
  for (std::int64_t i = 0; i < lanes; i += width<T>) {
    const vec<T> sum = vec<T>::load_aligned(sums + i);
    const vec<T> inverse = xsimd::select(sum == vec<T>(T(0)), vec<T>(T(0)), vec<T>(T(1)) / sum);
    for (T* o = out + i; o < out + rows * lanes; o += lanes) (inverse * vec<T>::load_aligned(o)).store_aligned(o);
  }
}

/// The stride of neighbours, known to the compiler.
using adjacent = std::integral_constant<std::int64_t, 1>;

}  // namespace cca::inline CCA_TARGET::detail
