// What is added to scores behind the softcap: slopes by distance (ALiBi) and biases of rows, forward, backward and in caches.

#include "executors.hpp"
#include "kv_cache_steps.hpp"
#include "score_calls.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/gradient.hpp>

namespace cca::test { namespace {

template <class T>
class Shift : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block;
};
TYPED_TEST_SUITE(Shift, precisions);

/// Slopes and biases, alone and together; of each entry point those that it takes.
std::vector<score_terms> terms_of(entry entry) {
  std::vector<score_terms> all{{.slopes = true}, {.slopes = true, .shared = false}};
  if (entry != entry::attention)
    for (const std::int64_t heads : {1, 2, 4})
      for (const bool slopes : {false, true})
        all.push_back({.slopes = slopes, .key_bias_heads = heads, .shared = heads != 2});
  if (entry == entry::attend)
    for (const std::int64_t heads : {1, 2, 4})
      for (const bool slopes : {false, true})
        all.push_back(
            {.slopes = slopes, .key_bias_heads = slopes ? 2 : 0, .far_bias_heads = heads, .shared = heads != 2});
  return all;
}

constexpr sizes example_sizes(std::int64_t queries, std::int64_t keys) {
  return {.batch = 2, .heads = 4, .kv_heads = 2, .queries = queries, .keys = keys, .dim = 5, .value_dim = 3};
}

// --------------------------------------------------------------------------------------------------------- by the rule

TYPED_TEST(Shift, IsThatOfTheTextbook) {
  random_engine random(1);
  score_rules<TypeParam> rules;  // of all entry points: a call has few slopes, and the error of a few numbers is luck
  for (const entry entry : score_entries)
    for (const score_terms& alone : terms_of(entry))
      for (const bool others : {false, true})  // a softcap, sinks, a negative scale
        for (const std::int64_t length : {std::int64_t{1}, std::int64_t{3}, std::int64_t{8}, std::int64_t{9},
                                          this->lanes + 1, 2 * this->lanes + 7, this->block + 11}) {
          problem p = example(entry, example_sizes(length, length + 2));
          score_terms terms = alone;
          if (others) {
            p.options.softcap = length % 2 == 0 ? 0.5 : 4;
            p.options.softmax_scale = -0.7;
            terms.sinks = length % 2 == 0 ? sinks::per_query : sinks::per_head;
          }
          score_call<TypeParam> c(p, terms, random);
          rules.add(c, label_of(p, terms));
        }
  rules.expect();
}

TYPED_TEST(Shift, OfAnyShape) {
  random_engine random(2);
  for (const entry entry : score_entries) {
    score_rules<TypeParam> rules;
    for (int times = 0; times < 60; ++times) {
      sizes s{.batch = draw(random, 1, 3),
              .kv_heads = draw(random, 1, 3),
              .queries = draw(random, 1, 100),
              .keys = draw(random, 1, 160),
              .dim = draw(random, 1, 20),
              .value_dim = draw(random, 1, 20)};
      s.heads = s.kv_heads * draw(random, 1, 3);
      problem p = example(entry, s);
      p.far_heads = draw_from(random, std::array{std::int64_t{1}, s.kv_heads, s.heads});
      if (p.options.window != unlimited) p.options.window = draw(random, 1, s.keys + 5);
      if (entry == entry::attention) {
        p.options.group_size = draw(random, 1, 9);
        p.options.pool = draw_from(random, all_poolings);
        p.options.core_heads = draw_from(random, all_core_heads);
      } else if (draw(random, 0, 2) == 0) {
        p.options.first_position = draw(random, -20, s.keys + 20);
      }
      p.options.softcap = draw_from(random, softcaps);
      if (draw(random, 0, 3) == 0) p.options.softmax_scale = draw_from(random, std::array{0.0, -0.5, 2.0});
      score_terms terms{
          .sinks = draw_from(random, all_sinks), .slopes = draw(random, 0, 1) == 1, .shared = draw(random, 0, 1) == 1};
      const std::array some_heads{std::int64_t{0}, std::int64_t{1}, s.kv_heads, s.heads, s.heads / s.kv_heads};
      if (entry != entry::attention) terms.key_bias_heads = draw_from(random, some_heads);
      if (entry == entry::attend) terms.far_bias_heads = draw_from(random, some_heads);
      score_call<TypeParam> c(p, terms, random);
      rules.add(c, label_of(p, terms));
    }
    rules.expect();
  }
}

/// Few queries of a context that is cut into parts, as many as ride in lanes, and many of several blocks.
TYPED_TEST(Shift, OfALongContext) {
  random_engine random(3);
  score_rules<TypeParam> rules;
  for (const std::int64_t queries : {3, 7, 10, 20})  // lanes begin at 7, or at 10 where a vector has 16
    for (const score_terms& terms : terms_of(entry::dense)) {
      const problem p = example(entry::dense, {.batch = 2,
                                               .heads = 4,
                                               .kv_heads = 2,
                                               .queries = queries,
                                               .keys = 2 * detail::part_rows + 7,
                                               .dim = 6,
                                               .value_dim = 4});
      score_call<TypeParam> c(p, terms, random);
      rules.add(c, label_of(p, terms));
    }
  rules.expect();
}

TYPED_TEST(Shift, OfACache) {
  using T = TypeParam;
  random_engine random(4);
  attention_rule<T> rule;
  for (const options& plain :
       {options{}, {.window = 6}, {.group_size = 3, .window = 5}, {.group_size = 1, .window = 4}})
    for (const double softcap : {0.0, 1.5})
      for (const std::int64_t slopes_batch : {1, 2})
        for (const std::int64_t chunk : {1, 4, 11, 40}) {
          options options = plain;
          options.softcap = softcap;
          const cache_setup setup = example_cache(options, {.batch = 2, .rewind = 4});
          const std::int64_t length = 40;
          const operands<T> all = random_tokens<T>(setup, 2, length, random);
          tensor<T, 3> slopes({slopes_batch, setup.shape.heads, 1});
          slopes.randomize(random, 0.3);
          kv_cache<T> cache = setup.template make<T>();
          const results<T> got = collect<T>(setup.step(2, length), [&](tensor_view<T> out, lse_view<T> lse) {
            for (std::int64_t t = 0; t < length; t += chunk) {
              const range part{t, std::min(t + chunk, length)};
              token_views<T> tokens = tokens_of(all, part);
              tokens.slopes = std::as_const(slopes).view();
              attend(cache, tokens, tokens_of(out, part), tokens_of(lse, part));
              // Again: what is taken back and comes back is where it was.
              if (part.size() > 4 || t == 0) continue;
              for (const std::int64_t b : {0, 1}) cache.truncate(b, t);
              attend(cache, tokens, tokens_of(out, part), tokens_of(lse, part));
              std::istringstream file(content(cache));
              cache = load<T>(file);
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

// ------------------------------------------------------------------------------------------------------------ positions

/// Positions count by their differences alone, to the bit, however large they are.
TYPED_TEST(Shift, OfDistancesBetweenLargePositions) {
  using T = TypeParam;
  random_engine random(5);
  score_rules<T> rules;
  for (const std::int64_t queries : {3, 40})
    for (const std::int64_t offset : {std::int64_t{1} << 31, std::int64_t{1} << 40, std::int64_t{1} << 60}) {
      problem p = example(entry::attend, example_sizes(queries, 0));
      p.far_length = 50;
      p.options.first_position = 7;
      score_call<T> small(p, {.slopes = true}, random);
      score_call<T> large = small;
      *large.memory.problem.options.first_position += offset;
      for_each_row(large.positions.view(),
                   [&](std::int64_t b, std::int64_t h, std::int64_t i) { *large.positions.row(b, h, i) += offset; });
      small.forward().gradient();
      large.forward().gradient();
      EXPECT_TRUE(same_bits(small.written(), large.written()));
      rules.add(large, label_of(large.memory.problem, large.terms));
    }
  rules.expect();
}

/// Far queries of near keys.
TYPED_TEST(Shift, OfLargeDistances) {
  using T = TypeParam;
  random_engine random(6);
  score_rules<T> rules;
  for (const std::int64_t queries : {3, 40})
    for (const std::int64_t position : {std::int64_t{1} << 31, -(std::int64_t{1} << 31) + 60, std::int64_t{1} << 40}) {
      problem p = example(entry::dense, example_sizes(queries, 60));
      p.options.first_position = position;
      score_call<T> c(p, {.slopes = true}, random);
      c.slopes.numbers.generate(
          [&] { return static_cast<T>(draw(random, 1, 9)) * static_cast<T>(std::ldexp(1.0, -40)); });
      rules.add_forward(c, label_of(p, c.terms));
    }
  rules.expect();
}

/// A core lies where its last token does: with slopes that leave nothing else, the nearest row has all the weight.
TYPED_TEST(Shift, PutsACoreAtItsLastToken) {
  using T = TypeParam;
  random_engine random(7);
  for (const std::int64_t window : {1, 3}) {
    problem p = example(entry::attention, {.queries = 64, .keys = 64, .dim = 1, .value_dim = 1});
    p.options = {.group_size = 4, .window = window};
    score_call<T> c(p, {.slopes = true}, random);
    c.memory.operands[0].fill(T(0));
    c.slopes.numbers.fill(T(1));
    c.forward();
    const partition partition{4, window};
    for (std::int64_t t = 0; t < 64; ++t) {
      double sum = 0;
      for (std::int64_t b = 0; b < partition.core_count(t); ++b) sum += std::exp(-static_cast<double>(t - (4 * b + 3)));
      for (std::int64_t j = partition.raw(t).begin; j <= t; ++j) sum += std::exp(-static_cast<double>(t - j));
      EXPECT_NEAR(static_cast<double>(*c.lse().row(0, 0, t)), std::log(sum), 1e-5) << t;
    }
  }
}

// ------------------------------------------------------------------------------------------------------- special values

/// A bias of -inf masks its row, also the only one that a query sees; one of +inf, and a NaN, show where the row is seen.
TYPED_TEST(Shift, BiasesThatAreNotFinite) {
  using T = TypeParam;
  random_engine random(8);
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  score_rules<T> rules;
  for (const double softcap : {0.0, 2.0})
    for (const std::int64_t length : {4, 45, 150}) {
      problem p = example(entry::dense, example_sizes(length, length));
      p.options.softcap = softcap;
      score_call<T> c(p, {.key_bias_heads = 2}, random);
      for (const std::int64_t h : {0, 1})
        for (std::int64_t j = 0; j < length; j += 3) *c.key_bias.numbers.row(0, h, j) = -infinity;
      c.forward().gradient();
      for (const tensor_view<T>& view : c.written())
        for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          for (std::int64_t d = 0; d < view.dim(); ++d) EXPECT_FALSE(std::isnan(view.row(b, h, i)[d]));
        });
      for (std::int64_t d = 0; d < 3; ++d) EXPECT_EQ(c.out().row(1, 2, 0)[d], T(0));
      EXPECT_EQ(*c.lse().row(1, 2, 0), -infinity);
      for (std::int64_t j = 0; j < length; j += 3) EXPECT_EQ(*c.key_bias.grad.row(0, 1, j), T(0));
      rules.add(c, label_of(p, c.terms));

      score_call<T> masked = c;
      for (const T shown : {infinity, nan}) {
        *c.key_bias.numbers.row(0, 1, 2) = shown;
        c.forward();
        for_each_row(c.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          const bool seen = h >= 2 && i >= 2;
          for (std::int64_t d = 0; d < 3; ++d) EXPECT_EQ(std::isnan(c.out().row(b, h, i)[d]), seen);
          EXPECT_EQ(std::isnan(*c.lse().row(b, h, i)), seen);
          EXPECT_TRUE(seen || same_bits(*c.lse().row(b, h, i), *masked.lse().row(b, h, i)));
        });
      }
    }
  rules.expect();
}

/// Biases that nobody sees are not looked at; a NaN of a slope shows in its head.
TYPED_TEST(Shift, WhatNobodySeesMayBeNaN) {
  using T = TypeParam;
  random_engine random(9);
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  for (const std::int64_t queries : {3, 30}) {
    problem p = example(entry::attend, example_sizes(queries, 90));
    p.far_length = 40;
    p.options = {.window = 7};
    score_call<T> c(p, {.slopes = true, .key_bias_heads = 2, .far_bias_heads = 4}, random);
    for_each_row(c.memory.seen.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      *c.memory.seen.row(b, h, i) = std::min<std::int64_t>(*c.memory.seen.row(b, h, i), 20);
    });
    score_call<T> poisoned = c;
    for (const std::int64_t h : {0, 1})
      for (std::int64_t j = 0; j < 90 - queries - 6; ++j) *poisoned.key_bias.numbers.row(0, h, j) = nan;
    for (const std::int64_t h : {0, 1, 2, 3})
      for (std::int64_t j = 20; j < 40; ++j) *poisoned.far_bias.numbers.row(0, h, j) = nan;
    c.forward().gradient();
    poisoned.forward().gradient();
    EXPECT_TRUE(same_bits(c.written(), poisoned.written()));

    *c.slopes.numbers.row(0, 1, 0) = nan;
    c.forward();
    for_each_row(c.lse().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      EXPECT_EQ(std::isnan(*c.lse().row(b, h, i)), h == 1);
    });
  }
}

// ------------------------------------------------------------------------------------------------------------ identities

/// Numbers that are shared are as many of the same, to the bit.
TYPED_TEST(Shift, SharedNumbersAreMany) {
  using T = TypeParam;
  random_engine random(10);
  for (const std::int64_t queries : {4, 70}) {
    const problem p = example(entry::attend, example_sizes(queries, queries + 3));
    score_call<T> one(p, {.slopes = true, .key_bias_heads = 1, .far_bias_heads = 1}, random);
    score_call<T> many(p, {.slopes = true, .key_bias_heads = 4, .far_bias_heads = 4, .shared = false}, random);
    many.memory = one.memory;
    const auto repeat = [](tensor<T, 3>& to, tensor<T, 3>& from) {
      for_each_row(to.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        *to.row(b, h, i) = *from.row(0, from.view().heads() == 1 ? 0 : h, i);
      });
    };
    repeat(many.slopes.numbers, one.slopes.numbers);
    repeat(many.key_bias.numbers, one.key_bias.numbers);
    repeat(many.far_bias.numbers, one.far_bias.numbers);
    many.positions = tensor<std::int64_t, 3>({2, 4, p.far_length});
    for_each_row(many.positions.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      *many.positions.row(b, h, i) = *one.positions.row(0, h / 2, i);
    });
    one.forward().gradient();
    many.forward().gradient();
    std::vector<tensor_view<T>> a = one.written(), b = many.written();
    a.resize(2 + one.memory.results.size());  // not the gradients of what is shared
    b.resize(a.size());
    EXPECT_TRUE(same_bits(a, b));
  }
}

