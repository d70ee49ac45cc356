#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/source.hpp"
#include "../simd/simd.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Where the gradients of a shift are summed, of a block of rows and the tiles of a stack; null where nobody asks.
template <class T>
struct shift_sums {
  T* bias = nullptr;   ///< per row of the block
  T* slope = nullptr;  ///< per lane of a tile, whose sum is minus the gradient
};

/// Where scores lie: rows `rows` of a source, which are there to be read, and a query, the first of a tile.
template <class T, class Bias>
struct score_place {
  row_terms<Bias> terms;
  T slope;
  std::int64_t query;
  range rows;
  shift_sums<T> sums{};

  [[nodiscard]] CCA_INLINE T bias(std::int64_t row) const {
    return terms.bias == nullptr ? T(0) : static_cast<T>(terms.bias[row * terms.bias_stride]);
  }
};

template <class T, class Bias>
score_place(row_terms<Bias>, T, std::int64_t, range, shift_sums<T>) -> score_place<T, Bias>;

/// Logits to which nothing is added.
struct unshifted {
  [[nodiscard]] static CCA_INLINE unshifted row(std::int64_t) { return {}; }
  template <class V>
  CCA_INLINE V operator()(V x, std::int64_t) const {
    return x;
  }
  template <class V>
  CCA_INLINE void add_gradient(V, std::int64_t, std::int64_t) const {}
};

/// `x -= slope * |distance|`, then the row's bias, of a part of a tile. A distance is a difference of whole numbers of 64
/// bits before it is a number of `T`: it is exact where it is small, however large the positions are.
template <class T, class Bias>
class tile_shift {
  static constexpr std::int64_t W = width<T>;

 public:
  template <class Part>
  tile_shift(const Part& part, const score_place<T, Bias>& place)
      : place_(place), first_row_(part.rows.begin), first_lane_(part.first * W) {
    alignas(alignment<T>) T lanes[extent(W)];
    for (std::int64_t i = 0; i < W; ++i) lanes[i] = static_cast<T>(i);
    lanes_ = vec<T>::load_aligned(lanes);
  }

  /// The same of one row, for logits of vector `n` of the part.
  struct row_shift {
    vec<T> distance;  ///< of the part's first lanes, with its sign
    vec<T> slope, bias;

    CCA_INLINE vec<T> operator()(vec<T> x, std::int64_t n) const {
      return fma<T>(slope, xsimd::abs(distance + vec<T>(static_cast<T>(n * W))), x) + bias;
    }
  };

  /// Of row `j` of the part.
  [[nodiscard]] CCA_INLINE row_shift row(std::int64_t j) const {
    return {distance(j), vec<T>(-place_.slope), vec<T>(place_.bias(present(j)))};
  }

  /// Adds to the sums; `grad` is the gradient of the logit, 0 where it is unseen.
  CCA_INLINE void add_gradient(vec<T> grad, std::int64_t j, std::int64_t n) const {
    const auto& [bias, slope] = place_.sums;
    if (bias != nullptr) bias[present(j) - place_.rows.begin] += reduce_add<T>(grad);
    if (slope == nullptr) return;
    T* const lanes = slope + first_lane_ + n * W;
    fma<T>(grad, xsimd::abs(distance(j) + vec<T>(static_cast<T>(n * W))), vec<T>::load_aligned(lanes))
        .store_aligned(lanes);
  }

 private:
  /// A unit takes whole chunks of rows: what is beside those that are there nobody sees.
  [[nodiscard]] CCA_INLINE std::int64_t present(std::int64_t j) const {
    return smaller(larger(first_row_ + j, place_.rows.begin), place_.rows.end - 1);
  }
  [[nodiscard]] CCA_INLINE vec<T> distance(std::int64_t j) const {
    return vec<T>(static_cast<T>(place_.query + first_lane_ - place_.terms.positions[present(j)])) + lanes_;
  }

  score_place<T, Bias> place_;
  std::int64_t first_row_, first_lane_;
  vec<T> lanes_;  // 0, 1, ..
};

template <class Part, class T, class Bias>
tile_shift(const Part&, const score_place<T, Bias>&) -> tile_shift<T, Bias>;

/// The same of one query and all rows of a place: their logits lie one after the other, in memory for whole vectors.
template <class T, class Bias>
void shift_row(T* logits, const score_place<T, Bias>& place) {
  constexpr std::int64_t W = width<T>;
  for (std::int64_t j = place.rows.begin; j < place.rows.end; j += W, logits += W) {
    alignas(alignment<T>) T distance[extent(W)] = {};
    alignas(alignment<T>) T bias[extent(W)] = {};
    for (std::int64_t r = 0; r < smaller(W, place.rows.end - j); ++r) {
      distance[r] = static_cast<T>(magnitude(place.query - place.terms.positions[j + r]));
      bias[r] = place.bias(j + r);
    }
    const vec<T> x = fma<T>(vec<T>(-place.slope), vec<T>::load_aligned(distance), vec<T>::load_aligned(logits));
    (x + vec<T>::load_aligned(bias)).store_aligned(logits);
  }
}

}}}  // namespace cca::CCA_TARGET::detail
