#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "attention.hpp"
#include "call.hpp"
#include "detail/base/numbers.hpp"
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

/// The results that a gradient reads, and the gradients that come in, for the engine. `T` is what is computed in.
template <class T, class Inputs, class Out, class Lse, class GradOut, class GradLse>
auto checked_results(const Inputs& in, const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from) {
  static_assert(sizeof(Lse) >= sizeof(T),
                "cca: the weights come from lse: a float one would cost double gradients half of their digits");
  const std::array<std::int64_t, 4> out{in.query.batch(), in.query.heads(), in.query.length(), in.value.dim()};
  const std::array<std::int64_t, 3> lse{out[0], out[1], out[2]};
  require_operand("out", of.out);
  require_extents("out", of.out, out);
  require_operand("lse", of.lse);
  require_extents("lse", of.lse, lse);
  require_operand("grad_out", from.grad_out);
  require_extents("grad_out", from.grad_out, out);
  if (given(from.grad_lse)) {
    require_operand("grad_lse", from.grad_lse);
    require_extents("grad_lse", from.grad_lse, lse);
  }
  using Query = typename decltype(in.query)::element_type;
  return query_results<Query, const Out, const Lse, const GradOut, const GradLse>{in.query, of.out, of.lse,
                                                                                  from.grad_out, from.grad_lse};
}

/// A gradient is summed where it is written.
template <class T, std::size_t Rank>
void require_gradient(const char* name, const tensor_view<T, Rank>& gradient,
                      const std::array<std::int64_t, Rank>& extents) {
  require_output(name, gradient);
  require_extents(name, gradient, extents);
}

/// The gradients of inputs, apart from them and from `more` that the call reads. `T` is what is computed in.
template <class T, class Inputs, class G>
void require_gradients(const Inputs& in, const gradients<G>& to, std::initializer_list<named_view> more) {
  static_assert(std::is_same_v<G, T>,
                "cca: gradients are of the type that is computed in: double if an operand is, otherwise float");
  require_gradient("grad_query", to.query, in.query.extent);
  require_gradient("grad_key", to.key, in.key.extent);
  require_gradient("grad_value", to.value, in.value.extent);
  if (given(to.sink_logits)) {
    if (!given(in.sink_logits))
      refuse("grad_sink_logits", to_string(to.sink_logits.extent), "none: there are no sinks");
    require_gradient("grad_sink_logits", to.sink_logits, in.sink_logits.extent);
  }
  const auto require = [&](std::initializer_list<named_view> read) {
    require_apart({{"grad_query", to.query},
                   {"grad_key", to.key},
                   {"grad_value", to.value},
                   {"grad_far_key", to.far_key},
                   {"grad_far_value", to.far_value},
                   {"grad_sink_logits", to.sink_logits}},
                  read);
  };
  require({{"query", in.query}, {"key", in.key}, {"value", in.value}, {"sink_logits", in.sink_logits}});
  require(more);
}

/// Far gradients where there are no far rows.
template <class T>
void require_no_far_gradients(const gradients<T>& to) {
  if (given(to.far_key)) refuse("grad_far_key", to_string(to.far_key.extent), "none: there is no far context");
  if (given(to.far_value)) refuse("grad_far_value", to_string(to.far_value.extent), "none: there is no far context");
}

template <class T>
void fill_zero(tensor_view<T> view, const execution& run) {
  run_tasks(run, run.concurrency(), view.batch() * view.heads(), [&](std::int64_t, std::int64_t task) {
    for (std::int64_t i = 0; i < view.length(); ++i)
      fill_n(view.row(task / view.heads(), task % view.heads(), i), view.dim(), T(0));
  });
}

/// Adds what the gradients of cores say of the tokens that were pooled, and of the queries that weighed them.
template <class Inputs, class Core, class T>
void add_pool_gradient(const Inputs& in, const cores<Core>& from, const gradients<T>& to, const options& options,
                       const execution& run, const worker_scratch<T>& scratch) {
  add_pool_gradient<std::remove_pointer_t<decltype(in.query.data)>, std::remove_pointer_t<decltype(in.key.data)>,
                    std::remove_pointer_t<decltype(in.value.data)>, T>(
      in.query, in.key, in.value, from.key, from.value, to.query, to.key, to.value, options, run, scratch);
}

/// The engine of the gradients for these queries and sources of whose heads `head_groups` is the greatest common divisor.
/// `Element` is the operands' `product_type`.
template <class Element, class Query>
backward<Element> backward_plan(const tensor_view<Query>& query, std::int64_t value_dim, std::int64_t head_groups,
                                bool staged, matrix_unit unit, const execution& run) {
  return {query.batch(), query.heads(), query.length(),   tile_form{query.dim(), value_dim, chosen_unit<Element>(unit)},
          head_groups,   staged,        run.concurrency()};
}

