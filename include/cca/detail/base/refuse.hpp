#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "numbers.hpp"
#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What a refusal says: not std::string, of which C++20 makes every function anew in each translation unit, with whatever
/// instructions it may use (see target.hpp). Longer texts than fit are cut.
class text {
 public:
  text(const char* characters) { append(characters, std::strlen(characters)); }

  text& operator+=(const text& more) {
    append(more.characters_, more.size_);
    return *this;
  }
  friend text operator+(text a, const text& b) { return a += b; }

  [[nodiscard]] const char* c_str() const { return characters_; }

 private:
  void append(const char* characters, std::size_t size) {
    size = smaller(size, sizeof characters_ - 1 - size_);
    std::memcpy(characters_ + size_, characters, size);
    size_ += size;
  }

  std::size_t size_ = 0;
  char characters_[1000] = {};
};

/// Whole numbers, among them those that only `long double` holds, and `double`.
template <class Number>
text to_string(Number number) {
  char digits[100];
  if constexpr (std::is_same_v<Number, long double>)
    std::snprintf(digits, sizeof digits, "%.0Lf", number);
  else if constexpr (std::is_same_v<Number, double>)
    std::snprintf(digits, sizeof digits, "%g", number);
  else if constexpr (std::is_signed_v<Number>)
    std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(number));
  else
    std::snprintf(digits, sizeof digits, "%llu", static_cast<unsigned long long>(number));
  return digits;
}

template <std::size_t Rank>
text to_string(const std::array<std::int64_t, Rank>& numbers) {
  text list = "[";
  for (std::size_t i = 0; i < Rank; ++i) list += (i ? ", " : "") + to_string(numbers[i]);
  return list + "]";
}

/// The text is made only for a refusal: checks that pass allocate nothing.
[[noreturn]] inline void refuse(const text& argument, const text& got, const text& wanted) {
  throw std::invalid_argument(("cca: " + argument + ": got " + got + ", wants " + wanted).c_str());
}

}}}  // namespace cca::CCA_TARGET::detail
