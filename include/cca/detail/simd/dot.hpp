#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "register_block.hpp"
#include "simd.hpp"
#include "transpose.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// One query over rows of keys: lanes run along the dim. This regime is bound by memory; its rows are read once, in
// order, as they lie, and converted in registers where `loads_as` says that they can be.

/// Rows that one step takes in: their logits fit a small buffer, their data the first-level cache.
inline constexpr std::int64_t row_block = 32;

/// How many rows ahead of the one in use memory is asked for: 4 KiB, beyond which the processor's own prefetching stops
/// at the end of a page. Measured on decoding 128K rows of 128 floats: 1.3 times the speed of none.
template <class Element>
[[nodiscard]] constexpr std::int64_t rows_ahead(std::int64_t dim) {
  return larger<std::int64_t>(4096 / (dim * static_cast<std::int64_t>(sizeof(Element))), 1);
}

/// Asks for the line of element `d` of the row that is `ahead` rows of `stride` behind one. It comes to the first-level cache: a
/// few rows are read meanwhile.
template <class T>
CCA_INLINE void ask_ahead(const T* row, std::int64_t ahead, std::int64_t stride, std::int64_t d) {
  prefetch_first(place_in_memory(row, ahead, stride, d));
}

/// Vectors of elements for which memory is asked for at a time: those of a cache line. Some processors bring its neighbour as
/// well, others do not: on Zen 5 every other line alone made decoding 0.7 times as fast.
template <class T, class Element>
inline constexpr std::int64_t vectors_asked =
    larger<std::int64_t>(64 / (width<T> * static_cast<std::int64_t>(sizeof(Element))), 1);

/// `dim` rounded up to whole vectors.
template <class T>
[[nodiscard]] constexpr std::int64_t padded(std::int64_t dim) {
  return (dim + width<T> - 1) / width<T> * width<T>;
}

/// `to[d] = from[d] * factor` for d in `[0, dim)`, across element types.
template <class T, class From, class To>
void scale_row(const From* from, std::int64_t dim, T factor, To* to) {
  std::int64_t d = 0;
  if constexpr (loads_as<T, From> && std::is_same_v<To, T>)
    for (; d + width<T> <= dim; d += width<T>) (load_as<T>(from + d) * vec<T>(factor)).store_unaligned(to + d);
  for (; d < dim; ++d) to[d] = element_cast<To>(element_cast<T>(from[d]) * factor);
}

/// `to[d] = from[d * stride] * factor` for the d in `[0, dim)` where `to[d]` is not finite. Returns whether all were.
template <class T, class To>
bool replace_infinite(const T* from, std::int64_t stride, std::int64_t dim, T factor, To* to) {
  bool finite = true;
  for (std::int64_t d = 0; d < dim; ++d) {
    if (magnitude(element_cast<T>(to[d])) <= largest_finite<T>) continue;
    to[d] = element_cast<To>(from[d * stride] * factor);
    finite = false;
  }
  return finite;
}

/// Vectors whose lanes are summed together: as many as 128 bits have lanes.
template <class T>
inline constexpr std::int64_t sums_at_a_time = static_cast<std::int64_t>(xsimd::batch<T, transpose_arch>::size);

/// `to[i]` = the sum of the lanes of `x[i]`, for `sums_at_a_time` vectors: half the work of one after the other.
template <class T>
CCA_INLINE void reduce_add_each(const vec<T>* x, T* to) {
  using quad = xsimd::batch<T, transpose_arch>;
  // However a version of xsimd zips beyond 128 bits, the lanes of the two alternate.
  const auto zip_add = [](vec<T> a, vec<T> b) CCA_INLINE_LAMBDA { return xsimd::zip_lo(a, b) + xsimd::zip_hi(a, b); };
  vec<T> sum = zip_add(x[0], x[1]);
  if constexpr (sums_at_a_time<T> == 4) {
    const auto pairs = cast_bits<double>(sum), others = cast_bits<double>(zip_add(x[2], x[3]));
    sum = cast_bits<T>(xsimd::zip_lo(pairs, others)) + cast_bits<T>(xsimd::zip_hi(pairs, others));
  }
  alignas(alignment<T>) T lanes[width<T>];
  sum.store_aligned(lanes);
  quad total = quad::load_aligned(lanes);
  for (std::int64_t i = sums_at_a_time<T>; i < width<T>; i += sums_at_a_time<T>) total += quad::load_aligned(lanes + i);
  total.store_unaligned(to);
}

