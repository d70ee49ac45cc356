#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.hpp"

namespace policies {

/// Tokens of an image that see those of their cluster, in both directions. After Semantic Equitable Clustering, SecViT,
/// Fan et al., arXiv 2405.13337, as the authors' code has it: in each head tokens are sorted by the cosine of their key
/// and the mean of all keys, and cut into clusters of the same size (here of two sizes one apart where the length does
/// not divide). There is one pass and no iteration.
///
/// Each cluster is a sequence of a packed batch of the library. No gradient goes through the sorting.
template <class T>
class equitable_clusters {
 public:
  equitable_clusters(view<const T> key, std::int64_t clusters) : order_(key.heads(), key.length(), 1) {
    for (std::int64_t c = 0; c <= clusters; ++c) offsets_.push_back(c * key.length() / clusters);
    for (std::int64_t h = 0; h < key.heads(); ++h) {
      const std::vector<double> likeness = likeness_to_mean(key, h);
      std::int64_t* const order = order_.row(h, 0);
      std::iota(order, order + key.length(), 0);
      std::stable_sort(order, order + key.length(),
                       [&](std::int64_t i, std::int64_t j) { return likeness[index(i)] < likeness[index(j)]; });
    }
  }

  /// Attention within clusters. `lse` has to be given, for the gradient.
  void attend(view<const T> query, view<const T> key, view<const T> value, const cca::results<T>& to) const {
    const rows<T> q = sorted(query), k = sorted(key), v = sorted(value);
    rows<T> out(query.heads(), query.length(), value.dim()), lse(query.heads(), query.length(), 1);
    kernels::attention<T>({packed(q), packed(k), packed(v)}, {packed(out), packed_numbers(lse)}, both_ways);
    restore(out, to.out), restore(lse, as_rows(to.lse));
  }

  /// Its gradients, written whole.
  void gradient(view<const T> query, view<const T> key, view<const T> value, const cca::results<T>& of,
                view<const T> grad_out, view<T> grad_query, view<T> grad_key, view<T> grad_value) const {
    const rows<T> q = sorted(query), k = sorted(key), v = sorted(value), out = sorted(of.out),
                  lse = sorted(as_rows(of.lse)), d_out = sorted(grad_out);
    rows<T> dq = q, dk = k, dv = v;
    kernels::attention_gradient<T>({packed(q), packed(k), packed(v)}, {packed(out), packed_numbers(lse)},
                                   {packed(d_out)}, {packed(dq), packed(dk), packed(dv)}, both_ways);
    restore(dq, grad_query), restore(dk, grad_key), restore(dv, grad_value);
  }

 private:
  static constexpr cca::options both_ways{.lookahead = cca::unlimited};

  static std::vector<double> likeness_to_mean(view<const T> key, std::int64_t h) {
    std::vector<double> mean(index(key.dim())), likeness;
    for (std::int64_t j = 0; j < key.length(); ++j)
      for (std::int64_t d = 0; d < key.dim(); ++d) mean[index(d)] += static_cast<double>(key.row(0, h, j)[d]);
    for (std::int64_t j = 0; j < key.length(); ++j) {
      double product = 0, square = 0;  // the mean's own length is the same for all
      for (std::int64_t d = 0; d < key.dim(); ++d) {
        const auto k = static_cast<double>(key.row(0, h, j)[d]);
        product += k * mean[index(d)], square += k * k;
      }
      likeness.push_back(product / std::max(std::sqrt(square), 1e-12));
    }
    return likeness;
  }

  /// @{
  /// Rows in the order of their head of keys, and back.
  rows<T> sorted(view<const T> x) const {
    rows<T> y(x.heads(), x.length(), x.dim());
    for (std::int64_t h = 0; h < y.heads; ++h)
      for (std::int64_t i = 0; i < y.length; ++i) std::copy_n(x.row(0, h, token(h, y.heads, i)), y.dim, y.row(h, i));
    return y;
  }
  void restore(const rows<T>& y, view<T> x) const {
    for (std::int64_t h = 0; h < y.heads; ++h)
      for (std::int64_t i = 0; i < y.length; ++i) std::copy_n(y.row(h, i), y.dim, x.row(0, h, token(h, y.heads, i)));
  }
  std::int64_t token(std::int64_t h, std::int64_t heads, std::int64_t i) const {
    return *order_.row(h / (heads / order_.heads), i);
  }
  static view<T> as_rows(cca::lse_view<T> x) {
    return {x.data, {1, x.heads(), x.length(), 1}, {0, x.stride[1], x.stride[2], 1}};
  }
  /// @}

  /// @{
  /// Sorted rows as sequences, one for each cluster.
  template <class Rows>
  auto packed(Rows& x) const {
    auto clusters = cca::packed(x.data.data(), offsets_, x.heads, x.dim);
    clusters.stride = x.view().stride;
    clusters.stride[0] = 0;
    return clusters;
  }
  template <class Rows>
  auto packed_numbers(Rows& x) const {
    return cca::packed(x.data.data(), offsets_, x.heads);
  }
  /// @}

  std::vector<std::int64_t> offsets_;
  rows<std::int64_t> order_;  ///< `[key/value heads][tokens]`
};

}  // namespace policies
