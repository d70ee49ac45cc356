#pragma once

#include <cstdint>
#include <type_traits>

#include "../call.hpp"
#include "../detail/base/numbers.hpp"
#include "../detail/base/scratch.hpp"
#include "../detail/base/target.hpp"
#include "../detail/context/source.hpp"
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

/// The cores as the far context of a call.
template <class Call>
class pooled_cores {
 public:
  /// Also where nothing is pooled, and there are none.
  explicit pooled_cores(const Call& of) : call_(of), all_(of.gather_cores()) {}

  static constexpr bool staged = Call::staged;
  static constexpr std::int64_t queries_at_once = queries_between_progress;

  [[nodiscard]] bool given() const { return call_.pooled; }
  [[nodiscard]] bool biased() const { return call_.biased; }
  [[nodiscard]] std::int64_t head_groups() const { return call_.in.key.heads(); }
  [[nodiscard]] piece_form pieces() const { return {}; }
  [[nodiscard]] auto rows() const { return lengths_of(call_.cores.key); }

  /// @{
  /// Their way to all ranks. Collective.
  void start(const execution& run) {
    call_.pool_own_groups(run);
    call_.start_cores(all_);
  }
  void progress() { all_.progress(); }
  void finish() { call_.finish_cores(all_); }
  /// @}

  /// Calls `f` with them as a source for the queries of a slice.
  template <class F>
  void with_source(query_slice& slice, const F& f) const {
    f(call_.core_source([&slice](std::int64_t b) { return slice.first_position(b); }));
  }

 private:
  const Call& call_;
  gathering all_;
};

/// Answers the queries of a slice over one part of the context.
template <class Element, class Call, class Far, class Out, class Lse>
void attend_slice(const Call& call, const Far& far_rows, query_slice& slice, part_of_context part, tensor_view<Out> out,
                  lse_view<Lse> lse, const execution& run) {
  using T = compute_type<Element>;
  const auto query = slice.of(call.in.query);
  auto rule = make_score_rule<T>(call.options, call.in, far_rows.biased() || call.in.key_bias.data != nullptr);
  if (part == part_of_context::cores)
    rule.sink_logits = {};  // the other part has it
  else if (rule.sink_logits.data != nullptr && rule.sink_logits.length() != 1)
    rule.sink_logits = slice.of(rule.sink_logits);
  const auto first = [&slice](std::int64_t b) { return slice.first_position(b); };
  const auto sinks = call.sink_source(first);
  const auto raw = call.raw_source(first);
  const auto attend = [&](const auto& forward, const auto&... sources) {
    scratch memory({}, forward.bytes());
    forward(query, slice.of(out), slice.of(lse), rule, run, memory, sources...);
  };
  const auto planned = [&](const auto&... rows) {
    return cca::detail::plan<Element>({call.own.size(), false}, query, call.in.value.dim(), far_rows.head_groups(),
                                      far_rows.pieces(), Far::staged, call.options.unit, run, rows...);
  };
  if (part == part_of_context::tokens) return attend(planned(sinks.length, raw.length), sinks, raw);
  far_rows.with_source(slice, [&](const auto& source) {
    if (part == part_of_context::cores)
      attend(planned(far_rows.rows()), source);
    else
      attend(planned(sinks.length, far_rows.rows(), raw.length), sinks, source, raw);
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
      : places(call.own.size(),
               [&](std::int64_t b) {
                 return range{0, call.own[b].tokens.size()};
               }),
        outs(call.in.query.heads() * places.rows() * call.in.value.dim()),
        lses(call.in.query.heads() * places.rows()),
        out(places.view(outs.data(), call.in.query.heads(), call.in.value.dim())),
        lse(places.view(lses.data(), call.in.query.heads())) {}
  partial_results(const partial_results&) = delete;
  partial_results& operator=(const partial_results&) = delete;
};

/// The forward pass of a rank. Collective.
template <class Element, class Call, class Far, class Out, class Lse>
void attend_over_ranks(const Call& call, Far& far_rows, const results<Out, Lse>& to, bool overlap,
                       const execution& run) {
  using T = compute_type<Element>;
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < call.own.size(); ++b) longest = larger(longest, call.own[b].tokens.size());
  const results<Out, Lse> whole{call.own.sized(to.out), to.lse.data == nullptr ? to.lse : call.own.sized(to.lse)};
  query_slice all(call.own, {0, longest});

  call.exchange_tokens();
  if (far_rows.given()) far_rows.start(run);
  if (!far_rows.given() || !overlap || call.ranks.size() == 1) {
    if (far_rows.given()) far_rows.finish();
    return attend_slice<Element>(call, far_rows, all, part_of_context::all, whole.out, whole.lse, run);
  }
  const partial_results<T> window(call), pooled(call);
  for (std::int64_t first = 0; first < longest;) {
    const std::int64_t end = Far::queries_at_once < longest - first ? first + Far::queries_at_once : longest;
    query_slice some(call.own, {first, end});
    attend_slice<Element>(call, far_rows, some, part_of_context::tokens, window.out, window.lse, run);
    far_rows.progress();
    first = end;
  }
  far_rows.finish();
  attend_slice<Element>(call, far_rows, all, part_of_context::cores, pooled.out, pooled.lse, run);
  const results<const T, const T> of_window{window.out, window.lse}, of_cores{pooled.out, pooled.lse};
  if (whole.lse.data != nullptr)
    merge(of_window, of_cores, whole, run);
  else
    merge(of_window, of_cores, results<Out, T>{whole.out, window.lse}, run);
}

}}}}  // namespace cca::CCA_TARGET::mpi::detail
