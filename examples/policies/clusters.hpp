#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// Which of some centres is nearest to token i, by `apart(i, centre)`; the first of equals.
template <class Apart>
[[nodiscard]] std::int64_t nearest_centre(const std::vector<std::int64_t>& centres, std::int64_t i,
                                          const Apart& apart) {
  return std::min_element(centres.begin(), centres.end(),
                          [&](std::int64_t a, std::int64_t b) { return apart(i, a) < apart(i, b); }) -
         centres.begin();
}

/// One row for each cluster, `y_c = sum_j w_j x_j` over the tokens j of cluster c.
///
/// @param cluster  of each token, -1 where it has none
/// @param weight  of each token
template <class T>
[[nodiscard]] rows<T> cluster_sums(view<const T> x, const std::vector<std::int64_t>& cluster,
                                   const std::vector<T>& weight, std::int64_t clusters) {
  rows<T> y(x.heads(), clusters, x.dim());
  for (std::int64_t j = 0; j < x.length(); ++j)
    if (cluster[index(j)] >= 0) add_of_heads(weight[index(j)], x, j, y.view(), cluster[index(j)]);
  return y;
}

}  // namespace policies
