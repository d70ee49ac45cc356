// Gradients: the textbook's against finite differences, the kernels' against the textbook.

#include "gradient_entry_points.hpp"

namespace cca::test { namespace {

// ------------------------------------------------------------------------------------------- the textbook's gradients

/// What the incoming gradients are the gradients of: a function of the entry point's results, linear in them.
double loss(const problem& p, const arguments<double>& a) {
  const auto& in = a.operands;
  const auto dot = [](const auto& grad, const auto& result) {
    double sum = 0;
    for_each_row(grad, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < grad.dim(); ++d)
        // The lse of a query that sees nothing is -inf whatever the operands are.
        if (std::isfinite(result.row(b, h, i)[d])) sum += grad.row(b, h, i)[d] * result.row(b, h, i)[d];
    });
    return sum;
  };
  const auto &first = in[in.size() - 2], &second = in[in.size() - 1];
  if (p.entry == entry::pool) {
    const auto [key, value] = reference::pool<double>(in[0], in[1], in[2], p.options);
    return dot(first, key.view()) + dot(second, value.view());
  }
  const auto result = [&] {
    if (p.entry == entry::attention) return reference::attention<double>(inputs{in[0], in[1], in[2]}, p.options);
    if (p.entry == entry::attend)
      return reference::attend<double>(inputs{in[0], in[1], in[2]}, far_context{in[3], in[4], a.seen}, p.options);
    return reference::local_attention<double>(inputs{in[0], in[1], in[2]}, p.options);
  }();
  return dot(first, result.out.view()) + dot(second, result.lse.view());
}

/// Central differences for every element of every operand. Their error is of the order of the square of the step, that
/// of a formula that is wrong is of the order of the gradient: the step lies far from both.
void expect_differences(gradient_memory<double>& memory, const arguments<double>& a) {
  constexpr double step = 0x1p-17;  // about the cube root of epsilon, where truncation and rounding are alike
  const auto gradients = textbook_gradient<double>(memory.problem, a);
  for (std::size_t o = 0; o < memory.forward_operands(); ++o) {
    const auto gradient = gradients[o].view();
    for_each_row(gradient, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < gradient.dim(); ++d) {
        double& x = memory.operands[o].row(b, h, i)[d];
        const double before = x;
        x = before + step;
        const double up = loss(memory.problem, a);
        x = before - step;
        const double down = loss(memory.problem, a);
        x = before;
        const double difference = (up - down) / (2 * step);
        ASSERT_NEAR(gradient.row(b, h, i)[d], difference, step * std::max(1.0, std::abs(difference)))
            << memory.problem << ", operand " << o << " at " << text_of<4>({b, h, i, d});
      }
    });
  }
}

/// The gradients of the first result alone, of the second alone, and of both.
void expect_differences(const problem& p, random_engine& random) {
  gradient_memory<double> both = gradient_memory<double>(p).randomize(random), first = both, second = both;
  expect_differences(both, both.arguments());
  second.operands[second.operands.size() - 2].fill(0);
  expect_differences(second, second.arguments());
  arguments<double> a = first.arguments();
  if (p.entry != entry::pool) {
    // No gradient of the lse is one of zeros.
    first.operands.back().fill(0);
    a.operands.back() = {};
    for (std::size_t i = 0; const auto& gradient : textbook_gradient<double>(p, a))
      EXPECT_TRUE(same_bits(gradient.view(), textbook_gradient<double>(p, first.arguments())[i++].view())) << p;
  } else {
    first.operands.back().fill(0);
  }
  expect_differences(first, first.arguments());
}

