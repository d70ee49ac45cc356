#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "detail/base/refuse.hpp"
#include "detail/base/target.hpp"
#include "partition.hpp"

namespace cca { inline namespace CCA_TARGET {

/// How a group becomes a core token. Source: arXiv 2412.12465, section 3.1; `mean` and `max` (elementwise) are the
/// paper's ablations. `pooling_scale` sharpens the weights of `last_query`; `select` is the limit.
enum class pooling {
  last_query,  ///< weights `softmax_j(pooling_scale * scale * q_last . k_j)`, `q_last` the query of the group's last token
  mean,
  max,
  select,  ///< the token of the largest of these weights, the first of equals, as it is; no gradient goes to `q_last`
  /// The token to which the queries that see the group raw give most, the first of equals, as it is. Of them 32 per window
  /// are asked, at the positions that `max(1, window / 32)` divides; a key's mass is the sum of their weights, each a softmax
  /// of `scale * q . k` over all that the query sees raw. The core is made when its group leaves the window, without any
  /// later query. Per kv head the masses of its query heads are added. No gradient goes to the queries.
  select_by_mass
};

/// Under grouped-query attention, who has cores of its own. `mean` and `max` pooling do not depend on the query, so
/// their cores are always per key/value head.
enum class core_heads {
  per_query_head,  ///< as in the authors' code
  per_kv_head  ///< weights by the mean of the query heads that share the key/value head: that many times fewer cores
};

/// What is added to the logits of cores.
enum class core_bias {
  none,  ///< as in the paper
  /// `H(w) = -sum_j w_j log w_j` of the weights of the pooling. `e^(q . core + H)` is then at most the sum of the
  /// `e^(q . k_j)` of the group's tokens, for any query and weights (Jensen), and that sum for the query that pools.
  /// `mean` has equal weights, so the logarithm of the group's size; `max` has none.
  entropy
};

/// What multiplies. By default nothing but the vectors of floats, of 16 bits exactly as if floats were stored. A matrix unit
/// is much faster; it multiplies elements of 16 bits as they are stored and adds in float, so that what lies between two
/// products, the cores and the weights of the softmax, is rounded to the operands' 16 bits, and denormals of bfloat16 are
/// taken for zeros. The softmax itself is computed in float.
///
/// `vnni` rounds further, and therefore is taken by name alone: every query, key and value to integers of 8 bits in a scale
/// of its own, weights to 8 bits relative to the largest of a block of rows. It takes floats as well, and other types
/// than the query's; cores stay as without a unit. It is forward only. Rows of values below 2^-64 count as zeros.
enum class matrix_unit {
  none,         ///< products of floats
  best,         ///< the fastest for the operands but `vnni`, which for floats and doubles is `none`; see `best_unit`
  avx512_bf16,  ///< for bfloat16
  amx,          ///< tiles, for bfloat16, and on processors that have them for half
  vnni  ///< four products of 8 bits at a time (AVX-512 VNNI or AVX-VNNI): for float, bfloat16 and half, forward only
};

namespace detail {

/// A `double` in everything but its name: `std::optional<double>` is shared by units of different flags, see target.hpp.
struct number {
  double value = 0;