template <class Query, class Key, class Value, class Sink, class FarKey, class FarValue>
auto attend_backward(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue>& context,
                     matrix_unit unit, const execution& run) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  return backward_plan<product_type<Query, Key, Value, FarKey, FarValue>>(
      in.query, in.value.dim(), gcd(in.key.heads(), context.key.heads()), !in_place<T, Key, Value, FarKey, FarValue>,
      unit, run);
}

/// Scratch of the gradient of CCA attention: cores and their gradients, what pools them, and the engine.
template <class Element, class Core>
struct cca_gradient_plan {
  using T = compute_type<Element>;
  core_plan<Core> cores;
  std::int64_t workers, pooler_size;
  detail::backward<Element> backward;

  template <class Query, class Key, class Value, class Sink>
  cca_gradient_plan(const inputs<Query, Key, Value, Sink>& in, const options& options, const execution& run)
      : cores(in, options),
        workers(pool_workers(in.key, options, run)),
        pooler_size(group_rows<T>::size(cores.dim, cores.value_dim, !in_place<T, Key, Value>)),
        backward(backward_plan<Element>(in.query, cores.value_dim, in.key.heads(), !in_place<T, Key, Value, Core>,
                                        options.unit, run)) {}

  [[nodiscard]] std::size_t bytes() const {
    return cores.bytes() + cores.template bytes<T>() + worker_scratch<T>::bytes(workers, pooler_size) +
           backward.bytes();
  }
};

}  // namespace detail

/// Bytes of workspace that every gradient but that of `attend` is content with for these operands, options and executor.
/// @throws std::invalid_argument  for options that make no sense
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>>
[[nodiscard]] std::size_t gradient_workspace_size(const inputs<Query, Key, Value, Sink>& in,
                                                  const options& options = {}, const execution& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  detail::require_options<Element>(options);
  detail::require_sizes(in);
  return detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    return detail::cca_gradient_plan<Element, Core>(in, options, run).bytes() + detail::scratch_alignment;
  });
}

/// The same for `attend_gradient`. Of the options only the unit matters.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey>
[[nodiscard]] std::size_t gradient_workspace_size(const inputs<Query, Key, Value, Sink>& in,
                                                  const far_context<FarKey, FarValue>& context,
                                                  const options& options = {}, const execution& run = {}) {
  detail::require_sizes(in);
  detail::require_sizes("far.key", context.key);
  return detail::attend_backward(in, context, options.unit, run).bytes() + detail::scratch_alignment;
}

/// Gradients of `pool`: of the keys and values, and through the weights of the queries.
///
/// @param in,options  as for `pool`
/// @param from  gradients of the cores, of their extents
/// @param to  query, key and value, written whole, of the extents of the operand; 0 for what is not pooled and for
///   queries that are not a group's last. With `max` pooling an element's gradient goes to the first token that has the
///   maximum, with `select` pooling that of a core to the token that was selected.
/// @param run  as for `attention_gradient`, as are errors
/// Source: arXiv 2412.12465, section 3.1, differentiated.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class GradCore = const compute_type<Query, Key, Value>, class T = compute_type<Query, Key, Value>>
void pool_gradient(const inputs<Query, Key, Value, Sink>& in, const cores<GradCore>& from, const gradients<T>& to,
                   const options& options, const execution& run = {}) {
  static_assert(std::is_same_v<std::remove_const_t<GradCore>, T>, "cca: gradients of cores are of the gradients' type");
  detail::require_pool(in, options);
  detail::require_operand("grad_core_key", from.key);
  detail::require_operand("grad_core_value", from.value);
  detail::require_cores("grad_core_key", "grad_core_value", in, from, options);
  detail::require_no_far_gradients(to);
  detail::require_gradients<compute_type<Query, Key, Value>>(
      in, to, {{"grad_core_key", from.key}, {"grad_core_value", from.value}});

  const std::int64_t workers = detail::pool_workers(in.key, options, run);
  const std::int64_t size = detail::group_rows<T>::size(in.key.dim(), in.value.dim(), !detail::in_place<T, Key, Value>);
  detail::scratch memory(run.workspace(), detail::worker_scratch<T>::bytes(workers, size), "gradient_workspace_size");
  for (const auto& sum : {to.query, to.key, to.value}) detail::fill_zero(sum, run);
  detail::add_pool_gradient(in, from, to, options, run, detail::worker_scratch<T>(memory, workers, size));
}

/// Gradients of `attention` with respect to query, key and value, through the cores and their weights as well, and to the
/// sink logits.
///
/// The weights of the softmax are computed again from `lse`: nothing of size length x length is stored. A query that
/// sees nothing has gradients of 0; a token gets none, not even a NaN, from a query that does not see it.
///
/// @param in,options  those of the forward pass
/// @param of  `out` and `lse` as it wrote them. `lse` is at least as precise as what is computed in: double for double.
/// @param from  gradients of `out` and of `lse`
/// @param to  written whole, of the extents of the operands. They overlap nothing.
/// @param run  an executor, or `{executor, workspace}` with at least `gradient_workspace_size` bytes; the results are
///   bitwise the same for any. Tasks may wait for others that were begun before.
/// @throws std::invalid_argument  before anything is written, naming the argument, what it got and what it wants
/// Source: arXiv 2412.12465, section 3.3, differentiated; recomputation as in FlashAttention, arXiv 2205.14135.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class Out = const Query, class Lse = const compute_type<Query, Key, Value>,
          class GradOut = std::remove_const_t<Out>, class GradLse = std::remove_const_t<Lse>,
          class T = compute_type<Query, Key, Value>>
