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
  float_rows(const Element* rows, std::int64_t stride, std::int64_t dim, row_scales scales)
      : rows_(rows),
        stride_(stride),
        dim_(dim),
        scales_(is_q8<Element> ? scales : row_scales{&one, 0}),
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
      for (std::int64_t i = 0; i < count; ++i) f(d + i, piece[i] * scales_[j]);
    }
  }

  static constexpr float one = 1;

  const void* rows_ = nullptr;
  std::int64_t stride_ = 0, dim_ = 0;
  row_scales scales_{};
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

/// Of `dim` elements. What is below `least` in all of them counts as zero. Inlined, as `put_bytes` is: 2 % of the whole.
template <class Element>
[[nodiscard]] CCA_INLINE byte_scale scale_of(const Element* row, std::int64_t dim, float least) {
  constexpr std::int64_t W = width<float>;
  vec<std::int32_t> largest(0), other(0);  // bits without their sign are ordered as magnitudes are
  for_each_piece(row, dim, [&](const float* piece, std::int64_t count, std::int64_t) CCA_INLINE_LAMBDA {
    const auto bits = [piece](std::int64_t i) CCA_INLINE_LAMBDA {
      return cast_bits<std::int32_t>(vec<float>::load_unaligned(piece + i)) & vec<std::int32_t>(0x7fffffff);
    };
    std::int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) {
      largest = (xsimd::max)(largest, (xsimd::max)(bits(i), bits(i + W)));
      other = (xsimd::max)(other, (xsimd::max)(bits(i + 2 * W), bits(i + 3 * W)));
    }
    for (; i < count; i += W) largest = (xsimd::max)(largest, bits(i));
  });
  float magnitude = __builtin_bit_cast(float, reduce_max((xsimd::max)(largest, other)));
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

#if defined(__AVX512BW__)

// What shuffles and converts is the form with a mask, of all lanes: g++ 12 finds that without one uninitialised.

/// Stores numbers times `factor` as bytes, to nearest, a vector of them or four, and adds them up.
class byte_writer {
 public:
  explicit byte_writer(float factor) : factor_(_mm512_set1_ps(factor)) {}

  CCA_INLINE void put(const float* from, std::int8_t* to) {
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, whole(from));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    add(_mm512_zextsi128_si512(bytes));
  }
  CCA_INLINE void put_four(const float* from, std::int8_t* to) {
    // Packing goes by lanes of 128 bits, and leaves each lane's four numbers of a vector side by side.
    const __m512i low = _mm512_maskz_packs_epi32(0xffffffff, whole(from), whole(from + 16));
    const __m512i high = _mm512_maskz_packs_epi32(0xffffffff, whole(from + 32), whole(from + 48));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes =
        _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_maskz_packs_epi16(~__mmask64{0}, low, high));
    _mm512_storeu_si512(to, bytes);
    add(bytes);
  }
  [[nodiscard]] std::int32_t sum() const {
    return static_cast<std::int32_t>(_mm512_reduce_add_epi64(sum_)) - surplus_;
  }

 private:
  [[nodiscard]] CCA_INLINE __m512i whole(const float* from) const {
    return _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(factor_, _mm512_loadu_ps(from)));
  }
  /// Bytes are added without a sign, each 128 more.
  CCA_INLINE void add(__m512i bytes) {
    const __m512i shifted = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
    sum_ = _mm512_add_epi64(sum_, _mm512_sad_epu8(shifted, _mm512_setzero_si512()));
    surplus_ += 64 * 128;
  }

  __m512 factor_;
  __m512i sum_ = _mm512_setzero_si512();
  std::int32_t surplus_ = 0;
};

#elif defined(__AVX2__)

/// The same of 8 numbers in a vector.
class byte_writer {
 public:
  explicit byte_writer(float factor) : factor_(_mm256_set1_ps(factor)) {}

  CCA_INLINE void put(const float* from, std::int8_t* to) {
    const __m256i x = whole(from);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i bytes = _mm_packs_epi16(words, _mm_setzero_si128());
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
    add(_mm256_inserti128_si256(_mm256_setzero_si256(), bytes, 0));
  }
  CCA_INLINE void put_four(const float* from, std::int8_t* to) {
    const __m256i low = _mm256_packs_epi32(whole(from), whole(from + 8));
    const __m256i high = _mm256_packs_epi32(whole(from + 16), whole(from + 24));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
    add(bytes);
  }
  [[nodiscard]] std::int32_t sum() const {
    alignas(32) std::int64_t part[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), sum_);
    return static_cast<std::int32_t>(part[0] + part[1] + part[2] + part[3]) - surplus_;
  }

 private:
  [[nodiscard]] CCA_INLINE __m256i whole(const float* from) const {
    return _mm256_cvtps_epi32(_mm256_mul_ps(factor_, _mm256_loadu_ps(from)));
  }
  CCA_INLINE void add(__m256i bytes) {
    const __m256i shifted = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    sum_ = _mm256_add_epi64(sum_, _mm256_sad_epu8(shifted, _mm256_setzero_si256()));
    surplus_ += 32 * 128;
  }

  __m256 factor_;
  __m256i sum_ = _mm256_setzero_si256();
  std::int32_t surplus_ = 0;
};

