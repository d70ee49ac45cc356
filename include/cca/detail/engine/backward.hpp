#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "../../call.hpp"
#include "../../element.hpp"
#include "../../executor.hpp"
#include "../../tensor_view.hpp"
#include "../base/numbers.hpp"
#include "../base/scratch.hpp"
#include "../base/turn.hpp"
#include "../context/source.hpp"
#include "../context/tasks.hpp"
#include "../product/list.hpp"
#include "../simd/dot.hpp"
#include "../softmax/score_rule.hpp"
#include "gradient_tile.hpp"
#include "stack.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A source, and where the gradients of its rows are summed: views of the extents of its keys and values, and for those of
/// its biases `bias_sums`, or no data where nobody asks. Sources may share views, but no row of them: who adds to a row
/// takes turns as one of one source.
template <class Source, class T>
struct source_gradient {
  Source source;
  tensor_view<T> key, value;
  tensor_view<T, 3> bias{};
};

template <class Source, class T>
source_gradient(Source, tensor_view<T>, tensor_view<T>) -> source_gradient<Source, T>;
template <class Source, class T>
source_gradient(Source, tensor_view<T>, tensor_view<T>, tensor_view<T, 3>) -> source_gradient<Source, T>;

/// The same of a source by its elements alone. Refers to it.
template <class Source, class T>
auto ref_of(const source_gradient<Source, T>& gradient) {
  return source_gradient{source_ref(gradient.source), gradient.key, gradient.value, gradient.bias};
}

/// What a task sums of the gradients of shifts, a block of rows at a time.
template <class Tile>
class task_shift {
  using T = typename Tile::number;

 public:
  explicit task_shift(bool with_slope = false) : with_slope_(with_slope) {}

  /// Begins with a source, the gradients of whose biases are summed from `grad_bias` on; null: nobody asks.
  void begin(T* grad_bias, std::int64_t stride) {
    grad_bias_ = grad_bias;
    stride_ = stride;
  }

  [[nodiscard]] shift_sums<T> sums() {
    return {grad_bias_ != nullptr ? bias_ : nullptr, with_slope_ ? lanes_ : nullptr};
  }

  /// Takes in what a block left: the rows `rows`.
  void end_block(range rows) {
    T block = T(0);
    for (T& lane : lanes_) block += exchange(lane, T(0));
    slope_ += block;
    for (std::int64_t j = 0; grad_bias_ != nullptr && j < rows.size(); ++j)
      grad_bias_[(rows.begin + j) * stride_] += exchange(bias_[j], T(0));
  }

  /// Minus the gradient of the slope.
  [[nodiscard]] T slope() const { return slope_; }

 private:
  alignas(alignment<T>) T lanes_[extent(Tile::lanes)] = {};
  T bias_[extent(Tile::block_rows)] = {};
  T slope_ = T(0);
  bool with_slope_;
  T* grad_bias_ = nullptr;
  std::int64_t stride_ = 0;
};

template <class T>
void fill_zero(tensor_view<T, 3> numbers) {
  for (std::int64_t b = 0; b < numbers.batch(); ++b)
    for (std::int64_t h = 0; h < numbers.heads(); ++h)
      for (std::int64_t i = 0; i < numbers.length(b); ++i) *numbers.row(b, h, i) = T(0);
}

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

