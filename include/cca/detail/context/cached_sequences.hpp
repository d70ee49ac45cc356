#pragma once

#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

#include "../../cache_shape.hpp"
#include "../../call.hpp"
#include "../../options.hpp"
#include "../../partition.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/refuse.hpp"
#include "../base/scratch.hpp"
#include "../pool/observers.hpp"
#include "../pool/observing.hpp"
#include "../pool/pooler.hpp"
#include "row_store.hpp"
#include "source.hpp"
#include "step_observers.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The sequences of a cache: what of each is held, and in which rows; which of them a query sees; how tokens come in.
template <class Element, class Core>
struct cached_sequences {
  using ring = row_ring<Element>;
  using bias = compute_type<Element>;
  using tokens = row_views<Element, Element>;  ///< new ones, as they are kept

  struct sequence {
    std::int64_t length = 0;
    std::int64_t oldest = 0;   // of the raw tokens held behind the sink tokens, [oldest, length)
    row_store<Core> cores;     // row b: group b
    row_store<bias> biases;    // of the cores, keys of one element; of none where they have none
    row_store<Element> sinks;  // row t: sink token t, held for good
    ring raw;
    row_ring<bias> observers;  // of every query head, by their numbers; none where the pooling asks none
  };

  cache_shape shape;  ///< its batch is that of `all`
  cca::options options;
  std::int64_t core_heads;
  std::vector<sequence> all{};

  [[nodiscard]] const sequence& at(std::int64_t b) const { return all[static_cast<std::size_t>(b)]; }
  [[nodiscard]] sequence& at(std::int64_t b) { return all[static_cast<std::size_t>(b)]; }
  [[nodiscard]] cca::partition partition() const { return partition_of(options); }

  /// Sink tokens among the first `length` tokens.
  [[nodiscard]] std::int64_t sink_count(std::int64_t length) const { return partition().sink_count(length); }

  /// Raw tokens of a sequence that are held.
  [[nodiscard]] std::int64_t raw_count(const sequence& s) const {
    return sink_count(s.length) + range{s.oldest, s.length}.size();
  }

  /// Cores that are kept after `length` tokens: those of the complete groups, or where observers choose, of those that have
  /// left the window of the next query. Without a window no query ever sees any.
  [[nodiscard]] std::int64_t group_count(std::int64_t length) const {
    if (options.window == unlimited) return 0;
    return observes(options.pool) ? partition().core_count(length) : partition().group_count(length);
  }

  /// @{
  /// Of the observers: where they are; whether there are any; those held, of which some query or a rewind can have need;
  /// the most of them.
  [[nodiscard]] observer_grid grid() const { return observer_grid(options); }
  [[nodiscard]] bool observed() const { return observes(options.pool) && pools(options); }
  [[nodiscard]] range observers(const sequence& s) const {
    return observed() ? grid().within({s.oldest, s.length}) : range{};
  }
  [[nodiscard]] std::int64_t observer_limit() const { return raw_limit() / grid().stride + 1; }
  /// @}

  [[nodiscard]] sequence new_sequence() const {
    return {0,
            options.sink_tokens,
            {core_heads, shape.dim, shape.value_dim},
            {core_heads, has_core_biases(options) ? 1 : 0, 0},
            {shape.kv_heads, shape.dim, shape.value_dim},
            {shape.kv_heads, shape.dim, shape.value_dim, options.sink_tokens},
            {observed() ? shape.heads : 0, shape.dim, 2, 0}};
  }

  /// Empties a sequence; its memory stays.
  void clear(sequence& s) const {
    s.length = 0;
    s.oldest = options.sink_tokens;
  }

  /// Takes a sequence in, as one more of the batch.
  void add(sequence&& s) {
    reserve("shape.capacity", s, shape.capacity);
    all.push_back(std::move(s));
    shape.batch = std::ssize(all);
  }

  /// Raw entries that a sequence of any length needs behind its sink tokens: what the queries from `longest - 2 rewind` on
  /// see. A refused draft takes one `rewind` away, the tokens before it can then be taken back by the other.
  [[nodiscard]] std::int64_t raw_limit() const {
    std::int64_t limit = options.window;
    for (const std::int64_t more : {options.group_size, shape.rewind, shape.rewind})
      limit = limit > unlimited - more ? unlimited : limit + more;
    return limit;
  }

