#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "../base/numbers.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../softmax/score_rule.hpp"
#include "query_tile.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// A tile of queries, one in every lane, that goes backward over blocks of keys and values: from the log-sum-exp of the
/// forward pass it computes the weights `P` of a block again, with them the gradients `dS` of its scores, and adds to the
/// gradients of the queries. With `dO` the gradient of the output and `delta = sum_d out dO - (gradient of lse)`:
///
///     forward     S = K Q^T    X = rule(S)    P = exp(X - lse)              O = V^T P
///     backward    dP = V dO^T    dX = P (dP - delta)    dS = rule'(dX)    dQ = K^T dS
///
/// `dX`, summed over queries, is the gradient of a row's bias; times the distances, and over rows, minus that of the slope.
///
/// The block's own gradients, sums over queries, are left to whoever owns the rows: `gradient_memory::add_to_rows`.
///
/// Cost of a pair of a query and a row: five products, `3 dim + 2 value_dim` multiply-adds, where the forward pass has
/// two; and one exp2. Per block and stack, its rows of keys and values and of their gradients are read and the latter
/// written: a stack of 128 queries pays 640 multiply-adds for every four bytes of that.
///
/// A view of scratch memory, `size(form)` elements aligned to vectors: packed queries and gradients of the output, gradients
/// of the queries `[dim][lanes]`, log-sum-exp in base 2, `delta`, and whether something was seen, `[lanes]`.
template <class Product>
class gradient_tile {
 public:
  using product = Product;
  using number = typename Product::number;
  using staged_block = typename Product::staged_gradient_block;
  using visible_lanes = typename Product::visible_lanes;
  using stack_memory = typename Product::gradient_memory;
  static constexpr std::int64_t lanes = Product::lanes;
  static constexpr std::int64_t block_rows = Product::shape::gradient_block, most = Product::shape::gradient_stack;
  static constexpr bool backward = true;

  static constexpr std::int64_t size(const tile_form& form) {
    return Product::packed_size(form.dim) + Product::packed_size(form.value_dim) + (form.dim + 3) * lanes;
  }

  /// Queries of a stack: as many as their scratch has place within the shape's budget.
  static std::int64_t stack_lanes(std::int64_t length, const tile_form& form) {
    constexpr std::int64_t budget = Product::shape::gradient_budget / static_cast<std::int64_t>(sizeof(number));
    std::int64_t tiles = std::clamp<std::int64_t>((length + lanes - 1) / lanes, 1, most);
    const auto needed = [&] {
      return tiles * size(form) + stack_memory::size(form, tiles) + staged_block::size(form, block_rows, false);
    };
    while (tiles > 1 && needed() > budget) --tiles;
    return tiles * lanes;
  }

  gradient_tile(number* scratch, const tile_call<number>& call, std::int64_t count)
      : call_(call),
        count_(count),
        query_(scratch),
        grad_out_(query_ + Product::packed_size(call.form.dim)),
        grad_query_(grad_out_ + Product::packed_size(call.form.value_dim)),
        lse_(grad_query_ + call.form.dim * lanes),
        delta_(lse_ + lanes),
        saw_(delta_ + lanes) {}

  [[nodiscard]] std::int64_t count() const { return count_; }

  /// Loads the queries and the gradients of their outputs from query `first` of the stack on, and forgets all else.
  void begin(const stack_memory& memory, std::int64_t first) {
    Product::pack(memory.query.row(first), memory.query.row(1) - memory.query.row(0), count_, call_.form.dim,
                  call_.rule->query_factor(), query_);
    Product::pack(memory.grad_out.row(first), memory.grad_out.row(1) - memory.grad_out.row(0), count_,
                  call_.form.value_dim, number(1), grad_out_);
    fill(grad_query_, saw_ + lanes, number(0));
  }

  /// The natural log-sum-exp of query `i`, and its `delta`. One that saw nothing, or only logits of -inf, has the
  /// log-sum-exp -inf.
  void set(std::int64_t i, number lse, number delta) {
    saw_[i] = lse == -infinity<number> ? number(0) : number(1);
    lse_[i] = lse == -infinity<number> ? number(0) : lse * std::numbers::log2e_v<number>;
    delta_[i] = delta;
  }

