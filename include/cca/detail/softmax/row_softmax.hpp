#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The online softmax of one query, base 2.
template <class T>
struct row_softmax {
  T maximum = -infinity<T>;
  T sum = T(0);

  /// Turns `count` logits (times log2(e)) into weights relative to the raised maximum and adds them to the sum; returns
  /// by how much what was absorbed before has to shrink. `logits` is padded to a multiple of the vector width.
  T absorb(T* logits, std::int64_t count) {
    constexpr std::int64_t W = width<T>;
    for (std::int64_t j = count; j % W != 0; ++j) logits[j] = -infinity<T>;
    const T old = maximum;
    raise(logits, count);
    const T base = maximum == -infinity<T> ? T(0) : maximum;
    vec<T> total(T(0));
    for (std::int64_t j = 0; j < count; j += W) {
      const vec<T> weight = exp2<T>(vec<T>::load_aligned(logits + j) - vec<T>(base));
      weight.store_aligned(logits + j);
      total += weight;
    }
    const T rescale = old == base ? T(1) : std::exp2(old - base);
    // A compiler may or may not make one operation of `sum * rescale + x`: this it cannot choose.
    sum = reduce_add<T>(fma<T>(load_partial(&sum, 1), vec<T>(rescale), total));
    return rescale;
  }

  /// Raises the maximum to the largest of `count` logits, padded with -inf to whole vectors; a NaN is none of them.
  /// Mostly none is larger: a branch that is foreseen, where every block would wait for the lanes of the one before.
  void raise(const T* logits, std::int64_t count) {
    constexpr std::int64_t W = width<T>;
    vec<T> largest(maximum);
    for (std::int64_t j = 0; j < count; j += W) {
      const vec<T> x = vec<T>::load_aligned(logits + j);
      largest = xsimd::select(x > largest, x, largest);
    }
    if (!xsimd::any(largest > vec<T>(maximum))) return;
    alignas(alignment<T>) T lanes[W];
    largest.store_aligned(lanes);
    maximum = *std::max_element(lanes, lanes + W);
  }

  /// What turns weights into shares; 0 where nothing was seen.
  [[nodiscard]] T inverse_sum() const { return sum == T(0) ? T(0) : T(1) / sum; }

  /// The natural log-sum-exp, -inf where nothing was seen.
  [[nodiscard]] T lse() const {
    return sum == T(0) ? -infinity<T> : (maximum + std::log2(sum)) * std::numbers::ln2_v<T>;
  }
};

}}}  // namespace cca::CCA_TARGET::detail
