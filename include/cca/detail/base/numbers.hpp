#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// What the headers use of the standard library's functions on numbers, as functions of their own. An instantiation of
// std::fill for floats has the same name in all translation units, whatever instructions they may use (see target.hpp);
// and std::min and std::max are macros elsewhere.

template <class T>
inline constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

template <class T>
inline constexpr T largest_finite = (std::numeric_limits<T>::max)();

/// The size of an array.
[[nodiscard]] constexpr std::size_t extent(std::int64_t n) { return static_cast<std::size_t>(n); }

template <class T>
[[nodiscard]] constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
[[nodiscard]] constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
[[nodiscard]] constexpr T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <class T>
[[nodiscard]] constexpr bool is_nan(T x) {
  return x != x;
}

[[nodiscard]] inline float exp2(float x) { return __builtin_exp2f(x); }
[[nodiscard]] inline double exp2(double x) { return __builtin_exp2(x); }
[[nodiscard]] inline float log2(float x) { return __builtin_log2f(x); }
[[nodiscard]] inline double log2(double x) { return __builtin_log2(x); }

[[nodiscard]] inline float exp(float x) { return __builtin_expf(x); }
[[nodiscard]] inline double exp(double x) { return __builtin_exp(x); }
[[nodiscard]] inline double log(double x) { return __builtin_log(x); }

/// `x * 2^n`.
[[nodiscard]] inline float ldexp(float x, int n) { return __builtin_ldexpf(x, n); }
[[nodiscard]] inline double ldexp(double x, int n) { return __builtin_ldexp(x, n); }

/// The exponent of a number that is not 0.
[[nodiscard]] inline int ilogb(double x) { return __builtin_ilogb(x); }

template <class T>
[[nodiscard]] constexpr T gcd(T a, T b) {
  while (b != 0) {
    const T rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

template <class T>
constexpr T exchange(T& old, std::type_identity_t<T> with) {
  const T was = old;
  old = with;
  return was;
}

template <class T>
constexpr void fill(T* from, T* to, std::type_identity_t<T> value) {
  for (; from < to; ++from) *from = value;
}

template <class T>
constexpr void fill_n(T* to, std::int64_t n, std::type_identity_t<T> value) {
  fill(to, to + n, value);
}

template <class T>
void copy_n(const T* from, std::int64_t n, T* to) {
  if (n > 0) std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(n) * sizeof(T));
}

}}}  // namespace cca::CCA_TARGET::detail
