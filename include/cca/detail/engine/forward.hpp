#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../../element.hpp"
#include "../../executor.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../context/source.hpp"
#include "../context/tasks.hpp"
#include "../product/list.hpp"
#include "../softmax/score_rule.hpp"
#include "few_queries.hpp"
#include "query_tile.hpp"
#include "sequence_shape.hpp"
#include "stack.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// Attention of every query over all sources in one softmax: the engine of every entry point. It is told the shapes
/// first, so that its scratch memory can be part of a caller's workspace. `Element` is the operands' `product_type`.
///
/// Each sequence takes the way that its own lengths say, as if it were alone.
template <class Element>
class forward {
  using T = compute_type<Element>;

 public:
  /// The query heads fall into `head_groups` of which no two share rows of any source: the greatest common divisor of
  /// the sources' heads. `queries(b)` and each of `rows(b)` are how many queries per head sequence `b` has, and what
  /// `most_seen` of a source says.
  forward(const sequences& all, std::int64_t heads, const tile_form& form, std::int64_t head_groups,
          const piece_form& pieces, bool staged, std::int64_t workers, of_sequence queries,
          std::initializer_list<of_sequence> rows)
      : all_(all),
        heads_(heads),
        form_(form),
        groups_(heads > 0 ? head_groups : 0),
        block_(pieces.block),
        across_(pieces.across),
        pieces_(pieces.given),
        staged_(staged) {
    std::int64_t most_tasks = 0;
    const auto plan = [&]<class Tile>(std::type_identity<Tile>) {
      for (std::int64_t b = 0; b < all_.distinct(); ++b) {
        std::int64_t parts = 0;
        for (const of_sequence& of_source : rows) parts += count_parts(of_source(b));
        const sequence_shape s = measured(queries(b), parts);
        if (s.few()) worker_size_ = larger(worker_size_, few_size(s.queries));
        if (!s.few() || s.alone)  // a context may turn out to be shorter than planned for
          worker_size_ = larger(worker_size_, s.in_lists() ? list_size<Tile>()
                                                           : stack<Tile>::size(lanes<Tile>(s), form_, staged_, pieces_));
        partials_ = s.few() ? element_count<T>(partials_ + partials_of(s)) : partials_;
        most_tasks += s.few() ? s.few_tasks() * groups_ : (s.in_lists() ? s.lists() : s.most_stacks(vectors<T>::lanes)) * heads_;
      }
    };
    of_tile(plan);
    partials_ = element_count<T>(all_.copies(), partials_);
    workers_ = std::clamp<std::int64_t>(all_.copies() * most_tasks, 1, workers);
  }

  [[nodiscard]] static std::int64_t count_parts(std::int64_t rows) { return (rows + part_rows - 1) / part_rows; }

  [[nodiscard]] std::size_t bytes() const {
    return worker_scratch<T>::bytes(workers_, worker_size_) + scratch_bytes<T>(partials_) +
           2 * scratch_bytes<sequence_tasks>(all_.table_size()) + scratch_bytes<std::int64_t>(all_.table_size());
  }

  template <class Query, class Out, class Lse, executor E, class... Source>
  void operator()(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                  const E& run, scratch& memory, const Source&... sources) const {
    attend(query, out, lse, rule, run, memory, source_ref(sources)...);
  }