TEST(TextbookGradient, OfAttentionIsThatOfFiniteDifferences) {
  random_engine random(1);
  for (const auto& [heads, kv_heads] : std::array<std::pair<std::int64_t, std::int64_t>, 3>{{{1, 1}, {4, 2}, {3, 1}}})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads) {
        const sizes s{.heads = heads, .kv_heads = kv_heads, .queries = 9, .keys = 9, .dim = 3, .value_dim = 2};
        expect_differences({.entry = entry::attention,
                            .sizes = s,
                            .options = {.group_size = 2, .window = 3, .pool = pool, .core_heads = cores}},
                           random);
      }
  const sizes s{.batch = 2, .queries = 8, .keys = 8, .dim = 2, .value_dim = 3};
  for (const options& options : {options{.window = 3},
                                 {.group_size = 3, .window = 1},
                                 {.group_size = 3, .window = 8},
                                 {.group_size = 9, .window = 2},
                                  {.group_size = 3, .window = 2, .softmax_scale = -0.8},
                                  {.group_size = 2, .window = 2, .sink_tokens = 1},
                                  {.group_size = 2, .window = 1, .sink_tokens = 3},
                                  {.window = 2, .sink_tokens = 9},
                                  {.group_size = 3, .window = 2, .pool = pooling::select, .softmax_scale = -0.8},
                                  {.group_size = 3, .window = 2, .pooling_scale = 3},
                                  {.group_size = 3, .window = 2, .softmax_scale = 0.7, .pooling_scale = 0}})
    expect_differences({.entry = entry::attention, .sizes = s, .options = options}, random);
}

TEST(TextbookGradient, OfLocalAndDenseAttentionIsThatOfFiniteDifferences) {
  random_engine random(2);
  const sizes s{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 4, .keys = 6, .dim = 2, .value_dim = 3};
  for (const options& options : {options{}, {.softmax_scale = 1.3}, {.first_position = -2}, {.first_position = 1}})
    expect_differences({.entry = entry::dense, .sizes = s, .options = options}, random);
  for (const options& options : {options{.window = 1},
                                 {.window = 3},
                                 {.group_size = 2, .window = 2},
                                 {.window = 3, .first_position = 5},
                                 {.window = 1, .sink_tokens = 2},
                                 {.group_size = 2, .window = 1, .sink_tokens = 1},
                                 {.window = 2, .lookahead = 1, .first_position = 1},
                                 {.window = 2, .sink_tokens = 2, .lookahead = unlimited, .first_position = -1},
                                 {.window = 1, .sink_tokens = 1, .prefix = 3, .first_position = -1},
                                 {.window = 2, .first_position = -1}})
    expect_differences({.entry = entry::local, .sizes = s, .options = options}, random);
}

TEST(TextbookGradient, OfAttendingToFarRowsIsThatOfFiniteDifferences) {
  random_engine random(3);
  for (const std::int64_t far_heads : {1, 2, 4})
    for (const std::int64_t keys : {0, 5}) {
      problem p =
          example(entry::attend, {.heads = 4, .kv_heads = 2, .queries = 5, .keys = keys, .dim = 3, .value_dim = 2});
      p.options.window = 2;
      p.far_heads = far_heads;
      p.far_length = 4;
      expect_differences(p, random);
    }
}

TEST(TextbookGradient, OfPoolingIsThatOfFiniteDifferences) {
  random_engine random(4);
  for (const auto& [heads, kv_heads] : std::array<std::pair<std::int64_t, std::int64_t>, 3>{{{1, 1}, {4, 2}, {3, 1}}})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads)
        for (const std::int64_t group_size : {1, 3}) {
          const sizes s{
              .batch = 2, .heads = heads, .kv_heads = kv_heads, .queries = 7, .keys = 7, .dim = 3, .value_dim = 2};
          expect_differences({.entry = entry::pool,
                              .sizes = s,
                              .options = {.group_size = group_size,
                                          .window = pool_window(pool, 3),
                                          .pool = pool,
                                          .core_heads = cores}},
                             random);
        }
}

// ------------------------------------------------------------------------------------------------------ the error rule

/// The error rule for gradients, each for itself.
template <class T>
class gradient_rule {
 public:
  /// Judges what a call has written against `textbook.template operator()<Scalar>()`, the textbook's gradients.
  template <class Textbook>
  void add(const gradient_memory<T>& memory, const Textbook& textbook) {
    EXPECT_TRUE(memory.canaries_intact()) << memory.problem;
    const auto plain = textbook.template operator()<T>();
    const auto exact = textbook.template operator()<exact_type<T>>();
    std::ostringstream label;
    label << memory.problem;
    rules_.resize(std::max(rules_.size(), exact.size()));
    for (std::size_t i = 0; i < exact.size(); ++i)
      rules_[i].add(memory.results[i].view(), plain[i].view(), exact[i].view(), label.str());
  }

