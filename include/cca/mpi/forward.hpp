#pragma once

#include <cstdint>
#include <type_traits>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/base/target.hpp"
#include "../detail/engine/plan.hpp"
#include "../detail/softmax/score_rule.hpp"
#include "../element.hpp"
#include "../merge.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../tensor_view.hpp"
#include "exchange.hpp"
#include "rank_call.hpp"
#include "rows.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi { namespace detail {

/// Queries of each segment that are answered before MPI is asked again whether it has something to do.
inline constexpr std::int64_t queries_between_progress = 2048;

/// Which sources take part in a softmax.
enum class part_of_context { all, tokens, cores };

/// Answers the queries of a slice over one part of the context.
template <class Element, class Call, class Out, class Lse>
void attend_slice(const Call& call, query_slice& slice, part_of_context part, tensor_view<Out> out, lse_view<Lse> lse,
                  const execution& run) {
  using T = compute_type<Element>;
  const auto query = slice.of(call.in.query);
  auto rule = make_score_rule<T>(call.options, call.in, call.biased || call.in.key_bias.data != nullptr);
  if (part == part_of_context::cores)
    rule.sink_logits = {};  // the other part has it
  else if (rule.sink_logits.data != nullptr && rule.sink_logits.length() != 1)
    rule.sink_logits = slice.of(rule.sink_logits);
  const auto attend = [&](const auto&... sources) {
    const auto forward = cca::detail::plan<Element>({call.own.size(), false}, query, call.in.value.dim(), call.in.key.heads(), {},
                                       Call::staged, call.options.unit, run, sources.length...);
    scratch memory({}, forward.bytes());
    forward(query, slice.of(out), slice.of(lse), rule, run, memory, sources...);
  };
  call.with_sources([&slice](std::int64_t b) { return slice.first_position(b); },
                    [&](const auto& sinks, const auto& cores, const auto& raw) {
                      if (part == part_of_context::all) attend(sinks, cores, raw);
                      if (part == part_of_context::tokens) attend(sinks, raw);
                      if (part == part_of_context::cores) attend(cores);
                    });
}

/// Results of a part, in the type that is computed in.
template <class T>
struct partial_results {
  row_places places;
  buffer<T> outs, lses;
  tensor_view<T> out;
  lse_view<T> lse;

  template <class Call>
  explicit partial_results(const Call& call)
      : places(call.own.size(), [&](std::int64_t b) { return range{0, call.own[b].tokens.size()}; }),
        outs(call.in.query.heads() * places.rows() * call.in.value.dim()),
        lses(call.in.query.heads() * places.rows()),
        out(places.view(outs.data(), call.in.query.heads(), call.in.value.dim())),
        lse(places.view(lses.data(), call.in.query.heads())) {}
  partial_results(const partial_results&) = delete;
  partial_results& operator=(const partial_results&) = delete;
};

/// The forward pass of a rank. Collective.
template <class Element, class Core, class Call, class Out, class Lse>
void attend_over_ranks(const Call& call, const results<Out, Lse>& to, bool overlap, const execution& run) {
  using T = compute_type<Element>;
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < call.own.size(); ++b) longest = larger(longest, call.own[b].tokens.size());
  const results<Out, Lse> whole{call.own.sized(to.out), to.lse.data == nullptr ? to.lse : call.own.sized(to.lse)};
  query_slice all(call.own, {0, longest});

  call.exchange_tokens();
  if (!call.pooled) return attend_slice<Element>(call, all, part_of_context::all, whole.out, whole.lse, run);
  call.pool_own_groups(run);
  gathering cores = call.gather_cores();
  call.start_cores(cores);
  if (!overlap || call.ranks.size() == 1) {
    call.finish_cores(cores);
    return attend_slice<Element>(call, all, part_of_context::all, whole.out, whole.lse, run);
  }
  const partial_results<T> window(call), pooled(call);
  for (std::int64_t first = 0; first < longest; first += queries_between_progress) {
    query_slice some(call.own, {first, first + queries_between_progress});
    attend_slice<Element>(call, some, part_of_context::tokens, window.out, window.lse, run);
    cores.progress();
  }
  call.finish_cores(cores);
  attend_slice<Element>(call, all, part_of_context::cores, pooled.out, pooled.lse, run);
  if (whole.lse.data != nullptr)
    merge(results<const T, const T>{window.out, window.lse}, results<const T, const T>{pooled.out, pooled.lse}, whole, run);
  else
    merge(results<const T, const T>{window.out, window.lse}, results<const T, const T>{pooled.out, pooled.lse},
          results<Out, T>{whole.out, window.lse}, run);
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