  constexpr number() = default;
  constexpr number(double v) : value(v) {}
  constexpr operator double() const { return value; }
};

template <class Option>
inline constexpr bool is_real = std::is_same_v<Option, double> || std::is_same_v<Option, number>;

}  // namespace detail

/// Settings of every entry point. The defaults mean plain causal attention, `{.window = s}` the sliding window,
/// `{.window = s, .sink_tokens = m}` that of StreamingLLM, and `{.group_size = g, .window = s}` Core Context Aware
/// attention; `{.lookahead = unlimited}` is bidirectional attention, `{.prefix = p}` that of a prefix language model.
struct options {
  std::int64_t group_size = 0;      ///< tokens per core; 0: nothing is pooled
  std::int64_t window = unlimited;  ///< tokens that stay raw, s >= 1; counts the current one
  /// first tokens of a sequence that stay raw for every query behind them; groups begin behind them. Without a window all
  /// tokens do, and it changes nothing.
  std::int64_t sink_tokens = 0;
  /// tokens behind the query's position that it sees, too, up to `unlimited`; without groups
  std::int64_t lookahead = 0;
  std::int64_t prefix = 0;             ///< first tokens of a sequence that every query sees; without groups
  pooling pool = pooling::last_query;  ///< see `pooling`
  /// see `core_heads`
  cca::core_heads core_heads = cca::core_heads::per_query_head;
  cca::core_bias core_bias = cca::core_bias::none;  ///< see `core_bias`
  std::optional<detail::number> softmax_scale{};    ///< default `1 / sqrt(dim)` of query and key
  double pooling_scale = 1;  ///< a factor on the scale of the weights of `last_query` pooling, at least 0; 1: the paper's
  double softcap = 0;        ///< a scaled score x becomes `softcap tanh(x / softcap)` before the softmax; 0: it stays
  std::optional<std::int64_t> first_position{};  ///< position of query 0; default: the last query is the last key
  matrix_unit unit = matrix_unit::none;          ///< see `matrix_unit`
};

/// Who sees what by these options.
[[nodiscard]] constexpr partition partition_of(const options& options) {
  return {options.group_size, options.window, options.sink_tokens, options.lookahead, options.prefix};
}

namespace detail {

/// The list of all options: calls `f(name, option)` for each. Validation, files of caches, `cca::dispatch` and the
/// descriptions of the tests go by it. The binding does not compile for an option that the list lacks.
template <class Options, class F>
constexpr void for_each_option(Options& all, const F& f) {
  auto& [group_size, window, sinks, lookahead, prefix, pool, heads, bias, scale, pooling_scale, softcap, position,
         unit] = all;
  f("group_size", group_size);
  f("window", window);
  f("sink_tokens", sinks);
  f("lookahead", lookahead);
  f("prefix", prefix);
  f("pool", pool);
  f("core_heads", heads);
  f("core_bias", bias);
  f("softmax_scale", scale);
  f("pooling_scale", pooling_scale);
  f("softcap", softcap);
  f("first_position", position);
  f("unit", unit);
}

/// The names of an option's enumerators, in the order of their values.
constexpr auto enumerators(pooling) {
  return std::array{"last_query", "mean", "max", "select", "select_by_mass"};
}
constexpr auto enumerators(core_heads) { return std::array{"per_query_head", "per_kv_head"}; }
constexpr auto enumerators(core_bias) { return std::array{"none", "entropy"}; }
constexpr auto enumerators(matrix_unit) { return std::array{"none", "best", "avx512_bf16", "amx", "vnni"}; }

/// The value of an option in words.
template <class Option>
text_part option_text(const Option& option) {
  if constexpr (std::is_enum_v<Option>) {
    constexpr auto names = enumerators(Option{});
    const auto number = static_cast<std::size_t>(option);
    return number < names.size() ? text_part(names[number]) : text_part(static_cast<int>(option));
  } else if constexpr (std::is_same_v<Option, std::int64_t>) {
    return option == unlimited ? text_part("unlimited") : text_part(option);
  } else if constexpr (is_real<Option>) {
    return static_cast<double>(option);
  } else {
    return option ? option_text(*option) : "none";
  }
}

/// An option as numbers that mean the same in every translation unit and in a file.
struct option_code {
  std::int64_t present = 1;  ///< 0: an optional one without a value
  std::int64_t bits = 0;

  friend bool operator==(const option_code&, const option_code&) = default;
};

template <class Option>
option_code encode_option(const Option& option) {
  if constexpr (is_real<Option>)
    return {1, __builtin_bit_cast(std::int64_t, static_cast<double>(option))};
  else if constexpr (std::is_arithmetic_v<Option> || std::is_enum_v<Option>)
    return {1, static_cast<std::int64_t>(option)};
  else
    return option ? encode_option(*option) : option_code{0, 0};
}

template <class Option>
void decode_option(const option_code& code, Option& option) {
  if constexpr (is_real<Option>)
    option = __builtin_bit_cast(double, code.bits);
  else if constexpr (std::is_arithmetic_v<Option> || std::is_enum_v<Option>)
    option = static_cast<Option>(code.bits);
  else if (code.present != 0)
    decode_option(code, option.emplace());
  else
    option.reset();
}

/// Whether there are groups, and queries that see their cores: without a window there are none.
inline bool pools(const options& options) { return options.group_size >= 1 && options.window != unlimited; }

/// Whether they have biases.
inline bool has_core_biases(const options& options) {
  return pools(options) && options.core_bias != cca::core_bias::none;
}

inline double softmax_scale(const options& options, std::int64_t dim) {
  return options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
}

/// That of the weights of a group's tokens.
inline double pooling_scale(const options& options, std::int64_t dim) {
  return options.pooling_scale * softmax_scale(options, dim);
}

/// Position of query 0. `query_length` queries end with the last of `key_length` keys unless the caller says otherwise.
inline std::int64_t first_position(const options& options, std::int64_t query_length, std::int64_t key_length) {
  return options.first_position.value_or(key_length - query_length);
}

/// Whether cores depend on the queries of their groups' last tokens.
inline bool uses_last_query(pooling pool) { return pool == pooling::last_query || pool == pooling::select; }

/// Whether they depend on those of the queries that see their groups raw.
inline bool observes(pooling pool) { return pool == pooling::select_by_mass; }

/// Whether they depend on queries at all.
inline bool uses_query(pooling pool) { return uses_last_query(pool) || observes(pool); }

/// What divides the positions of the queries that observe: so there are about 32 to a window, and one at least.
inline std::int64_t observer_stride(const options& options) {
  constexpr std::int64_t observers_per_window = 32;
  return larger<std::int64_t>(options.window / observers_per_window, 1);
}

/// Whose cores there are, see `core_heads`.
inline std::int64_t core_head_count(const options& options, std::int64_t query_heads, std::int64_t kv_heads) {
  const bool per_query = uses_query(options.pool) && options.core_heads == cca::core_heads::per_query_head;
  return per_query ? query_heads : kv_heads;
}

}  // namespace detail
}}  // namespace cca::CCA_TARGET
