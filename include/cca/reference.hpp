#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

/// The textbook: attention as its formulas read, one query after the other, O(length^2). In double it is the oracle of
/// the tests; in float it is what the error of the kernels is measured against. It checks nothing and hides nothing:
/// shapes and options are those of the entry points of the same name, which do the validation.
namespace cca::inline CCA_TARGET::reference {

/// A tensor that owns its elements, `[batch][heads][length][dim]` in memory.
template <class Scalar>
struct tensor {
  std::array<std::int64_t, 4> extent{};
  std::vector<Scalar> data;

  tensor() = default;
  tensor(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d)
      : extent{b, h, s, d}, data(static_cast<std::size_t>(b * h * s * d)) {}

  [[nodiscard]] auto view() { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  [[nodiscard]] auto view() const { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
};

template <class Scalar>
struct result {
  tensor<Scalar> out;  // [batch, query heads, length, value dim]
  tensor<Scalar> lse;  // [batch, query heads, length, 1]
};

template <class Scalar>
using matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

/// One head of a view, `[length, dim]`.
template <class Scalar, class T>
matrix<Scalar> head(tensor_view<T> view, std::int64_t b, std::int64_t h) {
  matrix<Scalar> rows(view.length(), view.dim());
  for (std::int64_t i = 0; i < view.length(); ++i)
    for (std::int64_t d = 0; d < view.dim(); ++d) rows(i, d) = static_cast<Scalar>(view.row(b, h, i)[d]);
  return rows;
}

/// Weights and log-sum-exp of a row of scores. No score: no weight, -inf.
template <class Scalar>
Scalar softmax(vector<Scalar>& scores) {
  if (scores.size() == 0) return -std::numeric_limits<Scalar>::infinity();
  const Scalar maximum = scores.maxCoeff();
  scores = (scores.array() - maximum).exp();
  const Scalar sum = scores.sum();
  scores /= sum;
  return maximum + std::log(sum);
}

/// Cores of every complete group: `core_k = sum_j w_j k_j` with `w = softmax_j(scale * q_last . k_j)`, and alike for the
/// values; or the group's mean or maximum.
template <class Scalar, class Query, class Key, class Value>
std::pair<tensor<Scalar>, tensor<Scalar>> pool(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                                               const options& options) {
  const partition partition{options.group_size, options.window};
  const auto scale = static_cast<Scalar>(detail::softmax_scale(options, key.dim()));
  const std::int64_t heads = detail::core_head_count(options, query.heads(), key.heads());
  const std::int64_t groups = partition.group_count(key.length()),
                     sharing = query.heads() / std::max<std::int64_t>(heads, 1);
  std::pair<tensor<Scalar>, tensor<Scalar>> cores{{key.batch(), heads, groups, key.dim()},
                                                  {key.batch(), heads, groups, value.dim()}};
  for (std::int64_t b = 0; b < key.batch(); ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t kv_head = h / (heads / key.heads());
      const matrix<Scalar> keys = head<Scalar>(key, b, kv_head), values = head<Scalar>(value, b, kv_head);
      matrix<Scalar> queries =
          matrix<Scalar>::Zero(query.length(), query.dim());  // the mean of those that share the cores
      for (std::int64_t i = h * sharing; i < (h + 1) * sharing; ++i)
        queries += head<Scalar>(query, b, i) / static_cast<Scalar>(sharing);
      for (std::int64_t c = 0; c < groups; ++c) {
        const range group = partition.group(c);
        const auto k = keys.middleRows(group.begin, group.size()), v = values.middleRows(group.begin, group.size());
        Eigen::Map<vector<Scalar>> core_key(cores.first.view().row(b, h, c), key.dim());
        Eigen::Map<vector<Scalar>> core_value(cores.second.view().row(b, h, c), value.dim());
        if (options.pool == pooling::max) {
          for (std::int64_t d = 0; d < key.dim(); ++d) core_key(d) = k.col(d).template maxCoeff<Eigen::PropagateNaN>();
          for (std::int64_t d = 0; d < value.dim(); ++d)
            core_value(d) = v.col(d).template maxCoeff<Eigen::PropagateNaN>();
          continue;
        }
        vector<Scalar> weights = vector<Scalar>::Constant(group.size(), Scalar(1) / static_cast<Scalar>(group.size()));
        if (options.pool == pooling::last_query) {
          weights = scale * (k * queries.row(group.end - 1).transpose());
          softmax(weights);
        }
        core_key = k.transpose() * weights;
        core_value = v.transpose() * weights;
      }
    }
  return cores;
}

/// Attention of every query to the far rows `[0, seen(b, h, i))` and the tokens `raw(i)`, in one softmax.
template <class Scalar, class Query, class Key, class Value, class FarKey, class FarValue, class Seen, class Raw>
result<Scalar> attend(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                      tensor_view<FarKey> far_key, tensor_view<FarValue> far_value, const options& options,
                      const Seen& seen, const Raw& raw) {
  const auto scale = static_cast<Scalar>(detail::softmax_scale(options, key.dim()));
  result<Scalar> result{{query.batch(), query.heads(), query.length(), value.dim()},
                        {query.batch(), query.heads(), query.length(), 1}};
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const std::int64_t kv_head = h / (query.heads() / key.heads()), far_head = h / (query.heads() / far_key.heads());
      const matrix<Scalar> q = head<Scalar>(query, b, h);
      const matrix<Scalar> k = head<Scalar>(key, b, kv_head), v = head<Scalar>(value, b, kv_head);
      const matrix<Scalar> fk = head<Scalar>(far_key, b, far_head), fv = head<Scalar>(far_value, b, far_head);
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const std::int64_t far = seen(b, h, i);
        const range near = raw(i);
        vector<Scalar> weights(far + near.size());
        weights.head(far) = scale * (fk.topRows(far) * q.row(i).transpose());
        weights.tail(near.size()) = scale * (k.middleRows(near.begin, near.size()) * q.row(i).transpose());
        *result.lse.view().row(b, h, i) = softmax(weights);
        Eigen::Map<vector<Scalar>>(result.out.view().row(b, h, i), value.dim()) =
            fv.topRows(far).transpose() * weights.head(far) +
            v.middleRows(near.begin, near.size()).transpose() * weights.tail(near.size());
      }
    }
  return result;
}

namespace detail {

template <class Query, class Key>
auto raw_tokens(const tensor_view<Query>& query, const tensor_view<Key>& key, const options& options) {
  const std::int64_t first = cca::detail::first_position(options, query.length(), key.length());
  return [partition = partition{options.group_size, options.window}, first, length = key.length()](std::int64_t i) {
    const range raw = intersection(partition.raw(first + i), {0, length});
    return raw.empty() ? range{} : raw;
  };
}

}  // namespace detail

/// `cca::attention`: cores, then raw tokens.
template <class Scalar, class Query, class Key, class Value>
result<Scalar> attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                         const options& options) {
  const partition partition{options.group_size, options.window};
  const auto cores = pool<Scalar>(query, key, value, options);
  return attend<Scalar>(
      query, key, value, cores.first.view(), cores.second.view(), options,
      [&](std::int64_t, std::int64_t, std::int64_t t) { return partition.core_count(t); },
      detail::raw_tokens(query, key, options));
}

/// `cca::local_attention`, and with the default options `cca::dense_attention`: raw tokens alone.
template <class Scalar, class Query, class Key, class Value>
result<Scalar> local_attention(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                               const options& options) {
  return attend<Scalar>(
      query, key, value, key, value, options, [](std::int64_t, std::int64_t, std::int64_t) { return std::int64_t{0}; },
      detail::raw_tokens(query, key, options));
}

/// `cca::attend`: the caller's far rows, then raw tokens.
template <class Scalar, class Query, class Key, class Value, class FarKey, class FarValue>
result<Scalar> attend(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                      const far<FarKey, FarValue>& far, const options& options) {
  return attend<Scalar>(
      query, key, value, far.key, far.value, options,
      [&](std::int64_t b, std::int64_t h, std::int64_t i) { return *far.seen.row(b, h, i); },
      detail::raw_tokens(query, key, options));
}

}  // namespace cca::inline CCA_TARGET::reference