  /// Room for `length` tokens, which `argument` asks for. While the raw entries still grow nothing has wrapped around:
  /// every token keeps its row.
  void reserve(const char* argument, sequence& s, std::int64_t length) {
    const std::int64_t cores = group_count(length), sinks = sink_count(length);
    const std::int64_t raw = smaller(length - sinks, raw_limit());
    const long double bytes = elements(core_heads, cores, row_bytes<Core>(shape.dim, shape.value_dim)) +
                              elements(shape.kv_heads, sinks + raw, row_bytes<Element>(shape.dim, shape.value_dim));
    if (bytes > most_allocated_bytes)
      refuse(argument, {length, " tokens of ", bytes, " bytes"}, {"at most 2^40 bytes per sequence"});
    s.cores.reserve(cores, unlimited);
    if (has_core_biases(options)) s.biases.reserve(cores, unlimited);
    s.sinks.reserve(sinks, options.sink_tokens);
    s.raw.reserve(raw, raw_limit());
    if (observed()) s.observers.reserve(smaller(grid().count(length), observer_limit()), observer_limit());
  }

  /// Copies the rows `held` of a ring to one of the same capacity.
  template <class Rows>
  static void copy_held(const Rows& source, range held, Rows& target) {
    const typename Rows::pieces at = source.find(held);
    target.write(at.first, [&](std::int64_t h) { return source.rows(h, at.row); });
    target.write(at.second, [&](std::int64_t h) { return source.rows(h, 0); });
  }

  /// Makes one sequence a copy of another.
  void copy(const sequence& source, sequence& target) const {
    const std::int64_t cores = group_count(source.length), sinks = sink_count(source.length);
    target.cores.reserve(cores, source.cores.capacity());
    if (has_core_biases(options)) target.biases.reserve(cores, source.biases.capacity());
    target.sinks.reserve(sinks, source.sinks.capacity());
    if (target.raw.capacity() != source.raw.capacity()) {  // a token's row goes by the capacity
      ring raw(shape.kv_heads, shape.dim, shape.value_dim, options.sink_tokens);
      raw.reserve(source.raw.capacity(), source.raw.capacity());
      target.raw = std::move(raw);
    }
    if (target.observers.capacity() != source.observers.capacity()) {
      row_ring<bias> observers(source.observers.heads(), shape.dim, 2, 0);
      observers.reserve(source.observers.capacity(), source.observers.capacity());
      target.observers = std::move(observers);
    }
    for (std::int64_t h = 0; h < core_heads; ++h) {
      target.cores.copy_rows(h, 0, source.cores.rows(h, 0), cores);
      target.biases.copy_rows(h, 0, source.biases.rows(h, 0), cores);
    }
    for (std::int64_t h = 0; h < shape.kv_heads; ++h) target.sinks.copy_rows(h, 0, source.sinks.rows(h, 0), sinks);
    copy_held(source.raw, {source.oldest, source.length}, target.raw);
    copy_held(source.observers, observers(source), target.observers);
    target.length = source.length;
    target.oldest = source.oldest;
  }

  /// Those of batch entry `b` of a step, of as many sequences and new tokens as its queries.
  template <class T, class Query>
  [[nodiscard]] auto observers_of_step(const sequence& s, const tensor_view<Query>& query, std::int64_t b,
                                       const pool_memory<T>& memory) const {
    return step_observers<T, bias, Query>{s.observers, grid(), s.length, query.sequence(b),
                                          memory.sums + b * shape.heads * (query.length() / grid().stride + 1)};
  }

  /// Scratch of pooling what `count` sequences from `first` on have to pool as `new_tokens` come to each.
  template <class T>
  [[nodiscard]] pool_plan<T> plan_pooling(std::int64_t first, std::int64_t count, std::int64_t new_tokens,
                                          const execution& run) const {
    std::int64_t groups = 0, tasks = 1;  // of the sequence that has most
    for (std::int64_t b = first; b < first + count; ++b)
      groups = larger(groups, group_count(at(b).length + new_tokens) - group_count(at(b).length));
    const std::int64_t observers = observed() ? new_tokens / grid().stride + 1 : 0;
    if (pools(options))
      tasks = larger(task_list::size(
                         {1, true}, shape.kv_heads, [&](std::int64_t) { return groups; },
                         [&](std::int64_t) { return groups_per_task(options.group_size); }),
                     observing_tasks({1, true}, shape.heads, [&](std::int64_t) { return observers; }));
    return {worker_count(run, tasks), group_rows<T>::size(shape.dim, shape.value_dim, !in_place<T, Element>), 0,
            element_count<observer_sum<T>>(count, shape.heads, observers)};
  }

