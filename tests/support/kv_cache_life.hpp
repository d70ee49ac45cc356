#pragma once

// The life of a cache: operations that are drawn from numbers or bytes, each answer compared with the textbook's of the
// whole sequence.

#include "kv_cache_steps.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <optional>
#include <set>
#include <stdexcept>

namespace cca::test {

/// The last rows of a tensor.
template <class Scalar>
reference::tensor<Scalar> last_rows(const reference::tensor<Scalar>& all, std::int64_t count) {
  const auto& [batch, heads, length, dim] = all.extent;
  reference::tensor<Scalar> last(batch, heads, count, dim);
  copy<Scalar>(tokens_of(all.view(), {length - count, length}), last.view());
  return last;
}

/// Rounds rows to elements of the type, those of `q8` by the scale of each row, in numbers of `Scalar` but for that.
template <class Element, class Scalar>
void round_rows_to(tensor_view<Scalar> rows) {
  for_each_row(rows, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    Scalar *const begin = rows.row(b, h, i), *const end = begin + rows.dim();
    if constexpr (std::is_same_v<Element, q8>) {
      float largest = 0;
      for (Scalar* x = begin; x < end; ++x) largest = std::max(largest, std::fabs(static_cast<float>(*x)));
      const float scale = largest / 127;
      for (Scalar* x = begin; x < end; ++x)
        *x = scale == 0
                 ? 0
                 : static_cast<Scalar>(std::nearbyint(static_cast<float>(*x) / scale)) * static_cast<Scalar>(scale);
    } else {
      for (Scalar* x = begin; x < end; ++x) *x = static_cast<Scalar>(static_cast<Element>(*x));
    }
  });
}

/// The textbook of a step: attention over the whole sequence, of which the step is the last `count` queries. Tokens are as a
/// cache of `Element` keeps them; the plain textbook keeps cores in `Core`, as the cache does.
template <class Element, class Core, class T>
auto textbook_of(const token_views<T>& whole, std::int64_t count, const options& options) {
  return [=]<class Scalar>() {
    reference::converter<Scalar> numbers;
    reference::operands<Scalar> in = numbers(inputs{whole.query, whole.key, whole.value});
    reference::tensor<Scalar> key(whole.key.extent), value(whole.value.extent);
    if constexpr (std::is_same_v<Element, q8>) {
      copy<Scalar>(in.key, key.view());
      copy<Scalar>(in.value, value.view());
      round_rows_to<q8>(key.view());
      round_rows_to<q8>(value.view());
      in.key = key.view();
      in.value = value.view();
    }
    auto cores = reference::pool(in, options);
    if constexpr (std::is_same_v<Scalar, T>)
      for (reference::tensor<Scalar>* rows : {&cores.first, &cores.second}) round_rows_to<Core>(rows->view());
    const partition partition = partition_of(options);
    const auto biases = reference::core_biases(in, options);
    const auto all = reference::attend<Scalar>(
        in, cores.first.view(), cores.second.view(), options,
        [&](std::int64_t, std::int64_t, std::int64_t t) { return reference::first_rows(partition.core_count(t)); },
        [&](std::int64_t t) { return reference::raw_tokens(partition, t, whole.key.length()); },
        reference::core_terms(options, biases, whole.query.heads()));
    return reference::result<Scalar>{last_rows(all.out, count), last_rows(all.lse, count)};
  };
}
template <class T>
auto textbook(const token_views<T>& whole, std::int64_t count, const options& options) {
  return textbook_of<T, T>(whole, count, options);
}

enum class operation { append, append_to_all, attend, attend_all, truncate, fork, reset, reload };
constexpr std::int64_t operation_count = 8;

/// What a sequence of a cache should be.
template <class T>
struct known_sequence {
  operands<T> tokens;  // the first `length` of them
  std::int64_t length = 0;
  std::int64_t longest = 0;  // since it was empty
  std::int64_t oldest = 0;   // raw token still held behind the sink tokens
};