/// The sum of its lanes is `query . key`, of a key row that others follow in steps of `stride`. One sum is enough: the
/// processor is at the next rows meanwhile. It is that of `dot_shared_rows`, to the bit.
template <class T, class Element>
CCA_INLINE vec<T> dot_lanes(const T* query, const Element* key, std::int64_t stride, std::int64_t dim,
                            std::int64_t ahead) {
  constexpr std::int64_t W = width<T>, steps = 4;
  const std::int64_t full = dim - dim % W;
  vec<T> sum(T(0));
  const auto add = [&](std::int64_t d, auto i) CCA_INLINE_LAMBDA {
    if (i % vectors_asked<T, Element> == 0) ask_ahead(key, ahead, stride, d);
    sum = fma<T>(load_as<T>(key + d), vec<T>::load_aligned(query + d), sum);
  };
  std::int64_t d = 0;
  for (; d + steps * W <= full; d += steps * W) unroll<steps>([&](auto i) CCA_INLINE_LAMBDA { add(d + i * W, i); });
  for (; d < full; d += W) add(d, std::integral_constant<std::int64_t, 0>{});
  if (full < dim) sum = fma<T>(load_as<T>(key + full, dim - full), vec<T>::load_aligned(query + full), sum);
  return sum;
}

/// `logits[j] = query . key_j` for j in `[0, count)`. `query` is padded with zeros to a multiple of the vector width.
/// Row by row, in the order of memory: four rows side by side read up to 1.4 times slower. Blocks of eight vectors of the
/// query that stay in registers were 0.84 to 0.97 of the speed, too: a lone load of the query costs nothing.
template <class T, class Element>
void dot_rows(const T* query, row_span<Element> keys, std::int64_t dim, std::int64_t count, T* logits,
              std::int64_t ahead) {
  constexpr std::int64_t n = sums_at_a_time<T>;
  std::int64_t j = 0;
  for (; j + n <= count; j += n) {
    vec<T> dots[extent(n)];
    unroll<n>([&](auto i) CCA_INLINE_LAMBDA { dots[i] = dot_lanes(query, keys.row(j + i), keys.stride, dim, ahead); });
    reduce_add_each<T>(dots, logits + j);
  }
  if (j == count) return;
  vec<T> dots[extent(n)];
  unroll<n>([&](auto i) CCA_INLINE_LAMBDA {
    dots[i] = j + i < count ? dot_lanes(query, keys.row(j + i), keys.stride, dim, ahead) : vec<T>(T(0));
  });
  T last[extent(n)];
  reduce_add_each<T>(dots, last);
  copy_n(last, count - j, logits + j);
}
template <class T, class Element = T>
void dot_rows(const T* query, row_span<Element> keys, std::int64_t dim, std::int64_t count, T* logits) {
  dot_rows(query, keys, dim, count, logits, rows_ahead<Element>(dim));
}

/// Rows of a register block of `Queries` queries that share them: 4 x 4 accumulators of 32 registers, 4 x 2 of 16.
template <class T>
inline constexpr std::int64_t shared_rows = tile_shape<T>::vectors;

