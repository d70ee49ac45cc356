// Groups to core tokens.

#include "entry_points.hpp"

namespace cca::test {
namespace {

template <class T>
struct cores {
  tensor<T> key, value;
};

template <class T>
cores<T> run(const sizes& s, const operands<T>& o, const options& options, const std::array<layout, 2>& layouts = {}) {
  const std::int64_t heads = detail::core_head_count(options, s.heads, s.kv_heads);
  const std::int64_t groups = partition_of(options).group_count(s.keys);
  cores<T> c{tensor<T>({s.batch, heads, groups, s.dim}, layouts[0]),
             tensor<T>({s.batch, heads, groups, s.value_dim}, layouts[1])};
  call<T>({.entry = entry::pool, .sizes = s, .options = options},
          {.operands = {o.query.view(), o.key.view(), o.value.view()},
           .results = {c.key.view(), c.value.view()},
           .seen = {}});
  EXPECT_TRUE(c.key.canaries_intact());
  EXPECT_TRUE(c.value.canaries_intact());
  return c;
}

template <class T>
testing::AssertionResult same_bits(const cores<T>& a, const cores<T>& b) {
  const testing::AssertionResult key = test::same_bits(a.key.view(), b.key.view());
  return key ? test::same_bits(a.value.view(), b.value.view()) : key;
}

/// The error rule for cores.
template <class T>
class core_rule {
 public:
  void add(const sizes& s, const operands<T>& o, const options& options, const std::array<layout, 2>& layouts = {}) {
    const cores<T> kernel = run(s, o, options, layouts);
    const auto plain = reference::pool<T>(o.query.view(), o.key.view(), o.value.view(), options);
    const auto exact = reference::pool<exact_type<T>>(o.query.view(), o.key.view(), o.value.view(), options);
    const std::string label = describe(s) + ", " + describe(options);
    key_.add(kernel.key.view(), plain.first.view(), exact.first.view(), label);
    value_.add(kernel.value.view(), plain.second.view(), exact.second.view(), label);
  }

  [[nodiscard]] testing::AssertionResult holds() const {
    if (const auto key = key_.holds(); !key) return testing::AssertionFailure() << "core keys: " << key.message();
    if (const auto value = value_.holds(); !value)
      return testing::AssertionFailure() << "core values: " << value.message();
    return testing::AssertionSuccess();
  }

