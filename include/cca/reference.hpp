#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "call.hpp"
#include "element.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

/// The textbook: attention and its gradients as their formulas read, one query after the other, O(length^2). In double it
/// is the oracle of the tests; in float it is what the error of the kernels is measured against. It checks nothing and
/// hides nothing: shapes and options are those of the entry points of the same name, which do the validation.
namespace cca { inline namespace CCA_TARGET { namespace reference {

/// A tensor that owns its elements, `[batch][heads][length][dim]` in memory.
template <class Scalar>
struct tensor {
  std::array<std::int64_t, 4> extent{};  ///< `[batch, heads, length, dim]`
  std::vector<Scalar> data;              ///< in this order

  /// @{
  /// Of zeros.
  tensor() = default;
  tensor(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d)
      : extent{b, h, s, d}, data(static_cast<std::size_t>(b * h * s * d)) {}
  explicit tensor(const std::array<std::int64_t, 4>& e) : tensor(e[0], e[1], e[2], e[3]) {}
  /// @}

  /// @{
  /// All of it.
  [[nodiscard]] auto view() { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  [[nodiscard]] auto view() const { return bhsd(data.data(), extent[0], extent[1], extent[2], extent[3]); }
  /// @}
};

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
template <class Scalar, class T>
matrix<Scalar> head(tensor_view<T> view, std::int64_t b, std::int64_t h) {
  matrix<Scalar> rows(view.length(), view.dim());
  for (std::int64_t i = 0; i < view.length(); ++i)
    for (std::int64_t d = 0; d < view.dim(); ++d) rows(i, d) = static_cast<Scalar>(view.row(b, h, i)[d]);
  return rows;
}

/// One head of a tensor that is added to, `[length, dim]`.
template <class Scalar>
Eigen::Map<matrix<Scalar>> head(tensor<Scalar>& tensor, std::int64_t b, std::int64_t h) {
  return {tensor.view().row(b, h, 0), tensor.extent[2], tensor.extent[3]};
}

/// The mean of the query heads that share the cores of head `h`.
template <class Scalar, class T>
matrix<Scalar> mean_query(tensor_view<T> query, std::int64_t b, std::int64_t h, std::int64_t sharing) {
  matrix<Scalar> mean = matrix<Scalar>::Zero(query.length(), query.dim());
  for (std::int64_t i = h * sharing; i < (h + 1) * sharing; ++i)
    mean += head<Scalar>(query, b, i) / static_cast<Scalar>(sharing);
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

/// Keys and values of the cores of every complete group. `core_k = sum_j w_j k_j` with
/// `w = softmax_j(pooling_scale * scale * q_last . k_j)`, and alike for the values; or the group's mean or maximum, or the
/// token of the largest weight.
template <class Scalar, class Query, class Key, class Value>
std::pair<tensor<Scalar>, tensor<Scalar>> pool(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                                               const options& options) {
  const partition partition{options.group_size, options.window};
  const auto scale = static_cast<Scalar>(detail::pooling_scale(options, key.dim()));
  const std::int64_t heads = detail::core_head_count(options, query.heads(), key.heads());
  const std::int64_t groups = partition.group_count(key.length()),
                     sharing = query.heads() / (std::max<std::int64_t>)(heads, 1);
  std::pair<tensor<Scalar>, tensor<Scalar>> cores{{key.batch(), heads, groups, key.dim()},
                                                  {key.batch(), heads, groups, value.dim()}};
  for (std::int64_t b = 0; b < key.batch(); ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t kv_head = h / (heads / key.heads());
      const matrix<Scalar> keys = head<Scalar>(key, b, kv_head), values = head<Scalar>(value, b, kv_head);
      const matrix<Scalar> queries = mean_query<Scalar>(query, b, h, sharing);
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
        if (options.pool == pooling::select) {
          const std::int64_t selected = selected_token(k, last, scale);
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

/// Scores of a query and keys: `x = scale q . k`, and with a softcap `cap tanh(x / cap)` in its place.
template <class Scalar, class Keys, class Row>
vector<Scalar> scores(const Keys& keys, const Row& query, const options& options) {
  const vector<Scalar> x = static_cast<Scalar>(cca::detail::softmax_scale(options, keys.cols())) * (keys * query);
  const auto cap = static_cast<Scalar>(options.softcap);
  return cap > 0 ? vector<Scalar>(cap * (x / cap).array().tanh()) : x;
}

/// The sink logit of query `i`; where there is none, that of no weight.
template <class Scalar, class Sink>
Scalar sink_logit(const lse_view<Sink>& sinks, std::int64_t b, std::int64_t h, std::int64_t i) {
  if (sinks.data == nullptr) return -std::numeric_limits<Scalar>::infinity();
  return static_cast<Scalar>(*sinks.row(b % sinks.batch(), h, i % sinks.length()));
}

/// Attention of every query to the far rows `[0, seen(b, h, i))` and the tokens `raw(i)`, in one softmax.
template <class Scalar, class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class Seen,
          class Raw>
result<Scalar> attend(const inputs<Query, Key, Value, Sink>& in, tensor_view<FarKey> far_key,
                      tensor_view<FarValue> far_value, const options& options, const Seen& seen, const Raw& raw) {
  const auto& query = in.query;
  const std::int64_t value_dim = in.value.dim();
  result<Scalar> result{{query.batch(), query.heads(), query.length(), value_dim},
                        {query.batch(), query.heads(), query.length(), 1}};
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const std::int64_t kv_head = h / (query.heads() / in.key.heads()),
                         far_head = h / (query.heads() / far_key.heads());
      const matrix<Scalar> q = head<Scalar>(query, b, h);
      const matrix<Scalar> k = head<Scalar>(in.key, b, kv_head), v = head<Scalar>(in.value, b, kv_head);
      const matrix<Scalar> fk = head<Scalar>(far_key, b, far_head), fv = head<Scalar>(far_value, b, far_head);
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const std::int64_t pooled = seen(b, h, i);
        const range window = raw(i);
        const vector<Scalar> row = q.row(i);
        vector<Scalar> weights(pooled + window.size());
        weights << scores<Scalar>(fk.topRows(pooled), row, options),
            scores<Scalar>(k.middleRows(window.begin, window.size()), row, options);
        *result.lse.view().row(b, h, i) = softmax(weights, sink_logit<Scalar>(in.sink_logits, b, h, i));
        Eigen::Map<vector<Scalar>>(result.out.view().row(b, h, i), value_dim) =
            fv.topRows(pooled).transpose() * weights.head(pooled) +
            v.middleRows(window.begin, window.size()).transpose() * weights.tail(window.size());
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

/// The raw part of attention alone: the window, or with the default options every token up to the query's own.
template <class Scalar, class Query, class Key, class Value, class Sink>
result<Scalar> local_attention(const inputs<Query, Key, Value, Sink>& in, const options& options) {
  return attend<Scalar>(
      in, in.key, in.value, options, [](std::int64_t, std::int64_t, std::int64_t) { return std::int64_t{0}; },
      detail::raw_tokens(in.query, in.key, options));
}

/// `cca::attention`: cores, where something is pooled, then raw tokens.
template <class Scalar, class Query, class Key, class Value, class Sink>
result<Scalar> attention(const inputs<Query, Key, Value, Sink>& in, const options& options) {
  if (!cca::detail::pools(options)) return local_attention<Scalar>(in, options);
  const auto cores = pool<Scalar>(in.query, in.key, in.value, options);
  return attend<Scalar>(
      in, cores.first.view(), cores.second.view(), options,
      [&](std::int64_t, std::int64_t, std::int64_t t) {
        return partition{options.group_size, options.window}.core_count(t);
      },
      detail::raw_tokens(in.query, in.key, options));
}

/// `cca::attend`: the caller's far rows, then raw tokens.
template <class Scalar, class Query, class Key, class Value, class Sink, class FarKey, class FarValue>
result<Scalar> attend(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue>& context,
                      const options& options) {
  return attend<Scalar>(
      in, context.key, context.value, options,
      [&](std::int64_t b, std::int64_t h, std::int64_t i) { return *context.seen.row(b, h, i); },
      detail::raw_tokens(in.query, in.key, options));
}

}}}  // namespace cca::CCA_TARGET::reference
