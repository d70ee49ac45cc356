#pragma once

// Forward and backward as the parameter of a test: what holds of the memory and the tasks of an entry point holds of its
// gradient, too.

#include "gradient_entry_points.hpp"

namespace cca::test {

template <class T>
struct forward_pass {
  using element = T;
  using memory = argument_memory<T>;
  using shape = detail::tile_shape<T>;

  static constexpr const auto& entries = all_entries;
  static constexpr std::int64_t lanes = shape::lanes, block = shape::block;
  static constexpr std::int64_t stack = shape::least_stack * lanes;  // of sequences as short as those of the tests

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
  using shape = detail::tile_shape<T>;

  static constexpr const auto& entries = gradient_entries;
  static constexpr std::int64_t lanes = shape::lanes, block = shape::gradient_block;
  static constexpr std::int64_t stack = shape::gradient_stack * lanes;

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
