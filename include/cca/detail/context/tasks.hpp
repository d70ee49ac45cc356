#pragma once

#include <cstdint>

#include "../../partition.hpp"
#include "../base/function_ref.hpp"
#include "../base/numbers.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Queries, per head, whose context is cut into parts, each a task: they are bound by memory. Of more each stack takes all.
inline constexpr std::int64_t most_few_queries = 12;

/// Some of the queries, or of the groups, of one head of a sequence.
struct task {
  std::int64_t b, head;
  range items;
  bool leads = false;  ///< the first of its chain
};

/// Queries side by side in lanes: from query `first` of head `head` of sequence `b` on those behind it, or, `across`
/// heads, the same query of the heads behind.
struct lane_queries {
  std::int64_t b, head, first;
  bool across = false;

  [[nodiscard]] std::int64_t head_of(std::int64_t lane) const { return across ? head + lane : head; }
  [[nodiscard]] std::int64_t query_of(std::int64_t lane) const { return across ? first : first + lane; }
  /// Those from a lane on.
  [[nodiscard]] lane_queries from(std::int64_t lane) const { return {b, head_of(lane), query_of(lane), across}; }
  /// The heads and the queries of `count` lanes.
  [[nodiscard]] range heads(std::int64_t count) const { return {head, across ? head + count : head + 1}; }
  [[nodiscard]] range queries(std::int64_t count) const { return {first, across ? first + 1 : first + count}; }
  /// Of a view of queries, the row of the first lane and what leads to that of the next.
  template <class View>
  [[nodiscard]] auto row(const View& view) const {
    return view.row(b, head, first);
  }
  template <class View>
  [[nodiscard]] std::int64_t stride(const View& view) const {
    return view.stride[across ? 1 : 2];
  }
};

/// The sequences of a batch. Where all are alike, one stands for all: what is planned for each of them then takes no longer
/// for a large batch.
struct sequences {
  std::int64_t batch;
  bool alike;

  /// Those to look at are `[0, distinct())`, each of which stands for `copies()`.
  [[nodiscard]] std::int64_t distinct() const { return alike ? smaller<std::int64_t>(batch, 1) : batch; }
  [[nodiscard]] std::int64_t copies() const { return alike ? batch : 1; }
  /// Entries of a table of them; of sequences that are alike there is none.
  [[nodiscard]] std::int64_t table_size() const { return alike ? 0 : batch; }
};

/// A number of each sequence.
using of_sequence = function_ref<std::int64_t(std::int64_t)>;

/// Where the share of each sequence begins in what sequences have one after the other.
class sequence_offsets {
 public:
  /// `size(b)` is the share of sequence `b`; `table` has place for `table_size()` numbers.
  sequence_offsets(const sequences& all, std::int64_t* table, of_sequence size)
      : table_(all.alike ? nullptr : table), each_(all.alike && all.batch > 0 ? size(0) : 0) {
    std::int64_t next = 0;
    for (std::int64_t b = 0; b < all.table_size(); ++b) {
      table[b] = next;
      next += size(b);
    }
  }

  [[nodiscard]] std::int64_t operator[](std::int64_t b) const { return table_ != nullptr ? table_[b] : b * each_; }

 private:
  const std::int64_t* table_;
  std::int64_t each_;
};

/// The `length` queries of a sequence, cut into stacks of at most `lanes`. Queries share what they see in blocks of
/// `block`: no stack holds queries of two of them. As items of tasks each block begins at a multiple of `lanes`.
class query_cuts {
 public:
  query_cuts(std::int64_t length, std::int64_t block, std::int64_t lanes)
      : length_(length),
        block_(smaller(block, larger<std::int64_t>(length, 1))),
        stride_((block_ + lanes - 1) / lanes * lanes) {}

  [[nodiscard]] std::int64_t items() const {
    return length_ <= block_ ? length_ : length_ / block_ * stride_ + length_ % block_;
  }

  /// Those of a task.
  [[nodiscard]] range queries(range items) const {
    const std::int64_t block = items.begin / stride_ * block_, first = block + items.begin % stride_;
    return {first, smaller(first + items.size(), smaller(block + block_, length_))};
  }

 private:
  std::int64_t length_, block_, stride_;
};

