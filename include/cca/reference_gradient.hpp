#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>

#include "call.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "reference.hpp"
#include "tensor_view.hpp"

/// The textbook of the gradients.
namespace cca { inline namespace CCA_TARGET { namespace reference {

/// Of the operands of the same names; those of operands that the caller does not have are empty.
template <class Scalar>
struct gradient {
  /// @{
  /// Of the operand's extents.
  tensor<Scalar> query, key, value, far_key, far_value, sink_logits{}, alibi_slopes{}, key_bias{}, far_bias{};
  /// @}
};

namespace detail {

/// The gradient of the maximum of each column goes to the first token that has it; a NaN counts as the maximum.
template <class Rows, class Core, class Gradient>
void add_max_gradient(const Rows& rows, const Core& grad_core, Gradient&& grad) {
  for (std::int64_t d = 0; d < rows.cols(); ++d) {
    std::int64_t first = 0;
    for (std::int64_t j = 1; j < rows.rows(); ++j)
      if (!(rows(j, d) <= rows(first, d)) && !std::isnan(rows(first, d))) first = j;
    grad(first, d) += grad_core(d);
  }
}

/// The gradients `f(b)` of each sequence, added up in tensors of these extents.
template <class Scalar, class F>
gradient<Scalar> each_alone(gradient<Scalar> sum, std::int64_t batch, const F& f) {
  using all = gradient<Scalar>;
  for (std::int64_t b = 0; b < batch; ++b) {
    const gradient<Scalar> one = f(b);
    for (const auto part : {&all::query, &all::key, &all::value, &all::far_key, &all::far_value, &all::sink_logits,
                            &all::alibi_slopes, &all::key_bias, &all::far_bias})
      if (!(sum.*part).data.empty()) add_sequence(one.*part, b, sum.*part);
  }
  return sum;
}

/// Zeros of the extents of numbers that may be given.
template <class Scalar>
tensor<Scalar> zeros_of_numbers(const lse_view<const Scalar>& numbers) {
  const auto& [batch, heads, length] = numbers.extent;
  return {batch, heads, length, 1};
}

/// Zeros of the extents of inputs.
template <class Scalar>
gradient<Scalar> zeros_of(const operands<Scalar>& in) {
  gradient<Scalar> zeros{tensor<Scalar>(in.query.extent), tensor<Scalar>(in.key.extent), tensor<Scalar>(in.value.extent),
                         {}, {}};
  zeros.sink_logits = zeros_of_numbers(in.sink_logits);
  zeros.alibi_slopes = zeros_of_numbers(in.alibi_slopes);
  zeros.key_bias = zeros_of_numbers(in.key_bias);
  return zeros;
}

/// Adds to the biases of the rows `rows` of query head `h` of `heads`, if there are any.
template <class Scalar, class Gradient>
void add_to_biases(tensor<Scalar>& grad, std::int64_t heads, std::int64_t b, std::int64_t h,
                   const row_numbers& rows, const Gradient& ds) {
  if (grad.data.empty()) return;
  for (std::int64_t i = 0; i < rows.size(); ++i)
    *grad.view().row(b % grad.extent[0], h / (heads / grad.extent[1]), rows(i)) += ds(i);
}

/// The gradient of a selected token; where none is, the core is NaN and so are all gradients.
template <class Core, class Gradient>
void add_selected_gradient(std::int64_t selected, const Core& grad_core, Gradient&& grad) {
  if (selected >= 0)
    grad.row(selected) += grad_core;
  else
    grad.setConstant(std::numeric_limits<typename Core::Scalar>::quiet_NaN());
}

}  // namespace detail

/// Of `pool`, and of `core_biases` where `grad_core_bias` has data, for the gradients of the first `grad_core_key.length()`
/// cores. With `dc_k`, `dc_v` those of a core:
/// `dw_j = dc_k . k_j + dc_v . v_j`, `dl_j = w_j (dw_j - sum_i w_i dw_i)`; `dk_j = w_j dc_k + scale dl_j q_last`,
/// `dv_j = w_j dc_v`, `dq_last = scale sum_j dl_j k_j`, shared by the query heads whose mean `q_last` is. With `db` that of
/// a bias, the entropy of the weights, `dl_j -= db w_j (l_j - sum_i w_i l_i)`. Of a selected token `dk = dc_k`, `dv = dc_v`.
template <class Scalar>
gradient<Scalar> pool_gradient(const operands<Scalar>& in, tensor_view<const Scalar> grad_core_key,
                               tensor_view<const Scalar> grad_core_value, const options& options,
                               const lse_view<const Scalar>& grad_core_bias = {}) {
  const auto &query = in.query, &key = in.key, &value = in.value;
  const partition partition = partition_of(options);
  const auto scale = static_cast<Scalar>(cca::detail::pooling_scale(options, key.dim()));
  const std::int64_t heads = grad_core_key.heads(), sharing = query.heads() / (std::max<std::int64_t>)(heads, 1);
  gradient<Scalar> grad{tensor<Scalar>(query.extent), tensor<Scalar>(key.extent), tensor<Scalar>(value.extent), {}, {}};
  if (detail::have_lengths(query, key, value))
    return detail::each_alone(grad, key.batch(), [&](std::int64_t b) {
      return pool_gradient(detail::sequence_of(in, b), grad_core_key.sequence(b), grad_core_value.sequence(b), options);
    });
  for (std::int64_t b = 0; b < key.batch(); ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t kv_head = h / (heads / key.heads());
      const matrix<Scalar> queries = mean_query(query, b, h, sharing);
      const matrix<Scalar> keys = head(key, b, kv_head), values = head(value, b, kv_head);
      const matrix<Scalar> core_keys = head(grad_core_key, b, h),
                           core_values = head(grad_core_value, b, h);
      for (std::int64_t c = 0; c < grad_core_key.length(); ++c) {
        const range group = partition.group(c);
        const auto k = keys.middleRows(group.begin, group.size()), v = values.middleRows(group.begin, group.size());
        const vector<Scalar> dc_k = core_keys.row(c), dc_v = core_values.row(c);
        auto grad_key = head(grad.key, b, kv_head), grad_value = head(grad.value, b, kv_head);
        auto dk = grad_key.middleRows(group.begin, group.size()), dv = grad_value.middleRows(group.begin, group.size());
        if (options.pool == pooling::max) {
          detail::add_max_gradient(k, dc_k, dk);
          detail::add_max_gradient(v, dc_v, dv);
          continue;
        }
        const vector<Scalar> last = queries.row(group.end - 1);
        if (options.pool == pooling::select || options.pool == pooling::select_by_mass) {
          const std::int64_t selected =
              options.pool == pooling::select
                  ? selected_token(k, last, scale)
                  : heaviest_token(masses(sharing_queries(query, b, h, sharing), keys, c, options));
          detail::add_selected_gradient(selected, dc_k, dk);
          detail::add_selected_gradient(selected, dc_v, dv);
          continue;
        }
        vector<Scalar> weights = vector<Scalar>::Constant(group.size(), Scalar(1) / static_cast<Scalar>(group.size()));
        if (options.pool == pooling::last_query) {
          weights = pooling_weights(k, last, scale);
          const vector<Scalar> dw = k * dc_k + v * dc_v;
          vector<Scalar> dl = weights.cwiseProduct((dw.array() - weights.dot(dw)).matrix());
          if (grad_core_bias.data != nullptr) {
            const vector<Scalar> l = scale * (k * last);
            dl -= *grad_core_bias.row(b, h, c) * weights.cwiseProduct((l.array() - weights.dot(l)).matrix());
          }
          dk += scale * dl * last.transpose();
          for (std::int64_t i = h * sharing; i < (h + 1) * sharing; ++i)
            head(grad.query, b, i).row(group.end - 1) += scale * dl.transpose() * k / static_cast<Scalar>(sharing);
        }
        dk += weights * dc_k.transpose();
        dv += weights * dc_v.transpose();
      }
    }
  return grad;
}
template <class Scalar, class Query, class Key, class Value, class CoreKey, class CoreValue>
gradient<Scalar> pool_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                               tensor_view<CoreKey> grad_core_key, tensor_view<CoreValue> grad_core_value,
                               const options& options) {
  converter<Scalar> numbers;
  return pool_gradient<Scalar>(operands<Scalar>{numbers(query), numbers(key), numbers(value)}, numbers(grad_core_key),
                               numbers(grad_core_value), options);
}

/// Of `attend`: with `dO` and `dlse` the gradients of the output and of the log-sum-exp, `P = exp(S - lse)`,
/// `dV = P^T dO`, `dP = dO V^T`, `delta = rowsum(P dP) - dlse`, `dS = P (dP - delta)`, with a softcap times
/// `1 - (X / cap)^2`; `dQ = scale dS K`, `dK = scale dS^T Q`. A sink logit: `-exp(sink - lse) delta`, of all queries that it
/// is for; a bias: `dS` before the softcap's factor, of all queries and heads that see it; a slope: minus that times
/// the distances, of all rows. No `grad_lse`: 0.
template <class Scalar>
gradient<Scalar> attend_gradient(const operands<Scalar>& in, tensor_view<const Scalar> far_key,
                                 tensor_view<const Scalar> far_value, const incoming_numbers<Scalar>& from,
                                 const options& options, const seen_rows_of& seen, const raw_tokens_of& raw,
                                 const row_terms<Scalar>& far_at = {},
                                 const std::array<std::int64_t, 3>& far_biases = {}) {
  const auto& query = in.query;
  const std::int64_t first = cca::detail::first_position(options, query.length(), in.key.length());
  const row_terms<Scalar> raw_at = raw_terms(in);
  const std::array<std::int64_t, 3>& sinks = in.sink_logits.extent;
  const auto numbers = [](const std::array<std::int64_t, 3>& e) { return tensor<Scalar>(e[0], e[1], e[2], 1); };
  const auto scale = static_cast<Scalar>(cca::detail::softmax_scale(options, query.dim()));
  const auto cap = static_cast<Scalar>(options.softcap);
  gradient<Scalar> grad{
      tensor<Scalar>(query.extent),    tensor<Scalar>(in.key.extent),    tensor<Scalar>(in.value.extent),
      tensor<Scalar>(far_key.extent),  tensor<Scalar>(far_value.extent), numbers(sinks),
      numbers(in.alibi_slopes.extent), numbers(in.key_bias.extent),      numbers(far_biases)};
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const std::int64_t kv_head = h / (query.heads() / in.key.heads()),
                         far_head = h / (query.heads() / far_key.heads());
      const matrix<Scalar> q = head(query, b, h), grad_rows = head(from.grad_out, b, h);
      const matrix<Scalar> k = head(in.key, b, kv_head), v = head(in.value, b, kv_head);
      const matrix<Scalar> fk = head(far_key, b, far_head), fv = head(far_value, b, far_head);
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const row_numbers tokens = raw(i), pooled_rows = seen(b, h, i);
        const std::int64_t pooled = pooled_rows.size();
        const matrix<Scalar> keys = seen_rows(fk, pooled_rows, k, tokens), values = seen_rows(fv, pooled_rows, v, tokens);
        const vector<Scalar> capped = scores(keys, vector<Scalar>(q.row(i)), options);
        vector<Scalar> logits = capped;
        shift(logits.head(pooled), in.alibi_slopes, far_at, b, h, first + i, pooled_rows);
        shift(logits.tail(tokens.size()), in.alibi_slopes, raw_at, b, h, first + i, tokens);
        const Scalar sink = sink_logit(in.sink_logits, b, h, i);
        vector<Scalar> weights = logits;
        const Scalar lse = softmax(weights, sink);
        if (lse == -std::numeric_limits<Scalar>::infinity()) continue;  // all are masked
        weights = (logits.array() - lse).exp();  // with the rounding of lse, which is what the forward pass leaves
        const vector<Scalar> dp = values * grad_rows.row(i).transpose();
        const Scalar delta =
            weights.dot(dp) - (from.grad_lse.data ? *from.grad_lse.row(b, h, i) : Scalar(0));
        vector<Scalar> ds = weights.cwiseProduct((dp.array() - delta).matrix());
        if (in.alibi_slopes.data)
          *grad.alibi_slopes.view().row(b % grad.alibi_slopes.extent[0], h, 0) -=
              ds.head(pooled).dot(distances(far_at, b, h, first + i, pooled_rows)) +
              ds.tail(tokens.size()).dot(distances(raw_at, b, h, first + i, tokens));
        detail::add_to_biases(grad.far_bias, query.heads(), b, h, pooled_rows, ds.head(pooled));
        detail::add_to_biases(grad.key_bias, query.heads(), b, h, tokens, ds.tail(tokens.size()));
        if (cap > 0) ds.array() *= 1 - (capped / cap).array().square();
        const matrix<Scalar> grad_keys = scale * ds * q.row(i), grad_values = weights * grad_rows.row(i);
        head(grad.query, b, h).row(i) = scale * ds.transpose() * keys;
        for (std::int64_t place = 0; place < pooled; ++place) {
          head(grad.far_key, b, far_head).row(pooled_rows(place)) += grad_keys.row(place);
          head(grad.far_value, b, far_head).row(pooled_rows(place)) += grad_values.row(place);
        }
        for (std::int64_t place = 0; place < tokens.size(); ++place) {
          head(grad.key, b, kv_head).row(tokens(place)) += grad_keys.row(pooled + place);
          head(grad.value, b, kv_head).row(tokens(place)) += grad_values.row(pooled + place);
        }
        if (in.sink_logits.data)
          *grad.sink_logits.view().row(b % sinks[0], h, i % sinks[2]) -= std::exp(sink - lse) * delta;
      }
    }
  return grad;
}

