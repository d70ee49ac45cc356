#pragma once

// A program that allocations.cpp is part of counts its allocations, and has them fail when a test wants them to.

#include <cstddef>
#include <cstdint>
#include <limits>

namespace cca::test {

/// Of the whole program so far.
[[nodiscard]] std::int64_t allocation_count();

/// While it lives, this thread's first `count` allocations succeed as long as they are of `bytes` in all; the others
/// throw.
class allocation_limit {
 public:
  explicit allocation_limit(std::int64_t count, std::size_t bytes = std::numeric_limits<std::size_t>::max());
  allocation_limit(const allocation_limit&) = delete;
  allocation_limit& operator=(const allocation_limit&) = delete;
  ~allocation_limit();
};

}  // namespace cca::test
