#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../../call.hpp"
#include "../../element.hpp"
#include "../../options.hpp"
#include "../../tensor_view.hpp"
#include "refuse.hpp"
#include "target.hpp"
#include "validate_options.hpp"
#include "validate_selection.hpp"
#include "validate_views.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What a call reads, the far context of its caller, and where it writes.
struct input_views {
  named_view query, key, value, sink_logits, alibi_slopes, key_bias, key_scales, value_scales;
};
struct far_views {
  named_view key, value, seen, bias, positions, visible_from, visible_until, blocks, key_scales, value_scales;
  far_selection selected;
};
struct result_views {
  output_view out, lse;
};

/// @{
/// An argument's views by their names.
template <class... T>
input_views named(const inputs<T...>& in) {
  return {{"query", in.query},
          {"key", in.key},
          {"value", in.value},
          {"sink_logits", in.sink_logits},
          {"alibi_slopes", in.alibi_slopes},
          {"key_bias", in.key_bias},
          {"key_scales", in.key_scales},
          {"value_scales", in.value_scales}};
}
template <class... T>
far_views named(const far_context<T...>& context) {
  return {{"far.key", context.key},
          {"far.value", context.value},
          {"far.seen", context.seen},
          {"far.bias", context.bias},
          {"far.positions", context.positions},
          {"far.visible_from", context.visible_from},
          {"far.visible_until", context.visible_until},
          {"far.selected.blocks", context.selected.blocks},
          {"far.key_scales", context.key_scales},
          {"far.value_scales", context.value_scales},
          context.selected};
}
template <class... T>
result_views named(const results<T...>& to) {
  return {{"out", to.out}, {"lse", to.lse}};
}
/// @}

/// Those of what attention reads.
inline void require_sizes(const input_views& in) {
  require_sizes(in.query);
  require_sizes(in.key);
  require_sizes(in.value);
  require_batch(in.query, in.key);
}
inline void require_sizes(const input_views& in, const far_views& far_rows) {
  require_sizes(in);
  require_sizes(far_rows.key);
  require_batch(in.query, far_rows.key);
  require_selection_sizes(far_rows.blocks, far_rows.selected);
}

/// `heads` key/value heads serve `query_heads`: head `h` uses `h / (query_heads / heads)`.
inline void require_heads(const char* name, std::int64_t heads, std::int64_t query_heads) {
  if (!(heads > 0 ? query_heads % heads == 0 : query_heads == 0))
    refuse(name, {heads, " heads"}, {"a divisor of the ", query_heads, " query heads"});
}

/// A scale for each of the rows where these are of 8 bits, otherwise none.
inline void require_scales(const named_view& rows, const named_view& scales) {
  if (rows.element_size != sizeof(q8)) {
    if (given(scales)) refuse(scales.name, {scales.extents()}, {"none: ", rows.name, " has no elements of 8 bits"});
    return;
  }
  if (!given(scales) && !rows.empty())
    refuse(scales.name, {"none"}, {"a scale for each row of ", rows.name, ", of 8 bits"});
  if (!given(scales)) return;
  require_operand(scales);
  require_shape(scales, rows.heads(), 1, rows);
}

/// Key and value, as seen by query: the same batch, heads that divide the query's, equal dims of query and key. `in` are
/// views of inputs or a far context.
template <class Views>
void require_key_value(const named_view& query, const Views& in) {
  const named_view &key = in.key, &value = in.value;
  require_operand(key);
  require_operand(value);
  require_extents(key, {query.batch(), key.heads(), key.length(), query.dim()});
  require_heads(key.name, key.heads(), query.heads());
  require_shape(value, key.heads(), value.dim(), key);
  require_scales(key, in.key_scales);
  require_scales(value, in.value_scales);
}

/// An optional view that this call has no use for.
inline void require_none(const named_view& view, const char* reason) {
  if (given(view)) refuse(view.name, {view.extents()}, {"none: ", reason});
}

