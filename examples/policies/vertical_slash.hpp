#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "mass.hpp"

namespace policies {

/// How much of a prompt the heads read. The defaults are those of MInference's code, where a search ahead of time gives
/// each head `verticals` and `slashes` of its own.
struct vertical_slash_sizes {
  std::int64_t verticals = 1000;      ///< columns, tokens that all queries behind them see
  std::int64_t slashes = 6096;        ///< diagonals, distances at which all queries see
  std::int64_t first_columns = 30;    ///< of the verticals, always
  std::int64_t near_diagonals = 100;  ///< of the slashes, always; at least 1, the query's own token
  std::int64_t last_queries = 64;     ///< that vote
  std::int64_t block = 1;             ///< queries and keys that are read together
};

/// The vertical-slash pattern of MInference, Jiang et al., arXiv 2407.02490, as the authors' code selects it: the last
/// queries of a prompt attend to all of it, what they gave is summed along columns and along diagonals, and each head
/// reads the columns and the diagonals that got most. Query t then sees token j if column j or the distance t - j is
/// chosen. With blocks above 1 a tile of queries and keys is read whole, up to the diagonal, where anything in it is
/// chosen: as the authors' kernel reads diagonals, though not columns, which it gathers.
struct vertical_slash {
  std::int64_t block, heads;
  rows<std::int64_t> lists;        ///< `[query heads][blocks of queries][most]`, ascending, -1 behind the last
  std::vector<std::int64_t> seen;  ///< `[queries]`: the tokens up to the query's own

  template <class T>
  vertical_slash(view<const T> query, view<const T> key, view<const T> value, const vertical_slash_sizes& sizes)
      : block(sizes.block), heads(query.heads()) {
    const std::int64_t length = key.length();
    for (std::int64_t t = 0; t < length; ++t) seen.push_back(t + 1);

    rows<double> columns(heads, length, 1), diagonals(heads, length, 1);
    const std::int64_t voting = std::min(sizes.last_queries, length), first = length - voting;
    const view<const T> last = query.slice(first, voting);
    rows<T> out(heads, voting, value.dim()), lse(heads, voting, 1);
    kernels::attention<T>({last, key, value}, {out.view(), lse.numbers()});
    for_each_weight<T>(last, key, lse.numbers(), first,
                       [&](std::int64_t h, std::int64_t i, std::int64_t j, double weight) {
                         *columns.row(h, j) += weight;
                         *diagonals.row(h, first + i - j) += weight;
                       });

    std::vector<std::vector<std::int64_t>> all;
    for (std::int64_t h = 0; h < heads; ++h) {
      std::fill_n(columns.row(h, 0), std::min(sizes.first_columns, length), HUGE_VAL);
      std::fill_n(diagonals.row(h, 0), std::min(sizes.near_diagonals, length), HUGE_VAL);
      const auto verticals = places_of_largest(columns.row(h, 0), length, sizes.verticals);
      const auto slashes = places_of_largest(diagonals.row(h, 0), length, sizes.slashes);
      for (std::int64_t begin = 0; begin < length; begin += block)
        all.push_back(blocks_of(begin, std::min(begin + block, length), verticals, slashes));
    }
    std::size_t most = 0;
    for (const auto& list : all) most = std::max(most, list.size());
    lists = rows<std::int64_t>(heads, (length + block - 1) / block, static_cast<std::int64_t>(most));
    std::fill(lists.data.begin(), lists.data.end(), -1);
    for (std::size_t i = 0; i < all.size(); ++i)
      std::copy(all[i].begin(), all[i].end(), lists.data.begin() + static_cast<std::ptrdiff_t>(i * most));
  }

  /// For `attend_far` and `attend_far_gradient`. No gradient goes through the choice.
  template <class T>
  [[nodiscard]] cca::far_context<T> over(view<const T> key, view<const T> value) const {
    cca::far_context<T> context{.key = key, .value = value};
    context.seen = same_for_heads(seen, heads);
    context.selected = {.blocks = lists.view(), .block_rows = block, .block_queries = block};
    return context;
  }

 private:
  /// The blocks of keys that the queries `[begin, end)` read.
  std::vector<std::int64_t> blocks_of(std::int64_t begin, std::int64_t end, const std::vector<std::int64_t>& verticals,
                                      const std::vector<std::int64_t>& slashes) const {
    std::vector<std::int64_t> blocks;
    for (const std::int64_t j : verticals)
      if (j < end) blocks.push_back(j / block);
    for (const std::int64_t distance : slashes)  // the keys from begin - distance to the last query's
      if (distance < end)
        for (std::int64_t c = std::max<std::int64_t>(begin - distance, 0) / block; c <= (end - 1 - distance) / block;
             ++c)
          blocks.push_back(c);
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    return blocks;
  }
};

}  // namespace policies
