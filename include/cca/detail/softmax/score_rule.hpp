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

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What happens between `q . k` and the softmax: `apply` turns a score, `q . k` times `query_factor`, into what the softmax takes, which
/// is the logit divided by `unit`, and `differentiate` goes back. Where the options ask for no more than a scale, the
/// scores stay as they are: the softmax multiplies by `unit` after it has subtracted the maximum, which is exact.
///
/// In this order: `x = scale * q . k`, `x = softcap * tanh(x / softcap)`, the mask. Logits of -inf are masked.
template <class T>
struct score_rule {
  T scale = T(1);
  T softcap = T(0);                       ///< 0: none
  tensor_view<const T, 3> sink_logits{};  ///< `[1 or batch, heads, 1 or length]`; without data there are none
  int exponent = 0;                       ///< the power of two of the scale that queries are multiplied by

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
  [[nodiscard]] T unit() const { return softcap != T(0) ? T(1) : score_unit(); }
  [[nodiscard]] T unit_in_base_2() const { return unit() * std::numbers::log2e_v<T>; }

  /// The scaled `q . k` of a score of 1.
  [[nodiscard]] T score_unit() const { return scale == T(0) ? T(1) : detail::ldexp(magnitude(scale), -exponent); }

  [[nodiscard]] bool has_sinks() const { return sink_logits.data != nullptr; }
  /// The sink of query `i` of head `h` of sequence `b` as a sum of exponentials; nothing where there are none.
  [[nodiscard]] exponential_sum<T> sink_sum(std::int64_t b, std::int64_t h, std::int64_t i) const {
    if (!has_sinks()) return {};
    return {sink(b, h, i) * std::numbers::log2e_v<T>, T(1)};
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

  /// Of a part of a tile: the scores, and where they are asked for their maxima, for which unseen scores are -inf.
  template <class Part>
  void apply(const Part& part, const score_block<T> scores) const {
    if (softcap == T(0)) return;
    const vec<T> unseen(scores.maximum != nullptr ? -infinity<T> : T(0));
    for (std::int64_t n = 0; n < Part::vectors; ++n)
      part.with_mask(n, [&](const auto& mask) {
        vec<T> maximum(-infinity<T>);
        for (std::int64_t j = 0; j < part.rows.size(); ++j) {
          const vec<T> x = mask.select(j, cap(vec<T>::load_aligned(scores.at(j, n))), unseen);
          x.store_aligned(scores.at(j, n));
          maximum = (xsimd::max)(maximum, x);
        }
        if (scores.maximum != nullptr) maximum.store_aligned(scores.maximum + n * width<T>);
      });
  }

  /// Of one query: `count` scores, in memory for whole vectors of them.
  void apply(T* scores, std::int64_t count) const {
    if (softcap == T(0)) return;
    for (std::int64_t j = count; j % width<T> != 0; ++j) scores[j] = T(0);
    for (std::int64_t j = 0; j < count; j += width<T>) cap(vec<T>::load_aligned(scores + j)).store_aligned(scores + j);
  }

  /// A weight times the derivative of its logit by `q . k`; `x` is what `apply` left.
  [[nodiscard]] CCA_INLINE vec<T> differentiate(vec<T> x, vec<T> weight) const {
    const vec<T> scaled = weight * vec<T>(scale);
    if (softcap == T(0)) return scaled;
    const vec<T> share = x * vec<T>(T(1) / softcap);
    return scaled * (vec<T>(T(1)) - share * share);
  }

 private:
  [[nodiscard]] vec<T> cap(vec<T> score) const {
    const vec<T> x = score * vec<T>(score_unit()) * vec<T>(T(1) / softcap);
    return vec<T>(softcap) * detail::tanh<T>(x);
  }
};

/// The rule that the options ask for, for queries and keys of `dim` elements.
template <class T>
score_rule<T> make_score_rule(const options& options, std::int64_t dim, tensor_view<const T, 3> sink_logits = {}) {
  return {static_cast<T>(softmax_scale(options, dim)), static_cast<T>(options.softcap), sink_logits};
}

}}}  // namespace cca::CCA_TARGET::detail
