#pragma once

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

namespace smollm2 {

/// A bar on the terminal; nothing where the errors go to a file.
class progress {
 public:
  explicit progress(std::int64_t steps) : steps_(steps) {}

  void step(const std::string& label) {
    ++done_;
    std::string bar(40, '.');
    std::fill_n(bar.begin(), static_cast<std::int64_t>(bar.size()) * done_ / steps_, '#');
    if (visible_) fmt::print(stderr, "\r[{}] {:3} % {:<30}", bar, 100 * done_ / steps_, label);
  }
  void hide() const {
    if (visible_) fmt::print(stderr, "\r\033[K");
  }

 private:
  std::int64_t steps_;
  std::int64_t done_ = 0;
  bool visible_ = ::isatty(STDERR_FILENO) == 1;
};

}  // namespace smollm2
