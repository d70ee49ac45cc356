#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// Block selection: every query sees the tokens of a few blocks of its past, which it chooses by what stands for a
/// block. All keys and values are kept; what falls is what a step reads.

/// Quest, Tang et al., arXiv 2406.10774: the elementwise least and greatest key of a block (a page) bound every
/// product with its keys, `q . k <= sum_d max(q_d min_d, q_d max_d)`.
template <class T>
struct quest_bounds {
  rows<T> least, most;  ///< `[key/value heads][complete blocks][dim]`

  quest_bounds(view<const T> key, std::int64_t block)
      : least(key.heads(), key.length() / block, key.dim()), most(least) {
    for (std::int64_t h = 0; h < least.heads; ++h)
      for (std::int64_t j = 0; j < least.length * block; ++j)
        for (std::int64_t d = 0; d < least.dim; ++d) {
          T &low = least.row(h, j / block)[d], &high = most.row(h, j / block)[d];
          const T k = key.row(0, h, j)[d];
          low = j % block == 0 ? k : std::min(low, k);
          high = j % block == 0 ? k : std::max(high, k);
        }
  }

  [[nodiscard]] T operator()(const T* query, std::int64_t h, std::int64_t c) const {
    T sum = 0;
    for (std::int64_t d = 0; d < least.dim; ++d)
      sum += std::max(query[d] * least.row(h, c)[d], query[d] * most.row(h, c)[d]);
    return sum;
  }
};

/// MoBA, Lu et al., arXiv 2502.13189: the mean key of a block, `s_i = <q, mean_pool(K[I_i])>`.
template <class T>
struct moba_means {
  rows<T> mean;  ///< `[key/value heads][complete blocks][dim]`

  moba_means(view<const T> key, std::int64_t block) : mean(key.heads(), key.length() / block, key.dim()) {
    for (std::int64_t h = 0; h < mean.heads; ++h)
      for (std::int64_t j = 0; j < mean.length * block; ++j)
        for (std::int64_t d = 0; d < mean.dim; ++d)
          mean.row(h, j / block)[d] += key.row(0, h, j)[d] / static_cast<T>(block);
  }

  [[nodiscard]] T operator()(const T* query, std::int64_t h, std::int64_t c) const {
    T sum = 0;
    for (std::int64_t d = 0; d < mean.dim; ++d) sum += query[d] * mean.row(h, c)[d];
    return sum;
  }
};

/// Which blocks each query sees: its own, up to itself, and those of the past that count most for it.
struct block_selection {
  std::int64_t block, heads, most;
  std::vector<std::int64_t> lists;  ///< `[query heads][queries][most]`, ascending, -1 behind the last
  std::vector<std::int64_t> seen;   ///< `[queries]`: the tokens up to the query's own

  /// @param query  the queries at the positions from `first` on
  /// @param count_of  `quest_bounds` or `moba_means` of the keys
  /// @param count  blocks that a query sees, its own among them
  template <class T, class CountOf>
  block_selection(view<const T> query, std::int64_t first, std::int64_t kv_heads, const CountOf& count_of,
                  std::int64_t block_rows, std::int64_t count)
      : block(block_rows), heads(query.heads()), most(count), lists(index(heads * query.length() * count), -1) {
    for (std::int64_t i = 0; i < query.length(); ++i) seen.push_back(first + i + 1);
    std::vector<std::pair<T, std::int64_t>> past;
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const std::int64_t own = (first + i) / block, chosen = std::min(own, count - 1);
        past.clear();
        for (std::int64_t c = 0; c < own; ++c)
          past.emplace_back(-count_of(query.row(0, h, i), h / (heads / kv_heads), c), c);
        std::partial_sort(past.begin(), past.begin() + chosen, past.end());
        std::int64_t* const list = lists.data() + (h * query.length() + i) * count;
        for (std::int64_t c = 0; c < chosen; ++c) list[c] = past[index(c)].second;
        std::sort(list, list + chosen);
        list[chosen] = own;
      }
  }

  /// For `attend_far` and `attend_far_gradient`. No gradient goes through the choice, as in MoBA's training.
  template <class T>
  [[nodiscard]] cca::far_context<T> over(view<const T> key, view<const T> value) const {
    const auto queries = static_cast<std::int64_t>(seen.size());
    cca::far_context<T> context{.key = key, .value = value};
    context.seen = same_for_heads(seen, heads);
    context.selected = {.blocks = cca::bhsd(lists.data(), 1, heads, queries, most), .block_rows = block};
    return context;
  }
};

}  // namespace policies