void attention_gradient(const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& of,
                        const incoming<GradOut, GradLse>& from, const gradients<T>& to, const options& options = {},
                        const execution& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  detail::require_attention(in, options);
  const auto results = detail::checked_results<compute_type<Element>>(in, of, from);
  detail::require_no_far_gradients(to);
  detail::require_gradients<compute_type<Element>>(
      in, to, {{"out", of.out}, {"lse", of.lse}, {"grad_out", from.grad_out}, {"grad_lse", from.grad_lse}});

  const bool pooled = detail::pools(options);
  detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    const detail::cca_gradient_plan<Element, Core> plan(in, options, run);
    detail::scratch memory(run.workspace(), plan.bytes(), "gradient_workspace_size");
    const auto core_rows = plan.cores.take(memory);
    const auto grad_cores = plan.cores.template take<T>(memory);
    const detail::worker_scratch<T> pooler(memory, plan.workers, plan.pooler_size);
    if (pooled) detail::pool_views<T>(in.query, in.key, in.value, core_rows.key, core_rows.value, options, run, pooler);
    for (const auto& sum : {to.key, to.value, grad_cores.key, grad_cores.value}) detail::fill_zero(sum, run);
    plan.backward(results, to.query, detail::make_score_rule<T>(options, in.key.dim(), in.sink_logits), to.sink_logits,
                  run, memory,
                  detail::source_gradient{detail::core_source(core_rows, options), grad_cores.key, grad_cores.value},
                  detail::source_gradient{detail::raw_source(in, options), to.key, to.value});
    if (pooled) detail::add_pool_gradient(in, grad_cores, to, options, run, pooler);
  });
}

/// Gradients of `attend`, also with respect to the caller's far keys and values: `to.far_key` and `to.far_value` are of
/// their extents and written whole. Other parameters and errors as for `attention_gradient`.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class Out = const Query,
          class Lse = const compute_type<Query, Key, Value, FarKey, FarValue>, class GradOut = std::remove_const_t<Out>,
          class GradLse = std::remove_const_t<Lse>, class T = compute_type<Query, Key, Value, FarKey, FarValue>>
void attend_gradient(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue>& context,
                     const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from, const gradients<T>& to,
                     const options& options = {}, const execution& run = {}) {
  using Number = compute_type<Query, Key, Value, FarKey, FarValue>;
  detail::require_attend(in, context, options);
  const auto results = detail::checked_results<Number>(in, of, from);
  detail::require_gradient("grad_far_key", to.far_key, context.key.extent);
  detail::require_gradient("grad_far_value", to.far_value, context.value.extent);
  detail::require_gradients<Number>(in, to,
                                    {{"far.key", context.key},
                                     {"far.value", context.value},
                                     {"out", of.out},
                                     {"lse", of.lse},
                                     {"grad_out", from.grad_out},
                                     {"grad_lse", from.grad_lse}});

  const auto backward = detail::attend_backward(in, context, options.unit, run);
  detail::scratch memory(run.workspace(), backward.bytes(), "gradient_workspace_size");
  for (const auto& sum : {to.key, to.value, to.far_key, to.far_value}) detail::fill_zero(sum, run);
  backward(results, to.query, detail::make_score_rule<T>(options, in.key.dim(), in.sink_logits), to.sink_logits, run,
           memory, detail::source_gradient{detail::seen_source(context), to.far_key, to.far_value},
           detail::source_gradient{detail::raw_source(in, options), to.key, to.value});
}

/// @{
/// Deprecated, as `dense_attention` and `local_attention` are.
template <class Inputs, class Results, class Incoming, class Gradients>
void dense_attention_gradient(const Inputs& in, const Results& of, const Incoming& from, const Gradients& to,
                              const options& options = {}, const execution& run = {}) {
  detail::require_dense(options);
  attention_gradient(in, of, from, to, options, run);
}
template <class Inputs, class Results, class Incoming, class T>
void local_attention_gradient(const Inputs& in, const Results& of, const Incoming& from, const gradients<T>& to,
                              const options& options, const execution& run = {}) {
  const auto no_rows = detail::no_far_context(in);
  gradients<T> with_far = to;
  with_far.far_key = {nullptr, no_rows.key.extent, no_rows.key.stride};
  with_far.far_value = {nullptr, no_rows.value.extent, no_rows.value.stride};
  attend_gradient(in, no_rows, of, from, with_far, options, run);
}
/// @}

}}  // namespace cca::CCA_TARGET
