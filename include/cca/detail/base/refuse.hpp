#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

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

}}}  // namespace cca::CCA_TARGET::detail
