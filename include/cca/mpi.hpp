#pragma once

/// @file
/// The library across the ranks of a communicator: each holds some tokens of every sequence, and all of them together get
/// what one process would. Not included by `cca.hpp`, since it needs MPI.

#include <cstdint>
#include <exception>
#include <type_traits>

#include "attention.hpp"
#include "call.hpp"
#include "detail/base/scratch.hpp"
#include "detail/base/validate.hpp"
#include "detail/engine/plan.hpp"
#include "detail/softmax/score_rule.hpp"
#include "element.hpp"
#include "gradient.hpp"
#include "merge.hpp"
#include "mpi/agreement.hpp"
#include "mpi/backward.hpp"
#include "mpi/communicator.hpp"
#include "mpi/exchange.hpp"
#include "mpi/far_rows.hpp"
#include "mpi/forward.hpp"
#include "mpi/kv_cache.hpp"
#include "mpi/layout.hpp"
#include "mpi/merge.hpp"
#include "mpi/plan.hpp"
#include "mpi/rank_call.hpp"
#include "mpi/validate.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi {

/// `cca::attention` of sequences that lie across ranks. Collective: every rank calls it with its own tokens, and gets the
/// results of its own queries.
///
/// Each rank gets the raw tokens that its queries see, those of the window and of a group before its segments and the sink
/// tokens, from whoever holds them; it pools the groups whose last token it has and gives their cores to all, while it
/// computes the window's part. Without groups and without a window every key and value goes to every rank that sees it.
///
/// @param over  the ranks and the layout
/// @param in  a sequence for each of the rank's segments, see `layout`; a query for every key. `sink_logits` are
///   `[1, query heads, 1]`, the same on all ranks, or one for each query; `alibi_slopes` are `[1, query heads, 1]`;
///   `key_bias` is for each of the rank's keys. Sink logits of a rank with one query are what they are on the other ranks; where
///   all have one query at most, those of heads, unless the view has lengths.
/// @param to  as for `cca::attention`
/// @param options  as there, but for `first_position` and the pooling `select_by_mass`; the same on all ranks
/// @param run  an executor, without a workspace; the results are bitwise the same for any. With `over.overlap` off, and in
///   segments of more than 12 tokens, they are those of one process to the bit as well.
/// @throws std::invalid_argument  before anything is sent or written, and the same on every rank: where arguments are
///   refused on one, or differ between two
/// @throws cca::mpi::error  where MPI fails
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          cca::detail::written Out = Query, class Lse = compute_type<Query, Key, Value>>
void attention(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& to,
               const options& options = {}, const execution& run = {}) {
  using Element = cca::detail::product_type<Query, Key, Value>;
  if constexpr (cca::detail::check_numbers<compute_type<Element>, Sink>()) {
    detail::agreement same("attention");
    detail::check_on_all_ranks(over.ranks, same, [&] {
      detail::require_attention<Element>(over, in, options, run);
      detail::require_results(detail::named(in), in.value.dim(), detail::named(to));
      detail::add_call<Element>(same, over, in, options);
    });
    const plan planned(over.tokens, partition_of(options), cca::detail::pools(options));
    cca::detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
      const detail::rank_call<Element, Core, Query, Key, Value, Sink> call(over.ranks, planned, in, options);
      detail::pooled_cores cores(call);
      detail::attend_over_ranks<Element>(call, cores, to, over.overlap, run);
    });
  }
}

/// `cca::attend` across ranks. Collective: far context that the callers made, of which each rank gives the rows of its
/// segments to all.
///
/// @param over,in,to,run  as for `attention`
/// @param context  a sequence for each of the rank's segments: its far rows, and their biases, positions and bounds. The
///   rows of a sequence are numbered over all ranks, in the order of their segments' tokens; so count `seen` and
///   `selected`, which are for the rank's own queries. A segment without tokens has none.
/// @param options  as for `cca::attend`, but for `first_position`; the same on all ranks
/// @throws std::invalid_argument,cca::mpi::error  as `attention`
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class FarKey = Query, class FarValue = FarKey, class FarBias = compute_type<FarKey, FarValue>,
          cca::detail::written Out = Query, class Lse = compute_type<Query, Key, Value, FarKey, FarValue>>
