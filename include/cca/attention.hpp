#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "call.hpp"
#include "detail/base/numbers.hpp"
#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/source.hpp"
#include "detail/context/tasks.hpp"
#include "detail/engine/forward.hpp"
#include "detail/pool/pooler.hpp"
#include "detail/product/choose_unit.hpp"
#include "detail/softmax/score_rule.hpp"
#include "element.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {
namespace detail {

/// `first(b)`: the position of query 0 of sequence `b`.
template <class Inputs>
auto first_positions(const Inputs& in, const options& options) {
  return [options, queries = in.query, keys = in.key](std::int64_t b) {
    return first_position(options, queries.length(b), keys.length(b));
  };
}

/// The tokens of the keys that query `i` sees raw as `which(partition, position)` says.
template <class Inputs, class Which>
auto token_source(const Inputs& in, const options& options, const Which& which) {
  const auto first = first_positions(in, options);
  return view_source(
      in.key, in.value,
      [which, partition = partition_of(options), first, keys = in.key](std::int64_t b, std::int64_t, std::int64_t i) {
        return intersection(which(partition, first(b) + i), {0, keys.length(b)});
      },
      terms_of([first](std::int64_t b) { return row_positions{.first = -first(b), .step = 1}; }, in.key_bias,
               in.query.heads()));
}

/// Rows of `sink_source` of sequence `b`.
template <class Inputs>
auto sink_counts(const Inputs& in, const options& options) {
  return [partition = partition_of(options), keys = in.key](std::int64_t b) {
    return partition.sink_count(keys.length(b));
  };
}

/// The first tokens, which queries see whatever their window. Without sink tokens and prefix there are no rows.
template <class Inputs>
auto sink_source(const Inputs& in, const options& options) {
  const auto tokens = token_source(in, options, [](const partition& p, std::int64_t t) { return p.sinks(t); });
  return source{tokens.heads, sink_counts(in, options), tokens.rows, tokens.visible, tokens.terms};
}

/// The tokens behind those. No token is a row of both for any query, so that each has its turns of adding to gradients.
template <class Inputs>
auto raw_source(const Inputs& in, const options& options) {
  return token_source(in, options, [](const partition& p, std::int64_t t) { return p.raw(t); });
}

/// The far part `[0, seen)` of a caller's rows or of cores.
template <class Key, class Value, class Seen, class Terms>
auto far_source(tensor_view<Key> key, tensor_view<Value> value, Seen seen, Terms terms) {
  return view_source(
      key, value,
      [seen](std::int64_t b, std::int64_t h, std::int64_t i) {
        return range{0, seen(b, h, i)};
      },
      terms);
}

/// A caller's far rows.
template <class Inputs, class Key, class Value, class Bias>
auto seen_source(const Inputs& in, const far_context<Key, Value, Bias>& context, const options& options) {
  return far_source(
      context.key, context.value,
      [seen = context.seen](std::int64_t b, std::int64_t h, std::int64_t i) { return *seen.row(b, h, i); },
      [at = context.positions, bias = context.bias, heads = in.query.heads(), first = first_positions(in, options)](
          std::int64_t b, std::int64_t h) {
        return row_terms<Bias>{
            {-first(b), at.stride[2], shared_row(at, b, h, heads)}, shared_row(bias, b, h, heads), bias.stride[2]};
      });
}

/// Cores, and their biases where they have some. Where nothing is pooled there are none.
template <class T, class Bias>
auto core_source(const cores<T>& rows, tensor_view<const Bias, 3> bias, const options& options, std::int64_t heads) {
  const partition partition = partition_of(options);
  return far_source(
      rows.key, rows.value,
      [partition, key = rows.key](std::int64_t b, std::int64_t, std::int64_t t) {
        return smaller(partition.core_count(t), key.length(b));
      },
      terms_of([partition](std::int64_t) { return core_positions(partition, 0); }, bias, heads));
}

/// Calls `f(std::type_identity<Core>)`, where `Core` is what cores are kept in: what is computed in or, for a matrix unit,
/// what it multiplies. `Element` is the operands' `product_type`.
template <class Element, class F>
decltype(auto) with_core_type(matrix_unit unit, const F& f) {
  if constexpr (is_unit_element<Element>)
    if (chosen_unit<Element>(unit) != matrix_unit::none) return f(std::type_identity<Element>{});
  return f(std::type_identity<compute_type<Element>>{});
}

/// The engine for these queries and sources, of whose heads `head_groups` is the greatest common divisor and `rows(b)` the
/// rows. `Element` is the operands' `product_type`.
template <class Element, class Query, class... Rows>
forward<Element> plan(const sequences& all, const tensor_view<Query>& query, std::int64_t value_dim,
                      std::int64_t head_groups, bool staged, matrix_unit unit, const execution& run,
                      const Rows&... rows) {
  const tile_form form{query.dim(), value_dim, chosen_unit<Element>(unit)};
  return {all, query.heads(), form, head_groups, staged, run.concurrency(), lengths_of(query), rows...};
}

/// Whether what is planned for one of the sequences of these views holds for all.
template <class Query, class... View>
sequences sequences_of(const Query& query, const View&... more) {
  return {query.batch(), !(query.has_lengths() || ... || more.has_lengths())};
}

template <class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class FarBias>
auto attend_plan(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, FarBias>& context,
                 const options& options, const execution& run) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  return plan<product_type<Query, Key, Value, FarKey, FarValue>>(
      sequences_of(in.query, in.key, context.key), in.query, in.value.dim(), gcd(in.key.heads(), context.key.heads()),
      !in_place<T, Key, Value, FarKey, FarValue>, options.unit, run, sink_counts(in, options), lengths_of(context.key),
      lengths_of(in.key));
}

