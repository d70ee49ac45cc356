#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "clusters.hpp"
#include "kernels.hpp"
#include "mass.hpp"

namespace policies {

/// Keys and values of an image gathered into clusters by what they hold, and each query sees all clusters: after
/// ClusTR, Xie et al., arXiv 2208.13138, as its abstract has it. Centres are peaks of density and clusters are weighted
/// means, as in the code of TCFormer, Zeng et al., CVPR 2022 (DPC-KNN):
///
///   density_i = exp(-the mean of |k_i - k_j|^2 / C over the nearest `neighbours` tokens j, i among them)
///   peak_i = density_i times the distance of i to the nearest token that is denser; the largest of all if none is
///
/// with C the numbers in a token's keys, of all heads together. The tokens of the greatest peaks are centres, each
/// token joins the nearest one, and a cluster's row is the mean of its tokens by weights from scores that a model
/// learns: `y_c = sum_j w_j x_j`, `w = softmax_{j in c}(score_j)`. It is one scale of the paper's several. Attention
/// over the clusters is the library's, in both directions.
template <class T>
class clustered_tokens {
 public:
  /// @param score  one for each token
  /// @param clusters,neighbours  from 1 to the number of tokens
  clustered_tokens(view<const T> key, const std::vector<T>& score, std::int64_t clusters, std::int64_t neighbours)
      : count_(clusters) {
    assign(key, neighbours);
    std::vector<T> most(index(count_), -HUGE_VAL), sum(index(count_));
    for (std::size_t j = 0; j < score.size(); ++j) most[of(j)] = std::max(most[of(j)], score[j]);
    for (std::size_t j = 0; j < score.size(); ++j) {
      weight_.push_back(std::exp(score[j] - most[of(j)]));
      sum[of(j)] += weight_.back();
    }
    for (std::size_t j = 0; j < score.size(); ++j) weight_[j] /= sum[of(j)];
  }

  /// `[heads][clusters][dim]`, of the keys or of the values.
  [[nodiscard]] rows<T> pooled(view<const T> x) const { return cluster_sums(x, cluster_, weight_, count_); }

  /// The gradients of keys, values and scores from those of what is pooled, written whole. Who joins whom is given, so
  /// `dx_j = w_j dy_c` and `dscore_j = w_j (a_j - sum_{i in c} w_i a_i)` with `a_j` the product of dy_c and token j.
  void gradient(view<const T> key, view<const T> value, view<const T> grad_pooled_key, view<const T> grad_pooled_value,
                rows<T>& grad_key, rows<T>& grad_value, std::vector<T>& grad_score) const {
    std::vector<T> mean(index(count_));
    for (auto* grad : {&grad_key.data, &grad_value.data}) std::fill(grad->begin(), grad->end(), T(0));
    for (std::size_t j = 0; j < cluster_.size(); ++j) {
      const std::int64_t c = cluster_[j], token = static_cast<std::int64_t>(j);
      add_of_heads(weight_[j], grad_pooled_key, c, grad_key.view(), token);
      add_of_heads(weight_[j], grad_pooled_value, c, grad_value.view(), token);
      grad_score[j] = static_cast<T>(dot_of_heads(grad_pooled_key, c, key, token) +
                                     dot_of_heads(grad_pooled_value, c, value, token));
      mean[of(j)] += weight_[j] * grad_score[j];
    }
    for (std::size_t j = 0; j < cluster_.size(); ++j) grad_score[j] = weight_[j] * (grad_score[j] - mean[of(j)]);
  }

 private:
  [[nodiscard]] std::size_t of(std::size_t token) const { return index(cluster_[token]); }

  /// Finds the centres and who joins which.
  void assign(view<const T> key, std::int64_t neighbours) {
    const std::int64_t length = key.length();
    rows<double> distance(1, length, length);
    for (std::int64_t i = 0; i < length; ++i)
      for (std::int64_t j = 0; j < length; ++j) {
        for (std::int64_t h = 0; h < key.heads(); ++h)
          for (std::int64_t d = 0; d < key.dim(); ++d) {
            const double apart = static_cast<double>(key.row(0, h, i)[d]) - static_cast<double>(key.row(0, h, j)[d]);
            distance.row(0, i)[j] += apart * apart / static_cast<double>(key.heads() * key.dim());
          }
      }
    std::vector<double> density, peak, nearest(index(length));
    for (std::int64_t i = 0; i < length; ++i) {
      std::copy_n(distance.row(0, i), length, nearest.begin());
      std::sort(nearest.begin(), nearest.end());
      double sum = 0;
      for (std::int64_t n = 0; n < neighbours; ++n) sum += nearest[index(n)];
      density.push_back(std::exp(-sum / static_cast<double>(neighbours)));
    }
    const double largest = *std::max_element(distance.data.begin(), distance.data.end());
    for (std::int64_t i = 0; i < length; ++i) {
      double least = largest;
      for (std::int64_t j = 0; j < length; ++j)
        if (density[index(j)] > density[index(i)]) least = std::min(least, distance.row(0, i)[j]);
      peak.push_back(density[index(i)] * std::sqrt(least));
    }
    const auto centres = places_of_largest(peak.data(), length, count_);
    for (std::int64_t i = 0; i < length; ++i)
      cluster_.push_back(
          nearest_centre(centres, i, [&](std::int64_t a, std::int64_t c) { return distance.row(0, a)[c]; }));
    // Of centres that are alike, each keeps itself: no cluster is empty.
    for (std::size_t c = 0; c < centres.size(); ++c) cluster_[index(centres[c])] = static_cast<std::int64_t>(c);
  }

  std::int64_t count_;
  std::vector<std::int64_t> cluster_;
  std::vector<T> weight_;
};

}  // namespace policies
