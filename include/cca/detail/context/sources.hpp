#pragma once

#include <cstdint>

#include "../../call.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "far_visible.hpp"
#include "source.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// What the queries of a call see, as sources of one softmax.

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
      row_views_of(in),
      [which, partition = partition_of(options), first, keys = in.key](std::int64_t b, std::int64_t, std::int64_t i) {
        const range seen = intersection(which(partition, first(b) + i), {0, keys.length(b)});
        return seen.empty() ? range{} : seen;  // bounds of an unlimited prefix are none to count with
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

/// A caller's far rows.
template <class Inputs, class Key, class Value, class Bias>
auto seen_source(const Inputs& in, const far_context<Key, Value, Bias>& context, const options& options) {
  return view_source(
      row_views_of(context), far_visible(context, in.query.heads(), first_positions(in, options)),
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
  return view_source(
      rows.key, rows.value,
      [partition, key = rows.key](std::int64_t b, std::int64_t, std::int64_t t) {
        return range{0, smaller(partition.core_count(t), key.length(b))};
      },
      terms_of([partition](std::int64_t) { return core_positions(partition, 0); }, bias, heads));
}

}}}  // namespace cca::CCA_TARGET::detail