  /// Calls the gradient and judges it.
  void add(gradient_memory<T>& memory) {
    memory.gradient();
    const arguments<T> a = memory.arguments();
    add(memory, [&]<class Scalar>() { return textbook_gradient<Scalar>(memory.problem, a); });
  }

  void add(const problem& p, random_engine& random) {
    gradient_memory<T> memory = gradient_memory<T>(p).randomize(random);
    add(memory);
  }

  [[nodiscard]] testing::AssertionResult holds() const {
    constexpr std::array names{"query", "key", "value", "far key", "far value"};
    for (std::size_t i = 0; i < rules_.size(); ++i)
      if (const auto rule = rules_[i].holds(); !rule)
        return testing::AssertionFailure() << "gradient of " << names[i] << ": " << rule.message();
    return testing::AssertionSuccess();
  }

 private:
  std::vector<error_rule<T>> rules_;
};

template <class T>
testing::AssertionResult exact(const problem& p, random_engine& random) {
  gradient_rule<T> rule;
  rule.add(p, random);
  return rule.holds();
}

template <class T>
class Gradient : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().gradient_block;
  const std::int64_t stack = tile<T>().gradient_stack * lanes;
};

TYPED_TEST_SUITE(Gradient, precisions);

TYPED_TEST(Gradient, IsExactAroundTheSizesOfTheKernel) {
  using T = TypeParam;
  random_engine random(5);
  gradient_rule<T> dense, local, far, attention;
  for (const std::int64_t edge : {this->lanes, this->block, this->stack, 2 * this->stack})
    for (std::int64_t length = edge - 1; length <= edge + 1; ++length) {
      const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 20, .value_dim = 12};
      dense.add({.entry = entry::dense, .sizes = s}, random);
      local.add({.entry = entry::local, .sizes = s, .options = {.group_size = 9, .window = 17}}, random);
      far.add(example(entry::attend, s), random);
      // Groups of 1 and 2 make so many cores that they, too, fill blocks.
      for (const options& options :
           {options{.window = 3}, {.group_size = 2, .window = 50}, {.group_size = 9, .window = 17}})
        attention.add({.entry = entry::attention, .sizes = s, .options = options}, random);
    }
  EXPECT_TRUE(dense.holds());
  EXPECT_TRUE(local.holds());
  EXPECT_TRUE(far.holds());
  EXPECT_TRUE(attention.holds());
}

/// Sums over many blocks of queries and of keys.
TYPED_TEST(Gradient, IsExactForLongSequences) {
  using T = TypeParam;
  random_engine random(6);
  gradient_rule<T> rule;
  for (const std::int64_t length : {8 * this->stack + 1, 1500 + this->lanes - 3}) {
    const sizes s{.queries = length, .keys = length, .dim = 3, .value_dim = 2};
    rule.add({.entry = entry::attention, .sizes = s, .options = {.group_size = 64, .window = 70}}, random);
    rule.add({.entry = entry::attention, .sizes = s, .options = {.group_size = 3, .window = 200}}, random);
    rule.add({.entry = entry::local, .sizes = s, .options = {.window = this->block + 3}}, random);
    rule.add({.entry = entry::dense, .sizes = s}, random);
  }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Gradient, IsExactForEveryHeadDim) {
  using T = TypeParam;
  random_engine random(7);
  gradient_rule<T> rule;
  for (std::size_t i = 0; i < head_dims.size(); ++i)
    for (const std::int64_t value_dim : {head_dim(i), head_dim(i, 1), head_dim(i, 8)}) {
      const sizes s{.heads = 2, .queries = 70, .keys = 70, .dim = head_dim(i), .value_dim = value_dim};
      rule.add({.entry = entry::attention, .sizes = s, .options = {.group_size = 5, .window = 12}}, random);
    }
  EXPECT_TRUE(rule.holds());
}

