// Attention across ranks: what all of them together get is what one process gets. Run by mpirun, see mpi.cmake.

#include "ranks.hpp"

#include "executors.hpp"

namespace cca::test { namespace {

using T = float;

/// The results of a call, of all ranks.
std::pair<whole_tensor<T>, whole_tensor<T>> attend(const spread_problem& p, const own_operands<T>& operands,
                                                   ragged_layout memory, bool overlap, const any_executor& run = {}) {
  const own_results<T> r(p, memory);
  mpi::attention(over(p, overlap), operands.in, r.view(), p.options, run);
  EXPECT_TRUE(r.out.canaries_intact());
  EXPECT_TRUE(r.lse.canaries_intact());
  return {r.out.whole(p), r.lse.whole(p)};
}

TEST(Ranks, GetWhatTheTextbookSays) {
  random_engine random(1);
  error_rule<T> out, lse;
  for (int repeat = 0; repeat < problems(40); ++repeat) {
    const spread_problem p = random_problem(random, world().size());
    const whole_operands<T> all(p, random);
    const ragged_layout memory = draw_from(random, all_ragged_layouts);
    const own_operands<T> own(p, all, memory);
    const auto [outs, lses] = attend(p, own, memory, draw(random, 0, 2) > 0);
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    if (world().rank() != 0) continue;
    error_rule<T> out_of_one;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (p.lengths[q] == 0) continue;
      const auto plain = reference::attention<T>(all.sequence(p, q), p.options);
      const auto exact = reference::attention<exact_type<T>>(all.sequence(p, q), p.options);
      for (error_rule<T>* rule : {&out, &out_of_one}) add_whole(*rule, outs[q], plain.out, exact.out, label.str());
      add_whole(lse, lses[q], plain.lse, exact.lse, label.str());
    }
  }
  if (world().rank() != 0) return;
  EXPECT_TRUE(out.holds());
  EXPECT_TRUE(lse.holds());
}

/// Numbers that all ranks have: on each the same, to the bit.
void expect_same_on_all_ranks(const tensor<T, 3>& numbers) {
  for_each_row(numbers.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    T first = *numbers.row(b, h, i);
    MPI_Bcast(&first, 1, MPI_FLOAT, 0, MPI_COMM_WORLD);
    EXPECT_TRUE(same_bits(first, *numbers.row(b, h, i)));
  });
}

/// All gradients of a problem.
struct spread_gradient {
  own_part<T> query, key, value, sinks_per_query, key_bias;
  tensor<T, 3> sinks, slopes;

  spread_gradient(const spread_problem& p, ragged_layout memory)
      : query(p, p.heads, p.dim, memory),
        key(p, p.kv_heads, p.dim, memory),
        value(p, p.kv_heads, p.value_dim, memory),
        sinks_per_query(p, p.heads, 1, memory),
        key_bias(p, p.kv_heads, 1, memory),
        sinks({1, p.heads, 1}),
        slopes({1, p.heads, 1}) {}

  [[nodiscard]] gradients<T> view(const spread_problem& p) {
    gradients<T> to{query.view(), key.view(), value.view()};
    if (p.sink_logits) to.sink_logits = p.sinks_per_query ? without_dim(sinks_per_query.view()) : sinks.view();
    if (p.alibi) to.alibi_slopes = slopes.view();
    if (p.key_bias) to.key_bias = without_dim(key_bias.view());
    return to;
  }
};