void attend(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in,
            const far_context<FarKey, FarValue, FarBias>& context, const results<Out, Lse>& to,
            const options& options = {}, const execution& run = {}) {
  using Element = cca::detail::product_type<Query, Key, Value, FarKey, FarValue>;
  using T = compute_type<Element>;
  if constexpr (cca::detail::check_numbers<T, Sink>()) {
    const auto far_rows = detail::named(context);
    detail::agreement same("attend");
    detail::check_on_all_ranks(over.ranks, same, [&] {
      const auto views = detail::named(in);
      detail::require_tokens<Element>(over, in, options, run);
      detail::require_no_pooling(options, "the caller pools");
      detail::require_own_far(over, views, far_rows, sizeof(T));
      detail::require_results(views, in.value.dim(), detail::named(to),
                              {far_rows.key, far_rows.value, far_rows.seen, far_rows.bias, far_rows.positions,
                               far_rows.visible_from, far_rows.visible_until, far_rows.blocks});
      detail::add_call<Element>(same, over, in, options);
      detail::add_far<FarKey, FarValue>(same, far_rows);
    });
    const detail::far_counts counts(over, far_rows.key);
    detail::agreement rows("attend, when far rows are counted");
    detail::check_on_all_ranks(over.ranks, rows, [&] {
      detail::require_far_counts(detail::named(in).query, far_rows, counts.all_rows(far_rows.key));
    });
    const plan planned(over.tokens, partition_of(options), false);
    const detail::rank_call<Element, T, Query, Key, Value, Sink> call(over.ranks, planned, in, options);
    detail::spread_far_rows far_part(call, counts, context);
    detail::attend_over_ranks<Element>(call, far_part, to, over.overlap && !detail::given(far_rows.blocks), run);
  }
}

/// Gradients of `attention` across ranks. Collective: every rank gets those of its own queries, keys and values. What the
/// queries of other ranks say of them is added in the order of the segments in the layout, its own among them, so that the
/// sums are the same for any timing of messages.
///
/// @param over,in,options,run  those of the forward pass
/// @param of,from,to  as for `cca::attention_gradient`, of the rank's own queries and tokens. Those of `sink_logits` and
///   `alibi_slopes` that all ranks share are added up over the ranks, in their order, and written on all.
/// @throws std::invalid_argument,cca::mpi::error  as `attention`
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          class Out = const Query, class Lse = const compute_type<Query, Key, Value>,
          class GradOut = std::remove_const_t<Out>, class GradLse = std::remove_const_t<Lse>,
          class T = compute_type<Query, Key, Value>>
void attention_gradient(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in,
                        const results<Out, Lse>& of, const incoming<GradOut, GradLse>& from, const gradients<T>& to,
                        const options& options = {}, const execution& run = {}) {
  using Element = cca::detail::product_type<Query, Key, Value>;
  if constexpr (cca::detail::check_numbers<compute_type<Element>, Sink>() &&
                cca::detail::check_gradients<compute_type<Element>, T>()) {
    detail::agreement same("attention_gradient");
    detail::check_on_all_ranks(over.ranks, same, [&] {
      const auto views = detail::named(in);
      const auto read = detail::named(of, from);
      const auto grad = detail::named(to);
      detail::require_attention<Element>(over, in, options, run);
      cca::detail::require_differentiable(options);
      detail::require_read(views, read);
      detail::require_no_far_gradients(grad);
      detail::require_gradients(views, grad, {read.out, read.lse, read.grad_out, read.grad_lse});
      detail::add_call<Element>(same, over, in, options);
      same.add("grad_sink_logits", detail::given(grad.sink_logits), detail::yes_or_no);
      same.add("grad_alibi_slopes", detail::given(grad.alibi_slopes), detail::yes_or_no);
      same.add("grad_key_bias", detail::given(grad.key_bias), detail::yes_or_no);
    });
    const plan planned(over.tokens, partition_of(options), cca::detail::pools(options));
    cca::detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
      const detail::rank_call<Element, Core, Query, Key, Value, Sink> call(over.ranks, planned, in, options);
      detail::differentiate_over_ranks<Element>(call, of, from, to, same.shared("sink_logits"), run);
    });
  }
}