 private:
  error_rule<T> key_, value_;
};

template <class T>
class Pool : public testing::Test {};

TYPED_TEST_SUITE(Pool, precisions);

/// Groups of one row block, of several, and of a few rows more or less.
TYPED_TEST(Pool, IsExactForEveryGroupSize) {
  using T = TypeParam;
  random_engine random(1);
  constexpr std::int64_t block = detail::row_block;
  for (const std::int64_t group_size :
       {std::int64_t{1}, std::int64_t{2}, std::int64_t{3}, std::int64_t{4}, std::int64_t{5}, std::int64_t{16},
        block - 1, block, block + 1, 2 * block - 3, 2 * block, 3 * block + 7})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads) {
        const std::int64_t length = 3 * group_size + group_size / 2;
        const sizes s{
            .batch = 2, .heads = 6, .kv_heads = 2, .queries = length, .keys = length, .dim = 10, .value_dim = 7};
        core_rule<T> rule;
        rule.add(s, random_operands<T>(s, random),
                 {.group_size = group_size, .window = pool_window(pool, 70), .pool = pool, .core_heads = cores});
        EXPECT_TRUE(rule.holds());
      }
}

/// More groups than one task of the pooling takes in.
TYPED_TEST(Pool, IsExactForManyGroups) {
  using T = TypeParam;
  random_engine random(2);
  for (const std::int64_t group_size : {1, 16, 1000}) {
    const std::int64_t length = 2 * detail::pool_task_tokens + 1500;
    const sizes s{.heads = 2, .kv_heads = 1, .queries = length, .keys = length, .dim = 5, .value_dim = 3};
    core_rule<T> rule;
    rule.add(s, random_operands<T>(s, random), {.group_size = group_size});
    EXPECT_TRUE(rule.holds());
  }
}

TYPED_TEST(Pool, IsExactForEveryHeadDimAndScale) {
  using T = TypeParam;
  random_engine random(3);
  for (std::size_t i = 0; i < head_dims.size(); ++i)
    for (const std::optional<double> scale : {std::optional<double>{}, {0.0}, {-0.05}}) {
      const sizes s{
          .heads = 8, .kv_heads = 8, .queries = 66, .keys = 66, .dim = head_dim(i), .value_dim = head_dim(i, 8)};
      core_rule<T> rule;
      const operands<T> o = random_operands<T>(s, random);
      rule.add(s, o, {.group_size = 6, .softmax_scale = scale});
      rule.add(s, o, {.group_size = 6, .pool = pooling::select, .softmax_scale = scale});
      if (scale != 0.0)  // all weights are the same, but for their rounding
        rule.add(s, o, {.group_size = 6, .window = 20, .pool = pooling::select_by_mass, .softmax_scale = scale});
      for (const double pooling_scale : {0.0, 0.3, 4.0, 100.0})
        rule.add(s, o, {.group_size = 6, .softmax_scale = scale, .pooling_scale = pooling_scale});
      EXPECT_TRUE(rule.holds());
    }
}

TYPED_TEST(Pool, IsExactInAnyLayout) {
  using T = TypeParam;
  random_engine random(4);
  core_rule<T> rule;
  for (int i = 0; i < 100; ++i) {
    const std::int64_t length = draw(random, 1, 200), kv_heads = draw(random, 1, 3);
    const sizes s{.batch = draw(random, 1, 3),
                  .heads = kv_heads * draw_from(random, std::array{1, 2, 3, 7, 8, 16}),
                  .kv_heads = kv_heads,
                  .queries = length,
                  .keys = length,
                  .dim = draw(random, 1, 40),
                  .value_dim = draw(random, 1, 40)};
    const pooling pool = draw_from(random, all_poolings);
    rule.add(s, random_operands<T>(s, random, random_operand_layouts(random)),
             {.group_size = draw(random, 1, 80),
              .window = pool_window(pool, draw(random, 1, 200)),
              .pool = pool,
              .core_heads = draw_from(random, all_core_heads)},
             {random_layout(random), random_layout(random)});
  }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Pool, TakesTheMaximumAsItIs) {
  using T = TypeParam;
  random_engine random(5);
  const sizes s{.heads = 2, .kv_heads = 2, .queries = 50, .keys = 50, .dim = 9, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  const cores<T> c = run(s, o, {.group_size = 7, .pool = pooling::max});
  for_each_row(c.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < s.dim; ++d) {
      T largest = o.key.row(b, h, 7 * i)[d];
      for (std::int64_t j = 1; j < 7; ++j) largest = std::max(largest, o.key.row(b, h, 7 * i + j)[d]);
      EXPECT_EQ(c.key.row(b, h, i)[d], largest);
    }
  });
}

/// The token of the largest logit, to the bit, by the query of each core.
TYPED_TEST(Pool, SelectsATokenAsItIs) {
  using T = TypeParam;
  random_engine random(10);
  for (const std::int64_t g : {std::int64_t{7}, detail::row_block + 5})
    for (const core_heads cores : all_core_heads)
      for (const double scale : {0.5, -0.5}) {
        const sizes s{.heads = 4, .kv_heads = 2, .queries = 4 * g + 3, .keys = 4 * g + 3, .dim = 9, .value_dim = 5};
        const operands<T> o = random_operands<T>(s, random);
        const auto c =
            run(s, o, {.group_size = g, .pool = pooling::select, .core_heads = cores, .softmax_scale = scale});
        const std::int64_t sharing = s.heads / c.key.view().heads();
        for_each_row(c.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          const std::int64_t kv_head = h * sharing / 2, last = (i + 1) * g - 1;
          std::int64_t selected = -1;
          double largest = -std::numeric_limits<double>::infinity();
          for (std::int64_t j = i * g; j <= last; ++j) {
            double logit = 0;
            for (std::int64_t q = h * sharing; q < (h + 1) * sharing; ++q)
              for (std::int64_t d = 0; d < s.dim; ++d)
                logit += scale * static_cast<double>(o.query.row(b, q, last)[d]) *
                         static_cast<double>(o.key.row(b, kv_head, j)[d]);
            if (logit > largest) largest = logit, selected = j;
          }
          for (std::int64_t d = 0; d < s.dim; ++d)
            EXPECT_EQ(c.key.row(b, h, i)[d], o.key.row(b, kv_head, selected)[d]) << h << " " << i;
          for (std::int64_t d = 0; d < s.value_dim; ++d)
            EXPECT_EQ(c.value.row(b, h, i)[d], o.value.row(b, kv_head, selected)[d]) << h << " " << i;
        });
      }
}