TEST(Ranks, HaveTheGradientsThatTheTextbookSays) {
  random_engine random(2);
  std::array<error_rule<T>, 7> rules;
  for (int repeat = 0; repeat < problems(40); ++repeat) {
    const spread_problem p = random_problem(random, world().size());
    const whole_operands<T> all(p, random);
    const auto grad_out = random_whole<T>(p, p.heads, p.value_dim, random),
               grad_lse = random_whole<T>(p, p.heads, 1, random);
    const ragged_layout memory = draw_from(random, all_ragged_layouts);
    const own_operands<T> own(p, all, memory);
    const own_results<T> r(p, memory);
    own_results<T> incoming_gradients(p, memory);
    incoming_gradients.out.take(grad_out);
    incoming_gradients.lse.take(grad_lse);
    spread_gradient grad(p, memory);
    mpi::attention(over(p), own.in, r.view(), p.options);
    mpi::attention_gradient(over(p), own.in, r.view(),
                            incoming{incoming_gradients.view().out, incoming_gradients.view().lse}, grad.view(p),
                            p.options);
    for (const auto* part : {&grad.query, &grad.key, &grad.value, &grad.sinks_per_query, &grad.key_bias})
      EXPECT_TRUE(part->canaries_intact());
    const std::array got{grad.query.whole(p), grad.key.whole(p), grad.value.whole(p), grad.sinks_per_query.whole(p),
                         grad.key_bias.whole(p)};
    if (p.sink_logits && !p.sinks_per_query) expect_same_on_all_ranks(grad.sinks);
    if (p.alibi) expect_same_on_all_ranks(grad.slopes);
    if (world().rank() != 0) continue;
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    reference::tensor<T> sinks(1, p.heads, 1, 1), slopes(1, p.heads, 1, 1);
    reference::tensor<exact_type<T>> exact_sinks(1, p.heads, 1, 1), exact_slopes(1, p.heads, 1, 1);
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (p.lengths[q] == 0) continue;
      const incoming from{std::as_const(grad_out[q]).view(), without_dim(std::as_const(grad_lse[q]).view())};
      const auto plain = reference::attention_gradient<T>(all.sequence(p, q), from, p.options);
      const auto exact = reference::attention_gradient<exact_type<T>>(all.sequence(p, q), from, p.options);
      add_whole(rules[0], got[0][q], plain.query, exact.query, "query, " + label.str());
      add_whole(rules[1], got[1][q], plain.key, exact.key, "key, " + label.str());
      add_whole(rules[2], got[2][q], plain.value, exact.value, "value, " + label.str());
      if (p.sinks_per_query)
        add_whole(rules[3], got[3][q], plain.sink_logits, exact.sink_logits, "sinks, " + label.str());
      if (p.key_bias) add_whole(rules[4], got[4][q], plain.key_bias, exact.key_bias, "biases, " + label.str());
      const auto add = [&](auto& sum, const auto& one) {
        for (std::size_t i = 0; i < one.data.size(); ++i) sum.data[i] += one.data[i];
      };
      if (p.sink_logits && !p.sinks_per_query) add(sinks, plain.sink_logits), add(exact_sinks, exact.sink_logits);
      if (p.alibi) add(slopes, plain.alibi_slopes), add(exact_slopes, exact.alibi_slopes);
    }
    if (p.sink_logits && !p.sinks_per_query)
      rules[5].add(with_dim(std::as_const(grad.sinks).view()), std::as_const(sinks).view(),
                   std::as_const(exact_sinks).view(), label.str());
    if (p.alibi)
      rules[6].add(with_dim(std::as_const(grad.slopes).view()), std::as_const(slopes).view(),
                   std::as_const(exact_slopes).view(), label.str());
  }
  if (world().rank() != 0) return;
  for (const auto& rule : rules) EXPECT_TRUE(rule.holds());
}

TEST(Ranks, PoolEachItsOwnGroups) {
  random_engine random(3);
  std::array<error_rule<T>, 2> rules;
  for (int repeat = 0; repeat < problems(20); ++repeat) {
    spread_problem p = random_problem(random, world().size());
    p.options = {.group_size = draw(random, 1, 12), .sink_tokens = draw(random, 0, 9)};
    p.options.pool = draw_from(random, all_poolings);
    p.options.core_heads = draw_from(random, all_core_heads);
    p.sink_logits = p.alibi = p.key_bias = p.sinks_per_query = false;
    const whole_operands<T> all(p, random);
    const own_operands<T> own(p, all, draw_from(random, all_ragged_layouts));
    // The cores of a rank are a problem of their own, whose tokens are groups.
    const mpi::plan planned = mpi::plan::of_pooling(p.layout, partition_of(p.options));
    std::vector<mpi::segment> segments(p.layout.segments().begin(), p.layout.segments().end());
    for (std::size_t i = 0; i < segments.size(); ++i) segments[i].tokens = planned[static_cast<std::int64_t>(i)].groups;
    std::vector<std::int64_t> groups;
    for (const std::int64_t length : p.lengths) groups.push_back(partition_of(p.options).group_count(length));
    const spread_problem of_cores{groups, mpi::layout(world().size(), groups, segments)};
    const std::int64_t heads = detail::core_head_count(p.options, p.heads, p.kv_heads);
    const own_part<T> key(of_cores, heads, p.dim, ragged_layout::packed),
        value(of_cores, heads, p.value_dim, ragged_layout::packed);
    mpi::pool(over(p), own.in, cores{key.view(), value.view()}, p.options);
    EXPECT_TRUE(key.canaries_intact() && value.canaries_intact());
    const auto keys = key.whole(of_cores), values = value.whole(of_cores);
    if (world().rank() != 0) continue;
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (groups[q] == 0) continue;
      const auto plain = reference::pool<T>(all.query[q].view(), all.key[q].view(), all.value[q].view(), p.options);
      const auto exact =
          reference::pool<exact_type<T>>(all.query[q].view(), all.key[q].view(), all.value[q].view(), p.options);
      add_whole(rules[0], keys[q], plain.first, exact.first, label.str());
      add_whole(rules[1], values[q], plain.second, exact.second, label.str());
    }
  }
  if (world().rank() != 0) return;
  for (const auto& rule : rules) EXPECT_TRUE(rule.holds());
}

