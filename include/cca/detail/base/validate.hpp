#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <numbers>
#include <optional>
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

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The largest distance in elements between two of the view's, or nothing when it does not fit 63 bits.
template <class T, std::size_t Rank>
std::optional<std::int64_t> reach(const tensor_view<T, Rank>& view) {
  // Long double holds every product of two 63-bit numbers closely enough to tell whether it fits.
  long double total = 0;
  for (std::size_t i = 0; i < Rank; ++i)
    total += magnitude(static_cast<long double>(view.stride[i])) * static_cast<long double>(view.extent[i] - 1);
  if (total * sizeof(T) >= 0x1p62L) return std::nullopt;
  return static_cast<std::int64_t>(total);
}

/// Whether rows, tasks and bytes of memory can be counted, also those of a view without elements or with strides of 0.
template <class T, std::size_t Rank>
bool countable(const tensor_view<T, Rank>& view) {
  long double bytes = sizeof(T);
  for (const std::int64_t e : view.extent) bytes *= static_cast<long double>(larger<std::int64_t>(e, 1));
  return bytes < 0x1p62L;
}

/// Extents for which scratch memory can be planned. Rows of up to 2^31 elements leave room for the many of them that a
/// worker holds.
template <class T, std::size_t Rank>
void require_sizes(const char* name, const tensor_view<T, Rank>& view) {
  for (const std::int64_t e : view.extent)
    if (e < 0) refuse(name, "extents " + to_string(view.extent), "none below 0");
  if constexpr (Rank == 4)
    if (view.dim() < 1) refuse(name, "dim " + to_string(view.dim()), "a dim of at least 1");
  if (!countable(view)) refuse(name, "extents " + to_string(view.extent), "fewer than 2^62 bytes of elements");
  if constexpr (Rank == 4)
    if (view.dim() > std::int64_t{1} << 31) refuse(name, "dim " + to_string(view.dim()), "a dim of at most 2^31");
}

/// Those of what attention reads.
template <class Inputs>
void require_sizes(const Inputs& in) {
  require_sizes("query", in.query);
  require_sizes("key", in.key);
  require_sizes("value", in.value);
}

/// A view that can be read: extents, strides and pointer make sense.
template <class T, std::size_t Rank>
void require_operand(const char* name, const tensor_view<T, Rank>& view) {
  require_sizes(name, view);
  if constexpr (Rank == 4)
    if (view.stride[3] != 1) refuse(name, "strides " + to_string(view.stride), "an inner stride of 1");
  if (view.empty()) return;
  if (view.data == nullptr) refuse(name, "a null pointer", "elements " + to_string(view.extent));
  if (!reach(view).has_value())
    refuse(name, "extents " + to_string(view.extent) + " with strides " + to_string(view.stride),
           "offsets below 2^62 bytes");
}

/// A view that can be written: no two of its elements may share memory, or threads would race for it. Sorted by
/// stride, each dimension has to step over all that the smaller ones reach; every permuted or padded layout does.
template <class T, std::size_t Rank>
void require_output(const char* name, const tensor_view<T, Rank>& view) {
  static_assert(!std::is_const_v<T>, "cca: an output's elements are mutable");
  require_operand(name, view);
  if (view.empty()) return;
  struct dimension {
    std::int64_t stride, extent;
  } dims[Rank];
  for (std::size_t i = 0; i < Rank; ++i) {
    // The stride of a single element, which may be any number, leads nowhere.
    const dimension next{view.extent[i] == 1 ? 0 : magnitude(view.stride[i]), view.extent[i]};
    std::size_t place = i;
    for (; place > 0 && dims[place - 1].stride > next.stride; --place) dims[place] = dims[place - 1];
    dims[place] = next;
  }
  std::int64_t covered = 0;
  for (const auto& [stride, extent] : dims) {
    if (extent == 1) continue;
    if (stride <= covered)
      refuse(name, "strides " + to_string(view.stride) + " for extents " + to_string(view.extent),
             "elements that do not overlap");
    covered += stride * (extent - 1);
  }
}

template <class T, std::size_t Rank>
void require_extents(const char* name, const tensor_view<T, Rank>& view, const std::array<std::int64_t, Rank>& wanted) {
  if (view.extent != wanted) refuse(name, to_string(view.extent), "extents " + to_string(wanted));
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
  require_extents(value_name, value, {key.batch(), key.heads(), key.length(), value.dim()});
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
  // What is computed with is the scale times log2(e).
  constexpr double largest = static_cast<double>(largest_finite<T>) / std::numbers::log2e;
  if (!(magnitude<double>(options.softmax_scale.value_or(0)) <= largest))
    refuse("options.softmax_scale", to_string<double>(*options.softmax_scale),
           "a finite number, at most " + to_string(largest));
  if (options.pool != pooling::last_query)
    require_unset(options, &options::pooling_scale, "of the poolings last_query alone has weights to sharpen");
  if (!(0 <= options.pooling_scale &&
        options.pooling_scale * magnitude<double>(options.softmax_scale.value_or(1)) <= largest))
    refuse("options.pooling_scale", to_string(options.pooling_scale),
           "a finite number of at least 0, and times the softmax's scale at most " + to_string(largest));
  if (!(0 <= options.softcap && options.softcap <= static_cast<double>(largest_finite<T>)))
    refuse("options.softcap", to_string(options.softcap), "a finite number above 0, or 0 for none");
}

/// What only cores have a use for.
inline void require_no_pooling(const options& options, const char* reason) {
  require_unset(options, &options::pool, reason);
  require_unset(options, &options::core_heads, reason);
  require_unset(options, &options::pooling_scale, reason);
}

