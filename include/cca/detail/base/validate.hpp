#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <numbers>
#include <type_traits>
#include <utility>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../product/choose_unit.hpp"
#include "numbers.hpp"
#include "refuse.hpp"
#include "target.hpp"
#include "validate_selection.hpp"
#include "validate_views.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Those of what attention reads.
template <class Inputs>
void require_sizes(const Inputs& in) {
  require_sizes("query", in.query);
  require_sizes("key", in.key);
  require_sizes("value", in.value);
  require_batch("key", in.query, in.key);
}

/// `heads` key/value heads serve `query_heads`: head `h` uses `h / (query_heads / heads)`.
inline void require_heads(const char* name, std::int64_t heads, std::int64_t query_heads) {
  if (!(heads > 0 ? query_heads % heads == 0 : query_heads == 0))
    refuse(name, to_string(heads) + " heads", "a divisor of the " + to_string(query_heads) + " query heads");
}

/// Key and value, as seen by query: the same batch, heads that divide the query's, equal dims of query and key.
template <class Query, class Key, class Value>
void require_key_value(const char* key_name, const char* value_name, const tensor_view<Query>& query,
                       const tensor_view<Key>& key, const tensor_view<Value>& value) {
  require_operand(key_name, key);
  require_operand(value_name, value);
  require_extents(key_name, key, {query.batch(), key.heads(), key.length(), query.dim()});
  require_heads(key_name, key.heads(), query.heads());
  require_shape(value_name, value, key.heads(), value.dim(), key);
}

/// `Element` is the operands' `product_type`.
template <class Element>
void require_unit(const options& options) {
  const matrix_unit unit = options.unit;
  if (unit == matrix_unit::none || unit == matrix_unit::best) return;
  if (!is_unit_element<Element>)
    refuse("options.unit", option_text(unit), "none: the operands are not all of the same 16-bit type");
  if (!has_unit<Element>(unit))
    refuse("options.unit", option_text(unit), "best, or a unit that this processor has for the operands' type");
}

/// An option with a value that its enumeration has.
template <class Option>
void require_known(const char* name, const Option& option) {
  if constexpr (std::is_enum_v<Option>) {
    constexpr auto names = enumerators(Option{});
    if (static_cast<std::size_t>(option) < names.size()) return;
    text wanted = "";
    for (std::size_t i = 0; i < names.size(); ++i)
      wanted += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + text(names[i]);
    refuse("options." + text(name), option_text(option), wanted);
  }
}

/// An option that this call would ignore.
template <class Option>
void require_unset(const options& options, Option cca::options::*option, const char* reason) {
  if (options.*option == cca::options{}.*option) return;
  for_each_option(options, [&](const char* name, const auto& value) {
    if (static_cast<const void*>(&value) == static_cast<const void*>(&(options.*option)))
      refuse("options." + text(name), option_text(value), option_text(cca::options{}.*option) + ": " + text(reason));
  });
}

/// Options that make sense by themselves. `Element` is the operands' `product_type`: a scale beyond the numbers that it
/// is computed in would turn every score into NaN.
template <class Element>
void require_options(const options& options) {
  using T = compute_type<Element>;
  for_each_option(options, [](const char* name, const auto& option) { require_known(name, option); });
  require_unit<Element>(options);
  if (options.group_size < 0)
    refuse("options.group_size", to_string(options.group_size), "at least 1, or 0 where nothing is pooled");
  if (options.window < 1) refuse("options.window", to_string(options.window), "at least 1");
  const auto require_count = [](const char* name, std::int64_t tokens) {
    if (tokens < 0) refuse(name, to_string(tokens), "at least 0");
  };
  require_count("options.sink_tokens", options.sink_tokens);
  require_count("options.lookahead", options.lookahead);
  require_count("options.prefix", options.prefix);
  // What is computed with is the scale times log2(e).
  constexpr double largest = static_cast<double>(largest_finite<T>) / std::numbers::log2e;
  if (!(magnitude<double>(options.softmax_scale.value_or(0)) <= largest))
    refuse("options.softmax_scale", to_string<double>(*options.softmax_scale),
           "a finite number, at most " + to_string(largest));
  if (options.core_bias != cca::core_bias::none && (options.pool == pooling::max || options.pool == pooling::select))
    refuse("options.core_bias", option_text(options.core_bias), "none: the pooling has no weights");
  if (options.pool != pooling::last_query)
    require_unset(options, &options::pooling_scale, "of the poolings last_query alone has weights to sharpen");
  if (!(0 <= options.pooling_scale &&
        options.pooling_scale * magnitude<double>(options.softmax_scale.value_or(1)) <= largest))
    refuse("options.pooling_scale", to_string(options.pooling_scale),
           "at least 0 and, times the softmax's scale, at most " + to_string(largest));
  if (!(0 <= options.softcap && options.softcap <= static_cast<double>(largest_finite<T>)))
    refuse("options.softcap", to_string(options.softcap), "a finite number above 0, or 0 for none");
}

