#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "detail/matrix_units.hpp"
#include "partition.hpp"
#include "tensor_view.hpp"

namespace cca::inline CCA_TARGET {

/// How a group becomes a core token. Source: arXiv 2412.12465, section 3.1; `mean` and `max` (elementwise) are the
/// paper's ablations.
enum class pooling {
  last_query,  ///< weights `softmax_j(scale * q_last . k_j)`, `q_last` the query of the group's last token
  mean,
  max
};

/// Under grouped-query attention, who has cores of its own. `mean` and `max` pooling do not depend on the query, so
/// their cores are always per key/value head.
enum class core_heads {
  per_query_head,  ///< as in the authors' code
  per_kv_head  ///< weights by the mean of the query heads that share the key/value head: that many times fewer cores
};

/// What multiplies operands of 16 bits. By default nothing but the vectors of floats, exactly as if floats were stored. A
/// matrix unit is much faster; it multiplies the elements as they are stored and adds in float, so that what lies between
/// two products, the cores and the weights of the softmax, is rounded to the operands' 16 bits, and denormals of bfloat16
/// are taken for zeros. The softmax itself is computed in float.
enum class matrix_unit {
  none,         ///< products of floats
  best,         ///< the fastest of those below that the processor has and the operating system allows, otherwise `none`
  avx512_bf16,  ///< for bfloat16
  amx           ///< tiles, for bfloat16, and on processors that have them for half
};

/// Settings of every entry point. The defaults mean plain causal attention.
struct options {
  std::int64_t group_size = 1;                    ///< tokens per core, g >= 1
  std::int64_t window = unlimited;                ///< tokens that stay raw, s >= 1; counts the current one
  pooling pool = pooling::last_query;             ///< see `pooling`
  core_heads cores = core_heads::per_query_head;  ///< see `core_heads`
  std::optional<double> softmax_scale{};          ///< default `1 / sqrt(dim)` of query and key
  std::optional<std::int64_t> first_position{};   ///< position of query 0; default: the last query is the last key
  matrix_unit unit = matrix_unit::none;           ///< for operands that are all bfloat16 or all half, see `matrix_unit`
};

namespace detail {

/// The text is made only for a refusal: checks that pass allocate nothing.
[[noreturn]] inline void refuse(const std::string& argument, const std::string& got, const std::string& wanted) {
  throw std::invalid_argument("cca: " + argument + ": got " + got + ", wants " + wanted);
}

template <std::size_t Rank>
std::string to_string(const std::array<std::int64_t, Rank>& numbers) {
  std::string text = "[";
  for (std::size_t i = 0; i < Rank; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

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

/// A view that can be read: extents, strides and pointer make sense.
template <class T, std::size_t Rank>
void require_operand(const char* name, const tensor_view<T, Rank>& view) {
  for (const std::int64_t e : view.extent)
    if (e < 0) refuse(name, "extents " + to_string(view.extent), "none below 0");
  if constexpr (Rank == 4) {
    if (view.dim() < 1) refuse(name, "dim " + std::to_string(view.dim()), "a dim of at least 1");
    if (view.stride[3] != 1) refuse(name, "strides " + to_string(view.stride), "an inner stride of 1");
  }
  if (!countable(view)) refuse(name, "extents " + to_string(view.extent), "fewer than 2^62 bytes of elements");
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

/// Whether this processor multiplies such elements with the unit.
template <class Element>
[[nodiscard]] bool has_unit(matrix_unit unit) {
  const matrix_units& units = present_units();
  if (unit == matrix_unit::amx) return is_bfloat16<Element> ? units.amx_bf16 : is_half<Element> && units.amx_fp16;
  return unit == matrix_unit::avx512_bf16 && is_bfloat16<Element> && units.avx512_bf16;
}

/// The unit that `wanted` means for operands whose `product_type` is `Element`: never `best`.
template <class Element>
[[nodiscard]] matrix_unit chosen_unit(matrix_unit wanted) {
  if (wanted != matrix_unit::best) return wanted;
  for (const matrix_unit unit : {matrix_unit::amx, matrix_unit::avx512_bf16})
    if (has_unit<Element>(unit)) return unit;
  return matrix_unit::none;
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
  if (!(options.cores == core_heads::per_query_head || options.cores == core_heads::per_kv_head))
    refuse("options.cores", std::to_string(static_cast<int>(options.cores)), "per_query_head or per_kv_head");
  if (options.softmax_scale)
    if (!(std::abs(*options.softmax_scale) <= static_cast<double>(std::numeric_limits<T>::max())))
      refuse("options.softmax_scale", std::to_string(*options.softmax_scale), "a finite number");
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

inline double softmax_scale(const options& options, std::int64_t dim) {
  return options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
}

/// Position of query 0. `query_length` queries end with the last of `key_length` keys unless the caller says otherwise.
inline std::int64_t first_position(const options& options, std::int64_t query_length, std::int64_t key_length) {
  return options.first_position.value_or(key_length - query_length);
}

/// Whose cores there are, see `core_heads`.
inline std::int64_t core_head_count(const options& options, std::int64_t query_heads, std::int64_t kv_heads) {
  const bool per_query = options.pool == pooling::last_query && options.cores == core_heads::per_query_head;
  return per_query ? query_heads : kv_heads;
}

}  // namespace detail

/// The unit that `matrix_unit::best` means for operands of these elements on this processor.
template <class Element>
[[nodiscard]] matrix_unit best_unit() {
  return detail::chosen_unit<std::remove_const_t<Element>>(matrix_unit::best);
}

}  // namespace cca::inline CCA_TARGET