 private:
  template <class Query, class Out, class Lse, executor E, class... Source>
  void attend(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
              const E& run, scratch& memory, const Source&... sources) const {
    const worker_scratch<T> scratch(memory, workers_, worker_size_);
    auto* const stacks = memory.take<sequence_tasks>(all_.table_size());
    const bool across = goes_across() && !rule.shifts();  // a tile has one slope, and one bias for each row
    const auto measure = [&](std::int64_t b) {
      return measured(query.length(b), (count_parts(sources.most_seen(b)) + ... + 0));
    };
    with_product<Element, (of_elements<Element, Source> && ...)>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) {
          using tile = query_tile<Product>;
          const score_rule<T> scaled = Product::balances ? rule.balanced() : rule;
          const auto attend = [&](std::int64_t worker, const stack_queries& queries, const stack_queries& next) {
            attend_stack<tile>(queries, next, query, out, lse, scaled, scratch[worker], sources...);
          };
          const auto per_stack = [&](std::int64_t b) {
            const std::int64_t seen = (seen_by_last(sources, b, query.length(b)) + ... + 0);
            return smaller(lanes<tile>(measure(b)), most_lanes<tile>(seen));
          };
          attend_many(measure, per_stack, attend, run, stacks);
          if (across) attend_across(measure, most_across<tile>(), attend, run, stacks);
        });
    if (block_ <= most_few_of_block && !across)
      attend_lists(query, out, lse, rule.balanced(), run, scratch, stacks, sources...);
    const auto parts = [&](std::int64_t b) { return measure(b).few_tasks(); };
    const task_list tasks(all_, memory.take<sequence_tasks>(all_.table_size()), groups_, parts,
                          [](std::int64_t) { return 1; });
    const sequence_offsets first_partial(all_, memory.take<std::int64_t>(all_.table_size()),
                                         [&](std::int64_t b) { return partials_of(measure(b)); });
    const few_memory<T> few{measure, tasks, first_partial, memory.take<T>(partials_), form_.value_dim};
    if (tasks.size() == 0) return;
    for (const int headroom : {0, most_headroom})
      if (attend_few(few, query, out, lse, rule.balanced(), headroom, run, scratch, sources...)) return;
  }

  [[nodiscard]] sequence_shape measured(std::int64_t queries, std::int64_t parts) const {
    const bool alone = form_.unit == matrix_unit::none && groups_ == heads_ && queries >= least_in_lanes<T>;
    return {queries, block_, larger<std::int64_t>(parts, 1), alone};
  }

  template <class F>
  void of_tile(const F& f) const {
    with_product<Element>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) { f(std::type_identity<query_tile<Product>>{}); });
  }
  template <class Tile>
  [[nodiscard]] std::int64_t lanes(const sequence_shape& s) const {
    return Tile::stack_lanes(smaller(s.queries, block_), larger(s.queries, s.parts * part_rows), form_, all_.batch * heads_);
  }
  /// Queries of a stack that each see `seen` rows, at most: where the next stack finds those rows in a cache, small stacks read no
  /// more memory, and it is known earlier what the next one reads.
  template <class Tile>
  [[nodiscard]] std::int64_t most_lanes(std::int64_t seen) const {
    return seen <= stack<Tile>::kept_rows(form_) / 2 ? Tile::stack_lanes(part_rows, 0, form_) : unlimited;
  }
  /// Whether heads that share rows and lists are enough to fill half a vector of lanes. `few_queries` gets 0.3 of what
  /// a stack gets that fills them all.
  [[nodiscard]] bool goes_across() const { return block_ == 1 && 2 * across_ >= width<T>; }
  /// Heads of a stack.
  template <class Tile>
  [[nodiscard]] std::int64_t most_across() const {
    return Tile::stack_lanes(across_, part_rows, form_);
  }
  /// What a task of a list takes, whichever way it goes.
  template <class Tile>
  [[nodiscard]] std::int64_t list_size() const {
    const std::int64_t stack_size =
        goes_across() ? stack<Tile>::size(smaller(across_, most_across<Tile>()), form_, staged_, pieces_) : 0;
    return larger(few_size(block_) + list_partials(), stack_size);
  }
  [[nodiscard]] std::int64_t queries_per_group(std::int64_t queries) const {
    return groups_ > 0 ? heads_ / groups_ * queries : 0;
  }
  [[nodiscard]] range heads_of_group(std::int64_t group) const {
    return {group * heads_ / groups_, (group + 1) * heads_ / groups_};
  }
  [[nodiscard]] std::int64_t few_size(std::int64_t queries_per_head) const {
    const std::int64_t queries = queries_per_group(queries_per_head);
    (void)element_count<T>(queries, few_queries<T>::size(1, form_.dim, form_.value_dim, staged_, pieces_));
    return few_queries<T>::size(queries, form_.dim, form_.value_dim, staged_, pieces_);
  }
  /// What the queries of a list have seen.
  [[nodiscard]] std::int64_t list_partials() const {
    return element_count<T>(queries_per_group(block_), partial_result<T>::size(form_.value_dim));
  }
  [[nodiscard]] std::int64_t partials_of(const sequence_shape& s) const {
    return s.few() ? element_count<T>(heads_, s.queries, s.parts, partial_result<T>::size(form_.value_dim)) : 0;
  }

  /// `attend(worker, queries, next)`: the queries of a stack, and those of the worker's next one, no queries where that is
  /// not known.
  using stack_task = function_ref<void(std::int64_t, const stack_queries&, const stack_queries&)>;

  /// A task is a stack of queries, of `lanes(b)` at most.
  template <executor E>
  void attend_many(shape_of_sequence measure, of_sequence lanes, stack_task attend, const E& run,
                   sequence_tasks* table) const {
    const auto cuts = [&](std::int64_t b) { return query_cuts(measure(b).queries, block_, lanes(b)); };
    const auto many = [&](std::int64_t b) { return !measure(b).few() && !measure(b).in_lists(); };
    const task_list tasks(all_, table, heads_, [&](std::int64_t b) { return many(b) ? cuts(b).items() : 0; }, lanes);
    const auto queries_of = [&](std::int64_t i) -> stack_queries {
      const task task = tasks.last_first(i);
      const range some = cuts(task.b).queries(task.items);
      return {{task.b, task.head, some.begin}, heads_, some.size()};
    };
    run_tasks_in_sight(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t i, std::int64_t next) {
      attend(worker, queries_of(i), next < tasks.size() ? queries_of(next) : stack_queries{});
    });
  }

  template <class Tile, class Query, class Out, class Lse, class... Source>
  void attend_stack(const stack_queries& queries, const stack_queries& next, tensor_view<Query> query,
                    tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule, T* scratch,
                    const Source&... sources) const {
    // A mean of finite values is finite: where it is not, it may have overflowed on the way, and is taken again.
    for (const int headroom : {0, most_headroom}) {
      stack<Tile> stack(scratch, {form_, &rule, headroom}, queries, staged_);
      if (next.count > 0) stack.expect(next, query, out);
      stack.for_each_tile([&](Tile tile, std::int64_t at) {
        const lane_queries of = queries.lanes.from(at);
        tile.begin(of.row(query), of.stride(query), rule.query_factor());
      });
      (stack.absorb(sources, nothing_after_blocks{}), ...);
      bool finite = true;
      stack.for_each_tile([&](Tile tile, std::int64_t at) {
        const lane_queries of = queries.lanes.from(at);
        finite &= tile.finish(of);
        tile.write(of.row(out), of.stride(out));
        for (std::int64_t q = 0; headroom == 0 && lse.data != nullptr && q < tile.count(); ++q)
          *of.from(q).row(lse) = static_cast<Lse>(tile.lse(q, of));
      });
      if (finite) break;
    }
  }

  /// A task is one query of the heads that share rows and lists, `most` of them, which fit into a stack.
  template <executor E>
  void attend_across(shape_of_sequence measure, std::int64_t most, stack_task attend, const E& run,
                     sequence_tasks* table) const {
    const std::int64_t stacks = (across_ + most - 1) / most;
    const auto count = [&](std::int64_t b) { return measure(b).in_lists() ? measure(b).queries * stacks : 0; };
    const task_list tasks(all_, table, heads_ / across_, count, [](std::int64_t) { return 1; });
    run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t place) {
      const task task = tasks.last_first(place);
      const std::int64_t head = task.head * across_, first = head + task.items.begin % stacks * most;
      attend(worker, {{task.b, first, task.items.begin / stacks, true}, heads_, smaller(most, head + across_ - first)}, {});
    });
  }

  /// A task is the queries of the heads that share rows, over a part of one source; then the parts are merged. Returns
  /// whether all was finite; with a headroom only what is not finite yet is written.
  template <class Query, class Out, class Lse, executor E, class... Source>
  [[nodiscard]] bool attend_few(const few_memory<T>& few, tensor_view<Query> query, tensor_view<Out> out,
                                lse_view<Lse> lse, const score_rule<T>& rule, int headroom, const E& run,
                                const worker_scratch<T>& scratch, const Source&... sources) const {
    run_tasks(run, workers_, few.tasks.size(), [&](std::int64_t worker, std::int64_t place) {
      const task task = few.tasks[place];
      const std::int64_t b = task.b, part = task.items.begin;
      const sequence_shape s = few.measure(b);
      const range heads = heads_of_group(task.head);
      few_queries<T> queries(scratch[worker], queries_per_group(s.queries), form_.dim, form_.value_dim, staged_, rule,
                             headroom);
      const few_places places{b, heads_, heads, {0, s.queries}};
      const few_results<T> results = few.results(b, s, heads.begin, part);
      for (std::int64_t h = heads.begin; h < heads.end; ++h)
        for (std::int64_t i = 0; i < s.queries; ++i) {
          const std::int64_t q = (h - heads.begin) * s.queries + i;
          queries.load(q, query.row(b, h, i));
          results[q].begin();
        }
      std::int64_t source_part = part;  // counted from the source's first
      const auto absorb = [&](const auto& source) {
        const std::int64_t parts = count_parts(source.most_seen(b));
        if (source_part >= 0 && source_part < parts)
          queries.absorb(source, places, {source_part * part_rows, (source_part + 1) * part_rows}, results);
        source_part -= parts;
      };
      (absorb(sources), ...);
    });
    std::atomic<bool> finite{true};
    run_tasks(run, workers_, all_.batch * heads_, [&](std::int64_t, std::int64_t place) {
      const std::int64_t b = place / heads_, h = place % heads_;
      const sequence_shape s = few.measure(b);
      for (std::int64_t i = 0; s.few() && i < s.queries; ++i)
        if (!merge_parts(few, s, b, h, i, out, lse, rule, headroom)) finite = false;
    });
    return finite;
  }

  /// Writes the answer of one query from its parts. Returns whether it was finite.
  template <class Out, class Lse>
  [[nodiscard]] bool merge_parts(const few_memory<T>& few, const sequence_shape& s, std::int64_t b, std::int64_t h,
                                 std::int64_t i, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                                 int headroom) const {
    partial_result<T> whole = few.results(b, s, h, 0)[i];
    for (std::int64_t part = 1; part < s.parts; ++part)
      whole.merge(few.results(b, s, h, part)[i], rule.unit_in_base_2());
    return write(whole, b, h, i, out, lse, rule, headroom);
  }

  /// Writes the answer of one query.
  template <class Out, class Lse>
  [[nodiscard]] bool write(const partial_result<T>& whole, std::int64_t b, std::int64_t h, std::int64_t i,
                           tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule, int headroom) const {
    const T share = whole.share(rule.sink_sum(b, h, i), rule.unit_in_base_2(), headroom);
    if (headroom == 0) {
      scale_row(whole.out(), form_.value_dim, share, out.row(b, h, i));
      if (lse.data) *lse.row(b, h, i) = static_cast<Lse>(rule.log(whole.total(rule.unit_in_base_2(), 0), b, h, i));
    }
    return replace_infinite(whole.out(), 1, form_.value_dim, share, out.row(b, h, i));
  }

  /// A task is the queries of a list, in the heads that share rows, over all sources one after the other.
  template <class Query, class Out, class Lse, executor E, class... Source>
  void attend_lists(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                    const E& run, const worker_scratch<T>& scratch, sequence_tasks* table,
                    const Source&... sources) const {
    const task_list tasks(
        all_, table, groups_,
        [&](std::int64_t b) { return measured(query.length(b), 1).in_lists() ? query.length(b) : 0; },
        [&](std::int64_t) { return block_; });
    run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t place) {
      const task task = tasks.last_first(place);
      const std::int64_t b = task.b;
      const few_places places{b, heads_, heads_of_group(task.head), task.items};
      T* const partials = scratch[worker];
      const few_results<T> results{partials, partial_result<T>::size(form_.value_dim), form_.value_dim};
      for (const int headroom : {0, most_headroom}) {
        few_queries<T> queries(partials + list_partials(), places.count(), form_.dim, form_.value_dim, staged_, rule,
                               headroom);
        for (std::int64_t q = 0; q < places.count(); ++q) {
          queries.load(q, query.row(b, places.head(q), places.query(q)));
          results[q].begin();
        }
        (queries.absorb(sources, places, all_rows, results), ...);
        bool finite = true;
        for (std::int64_t q = 0; q < places.count(); ++q)
          finite &= write(results[q], b, places.head(q), places.query(q), out, lse, rule, headroom);
        if (finite) break;
      }
    });
  }

  sequences all_;
  std::int64_t heads_;
  tile_form form_;
  std::int64_t groups_, block_, across_, partials_ = 0, workers_ = 1, worker_size_ = 0;
  bool pieces_, staged_;
};

}}}  // namespace cca::CCA_TARGET::detail