/// Lengths and dims up to a tile: every remainder of every loop. Together: where few keys matter, how the log-sum-exp was
/// rounded is a matter of luck.
TYPED_TEST(Gradient, IsExactForSmallSizes) {
  using T = TypeParam;
  random_engine random(8);
  const std::int64_t greatest = this->lanes + 2;
  gradient_rule<T> rule;
  for (std::int64_t dim = 1; dim <= greatest; ++dim)
    for (std::int64_t length = 1; length <= greatest; ++length) {
      const bool edge = length <= 2 || length >= greatest - 3;
      if (!edge && (length + dim) % 5 != 0) continue;
      const sizes s{.queries = length, .keys = length, .dim = dim, .value_dim = greatest + 1 - dim};
      rule.add({.entry = entry::attention,
                .sizes = s,
                .options = {.group_size = draw(random, 1, 4), .window = draw(random, 1, length)}},
               random);
    }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Gradient, IsExactForGroupedQueries) {
  using T = TypeParam;
  random_engine random(9);
  for (const std::int64_t ratio : {1, 2, 3, 7, 8})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads)
        for (const entry entry : {entry::attention, entry::pool}) {
          const sizes s{
              .batch = 2, .heads = 2 * ratio, .kv_heads = 2, .queries = 45, .keys = 45, .dim = 6, .value_dim = 9};
          const std::int64_t window = entry == entry::pool ? pool_window(pool, 11) : 11;
          EXPECT_TRUE(exact<T>({.entry = entry,
                                .sizes = s,
                                .options = {.group_size = 4, .window = window, .pool = pool, .core_heads = cores}},
                               random));
        }
}

TYPED_TEST(Gradient, IsExactForEveryGroupAndWindow) {
  using T = TypeParam;
  random_engine random(10);
  for (const pooling pool : all_poolings) {
    gradient_rule<T> rule;
    for (int i = 0; i < 80; ++i) {
      const std::int64_t length = draw(random, 1, 130);
      const sizes s{.heads = 2, .kv_heads = 2, .queries = length, .keys = length, .dim = 5, .value_dim = 4};
      const std::int64_t g = draw_from(random, std::array{1, 2, 3, 7, 16, 64}) + draw(random, 0, 1);
      rule.add({.entry = entry::attention,
                .sizes = s,
                .options = {.group_size = g, .window = draw(random, 1, length + 2), .pool = pool}},
               random);
    }
    EXPECT_TRUE(rule.holds()) << "pooling " << static_cast<int>(pool);
  }
}

/// Pooling takes the rows of a group in blocks.
TYPED_TEST(Gradient, IsExactForGroupsOfAnySize) {
  using T = TypeParam;
  random_engine random(11);
  constexpr std::int64_t rows = detail::row_block;
  for (const std::int64_t group_size : {rows - 1, rows, rows + 1, 2 * rows, 3 * rows + 7})
    for (const pooling pool : all_poolings) {
      const std::int64_t length = 3 * group_size + group_size / 2;
      const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 10, .value_dim = 7};
      EXPECT_TRUE(
          exact<T>({.entry = entry::pool,
                    .sizes = s,
                    .options = {.group_size = group_size, .window = pool_window(pool, 70), .pool = pool}},
                   random));
    }
}

/// Among equals the first, and a NaN before all.
TYPED_TEST(Gradient, OfTheMaximumGoesToTheFirstThatHasIt) {
  using T = TypeParam;
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  const std::array<std::array<T, 4>, 4> rows{{{1, 2, 0, 5}, {3, 2, nan, 0}, {3, 1, 7, nan}, {2, 2, nan, 9}}};
  const std::array<std::int64_t, 4> first{1, 0, 1, 2};
  for (const std::int64_t length : {std::int64_t{4}, 3 * detail::row_block}) {  // the same rows again and again
    const sizes s{.queries = length, .keys = length, .dim = 4, .value_dim = 1};
    gradient_memory<T> memory(
        {.entry = entry::pool, .sizes = s, .options = {.group_size = length, .pool = pooling::max}});
    for (tensor<T>& operand : memory.operands) operand.fill(1);
    for (std::int64_t j = 0; j < length; ++j)
      std::copy_n(rows[static_cast<std::size_t>(j) % 4].data(), 4, memory.operands[1].row(0, 0, j));
    memory.gradient();
    const auto textbook = textbook_gradient<T>(memory.problem, memory.arguments());
    for (std::int64_t j = 0; j < length; ++j) {
      for (std::size_t d = 0; d < 4; ++d) {
        EXPECT_EQ(memory.results[1].row(0, 0, j)[d], first[d] == j ? 1 : 0) << j << " " << d;
        EXPECT_EQ(textbook[1].view().row(0, 0, j)[d], first[d] == j ? 1 : 0) << j << " " << d;
      }
      EXPECT_EQ(*memory.results[2].row(0, 0, j), j == 0 ? 1 : 0);
      EXPECT_EQ(*textbook[2].view().row(0, 0, j), j == 0 ? 1 : 0);
    }
  }
}

