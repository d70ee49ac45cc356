// Biases of cores: the entropy of the weights that made them, forward, backward and in caches.

#include "executors.hpp"
#include "kv_cache_life.hpp"
#include "score_calls.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/gradient.hpp>

namespace cca::test { namespace {

template <class T>
class CoreBias : public testing::Test {};
TYPED_TEST_SUITE(CoreBias, precisions);

constexpr std::array weighing{pooling::last_query, pooling::mean};

problem entropy_problem(const sizes& s, std::int64_t group_size, std::int64_t window) {
  problem p = example(entry::attention, s);
  p.options = {.group_size = group_size, .window = window, .core_bias = core_bias::entropy};
  return p;
}

// --------------------------------------------------------------------------------------------------------- by the rule

TYPED_TEST(CoreBias, IsThatOfTheTextbook) {
  random_engine random(1);
  score_rules<TypeParam> rules;
  for (const pooling pool : weighing)
    for (const core_heads heads : all_core_heads)
      for (const bool others : {false, true})  // slopes, sinks, a softcap
        for (const std::int64_t group_size : {1, 3, 16})
          for (const std::int64_t length : {3, 8, 9, 40, 71, 150}) {
            problem p = entropy_problem(
                {.batch = 2, .heads = 4, .kv_heads = 2, .keys = length, .dim = 5, .value_dim = 3}, group_size, 4);
            p.options.pool = pool;
            p.options.core_heads = heads;
            if (others) p.options.softcap = 4;
            if (length % 2 == 1) p.options.softmax_scale = -0.7;
            const score_terms terms{.sinks = others ? sinks::per_query : sinks::none, .slopes = others};
            score_call<TypeParam> c(p, terms, random);
            rules.add(c, label_of(p, terms));
          }
  rules.expect();
}

/// Groups of several blocks of rows, logits that grow along them, and scales that leave one weight or make all alike.
TYPED_TEST(CoreBias, OfLongGroups) {
  using T = TypeParam;
  random_engine random(2);
  score_rules<T> rules;
  for (const double scale : {0.0, 0.02, 1.0, 8.0})
    for (const bool growing : {false, true}) {
      problem p = entropy_problem({.heads = 2, .keys = 700, .dim = 4, .value_dim = 3}, 300, 20);
      p.options.softmax_scale = scale;
      score_call<T> c(p, sinks::none, random);
      for (std::int64_t j = 0; growing && j < 700; ++j) {
        c.memory.operands[1].row(0, 0, j)[0] = static_cast<T>(j) / 100;
        for (const std::int64_t h : {0, 1}) c.memory.operands[0].row(0, h, j)[0] = T(1);
      }
      rules.add(c, label_of(p, c.terms));
      for (const tensor_view<T>& view : c.written())
        for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          EXPECT_TRUE(std::isfinite(view.row(b, h, i)[0]));
        });
    }
  rules.expect();
}

// ------------------------------------------------------------------------------------------------------------ identities

/// With the same query everywhere a core and its entropy stand for all that its tokens add to the sum: as dense attention.
TYPED_TEST(CoreBias, IsExactForTheQueryThatPools) {
  using T = TypeParam;
  random_engine random(3);
  for (const core_heads heads : all_core_heads)
    for (const std::int64_t length : {30, 100}) {
      problem p = entropy_problem({.heads = 4, .kv_heads = 2, .keys = length, .dim = 6, .value_dim = 3}, 7, 5);
      p.options.core_heads = heads;
      score_call<T> c(p, sinks::none, random);
      for_each_row(c.memory.operands[0].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::copy_n(c.memory.operands[0].row(0, 0, 0), 6, c.memory.operands[0].row(b, h, i));
      });
      score_call<T> dense = c;
      dense.memory.problem.options = {.group_size = 1, .window = 5};  // cores of single tokens
      c.forward();
      dense.forward();
      for_each_row(c.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        EXPECT_NEAR(static_cast<double>(*c.lse().row(b, h, i)), static_cast<double>(*dense.lse().row(b, h, i)), 1e-5);
        for (std::int64_t d = 0; d < 3; ++d)
          EXPECT_NEAR(static_cast<double>(c.out().row(b, h, i)[d]), static_cast<double>(dense.out().row(b, h, i)[d]),
                      1e-5);
      });
    }
}

