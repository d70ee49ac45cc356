// Across ranks: a caller's far rows, results that are merged, and decoding over a spread cache. Run by mpirun, see mpi.cmake.

#include "spread_checks.hpp"

namespace cca::test { namespace {

using T = float;

/// Far rows of every sequence, cut at the segments of tokens: which of them each segment has.
mpi::layout spread_far(random_engine& random, const spread_problem& p, std::vector<std::int64_t>& lengths) {
  std::vector<mpi::segment> all(p.layout.segments().begin(), p.layout.segments().end());
  for (std::size_t q = 0; q < p.lengths.size(); ++q) {
    std::int64_t next = 0;
    p.layout.for_each_holder(static_cast<std::int64_t>(q), {0, p.lengths[q]}, [&](std::int64_t i, range) {
      const std::int64_t rows = draw(random, 0, 2) == 0 ? 0 : draw(random, 1, 20);
      all[static_cast<std::size_t>(i)].tokens = {next, next + rows};
      next += rows;
    });
    lengths.push_back(next);
  }
  for (mpi::segment& s : all)
    if (s.tokens.end > lengths[static_cast<std::size_t>(s.sequence)]) s.tokens = {};
  for (std::size_t i = 0; i < all.size(); ++i)
    if (p.layout.segments()[i].tokens.empty()) all[i].tokens = {};
  return {p.layout.ranks(), lengths, all};
}

TEST(Ranks, AttendToFarRowsOfAll) {
  random_engine random(8);
  error_rule<T> out, lse;
  using count = std::int64_t;
  for (int repeat = 0; repeat < problems(25); ++repeat) {
    spread_problem p = random_problem(random, world().size());
    p.options.pool = pooling::last_query;
    p.options.core_heads = core_heads::per_query_head;
    p.options.core_bias = core_bias::none;
    p.options.pooling_scale = 1;
    const whole_operands<T> all(p, random);
    const own_operands<T> own(p, all, draw_from(random, all_ragged_layouts));
    std::vector<std::int64_t> rows;
    const mpi::layout of_rows = spread_far(random, p, rows);
    spread_problem far_problem{rows, of_rows};
    const bool biased = draw(random, 0, 1) == 0, comes = draw(random, 0, 2) == 0;
    const auto far_key = random_whole<T>(far_problem, p.kv_heads, p.dim, random),
               far_value = random_whole<T>(far_problem, p.kv_heads, p.value_dim, random),
               bias = random_whole<T>(far_problem, 1, 1, random);
    whole_tensor<count> seen = make_whole<count>(p, p.heads, 1), at = make_whole<count>(far_problem, 1, 1),
                        from = make_whole<count>(far_problem, 1, 1), until = make_whole<count>(far_problem, 1, 1);
    for (std::size_t q = 0; q < rows.size(); ++q) {
      seen[q].generate([&] { return draw(random, 0, rows[q]); });
      at[q].generate([&] { return draw(random, 0, 50); });
      from[q].generate([&] { return draw(random, 0, p.lengths[q]); });
      until[q].generate([&] { return draw(random, 0, 2 * p.lengths[q]); });
    }
    own_part<T> own_key(far_problem, p.kv_heads, p.dim, ragged_layout::packed),
        own_value(far_problem, p.kv_heads, p.value_dim, ragged_layout::packed),
        own_bias(far_problem, 1, 1, ragged_layout::packed);
    own_part<count> own_seen(p, p.heads, 1, ragged_layout::packed), own_at(far_problem, 1, 1, ragged_layout::packed),
        own_from(far_problem, 1, 1, ragged_layout::packed), own_until(far_problem, 1, 1, ragged_layout::packed);
    own_key.take(far_key), own_value.take(far_value), own_bias.take(bias);
    own_seen.take(seen), own_at.take(at), own_from.take(from), own_until.take(until);
    far_context<T> context{own_key.view(), own_value.view()};
    if (!comes || draw(random, 0, 1) == 0) context.seen = without_dim(own_seen.view());
    if (biased) context.bias = without_dim(own_bias.view());
    if (p.alibi) context.positions = without_dim(own_at.view());
    if (comes) {
      context.visible_from = without_dim(own_from.view());
      context.visible_until = without_dim(own_until.view());
    }
    const own_results<T> r(p, ragged_layout::packed);
    mpi::attend(over(p, draw(random, 0, 2) > 0), own.in, context, r.view(), p.options);
    const auto outs = r.out.whole(p), lses = r.lse.whole(p);
    if (world().rank() != 0) continue;
    std::ostringstream label;
    label << "problem " << repeat << ": " << p << ", far rows " << testing::PrintToString(rows);
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (p.lengths[q] == 0) continue;
      far_context<T> whole{far_key[q].view(), far_value[q].view()};
      if (context.seen.extent[1] > 0) whole.seen = without_dim(std::as_const(seen[q]).view());
      if (biased) whole.bias = without_dim(bias[q].view());
      if (p.alibi) whole.positions = without_dim(std::as_const(at[q]).view());
      if (comes) {
        whole.visible_from = without_dim(std::as_const(from[q]).view());
        whole.visible_until = without_dim(std::as_const(until[q]).view());
      }
      const auto plain = reference::attend<T>(all.sequence(p, q), whole, p.options);
      const auto exact = reference::attend<exact_type<T>>(all.sequence(p, q), whole, p.options);
      add_whole(out, outs[q], plain.out, exact.out, label.str());
      add_whole(lse, lses[q], plain.lse, exact.lse, label.str());
    }
  }
  if (world().rank() != 0) return;
  EXPECT_TRUE(out.holds());
  EXPECT_TRUE(lse.holds());
}

TEST(Ranks, AttendToSelectedRowsOfAll) {
  random_engine random(9);
  const std::int64_t ranks = world().size(), length = 40, block = 4, most = 3;
  const std::vector<std::int64_t> lengths{length};
  spread_problem p{lengths, mpi::layout::contiguous(ranks, lengths)};
  p.options.window = 5;
  const whole_operands<T> all(p, random);
  const own_operands<T> own(p, all, ragged_layout::packed);
  // Raw tokens as far rows: of every segment its own. A list for each query, of blocks before it.
  tensor<std::int64_t> blocks({1, p.heads, length, most});
  for_each_row(blocks.view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
    std::int64_t next = 0;
    for (std::int64_t i = 0; i < most; ++i) {
      next = next < 0 || draw(random, 0, 3) == 0 ? -1 : draw(random, next, next + 3);
      blocks.row(b, h, t)[i] = next >= length / block ? next = -1 : next;
      if (next >= 0) ++next;
    }
  });
  const range mine = p.layout.segments()[static_cast<std::size_t>(world().rank())].tokens;
  far_context<T> context{own.key.view(), own.value.view()}, whole{all.key[0].view(), all.value[0].view()};
  whole.selected = {blocks.view(), block, 1};
  context.selected = {std::as_const(blocks).view().slice(mine.begin, mine.size()), block, 1};
  const own_results<T> r(p, ragged_layout::packed);
  mpi::attend(over(p), own.in, context, r.view(), p.options);
  const auto outs = r.out.whole(p);
  if (world().rank() != 0) return;
  error_rule<T> rule;
  add_whole(rule, outs[0], reference::attend<T>(all.sequence(p, 0), whole, p.options).out,
            reference::attend<exact_type<T>>(all.sequence(p, 0), whole, p.options).out, "selected");
  EXPECT_TRUE(rule.holds());
}

