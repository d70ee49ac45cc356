#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#include "../base/numbers.hpp"
#include "../base/target.hpp"
#include "arch.hpp"

#if defined(__GNUC__) || defined(__clang__)
#define CCA_INLINE inline __attribute__((always_inline))
#define CCA_INLINE_LAMBDA __attribute__((always_inline))
#else
#define CCA_INLINE inline
#define CCA_INLINE_LAMBDA
#endif

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The vector of the translation unit's own instruction set.
template <class T>
using vec = xsimd::batch<T, vector_arch>;

/// One truth value per lane of a `vec<T>`.
template <class T>
using vec_mask = typename vec<T>::batch_bool_type;

template <class T>
inline constexpr std::int64_t width = static_cast<std::int64_t>(vec<T>::size);

template <class T>
inline constexpr std::size_t alignment = vec<T>::arch_type::alignment();

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();

/// Calls `f(constant 0), .. f(constant N-1)`, where what is called is compiled for each number.
template <std::int64_t N, class F>
CCA_INLINE void for_constants(const F& f) {
  const auto each = [&]<std::int64_t... Index>(std::integer_sequence<std::int64_t, Index...>) CCA_INLINE_LAMBDA {
    (f(std::integral_constant<std::int64_t, Index>{}), ...);
  };
  each(std::make_integer_sequence<std::int64_t, N>{});
}

/// Calls `f(0), .. f(N-1)`: a loop that is unrolled, so that the arrays which it indexes live in registers; by g++ from -O2
/// on. (`for_constants` would do so at any level, and takes twice as long to compile.)
template <std::int64_t N, class F>
CCA_INLINE void unroll(const F& f) {
  static_assert(N <= 64);
#if defined(__clang__)
#pragma clang loop unroll(full)
#else
#pragma GCC unroll 64
#endif
  for (std::int64_t i = 0; i < N; ++i) f(i);
}

/// `a * b + c` in one rounding where the processor can. xsimd 8.1 has no AVX-512 one: its product and sum are fused by
/// g++ but not by clang, at half the speed.
template <class T>
CCA_INLINE vec<T> fma(vec<T> a, vec<T> b, vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#else
  return xsimd::fma(a, b, c);
#endif
}

/// Not by xsimd's AVX2 where AVX-512 is there: it would be shared with units of AVX2.
template <class T>
CCA_INLINE T reduce_add(vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_reduce_add_ps(x);
  else
    return _mm512_reduce_add_pd(x);
#elif XSIMD_VERSION_MAJOR >= 9
  return xsimd::reduce_add(x);
#else
  return xsimd::hadd(x);
#endif
}

/// The same bits read as lanes of type `To`.
template <class To, class From>
CCA_INLINE vec<To> cast_bits(vec<From> x) {
#if XSIMD_VERSION_MAJOR >= 11
  return xsimd::bitwise_cast<To>(x);
#else
  return xsimd::bitwise_cast<vec<To>>(x);
#endif
}

/// Loads `n` elements, 0 <= n < width, and zeros; nothing behind them is read.
template <class T>
CCA_INLINE vec<T> load_partial(const T* from, std::int64_t n) {
#if defined(__AVX512F__)
  const auto mask = (1u << n) - 1u;
  if constexpr (std::is_same_v<T, float>)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  else
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
#else
  alignas(alignment<T>) T buffer[width<T>] = {};
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = from[i];
  return vec<T>::load_aligned(buffer);
#endif
}

/// Stores the first `n` lanes, 0 <= n < width; nothing behind them is written.
template <class T>
CCA_INLINE void store_partial(T* to, vec<T> x, std::int64_t n) {
  alignas(alignment<T>) T buffer[width<T>];
  x.store_aligned(buffer);
  for (std::int64_t i = 0; i < n; ++i) to[i] = buffer[i];
}

/// Lets the compiler forget how a number or an address was made, so that it keeps nothing ready to make others like it.
template <class T>
CCA_INLINE void forget(T& x) {
#if defined(__GNUC__)
  asm("" : "+r"(x));
#endif
}

/// Elements of a cache line.
template <class T>
inline constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));

/// The address of element `d` of the row `rows` rows of `stride` behind `from`. It may lie outside of the array: it is made
/// by numbers that may wrap around.
template <class T>
[[nodiscard]] CCA_INLINE std::uintptr_t place_in_memory(const T* from, std::int64_t rows, std::int64_t stride,
                                                        std::int64_t d) {
  const auto offset =
      static_cast<std::uintptr_t>(rows) * static_cast<std::uintptr_t>(stride) + static_cast<std::uintptr_t>(d);
  return reinterpret_cast<std::uintptr_t>(from) + offset * sizeof(T);
}

