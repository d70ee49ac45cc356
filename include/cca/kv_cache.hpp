#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "cache_shape.hpp"
#include "call.hpp"
#include "detail/base/numbers.hpp"
#include "detail/base/validate.hpp"
#include "detail/context/cached_sequences.hpp"
#include "detail/context/kept_tokens.hpp"
#include "detail/context/row_store.hpp"
#include "detail/context/tasks.hpp"
#include "detail/softmax/score_rule.hpp"
#include "element.hpp"
#include "options.hpp"
#include "partition.hpp"
#include "pooling.hpp"
#include "tensor_view.hpp"

namespace cca { inline namespace CCA_TARGET {

namespace detail {
struct cache_file;
}

/// The keys and values that CCA attention can still see: per sequence the first `m = sink_tokens` tokens, the cores of all
/// complete groups behind them and the raw tokens of the window, `floor((n - m) / g)` cores and at most
/// `m + s + g + 2 rewind` raw entries after n tokens.
///
/// Tokens are appended one or many at a time; a group is pooled as soon as its last token arrives, with that token's
/// query, or with `select_by_mass` when it leaves the window: until then the cache keeps the queries that observe, about
/// `heads (s + g + 2 rewind) / max(1, s / 32)` rows of a query and two numbers. Attending gives what `attention` gives for the whole sequence, within rounding, however it was cut. With a
/// matrix unit, which queries, tokens and cores all of the same 16-bit type can have, a prompt is attended to by the unit;
/// up to `detail::most_few_queries` at a time, which are bound by memory, by floats.
///
/// @tparam Element  of keys and values; computed with in `compute_type`. With `q8` a cache of a quarter of the bytes: tokens
///   come as float, `Eigen::bfloat16` or `Eigen::half` and are rounded as `quantize` does before anything sees them, so
///   that the cache is one of the rounded tokens; or they come as rows of `q8`, with scales.
/// @tparam Core  of cores, which are rounded to it once: with `float` cores beside `Eigen::bfloat16` tokens they stay as
///   they were computed, with `Eigen::bfloat16` cores beside `float` tokens far context takes half the bytes, with `q8`
///   a quarter
/// Every method that throws leaves the cache as it was: `std::invalid_argument` for what it refuses, naming the argument,
/// and `std::bad_alloc`. One thread at a time may use a cache.
/// Source: arXiv 2412.12465, section 3.4 (inference).
template <class Element = float, class Core = Element>
class kv_cache {
  static_assert(detail::check_cache_elements<Element, Core>());

 public:
  using element_type = Element;  ///< of keys and values
  using core_type = Core;        ///< of cores
  /// Of queries, tokens and outputs in braces: the cache's, or float where it rounds them to `q8`.
  using number_type = std::conditional_t<detail::is_q8<Element>, float, Element>;

  /// @throws std::invalid_argument  naming the member of `shape` or `options` that makes no sense
  kv_cache(const cache_shape& shape, const options& options)
      : held_{detail::complete(shape), validated(options),
              detail::core_head_count(options, shape.heads, shape.kv_heads)} {
    for (std::int64_t b = 0; b < shape.batch; ++b) held_.add(held_.new_sequence());
  }

  /// @{
  /// What the cache was made with, the shape's defaults filled in.
  [[nodiscard]] const cache_shape& shape() const { return held_.shape; }
  [[nodiscard]] const cca::options& options() const { return held_.options; }
  /// @}

  /// Tokens appended to sequence `b`.
  [[nodiscard]] std::int64_t length(std::int64_t b = 0) const { return known(b).length; }
  /// Core tokens of sequence `b`, per core head: of the complete groups, or with `select_by_mass` of those that have left the
  /// window.
  [[nodiscard]] std::int64_t core_count(std::int64_t b = 0) const { return held_.group_count(known(b).length); }
  /// Raw tokens of sequence `b` that a query to come can see, sink tokens among them, or that a rewind needs, per key/value
  /// head.
  [[nodiscard]] std::int64_t raw_count(std::int64_t b = 0) const { return held_.raw_count(known(b)); }
  /// The least length to which `truncate` can take sequence `b`.
  [[nodiscard]] std::int64_t least_length(std::int64_t b = 0) const {
    return held_.partition().first_query_beyond(known(b).oldest);
  }

