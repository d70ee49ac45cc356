#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <type_traits>

#include "attention.hpp"
#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/source.hpp"
#include "detail/engine/backward.hpp"
#include "detail/pool/pooler.hpp"
#include "detail/softmax/score_rule.hpp"
#include "element.hpp"
#include "executor.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// A gradient is summed where it is written.
template <class T>
void require_gradient(const char* name, const tensor_view<T>& gradient, const std::array<std::int64_t, 4>& extents) {
  require_output(name, gradient);
  require_extents(name, gradient, extents);
}

template <class T, class... Operand>
constexpr void require_gradient_type() {
  static_assert(std::is_same_v<T, compute_type<Operand...>>,
                "gradients are of the type that is computed in: float, or double if an operand is");
}

template <class Query, class Key, class Value, class T>
void require_gradients(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
                       const tensor_view<T>& grad_query, const tensor_view<T>& grad_key,
                       const tensor_view<T>& grad_value) {
  require_gradient("grad_query", grad_query, query.extent);
  require_gradient("grad_key", grad_key, key.extent);
  require_gradient("grad_value", grad_value, value.extent);
}

template <class T, class Query, class Out, class Lse, class GradOut, class GradLse>
void require_query_results(const query_results<Query, Out, Lse, GradOut, GradLse>& of, std::int64_t value_dim) {
  static_assert(std::is_floating_point_v<Lse> && sizeof(Lse) >= sizeof(T),
                "the weights come from lse: a float one would cost double gradients half of their digits");
  static_assert(std::is_floating_point_v<std::remove_const_t<GradLse>>, "grad_lse is float or double");
  const std::array<std::int64_t, 4> out{of.query.batch(), of.query.heads(), of.query.length(), value_dim};
  const std::array<std::int64_t, 3> lse{out[0], out[1], out[2]};
  require_operand("out", of.out);
  require_extents("out", of.out, out);
  require_operand("lse", of.lse);
  require_extents("lse", of.lse, lse);
  require_operand("grad_out", of.grad_out);
  require_extents("grad_out", of.grad_out, out);
  if (of.grad_lse.data == nullptr && of.grad_lse.extent == std::array<std::int64_t, 3>{}) return;
  require_operand("grad_lse", of.grad_lse);
  require_extents("grad_lse", of.grad_lse, lse);
}

template <class T, executor E>
void fill_zero(tensor_view<T> view, const E& run) {
  run_tasks(run, concurrency(run), view.batch() * view.heads(), [&](std::int64_t, std::int64_t task) {
    for (std::int64_t i = 0; i < view.length(); ++i)
      std::fill_n(view.row(task / view.heads(), task % view.heads(), i), view.dim(), T(0));
  });
}

/// The engine of the gradients for these queries and sources of whose heads `head_groups` is the greatest common divisor.
/// `Element` is the operands' `product_type`.
template <class Element, class Query, executor E>
backward<Element> backward_plan(const tensor_view<Query>& query, std::int64_t value_dim, std::int64_t head_groups,
                                bool staged, matrix_unit unit, const E& run) {
  return {query.batch(), query.heads(), query.length(),  tile_form{query.dim(), value_dim, chosen_unit<Element>(unit)},
          head_groups,   staged,        concurrency(run)};
}

template <class Query, class Key, class Value, class FarKey, class FarValue, executor E>
auto attend_backward(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
                     const far_context<FarKey, FarValue>& context, matrix_unit unit, const E& run) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  return backward_plan<product_type<Query, Key, Value, FarKey, FarValue>>(
      query, value.dim(), std::gcd(key.heads(), context.key.heads()), !in_place<T, Key, Value, FarKey, FarValue>, unit,
      run);
}

/// Scratch of the gradient of CCA attention: cores and their gradients, what pools them, and the engine.
template <class Element, class Core>
struct cca_gradient_plan : core_plan<Core> {
  using T = compute_type<Element>;
  std::int64_t workers, pooler_size;
  detail::backward<Element> backward;

  template <class Query, class Key, class Value, executor E>
  cca_gradient_plan(const tensor_view<Query>& query, const tensor_view<Key>& key, const tensor_view<Value>& value,
                    const options& options, const E& run)
      : core_plan<Core>(query, key, value, options),
        workers(pool_workers(key, options, run)),
        pooler_size(group_rows<T>::size(key.dim(), value.dim(), !in_place<T, Key, Value>)),
        backward(backward_plan<Element>(query, value.dim(), key.heads(), !in_place<T, Key, Value, Core>, options.unit,
                                        run)) {}

  [[nodiscard]] std::size_t bytes() const {
    return core_plan<Core>::bytes() + scratch_bytes<T>(this->core_key_size) + scratch_bytes<T>(this->core_value_size) +
           worker_scratch<T>::bytes(workers, pooler_size) + backward.bytes();
  }
};

