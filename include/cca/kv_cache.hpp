#pragma once

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
#include "detail/context/row_store.hpp"
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

/// The keys and values that CCA attention can still see: per sequence the cores of all complete groups and the raw
/// tokens of the window, `floor(n / g)` cores and at most `s + g + 2 rewind` raw entries after n tokens.
///
/// Tokens are appended one or many at a time; a group is pooled as soon as its last token arrives, with that token's
/// query. Attending gives what `attention` gives for the whole sequence, within rounding, however it was cut. With a
/// matrix unit, which queries, tokens and cores all of the same 16-bit type can have, a prompt is attended to by the unit;
/// up to `detail::most_few_queries` at a time, which are bound by memory, by floats.
///
/// @tparam Element  of keys and values; computed with in `compute_type`
/// @tparam Core  of cores, which are rounded to it once: with `float` cores beside `Eigen::bfloat16` tokens they stay as
///   they were computed, with `Eigen::bfloat16` cores beside `float` tokens far context takes half the bytes
/// Every method that throws leaves the cache as it was: `std::invalid_argument` for what it refuses, naming the argument,
/// and `std::bad_alloc`. One thread at a time may use a cache.
/// Source: arXiv 2412.12465, section 3.4 (inference).
template <class Element = float, class Core = Element>
class kv_cache {
  static_assert(detail::check_elements<Element, Core>());
  static_assert(std::is_same_v<Element, double> || !std::is_same_v<Core, double>,
                "cores are computed in float unless keys and values are double: as double they would hold no more");

 public:
  using element_type = Element;  ///< of keys and values
  using core_type = Core;        ///< of cores

  /// @throws std::invalid_argument  naming the member of `shape` or `options` that makes no sense
  kv_cache(const cache_shape& shape, const options& options)
      : shape_(detail::complete(shape)),
        options_(validated(options)),
        partition_{options.group_size, options.window},
        core_heads_(detail::core_head_count(options, shape_.heads, shape_.kv_heads)) {
    for (std::int64_t b = 0; b < shape_.batch; ++b) {
      sequences_.push_back(new_sequence());
      reserve("shape.capacity", sequences_.back(), shape_.capacity);
    }
  }

  /// @{
  /// What the cache was made with, the shape's defaults filled in.
  [[nodiscard]] const cache_shape& shape() const { return shape_; }
  [[nodiscard]] const cca::options& options() const { return options_; }
  /// @}

  /// Tokens appended to sequence `b`.
  [[nodiscard]] std::int64_t length(std::int64_t b = 0) const { return known(b).length; }
  /// Core tokens of sequence `b`, per core head.
  [[nodiscard]] std::int64_t core_count(std::int64_t b = 0) const { return group_count(known(b).length); }
  /// Raw tokens of sequence `b` that a query to come can see, or that a rewind needs, per key/value head.
  [[nodiscard]] std::int64_t raw_count(std::int64_t b = 0) const { return known(b).length - known(b).oldest; }
  /// The least length to which `truncate` can take sequence `b`.
  [[nodiscard]] std::int64_t least_length(std::int64_t b = 0) const {
    return partition_.first_query_beyond(known(b).oldest);
  }

  /// Bytes of the cores and raw tokens held.
  [[nodiscard]] std::size_t bytes() const {
    std::size_t column = 0;  // one element of every row
    for (std::int64_t b = 0; b < shape_.batch; ++b)
      column += static_cast<std::size_t>(core_heads_ * core_count(b)) * sizeof(Core) +
                static_cast<std::size_t>(shape_.kv_heads * raw_count(b)) * sizeof(Element);
    return column * static_cast<std::size_t>(shape_.dim + shape_.value_dim);
  }
  /// Bytes of memory taken for keys and values.
  [[nodiscard]] std::size_t allocated_bytes() const {
    std::size_t total = 0;
    for (const sequence& s : sequences_) total += s.cores.bytes() + s.raw.bytes();
    return total;
  }

