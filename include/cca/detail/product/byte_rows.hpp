#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/row_span.hpp"
#include "../simd/convert.hpp"
#include "../simd/dot.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "operands.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// Rows in 8 bits. Each has a scale of its own, `number = scale * byte` with bytes in [-127, 127], which hangs on nothing
// but the row: not on the block, the stack or the call that it is in, nor on what a query does not see.

/// Calls `f(piece, count, d)` for pieces of a row as floats, from element `d` on: whole vectors, zeros behind the row.
template <class Element, class F>
CCA_INLINE void for_each_piece(const Element* row, std::int64_t dim, const F& f) {
  if constexpr (std::is_same_v<Element, float>)
    if (dim % width<float> == 0) return f(row, dim, std::int64_t{0});
  constexpr std::int64_t most = 64;
  alignas(alignment<float>) float buffer[most];
  for (std::int64_t d = 0; d < dim; d += most) {
    const std::int64_t count = smaller(most, dim - d), whole = padded<float>(count);
    convert(row + d, count, buffer);
    fill(buffer + count, buffer + whole, 0.0f);
    f(buffer, whole, d);
  }
}

/// Rows of whichever type as floats, for the few that are not finite.
class float_rows {
 public:
  float_rows() = default;
  template <class Element>
  float_rows(const Element* rows, std::int64_t stride, std::int64_t dim)
      : rows_(rows),
        stride_(stride),
        dim_(dim),
        read_([](const void* from, std::int64_t at, std::int64_t n, float* to) {
          convert(static_cast<const Element*>(from) + at, n, to);
        }) {}

  /// Calls `f(d, x)` for the elements of row `j` if they are not all finite.
  template <class F>
  void for_each_of_infinite(std::int64_t j, const F& f) const {
    bool finite = true;
    for_each_element(j, [&](std::int64_t, float x) { finite &= detail::magnitude(x) <= largest_finite<float>; });
    if (!finite) for_each_element(j, f);
  }

 private:
  template <class F>
  void for_each_element(std::int64_t j, const F& f) const {
    constexpr std::int64_t most = 64;
    float piece[most];
    for (std::int64_t d = 0; d < dim_; d += most) {
      const std::int64_t count = smaller(most, dim_ - d);
      read_(rows_, j * stride_ + d, count, piece);
      for (std::int64_t i = 0; i < count; ++i) f(d + i, piece[i]);
    }
  }

  const void* rows_ = nullptr;
  std::int64_t stride_ = 0, dim_ = 0;
  void (*read_)(const void*, std::int64_t, std::int64_t, float*) = nullptr;
};

/// How a row is kept. One that is not finite is kept as zeros, in the scale of its finite elements.
struct byte_scale {
  float scale;
  bool finite;

  /// What numbers are multiplied by to become bytes.
  [[nodiscard]] float factor() const { return finite ? 1.0f / scale : 0.0f; }
};

[[nodiscard]] CCA_INLINE std::int32_t reduce_max(vec<std::int32_t> x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(x);
#else
  alignas(alignment<std::int32_t>) std::int32_t lanes[width<std::int32_t>];
  x.store_aligned(lanes);
  for (std::int64_t i = 1; i < width<std::int32_t>; ++i) lanes[0] = larger(lanes[0], lanes[i]);
  return lanes[0];
#endif
}

/// Of `dim` elements. What is below `least` in all of them counts as zero.
template <class Element>
[[nodiscard]] byte_scale scale_of(const Element* row, std::int64_t dim, float least) {
  constexpr std::int64_t W = width<float>;
  vec<std::int32_t> largest(0);  // bits without their sign are ordered as magnitudes are
  for_each_piece(row, dim, [&](const float* piece, std::int64_t count, std::int64_t) CCA_INLINE_LAMBDA {
    for (std::int64_t i = 0; i < count; i += W)
      largest = (xsimd::max)(
          largest, cast_bits<std::int32_t>(vec<float>::load_unaligned(piece + i)) & vec<std::int32_t>(0x7fffffff));
  });
  float magnitude = __builtin_bit_cast(float, reduce_max(largest));
  const bool finite = magnitude <= largest_finite<float>;
  if (!finite) {
    magnitude = 0.0f;
    for (std::int64_t d = 0; d < dim; ++d) {
      const float x = detail::magnitude(element_cast<float>(row[d]));
      if (x <= largest_finite<float>) magnitude = larger(magnitude, x);
    }
  }
  return {larger(magnitude, least) / 127.0f, finite};
}

/// Stores the lowest byte of each lane.
CCA_INLINE void store_bytes(vec<packed_quad> lanes, std::int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, lanes));
#else
  alignas(alignment<packed_quad>) packed_quad each[width<packed_quad>];
  lanes.store_aligned(each);
  for (std::int64_t i = 0; i < width<packed_quad>; ++i) to[i] = static_cast<std::int8_t>(each[i] & 0xff);
#endif
}

/// Writes `dim` elements times `factor` as bytes, to nearest, and zeros up to whole vectors of floats. Returns their sum.
template <class Element>
std::int32_t put_bytes(const Element* row, std::int64_t dim, float factor, std::int8_t* to) {
  constexpr std::int64_t W = width<float>;
  const vec<float> shifter(0x1.8p23f);  // leaves whole numbers in the lowest bits
  vec<float> sum(0.0f);
  for_each_piece(row, dim, [&](const float* piece, std::int64_t count, std::int64_t d) CCA_INLINE_LAMBDA {
    for (std::int64_t i = 0; i < count; i += W) {
      vec<float> shifted = fma<float>(vec<float>::load_unaligned(piece + i), vec<float>(factor), shifter);
      keep<float>(shifted);
      sum += shifted - shifter;
      store_bytes(cast_bits<packed_quad>(shifted), to + d + i);
    }
  });
  return static_cast<std::int32_t>(reduce_add<float>(sum));
}

/// Four rows of `n` bytes, a multiple of 16, as quads.
inline void interleave_quads(const std::int8_t* rows, std::int64_t n, packed_quad* to) {
  using bytes = xsimd::batch<std::uint8_t, transpose_arch>;
  using words = xsimd::batch<std::uint16_t, transpose_arch>;
  const auto as_words = [](bytes x) {
    words w;
    std::memcpy(static_cast<void*>(&w), &x, sizeof w);
    return w;
  };
  const auto* from = reinterpret_cast<const std::uint8_t*>(rows);
  for (std::int64_t i = 0; i < n; i += 16, to += 16) {
    bytes row[4];
    for (std::int64_t r = 0; r < 4; ++r) row[r] = bytes::load_unaligned(from + r * n + i);
    const words low[] = {as_words(xsimd::zip_lo(row[0], row[1])), as_words(xsimd::zip_lo(row[2], row[3]))};
    const words high[] = {as_words(xsimd::zip_hi(row[0], row[1])), as_words(xsimd::zip_hi(row[2], row[3]))};
    const words quads[] = {xsimd::zip_lo(low[0], low[1]), xsimd::zip_hi(low[0], low[1]),
                           xsimd::zip_lo(high[0], high[1]), xsimd::zip_hi(high[0], high[1])};
    std::memcpy(to, quads, sizeof quads);
  }
}

}}}  // namespace cca::CCA_TARGET::detail