/// For any other query it stands for less, and for more than without.
TYPED_TEST(CoreBias, IsABoundForEveryQuery) {
  using T = TypeParam;
  random_engine random(4);
  for (const pooling pool : weighing) {
    problem p = entropy_problem({.heads = 4, .kv_heads = 2, .keys = 120, .dim = 6, .value_dim = 3}, 8, 5);
    p.options.pool = pool;
    score_call<T> c(p, sinks::none, random);
    score_call<T> dense = c, without = c;
    dense.memory.problem.options = {.group_size = 1, .window = 5};
    without.memory.problem.options.core_bias = core_bias::none;
    c.forward();
    dense.forward();
    without.forward();
    for_each_row(c.lse().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      EXPECT_LE(*c.lse().row(b, h, i), *dense.lse().row(b, h, i) + T(1e-5));
      EXPECT_GE(*c.lse().row(b, h, i), *without.lse().row(b, h, i) - T(1e-5));
    });
  }
}

TYPED_TEST(CoreBias, IsTheSameForAnyExecutor) {
  using T = TypeParam;
  random_engine random(5);
  for (const core_heads heads : all_core_heads) {
    problem p = entropy_problem({.batch = 2, .heads = 4, .kv_heads = 2, .keys = 150, .dim = 4, .value_dim = 3}, 3, 7);
    p.options.core_heads = heads;
    score_call<T> serial(p, score_terms{.slopes = true}, random);
    const score_call<T> fresh = serial;
    serial.forward().gradient();
    for (const named_executor& executor : executors()) {
      score_call<T> c = fresh;
      c.forward(executor.run).gradient(executor.run);
      EXPECT_TRUE(same_bits(c.written(), serial.written())) << executor.name;
    }
  }
}

TEST(CoreBiasTextbook, GradientsAreSlopes) {
  random_engine random(6);
  for (const pooling pool : weighing)
    for (const core_heads heads : all_core_heads) {
      problem p = entropy_problem({.heads = 2, .kv_heads = 1, .keys = 14, .dim = 3, .value_dim = 2}, 3, 2);
      p.options.pool = pool;
      p.options.core_heads = heads;
      score_call<double> c(p, score_terms{.slopes = true}, random);
      c.memory = gradient_memory<double>(p);
      c.memory.randomize(random);
      const auto grad = c.textbook_gradient<double>();
      expect_slopes(c, c.memory.operands[0].view(), grad.query, label_of(p, c.terms));
      expect_slopes(c, c.memory.operands[1].view(), grad.key, label_of(p, c.terms));
      expect_slopes(c, c.memory.operands[2].view(), grad.value, label_of(p, c.terms));
    }
}

// ---------------------------------------------------------------------------------------------------------------- caches

/// Beside the lives of caches in kv_cache_test.cpp: every length of chunks, taken back and loaded again, and slopes.
TYPED_TEST(CoreBias, OfACache) {
  using T = TypeParam;
  random_engine random(7);
  attention_rule<T> rule;
  for (const pooling pool : weighing)
    for (const core_heads heads : all_core_heads)
      for (const std::int64_t chunk : {1, 3, 5, 16, 48}) {
        const options options{
            .group_size = 4, .window = 6, .pool = pool, .core_heads = heads, .core_bias = core_bias::entropy};
        const cache_setup setup = example_cache(options, {.batch = 2, .rewind = 5});
        const std::int64_t length = 48;
        const operands<T> all = random_tokens<T>(setup, 2, length, random);
        tensor<T, 3> slopes({1, setup.shape.heads, 1});
        slopes.fill(T(0.1));
        kv_cache<T> cache = setup.template make<T>();
        const results<T> got = collect<T>(setup.step(2, length), [&](tensor_view<T> out, lse_view<T> lse) {
          for (std::int64_t t = 0; t < length; t += chunk) {
            const range part{t, std::min(t + chunk, length)};
            token_views<T> tokens = tokens_of(all, part);
            tokens.slopes = std::as_const(slopes).view();
            if (part.size() <= 5 && t > 0) {  // other tokens first, which complete other groups
              append(cache, views_of(random_tokens<T>(setup, 2, part.size(), random)));
              for (const std::int64_t b : {0, 1}) cache.truncate(b, t);
              std::istringstream file(content(cache));
              cache = load<T>(file);
            }
            attend(cache, tokens, tokens_of(out, part), tokens_of(lse, part));
          }
        });
        rule.add(
            got,
            [&]<class Scalar>() {
              inputs<T> in{all.query.view(), all.key.view(), all.value.view()};
              in.alibi_slopes = std::as_const(slopes).view();
              return reference::attention<Scalar>(in, options);
            },
            describe(setup) + ", chunks of " + std::to_string(chunk));
      }
  EXPECT_TRUE(rule.holds());
}

