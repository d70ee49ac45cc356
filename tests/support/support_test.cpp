// The tests' own tools, tested: a comparison that passes on NaN would pass everything.

#include "support.hpp"

#include <set>

namespace cca::test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

tensor<double> one_row(std::initializer_list<double> numbers) {
  tensor<double> t({1, 1, 1, std::ssize(numbers)});
  std::copy(numbers.begin(), numbers.end(), t.row(0, 0, 0));
  return t;
}

TEST(Distance, IsInfiniteUnlessNanAndInfinityAgree) {
  EXPECT_EQ(distance(1.0, 1.25), 0.25L);
  EXPECT_EQ(distance(-1.0f, 1.0), 2.0L);
  EXPECT_EQ(distance(nan, nan), 0.0L);
  EXPECT_EQ(distance(infinity, infinity), 0.0L);
  EXPECT_EQ(distance(-infinity, -infinity), 0.0L);
  for (const double x : {0.0, 1.0, infinity, -infinity}) {
    EXPECT_EQ(distance(nan, x), infinity) << x;
    EXPECT_EQ(distance(x, nan), infinity) << x;
  }
  EXPECT_EQ(distance(infinity, -infinity), infinity);
  EXPECT_EQ(distance(infinity, 1.0), infinity);
  EXPECT_EQ(distance(1.0, -infinity), infinity);
}

TEST(SameBits, TellsZerosAndNansApart) {
  EXPECT_TRUE(same_bits(one_row({nan, -0.0}).view(), one_row({nan, -0.0}).view()));
  EXPECT_FALSE(same_bits(one_row({0.0}).view(), one_row({-0.0}).view()));
  EXPECT_FALSE(same_bits(one_row({nan}).view(), one_row({canary<double>()}).view()));
  EXPECT_FALSE(same_bits(one_row({1}).view(), one_row({1, 1}).view()));
}

testing::AssertionResult rule(double kernel, double textbook, double exact) {
  error_rule<double> rule;
  rule.add(one_row({kernel}).view(), one_row({textbook}).view(), one_row({exact}).view());
  return rule.holds();
}

TEST(ErrorRule, AllowsTwiceTheTextbookAndRounding) {
  constexpr double epsilon = std::numeric_limits<double>::epsilon();
  EXPECT_TRUE(rule(1, 1, 1));
  EXPECT_TRUE(rule(1.25, 0.875, 1));
  EXPECT_FALSE(rule(1.375, 0.875, 1));
  EXPECT_TRUE(rule(1 + epsilon, 1, 1));
  EXPECT_FALSE(rule(1 + 2 * epsilon, 1, 1));
  EXPECT_TRUE(rule(1024 * (1 + epsilon), 1024, 1024)) << "rounding is relative";
  EXPECT_FALSE(rule(epsilon, 0, 0));
  constexpr double least = std::numeric_limits<double>::denorm_min();
  EXPECT_TRUE(rule(8 * least, 7 * least, 7 * least)) << "rounding to denormal numbers is not relative";
  EXPECT_FALSE(rule(9 * least, 7 * least, 7 * least));
}

TEST(ErrorRule, FailsOnNanAndInfinity) {
  for (const double x : {nan, infinity, -infinity}) {
    EXPECT_FALSE(rule(x, 1, 1)) << x;
    EXPECT_FALSE(rule(1, x, 1)) << x << ": a broken textbook allows nothing";
    EXPECT_FALSE(rule(1, 1, x)) << x;
    EXPECT_TRUE(rule(x, x, x)) << x << ": a result that has to be so";
  }
  error_rule<double> infinite_magnitude;
  infinite_magnitude.add(one_row({infinity, 2}).view(), one_row({infinity, 1}).view(), one_row({infinity, 1}).view());
  EXPECT_FALSE(infinite_magnitude.holds()) << "an infinite result leaves no room for the others";
}

