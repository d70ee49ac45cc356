#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// How many sink tokens have left the window of the queries at the positions `[first, first + count)`: those that a
/// query sees beside its window.
[[nodiscard]] inline std::vector<std::int64_t> sinks_beside_window(std::int64_t first, std::int64_t count,
                                                                   std::int64_t sinks, std::int64_t window) {
  std::vector<std::int64_t> seen;
  for (std::int64_t t = first; t < first + count; ++t)
    seen.push_back(std::min(sinks, std::max<std::int64_t>(t + 1 - window, 0)));
  return seen;
}

/// Operands, or with elements that are not constant their gradients, where a model turns a token's query otherwise
/// for the sink tokens than for the window.
template <class T>
struct two_queries {
  view<T> query, key, value;                 ///< of the window
  view<T> sink_query, sink_key, sink_value;  ///< of the sink tokens
};

/// One softmax over both: `softmax([q_sink K_sink ; q K_window])`. Each part is attended to by itself, and `merge`
/// joins them by their log-sum-exps.
template <class T>
void attend_sinks_and_window(const two_queries<const T>& in, std::int64_t window, const cca::results<T>& to) {
  using part = cca::results<const T, const T>;
  const std::int64_t heads = in.query.heads(), length = in.query.length(), dim = in.value.dim();
  const auto seen = sinks_beside_window(0, length, in.sink_key.length(), window);
  rows<T> sink_out(heads, length, dim), sink_lse(heads, length, 1), out(heads, length, dim), lse(heads, length, 1);
  attend_far<T>(in.sink_query, {in.sink_key, in.sink_value, same_for_heads(seen, heads)},
                {sink_out.view(), sink_lse.numbers()});
  kernels::attention<T>({in.query, in.key, in.value}, {out.view(), lse.numbers()}, {.window = window});
  kernels::merge(part{sink_out.view(), sink_lse.numbers()}, part{out.view(), lse.numbers()}, to);
}

/// Its gradients, written whole. A weight is `exp(score - lse)` with the `lse` of both parts, so the gradient of each
/// part takes the merged results as its own.
template <class T>
void sinks_and_window_gradient(const two_queries<const T>& in, std::int64_t window, const cca::results<T>& of,
                               view<const T> grad_out, const two_queries<T>& to) {
  const auto seen = sinks_beside_window(0, in.query.length(), in.sink_key.length(), window);
  attend_far_gradient<T>(in.sink_query, {in.sink_key, in.sink_value, same_for_heads(seen, in.query.heads())}, of,
                         grad_out, to.sink_query, to.sink_key, to.sink_value);
  kernels::attention_gradient<T>({in.query, in.key, in.value}, {of.out, of.lse}, {grad_out},
                                 {to.query, to.key, to.value}, {.window = window});
}

}  // namespace policies
