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
#include "detail/context/tasks.hpp"
#include "detail/engine/backward.hpp"
#include "detail/engine/bias_sums.hpp"
#include "detail/engine/gradient_plan.hpp"
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

/// What a gradient reads of the forward pass and of what comes in, and what it writes.
struct read_views {
  named_view out, lse, grad_out, grad_lse;
};
struct gradient_views {
  output_view query, key, value, far_key, far_value, sink_logits, alibi_slopes, key_bias, far_bias;
};

template <class Out, class Lse, class GradOut, class GradLse>
read_views named(const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from) {
  return {{"out", of.out}, {"lse", of.lse}, {"grad_out", from.grad_out}, {"grad_lse", from.grad_lse}};
}
template <class T>
gradient_views named(const gradients<T>& to) {
  return {{"grad_query", to.query},
          {"grad_key", to.key},
          {"grad_value", to.value},
          {"grad_far_key", to.far_key},
          {"grad_far_value", to.far_value},
          {"grad_sink_logits", to.sink_logits},
          {"grad_alibi_slopes", to.alibi_slopes},
          {"grad_key_bias", to.key_bias},
          {"grad_far_bias", to.far_bias}};
}

inline void require_read(const input_views& in, const read_views& of) {
  const std::int64_t heads = in.query.heads(), dim = in.value.dim();
  require_operand(of.out);
  require_shape(of.out, heads, dim, in.query);
  require_operand(of.lse);
  require_shape(of.lse, heads, 1, in.query);
  require_operand(of.grad_out);
  require_shape(of.grad_out, heads, dim, in.query);
  if (given(of.grad_lse)) {
    require_operand(of.grad_lse);
    require_shape(of.grad_lse, heads, 1, in.query);
  }
}

/// The same for the engine. `T` is what is computed in.
template <class T, class Inputs, class Out, class Lse, class GradOut, class GradLse>
auto results_of(const Inputs& in, const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from) {
  static_assert(sizeof(Lse) >= sizeof(T),
                "cca: the weights come from lse: a float one would cost double gradients half of their digits");
  using Query = typename decltype(in.query)::element_type;
  return query_results<Query, const Out, const Lse, const GradOut, const GradLse>{in.query, of.out, of.lse,
                                                                                  from.grad_out, from.grad_lse};
}

/// A gradient is summed where it is written. It has the extents and lengths of its operand.
inline void require_gradient(const output_view& gradient, const named_view& operand) {
  require_output(gradient);
  require_shape(gradient, operand.heads(), operand.dim(), operand);
}

/// A gradient that not every caller wants, of an operand that not every caller has.
inline void require_optional_gradient(const output_view& gradient, const named_view& operand, const char* reason) {
  if (!given(operand)) require_none(gradient, reason);
  if (given(gradient)) require_gradient(gradient, operand);
}

/// The gradients of inputs, apart from them and from `more` that the call reads.
inline void require_gradients(const input_views& in, const gradient_views& to,
                              std::initializer_list<named_memory> more) {
  require_gradient(to.query, in.query);
  require_gradient(to.key, in.key);
  require_gradient(to.value, in.value);
  require_optional_gradient(to.sink_logits, in.sink_logits, "there are no sinks");
  require_optional_gradient(to.alibi_slopes, in.alibi_slopes, "there are no slopes");
  require_optional_gradient(to.key_bias, in.key_bias, "keys have no bias");
  const auto require = [&](std::initializer_list<named_memory> read) {
    require_apart({to.query, to.key, to.value, to.far_key, to.far_value, to.sink_logits, to.alibi_slopes, to.key_bias,
                   to.far_bias},
                  read);
  };
  require({in.query, in.key, in.value, in.sink_logits, in.alibi_slopes, in.key_bias});
  require(more);
}

/// Far gradients where there are no far rows.
inline void require_no_far_gradients(const gradient_views& to) {
  for (const output_view* gradient : {&to.far_key, &to.far_value, &to.far_bias})
    require_none(*gradient, "there is no far context");
}

inline void require_far_gradients(const far_views& far_rows, const gradient_views& to) {
  require_gradient(to.far_key, far_rows.key);
  require_gradient(to.far_value, far_rows.value);
  require_optional_gradient(to.far_bias, far_rows.bias, "far rows have no bias");
}

template <class T>
void fill_zero(tensor_view<T> view, const execution& run) {
  run_tasks(run, run.concurrency(), view.batch() * view.heads(), [&](std::int64_t, std::int64_t task) {
    const std::int64_t b = task / view.heads(), h = task % view.heads();
    for (std::int64_t i = 0; i < view.length(b); ++i) fill_n(view.row(b, h, i), view.dim(), T(0));
  });
}