/// @{
/// Asks for the cache line of an address, of which nothing is read: `prefetch` for the second-level cache, `prefetch_first`
/// for the first, where the line is wanted before others would drive it out.
CCA_INLINE void prefetch(std::uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2); }
CCA_INLINE void prefetch_first(std::uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 3);
}
/// @}

/// Minimax polynomials for 2^f on [-1/2, 1/2] with p(0) = 1, so that the weight of the maximum is exactly 1.
/// Relative error 2.6e-9 (float) and 1.8e-17 (double), below the rounding of the evaluation.
template <class T>
struct exp2_constants;

template <>
struct exp2_constants<float> {
  using integer = std::int32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float polynomial[] = {0x1.470b4ap-13f, 0x1.5f7276p-10f, 0x1.3b270ep-7f,
                                         0x1.c6ae72p-5f,  0x1.ebfbe2p-3f,  0x1.62e432p-1f};
};

template <>
struct exp2_constants<double> {
  using integer = std::int64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double polynomial[] = {0x1.c0638527edf34p-32, 0x1.e605f979c7a5dp-28, 0x1.b54167a0b9061p-24,
                                          0x1.62bfd49ed0adfp-20, 0x1.ffcbee3b0af8cp-17, 0x1.4309130961163p-13,
                                          0x1.5d87fe7bbbe07p-10, 0x1.3b2ab6fba1e1cp-7,  0x1.c6b08d7048f31p-5,
                                          0x1.ebfbdff82c598p-3,  0x1.62e42fefa39f3p-1};
};

/// Whether all of some vectors are finite. Bits without their sign are ordered as magnitudes are, infinities and NaNs last:
/// a maximum raises no exception, and truth values, which move between registers, are made once.
template <class T>
class finite_check {
  using integer = typename exp2_constants<T>::integer;
  static constexpr integer exponent = (2 * integer(exp2_constants<T>::bias) + 1) << exp2_constants<T>::mantissa_bits;

 public:
  CCA_INLINE void add(vec<T> x) {
    constexpr integer magnitude = (std::numeric_limits<integer>::max)();
    largest_ = (xsimd::max)(largest_, cast_bits<integer>(x) & vec<integer>(magnitude));
  }
  [[nodiscard]] CCA_INLINE bool holds() const { return xsimd::all(largest_ < vec<integer>(exponent)); }

 private:
  vec<integer> largest_ = vec<integer>(integer(0));
};

/// Whether none of the `n` elements is infinite or NaN.
template <class T>
bool all_finite(const T* x, std::int64_t n) {
  finite_check<T> finite;
  std::int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) finite.add(vec<T>::load_unaligned(x + i));
  finite.add(load_partial(x + i, n - i));
  return finite.holds();
}

/// Where the results of `exp2` end. With a `headroom` of h they are 2^-h times as large, so that 2^h of them, times numbers
/// of any size, add up to a finite sum; those below the normal numbers are 0.
template <class T>
struct exp2_range {
  using constants = exp2_constants<T>;
  vec<T> least;
  /// Adding it rounds x to a whole number n and leaves n + bias - h in the lowest bits, whence a shift makes 2^(n - h).
  vec<T> shifter;

  explicit exp2_range(int headroom = 0)
      : least(static_cast<T>(1 - constants::bias + headroom)),
        shifter(T(3) * static_cast<T>(typename constants::integer(1) << (constants::mantissa_bits - 1)) +
                static_cast<T>(constants::bias - headroom)) {}
};

/// Keeps a compiler that may reorder sums (-fassociative-math, a part of -ffast-math) from undoing those of `exp2`.
template <class T>
CCA_INLINE void keep(vec<T>& x) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(x.data));
#elif defined(__x86_64__)
  asm("" : "+x"(x.data));
#elif defined(__aarch64__)
  asm("" : "+w"(x.data));
#endif
}

/// x less the nearest whole number, which `shifted` gets in its lowest bits.
template <class T>
CCA_INLINE vec<T> fraction(vec<T> x, const exp2_range<T>& range, vec<T>& shifted) {
  shifted = x + range.shifter;
  keep<T>(shifted);
  vec<T> whole = shifted - range.shifter;
  keep<T>(whole);
  return x - whole;
}

