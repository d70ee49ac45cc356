#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "../../partition.hpp"
#include "../simd/convert.hpp"
#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Rows of keys or values: row `i` starts at `data + i * stride`.
template <class T>
struct row_span {
  const T* data = nullptr;
  std::int64_t stride = 0;

  [[nodiscard]] CCA_INLINE const T* row(std::int64_t i) const { return data + i * stride; }
  [[nodiscard]] CCA_INLINE row_span from(std::int64_t i) const { return {row(i), stride}; }
};

/// The scales of rows of 8 bits, `data[i * stride]` that of row `i`. Rows of other elements have none.
struct row_scales {
  const float* data = nullptr;
  std::int64_t stride = 0;

  [[nodiscard]] CCA_INLINE float operator[](std::int64_t i) const { return data[i * stride]; }
  [[nodiscard]] row_scales from(std::int64_t i) const { return {data + i * stride, stride}; }
};

/// `numbers[i] *= scales[i]` for the rows `rows`, where these are of 8 bits: a row's scale is a factor of its products.
template <class Element, class T>
CCA_INLINE void multiply_by_scales([[maybe_unused]] row_scales scales, [[maybe_unused]] range rows,
                                   [[maybe_unused]] T* numbers) {
  if constexpr (is_q8<Element>)
    for (std::int64_t i = rows.begin; i < rows.end; ++i) numbers[i] *= static_cast<T>(scales[i]);
}

/// Asks for the memory of row `i`, which may lie outside of the span: nothing is read.
template <class T>
CCA_INLINE void prefetch_row(row_span<T> rows, std::int64_t i, std::int64_t dim) {
  for (std::int64_t d = 0; d < dim; d += line<T>) prefetch(place_in_memory(rows.data, i, rows.stride, d));
}

/// Whether all of `count` rows of `dim` elements are finite.
template <class T>
[[nodiscard]] bool all_finite(row_span<T> rows, std::int64_t dim, std::int64_t count) {
  for (std::int64_t j = 0; j < count; ++j)
    if (!all_finite(rows.row(j), dim)) return false;
  return true;
}

/// Goes through `rows` in order: calls `f(run)` for runs of finite rows, half-open ranges, and `g(j)` for every other row.
template <class T, class F, class G>
CCA_INLINE void for_each_finite_run(row_span<T> span, std::int64_t dim, range rows, const F& f, const G& g) {
  for (std::int64_t j = rows.begin; j < rows.end;) {
    std::int64_t end = j;
    while (end < rows.end && all_finite(span.row(end), dim)) ++end;
    if (end > j) f(range{j, end});
    if (end < rows.end) g(end);
    j = end + 1;
  }
}

/// Whether rows of these elements are computed with where they lie; otherwise `stage` needs a buffer for them.
template <class T, class... Elements>
inline constexpr bool in_place = (std::is_same_v<std::remove_const_t<Elements>, T> && ...);

/// Whether each row is on a page of its own, as those of one of many heads in the layout `[batch, length, heads, dim]`. Products
/// go over a block of rows many times, and such a one is more pages than a core keeps in mind, often in a few sets of its caches:
/// where rows are put side by side first, prefill takes 0.8 to 0.9 of the time.
template <class Element>
[[nodiscard]] bool lie_apart(std::int64_t stride, std::int64_t dim) {
  constexpr std::int64_t page = 4096 / static_cast<std::int64_t>(sizeof(Element));
  const std::int64_t distance = stride < 0 ? -stride : stride;
  return distance >= page && distance >= 2 * dim;
}

/// Whether blocks of rows of some of these views are converted or put side by side before they are multiplied.
template <class T, class... View>
[[nodiscard]] bool staged(const View&... views) {
  return !in_place<T, typename View::element_type...> || (lie_apart<typename View::element_type>(views.stride[2], views.dim()) || ...);
}

/// `count` rows of `dim` elements in the type that they are computed in, once for all that read them: where they lie, or in
/// `buffer`, converted or, where they lie apart, `side_by_side`. Rows of 8 bits stay without their scales.
template <class T, class Element>
[[nodiscard]] row_span<T> stage(const Element* from, std::int64_t stride, std::int64_t dim, std::int64_t count,
                                [[maybe_unused]] T* buffer, [[maybe_unused]] bool side_by_side = false) {
  if constexpr (in_place<T, Element>)
    if (!side_by_side || !lie_apart<Element>(stride, dim)) return {from, stride};
  for (std::int64_t i = 0; i < count; ++i) convert(from + i * stride, dim, buffer + i * dim);
  return {buffer, dim};
}