  /// Pools the groups that the new tokens complete, or that leave the window by them, from old rows and new ones.
  template <class T, class Query>
  void pool_new_groups(std::int64_t first, const tensor_view<Query>& query, const tokens& fresh, const execution& run,
                       const pool_memory<T>& memory) {
    if (!pools(options)) return;
    for (std::int64_t b = 0; b < query.batch(); ++b) {
      const sequence& s = at(first + b);
      const auto absorb = [&](auto& to, std::int64_t, std::int64_t h, range rows) {
        to.absorb(s.sinks.rows(h, 0), intersection(rows, {0, sink_count(s.length)}));
        const typename ring::pieces old = s.raw.find(intersection(rows, {sink_count(s.length), s.length}));
        to.absorb(s.raw.rows(h, old.row), {0, old.first.size()});
        to.absorb(s.raw.rows(h, 0), {0, old.second.size()});
        to.absorb(rows_of(fresh, b, h), shifted(intersection(rows, {s.length, rows.end}), -s.length));
      };
      const auto observers = observers_of_step(s, query, b, memory);
      if (observed())
        observe<T>(
            {1, true}, shape.heads, shape.kv_heads, [&](std::int64_t) { return observers.fresh(); }, options, observers,
            absorb, run, memory.workers.workers(), memory.table,
            [&](std::int64_t worker) {
              return group_rows<T>(memory.workers[worker], shape.dim, shape.value_dim,
                                   pooling_rule<T>(options, shape.dim));
            },
            [&](std::int64_t, std::int64_t h, std::int64_t i, const observer_sum<T>& sum) {
              observers.fresh_sum(h, i) = sum;
            });
      const auto last = [&](std::int64_t, std::int64_t h, std::int64_t token) {
        return query.row(b, h, token - s.length);
      };
      const auto core = [&](std::int64_t, std::int64_t h, std::int64_t c) {
        return core_place{s.cores.key(h, c), s.cores.value(h, c),
                          has_core_biases(options) ? s.biases.key(h, c) : nullptr, s.cores.key_scale(h, c),
                          s.cores.value_scale(h, c)};
      };
      const range groups{group_count(s.length), group_count(s.length + query.length())};
      pool_groups<T>(
          {{1, true}, shape.heads, shape.kv_heads, core_heads}, [&](std::int64_t) { return groups; }, shape.dim,
          shape.value_dim, options, absorb, last, core, run, memory, observers_ref<T>(observers));
    }
  }

  /// Takes over the new observers of batch entry `b`, before the length changes.
  template <class T, class Query>
  void keep_observers(sequence& s, const tensor_view<Query>& query, std::int64_t b, const pool_memory<T>& memory) const {
    if (observed()) observers_of_step(s, query, b, memory).keep(s.observers);
  }

  /// Takes over the new sink tokens of batch entry `b` of the views. They count when the length says so: queries are
  /// answered in between.
  void keep_sinks(sequence& s, const tokens& fresh, std::int64_t b) const {
    const range sinks{s.length, sink_count(s.length + fresh.key.length())};
    for (std::int64_t h = 0; h < shape.kv_heads && !sinks.empty(); ++h)
      s.sinks.copy_rows(h, sinks.begin, rows_of(fresh, b, h), sinks.size());
  }

  /// Takes over the other new raw tokens of batch entry `b` of the views that later queries or a rewind can need.
  void keep(sequence& s, const tokens& fresh, std::int64_t b) {
    const std::int64_t length = s.length + fresh.key.length();
    const range kept{larger(larger(s.length, sink_count(length)), length - s.raw.capacity()), length};
    s.raw.write(kept, [&](std::int64_t h) { return rows_of(fresh, b, h).from(kept.begin - s.length); });
    s.length = length;
    s.oldest = larger(s.oldest, length - s.raw.capacity());
  }

