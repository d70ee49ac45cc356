#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
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

/// Queries, per head, up to which they share rows along the dim (`few_queries`); more of them ride in lanes (`stack`). Where
/// the two cross was measured: of 12, 14 and 16 queries after 32K keys, `few_queries` takes 0.86, 1.14 and 0.98 of the time
/// of a stack with AVX-512, 0.94, 1.18 and 1.20 with AVX2.
inline constexpr std::int64_t most_few_queries = 12;

/// Attention of every query over all sources in one softmax: the engine of every entry point. It is told the shapes
/// first, so that its scratch memory can be part of a caller's workspace. `Element` is the operands' `product_type`.
///
/// Each sequence takes the way that its own lengths say, as if it were alone.
template <class Element>
class forward {
  using T = compute_type<Element>;

 public:
  /// The query heads fall into `head_groups` of which no two share rows of any source: the greatest common divisor of
  /// the sources' heads. `queries(b)` and each of `rows(b)` are how many queries per head, and rows of a source, sequence
  /// `b` has.
  template <class Queries, class... Rows>
  forward(const sequences& all, std::int64_t heads, const tile_form& form, std::int64_t head_groups, bool staged,
          std::int64_t workers, const Queries& queries, const Rows&... rows)
      : all_(all), heads_(heads), form_(form), groups_(head_groups) {
    std::int64_t most_tasks = 0;
    const auto plan = [&]<class Tile>(std::type_identity<Tile>) {
      for (std::int64_t b = 0; b < all_.distinct(); ++b) {
        const sequence s = measured(queries(b), rows(b)...);
        worker_size_ =
            larger(worker_size_, s.few() ? few_size(s, staged) : stack<Tile>::size(lanes<Tile>(s), form_, staged));
        partials_ = s.few() ? element_count<T>(partials_ + partials_of(s)) : partials_;
        most_tasks += s.few() ? few_tasks(s) * groups_ : most_stacks(s) * heads_;
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
    sequence_tasks* const stacks = memory.take<sequence_tasks>(all_.table_size());
    with_product<Element, (of_elements<Element, Source> && ...)>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) {
          attend_many<query_tile<Product>>(query, out, lse, Product::balances ? rule.balanced() : rule, run, scratch,
                                           stacks, sources...);
        });
    const auto measure = [&](std::int64_t b) { return measured(query.length(b), sources.length(b)...); };
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

  /// How long a sequence is: its queries, per head, and the parts of its context. Those are what few queries' context is
  /// cut into, and how long it is for many.
  struct sequence {
    std::int64_t queries, parts;

    [[nodiscard]] bool few() const { return queries <= most_few_queries; }
  };
  template <class... Rows>
  static sequence measured(std::int64_t queries, Rows... rows) {
    return {queries, larger<std::int64_t>((count_parts(rows) + ... + 0), 1)};
  }

  /// What few queries work with beside the scratch of each worker.
  struct few_memory {
    const task_list& tasks;
    const sequence_offsets& first;
    T* partials;
    std::int64_t value_dim;

    /// What query `i` of head `h` of sequence `b` has seen of a part.
    [[nodiscard]] partial_result<T> partial(std::int64_t b, const sequence& s, std::int64_t h, std::int64_t i,
                                            std::int64_t part) const {
      return {partials + first[b] + ((h * s.queries + i) * s.parts + part) * partial_result<T>::size(value_dim),
              value_dim};
    }
  };

  template <class F>
  void of_tile(const F& f) const {
    with_product<Element>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) { f(std::type_identity<query_tile<Product>>{}); });
  }
  template <class Tile>
  [[nodiscard]] std::int64_t lanes(const sequence& s) const {
    return Tile::stack_lanes(s.queries, larger(s.queries, s.parts * part_rows), form_);
  }
  /// Stacks of many queries of a head, if every tile were one of its own. How many tiles a stack has depends on the
  /// context, and a workspace is sized for more of that than some entry points have.
  [[nodiscard]] static std::int64_t most_stacks(const sequence& s) {
    return (s.queries + vectors<T>::lanes - 1) / vectors<T>::lanes;
  }
  /// Tasks of few queries, for each group of heads.
  [[nodiscard]] static std::int64_t few_tasks(const sequence& s) { return s.few() && s.queries > 0 ? s.parts : 0; }
  [[nodiscard]] std::int64_t queries_per_group(std::int64_t queries) const {
    return groups_ > 0 ? heads_ / groups_ * queries : 0;
  }
  [[nodiscard]] std::int64_t few_size(const sequence& s, bool staged) const {
    const std::int64_t queries = queries_per_group(s.queries);
    (void)element_count<T>(queries, few_queries<T>::size(1, form_.dim, form_.value_dim, staged));
    return few_queries<T>::size(queries, form_.dim, form_.value_dim, staged);
  }
  [[nodiscard]] std::int64_t partials_of(const sequence& s) const {
    return s.few() ? element_count<T>(heads_, s.queries, s.parts, partial_result<T>::size(form_.value_dim)) : 0;
  }

  /// A task is a stack of queries.
  template <class Tile, class Query, class Out, class Lse, executor E, class... Source>
  void attend_many(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                   const E& run, const worker_scratch<T>& scratch, sequence_tasks* table,
                   const Source&... sources) const {
    const auto measure = [&](std::int64_t b) { return measured(query.length(b), sources.length(b)...); };
    const task_list tasks(
        all_, table, heads_, [&](std::int64_t b) { return measure(b).few() ? 0 : query.length(b); },
        [&](std::int64_t b) { return lanes<Tile>(measure(b)); });
    run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t i) {
      const task task = tasks.last_first(i);
      const std::int64_t b = task.b, h = task.head, first = task.items.begin, count = task.items.size();
      // A mean of finite values is finite: where it is not, it may have overflowed on the way, and is taken again.
      for (const int headroom : {0, most_headroom}) {
        stack<Tile> stack(scratch[worker], {form_, &rule, headroom}, {b, h, heads_, first, count});
        stack.for_each_tile(
            [&](Tile tile, std::int64_t at) { tile.begin(query.row(b, h, first + at), query.stride[2]); });
        (stack.absorb(sources, nothing_after_blocks{}), ...);
        bool finite = true;
        stack.for_each_tile([&](Tile tile, std::int64_t at) {
          finite &= tile.finish(b, h, first + at);
          tile.write(out.row(b, h, first + at), out.stride[2]);
          for (std::int64_t q = 0; headroom == 0 && lse.data != nullptr && q < tile.count(); ++q)
            *lse.row(b, h, first + at + q) = static_cast<Lse>(tile.lse(q, b, h, first + at + q));
        });
        if (finite) break;
      }
    });
  }

  /// A task is the queries of the heads that share rows, over a part of one source; then the parts are merged. Returns
  /// whether all was finite; with a headroom only what is not finite yet is written.
  template <class Query, class Out, class Lse, executor E, class... Source>
  bool attend_few(const few_memory& few, tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse,
                  const score_rule<T>& rule, int headroom, const E& run, const worker_scratch<T>& scratch,
                  const Source&... sources) const {
    const auto measure = [&](std::int64_t b) { return measured(query.length(b), sources.length(b)...); };
    run_tasks(run, workers_, few.tasks.size(), [&](std::int64_t worker, std::int64_t place) {
      const task task = few.tasks[place];
      const std::int64_t b = task.b, part = task.items.begin;
      const sequence s = measure(b);
      const range heads{task.head * heads_ / groups_, (task.head + 1) * heads_ / groups_};
      few_queries<T> queries(scratch[worker], queries_per_group(s.queries), form_.dim, form_.value_dim, rule, headroom);
      for (std::int64_t h = heads.begin; h < heads.end; ++h)
        for (std::int64_t i = 0; i < s.queries; ++i) {
          queries.load((h - heads.begin) * s.queries + i, query.row(b, h, i));
          few.partial(b, s, h, i, part).begin();
        }
      std::int64_t source_part = part;  // counted from the source's first
      const auto absorb = [&](const auto& source) {
        const std::int64_t parts = count_parts(source.length(b));
        if (source_part >= 0 && source_part < parts)
          absorb_part(queries, source, rule, b, heads, s.queries, source_part, [&](std::int64_t q) {
            return few.partial(b, s, heads.begin + q / s.queries, q % s.queries, part);
          });
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
  bool merge_parts(const few_memory& few, const sequence& s, std::int64_t b, std::int64_t h, std::int64_t i,
                   tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule, int headroom) const {
    partial_result<T> whole = few.partial(b, s, h, i, 0);
    for (std::int64_t part = 1; part < s.parts; ++part)
      whole.merge(few.partial(b, s, h, i, part), rule.unit_in_base_2());
    const T share = whole.share(rule.sink_sum(b, h, i), rule.unit_in_base_2(), headroom);
    if (headroom == 0) {
      scale_row(whole.out(), form_.value_dim, share, out.row(b, h, i));
      if (lse.data) *lse.row(b, h, i) = static_cast<Lse>(rule.log(whole.total(rule.unit_in_base_2(), 0), b, h, i));
    }
    return replace_infinite(whole.out(), 1, form_.value_dim, share, out.row(b, h, i));
  }

  template <class Source, class Result>
  void absorb_part(few_queries<T>& queries, const Source& source, const score_rule<T>& rule, std::int64_t b,
                   range heads, std::int64_t length, std::int64_t part, const Result& result) const {
    for (std::int64_t h = heads.begin; h < heads.end; ++h)
      source.visible(b, h, {0, length}, queries.seen() + (h - heads.begin) * length);
    range total;  // what some query sees: parts are counted from there
    for (std::int64_t q = 0; q < heads.size() * length; ++q) total = hull(total, queries.seen()[q]);
    const range rows{total.begin + part * part_rows, smaller(total.begin + (part + 1) * part_rows, total.end)};
    if (rows.empty()) return;
    const std::int64_t sharing = heads_ / source.heads;  // they divide `heads`, a group
    const auto place = [&](std::int64_t q, range some) {
      const std::int64_t h = heads.begin + q / length;
      return score_place{source.terms(b, h), rule.slope(b, h), q % length, some, shift_sums<T>{}};
    };
    for (std::int64_t h = heads.begin; h < heads.end; h += sharing) {
      const std::int64_t first = (h - heads.begin) * length;
      queries.absorb(source.rows(b, h / sharing), rows, {first, first + sharing * length}, result, place);
    }
  }

  sequences all_;
  std::int64_t heads_;
  tile_form form_;
  std::int64_t groups_, partials_ = 0, workers_ = 1, worker_size_ = 0;
};

}}}  // namespace cca::CCA_TARGET::detail
