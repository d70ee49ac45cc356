// Who sees what: every number of the partition against the rules of the paper, spelled out token by token.

#include <gtest/gtest.h>

#include <algorithm>
#include <cca/partition.hpp>
#include <cstdint>
#include <vector>

namespace cca { namespace {

constexpr std::int64_t exhaustive = 40;

constexpr std::int64_t sink_counts[] = {0, 1, 5, exhaustive};

/// The rule in words: of the `n = t + 1` tokens that the query may see the first `sink_tokens` and the last `window` are
/// raw; a group behind the former whose tokens all come before the latter is seen as a core, and every other token raw.
bool core_is_seen(std::int64_t b, std::int64_t t, const partition& p) {
  const std::int64_t first = p.sink_tokens + b * p.group_size;
  for (std::int64_t token = first; token < first + p.group_size; ++token)
    if (token >= t + 1 - p.window) return false;
  return true;
}

class Exhaustive : public testing::Test {
 protected:
  /// Calls `f(partition, t)` for all group sizes, windows, sink tokens and positions, some before the sequence.
  template <class F>
  static void for_all(const F& f) {
    for (std::int64_t g = 1; g <= exhaustive; ++g)
      for (std::int64_t s = 1; s <= exhaustive; ++s)
        for (const std::int64_t m : sink_counts)
          for (std::int64_t t = -3; t < exhaustive; ++t) {
            f(partition{g, s, m}, t);
            if (HasFailure())
              FAIL() << "group size " << g << ", window " << s << ", sink tokens " << m << ", position " << t;
          }
  }
};

TEST_F(Exhaustive, CoresAreThoseOfTheRule) {
  for_all([](const partition& p, std::int64_t t) {
    for (std::int64_t b = 0; b <= exhaustive; ++b)
      ASSERT_EQ(b < p.core_count(t), core_is_seen(b, t, p)) << "group " << b;
  });
}

TEST_F(Exhaustive, EveryTokenIsSeenExactlyOnce) {
  for_all([](const partition& p, std::int64_t t) {
    std::vector<int> times(3 * exhaustive);
    for (std::int64_t j = p.sinks(t).begin; j < p.sinks(t).end; ++j) ++times.at(static_cast<std::size_t>(j));
    for (std::int64_t b = 0; b < p.core_count(t); ++b)
      for (std::int64_t j = p.group(b).begin; j < p.group(b).end; ++j) ++times.at(static_cast<std::size_t>(j));
    for (std::int64_t j = p.raw(t).begin; j < p.raw(t).end; ++j) ++times.at(static_cast<std::size_t>(j));
    for (std::int64_t j = 0; j < std::ssize(times); ++j)
      ASSERT_EQ(times[static_cast<std::size_t>(j)], j <= t ? 1 : 0) << "token " << j;
  });
}

TEST_F(Exhaustive, CoreCountIsTheFormula) {
  for_all([](const partition& p, std::int64_t t) {
    const std::int64_t before_window = t + 1 - p.sink_tokens - p.window;
    std::int64_t floor = 0;
    while ((floor + 1) * p.group_size <= before_window) ++floor;
    ASSERT_EQ(p.core_count(t), floor);
  });
}

TEST_F(Exhaustive, RawPartIsAWindowAndLessThanAGroup) {
  for_all([](const partition& p, std::int64_t t) {
    const std::int64_t n = t + 1 - p.sink_tokens, size = p.raw(t).size();
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
        const partition p{g, s, b % 7};
        ASSERT_FALSE(core_is_seen(b, p.first_query(b) - 1, p)) << g << " " << s << " " << b;
        ASSERT_TRUE(core_is_seen(b, p.first_query(b), p)) << g << " " << s << " " << b;
      }
}

/// Nothing is pooled: the window slides, and what is behind it is not seen.
TEST(Partition, RawQueriesSeeTheirGroupRaw) {
  for (const std::int64_t g : {1, 2, 5, 16})
    for (const std::int64_t s : {1, 2, 7, 30})
      for (const std::int64_t m : {0, 3})
        for (std::int64_t b = 0; b < 9; ++b) {
          const partition p{g, s, m};
          for (std::int64_t t = 0; t < 250; ++t)
            ASSERT_EQ(p.raw_queries(b).contains(t), intersection(p.raw(t), p.group(b)) == p.group(b))
                << g << " " << s << " " << m << " " << b << " " << t;
        }
}

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
      for (std::int64_t token = 0; token <= exhaustive; ++token)
        for (const std::int64_t m : sink_counts) {
          const partition p{g, s, m};
          const std::int64_t t = p.first_query_beyond(token);
          const auto before = [&](std::int64_t query) { return intersection(p.raw(query), {0, token}); };
          ASSERT_TRUE(before(t).empty()) << g << " " << s << " " << m << " " << token;
          ASSERT_TRUE(t == 0 || !before(t - 1).empty()) << g << " " << s << " " << m << " " << token;
        }
}

/// Every token is seen once that lies in the window, among the sink tokens at or before the query, or in the prefix; and
/// through `sinks` where it is one of the first of all.
TEST(Partition, WithoutGroupsTokensAreSeenByTheirPlaces) {
  for (const std::int64_t s : {std::int64_t{1}, std::int64_t{3}, std::int64_t{7}, exhaustive, unlimited})
    for (const std::int64_t m : {std::int64_t{0}, std::int64_t{2}, std::int64_t{9}, unlimited})
      for (const std::int64_t ahead : {std::int64_t{0}, std::int64_t{1}, std::int64_t{5}, unlimited})
        for (const std::int64_t prefix : {std::int64_t{0}, std::int64_t{1}, std::int64_t{6}, unlimited})
          for (std::int64_t t = -9; t < exhaustive; ++t)
            for (std::int64_t j = 0; j <= exhaustive; ++j) {
              const partition p{0, s, m, ahead, prefix};
              const bool first = j < std::max(m, prefix), near = j - t <= ahead && (j < m || t - j < s);
              ASSERT_EQ(p.sinks(t).contains(j), first && (near || j < prefix))
                  << s << " " << m << " " << ahead << " " << prefix << ", position " << t << ", token " << j;
              ASSERT_EQ(p.raw(t).contains(j), !first && near)
                  << s << " " << m << " " << ahead << " " << prefix << ", position " << t << ", token " << j;
              ASSERT_EQ(p.sink_count(exhaustive) > j, first && j < exhaustive);
              ASSERT_GE(p.raw(t + 1).begin, p.raw(t).begin);
              ASSERT_GE(p.raw(t + 1).end, p.raw(t).end);
            }
}

TEST(Partition, PairCountIsTheSumOverQueries) {
  for (std::int64_t g = 1; g <= exhaustive; g += 3)
    for (std::int64_t s = 1; s <= exhaustive; ++s)
      for (std::int64_t begin = 0; begin < exhaustive; begin += 7) {
        std::int64_t pairs = 0;
        for (std::int64_t t = begin; t < exhaustive; ++t) {
          std::int64_t cores = 0;
          while (core_is_seen(cores, t, partition{g, s})) ++cores;
          pairs += cores + t + 1 - cores * g;
        }
        ASSERT_EQ((partition{g, s}.pair_count({begin, exhaustive})), pairs) << g << " " << s << " " << begin;
      }
  EXPECT_EQ((partition{}.pair_count({0, 1000})), 1000 * 1001 / 2);
  EXPECT_EQ((partition{}.pair_count({5, 5})), 0);
  EXPECT_EQ((partition{0, unlimited, 0, unlimited}.pair_count({0, 10})), 10 * 10) << "bidirectional";
  EXPECT_EQ((partition{0, unlimited, 0, 0, 4}.pair_count({0, 10})), 10 * 11 / 2 + 3 + 2 + 1) << "a prefix";
  EXPECT_EQ((partition{0, 2, 3}.pair_count({0, 10})), 1 + 2 + 3 + 4 + 5 * 6) << "sink tokens";
  EXPECT_EQ((partition{2, 3, 1}.pair_count({8, 10})), (1 + 2 + 4) + (1 + 3 + 3)) << "sink tokens and cores";
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

/// Nothing overflows where options have no limit and positions are as far as they go.
TEST(Partition, LimitsMayBeMissing) {
  constexpr std::int64_t edge = std::int64_t{1} << 62;
  for (const std::int64_t t : {-edge, std::int64_t{-1}, std::int64_t{0}, std::int64_t{5}, edge}) {
    const partition wide{0, unlimited, 0, unlimited}, sunk{3, 2, unlimited}, all{0, 1, unlimited, unlimited, unlimited};
    EXPECT_EQ(wide.raw(t), (range{0, t < -1 ? t + 1 + unlimited : unlimited})) << t;
    EXPECT_EQ(sunk.core_count(t), 0);
    EXPECT_EQ(sunk.group_count(edge), 0);
    EXPECT_EQ(sunk.sinks(t), (range{0, std::max<std::int64_t>(t + 1, 0)}));
    EXPECT_TRUE(sunk.raw(t).empty());
    EXPECT_EQ(all.sinks(t), (range{0, unlimited}));
    EXPECT_TRUE(all.raw(t).empty());
    EXPECT_EQ((partition{0, 7, 2, 3}.raw(t).end), std::max<std::int64_t>(t + 4, 0));
  }
  EXPECT_EQ((partition{16, 5, 3}.core_count(edge)), (edge - 3 - 5 + 1) / 16);
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
