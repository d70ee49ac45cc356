#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../call.hpp"
#include "../../element.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../pooling.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/refuse.hpp"
#include "../base/scratch.hpp"
#include "../context/sources.hpp"
#include "../context/tasks.hpp"
#include "../pool/pooler.hpp"
#include "../product/choose_unit.hpp"
#include "forward.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

// How much memory a call takes, and how its work is cut, before anything is computed.

/// Calls `f(std::type_identity<Core>)`, where `Core` is what cores are kept in: what is computed in or, for a matrix unit,
/// what it multiplies. `Element` is the operands' `product_type`.
template <class Element, class F>
decltype(auto) with_core_type(matrix_unit unit, const F& f) {
  if constexpr (is_unit_element<Element>)
    if (unit != matrix_unit::vnni && chosen_unit<Element>(unit) != matrix_unit::none)
      return f(std::type_identity<Element>{});
  return f(std::type_identity<compute_type<Element>>{});
}

/// The engine for these queries and sources, of whose heads `head_groups` is the greatest common divisor and `rows(b)` what
/// their `most_seen` says. `Element` is the operands' `product_type`.
template <class Element, class Query, class... Rows>
forward<Element> plan(const sequences& all, const tensor_view<Query>& query, std::int64_t value_dim,
                      std::int64_t head_groups, const piece_form& pieces, bool staged, matrix_unit unit,
                      const execution& run, const Rows&... rows) {
  constexpr std::int64_t most_of_bytes = 65536;  // their sums have 32 bits
  if (unit == matrix_unit::vnni && query.dim() > most_of_bytes)
    refuse("query", {"the dim ", query.dim()}, {"at most ", most_of_bytes, " with options.unit vnni"});
  const tile_form form{query.dim(), value_dim, chosen_unit<Element>(unit)};
  return {all,    query.heads(),     form,              head_groups, pieces,
          staged, run.concurrency(), lengths_of(query), {rows...}};
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
      pieces_of(in, context), staged<T>(in.key, in.value, context.key, context.value), options.unit, run, sink_counts(in, options),
      most_far_rows(context), raw_counts(in, options));
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
        forward(plan<Element>(sequences_of(in.query, in.key), in.query, cores.value_dim, in.key.heads(), {},
                              !in_place<T, Core> || staged<T>(in.key, in.value), options.unit, run, sink_counts(in, options),
                              core_counts(in, options), raw_counts(in, options))) {}

  [[nodiscard]] std::size_t bytes() const {
    return cores.bytes() + cores.template bias_bytes<T>() + cores.offset_bytes() + pooler.bytes() + forward.bytes();
  }
};

}}}  // namespace cca::CCA_TARGET::detail