/// A cache, and beside it all tokens of its sequences: whatever is done to it, it has to answer and to count as if it had
/// all of them, too. What is done is drawn from `Random`, from which `draw` takes numbers. Answers go to
/// `judge(results, textbook, label)`, `textbook` as `attention_rule` wants it; all else is expected here.
template <class Element, class Core, class Random, class Judge>
class cache_life {
  using T = number_of<Element>;

 public:
  cache_life(Random& random, std::string label, Judge judge)
      : random_(random),
        numbers_(static_cast<std::uint64_t>(draw(random, 0, 255))),
        setup_(random_setup(random)),
        cache_(setup_.template make<Element, Core>()),
        label_(std::move(label)),
        judge_(std::move(judge)) {
    for (std::int64_t b = 0; b < setup_.shape.batch; ++b)
      known_.push_back({.tokens = random_tokens<T>(setup_, 1, longest, numbers_)});
  }

  /// `note(operation, group size, tokens beyond complete groups)` hears of each step, but of those within sink tokens.
  template <class Note>
  void live(int steps, const Note& note) {
    // Mostly tokens come.
    constexpr std::array operations{operation::append,     operation::append_to_all, operation::attend,
                                    operation::attend,     operation::attend,        operation::attend,
                                    operation::attend_all, operation::fork,          operation::reset,
                                    operation::truncate,   operation::truncate,      operation::reload};
    for (int step = 0; step < steps && !testing::Test::HasFailure(); ++step) {
      const operation next = draw_from(random_, operations);
      const std::int64_t b = draw(random_, 0, setup_.shape.batch - 1);
      const std::int64_t group_size = setup_.options.group_size, length = known(b).length;
      const std::string label = label_ + ", step " + std::to_string(step) + ", operation " +
                                std::to_string(static_cast<int>(next)) + ", sequence " + std::to_string(b) +
                                " of length " + std::to_string(length) + "; " + describe(setup_);
      SCOPED_TRACE(label);
      const std::int64_t behind_sinks = length - setup_.options.sink_tokens;
      if (group_size > 0 && behind_sinks >= 0) note(next, group_size, behind_sinks % group_size);
      operate(next, b, label);
      expect_counts();
    }
  }

 private:
  static constexpr std::int64_t longest = 72;

  static cache_setup random_setup(Random& random) {
    const std::int64_t kv_heads = draw(random, 1, 2);
    cache_setup setup{.shape = {.batch = draw(random, 1, 3),
                                .heads = kv_heads * draw(random, 1, 3),
                                .kv_heads = kv_heads,
                                .dim = draw_from(random, std::array{1, 3, 4, 8, 17}),
                                .value_dim = draw_from(random, std::array{0, 0, 1, 4, 9}),
                                .capacity = draw_from(random, std::array<std::int64_t, 3>{0, 0, longest}),
                                .rewind = draw(random, 0, 5)},
                      .options = {.group_size = draw(random, 1, 9),
                                  .window = draw(random, 1, 20),
                                  .sink_tokens = draw_from(random, std::array{0, 0, 0, 0, 1, 2, 6, 13, 200}),
                                  .pool = draw_from(random, all_poolings),
                                  .core_heads = draw_from(random, all_core_heads)}};
    const bool weighted = setup.options.pool == pooling::last_query || setup.options.pool == pooling::mean;
    if (weighted && draw(random, 0, 2) == 0) setup.options.core_bias = core_bias::entropy;
    if (draw(random, 0, 7) == 0)
      setup.options = {.window = setup.options.window, .sink_tokens = setup.options.sink_tokens};
    if (draw(random, 0, 3) == 0) setup.options.softmax_scale = -0.3;
    if (setup.options.pool == pooling::last_query && setup.options.group_size % 2 == 1) setup.options.pooling_scale = 3;
    if (draw(random, 0, 15) == 0) setup.options = {.sink_tokens = setup.options.sink_tokens};
    return setup;
  }

  [[nodiscard]] known_sequence<T>& known(std::int64_t b) { return known_[static_cast<std::size_t>(b)]; }

