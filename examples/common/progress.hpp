#pragma once

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

namespace common {

/// A bar on the terminal; nothing where the errors go to a file.
class progress {
 public:
  explicit progress(std::int64_t steps, std::int64_t done = 0) : steps_(steps), done_(done) {}

  void step(const std::string& label) {
    ++done_;
    std::string bar(40, '.');
    std::fill_n(bar.begin(), static_cast<std::int64_t>(bar.size()) * done_ / steps_, '#');
    if (visible_) fmt::print(stderr, "\r[{}] {:3} % {}\033[K", bar, 100 * done_ / steps_, label);
  }
  void hide() const {
    if (visible_) fmt::print(stderr, "\r\033[K");
  }

 private:
  std::int64_t steps_;
  std::int64_t done_;
  bool visible_ = ::isatty(STDERR_FILENO) == 1;
};

}  // namespace common
