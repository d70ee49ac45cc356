#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// Keys and values that are pooled around each token before attention, by weights and widths that a model learns.
/// After ContextPool, Huang et al., arXiv 2207.01844, which pools a layer's features; what follows is linear, so keys
/// and values before they are turned by position may be pooled in their place. One-sided, for causal use:
///
///   y_i = sum_j p_ij x_j,  p_ij = w_j exp(-(i - j)^2 / (2 s_i^2)) / (the sum of these over j),  j in (i - reach, i]
///
/// with w_j the weight of token j and s_i the width of token i, both above 0. Attention over what is pooled is any of
/// the library's, and has as many scores; the gain is that of a model with fewer layers.
template <class T>
class context_pool {
 public:
  /// @param weight,width  one for each token; they stay the caller's
  context_pool(const std::vector<T>& weight, const std::vector<T>& width, std::int64_t reach)
      : weight_(weight), width_(width), reach_(reach) {}

  [[nodiscard]] rows<T> pooled(view<const T> x) const {
    rows<T> y(x.heads(), x.length(), x.dim());
    for_each_pair([&](std::int64_t i, std::int64_t j, T p) { add_of_heads(p, x, j, y.view(), i); });
    return y;
  }

  /// The gradients of keys and values from those of the pooled ones, and of weights and widths through both; all are
  /// written whole. `dw_j = sum_i p_ij (a_ij - a_i) / w_j` and `ds_i = sum_j p_ij (a_ij - a_i) (i - j)^2 / s_i^3`,
  /// where `a_ij` is the product of row i's gradients with token j and `a_i = sum_j p_ij a_ij`.
  void gradient(view<const T> key, view<const T> value, const rows<T>& grad_pooled_key,
                const rows<T>& grad_pooled_value, rows<T>& grad_key, rows<T>& grad_value, std::vector<T>& grad_weight,
                std::vector<T>& grad_width) const {
    std::vector<T> mean(weight_.size());
    for (auto* grad : {&grad_weight, &grad_width, &grad_key.data, &grad_value.data})
      std::fill(grad->begin(), grad->end(), T(0));
    const auto product = [&](std::int64_t i, std::int64_t j) {
      return static_cast<T>(dot_of_heads(grad_pooled_key.view(), i, key, j) +
                            dot_of_heads(grad_pooled_value.view(), i, value, j));
    };
    for_each_pair([&](std::int64_t i, std::int64_t j, T p) {
      mean[index(i)] += p * product(i, j);
      add_of_heads(p, grad_pooled_key.view(), i, grad_key.view(), j);
      add_of_heads(p, grad_pooled_value.view(), i, grad_value.view(), j);
    });
    for_each_pair([&](std::int64_t i, std::int64_t j, T p) {
      const T slope = p * (product(i, j) - mean[index(i)]), s = width_[index(i)], away = static_cast<T>(i - j);
      grad_weight[index(j)] += slope / weight_[index(j)];
      grad_width[index(i)] += slope * away * away / (s * s * s);
    });
  }

 private:
  /// Calls `f(i, j, p_ij)` for every token i and those that it pools.
  template <class F>
  void for_each_pair(const F& f) const {
    std::vector<T> p;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(weight_.size()); ++i) {
      const std::int64_t first = std::max<std::int64_t>(i + 1 - reach_, 0);
      const T s = width_[index(i)];
      T sum = 0;
      p.clear();
      for (std::int64_t j = first; j <= i; ++j) {
        const T away = static_cast<T>(i - j) / s;
        p.push_back(weight_[index(j)] * std::exp(-away * away / 2));
        sum += p.back();
      }
      for (std::int64_t j = first; j <= i; ++j) f(i, j, p[index(j - first)] / sum);
    }
  }

  const std::vector<T>& weight_;
  const std::vector<T>& width_;
  std::int64_t reach_;
};

}  // namespace policies