/// 2^x for x <= 0: within 2 ulp, 0 below the normal numbers and for -inf, NaN for NaN; times 2^-headroom. Raises no
/// floating-point exception but for a NaN.
template <class T>
CCA_INLINE vec<T> exp2(vec<T> x, const exp2_range<T>& range = exp2_range<T>()) {
  using constants = exp2_constants<T>;
  x = xsimd::select(x < range.least, range.least - vec<T>(T(1)), x);  // whose power has the bits 0; false for NaN
  vec<T> shifted;
  const vec<T> f = fraction<T>(x, range, shifted);
  vec<T> p(constants::polynomial[0]);
  unroll<std::ssize(constants::polynomial) - 1>(
      [&](auto i) CCA_INLINE_LAMBDA { p = fma<T>(p, f, vec<T>(constants::polynomial[i + 1])); });
  p = fma<T>(p, f, vec<T>(T(1)));
  // A product, not a sum of exponents: it keeps every NaN a NaN.
  return p * cast_bits<T>(cast_bits<typename constants::integer>(shifted) << constants::mantissa_bits);
}

/// The hyperbolic tangent, within some ulp; NaN for NaN. Near 0 by the polynomials of Cephes, where `1 - e^-2x` cancels.
/// Their square ends at 1, far behind where they are taken: of an infinite one they would make NaN, and an exception.
template <class T>
CCA_INLINE vec<T> tanh(vec<T> x) {
  const vec<T> one(T(1)), magnitude = xsimd::abs(x), square = (xsimd::min)(x * x, one);
  const vec<T> power = exp2<T>(magnitude * vec<T>(T(-2.8853900817779268)));  // e^-2|x|
  const vec<T> far_from_0 = (one - power) / (one + power);
  vec<T> near_0;
  if constexpr (std::is_same_v<T, float>) {
    vec<T> p(T(-5.70498872745e-3));
    for (const T c : {T(2.06390887954e-2), T(-5.37397155531e-2), T(1.33314422036e-1), T(-3.33332819422e-1)})
      p = fma<T>(p, square, vec<T>(c));
    near_0 = x * fma<T>(p, square, one);
  } else {
    const vec<T> p = fma<T>(fma<T>(vec<T>(T(-9.64399179425052238628e-1)), square, vec<T>(T(-9.92877231001918586564e1))),
                            square, vec<T>(T(-1.61468768441708447952e3)));
    const vec<T> q =
        fma<T>(fma<T>(square + vec<T>(T(1.12811678491632931402e2)), square, vec<T>(T(2.23548839060100448583e3))),
               square, vec<T>(T(4.84406305325125486048e3)));
    near_0 = x * fma<T>(p / q, square, one);
  }
  return xsimd::select(magnitude < vec<T>(T(0.625)), near_0, xsimd::select(x < vec<T>(T(0)), -far_from_0, far_from_0));
}

/// The same for weights that are rounded to 16 bits: within 2e-7, where rounding to half takes 2^-12 and to bfloat16 2^-9.
/// Exact for whole numbers.
CCA_INLINE vec<float> exp2_rounded(vec<float> x, const exp2_range<float>& range = exp2_range<float>()) {
  constexpr float polynomial[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f,
                                  0x1.ebf9bcp-3f,  0x1.62e42ap-1f, 1.0f};
  x = xsimd::select(x < range.least, range.least - vec<float>(1.0f), x);
  vec<float> shifted;
  const vec<float> f = fraction<float>(x, range, shifted);
  vec<float> p(polynomial[0]);
  unroll<std::ssize(polynomial) - 1>([&](auto i)
                                         CCA_INLINE_LAMBDA { p = fma<float>(p, f, vec<float>(polynomial[i + 1])); });
  return p * cast_bits<float>(cast_bits<std::int32_t>(shifted) << exp2_constants<float>::mantissa_bits);
}

/// 255 * 2^x for x <= 0, for weights that are rounded to 8 bits: within 3e-6, exactly 255 for 0, NaN for NaN. No denormal
/// number: where those count as zeros, one of the instructions still takes them for what they are.
CCA_INLINE vec<float> exp2_bytes(vec<float> x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  constexpr float polynomial[] = {0x1.b6404ap+1f, 0x1.aa4b8cp+3f, 0x1.ec3668p+5f, 0x1.6173ecp+7f, 255.0f};
  // What x is above the whole number below it, since scaling by a power of x takes that number. The rest of -inf is 0. With
  // masks, of all lanes: g++ 12 finds the intrinsics without one uninitialised.
  const vec<float> f = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vec<float> p(polynomial[0]);
  unroll<std::ssize(polynomial) - 1>([&](auto i)
                                         CCA_INLINE_LAMBDA { p = fma<float>(p, f, vec<float>(polynomial[i + 1])); });
  return _mm512_maskz_scalef_ps(0xffff, p, x);
#else
  return exp2_rounded(x) * vec<float>(255.0f);
#endif
}

}}}  // namespace cca::CCA_TARGET::detail