/// The same of the numbers that rows stand for.
template <class T, class Element>
[[nodiscard]] row_span<T> stage_numbers(const Element* from, std::int64_t stride, [[maybe_unused]] row_scales scales,
                                        std::int64_t dim, std::int64_t count, T* buffer, bool side_by_side = false) {
  const row_span<T> rows = stage(from, stride, dim, count, buffer, side_by_side);
  for (std::int64_t i = 0; is_q8<Element> && i < count; ++i) {
    T* const row = buffer + i * dim;
    const T scale = static_cast<T>(scales[i]);
    std::int64_t d = 0;
    for (; d + width<T> <= dim; d += width<T>)
      (vec<T>::load_unaligned(row + d) * vec<T>(scale)).store_unaligned(row + d);
    for (; d < dim; ++d) row[d] *= scale;
  }
  return rows;
}

/// Consecutive rows of keys and values of a source, `rows` of it, in the type that they are computed in.
template <class T>
struct context_block {
  row_span<T> keys, values;
  range rows;
  bool ask_ahead = false;  ///< whoever absorbs it asks for the rows that follow

  [[nodiscard]] context_block part(range some) const {
    return {keys.from(some.begin - rows.begin), values.from(some.begin - rows.begin), some, ask_ahead};
  }
};

/// Where the last of the blocks of `R` rows of `[0, count)` ends. Of twelve and a rest of up to four, two blocks of eight are made:
/// a block of few rows takes as long as one of eight, whose multiply-adds wait for nothing.
template <std::int64_t R>
[[nodiscard]] constexpr std::int64_t whole_blocks(std::int64_t count, std::int64_t least_rest) {
  const std::int64_t rest = count % R, whole = count - rest;
  return R == 12 && rest >= least_rest && rest <= 4 && whole > 0 ? whole - R : whole;
}

/// Calls `f(constant size)` for the powers of two below `R`, downwards. (No fold over lambdas: whatever they are inlined into,
/// compilers optimise the blocks once more there.)
template <std::int64_t R, class F>
CCA_INLINE void for_powers_below(const F& f) {
  static_assert(R <= 16);
  if constexpr (R > 8) f(std::integral_constant<std::int64_t, 8>{});
  if constexpr (R > 4) f(std::integral_constant<std::int64_t, 4>{});
  if constexpr (R > 2) f(std::integral_constant<std::int64_t, 2>{});
  if constexpr (R > 1) f(std::integral_constant<std::int64_t, 1>{});
}

/// Calls `f(constant rows, i)` for the blocks of `R` rows of `[0, count)`, then for the remainder in powers of two: few
/// kinds of blocks, since each is a kernel of its own to compile.
template <std::int64_t R, class F>
CCA_INLINE void for_row_blocks(std::int64_t count, const F& f) {
  const std::int64_t whole = whole_blocks<R>(count, 4);
  std::int64_t i = 0;
  for (; i < whole; i += R) f(std::integral_constant<std::int64_t, R>{}, i);
  for_powers_below<R>([&](auto rest) CCA_INLINE_LAMBDA {
    for (; i + rest <= count; i += rest) f(rest, i);
  });
}

/// The same of blocks that may take in rows twice, which has to change nothing: the rest takes one block of the next power of
/// two, which begins before it, or two.
template <std::int64_t R, class F>
CCA_INLINE void for_row_blocks_again(std::int64_t count, const F& f) {
  const std::int64_t whole = whole_blocks<R>(count, 1);
  std::int64_t i = 0;
  for (; i < whole; i += R) f(std::integral_constant<std::int64_t, R>{}, i);
  while (i < count) {
    std::int64_t rows = 1;  // by hand: functions of the standard library may be shared with code of other instruction sets
    while (rows < count - i) rows *= 2;
    while (rows > count || rows >= R) rows /= 2;
    for_powers_below<R>([&](auto size) CCA_INLINE_LAMBDA {
      if (rows == size) f(size, smaller(i, count - size));
    });
    i += rows;
  }
}

}}}  // namespace cca::CCA_TARGET::detail