/// Parts of a context on the ranks, some of them empty.
TEST(Ranks, MergeInTheirOrder) {
  random_engine random(10);
  const std::int64_t ranks = world().size(), batch = 2, heads = 3, queries = 5, dim = 7;
  std::vector<tensor<T>> outs;
  std::vector<tensor<T, 3>> lses;
  for (std::int64_t r = 0; r < ranks; ++r) {
    outs.push_back(tensor<T>({batch, heads, queries, dim}).randomize(random));
    lses.push_back(tensor<T, 3>({batch, heads, queries}).randomize(random, 5));
    for_each_row(lses.back().view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      if (draw(random, 0, 2) > 0 && i != 2) return;
      *lses.back().row(b, h, i) = -std::numeric_limits<T>::infinity();
      outs.back().row(b, h, i)[0] = std::numeric_limits<T>::quiet_NaN();
    });
  }
  const auto mine = static_cast<std::size_t>(world().rank());
  tensor<T> out({batch, heads, queries, dim}, bshd_layout);
  tensor<T, 3> lse({batch, heads, queries});
  mpi::merge(world(), cca::results{std::as_const(outs[mine]).view(), std::as_const(lses[mine]).view()},
             cca::results{out.view(), lse.view()});
  for_each_row(out.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    long double sum = 0;
    std::array<long double, dim> wanted{};
    for (std::int64_t r = 0; r < ranks; ++r) {
      const long double weight = std::exp(static_cast<long double>(*lses[static_cast<std::size_t>(r)].row(b, h, i)));
      sum += weight;
      for (std::size_t d = 0; d < wanted.size() && weight > 0; ++d)
        wanted[d] += weight * static_cast<long double>(outs[static_cast<std::size_t>(r)].row(b, h, i)[d]);
    }
    for (std::size_t d = 0; d < wanted.size(); ++d)
      EXPECT_NEAR(sum == 0 ? 0 : static_cast<double>(wanted[d] / sum), static_cast<double>(out.row(b, h, i)[d]), 1e-6);
    if (sum == 0)
      EXPECT_EQ(-std::numeric_limits<T>::infinity(), *lse.row(b, h, i));
    else
      EXPECT_NEAR(static_cast<double>(std::log(sum)), static_cast<double>(*lse.row(b, h, i)), 1e-5);
    std::array<T, dim> of_first{};
    std::copy_n(out.row(b, h, i), dim, of_first.begin());
    MPI_Bcast(of_first.data(), dim, MPI_FLOAT, 0, MPI_COMM_WORLD);
    EXPECT_EQ(0, std::memcmp(of_first.data(), out.row(b, h, i), sizeof of_first));
  });
}