TYPED_TEST(Shift, IsTheSameForAnyExecutor) {
  using T = TypeParam;
  random_engine random(11);
  for (const entry entry : score_entries)
    for (const bool shared : {true, false}) {
      problem p = example(entry, example_sizes(150, 150));
      p.options.softcap = 2;
      score_terms terms{.sinks = sinks::per_query, .slopes = true, .shared = shared};
      if (entry != entry::attention) terms.key_bias_heads = shared ? 1 : 4;
      if (entry == entry::attend) terms.far_bias_heads = shared ? 2 : 1;
      score_call<T> serial(p, terms, random);
      const score_call<T> fresh = serial;
      serial.forward().gradient();
      for (const named_executor& executor : executors()) {
        score_call<T> c = fresh;
        c.forward(executor.run).gradient(executor.run);
        EXPECT_TRUE(same_bits(c.written(), serial.written())) << executor.name << ", " << label_of(p, terms);
      }
    }
}

// -------------------------------------------------------------------------------------------------------------- refusals

struct refused_call {
  sizes s = example_sizes(9, 9);
  random_engine random{12};
  operands<float> o = random_operands<float>(s, random);
  results<float> r{tensor<float>({2, 4, 9, 3}), tensor<float, 3>({2, 4, 9})};
  tensor<float, 3> numbers{{2, 4, 20}};
  tensor<std::int64_t, 3> counts{{2, 4, 20}};
  inputs<float> in{o.query.view(), o.key.view(), o.value.view()};
  cca::results<float> to{r.out.view(), r.lse.view()};
  far_context<float> far_rows{in.key, in.value, {counts.view().data, {2, 4, 9}, {0, 0, 0}}};