/// `logits[q * logit_stride + j] = query_q . key_j` for `Queries` queries `query_stride` apart, j in `[0, count)`. A load of
/// a row serves all queries: from four of them on products bound it, not memory, which is asked for `ahead` rows ahead.
template <std::int64_t Queries, class T, class Element>
void dot_shared_rows(const T* query, std::int64_t query_stride, row_span<Element> keys, std::int64_t dim,
                     std::int64_t count, T* logits, std::int64_t logit_stride, std::int64_t ahead) {
  constexpr std::int64_t W = width<T>, n = sums_at_a_time<T>;
  const std::int64_t full = dim - dim % W;
  for_row_blocks<shared_rows<T>>(count, [&](auto rows, std::int64_t j) CCA_INLINE_LAMBDA {
    constexpr std::int64_t R = rows();
    // Rows of a query lie side by side; what is behind the last fills up a sum of several.
    vec<T> sum[extent(Queries)][extent((R + n - 1) / n * n)];
    unroll<Queries*((R + n - 1) / n * n)>([&](auto i) CCA_INLINE_LAMBDA {
      constexpr std::int64_t columns = (R + n - 1) / n * n;
      sum[i / columns][i % columns] = vec<T>(T(0));
    });
    const auto add = [&](std::int64_t d, auto load) CCA_INLINE_LAMBDA {
      vec<T> row[extent(R)];
      unroll<R>([&](auto r) CCA_INLINE_LAMBDA { row[r] = load(keys.row(j + r) + d); });
      unroll<Queries>([&](auto q) CCA_INLINE_LAMBDA {
        const vec<T> x = vec<T>::load_aligned(query + q * query_stride + d);
        unroll<R>([&](auto r) CCA_INLINE_LAMBDA { sum[q][r] = fma<T>(row[r], x, sum[q][r]); });
      });
    };
    for (std::int64_t d = 0; d < full; d += W) {
      unroll<R>([&](auto r) CCA_INLINE_LAMBDA { ask_ahead(keys.row(j + r), ahead, keys.stride, d); });
      add(d, [](const Element* from) CCA_INLINE_LAMBDA { return load_as<T>(from); });
    }
    if (full < dim) add(full, [&](const Element* from) CCA_INLINE_LAMBDA { return load_as<T>(from, dim - full); });
    unroll<Queries>([&](auto q) CCA_INLINE_LAMBDA {
      unroll<(R + n - 1) / n>([&](auto part) CCA_INLINE_LAMBDA {
        alignas(alignment<T>) T sums[extent(n)];
        reduce_add_each<T>(sum[q] + part * n, sums);
        unroll<n>([&](auto i) CCA_INLINE_LAMBDA {
          if constexpr (part() * n + i() < R) logits[q * logit_stride + j + part * n + i] = sums[i];
        });
      });
    });
  });
}

/// `sum[d] = sum[d] * rescale + sum_j weights[j] * rows[j][d]` for d in `[0, dim)`, j in `[0, count)`.
template <class T, class Element>
void add_weighted_rows(const T* weights, row_span<Element> rows, std::int64_t dim, std::int64_t count, T rescale, T* sum,
                       std::int64_t ahead) {
  constexpr std::int64_t W = width<T>, vectors = 8;
  const std::int64_t full = dim - dim % W;
  for_row_blocks<vectors>(dim / W, [&](auto n, std::int64_t first) CCA_INLINE_LAMBDA {
    constexpr std::int64_t N = n();
    const std::int64_t d = first * W;
    vec<T> partial[extent(N)];
    unroll<N>([&](auto i) CCA_INLINE_LAMBDA { partial[i] = vec<T>(T(0)); });
    for (std::int64_t j = 0; j < count; ++j) {
      const vec<T> weight(weights[j]);
      unroll<N>([&](auto i) CCA_INLINE_LAMBDA {
        if (i % vectors_asked<T, Element> == 0) ask_ahead(rows.row(j), ahead, rows.stride, d + i * W);
        partial[i] = fma<T>(weight, load_as<T>(rows.row(j) + d + i * W), partial[i]);
      });
    }
    unroll<N>([&](auto i) CCA_INLINE_LAMBDA {
      T* s = sum + d + i * W;
      fma<T>(vec<T>::load_unaligned(s), vec<T>(rescale), partial[i]).store_unaligned(s);
    });
  });
  if (full == dim) return;
  vec<T> partial(T(0));
  for (std::int64_t j = 0; j < count; ++j)
    partial = fma<T>(vec<T>(weights[j]), load_as<T>(rows.row(j) + full, dim - full), partial);
  store_partial(sum + full, fma<T>(load_partial(sum + full, dim - full), vec<T>(rescale), partial), dim - full);
}
template <class T, class Element = T>
void add_weighted_rows(const T* weights, row_span<Element> rows, std::int64_t dim, std::int64_t count, T rescale,
                       T* sum) {
  add_weighted_rows(weights, rows, dim, count, rescale, sum, rows_ahead<Element>(dim));
}