/// Local and dense attention.
template <class Query, class Out, class Lse, class GradOut, class GradLse, class Key, class Value, class T, executor E>
void raw_gradient(const query_results<Query, Out, Lse, GradOut, GradLse>& results, tensor_view<Key> key,
                  tensor_view<Value> value, tensor_view<T> grad_query, tensor_view<T> grad_key,
                  tensor_view<T> grad_value, const options& options, const E& run, std::span<std::byte> workspace) {
  require_gradient_type<T, Query, Key, Value>();
  const auto& query = results.query;
  require_raw(query, key, value, options);
  require_query_results<T>(results, value.dim());
  require_gradients(query, key, value, grad_query, grad_key, grad_value);

  const auto backward = backward_plan<product_type<Query, Key, Value>>(query, value.dim(), key.heads(),
                                                                       !in_place<T, Key, Value>, options.unit, run);
  scratch memory(workspace, backward.bytes(), "gradient_workspace_size");
  fill_zero(grad_key, run);
  fill_zero(grad_value, run);
  backward(results, grad_query, make_score_rule<T>(options, key.dim()), {}, run, memory,
           source_gradient{raw_source(query, key, value, options), grad_key, grad_value});
}

}  // namespace detail

/// Bytes of workspace that every gradient but that of `attend` is content with for these operands, options and executor.
template <class Query, class Key, class Value, executor E = serial_executor>
[[nodiscard]] std::size_t gradient_workspace_size(tensor_view<Query> query, tensor_view<Key> key,
                                                  tensor_view<Value> value, const options& options, const E& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  detail::require_options<compute_type<Element>>(options);
  detail::require_unit<Element>(options);
  detail::require_sizes("query", query);
  detail::require_sizes("key", key);
  detail::require_sizes("value", value);
  return detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    return detail::cca_gradient_plan<Element, Core>(query, key, value, options, run).bytes() +
           detail::scratch_alignment;
  });
}

/// The same for `attend_gradient`.
template <class Query, class Key, class Value, class FarKey, class FarValue, executor E = serial_executor>
[[nodiscard]] std::size_t gradient_workspace_size(tensor_view<Query> query, tensor_view<Key> key,
                                                  tensor_view<Value> value, far_context<FarKey, FarValue> context,
                                                  const E& run = {}, matrix_unit unit = matrix_unit::none) {
  detail::require_sizes("query", query);
  detail::require_sizes("key", key);
  detail::require_sizes("value", value);
  detail::require_sizes("far.key", context.key);
  return detail::attend_backward(query, key, value, context, unit, run).bytes() + detail::scratch_alignment;
}

/// Gradients of `pool`: of the keys and values, and through the weights of the queries.
///
/// @param query,key,value,options  as for `pool`
/// @param grad_core_key,grad_core_value  gradients of the cores, of their extents
/// @param grad_query,grad_key,grad_value  written whole, of the extents of the operand; 0 for what is not pooled and for
///   queries that are not a group's last. With `max` pooling an element's gradient goes to the first token that has the
///   maximum.
/// @param run,workspace  as for `attention_gradient`, as are errors
/// Source: arXiv 2412.12465, section 3.1, differentiated.
template <class Query, class Key, class Value, class T, executor E = serial_executor>
void pool_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                   tensor_view<const std::type_identity_t<T>> grad_core_key,
                   tensor_view<const std::type_identity_t<T>> grad_core_value, tensor_view<T> grad_query,
                   tensor_view<T> grad_key, tensor_view<T> grad_value, const options& options, const E& run = {},
                   std::span<std::byte> workspace = {}) {
  detail::require_gradient_type<T, Query, Key, Value>();
  detail::require_pool(query, key, value, options);
  const auto [core_key, core_value] = detail::core_extents(query, key, value, options);
  detail::require_operand("grad_core_key", grad_core_key);
  detail::require_operand("grad_core_value", grad_core_value);
  detail::require_extents("grad_core_key", grad_core_key, core_key);
  detail::require_extents("grad_core_value", grad_core_value, core_value);
  detail::require_gradients(query, key, value, grad_query, grad_key, grad_value);

  const std::int64_t workers = detail::pool_workers(key, options, run);
  const std::int64_t size = detail::group_rows<T>::size(key.dim(), value.dim(), !detail::in_place<T, Key, Value>);
  detail::scratch memory(workspace, detail::worker_scratch<T>::bytes(workers, size), "gradient_workspace_size");
  detail::fill_zero(grad_query, run);
  detail::fill_zero(grad_key, run);
  detail::fill_zero(grad_value, run);
  detail::add_pool_gradient(query, key, value, grad_core_key, grad_core_value, grad_query, grad_key, grad_value,
                            options, run, detail::worker_scratch<T>(memory, workers, size));
}