/// Adds what the gradients of cores say of the tokens that were pooled, and of the queries that weighed them.
template <class Inputs, class Core, class T>
void add_pool_gradient(const Inputs& in, const cores<Core>& from, const tensor_view<T, 3>& bias, const gradients<T>& to,
                       const options& options, const execution& run, const pool_memory<T>& memory) {
  add_pool_gradient<std::remove_pointer_t<decltype(in.query.data)>, std::remove_pointer_t<decltype(in.key.data)>,
                    std::remove_pointer_t<decltype(in.value.data)>, T>(
      in.query, in.key, in.value, from.key, from.value, bias, to.query, to.key, to.value, options, run, memory);
}

}  // namespace detail

/// Bytes of workspace that every gradient but that of `attend` is content with for these operands, options and executor.
/// @throws std::invalid_argument  for options that make no sense
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>>
[[nodiscard]] std::size_t gradient_workspace_size(const inputs<Query, Key, Value, Sink>& in,
                                                  const options& options = {}, const execution& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  detail::require_options<Element>(options);
  detail::require_differentiable(options);
  detail::require_sizes(detail::named(in));
  return detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    return detail::cca_gradient_plan<Element, Core>(in, options, run).bytes() + detail::scratch_alignment;
  });
}

/// The same for `attend_gradient`. Of the options only the unit matters.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class FarBias = compute_type<FarKey, FarValue>>
[[nodiscard]] std::size_t gradient_workspace_size(const inputs<Query, Key, Value, Sink>& in,
                                                  const far_context<FarKey, FarValue, FarBias>& context,
                                                  const options& options = {}, const execution& run = {}) {
  detail::require_differentiable(options);
  detail::require_sizes(detail::named(in), detail::named(context));
  return detail::attend_backward(in, context, options.unit, run).bytes() + detail::scratch_alignment;
}

/// Gradients of `pool`: of the keys and values, and through the weights of the queries.
///
/// @param in,options  as for `pool`
/// @param from  gradients of the cores, of their extents
/// @param to  query, key and value, written whole, of the extents of the operand; 0 for what is not pooled and for
///   queries that are not a group's last. With `max` pooling an element's gradient goes to the first token that has the
///   maximum, with `select` and `select_by_mass` that of a core to the token that was selected.
/// @param run  as for `attention_gradient`, as are errors
/// Source: arXiv 2412.12465, section 3.1, differentiated.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class GradCore = const compute_type<Query, Key, Value>, class T = compute_type<Query, Key, Value>>
void pool_gradient(const inputs<Query, Key, Value, Sink>& in, const cores<GradCore>& from, const gradients<T>& to,
                   const options& options, const execution& run = {}) {
  static_assert(std::is_same_v<std::remove_const_t<GradCore>, T>, "cca: gradients of cores are of the gradients' type");
  (void)(detail::check_differentiable<Key, Value>() && detail::check_gradients<compute_type<Query, Key, Value>, T>());
  const auto views = detail::named(in);
  const auto grad = detail::named(to);
  const detail::named_view grad_key("grad_core_key", from.key), grad_value("grad_core_value", from.value);
  detail::require_options<detail::product_type<Query, Key, Value>>(options);
  detail::require_pool(views, options);
  detail::require_operand(grad_key);
  detail::require_operand(grad_value);
  detail::require_cores(views, grad_key, grad_value, options);
  detail::require_no_far_gradients(grad);
  detail::require_gradients(views, grad, {grad_key, grad_value});

  const auto plan = detail::plan_pooling<T>(in, options, run);
  detail::scratch memory(run.workspace(), plan.bytes(), "gradient_workspace_size");
  for (const auto& sum : {to.query, to.key, to.value}) detail::fill_zero(sum, run);
  detail::add_pool_gradient(in, from, lse_view<T>{}, to, options, run, plan.take(memory));
}