/// The items of one sequence, `[0, length)` for every head, cut into tasks of `per_task` items.
struct sequence_tasks {
  std::int64_t b, length, per_task;
  std::int64_t first = 0;  ///< its first task in the list

  /// Tasks of a head.
  [[nodiscard]] std::int64_t cuts() const { return (length + per_task - 1) / per_task; }
};

/// What is to do, cut into tasks: the items `[0, length(b))` of every head of sequence `b`, `per_task(b)` at a time. The
/// only place that knows which task holds what. Heads that share rows, `sharing` at a time, form a chain: the tasks of a
/// chain follow each other, those of the same items first, since they read the same rows.
///
/// Long sequences come first, within a factor of two: their tasks are the long ones. A sequence without items has none.
class task_list {
 public:
  /// `table` has place for `all.table_size()` entries.
  task_list(const sequences& all, sequence_tasks* table, std::int64_t heads, of_sequence length, of_sequence per_task,
            std::int64_t sharing = 1)
      : sharing_(sharing), chains_(sharing > 0 ? heads / sharing : 0), table_(all.alike ? nullptr : table) {
    if (all.alike) {
      if (all.batch > 0) one_ = entry(0, length, per_task);
      size_ = all.batch * tasks_of(one_);
      return;
    }
    std::int64_t longest = 0;
    for (std::int64_t b = 0; b < all.batch; ++b) longest = larger(longest, length(b));
    for (std::int64_t most = longest; most > 0; most /= 2)
      for (std::int64_t b = 0; b < all.batch; ++b)
        if (length(b) <= most && length(b) > most / 2) {
          table[entries_] = entry(b, length, per_task);
          size_ += tasks_of(table[entries_++]);
        }
  }

  [[nodiscard]] std::int64_t size() const { return size_; }

  /// The same number before there is a table.
  [[nodiscard]] static std::int64_t size(const sequences& all, std::int64_t heads, of_sequence length,
                                         of_sequence per_task) {
    std::int64_t tasks = 0;
    for (std::int64_t b = 0; b < all.distinct(); ++b)
      tasks += heads * sequence_tasks{b, length(b), larger<std::int64_t>(per_task(b), 1)}.cuts();
    return all.copies() * tasks;
  }

  [[nodiscard]] task operator[](std::int64_t i) const {
    const auto [of, chain, place] = find(i);
    return at(of, chain, place);
  }

  /// The same chains, of which each begins with its last task: later queries see more, and where long tasks are begun
  /// first, threads finish together.
  [[nodiscard]] task last_first(std::int64_t i) const {
    const auto [of, chain, place] = find(i);
    return at(of, chain, of.cuts() * sharing_ - 1 - place);
  }

 private:
  struct position {
    sequence_tasks of;
    std::int64_t chain, place;
  };

  [[nodiscard]] sequence_tasks entry(std::int64_t b, of_sequence length, of_sequence per_task) const {
    return {b, length(b), larger<std::int64_t>(per_task(b), 1), size_};
  }
  [[nodiscard]] std::int64_t tasks_of(const sequence_tasks& s) const { return chains_ * sharing_ * s.cuts(); }

  [[nodiscard]] position find(std::int64_t i) const {
    sequence_tasks of = one_;
    if (table_ != nullptr) {
      std::int64_t low = 0, high = entries_;  // the entry lies in [low, high)
      while (high - low > 1) {
        const std::int64_t middle = low + (high - low) / 2;
        (table_[middle].first <= i ? low : high) = middle;
      }
      of = table_[low];
    } else {
      of.b = i / tasks_of(one_);
      of.first = of.b * tasks_of(one_);
    }
    const std::int64_t per_chain = of.cuts() * sharing_;
    return {of, (i - of.first) / per_chain, (i - of.first) % per_chain};
  }

  [[nodiscard]] task at(const sequence_tasks& of, std::int64_t chain, std::int64_t place) const {
    const std::int64_t first = place / sharing_ * of.per_task;
    return {of.b, chain * sharing_ + place % sharing_, {first, smaller(first + of.per_task, of.length)}, place == 0};
  }

  std::int64_t sharing_, chains_;
  const sequence_tasks* table_;
  sequence_tasks one_{0, 0, 1};
  std::int64_t entries_ = 0, size_ = 0;
};

}}}  // namespace cca::CCA_TARGET::detail
