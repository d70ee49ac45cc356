#pragma once

#include <algorithm>
#include <cstdint>

#include "../base/numbers.hpp"
#include "../context/tasks.hpp"
#include "../simd/dot.hpp"
#include "../simd/register_block.hpp"
#include "../simd/simd.hpp"
#include "../simd/transpose.hpp"
#include "../simd/wanted_memory.hpp"
#include "../softmax/score_rule.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// What all tiles of a stack share: the rule of the scores, and by how many powers of two weights are held back.
template <class T>
struct tile_call {
  tile_form form;
  const score_rule<T>* rule;
  int headroom = 0;
  wanted_memory* wanted = nullptr;  ///< what a stack's products ask for
};

/// A tile of queries, one in every lane, that absorbs blocks of keys and values: the online softmax of attention.
///
/// Cost. A row of keys and values takes each vector of queries `dim + value_dim` multiply-adds, at 0.92 of their peak
/// where the vectors of a tile go together (AVX2: 0.89), and about 4 more for exp2, maximum and sum. At an edge, where
/// vectors go by themselves, each takes some `width / 2` rows in vain, and all at 0.64 of the peak (AVX2: 0.25).
/// A stack of tiles reads its rows once, `lanes / 2` FLOP per byte of floats. With 256 queries a core of 118 GFLOP/s
/// asks memory for 0.9 GB/s; with 64 it asks for 3.7, and loses 7 % at 16K rows and 10 % at 32K.
/// Queries, keys, values and outputs, `2 (dim + value_dim)` elements per token, pass once besides: 1 % of the time of
/// CCA attention at 32K tokens. A window of 64 waited for them for 0.3 of its time, so the stack before asks for them.
/// So products bound prefill, edges and operands bound short windows and sequences, and reading bounds few queries
/// (`few_queries`). bench/TUNING.md has what this predicts beside what was measured.
///
/// A view of scratch memory, `size(form)` elements aligned to vectors: packed queries, output `[value_dim][lanes]`, and
/// the softmax.
template <class Product>
class query_tile {
 public:
  using product = Product;
  using number = typename Product::number;
  using staged_block = typename Product::staged_block;
  using visible_lanes = typename Product::visible_lanes;
  using stack_memory = typename Product::stack_memory;
  static constexpr std::int64_t block_rows = Product::shape::block, most = Product::shape::stack;
  static constexpr bool backward = false;
  static constexpr std::int64_t lanes = Product::lanes;

  static constexpr std::int64_t size(const tile_form& form) {
    return Product::packed_size(form.dim) + form.value_dim * lanes + Product::softmax::size(lanes);
  }

  /// Queries of a stack for `length` queries of each of `heads` heads over `rows` of context: the more, the less memory
  /// traffic. Where every row is a query, too, some 64 stacks should be there for threads to share, of a head 4 at least, whose
  /// last ones take longest; few queries after a long context are worth as large a stack, since each stack reads all of it.
  /// Scratch should stay within a budget.
  static std::int64_t stack_lanes(std::int64_t length, std::int64_t rows, const tile_form& form, std::int64_t heads = 1) {
    using shape = typename Product::shape;
    const std::int64_t tasks = std::clamp<std::int64_t>(64 / larger<std::int64_t>(heads, 1), 4, 64);
    const std::int64_t affordable = shape::budget / (size(form) * static_cast<std::int64_t>(sizeof(number)));
    const std::int64_t wanted = std::clamp(rows / (tasks * lanes), shape::least_stack, shape::stack);
    const std::int64_t needed = larger((length + lanes - 1) / lanes, shape::least_stack);
    return lanes * std::clamp<std::int64_t>(smaller(wanted, needed), 1, larger<std::int64_t>(affordable, 1));
  }

  query_tile(number* scratch, const tile_call<number>& call, std::int64_t count)
      : call_(call),
        count_(count),
        query_(scratch),
        out_(query_ + Product::packed_size(call.form.dim)),
        softmax_(out_ + call.form.value_dim * lanes, lanes, *call.rule, call.headroom) {}

  [[nodiscard]] std::int64_t count() const { return count_; }

  /// Loads the queries, rows of `dim` elements, times `factor`, and forgets what was absorbed.
  template <class Query>
  void begin(const Query* query, std::int64_t stride, number factor) {
    Product::pack(query, stride, count_, call_.form.dim, factor, query_);
    fill_n(out_, call_.form.value_dim * lanes, number(0));
    softmax_.begin();
  }

  /// Of what the queries see, none is left out.
  void leave_out(range*) const {}

  /// Absorbs what the queries see of a block: the four lines of attention, `S = K Q^T`, what happens to scores, the
  /// softmax, `O = O rescale + V^T P`. `at` is a `score_place`.
  template <class Place>
  void absorb(const stack_memory& memory, const staged_block& block, const visible_lanes& visible, std::int64_t,
              const Place& at) {
    Product::for_each_part(block.rows(), visible, count_, [&](const auto& part) {
      const score_block<number> scores = memory.scores(part);
      const typename Product::weights weights(memory, block, part, scores);
      Product::score(memory, block, part, call_.form, *call_.rule, query_, scores, *call_.wanted);
      call_.rule->apply(part, scores, at);
      softmax_.absorb(part, scores, weights);
      Product::add(memory, part, block.value_columns(part.rows.begin), call_.form.value_dim, weights.at,
                   softmax_.rescale(), out_, *call_.wanted);
    });
  }

  /// @{
  /// Of what was absorbed, before `finish`: writes `count` rows of `value_dim` elements, the weighted sums of the values; the
  /// maximum of the scores of query `i` and the sum of its weights.
  void write_sums(number* out, std::int64_t stride) const {
    transpose(out_, lanes, out, stride, call_.form.value_dim, count_);
  }
  [[nodiscard]] exponential_sum<number> weights(std::int64_t i) const { return softmax_.weights(i); }
  /// @}

  /// Makes the means of the values, 0 where nothing was seen, of these queries. Returns whether all are finite.
  bool finish(const lane_queries& of) {
    softmax_.finish(count_, of);
    finite_check<number> finite;
    for (std::int64_t lane = 0; lane < lanes; lane += width<number>) {
      const auto share = vec<number>::load_aligned(softmax_.shares() + lane);
      for (number* o = out_ + lane; o < out_ + call_.form.value_dim * lanes; o += lanes) {
        const vec<number> mean = share * vec<number>::load_aligned(o);
        finite.add(mean);
        mean.store_aligned(o);
      }
    }
    return finite.holds();
  }

  /// Writes `count` rows of `value_dim` elements; with a headroom only what is not finite there yet.
  template <class Out>
  void write(Out* out, std::int64_t stride) const {
    if (call_.headroom == 0) return transpose(out_, lanes, out, stride, call_.form.value_dim, count_);
    for (std::int64_t i = 0; i < count_; ++i)
      replace_infinite(out_ + i, lanes, call_.form.value_dim, number(1), out + i * stride);
  }

  /// The natural log-sum-exp of query `i` of these, -inf where nothing was seen.
  [[nodiscard]] number lse(std::int64_t i, const lane_queries& of) const { return softmax_.lse(i, of); }

 private:
  tile_call<number> call_;
  std::int64_t count_;
  number *query_, *out_;
  typename Product::softmax softmax_;
};

}}}  // namespace cca::CCA_TARGET::detail