  refused_call() { numbers.fill(0), counts.fill(0); }

  [[nodiscard]] lse_view<float> of(std::int64_t b, std::int64_t h, std::int64_t i) {
    return {numbers.view().data, {b, h, i}, {80, 20, 1}};
  }
  [[nodiscard]] lse_view<const std::int64_t> at(std::int64_t b, std::int64_t h, std::int64_t i) {
    return {counts.view().data, {b, h, i}, {80, 20, 1}};
  }
};

void expect_text(const std::string& text, const std::string& wanted) {
  EXPECT_NE(text.find(wanted), std::string::npos) << text << "; wants " << wanted;
}

TEST(ShiftRefusals, ExtentsThatDoNotFit) {
  refused_call c;
  const auto attention_of = [&](const inputs<float>& in) { return refusal_of([&] { through::attention(in, c.to); }); };
  for (const auto& [b, h, i] : {std::array{1, 2, 1}, {3, 4, 1}, {1, 4, 9}, {1, 4, 0}}) {
    inputs<float> in = c.in;
    in.alibi_slopes = c.of(b, h, i);
    expect_text(attention_of(in), "alibi_slopes: got " + text_of<3>({b, h, i}) + ", wants [1 or 2, 4, 1]");
  }
  for (const auto& [b, h, i] : {std::array{3, 4, 9}, {1, 2, 8}, {0, 1, 9}}) {
    inputs<float> in = c.in;
    in.key_bias = c.of(b, h, i);
    expect_text(attention_of(in), "key_bias: got " + text_of<3>({b, h, i}) + ", wants [1 or 2, ");
  }
  inputs<float> in = c.in;
  in.key_bias = c.of(1, 3, 9);
  expect_text(attention_of(in), "key_bias: got 3 heads");
  in.key_bias = {nullptr, {1, 1, 9}, {0, 0, 1}};
  expect_text(attention_of(in), "key_bias: got a null pointer");
  const auto attend_of = [&](const inputs<float>& of, const far_context<float>& context) {
    return refusal_of([&] { through::attend(of, context, c.to); });
  };
  auto context = c.far_rows;
  context.bias = c.of(1, 4, 8);
  expect_text(attend_of(c.in, context), "far.bias: got [1, 4, 8], wants [1 or 2, 4, 9]");
  context = c.far_rows;
  context.positions = c.at(1, 4, 9);
  expect_text(attend_of(c.in, context), "far.positions: got [1, 4, 9], wants none");
  inputs<float> sloped = c.in;
  sloped.alibi_slopes = c.of(1, 4, 1);
  EXPECT_EQ(attend_of(sloped, context), "none");
  expect_text(attend_of(sloped, c.far_rows), "far.positions: got none");
  context.positions = c.at(1, 3, 9);
  expect_text(attend_of(sloped, context), "far.positions: got 3 heads");
  context.positions = c.at(1, 1, 9);
  c.counts.row(0, 0, 3)[0] = (std::int64_t{1} << 61) + 1;
  context.seen.data = c.counts.row(1, 0, 0);
  expect_text(attend_of(sloped, context), "at [0, 0, 3], wants a position between");
}

