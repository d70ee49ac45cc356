#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../options.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The one table of the kernel's sizes, chosen by measurement.
///  - `vectors`: vectors of queries in a tile, every lane a query.
///  - `rows`: rows of a register block of `vectors` vectors. Its `rows * vectors` accumulators, `vectors` operands and
///    one broadcast fill the registers: 6 x 4 of 32, 6 x 2 of 16.
///  - `single_rows`: rows of a register block of one vector, enough to hide the latency of a multiply-add.
///  - `block`: rows of keys and values absorbed at once. Their weights, `block * lanes`, share the first-level cache
///    with the rows in use; long blocks spread the rescaling of the output over more products.
///  - `least_stack` to `stack`: tiles that take turns on a block while it is in cache, so that memory is read once for all
///    of them; the more the longer the sequence.
///  - `budget`: bytes of scratch that they should stay within: half of a second-level cache.
template <class T>
struct tile_shape {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr std::int64_t vectors = 4;
#else
  static constexpr std::int64_t vectors = 2;
#endif
  static constexpr std::int64_t rows = 6;
  static constexpr std::int64_t single_rows = 12;
  static constexpr std::int64_t lanes = vectors * width<T>;
  static constexpr std::int64_t block = 128;
  static constexpr std::int64_t least_stack = larger<std::int64_t>(64 / lanes, 1);
  static constexpr std::int64_t stack = larger<std::int64_t>(256 / lanes, 1);
  static constexpr std::int64_t budget = std::int64_t{1} << 19;

  /// Backward: rows whose gradients are summed at once, and tiles whose queries they are summed over.
  static constexpr std::int64_t gradient_block = 64;
  static constexpr std::int64_t gradient_stack = larger<std::int64_t>(128 / lanes, 1);
  static constexpr std::int64_t gradient_budget = std::int64_t{1}
                                                  << 19;  ///< bytes of scratch: half of a second-level cache

  /// Rows of a register block of `N` vectors.
  template <std::int64_t N>
  static constexpr std::int64_t rows_of = N == 1 ? single_rows : rows;
};

/// What a tile is made for: the dims of its rows, and the unit that multiplies them.
struct tile_form {
  std::int64_t dim, value_dim;
  matrix_unit unit = matrix_unit::none;
};

/// The stride of neighbours, known to the compiler.
using adjacent = std::integral_constant<std::int64_t, 1>;

/// `sum[r][n] += sum_i a[r * row_stride + i * step] * b[i * b_stride + n * width ..]` for i in `[0, steps)`: the register
/// block of all products of attention. An element of `a` is broadcast to all lanes, a vector of `b` serves all rows.
/// (The caller's array, not a returned one: g++ 12 keeps it in registers only so, at three times the speed.)
template <std::size_t Rows, std::size_t Vectors, class T, class RowStride, class Step>
CCA_INLINE void accumulate(vec<T> (&sum)[Rows][Vectors], const T* a, RowStride row_stride, Step step, const T* b,
                           std::int64_t b_stride, std::int64_t steps) {
  constexpr std::int64_t R = Rows, N = Vectors;
  // Three rows to an address: each is that and the stride, once or twice. Otherwise g++ makes an address of each row, which
  // are more than there are registers for: it loads them anew in each step, or puts sums where they were.
  constexpr std::int64_t each = std::is_same_v<RowStride, adjacent> ? R : 3, addresses = (R + each - 1) / each;
  const T* row[extent(addresses)];
  unroll<addresses>([&](auto k) CCA_INLINE_LAMBDA { row[k] = a + k * each * row_stride; });
  for (std::int64_t i = 0; i < steps; ++i, b += b_stride) {
    vec<T> operand[Vectors];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { operand[n] = vec<T>::load_aligned(b + n * width<T>); });
    unroll<R>([&](auto r) CCA_INLINE_LAMBDA {
      const vec<T> element(row[r / each][r % each * row_stride]);
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA { sum[r][n] = fma<T>(element, operand[n], sum[r][n]); });
    });
    unroll<addresses>([&](auto k) CCA_INLINE_LAMBDA {
      row[k] += step;
      if constexpr (addresses > 1) forget(row[k]);
    });
  }
}

/// The same from 0 on.
template <std::size_t Rows, std::size_t Vectors, class T, class RowStride, class Step>
CCA_INLINE void multiply(vec<T> (&sum)[Rows][Vectors], const T* a, RowStride row_stride, Step step, const T* b,
                         std::int64_t b_stride, std::int64_t steps) {
  constexpr std::int64_t N = Vectors;
  unroll<Rows * Vectors>([&](auto i) CCA_INLINE_LAMBDA { sum[i / N][i % N] = vec<T>(T(0)); });
  accumulate(sum, a, row_stride, step, b, b_stride, steps);
}

}}}  // namespace cca::CCA_TARGET::detail
