#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>

#include "numbers.hpp"
#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A part of a text: words, a number or a list of numbers. It refers to what is no number of 64 bits, which outlives it.
struct text_part {
  enum { words, whole, natural, real, count, list } kind;
  std::size_t size = 0;  ///< of a list
  union {
    const char* characters;
    std::int64_t integer;
    std::uint64_t unsigned_integer;
    double number;
    const long double* large;  ///< a whole number that may not fit 64 bits
    const std::int64_t* numbers;
  };

  constexpr text_part(const char* text) : kind(words), characters(text) {}
  constexpr text_part(std::signed_integral auto n) : kind(whole), integer(n) {}
  constexpr text_part(std::unsigned_integral auto n) : kind(natural), unsigned_integer(n) {}
  constexpr text_part(double x) : kind(real), number(x) {}
  constexpr text_part(const long double& n) : kind(count), large(&n) {}
  constexpr text_part(const std::int64_t* first, std::size_t n) : kind(list), size(n), numbers(first) {}
  template <std::size_t Size>
  constexpr text_part(const std::array<std::int64_t, Size>& all) : text_part(all.data(), Size) {}
};

/// What a refusal says: not std::string, of which C++20 makes every function anew in each translation unit, with whatever
/// instructions it may use (see target.hpp). Longer texts than fit are cut.
class text {
 public:
  text(std::initializer_list<text_part> parts) { *this += parts; }

  [[gnu::cold, gnu::noinline]] text& operator+=(std::initializer_list<text_part> parts) {
    for (const text_part& p : parts) {
      if (p.kind == text_part::words) print("%s", p.characters);
      if (p.kind == text_part::whole) print("%lld", static_cast<long long>(p.integer));
      if (p.kind == text_part::natural) print("%llu", static_cast<unsigned long long>(p.unsigned_integer));
      if (p.kind == text_part::real) print("%g", p.number);
      if (p.kind == text_part::count) print("%.0Lf", *p.large);
      if (p.kind != text_part::list) continue;
      for (std::size_t i = 0; i < p.size; ++i) print(i == 0 ? "[%lld" : ", %lld", static_cast<long long>(p.numbers[i]));
      print("%s", "]");
    }
    return *this;
  }

  [[nodiscard]] const char* c_str() const { return characters_; }

 private:
  template <class Value>
  void print(const char* format, Value value) {
    const int printed = std::snprintf(characters_ + size_, sizeof characters_ - size_, format, value);
    size_ = smaller(size_ + static_cast<std::size_t>(printed), sizeof characters_ - 1);
  }

  std::size_t size_ = 0;
  char characters_[1000];
};

/// The text is made only for a refusal, and out of the way of the code that checks.
[[noreturn, gnu::cold, gnu::noinline]] inline void refuse(const char* argument, std::initializer_list<text_part> got,
                                                          std::initializer_list<text_part> wanted) {
  text message{"cca: ", argument, ": got "};
  message += got;
  message += {", wants "};
  message += wanted;
  throw std::invalid_argument(message.c_str());
}

}}}  // namespace cca::CCA_TARGET::detail
