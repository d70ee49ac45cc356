#pragma once

#include <cstddef>
#include <cstdint>
#include <numbers>
#include <type_traits>

#include "../../element.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../product/choose_unit.hpp"
#include "numbers.hpp"
#include "refuse.hpp"
#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// `Element` is the operands' `product_type`.
template <class Element>
void require_unit(const options& options) {
  const matrix_unit unit = options.unit;
  if (unit == matrix_unit::none || unit == matrix_unit::best) return;
  if (unit == matrix_unit::vnni && std::is_same_v<compute_type<Element>, double>)
    refuse("options.unit", {option_text(unit)},
           {"none: integers stand for floats and 16-bit operands, not for doubles"});
  if (unit != matrix_unit::vnni && !is_unit_element<Element>)
    refuse("options.unit", {option_text(unit)}, {"none: the operands are not all of the same 16-bit type"});
  if (!has_unit<Element>(unit))
    refuse("options.unit", {option_text(unit)}, {"best, or a unit that this processor has for the operands' type"});
}

/// Integers are forward only: gradients would take the weights of other scores than those of the output.
inline void require_differentiable(const options& options) {
  if (options.unit == matrix_unit::vnni)
    refuse("options.unit", {option_text(options.unit)}, {"none, or a unit of 16 bits: integers have no gradients"});
}

[[noreturn, gnu::cold, gnu::noinline]] inline void refuse_enumerator(const char* option, int got,
                                                                     const char* const* names, std::size_t count) {
  text wanted{names[0]};
  for (std::size_t i = 1; i < count; ++i) wanted += {i + 1 < count ? ", " : " or ", names[i]};
  refuse(text{"options.", option}.c_str(), {got}, {wanted.c_str()});
}

/// An option with a value that its enumeration has.
template <class Option>
void require_known(const char* name, const Option& option) {
  if constexpr (std::is_enum_v<Option>) {
    constexpr auto names = enumerators(Option{});
    if (static_cast<std::size_t>(option) >= names.size())
      refuse_enumerator(name, static_cast<int>(option), names.data(), names.size());
  }
}

/// Refuses the option at this address.
[[noreturn, gnu::cold, gnu::noinline]] inline void refuse_option(const options& options, const void* option,
                                                                 text_part wanted, const char* reason) {
  const char* found = "";
  text_part got = "";
  for_each_option(options, [&](const char* name, const auto& value) {
    if (static_cast<const void*>(&value) != option) return;
    found = name;
    got = option_text(value);
  });
  refuse(text{"options.", found}.c_str(), {got}, {wanted, ": ", reason});
}

/// An option that this call would ignore.
template <class Option>
void require_unset(const options& options, Option cca::options::*option, const char* reason) {
  const Option unset = cca::options{}.*option;
  if (options.*option != unset) refuse_option(options, &(options.*option), option_text(unset), reason);
}

/// Options whose values make sense by themselves. `most` is the largest number that is computed with: a scale beyond it
/// would turn every score into NaN.
inline void require_values(const options& options, double most) {
  if (options.group_size < 0)
    refuse("options.group_size", {options.group_size}, {"at least 1, or 0 where nothing is pooled"});
  if (options.window < 1) refuse("options.window", {options.window}, {"at least 1"});
  const auto require_count = [](const char* name, std::int64_t tokens) {
    if (tokens < 0) refuse(name, {tokens}, {"at least 0"});
  };
  require_count("options.sink_tokens", options.sink_tokens);
  require_count("options.lookahead", options.lookahead);
  require_count("options.prefix", options.prefix);
  // What is computed with is the scale times log2(e).
  const double largest = most / std::numbers::log2e;
  if (!(magnitude<double>(options.softmax_scale.value_or(0)) <= largest))
    refuse("options.softmax_scale", {option_text(options.softmax_scale)}, {"a finite number, at most ", largest});
  if (options.core_bias != cca::core_bias::none &&
      (options.pool == pooling::max || options.pool == pooling::select || observes(options.pool)))
    refuse("options.core_bias", {option_text(options.core_bias)}, {"none: the pooling has no weights"});
  if (options.pool != pooling::last_query)
    require_unset(options, &options::pooling_scale, "of the poolings last_query alone has weights to sharpen");
  if (!(0 <= options.pooling_scale &&
        options.pooling_scale * magnitude<double>(options.softmax_scale.value_or(1)) <= largest))
    refuse("options.pooling_scale", {options.pooling_scale},
           {"at least 0 and, times the softmax's scale, at most ", largest});
  if (!(0 <= options.softcap && options.softcap <= most))
    refuse("options.softcap", {options.softcap}, {"a finite number above 0, or 0 for none"});
}

/// Options that make sense by themselves. `Element` is the operands' `product_type`.
template <class Element>
void require_options(const options& options) {
  for_each_option(options, [](const char* name, const auto& option) { require_known(name, option); });
  require_unit<Element>(options);
  require_values(options, static_cast<double>(largest_finite<compute_type<Element>>));
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
    refuse("options.first_position", {position}, {"a position between -2^62 and 2^62"});
}

}}}  // namespace cca::CCA_TARGET::detail
