#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// A point of an image.
using point = std::array<double, 2>;

/// Messages between the keypoints of images, through a few that are likely to have a partner. After MaKeGNN, Li and
/// Ma, arXiv 2307.01447: some keypoints of great matchability that lie apart from each other are sampled, and all
/// keypoints, of the same image or of the other, hear from these alone, guided by their matchability: here it
/// multiplies a keypoint's weight, `softmax_j(q . k_j + log matchability_j)`. The sampling is greedy, where the
/// paper's looks at both images.
template <class T>
class matchable_keypoints {
 public:
  /// @param at,matchability  of all keypoints of an image; matchability lies in (0, 1]
  /// @param count  keypoints that are sampled, fewer where no more lie apart
  /// @param apart  the least distance of two of them
  matchable_keypoints(const std::vector<point>& at, const std::vector<T>& matchability, std::int64_t count,
                      double apart)
      : matchability_(matchability) {
    std::vector<std::int64_t> order(at.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t i, std::int64_t j) { return matchability[index(i)] > matchability[index(j)]; });
    for (const std::int64_t i : order)
      if (static_cast<std::int64_t>(sampled_.size()) < count &&
          std::all_of(sampled_.begin(), sampled_.end(), [&](std::int64_t j) {
            return std::hypot(at[index(i)][0] - at[index(j)][0], at[index(i)][1] - at[index(j)][1]) >= apart;
          }))
        sampled_.push_back(i);
    std::sort(sampled_.begin(), sampled_.end());
    for (const T m : matchability) log_matchability_.push_back(std::log(m));
  }

  [[nodiscard]] std::int64_t sampled() const { return static_cast<std::int64_t>(sampled_.size()); }

  /// What these keypoints, whose keys and values these are, tell to `queries` others.
  [[nodiscard]] cca::far_context<T> context(view<const T> key, view<const T> value, std::int64_t queries) const {
    cca::far_context<T> all{.key = key, .value = value};
    all.bias = {log_matchability_.data(), {1, 1, key.length()}, {0, 0, 1}};
    all.selected = {.blocks = cca::bhsd(sampled_.data(), 1, 1, 1, sampled()), .block_queries = queries};
    return all;
  }

  /// The gradients, written whole; that of the matchability goes through the weights, not through the sampling.
  void gradient(view<const T> query, const cca::far_context<T>& context, const cca::results<T>& of,
                view<const T> grad_out, rows<T>& grad_query, rows<T>& grad_key, rows<T>& grad_value,
                std::vector<T>& grad_matchability) const {
    kernels::attend_gradient<T>({query, context.key.slice(0, 0), context.value.slice(0, 0)}, context, {of.out, of.lse},
                                {grad_out},
                                {.query = grad_query.view(),
                                 .key = grad_key.view().slice(0, 0),
                                 .value = grad_value.view().slice(0, 0),
                                 .far_key = grad_key.view(),
                                 .far_value = grad_value.view(),
                                 .far_bias = cca::bhs(grad_matchability.data(), 1, 1, context.key.length())},
                                {.first_position = 0});
    for (std::size_t j = 0; j < matchability_.size(); ++j) grad_matchability[j] /= matchability_[j];
  }

 private:
  std::vector<T> matchability_, log_matchability_;
  std::vector<std::int64_t> sampled_;
};

}  // namespace policies