/// A problem whose segments begin at multiples of 64, where tiles of queries do, in any order on any ranks.
spread_problem problem_of_tiles(random_engine& random) {
  const std::int64_t ranks = world().size();
  std::vector<std::int64_t> lengths{draw(random, 200, 500), draw(random, 64, 200)};
  std::vector<mpi::segment> all;
  for (std::size_t q = 0; q < lengths.size(); ++q)
    for (std::int64_t begin = 0; begin < lengths[q];) {
      std::int64_t end = begin + 64 * draw(random, 1, 3);
      if (lengths[q] - end <= detail::most_few_queries) end = lengths[q];
      all.push_back({draw(random, 0, ranks - 1), static_cast<std::int64_t>(q), {begin, end}});
      begin = end;
    }
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.rank < b.rank; });
  spread_problem p = random_problem(random, ranks);
  return {lengths,
          mpi::layout(ranks, lengths, all),
          p.heads,
          p.kv_heads,
          p.dim,
          p.value_dim,
          p.options,
          p.sink_logits,
          p.sinks_per_query,
          p.alibi,
          p.key_bias};
}

TEST(Ranks, GetTheBitsOfOneProcessWhereTilesAreTheSame) {
  random_engine random(4);
  for (int repeat = 0; repeat < problems(15); ++repeat) {
    const spread_problem p = problem_of_tiles(random);
    const whole_operands<T> all(p, random);
    const own_operands<T> own(p, all, draw_from(random, all_ragged_layouts));
    const own_results<T> r(p, ragged_layout::packed);
    mpi::attention(over(p, false), own.in, r.view(), p.options);
    std::vector<results<T>> one;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      one.push_back({tensor<T>({1, p.heads, p.lengths[q], p.value_dim}), tensor<T, 3>({1, p.heads, p.lengths[q]})});
      attention(all.sequence(p, q), cca::results{one.back().out.view(), one.back().lse.view()}, p.options);
    }
    std::int64_t differences = 0;
    r.out.each([&](const T* mine, std::int64_t q, std::int64_t h, std::int64_t t) {
      differences += std::memcmp(mine, one[static_cast<std::size_t>(q)].out.row(0, h, t),
                                 sizeof(T) * static_cast<std::size_t>(p.value_dim)) != 0;
    });
    r.lse.each([&](const T* mine, std::int64_t q, std::int64_t h, std::int64_t t) {
      differences += !same_bits(*mine, *one[static_cast<std::size_t>(q)].lse.row(0, h, t));
    });
    EXPECT_EQ(0, differences) << p;
  }
}

