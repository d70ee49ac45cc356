#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "clusters.hpp"
#include "kernels.hpp"
#include "mass.hpp"

namespace policies {

/// A static prefix, such as the tokens of an image, made small by what is alike in it. After PACT, Dhouib et al.,
/// arXiv 2504.08966, pruning and clusters whose radius is bounded, at the keys of attention: the tokens of least
/// importance are left out; of the others those around which most lie become centres one after the other, unless a
/// centre is nearer than the bound; each token joins its nearest centre. A cluster's row is the mean of its tokens,
/// and counts as many times by the logarithm of its size, added to its scores. Distance is one minus the cosine of
/// two tokens' keys, of all heads together.
///
/// Later queries see `context()` and their own raw tokens, in one `attend`.
template <class T>
class merged_prefix {
 public:
  /// @param importance  `[tokens]`, any measure
  /// @param kept  tokens that are not left out
  /// @param radius  the bound on the distance of a token to its centre
  merged_prefix(view<const T> key, view<const T> value, const std::vector<double>& importance, std::int64_t kept,
                double radius) {
    const auto tokens = places_of_largest(importance.data(), key.length(), kept);
    assign(key, tokens, radius);
    const auto size = static_cast<std::int64_t>(log_size_.size());
    key_ = cluster_sums(key, cluster_, weight_, size);
    value_ = cluster_sums(value, cluster_, weight_, size);
  }

  /// Visible from the first position of those queries on.
  [[nodiscard]] cca::far_context<T> context() const {
    static constexpr std::int64_t first = 0;
    cca::far_context<T> all{.key = key_.view(), .value = value_.view()};
    all.visible_from = {&first, {1, 1, key_.length}, {}};
    all.bias = {log_size_.data(), {1, 1, key_.length}, {0, 0, 1}};
    return all;
  }

  /// The cluster of each token, -1 where it is left out.
  [[nodiscard]] const std::vector<std::int64_t>& clusters() const { return cluster_; }
  [[nodiscard]] std::int64_t size() const { return key_.length; }

 private:
  /// Finds the centres and who joins which.
  void assign(view<const T> key, const std::vector<std::int64_t>& tokens, double radius) {
    const auto apart = [&](std::int64_t i, std::int64_t j) {
      return 1 - dot_of_heads(key, i, key, j) / std::sqrt(dot_of_heads(key, i, key, i) * dot_of_heads(key, j, key, j));
    };
    std::vector<double> density(index(key.length()));
    for (const std::int64_t i : tokens)
      for (const std::int64_t j : tokens) density[index(i)] += std::exp(-apart(i, j) / radius);
    std::vector<std::int64_t> order = tokens, centres;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t i, std::int64_t j) { return density[index(i)] > density[index(j)]; });
    for (const std::int64_t i : order)
      if (std::all_of(centres.begin(), centres.end(), [&](std::int64_t c) { return apart(i, c) > radius; }))
        centres.push_back(i);
    std::vector<T> sizes(centres.size());
    cluster_.assign(density.size(), -1);
    weight_.resize(density.size());
    for (const std::int64_t i : tokens) {
      cluster_[index(i)] = nearest_centre(centres, i, apart);
      ++sizes[index(cluster_[index(i)])];
    }
    for (const std::int64_t i : tokens) weight_[index(i)] = 1 / sizes[index(cluster_[index(i)])];
    for (const T size : sizes) log_size_.push_back(std::log(size));
  }

  std::vector<std::int64_t> cluster_;
  std::vector<T> weight_, log_size_;
  rows<T> key_, value_;
};

}  // namespace policies
