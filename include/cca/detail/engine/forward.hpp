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

/// Queries, per head, up to which each goes through the rows by itself (`few_queries`), bound by memory; more of them
/// ride in lanes (`stack`), bound by arithmetic.
inline constexpr std::int64_t most_few_queries = 8;

/// Attention of every query over all sources in one softmax: the engine of every entry point. It is told the shapes
/// first, so that its scratch memory can be part of a caller's workspace. `Element` is the operands' `product_type`.
template <class Element>
class forward {
  using T = compute_type<Element>;

 public:
  /// The query heads fall into `head_groups` of which no two share rows of any source: the greatest common divisor of
  /// the sources' heads. `parts`, the sum of `count_parts` over the sources, is what few queries' context is cut into
  /// and how long it is for many.
  forward(std::int64_t batch, std::int64_t heads, std::int64_t length, const tile_form& form, std::int64_t head_groups,
          std::int64_t parts, bool staged, std::int64_t workers)
      : batch_(batch),
        heads_(heads),
        length_(length),
        form_(form),
        groups_(head_groups),
        parts_(larger<std::int64_t>(parts, 1)),
        workers_(std::clamp<std::int64_t>(most_tasks(), 1, workers)),
        worker_size_(worker_size(staged)) {}

  [[nodiscard]] static std::int64_t count_parts(std::int64_t rows) { return (rows + part_rows - 1) / part_rows; }

  [[nodiscard]] std::size_t bytes() const {
    return worker_scratch<T>::bytes(workers_, worker_size_) + scratch_bytes<T>(partials_size());
  }