/// What only cores have a use for.
inline void require_no_pooling(const options& options, const char* reason) {
  require_unset(options, &options::pool, reason);
  require_unset(options, &options::core_heads, reason);
  require_unset(options, &options::core_bias, reason);
  require_unset(options, &options::pooling_scale, reason);
}

/// What dense attention has no use for.
inline void require_dense(const options& options) {
  if (options.group_size > 1) require_unset(options, &options::group_size, "dense attention has no groups");
  require_unset(options, &options::window, "dense attention has no window");
}

/// Queries see no token behind their own.
inline void require_causal(const options& options, const char* reason) {
  require_unset(options, &options::lookahead, reason);
  require_unset(options, &options::prefix, reason);
}

/// Groups without a window would be ignored; those of one token change nothing. So would poolings without groups. Groups
/// are of what came before: attention with them is causal.
inline void require_grouping(const options& options) {
  if (options.group_size == 0) require_no_pooling(options, "nothing is pooled, for options.group_size is 0");
  if (options.group_size > 1 && options.window == unlimited)
    require_unset(options, &options::group_size, "without options.window no query sees a core");
  if (pools(options)) require_causal(options, "with groups attention is causal");
}

/// Positions are exact up to 2^62: the partition adds a group and a window to them.
inline void require_positions(const options& options) {
  const std::int64_t position = options.first_position.value_or(0);
  if (!(-(std::int64_t{1} << 62) <= position && position <= (std::int64_t{1} << 62)))
    refuse("options.first_position", to_string(position), "a position between -2^62 and 2^62");
}

/// A query for every key: the last one of a group weighs it.
template <class Query, class Key>
void require_query_for_every_key(const tensor_view<Query>& query, const tensor_view<Key>& key, const options& options) {
  const bool each = query.has_lengths() || key.has_lengths();
  for (std::int64_t b = 0; b < (each ? query.batch() : 1); ++b) {
    const std::int64_t queries = each ? query.length(b) : query.length(), keys = each ? key.length(b) : key.length();
    if (queries != keys)
      refuse("query", to_string(queries) + " queries" + (each ? " of sequence " + to_string(b) : ""),
             "a query for each of the " + to_string(keys) +
                 " keys, since a group is pooled with its last one; new tokens after old ones are for kv_cache");
  }
  if (options.first_position.value_or(0) != 0)
    refuse("options.first_position", to_string(*options.first_position), "0 or none: there is a query for every key");
}

/// Whether numbers beside the operands are of the type `T` that is computed in; if not, the compiler's message says so.
template <class T, class Numbers>
constexpr bool check_numbers() {
  constexpr bool same = std::is_same_v<std::remove_const_t<Numbers>, T>;
  static_assert(same,
                "cca: sink_logits, alibi_slopes and key_bias are of the type that is computed in: double if an operand "
                "is, otherwise float");
  return same;
}

/// The same of gradients.
template <class T, class Gradient>
constexpr bool check_gradients() {
  constexpr bool same = std::is_same_v<Gradient, T>;
  static_assert(same,
                "cca: gradients are of the type that is computed in: double if an operand is, otherwise float");
  return same;
}

