#pragma once

#include <atomic>
#include <cstdint>

#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Tasks that add to the same rows do so in their order, whoever runs them: sums are then the same for any number of
/// threads, without a copy per thread. Every task goes through its rows upwards, and adds to the rows below `row` once
/// the task before it has passed `row`; so they follow each other at the distance of a block.
///
/// A task waits for none but those begun before it, so the first of those that run never waits.
class turn {
 public:
  using counter = std::atomic<std::int64_t>;

  /// `before` is null for a task that follows no other.
  turn(const counter* before, counter* mine) : before_(before), mine_(mine) {}

  /// Returns when the task before, and so every earlier one, is done with the rows below `row`.
  void await(std::int64_t row) const {
    if (before_ == nullptr) return;
    for (std::int64_t passed; (passed = before_->load(std::memory_order_acquire)) < row;)
      before_->wait(passed, std::memory_order_acquire);
  }

  /// Lets the next task have the rows below `row`.
  void pass(std::int64_t row) {
    await(row);  // rows that this task left out may still be in use by an earlier one
    mine_->store(row, std::memory_order_release);
    mine_->notify_all();
  }

 private:
  const counter* before_;
  counter* mine_;
};

}}}  // namespace cca::CCA_TARGET::detail
