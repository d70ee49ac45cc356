#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "../base/numbers.hpp"
#include "../context/tasks.hpp"
#include "../context/visible.hpp"
#include "../simd/simd.hpp"
#include "row_softmax.hpp"
#include "score_rule.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The online softmax with a query in every lane of a tile. Running maximum, sum and rescaling are vertical: lanes never
/// meet, so a NaN stays with the queries that see it.
///
/// A product may store weights that are rounded. The sum of the weights makes the log-sum-exp, the sum of those stored,
/// which multiply the values, is what the output is divided by: so rows of equal values, and those that one key
/// dominates, come out exactly.
///
/// A view of scratch memory, `size(lanes)` elements aligned to vectors.
template <class T>
class lane_softmax {
  static constexpr std::int64_t W = width<T>;

 public:
  static constexpr std::int64_t size(std::int64_t lanes) { return 4 * lanes; }

  lane_softmax(T* memory, std::int64_t lanes, const score_rule<T>& rule, int headroom)
      : lane_softmax(memory, lanes, rule, headroom, rule.unit_in_base_2()) {}
  void begin() {
    fill(maximum_, sum_, -infinity<T>);
    fill(sum_, rescale_, T(0));
  }

  /// Turns the scores of a part into weights relative to the raised maximum, which `weights.put(j, n, vectors)` stores, and
  /// adds them to the sums. What was absorbed before has to shrink by `rescale`. (Values, not references: the stores of
  /// vectors might change what those refer to, for all that a compiler knows.)
  template <class Part, class Weights>
  void absorb(const Part& part, const score_block<T> scores, const Weights weights) {
    constexpr auto N = smaller<std::int64_t>(Part::vectors, 4);  // as many as registers hold
    static_assert(Part::vectors % N == 0);
    for (std::int64_t n = 0; n < Part::vectors; n += N) absorb_vectors<N>(n, part, scores, weights);
  }

  /// What lane `i` has seen: its maximum, of scores, and the sum of its weights.
  [[nodiscard]] exponential_sum<T> weights(std::int64_t i) const { return {maximum_[i], sum_[i]}; }

  /// By how much each lane shrinks what it had before the last `absorb`.
  [[nodiscard]] const T* rescale() const { return rescale_; }

  /// Makes the shares of the first `count` of these queries. A sink is one more row, of value 0: it joins the sum and
  /// nothing else.
  void finish(std::int64_t count, const lane_queries& of) {
    const vec<T> zero(T(0)), one(T(1));
    for (std::int64_t lane = 0; lane < lanes_; lane += W) {
      const vec<T> stored = vec<T>::load_aligned(stored_ + lane);
      const auto empty = stored == zero;
      vec<T> divisor = xsimd::select(empty, one, stored);
      keep<T>(divisor);  // clang would divide by 0 and then choose
      xsimd::select(empty, zero, one / divisor).store_aligned(stored_ + lane);
    }
    for (std::int64_t i = 0; rule_->has_sinks() && i < count; ++i) {
      exponential_sum<T> whole = total(i);
      const T own = whole.sum;
      stored_[i] *= own * whole.join(rule_->sink_sum(of.b, of.head_of(i), of.query_of(i))).first * whole.inverse();
    }
  }

  /// After `finish`: what turns a lane's sum of weighted values into their mean.
  [[nodiscard]] const T* shares() const { return stored_; }

  /// The natural log-sum-exp of lane `i` of these queries.
  [[nodiscard]] T lse(std::int64_t i, const lane_queries& of) const {
    return rule_->log(total(i), of.b, of.head_of(i), of.query_of(i));
  }

 protected:
  /// Maxima count `unit` each, in base 2.
  lane_softmax(T* memory, std::int64_t lanes, const score_rule<T>& rule, int headroom, T unit)
      : lanes_(lanes),
        rule_(&rule),
        headroom_(headroom),
        unit_(unit),
        maximum_(memory),
        sum_(maximum_ + lanes),
        stored_(sum_ + lanes),
        rescale_(stored_ + lanes) {}

  /// Raises the maxima of the lanes from `lane` on, and says how much they shrink by. Returns what weights are relative to: a
  /// lane that has seen nothing has the maximum -inf, and -inf - 0 is -inf where -inf - -inf were NaN.
  [[nodiscard]] CCA_INLINE vec<T> raise(std::int64_t lane, vec<T> maximum) const {
    const vec<T> old = vec<T>::load_aligned(maximum_ + lane);
    const vec<T> raised = (xsimd::max)(old, maximum);
    const vec<T> base = or_zero(raised);
    raised.store_aligned(maximum_ + lane);
    exp2<T>((old - base) * vec<T>(unit_)).store_aligned(rescale_ + lane);
    return base;
  }

  /// A maximum, 0 where there is none.
  static CCA_INLINE vec<T> or_zero(vec<T> maximum) {
    return xsimd::select(maximum == vec<T>(-infinity<T>), vec<T>(T(0)), maximum);
  }

  /// Adds what a part gave to the sums of the weights and of those stored, from `lane` on.
  CCA_INLINE void add(std::int64_t lane, vec<T> sum, vec<T> stored) const {
    const vec<T> rescale = vec<T>::load_aligned(rescale_ + lane);
    fma<T>(vec<T>::load_aligned(sum_ + lane), rescale, sum).store_aligned(sum_ + lane);
    fma<T>(vec<T>::load_aligned(stored_ + lane), rescale, stored).store_aligned(stored_ + lane);
  }

  [[nodiscard]] const score_rule<T>& rule() const { return *rule_; }
  [[nodiscard]] int headroom() const { return headroom_; }

 private:
  /// What lane `i` has seen, in base 2.
  [[nodiscard]] exponential_sum<T> total(std::int64_t i) const {
    if (sum_[i] == T(0)) return {};
    return {product(maximum_[i], unit_), detail::ldexp(sum_[i], headroom_)};
  }

  /// The same of `N` vectors of the part, from `first` on.
  template <std::int64_t N, class Part, class Weights>
  CCA_INLINE void absorb_vectors(std::int64_t first, const Part& part, const score_block<T> scores,
                                 const Weights weights) {
    constexpr std::int64_t R = Weights::rows_at_once;
    const vec<T> unit(unit_);
    const exp2_range<T> range(headroom_);
    const std::int64_t lane = (part.first + first) * W, count = part.rows.size();
    vec<T> base[extent(N)], sum[extent(N)], stored[extent(N)];
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
      base[n] = raise(lane + n * W, vec<T>::load_aligned(scores.maximum + (first + n) * W));
      sum[n] = stored[n] = vec<T>(T(0));
    });
    for (std::int64_t j = 0; j < count; j += R)
      unroll<N>([&](auto n) CCA_INLINE_LAMBDA {
        vec<T> weight[extent(R)];
        unroll<R>([&](auto r) CCA_INLINE_LAMBDA {
          const vec<T> score = vec<T>::load_aligned(scores.at(j + r, first + n));
          weight[r] = Weights::exp2((score - base[n]) * unit, range);
          sum[n] += weight[r];
        });
        if constexpr (Weights::exact)
          weights.put(j, first + n, weight);
        else
          stored[n] += weights.put(j, first + n, weight);
      });
    unroll<N>([&](auto n) CCA_INLINE_LAMBDA { add(lane + n * W, sum[n], Weights::exact ? sum[n] : stored[n]); });
  }

  std::int64_t lanes_;
  const score_rule<T>* rule_;
  int headroom_;
  T unit_;
  T *maximum_, *sum_, *stored_, *rescale_;
};

}}}  // namespace cca::CCA_TARGET::detail