/// Of the raw part of attention.
template <class Scalar>
gradient<Scalar> local_attention_gradient(const operands<Scalar>& in, const incoming_numbers<Scalar>& from,
                                          const options& options) {
  if (detail::have_lengths(in.query, in.key))
    return detail::each_alone(detail::zeros_of(in), in.query.batch(), [&](std::int64_t b) {
      return local_attention_gradient(detail::sequence_of(in, b), detail::sequence_of(from, b), options);
    });
  gradient<Scalar> grad = attend_gradient(in, in.key, in.value, from, options, none_seen,
                                          raw_tokens(options, in.query.length(), in.key.length()));
  grad.far_key = grad.far_value = {};
  return grad;
}
template <class Scalar, class Query, class Key, class Value, class Sink, class GradOut, class GradLse>
gradient<Scalar> local_attention_gradient(const inputs<Query, Key, Value, Sink>& in,
                                          const incoming<GradOut, GradLse>& from, const options& options) {
  converter<Scalar> numbers;
  return local_attention_gradient(numbers(in), numbers(from), options);
}

/// Of `attention`: that of attending to the cores and the raw tokens, and through the cores that of pooling.
template <class Scalar>
gradient<Scalar> attention_gradient(const operands<Scalar>& in, const incoming_numbers<Scalar>& from,
                                    const options& options) {
  if (!cca::detail::pools(options)) return local_attention_gradient(in, from, options);
  if (detail::have_lengths(in.query, in.key))
    return detail::each_alone(detail::zeros_of(in), in.query.batch(), [&](std::int64_t b) {
      return attention_gradient(detail::sequence_of(in, b), detail::sequence_of(from, b), options);
    });
  const partition partition = partition_of(options);
  const auto cores = pool(in, options);
  const tensor<Scalar> biases = core_biases(in, options);
  gradient<Scalar> grad = attend_gradient(
      in, cores.first.view(), cores.second.view(), from, options,
      [&](std::int64_t, std::int64_t, std::int64_t t) { return first_rows(partition.core_count(t)); },
      raw_tokens(options, in.query.length(), in.key.length()), core_terms(options, biases, in.query.heads()),
      {biases.extent[0], biases.extent[1], biases.extent[2]});
  auto grad_core_key = grad.far_key.view(), grad_core_value = grad.far_value.view();
  grad_core_key.extent[2] = grad_core_value.extent[2] = partition.core_count(in.key.length() - 1);  // those seen
  const gradient<Scalar> pooled = pool_gradient<Scalar>(
      in, grad_core_key, grad_core_value, options,
      bhs(std::as_const(grad.far_bias).data.data(), biases.extent[0], biases.extent[1], biases.extent[2]));
  for (const auto part : {&gradient<Scalar>::query, &gradient<Scalar>::key, &gradient<Scalar>::value})
    std::transform((pooled.*part).data.begin(), (pooled.*part).data.end(), (grad.*part).data.begin(),
                   (grad.*part).data.begin(), std::plus<Scalar>());
  grad.far_key = grad.far_value = grad.far_bias = {};
  return grad;
}
template <class Scalar, class Query, class Key, class Value, class Sink, class GradOut, class GradLse>
gradient<Scalar> attention_gradient(const inputs<Query, Key, Value, Sink>& in, const incoming<GradOut, GradLse>& from,
                                    const options& options) {
  converter<Scalar> numbers;
  return attention_gradient(numbers(in), numbers(from), options);
}

