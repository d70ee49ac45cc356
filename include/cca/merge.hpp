#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include "call.hpp"
#include "detail/base/numbers.hpp"
#include "detail/base/validate.hpp"
#include "detail/simd/convert.hpp"
#include "detail/softmax/row_softmax.hpp"
#include "element.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Two parts of a context and the whole, all of the extents of the first.
inline void require_parts(const named_view& out_a, const named_view& lse_a, const named_view& out_b,
                          const named_view& lse_b, const result_views& whole) {
  for (const named_view* part : {&out_a, &lse_a, &out_b, &lse_b}) require_operand(*part);
  require_output(whole.out);
  require_output(whole.lse);
  const std::int64_t heads = out_a.heads(), dim = out_a.dim();
  require_shape(lse_a, heads, 1, out_a);
  require_shape(out_b, heads, dim, out_a);
  require_shape(lse_b, heads, 1, out_a);
  require_shape(whole.out, heads, dim, out_a);
  require_shape(whole.lse, heads, 1, out_a);
}

}  // namespace detail

/// Joins the results of attention to two disjoint parts of a context into that of the whole:
/// `out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b)`, `lse = log(e^lse_a + e^lse_b)`.
///
/// A part whose `lse` is -inf is empty and its `out` is not looked at; of two empty parts the result is empty: 0, -inf.
///
/// @param first,second  the parts: `[batch, heads, length, dim]` and natural logarithms `[batch, heads, length]`, read whole
/// @param whole  the same extents, written whole; each may be the very view of a part (not a shifted one)
/// @param run  executor; the results are bitwise the same for any
/// @throws std::invalid_argument  before anything is written, naming the argument, what it got and what it wants
template <class A = const float, class LseA = const compute_type<A>, class B = const float,
          class LseB = const compute_type<B>, detail::written Out = float, class Lse = compute_type<Out>>
void merge(const results<A, LseA>& first, const results<B, LseB>& second, const results<Out, Lse>& whole,
           const execution& run = {}) {
  using T = compute_type<A, B>;
  const tensor_view<A> out_a = first.out;
  const tensor_view<B> out_b = second.out;
  const tensor_view<Out> out = whole.out;
  const lse_view<LseA> lse_a = first.lse;
  const lse_view<LseB> lse_b = second.lse;
  const lse_view<Lse> lse = whole.lse;
  detail::require_parts({"out_a", out_a}, {"lse_a", lse_a}, {"out_b", out_b}, {"lse_b", lse_b},
                        detail::named(whole));

  const auto merge_row = [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    constexpr double empty = -std::numeric_limits<double>::infinity(), unit = std::numbers::log2e;
    const auto a = static_cast<double>(*lse_a.row(b, h, i)), c = static_cast<double>(*lse_b.row(b, h, i));
    detail::exponential_sum<double> both{a, a == empty ? 0.0 : 1.0};
    const auto shares = both.join({c, c == empty ? 0.0 : 1.0}, unit);
    const T share_a = static_cast<T>(shares.first * both.inverse()),
            share_b = static_cast<T>(shares.second * both.inverse());
    const A* row_a = out_a.row(b, h, i);
    const B* row_b = out_b.row(b, h, i);
    Out* to = out.row(b, h, i);
    for (std::int64_t d = 0; d < out.dim(); ++d)
      to[d] = detail::element_cast<Out>((a == empty ? T(0) : share_a * detail::element_cast<T>(row_a[d])) +
                                        (c == empty ? T(0) : share_b * detail::element_cast<T>(row_b[d])));
    *lse.row(b, h, i) = static_cast<Lse>(both.sum == 0 ? empty : both.maximum + detail::log(both.sum));
  };
  const std::int64_t heads = out.heads(), tasks = out.batch() * heads;
  detail::run_tasks(run, detail::worker_count(run, tasks), tasks, [&](std::int64_t, std::int64_t task) {
    const std::int64_t b = task / heads;
    for (std::int64_t i = 0; i < out.length(b); ++i) merge_row(b, task % heads, i);
  });
}

}}  // namespace cca::CCA_TARGET
