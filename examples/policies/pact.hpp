#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

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
    key_ = mean(key, tokens);
    value_ = mean(value, tokens);
  }

  /// Visible from the first position of those queries on.
  [[nodiscard]] cca::far_context<T> context() const {
    static constexpr std::int64_t first = 0;
    cca::far_context<T> all{.key = key_.view(), .value = value_.view()};
    all.visible_from = {&first, {1, 1, key_.length}, {}};
    all.bias = {log_size_.data(), {1, 1, key_.length}, {0, 0, 1}};
    return all;
  }

  /// The cluster of each kept token.
  [[nodiscard]] const std::vector<std::int64_t>& clusters() const { return cluster_; }
  [[nodiscard]] std::int64_t size() const { return key_.length; }

 private:
  static double distance(view<const T> key, std::int64_t i, std::int64_t j) {
    double product = 0, of_i = 0, of_j = 0;
    for (std::int64_t h = 0; h < key.heads(); ++h)
      for (std::int64_t d = 0; d < key.dim(); ++d) {
        const auto a = static_cast<double>(key.row(0, h, i)[d]), b = static_cast<double>(key.row(0, h, j)[d]);
        product += a * b, of_i += a * a, of_j += b * b;
      }
    return 1 - product / std::sqrt(of_i * of_j);
  }

  /// Finds the centres and who joins which.
  void assign(view<const T> key, const std::vector<std::int64_t>& tokens, double radius) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    const auto apart = [&](std::int64_t i, std::int64_t j) {
      return distance(key, tokens[index(i)], tokens[index(j)]);
    };
    std::vector<double> density(index(count));
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < count; ++j) density[index(i)] += std::exp(-apart(i, j) / radius);
    std::vector<std::int64_t> order(index(count)), centres;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t i, std::int64_t j) { return density[index(i)] > density[index(j)]; });
    for (const std::int64_t i : order)
      if (std::all_of(centres.begin(), centres.end(), [&](std::int64_t c) { return apart(i, c) > radius; }))
        centres.push_back(i);
    std::vector<std::int64_t> sizes(centres.size());
    for (std::int64_t i = 0; i < count; ++i) {
      const auto nearest = std::min_element(centres.begin(), centres.end(),
                                            [&](std::int64_t a, std::int64_t b) { return apart(i, a) < apart(i, b); });
      cluster_.push_back(nearest - centres.begin());
      ++sizes[index(cluster_.back())];
    }
    for (const std::int64_t size : sizes) {
      size_.push_back(static_cast<T>(size));
      log_size_.push_back(std::log(size_.back()));
    }
  }

  [[nodiscard]] rows<T> mean(view<const T> of, const std::vector<std::int64_t>& tokens) const {
    rows<T> result(of.heads(), static_cast<std::int64_t>(log_size_.size()), of.dim());
    for (std::int64_t h = 0; h < of.heads(); ++h)
      for (std::size_t i = 0; i < tokens.size(); ++i)
        for (std::int64_t d = 0; d < of.dim(); ++d)
          result.row(h, cluster_[i])[d] += of.row(0, h, tokens[i])[d] / size_[index(cluster_[i])];
    return result;
  }

  std::vector<std::int64_t> cluster_;
  std::vector<T> size_, log_size_;
  rows<T> key_, value_;
};

}  // namespace policies
