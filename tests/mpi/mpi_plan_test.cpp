// Who holds which tokens, who reads which, and what that costs: without MPI.

#include <cca/mpi/cost.hpp>
#include <cca/mpi/layout.hpp>
#include <cca/mpi/plan.hpp>

#include <gtest/gtest.h>

#include "layouts.hpp"

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <tuple>
#include <vector>

namespace cca::mpi { namespace {

using lengths = std::vector<std::int64_t>;

std::int64_t draw(std::mt19937_64& random, std::int64_t least, std::int64_t greatest) {
  return std::uniform_int_distribution<std::int64_t>(least, greatest)(random);
}

partition random_partition(std::mt19937_64& random) {
  partition by;
  by.group_size = draw(random, 0, 2) == 0 ? 0 : draw(random, 1, 9);
  by.window = by.group_size == 0 && draw(random, 0, 1) == 0 ? unlimited : draw(random, 1, 30);
  by.sink_tokens = draw(random, 0, 1) * draw(random, 0, 9);
  if (by.group_size == 0) {
    by.lookahead = draw(random, 0, 1) * draw(random, 0, 9);
    by.prefix = draw(random, 0, 1) * draw(random, 0, 20);
  }
  return by;
}

using token = std::tuple<std::int64_t, std::int64_t>;  // sequence, position

TEST(Layout, HelpersHoldEveryTokenOnce) {
  for (const std::int64_t ranks : {1, 2, 3, 7, 64})
    for (const lengths& all : {lengths{0}, lengths{1}, lengths{100, 7, 0, 33}, lengths{64}})
      for (const layout& of :
           {layout::contiguous(ranks, all), layout::head_to_tail(ranks, all), layout::concatenated(ranks, all)}) {
        std::set<token> held;
        std::int64_t total = 0;
        for (std::int64_t r = 0; r < ranks; ++r) total += of.tokens_of(r);
        for (const segment& s : of.segments())
          for (std::int64_t t = s.tokens.begin; t < s.tokens.end; ++t) EXPECT_TRUE(held.insert({s.sequence, t}).second);
        EXPECT_EQ(std::ssize(held), total);
        EXPECT_EQ(std::accumulate(all.begin(), all.end(), std::int64_t{0}), total);
      }
}

TEST(Layout, RefusesWhatIsNotHeldOnce) {
  const lengths ten{10};
  const auto make = [&](std::vector<segment> segments) { (void)layout(2, ten, segments); };
  EXPECT_NO_THROW(make({{0, 0, {0, 4}}, {1, 0, {4, 10}}}));
  EXPECT_NO_THROW(make({{0, 0, {4, 10}}, {1, 0, {0, 4}}, {1, 0, {3, 3}}}));
  EXPECT_THROW(make({{0, 0, {0, 4}}, {1, 0, {5, 10}}}), std::invalid_argument);
  EXPECT_THROW(make({{0, 0, {0, 4}}, {1, 0, {3, 10}}}), std::invalid_argument);
  EXPECT_THROW(make({{0, 0, {0, 4}}, {1, 0, {4, 9}}}), std::invalid_argument);
  EXPECT_THROW(make({{0, 0, {0, 11}}}), std::invalid_argument);
  EXPECT_THROW(make({{2, 0, {0, 10}}}), std::invalid_argument);
  EXPECT_THROW(make({{0, 1, {0, 10}}}), std::invalid_argument);
  EXPECT_THROW(make({{1, 0, {0, 4}}, {0, 0, {4, 10}}}), std::invalid_argument);
  EXPECT_THROW((void)layout::contiguous(0, ten), std::invalid_argument);
}

TEST(Layout, FingerprintsTellLayoutsApart) {
  std::set<std::int64_t> all;
  for (const std::int64_t ranks : {2, 3})
    for (const lengths& of : {lengths{10}, lengths{11}, lengths{5, 5}})
      for (const layout& l : {layout::contiguous(ranks, of), layout::head_to_tail(ranks, of)})
        EXPECT_TRUE(all.insert(l.fingerprint()).second);
}

/// What the queries see, and what groups are made of, is where they are; every group is pooled once.
TEST(Plan, HasWhatQueriesSee) {
  std::mt19937_64 random(1);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const std::int64_t ranks = draw(random, 1, 6);
    const lengths all{draw(random, 0, 90), draw(random, 0, 90)};
    const layout of = test::random_segments(random, ranks, all);
    const partition by = random_partition(random);
    const bool pooled = by.group_size > 0;
    const plan planned(of, by, pooled);
    std::vector<std::set<std::int64_t>> pooled_groups(all.size());
    for (std::int64_t i = 0; i < std::ssize(of.segments()); ++i) {
      const segment& s = of.segments()[static_cast<std::size_t>(i)];
      const segment_plan& p = planned[i];
      const range sequence{0, of.length(s.sequence)};
      std::set<std::int64_t> read_raw, read_sinks;
      planned.for_each_piece(i, [&](const piece& some) {
        EXPECT_EQ(i, some.reader);
        const segment& holder = of.segments()[static_cast<std::size_t>(some.holder)];
        EXPECT_EQ(s.sequence, holder.sequence);
        EXPECT_EQ(some.tokens, intersection(some.tokens, holder.tokens));
        for (std::int64_t t = some.tokens.begin; t < some.tokens.end; ++t)
          EXPECT_TRUE((some.in == piece::part::sinks ? read_sinks : read_raw).insert(t).second);
      });
      for (std::int64_t t = s.tokens.begin; t < s.tokens.end; ++t) {
        const range sinks = intersection(by.sinks(t), sequence), raw = intersection(by.raw(t), sequence);
        for (std::int64_t j = sinks.begin; j < sinks.end; ++j)
          EXPECT_TRUE(p.sinks.contains(j) && read_sinks.contains(j));
        for (std::int64_t j = raw.begin; j < raw.end; ++j) EXPECT_TRUE(p.raw.contains(j) && read_raw.contains(j));
        EXPECT_LE(pooled ? by.core_count(t) : 0, p.cores.end);
      }
      for (std::int64_t c = p.groups.begin; c < p.groups.end; ++c) {
        EXPECT_TRUE(pooled_groups[static_cast<std::size_t>(s.sequence)].insert(c).second);
        EXPECT_TRUE(s.tokens.contains(by.group(c).end - 1));
        EXPECT_EQ(by.group(c), intersection(by.group(c), p.raw)) << "a group that is not all there";
      }
      // No more than that travels: a window, a group and the sink tokens.
      const std::int64_t halo = pooled ? by.window + by.group_size + by.sink_tokens : unlimited / 2;
      EXPECT_LE(p.raw.size(), s.tokens.size() + halo);
    }
    for (std::size_t q = 0; q < all.size(); ++q)
      EXPECT_EQ(pooled ? by.core_count(all[q] - 1) : 0, std::ssize(pooled_groups[q]));
    for (std::int64_t i = 0; i < std::ssize(of.segments()); ++i) {
      const segment& s = of.segments()[static_cast<std::size_t>(i)];
      for (std::int64_t c = planned[i].groups.begin; c < planned[i].groups.end; ++c) {
        bool elsewhere = false;
        for (std::int64_t j = 0; j < std::ssize(of.segments()); ++j) {
          const segment& other = of.segments()[static_cast<std::size_t>(j)];
          elsewhere |= other.rank != s.rank && other.sequence == s.sequence && planned[j].cores.contains(c);
        }
        EXPECT_EQ(elsewhere, planned[i].sent.contains(c));
      }
    }
  }
}

/// Who sends a piece and who receives it list the same ones, in the same order.
TEST(Plan, SendersAndReceiversAgree) {
  std::mt19937_64 random(2);
  for (int repeat = 0; repeat < 200; ++repeat) {
    const std::int64_t ranks = draw(random, 1, 5);
    const lengths all{draw(random, 0, 60), draw(random, 0, 60)};
    const layout of = test::random_segments(random, ranks, all);
    const partition by = random_partition(random);
    const plan planned(of, by, by.group_size > 0);
    for (const bool cores : {false, true}) {
      const auto pieces_of = [&](std::int64_t r) { return cores ? planned.core_pieces_of(r) : planned.pieces_of(r); };
      const auto between = [&](const std::vector<piece>& pieces, std::int64_t from, std::int64_t to) {
        std::vector<std::tuple<std::int64_t, std::int64_t, int, std::int64_t, std::int64_t>> some;
        for (const piece& p : pieces)
          if (planned.rank_of(p.holder) == from && planned.rank_of(p.reader) == to)
            some.emplace_back(p.holder, p.reader, static_cast<int>(p.in), p.tokens.begin, p.tokens.end);
        return some;
      };
      for (std::int64_t from = 0; from < ranks; ++from)
        for (std::int64_t to = 0; to < ranks; ++to)
          EXPECT_EQ(between(pieces_of(from), from, to), between(pieces_of(to), from, to));
    }
    for (std::int64_t i = 0; i < std::ssize(of.segments()); ++i) {
      std::int64_t next = 0;
      planned.for_each_core_piece(i, [&](const piece& p) {
        EXPECT_EQ(next, p.tokens.begin);
        next = p.tokens.end;
        EXPECT_EQ(p.tokens, intersection(p.tokens, planned[p.holder].groups));
      });
      EXPECT_EQ(planned[i].cores.end, next);
    }
  }
}

/// All ranks together compute the scores of one process, and head-to-tail segments share them evenly.
TEST(Plan, CountsWorkAndRows) {
  const lengths all{4096};
  for (const partition by : {partition{.group_size = 16, .window = 256, .sink_tokens = 4}, partition{.group_size = 0}})
    for (const std::int64_t ranks : {2, 4, 8}) {
      const bool pooled = by.group_size > 0;
      const layout contiguous = layout::contiguous(ranks, all), balanced = layout::head_to_tail(ranks, all);
      for (const layout* of : {&contiguous, &balanced}) {
        const plan planned(*of, by, pooled);
        std::int64_t pairs = 0, most = 0;
        for (std::int64_t r = 0; r < ranks; ++r) {
          const auto of_rank = planned.pairs_of(r);
          pairs += of_rank.raw + of_rank.cores;
          most = std::max(most, of_rank.raw + of_rank.cores);
        }
        EXPECT_EQ(by.pair_count({0, all[0]}), pairs);
        EXPECT_LE(static_cast<double>(most * ranks), (of == &balanced ? 1.05 : 2) * static_cast<double>(pairs));
      }
      const auto received = plan(contiguous, by, pooled).received_by(1);
      const std::int64_t each = all[0] / ranks;
      if (pooled) {
        EXPECT_LE(received.raw, by.window + by.group_size + by.sink_tokens);
        EXPECT_GE(received.raw, std::min(by.window - 1, each));
      } else {
        EXPECT_EQ(each, received.raw);
        EXPECT_EQ(0, received.cores);
      }
    }
}

/// Counted token by token, for any layout: what every rank receives and computes, and how long the slowest takes.
TEST(Plan, CostsWhatIsCounted) {
  std::mt19937_64 random(3);
  // Of each a share that shows in the sum.
  const machine cluster{.pairs_per_second = 1e4, .bandwidth = 1e6, .latency = 1e-3};
  for (int repeat = 0; repeat < 200; ++repeat) {
    const std::int64_t ranks = draw(random, 1, 6);
    const lengths all{draw(random, 0, 90), draw(random, 1, 90)};
    const layout of = test::random_segments(random, ranks, all);
    const partition by = random_partition(random);
    options o{.group_size = by.group_size, .window = by.window, .sink_tokens = by.sink_tokens};
    o.lookahead = by.lookahead, o.prefix = by.prefix;
    if (by.group_size > 0 && draw(random, 0, 1) == 0) o.core_heads = core_heads::per_kv_head;
    const call_shape shape{.heads = 4, .kv_heads = 2, .dim = 3, .value_dim = 5, .element_bytes = 2, .core_bytes = 4};
    const std::int64_t pooled_heads = o.core_heads == core_heads::per_kv_head ? 2 : 4;
    const bool overlap = draw(random, 0, 1) == 0;
    const plan planned(of, by, by.group_size > 0);
    const auto rank_of_token = [&](std::int64_t q, std::int64_t t) {
      std::int64_t rank = -1;
      for (const segment& s : of.segments())
        if (s.sequence == q && s.tokens.contains(t)) rank = s.rank;
      return rank;
    };
    std::int64_t most_raw = 0, most_cores = 0, pairs_of_all = 0, pooled_of_all = 0, most_pairs = 0;
    double seconds = 0;
    const double log2_ranks = ranks == 1 ? 0 : ranks == 2 ? 1 : ranks <= 4 ? 2 : 3;
    for (std::int64_t r = 0; r < ranks; ++r) {
      std::int64_t raw_rows = 0, core_rows = 0, raw_pairs = 0, core_pairs = 0, pooled = 0;
      std::set<std::int64_t> senders;
      for (std::int64_t i = 0; i < std::ssize(of.segments()); ++i) {
        const segment& s = of.segments()[static_cast<std::size_t>(i)];
        const std::int64_t length = of.length(s.sequence);
        if (s.rank != r) continue;
        for (const range rows : {planned[i].sinks, planned[i].raw})
          for (std::int64_t t = rows.begin; t < rows.end; ++t)
            if (const std::int64_t from = rank_of_token(s.sequence, t); from != r) ++raw_rows, senders.insert(from);
        for (std::int64_t t = s.tokens.begin; t < s.tokens.end; ++t) {
          core_pairs += by.group_size > 0 ? by.core_count(t) : 0;
          for (std::int64_t j = 0; j < length; ++j) raw_pairs += by.sinks(t).contains(j) || by.raw(t).contains(j);
        }
      }
      for (std::int64_t q = 0; q < of.sequences() && by.group_size > 0; ++q)
        for (std::int64_t c = 0; by.group(c).end <= of.length(q); ++c) {
          bool seen = false, elsewhere = false;
          const std::int64_t at = rank_of_token(q, by.group(c).end - 1);
          for (std::int64_t t = 0; t < of.length(q); ++t)
            if (by.core_count(t) > c) seen = true, elsewhere |= rank_of_token(q, t) != at;
          if (at == r && seen) pooled += by.group_size;
          if (at != r && elsewhere) ++core_rows;
        }
      const auto of_messages = [&](double messages, std::int64_t bytes) {
        return messages * cluster.latency + static_cast<double>(bytes) / cluster.bandwidth;
      };
      const auto of_pairs = [&](std::int64_t pairs, std::int64_t heads) {
        return static_cast<double>(pairs * heads) / cluster.pairs_per_second;
      };
      const double halo = of_messages(static_cast<double>(senders.size()), raw_rows * 2 * 8 * 2);
      const double way = by.group_size > 0 ? of_messages(log2_ranks, core_rows * pooled_heads * 8 * 4) : 0;
      const double window = of_pairs(raw_pairs, 4);
      seconds = std::max(seconds, of_messages(2 * log2_ranks, 0) + halo + of_pairs(pooled, pooled_heads) +
                                      (overlap ? std::max(window, way) : window + way) + of_pairs(core_pairs, 4));
      most_raw = std::max(most_raw, raw_rows * 2 * 8 * 2);
      most_cores = std::max(most_cores, core_rows * pooled_heads * 8 * 4);
      most_pairs = std::max(most_pairs, raw_pairs + core_pairs);
      pairs_of_all += raw_pairs + core_pairs, pooled_of_all += pooled;
    }
    const call_cost cost = cost_of(of, o, shape, cluster, overlap);
    EXPECT_EQ(most_raw, cost.most_raw_bytes);
    EXPECT_EQ(most_cores, cost.most_core_bytes);
    EXPECT_NEAR(static_cast<double>(most_pairs * ranks) / static_cast<double>(pairs_of_all), cost.balance, 1e-12);
    EXPECT_NEAR(seconds, cost.seconds, 1e-12 * seconds);
    const double work = static_cast<double>(pairs_of_all * 4 + pooled_of_all * pooled_heads) / cluster.pairs_per_second;
    EXPECT_NEAR(work / static_cast<double>(ranks), cost.compute_seconds, 1e-12 * work);
    EXPECT_NEAR(cost.compute_seconds / seconds, cost.efficiency(), 1e-12);
  }
}

/// The bytes of large calls are those of the header's comment.
TEST(Plan, CostsWhatItsFormulasSay) {
  const lengths all{65536};
  const options o{.group_size = 16, .window = 1024, .sink_tokens = 4};
  const call_shape shape{.heads = 8, .kv_heads = 2, .dim = 64, .value_dim = 64, .element_bytes = 4, .core_bytes = 4};
  const std::int64_t row = 2 * 128 * 4;
  for (const std::int64_t ranks : {2, 8, 64}) {
    const layout of = layout::contiguous(ranks, all);
    const call_cost cost = cost_of(of, o, shape, {});
    EXPECT_EQ(all[0] / ranks * (ranks - 1) * row, cost.ring_bytes);
    // A window, the rest of a group and the sink tokens: before token 1024 r of 65536 / ranks there are 1024 + 15 - 4 of them.
    EXPECT_LE(cost.most_raw_bytes, (1024 + 16 + 4) * row);
    EXPECT_GE(cost.most_raw_bytes, 1024 * row);
    // L / g (1 - 1 / R), but for those of the last window, which no query sees.
    const std::int64_t cores = all[0] / 16 / ranks * (ranks - 1) * 8 * 128 * 4, unseen = (1024 / 16 + 1) * 8 * 128 * 4;
    EXPECT_LE(cost.most_core_bytes, cores);
    EXPECT_GE(cost.most_core_bytes, cores - unseen);
    options shared = o;
    shared.core_heads = core_heads::per_kv_head;
    EXPECT_EQ(cost.most_core_bytes, 4 * cost_of(of, shared, shape, {}).most_core_bytes);
  }
}

TEST(Plan, OfPoolingHasItsGroups) {
  const lengths all{103};
  const layout of = layout::contiguous(4, all);
  const partition by{.group_size = 7, .window = unlimited, .sink_tokens = 2};
  const plan planned = plan::of_pooling(of, by);
  std::int64_t next = 0;
  for (std::int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(next, planned[i].groups.begin);
    next = planned[i].groups.end;
    EXPECT_TRUE(planned[i].sinks.empty() && planned[i].cores.empty() && planned[i].sent.empty());
  }
  EXPECT_EQ(by.group_count(103), next);
}

}}  // namespace cca::mpi