/// What dense attention has no use for.
inline void require_dense(const options& options) {
  if (options.group_size > 1) require_unset(options, &options::group_size, "dense attention has no groups");
  require_unset(options, &options::window, "dense attention has no window");
}

/// Groups without a window would be ignored; those of one token change nothing. So would poolings without groups.
inline void require_grouping(const options& options) {
  if (options.group_size == 0) require_no_pooling(options, "nothing is pooled, for options.group_size is 0");
  if (options.group_size > 1 && options.window == unlimited)
    require_unset(options, &options::group_size, "without options.window no query sees a core");
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
  if (query.length() != key.length())
    refuse("query", to_string(query.length()) + " queries",
           "a query for each of the " + to_string(key.length()) +
               " keys, since a group is pooled with its last one; new tokens after old ones are for kv_cache");
  if (options.first_position.value_or(0) != 0)
    refuse("options.first_position", to_string(*options.first_position), "0 or none: there is a query for every key");
}

/// Whether an optional view was given.
template <class T, std::size_t Rank>
bool given(const tensor_view<T, Rank>& view) {
  return view.data != nullptr || view.extent != std::array<std::int64_t, Rank>{};
}

/// A logit for each head, of one sequence or of all, or for each query. `T` is what is computed in.
template <class T, class Query, class Sink>
void require_sink_logits(const tensor_view<Query>& query, const lse_view<Sink>& sink_logits) {
  if (!given(sink_logits)) return;
  static_assert(std::is_same_v<std::remove_const_t<Sink>, T>,
                "cca: sink_logits are of the type that is computed in: double if an operand is, otherwise float");
  require_operand("sink_logits", sink_logits);
  const std::array<std::int64_t, 3>& e = sink_logits.extent;
  const std::int64_t batch = query.batch(), heads = query.heads(), length = query.length();
  for (const std::array<std::int64_t, 3>& wanted :
       {std::array<std::int64_t, 3>{1, heads, 1}, {batch, heads, 1}, {batch, heads, length}})
    if (e == wanted) return;
  refuse("sink_logits", to_string(e),
         "[1 or " + to_string(batch) + ", " + to_string(heads) + ", 1] or " + to_string<3>({batch, heads, length}));
}

/// What an entry point of attention reads. `T` is what is computed in.
template <class T, class Inputs>
void require_inputs(const Inputs& in) {
  require_operand("query", in.query);
  require_key_value("key", "value", in.query, in.key, in.value);
  require_sink_logits<T>(in.query, in.sink_logits);
}

/// A caller's far context of a call.
template <class Inputs, class Far>
void require_far(const Inputs& in, const Far& far_rows) {
  require_key_value("far.key", "far.value", in.query, far_rows.key, far_rows.value);
  if (far_rows.value.dim() != in.value.dim())
    refuse("far.value", "dim " + to_string(far_rows.value.dim()), "the value's dim " + to_string(in.value.dim()));
  const lse_view<const std::int64_t>& seen = far_rows.seen;
  require_operand("far.seen", seen);
  require_extents("far.seen", seen, {in.query.batch(), in.query.heads(), in.query.length()});
  for (std::int64_t b = 0; b < seen.batch(); ++b)
    for (std::int64_t h = 0; h < seen.heads(); ++h)
      for (std::int64_t i = 0; i < seen.length(); ++i) {
        const std::int64_t count = *seen.row(b, h, i);
        if (!(0 <= count && count <= far_rows.key.length()))
          refuse("far.seen", to_string(count) + " at " + to_string<3>({b, h, i}),
                 "a count in [0, " + to_string(far_rows.key.length()) + "]");
      }
}

/// Where a call writes, of the extents that follow from its query.
template <class Query, class Out, class Lse>
void require_results(const tensor_view<Query>& query, std::int64_t value_dim, const tensor_view<Out>& out,
                     const lse_view<Lse>& lse) {
  require_output("out", out);
  require_extents("out", out, {query.batch(), query.heads(), query.length(), value_dim});
  if (!given(lse)) return;
  require_output("lse", lse);
  require_extents("lse", lse, {query.batch(), query.heads(), query.length()});
}

/// A view by its name in refusals.
struct named_view {
  const char* name;
  const void* data;  ///< null where there is nothing

  template <class T, std::size_t Rank>
  named_view(const char* n, const tensor_view<T, Rank>& view) : name(n), data(view.empty() ? nullptr : view.data) {}
};

/// What is written shares no memory with what is read or written beside it, as far as the first elements tell: whether
/// views overlap otherwise is for the caller to see to.
inline void require_apart(std::initializer_list<named_view> written, std::initializer_list<named_view> read) {
  const auto require = [](const named_view& a, const named_view& b) {
    if (a.data != nullptr && a.data == b.data) refuse(a.name, "the memory of " + text(b.name), "memory of its own");
  };
  for (const named_view* a = written.begin(); a != written.end(); ++a) {
    for (const named_view& b : read) require(*a, b);
    for (const named_view* b = written.begin(); b != a; ++b) require(*a, *b);
  }
}

/// Results, apart from inputs and from `more` that is read.
template <class Inputs, class Results>
void require_results_apart(const Inputs& in, const Results& to, std::initializer_list<named_view> more = {}) {
  require_apart({{"out", to.out}, {"lse", to.lse}}, more);
  require_apart({{"out", to.out}, {"lse", to.lse}},
                {{"query", in.query}, {"key", in.key}, {"value", in.value}, {"sink_logits", in.sink_logits}});
}

/// Where attention writes. `more` is what it reads beside its inputs.
template <class Inputs, class Results>
void require_results(const Inputs& in, const Results& to, std::initializer_list<named_view> more = {}) {
  require_results(in.query, in.value.dim(), to.out, to.lse);
  require_results_apart(in, to, more);
}

}}}  // namespace cca::CCA_TARGET::detail
