#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "call.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "reference.hpp"
#include "tensor_view.hpp"

/// The textbook of the gradients.
namespace cca { inline namespace CCA_TARGET { namespace reference {

/// Of the operands of the same names; those of far rows and of sink logits are empty where the caller has none.
template <class Scalar>
struct gradient {
  /// @{
  /// Of the operand's extents.
  tensor<Scalar> query, key, value, far_key, far_value, sink_logits;
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

/// The gradient of a selected token; where none is, the core is NaN and so are all gradients.
template <class Core, class Gradient>
void add_selected_gradient(std::int64_t selected, const Core& grad_core, Gradient&& grad) {
  if (selected >= 0)
    grad.row(selected) += grad_core;
  else
    grad.setConstant(std::numeric_limits<typename Core::Scalar>::quiet_NaN());
}

}  // namespace detail

/// Of `pool`, for the gradients of the first `grad_core_key.length()` cores. With `dc_k`, `dc_v` those of a core:
/// `dw_j = dc_k . k_j + dc_v . v_j`, `dl_j = w_j (dw_j - sum_i w_i dw_i)`; `dk_j = w_j dc_k + scale dl_j q_last`,
/// `dv_j = w_j dc_v`, `dq_last = scale sum_j dl_j k_j`, shared by the query heads whose mean `q_last` is. Of a selected
/// token `dk = dc_k`, `dv = dc_v`.
template <class Scalar, class Query, class Key, class Value, class CoreKey, class CoreValue>
gradient<Scalar> pool_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                               tensor_view<CoreKey> grad_core_key, tensor_view<CoreValue> grad_core_value,
                               const options& options) {
  const partition partition{options.group_size, options.window};
  const auto scale = static_cast<Scalar>(cca::detail::pooling_scale(options, key.dim()));
  const std::int64_t heads = grad_core_key.heads(), sharing = query.heads() / (std::max<std::int64_t>)(heads, 1);
  gradient<Scalar> grad{
      tensor<Scalar>(query.extent), tensor<Scalar>(key.extent), tensor<Scalar>(value.extent), {}, {}, {}};
  for (std::int64_t b = 0; b < key.batch(); ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t kv_head = h / (heads / key.heads());
      const matrix<Scalar> queries = mean_query<Scalar>(query, b, h, sharing);
      const matrix<Scalar> keys = head<Scalar>(key, b, kv_head), values = head<Scalar>(value, b, kv_head);
      const matrix<Scalar> core_keys = head<Scalar>(grad_core_key, b, h),
                           core_values = head<Scalar>(grad_core_value, b, h);
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
        if (options.pool == pooling::select) {
          detail::add_selected_gradient(selected_token(k, last, scale), dc_k, dk);
          detail::add_selected_gradient(selected_token(k, last, scale), dc_v, dv);
          continue;
        }
        vector<Scalar> weights = vector<Scalar>::Constant(group.size(), Scalar(1) / static_cast<Scalar>(group.size()));
        if (options.pool == pooling::last_query) {
          weights = pooling_weights(k, last, scale);
          const vector<Scalar> dw = k * dc_k + v * dc_v;
          const vector<Scalar> dl = weights.cwiseProduct((dw.array() - weights.dot(dw)).matrix());
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

/// Of `attend`: with `dO` and `dlse` the gradients of the output and of the log-sum-exp, `P = exp(S - lse)`,
/// `dV = P^T dO`, `dP = dO V^T`, `delta = rowsum(P dP) - dlse`, `dS = P (dP - delta)`, with a softcap times
/// `1 - (S / cap)^2`; `dQ = scale dS K`, `dK = scale dS^T Q`. A sink logit: `-exp(sink - lse) delta`, of all queries that it
/// is for. No `grad_lse`: 0.
template <class Scalar, class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class GradOut,
          class GradLse, class Seen, class Raw>
gradient<Scalar> attend_gradient(const inputs<Query, Key, Value, Sink>& in, tensor_view<FarKey> far_key,
                                 tensor_view<FarValue> far_value, const incoming<GradOut, GradLse>& from,
                                 const options& options, const Seen& seen, const Raw& raw) {
  const auto& query = in.query;
  const std::array<std::int64_t, 3>& sinks = in.sink_logits.extent;
  const auto scale = static_cast<Scalar>(cca::detail::softmax_scale(options, query.dim()));
  const auto cap = static_cast<Scalar>(options.softcap);
  gradient<Scalar> grad{tensor<Scalar>(query.extent),     tensor<Scalar>(in.key.extent),
                        tensor<Scalar>(in.value.extent),  tensor<Scalar>(far_key.extent),
                        tensor<Scalar>(far_value.extent), {sinks[0], sinks[1], sinks[2], 1}};
  for (std::int64_t b = 0; b < query.batch(); ++b)
    for (std::int64_t h = 0; h < query.heads(); ++h) {
      const std::int64_t kv_head = h / (query.heads() / in.key.heads()),
                         far_head = h / (query.heads() / far_key.heads());
      const matrix<Scalar> q = head<Scalar>(query, b, h), grad_rows = head<Scalar>(from.grad_out, b, h);
      const matrix<Scalar> k = head<Scalar>(in.key, b, kv_head), v = head<Scalar>(in.value, b, kv_head);
      const matrix<Scalar> fk = head<Scalar>(far_key, b, far_head), fv = head<Scalar>(far_value, b, far_head);
      for (std::int64_t i = 0; i < query.length(); ++i) {
        const std::int64_t pooled = seen(b, h, i);
        const range window = raw(i);
        matrix<Scalar> keys(pooled + window.size(), query.dim()), values(pooled + window.size(), in.value.dim());
        keys << fk.topRows(pooled), k.middleRows(window.begin, window.size());
        values << fv.topRows(pooled), v.middleRows(window.begin, window.size());
        const vector<Scalar> logits = scores<Scalar>(keys, vector<Scalar>(q.row(i)), options);
        const Scalar sink = sink_logit<Scalar>(in.sink_logits, b, h, i);
        vector<Scalar> weights = logits;
        const Scalar lse = softmax(weights, sink);
        if (lse == -std::numeric_limits<Scalar>::infinity()) continue;  // all are masked
        weights = (logits.array() - lse).exp();  // with the rounding of lse, which is what the forward pass leaves
        const vector<Scalar> dp = values * grad_rows.row(i).transpose();
        const Scalar delta =
            weights.dot(dp) - (from.grad_lse.data ? static_cast<Scalar>(*from.grad_lse.row(b, h, i)) : Scalar(0));
        vector<Scalar> ds = weights.cwiseProduct((dp.array() - delta).matrix());
        if (cap > 0) ds.array() *= 1 - (logits / cap).array().square();
        const matrix<Scalar> grad_keys = scale * ds * q.row(i), grad_values = weights * grad_rows.row(i);
        head(grad.query, b, h).row(i) = scale * ds.transpose() * keys;
        head(grad.far_key, b, far_head).topRows(pooled) += grad_keys.topRows(pooled);
        head(grad.far_value, b, far_head).topRows(pooled) += grad_values.topRows(pooled);
        head(grad.key, b, kv_head).middleRows(window.begin, window.size()) += grad_keys.bottomRows(window.size());
        head(grad.value, b, kv_head).middleRows(window.begin, window.size()) += grad_values.bottomRows(window.size());
        if (in.sink_logits.data)
          *grad.sink_logits.view().row(b % sinks[0], h, i % sinks[2]) -= std::exp(sink - lse) * delta;
      }
    }
  return grad;
}

/// Of the raw part of attention.
template <class Scalar, class Query, class Key, class Value, class Sink, class GradOut, class GradLse>
gradient<Scalar> local_attention_gradient(const inputs<Query, Key, Value, Sink>& in,
                                          const incoming<GradOut, GradLse>& from, const options& options) {
  gradient<Scalar> grad = attend_gradient<Scalar>(
      in, in.key, in.value, from, options, [](std::int64_t, std::int64_t, std::int64_t) { return std::int64_t{0}; },
      detail::raw_tokens(in.query, in.key, options));
  grad.far_key = grad.far_value = {};
  return grad;
}

/// Of `attention`: that of attending to the cores and the raw tokens, and through the cores that of pooling.
template <class Scalar, class Query, class Key, class Value, class Sink, class GradOut, class GradLse>
gradient<Scalar> attention_gradient(const inputs<Query, Key, Value, Sink>& in, const incoming<GradOut, GradLse>& from,
                                    const options& options) {
  if (!cca::detail::pools(options)) return local_attention_gradient<Scalar>(in, from, options);
  const partition partition{options.group_size, options.window};
  const auto cores = pool<Scalar>(in.query, in.key, in.value, options);
  gradient<Scalar> grad = attend_gradient<Scalar>(
      in, cores.first.view(), cores.second.view(), from, options,
      [&](std::int64_t, std::int64_t, std::int64_t t) { return partition.core_count(t); },
      detail::raw_tokens(in.query, in.key, options));
  auto grad_core_key = grad.far_key.view(), grad_core_value = grad.far_value.view();
  grad_core_key.extent[2] = grad_core_value.extent[2] = partition.core_count(in.key.length() - 1);  // those seen
  const gradient<Scalar> pooled =
      pool_gradient<Scalar>(in.query, in.key, in.value, grad_core_key, grad_core_value, options);
  for (const auto part : {&gradient<Scalar>::query, &gradient<Scalar>::key, &gradient<Scalar>::value})
    std::transform((pooled.*part).data.begin(), (pooled.*part).data.end(), (grad.*part).data.begin(),
                   (grad.*part).data.begin(), std::plus<Scalar>());
  grad.far_key = grad.far_value = {};
  return grad;
}

/// Of `attend` to the caller's far rows.
template <class Scalar, class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class GradOut,
          class GradLse>
gradient<Scalar> attend_gradient(const inputs<Query, Key, Value, Sink>& in,
                                 const far_context<FarKey, FarValue>& context, const incoming<GradOut, GradLse>& from,
                                 const options& options) {
  return attend_gradient<Scalar>(
      in, context.key, context.value, from, options,
      [&](std::int64_t b, std::int64_t h, std::int64_t i) { return *context.seen.row(b, h, i); },
      detail::raw_tokens(in.query, in.key, options));
}

}}}  // namespace cca::CCA_TARGET::reference
