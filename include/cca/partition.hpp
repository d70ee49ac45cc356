#pragma once

#include <cstdint>
#include <limits>

#include "detail/base/numbers.hpp"
#include "detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET {

/// The window that holds everything: plain causal attention. As a lookahead: every token to come.
inline constexpr std::int64_t unlimited = (std::numeric_limits<std::int64_t>::max)();

/// Half-open: `[begin, end)`. Empty when `end <= begin`.
struct range {
  std::int64_t begin = 0;  ///< the first
  std::int64_t end = 0;    ///< one behind the last

  /// @{
  /// The set of numbers that it stands for.
  [[nodiscard]] constexpr std::int64_t size() const { return detail::larger<std::int64_t>(end - begin, 0); }
  [[nodiscard]] constexpr bool empty() const { return end <= begin; }
  [[nodiscard]] constexpr bool contains(std::int64_t i) const { return begin <= i && i < end; }
  /// @}

  /// Of the bounds: empty ranges may differ.
  friend constexpr bool operator==(range, range) = default;
};

/// What both contain.
[[nodiscard]] constexpr range intersection(range a, range b) {
  return {detail::larger(a.begin, b.begin), detail::smaller(a.end, b.end)};
}

/// The range moved up by `by`.
[[nodiscard]] constexpr range shifted(range r, std::int64_t by) { return {r.begin + by, r.end + by}; }

/// The smallest range that contains both.
[[nodiscard]] constexpr range hull(range a, range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {detail::smaller(a.begin, b.begin), detail::larger(a.end, b.end)};
}

/// Which context the query at position `t` sees, and in which form: the first tokens `sinks(t)` raw, the cores
/// `[0, core_count(t))`, and the raw tokens `raw(t)`. Every token at or before `t` is seen exactly once: token `j` raw until
/// its group's core takes its place, and the first `sink_tokens` raw for good. All window and group arithmetic of the
/// library is here.
///
/// A token is seen through `sinks` by all queries that see it or through `raw` by all: that goes by `sink_count`.
///
/// Source: arXiv 2412.12465, section 3 (globality-aware pooling and locality-preserving attention); the window start
/// is that of the authors' reference mask. Sink tokens: arXiv 2309.17453 (StreamingLLM), section 3.2. `window >= 1`;
/// positions count from 0, up to 2^62.
struct partition {
  std::int64_t group_size = 1;      ///< tokens per core; 0: nothing is pooled
  std::int64_t window = unlimited;  ///< tokens that stay raw, the current one among them
  std::int64_t sink_tokens = 0;     ///< first tokens that stay raw whatever the window; groups begin behind them
  std::int64_t lookahead = 0;       ///< tokens behind the current one that are seen, too; only where nothing is pooled
  std::int64_t prefix = 0;          ///< first tokens that every query sees, also one before them; as `lookahead`

  /// The first tokens that the query at `t` sees whatever its window: `[0, min(sink_tokens, t + 1 + lookahead))`, and the
  /// prefix.
  [[nodiscard]] constexpr range sinks(std::int64_t t) const {
    return {0, detail::larger(prefix, detail::smaller(sink_tokens, horizon(t)))};
  }

  /// The tokens among the first `length` that are seen through `sinks`.
  [[nodiscard]] constexpr std::int64_t sink_count(std::int64_t length) const {
    return detail::smaller(detail::larger(sink_tokens, prefix), length);
  }

  /// The cores that the query at `t` sees: those of the complete groups whose tokens all lie before its window,
  /// `max(0, floor((t + 1 - sink_tokens - window) / group_size))`. A query before the sequence (`t < 0`) sees none.
  [[nodiscard]] constexpr std::int64_t core_count(std::int64_t t) const {
    if (t < sink_tokens || t - sink_tokens < window || group_size == 0) return 0;
    return (t - sink_tokens - window + 1) / group_size;
  }

  /// The tokens that the query at `t` sees raw behind `sinks(t)`: those from the end of its last core's group on, without
  /// groups the last `window`; up to `t + lookahead`.
  [[nodiscard]] constexpr range raw(std::int64_t t) const {
    const std::int64_t cores = core_count(t), before_window = t < window ? 0 : t - window + 1;
    const std::int64_t begin = group_size == 0 ? before_window : cores == 0 ? 0 : group(cores).begin;
    return {detail::larger(begin, sinks(t).end), horizon(t)};
  }

  /// The first position from which on no query sees a token before `token` through `raw`. Needs a window below `unlimited`,
  /// but for the tokens up to the first behind the sink tokens.
  [[nodiscard]] constexpr std::int64_t first_query_beyond(std::int64_t token) const {
    if (token <= sink_tokens) return 0;
    return group_size > 0 ? first_query((token - sink_tokens - 1) / group_size) : window - 1 + token;
  }

  /// The first position whose query sees core `b`: there the core takes the place of its tokens. Needs a window below
  /// `unlimited`, with which no core is ever seen.
  [[nodiscard]] constexpr std::int64_t first_query(std::int64_t b) const { return window - 1 + group(b).end; }

  /// The queries that see every token of group `b` raw: `window` of them, from that of its last token on. Needs a window
  /// below `unlimited`.
  [[nodiscard]] constexpr range raw_queries(std::int64_t b) const { return {group(b).end - 1, first_query(b)}; }

  /// The tokens of group `b`.
  [[nodiscard]] constexpr range group(std::int64_t b) const {
    return {sink_tokens + b * group_size, sink_tokens + (b + 1) * group_size};
  }

  /// The complete groups among the first `length` tokens.
  [[nodiscard]] constexpr std::int64_t group_count(std::int64_t length) const {
    return group_size > 0 && length > sink_tokens ? (length - sink_tokens) / group_size : 0;
  }

  /// Query-key pairs of the queries `[positions.begin, positions.end)`, with which the sequence ends: the scores that
  /// attention has to compute.
  [[nodiscard]] constexpr std::int64_t pair_count(range positions) const {
    const range tokens{0, positions.end};
    std::int64_t pairs = 0;
    for (std::int64_t t = positions.begin; t < positions.end; ++t)
      pairs += core_count(t) + intersection(sinks(t), tokens).size() + intersection(raw(t), tokens).size();
    return pairs;
  }

 private:
  /// One behind the last token that the query at `t` sees by its position.
  [[nodiscard]] constexpr std::int64_t horizon(std::int64_t t) const {
    return t >= unlimited - lookahead ? unlimited : detail::larger<std::int64_t>(t + 1 + lookahead, 0);
  }
};

}}  // namespace cca::CCA_TARGET
