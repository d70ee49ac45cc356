#pragma once

#include <cca/cca.hpp>

#include <vector>

inline constexpr int length = 20, dim = 3;

/// Attention of `length` tokens with all operands the same: what both translation units compute.
inline std::vector<float> attend_to_itself(const std::vector<float>& tokens) {
  std::vector<float> out(tokens.size());
  const auto view = cca::bhsd(tokens.data(), 1, 1, length, dim);
  cca::attention(view, view, view, cca::bhsd(out.data(), 1, 1, length, dim), {.group_size = 2, .window = 4});
  return out;
}

/// Defined in second.cpp.
std::vector<float> second_attend_to_itself(const std::vector<float>& tokens);
