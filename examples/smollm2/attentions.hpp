#pragma once

#include <fmt/core.h>

#include <cca/options.hpp>
#include <cstdint>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>

namespace smollm2 {

/// How an attention is written on the command line.
inline constexpr const char* attention_forms =
    "dense, G/S (group size and window of CCA) or window/S, and behind it any of /shared (cores shared by the query "
    "heads "
    "of a key/value head), /select (the token of largest weight for a core), /mass (that to which the queries of its "
    "window give most), /sharpen=F (a factor of the pooling's "
    "scale), /sinks=M (instead of --sink-tokens); behind any /vnni, products of 8-bit integers";

/// The options of an attention in one of these forms, which `argument` gives; `sink_tokens` stay raw beside a window.
/// @throws std::invalid_argument  for any other text
inline cca::options parse_attention(const char* argument, const std::string& text, std::int64_t sink_tokens) {
  static const std::regex form(
      "dense(/vnni)?|(window|[1-9][0-9]{0,8})/([1-9][0-9]{0,8})"
      "((/(shared|select|mass|vnni|sharpen=[0-9.]{1,8}|sinks=[0-9]{1,8}))*)");
  std::smatch match;
  if (!std::regex_match(text, match, form))
    throw std::invalid_argument(
        fmt::format("{}: got '{}', wants {}", argument, text, attention_forms));
  cca::options options;
  if (text.ends_with("/vnni") || text.find("/vnni/") != std::string::npos) options.unit = cca::matrix_unit::vnni;
  if (text.starts_with("dense")) return options;
  options.window = std::stoll(match[3]);
  options.sink_tokens = sink_tokens;
  if (match[2] != "window") options.group_size = std::stoll(match[2]);
  std::istringstream words(match[4]);
  for (std::string word; std::getline(words, word, '/');) {
    const std::string number = word.substr(word.find('=') + 1);
    if (word == "shared") options.core_heads = cca::core_heads::per_kv_head;
    if (word == "select") options.pool = cca::pooling::select;
    if (word == "mass") options.pool = cca::pooling::select_by_mass;
    if (word.starts_with("sharpen=")) options.pooling_scale = std::stod(number);
    if (word.starts_with("sinks=")) options.sink_tokens = std::stoll(number);
  }
  return options;
}

/// What tables call it.
inline std::string name_of(const cca::options& options) {
  const std::string unit = options.unit == cca::matrix_unit::vnni ? ", 8 bits" : "";
  if (options.window == cca::unlimited) return "dense" + unit;
  std::string name = options.group_size > 0 ? fmt::format("CCA g={} s={}", options.group_size, options.window)
                                            : fmt::format("window s={}", options.window);
  if (options.sink_tokens > 0) name += fmt::format(" m={}", options.sink_tokens);
  if (options.core_heads == cca::core_heads::per_kv_head) name += ", shared cores";
  if (options.pool == cca::pooling::select) name += ", selected";
  if (options.pool == cca::pooling::select_by_mass) name += ", selected by mass";
  if (options.pooling_scale != 1) name += fmt::format(", sharpened {}", options.pooling_scale);
  return name + unit;
}

}  // namespace smollm2