/// A logit for each head, of one sequence or of all, or for each query. `T` is what is computed in.
template <class T, class Query, class Sink>
void require_sink_logits(const tensor_view<Query>& query, const lse_view<Sink>& sink_logits) {
  if (!given(sink_logits)) return;
  require_operand("sink_logits", sink_logits);
  const std::array<std::int64_t, 3>& e = sink_logits.extent;
  const std::int64_t batch = query.batch(), heads = query.heads(), length = query.length();
  if (sink_logits.has_lengths()) return require_shape("sink_logits", sink_logits, heads, 1, query);
  for (const std::array<std::int64_t, 3>& wanted :
       {std::array<std::int64_t, 3>{1, heads, 1}, {batch, heads, 1}, {batch, heads, length}})
    if (e == wanted) {
      if (e[2] != 1) require_shape("sink_logits", sink_logits, heads, 1, query);
      return;
    }
  refuse("sink_logits", to_string(e),
         "[1 or " + to_string(batch) + ", " + to_string(heads) + ", 1] or " + to_string<3>({batch, heads, length}));
}

/// A slope for each head, of one sequence or of all. `T` is what is computed in.
template <class T, class Query, class Slope>
void require_alibi_slopes(const tensor_view<Query>& query, const lse_view<Slope>& slopes) {
  if (!given(slopes)) return;
  require_operand("alibi_slopes", slopes);
  const std::int64_t batch = query.batch(), heads = query.heads();
  const std::array<std::int64_t, 3>& e = slopes.extent;
  if (slopes.has_lengths() || (e != std::array<std::int64_t, 3>{1, heads, 1} &&
                               e != std::array<std::int64_t, 3>{batch, heads, 1}))
    refuse("alibi_slopes", to_string(slopes.extent), "[1 or " + to_string(batch) + ", " + to_string(heads) + ", 1]");
}

/// A number for each of the rows, where they are given: of every sequence or of one for all, of heads that query heads
/// share.
template <class Query, class Number, class Rows>
void require_row_numbers(const char* name, const tensor_view<Query>& query, const lse_view<Number>& numbers,
                         const Rows& rows) {
  if (!given(numbers)) return;
  require_operand(name, numbers);
  require_heads(name, numbers.heads(), query.heads());
  const bool each = numbers.batch() == query.batch();
  if (each && (numbers.has_lengths() || rows.has_lengths()))
    return require_shape(name, numbers, numbers.heads(), 1, rows);
  if ((numbers.batch() != 1 && !each) || numbers.has_lengths() || numbers.length() != rows.length())
    refuse(name, to_string(numbers.extent),
           "[1 or " + to_string(query.batch()) + ", " + to_string(numbers.heads()) + ", " + to_string(rows.length()) + "]");
}

/// What an entry point of attention reads. `T` is what is computed in.
template <class T, class Inputs>
void require_inputs(const Inputs& in) {
  require_operand("query", in.query);
  require_key_value("key", "value", in.query, in.key, in.value);
  require_sink_logits<T>(in.query, in.sink_logits);
  require_alibi_slopes<T>(in.query, in.alibi_slopes);
  require_row_numbers("key_bias", in.query, in.key_bias, in.key);
}

/// Calls `f(b, h, i)` for the rows of a view of three extents.
template <class T, class F>
void for_each_row(const lse_view<T>& view, const F& f) {
  for (std::int64_t b = 0; b < view.batch(); ++b)
    for (std::int64_t h = 0; h < view.heads(); ++h)
      for (std::int64_t i = 0; i < view.length(b); ++i) f(b, h, i);
}

/// Biases and positions of far rows. Distances are for slopes, and theirs alone.
template <class T, class Inputs, class Far>
void require_far_terms(const Inputs& in, const Far& far_rows) {
  require_row_numbers("far.bias", in.query, far_rows.bias, far_rows.key);
  using Bias = std::remove_const_t<typename decltype(far_rows.bias)::element_type>;
  if (!std::is_same_v<Bias, T> && given(far_rows.bias))
    refuse("far.bias", "numbers of " + to_string(sizeof(Bias)) + " bytes",
           "the type that is computed in, of " + to_string(sizeof(T)) + " bytes");
  const lse_view<const std::int64_t>& positions = far_rows.positions;
  require_row_numbers("far.positions", in.query, positions, far_rows.key);
  if (given(positions) && !given(in.alibi_slopes))
    refuse("far.positions", to_string(positions.extent), "none: only alibi_slopes have a use for them");
  if (!given(positions) && given(in.alibi_slopes) && far_rows.key.length() > 0)
    refuse("far.positions", "none", "those of the far rows, for alibi_slopes are given");
  constexpr std::int64_t most = std::int64_t{1} << 61;
  for_each_row(positions, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t position = *positions.row(b, h, i);
    if (!(-most <= position && position <= most))
      refuse("far.positions", to_string(position) + " at " + to_string<3>({b, h, i}),
             "a position between -2^61 and 2^61");
  });
}