/// All of it, to the first of equals alone; nothing to the query.
TYPED_TEST(Gradient, OfASelectedTokenGoesToItAlone) {
  using T = TypeParam;
  random_engine random(21);
  for (const std::int64_t group_size : {std::int64_t{1}, std::int64_t{5}, 2 * detail::row_block + 3})
    for (const core_heads cores : all_core_heads) {
      const sizes s{.heads = 4, .kv_heads = 2, .queries = group_size, .keys = group_size, .dim = 5, .value_dim = 3};
      gradient_memory<T> memory(
          {.entry = entry::pool,
           .sizes = s,
           .options = {.group_size = group_size, .pool = pooling::select, .core_heads = cores}});
      memory.randomize(random);
      memory.operands[0].fill(1);
      memory.operands[1].fill(-1);
      const std::array<std::int64_t, 2> first{group_size / 3, group_size / 2};
      for (std::int64_t h = 0; h < 2; ++h)
        for (std::int64_t j = first[static_cast<std::size_t>(h)]; j < group_size; j += 2)
          std::fill_n(memory.operands[1].row(0, h, j), s.dim, T(3));
      memory.gradient();
      const std::int64_t per_head = memory.operands[3].view().heads() / 2;
      for_each_row(memory.results[0].view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
        for (std::int64_t d = 0; d < 5; ++d) EXPECT_EQ(memory.results[0].row(b, h, j)[d], 0);
      });
      for (const std::size_t o : {std::size_t{1}, std::size_t{2}})
        for_each_row(memory.results[o].view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
          for (std::int64_t d = 0; d < memory.results[o].view().dim(); ++d) {
            T sum = 0;
            if (j == first[static_cast<std::size_t>(h)])
              for (std::int64_t c = h * per_head; c < (h + 1) * per_head; ++c)
                sum += memory.operands[o + 2].row(b, c, 0)[d];
            EXPECT_EQ(memory.results[o].row(b, h, j)[d], sum) << o << " " << h << " " << j;
          }
        });
    }
}

TYPED_TEST(Gradient, IsExactForAnyScale) {
  using T = TypeParam;
  random_engine random(12);
  for (const double scale : {0.0, 1e-3, 1.0, -0.3, -1.0}) {
    const sizes s{.heads = 16, .kv_heads = 8, .queries = 90, .keys = 90, .dim = 16, .value_dim = 16};
    for (const core_heads cores : all_core_heads)
      EXPECT_TRUE(exact<T>({.entry = entry::attention,
                            .sizes = s,
                            .options = {.group_size = 6, .window = 20, .core_heads = cores, .softmax_scale = scale}},
                           random));
    EXPECT_TRUE(
        exact<T>({.entry = entry::local, .sizes = s, .options = {.window = 20, .softmax_scale = scale}}, random));
    EXPECT_TRUE(exact<T>({.entry = entry::dense, .sizes = s, .options = {.softmax_scale = scale}}, random));
    for (const double pooling_scale : {1.0, 0.0, 2.0})
      for (const entry entry : {entry::attention, entry::pool})
        EXPECT_TRUE(exact<T>({.entry = entry,
                              .sizes = s,
                              .options = {.group_size = 6,
                                          .window = entry == entry::pool ? unlimited : 20,
                                          .softmax_scale = scale,
                                          .pooling_scale = pooling_scale}},
                             random));
  }
}

