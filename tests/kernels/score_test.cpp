// Softcaps and sink logits, forward, backward and in caches, against the textbook; and the textbook's own gradients, of all
// that is added to scores, against differences of its results.

#include <bit>

#include "executors.hpp"
#include "kv_cache_steps.hpp"
#include "score_calls.hpp"

namespace cca::test { namespace {

template <class T>
class Score : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block;
};
TYPED_TEST_SUITE(Score, precisions);

// --------------------------------------------------------------------------------------------------------- by the rule

TYPED_TEST(Score, IsThatOfTheTextbook) {
  random_engine random(1);
  for (const entry entry : score_entries) {
    score_rules<TypeParam> rules;
    for (const sinks kind : all_sinks)
      for (const double softcap : softcaps)
        for (const std::int64_t length : {std::int64_t{1}, std::int64_t{3}, std::int64_t{8}, std::int64_t{9},
                                          this->lanes, this->lanes + 1, 2 * this->lanes + 7, this->block + 11}) {
          problem p = example(
              entry,
              {.batch = 2, .heads = 4, .kv_heads = 2, .queries = length, .keys = length + 2, .dim = 5, .value_dim = 3});
          p.options.softcap = softcap;
          if (length % 2 == 1) p.options.softmax_scale = -0.7;
          score_call<TypeParam> c(p, kind, random);
          rules.add(c, label_of(p, {.sinks = kind}));
        }
    rules.expect();
  }
}

TYPED_TEST(Score, OfAnyShape) {
  random_engine random(2);
  for (const entry entry : score_entries) {
    score_rules<TypeParam> rules;
    for (int times = 0; times < 60; ++times) {
      sizes s{.batch = draw(random, 1, 3),
              .kv_heads = draw(random, 1, 2),
              .queries = draw(random, 1, 100),
              .keys = draw(random, 1, 160),
              .dim = draw(random, 1, 20),
              .value_dim = draw(random, 1, 20)};
      s.heads = s.kv_heads * draw(random, 1, 3);
      problem p = example(entry, s);
      if (p.options.window != unlimited) p.options.window = draw(random, 1, s.keys + 5);
      if (entry == entry::attention) {
        p.options.group_size = draw(random, 1, 9);
        p.options.pool = draw_from(random, all_poolings);
        p.options.core_heads = draw_from(random, all_core_heads);
      }
      p.options.softcap = draw_from(random, softcaps);
      if (draw(random, 0, 3) == 0) p.options.softmax_scale = draw_from(random, std::array{0.0, -0.5, 2.0});
      const sinks kind = draw_from(random, all_sinks);
      score_call<TypeParam> c(p, kind, random);
      rules.add(c, label_of(p, {.sinks = kind}));
    }
    rules.expect();
  }
}

/// Few queries of a context that is cut into parts: every part has its scores capped, and the sink counts once.
TYPED_TEST(Score, OfFewQueriesOfALongContext) {
  random_engine random(3);
  score_rules<TypeParam> rules;
  for (const sinks kind : all_sinks)
    for (const double softcap : {0.0, 2.0})
      for (const std::int64_t heads : {2, 5}) {  // six queries that share rows, and fifteen
        problem p = example(
            entry::dense,
            {.heads = heads, .kv_heads = 1, .queries = 3, .keys = 3 * detail::part_rows + 7, .dim = 6, .value_dim = 4});
        p.options.softcap = softcap;
        score_call<TypeParam> c(p, kind, random);
        rules.add(c, label_of(p, {.sinks = kind}));
      }
  rules.expect();
}

TYPED_TEST(Score, OfACache) {
  using T = TypeParam;
  random_engine random(4);
  attention_rule<T> rule;
  for (const options& plain : {options{}, {.window = 6}, {.group_size = 3, .window = 5}})
    for (const double softcap : {0.0, 1.5})
      for (const sinks kind : all_sinks)
        for (const std::int64_t chunk : {1, 4, 11, 40}) {
          options options = plain;
          options.softcap = softcap;
          const cache_setup setup = example_cache(options, {.batch = 2});
          const std::int64_t length = 40;
          const operands<T> all = random_tokens<T>(setup, 2, length, random);
          tensor<T, 3> logits(sink_extents(kind, setup.step(2, length)));
          logits.randomize(random, 3);
          kv_cache<T> cache = setup.template make<T>();
          const results<T> got = collect<T>(setup.step(2, length), [&](tensor_view<T> out, lse_view<T> lse) {
            for (std::int64_t t = 0; t < length; t += chunk) {
              const range part{t, std::min(t + chunk, length)};
              token_views<T> tokens = tokens_of(all, part);
              if (kind != sinks::none) {
                tokens.sinks = std::as_const(logits).view();
                if (tokens.sinks.length() > 1) tokens.sinks = tokens_of(tokens.sinks, part);
              }
              attend(cache, tokens, tokens_of(out, part), tokens_of(lse, part));
            }
          });
          rule.add(
              got,
              [&]<class Scalar>() {
                inputs<T> in{all.query.view(), all.key.view(), all.value.view()};
                if (kind != sinks::none) in.sink_logits = std::as_const(logits).view();
                return reference::attention<Scalar>(in, options);
              },
              describe(setup) + ", chunks of " + std::to_string(chunk));
        }
  EXPECT_TRUE(rule.holds());
}

// ------------------------------------------------------------------------------------------------------------- identities

/// One sink logit for all is as many of the same, to the bit; and its gradient is their sum.
TYPED_TEST(Score, OneSinkLogitIsMany) {
  using T = TypeParam;
  random_engine random(5);
  for (const entry entry : score_entries)
    for (const std::int64_t queries : {4, 70}) {
      const problem p =
          example(entry, {.batch = 2, .heads = 2, .queries = queries, .keys = queries, .dim = 4, .value_dim = 3});
      score_call<T> one(p, sinks::per_head, random);
      score_call<T> many = one;
      many.sinks.numbers = tensor<T, 3>(sink_extents(sinks::per_query, p.sizes));
      many.sinks.grad = many.sinks.numbers;
      for_each_row(many.sinks.numbers.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        *many.sinks.numbers.row(b, h, i) = *one.sinks.numbers.row(0, h, 0);
      });
      one.forward().gradient();
      many.forward().gradient();
      EXPECT_TRUE(same_bits(one.out().view(), many.out().view()));
      EXPECT_TRUE(same_bits(one.lse().view(), many.lse().view()));
      for (std::size_t i = 0; i < one.memory.results.size(); ++i)
        EXPECT_TRUE(same_bits(one.memory.results[i].view(), many.memory.results[i].view()));
      for (std::int64_t h = 0; h < 2; ++h) {
        long double sum = 0, size = 0;
        for (std::int64_t b = 0; b < 2; ++b)
          for (std::int64_t i = 0; i < queries; ++i) {
            sum += static_cast<long double>(*many.sinks.grad.row(b, h, i));
            size += std::fabs(static_cast<long double>(*many.sinks.grad.row(b, h, i)));
          }
        // Each of so many additions rounds a partial sum, which is at most the sum of the sizes.
        EXPECT_NEAR(static_cast<double>(*one.sinks.grad.row(0, h, 0)), static_cast<double>(sum),
                    static_cast<double>(size) * static_cast<double>(2 * queries) *
                        static_cast<double>(std::numeric_limits<T>::epsilon()));
      }
    }
}

