// The list of tasks: which items each holds, and how the tasks of a chain follow each other.

#include <gtest/gtest.h>
#include <cca/detail/context/tasks.hpp>
#include <map>
#include <tuple>
#include <vector>

namespace cca::test { namespace {

using detail::task, detail::task_list, detail::sequences, detail::sequence_tasks;

struct work {
  std::int64_t batch, chains, sharing, length, per_task;

  [[nodiscard]] task_list tasks() const {
    return {sequences{batch, true},
            nullptr,
            chains * sharing,
            [*this](std::int64_t) { return length; },
            [*this](std::int64_t) { return per_task; },
            sharing};
  }
  /// Tasks of a chain.
  [[nodiscard]] std::int64_t per_chain() const { return (length + per_task - 1) / per_task * sharing; }
};

/// Calls `f` for work of all kinds: none, one task, several, and such as the length does not divide.
template <class F>
void for_each_work(const F& f) {
  for (const std::int64_t batch : {0, 1, 3})
    for (const std::int64_t chains : {0, 1, 2})
      for (const std::int64_t sharing : {1, 2, 3})
        for (const std::int64_t length : {0, 1, 5, 8, 9})
          for (const std::int64_t per_task : {1, 4, 8, 20}) {
            SCOPED_TRACE(testing::Message() << "batch " << batch << ", " << chains << " chains of " << sharing
                                            << " heads, length " << length << ", " << per_task << " per task");
            f(work{batch, chains, sharing, length, per_task});
          }
}

TEST(Tasks, HoldEveryItemOnce) {
  for_each_work([](const work& w) {
    const task_list tasks = w.tasks();
    EXPECT_EQ(tasks.size(), w.batch * w.chains * w.per_chain());
    std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, int> held;
    for (std::int64_t i = 0; i < tasks.size(); ++i) {
      const task task = tasks[i];
      EXPECT_GT(task.items.size(), 0);
      EXPECT_LE(task.items.size(), w.per_task);
      for (std::int64_t item = task.items.begin; item < task.items.end; ++item) ++held[{task.b, task.head, item}];
    }
    EXPECT_EQ(std::ssize(held), w.batch * w.chains * w.sharing * w.length);
    for (const auto& [where, times] : held) {
      const auto& [b, head, item] = where;
      EXPECT_TRUE(0 <= b && b < w.batch && 0 <= head && head < w.chains * w.sharing && 0 <= item && item < w.length);
      EXPECT_EQ(times, 1);
    }
  });
}

/// The tasks of a chain lie one after the other, of ever later items, and of the same items head by head; the first leads.
TEST(Tasks, OfAChainFollowEachOther) {
  for_each_work([](const work& w) {
    const task_list tasks = w.tasks();
    for (std::int64_t i = 0; i < tasks.size(); ++i) {
      const task here = tasks[i];
      const bool leads = i % w.per_chain() == 0;
      EXPECT_EQ(here.leads, leads) << i;
      if (leads) {
        EXPECT_EQ(here.items.begin, 0);
        EXPECT_EQ(here.head % w.sharing, 0);
        continue;
      }
      const task before = tasks[i - 1];
      EXPECT_EQ(here.b, before.b);
      EXPECT_EQ(here.head / w.sharing, before.head / w.sharing);
      const bool same_items = here.items == before.items;
      EXPECT_EQ(here.head % w.sharing, same_items ? before.head % w.sharing + 1 : 0);
      if (!same_items) {
        EXPECT_EQ(here.items.begin, before.items.end);
      }
    }
  });
}

TEST(Tasks, BeginWithTheLastOfAChain) {
  for_each_work([](const work& w) {
    const task_list tasks = w.tasks();
    for (std::int64_t i = 0; i < tasks.size(); ++i) {
      const std::int64_t chain = i / w.per_chain();
      const task got = tasks.last_first(i), want = tasks[(2 * chain + 1) * w.per_chain() - 1 - i];
      EXPECT_EQ(std::tie(got.b, got.head, got.leads), std::tie(want.b, want.head, want.leads)) << i;
      EXPECT_EQ(got.items, want.items) << i;
    }
  });
}

}}  // namespace cca::test
