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

/// Scores of `R` rows by `N` vectors of 16 lanes.
template <std::int64_t R, std::int64_t N>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void score_vectors(byte_keys keys, byte_queries queries,
                                                                          byte_scores to) {
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
      const __m512 score = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(all, sum[r][n]), _mm512_mul_ps(scale[n], key_scale),
                                           exponent);
      _mm512_store_ps(to.data + r * to.stride + n * 16, score);
      maximum[n] = _mm512_maskz_max_ps(all, maximum[n], score);
    }
  }
#pragma GCC unroll 4
  for (std::int64_t n = 0; n < N; ++n) _mm512_store_ps(to.maximum + n * 16, maximum[n]);
}

/// `R` rows of a sum by `N` vectors of 16 lanes, `[R][stride of the weights]`.
template <std::int64_t R, std::int64_t N>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void add_vectors(byte_columns columns, byte_weights weights,
                                                                        const float* rescale, float* to,
                                                                        std::int64_t steps) {
  __m512i sum[extent(R)][extent(N)];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < steps; ++i, columns.data += columns.stride, weights.data += weights.stride) {
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
    factor[n] = _mm512_load_ps(rescale + n * 16);
    share[n] = _mm512_load_ps(weights.share + n * 16);
  }
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) {
      float* const at = to + r * weights.stride + n * 16;
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
  const auto block = [&](std::int64_t i, std::int64_t lane, const auto& kernel) CCA_INLINE_LAMBDA {
    kernel(byte_keys{keys.data + i * keys.stride, keys.stride, keys.scale + i, keys.start + i},
           byte_queries{queries.data + lane, queries.stride, queries.steps, queries.scale + lane},
           byte_scores{to.data + i * to.stride + lane, to.stride, to.maximum + lane, to.exponent + i, to.unit});
  };
  if (present_units().avx512_vnni)
    for_byte_blocks<64>(rows, to.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      block(i, lane, score_vectors<r(), 4>);
    });
  else
    for_byte_blocks<16>(rows, to.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      block(i, lane, score_half_vectors<r(), 2>);
    });
}

/// `to = to * rescale + share * columns weights`, `[rows][lanes]`, of `steps` quads of values.
inline void add_bytes(const byte_columns& columns, const byte_weights& weights, const float* rescale, float* to,
                      std::int64_t rows, std::int64_t steps) {
  const auto block = [&](std::int64_t i, std::int64_t lane, const auto& kernel) CCA_INLINE_LAMBDA {
    kernel(byte_columns{columns.data + i, columns.stride},
           byte_weights{weights.data + lane, weights.stride, weights.share + lane}, rescale + lane,
           to + i * weights.stride + lane, steps);
  };
  if (present_units().avx512_vnni)
    for_byte_blocks<64>(rows, weights.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      block(i, lane, add_vectors<r(), 4>);
    });
  else
    for_byte_blocks<16>(rows, weights.stride, [&](auto r, std::int64_t i, std::int64_t lane) {
      block(i, lane, add_half_vectors<r(), 2>);
    });
}

#else

inline void score_bytes(const byte_keys&, const byte_queries&, const byte_scores&, std::int64_t) {}
inline void add_bytes(const byte_columns&, const byte_weights&, const float*, float*, std::int64_t, std::int64_t) {}

#endif

}}}  // namespace cca::CCA_TARGET::detail