  /// Bytes of the cores, their biases where they have any, and raw tokens held, with the scales of rows of 8 bits; with
  /// `select_by_mass` also of the queries that observe.
  [[nodiscard]] std::size_t bytes() const {
    std::int64_t cores = 0, raw = 0, observers = 0;  // rows
    for (std::int64_t b = 0; b < held_.shape.batch; ++b) {
      cores += held_.core_heads * core_count(b);
      raw += held_.shape.kv_heads * raw_count(b);
      observers += held_.shape.heads * held_.observers(held_.at(b)).size();
    }
    const auto [dim, value_dim] = std::array{held_.shape.dim, held_.shape.value_dim};
    const std::int64_t bias = detail::has_core_biases(held_.options) ? sizeof(compute_type<Element>) : 0;
    return static_cast<std::size_t>(cores * (detail::row_bytes<Core>(dim, value_dim) + bias) +
                                    raw * detail::row_bytes<Element>(dim, value_dim) +
                                    observers * detail::row_bytes<compute_type<Element>>(dim, 2));
  }
  /// Bytes of memory taken for keys and values.
  [[nodiscard]] std::size_t allocated_bytes() const {
    std::size_t total = 0;
    for (const auto& s : held_.all)
      total += s.cores.bytes() + s.biases.bytes() + s.sinks.bytes() + s.raw.bytes() + s.observers.bytes();
    return total;
  }

  /// Appends the same number of tokens to every sequence and attends for their queries: `out` and `lse` as of
  /// `attention` over each whole sequence, its last rows.
  ///
  /// @param in  the new tokens: query `[batch, heads, new tokens, dim]`; key `[batch, kv_heads, new tokens, dim]` and value,
  ///   the same with `value_dim`, of elements that the cache takes; sink logits for these queries, and slopes. Queries pool
  ///   groups as well, see `pooling`.
  /// @param to  `out` `[batch, heads, new tokens, value_dim]` and, where given, `lse`, written whole
  /// @param run  executor; the results are bitwise the same for any. A cache has a workspace of its own.
  template <class Query = number_type, class Key = number_type, class Value = Key,
            class Sink = compute_type<Query, Element>, detail::written Out = number_type,
            class Lse = compute_type<Query, Element>>
  void attend(const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& to, const execution& run = {}) {
    if constexpr (check_tokens<Key, Value>()) {
      require_answers(detail::named(in), detail::named(to), held_.shape.batch);
      step(0, in, &to, run);
    }
  }

  /// Of views, without log-sum-exps.
  template <detail::view_or_mistaken Query, class Key, class Value, class Out>
  void attend(const Query& query, const Key& key, const Value& value, const Out& out, const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value, Out>()) attend(inputs{query, key, value}, results{out}, run);
  }

  /// The same for sequence `b` alone: the views' batch is 1. So sequences grow to different lengths.
  template <class Query = number_type, class Key = number_type, class Value = Key,
            class Sink = compute_type<Query, Element>, detail::written Out = number_type,
            class Lse = compute_type<Query, Element>>
  void attend(std::int64_t b, const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>& to,
              const execution& run = {}) {
    if constexpr (check_tokens<Key, Value>()) {
      require_sequence("b", b);
      require_answers(detail::named(in), detail::named(to), 1);
      step(b, in, &to, run);
    }
  }

  /// Of views, without log-sum-exps.
  template <class Query, class Key, class Value, class Out>
  void attend(std::int64_t b, const Query& query, const Key& key, const Value& value, const Out& out,
              const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value, Out>())
      attend(b, inputs{query, key, value}, results{out}, run);
  }

