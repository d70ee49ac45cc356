#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "../base/numbers.hpp"
#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What sums of weights are held back by where a mean of finite numbers overflowed on the way: 2^40 rows of the largest
/// numbers fit then. Weights below 2^-86 of the largest are lost, which no sum of 2^40 of them would show.
inline constexpr int most_headroom = 40;

/// @{
/// `a * b + c` as vectors compute it, and `a * b`. A compiler may make one operation of a product and a sum, or not, where
/// both are written out: of these it cannot choose, so that results are the same to the bit wherever they are inlined.
template <class T>
T multiply_add(T a, T b, T c) {
  T sum;
  store_partial(&sum, fma<T>(vec<T>(a), vec<T>(b), vec<T>(c)), 1);
  return sum;
}
template <class T>
T product(T a, T b) {
  return multiply_add(a, b, T(0));
}
/// @}

/// `sum * 2^maximum`: a sum of exponentials of logits.
template <class T>
struct exponential_sum {
  T maximum = -infinity<T>;  ///< in base 2
  T sum = T(0);

  /// By how much two sums, and what was weighed by them, shrink in their joint sum.
  struct shares {
    T first, second;
  };

  /// Adds another; maxima count `unit` each.
  shares join(const exponential_sum& other, T unit = T(1)) {
    const T raised = is_nan(maximum) || maximum > other.maximum ? maximum : other.maximum;  // a NaN stays
    const T base = raised == -infinity<T> ? T(0) : raised;
    const shares s{exp2((maximum - base) * unit), exp2((other.maximum - base) * unit)};
    sum = multiply_add(sum, s.first, product(other.sum, s.second));
    maximum = raised;
    return s;
  }

  /// What turns weights into shares; 0 where nothing was seen.
  [[nodiscard]] T inverse() const { return sum == T(0) ? T(0) : T(1) / sum; }

  /// The natural log-sum-exp, -inf where nothing was seen; the maximum counts `unit`.
  [[nodiscard]] T log(T unit = T(1)) const {
    return sum == T(0) ? -infinity<T> : (maximum * unit + log2(sum)) * std::numbers::ln2_v<T>;
  }
};

/// The online softmax of one query over rows of scores, of which each counts `unit` in base 2. `sum` is held back by
/// 2^-headroom, like all weights.
template <class T>
struct row_softmax : exponential_sum<T> {
  /// Turns `count` scores into weights relative to the raised maximum and adds them to the sum; returns by how much what
  /// was absorbed before has to shrink. `scores` is padded to a multiple of the vector width.
  T absorb(T* scores, std::int64_t count, T unit, int headroom = 0) {
    constexpr std::int64_t W = width<T>;
    for (std::int64_t j = count; j % W != 0; ++j) scores[j] = -infinity<T>;
    const T old = this->maximum;
    raise(scores, count);
    const exp2_range<T> range(headroom);
    vec<T> total(T(0));
    for (std::int64_t j = 0; j < count; j += W) {
      const vec<T> weight = exp2<T>((vec<T>::load_aligned(scores + j) - vec<T>(base())) * vec<T>(unit), range);
      weight.store_aligned(scores + j);
      total += weight;
    }
    const T rescale = old == base() ? T(1) : exp2((old - base()) * unit);
    // A compiler may or may not make one operation of `sum * rescale + x`: this it cannot choose.
    this->sum = reduce_add<T>(fma<T>(load_partial(&this->sum, 1), vec<T>(rescale), total));
    return rescale;
  }

  /// Turns scores into the shares of a softmax that has seen all of them, without a headroom.
  void share(T* scores, std::int64_t count, T unit, T inverse_sum) const {
    constexpr std::int64_t W = width<T>;
    for (std::int64_t j = count; j % W != 0; ++j) scores[j] = -infinity<T>;
    const vec<T> inverse(inverse_sum);
    for (std::int64_t j = 0; j < count; j += W) {
      const vec<T> distance = vec<T>::load_aligned(scores + j) - vec<T>(base());
      (exp2<T>(distance * vec<T>(unit)) * inverse).store_aligned(scores + j);
    }
  }

 private:
  /// What has seen nothing has the maximum -inf; -inf - 0 is -inf where -inf - -inf were NaN.
  [[nodiscard]] T base() const { return this->maximum == -infinity<T> ? T(0) : this->maximum; }

  /// Raises the maximum to the largest of `count` scores, padded with -inf to whole vectors; a NaN is none of them.
  /// Mostly none is larger: a branch that is foreseen, where every block would wait for the lanes of the one before.
  void raise(const T* scores, std::int64_t count) {
    constexpr std::int64_t W = width<T>;
    vec<T> largest(this->maximum);
    for (std::int64_t j = 0; j < count; j += W) {
      const vec<T> x = vec<T>::load_aligned(scores + j);
      largest = xsimd::select(x > largest, x, largest);
    }
    if (!xsimd::any(largest > vec<T>(this->maximum))) return;
    alignas(alignment<T>) T lanes[extent(W)];
    largest.store_aligned(lanes);
    for (const T lane : lanes) this->maximum = larger(this->maximum, lane);
  }
};

}}}  // namespace cca::CCA_TARGET::detail