/// A sink of -inf is none, one far above every score leaves nothing else, and a NaN shows in its head alone.
TYPED_TEST(Score, SinksBeyondTheScores) {
  using T = TypeParam;
  random_engine random(6);
  constexpr T infinity = std::numeric_limits<T>::infinity();
  score_rules<T> rules;  // by the textbook, for which a sink of -inf is no row
  for (const entry entry : score_entries)
    for (const std::int64_t queries : {3, 40}) {
      SCOPED_TRACE(testing::Message() << entry << ", " << queries);
      const problem p = example(entry, {.heads = 2, .queries = queries, .keys = queries, .dim = 4, .value_dim = 3});
      score_call<T> sunk(p, sinks::per_head, random);
      sunk.sinks.numbers.fill(-infinity);
      rules.add(sunk, label_of(p, {.sinks = sinks::per_head}));
      for (const std::int64_t h : {0, 1}) EXPECT_EQ(*sunk.sinks.grad.row(0, h, 0), T(0));

      sunk.sinks.numbers.fill(T(1e4));
      sunk.forward().gradient();
      for_each_row(sunk.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        for (std::int64_t d = 0; d < 3; ++d) EXPECT_EQ(sunk.out().row(b, h, i)[d], T(0));
        EXPECT_EQ(*sunk.lse().row(b, h, i), T(1e4));
      });

      *sunk.sinks.numbers.row(0, 0, 0) = std::numeric_limits<T>::quiet_NaN();
      *sunk.sinks.numbers.row(0, 1, 0) = T(0.5);
      sunk.forward();
      for_each_row(sunk.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        EXPECT_EQ(std::isnan(sunk.out().row(b, h, i)[0]), h == 0);
        EXPECT_EQ(std::isnan(*sunk.lse().row(b, h, i)), h == 0);
      });
    }
  rules.expect();
}