  /// Appends to every sequence without attending.
  template <detail::view_or_mistaken Query, class Key, class Value>
  void append(const Query& query, const Key& key, const Value& value, const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value>()) append(inputs{query, key, value}, run);
  }

  /// The same of inputs: tokens of `q8` have scales.
  template <class Query = number_type, class Key = number_type, class Value = Key,
            class Sink = compute_type<Query, Element>>
  void append(const inputs<Query, Key, Value, Sink>& in, const execution& run = {}) {
    if constexpr (check_tokens<Key, Value>()) {
      require_query({"query", in.query}, held_.shape.batch);
      step<float, compute_type<Element>>(0, in, nullptr, run);
    }
  }

  /// Appends to sequence `b` alone without attending.
  template <class Query, class Key, class Value>
  void append(std::int64_t b, const Query& query, const Key& key, const Value& value, const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value>()) append(b, inputs{query, key, value}, run);
  }

  /// The same of inputs.
  template <class Query = number_type, class Key = number_type, class Value = Key,
            class Sink = compute_type<Query, Element>>
  void append(std::int64_t b, const inputs<Query, Key, Value, Sink>& in, const execution& run = {}) {
    if constexpr (check_tokens<Key, Value>()) {
      require_sequence("b", b);
      require_query({"query", in.query}, 1);
      step<float, compute_type<Element>>(b, in, nullptr, run);
    }
  }

  /// Takes back the tokens of sequence `b` from `length` on, as speculative decoding does with those that were refused.
  /// `least_length` says how far that goes: to `longest - 2 rewind` at least, where `longest` is the greatest length
  /// since the sequence was empty. So `rewind` tokens can be taken back from every length down to `longest - rewind`,
  /// however often that many were appended and refused; what was taken back once counts until `longest` grows.
  void truncate(std::int64_t b, std::int64_t length) {
    require_sequence("b", b);
    if (!(least_length(b) <= length && length <= held_.at(b).length))
      detail::refuse(
          "length", {length},
          {"between ", least_length(b), " and ", held_.at(b).length, ": what earlier queries saw has left the window"});
    held_.at(b).length = length;
  }

  /// Empties sequence `b`; its memory stays.
  void reset(std::int64_t b) {
    require_sequence("b", b);
    held_.clear(held_.at(b));
  }
  /// Empties every sequence.
  void reset() {
    for (auto& s : held_.all) held_.clear(s);
  }

  /// Makes sequence `to` a copy of sequence `from`, as beam search does.
  void fork(std::int64_t from, std::int64_t to) {
    require_sequence("from", from);
    require_sequence("to", to);
    if (from != to) held_.copy(held_.at(from), held_.at(to));
  }

 private:
  friend struct detail::cache_file;

  /// Whether tokens can be taken in as they are.
  template <class Key, class Value>
  static constexpr bool check_tokens() {
    constexpr bool taken = detail::takes_tokens<Element, Key, Value>;
    static_assert(taken,
                  "cca: keys and values have the cache's element type, which for q8 may be rounded from float, "
                  "Eigen::bfloat16 or Eigen::half: attention sees them as it keeps them");
    return taken;
  }

  /// A caller's sequence.
  [[nodiscard]] const auto& known(std::int64_t b) const {
    require_sequence("b", b);
    return held_.at(b);
  }

  static cca::options validated(const cca::options& options) {
    detail::require_options<detail::product_type<Element, Core>>(options);
    detail::require_grouping(options);
    detail::require_unset(options, &cca::options::first_position, "a cache knows its positions");
    detail::require_causal(options, "a cache does not know the tokens to come");
    return options;
  }

  void require_sequence(const char* name, std::int64_t b) const {
    if (!(0 <= b && b < held_.shape.batch)) detail::refuse(name, {b}, {"a sequence in [0, ", held_.shape.batch, ")"});
  }

  /// A step has as many new tokens for every sequence.
  static void require_even(const detail::named_view& view) {
    if (view.has_lengths())
      detail::refuse(view.name, {"lengths per sequence"},
                     {"as many tokens for each; the calls of one sequence take any number"});
  }

  void require_query(const detail::named_view& query, std::int64_t batch) const {
    detail::require_operand(query);
    require_even(query);
    detail::require_extents(query, {batch, held_.shape.heads, query.length(), held_.shape.dim});
  }

  /// Queries, what belongs to them, and where their answers go.
  void require_answers(const detail::input_views& in, const detail::result_views& to, std::int64_t batch) const {
    require_query(in.query, batch);
    detail::require_sink_logits(in.query, in.sink_logits);
    detail::require_alibi_slopes(in.query, in.alibi_slopes);
    detail::require_none(in.key_bias, "a cache keeps no biases of its tokens");
    detail::require_results(in, held_.shape.value_dim, to);
  }

  /// The sequences of a step, `count` of them from `first` on, and its new tokens for each.
  struct step_extent {
    std::int64_t first, count, tokens;
  };

  /// Keys and values of a step, and room for its tokens.
  void require_tokens(const step_extent& extent, const detail::input_views& in) const {
    const auto& [first, batch, count] = extent;
    const detail::named_view &key = in.key, &value = in.value;
    for (const detail::named_view* tokens : {&key, &value}) {
      detail::require_operand(*tokens);
      require_even(*tokens);
    }
    detail::require_extents(key, {batch, held_.shape.kv_heads, count, held_.shape.dim});
    detail::require_extents(value, {batch, held_.shape.kv_heads, count, held_.shape.value_dim});
    detail::require_scales(key, in.key_scales);
    detail::require_scales(value, in.value_scales);
    for (std::int64_t b = first; b < first + batch && held_.shape.capacity > 0; ++b)
      if (count > held_.shape.capacity - held_.at(b).length)
        detail::refuse("key", {count, " tokens after ", held_.at(b).length},
                       {"at most the capacity of ", held_.shape.capacity});
  }

  /// Everything that can fail comes first; then tokens are rounded where they are kept in 8 bits, sink tokens are taken over, groups pooled and queries answered beside what
  /// counts; only then does the cache change. `to` is null where nothing is asked. The sequences are those from `first` on.
  template <class Out, class Lse, class Query, class Key, class Value, class Sink>
  void step(std::int64_t first, const inputs<Query, Key, Value, Sink>& in, const results<Out, Lse>* to,
            const execution& run) {
    using T = compute_type<Query, Element>;
    (void)detail::check_numbers<T, Sink>();
    using Product = detail::product_type<Query, Element, Core>;
    const step_extent extent{first, in.query.batch(), in.query.length()};
    if (to != nullptr) detail::require_unit<Product>(held_.options);
    require_tokens(extent, detail::named(in));
    if (extent.tokens == 0) return;
    for (std::int64_t b = first; b < first + extent.count; ++b)
      held_.reserve("key", held_.at(b), held_.at(b).length + extent.tokens);

    const detail::pool_plan<T> pooler = held_.template plan_pooling<T>(first, extent.count, extent.tokens, run);
    const auto rows = held_.rows_of_step(first, extent.count, extent.tokens);
    const auto each = [](std::int64_t count) { return [count](std::int64_t) { return count; }; };
    const auto forward =
        detail::plan<Product>({extent.count, true}, in.query, held_.shape.value_dim, held_.shape.kv_heads, {},
                              !detail::in_place<T, Element, Core>, held_.options.unit, run, each(rows.sinks),
                              each(rows.cores), each(rows.raw), each(rows.raw), each(rows.fresh));
    const detail::kept_tokens<Element, Key, Value> kept(in.key, in.value);
    detail::scratch memory = take_workspace(kept.bytes() + pooler.bytes() + forward.bytes());
    const auto fresh = kept.take(in, run, memory);
    const auto pool_memory = pooler.take(memory);
    held_.pool_new_groups(first, in.query, fresh, run, pool_memory);
    for (std::int64_t b = 0; b < extent.count; ++b) held_.keep_sinks(held_.at(first + b), fresh, b);
    if (to != nullptr)
      held_.with_sources(first, fresh, rows, [&](const auto&... sources) {
        const auto rule = detail::make_score_rule<T>(held_.options, in, detail::has_core_biases(held_.options));
        forward(in.query, to->out, to->lse, rule, run, memory, sources...);
      });
    for (std::int64_t b = 0; b < extent.count; ++b) {
      held_.keep_observers(held_.at(first + b), in.query, b, pool_memory);
      held_.keep(held_.at(first + b), fresh, b);
    }
  }

  /// Memory for a step, which stays for the next.
  [[nodiscard]] detail::scratch take_workspace(std::size_t bytes) {
    if (workspace_.bytes() < bytes + detail::scratch_alignment)
      workspace_ = detail::aligned_memory(bytes + detail::scratch_alignment);
    return {{workspace_.data(), workspace_.bytes()}, bytes};
  }

  detail::cached_sequences<Element, Core> held_;
  detail::aligned_memory workspace_;
};

}}  // namespace cca::CCA_TARGET