/// The cores of sequence `b` that some query sees: none where nothing is pooled.
template <class Inputs>
auto core_counts(const Inputs& in, const options& options) {
  return [partition = partition_of(options), pooled = pools(options), key = in.key](std::int64_t b) {
    return pooled ? partition.core_count(key.length(b) - 1) : 0;
  };
}

/// Scratch for those cores: `[batch][heads][cores][dim]`, or `[heads][cores of all sequences][dim]` where each sequence has
/// a length of its own.
template <class Core>
struct core_plan {
  sequences all;
  std::int64_t heads, dim, value_dim, longest = 0, rows = 0;
  bool biased;

  template <class Inputs>
  core_plan(const Inputs& in, const options& options)
      : all(sequences_of(in.key)),
        heads(core_head_count(options, in.query.heads(), in.key.heads())),
        dim(in.key.dim()),
        value_dim(in.value.dim()),
        biased(has_core_biases(options)) {
    const auto count = core_counts(in, options);
    for (std::int64_t b = 0; b < all.distinct(); ++b) {
      longest = larger(longest, count(b));
      rows += count(b);
    }
  }

  template <class Row = Core>
  [[nodiscard]] std::size_t bytes() const {
    return scratch_bytes<Row>(elements<Row>(dim)) + scratch_bytes<Row>(elements<Row>(value_dim));
  }
  [[nodiscard]] std::size_t offset_bytes() const { return scratch_bytes<std::int64_t>(offset_count()); }

  /// Where the cores of each sequence begin and, one more, where those of the last end; nothing where all are alike.
  template <class Inputs>
  [[nodiscard]] const std::int64_t* take_offsets(scratch& memory, const Inputs& in, const options& options) const {
    auto* offsets = memory.take<std::int64_t>(offset_count());
    const auto count = core_counts(in, options);
    std::int64_t next = 0;
    for (std::int64_t b = 0; b < offset_count(); ++b) {
      offsets[b] = next;
      if (b < all.batch) next += count(b);
    }
    return all.alike ? nullptr : offsets;
  }

  template <class Row = Core>
  [[nodiscard]] cores<Row> take(scratch& memory, const std::int64_t* offsets) const {
    const tensor_view<Row> key = take_rows<Row>(memory, offsets, dim);
    return {key, take_rows<Row>(memory, offsets, value_dim)};
  }

  /// @{
  /// Of their biases, one per core where they have any; no data where they have none.
  template <class T>
  [[nodiscard]] std::size_t bias_bytes() const {
    return biased ? scratch_bytes<T>(elements<T>(1)) : 0;
  }
  template <class T>
  [[nodiscard]] lse_view<T> take_bias(scratch& memory, const std::int64_t* offsets) const {
    if (!biased) return {};
    const auto [data, extent, stride, begins, ends] = take_rows<T>(memory, offsets, 1);
    return {data, {extent[0], extent[1], extent[2]}, {stride[0], stride[1], stride[2]}, begins, ends};
  }
  /// @}

 private:
  [[nodiscard]] std::int64_t offset_count() const { return all.alike ? 0 : all.batch + 1; }
  template <class Row>
  [[nodiscard]] tensor_view<Row> take_rows(scratch& memory, const std::int64_t* offsets, std::int64_t d) const {
    const tensor_view<Row> view = bhsd(memory.take<Row>(elements<Row>(d)), all.batch, heads, longest, d);
    if (offsets == nullptr) return view;
    return {view.data, view.extent, {0, rows * d, d, 1}, offsets, offsets + 1};
  }
  template <class Row>
  [[nodiscard]] std::int64_t elements(std::int64_t d) const {
    return element_count<Row>(all.copies(), heads, rows, d);
  }
};

/// Scratch of CCA attention: the cores, what pools them, and what attends to them.
template <class Element, class Core>
struct cca_plan {
  using T = compute_type<Element>;
  core_plan<Core> cores;
  pool_plan<T> pooler;
  detail::forward<Element> forward;

