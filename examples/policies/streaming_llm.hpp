#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.hpp"
#include "rope.hpp"
#include "sinks_and_window.hpp"

namespace policies {

/// StreamingLLM: the first tokens of a stream and its window. Xiao et al., Efficient Streaming Language Models with
/// Attention Sinks, arXiv 2309.17453, section 3.2: a cache of sink tokens and a rolling one of the latest tokens, where
/// positions are those in the cache, not in the text.
///
/// Of m sink tokens and a window of s tokens, sink token j has the position j, and the query of token t has
/// `min(t, m + s - 1)`. Within the window distances are those of the text, so the window's keys stay turned as they are,
/// and only the sink tokens need a query of their own. (Where positions of the text will do, the library's
/// `{.window = s, .sink_tokens = m}` is all of it.)
template <class T>
class streaming_llm {
 public:
  /// @param shape  one sequence
  streaming_llm(const cca::cache_shape& shape, std::int64_t sinks, std::int64_t window, rope turn = {})
      : recent_(shape, {.window = window}),
        sinks_(sinks),
        window_(window),
        turn_(turn),
        sink_key_(shape.kv_heads, sinks, shape.dim),
        sink_value_(shape.kv_heads, sinks, recent_.shape().value_dim) {}

  /// Appends tokens, a prompt or one, whose queries and keys are not turned yet, and answers their queries.
  void attend(view<const T> query, view<const T> key, view<const T> value, view<T> out) {
    using part = cca::results<const T, const T>;
    const std::int64_t first = recent_.length(), count = query.length(), heads = query.heads();
    const auto in_text = [&](std::int64_t i) { return first + i; };
    const auto in_cache = [&](std::int64_t i) { return std::min(first + i, sinks_ + window_ - 1); };
    const rows<T> window_query = turn_.turned(query, in_text), window_key = turn_.turned(key, in_text),
                  sink_query = turn_.turned(query, in_cache);
    keep_sinks(window_key.view(), value, first);
    const auto seen = sinks_beside_window(first, count, sinks_, window_);
    rows<T> sink_out(heads, count, out.dim()), sink_lse(heads, count, 1), lse(heads, count, 1), out_lse = lse;
    attend_far<T>(sink_query.view(), {sink_key_.view(), sink_value_.view(), same_for_heads(seen, heads)},
                  {sink_out.view(), sink_lse.numbers()});
    recent_.attend(cca::inputs<T>{window_query.view(), window_key.view(), value}, cca::results<T>{out, lse.numbers()});
    kernels::merge(part{sink_out.view(), sink_lse.numbers()}, part{out, lse.numbers()},
                   cca::results<T>{out, out_lse.numbers()});
  }

  /// Bytes of keys and values that are kept.
  [[nodiscard]] std::size_t bytes() const {
    return recent_.bytes() + (sink_key_.data.size() + sink_value_.data.size()) * sizeof(T);
  }

 private:
  /// Takes over those of the new tokens that are sink tokens.
  void keep_sinks(view<const T> key, view<const T> value, std::int64_t first) {
    for (std::int64_t t = first; t < std::min(sinks_, first + key.length()); ++t)
      for (std::int64_t h = 0; h < key.heads(); ++h) {
        std::copy_n(key.row(0, h, t - first), key.dim(), sink_key_.row(h, t));
        std::copy_n(value.row(0, h, t - first), value.dim(), sink_value_.row(h, t));
      }
  }

  kernels::kv_cache<T> recent_;
  std::int64_t sinks_, window_;
  rope turn_;
  rows<T> sink_key_, sink_value_;
};

}  // namespace policies