/// Whether a far context has more than counts to say who sees it.
template <class Far>
bool says_who_sees(const Far& far_rows) {
  return given(far_rows.visible_from) || given(far_rows.visible_until) || given(far_rows.selected.blocks);
}

/// When far rows are visible, and which of them are selected.
template <class Query, class Far>
void require_far_visible(const tensor_view<Query>& query, const Far& far_rows) {
  require_row_numbers("far.visible_from", query, far_rows.visible_from, far_rows.key);
  require_row_numbers("far.visible_until", query, far_rows.visible_until, far_rows.key);
  require_selection_sizes(far_rows.selected);
  if (!given(far_rows.selected.blocks)) return;
  if (given(far_rows.visible_from) || given(far_rows.visible_until))
    refuse("far.selected.blocks", to_string(far_rows.selected.blocks.extent),
           "none: far.visible_from and far.visible_until say who sees a row");
  require_selection(query, far_rows.key, far_rows.selected);
}

/// A caller's far context of a call. `T` is what is computed in.
template <class T, class Inputs, class Far>
void require_far(const Inputs& in, const Far& far_rows) {
  require_key_value("far.key", "far.value", in.query, far_rows.key, far_rows.value);
  if (far_rows.value.dim() != in.value.dim())
    refuse("far.value", "dim " + to_string(far_rows.value.dim()), "the value's dim " + to_string(in.value.dim()));
  const lse_view<const std::int64_t>& seen = far_rows.seen;
  require_far_visible(in.query, far_rows);
  if (says_who_sees(far_rows) && !given(seen)) return require_far_terms<T>(in, far_rows);
  require_operand("far.seen", seen);
  require_shape("far.seen", seen, in.query.heads(), 1, in.query);
  for_each_row(seen, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t count = *seen.row(b, h, i);
    if (!(0 <= count && count <= far_rows.key.length(b)))
      refuse("far.seen", to_string(count) + " at " + to_string<3>({b, h, i}),
             "a count in [0, " + to_string(far_rows.key.length(b)) + "]");
  });
  require_far_terms<T>(in, far_rows);
}

/// Where a call writes, of the extents that follow from its query.
template <class Query, class Out, class Lse>
void require_results(const tensor_view<Query>& query, std::int64_t value_dim, const tensor_view<Out>& out,
                     const lse_view<Lse>& lse) {
  require_output("out", out);
  require_shape("out", out, query.heads(), value_dim, query);
  if (!given(lse)) return;
  require_output("lse", lse);
  require_shape("lse", lse, query.heads(), 1, query);
}

/// Results, apart from inputs and from `more` that is read.
template <class Inputs, class Results>
void require_results_apart(const Inputs& in, const Results& to, std::initializer_list<named_view> more = {}) {
  require_apart({{"out", to.out}, {"lse", to.lse}}, more);
  require_apart({{"out", to.out}, {"lse", to.lse}}, {{"query", in.query},
                                                     {"key", in.key},
                                                     {"value", in.value},
                                                     {"sink_logits", in.sink_logits},
                                                     {"alibi_slopes", in.alibi_slopes},
                                                     {"key_bias", in.key_bias}});
}

/// Where attention writes. `more` is what it reads beside its inputs.
template <class Inputs, class Results>
void require_results(const Inputs& in, const Results& to, std::initializer_list<named_view> more = {}) {
  require_results(in.query, in.value.dim(), to.out, to.lse);
  require_results_apart(in, to, more);
}

}}}  // namespace cca::CCA_TARGET::detail