/// Both passes, with any executor.
TEST(Ranks, GetTheSameBitsForAnyNumberOfThreads) {
  random_engine random(5);
  for (int repeat = 0; repeat < problems(4); ++repeat) {
    const spread_problem p = random_problem(random, world().size());
    const whole_operands<T> all(p, random);
    const own_operands<T> own(p, all, ragged_layout::packed);
    const own_results<T> r(p, ragged_layout::packed);
    spread_gradient grad(p, ragged_layout::packed);
    mpi::attention(over(p), own.in, r.view(), p.options);
    const auto differentiate = [&](const own_results<T>& of, spread_gradient& to, const any_executor& run) {
      mpi::attention_gradient(over(p), own.in, of.view(), incoming{of.view().out}, to.view(p), p.options, run);
    };
    differentiate(r, grad, {});
    const auto all_executors = executors();
    for (const std::size_t e : {std::size_t{1}, std::size_t{6}, all_executors.size() - 2}) {
      const any_executor& run = all_executors[e].run;
      const std::string& name = all_executors[e].name;
      const own_results<T> again(p, ragged_layout::packed);
      spread_gradient grad_again(p, ragged_layout::packed);
      mpi::attention(over(p), own.in, again.view(), p.options, run);
      differentiate(again, grad_again, run);
      const auto expect_same = [&](const auto& a, const auto& b) {
        const auto same = same_bits(a.view(), b.view());
        EXPECT_TRUE(same) << name << ", " << p;
      };
      expect_same(again.out, r.out);
      expect_same(again.lse, r.lse);
      expect_same(grad_again.query, grad.query);
      expect_same(grad_again.key, grad.key);
      expect_same(grad_again.value, grad.value);
      if (p.sink_logits && !p.sinks_per_query) expect_same(grad_again.sinks, grad.sinks);
      if (p.alibi) expect_same(grad_again.slopes, grad.slopes);
    }
  }
}

