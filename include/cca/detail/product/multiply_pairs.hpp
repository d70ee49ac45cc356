#pragma once

#include <cstdint>

#include "../../options.hpp"
#include "amx.hpp"
#include "avx512_bf16.hpp"
#include "operands.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// The list of matrix units. Each multiplies the same operands: rows of 16-bit elements, and pairs of them in lanes.

#if defined(CCA_MATRIX_UNITS)

/// `c[i][j] = sum_k a[i][k] b[k][j]` in float, for i in `[0, rows)`, j in `[0, lanes)` and k in `[0, depth)`, where
/// `b[k]` and `b[k + 1]` are the halves of a pair. With tiles all three are rounded up to whole units: `a` has to be readable
/// and `c` writable so far. A unit takes denormals for zeros, and rounds to nearest.
template <class Element>
void multiply(matrix_unit unit, element_rows a, pair_rows b, float* c, std::int64_t c_stride, std::int64_t rows,
              std::int64_t lanes, std::int64_t depth) {
  if (unit == matrix_unit::amx) {
    const std::int64_t steps = whole_units(depth) / unit_depth;
    for (std::int64_t i = 0; i < rows; i += unit_height)
      for (std::int64_t j = 0; j < lanes; j += unit_height)
        multiply_tiles<Element>({a.row(i), a.stride}, {b.data + j, b.stride}, c + i * c_stride + j, c_stride, steps);
    return;
  }
  multiply_avx512_bf16(a, b, c, c_stride, rows, lanes, (depth + 1) / 2);
}

#else

template <class Element>
void multiply(matrix_unit, element_rows, pair_rows, float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t) {}

#endif

}}}  // namespace cca::CCA_TARGET::detail