TYPED_TEST(Gradient, IsExactForFewerQueries) {
  using T = TypeParam;
  random_engine random(13);
  gradient_rule<T> rule;
  for (std::int64_t queries = 1; queries <= 40; queries += draw(random, 1, 3))
    for (std::int64_t keys = 1; keys <= 40; keys += draw(random, 1, 3)) {
      const sizes s{.queries = queries, .keys = keys, .dim = 4, .value_dim = 3};
      rule.add({.entry = entry::dense, .sizes = s}, random);
      rule.add({.entry = entry::local,
                .sizes = s,
                .options = {.group_size = draw(random, 1, 5), .window = draw(random, 1, 40)}},
               random);
      rule.add({.entry = entry::local,
                .sizes = s,
                .options = {.window = draw(random, 1, 40), .first_position = draw(random, -20, 45)}},
               random);
    }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Gradient, IsExactForFarRows) {
  using T = TypeParam;
  random_engine random(14);
  gradient_rule<T> rule;
  for (const std::int64_t far_heads : {1, 2, 3, 6})
    for (const std::int64_t far_length : {std::int64_t{0}, std::int64_t{1}, std::int64_t{17}, this->block + 5})
      for (const std::int64_t keys : {0, 1, 50}) {
        problem p =
            example(entry::attend,
                    {.batch = 2, .heads = 6, .kv_heads = 3, .queries = 50, .keys = keys, .dim = 8, .value_dim = 6});
        p.far_heads = far_heads;
        p.far_length = far_length;
        rule.add(p, random);
      }
  EXPECT_TRUE(rule.holds());
}

/// One of the incoming gradients, or both; and the gradient of the lse may be left out, which is one of zeros.
TYPED_TEST(Gradient, IsExactForEachIncomingGradientAlone) {
  using T = TypeParam;
  random_engine random(15);
  for (const entry entry : gradient_entries) {
    const problem p =
        example(entry, {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 60, .keys = 60, .dim = 7, .value_dim = 5});
    for (const std::size_t kept : {0u, 1u}) {
      gradient_memory<T> memory = gradient_memory<T>(p).randomize(random);
      memory.operands[memory.operands.size() - 2 + (1 - kept)].fill(0);
      gradient_rule<T> rule;
      rule.add(memory);
      EXPECT_TRUE(rule.holds()) << p << ", of result " << kept << " alone";
      if (kept == 1 || entry == entry::pool) continue;
      gradient_memory<T> without = memory;
      arguments<T> a = without.arguments();
      a.operands.back() = {};
      call_gradient(p, a);
      EXPECT_TRUE(same_bits(a.results, memory.arguments().results)) << p << ", without a gradient of the lse";
    }
  }
}

TYPED_TEST(Gradient, IsExactInAnyLayout) {
  using T = TypeParam;
  random_engine random(16);
  for (const entry entry : gradient_entries) {
    gradient_rule<T> rule;
    for (int i = 0; i < 60; ++i) {
      const std::int64_t keys = draw(random, 1, 70), kv_heads = draw(random, 1, 3);
      problem p = example(entry, {.batch = draw(random, 1, 3),
                                  .heads = kv_heads * draw(random, 1, 3),
                                  .kv_heads = kv_heads,
                                  .queries = draw(random, 1, 70),
                                  .keys = keys,
                                  .dim = draw(random, 1, 40),
                                  .value_dim = draw(random, 1, 40)});
      if (entry == entry::local || entry == entry::attention) p.options.group_size = draw(random, 1, 9);
      if (entry == entry::local || entry == entry::attention) p.options.window = draw(random, 1, keys + 1);
      if (entry == entry::attention || entry == entry::pool) {
        p.options.pool = draw_from(random, all_poolings);
        if (entry == entry::pool) p.options.window = pool_window(p.options.pool, draw(random, 1, keys + 1));
        p.options.core_heads = draw_from(random, all_core_heads);
      } else if (draw(random, 0, 1) == 0) {
        p.options.first_position = draw(random, -5, keys + 5);
      }
      gradient_memory<T> memory(
          p, [&](bool may_broadcast) { return may_broadcast ? random_operand_layout(random) : random_layout(random); });
      memory.randomize(random);
      rule.add(memory);
    }
    EXPECT_TRUE(rule.holds()) << entry;
  }
}

// ---------------------------------------------------------------------------------------------------------- identities

/// A problem of CCA attention whose queries see what those of dense attention see: its gradients are the same.
template <class T>
void add_as_dense(gradient_rule<T>& rule, const problem& p, random_engine& random) {
  gradient_memory<T> memory = gradient_memory<T>(p).randomize(random);
  memory.gradient();
  const problem dense{.entry = entry::dense, .sizes = p.sizes};
  const arguments<T> a = memory.arguments();
  rule.add(memory, [&]<class Scalar>() { return textbook_gradient<Scalar>(dense, a); });
}