  void operate(operation next, std::int64_t b, const std::string& label) {
    switch (next) {
      case operation::append:
        return step({b, b + 1}, false, label);
      case operation::append_to_all:
        return step({0, setup_.shape.batch}, false, label);
      case operation::attend:
        return step({b, b + 1}, true, label);
      case operation::attend_all:
        return step({0, setup_.shape.batch}, true, label);
      case operation::truncate:
        return truncate(b);
      case operation::fork: {
        const std::int64_t to = draw(random_, 0, setup_.shape.batch - 1);
        cache_.fork(b, to);
        if (to != b) known(to) = known_sequence<T>(known(b));
        return;
      }
      case operation::reset:
        cache_.reset(b);
        known(b).length = known(b).longest = known(b).oldest = 0;
        return;
      case operation::reload: {
        const std::string file = content(cache_);
        std::istringstream stream(file);
        cache_ = load<Element, Core>(stream);
        EXPECT_EQ(content(cache_), file);
      }
    }
  }

  /// A single token, a few or many come to the sequences `batch`: one of them or all.
  void step(range batch, bool attending, const std::string& label) {
    std::int64_t room = longest;
    for (std::int64_t b = batch.begin; b < batch.end; ++b) room = std::min(room, longest - known(b).length);
    const std::int64_t most = draw_from(random_, std::array<std::int64_t, 5>{1, 1, 4, 20, longest});
    const std::int64_t count = room == 0 ? 1 : draw(random_, 1, std::min(most, room));
    const operands<T> fresh =
        random_operands<T>(setup_.step(batch.size(), count), numbers_, random_operand_layouts(numbers_));
    const token_views<T> tokens = views_of(fresh);
    const bool all = batch.size() == setup_.shape.batch;
    if (room == 0) {
      const auto one_more = [&] { all ? append(cache_, tokens) : append(cache_, batch.begin, tokens); };
      if (setup_.shape.capacity > 0) {
        EXPECT_THROW(one_more(), std::invalid_argument);
      }
      return;
    }
    std::optional<results<T>> answers;
    const auto come = [&](const auto& in) {
      if (attending)
        answers = all ? attend(cache_, in) : attend(cache_, batch.begin, in);
      else
        all ? append(cache_, in) : append(cache_, batch.begin, in);
    };
    bool rounded = false;  // before they come
    if constexpr (std::is_same_v<Element, q8>) {
      rounded = draw(numbers_, 0, 1) == 1;
      if (rounded) come(rounded_tokens(tokens, numbers_).views());
    }
    if (!rounded) come(tokens);

    for (std::int64_t b = batch.begin; b < batch.end; ++b) {
      known_sequence<T>& s = known(b);
      const token_views<T> added = sequence_of(tokens, b - batch.begin);
      const range place{s.length, s.length + count};
      copy<T>(added.query, tokens_of(s.tokens.query.view(), place));
      copy<T>(added.key, tokens_of(s.tokens.key.view(), place));
      copy<T>(added.value, tokens_of(s.tokens.value.view(), place));
      s.length += count;
      s.longest = std::max(s.longest, s.length);
      s.oldest = std::max(s.oldest, s.length - setup_.raw_limit());
      if (answers)
        judge_(sequence_of(*answers, b - batch.begin),
               textbook_of<Element, Core>(tokens_of(s.tokens, {0, s.length}), count, setup_.options), label);
    }
  }

  void truncate(std::int64_t b) {
    known_sequence<T>& s = known(b);
    const std::int64_t least = least_length(s);
    EXPECT_THROW(cache_.truncate(b, least - 1), std::invalid_argument);
    EXPECT_THROW(cache_.truncate(b, s.length + 1), std::invalid_argument);
    s.length = draw(random_, 0, 2) == 0 ? least : draw(random_, least, s.length);
    cache_.truncate(b, s.length);
  }

  /// The least length after which the next query finds all it sees raw.
  [[nodiscard]] std::int64_t least_length(const known_sequence<T>& s) const {
    const partition partition = partition_of(setup_.options);
    std::int64_t length = s.length;
    while (length > 0 && intersection(partition.raw(length - 1), {0, s.oldest}).empty()) --length;
    return length;
  }

