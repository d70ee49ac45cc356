#pragma once

#include <cstdint>
#include <limits>

#include "detail/base/numbers.hpp"
#include "detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET {

/// The window that holds everything: plain causal attention.
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

/// Which context the query at position `t` sees, and in which form: the cores `[0, core_count(t))`, then the raw tokens
/// `raw(t)`. Every token at or before `t` is seen exactly once: token `j` raw until its group's core takes its place.
/// All window and group arithmetic of the library is here.
///
/// Source: arXiv 2412.12465, section 3 (globality-aware pooling and locality-preserving attention); the window start
/// is that of the authors' reference mask. `window >= 1`; positions count from 0, up to 2^62.
struct partition {
  std::int64_t group_size = 1;      ///< tokens per core; 0: nothing is pooled
  std::int64_t window = unlimited;  ///< tokens that stay raw, the current one among them

  /// The cores that the query at `t` sees: those of the complete groups whose tokens all lie before its window,
  /// `max(0, floor((t + 1 - window) / group_size))`. A query before the sequence (`t < 0`) sees nothing.
  [[nodiscard]] constexpr std::int64_t core_count(std::int64_t t) const {
    return t < window || group_size == 0 ? 0 : (t - window + 1) / group_size;
  }

  /// The tokens that the query at `t` sees raw: `[core_count(t) * group_size, t + 1)`, without groups the last `window`.
  [[nodiscard]] constexpr range raw(std::int64_t t) const {
    const std::int64_t begin = group_size > 0 ? core_count(t) * group_size : t < window ? 0 : t - window + 1;
    return {begin, detail::larger<std::int64_t>(t + 1, 0)};
  }

  /// The first position whose query sees no token before `token` raw. Needs a window below `unlimited`, but for token 0.
  [[nodiscard]] constexpr std::int64_t first_query_beyond(std::int64_t token) const {
    if (token <= 0) return 0;
    return group_size > 0 ? first_query((token - 1) / group_size) : window - 1 + token;
  }

  /// The first position whose query sees core `b`: there the core takes the place of its tokens. Needs a window below
  /// `unlimited`, with which no core is ever seen.
  [[nodiscard]] constexpr std::int64_t first_query(std::int64_t b) const { return window - 1 + (b + 1) * group_size; }

  /// The tokens of group `b`.
  [[nodiscard]] constexpr range group(std::int64_t b) const { return {b * group_size, (b + 1) * group_size}; }

  /// The complete groups among the first `length` tokens.
  [[nodiscard]] constexpr std::int64_t group_count(std::int64_t length) const {
    return group_size > 0 ? length / group_size : 0;
  }

  /// Query-key pairs of the queries `[positions.begin, positions.end)`: the scores that attention has to compute.
  [[nodiscard]] constexpr std::int64_t pair_count(range positions) const {
    std::int64_t pairs = 0;
    for (std::int64_t t = positions.begin; t < positions.end; ++t) pairs += core_count(t) + raw(t).size();
    return pairs;
  }
};

}}  // namespace cca::CCA_TARGET
