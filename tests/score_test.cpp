// What happens between q . k and the softmax: softcaps and sink logits, forward, backward and in caches, against the textbook;
// and the textbook's own gradients against differences of its results.

#include <bit>

#include "executors.hpp"
#include "gradient_entry_points.hpp"
#include "kv_cache_steps.hpp"

namespace cca::test { namespace {

/// Extents of sink logits: none, one per head, and one per query or sequence.
enum class sinks { none, per_head, per_sequence, per_query };
constexpr std::array all_sinks{sinks::none, sinks::per_head, sinks::per_sequence, sinks::per_query};

std::array<std::int64_t, 3> sink_extents(sinks kind, const sizes& s) {
  if (kind == sinks::none) return {};
  return {kind == sinks::per_head ? 1 : s.batch, s.heads, kind == sinks::per_query ? s.queries : 1};
}

/// A call with sink logits, its gradient, and all that they need.
template <class T>
struct score_call {
  gradient_memory<T> memory;
  tensor<T, 3> sink_logits, grad_sinks;
  bool with_sinks;

  score_call(const problem& p, sinks kind, random_engine& random)
      : memory(
            p,
            [&](bool may_broadcast) { return may_broadcast ? random_operand_layout(random) : random_layout(random); }),
        sink_logits(sink_extents(kind, p.sizes), random_layout(random)),
        grad_sinks(sink_extents(kind, p.sizes), random_layout(random)),
        with_sinks(kind != sinks::none) {
    sink_logits.randomize(random, 3);
    for (std::size_t i = 0; i < memory.operands.size(); ++i)
      if (!memory.is_forward_result(i)) memory.operands[i].randomize(random);
  }

  [[nodiscard]] arguments<T> gradient_arguments() {
    arguments<T> a = memory.arguments();
    if (with_sinks) a.sinks = sink_logits.view(), a.grad_sinks = grad_sinks.view();
    return a;
  }

  /// Out and log-sum-exp go where the gradient reads them.
  score_call& forward(const any_executor& run = {}) {
    arguments<T> a = gradient_arguments();
    a.results = {out().view(), lse().view()};
    call(memory.problem, a, run);
    return *this;
  }
  score_call& gradient(const any_executor& run = {}) {
    call_gradient(memory.problem, gradient_arguments(), run);
    EXPECT_TRUE(memory.canaries_intact());
    EXPECT_TRUE(grad_sinks.canaries_intact());
    return *this;
  }

  [[nodiscard]] tensor<T>& out() { return memory.operands[memory.forward_operands()]; }
  [[nodiscard]] tensor<T>& lse() { return memory.operands[memory.forward_operands() + 1]; }

  template <class Scalar>
  [[nodiscard]] reference::result<Scalar> textbook() {
    const problem& p = memory.problem;
    const arguments<T> a = gradient_arguments();
    if (p.entry == entry::attend) return reference::attend<Scalar>(inputs_of(a), far_of(a), p.options);
    if (p.entry == entry::attention) return reference::attention<Scalar>(inputs_of(a), p.options);
    return reference::local_attention<Scalar>(inputs_of(a), p.options);
  }
  template <class Scalar>
  [[nodiscard]] reference::gradient<Scalar> textbook_gradient() {
    const problem& p = memory.problem;
    const arguments<T> a = gradient_arguments();
    const std::size_t last = a.operands.size() - 1;
    const incoming from{a.operands[last - 1], without_dim(a.operands[last])};
    if (p.entry == entry::attend) return reference::attend_gradient<Scalar>(inputs_of(a), far_of(a), from, p.options);
    if (p.entry == entry::attention) return reference::attention_gradient<Scalar>(inputs_of(a), from, p.options);
    return reference::local_attention_gradient<Scalar>(inputs_of(a), from, p.options);
  }
};

template <class T>
class Score : public testing::Test {
 protected:
  static constexpr std::int64_t lanes = detail::tile_shape<T>::lanes, block = detail::tile_shape<T>::block;
};
TYPED_TEST_SUITE(Score, precisions);

/// Judges out, log-sum-exp and all gradients of calls.
template <class T>
class score_rules {
 public:
  void add(score_call<T>& c, const std::string& label) {
    c.forward();
    const auto plain = c.template textbook<T>();
    const auto exact = c.template textbook<exact_type<T>>();
    rule_[0].add(std::as_const(c.out()).view(), plain.out.view(), exact.out.view(), label);
    rule_[1].add(std::as_const(c.lse()).view(), plain.lse.view(), exact.lse.view(), label);
    c.gradient();
    const auto plain_grad = c.template textbook_gradient<T>();
    const auto exact_grad = c.template textbook_gradient<exact_type<T>>();
    const auto add = [&](std::size_t i, const auto& got, auto part) {
      rule_[i].add(got, (plain_grad.*part.first).view(), (exact_grad.*part.second).view(), label);
    };
    using plain_type = reference::gradient<T>;
    using exact_type_ = reference::gradient<exact_type<T>>;
    const auto& grads = c.memory.results;
    add(2, grads[0].view(), std::pair(&plain_type::query, &exact_type_::query));
    add(3, grads[1].view(), std::pair(&plain_type::key, &exact_type_::key));
    add(4, grads[2].view(), std::pair(&plain_type::value, &exact_type_::value));
    if (grads.size() > 3) {
      add(5, grads[3].view(), std::pair(&plain_type::far_key, &exact_type_::far_key));
      add(6, grads[4].view(), std::pair(&plain_type::far_value, &exact_type_::far_value));
    }
    if (c.with_sinks)
      add(7, with_dim(std::as_const(c.grad_sinks).view()),
          std::pair(&plain_type::sink_logits, &exact_type_::sink_logits));
  }