/// A fork has the biases of its own cores, and goes its own way.
TEST(CoreBiasCache, ForksWithItsBiases) {
  random_engine random(8);
  const cache_setup setup =
      example_cache({.group_size = 3, .window = 4, .core_bias = core_bias::entropy}, {.batch = 2});
  const operands<float> all = random_tokens(setup, 1, 40, random);
  kv_cache<float> cache = setup.make();
  append(cache, 0, tokens_of(all, {0, 30}));
  append(cache, 1, views_of(random_tokens(setup, 1, 33, random)));
  cache.fork(0, 1);
  const results<float> from = attend(cache, 0, tokens_of(all, {30, 40})),
                       to = attend(cache, 1, tokens_of(all, {30, 40}));
  EXPECT_TRUE(same_bits(from, to));
  const std::size_t cores = 2 * 4 * 13, raw = 2 * 2 * static_cast<std::size_t>(cache.raw_count(0));
  EXPECT_EQ(cache.bytes(), (cores * 8 + raw * 8 + cores) * sizeof(float));
}

// -------------------------------------------------------------------------------------------------------------- refusals

TEST(CoreBiasRefusals, WhereItHasNoMeaning) {
  random_engine random(9);
  const sizes s{.heads = 2, .queries = 9, .keys = 9, .dim = 3, .value_dim = 3};
  const operands<float> o = random_operands<float>(s, random);
  const inputs<float> in{o.query.view(), o.key.view(), o.value.view()};
  tensor<float> out({1, 2, 9, 3}), core_key({1, 2, 3, 3}), core_value = core_key;
  tensor<std::int64_t, 3> seen({1, 2, 9});
  seen.fill(0);
  const cca::results<float> to{out.view()};
  const auto expect = [](const std::string& text, const std::string& wanted) {
    EXPECT_NE(text.find("options.core_bias: got entropy, wants none: " + wanted), std::string::npos) << text;
  };
  const options entropy{.group_size = 3, .window = 4, .core_bias = core_bias::entropy};
  options maximum = entropy, dense{.core_bias = core_bias::entropy}, pooling_alone = entropy;
  maximum.pool = pooling::max;
  pooling_alone.window = unlimited;
  expect(refusal_of([&] { through::attention(in, to, maximum); }), "the pooling has no weights");
  expect(refusal_of([&] { kv_cache<float>({.heads = 2, .kv_heads = 1, .dim = 3}, maximum); }), "the pooling");
  expect(refusal_of([&] { through::attention(in, to, dense); }), "nothing is pooled");
  const far_context<float> context{in.key, in.value, seen.view()};
  expect(refusal_of([&] { through::attend(in, context, to, entropy); }), "the caller pools");
  const cores<float> cores{core_key.view(), core_value.view()};
  expect(refusal_of([&] { through::pool(in, cores, pooling_alone); }), "attention adds it");
  options unknown = entropy;
  unknown.core_bias = static_cast<core_bias>(2);
  const std::string text = refusal_of([&] { through::attention(in, to, unknown); });
  EXPECT_NE(text.find("options.core_bias: got 2, wants none or entropy"), std::string::npos) << text;
}

}}  // namespace cca::test
