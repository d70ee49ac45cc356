#pragma once

#include <cstdint>
#include <cstring>

#if defined(CCA_MATRIX_UNITS)
#include <immintrin.h>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../base/processor.hpp"
#include "../context/row_span.hpp"
#endif

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Two neighbouring 16-bit elements, the first in the lower half: what matrix units multiply and add at once.
using packed_pair = std::uint32_t;

/// Rows, lanes and elements that a unit takes at a time: twice a tile of AMX, 16 rows of 64 bytes, either way.
inline constexpr std::int64_t unit_rows = 32;
inline constexpr std::int64_t unit_depth = 32;

/// `n` rounded up to what a unit takes at a time.
[[nodiscard]] constexpr std::int64_t whole_units(std::int64_t n) { return (n + unit_rows - 1) / unit_rows * unit_rows; }

/// Rows of elements, as they lie in memory. What is added along the row has zeros up to whole units.
struct element_rows {
  const std::uint16_t* data = nullptr;
  std::int64_t stride = 0;

  [[nodiscard]] const std::uint16_t* row(std::int64_t i) const { return data + i * stride; }
};

/// Rows of pairs, one pair per lane; zeros up to whole units, as above.
struct pair_rows {
  const packed_pair* data = nullptr;
  std::int64_t stride = 0;
};

#if defined(CCA_MATRIX_UNITS)

/// AMX's registers, configured for as long as this lives: eight tiles of 16 rows of 64 bytes. The configuration is left as
/// it was found; the tiles' contents nobody can expect to survive a call, as the ABI says.
class tile_registers {
 public:
  explicit tile_registers(matrix_unit unit) : in_use_(unit == matrix_unit::amx) {
    if (!in_use_) return;
    configuration ours;
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) {
      ours.row_bytes[i] = 64;
      ours.rows[i] = 16;
    }
    asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(found_) : "m"(ours));
  }
  ~tile_registers() {
    if (!in_use_) return;
    if (found_.palette == 0)
      asm volatile("tilerelease");
    else
      asm volatile("ldtilecfg %0" : : "m"(found_));
  }
  tile_registers(const tile_registers&) = delete;
  tile_registers& operator=(const tile_registers&) = delete;

 private:
  struct configuration {  // in memory
    std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  static_assert(sizeof(configuration) == 64);

  bool in_use_;
  configuration found_;
};

/// 32 x 32 numbers of `c`: four tiles that share the four which are loaded for each step. The instructions are spelled out
/// since g++ 12 and clang 14 differ in what they ask for before they let one write them, and do not know those of half.
template <class Element>
inline void multiply_tiles(element_rows a, pair_rows b,
                           float* c,  // NOLINT(readability-non-const-parameter): the instructions write there
                           std::int64_t c_stride, std::int64_t steps) {
  const std::uint16_t* rows = a.data;
  const packed_pair* lanes = b.data;
  const std::int64_t a_bytes = a.stride * 2, b_bytes = b.stride * 4, c_bytes = c_stride * 4;
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
  for (std::int64_t i = 0; i < steps; ++i, rows += unit_depth, lanes += unit_depth / 2 * b.stride) {
    asm volatile(
        "tileloadd (%0,%2,1), %%tmm4\n\t"
        "tileloadd (%3,%5,1), %%tmm6\n\t"
        "tileloadd (%1,%2,1), %%tmm5\n\t"
        "tileloadd (%4,%5,1), %%tmm7"
        :
        : "r"(rows), "r"(rows + 16 * a.stride), "r"(a_bytes), "r"(lanes), "r"(lanes + 16), "r"(b_bytes)
        : "memory");
    if constexpr (is_bfloat16<Element>)
      asm volatile(
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
          "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
          "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::
              : "memory");
    else  // tdpfp16ps of the same registers
      asm volatile(
          ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4\n\t"
          ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc\n\t"
          ".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5\n\t"
          ".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd" ::
              : "memory");
  }
  asm volatile(
      "tilestored %%tmm0, (%0,%2,1)\n\t"
      "tilestored %%tmm1, 64(%0,%2,1)\n\t"
      "tilestored %%tmm2, (%1,%2,1)\n\t"
      "tilestored %%tmm3, 64(%1,%2,1)"
      :
      : "r"(c), "r"(c + 16 * c_stride), "r"(c_bytes)
      : "memory");
}

/// `R` rows of `c` by `N` vectors of 16 lanes: as the register block `multiply` of floats, with a pair for an element.
template <std::int64_t R, std::int64_t N>
__attribute__((target("avx512f,avx512bw,avx512bf16"))) void multiply_vectors(element_rows a, pair_rows b, float* c,
                                                                             std::int64_t c_stride,
                                                                             std::int64_t pairs) {
  __m512 sum[R][N];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  const std::uint16_t* element = a.data;
  const packed_pair* lanes = b.data;
  for (std::int64_t i = 0; i < pairs; ++i, element += 2, lanes += b.stride) {
    __m512i operand[N];
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) operand[n] = _mm512_load_si512(lanes + n * 16);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < R; ++r) {
      int both;
      std::memcpy(&both, element + r * a.stride, sizeof both);
      const __m512i broadcast = _mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (std::int64_t n = 0; n < N; ++n)
        sum[r][n] = _mm512_dpbf16_ps(sum[r][n], (__m512bh)broadcast, (__m512bh)operand[n]);
    }
  }
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (std::int64_t n = 0; n < N; ++n) _mm512_store_ps(c + r * c_stride + n * 16, sum[r][n]);
}

/// `c[i][j] = sum_k a[i][k] b[k][j]` in float, for i in `[0, rows)`, j in `[0, lanes)` and k in `[0, depth)`, where
/// `b[k]` and `b[k + 1]` are the halves of a pair. With tiles all three are rounded up to whole units: `a` has to be readable
/// and `c` writable so far. A unit takes denormals for zeros, and rounds to nearest.
template <class Element>
void multiply(matrix_unit unit, element_rows a, pair_rows b, float* c, std::int64_t c_stride, std::int64_t rows,
              std::int64_t lanes, std::int64_t depth) {
  if (unit == matrix_unit::amx) {
    const std::int64_t steps = whole_units(depth) / unit_depth;
    for (std::int64_t i = 0; i < rows; i += unit_rows)
      for (std::int64_t j = 0; j < lanes; j += unit_rows)
        multiply_tiles<Element>({a.row(i), a.stride}, {b.data + j, b.stride}, c + i * c_stride + j, c_stride, steps);
    return;
  }
  for_row_blocks<4>((lanes + 15) / 16, [&](auto n, std::int64_t vector) {
    constexpr std::int64_t N = n();
    for_row_blocks<N == 1 ? 12 : 6>(rows, [&](auto r, std::int64_t i) {
      multiply_vectors<r(), N>({a.row(i), a.stride}, {b.data + vector * 16, b.stride}, c + i * c_stride + vector * 16,
                               c_stride, (depth + 1) / 2);
    });
  });
}

#else

/// No unit is ever chosen here.
class tile_registers {
 public:
  explicit tile_registers(matrix_unit) {}
};

template <class Element>
void multiply(matrix_unit, element_rows, pair_rows, float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t) {}

#endif

}}}  // namespace cca::CCA_TARGET::detail