/// Gradients of `attention` with respect to query, key and value, through the cores and their weights as well.
///
/// The weights of the softmax are computed again from `lse`: nothing of size length x length is stored. A query that
/// sees nothing has gradients of 0; a token gets none, not even a NaN, from a query that does not see it.
///
/// @param query,key,value,options  those of the forward pass
/// @param out,lse  what it wrote. `lse` is at least as precise as what is computed in: double for double.
/// @param grad_out  gradient of `out`, of its extents; any outer strides, 0 included
/// @param grad_lse  gradient of `lse`, of its extents; left out, it is 0
/// @param grad_query,grad_key,grad_value  written whole, of the extents of the operand; of the type that is computed in:
///   double if an operand is, otherwise float. They overlap nothing.
/// @param run  executor; the results are bitwise the same for any. Tasks may wait for others that were begun before.
/// @param workspace  at least `gradient_workspace_size` bytes, or empty: then memory for the cores, their gradients and
///   the workers is allocated
/// @throws std::invalid_argument  before anything is written, naming the argument, what it got and what it wants
/// Source: arXiv 2412.12465, section 3.3, differentiated; recomputation as in FlashAttention, arXiv 2205.14135.
template <class Query, class Key, class Value, class Out, class Lse, class GradOut, class GradLse, class T,
          executor E = serial_executor>
void attention_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                        lse_view<Lse> lse, tensor_view<GradOut> grad_out, lse_view<GradLse> grad_lse,
                        tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                        const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  detail::require_gradient_type<T, Query, Key, Value>();
  const detail::query_results results{query, out, lse, grad_out, grad_lse};
  detail::require_pooling_operands(query, key, value, options);
  detail::require_grouping(options);
  detail::require_query_results<T>(results, value.dim());
  detail::require_gradients(query, key, value, grad_query, grad_key, grad_value);

  using Element = detail::product_type<Query, Key, Value>;
  detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    const detail::cca_gradient_plan<Element, Core> plan(query, key, value, options, run);
    detail::scratch memory(workspace, plan.bytes(), "gradient_workspace_size");
    const auto cores = [&]<class Row>(std::type_identity<Row>) {
      const auto rows = [&](std::int64_t size, std::int64_t dim) {
        return bhsd(memory.take<Row>(size), key.batch(), plan.core_heads, plan.cores, dim);
      };
      return std::pair(rows(plan.core_key_size, key.dim()), rows(plan.core_value_size, value.dim()));
    };
    const auto [core_key, core_value] = cores(std::type_identity<Core>{});
    const auto [grad_core_key, grad_core_value] = cores(std::type_identity<T>{});
    const detail::worker_scratch<T> pooler(memory, plan.workers, plan.pooler_size);
    detail::pool_views<T>(query, key, value, core_key, core_value, options, run, pooler);
    for (const auto& sum : {grad_key, grad_value, grad_core_key, grad_core_value}) detail::fill_zero(sum, run);
    plan.backward(
        results, grad_query, detail::make_score_rule<T>(options, key.dim()), {}, run, memory,
        detail::source_gradient{detail::core_source(core_key, core_value, options), grad_core_key, grad_core_value},
        detail::source_gradient{detail::raw_source(query, key, value, options), grad_key, grad_value});
    detail::add_pool_gradient<Query, Key, Value, T>(query, key, value, grad_core_key, grad_core_value, grad_query,
                                                    grad_key, grad_value, options, run, pooler);
  });
}

/// Without a gradient of `lse`.
template <class Query, class Key, class Value, class Out, class Lse, class GradOut, class T,
          executor E = serial_executor>
void attention_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value, tensor_view<Out> out,
                        lse_view<Lse> lse, tensor_view<GradOut> grad_out, tensor_view<T> grad_query,
                        tensor_view<T> grad_key, tensor_view<T> grad_value, const options& options, const E& run = {},
                        std::span<std::byte> workspace = {}) {
  attention_gradient(query, key, value, out, lse, grad_out, lse_view<>{}, grad_query, grad_key, grad_value, options,
                     run, workspace);
}

/// Gradients of `local_attention`: queries may be fewer than keys. Parameters and errors as for `attention_gradient`.
template <class Query, class Key, class Value, class Out, class Lse, class GradOut, class GradLse, class T,
          executor E = serial_executor>
void local_attention_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                              tensor_view<Out> out, lse_view<Lse> lse, tensor_view<GradOut> grad_out,
                              lse_view<GradLse> grad_lse, tensor_view<T> grad_query, tensor_view<T> grad_key,
                              tensor_view<T> grad_value, const options& options, const E& run = {},
                              std::span<std::byte> workspace = {}) {
  detail::require_grouping(options);
  detail::raw_gradient(detail::query_results{query, out, lse, grad_out, grad_lse}, key, value, grad_query, grad_key,
                       grad_value, options, run, workspace);
}

