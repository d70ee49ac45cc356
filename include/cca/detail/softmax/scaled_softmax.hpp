#pragma once

#include <cstdint>
#include <type_traits>

#include "../base/numbers.hpp"
#include "../context/visible.hpp"
#include "../simd/simd.hpp"
#include "lane_softmax.hpp"
#include "score_rule.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Rows whose values are multiplied in a scale of their own: the value is `2^exponent` times what is multiplied, and
/// `inverse` is `2^-exponent / 255`.
struct scaled_rows {
  const float* exponent = nullptr;
  const float* inverse = nullptr;
};

/// Hides what `N` vectors of `count` rows from `n` on do not see, and raises the maxima to the largest of each lane.
/// `value(x, j)` is what a score of row `j` becomes before.
template <std::int64_t N, class Mask, class Value>
void raise_maxima(const score_block<float> scores, std::int64_t count, std::int64_t n, const Mask (&mask)[extent(N)],
                  const Value& value) {
  using vector = vec<float>;
  const vector none(-infinity<float>);
  vector maximum[extent(N)];
  unroll<N>([&](auto i)
                CCA_INLINE_LAMBDA { maximum[i] = vector::load_aligned(scores.maximum + (n + i) * width<float>); });
  for (std::int64_t j = 0; j < count; ++j)
    unroll<N>([&](auto i) CCA_INLINE_LAMBDA {
      const vector x = mask[i].select(j, value(vector::load_aligned(scores.at(j, n + i)), j), none);
      x.store_aligned(scores.at(j, n + i));
      maximum[i] = (xsimd::max)(maximum[i], x);
    });
  unroll<N>([&](auto i) CCA_INLINE_LAMBDA { maximum[i].store_aligned(scores.maximum + (n + i) * width<float>); });
}

/// The masks of vectors that see every row.
template <std::int64_t N>
inline constexpr unmasked everything[extent(N)]{};

/// Makes scores those of the values' scales: `unit * score + exponent`, in base 2.
inline auto in_scales(const float* exponent, float unit) {
  return [exponent, unit = vec<float>(unit)](vec<float> x, std::int64_t j)
             CCA_INLINE_LAMBDA { return fma<float>(x, unit, vec<float>(exponent[j])); };
}

/// The online softmax of rows in scales of their own, whose weights are rounded to 8 bits: a weight takes the row's scale in,
/// and is relative to the largest of the part in its lane. So none of a long flat row vanishes, and a row of small values
/// that most of the sum goes to leaves bits to the others. Sums are of weights that are not rounded. The scores of a part
/// are those of `in_scales`, and so are their maxima; where the rule shapes scores, they become so here.
class scaled_softmax : public lane_softmax<float> {
  using vector = vec<float>;
  static constexpr std::int64_t W = width<float>;

 public:
  scaled_softmax(float* memory, std::int64_t lanes, const score_rule<float>& rule, int headroom)
      : lane_softmax(memory, lanes, rule, headroom, 1.0f) {}

  /// As `lane_softmax::absorb`. `weights.put_share(n, share)` stores what turns sums of the part's weights times values into
  /// those of all that was absorbed.
  template <class Part, class Weights>
  void absorb(const Part& part, const score_block<float> scores, const Weights weights) {
    constexpr auto N = smaller<std::int64_t>(Part::vectors, 4);  // as many as registers hold
    static_assert(Part::vectors % N == 0);
    for (std::int64_t n = 0; n < Part::vectors; n += N) {
      if (rule().shapes()) {
        fill_n(scores.maximum + n * W, N * W, -infinity<float>);
        raise_maxima<N>(scores, part.rows.size(), n, everything<N>,
                        in_scales(weights.rows.exponent, rule().unit_in_base_2()));
      }
      absorb_vectors<N>(n, part, scores, weights);
    }
  }

 private:
  /// What scores may be relative to instead of so small a number, whose differences from others could be denormal.
  static CCA_INLINE vector not_near_zero(vector base) {
    return xsimd::select(xsimd::abs(base) < vector(0x1p-100f), vector(-0x1p-60f), base);
  }

  template <std::int64_t N, class Part, class Weights>
  CCA_INLINE void absorb_vectors(std::int64_t first, const Part& part, const score_block<float> scores,
                                 const Weights weights) {
    constexpr std::int64_t R = Weights::rows_at_once;
    const exp2_range<float> range(headroom());
    const std::int64_t lane = (part.first + first) * W, count = part.rows.size();
    vector base[extent(N)], share[extent(N)], sum[extent(N)];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      const vector maximum = vector::load_aligned(scores.maximum + (first + n) * W);
      base[n] = not_near_zero(or_zero(maximum));
      share[n] = detail::exp2<float>(maximum - raise(lane + n * W, maximum), range);
      sum[n] = vector(0.0f);
    });
    for (std::int64_t j = 0; j < count; j += R)
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        vector weight[extent(R)];
        unroll<R>([&](auto r) CCA_INLINE_LAMBDA {
          weight[r] = exp2_bytes(vector::load_aligned(scores.at(j + r, first + n)) - base[n]);
          sum[n] = fma<float>(weight[r], vector(weights.rows.inverse[j + r]), sum[n]);
        });
        weights.put(j, first + n, weight);
      });
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      add(lane + n * W, sum[n] * share[n], sum[n] * share[n]);
      weights.put_share(first + n, share[n] * vector(1.0f / 255.0f));
    });
  }
};

}}}  // namespace cca::CCA_TARGET::detail