TEST(ErrorRule, IsOfAllTensorsTogether) {
  error_rule<double> rule;
  const tensor<double> exact = one_row({1, 1});
  rule.add(one_row({1.25, 1}).view(), exact.view(), exact.view());
  EXPECT_FALSE(rule.holds());
  rule.add(exact.view(), one_row({1, 1.125}).view(), exact.view());
  EXPECT_TRUE(rule.holds());
  rule.add(one_row({1, nan}).view(), exact.view(), exact.view());
  EXPECT_FALSE(rule.holds());
}

TEST(ErrorRule, FailsWhereExtentsDiffer) {
  error_rule<double> rule;
  rule.add(one_row({1}).view(), one_row({1, 1}).view(), one_row({1, 1}).view());
  EXPECT_FALSE(rule.holds());
}

TEST(ErrorRule, TellsOfASingleWrongElement) {
  random_engine random(3);
  tensor<double> exact({1, 1, 100, 100});
  exact.randomize(random);
  tensor<double> textbook = exact, kernel = exact;
  const auto round = [&](tensor<double>& t) {
    for (std::int64_t i = 0; i < 100; ++i)
      for (std::int64_t d = 0; d < 100; ++d) t.row(0, 0, i)[d] += 1e-16 * static_cast<double>(draw(random, -3, 3));
  };
  round(textbook);
  round(kernel);
  const auto holds = [&] {
    error_rule<double> rule;
    rule.add(kernel.view(), textbook.view(), exact.view());
    return rule.holds();
  };
  EXPECT_TRUE(holds());
  kernel.row(0, 0, 50)[50] += 1e-12;
  EXPECT_FALSE(holds());
}

TEST(Tensor, ElementsOfAnyLayoutAreDistinct) {
  random_engine random(1);
  for (int i = 0; i < 200; ++i) {
    tensor<double> t({2, 3, 4, 5}, random_layout(random));
    EXPECT_NO_THROW(detail::require_output({"t", t.view()}));
    double next = 0;
    t.generate([&] { return next++; });
    std::set<double> seen;
    for_each_row(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t j) {
      seen.insert(t.row(b, h, j), t.row(b, h, j) + 5);
    });
    EXPECT_EQ(seen.size(), 120u);
    EXPECT_TRUE(t.canaries_intact());
  }
}

TEST(Tensor, LayoutsAreThoseOfTheFactories) {
  tensor<float> plain({2, 3, 4, 5}), transposed({2, 3, 4, 5}, bshd_layout);
  EXPECT_EQ(plain.view().stride, bhsd<float>(nullptr, 2, 3, 4, 5).stride);
  EXPECT_EQ(transposed.view().stride, bshd<float>(nullptr, 2, 4, 3, 5).stride);
  const tensor<float, 3> lse({2, 3, 4});
  EXPECT_EQ(lse.view().stride, bhs<float>(nullptr, 2, 3, 4).stride);
}

TEST(Tensor, RandomLayoutsCoverWhatStridesCanBe) {
  random_engine random(2);
  bool negative = false, broadcast = false, padded = false;
  for (int i = 0; i < 100; ++i) {
    const tensor<float> t({2, 3, 4, 5}, random_operand_layout(random));
    for (std::size_t d = 0; d < 3; ++d) {
      const std::int64_t stride = t.view().stride[d];
      negative |= stride < 0;
      broadcast |= stride == 0;
      padded |= stride % 5 != 0;
    }
  }
  EXPECT_TRUE(negative && broadcast && padded);
}

TEST(Tensor, CanariesTellOfWritesBesideTheRows) {
  const layout padded{.padding = 1};
  const auto write = [&](std::int64_t offset) {
    tensor<float> t({1, 1, 2, 3}, padded);
    t.fill(1);
    t.row(0, 0, 0)[offset] = 1;
    return t.canaries_intact();
  };
  EXPECT_TRUE(write(2));
  EXPECT_FALSE(write(3)) << "between the rows";
  EXPECT_FALSE(write(-1)) << "before the first";
  EXPECT_FALSE(write(7)) << "after the last";
}

TEST(Tensor, StartsAsCanaries) {
  const tensor<double> t({1, 1, 1, 1});
  EXPECT_TRUE(std::isnan(*t.row(0, 0, 0)));
}

}  // namespace
}  // namespace cca::test
