#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <numbers>

#include "../../options.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../context/visible.hpp"
#include "../simd/simd.hpp"
#include "row_softmax.hpp"
#include "score_shift.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What happens between `q . k` and the softmax: `apply` turns a score, `q . k` times `query_factor`, into what the softmax takes, which
/// is the logit divided by `unit`, and `differentiate` goes back. Where the options ask for no more than a scale, the
/// scores stay as they are: the softmax multiplies by `unit` after it has subtracted the maximum, which is exact.
///
/// In this order: `x = scale * q . k`, `x = softcap * tanh(x / softcap)`, `x -= slope * |distance|` and the row's bias
/// (`score_shift.hpp`), the mask. Logits of -inf are masked.
template <class T>
struct score_rule {
  T scale = T(1);
  T softcap = T(0);                        ///< 0: none
  tensor_view<const T, 3> sink_logits{};   ///< `[1 or batch, heads, 1 or length]`; without data there are none
  int exponent = 0;                        ///< the power of two of the scale that queries are multiplied by
  tensor_view<const T, 3> alibi_slopes{};  ///< `[1 or batch, heads, 1]`; without data there are none
  bool biased = false;                     ///< whether rows of some source have biases
  T inverse_softcap = T(1);                ///< 1 / softcap; of any value where there is none

  /// What queries are multiplied by as they are packed. The sign: scores of a negative scale would have their maximum at the
  /// wrong end, and those of a scale of 0 none.
  [[nodiscard]] T query_factor() const {
    return scale == T(0) ? T(0) : detail::ldexp(scale < T(0) ? T(-1) : T(1), exponent);
  }

  /// The rule with half of an extreme scale on the queries, so that neither `q . k` nor `scale * q` overflows where the
  /// logit does not.
  [[nodiscard]] score_rule balanced() const {
    score_rule rule = *this;
    const int whole = scale == T(0) ? 0 : detail::ilogb(scale);
    if (magnitude(whole) > 24) rule.exponent = whole / 2;
    return rule;
  }

  /// The logit of a score of 1, when the rule has been applied. Positive.
  [[nodiscard]] T unit() const { return shapes() ? T(1) : score_unit(); }
  [[nodiscard]] T unit_in_base_2() const { return unit() * std::numbers::log2e_v<T>; }

  /// The scaled `q . k` of a score of 1.
  [[nodiscard]] T score_unit() const { return scale == T(0) ? T(1) : detail::ldexp(magnitude(scale), -exponent); }

  /// Whether logits are more than scores times a unit.
  [[nodiscard]] bool shapes() const { return softcap != T(0) || shifts(); }

  [[nodiscard]] bool has_sinks() const { return sink_logits.data != nullptr; }
  /// The sink of query `i` of head `h` of sequence `b` as a sum of exponentials; nothing where there are none.
  [[nodiscard]] exponential_sum<T> sink_sum(std::int64_t b, std::int64_t h, std::int64_t i) const {
    if (!has_sinks()) return {};
    return {product(sink(b, h, i), std::numbers::log2e_v<T>), T(1)};
  }
  /// The sink logit of query `i` of head `h` of sequence `b`.
  [[nodiscard]] T sink(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return *sink_logits.row(sink_logits.batch() == 1 ? 0 : b, h, sink_logits.length() == 1 ? 0 : i);
  }

  /// The natural log-sum-exp of that query, of which `seen` is all but its sink.
  [[nodiscard]] T log(exponential_sum<T> seen, std::int64_t b, std::int64_t h, std::int64_t i) const {
    if (has_sinks() && seen.sum == T(0)) return sink(b, h, i);
    if (has_sinks()) seen.join(sink_sum(b, h, i));
    return seen.log();
  }

  /// Whether logits have a slope or a bias.
  [[nodiscard]] bool shifts() const { return alibi_slopes.data != nullptr || biased; }
  /// The slope of head `h` of sequence `b`, 0 where there is none.
  [[nodiscard]] T slope(std::int64_t b, std::int64_t h) const {
    return alibi_slopes.data == nullptr ? T(0) : *alibi_slopes.row(alibi_slopes.batch() == 1 ? 0 : b, h, 0);
  }

  /// Of a part of a tile: the scores, and their maxima, for which unseen scores are -inf.
  template <class Part, class Place>
  void apply(const Part& part, const score_block<T> scores, const Place& place) const {
    if (shapes()) with_shift(part, place, [&](const auto& shift) { shape(part, scores, vec<T>(-infinity<T>), shift); });
  }