/// Goes backward with a stack over a source, and adds to the gradients of its rows of head `head` when it is this task's
/// turn. All that a chain of tasks adds to counts as rows one after the other; those of the source begin at `offset`.
template <class Tile, class Gradient>
void absorb_in_turn(stack<Tile>& stack, const Gradient& gradient, std::int64_t b, std::int64_t head,
                    std::int64_t offset, turn& turn, task_shift<Tile>& shift) {
  stack.absorb(
      gradient.source,
      [&](range rows, const auto* seen) {
        turn.await(offset + rows.end);
        stack.memory().add_to_rows(rows, seen, gradient.key.row(b, head, rows.begin), gradient.key.stride[2],
                                   gradient.value.row(b, head, rows.begin), gradient.value.stride[2]);
        shift.end_block(rows);
        turn.pass(offset + rows.end);
      },
      shift.sums());
  turn.pass(offset + gradient.source.length(b));
}

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
  /// the sources' heads. `queries(b)` is how many queries per head sequence `b` has.
  template <class Queries>
  backward(const sequences& all, std::int64_t heads, const tile_form& form, std::int64_t head_groups,
           const piece_form& pieces, bool staged, std::int64_t workers, const Queries& queries)
      : all_(all),
        heads_(heads),
        form_(form),
        sharing_(head_groups > 0 ? heads / head_groups : 0),
        block_(pieces.block),
        staged_(staged) {
    for (std::int64_t b = 0; b < all_.distinct(); ++b)
      worker_size_ = larger(worker_size_, of_tile([&]<class Tile>(std::type_identity<Tile>) {
                              return stack<Tile>::size(lanes(queries(b)), form_, staged_, false);
                            }));
    stacks_ = task_list::size(
        all_, sharing_ > 0 ? heads : 0, [&](std::int64_t b) { return cuts(queries(b)).items(); },
        [&](std::int64_t b) { return lanes(queries(b)); });
    workers_ = std::clamp<std::int64_t>(stacks_, 1, workers);
  }

  [[nodiscard]] std::size_t bytes() const {
    return worker_scratch<T>::bytes(workers_, worker_size_) + scratch_bytes<turn::counter>(stacks_) +
           scratch_bytes<sequence_tasks>(all_.table_size()) + scratch_bytes<T>(stacks_);
  }

  /// Adds to the gradients of the sources' rows, and writes those of the queries, and of the sink logits and slopes where
  /// they are asked for.
  template <class Results, executor E, class... Gradient>
  void operator()(const Results& results, const gradients<T>& to, const score_rule<T>& rule, const E& run,
                  scratch& memory, const Gradient&... gradients) const {
    differentiate(results, to, rule, run, memory, ref_of(gradients)...);
  }

 private:
  template <class Results, executor E, class... Gradient>
  void differentiate(const Results& results, const gradients<T>& to, const score_rule<T>& rule, const E& run,
                     scratch& memory, const Gradient&... gradients) const {
    const worker_scratch<T> scratch(memory, workers_, worker_size_);
    auto* passed = memory.take<turn::counter>(stacks_);
    std::uninitialized_value_construct_n(passed, stacks_);
    const task_list tasks(
        all_, memory.take<sequence_tasks>(all_.table_size()), heads_,
        [&](std::int64_t b) { return cuts(results.query.length(b)).items(); },
        [&](std::int64_t b) { return lanes(results.query.length(b)); }, sharing_);
    T* slopes = memory.take<T>(stacks_);
    if (to.alibi_slopes.data == nullptr) slopes = nullptr;
    with_gradient_product<Element, (of_elements<Element, std::remove_cvref_t<decltype(gradients.source)>> && ...)>(
        form_.unit, [&]<class Product>(std::type_identity<Product>) {
          const score_rule<T> scaled = Product::balances ? rule.balanced() : rule;
          run_tasks(run, workers_, tasks.size(), [&](std::int64_t worker, std::int64_t i) {
            const task task = tasks[i];
            turn turn(task.leads ? nullptr : passed + i - 1, passed + i);
            run_stack<gradient_tile<Product>>(results, to.query, scaled, scratch[worker], task, turn,
                                              slopes != nullptr ? slopes + i : nullptr, gradients...);
          });
        });
    if (to.sink_logits.data != nullptr) differentiate_sinks(results, rule, to.sink_logits, run);
    if (slopes != nullptr) add_slopes(tasks, slopes, to.alibi_slopes);
  }

  template <class F>
  [[nodiscard]] std::int64_t of_tile(const F& f) const {
    return with_gradient_product<Element>(form_.unit, [&]<class Product>(std::type_identity<Product>) {
      return f(std::type_identity<gradient_tile<Product>>{});
    });
  }

  /// Queries of a stack, of a sequence with `queries` of them per head.
  [[nodiscard]] std::int64_t lanes(std::int64_t queries) const {
    return of_tile(
        [&]<class Tile>(std::type_identity<Tile>) { return Tile::stack_lanes(smaller(queries, block_), form_); });
  }
  [[nodiscard]] query_cuts cuts(std::int64_t queries) const { return {queries, block_, lanes(queries)}; }

  /// Goes backward with the queries of a task. Where it is asked for, `slope` gets their share of minus a slope's gradient.
  template <class Tile, class Results, class... Gradient>
  void run_stack(const Results& results, tensor_view<T> grad_query, const score_rule<T>& rule, T* scratch,
                 const task& task, turn& turn, T* slope, const Gradient&... gradients) const {
    const range some = cuts(results.query.length(task.b)).queries(task.items);
    const std::int64_t b = task.b, h = task.head, first = some.begin, count = some.size();
    stack<Tile> stack(scratch, {form_, &rule}, {{b, h, first}, heads_, count}, staged_);
    auto& memory = stack.memory();
    memory.query.load(count, [&](std::int64_t i) { return results.query.row(b, h, first + i); });
    memory.grad_out.load(count, [&](std::int64_t i) { return results.grad_out.row(b, h, first + i); });
    stack.for_each_tile([&](Tile tile, std::int64_t at) {
      tile.begin(memory, at);
      for (std::int64_t q = 0; q < tile.count(); ++q)
        tile.set(q, static_cast<T>(*results.lse.row(b, h, first + at + q)),
                 delta(results, memory.grad_out.row(at + q), b, h, first + at + q));
    });
    std::int64_t offset = 0;
    task_shift<Tile> shift(slope != nullptr);
    const auto absorb = [&](const auto& gradient) {
      if (gradient.source.length(b) == 0) return;
      shift.begin(shared_row(gradient.bias, b, h, heads_), gradient.bias.stride[2]);
      absorb_in_turn(stack, gradient, b, h / (heads_ / gradient.source.heads), offset, turn, shift);
      offset += gradient.source.length(b);
    };
    (absorb(gradients), ...);
    if (slope != nullptr) *slope = shift.slope();
    stack.for_each_tile(
        [&](Tile tile, std::int64_t at) { tile.finish(grad_query.row(b, h, first + at), grad_query.stride[2]); });
  }

  /// `out . grad_out` of one query, in pieces that are converted where they have to be: so the sum has one order for every
  /// type.
  template <class Out, class GradOut>
  [[nodiscard]] T dot(const Out* out, const GradOut* grad_out) const {
    constexpr std::int64_t piece = 64;
    alignas(scratch_alignment) T a[piece], b[piece];
    T sum = T(0);
    for (std::int64_t d = 0; d < form_.value_dim; d += piece) {
      const std::int64_t count = smaller(piece, form_.value_dim - d);
      fill_n(b, piece, T(0));
      convert(grad_out + d, count, b);
      T more;
      dot_rows(b, stage(out + d, 0, count, 1, a), count, 1, &more);
      sum += more;
    }
    return sum;
  }

  /// `sum_d out dO - (gradient of lse)` of one query.
  template <class Results, class GradOut>
  [[nodiscard]] T delta(const Results& results, const GradOut* grad_out, std::int64_t b, std::int64_t h,
                        std::int64_t i) const {
    const T product = dot(results.out.row(b, h, i), grad_out);
    return results.grad_lse.data == nullptr ? product : product - static_cast<T>(*results.grad_lse.row(b, h, i));
  }

  /// `d_slope = -sum dX |distance|` over the tasks of the queries that share it, one after the other.
  static void add_slopes(const task_list& tasks, const T* slopes, tensor_view<T, 3> grad) {
    fill_zero(grad);
    for (std::int64_t i = 0; i < tasks.size(); ++i) {
      const task task = tasks[i];
      *grad.row(grad.batch() == 1 ? 0 : task.b, task.head, 0) -= slopes[i];
    }
  }

  /// `d_sink = -sum p_sink delta` over the queries that share a sink logit, one after the other.
  template <class Results, executor E>
  void differentiate_sinks(const Results& results, const score_rule<T>& rule, tensor_view<T, 3> grad,
                           const E& run) const {
    fill_zero(grad);
    run_tasks(run, workers_, heads_, [&](std::int64_t, std::int64_t h) {
      for (std::int64_t b = 0; b < results.query.batch(); ++b)
        for (std::int64_t i = 0; i < results.query.length(b); ++i) {
          const T share = detail::exp(rule.sink(b, h, i) - static_cast<T>(*results.lse.row(b, h, i)));
          *grad.row(grad.batch() == 1 ? 0 : b, h, grad.length() == 1 ? 0 : i) -=
              share * delta(results, results.grad_out.row(b, h, i), b, h, i);
        }
    });
  }

  sequences all_;
  std::int64_t heads_;
  tile_form form_;
  std::int64_t sharing_, block_, stacks_ = 0, workers_ = 1, worker_size_ = 0;
  bool staged_;
};

}}}  // namespace cca::CCA_TARGET::detail
