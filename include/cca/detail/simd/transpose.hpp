#pragma once

#include "../base/numbers.hpp"
#include "convert.hpp"
#include "simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// 128 bits: the widest vector whose `zip_lo` and `zip_hi` mean the same in every version of xsimd.
using transpose_arch = quad_arch;

template <class T>
CCA_INLINE void transpose_block(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride) {
  using quad = xsimd::batch<T, transpose_arch>;
  constexpr std::int64_t n = quad::size;
  quad rows[extent(n)];
  unroll<n>([&](auto i) CCA_INLINE_LAMBDA { rows[i] = quad::load_unaligned(from + i * from_stride); });
  // Each round is a perfect shuffle; log2(n) of them transpose.
  for (std::int64_t round = 1; round < n; round *= 2) {
    quad next[extent(n)];
    unroll<n / 2>([&](auto i) CCA_INLINE_LAMBDA {
      next[2 * i] = xsimd::zip_lo(rows[i], rows[i + n / 2]);
      next[2 * i + 1] = xsimd::zip_hi(rows[i], rows[i + n / 2]);
    });
    unroll<n>([&](auto i) CCA_INLINE_LAMBDA { rows[i] = next[i]; });
  }
  unroll<n>([&](auto i) CCA_INLINE_LAMBDA { rows[i].store_unaligned(to + i * to_stride); });
}

/// `to[j][i] = from[i][j]` for i in `[0, rows)` and j in `[0, columns)`; nothing else is read or written.
template <class From, class To>
void transpose(const From* from, std::int64_t from_stride, To* to, std::int64_t to_stride, std::int64_t rows,
               std::int64_t columns) {
  std::int64_t full_rows = 0, full_columns = 0;
  if constexpr (std::is_same_v<From, To>) {
    constexpr std::int64_t n = xsimd::batch<To, transpose_arch>::size;
    full_rows = rows - rows % n;
    full_columns = columns - columns % n;
    // Whole lines are written one after the other; lines that are read in pieces stay in cache.
    for (std::int64_t j = 0; j < full_columns; j += n)
      for (std::int64_t i = 0; i < full_rows; i += n)
        transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
  }
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = i < full_rows ? full_columns : 0; j < columns; ++j)
      to[j * to_stride + i] = element_cast<To>(from[i * from_stride + j]);
}

}}}  // namespace cca::CCA_TARGET::detail
