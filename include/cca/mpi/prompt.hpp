#pragma once

#include <cstddef>
#include <cstdint>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/target.hpp"
#include "../detail/pool/pooler.hpp"
#include "../element.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "exchange.hpp"
#include "plan.hpp"
#include "rank_call.hpp"
#include "rows.hpp"
#include "validate.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

// A prompt that lies across ranks, on its way into a cache.

/// Pools the groups of a prompt where their last tokens are, and calls `take(sequence, group, message)` on every rank for
/// the cores of all of them. Collective.
template <class Core, class Query, class Element, class Sink, class Take>
void gather_prompt_cores(const context_parallel& over, const inputs<Query, Element, Element, Sink>& in,
                         const options& options, const execution& run, const Take& take) {
  using T = compute_type<Element>;
  using Product = product_type<Query, Element>;
  const plan planned = plan::of_pooling(over.tokens, partition_of(options));
  const rank_call<Product, Core, Query, Element, Element, Sink> call(over.ranks, planned, in, options);
  const held_rows<Core, Core, T> pooled(
      row_places(call.own.size(), [&](std::int64_t b) { return call.planned_of(b).groups; }), call.core_heads,
      in.key.dim(), in.value.dim(), has_core_biases(options) ? call.core_heads : 0);
  call.exchange_tokens();
  call.pool_own_groups(run, [&](std::int64_t b, std::int64_t h, std::int64_t c) {
    const std::int64_t i = c - pooled.places.first(b);
    return core_place{pooled.key.row(b, h, i), pooled.value.row(b, h, i),
                      pooled.bias.data == nullptr ? nullptr : pooled.bias.row(b, h, i)};
  });
  const std::int64_t bytes = bytes_of_row(pooled.key, pooled.value, pooled.bias);
  gathering all(over.ranks, over.tokens, bytes, [&](std::int64_t i) { return planned[i].groups.size(); });
  std::byte* to = all.own();
  for (std::int64_t b = 0; b < call.own.size(); ++b)
    to = put_rows(to, b, shifted(call.planned_of(b).groups, -pooled.places.first(b)), pooled.key, pooled.value,
                  pooled.bias);
  all.start();
  all.finish([&](std::int64_t i, const std::byte* from) {
    for (std::int64_t c = planned[i].groups.begin; c < planned[i].groups.end; ++c, from += bytes)
      take(over.tokens.segments()[static_cast<std::size_t>(i)].sequence, c, from);
  });
}

/// Calls `take(sequence, token, message)` on every rank for the tokens `kept` and the first `sinks` of every sequence.
/// Collective.
template <class Query, class Element, class Sink, class Take>
void gather_prompt_tokens(const context_parallel& over, const inputs<Query, Element, Element, Sink>& in,
                          std::int64_t sinks, range kept, const Take& take) {
  const auto each = [&](std::int64_t i, const auto& f) {
    const segment& s = over.tokens.segments()[static_cast<std::size_t>(i)];
    for (const range some : {intersection(s.tokens, {0, sinks}), intersection(s.tokens, kept)})
      if (!some.empty()) f(s, some);
  };
  const std::int64_t bytes = bytes_of_row(in.key, in.value);
  gathering all(over.ranks, over.tokens, bytes, [&](std::int64_t i) {
    std::int64_t count = 0;
    each(i, [&](const segment&, range some) { count += some.size(); });
    return count;
  });
  std::byte* to = all.own();
  const range own = over.tokens.segments_of(over.ranks.rank());
  for (std::int64_t i = own.begin; i < own.end; ++i)
    each(i, [&](const segment& s, range some) {
      to = put_rows(to, i - own.begin, shifted(some, -s.tokens.begin), in.key, in.value);
    });
  all.start();
  all.finish([&](std::int64_t i, const std::byte* from) {
    each(i, [&](const segment& s, range some) {
      for (std::int64_t t = some.begin; t < some.end; ++t, from += bytes) take(s.sequence, t, from);
    });
  });
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
