#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "call.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "reference_operands.hpp"
#include "tensor_view.hpp"

// The words of the textbook, and how groups become cores: see reference.hpp.

namespace cca { inline namespace CCA_TARGET { namespace reference {

/// What attention computes.
template <class Scalar>
struct result {
  tensor<Scalar> out;  ///< `[batch, query heads, length, value dim]`
  tensor<Scalar> lse;  ///< `[batch, query heads, length, 1]`
};

/// One row per token.
template <class Scalar>
using matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// One token, or one number per token.
template <class Scalar>
using vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

/// One head of a view, `[length, dim]`.
template <class Scalar>
matrix<Scalar> head(tensor_view<const Scalar> view, std::int64_t b, std::int64_t h) {
  matrix<Scalar> rows(view.length(), view.dim());
  for (std::int64_t i = 0; i < view.length(); ++i) {
    const Scalar* const row = view.row(b, h, i);
    for (std::int64_t d = 0; d < view.dim(); ++d) rows(i, d) = row[d];
  }
  return rows;
}

/// One head of a tensor that is added to, `[length, dim]`.
template <class Scalar>
Eigen::Map<matrix<Scalar>> head(tensor<Scalar>& tensor, std::int64_t b, std::int64_t h) {
  return {tensor.view().row(b, h, 0), tensor.extent[2], tensor.extent[3]};
}

/// The mean of the query heads that share the cores of head `h`.
template <class Scalar>
matrix<Scalar> mean_query(tensor_view<const Scalar> query, std::int64_t b, std::int64_t h, std::int64_t sharing) {
  matrix<Scalar> mean = matrix<Scalar>::Zero(query.length(), query.dim());
  for (std::int64_t i = h * sharing; i < (h + 1) * sharing; ++i)
    mean += head(query, b, i) / static_cast<Scalar>(sharing);
  return mean;
}

/// Weights and log-sum-exp of a row of scores, of which one more, the sink, takes part in the sum alone. A score of -inf is
/// masked: its weight is 0. No score but such, and no sink: no weight, -inf.
template <class Scalar>
Scalar softmax(vector<Scalar>& scores, Scalar sink = -std::numeric_limits<Scalar>::infinity()) {
  constexpr Scalar none = -std::numeric_limits<Scalar>::infinity();
  const Scalar maximum = scores.size() == 0 ? sink : (std::max)(scores.template maxCoeff<Eigen::PropagateNaN>(), sink);
  if (maximum == none) {
    scores.setZero();
    return none;
  }
  scores = (scores.array() - maximum).exp();
  const Scalar sum = scores.sum() + std::exp(sink - maximum);
  scores /= sum;
  return maximum + std::log(sum);
}

/// Weights of a group that is pooled with the query of its last token. A core stands for its group whatever the weights, so
/// where every score is -inf it is NaN.
template <class Scalar, class Keys, class Query>
vector<Scalar> pooling_weights(const Keys& keys, const Query& last, Scalar scale) {
  vector<Scalar> weights = scale * (keys * last);
  if (softmax(weights) == -std::numeric_limits<Scalar>::infinity())
    weights.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
  return weights;
}

namespace detail {

/// The results of `f(b)` of each sequence.
template <class Scalar, class F>
result<Scalar> each_alone(const tensor_view<const Scalar>& query, std::int64_t value_dim, const F& f) {
  result<Scalar> all{{query.batch(), query.heads(), query.length(), value_dim},
                     {query.batch(), query.heads(), query.length(), 1}};
  for (std::int64_t b = 0; b < query.batch(); ++b) {
    const result<Scalar> one = f(b);
    add_sequence(one.out, b, all.out);
    add_sequence(one.lse, b, all.lse);
  }
  return all;
}

}  // namespace detail

/// The token of a group with the largest score, the first of equals; -1 where a score is NaN, or all are -inf.
template <class Scalar, class Keys, class Query>
std::int64_t selected_token(const Keys& keys, const Query& last, Scalar scale) {
  Scalar largest = -std::numeric_limits<Scalar>::infinity();
  std::int64_t selected = -1;
  for (std::int64_t j = 0; j < keys.rows(); ++j) {
    const Scalar score = scale * keys.row(j).dot(last);
    if (std::isnan(score)) return -1;
    if (score > largest) largest = score, selected = j;
  }
  return selected;
}

/// What the observers among the queries of some heads, `[length, dim]` each, give to the tokens of group `c`: the sum of
/// their weights, each a softmax over the tokens that the query sees raw. The observers of a group are the queries that
/// see all of it raw and whose position `max(1, window / 32)` divides.
template <class Scalar>
vector<Scalar> masses(const std::vector<matrix<Scalar>>& queries, const matrix<Scalar>& keys, std::int64_t c,
                      const options& options) {
  const partition partition = partition_of(options);
  const auto scale = static_cast<Scalar>(cca::detail::softmax_scale(options, keys.cols()));
  const std::int64_t stride = (std::max<std::int64_t>)(options.window / 32, 1), length = keys.rows();
  const range group = partition.group(c);
  vector<Scalar> all = vector<Scalar>::Zero(group.size());
  for (const matrix<Scalar>& q : queries)
    for (std::int64_t t = group.end - 1; t < (std::min)(group.end - 1 + options.window, length); ++t) {
      if (t % stride != 0) continue;
      const range sinks = partition.sinks(t), raw = partition.raw(t);
      vector<Scalar> weights(sinks.size() + raw.size());
      weights << scale * (keys.topRows(sinks.size()) * q.row(t).transpose()),
          scale * (keys.middleRows(raw.begin, raw.size()) * q.row(t).transpose());
      softmax(weights);
      all += weights.segment(sinks.size() + group.begin - raw.begin, group.size());
    }
  return all;
}

/// The token of the largest mass, the first of equals; -1 where one is NaN.
template <class Scalar>
std::int64_t heaviest_token(const vector<Scalar>& masses) {
  std::int64_t heaviest = 0;
  for (std::int64_t j = 0; j < masses.size(); ++j) {
    if (std::isnan(masses(j))) return -1;
    if (masses(j) > masses(heaviest)) heaviest = j;
  }
  return heaviest;
}

/// The queries of the heads that share the cores of head `h`.
template <class Scalar>
std::vector<matrix<Scalar>> sharing_queries(tensor_view<const Scalar> query, std::int64_t b, std::int64_t h,
                                            std::int64_t sharing) {
  std::vector<matrix<Scalar>> all;
  for (std::int64_t i = h * sharing; i < (h + 1) * sharing; ++i) all.push_back(head(query, b, i));
  return all;
}

/// Keys and values of the cores of every complete group. `core_k = sum_j w_j k_j` with
/// `w = softmax_j(pooling_scale * scale * q_last . k_j)`, and alike for the values; or the group's mean or maximum, or the
/// token of the largest weight, or of the largest mass.
template <class Scalar>
std::pair<tensor<Scalar>, tensor<Scalar>> pool(const operands<Scalar>& in, const options& options) {
  const auto &query = in.query, &key = in.key, &value = in.value;
  const partition partition = partition_of(options);
  const auto scale = static_cast<Scalar>(cca::detail::pooling_scale(options, key.dim()));
  const std::int64_t heads = cca::detail::core_head_count(options, query.heads(), key.heads());
  const std::int64_t groups = partition.group_count(key.length()),
                     sharing = query.heads() / (std::max<std::int64_t>)(heads, 1);
  std::pair<tensor<Scalar>, tensor<Scalar>> cores{{key.batch(), heads, groups, key.dim()},
                                                  {key.batch(), heads, groups, value.dim()}};
  if (detail::have_lengths(query, key, value)) {
    for (std::int64_t b = 0; b < key.batch(); ++b) {
      const auto one = pool(detail::sequence_of(in, b), options);
      detail::add_sequence(one.first, b, cores.first);
      detail::add_sequence(one.second, b, cores.second);
    }
    return cores;
  }
  for (std::int64_t b = 0; b < key.batch(); ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t kv_head = h / (heads / key.heads());
      const matrix<Scalar> keys = head(key, b, kv_head), values = head(value, b, kv_head);
      const matrix<Scalar> queries = mean_query(query, b, h, sharing);
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
        const vector<Scalar> last = queries.row(group.end - 1);
        if (options.pool == pooling::select || options.pool == pooling::select_by_mass) {
          const std::int64_t selected =
              options.pool == pooling::select
                  ? selected_token(k, last, scale)
                  : heaviest_token(masses(sharing_queries(query, b, h, sharing), keys, c, options));
          core_key.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
          core_value.setConstant(std::numeric_limits<Scalar>::quiet_NaN());
          if (selected >= 0) core_key = k.row(selected), core_value = v.row(selected);
          continue;
        }
        vector<Scalar> weights = vector<Scalar>::Constant(group.size(), Scalar(1) / static_cast<Scalar>(group.size()));
        if (options.pool == pooling::last_query) weights = pooling_weights(k, last, scale);
        core_key = k.transpose() * weights;
        core_value = v.transpose() * weights;
      }
    }
  return cores;
}
template <class Scalar, class Query, class Key, class Value>
auto pool(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, const options& options) {
  converter<Scalar> numbers;
  return pool(operands<Scalar>{numbers(query), numbers(key), numbers(value)}, options);
}

/// Biases of the cores of every complete group, `[batch, core heads, groups, 1]`: the entropy of the weights,
/// `-sum_j w_j log w_j`; nothing where the options ask for none.
template <class Scalar>
tensor<Scalar> core_biases(const operands<Scalar>& in, const options& options) {
  const auto &query = in.query, &key = in.key;
  if (options.core_bias == core_bias::none) return {};
  const partition partition = partition_of(options);
  const auto scale = static_cast<Scalar>(cca::detail::pooling_scale(options, key.dim()));
  const std::int64_t heads = cca::detail::core_head_count(options, query.heads(), key.heads());
  tensor<Scalar> biases(key.batch(), heads, partition.group_count(key.length()), 1);
  for (std::int64_t b = 0; b < key.batch(); ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const matrix<Scalar> keys = head(key, b, h / (heads / key.heads())),
                           queries = mean_query(query, b, h, query.heads() / heads);
      for (std::int64_t c = 0; c < biases.extent[2]; ++c) {
        const range group = partition.group(c);
        Scalar& bias = *biases.view().row(b, h, c);
        bias = std::log(static_cast<Scalar>(group.size()));  // of equal weights
        if (options.pool != pooling::last_query) continue;
        const vector<Scalar> weights =
            pooling_weights(keys.middleRows(group.begin, group.size()), queries.row(group.end - 1).transpose(), scale);
        bias = 0;
        for (const Scalar w : weights) bias -= w == 0 ? w : w * std::log(w);
      }
    }
  return biases;
}

}}}  // namespace cca::CCA_TARGET::reference