/// Vectors of a row in a register block of queries that products bound: 4 x 4 sums of 32 registers, 4 x 2 of 16, enough to
/// hide the latency of a multiply-add; whole lines.
template <class T, class Element>
inline constexpr std::int64_t shared_vectors = larger(vectors_asked<T, Element>, tile_shape<T>::vectors);

/// `out(q)[d] += sum_j weights[q * weight_stride + j] * rows[j][d]` for `Queries` queries, d in `[0, dim)`, j in `[0, count)`.
/// A load of a row serves all queries, as above. `Vectors` of each row go at a time: a line where memory bounds it, of which
/// two or four were 0.8 times as fast.
template <std::int64_t Queries, std::int64_t Vectors, class T, class Element, class Out>
void add_shared_rows(const T* weights, std::int64_t weight_stride, row_span<Element> rows, std::int64_t dim,
                     std::int64_t count, const Out& out, std::int64_t ahead) {
  constexpr std::int64_t W = width<T>;
  T* to[extent(Queries)];
  unroll<Queries>([&](auto q) CCA_INLINE_LAMBDA { to[q] = out(q); });
  const std::int64_t full = dim - dim % W;
  for_row_blocks<Vectors>(dim / W, [&](auto n, std::int64_t first) CCA_INLINE_LAMBDA {
    constexpr std::int64_t N = n();
    const std::int64_t d = first * W;
    vec<T> sum[extent(Queries)][extent(N)];
    unroll<Queries * N>([&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N] = vec<T>(T(0)); });
    for (std::int64_t j = 0; j < count; ++j) {
      vec<T> row[extent(N)];
      unroll<N>([&](auto i) CCA_INLINE_LAMBDA {
        if (i % vectors_asked<T, Element> == 0) ask_ahead(rows.row(j), ahead, rows.stride, d + i * W);
        row[i] = load_as<T>(rows.row(j) + d + i * W);
        keep<T>(row[i]);
      });
      unroll<Queries>([&](auto q) CCA_INLINE_LAMBDA {
        vec<T> weight(weights[q * weight_stride + j]);
        if constexpr (N > 1) keep<T>(weight);
        unroll<N>([&](auto i) CCA_INLINE_LAMBDA { sum[q][i] = fma<T>(weight, row[i], sum[q][i]); });
      });
    }
    // Sums of some rows each, and then of those: rounding errors of long rows stay small.
    unroll<Queries * N>([&](auto i) CCA_INLINE_LAMBDA {
      T* s = to[i / N] + d + i % N * W;
      (vec<T>::load_unaligned(s) + sum[i / N][i % N]).store_unaligned(s);
    });
  });
  for (std::int64_t q = 0; full < dim && q < Queries; ++q)
    add_weighted_rows(weights + q * weight_stride, row_span<Element>{rows.data + full, rows.stride}, dim - full, count,
                      T(1), to[q] + full);
}

}}}  // namespace cca::CCA_TARGET::detail
