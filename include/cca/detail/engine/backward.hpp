#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "../../element.hpp"
#include "../../executor.hpp"
#include "../../tensor_view.hpp"
#include "../base/scratch.hpp"
#include "../base/turn.hpp"
#include "../softmax/score_rule.hpp"
#include "gradient_stack.hpp"
#include "unit_gradient_stack.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The queries, and what came of them.
template <class Query, class Out, class Lse, class GradOut, class GradLse>
struct query_results {
  tensor_view<Query> query;
  tensor_view<Out> out;
  lse_view<Lse> lse;
  tensor_view<GradOut> grad_out;
  lse_view<GradLse> grad_lse;  ///< no data: zero
};

template <class Query, class Out, class Lse, class GradOut, class GradLse>
query_results(tensor_view<Query>, tensor_view<Out>, lse_view<Lse>, tensor_view<GradOut>, lse_view<GradLse>)
    -> query_results<Query, Out, Lse, GradOut, GradLse>;

/// The gradients of attention of every query over all sources: the counterpart of `forward`. `Element` is the operands'
/// `product_type`.
///
/// A task is a stack of queries. Those whose heads share rows, of any source, form a chain: they add to the gradients of
/// the rows in turn, see `turn`. Stacks of the same queries in the heads of a chain follow each other, as they read the
/// same rows.
template <class Element>
class backward {
  using T = compute_type<Element>;

 public:
  /// The query heads fall into `head_groups` of which no two share rows of any source: the greatest common divisor of
  /// the sources' heads.
  backward(std::int64_t batch, std::int64_t heads, std::int64_t length, const tile_form& form, std::int64_t head_groups,
           bool staged, std::int64_t workers)
      : heads_(heads),
        length_(length),
        form_(form),
        sharing_(head_groups > 0 ? heads / head_groups : 0),
        lanes_(on_unit() ? unit_stack::lanes_for(length, form) : float_stack::lanes_for(length, form)),
        per_chain_((length + lanes_ - 1) / lanes_ * sharing_),
        tasks_(batch * head_groups * per_chain_),
        workers_(std::clamp<std::int64_t>(tasks_, 1, workers)),
        worker_size_(on_unit() ? unit_stack::size(lanes_, form, staged) : float_stack::size(lanes_, form, staged)) {}

  [[nodiscard]] std::size_t bytes() const {
    return worker_scratch<T>::bytes(workers_, worker_size_) + scratch_bytes<turn::counter>(tasks_);
  }

  /// Adds to the gradients of the sources' rows, and writes those of the queries.
  template <class Results, executor E, class... Gradient>
  void operator()(const Results& results, tensor_view<T> grad_query, const score_rule<T>& rule, const E& run,
                  scratch& memory, const Gradient&... gradients) const {
    const worker_scratch<T> scratch(memory, workers_, worker_size_);
    auto* passed = memory.take<turn::counter>(tasks_);
    std::uninitialized_value_construct_n(passed, tasks_);
    if constexpr (is_unit_element<Element> && (of_elements<Element, decltype(gradients.source)> && ...))
      if (on_unit()) return run_stacks<unit_stack>(results, grad_query, rule, run, scratch, passed, gradients...);
    run_stacks<float_stack>(results, grad_query, rule, run, scratch, passed, gradients...);
  }

 private:
  using float_stack = gradient_stack<T>;
  /// Of other operands there is none.
  using unit_stack =
      typename std::conditional_t<is_unit_element<Element>, std::type_identity<unit_gradient_stack<Element>>,
                                  std::type_identity<float_stack>>::type;

  [[nodiscard]] bool on_unit() const { return is_unit_element<Element> && form_.unit != matrix_unit::none; }

  template <class Stack, class Results, executor E, class... Gradient>
  void run_stacks(const Results& results, tensor_view<T> grad_query, const score_rule<T>& rule, const E& run,
                  const worker_scratch<T>& scratch, turn::counter* passed, const Gradient&... gradients) const {
    run_tasks(run, workers_, tasks_, [&](std::int64_t worker, std::int64_t task) {
      const std::int64_t chain = task / per_chain_, place = task % per_chain_, groups = heads_ / sharing_;
      const std::int64_t b = chain / groups, h = chain % groups * sharing_ + place % sharing_;
      const std::int64_t first = place / sharing_ * lanes_;
      turn turn(place > 0 ? passed + task - 1 : nullptr, passed + task);
      Stack stack(scratch[worker], form_, std::min(lanes_, length_ - first));
      stack.begin(results, b, h, first, rule.scale);
      std::int64_t offset = 0;
      const auto absorb = [&](const auto& gradient) {
        stack.absorb(gradient, b, h, heads_, first, offset, turn);
        offset += gradient.source.length;
      };
      (absorb(gradients), ...);
      stack.finish(grad_query.row(b, h, first), grad_query.stride[2], rule.scale);
    });
  }

  std::int64_t heads_, length_;
  tile_form form_;
  std::int64_t sharing_, lanes_, per_chain_, tasks_, workers_, worker_size_;
};

}}}  // namespace cca::CCA_TARGET::detail
