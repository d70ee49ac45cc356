#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "call.hpp"
#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/sources.hpp"
#include "detail/engine/plan.hpp"
#include "detail/pool/pooler.hpp"
#include "detail/softmax/score_rule.hpp"
#include "element.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// Operands and options of attention.
inline void require_attention(const input_views& in, const options& options) {
  require_inputs(in);
  require_grouping(options);
  pools(options) ? require_query_for_every_key(in.query, in.key, options) : require_positions(options);
  if (pools(options)) require_none(in.key_bias, "cores stand for several keys, and have no bias of one");
}

/// Operands and options of `attend`, which computes in numbers of this many bytes.
inline void require_attend(const input_views& in, const far_views& context, const options& options,
                           std::size_t number_size) {
  require_grouping(options);
  require_positions(options);
  require_inputs(in);
  require_far(in, context, number_size);
  require_no_pooling(options, "the caller pools");
}

/// No far rows: what is left of `attend` is its raw part.
template <class Query, class Key, class Value, class Sink>
far_context<Key, Value> no_far_context(const inputs<Query, Key, Value, Sink>& in) {
  static constexpr std::int64_t none = 0;
  const auto no_rows = [](auto view) {
    view.extent[2] = 0;
    view.begins = view.ends = nullptr;
    return view;
  };
  const auto& query = in.query;
  return {no_rows(in.key),
          no_rows(in.value),
          {&none, {query.batch(), query.heads(), query.length()}, {}, query.begins, query.ends}};
}

}  // namespace detail

/// Bytes of workspace that every entry point but `attend` is content with for these operands, options and executor.
/// @throws std::invalid_argument  for options that make no sense
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>>
[[nodiscard]] std::size_t workspace_size(const inputs<Query, Key, Value, Sink>& in, const options& options = {},
                                         const execution& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  detail::require_options<Element>(options);
  detail::require_sizes(detail::named(in));
  return detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    return detail::cca_plan<Element, Core>(in, options, run).bytes() + detail::scratch_alignment;
  });
}

/// The same for `attend`, whose far context may be larger than the cores. Of its options the unit, the sink tokens and the
/// prefix matter.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class FarBias = compute_type<FarKey, FarValue>>
[[nodiscard]] std::size_t workspace_size(const inputs<Query, Key, Value, Sink>& in,
                                         const far_context<FarKey, FarValue, FarBias>& context,
                                         const options& options = {}, const execution& run = {}) {
  detail::require_options<detail::product_type<Query, Key, Value, FarKey, FarValue>>(options);
  detail::require_sizes(detail::named(in), detail::named(context));
  return detail::attend_plan(in, context, options, run).bytes() + detail::scratch_alignment;
}

/// Attention. What the options ask for decides which:
/// - `{}`: dense causal attention, to every token at or before the query's position;
/// - `{.window = s}`: sliding-window attention, to the `s` tokens `[t + 1 - s, t + 1)` of the query at position t;
/// - `{.group_size = g, .window = s}`: Core Context Aware attention: the query at t sees the cores of all groups before its
///   window and the raw tokens from there to t, in one softmax;
/// - `.sink_tokens = m` with either: the first `m` tokens, up to t, stay raw beside the window, and groups begin behind
///   them;
/// - `{.lookahead = l}`, with or without a window: up to the token `t + l` instead of t, and all with `unlimited`;
///   `{.prefix = p}`: the first `p` tokens besides, wherever t is.
///
/// Without groups queries may be fewer than keys: they are the last ones, or start at `options.first_position`. With
/// groups there is a query for every key; `kv_cache` takes sequences piece by piece. Sequences of a batch may have lengths
/// of their own (`packed`, `with_lengths`): each is to the bit as if called alone.
///
/// @param in  query, key and value, read whole; keys as attention sees them, with RoPE applied
/// @param to  `out` and, where given, `lse` are written whole; they overlap no operand and not each other. A logit of -inf
///   is masked: a query that sees no other has the output 0 and the `lse` -inf.
/// @param options  `pool`, `core_heads` and `core_bias` are for groups, `first_position`, `lookahead` and `prefix` for none
/// @param run  an executor, or `{executor, workspace}`; the results are bitwise the same for any
/// @throws std::invalid_argument  before anything is written, naming the argument, what it got and what it wants
/// Source: arXiv 2412.12465, section 3.3 (fused CCA attention) and 3.2 (locality-preserving attention).
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          detail::written Out = Query, class Lse = compute_type<Query, Key, Value>>
void attention(const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& to, const options& options = {},
               const execution& run = {}) {
  using Element = detail::product_type<Query, Key, Value>;
  using T = compute_type<Element>;
  if constexpr (detail::check_numbers<T, Sink>()) {
    const auto views = detail::named(in);
    detail::require_options<Element>(options);
    detail::require_attention(views, options);
    detail::require_results(views, in.value.dim(), detail::named(to));

    detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
      const detail::cca_plan<Element, Core> plan(in, options, run);
      detail::scratch memory(run.workspace(), plan.bytes(), "workspace_size");
      const std::int64_t* offsets = plan.cores.take_offsets(memory, in, options);
      const auto cores = plan.cores.take(memory, offsets);
      const lse_view<T> core_bias = plan.cores.template take_bias<T>(memory, offsets);
      const auto pooler = plan.pooler.take(memory);
      if (detail::pools(options))
        detail::pool_views<T>(in.query, detail::row_views_of(in), cores, core_bias, options, run, pooler);
      const auto rule = detail::make_score_rule<T>(options, in, plan.cores.biased || detail::given(in.key_bias));
      plan.forward(in.query, to.out, to.lse, rule, run, memory, detail::sink_source(in, options),
                   detail::core_source(cores, lse_view<const T>(core_bias), options, in.query.heads()),
                   detail::raw_source(in, options));
    });
  }
}