  void expect(bool with_far, bool with_sinks) const {
    const char* const names[] = {"out", "lse", "query", "key", "value", "far key", "far value", "sinks"};
    for (std::size_t i = 0; i < std::size(names); ++i)
      if ((i < 5 || i == 7 || with_far) && (i < 7 || with_sinks)) {
        EXPECT_TRUE(rule_[i].holds()) << names[i];
      }
  }

 private:
  std::array<error_rule<T>, 8> rule_;
};

constexpr std::array score_entries{entry::dense, entry::local, entry::attention, entry::attend};
constexpr std::array softcaps{0.0, 0.4, 3.0, 50.0};

std::string label_of(const problem& p, sinks kind) {
  std::ostringstream label;
  label << p << ", sinks " << static_cast<int>(kind);
  return label.str();
}

// --------------------------------------------------------------------------------------------------------- by the rule

TYPED_TEST(Score, IsThatOfTheTextbook) {
  random_engine random(1);
  for (const entry entry : score_entries)
    for (const sinks kind : all_sinks) {
      score_rules<TypeParam> rules;
      for (const double softcap : softcaps)
        for (const std::int64_t length : {std::int64_t{1}, std::int64_t{3}, std::int64_t{8}, std::int64_t{9},
                                          this->lanes, this->lanes + 1, 2 * this->lanes + 7, this->block + 11}) {
          problem p = example(
              entry,
              {.batch = 2, .heads = 4, .kv_heads = 2, .queries = length, .keys = length + 2, .dim = 5, .value_dim = 3});
          p.options.softcap = softcap;
          if (length % 2 == 1) p.options.softmax_scale = -0.7;
          score_call<TypeParam> c(p, kind, random);
          rules.add(c, label_of(p, kind));
        }
      rules.expect(entry == entry::attend, kind != sinks::none);
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
      rules.add(c, label_of(p, kind));
    }
    rules.expect(entry == entry::attend, true);
  }
}

/// Few queries of a context that is cut into parts: every part has its scores capped, and the sink counts once.
TYPED_TEST(Score, OfFewQueriesOfALongContext) {
  random_engine random(3);
  score_rules<TypeParam> rules;
  for (const sinks kind : all_sinks)
    for (const double softcap : {0.0, 2.0}) {
      problem p = example(
          entry::dense,
          {.heads = 2, .kv_heads = 1, .queries = 3, .keys = 3 * detail::part_rows + 7, .dim = 6, .value_dim = 4});
      p.options.softcap = softcap;
      score_call<TypeParam> c(p, kind, random);
      rules.add(c, label_of(p, kind));
    }
  rules.expect(false, true);
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
      many.sink_logits = tensor<T, 3>(sink_extents(sinks::per_query, p.sizes));
      many.grad_sinks = many.sink_logits;
      for_each_row(many.sink_logits.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        *many.sink_logits.row(b, h, i) = *one.sink_logits.row(0, h, 0);
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
            sum += static_cast<long double>(*many.grad_sinks.row(b, h, i));
            size += std::fabs(static_cast<long double>(*many.grad_sinks.row(b, h, i)));
          }
        // Each of so many additions rounds a partial sum, which is at most the sum of the sizes.
        EXPECT_NEAR(static_cast<double>(*one.grad_sinks.row(0, h, 0)), static_cast<double>(sum),
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
  for (const entry entry : score_entries)
    for (const std::int64_t queries : {3, 40}) {
      SCOPED_TRACE(testing::Message() << entry << ", " << queries);
      const problem p = example(entry, {.heads = 2, .queries = queries, .keys = queries, .dim = 4, .value_dim = 3});
      score_call<T> sunk(p, sinks::per_head, random);
      sunk.sink_logits.fill(-infinity);
      score_rules<T> rules;  // by the textbook, for which it is no row
      rules.add(sunk, label_of(p, sinks::per_head));
      rules.expect(entry == entry::attend, false);
      for (const std::int64_t h : {0, 1}) EXPECT_EQ(*sunk.grad_sinks.row(0, h, 0), T(0));

      sunk.sink_logits.fill(T(1e4));
      sunk.forward().gradient();
      for_each_row(sunk.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        for (std::int64_t d = 0; d < 3; ++d) EXPECT_EQ(sunk.out().row(b, h, i)[d], T(0));
        EXPECT_EQ(*sunk.lse().row(b, h, i), T(1e4));
      });

      *sunk.sink_logits.row(0, 0, 0) = std::numeric_limits<T>::quiet_NaN();
      *sunk.sink_logits.row(0, 1, 0) = T(0.5);
      sunk.forward();
      for_each_row(sunk.out().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        EXPECT_EQ(std::isnan(sunk.out().row(b, h, i)[0]), h == 0);
        EXPECT_EQ(std::isnan(*sunk.lse().row(b, h, i)), h == 0);
      });
    }
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
      const auto sink = static_cast<double>(*c.sink_logits.row(0, 0, i)),
                 grad_lse = static_cast<double>(*c.memory.operands.back().row(0, 0, i));
      const double rounding = 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) * (1 + std::abs(sink));
      EXPECT_NEAR(static_cast<double>(*c.lse().row(0, 0, i)), sink, rounding);
      EXPECT_NEAR(static_cast<double>(*c.grad_sinks.row(0, 0, i)), grad_lse, 2 * rounding * std::abs(grad_lse));
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
        std::exp(static_cast<double>(*c.sink_logits.row(0, 0, 0)) - static_cast<double>(*c.lse().row(0, 0, i)));
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
        EXPECT_TRUE(same_bits(c.grad_sinks.view(), serial.grad_sinks.view())) << executor.name;
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

