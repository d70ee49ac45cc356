#pragma once

#include <cstdint>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../base/processor.hpp"
#include "operands.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

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

#else

/// No unit is ever chosen here.
class tile_registers {
 public:
  explicit tile_registers(matrix_unit) {}
};

#endif

}}}  // namespace cca::CCA_TARGET::detail