/// `cca::pool` across ranks. Collective: a group is pooled on the rank that holds its last token.
///
/// @param over  the ranks and the layout
/// @param in  as for `attention`, without `sink_logits`, `alibi_slopes` and `key_bias`
/// @param to  `[segments, core heads, groups, dim]` and the same with the value's dim: for each of the rank's segments the
///   cores of the groups whose last token it has, `plan::of_pooling(layout, partition_of(options))[i].groups` of segment i
/// @param options,run  as for `cca::pool`, without a workspace
/// @throws std::invalid_argument,cca::mpi::error  as `attention`
template <class Query = float, class Key = Query, class Value = Key, class Sink = compute_type<Query, Key, Value>,
          cca::detail::written CoreKey = Key, cca::detail::written CoreValue = Value>
void pool(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in, const cores<CoreKey, CoreValue>& to,
          const options& options, const execution& run = {}) {
  using Element = cca::detail::product_type<Query, Key, Value>;
  using T = compute_type<Element>;
  detail::agreement same("pool");
  detail::check_on_all_ranks(over.ranks, same, [&] {
    detail::require_pool<Element>(over, in, options, run);
    detail::require_own_cores(over, detail::named(in), {"core_key", to.key}, {"core_value", to.value}, options);
    detail::add_call<Element>(same, over, in, options);
  });
  const plan planned = plan::of_pooling(over.tokens, partition_of(options));
  const detail::rank_call<Element, T, Query, Key, Value, Sink> call(over.ranks, planned, in, options);
  call.exchange_tokens();
  call.pool_own_groups(run, [&](std::int64_t b, std::int64_t h, std::int64_t c) {
    const std::int64_t i = c - call.planned_of(b).groups.begin;
    return detail::core_place{to.key.row(b, h, i), to.value.row(b, h, i), static_cast<T*>(nullptr)};
  });
}

/// Joins the results of the same queries to the parts of a context that the ranks have: `cca::merge` of all of them, in the
/// order of the ranks. Collective; every rank gets the same bits.
///
/// @param ranks  whose parts they are
/// @param part  this rank's, `[batch, heads, length, dim]` and natural logarithms; one whose `lse` is -inf is empty
/// @param whole  of the same extents on all ranks, written whole; `lse` may be missing. It overlaps no part.
/// @throws std::invalid_argument,cca::mpi::error  as `attention`
template <class Part = const float, class PartLse = const compute_type<Part>, class Out = std::remove_const_t<Part>,
          class Lse = compute_type<Part>>
void merge(const communicator& ranks, const results<Part, PartLse>& part, const results<Out, Lse>& whole) {
  detail::agreement same("merge");
  detail::check_on_all_ranks(ranks, same, [&] {
    const detail::named_view out("out_part", part.out), lse("lse_part", part.lse);
    const auto to = detail::named(whole);
    detail::require_operand(out);
    detail::require_operand(lse);
    detail::require_shape(lse, out.heads(), 1, out);
    detail::require_output(to.out);
    detail::require_shape(to.out, out.heads(), out.dim(), out);
    if (detail::given(to.lse)) {
      detail::require_output(to.lse);
      detail::require_shape(to.lse, out.heads(), 1, out);
    }
    detail::require_apart({to.out, to.lse}, {out, lse});
    same.add_elements<Part, PartLse, Out, Lse>("elements of the results");
    same.add("sequences", out.batch());
    same.add("heads", out.heads());
    same.add("dim", out.dim());
    same.add_lengths("lengths of out_part", out);
  });
  detail::merge_over_ranks(ranks, part, whole);
}

}}}  // namespace cca::CCA_TARGET::mpi
