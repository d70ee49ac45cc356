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

// The kernels of vnni.hpp in 16 registers of 256 bits, for processors that have AVX-VNNI alone. The prefix keeps assemblers
// from the form that only AVX-512 has.

/// Scores of `R` rows from `row` on by `N` vectors of 8 lanes from `lane` on.
template <std::int64_t R, std::int64_t N>
__attribute__((noinline, target("avx2,fma"))) void score_half_vectors(const byte_keys& all_keys,
                                                                      const byte_queries& all_queries,
                                                                      const byte_scores& all_scores, std::int64_t row,
                                                                      std::int64_t lane) {
  byte_keys keys = all_keys.from(row);
  byte_queries queries = all_queries.from(lane);
  const byte_scores to = all_scores.from(row, lane);
  __m256i sum[extent(R)][extent(N)];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm256_set1_epi32(keys.start[r]);
  for (std::int64_t i = 0; i < queries.steps; ++i, keys.data += 4, queries.data += queries.stride) {
    __m256i operand[extent(N)];
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n)
      operand[n] = _mm256_load_si256(reinterpret_cast<const __m256i*>(queries.data + n * 8));
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      int four;
      std::memcpy(&four, keys.data + r * keys.stride, sizeof four);
      const __m256i broadcast = _mm256_set1_epi32(four);
#pragma GCC unroll 4
      for (std::int64_t n = 0; n < N; ++n)
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[r][n]) : "x"(operand[n]), "x"(broadcast));
    }
  }
  const __m256 unit = _mm256_set1_ps(to.unit);
#pragma GCC unroll 4
  for (std::int64_t n = 0; n < N; ++n) {
    const __m256 scale = _mm256_mul_ps(unit, _mm256_load_ps(queries.scale + n * 8));
    __m256 maximum = _mm256_load_ps(to.maximum + n * 8);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      const __m256 score =
          _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][n]), _mm256_mul_ps(scale, _mm256_set1_ps(keys.scale[r])),
                          _mm256_set1_ps(to.exponent[r]));
      _mm256_store_ps(to.data + r * to.stride + n * 8, score);
      maximum = _mm256_max_ps(maximum, score);
    }
    _mm256_store_ps(to.maximum + n * 8, maximum);
  }
}

/// Adds `R` rows of sums from `d` on by `N` vectors of 8 lanes from `lane` on.
template <std::int64_t R, std::int64_t N>
__attribute__((noinline, target("avx2,fma"))) void add_half_vectors(const byte_columns& all_columns,
                                                                    const byte_weights& all_weights,
                                                                    const byte_sums& all_sums, std::int64_t d,
                                                                    std::int64_t lane) {
  byte_columns columns = all_columns.from(d);
  byte_weights weights = all_weights.from(lane);
  const byte_sums to{all_sums.data + d * weights.stride + lane, all_sums.rescale + lane, all_sums.steps};
  __m256i sum[extent(R)][extent(N)];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < to.steps; ++i, columns.data += columns.stride, weights.data += weights.stride) {
    __m256i operand[extent(N)];
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n)
      operand[n] = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights.data + n * 8));
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      const __m256i broadcast = _mm256_set1_epi32(static_cast<int>(columns.data[r]));
#pragma GCC unroll 4
      for (std::int64_t n = 0; n < N; ++n)
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[r][n]) : "x"(operand[n]), "x"(broadcast));
    }
  }
#pragma GCC unroll 4
  for (std::int64_t n = 0; n < N; ++n) {
    const __m256 factor = _mm256_load_ps(to.rescale + n * 8), share = _mm256_load_ps(weights.share + n * 8);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      float* const at = to.data + r * weights.stride + n * 8;
      const __m256 more = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[r][n]), share);
      _mm256_store_ps(at, _mm256_fmadd_ps(_mm256_load_ps(at), factor, more));
    }
  }
}

#endif

}}}  // namespace cca::CCA_TARGET::detail
