#pragma once

// Forward and backward as the parameter of a test: what holds of the memory and the tasks of an entry point holds of its
// gradient, too.

#include "gradient_entry_points.hpp"

namespace cca::test {

template <class T>
struct forward_pass {
  using element = T;
  using memory = argument_memory<T>;

  static constexpr const auto& entries = all_entries;
  static std::int64_t lanes() { return tile<T>().lanes; }
  static std::int64_t block() { return tile<T>().block; }
  /// Of sequences as short as those of the tests.
  static std::int64_t stack() { return tile<T>().least_stack * lanes(); }

  static void call(const problem& p, const arguments<T>& a, const any_executor& run = {},
                   std::span<std::byte> workspace = {}) {
    test::call(p, a, run, workspace);
  }
  static std::size_t workspace_size(const problem& p, const arguments<T>& a, const any_executor& run = {}) {
    return test::workspace_size(p, a, run);
  }
};

template <class T>
struct backward_pass {
  using element = T;
  using memory = gradient_memory<T>;

  static constexpr const auto& entries = gradient_entries;
  static std::int64_t lanes() { return tile<T>().lanes; }
  static std::int64_t block() { return tile<T>().gradient_block; }
  static std::int64_t stack() { return tile<T>().gradient_stack * lanes(); }

  static void call(const problem& p, const arguments<T>& a, const any_executor& run = {},
                   std::span<std::byte> workspace = {}) {
    call_gradient(p, a, run, workspace);
  }
  static std::size_t workspace_size(const problem& p, const arguments<T>& a, const any_executor& run = {}) {
    return gradient_workspace_size(p, a, run);
  }
};

using passes = testing::Types<forward_pass<float>, forward_pass<double>, backward_pass<float>, backward_pass<double>>;

}  // namespace cca::test
