// The list of tasks: which items each holds, and how the tasks of a chain follow each other.

#include <gtest/gtest.h>
#include <cca/detail/context/tasks.hpp>
#include <cstdint>
#include <iterator>
#include <map>
#include <tuple>
#include <vector>

namespace cca::test { namespace {

using detail::task, detail::task_list, detail::sequences, detail::sequence_tasks;

/// Sequences of these lengths, and their tasks.
struct work {
  std::vector<std::int64_t> lengths, per_task;  // of each sequence; one of each where all are alike
  std::int64_t batch, chains, sharing;
  bool alike;
  std::vector<sequence_tasks> table{};

  [[nodiscard]] sequences all() const { return {batch, alike}; }
  [[nodiscard]] std::int64_t length(std::int64_t b) const { return lengths[alike ? 0 : static_cast<std::size_t>(b)]; }
  [[nodiscard]] std::int64_t items_per_task(std::int64_t b) const {
    return per_task[alike ? 0 : static_cast<std::size_t>(b)];
  }
  [[nodiscard]] std::int64_t cuts(std::int64_t b) const {
    return (length(b) + items_per_task(b) - 1) / items_per_task(b);
  }

  [[nodiscard]] task_list tasks() {
    table.resize(static_cast<std::size_t>(all().table_size()));
    return {all(),
            table.data(),
            chains * sharing,
            [this](std::int64_t b) { return length(b); },
            [this](std::int64_t b) { return items_per_task(b); },
            sharing};
  }
};

/// Calls `f` for work of all kinds: none, one task, several, and such as the length does not divide; sequences that are
/// alike, and such of their own lengths, 0 among them.
template <class F>
void for_each_work(const F& f) {
  for (const std::int64_t chains : {0, 1, 2})
    for (const std::int64_t sharing : {1, 2, 3}) {
      SCOPED_TRACE(testing::Message() << chains << " chains of " << sharing << " heads");
      for (const std::int64_t batch : {0, 1, 3})
        for (const std::int64_t length : {0, 1, 5, 8, 9})
          for (const std::int64_t per_task : {1, 4, 8, 20}) {
            SCOPED_TRACE(testing::Message()
                         << "batch " << batch << ", length " << length << ", " << per_task << " per task");
            f(work{{length}, {per_task}, batch, chains, sharing, true});
          }
      f(work{{5, 0, 9, 1, 8}, {4, 4, 4, 4, 4}, 5, chains, sharing, false});
      f(work{{0, 0, 7, 100, 0, 3, 0}, {1, 2, 3, 8, 5, 20, 7}, 7, chains, sharing, false});
      f(work{{0, 0}, {1, 1}, 2, chains, sharing, false});
      f(work{{}, {}, 0, chains, sharing, false});
    }
}

TEST(Tasks, HoldEveryItemOnce) {
  for_each_work([](work w) {
    const task_list tasks = w.tasks();
    std::int64_t count = 0, items = 0;
    for (std::int64_t b = 0; b < w.batch; ++b) {
      count += w.chains * w.sharing * w.cuts(b);
      items += w.chains * w.sharing * w.length(b);
    }
    EXPECT_EQ(tasks.size(), count);
    EXPECT_EQ(task_list::size(
                  w.all(), w.chains * w.sharing, [&](std::int64_t b) { return w.length(b); },
                  [&](std::int64_t b) { return w.items_per_task(b); }),
              count);
    std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, int> held;
    for (std::int64_t i = 0; i < tasks.size(); ++i) {
      const task task = tasks[i];
      EXPECT_GT(task.items.size(), 0);
      EXPECT_LE(task.items.size(), w.items_per_task(task.b));
      for (std::int64_t item = task.items.begin; item < task.items.end; ++item) ++held[{task.b, task.head, item}];
    }
    EXPECT_EQ(std::ssize(held), items);
    for (const auto& [where, times] : held) {
      const auto& [b, head, item] = where;
      EXPECT_TRUE(0 <= b && b < w.batch && 0 <= head && head < w.chains * w.sharing && 0 <= item && item < w.length(b));
      EXPECT_EQ(times, 1);
    }
  });
}

/// The tasks of a chain lie one after the other, of ever later items, and of the same items head by head; the first leads.
TEST(Tasks, OfAChainFollowEachOther) {
  for_each_work([](work w) {
    const task_list tasks = w.tasks();
    for (std::int64_t i = 0, left = 0; i < tasks.size(); ++i, --left) {
      const task here = tasks[i];
      EXPECT_EQ(here.leads, left == 0) << i;
      if (left == 0) {
        left = w.cuts(here.b) * w.sharing;
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
  for_each_work([](work w) {
    const task_list tasks = w.tasks();
    for (std::int64_t i = 0, first = 0; i < tasks.size(); ++i) {
      if (tasks[i].leads) first = i;
      const std::int64_t per_chain = w.cuts(tasks[i].b) * w.sharing;
      const task got = tasks.last_first(i), want = tasks[2 * first + per_chain - 1 - i];
      EXPECT_EQ(std::tie(got.b, got.head, got.leads), std::tie(want.b, want.head, want.leads)) << i;
      EXPECT_EQ(got.items, want.items) << i;
    }
  });
}

/// Within a factor of two.
TEST(Tasks, OfLongSequencesComeFirst) {
  for_each_work([](work w) {
    const task_list tasks = w.tasks();
    for (std::int64_t i = 1; i < tasks.size(); ++i) EXPECT_LT(w.length(tasks[i].b), 2 * w.length(tasks[i - 1].b)) << i;
  });
}

/// Shares lie one after the other, those of sequences that are alike without a table.
TEST(Tasks, HaveMemoryOneSequenceAfterTheOther) {
  const detail::sequence_offsets alike({4, true}, nullptr, [](std::int64_t) { return 7; });
  for (std::int64_t b = 0; b < 4; ++b) EXPECT_EQ(alike[b], 7 * b);
  std::vector<std::int64_t> table(4);
  const detail::sequence_offsets each({4, false}, table.data(), [](std::int64_t b) { return b % 2 == 0 ? b : 10; });
  EXPECT_EQ((std::vector{each[0], each[1], each[2], each[3]}), (std::vector<std::int64_t>{0, 0, 10, 12}));
}

}}  // namespace cca::test