  template <class Query, class Out, class Lse, executor E, class... Source>
  void operator()(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                  const E& run, scratch& memory, const Source&... sources) const {
    const worker_scratch<T> scratch(memory, workers_, worker_size_);
    if (few()) {
      T* partials = memory.take<T>(partials_size());
      for (const int headroom : {0, most_headroom})
        if (attend_few(query, out, lse, rule.balanced(), headroom, run, scratch, partials, sources...)) return;
      return;
    }
    with_product<Element, (of_elements<Element, Source> && ...)>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) {
          attend_many<query_tile<Product>>(query, out, lse, Product::balances ? rule.balanced() : rule, run, scratch,
                                           sources...);
        });
  }

 private:
  [[nodiscard]] bool few() const { return length_ <= most_few_queries; }
  [[nodiscard]] std::int64_t worker_size(bool staged) const {
    if (few()) {
      (void)element_count<T>(queries_per_group(), few_queries<T>::size(1, form_.dim, form_.value_dim, staged));
      return few_queries<T>::size(queries_per_group(), form_.dim, form_.value_dim, staged);
    }
    return with_product<Element>(form_.unit, [&]<class Product>(std::type_identity<Product>) {
      return stack<query_tile<Product>>::size(lanes<query_tile<Product>>(), form_, staged);
    });
  }
  template <class Tile>
  [[nodiscard]] std::int64_t lanes() const {
    return Tile::stack_lanes(length_, larger(length_, parts_ * part_rows), form_);
  }
  /// Tasks of many queries, if every tile were a stack of its own. How many tiles a stack has depends on the context, and
  /// a workspace is sized for more of that than some entry points have.
  [[nodiscard]] std::int64_t most_tasks() const {
    if (few()) return batch_ * groups_ * parts_;
    return batch_ * heads_ * ((length_ + vectors<T>::lanes - 1) / vectors<T>::lanes);
  }
  [[nodiscard]] std::int64_t queries_per_group() const { return groups_ > 0 ? heads_ / groups_ * length_ : 0; }
  [[nodiscard]] std::int64_t partials_size() const {
    return few() ? element_count<T>(batch_, heads_, length_, parts_, partial_result<T>::size(form_.value_dim)) : 0;
  }

  /// A task is a stack of queries.
  template <class Tile, class Query, class Out, class Lse, executor E, class... Source>
  void attend_many(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                   const E& run, const worker_scratch<T>& scratch, const Source&... sources) const {
    const task_list tasks(batch_, heads_, length_, lanes<Tile>());
    run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t i) {
      const task task = tasks.last_first(i);
      const std::int64_t b = task.b, h = task.head, first = task.items.begin, count = task.items.size();
      // A mean of finite values is finite: where it is not, it may have overflowed on the way, and is taken again.
      for (const int headroom : {0, most_headroom}) {
        stack<Tile> stack(scratch[worker], {form_, &rule, headroom}, {b, h, heads_, first, count});
        stack.for_each_tile(
            [&](Tile tile, std::int64_t at) { tile.begin(query.row(b, h, first + at), query.stride[2]); });
        (stack.absorb(sources, [](range, const auto*) {}), ...);
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
  bool attend_few(tensor_view<Query> query, tensor_view<Out> out, lse_view<Lse> lse, const score_rule<T>& rule,
                  int headroom, const E& run, const worker_scratch<T>& scratch, T* partials,
                  const Source&... sources) const {
    const auto partial = [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t part) {
      return partial_result<T>(
          partials + (((b * heads_ + h) * length_ + i) * parts_ + part) * partial_result<T>::size(form_.value_dim),
          form_.value_dim);
    };
    run_tasks(run, workers_, batch_ * groups_ * parts_, [&](std::int64_t worker, std::int64_t task) {
      const std::int64_t b = task / parts_ / groups_, group = task / parts_ % groups_, part = task % parts_;
      const range heads{group * heads_ / groups_, (group + 1) * heads_ / groups_};
      few_queries<T> queries(scratch[worker], queries_per_group(), form_.dim, form_.value_dim, rule, headroom);
      for (std::int64_t h = heads.begin; h < heads.end; ++h)
        for (std::int64_t i = 0; i < length_; ++i) {
          queries.load((h - heads.begin) * length_ + i, query.row(b, h, i));
          partial(b, h, i, part).begin();
        }
      std::int64_t source_part = part;  // counted from the source's first
      const auto absorb = [&](const auto& source) {
        if (source_part >= 0 && source_part < count_parts(source.length))
          absorb_part(queries, source, rule, b, heads, source_part,
                      [&](std::int64_t q) { return partial(b, heads.begin + q / length_, q % length_, part); });
        source_part -= count_parts(source.length);
      };
      (absorb(sources), ...);
    });
    std::atomic<bool> finite{true};
    run_tasks(run, workers_, batch_ * heads_, [&](std::int64_t, std::int64_t task) {
      const std::int64_t b = task / heads_, h = task % heads_;
      for (std::int64_t i = 0; i < length_; ++i) {
        partial_result<T> whole = partial(b, h, i, 0);
        for (std::int64_t part = 1; part < parts_; ++part) whole.merge(partial(b, h, i, part), rule.unit_in_base_2());
        const T share = whole.share(rule.sink_sum(b, h, i), rule.unit_in_base_2(), headroom);
        if (headroom == 0) {
          scale_row(whole.out(), form_.value_dim, share, out.row(b, h, i));
          if (lse.data) *lse.row(b, h, i) = static_cast<Lse>(rule.log(whole.total(rule.unit_in_base_2(), 0), b, h, i));
        }
        if (!replace_infinite(whole.out(), 1, form_.value_dim, share, out.row(b, h, i))) finite = false;
      }
    });
    return finite;
  }

  template <class Source, class Result>
  void absorb_part(few_queries<T>& queries, const Source& source, const score_rule<T>& rule, std::int64_t b,
                   range heads, std::int64_t part, const Result& result) const {
    range total;  // what some query sees: parts are counted from there
    for (std::int64_t q = 0; q < queries_per_group(); ++q) {
      const range seen = source.visible(b, heads.begin + q / length_, q % length_);
      queries.see(q, seen);
      total = hull(total, seen);
    }
    const range rows{total.begin + part * part_rows, smaller(total.begin + (part + 1) * part_rows, total.end)};
    if (rows.empty()) return;
    const std::int64_t sharing = heads_ / source.heads;  // they divide `heads`, a group
    const auto place = [&](std::int64_t q, range some) {
      const std::int64_t h = heads.begin + q / length_;
      return score_place{source.terms(b, h), rule.slope(b, h), q % length_, some, shift_sums<T>{}};
    };
    for (std::int64_t h = heads.begin; h < heads.end; h += sharing) {
      const std::int64_t first = (h - heads.begin) * length_;
      queries.absorb(source.rows(b, h / sharing), rows, {first, first + sharing * length_}, result, place);
    }
  }

  std::int64_t batch_, heads_, length_;
  tile_form form_;
  std::int64_t groups_, parts_, workers_, worker_size_;
};

}}}  // namespace cca::CCA_TARGET::detail
