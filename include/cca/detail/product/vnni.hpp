#pragma once

#include <cstdint>
#include <cstring>

#include "../base/numbers.hpp"
#include "../base/processor.hpp"
#include "../context/row_span.hpp"
#include "avx_vnni.hpp"
#include "operands.hpp"

#if defined(CCA_MATRIX_UNITS)
#include <immintrin.h>
#endif

namespace cca { inline namespace CCA_TARGET { namespace detail {

#if defined(CCA_MATRIX_UNITS)

// The instruction of all products is spelled out: of the intrinsic's types g++ 12 makes copies and stores of every
// accumulator, at half the speed. Conversions and maxima are those with a mask, of all lanes: g++ 12 finds those without
// one uninitialised.

// Operands come by reference, with the row and the lane to begin at: copies of them for each block of rows, stored in pieces
// and loaded in others, waited for those stores, 4 to 8 % of the whole. None is inlined: g++ 12 puts accumulators into memory
// where several of them meet in one function.

/// Scores of `R` rows from `row` on by `N` vectors of 16 lanes from `lane` on.
template <std::int64_t R, std::int64_t N>
__attribute__((noinline, target("avx512f,avx512bw,avx512vnni"))) void score_vectors(const byte_keys& all_keys,
                                                                                    const byte_queries& all_queries,
                                                                                    const byte_scores& all_scores,
                                                                                    std::int64_t row,
                                                                                    std::int64_t lane) {
  byte_keys keys = all_keys.from(row);
  byte_queries queries = all_queries.from(lane);
  const byte_scores to = all_scores.from(row, lane);
  __m512i sum[extent(R)][extent(N)];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm512_set1_epi32(keys.start[r]);
  for (std::int64_t i = 0; i < queries.steps; ++i, keys.data += 4, queries.data += queries.stride) {
    __m512i operand[extent(N)];
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) operand[n] = _mm512_load_si512(queries.data + n * 16);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      int four;
      std::memcpy(&four, keys.data + r * keys.stride, sizeof four);
      const __m512i broadcast = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (std::int64_t n = 0; n < N; ++n)
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][n]) : "v"(operand[n]), "v"(broadcast));
    }
  }
  constexpr __mmask16 all = 0xffff;
  const __m512 unit = _mm512_set1_ps(to.unit);
  __m512 scale[extent(N)], maximum[extent(N)];
#pragma GCC unroll 4
  for (std::int64_t n = 0; n < N; ++n) {
    scale[n] = _mm512_mul_ps(unit, _mm512_load_ps(queries.scale + n * 16));
    maximum[n] = _mm512_load_ps(to.maximum + n * 16);
  }
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r) {
    const __m512 key_scale = _mm512_set1_ps(keys.scale[r]), exponent = _mm512_set1_ps(to.exponent[r]);
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) {
      const __m512 score =
          _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(all, sum[r][n]), _mm512_mul_ps(scale[n], key_scale), exponent);
      _mm512_store_ps(to.data + r * to.stride + n * 16, score);
      maximum[n] = _mm512_maskz_max_ps(all, maximum[n], score);
    }
  }
#pragma GCC unroll 4
  for (std::int64_t n = 0; n < N; ++n) _mm512_store_ps(to.maximum + n * 16, maximum[n]);
}

/// Adds `R` rows of sums from `d` on by `N` vectors of 16 lanes from `lane` on.
template <std::int64_t R, std::int64_t N>
__attribute__((noinline, target("avx512f,avx512bw,avx512vnni"))) void add_vectors(const byte_columns& all_columns,
                                                                                  const byte_weights& all_weights,
                                                                                  const byte_sums& all_sums,
                                                                                  std::int64_t d, std::int64_t lane) {
  byte_columns columns = all_columns.from(d);
  byte_weights weights = all_weights.from(lane);
  const byte_sums to{all_sums.data + d * weights.stride + lane, all_sums.rescale + lane, all_sums.steps};
  __m512i sum[extent(R)][extent(N)];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < to.steps; ++i, columns.data += columns.stride, weights.data += weights.stride) {
    __m512i operand[extent(N)];
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) operand[n] = _mm512_load_si512(weights.data + n * 16);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      const __m512i broadcast = _mm512_set1_epi32(static_cast<int>(columns.data[r]));
#pragma GCC unroll 4
      for (std::int64_t n = 0; n < N; ++n)
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][n]) : "v"(operand[n]), "v"(broadcast));
    }
  }
  constexpr __mmask16 all = 0xffff;
  __m512 factor[extent(N)], share[extent(N)];
#pragma GCC unroll 4
  for (std::int64_t n = 0; n < N; ++n) {
    factor[n] = _mm512_load_ps(to.rescale + n * 16);
    share[n] = _mm512_load_ps(weights.share + n * 16);
  }
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) {
      float* const at = to.data + r * weights.stride + n * 16;
      const __m512 more = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(all, sum[r][n]), share[n]);
      _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), factor[n], more));
    }
}

/// Calls `f(constant rows, i, lane)` for blocks of rows and, each `Lanes` wide, of lanes.
template <std::int64_t Lanes, class F>
CCA_INLINE void for_byte_blocks(std::int64_t rows, std::int64_t lanes, const F& f) {
  for (std::int64_t lane = 0; lane < lanes; lane += Lanes)
    for_row_blocks<6>(rows, [&](auto r, std::int64_t i) { f(r, i, lane); });
}

/// Scores of `rows` rows in all lanes. The maxima are raised.
inline void score_bytes(const byte_keys& keys, const byte_queries& queries, const byte_scores& to, std::int64_t rows) {
  if (present_units().avx512_vnni)
    for_byte_blocks<64>(rows, to.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      score_vectors<r(), 4>(keys, queries, to, i, lane);
    });
  else
    for_byte_blocks<16>(rows, to.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      score_half_vectors<r(), 2>(keys, queries, to, i, lane);
    });
}

/// Adds `rows` rows of sums in all lanes.
inline void add_bytes(const byte_columns& columns, const byte_weights& weights, const byte_sums& to,
                      std::int64_t rows) {
  if (present_units().avx512_vnni)
    for_byte_blocks<64>(rows, weights.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      add_vectors<r(), 4>(columns, weights, to, i, lane);
    });
  else
    for_byte_blocks<16>(rows, weights.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      add_half_vectors<r(), 2>(columns, weights, to, i, lane);
    });
}

#else

inline void score_bytes(const byte_keys&, const byte_queries&, const byte_scores&, std::int64_t) {}
inline void add_bytes(const byte_columns&, const byte_weights&, const byte_sums&, std::int64_t) {}

#endif

}}}  // namespace cca::CCA_TARGET::detail
