#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.hpp"
#include "rope.hpp"
#include "sinks_and_window.hpp"

namespace policies {

/// LM-Infinite: the first tokens and the latest L, and no distance above L. Han et al., arXiv 2308.16137: a mask in
/// the shape of a Lambda, and `min(L, t - j)` in the place of the distance `t - j`, with L the length that the model
/// was trained with.
///
/// The tokens of the window are nearer than L. The first tokens behind it are all at the distance L: their keys as
/// they are at position 0, and a second query, at position L.
template <class T>
class lm_infinite {
 public:
  /// Queries and keys are not turned yet; they and the values stay the caller's.
  /// @param sinks  first tokens that every query sees
  /// @param trained_length  L
  lm_infinite(view<const T> query, view<const T> key, view<const T> value, std::int64_t sinks,
              std::int64_t trained_length, rope turn = {})
      : window_(trained_length),
        turn_(turn),
        value_(value),
        sink_key_(key.slice(0, std::min(sinks, key.length()))),
        query_(turn.turned(query, in_text)),
        key_(turn.turned(key, in_text)),
        sink_query_(turn.turned(query, [&](std::int64_t) { return trained_length; })) {}

  void attend(const cca::results<T>& to) const { attend_sinks_and_window(operands(), window_, to); }

  /// The gradients of the queries and keys before they were turned, and of the values, written whole.
  void gradient(const cca::results<T>& of, view<const T> grad_out, rows<T>& query, rows<T>& key, rows<T>& value) const {
    rows<T> sink_query = query_, sink_key(key.heads, sink_key_.length(), key.dim),
            sink_value(value.heads, sink_key.length, value.dim);
    const two_queries<T> to{query.view(),      key.view(),      value.view(),
                            sink_query.view(), sink_key.view(), sink_value.view()};
    sinks_and_window_gradient(operands(), window_, of, grad_out, to);
    const auto back = [](std::int64_t t) { return -t; };
    query = turn_.turned(view<const T>(query.view()), back);
    key = turn_.turned(view<const T>(key.view()), back);
    sink_query = turn_.turned(view<const T>(sink_query.view()), [&](std::int64_t) { return -window_; });
    add_rows<T>(sink_query.view(), query.view());
    add_rows<T>(sink_key.view(), key.view());
    add_rows<T>(sink_value.view(), value.view());
  }

 private:
  static std::int64_t in_text(std::int64_t t) { return t; }

  [[nodiscard]] two_queries<const T> operands() const {
    return {query_.view(), key_.view(), value_, sink_query_.view(), sink_key_, value_.slice(0, sink_key_.length())};
  }

  std::int64_t window_;
  rope turn_;
  view<const T> value_, sink_key_;
  rows<T> query_, key_, sink_query_;
};

}  // namespace policies
