#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <numbers>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../product/choose_unit.hpp"
#include "refuse.hpp"
#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The largest distance in elements between two of the view's, or nothing when it does not fit 63 bits.
template <class T, std::size_t Rank>
std::optional<std::int64_t> reach(const tensor_view<T, Rank>& view) {
  // Long double holds every product of two 63-bit numbers closely enough to tell whether it fits.
  long double total = 0;
  for (std::size_t i = 0; i < Rank; ++i)
    total += std::fabs(static_cast<long double>(view.stride[i])) * static_cast<long double>(view.extent[i] - 1);
  if (total * sizeof(T) >= 0x1p62L) return std::nullopt;
  return static_cast<std::int64_t>(total);
}

/// Whether rows, tasks and bytes of memory can be counted, also those of a view without elements or with strides of 0.
template <class T, std::size_t Rank>
bool countable(const tensor_view<T, Rank>& view) {
  long double bytes = sizeof(T);
  for (const std::int64_t e : view.extent) bytes *= static_cast<long double>(std::max<std::int64_t>(e, 1));
  return bytes < 0x1p62L;
}

/// Extents for which scratch memory can be planned. Rows of up to 2^31 elements leave room for the many of them that a
/// worker holds.
template <class T, std::size_t Rank>
void require_sizes(const char* name, const tensor_view<T, Rank>& view) {
  for (const std::int64_t e : view.extent)
    if (e < 0) refuse(name, "extents " + to_string(view.extent), "none below 0");
  if constexpr (Rank == 4)
    if (view.dim() < 1) refuse(name, "dim " + std::to_string(view.dim()), "a dim of at least 1");
  if (!countable(view)) refuse(name, "extents " + to_string(view.extent), "fewer than 2^62 bytes of elements");
  if constexpr (Rank == 4)
    if (view.dim() > std::int64_t{1} << 31) refuse(name, "dim " + std::to_string(view.dim()), "a dim of at most 2^31");
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
  static_assert(!std::is_const_v<T>, "an output's elements are mutable");
  require_operand(name, view);
  if (view.empty()) return;
  std::array<std::pair<std::int64_t, std::int64_t>, Rank> dims;
  for (std::size_t i = 0; i < Rank; ++i)  // the stride of a single element, which may be any number, leads nowhere
    dims[i] = {view.extent[i] == 1 ? 0 : std::abs(view.stride[i]), view.extent[i]};
  std::sort(dims.begin(), dims.end());
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
    refuse(name, std::to_string(heads) + " heads", "a divisor of the " + std::to_string(query_heads) + " query heads");
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
  if (unit == matrix_unit::none) return;
  const char* const names[] = {"none", "best", "avx512_bf16", "amx"};
  const auto number = static_cast<std::size_t>(unit);
  if (number >= std::size(names)) refuse("options.unit", std::to_string(number), "none, best, avx512_bf16 or amx");
  if (!is_unit_element<Element>)
    refuse("options.unit", names[number], "none: the operands are not all of the same 16-bit type");
  if (unit != matrix_unit::best && !has_unit<Element>(unit))
    refuse("options.unit", names[number], "best, or a unit that this processor has for the operands' type");
}

/// `T` is what is computed in: a scale beyond its numbers would turn every score into NaN.
template <class T>
void require_options(const options& options) {
  if (options.group_size < 1) refuse("options.group_size", std::to_string(options.group_size), "at least 1");
  if (options.window < 1) refuse("options.window", std::to_string(options.window), "at least 1");
  if (!(options.pool == pooling::last_query || options.pool == pooling::mean || options.pool == pooling::max))
    refuse("options.pool", std::to_string(static_cast<int>(options.pool)), "last_query, mean or max");
  if (!(options.core_heads == core_heads::per_query_head || options.core_heads == core_heads::per_kv_head))
    refuse("options.core_heads", std::to_string(static_cast<int>(options.core_heads)), "per_query_head or per_kv_head");
  // What is computed with is the scale times log2(e).
  if (const double scale = std::abs(options.softmax_scale.value_or(0));
      !(scale * std::numbers::log2e <= static_cast<double>(std::numeric_limits<T>::max())))
    refuse("options.softmax_scale", std::to_string(*options.softmax_scale),
           "a number below " + std::to_string(std::numeric_limits<T>::max() / std::numbers::log2e));
}

/// An option that this entry point would ignore.
inline void require_unused(bool unused, const char* option, const char* reason) {
  if (!unused) refuse(option, "a value other than the default", reason);
}

/// Groups without a window would be ignored.
inline void require_grouping(const options& options) {
  require_unused(options.group_size == 1 || options.window != unlimited, "options.group_size",
                 "1 where no window is set: without one nothing is pooled");
}

template <class Query, class Out, class Lse>
void require_results(const tensor_view<Query>& query, std::int64_t value_dim, const tensor_view<Out>& out,
                     const lse_view<Lse>& lse) {
  require_output("out", out);
  require_extents("out", out, {query.batch(), query.heads(), query.length(), value_dim});
  static_assert(std::is_floating_point_v<Lse>, "lse is float or double");
  const bool wanted = lse.data != nullptr || lse.extent != std::array<std::int64_t, 3>{};
  if (!wanted) return;
  require_output("lse", lse);
  require_extents("lse", lse, {query.batch(), query.heads(), query.length()});
}

/// Positions are exact up to 2^62: the partition adds a group and a window to them.
inline void require_positions(const options& options) {
  const std::int64_t position = options.first_position.value_or(0);
  if (!(-(std::int64_t{1} << 62) <= position && position <= (std::int64_t{1} << 62)))
    refuse("options.first_position", std::to_string(position), "a position between -2^62 and 2^62");
}

inline void require_seen(const lse_view<const std::int64_t>& seen, std::int64_t length) {
  for (std::int64_t b = 0; b < seen.batch(); ++b)
    for (std::int64_t h = 0; h < seen.heads(); ++h)
      for (std::int64_t i = 0; i < seen.length(); ++i) {
        const std::int64_t count = *seen.row(b, h, i);
        if (!(0 <= count && count <= length))
          refuse("far.seen", std::to_string(count) + " at " + to_string<3>({b, h, i}),
                 "a count in [0, " + std::to_string(length) + "]");
      }
}

}}}  // namespace cca::CCA_TARGET::detail