/// What is in a token shows where it is seen, on whatever rank that is, and nowhere else.
TEST(Ranks, SeeNothingOfWhatIsUnseen) {
  random_engine random(6);
  for (int repeat = 0; repeat < problems(12); ++repeat) {
    spread_problem p = random_problem(random, world().size());
    p.options.pool = pooling::last_query;  // a NaN stays where it is seen
    if (!detail::pools(p.options)) p.options.core_bias = core_bias::none;
    whole_operands<T> all(p, random);
    const own_results<T> before(p, ragged_layout::packed), after(p, ragged_layout::packed);
    mpi::attention(over(p), own_operands<T>(p, all, ragged_layout::packed).in, before.view(), p.options);
    const std::size_t q = static_cast<std::size_t>(draw(random, 0, std::ssize(p.lengths) - 1));
    if (p.lengths[q] == 0) continue;
    const std::int64_t poisoned = draw(random, 0, p.lengths[q] - 1);
    for (std::int64_t h = 0; h < p.kv_heads; ++h) {
      std::fill_n(all.key[q].row(0, h, poisoned), p.dim, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(all.value[q].row(0, h, poisoned), p.value_dim, std::numeric_limits<T>::quiet_NaN());
    }
    mpi::attention(over(p), own_operands<T>(p, all, ragged_layout::padded).in, after.view(), p.options);
    const partition by = partition_of(p.options);
    const auto sees = [&](std::int64_t t) {
      bool seen = by.sinks(t).contains(poisoned) || by.raw(t).contains(poisoned);
      for (std::int64_t c = 0; detail::pools(p.options) && c < by.core_count(t); ++c)
        seen |= by.group(c).contains(poisoned);
      return seen;
    };
    std::vector<const T*> rows;
    before.out.each([&](const T* mine, std::int64_t, std::int64_t, std::int64_t) { rows.push_back(mine); });
    std::size_t next = 0;
    std::int64_t wrong = 0;
    after.out.each([&](const T* mine, std::int64_t of, std::int64_t, std::int64_t t) {
      const T* was = rows[next++];
      if (static_cast<std::size_t>(of) == q && sees(t))
        wrong += !std::isnan(mine[0]);
      else
        wrong += std::memcmp(mine, was, sizeof(T) * static_cast<std::size_t>(p.value_dim)) != 0;
    });
    EXPECT_EQ(0, wrong) << "token " << poisoned << " of sequence " << q << ", " << p;
  }
}

/// What a call throws, which is the same on every rank.
template <class Call>
std::string refusal(const Call& call) {
  std::string said = "nothing";
  try {
    call();
  } catch (const std::exception& why) {
    said = why.what();
  }
  std::array<char, 1200> of_first{};
  std::copy_n(said.begin(), std::min(said.size(), of_first.size() - 1), of_first.begin());
  MPI_Bcast(of_first.data(), static_cast<int>(of_first.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
  EXPECT_EQ(of_first.data(), said) << "on rank " << world().rank();
  return said;
}

TEST(Ranks, RefuseAlikeWhereTheyDisagree) {
  random_engine random(7);
  const std::int64_t ranks = world().size(), last = ranks - 1;
  const bool odd = world().rank() == last;  // the one that differs
  spread_problem p{{40}, mpi::layout::contiguous(ranks, std::vector<std::int64_t>{40})};
  p.options = {.group_size = 4, .window = 8};
  const whole_operands<T> all(p, random);
  const own_operands<T> own(p, all, ragged_layout::packed);
  const own_results<T> r(p, ragged_layout::packed);
  const auto with = [&](const options& o) { return refusal([&] { mpi::attention(over(p), own.in, r.view(), o); }); };
  const auto expect = [&](const std::string& said, const std::string& name) {
    EXPECT_NE(std::string::npos, said.find(name)) << said;
    EXPECT_TRUE(r.out.canaries_intact());
  };
  // One rank cannot differ from itself.
  const auto disagree = [&](const std::string& said, const std::string& name) {
    if (ranks > 1) return expect(said, name);
    EXPECT_EQ("nothing", said);
  };
  options o = p.options;
  o.window += odd;
  disagree(with(o), "cca: options.window: got 8 on one rank and 9 on another, wants the same on every rank");
  o = p.options;
  if (odd) o.softmax_scale = 0.5;
  disagree(with(o), "options.softmax_scale: got none on one rank and given on another");
  o = p.options;
  o.softcap = odd ? 2.5 : 2;
  disagree(with(o), "options.softcap: got 2 on one rank and 2.5 on another");
  o = p.options;
  if (odd) o.pool = pooling::mean;
  disagree(with(o), "options.pool: got last_query on one rank and mean on another");
  disagree(refusal([&] { mpi::attention(over(p, !odd), own.in, r.view(), p.options); }), "overlap");

  // Another function, other elements, other heads, other numbers.
  if (ranks > 1)
    expect(refusal([&] {
             if (odd) {
               spread_gradient grad(p, ragged_layout::packed);
               mpi::attention_gradient(over(p), own.in, r.view(), incoming{r.view().out}, grad.view(p), p.options);
             } else {
               mpi::attention(over(p), own.in, r.view(), p.options);
             }
           }),
           "cca: call: got different functions on different ranks, wants the same call on every rank");
  tensor<T, 3> logits({1, p.heads, 1});
  logits.fill(odd ? T(2) : T(1));
  disagree(refusal([&] {
             inputs<T> in = own.in;
             in.sink_logits = logits.view();
             mpi::attention(over(p), in, r.view(), p.options);
           }),
           "sink_logits");
  disagree(refusal([&] {
             inputs<T> in = own.in;
             if (odd) in.alibi_slopes = logits.view();
             mpi::attention(over(p), in, r.view(), p.options);
           }),
           "alibi_slopes: got none on one rank and given on another");
  std::vector<mpi::segment> moved(p.layout.segments().begin(), p.layout.segments().end());
  if (ranks > 1 && world().rank() == 0) moved[0].tokens.end = moved[1].tokens.begin = 9;
  const mpi::layout other(ranks, p.lengths, moved);
  if (ranks > 1)
    expect(refusal([&] { mpi::attention({world(), other}, own.in, r.view(), p.options); }), "cca: rank 0: query: got ");

  // What one rank refuses, all do, by its text.
  o = p.options;
  if (odd) o.window = 0;
  expect(with(o), "cca: rank " + std::to_string(last) + ": options.window: got 0, wants at least 1");
  o.window = 8;
  o.first_position = 0;
  expect(with(o), "options.first_position");
  expect(refusal([&] {
           cca::results<T, T> to = r.view();
           if (odd) to.out.data = nullptr, to.out.extent[3] += 1;
           mpi::attention(over(p), own.in, to, p.options);
         }),
         "cca: rank " + std::to_string(last) + ": out: got");
  std::array<std::byte, 64> workspace;
  expect(refusal([&] {
           mpi::attention(over(p), own.in, r.view(), p.options, {serial_executor{}, workspace});
         }),
         "workspace: got 64 bytes, wants none");
  expect(refusal([&] {
           const mpi::layout of_more = mpi::layout::contiguous(ranks + 1, p.lengths);
           mpi::attention({world(), of_more}, own.in, r.view(), p.options);
         }),
         "layout: got one for");
  const std::vector<std::int64_t> longer{80};
  expect(refusal([&] {
           const mpi::layout of_more = mpi::layout::contiguous(ranks, longer);
           mpi::attention({world(), of_more}, own.in, r.view(), p.options);
         }),
         "query: got ");
  // And then they go on.
  EXPECT_EQ("nothing", with(p.options));
}

}}  // namespace cca::test
