// A program of two units, OLDER and NEWER. Its argument says who runs: `both`, which give the same numbers, or the `older`
// one alone, whose numbers are finite.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>
#include <string_view>

#include "unit.hpp"

unit OLDER, NEWER;
caller_pool the_pool;

int caller_pool::NumThreads() const { return 1; }

void numbers::append(double number, double tolerance) {
  if (count_ < capacity) number_[count_] = number, tolerance_[count_] = tolerance;
  ++count_;
}

bool numbers::agree_with(const numbers& other) const {
  bool agree = count_ > 0 && count_ <= capacity && count_ == other.count_;
  for (std::int64_t i = 0; agree && i < count_; ++i) {
    const double x = number_[i], y = other.number_[i];
    agree = std::isfinite(x) && std::fabs(x - y) <= tolerance_[i] * std::max(1.0, std::fabs(x));
    if (!agree) std::printf("number %td of %td: %.17g and %.17g\n", i, count_, x, y);
  }
  return agree;
}

int main(int, char** arguments) {
  static numbers older, newer;
  float tokens[length * dim];
  for (std::int64_t i = 0; i < length * dim; ++i) tokens[i] = static_cast<float>(i % 7) / 8;
  std::stringstream stream;
  OLDER(tokens, stream, older);
  if (std::string_view(arguments[1]) == "older") return !older.agree_with(older);
  NEWER(tokens, stream, newer);
  return !older.agree_with(newer);
}