/// Of `attend` to the caller's far rows.
template <class Scalar>
gradient<Scalar> attend_gradient(const operands<Scalar>& in, const far_operands<Scalar>& context,
                                 const incoming_numbers<Scalar>& from, const options& options) {
  if (detail::have_lengths(in.query, in.key, context.key)) {
    gradient<Scalar> zeros = detail::zeros_of(in);
    zeros.far_key = tensor<Scalar>(context.key.extent);
    zeros.far_value = tensor<Scalar>(context.value.extent);
    zeros.far_bias = detail::zeros_of_numbers(context.bias);
    return detail::each_alone(zeros, in.query.batch(), [&](std::int64_t b) {
      return attend_gradient(detail::sequence_of(in, b), detail::sequence_of(context, b), detail::sequence_of(from, b),
                             options);
    });
  }
  return attend_gradient(
      in, context.key, context.value, from, options,
      far_rows(in, context, options), raw_tokens(options, in.query.length(), in.key.length()), far_terms(context, in.query.heads()),
      context.bias.extent);
}
template <class Scalar, class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class Bias,
          class GradOut, class GradLse>
gradient<Scalar> attend_gradient(const inputs<Query, Key, Value, Sink>& in,
                                 const far_context<FarKey, FarValue, Bias>& context,
                                 const incoming<GradOut, GradLse>& from, const options& options) {
  converter<Scalar> numbers;
  return attend_gradient(numbers(in), numbers(context), numbers(from), options);
}

}}}  // namespace cca::CCA_TARGET::reference