/// Without a gradient of `lse`.
template <class Query, class Key, class Value, class Out, class Lse, class GradOut, class T,
          executor E = serial_executor>
void local_attention_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                              tensor_view<Out> out, lse_view<Lse> lse, tensor_view<GradOut> grad_out,
                              tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                              const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  local_attention_gradient(query, key, value, out, lse, grad_out, lse_view<>{}, grad_query, grad_key, grad_value,
                           options, run, workspace);
}

/// Gradients of `dense_attention`. Parameters and errors as for `attention_gradient`.
template <class Query, class Key, class Value, class Out, class Lse, class GradOut, class GradLse, class T,
          executor E = serial_executor>
void dense_attention_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                              tensor_view<Out> out, lse_view<Lse> lse, tensor_view<GradOut> grad_out,
                              lse_view<GradLse> grad_lse, tensor_view<T> grad_query, tensor_view<T> grad_key,
                              tensor_view<T> grad_value, const options& options = {}, const E& run = {},
                              std::span<std::byte> workspace = {}) {
  detail::require_dense(options);
  detail::raw_gradient(detail::query_results{query, out, lse, grad_out, grad_lse}, key, value, grad_query, grad_key,
                       grad_value, options, run, workspace);
}

/// Without a gradient of `lse`.
template <class Query, class Key, class Value, class Out, class Lse, class GradOut, class T,
          executor E = serial_executor>
void dense_attention_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                              tensor_view<Out> out, lse_view<Lse> lse, tensor_view<GradOut> grad_out,
                              tensor_view<T> grad_query, tensor_view<T> grad_key, tensor_view<T> grad_value,
                              const options& options = {}, const E& run = {}, std::span<std::byte> workspace = {}) {
  dense_attention_gradient(query, key, value, out, lse, grad_out, lse_view<>{}, grad_query, grad_key, grad_value,
                           options, run, workspace);
}

/// Gradients of `attend`, also with respect to the caller's far keys and values, of whose extents `grad_far_key` and
/// `grad_far_value` are and which are written whole. Other parameters and errors as for `attention_gradient`.
template <class Query, class Key, class Value, class FarKey, class FarValue, class Out, class Lse, class GradOut,
          class GradLse, class T, executor E = serial_executor>
void attend_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                     far_context<FarKey, FarValue> context, tensor_view<Out> out, lse_view<Lse> lse,
                     tensor_view<GradOut> grad_out, lse_view<GradLse> grad_lse, tensor_view<T> grad_query,
                     tensor_view<T> grad_key, tensor_view<T> grad_value, tensor_view<T> grad_far_key,
                     tensor_view<T> grad_far_value, const options& options, const E& run = {},
                     std::span<std::byte> workspace = {}) {
  detail::require_gradient_type<T, Query, Key, Value, FarKey, FarValue>();
  const detail::query_results results{query, out, lse, grad_out, grad_lse};
  detail::require_attend(query, key, value, context, options);
  detail::require_query_results<T>(results, value.dim());
  detail::require_gradients(query, key, value, grad_query, grad_key, grad_value);
  detail::require_gradient("grad_far_key", grad_far_key, context.key.extent);
  detail::require_gradient("grad_far_value", grad_far_value, context.value.extent);

  const auto backward = detail::attend_backward(query, key, value, context, options.unit, run);
  detail::scratch memory(workspace, backward.bytes(), "gradient_workspace_size");
  for (const auto& sum : {grad_key, grad_value, grad_far_key, grad_far_value}) detail::fill_zero(sum, run);
  backward(results, grad_query, detail::make_score_rule<T>(options, key.dim()), {}, run, memory,
           detail::source_gradient{detail::seen_source(context), grad_far_key, grad_far_value},
           detail::source_gradient{detail::raw_source(query, key, value, options), grad_key, grad_value});
}

/// Without a gradient of `lse`.
template <class Query, class Key, class Value, class FarKey, class FarValue, class Out, class Lse, class GradOut,
          class T, executor E = serial_executor>
void attend_gradient(tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                     far_context<FarKey, FarValue> context, tensor_view<Out> out, lse_view<Lse> lse,
                     tensor_view<GradOut> grad_out, tensor_view<T> grad_query, tensor_view<T> grad_key,
                     tensor_view<T> grad_value, tensor_view<T> grad_far_key, tensor_view<T> grad_far_value,
                     const options& options, const E& run = {}, std::span<std::byte> workspace = {}) {
  attend_gradient(query, key, value, context, out, lse, grad_out, lse_view<>{}, grad_query, grad_key, grad_value,
                  grad_far_key, grad_far_value, options, run, workspace);
}

}}  // namespace cca::CCA_TARGET
