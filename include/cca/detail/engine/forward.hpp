#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
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
  /// the sources' heads. `queries(b)` and each of `rows(b)` are how many queries per head sequence `b` has, and how
  /// many rows of a source a query sees at most.
  template <class Queries, class... Rows>
  forward(const sequences& all, std::int64_t heads, const tile_form& form, std::int64_t head_groups,
          const piece_form& pieces, bool staged, std::int64_t workers, const Queries& queries, const Rows&... rows)
      : all_(all),
        heads_(heads),
        form_(form),
        groups_(head_groups),
        block_(pieces.block),
        across_(pieces.across),
        pieces_(pieces.given),
        staged_(staged) {
    std::int64_t most_tasks = 0;
    const auto plan = [&]<class Tile>(std::type_identity<Tile>) {
      for (std::int64_t b = 0; b < all_.distinct(); ++b) {
        const sequence s = measured(queries(b), rows(b)...);
        if (s.few()) worker_size_ = larger(worker_size_, few_size(s.queries));
        if (!s.few() || s.alone)  // a context may turn out to be shorter than planned for
          worker_size_ = larger(worker_size_, s.in_lists() ? list_size<Tile>()
                                                           : stack<Tile>::size(lanes<Tile>(s), form_, staged_, pieces_));
        partials_ = s.few() ? element_count<T>(partials_ + partials_of(s)) : partials_;
        most_tasks += s.few() ? few_tasks(s) * groups_ : s.in_lists() ? lists(s) * heads_ : most_stacks(s) * heads_;
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
    with_product<Element, (of_elements<Element, Source> && ...)>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) {
          const score_rule<T> scaled = Product::balances ? rule.balanced() : rule;
          attend_many<query_tile<Product>>(query, out, lse, scaled, run, scratch, stacks, sources...);
          if (across) attend_across<query_tile<Product>>(query, out, lse, scaled, run, scratch, stacks, sources...);
        });
    if (block_ <= most_few_of_block && !across)
      attend_lists(query, out, lse, rule.balanced(), run, scratch, stacks, sources...);
    const auto measure = [&](std::int64_t b) { return measured(query.length(b), sources.most_seen(b)...); };
    const auto parts = [&](std::int64_t b) { return few_tasks(measure(b)); };
    const task_list tasks(all_, memory.take<sequence_tasks>(all_.table_size()), groups_, parts,
                          [](std::int64_t) { return 1; });
    const sequence_offsets first_partial(all_, memory.take<std::int64_t>(all_.table_size()),
                                         [&](std::int64_t b) { return partials_of(measure(b)); });
    const few_memory few{tasks, first_partial, memory.take<T>(partials_), form_.value_dim};
    if (tasks.size() == 0) return;
    for (const int headroom : {0, most_headroom})
      if (attend_few(few, query, out, lse, rule.balanced(), headroom, run, scratch, sources...)) return;
  }

  /// How long a sequence is: its queries, per head, those of them that share lists, and the parts of its context, which few
  /// queries' is cut into. `alone`: each head fills lanes of its own, which after a context of one part go as a stack.
  struct sequence {
    std::int64_t queries, block, parts;
    bool alone;

    [[nodiscard]] bool few() const { return queries <= smaller(most_few_queries, block) && !(alone && parts == 1); }
    /// Whether the few queries of each list go by themselves.
    [[nodiscard]] bool in_lists() const { return queries > block && block <= most_few_of_block; }
  };
  template <class... Rows>
  [[nodiscard]] sequence measured(std::int64_t queries, Rows... rows) const {
    const bool alone = form_.unit == matrix_unit::none && groups_ == heads_ && queries >= least_in_lanes<T>;
    return {queries, block_, larger<std::int64_t>((count_parts(rows) + ... + 0), 1), alone};
  }

  /// What few queries work with beside the scratch of each worker.
  struct few_memory {
    const task_list& tasks;
    const sequence_offsets& first;
    T* partials;
    std::int64_t value_dim;

    /// What the queries of sequence `b` have seen of a part, from the first of a head on.
    [[nodiscard]] few_results<T> results(std::int64_t b, const sequence& s, std::int64_t head, std::int64_t part) const {
      const std::int64_t size = partial_result<T>::size(value_dim);
      return {partials + first[b] + (head * s.queries * s.parts + part) * size, s.parts * size, value_dim};
    }
  };

  template <class F>
  void of_tile(const F& f) const {
    with_product<Element>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) { f(std::type_identity<query_tile<Product>>{}); });
  }
  template <class Tile>
  [[nodiscard]] std::int64_t lanes(const sequence& s) const {
    return Tile::stack_lanes(smaller(s.queries, block_), larger(s.queries, s.parts * part_rows), form_);
  }
  /// Stacks of many queries of a head, if every tile were one of its own. How many tiles a stack has depends on the
  /// context, and a workspace is sized for more of that than some entry points have.
  [[nodiscard]] static std::int64_t most_stacks(const sequence& s) {
    return (query_cuts(s.queries, s.block, vectors<T>::lanes).items() + vectors<T>::lanes - 1) / vectors<T>::lanes;
  }
  /// Tasks of few queries, for each group of heads.
  [[nodiscard]] static std::int64_t few_tasks(const sequence& s) { return s.few() && s.queries > 0 ? s.parts : 0; }
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
  /// Lists of a sequence.
  [[nodiscard]] static std::int64_t lists(const sequence& s) { return (s.queries + s.block - 1) / s.block; }
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
  [[nodiscard]] std::int64_t partials_of(const sequence& s) const {
    return s.few() ? element_count<T>(heads_, s.queries, s.parts, partial_result<T>::size(form_.value_dim)) : 0;
  }

  /// A task is a stack of queries.
  template <class Tile, class Query, class Out, class Lse, executor E, class... Source>
  void attend_many(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                   const E& run, const worker_scratch<T>& scratch, sequence_tasks* table,
                   const Source&... sources) const {
    const auto measure = [&](std::int64_t b) { return measured(query.length(b), sources.most_seen(b)...); };
    const auto cuts = [&](std::int64_t b) { return query_cuts(query.length(b), block_, lanes<Tile>(measure(b))); };
    const auto many = [&](std::int64_t b) { return !measure(b).few() && !measure(b).in_lists(); };
    const task_list tasks(
        all_, table, heads_, [&](std::int64_t b) { return many(b) ? cuts(b).items() : 0; },
        [&](std::int64_t b) { return lanes<Tile>(measure(b)); });
    run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t i) {
      const task task = tasks.last_first(i);
      const range some = cuts(task.b).queries(task.items);
      attend_stack<Tile>({{task.b, task.head, some.begin}, heads_, some.size()}, query, out, lse, rule, scratch[worker],
                         sources...);
    });
  }

  template <class Tile, class Query, class Out, class Lse, class... Source>
  void attend_stack(const stack_queries& queries, tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse,
                    const score_rule<T>& rule, T* scratch, const Source&... sources) const {
    // A mean of finite values is finite: where it is not, it may have overflowed on the way, and is taken again.
    for (const int headroom : {0, most_headroom}) {
      stack<Tile> stack(scratch, {form_, &rule, headroom}, queries, staged_);
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

  /// A task is one query of the heads that share rows and lists, some of them that fit into a stack.
  template <class Tile, class Query, class Out, class Lse, executor E, class... Source>
  void attend_across(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                     const E& run, const worker_scratch<T>& scratch, sequence_tasks* table,
                     const Source&... sources) const {
    const std::int64_t most = most_across<Tile>(), stacks = (across_ + most - 1) / most;
    const task_list tasks(
        all_, table, heads_ / across_,
        [&](std::int64_t b) { return measured(query.length(b)).in_lists() ? query.length(b) * stacks : 0; },
        [](std::int64_t) { return 1; });
    run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t place) {
      const task task = tasks.last_first(place);
      const std::int64_t head = task.head * across_, first = head + task.items.begin % stacks * most;
      attend_stack<Tile>({{task.b, first, task.items.begin / stacks, true}, heads_, smaller(most, head + across_ - first)},
                         query, out, lse, rule, scratch[worker], sources...);
    });
  }

  /// A task is the queries of the heads that share rows, over a part of one source; then the parts are merged. Returns
  /// whether all was finite; with a headroom only what is not finite yet is written.
  template <class Query, class Out, class Lse, executor E, class... Source>
  [[nodiscard]] bool attend_few(const few_memory& few, tensor_view<Query> query, tensor_view<Out> out,
                                lse_view<Lse> lse, const score_rule<T>& rule, int headroom, const E& run,
                                const worker_scratch<T>& scratch, const Source&... sources) const {
    const auto measure = [&](std::int64_t b) { return measured(query.length(b), sources.most_seen(b)...); };
    run_tasks(run, workers_, few.tasks.size(), [&](std::int64_t worker, std::int64_t place) {
      const task task = few.tasks[place];
      const std::int64_t b = task.b, part = task.items.begin;
      const sequence s = measure(b);
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
      const sequence s = measure(b);
      for (std::int64_t i = 0; s.few() && i < s.queries; ++i)
        if (!merge_parts(few, s, b, h, i, out, lse, rule, headroom)) finite = false;
    });
    return finite;
  }

  /// Writes the answer of one query from its parts. Returns whether it was finite.
  template <class Out, class Lse>
  [[nodiscard]] bool merge_parts(const few_memory& few, const sequence& s, std::int64_t b, std::int64_t h,
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
        [&](std::int64_t b) { return measured(query.length(b)).in_lists() ? query.length(b) : 0; },
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