/// Equal keys have equal logits, wherever they lie in the blocks of rows: the first of them is selected.
TYPED_TEST(Pool, SelectsTheFirstOfEquals) {
  using T = TypeParam;
  random_engine random(11);
  for (std::int64_t g = 1; g <= 2 * detail::row_block + 3; g += g < 12 ? 1 : 5)
    for (const std::int64_t dim : {1, 6, 33, 100}) {
      const sizes s{.queries = 3 * g, .keys = 3 * g, .dim = dim, .value_dim = 1};
      operands<T> o = random_operands<T>(s, random);
      for (std::int64_t i = 0; i < 3; ++i) {
        const T* query = o.query.row(0, 0, (i + 1) * g - 1);
        for (std::int64_t j = 0; j < g; ++j)
          for (std::int64_t d = 0; d < dim; ++d)
            o.key.row(0, 0, i * g + j)[d] = (j < g / 2 ? T(-1) : T(1)) * query[d];
      }
      const auto c = run(s, o, {.group_size = g, .pool = pooling::select});
      for (std::int64_t i = 0; i < 3; ++i)
        EXPECT_EQ(*c.value.row(0, 0, i), *o.value.row(0, 0, i * g + g / 2)) << g << " " << dim << " " << i;
    }
}

/// A NaN that comes after the largest logit shows as much as one before; no logit but -inf selects nobody.
TYPED_TEST(Pool, OfNobodySelectedIsNaN) {
  using T = TypeParam;
  constexpr T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  const std::int64_t g = detail::row_block + 6;
  const sizes s{.queries = 3 * g, .keys = 3 * g, .dim = 4, .value_dim = 2};
  random_engine random(12);
  operands<T> o = random_operands<T>(s, random);
  o.query.fill(1);
  const auto clean = run(s, o, {.group_size = g, .pool = pooling::select});
  const auto expect = [&](const operands<T>& with, bool shows) {
    const auto c = run(s, with, {.group_size = g, .pool = pooling::select});
    for (const std::int64_t i : {0, 2})
      EXPECT_TRUE(std::equal(c.key.row(0, 0, i), c.key.row(0, 0, i) + s.dim, clean.key.row(0, 0, i)));
    for (std::int64_t d = 0; d < s.dim; ++d) EXPECT_EQ(std::isnan(c.key.row(0, 0, 1)[d]), shows);
    for (std::int64_t d = 0; d < s.value_dim; ++d) EXPECT_EQ(std::isnan(c.value.row(0, 0, 1)[d]), shows);
  };
  for (const std::int64_t j : {std::int64_t{0}, g / 2, g - 1}) {
    operands<T> one = o;
    one.key.row(0, 0, g + j)[3] = nan;
    expect(one, true);
  }
  operands<T> masked = o;
  for (std::int64_t j = g; j < 2 * g; ++j) masked.key.row(0, 0, j)[1] = -infinity;
  expect(masked, true);
  std::fill_n(masked.key.row(0, 0, g + 2), s.dim, T(-1e6));
  expect(masked, false);
}