/// A query for every key: the last one of a group weighs it.
inline void require_query_for_every_key(const named_view& query, const named_view& key, const options& options) {
  const bool each = query.has_lengths() || key.has_lengths();
  for (std::int64_t b = 0; b < (each ? query.batch() : 1); ++b) {
    const std::int64_t queries = each ? query.length(b) : query.length(), keys = each ? key.length(b) : key.length();
    if (queries == keys) continue;
    text got{queries, " queries"};
    if (each) got += {" of sequence ", b};
    refuse("query", {got.c_str()},
           {"a query for each of the ", keys,
            " keys, since a group is pooled with its last one; new tokens after old ones are for kv_cache"});
  }
  if (options.first_position.value_or(0) != 0)
    refuse("options.first_position", {*options.first_position}, {"0 or none: there is a query for every key"});
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

/// A logit for each head, of one sequence or of all, or for each query.
inline void require_sink_logits(const named_view& query, const named_view& sink_logits) {
  if (!given(sink_logits)) return;
  require_operand(sink_logits);
  const std::int64_t batch = query.batch(), heads = query.heads(), length = query.length();
  if (sink_logits.has_lengths()) return require_shape(sink_logits, heads, 1, query);
  for (const std::array<std::int64_t, 4>& wanted :
       {std::array<std::int64_t, 4>{1, heads, 1, 1}, {batch, heads, 1, 1}, {batch, heads, length, 1}})
    if (sink_logits.extent == wanted) {
      if (sink_logits.length() != 1) require_shape(sink_logits, heads, 1, query);
      return;
    }
  refuse("sink_logits", {sink_logits.extents()},
         {"[1 or ", batch, ", ", heads, ", 1] or ", std::array{batch, heads, length}});
}

/// A slope for each head, of one sequence or of all.
inline void require_alibi_slopes(const named_view& query, const named_view& slopes) {
  if (!given(slopes)) return;
  require_operand(slopes);
  const std::int64_t batch = query.batch(), heads = query.heads();
  if (slopes.has_lengths() || slopes.heads() != heads || slopes.length() != 1 ||
      (slopes.batch() != 1 && slopes.batch() != batch))
    refuse("alibi_slopes", {slopes.extents()}, {"[1 or ", batch, ", ", heads, ", 1]"});
}

/// A number for each of the rows, where they are given: of every sequence or of one for all, of heads that query heads
/// share.
inline void require_row_numbers(const named_view& query, const named_view& numbers, const named_view& rows) {
  if (!given(numbers)) return;
  require_operand(numbers);
  require_heads(numbers.name, numbers.heads(), query.heads());
  const bool each = numbers.batch() == query.batch();
  if (each && (numbers.has_lengths() || rows.has_lengths())) return require_shape(numbers, numbers.heads(), 1, rows);
  if ((numbers.batch() != 1 && !each) || numbers.has_lengths() || numbers.length() != rows.length())
    refuse(numbers.name, {numbers.extents()},
           {"[1 or ", query.batch(), ", ", numbers.heads(), ", ", rows.length(), "]"});
}

/// What an entry point of attention reads.
inline void require_inputs(const input_views& in) {
  require_operand(in.query);
  require_key_value(in.query, in);
  require_sink_logits(in.query, in.sink_logits);
  require_alibi_slopes(in.query, in.alibi_slopes);
  require_row_numbers(in.query, in.key_bias, in.key);
}

/// Calls `f(number, b, h, i)` for the numbers of a view of whole numbers.
template <class F>
void for_each_number(const named_view& view, const F& f) {
  const auto& [batches, heads, tokens, one] = view.stride;
  const lse_view<const std::int64_t> numbers{static_cast<const std::int64_t*>(view.data),
                                             {view.batch(), view.heads(), view.length()},
                                             {batches, heads, tokens},
                                             view.begins,
                                             view.ends};
  for (std::int64_t b = 0; b < view.batch(); ++b)
    for (std::int64_t h = 0; h < view.heads(); ++h)
      for (std::int64_t i = 0; i < view.length(b); ++i) f(*numbers.row(b, h, i), b, h, i);
}

/// Biases and positions of far rows. Distances are for slopes, and theirs alone.
inline void require_far_terms(const input_views& in, const far_views& far_rows, std::size_t number_size) {
  require_row_numbers(in.query, far_rows.bias, far_rows.key);
  if (far_rows.bias.element_size != number_size && given(far_rows.bias))
    refuse("far.bias", {"numbers of ", far_rows.bias.element_size, " bytes"},
           {"the type that is computed in, of ", number_size, " bytes"});
  const named_view& positions = far_rows.positions;
  require_row_numbers(in.query, positions, far_rows.key);
  if (!given(in.alibi_slopes)) require_none(positions, "only alibi_slopes have a use for them");
  if (!given(positions) && given(in.alibi_slopes) && far_rows.key.length() > 0)
    refuse("far.positions", {"none"}, {"those of the far rows, for alibi_slopes are given"});
  constexpr std::int64_t most = std::int64_t{1} << 61;
  for_each_number(positions, [&](std::int64_t position, std::int64_t b, std::int64_t h, std::int64_t i) {
    if (!(-most <= position && position <= most))
      refuse("far.positions", {position, " at ", std::array{b, h, i}}, {"a position between -2^61 and 2^61"});
  });
}

/// When far rows are visible, and the sizes of what is selected of them.
inline void require_far_visible(const named_view& query, const far_views& far_rows) {
  require_row_numbers(query, far_rows.visible_from, far_rows.key);
  require_row_numbers(query, far_rows.visible_until, far_rows.key);
  require_selection_sizes(far_rows.blocks, far_rows.selected);
  if (!given(far_rows.blocks)) return;
  if (given(far_rows.visible_from) || given(far_rows.visible_until))
    require_none(far_rows.blocks, "far.visible_from and far.visible_until say who sees a row");
}

/// Which of the rows of `key` are selected and how many are seen: what can be said where they are all known.
inline void require_far_counts(const named_view& query, const far_views& far_rows, const named_view& key) {
  if (given(far_rows.blocks)) require_selection(query, key, far_rows.blocks, far_rows.selected);
  for_each_number(far_rows.seen, [&](std::int64_t count, std::int64_t b, std::int64_t h, std::int64_t i) {
    if (!(0 <= count && count <= key.length(b)))
      refuse("far.seen", {count, " at ", std::array{b, h, i}}, {"a count in [0, ", key.length(b), "]"});
  });
}

/// A caller's far context of a call, which computes in numbers of this many bytes, but for its counts.
inline void require_far_shapes(const input_views& in, const far_views& far_rows, std::size_t number_size) {
  require_key_value(in.query, far_rows);
  if (far_rows.value.dim() != in.value.dim())
    refuse("far.value", {"dim ", far_rows.value.dim()}, {"the value's dim ", in.value.dim()});
  require_far_visible(in.query, far_rows);
  const named_view& seen = far_rows.seen;
  const bool counts = given(seen) || !(given(far_rows.visible_from) || given(far_rows.visible_until) || given(far_rows.blocks));
  if (counts) {
    require_operand(seen);
    require_shape(seen, in.query.heads(), 1, in.query);
  }
  require_far_terms(in, far_rows, number_size);
}

/// All of it.
inline void require_far(const input_views& in, const far_views& far_rows, std::size_t number_size) {
  require_far_shapes(in, far_rows, number_size);
  require_far_counts(in.query, far_rows, far_rows.key);
}

/// Where attention writes: of the extents that follow from its query, apart from its inputs and from `more` that it reads.
inline void require_results(const input_views& in, std::int64_t value_dim, const result_views& to,
                            std::initializer_list<named_memory> more = {}) {
  const auto& [out, lse] = to;
  require_output(out);
  require_shape(out, in.query.heads(), value_dim, in.query);
  if (given(lse)) {
    require_output(lse);
    require_shape(lse, in.query.heads(), 1, in.query);
  }
  require_apart({out, lse}, more);
  require_apart({out, lse}, {in.key_scales, in.value_scales});
  require_apart({out, lse}, {in.query, in.key, in.value, in.sink_logits, in.alibi_slopes, in.key_bias});
}

}}}  // namespace cca::CCA_TARGET::detail
