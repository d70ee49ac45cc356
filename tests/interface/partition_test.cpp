// Who sees what: every number of the partition against the rules of the paper, spelled out token by token.

#include <gtest/gtest.h>

#include <algorithm>
#include <cca/partition.hpp>
#include <cstdint>
#include <vector>

namespace cca { namespace {

constexpr std::int64_t exhaustive = 40;

/// The rule in words: of the `n = t + 1` tokens that the query may see the last `window` are raw; a group whose tokens
/// all come before those is seen as a core, and every other token raw.
bool core_is_seen(std::int64_t b, std::int64_t t, std::int64_t g, std::int64_t s) {
  for (std::int64_t token = b * g; token < (b + 1) * g; ++token)
    if (token >= t + 1 - s) return false;
  return true;
}

class Exhaustive : public testing::Test {
 protected:
  /// Calls `f(partition, t)` for all group sizes, windows and positions, some before the sequence.
  template <class F>
  static void for_all(const F& f) {
    for (std::int64_t g = 1; g <= exhaustive; ++g)
      for (std::int64_t s = 1; s <= exhaustive; ++s)
        for (std::int64_t t = -3; t < exhaustive; ++t) {
          f(partition{g, s}, t);
          if (HasFailure()) FAIL() << "group size " << g << ", window " << s << ", position " << t;
        }
  }
};

TEST_F(Exhaustive, CoresAreThoseOfTheRule) {
  for_all([](const partition& p, std::int64_t t) {
    for (std::int64_t b = 0; b <= exhaustive; ++b)
      ASSERT_EQ(b < p.core_count(t), core_is_seen(b, t, p.group_size, p.window)) << "group " << b;
  });
}

TEST_F(Exhaustive, EveryTokenIsSeenExactlyOnce) {
  for_all([](const partition& p, std::int64_t t) {
    std::vector<int> times(2 * exhaustive);
    for (std::int64_t b = 0; b < p.core_count(t); ++b)
      for (std::int64_t j = p.group(b).begin; j < p.group(b).end; ++j) ++times.at(static_cast<std::size_t>(j));
    for (std::int64_t j = p.raw(t).begin; j < p.raw(t).end; ++j) ++times.at(static_cast<std::size_t>(j));
    for (std::int64_t j = 0; j < std::ssize(times); ++j)
      ASSERT_EQ(times[static_cast<std::size_t>(j)], j <= t ? 1 : 0) << "token " << j;
  });
}

TEST_F(Exhaustive, CoreCountIsTheFormula) {
  for_all([](const partition& p, std::int64_t t) {
    const std::int64_t before_window = t + 1 - p.window;
    std::int64_t floor = 0;
    while ((floor + 1) * p.group_size <= before_window) ++floor;
    ASSERT_EQ(p.core_count(t), floor);
  });
}

TEST_F(Exhaustive, RawPartIsAWindowAndLessThanAGroup) {
  for_all([](const partition& p, std::int64_t t) {
    const std::int64_t n = t + 1, size = p.raw(t).size();
    if (n < p.window) {
      ASSERT_EQ(size, n < 0 ? 0 : n);
    } else {
      ASSERT_GE(size, p.window);
      ASSERT_LE(size, p.window + p.group_size - 1);
    }
  });
}

TEST_F(Exhaustive, NothingIsForgottenAsPositionsGrow) {
  for_all([](const partition& p, std::int64_t t) {
    ASSERT_GE(p.core_count(t + 1), p.core_count(t));
    ASSERT_LE(p.core_count(t + 1), p.core_count(t) + 1);
    ASSERT_GE(p.raw(t + 1).begin, p.raw(t).begin);
    ASSERT_GE(p.raw(t + 1).end, p.raw(t).end);
  });
}

TEST_F(Exhaustive, CoresAreOfCompleteGroups) {
  for_all([](const partition& p, std::int64_t t) {
    ASSERT_LE(p.core_count(t), p.group_count(std::max<std::int64_t>(t + 1, 0)));
    ASSERT_LE(p.group(p.group_count(exhaustive) - 1).end, exhaustive);
    ASSERT_GT(p.group(p.group_count(exhaustive)).end, exhaustive);
  });
}

TEST(Partition, FirstQueryIsWhereTheCoreTakesOver) {
  for (std::int64_t g = 1; g <= exhaustive; ++g)
    for (std::int64_t s = 1; s <= exhaustive; ++s)
      for (std::int64_t b = 0; b <= exhaustive; ++b) {
        const partition p{g, s};
        ASSERT_FALSE(core_is_seen(b, p.first_query(b) - 1, g, s)) << g << " " << s << " " << b;
        ASSERT_TRUE(core_is_seen(b, p.first_query(b), g, s)) << g << " " << s << " " << b;
      }
}

/// Nothing is pooled: the window slides, and what is behind it is not seen.
TEST(Partition, WithoutGroupsTheWindowIsAll) {
  for (const std::int64_t s : {std::int64_t{1}, std::int64_t{2}, std::int64_t{7}, exhaustive, unlimited})
    for (std::int64_t t = -3; t < exhaustive; ++t) {
      const partition p{0, s};
      EXPECT_EQ(p.core_count(t), 0);
      EXPECT_EQ(p.group_count(t + 3), 0);
      for (std::int64_t j = 0; j <= exhaustive; ++j)
        EXPECT_EQ(p.raw(t).contains(j), j <= t && t - j < s) << "token " << j << ", position " << t << ", window " << s;
    }
}

TEST(Partition, FirstQueryBeyondATokenSeesNoneBeforeItRaw) {
  for (const std::int64_t g : {0, 1, 2, 3, 7, 16})
    for (std::int64_t s = 1; s <= exhaustive; ++s)
      for (std::int64_t token = 0; token <= exhaustive; ++token) {
        const partition p{g, s};
        const std::int64_t t = p.first_query_beyond(token);
        ASSERT_GE(p.raw(t).begin, token) << g << " " << s << " " << token;
        ASSERT_TRUE(t == 0 || p.raw(t - 1).begin < token) << g << " " << s << " " << token;
      }
}

TEST(Partition, PairCountIsTheSumOverQueries) {
  for (std::int64_t g = 1; g <= exhaustive; g += 3)
    for (std::int64_t s = 1; s <= exhaustive; ++s)
      for (std::int64_t begin = 0; begin < exhaustive; begin += 7) {
        std::int64_t pairs = 0;
        for (std::int64_t t = begin; t < exhaustive; ++t) {
          std::int64_t cores = 0;
          while (core_is_seen(cores, t, g, s)) ++cores;
          pairs += cores + t + 1 - cores * g;
        }
        ASSERT_EQ((partition{g, s}.pair_count({begin, exhaustive})), pairs) << g << " " << s << " " << begin;
      }
  EXPECT_EQ((partition{}.pair_count({0, 1000})), 1000 * 1001 / 2);
  EXPECT_EQ((partition{}.pair_count({5, 5})), 0);
}

/// Positions repeat: `k` groups later there are `k` more cores and the same raw part, however far away.
TEST(Partition, PositionsMayBeHuge) {
  for (const std::int64_t far :
       {std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 40, std::int64_t{1} << 61})
    for (const std::int64_t g : {1, 2, 7, 16, 1000})
      for (const std::int64_t s : {1, 2, 15, 16, 17, 1024})
        for (std::int64_t t = s; t < s + 2 * g && t < s + 40; ++t) {
          const partition p{g, s};
          const std::int64_t groups = far / g, shift = groups * g;
          ASSERT_EQ(p.core_count(t + shift), p.core_count(t) + groups) << g << " " << s << " " << t << " + " << shift;
          ASSERT_EQ(p.raw(t + shift).begin, p.raw(t).begin + shift);
          ASSERT_EQ(p.raw(t + shift).end, t + shift + 1);
        }
}

TEST(Partition, WindowsAndGroupsMayBeHuge) {
  constexpr std::int64_t huge = std::int64_t{1} << 40;
  for (std::int64_t offset = -5; offset <= 5; ++offset) {
    EXPECT_EQ((partition{1, huge}.core_count(huge - 1 + offset)), std::max<std::int64_t>(offset, 0));
    EXPECT_EQ((partition{huge, 3}.core_count(huge + 2 + offset)), offset >= 0 ? 1 : 0);
    EXPECT_EQ((partition{7, unlimited}.raw(huge + offset)), (range{0, huge + offset + 1}));
  }
}

TEST(Range, SizeIsNeverNegative) {
  EXPECT_EQ((range{3, 5}.size()), 2);
  EXPECT_EQ((range{5, 3}.size()), 0);
  EXPECT_TRUE((range{5, 3}.empty()));
  EXPECT_TRUE((range{3, 3}.empty()));
  EXPECT_FALSE((range{3, 4}.empty()));
}

TEST(Range, IsASetOfTokens) {
  for (std::int64_t i = 0; i < 6 * 6 * 6 * 6; ++i) {
    const range a{i % 6, i / 6 % 6}, b{i / 36 % 6, i / 216};
    const range both = intersection(a, b), either = hull(a, b);
    for (std::int64_t x = -1; x < 8; ++x) {
      EXPECT_EQ(both.contains(x), a.contains(x) && b.contains(x));
      const bool between = (a.contains(x) || b.contains(x)) ||
                           (a.size() && b.size() && std::min(a.begin, b.begin) <= x && x < std::max(a.end, b.end));
      EXPECT_EQ(either.contains(x), between);
    }
  }
}

// All of it is there at compile time: groups of 2, a window of 3, the 8th token.
static_assert(partition{2, 3}.core_count(7) == 2);
static_assert(partition{2, 3}.raw(7) == range{4, 8});
static_assert(partition{2, 3}.group(1) == range{2, 4});
static_assert(partition{2, 3}.group_count(9) == 4);
static_assert(partition{2, 3}.pair_count({0, 8}) == 1 + 2 + 3 + 4 + (1 + 3) + (1 + 4) + (2 + 3) + (2 + 4));
static_assert(partition{}.core_count(1000) == 0, "by default nothing is pooled");
static_assert(intersection({0, 5}, {3, 9}) == range{3, 5});
static_assert(hull({0, 2}, {5, 6}) == range{0, 6});
static_assert(shifted({2, 5}, 3) == range{5, 8});

}}  // namespace cca