  /// Appends the same number of tokens to every sequence and attends for their queries: `out` and `lse` as of
  /// `attention` over each whole sequence, its last rows.
  ///
  /// @param in  the new tokens: query `[batch, heads, new tokens, dim]`; key `[batch, kv_heads, new tokens, dim]` and value,
  ///   the same with `value_dim`, of the cache's element type; sink logits for these queries. With `last_query` pooling
  ///   groups are pooled with the query of their last token.
  /// @param to  `out` `[batch, heads, new tokens, value_dim]` and, where given, `lse`, written whole
  /// @param run  executor; the results are bitwise the same for any. A cache has a workspace of its own.
  template <class Query = Element, class Sink = compute_type<Query, Element>, detail::written Out = Element,
            class Lse = compute_type<Query, Element>>
  void attend(const inputs<Query, Element, Element, Sink>& in, const results<Out, Lse>& to, const execution& run = {}) {
    require_query(in.query, shape_.batch);
    detail::require_sink_logits<compute_type<Query, Element>>(in.query, in.sink_logits);
    detail::require_results(in.query, shape_.value_dim, to.out, to.lse);
    step(0, in, &to, run);
  }

  /// Of views, without log-sum-exps.
  template <detail::view_or_mistaken Query, class Key, class Value, class Out>
  void attend(const Query& query, const Key& key, const Value& value, const Out& out, const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value, Out>() && check_tokens<Key, Value>())
      attend(inputs{query, key, value}, results{out}, run);
  }

  /// The same for sequence `b` alone: the views' batch is 1. So sequences grow to different lengths.
  template <class Query = Element, class Sink = compute_type<Query, Element>, detail::written Out = Element,
            class Lse = compute_type<Query, Element>>
  void attend(std::int64_t b, const inputs<Query, Element, Element, Sink>& in, const results<Out, Lse>& to,
              const execution& run = {}) {
    require_sequence("b", b);
    require_query(in.query, 1);
    detail::require_sink_logits<compute_type<Query, Element>>(in.query, in.sink_logits);
    detail::require_results(in.query, shape_.value_dim, to.out, to.lse);
    step(b, in, &to, run);
  }

  /// Of views, without log-sum-exps.
  template <class Query, class Key, class Value, class Out>
  void attend(std::int64_t b, const Query& query, const Key& key, const Value& value, const Out& out,
              const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value, Out>() && check_tokens<Key, Value>())
      attend(b, inputs{query, key, value}, results{out}, run);
  }

  /// Appends to every sequence without attending.
  template <detail::view_or_mistaken Query, class Key, class Value>
  void append(const Query& query, const Key& key, const Value& value, const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value>() && check_tokens<Key, Value>()) {
      require_query(query, shape_.batch);
      step<float, compute_type<Element>>(0, inputs{query, key, value}, nullptr, run);
    }
  }

  /// Appends to sequence `b` alone without attending.
  template <class Query, class Key, class Value>
  void append(std::int64_t b, const Query& query, const Key& key, const Value& value, const execution& run = {}) {
    if constexpr (detail::check_views<Query, Key, Value>() && check_tokens<Key, Value>()) {
      require_sequence("b", b);
      require_query(query, 1);
      step<float, compute_type<Element>>(b, inputs{query, key, value}, nullptr, run);
    }
  }

  /// Takes back the tokens of sequence `b` from `length` on, as speculative decoding does with those that were refused.
  /// `least_length` says how far that goes: to `longest - 2 rewind` at least, where `longest` is the greatest length
  /// since the sequence was empty. So `rewind` tokens can be taken back from every length down to `longest - rewind`,
  /// however often that many were appended and refused; what was taken back once counts until `longest` grows.
  void truncate(std::int64_t b, std::int64_t length) {
    require_sequence("b", b);
    if (!(least_length(b) <= length && length <= at(b).length))
      detail::refuse("length", detail::to_string(length),
                     "between " + detail::to_string(least_length(b)) + " and " + detail::to_string(at(b).length) +
                         ": what earlier queries saw has left the window");
    at(b).length = length;
  }

  /// Empties sequence `b`; its memory stays.
  void reset(std::int64_t b) {
    require_sequence("b", b);
    at(b).length = at(b).oldest = 0;
  }
  /// Empties every sequence.
  void reset() {
    for (sequence& s : sequences_) s.length = s.oldest = 0;
  }

  /// Makes sequence `to` a copy of sequence `from`, as beam search does.
  void fork(std::int64_t from, std::int64_t to) {
    require_sequence("from", from);
    require_sequence("to", to);
    if (from == to) return;
    const sequence& source = at(from);
    sequence& target = at(to);
    target.cores.reserve(core_count(from), source.cores.capacity());
    if (target.raw.capacity() != source.raw.capacity()) {  // a token's row goes by the capacity
      ring raw(shape_.kv_heads, shape_.dim, shape_.value_dim);
      raw.reserve(source.raw.capacity(), source.raw.capacity());
      target.raw = std::move(raw);
    }
    for (std::int64_t h = 0; h < core_heads_; ++h)
      target.cores.copy_rows(h, 0, source.cores.rows(h, 0), core_count(from));
    const typename ring::pieces held = source.raw.find({source.oldest, source.length});
    target.raw.write(held.first, [&](std::int64_t h) { return source.raw.rows(h, held.row); });
    target.raw.write(held.second, [&](std::int64_t h) { return source.raw.rows(h, 0); });
    target.length = source.length;
    target.oldest = source.oldest;
  }

 private:
  friend struct detail::cache_file;

  using ring = detail::row_ring<Element>;

  struct sequence {
    std::int64_t length = 0;
    std::int64_t oldest = 0;        // of the raw tokens held, [oldest, length)
    detail::row_store<Core> cores;  // row b: group b
    ring raw;
  };

  [[nodiscard]] sequence new_sequence() const {
    return {0, 0, {core_heads_, shape_.dim, shape_.value_dim}, {shape_.kv_heads, shape_.dim, shape_.value_dim}};
  }

  /// Takes a sequence in, as one more of the batch.
  void add(sequence&& s) {
    reserve("shape.capacity", s, shape_.capacity);
    sequences_.push_back(std::move(s));
    ++shape_.batch;
  }

  /// Complete groups among `length` tokens; without a window no query ever sees their cores.
  [[nodiscard]] std::int64_t group_count(std::int64_t length) const {
    return options_.window == unlimited ? 0 : partition_.group_count(length);
  }

  /// Whether tokens can be taken in as they are.
  template <class Key, class Value>
  static constexpr bool check_tokens() {
    constexpr bool of_cache = std::is_same_v<std::remove_const_t<typename Key::element_type>, Element> &&
                              std::is_same_v<std::remove_const_t<typename Value::element_type>, Element>;
    static_assert(of_cache, "cca: keys and values have the cache's element type: attention sees them as it keeps them");
    return of_cache;
  }

  /// The raw tokens held that the next query sees.
  [[nodiscard]] typename ring::pieces window_of(const sequence& s) const {
    return s.raw.find({partition_.raw(s.length).begin, s.length});
  }

  [[nodiscard]] const sequence& at(std::int64_t b) const { return sequences_[static_cast<std::size_t>(b)]; }
  [[nodiscard]] sequence& at(std::int64_t b) { return sequences_[static_cast<std::size_t>(b)]; }
  /// A caller's sequence.
  [[nodiscard]] const sequence& known(std::int64_t b) const {
    require_sequence("b", b);
    return at(b);
  }

  /// Raw entries that a sequence of any length needs: what the queries from `longest - 2 rewind` on see. A refused draft
  /// takes one `rewind` away, the tokens before it can then be taken back by the other.
  [[nodiscard]] std::int64_t raw_limit() const {
    std::int64_t limit = options_.window;
    for (const std::int64_t more : {options_.group_size, shape_.rewind, shape_.rewind})
      limit = limit > unlimited - more ? unlimited : limit + more;
    return limit;
  }

  /// Room for `length` tokens, which `argument` asks for. While the raw entries still grow nothing has wrapped around:
  /// every token keeps its row.
  void reserve(const char* argument, sequence& s, std::int64_t length) {
    const std::int64_t cores = group_count(length), raw = detail::smaller(length, raw_limit());
    const std::int64_t dims = shape_.dim + shape_.value_dim;
    const long double bytes = detail::elements(core_heads_, cores, dims) * sizeof(Core) +
                              detail::elements(shape_.kv_heads, raw, dims) * sizeof(Element);
    if (bytes > detail::most_allocated_bytes)
      detail::refuse(argument, detail::to_string(length) + " tokens of " + detail::to_string(bytes) + " bytes",
                     "at most 2^40 bytes per sequence");
    s.cores.reserve(cores, unlimited);
    s.raw.reserve(raw, raw_limit());
  }

  static cca::options validated(const cca::options& options) {
    detail::require_options<detail::product_type<Element, Core>>(options);
    detail::require_grouping(options);
    detail::require_unset(options, &cca::options::first_position, "a cache knows its positions");
    return options;
  }

  void require_sequence(const char* name, std::int64_t b) const {
    if (!(0 <= b && b < shape_.batch))
      detail::refuse(name, detail::to_string(b), "a sequence in [0, " + detail::to_string(shape_.batch) + ")");
  }

  template <class Query>
  void require_query(const tensor_view<Query>& query, std::int64_t batch) const {
    detail::require_operand("query", query);
    detail::require_extents("query", query, {batch, shape_.heads, query.length(), shape_.dim});
  }

  /// The sequences of a step, `count` of them from `first` on, and its new tokens for each.
  struct step_extent {
    std::int64_t first, count, tokens;
  };

  /// Keys and values of a step, and room for its tokens.
  template <class Key, class Value>
  void require_tokens(const step_extent& extent, tensor_view<Key> key, tensor_view<Value> value) const {
    const auto& [first, batch, count] = extent;
    detail::require_operand("key", key);
    detail::require_operand("value", value);
    detail::require_extents("key", key, {batch, shape_.kv_heads, count, shape_.dim});
    detail::require_extents("value", value, {batch, shape_.kv_heads, count, shape_.value_dim});
    for (std::int64_t b = first; b < first + batch && shape_.capacity > 0; ++b)
      if (count > shape_.capacity - at(b).length)
        detail::refuse("key", detail::to_string(count) + " tokens after " + detail::to_string(at(b).length),
                       "at most the capacity of " + detail::to_string(shape_.capacity));
  }

  /// Everything that can fail comes first; then groups are pooled and queries answered beside what counts; only then
  /// does the cache change. `to` is null where nothing is asked. The sequences are those from `first` on.
  template <class Out, class Lse, class Inputs>
  void step(std::int64_t first, const Inputs& in, const results<Out, Lse>* to, const execution& run) {
    using Query = std::remove_const_t<typename decltype(in.query)::element_type>;
    using T = compute_type<Query, Element>;
    using Product = detail::product_type<Query, Element, Core>;
    const step_extent extent{first, in.query.batch(), in.query.length()};
    if (to != nullptr) detail::require_unit<Product>(options_);
    require_tokens(extent, in.key, in.value);
    if (extent.tokens == 0) return;
    for (std::int64_t b = first; b < first + extent.count; ++b) reserve("key", at(b), at(b).length + extent.tokens);

    const std::int64_t workers = pool_workers(extent.tokens, run);
    const std::int64_t pooler_size =
        detail::group_rows<T>::size(shape_.dim, shape_.value_dim, !detail::in_place<T, Element>);
    const source_rows rows = rows_of_step(extent);
    const auto forward =
        detail::plan<Product>(in.query, shape_.value_dim, shape_.kv_heads, {rows.cores, rows.raw, rows.raw, rows.fresh},
                              !detail::in_place<T, Element, Core>, options_.unit, run);
    detail::scratch memory = take_workspace(detail::worker_scratch<T>::bytes(workers, pooler_size) + forward.bytes());
    pool_new_groups(first, in.query, in.key, in.value, run, detail::worker_scratch<T>(memory, workers, pooler_size));
    if (to != nullptr) answer(forward, first, in, *to, rows, run, memory);
    for (std::int64_t b = 0; b < extent.count; ++b) keep(at(first + b), in.key, in.value, b);
  }

  /// Workers of pooling the most groups that so many tokens can complete.
  [[nodiscard]] std::int64_t pool_workers(std::int64_t tokens, const execution& run) const {
    if (!detail::pools(options_)) return 1;
    return detail::worker_count(
        run, detail::pool_tasks(1, shape_.kv_heads, group_count(tokens) + 1, options_.group_size).size());
  }

  /// Rows of the sources of a step, of the longest sequence.
  struct source_rows {
    std::int64_t cores, raw, fresh;
  };
  [[nodiscard]] source_rows rows_of_step(const step_extent& extent) const {
    source_rows rows{0, 0, extent.tokens};
    for (std::int64_t b = extent.first; b < extent.first + extent.count; ++b) {
      rows.cores = detail::larger(rows.cores, at(b).cores.capacity());
      rows.raw = detail::larger(rows.raw, at(b).raw.capacity());
    }
    return rows;
  }

  /// Memory for a step, which stays for the next.
  [[nodiscard]] detail::scratch take_workspace(std::size_t bytes) {
    if (workspace_.bytes() < bytes + detail::scratch_alignment)
      workspace_ = detail::aligned_memory(bytes + detail::scratch_alignment);
    return {{workspace_.data(), workspace_.bytes()}, bytes};
  }

  /// Attends to the cores, to the two pieces of the raw tokens held, and to the new tokens.
  template <class Forward, class Inputs, class Out, class Lse>
  void answer(const Forward& forward, std::int64_t first, const Inputs& in, const results<Out, Lse>& to,
              const source_rows& rows, const execution& run, detail::scratch& memory) const {
    using T = compute_type<typename decltype(in.query)::element_type, Element>;
    const auto sequence_of = [this, first](std::int64_t b) -> const sequence& { return at(first + b); };
    /// Of the raw tokens that query `i` sees those of a piece, counted from its first.
    const auto seen_of = [this, sequence_of](std::int64_t b, std::int64_t i, range piece) {
      return shifted(intersection(partition_.raw(sequence_of(b).length + i), piece), -piece.begin);
    };
    forward(in.query, to.out, to.lse, detail::make_score_rule<T>(options_, shape_.dim, in.sink_logits), run, memory,
            detail::source{core_heads_, rows.cores,
                           [=](std::int64_t b, std::int64_t h) { return sequence_of(b).cores.rows(h, 0); },
                           [=, this](std::int64_t b, std::int64_t, std::int64_t i) {
                             return range{0, partition_.core_count(sequence_of(b).length + i)};
                           }},
            detail::source{shape_.kv_heads, rows.raw,
                           [=, this](std::int64_t b, std::int64_t h) {
                             return sequence_of(b).raw.rows(h, window_of(sequence_of(b)).row);
                           },
                           [=, this](std::int64_t b, std::int64_t, std::int64_t i) {
                             return seen_of(b, i, window_of(sequence_of(b)).first);
                           }},
            detail::source{shape_.kv_heads, rows.raw,
                           [=](std::int64_t b, std::int64_t h) { return sequence_of(b).raw.rows(h, 0); },
                           [=, this](std::int64_t b, std::int64_t, std::int64_t i) {
                             return seen_of(b, i, window_of(sequence_of(b)).second);
                           }},
            detail::source{shape_.kv_heads, rows.fresh,
                           [=](std::int64_t b, std::int64_t h) { return detail::rows_of(in.key, in.value, b, h); },
                           [=](std::int64_t b, std::int64_t, std::int64_t i) {
                             const std::int64_t length = sequence_of(b).length;
                             return seen_of(b, i, {length, length + rows.fresh});
                           }});
  }

  /// Pools the groups that the new tokens complete, from old rows and new ones.
  template <class T, class Query, class Key, class Value>
  void pool_new_groups(std::int64_t first, tensor_view<Query> query, tensor_view<Key> key, tensor_view<Value> value,
                       const execution& run, const detail::worker_scratch<T>& scratch) {
    if (!detail::pools(options_)) return;
    for (std::int64_t b = 0; b < query.batch(); ++b) {
      const sequence& s = at(first + b);
      const auto absorb = [&](auto& pooler, std::int64_t, std::int64_t h, range group) {
        const typename ring::pieces old = s.raw.find(intersection(group, {0, s.length}));
        pooler.absorb(s.raw.rows(h, old.row), {0, old.first.size()});
        pooler.absorb(s.raw.rows(h, 0), {0, old.second.size()});
        pooler.absorb(detail::rows_of(key, value, b, h),
                      shifted(intersection(group, {s.length, group.end}), -s.length));
      };
      const auto last = [&](std::int64_t, std::int64_t h, std::int64_t token) {
        return query.row(b, h, token - s.length);
      };
      const auto core = [&](std::int64_t, std::int64_t h, std::int64_t c) {
        return std::pair(s.cores.key(h, c), s.cores.value(h, c));
      };
      const range groups{group_count(s.length), group_count(s.length + query.length())};
      detail::pool_groups<T>({1, shape_.heads, shape_.kv_heads, core_heads_}, groups, shape_.dim, shape_.value_dim,
                             options_, absorb, last, core, run, scratch);
    }
  }

  /// Takes over the new raw tokens of batch entry `b` of the views that later queries or a rewind can need.
  template <class Key, class Value>
  void keep(sequence& s, tensor_view<Key> key, tensor_view<Value> value, std::int64_t b) {
    const std::int64_t length = s.length + key.length();
    const range tokens{detail::larger(s.length, length - s.raw.capacity()), length};
    s.raw.write(tokens, [&](std::int64_t h) {
      auto rows = detail::rows_of(key, value, b, h);
      rows.key += (tokens.begin - s.length) * rows.key_stride;
      rows.value += (tokens.begin - s.length) * rows.value_stride;
      return rows;
    });
    s.length = length;
    s.oldest = detail::larger(s.oldest, length - s.raw.capacity());
  }

  cache_shape shape_;
  cca::options options_;
  partition partition_;
  std::int64_t core_heads_;
  std::vector<sequence> sequences_;
  detail::aligned_memory workspace_;
};

}}  // namespace cca::CCA_TARGET
