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

/// The results that a gradient reads, and the gradients that come in, for the engine. `T` is what is computed in.
template <class T, class Inputs, class Out, class Lse, class GradOut, class GradLse>
auto checked_results(const Inputs& in, const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from) {
  static_assert(sizeof(Lse) >= sizeof(T),
                "cca: the weights come from lse: a float one would cost double gradients half of their digits");
  const std::int64_t heads = in.query.heads(), dim = in.value.dim();
  require_operand("out", of.out);
  require_shape("out", of.out, heads, dim, in.query);
  require_operand("lse", of.lse);
  require_shape("lse", of.lse, heads, 1, in.query);
  require_operand("grad_out", from.grad_out);
  require_shape("grad_out", from.grad_out, heads, dim, in.query);
  if (given(from.grad_lse)) {
    require_operand("grad_lse", from.grad_lse);
    require_shape("grad_lse", from.grad_lse, heads, 1, in.query);
  }
  using Query = typename decltype(in.query)::element_type;
  return query_results<Query, const Out, const Lse, const GradOut, const GradLse>{in.query, of.out, of.lse,
                                                                                  from.grad_out, from.grad_lse};
}

/// A gradient is summed where it is written. It has the extents and lengths of its operand.
template <class T, class Operand>
void require_gradient(const char* name, const T& gradient, const Operand& operand) {
  require_output(name, gradient);
  require_shape(name, gradient, operand.heads(), operand.extent.back(), operand);
}

/// A gradient that not every caller wants, of an operand that not every caller has.
template <class T, class Operand>
void require_optional_gradient(const char* name, const lse_view<T>& gradient, const Operand& operand,
                               const char* reason) {
  if (!given(gradient)) return;
  if (!given(operand)) refuse(name, to_string(gradient.extent), "none: " + text(reason));
  require_gradient(name, gradient, operand);
}

/// The gradients of inputs, apart from them and from `more` that the call reads. `T` is what is computed in.
template <class T, class Inputs, class G>
void require_gradients(const Inputs& in, const gradients<G>& to, std::initializer_list<named_view> more) {
  require_gradient("grad_query", to.query, in.query);
  require_gradient("grad_key", to.key, in.key);
  require_gradient("grad_value", to.value, in.value);
  require_optional_gradient("grad_sink_logits", to.sink_logits, in.sink_logits, "there are no sinks");
  require_optional_gradient("grad_alibi_slopes", to.alibi_slopes, in.alibi_slopes, "there are no slopes");
  require_optional_gradient("grad_key_bias", to.key_bias, in.key_bias, "keys have no bias");
  const auto require = [&](std::initializer_list<named_view> read) {
    require_apart({{"grad_query", to.query},
                   {"grad_key", to.key},
                   {"grad_value", to.value},
                   {"grad_far_key", to.far_key},
                   {"grad_far_value", to.far_value},
                   {"grad_sink_logits", to.sink_logits},
                   {"grad_alibi_slopes", to.alibi_slopes},
                   {"grad_key_bias", to.key_bias},
                   {"grad_far_bias", to.far_bias}},
                  read);
  };
  require({{"query", in.query},
           {"key", in.key},
           {"value", in.value},
           {"sink_logits", in.sink_logits},
           {"alibi_slopes", in.alibi_slopes},
           {"key_bias", in.key_bias}});
  require(more);
}

/// Far gradients where there are no far rows.
template <class T>
void require_no_far_gradients(const gradients<T>& to) {
  if (given(to.far_key)) refuse("grad_far_key", to_string(to.far_key.extent), "none: there is no far context");
  if (given(to.far_value)) refuse("grad_far_value", to_string(to.far_value.extent), "none: there is no far context");
  if (given(to.far_bias)) refuse("grad_far_bias", to_string(to.far_bias.extent), "none: there is no far context");
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
  detail::require_sizes(in);
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
  detail::require_sizes(in);
  detail::require_sizes("far.key", context.key);
  detail::require_batch("far.key", in.query, context.key);
  detail::require_selection_sizes(context.selected);
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
  (void)detail::check_gradients<compute_type<Query, Key, Value>, T>();
  detail::require_pool(in, options);
  detail::require_operand("grad_core_key", from.key);
  detail::require_operand("grad_core_value", from.value);
  detail::require_cores("grad_core_key", "grad_core_value", in, from, options);
  detail::require_no_far_gradients(to);
  detail::require_gradients<compute_type<Query, Key, Value>>(
      in, to, {{"grad_core_key", from.key}, {"grad_core_value", from.value}});

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
  if constexpr (detail::check_numbers<compute_type<Element>, Sink>() &&
                detail::check_gradients<compute_type<Element>, T>()) {
    detail::require_attention(in, options);
    const auto results = detail::checked_results<compute_type<Element>>(in, of, from);
    detail::require_no_far_gradients(to);
    detail::require_gradients<compute_type<Element>>(
        in, to, {{"out", of.out}, {"lse", of.lse}, {"grad_out", from.grad_out}, {"grad_lse", from.grad_lse}});

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
      if (pooled) detail::pool_views<T>(in.query, in.key, in.value, core_rows, core_bias, options, run, pooler);
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
  if constexpr (detail::check_numbers<Number, Sink>() && detail::check_gradients<Number, T>()) {
    detail::require_attend(in, context, options);
    const auto results = detail::checked_results<Number>(in, of, from);
    detail::require_gradient("grad_far_key", to.far_key, context.key);
    detail::require_gradient("grad_far_value", to.far_value, context.value);
    detail::require_optional_gradient("grad_far_bias", to.far_bias, context.bias, "far rows have no bias");
    detail::require_gradients<Number>(in, to,
                                      {{"far.key", context.key},
                                       {"far.value", context.value},
                                       {"far.bias", context.bias},
                                       {"far.seen", context.seen},
                                       {"far.positions", context.positions},
                                       {"far.visible_from", context.visible_from},
                                       {"far.visible_until", context.visible_until},
                                       {"far.selected.blocks", context.selected.blocks},
                                       {"out", of.out},
                                       {"lse", of.lse},
                                       {"grad_out", from.grad_out},
                                       {"grad_lse", from.grad_lse}});

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
