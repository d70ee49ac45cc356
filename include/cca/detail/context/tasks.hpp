#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/numbers.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Some of the queries, or of the groups, of one head of a sequence.
struct task {
  std::int64_t b, head;
  range items;
  bool leads = false;  ///< the first of its chain
};

/// What is to do, cut into tasks: the items `[0, length)` of every head of every sequence, `per_task` at a time. The only
/// place that knows which task holds what. Heads that share rows, `sharing` at a time, form a chain: the tasks of a chain
/// follow each other, those of the same items first, since they read the same rows.
class task_list {
 public:
  task_list(std::int64_t batch, std::int64_t heads, std::int64_t length, std::int64_t per_task,
            std::int64_t sharing = 1)
      : chains_(sharing > 0 ? heads / sharing : 0),
        length_(length),
        per_task_(larger<std::int64_t>(per_task, 1)),
        sharing_(sharing),
        cuts_((length + per_task_ - 1) / per_task_),
        size_(batch * chains_ * sharing * cuts_) {}

  [[nodiscard]] std::int64_t size() const { return size_; }

  [[nodiscard]] task operator[](std::int64_t i) const { return at(i / (cuts_ * sharing_), i % (cuts_ * sharing_)); }

  /// The same chains, of which each begins with its last task: later queries see more, and where long tasks are begun
  /// first, threads finish together.
  [[nodiscard]] task last_first(std::int64_t i) const {
    const std::int64_t per_chain = cuts_ * sharing_;
    return at(i / per_chain, per_chain - 1 - i % per_chain);
  }

 private:
  [[nodiscard]] task at(std::int64_t chain, std::int64_t place) const {
    const std::int64_t first = place / sharing_ * per_task_;
    return {chain / chains_,
            chain % chains_ * sharing_ + place % sharing_,
            {first, smaller(first + per_task_, length_)},
            place == 0};
  }

  std::int64_t chains_, length_, per_task_, sharing_, cuts_, size_;
};

}}}  // namespace cca::CCA_TARGET::detail
