#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// Until when each token is seen, where caches evict: token j of a head of keys is seen by the queries at the positions
/// `[j, until(j))`. With it a whole sequence is attended to at once, and has its gradient.
struct evictions {
  rows<std::int64_t> until;        ///< `[key/value heads][tokens]`, `cca::unlimited` for those that stay
  std::vector<std::int64_t> seen;  ///< `[tokens]`: the tokens up to the query's own

  evictions(std::int64_t kv_heads, std::int64_t length) : until(kv_heads, length, 1) {
    std::fill(until.data.begin(), until.data.end(), cca::unlimited);
    for (std::int64_t t = 0; t < length; ++t) seen.push_back(t + 1);
  }

  /// For `attend_far` and `attend_far_gradient`. No gradient goes through the choice of what is evicted.
  template <class T>
  [[nodiscard]] cca::far_context<T> over(view<const T> key, view<const T> value, std::int64_t heads) const {
    cca::far_context<T> context{.key = key, .value = value};
    context.seen = same_for_heads(seen, heads);
    context.visible_until = until.numbers();
    return context;
  }
};

}  // namespace policies