TYPED_TEST(Gradient, IsDenseWhereNothingIsPooled) {
  using T = TypeParam;
  random_engine random(17);
  gradient_rule<T> groups_of_one, long_windows, one_group;
  for (std::int64_t length = 1; length <= 3 * this->lanes; length += draw(random, 1, 4)) {
    problem p{.entry = entry::attention,
              .sizes = {.heads = 2, .queries = length, .keys = length, .dim = 5, .value_dim = 3}};
    p.options = {.group_size = 1, .window = draw(random, 1, length)};
    add_as_dense(groups_of_one, p, random);
    const std::int64_t g = draw(random, 2, 20);
    p.options = {.group_size = g, .window = length + draw(random, 0, 2)};
    add_as_dense(long_windows, p, random);
    p.options = {.group_size = g, .window = std::max<std::int64_t>(length - g + 1, 1)};
    add_as_dense(one_group, p, random);
  }
  EXPECT_TRUE(groups_of_one.holds());
  EXPECT_TRUE(long_windows.holds());
  EXPECT_TRUE(one_group.holds());
}

/// Keys and values that query heads share have the sum of the gradients of their repeats.
TYPED_TEST(Gradient, OfSharedHeadsIsTheSumOfThatOfTheRepeats) {
  using T = TypeParam;
  random_engine random(18);
  for (const entry entry : {entry::dense, entry::local, entry::attention})
    for (const std::int64_t ratio : {1, 2, 3, 8}) {
      const problem p = example(
          entry, {.batch = 2, .heads = 2 * ratio, .kv_heads = 2, .queries = 40, .keys = 40, .dim = 7, .value_dim = 5});
      problem wide = p;
      wide.sizes.kv_heads = p.sizes.heads;
      gradient_memory<T> shared = gradient_memory<T>(p).randomize(random), repeated(wide);
      for (std::size_t o = 0; o < shared.operands.size(); ++o) {
        const std::int64_t sharing = repeated.operands[o].view().heads() / shared.operands[o].view().heads();
        for_each_row(repeated.operands[o].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          std::copy_n(shared.operands[o].row(b, h / sharing, i), shared.operands[o].view().dim(),
                      repeated.operands[o].row(b, h, i));
        });
      }
      shared.gradient();
      const arguments<T> a = repeated.arguments();
      gradient_rule<T> rule;
      rule.add(shared, [&]<class Scalar>() {
        auto gradients = textbook_gradient<Scalar>(wide, a);
        for (const std::size_t o : {1u, 2u}) {
          const auto all = std::exchange(gradients[o], reference::tensor<Scalar>(shared.results[o].view().extent));
          for_each_row(all.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
            for (std::int64_t d = 0; d < all.view().dim(); ++d)
              gradients[o].view().row(b, h / ratio, i)[d] += all.view().row(b, h, i)[d];
          });
        }
        return gradients;
      });
      EXPECT_TRUE(rule.holds()) << p;
    }
}

// ----------------------------------------------------------------------------------------------------------- causality

/// What depends only on outputs before `t` has no gradient at all by tokens from `t` on.
TYPED_TEST(Gradient, OfEarlierOutputsIsExactlyZero) {
  using T = TypeParam;
  random_engine random(19);
  const std::int64_t length = 2 * this->lanes + 11;
  const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 6, .value_dim = 5};
  std::vector<problem> problems{example(entry::dense, s), example(entry::local, s)};
  for (const std::int64_t group_size : {1, 2, 5, 16})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads)
        problems.push_back({.entry = entry::attention,
                            .sizes = s,
                            .options = {.group_size = group_size, .window = 7, .pool = pool, .core_heads = cores}});
  for (const problem& p : problems) {
    const gradient_memory<T> whole = gradient_memory<T>(p).randomize(random);
    for (std::int64_t t = 1; t < length; t += draw(random, 1, 9)) {
      gradient_memory<T> memory = whole;
      for (const std::size_t incoming : {memory.operands.size() - 2, memory.operands.size() - 1})
        for_each_row(memory.operands[incoming].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          if (i >= t) std::fill_n(memory.operands[incoming].row(b, h, i), memory.operands[incoming].view().dim(), T(0));
        });
      memory.gradient();
      for (std::size_t o = 0; o < memory.results.size(); ++o)
        for_each_row(memory.results[o].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          bool zero = true;
          for (std::int64_t d = 0; d < memory.results[o].view().dim(); ++d)
            zero = zero && memory.results[o].row(b, h, i)[d] == 0;
          ASSERT_EQ(zero, i >= t) << p << ": operand " << o << ", token " << i << ", outputs before " << t;
        });
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- options