/// A query that sees nothing has its sink alone: nothing comes out, and the sink's gradient is that of the log-sum-exp.
TYPED_TEST(Score, OfAQueryThatSeesNothing) {
  using T = TypeParam;
  random_engine random(7);
  for (const std::int64_t queries : {2, 30}) {
    problem p = example(entry::dense, {.queries = queries, .keys = 5, .dim = 4, .value_dim = 3});
    p.options.first_position = -queries;
    score_call<T> c(p, sinks::per_query, random);
    c.forward().gradient();
    for (std::int64_t i = 0; i < queries; ++i) {
      for (std::int64_t d = 0; d < 3; ++d) EXPECT_EQ(c.out().row(0, 0, i)[d], T(0));
      // The way to base 2 and back rounds twice.
      const auto sink = static_cast<double>(*c.sinks.numbers.row(0, 0, i)),
                 grad_lse = static_cast<double>(*c.memory.operands.back().row(0, 0, i));
      const double rounding = 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) * (1 + std::abs(sink));
      EXPECT_NEAR(static_cast<double>(*c.lse().row(0, 0, i)), sink, rounding);
      EXPECT_NEAR(static_cast<double>(*c.sinks.grad.row(0, 0, i)), grad_lse, 2 * rounding * std::abs(grad_lse));
    }
    for (const tensor<T>& grad : c.memory.results)
      for_each_row(grad.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        for (std::int64_t d = 0; d < grad.view().dim(); ++d) EXPECT_EQ(grad.row(b, h, i)[d], T(0));
      });
  }
}

/// Values are means with the sink's weight for nothing: with values of 1, out is what the sink leaves.
TYPED_TEST(Score, TheSinkTakesItsShare) {
  using T = TypeParam;
  random_engine random(8);
  score_call<T> c(example(entry::dense, {.queries = 20, .keys = 20, .dim = 4, .value_dim = 1}), sinks::per_head,
                  random);
  c.memory.operands[2].fill(T(1));
  c.forward();
  for (std::int64_t i = 0; i < 20; ++i) {
    const double share =
        std::exp(static_cast<double>(*c.sinks.numbers.row(0, 0, 0)) - static_cast<double>(*c.lse().row(0, 0, i)));
    EXPECT_NEAR(static_cast<double>(*c.out().row(0, 0, i)), 1 - share, 1e-5);
  }
}