  template <class Query, class Key, class Value, class Sink>
  cca_plan(const inputs<Query, Key, Value, Sink>& in, const options& options, const execution& run)
      : cores(in, options),
        pooler(plan_pooling<T>(in, options, run)),
        forward(plan<Element>(sequences_of(in.query, in.key), in.query, cores.value_dim, in.key.heads(),
                              !in_place<T, Key, Value, Core>, options.unit, run, sink_counts(in, options),
                              core_counts(in, options), lengths_of(in.key))) {}

  [[nodiscard]] std::size_t bytes() const {
    return cores.bytes() + cores.template bias_bytes<T>() + cores.offset_bytes() + pooler.bytes() + forward.bytes();
  }
};

/// Operands and options of attention.
template <class Query, class Key, class Value, class Sink>
void require_attention(const inputs<Query, Key, Value, Sink>& in, const options& options) {
  require_options<product_type<Query, Key, Value>>(options);
  require_inputs<compute_type<Query, Key, Value>>(in);
  require_grouping(options);
  pools(options) ? require_query_for_every_key(in.query, in.key, options) : require_positions(options);
  if (pools(options) && given(in.key_bias))
    refuse("key_bias", to_string(in.key_bias.extent), "none: cores stand for several keys, and have no bias of one");
}

/// Operands and options of `attend`.
template <class Query, class Key, class Value, class Sink, class FarKey, class FarValue, class FarBias>
void require_attend(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, FarBias>& context,
                    const options& options) {
  require_options<product_type<Query, Key, Value, FarKey, FarValue>>(options);
  require_grouping(options);
  require_positions(options);
  require_inputs<compute_type<Query, Key, Value, FarKey, FarValue>>(in);
  require_far<compute_type<Query, Key, Value, FarKey, FarValue>>(in, context);
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
  detail::require_sizes(in);
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
  detail::require_sizes(in);
  detail::require_sizes("far.key", context.key);
  detail::require_batch("far.key", in.query, context.key);
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
  detail::require_attention(in, options);
  detail::require_results(in, to);

  detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
    const detail::cca_plan<Element, Core> plan(in, options, run);
    detail::scratch memory(run.workspace(), plan.bytes(), "workspace_size");
    const std::int64_t* offsets = plan.cores.take_offsets(memory, in, options);
    const auto cores = plan.cores.take(memory, offsets);
    const lse_view<T> core_bias = plan.cores.template take_bias<T>(memory, offsets);
    const auto pooler = plan.pooler.take(memory);
    if (detail::pools(options))
      detail::pool_views<T>(in.query, in.key, in.value, cores, core_bias, options, run, pooler);
    const auto rule = detail::make_score_rule<T>(options, in, plan.cores.biased || detail::given(in.key_bias));
    plan.forward(in.query, to.out, to.lse, rule, run, memory, detail::sink_source(in, options),
                 detail::core_source(cores, lse_view<const T>(core_bias), options, in.query.heads()),
                 detail::raw_source(in, options));
  });
}

/// Attention of views, without log-sum-exps.
template <detail::not_inputs Query, class Key, class Value, class Out>
void attention(const Query& query, const Key& key, const Value& value, const Out& out, const options& options = {},
               const execution& run = {}) {
  if constexpr (detail::check_views<Query, Key, Value, Out>())
    attention(inputs{query, key, value}, results{out}, options, run);
}

/// One softmax over far context that the caller made, by any compressor, and the raw window: query i of head h sees the
/// far rows `[0, seen(b, h, i))` and the raw tokens that CCA attention with the same options sees: the window, which
/// reaches back to the start of a group where `group_size` is above 1, and the sink tokens, the first of `key`. An empty
/// key and value leave the far context alone.
///
/// @param in,to,run  as for `attention` without groups, as are errors
/// @param context  its heads divide the query's; every `seen` lies in `[0, far length]`
/// @param options  all but `pool`, `core_heads` and `core_bias`: the caller pools, and gives biases with his far context
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class FarBias = compute_type<FarKey, FarValue>,
          detail::written Out = Query, class Lse = compute_type<Query, Key, Value, FarKey, FarValue>>
void attend(const inputs<Query, Key, Value, Sink>& in, const far_context<FarKey, FarValue, FarBias>& context,
            const results<Out, Lse>& to, const options& options = {}, const execution& run = {}) {
  using T = compute_type<Query, Key, Value, FarKey, FarValue>;
  detail::require_attend(in, context, options);
  detail::require_results(in, to,
                          {{"far.key", context.key},
                           {"far.value", context.value},
                           {"far.seen", context.seen},
                           {"far.bias", context.bias},
                           {"far.positions", context.positions}});

  const auto forward = detail::attend_plan(in, context, options, run);
  detail::scratch memory(run.workspace(), forward.bytes(), "workspace_size");
  const bool biased = detail::given(in.key_bias) || detail::given(context.bias);
  forward(in.query, to.out, to.lse, detail::make_score_rule<T>(options, in, biased), run, memory,
          detail::sink_source(in, options), detail::seen_source(in, context, options), detail::raw_source(in, options));
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