/// Attention of views, without log-sum-exps.
template <detail::not_inputs Query, class Key, class Value, class Out>
void attention(const Query& query, const Key& key, const Value& value, const Out& out, const options& options = {},
               const execution& run = {}) {
  if constexpr (detail::check_views<Query, Key, Value, Out>())
    attention(inputs{query, key, value}, results{out}, options, run);
}

/// One softmax over far context that the caller made, by any compressor, and the raw window: query i of head h sees the
/// far rows `[0, seen(b, h, i))`, or those that are visible at its position or selected for it, and the raw tokens that
/// CCA attention with the same options sees: the window, which reaches back to the start of a group where `group_size`
/// is above 1, and the sink tokens, the first of `key`. An empty key and value leave the far context alone.
///
/// @param in,to,run  as for `attention` without groups, as are errors
/// @param context  its heads divide the query's; every `seen` lies in `[0, far length]`. The lists of `selected`
///   ascend. What a query gets does not depend, to the bit, on the lists of others. Where `block_queries` is at most 4
///   each list goes by itself with the heads that share rows, otherwise a tile of queries does, which is best filled by
///   64 and more of them.
/// @param options  all but `pool`, `core_heads` and `core_bias`: the caller pools, and gives biases with his far context
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class FarBias = compute_type<FarKey, FarValue>,
          detail::written Out = Query, class Lse = compute_type<Query, Key, Value, FarKey, FarValue>>
void attend(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, FarBias>& context,
            const results<Out, Lse>& to, const options& options = {}, const execution& run = {}) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  if constexpr (detail::check_numbers<T, Sink>()) {
    const auto views = detail::named(in);
    const auto far_rows = detail::named(context);
    detail::require_options<detail::product_type<Query, Key, Value, FarKey, FarValue>>(options);
    detail::require_attend(views, far_rows, options, sizeof(T));
    detail::require_results(
        views, in.value.dim(), detail::named(to),
        {far_rows.key, far_rows.value, far_rows.seen, far_rows.bias, far_rows.positions, far_rows.visible_from,
         far_rows.visible_until, far_rows.blocks, far_rows.key_scales, far_rows.value_scales});

    const auto forward = detail::attend_plan(in, context, options, run);
    detail::scratch memory(run.workspace(), forward.bytes(), "workspace_size");
    const bool biased = detail::given(in.key_bias) || detail::given(context.bias);
    forward(in.query, to.out, to.lse, detail::make_score_rule<T>(options, in, biased), run, memory,
            detail::sink_source(in, options), detail::seen_source(in, context, options), detail::raw_source(in, options));
  }
}

/// @{
/// Deprecated: without options `attention` is dense.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class Out = Query, class Lse = compute_type<Query, Key, Value>>
void dense_attention(const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& to,
                     const options& options = {}, const execution& run = {}) {
  detail::require_dense(options);
  attention(in, to, options, run);
}
template <detail::not_inputs Query, class Key, class Value, class Out>
void dense_attention(const Query& query, const Key& key, const Value& value, const Out& out,
                     const options& options = {}, const execution& run = {}) {
  dense_attention(inputs{query, key, value}, results{out}, options, run);
}
/// @}

/// @{
/// Deprecated: `attention` with `{.window = s}` is local. With a `group_size` above 1 this is the raw part of CCA
/// attention, which reaches back to the start of a group, as that of `attend`.
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class Out = Query, class Lse = compute_type<Query, Key, Value>>
void local_attention(const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& to, const options& options,
                     const execution& run = {}) {
  attend(in, detail::no_far_context(in), to, options, run);
}
template <detail::not_inputs Query, class Key, class Value, class Out>
void local_attention(const Query& query, const Key& key, const Value& value, const Out& out, const options& options,
                     const execution& run = {}) {
  local_attention(inputs{query, key, value}, results{out}, options, run);
}
/// @}

}}  // namespace cca::CCA_TARGET