/// The sum of all results, weighed by the gradients that come in.
double weighed(score_call<double>& c) {
  const auto r = c.textbook<double>();
  const auto& in = c.memory.operands;
  double sum = 0;
  for_each_row(r.lse.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < r.out.extent[3]; ++d)
      sum += r.out.view().row(b, h, i)[d] * in[in.size() - 2].row(b, h, i)[d];
    sum += *r.lse.view().row(b, h, i) * *in.back().row(b, h, i);
  });
  return sum;
}

TEST(ScoreTextbook, GradientsAreSlopes) {
  random_engine random(11);
  for (const entry entry : score_entries)
    for (const sinks kind : {sinks::per_head, sinks::per_query})
      for (const double softcap : {0.0, 0.8}) {
        problem p = example(
            entry, {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 12, .keys = 12, .dim = 3, .value_dim = 2});
        p.options.softcap = softcap;
        // Without broadcasting: a step of one element is one of one operand's.
        gradient_memory<double> memory(p);
        score_call<double> c(p, kind, random);
        memory.randomize(random);
        c.memory = memory;
        const auto grad = c.textbook_gradient<double>();
        constexpr double step = 1e-5;
        const auto expect_slope = [&](double& x, double slope) {
          const double at = x;
          x = at + step;
          const double above = weighed(c);
          x = at - step;
          const double below = weighed(c);
          x = at;
          EXPECT_NEAR(slope, (above - below) / (2 * step), 1e-6) << label_of(p, kind);
        };
        for (const auto& [operand, of] : {std::pair(0u, &grad.query), {1u, &grad.key}, {2u, &grad.value}})
          for (int times = 0; times < 6; ++times) {
            tensor<double>& t = c.memory.operands[operand];
            const std::int64_t b = draw(random, 0, t.view().batch() - 1), h = draw(random, 0, t.view().heads() - 1),
                               i = draw(random, 0, t.view().length() - 1), d = draw(random, 0, t.view().dim() - 1);
            expect_slope(t.row(b, h, i)[d], of->view().row(b, h, i)[d]);
          }
        for_each_row(c.sink_logits.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          expect_slope(*c.sink_logits.row(b, h, i), *grad.sink_logits.view().row(b, h, i));
        });
      }
}

}}  // namespace cca::test