/// From the mean of all tokens to the one that is selected.
TYPED_TEST(Pool, IsSharperTheLargerItsScale) {
  using T = TypeParam;
  random_engine random(13);
  const sizes s{.queries = 40, .keys = 40, .dim = 6, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  const auto distance = [&](const options& a, const options& b) {
    const auto x = run(s, o, a), y = run(s, o, b);
    double sum = 0;
    for_each_row(x.key.view(), [&](std::int64_t i, std::int64_t h, std::int64_t c) {
      for (std::int64_t d = 0; d < s.dim; ++d)
        sum += std::abs(static_cast<double>(x.key.row(i, h, c)[d] - y.key.row(i, h, c)[d]));
    });
    return sum;
  };
  const auto by_scale = [](double scale) { return options{.group_size = 8, .pooling_scale = scale}; };
  const options mean{.group_size = 8, .pool = pooling::mean}, selected{.group_size = 8, .pool = pooling::select};
  EXPECT_LT(distance(by_scale(0), mean), 1e-5);
  EXPECT_LT(distance(by_scale(1e6), selected), 1e-5);
  EXPECT_TRUE(same_bits(run(s, o, by_scale(3)), run(s, o, {.group_size = 8, .softmax_scale = 3 * (1 / std::sqrt(6.0))})));
  for (const double scale : {0.0, 1.0, 4.0, 16.0})
    EXPECT_LT(distance(by_scale(4 * scale + 1), selected), distance(by_scale(scale), selected)) << scale;
}

TYPED_TEST(Pool, OfLessThanAGroupIsNothing) {
  using T = TypeParam;
  random_engine random(6);
  const sizes s{.heads = 2, .kv_heads = 2, .queries = 9, .keys = 9, .dim = 4, .value_dim = 3};
  for (const std::int64_t group_size : {10, 64, 1000})
    EXPECT_TRUE(run(s, random_operands<T>(s, random), {.group_size = group_size}).key.view().empty());
}

/// Tokens of an incomplete group, and all queries but the last of each group, are not looked at.
TYPED_TEST(Pool, ReadsCompleteGroupsAndTheirLastQueries) {
  using T = TypeParam;
  random_engine random(7);
  const std::int64_t group_size = 6, length = 4 * group_size + 5;
  const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 7, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  operands<T> poisoned = o;
  const auto poison = [](tensor<T>& t, const auto& where) {
    for_each_row(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      if (where(i)) std::fill_n(t.row(b, h, i), t.view().dim(), std::numeric_limits<T>::quiet_NaN());
    });
  };
  const auto incomplete = [&](std::int64_t i) { return i >= 4 * group_size; };
  poison(poisoned.key, incomplete);
  poison(poisoned.value, incomplete);
  poison(poisoned.query, [&](std::int64_t i) { return incomplete(i) || i % group_size != group_size - 1; });
  for (const core_heads cores : all_core_heads)
    for (const pooling pool : {pooling::last_query, pooling::select}) {
      const options options{.group_size = group_size, .pool = pool, .core_heads = cores};
      EXPECT_TRUE(same_bits(run(s, poisoned, options), run(s, o, options)));
    }
  poison(poisoned.query, [](std::int64_t) { return true; });
  for (const pooling pool : {pooling::mean, pooling::max}) {
    const options options{.group_size = group_size, .pool = pool};
    EXPECT_TRUE(same_bits(run(s, poisoned, options), run(s, o, options))) << "no query is read";
  }
}

/// Each token has a part in the core of its own group, for its own heads, and in no other.
TYPED_TEST(Pool, KeepsGroupsApart) {
  using T = TypeParam;
  random_engine random(8);
  const std::int64_t group_size = 5, length = 20;
  const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 6, .value_dim = 6};
  const operands<T> o = random_operands<T>(s, random);
  for (const core_heads cores : all_core_heads) {
    const options options{.group_size = group_size, .core_heads = cores};
    const auto before = run(s, o, options);
    for (std::int64_t j = 0; j < length; ++j) {
      operands<T> changed = o;
      std::fill_n(changed.key.row(0, 1, j), s.dim, std::numeric_limits<T>::quiet_NaN());
      const auto after = run(s, changed, options);
      for_each_row(after.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t c) {
        const bool own = c == j / group_size && h / (after.key.view().heads() / 2) == 1;
        for (std::int64_t d = 0; d < s.dim; ++d)
          EXPECT_EQ(!test::same_bits(after.key.row(b, h, c)[d], before.key.row(b, h, c)[d]), own)
              << j << " " << h << " " << c;
      });
    }
  }
}

TYPED_TEST(Pool, HeedsEveryOption) {
  using T = TypeParam;
  random_engine random(9);
  const sizes s{.heads = 2, .kv_heads = 1, .queries = 12, .keys = 12, .dim = 6, .value_dim = 6};
  const operands<T> o = random_operands<T>(s, random);
  const auto before = run(s, o, {.group_size = 3});
  for (const options& options :
       {options{.group_size = 4}, options{.group_size = 3, .pool = pooling::mean},
        options{.group_size = 3, .pool = pooling::max}, options{.group_size = 3, .softmax_scale = 0.3},
         options{.group_size = 3, .core_heads = core_heads::per_kv_head}, options{.group_size = 3, .sink_tokens = 1},
         options{.group_size = 3, .pool = pooling::select}, options{.group_size = 3, .pooling_scale = 2}}) {
    const auto after = run(s, o, options);
    for (std::int64_t d = 0; d < s.dim; ++d) {
      EXPECT_NE(after.key.row(0, 0, 0)[d], before.key.row(0, 0, 0)[d]) << describe(options);
      EXPECT_NE(after.value.row(0, 0, 0)[d], before.value.row(0, 0, 0)[d]) << describe(options);
    }
  }
}

}  // namespace
}  // namespace cca::test
