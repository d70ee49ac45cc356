#pragma once

#include <cstdint>
#include <exception>
#include <type_traits>

#include "../attention.hpp"
#include "../call.hpp"
#include "../detail/base/validate.hpp"
#include "../detail/product/choose_unit.hpp"
#include "../options.hpp"
#include "../partition.hpp"
#include "../pooling.hpp"
#include "../tensor_view.hpp"
#include "agreement.hpp"
#include "communicator.hpp"
#include "layout.hpp"

namespace cca { inline namespace CCA_TARGET { namespace mpi {

/// The first arguments of every call: who computes, and who holds what. Refers to both.
struct context_parallel {
  const communicator& ranks;  ///< all of which make the call
  const layout& tokens;       ///< of as many ranks, the same on all
  /// Whether cores travel while the window's part is computed. The parts are then merged by their log-sum-exps, which
  /// rounds once more; otherwise there is one softmax, as in one process.
  bool overlap = true;
};

namespace detail {

/// One sequence for each of the rank's segments, as long as it.
inline void require_segments(const context_parallel& over, const named_view& view) {
  const range own = over.tokens.segments_of(over.ranks.rank());
  if (view.batch() != own.size())
    refuse(view.name, {view.batch(), " sequences"}, {"one for each of the rank's ", own.size(), " segments"});
  for (std::int64_t b = 0; b < own.size(); ++b) {
    const std::int64_t wanted = over.tokens.segments()[static_cast<std::size_t>(own.begin + b)].tokens.size();
    const std::int64_t got = view.has_lengths() ? view.length(b) : view.length();
    if (got != wanted)
      refuse(view.name, {got, " tokens in sequence ", b},
             {"those of the rank's segment ", b, " of the layout, ", wanted});
  }
}

inline void require_layout(const context_parallel& over) {
  if (over.tokens.ranks() != over.ranks.size())
    refuse("layout", {"one for ", over.tokens.ranks(), " ranks"}, {"one for the communicator's ", over.ranks.size()});
}

/// Whose the numbers of a view are: those of a rank's heads, or of its queries. Only other ranks can tell, where this one has
/// one query.
template <class T>
number_form form_of(const context_parallel& over, const tensor_view<T, 3>& numbers) {
  if (!given(numbers)) return number_form::none;
  if (numbers.batch() != 1 || numbers.length() != 1 || numbers.has_lengths()) return number_form::for_queries;
  const bool one_query =
      over.tokens.segments_of(over.ranks.rank()).size() == 1 && over.tokens.tokens_of(over.ranks.rank()) == 1;
  return one_query ? number_form::either : number_form::for_heads;
}

/// Of numbers that are always those of heads.
template <class T>
number_form form_for_heads(const tensor_view<T, 3>& numbers) {
  return given(numbers) ? number_form::for_heads : number_form::none;
}

/// Numbers that all ranks share: a segment's own would have to be those of its sequence on other ranks.
inline void require_shared(const named_view& numbers, const char* otherwise) {
  if (given(numbers) && (numbers.batch() != 1 || numbers.length() != 1 || numbers.has_lengths()))
    refuse(numbers.name, {numbers.extents()},
           {"one number for each head, [1, heads, 1], the same on every rank", otherwise});
}

inline void require_no_workspace(const execution& run) {
  if (!run.workspace().empty())
    refuse("workspace", {run.workspace().size(), " bytes"},
           {"none: messages and halos are as large as the layout says"});
}

/// Groups are pooled where their last tokens are; later queries, which lie on other ranks, are not asked.
inline void require_unobserved(const options& options) {
  if (observes(options.pool))
    refuse("options.pool", {option_text(options.pool)},
           {"another pooling across ranks: the queries that select a token lie on several"});
}

/// The tokens of a call of attention, as far as one rank can tell, and its options.
template <class Element, class Query, class Key, class Value, class Sink>
void require_tokens(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in, const options& options,
                    const execution& run) {
  const auto views = named(in);
  require_layout(over);
  require_no_workspace(run);
  require_options<Element>(options);
  require_unobserved(options);
  require_grouping(options);
  require_inputs(views);
  require_unset(options, &cca::options::first_position, "positions are those of the layout");
  require_segments(over, views.query);
  require_segments(over, views.key);
  require_shared(views.alibi_slopes, "");
  if (given(views.key_bias))
    require_extents(views.key_bias, {in.key.batch(), in.key_bias.heads(), in.key_bias.length(), 1});
  if (form_of(over, in.sink_logits) != number_form::for_queries) return;
  if (views.sink_logits.batch() != in.query.batch() || (views.sink_logits.length() == 1 && in.query.length() > 1))
    require_shared(views.sink_logits, ", or one for each query");
}

/// Operands and options of attention across ranks, as far as one rank can tell.
template <class Element, class Query, class Key, class Value, class Sink>
void require_attention(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in, const options& options,
                       const execution& run) {
  require_tokens<Element>(over, in, options, run);
  cca::detail::require_attention(named(in), options);
}

/// The same of pooling.
template <class Element, class Query, class Key, class Value, class Sink>
void require_pool(const context_parallel& over, const inputs<Query, Key, Value, Sink>& in, const options& options,
                  const execution& run) {
  const auto views = named(in);
  require_layout(over);
  require_no_workspace(run);
  require_options<Element>(options);
  require_unobserved(options);
  cca::detail::require_pool(views, options);
  require_segments(over, views.query);
  require_segments(over, views.key);
}

/// The cores of the groups whose last token a segment has.
inline void require_own_cores(const context_parallel& over, const input_views& in, const output_view& key,
                              const output_view& value, const options& options) {
  const partition by = partition_of(options);
  const range own = over.tokens.segments_of(over.ranks.rank());
  const std::int64_t heads = core_head_count(options, in.query.heads(), in.key.heads());
  for (const output_view* view : {&key, &value}) {
    require_output(*view);
    require_extents(*view, {own.size(), heads, view->length(), view == &key ? in.key.dim() : in.value.dim()});
    for (std::int64_t b = 0; b < own.size(); ++b) {
      const range tokens = over.tokens.segments()[static_cast<std::size_t>(own.begin + b)].tokens;
      const std::int64_t groups = tokens.empty() ? 0 : by.group_count(tokens.end) - by.group_count(tokens.begin);
      const std::int64_t got = view->has_lengths() ? view->length(b) : view->length();
      if (got != groups)
        refuse(view->name, {got, " cores of segment ", b},
               {"those of the ", groups, " groups whose last token it has"});
    }
  }
  require_apart({key, value}, {in.query, in.key, in.value});
}

/// What has to be the same on all ranks.
template <class Element, class Query, class Key, class Value, class Sink>
void add_call(agreement& same, const context_parallel& over, const inputs<Query, Key, Value, Sink>& in,
              const options& options) {
  same.add("layout", over.tokens.fingerprint(), hidden_number);
  same.add("overlap", over.overlap);
  same.add_elements<Query, Key, Value>("elements of query, key and value");
  same.add(options);
  same.add("matrix unit", static_cast<std::int64_t>(chosen_unit<Element>(options.unit)));
  same.add("query heads", in.query.heads());
  same.add("key heads", in.key.heads());
  same.add("dim of query and key", in.query.dim());
  same.add("dim of value", in.value.dim());
  same.add_shared("sink_logits", in.sink_logits, form_of(over, in.sink_logits));
  same.add_shared("alibi_slopes", in.alibi_slopes, form_for_heads(in.alibi_slopes));
  same.add("heads of key_bias", in.key_bias.heads());
}

/// Runs the checks of this rank, and throws on all ranks what one of them has found. Collective.
template <class Checks>
void check_on_all_ranks(const communicator& ranks, agreement& same, const Checks& checks) {
  try {
    checks();
  } catch (const std::exception& why) {
    same.fail(why);
  }
  same.compare(ranks);
}

}  // namespace detail
}}}  // namespace cca::CCA_TARGET::mpi
