#pragma once

#include <cstdint>

#include "../../call.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "far_visible.hpp"
#include "source.hpp"
#include "tasks.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// What the queries of a call see, as sources of one softmax.

/// `first(b)`: the position of query 0 of sequence `b`.
template <class Inputs>
auto first_positions(const Inputs& in, const options& options) {
  return [options, queries = in.query, keys = in.key](std::int64_t b) {
    return first_position(options, queries.length(b), keys.length(b));
  };
}

/// Who sees the tokens of the keys: query `i` those of `which(partition, position)`. Its bounds never fall from one position to
/// the next.
template <class Query, class Key, class Which>
class token_visible {
 public:
  token_visible(tensor_view<Query> query, tensor_view<Key> key, const options& options, Which which)
      : query_(query), key_(key), options_(options), which_(which) {}

  [[nodiscard]] range operator()(std::int64_t b, std::int64_t, std::int64_t i) const {
    const range seen = bounds(b, i, i);
    return seen.empty() ? range{} : seen;  // bounds of an unlimited prefix are none to count with
  }

  /// Tokens that are cut into parts: of few queries those from the first that one of them sees to the last, which with a window
  /// are few, too.
  [[nodiscard]] std::int64_t most(std::int64_t b) const {
    const std::int64_t queries = query_.length(b);
    if (queries > most_few_queries) return key_.length(b);
    return queries == 0 ? 0 : bounds(b, 0, queries - 1).size();
  }

 private:
  /// From the first token that query `first` sees to the last that query `last` sees.
  [[nodiscard]] range bounds(std::int64_t b, std::int64_t first, std::int64_t last) const {
    const partition partition = partition_of(options_);
    const std::int64_t position = first_position(options_, query_.length(b), key_.length(b));
    return intersection({which_(partition, position + first).begin, which_(partition, position + last).end},
                        {0, key_.length(b)});
  }

  tensor_view<Query> query_;
  tensor_view<Key> key_;
  options options_;
  Which which_;
};

/// The tokens that queries see raw as `which` says, see `token_visible`.
template <class Inputs, class Which>
auto token_source(const Inputs& in, const options& options, const Which& which) {
  return view_source(row_views_of(in), token_visible(in.query, in.key, options, which),
                     terms_of([first = first_positions(in, options)](
                                  std::int64_t b) { return row_positions{.first = -first(b), .step = 1}; },
                              in.key_bias, in.query.heads()));
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

/// Rows of `raw_source` of sequence `b` that are cut into parts.
template <class Inputs>
auto raw_counts(const Inputs& in, const options& options) {
  return [visible = raw_source(in, options).visible](std::int64_t b) { return visible.most(b); };
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