/// As many rows in other sequences would be merged with those of others.
TEST(Ranks, MergeResultsOfTheSameLengths) {
  const bool odd = world().rank() + 1 == world().size();
  const std::array<std::int64_t, 2> usual{3, 5}, other{5, 3};
  const auto& lengths = odd ? other : usual;
  tensor<T> out({2, 3, 5, 4}), whole({2, 3, 5, 4});
  tensor<T, 3> lse({2, 3, 5});
  const std::string said = refusal([&] {
    mpi::merge(world(), cca::results{out.view().with_lengths(lengths), lse.view().with_lengths(lengths)},
               cca::results{whole.view().with_lengths(lengths)});
  });
  EXPECT_EQ(world().size() == 1
                ? "nothing"
                : "cca: lengths of out_part: got other ones on one rank and other ones on another, wants the "
                  "same on every rank",
            said);
}

TEST(Ranks, DecodeOverASpreadCache) { check_decoding<T, T, T>(11, problems(10)); }

/// A prompt on ranks of another order would go to the wrong ones.
TEST(Ranks, TakePromptsOfTheCachesRanksAlone) {
  random_engine random(15);
  MPI_Comm turned = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, 0, -world().rank(), &turned);
  {
    const mpi::communicator others(turned), again(MPI_COMM_WORLD);
    const std::int64_t ranks = world().size(), length = 20 * ranks;
    const std::vector<std::int64_t> lengths{length};
    spread_problem p{lengths, mpi::layout::contiguous(ranks, lengths)};
    p.options = {.group_size = 4, .window = 8};
    const whole_operands<T> all(p, random);
    const own_operands<T> own(p, all, ragged_layout::packed);
    const inputs<T> in{own.query.view(), own.key.view(), own.value.view()};
    mpi::kv_cache<T> cache(world(), {.heads = p.heads, .kv_heads = p.kv_heads, .dim = p.dim, .value_dim = p.value_dim},
                           p.options);
    const std::string said = refusal([&] { cache.append({others, p.layout}, in); });
    EXPECT_EQ(ranks == 1
                  ? "nothing"
                  : "cca: rank 0: ranks: got a communicator of other ranks, or in another order, wants the cache's "
                    "ranks in their order",
              said);
    EXPECT_EQ(ranks == 1 ? length : 0, cache.length());
    if (ranks == 1) return;
    // By another communicator of the same ranks messages are still the cache's own.
    world().received() = {};
    cache.append({again, p.layout}, in);
    EXPECT_EQ(length, cache.length());
    EXPECT_LT(0, world().received().cores);
    EXPECT_EQ(0, again.received().cores + again.received().raw + again.received().compared);
  }
  MPI_Comm_free(&turned);
}

/// Of slopes for each sequence, too: those of the last one count as those of the first.
TEST(Ranks, CompareSlopesOfEverySequence) {
  const std::int64_t batch = 3, heads = 2, dim = 4;
  random_engine random(16);
  mpi::kv_cache<T> cache(world(), {.batch = batch, .heads = heads, .kv_heads = heads, .dim = dim}, {.window = 8});
  const tensor<T> query = tensor<T>({batch, heads, 1, dim}).randomize(random);
  tensor<T> out({batch, heads, 1, dim});
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      tensor<T, 3> slopes({batch, heads, 1});
      slopes.fill(T(0.5));
      if (world().rank() + 1 == world().size()) *slopes.row(b, h, 0) = T(0.25);
      inputs<T> in{query.view(), query.view(), query.view()};
      in.alibi_slopes = std::as_const(slopes).view();
      const std::string said = refusal([&] { cache.attend(in, cca::results{out.view()}); });
      EXPECT_EQ(world().size() == 1, said == "nothing") << said;
      EXPECT_EQ(world().size() == 1, said.find("alibi_slopes") == std::string::npos) << said;
    }
}

}}  // namespace cca::test