/// Gradients of `attention` with respect to query, key and value, through the cores and their weights as well, and where
/// they are wanted to the sink logits, the slopes and the biases of keys.
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
  if constexpr (detail::check_differentiable<Key, Value>() && detail::check_numbers<compute_type<Element>, Sink>() &&
                detail::check_gradients<compute_type<Element>, T>()) {
    const auto views = detail::named(in);
    const auto read = detail::named(of, from);
    const auto grad = detail::named(to);
    detail::require_options<Element>(options);
    detail::require_differentiable(options);
    detail::require_attention(views, options);
    detail::require_read(views, read);
    detail::require_no_far_gradients(grad);
    detail::require_gradients(views, grad, {read.out, read.lse, read.grad_out, read.grad_lse});

    const auto results = detail::results_of<compute_type<Element>>(in, of, from);
    const bool pooled = detail::pools(options);
    detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
      const detail::cca_gradient_plan<Element, Core> plan(in, options, run);
      detail::scratch memory(run.workspace(), plan.bytes(), "gradient_workspace_size");
      const std::int64_t* offsets = plan.cores.take_offsets(memory, in, options);
      const auto core_rows = plan.cores.take(memory, offsets);
      const auto grad_cores = plan.cores.template take<T>(memory, offsets);
      const auto pooler = plan.pooler.take(memory);
      const lse_view<T> core_bias = plan.cores.template take_bias<T>(memory, offsets);
      const lse_view<T> grad_bias = plan.cores.biased ? plan.core_bias.take(memory) : lse_view<T>{};
      if (pooled) detail::pool_views<T>(in.query, detail::row_views_of(in), core_rows, core_bias, options, run, pooler);
      for (const auto& sum : {to.key, to.value, grad_cores.key, grad_cores.value}) detail::fill_zero(sum, run);
      const auto cores = detail::core_source(core_rows, lse_view<const T>(core_bias), options, in.query.heads());
      const auto rule = detail::make_score_rule<T>(options, in, plan.cores.biased || detail::given(in.key_bias));
      const auto key_bias = detail::wanted_sums(plan.key_bias, to.key_bias, memory);
      plan.backward(results, to, rule, run, memory,
                    detail::source_gradient{detail::sink_source(in, options), to.key, to.value, key_bias},
                    detail::source_gradient{cores, grad_cores.key, grad_cores.value, grad_bias},
                    detail::source_gradient{detail::raw_source(in, options), to.key, to.value, key_bias});
      if (key_bias.data != nullptr) detail::add_up(key_bias, to.key_bias, run);
      if (pooled) detail::add_pool_gradient(in, grad_cores, grad_bias, to, options, run, pooler);
    });
  }
}

/// Gradients of `attend`, also with respect to the caller's far keys and values, and where it is wanted to their biases:
/// `to.far_key`, `to.far_value` and `to.far_bias` are of their extents and written whole. Other parameters and errors as for
/// `attention_gradient`.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class FarBias = compute_type<FarKey, FarValue>,
          class Out = const Query, class Lse = const compute_type<Query, Key, Value, FarKey, FarValue>,
          class GradOut = std::remove_const_t<Out>, class GradLse = std::remove_const_t<Lse>,
          class T = compute_type<Query, Key, Value, FarKey, FarValue>>
void attend_gradient(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, FarBias>& context,
                     const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from, const gradients<T>& to,
                     const options& options = {}, const execution& run = {}) {
  using Number = compute_type<Query, Key, Value, FarKey, FarValue>;
  if constexpr (detail::check_differentiable<Key, Value, FarKey, FarValue>() && detail::check_numbers<Number, Sink>() &&
                detail::check_gradients<Number, T>()) {
    const auto views = detail::named(in);
    const auto far_rows = detail::named(context);
    const auto read = detail::named(of, from);
    const auto grad = detail::named(to);
    detail::require_options<detail::product_type<Query, Key, Value, FarKey, FarValue>>(options);
    detail::require_differentiable(options);
    detail::require_attend(views, far_rows, options, sizeof(Number));
    detail::require_read(views, read);
    detail::require_far_gradients(far_rows, grad);
    detail::require_gradients(views, grad,
                              {far_rows.key, far_rows.value, far_rows.bias, far_rows.seen, far_rows.positions,
                               far_rows.visible_from, far_rows.visible_until, far_rows.blocks, read.out, read.lse,
                               read.grad_out, read.grad_lse});

    const auto results = detail::results_of<Number>(in, of, from);
    const auto plan = detail::attend_backward(in, context, options.unit, run);
    detail::scratch memory(run.workspace(), plan.bytes(), "gradient_workspace_size");
    for (const auto& sum : {to.key, to.value, to.far_key, to.far_value}) detail::fill_zero(sum, run);
    const auto far_bias = detail::wanted_sums(plan.far_bias, to.far_bias, memory);
    const auto key_bias = detail::wanted_sums(plan.key_bias, to.key_bias, memory);
    const bool biased = detail::given(in.key_bias) || detail::given(context.bias);
    plan.backward(results, to, detail::make_score_rule<T>(options, in, biased), run, memory,
                  detail::source_gradient{detail::sink_source(in, options), to.key, to.value, key_bias},
                  detail::source_gradient{detail::seen_source(in, context, options), to.far_key, to.far_value, far_bias},
                  detail::source_gradient{detail::raw_source(in, options), to.key, to.value, key_bias});
    if (far_bias.data != nullptr) detail::add_up(far_bias, to.far_bias, run);
    if (key_bias.data != nullptr) detail::add_up(key_bias, to.key_bias, run);
  }
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