  /// The same up to the softcap, without maxima; unseen scores are 0. What follows is for `with_shift`.
  template <class Part>
  void apply_softcap(const Part& part, const score_block<T> scores) const {
    if (shapes()) shape(part, scores, vec<T>(T(0)), unshifted{});
  }

  /// Calls `f` with what is behind the softcap, a function of a logit and its place: `tile_shift`, or `unshifted`.
  template <class Part, class Place, class F>
  CCA_INLINE void with_shift(const Part& part, const Place& place, const F& f) const {
    if (shifts())
      f(tile_shift(part, place));
    else
      f(unshifted{});
  }

  /// Of one query: `count` scores, in memory for whole vectors of them. `place()` says where they lie.
  template <class Place>
  void apply(T* scores, std::int64_t count, const Place& place) const {
    if (!shapes()) return;
    for (std::int64_t j = count; j % width<T> != 0; ++j) scores[j] = T(0);
    const logit_of shaped = logit();
    for (std::int64_t j = 0; j < count; j += width<T>)
      shaped(vec<T>::load_aligned(scores + j)).store_aligned(scores + j);
    if (shifts()) shift_row(scores, place());
  }

  /// A weight times the derivative of its logit by `q . k`; `x` is what `apply` left.
  [[nodiscard]] CCA_INLINE vec<T> differentiate(vec<T> x, vec<T> weight) const {
    const vec<T> scaled = weight * vec<T>(scale);
    if (softcap == T(0)) return scaled;
    const vec<T> share = x * vec<T>(inverse_softcap);
    return scaled * (vec<T>(T(1)) - share * share);
  }

 private:
  /// What a score is before it is shifted: `x = unit * score`, then the softcap.
  struct logit_of {
    T unit, softcap, inverse_softcap;

    CCA_INLINE vec<T> operator()(vec<T> score) const {
      const vec<T> x = score * vec<T>(unit);
      return softcap == T(0) ? x : vec<T>(softcap) * detail::tanh<T>(x * vec<T>(inverse_softcap));
    }
  };
  [[nodiscard]] logit_of logit() const { return {score_unit(), softcap, inverse_softcap}; }

  template <class Part, class Shift>
  void shape(const Part& part, const score_block<T> scores, vec<T> unseen, const Shift& shift) const {
    constexpr auto N = smaller<std::int64_t>(Part::vectors, 4);  // as many as registers hold
    if (part.all_seen())
      for (std::int64_t n = 0; n < Part::vectors; n += N)
        shape_vectors<N>(n, part.rows.size(), scores, unmasked{}, unseen, shift, logit());
    else
      for (std::int64_t n = 0; n < Part::vectors; ++n)
        part.with_mask(n, [&](const auto& mask) {
          shape_vectors<1>(n, part.rows.size(), scores, mask, unseen, shift, logit());
        });
  }

  /// The same of `N` vectors from `first` on. (Values, not references, as in `lane_softmax`.)
  template <std::int64_t N, class Mask, class Shift>
  static void shape_vectors(std::int64_t first, std::int64_t count, const score_block<T> scores, const Mask mask,
                            vec<T> unseen, const Shift shift, const logit_of logit) {
    vec<T> maximum[extent(N)];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { maximum[n] = vec<T>(-infinity<T>); });
    for (std::int64_t j = 0; j < count; ++j) {
      const auto shift_row = shift.row(j);
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        T* const at = scores.at(j, first + n);
        const vec<T> x = mask.select(j, shift_row(logit(vec<T>::load_aligned(at)), first + n), unseen);
        x.store_aligned(at);
        maximum[n] = (xsimd::max)(maximum[n], x);
      });
    }
    if (scores.maximum == nullptr) return;
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { maximum[n].store_aligned(scores.maximum + (first + n) * width<T>); });
  }
};

/// The rule that the options and inputs ask for. `biased` says whether rows of some source have biases.
template <class T, class Inputs>
score_rule<T> make_score_rule(const options& options, const Inputs& in, bool biased) {
  score_rule<T> rule{static_cast<T>(softmax_scale(options, in.key.dim())), static_cast<T>(options.softcap),
                     in.sink_logits};
  rule.alibi_slopes = in.alibi_slopes;
  rule.biased = biased;
  // Here, once: in a loop a compiler may divide before it asks whether there is a softcap, and raise an exception.
  rule.inverse_softcap = T(1) / (rule.softcap == T(0) ? T(1) : rule.softcap);
  return rule;
}

}}}  // namespace cca::CCA_TARGET::detail