#else

/// The same with vectors of any width.
class byte_writer {
 public:
  explicit byte_writer(float factor) : factor_(factor) {}

  CCA_INLINE void put(const float* from, std::int8_t* to) {
    const vec<float> shifter(0x1.8p23f);  // leaves whole numbers in the lowest bits
    vec<float> shifted = fma<float>(vec<float>::load_unaligned(from), factor_, shifter);
    keep<float>(shifted);
    sum_ += shifted - shifter;
    alignas(alignment<packed_quad>) packed_quad each[width<packed_quad>];
    cast_bits<packed_quad>(shifted).store_aligned(each);
    for (std::int64_t i = 0; i < width<packed_quad>; ++i) to[i] = static_cast<std::int8_t>(each[i] & 0xff);
  }
  CCA_INLINE void put_four(const float* from, std::int8_t* to) {
    for (std::int64_t i = 0; i < 4; ++i) put(from + i * width<float>, to + i * width<float>);
  }
  [[nodiscard]] std::int32_t sum() const { return static_cast<std::int32_t>(reduce_add<float>(sum_)); }

 private:
  vec<float> factor_, sum_ = vec<float>(0.0f);
};

#endif

/// Writes `dim` elements times `factor` as bytes, to nearest, and zeros up to whole vectors of floats. Returns their sum.
template <class Element>
CCA_INLINE std::int32_t put_bytes(const Element* row, std::int64_t dim, float factor, std::int8_t* to) {
  constexpr std::int64_t W = width<float>;
  byte_writer writer(factor);
  for_each_piece(row, dim, [&](const float* piece, std::int64_t count, std::int64_t d) CCA_INLINE_LAMBDA {
    std::int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W) writer.put_four(piece + i, to + d + i);
    for (; i < count; i += W) writer.put(piece + i, to + d + i);
  });
  return writer.sum();
}

#if defined(__AVX512BW__)
/// 64 columns of four rows `n` bytes apart as quads.
inline void interleave_64_quads(const std::uint8_t* rows, std::int64_t n, packed_quad* to) {
  constexpr __mmask64 bytes = ~__mmask64{0};
  constexpr __mmask32 words = 0xffffffff;
  constexpr __mmask16 quads = 0xffff;
  __m512i row[4];
  for (std::int64_t r = 0; r < 4; ++r) row[r] = _mm512_loadu_si512(rows + r * n);
  const __m512i low[] = {_mm512_maskz_unpacklo_epi8(bytes, row[0], row[1]),
                         _mm512_maskz_unpacklo_epi8(bytes, row[2], row[3])};
  const __m512i high[] = {_mm512_maskz_unpackhi_epi8(bytes, row[0], row[1]),
                          _mm512_maskz_unpackhi_epi8(bytes, row[2], row[3])};
  // In each lane of 128 bits columns of its own: lanes are transposed.
  const __m512i of[] = {_mm512_maskz_unpacklo_epi16(words, low[0], low[1]),
                        _mm512_maskz_unpackhi_epi16(words, low[0], low[1]),
                        _mm512_maskz_unpacklo_epi16(words, high[0], high[1]),
                        _mm512_maskz_unpackhi_epi16(words, high[0], high[1])};
  const __m512i half[] = {
      _mm512_maskz_shuffle_i32x4(quads, of[0], of[1], 0x44), _mm512_maskz_shuffle_i32x4(quads, of[2], of[3], 0x44),
      _mm512_maskz_shuffle_i32x4(quads, of[0], of[1], 0xee), _mm512_maskz_shuffle_i32x4(quads, of[2], of[3], 0xee)};
  for (std::int64_t i = 0; i < 4; i += 2, to += 32) {
    _mm512_storeu_si512(to, _mm512_maskz_shuffle_i32x4(quads, half[i], half[i + 1], 0x88));
    _mm512_storeu_si512(to + 16, _mm512_maskz_shuffle_i32x4(quads, half[i], half[i + 1], 0xdd));
  }
}
#endif

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
  std::int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n; i += 64, to += 64) interleave_64_quads(from + i, n, to);
#endif
  for (; i < n; i += 16, to += 16) {
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