  /// Of what the queries see, takes away what those see whose logits are all masked.
  void leave_out(range* visible) const {
    for (std::int64_t i = 0; i < count_; ++i)
      if (saw_[i] == number(0)) visible[i] = {};
  }

  /// Goes over a block of rows. Leaves `P` and `dS` of the pairs of a row and a lane that sees it in the memory, and 0 of
  /// all other pairs; `place` is the tile's in the stack, `at` a `score_place`, to whose sums `dX` is added.
  template <class Place>
  void absorb(const stack_memory& memory, const staged_block& block, const visible_lanes& visible, std::int64_t place,
              const Place& at) {
    const tile_form& form = call_.form;
    if (intersection(block.rows(), visible.seen_by_all()) != block.rows()) memory.clear(block.rows(), place);
    Product::for_each_part(block.rows(), visible, count_, [&](const auto& part) {
      const std::int64_t j = part.rows.begin;
      const score_block<number> scores = memory.scores(part, block.rows(), place);
      const score_block<number> grads = memory.grad_weights(part, block.rows(), place);
      const typename Product::factors factors(memory, part, block.rows(), place);
      Product::multiply_rows(part, block.keys(j), form.dim, query_, form.unit, scores, *call_.wanted);
      Product::multiply_rows(part, block.values(j), form.value_dim, grad_out_, form.unit, grads, *call_.wanted);
      call_.rule->apply_softcap(part, scores);
      call_.rule->with_shift(part, at, [&](const auto& shift) { differentiate(part, scores, grads, factors, shift); });
      Product::add(memory, part, block.key_columns(j), form.dim, factors.at, nullptr, grad_query_, *call_.wanted);
    });
  }

  /// Writes `count` rows of `dim` elements: the gradients of the queries.
  void finish(number* grad_query, std::int64_t stride) {
    transpose(grad_query_, lanes, grad_query, stride, call_.form.dim, count_);
  }

 private:
  /// `P = exp(X - lse)`, `dX = P (dP - delta)` and from it `dS`, for the pairs of a row and a lane that sees it; otherwise 0.
  template <class Part, class Factors, class Shift>
  void differentiate(const Part& part, const score_block<number> scores, const score_block<number> grads,
                     const Factors factors, const Shift shift) const {
    using vector = vec<number>;
    constexpr std::int64_t R = Factors::rows_at_once;
    const vector unit(call_.rule->unit_in_base_2()), zero(number(0));
    const score_rule<number> rule = *call_.rule;
    const std::int64_t count = part.rows.size();
    for (std::int64_t n = 0; n < Part::vectors; ++n) {
      const std::int64_t lane = (part.first + n) * width<number>;
      const vector lse = vector::load_aligned(lse_ + lane), delta = vector::load_aligned(delta_ + lane);
      part.with_mask(n, [&](const auto& mask) {
        for (std::int64_t j = 0; j < count; j += R) {
          vector weight[extent(R)], grad_score[extent(R)];
          unroll<R>([&](auto r) CCA_INLINE_LAMBDA {
            const vector x = vector::load_aligned(scores.at(j + r, n));
            // No weight is above 1, but where lse was rounded, and of what a lane does not see. A NaN stays.
            const vector p = Factors::exp2((xsimd::min)(zero, fma<number>(shift.row(j + r)(x, n), unit, -lse)));
            weight[r] = mask.select(j + r, p, zero);
            const vector grad_weight = vector::load_aligned(grads.at(j + r, n)) - delta;
            shift.add_gradient(mask.select(j + r, p * grad_weight, zero), j + r, n);
            grad_score[r] = mask.select(j + r, rule.differentiate(x, p) * grad_weight, zero);
          });
          factors.put(j, n, weight, grad_score);
        }
      });
    }
  }

  tile_call<number> call_;
  std::int64_t count_;
  number *query_, *grad_out_, *grad_query_, *lse_, *delta_, *saw_;
};

}}}  // namespace cca::CCA_TARGET::detail
