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
#include "merge.hpp"
#include "mpi/agreement.hpp"
#include "mpi/communicator.hpp"
#include "mpi/exchange.hpp"
#include "mpi/forward.hpp"
#include "mpi/layout.hpp"
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
///   `key_bias` is for each of the rank's keys.
/// @param to  as for `cca::attention`
/// @param options  as there, but for `first_position`; the same on all ranks
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
    detail::check_on_all_ranks(over, same, [&] {
      detail::require_attention<Element>(over, in, options, run);
      detail::require_results(detail::named(in), in.value.dim(), detail::named(to));
      detail::add_call<Element>(same, over, in, options);
    });
    const plan planned(over.tokens, partition_of(options), cca::detail::pools(options));
    cca::detail::with_core_type<Element>(options.unit, [&]<class Core>(std::type_identity<Core>) {
      const detail::rank_call<Element, Core, Query, Key, Value, Sink> call(over.ranks, planned, in, options);
      detail::attend_over_ranks<Element, Core>(call, to, over.overlap, run);
    });
  }
}

}}}  // namespace cca::CCA_TARGET::mpi