TYPED_TEST(Gradient, HeedsEveryOption) {
  using T = TypeParam;
  const sizes s{.heads = 2, .kv_heads = 1, .queries = 30, .keys = 30, .dim = 8, .value_dim = 8};
  // The same operands and incoming gradients under both; the output and the lse are those of each.
  const auto expect_change = [&](entry entry, const options& a, const options& b, std::vector<std::size_t> changed) {
    problem p = example(entry, s), q = p;
    p.options = a;
    q.options = b;
    std::array memories{gradient_memory<T>(p), gradient_memory<T>(q)};
    for (gradient_memory<T>& memory : memories) {
      random_engine random(20);
      memory.randomize(random);
      // Cores may be as many as the options say, and have all the same gradient.
      if (entry == entry::pool) memory.operands[3].fill(1), memory.operands[4].fill(1);
      memory.gradient();
    }
    for (std::size_t o : changed)
      EXPECT_FALSE(same_bits(memories[0].results[o].view(), memories[1].results[o].view()))
          << q << ", gradient " << o << " as with " << describe(a);
  };
  const std::vector<std::size_t> all{0, 1, 2};
  expect_change(entry::dense, {}, {.softmax_scale = 0.5}, all);
  expect_change(entry::dense, {}, {.first_position = 3}, all);
  expect_change(entry::dense, {}, {.lookahead = 1}, all);
  expect_change(entry::dense, {}, {.prefix = 2}, all);

  const options local{.window = 5};
  expect_change(entry::local, local, {.window = 6}, all);
  expect_change(entry::local, local, {.group_size = 2, .window = 5}, all);
  expect_change(entry::local, local, {.window = 5, .softmax_scale = 0.5}, all);
  expect_change(entry::local, local, {.window = 5, .first_position = 3}, all);
  for (const options& more : {options{.window = 5, .sink_tokens = 1},
                              {.window = 5, .lookahead = 1},
                              {.window = 5, .prefix = 2},
                              {.window = 5, .lookahead = unlimited}})
    expect_change(entry::local, local, more, all);

  const std::vector<std::size_t> all_of_attend{0, 1, 2, 3, 4};
  expect_change(entry::attend, local, {.window = 6}, all_of_attend);
  expect_change(entry::attend, local, {.group_size = 2, .window = 5}, all_of_attend);
  expect_change(entry::attend, local, {.window = 5, .softmax_scale = 0.5}, all_of_attend);
  expect_change(entry::attend, local, {.window = 5, .first_position = 3}, all_of_attend);
  expect_change(entry::attend, local, {.window = 5, .sink_tokens = 1}, all_of_attend);
  expect_change(entry::attend, local, {.window = 5, .lookahead = 1}, all_of_attend);
  expect_change(entry::attend, local, {.window = 5, .prefix = 2}, all_of_attend);

  const options cca{.group_size = 3, .window = 5};
  expect_change(entry::attention, cca, {.group_size = 4, .window = 5}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 6}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .pool = pooling::mean}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .pool = pooling::max}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .core_heads = core_heads::per_kv_head}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .softmax_scale = 0.5}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .sink_tokens = 2}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .pool = pooling::select}, all);
  expect_change(entry::attention, cca, {.group_size = 3, .window = 5, .pooling_scale = 2}, all);

  const options pooled{.group_size = 3};
  expect_change(entry::pool, pooled, {.group_size = 4}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .pool = pooling::mean}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .pool = pooling::max}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .core_heads = core_heads::per_kv_head}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .softmax_scale = 0.5}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .sink_tokens = 1}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .pool = pooling::select}, all);
  expect_change(entry::pool, pooled, {.group_size = 3, .pooling_scale = 2}, all);
}

}}  // namespace cca::test