  /// The raw tokens held behind the sink tokens that the next query sees.
  [[nodiscard]] typename ring::pieces window_of(const sequence& s) const {
    return s.raw.find({partition().raw(s.length).begin, s.length});
  }

  /// Rows of the sources of a step, of the longest sequence.
  struct source_rows {
    std::int64_t sinks, cores, raw, fresh;
  };
  [[nodiscard]] source_rows rows_of_step(std::int64_t first, std::int64_t batch, std::int64_t count) const {
    source_rows rows{0, 0, 0, count};
    for (std::int64_t b = first; b < first + batch; ++b) {
      rows.sinks = larger(rows.sinks, at(b).sinks.capacity());
      rows.cores = larger(rows.cores, at(b).cores.capacity());
      rows.raw = larger(rows.raw, at(b).raw.capacity());
    }
    return rows;
  }

  /// Calls `f` with the sources of a step: the sink tokens, new ones among them; the cores; the two pieces of the other raw
  /// tokens held; and the new tokens behind the sink tokens.
  template <class F>
  void with_sources(std::int64_t first, const tokens& fresh, const source_rows& rows, const F& f) const {
    const cca::partition partition = this->partition();
    const auto sequence_of = [this, first](std::int64_t b) -> const sequence& { return at(first + b); };
    /// Of the raw tokens that query `i` sees those of a piece, counted from its first.
    const auto seen_of = [partition, sequence_of](std::int64_t b, std::int64_t i, range piece) {
      return shifted(intersection(partition.raw(sequence_of(b).length + i), piece), -piece.begin);
    };
    const auto rows_each = [](std::int64_t count) { return [count](std::int64_t) { return count; }; };
    /// Positions are counted from the first new token. Caches have no biases of tokens.
    const auto at = [sequence_of](std::int64_t b, std::int64_t token) {
      return row_terms<bias>{{.first = token - sequence_of(b).length, .step = 1}};
    };
    f(source{shape.kv_heads, rows_each(rows.sinks),
             [=](std::int64_t b, std::int64_t h) { return sequence_of(b).sinks.rows(h, 0); },
             [=](std::int64_t b, std::int64_t, std::int64_t i) { return partition.sinks(sequence_of(b).length + i); },
             [=](std::int64_t b, std::int64_t) { return at(b, 0); }},
      source{core_heads, rows_each(rows.cores),
             [=](std::int64_t b, std::int64_t h) { return sequence_of(b).cores.rows(h, 0); },
             [=](std::int64_t b, std::int64_t, std::int64_t i) {
               return range{0, partition.core_count(sequence_of(b).length + i)};
             },
             [=, this](std::int64_t b, std::int64_t h) {
               const std::int64_t core_head = h / (shape.heads / core_heads);
               return row_terms<bias>{core_positions(partition, sequence_of(b).length),
                                      has_core_biases(options) ? sequence_of(b).biases.key(core_head, 0) : nullptr, 1};
             }},
      source{shape.kv_heads, rows_each(rows.raw),
             [=, this](std::int64_t b, std::int64_t h) {
               return sequence_of(b).raw.rows(h, window_of(sequence_of(b)).row);
             },
             [=, this](std::int64_t b, std::int64_t, std::int64_t i) {
               return seen_of(b, i, window_of(sequence_of(b)).first);
             },
             [=, this](std::int64_t b, std::int64_t) { return at(b, window_of(sequence_of(b)).first.begin); }},
      source{shape.kv_heads, rows_each(rows.raw),
             [=](std::int64_t b, std::int64_t h) { return sequence_of(b).raw.rows(h, 0); },
             [=, this](std::int64_t b, std::int64_t, std::int64_t i) {
               return seen_of(b, i, window_of(sequence_of(b)).second);
             },
             [=, this](std::int64_t b, std::int64_t) { return at(b, window_of(sequence_of(b)).second.begin); }},
      source{shape.kv_heads, rows_each(rows.fresh),
             [=](std::int64_t b, std::int64_t h) { return rows_of(fresh, b, h); },
             [=](std::int64_t b, std::int64_t, std::int64_t i) {
               const std::int64_t length = sequence_of(b).length;
               return seen_of(b, i, {length, length + rows.fresh});
             },
             [=](std::int64_t b, std::int64_t) { return at(b, sequence_of(b).length); }});
  }
};

}}}  // namespace cca::CCA_TARGET::detail