  void expect_counts() {
    const bool grouped = setup_.options.window != unlimited;
    const std::int64_t core_heads = detail::core_head_count(setup_.options, setup_.shape.heads, setup_.shape.kv_heads);
    std::int64_t core_rows = 0, raw_rows = 0, observers = 0;
    for (std::int64_t b = 0; b < setup_.shape.batch; ++b) {
      const known_sequence<T>& s = known(b);
      const bool observed = setup_.options.pool == pooling::select_by_mass && grouped && setup_.options.group_size > 0;
      const partition partition = partition_of(setup_.options);
      const std::int64_t kept = observed ? partition.core_count(s.length) : partition.group_count(s.length);
      const std::int64_t cores = grouped ? kept : 0,
                         sinks = std::min(setup_.options.sink_tokens, s.length),
                         raw = sinks + range{std::max(sinks, s.oldest), s.length}.size();
      EXPECT_EQ(cache_.length(b), s.length);
      EXPECT_EQ(cache_.core_count(b), cores);
      EXPECT_EQ(cache_.raw_count(b), raw);
      EXPECT_LE(raw - sinks, setup_.raw_limit());
      EXPECT_EQ(cache_.least_length(b), least_length(s));
      EXPECT_LE(cache_.least_length(b), std::max<std::int64_t>(s.longest - 2 * setup_.shape.rewind, 0));
      core_rows += core_heads * cores;
      raw_rows += setup_.shape.kv_heads * raw;
      // A window of at most 20 tokens has an observer in each place.
      if (observed) observers += setup_.shape.heads * range{std::max(setup_.options.sink_tokens, s.oldest), s.length}.size();
    }
    const auto bytes = [&]<class Row>(std::int64_t rows, std::type_identity<Row>) {
      const std::size_t scales = std::is_same_v<Row, q8> ? 2 * sizeof(float) : 0;
      return static_cast<std::size_t>(rows) *
             (static_cast<std::size_t>(setup_.shape.dim + setup_.value_dim()) * sizeof(Row) + scales);
    };
    const std::size_t biases = detail::has_core_biases(setup_.options) ? static_cast<std::size_t>(core_rows) : 0;
    EXPECT_EQ(cache_.bytes(), bytes(core_rows, std::type_identity<Core>{}) + biases * sizeof(compute_type<T>) +
                                  bytes(raw_rows, std::type_identity<Element>{}) +
                                  static_cast<std::size_t>(observers * (setup_.shape.dim + 2)) *
                                      sizeof(compute_type<T>));
    EXPECT_GE(cache_.allocated_bytes(), cache_.bytes());
    EXPECT_EQ(cache_.shape().capacity, setup_.shape.capacity);
    EXPECT_EQ(cache_.shape().batch, setup_.shape.batch);
  }

  Random& random_;
  random_engine numbers_;  // of tokens, and how they lie in memory
  cache_setup setup_;
  kv_cache<Element, Core> cache_;
  std::string label_;
  std::vector<known_sequence<T>> known_;
  Judge judge_;
};

/// A cache answers like attention over the whole sequence, however the sequence came to be.
template <class Element, class Core>
void expect_answers_like_recomputation() {
  // With the group size and the tokens beyond complete groups.
  std::set<std::tuple<operation, std::int64_t, std::int64_t>> done;
  for (std::uint64_t seed = 1; seed <= 360 && !testing::Test::HasFailure(); ++seed) {
    random_engine random(seed);
    attention_rule<number_of<Element>> rule;
    const auto judge = [&](const auto&... answer) { rule.add(answer...); };
    cache_life<Element, Core, random_engine, decltype(judge)> life(random, "seed " + std::to_string(seed), judge);
    life.live(40, [&](auto... step) { done.emplace(step...); });
    EXPECT_TRUE(rule.holds());
  }
  EXPECT_EQ(std::ssize(done), operation_count * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9))
      << "not every length mod group size";
}

}  // namespace cca::test
