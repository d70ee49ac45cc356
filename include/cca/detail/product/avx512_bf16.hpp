#pragma once

#include <cstdint>
#include <cstring>

#include "../base/numbers.hpp"
#include "../base/processor.hpp"
#include "../context/row_span.hpp"
#include "operands.hpp"

#if defined(CCA_MATRIX_UNITS)
#include <immintrin.h>
#endif

namespace cca { inline namespace CCA_TARGET { namespace detail {

#if defined(CCA_MATRIX_UNITS)

/// `R` rows of `c` by `N` vectors of 16 lanes: as the register block `multiply` of floats, with a pair for an element.
template <std::int64_t R, std::int64_t N>
__attribute__((target("avx512f,avx512bw,avx512bf16"))) void multiply_vectors(element_rows a, pair_rows b, float* c,
                                                                             std::int64_t c_stride,
                                                                             std::int64_t pairs) {
  __m512 sum[extent(R)][extent(N)];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  const std::uint16_t* element = a.data;
  const packed_pair* lanes = b.data;
  for (std::int64_t i = 0; i < pairs; ++i, element += 2, lanes += b.stride) {
    __m512i operand[extent(N)];
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) operand[n] = _mm512_load_si512(lanes + n * 16);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      int both;
      std::memcpy(&both, element + r * a.stride, sizeof both);
      const __m512i broadcast = _mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (std::int64_t n = 0; n < N; ++n)
        sum[r][n] =
            _mm512_dpbf16_ps(sum[r][n], reinterpret_cast<__m512bh>(broadcast), reinterpret_cast<__m512bh>(operand[n]));
    }
  }
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) _mm512_store_ps(c + r * c_stride + n * 16, sum[r][n]);
}

/// `c[i][j] = sum_k a[i][k] b[k][j]` for i in `[0, rows)`, j in `[0, lanes)` and `pairs` pairs of k.
inline void multiply_avx512_bf16(element_rows a, pair_rows b, float* c, std::int64_t c_stride, std::int64_t rows,
                                 std::int64_t lanes, std::int64_t pairs) {
  for_row_blocks<4>((lanes + 15) / 16, [&](auto n, std::int64_t vector) {
    constexpr std::int64_t N = n();
    for_row_blocks<N == 1 ? 12 : 6>(rows, [&](auto r, std::int64_t i) {
      multiply_vectors<r(), N>({a.row(i), a.stride}, {b.data + vector * 16, b.stride}, c + i * c_stride + vector * 16,
                               c_stride, pairs);
    });
  });
}

#endif

}}}  // namespace cca::CCA_TARGET::detail
