#pragma once

#include <cstdint>

#include "../../executor.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../base/numbers.hpp"
#include "../context/source.hpp"
#include "../context/tasks.hpp"
#include "../softmax/row_softmax.hpp"
#include "group_rows.hpp"
#include "observers.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The softmax of a few observers of a head, side by side.
template <class T>
class observing {
 public:
  observing(group_rows<T>& group, const partition& partition, const observer_grid& grid, range observers)
      : group_(group), partition_(partition), grid_(grid), observers_(observers) {}

  /// Takes in what they see. Blocks of rows begin at fixed tokens, a token has its lane in them, and a block is whole before
  /// a softmax takes it in: so sums are the same to the bit wherever the rows lie, and whoever observes beside. They are the
  /// same however a sequence was cut into steps.
  template <class Feed>
  void see(const Feed& feed) {
    const std::int64_t first = grid_.position(observers_.begin), last = grid_.position(observers_.end - 1);
    see(partition_.sinks(last), feed, [&](std::int64_t t) { return partition_.sinks(t); });
    see({partition_.raw(first).begin, last + 1}, feed, [&](std::int64_t t) { return partition_.raw(t); });
  }

  /// Rows of the block at hand, from where the last ones ended.
  template <class Key, class Value>
  void absorb(const context_rows<Key, Value>& head, range rows) {
    group_.for_each_key_block(head, rows, [&](std::int64_t, row_span<T> keys, std::int64_t count) {
      group_.observer.score(observers_.size(), keys, group_.dim, count, filled_);
      filled_ += count;
    });
  }

  [[nodiscard]] observer_sum<T> sum(std::int64_t i) const {
    const row_softmax<T>& softmax = softmax_[i - observers_.begin];
    return {softmax.maximum, softmax.inverse()};
  }

 private:
  template <class Feed, class Seen>
  void see(range tokens, const Feed& feed, const Seen& seen) {
    for (std::int64_t begin = tokens.begin, end; begin < tokens.end; begin = end) {
      const std::int64_t first = begin / row_block * row_block;
      end = smaller(tokens.end, first + row_block);
      filled_ = begin - first;
      feed(*this, range{begin, end});
      for (std::int64_t i = observers_.begin; i < observers_.end; ++i) {
        T* const scores = group_.observer.scores + (i - observers_.begin) * row_block;
        const range own = seen(grid_.position(i));
        const bool whole = own.begin <= first && end <= own.end;
        for (std::int64_t j = first; j < end && !whole; ++j)
          if (!own.contains(j)) scores[j - first] = -infinity<T>;
        softmax_[i - observers_.begin].absorb(scores, end - first, group_.rule.unit_in_base_2());
      }
    }
  }

  group_rows<T>& group_;
  const partition& partition_;
  observer_grid grid_;
  range observers_;
  std::int64_t filled_ = 0;  ///< of the block at hand
  row_softmax<T> softmax_[extent(observers_at_once)];
};

/// Observers that a task of observing takes in.
inline constexpr std::int64_t observers_per_task = 4 * observers_at_once;

/// Tasks of observing `count(b)` observers of every sequence and head.
template <class Count>
std::int64_t observing_tasks(const sequences& all, std::int64_t heads, const Count& count) {
  return task_list::size(all, heads, count, [](std::int64_t) { return observers_per_task; });
}

/// Finds out the sums of the observers `fresh(b)` of every sequence and head and gives them to `keep(b, h, i, sum)`. Of
/// `group_of(worker)` are the `group_rows` of a worker; `absorb(to, b, kv_head, tokens)` feeds rows.
template <class T, class Fresh, class Observers, class Absorb, class GroupOf, class Keep, executor E>
void observe(const sequences& all, std::int64_t heads, std::int64_t kv_heads, const Fresh& fresh,
             const options& options, const Observers& observers, const Absorb& absorb, const E& run,
             std::int64_t workers, sequence_tasks* table, const GroupOf& group_of, const Keep& keep) {
  const partition partition = partition_of(options);
  const observer_grid grid(options);
  const std::int64_t sharing = kv_heads == 0 ? 1 : heads / kv_heads;
  const task_list tasks(
      all, table, heads, [&](std::int64_t b) { return fresh(b).size(); },
      [](std::int64_t) { return observers_per_task; }, sharing);
  run_tasks(run, workers, tasks.size(), [&](std::int64_t worker, std::int64_t place) {
    const task task = tasks[place];
    group_rows<T> group = group_of(worker);
    const range items = shifted(task.items, fresh(task.b).begin);
    for (std::int64_t i = items.begin; i < items.end; i += observers_at_once) {
      const range some{i, smaller(i + observers_at_once, items.end)};
      for (std::int64_t j = some.begin; j < some.end; ++j)
        group.observer.load(observers, task.b, task.head, j, group.dim, group.rule.query_factor(), j - i);
      observing<T> softmax(group, partition, grid, some);
      softmax.see([&](auto& to, range tokens) { absorb(to, task.b, task.head / sharing, tokens); });
      for (std::int64_t j = some.begin; j < some.end; ++j) keep(task.b, task.head, j, softmax.sum(j));
    }
  });
}

}}}  // namespace cca::CCA_TARGET::detail