TEST(ShiftRefusals, WhatHasNoMeaning) {
  refused_call c;
  inputs<float> biased = c.in, sloped = c.in;
  biased.key_bias = c.of(1, 1, 9);
  sloped.alibi_slopes = c.of(1, 4, 1);
  const options pooled{.group_size = 3, .window = 4};
  expect_text(refusal_of([&] { through::attention(biased, c.to, pooled); }), "key_bias: got [1, 1, 9], wants none: cores");
  EXPECT_EQ(refusal_of([&] { through::attention(sloped, c.to, pooled); }), "none");
  kv_cache<float> cache({.batch = 2, .heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3}, pooled);
  expect_text(refusal_of([&] { cache.attend(biased, c.to); }), "key_bias: got [1, 1, 9], wants none: a cache");
  inputs<float> wrong = c.in;
  wrong.alibi_slopes = c.of(1, 3, 1);
  expect_text(refusal_of([&] { cache.attend(wrong, c.to); }), "alibi_slopes: got [1, 3, 1]");
  tensor<float> core_key({2, 4, 3, 5}), core_value({2, 4, 3, 3});
  const cores to{core_key.view(), core_value.view()};
  expect_text(refusal_of([&] { through::pool(biased, to, {.group_size = 3}); }), "key_bias: got [1, 1, 9], wants none");
  expect_text(refusal_of([&] { through::pool(sloped, to, {.group_size = 3}); }),
              "alibi_slopes: got [1, 4, 1], wants none");

  // Outputs that are these operands, and gradients of what is not given.
  cca::results<float> same = c.to;
  same.lse.data = c.numbers.view().data;
  expect_text(refusal_of([&] { through::attention(biased, same); }), "lse: got the memory of key_bias");
  expect_text(refusal_of([&] { through::attention(sloped, same); }), "lse: got the memory of alibi_slopes");
  auto context = c.far_rows;
  context.bias = c.of(1, 1, 9);
  expect_text(refusal_of([&] { through::attend(c.in, context, same); }), "lse: got the memory of far.bias");
  operands<float> grads = c.o;
  tensor<float, 3> grad({1, 1, 9});
  const auto gradient = [&](const inputs<float>& in, auto member) {
    gradients<float> all{grads.query.view(), grads.key.view(), grads.value.view()};
    all.*member = grad.view();
    return refusal_of([&] {
      through::attention_gradient(in, cca::results<const float, const float>{c.r.out.view(), c.r.lse.view()},
                                  incoming<float>{c.r.out.view()}, all);
    });
  };
  expect_text(gradient(c.in, &gradients<float>::key_bias), "grad_key_bias: got [1, 1, 9], wants none");
  expect_text(gradient(c.in, &gradients<float>::alibi_slopes), "grad_alibi_slopes: got [1, 1, 9], wants none");
  expect_text(gradient(c.in, &gradients<float>::far_bias), "grad_far_bias: got [1, 1, 9], wants none");
  expect_text(gradient(sloped, &gradients<float>::alibi_slopes), "grad_alibi_slopes: got [1, 1, 9], wants extents");
  through::attention(biased, c.to);
  EXPECT_EQ(gradient(biased, &gradients<float>::key_bias), "none");
}

}}  // namespace cca::test