TYPED_TEST(Score, IsTheSameForAnyExecutor) {
  using T = TypeParam;
  random_engine random(9);
  for (const entry entry : score_entries)
    for (const sinks kind : {sinks::per_head, sinks::per_sequence, sinks::per_query}) {
      problem p = example(
          entry, {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 150, .keys = 150, .dim = 4, .value_dim = 3});
      p.options.softcap = 2;
      score_call<T> serial(p, kind, random);
      const score_call<T> fresh = serial;
      serial.forward().gradient();
      for (const named_executor& executor : executors()) {
        score_call<T> c = fresh;
        c.forward(executor.run).gradient(executor.run);
        EXPECT_TRUE(same_bits(c.out().view(), serial.out().view())) << executor.name;
        for (std::size_t i = 0; i < c.memory.results.size(); ++i)
          EXPECT_TRUE(same_bits(c.memory.results[i].view(), serial.memory.results[i].view())) << executor.name;
        EXPECT_TRUE(same_bits(c.sinks.grad.view(), serial.sinks.grad.view())) << executor.name;
      }
    }
}

/// Scores as large as they get stay within the cap, of either sign; a NaN shows.
TYPED_TEST(Score, SoftcapsHoldWhatIsHuge) {
  using T = TypeParam;
  random_engine random(10);
  for (const std::int64_t queries : {4, 40}) {
    problem p = example(entry::dense, {.queries = queries, .keys = queries, .dim = 1, .value_dim = 1});
    p.options = {.softmax_scale = 1, .softcap = 2};
    score_call<T> c(p, sinks::none, random);
    for (std::int64_t i = 0; i < queries; ++i) {
      *c.memory.operands[0].row(0, 0, i) = T(1e15);
      *c.memory.operands[1].row(0, 0, i) = i % 2 == 0 ? T(1e15) : T(-1e15);
    }
    c.forward();
    for (std::int64_t i = 0; i < queries; ++i) {
      const double even = static_cast<double>(i / 2 + 1), odd = static_cast<double>((i + 1) / 2);
      EXPECT_NEAR(static_cast<double>(*c.lse().row(0, 0, i)), std::log(even * std::exp(2.0) + odd * std::exp(-2.0)),
                  1e-5);
    }
    c.memory.operands[1].fill(std::numeric_limits<T>::quiet_NaN());
    c.forward();
    for (std::int64_t i = 0; i < queries; ++i) EXPECT_TRUE(std::isnan(*c.lse().row(0, 0, i)));
  }
}

// ------------------------------------------------------------------------------------------------ the textbook's gradients

TEST(ScoreTextbook, GradientsAreSlopes) {
  random_engine random(11);
  for (const entry entry : score_entries)
    for (const bool shared : {true, false})
      for (const double softcap : {0.0, 0.8}) {
        problem p =
            example(entry, {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 9, .keys = 9, .dim = 3, .value_dim = 2});
        p.options.softcap = softcap;
        score_terms terms{.sinks = shared ? sinks::per_head : sinks::per_query, .slopes = true, .shared = shared};
        if (entry != entry::attention) terms.key_bias_heads = shared ? 1 : 2;
        if (entry == entry::attend) terms.far_bias_heads = shared ? 2 : 1;
        // Without broadcasting: a step of one element is one of one operand's.
        score_call<double> c(p, terms, random);
        c.memory = gradient_memory<double>(p);
        c.memory.randomize(random);
        const std::string label = label_of(p, terms);
        const auto grad = c.textbook_gradient<double>();
        auto& in = c.memory.operands;
        expect_slopes(c, in[0].view(), grad.query, label);
        expect_slopes(c, in[1].view(), grad.key, label);
        expect_slopes(c, in[2].view(), grad.value, label);
        if (entry == entry::attend) {
          expect_slopes(c, in[3].view(), grad.far_key, label);
          expect_slopes(c, in[4].view(), grad.far_value, label);
        }
        expect_slopes(c, with_dim(c.sinks.numbers.view()), grad.sink_logits, label);
        expect_slopes(c, with_dim(c.slopes.numbers.view()), grad.alibi_slopes, label);
        expect_slopes(c, with_dim(c.key_bias.numbers.view()), grad.key_bias, label);
        expect_slopes(c, with_dim(c.far_bias.numbers.view()), grad.far_bias, label);
      }
}

}}  // namespace cca::test
