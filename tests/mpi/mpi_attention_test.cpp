// Attention across ranks: what all of them together get is what one process gets. Run by mpirun, see mpi.cmake.

#include "spread_checks.hpp"

#include "executors.hpp"

#include <chrono>
#include <thread>

namespace cca::test { namespace {

using T = float;

TEST(Ranks, GetWhatTheTextbookSays) { check_attention<T, T>(1, problems(40)); }

TEST(Ranks, HaveTheGradientsThatTheTextbookSays) { check_gradients<T, T>(2, problems(40)); }

TEST(Ranks, PoolEachItsOwnGroups) {
  random_engine random(3);
  std::array<error_rule<T>, 2> rules;
  for (int repeat = 0; repeat < problems(20); ++repeat) {
    spread_problem p = random_problem(random, world().size());
    p.options = {.group_size = draw(random, 1, 12), .sink_tokens = draw(random, 0, 9)};
    p.options.pool = draw_from(random, group_poolings);
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
    spread_gradient<T> grad(p, ragged_layout::packed);
    mpi::attention(over(p), own.in, r.view(), p.options);
    const auto differentiate = [&](const own_results<T>& of, spread_gradient<T>& to, const any_executor& run) {
      mpi::attention_gradient(over(p), own.in, of.view(), incoming{of.view().out}, to.view(p), p.options, run);
    };
    differentiate(r, grad, {});
    const auto all_executors = executors();
    for (const std::size_t e : {std::size_t{1}, std::size_t{6}, all_executors.size() - 2}) {
      const any_executor& run = all_executors[e].run;
      const std::string& name = all_executors[e].name;
      const own_results<T> again(p, ragged_layout::packed);
      spread_gradient<T> grad_again(p, ragged_layout::packed);
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

TEST(Ranks, RefuseAlikeWhereTheyDisagree) {
  random_engine random(7);
  const std::int64_t ranks = world().size(), last = ranks - 1;
  const bool odd = world().rank() == last;  // the one that differs
  spread_problem p{{40}, mpi::layout::contiguous(ranks, std::vector<std::int64_t>{40})};
  p.options = {.group_size = 4, .window = 8};
  const whole_operands<T> all(p, random);
  const own_operands<T> own(p, all, ragged_layout::packed);
  // A call is refused before anything is written, or has written all.
  const auto expect = [&](const std::string& name, const auto& call) {
    const own_results<T> r(p, ragged_layout::packed);
    const std::string said = refusal([&] { call(r); });
    EXPECT_NE(std::string::npos, said.find(name)) << said;
    EXPECT_EQ(said != "nothing", r.out.untouched() && r.lse.untouched()) << said;
  };
  // One rank cannot differ from itself.
  const auto disagree = [&](const std::string& name, const auto& call) { expect(ranks > 1 ? name : "nothing", call); };
  const auto with = [&](const options& o) {
    return [&own, &p, o](const own_results<T>& r) { mpi::attention(over(p), own.in, r.view(), o); };
  };
  options o = p.options;
  o.window += odd;
  disagree("cca: options.window: got 8 on one rank and 9 on another, wants the same on every rank", with(o));
  o = p.options;
  if (odd) o.softmax_scale = 0.5;
  disagree("options.softmax_scale: got none on one rank and given on another", with(o));
  o = p.options;
  o.softcap = odd ? 2.5 : 2;
  disagree("options.softcap: got 2 on one rank and 2.5 on another", with(o));
  o = p.options;
  if (odd) o.pool = pooling::mean;
  disagree("options.pool: got last_query on one rank and mean on another", with(o));
  disagree("overlap", [&](const own_results<T>& r) { mpi::attention(over(p, !odd), own.in, r.view(), p.options); });

  // Another function, other elements, other heads, other numbers.
  disagree("cca: call: got different functions on different ranks, wants the same call on every rank",
           [&](const own_results<T>& r) {
             if (!odd || ranks == 1) return mpi::attention(over(p), own.in, r.view(), p.options);
             spread_gradient<T> grad(p, ragged_layout::packed);
             mpi::attention_gradient(over(p), own.in, r.view(), incoming{r.view().out}, grad.view(p), p.options);
           });
  tensor<T, 3> logits({1, p.heads, 1});
  logits.fill(odd ? T(2) : T(1));
  disagree("sink_logits", [&](const own_results<T>& r) {
    inputs<T> in = own.in;
    in.sink_logits = logits.view();
    mpi::attention(over(p), in, r.view(), p.options);
  });
  disagree("alibi_slopes: got none on one rank and given on another", [&](const own_results<T>& r) {
    inputs<T> in = own.in;
    if (odd) in.alibi_slopes = logits.view();
    mpi::attention(over(p), in, r.view(), p.options);
  });
  std::vector<mpi::segment> moved(p.layout.segments().begin(), p.layout.segments().end());
  if (ranks > 1 && world().rank() == 0) moved[0].tokens.end = moved[1].tokens.begin = 9;
  const mpi::layout other(ranks, p.lengths, moved);
  disagree("cca: rank 0: query: got ", [&](const own_results<T>& r) {
    mpi::attention({world(), other}, own.in, r.view(), p.options);
  });

  // What one rank refuses, all do, by its text.
  o = p.options;
  if (odd) o.window = 0;
  expect("cca: rank " + std::to_string(last) + ": options.window: got 0, wants at least 1", with(o));
  o.window = 8;
  o.first_position = 0;
  expect("options.first_position", with(o));
  o = p.options;
  o.pool = pooling::select_by_mass;
  expect("options.pool: got select_by_mass, wants another pooling across ranks", with(o));
  expect("cca: rank " + std::to_string(last) + ": out: got", [&](const own_results<T>& r) {
    cca::results<T, T> to = r.view();
    if (odd) to.out.data = nullptr, to.out.extent[3] += 1;
    mpi::attention(over(p), own.in, to, p.options);
  });
  std::array<std::byte, 64> workspace;
  expect("workspace: got 64 bytes, wants none", [&](const own_results<T>& r) {
    mpi::attention(over(p), own.in, r.view(), p.options, {serial_executor{}, workspace});
  });
  const std::vector<std::int64_t> longer{80};
  const mpi::layout of_more = mpi::layout::contiguous(ranks + 1, p.lengths),
                    of_longer = mpi::layout::contiguous(ranks, longer);
  expect("layout: got one for", [&](const own_results<T>& r) {
    mpi::attention({world(), of_more}, own.in, r.view(), p.options);
  });
  expect("query: got ", [&](const own_results<T>& r) {
    mpi::attention({world(), of_longer}, own.in, r.view(), p.options);
  });
  // And then they go on.
  expect("nothing", with(p.options));
}

/// Sink logits of one number for each head of a rank are those of its heads, or of its only query: as on the other ranks.
TEST(Ranks, AgreeWhoseSinkLogitsAre) {
  random_engine random(12);
  error_rule<T> out, grad_sinks;
  const std::int64_t ranks = world().size(), me = world().rank();
  for (int repeat = 0; repeat < 20; ++repeat) {
    // Of `ranks` tokens each rank has one; of one more the last has two.
    const bool longer = repeat % 2 == 1, per_query = repeat / 2 % 2 == 1;
    const std::vector<std::int64_t> lengths{ranks + longer};
    spread_problem p{lengths, mpi::layout::contiguous(ranks, lengths)};
    p.sink_logits = true, p.sinks_per_query = per_query;
    const range mine = p.layout.segments()[static_cast<std::size_t>(me)].tokens;
    const whole_operands<T> all(p, random);
    own_operands<T> own(p, all, ragged_layout::packed);
    const auto grad_out = random_whole<T>(p, p.heads, p.value_dim, random);
    own_results<T> from(p, ragged_layout::packed);
    from.out.take(grad_out);
    const own_results<T> r(p, ragged_layout::packed);
    spread_gradient<T> grad(p, ragged_layout::packed);
    gradients<T> to = grad.view(p);
    tensor<T, 3> logits({1, p.heads, per_query ? mine.size() : 1}), grad_logits(logits);
    for_each_row(logits.view(), [&](std::int64_t, std::int64_t h, std::int64_t i) {
      *logits.row(0, h, i) = per_query ? *all.sinks_per_query[0].row(0, h, mine.begin + i) : *all.sinks.row(0, h, 0);
    });
    // Without lengths, but where no rank could tell.
    if (longer || !per_query) own.in.sink_logits = std::as_const(logits).view(), to.sink_logits = grad_logits.view();
    mpi::attention(over(p), own.in, r.view(), p.options);
    mpi::attention_gradient(over(p), own.in, r.view(), incoming{from.view().out}, to, p.options);
    const auto outs = r.out.whole(p);
    const auto plain =
        reference::attention_gradient<T>(all.sequence(p, 0), incoming{std::as_const(grad_out[0]).view()}, p.options);
    const auto exact = reference::attention_gradient<exact_type<T>>(
        all.sequence(p, 0), incoming{std::as_const(grad_out[0]).view()}, p.options);
    const auto own_rows = [&](const auto& whole) {
      return per_query ? whole.view().slice(mine.begin, mine.size()) : whole.view();
    };
    grad_sinks.add(with_dim(tensor_view<const T, 3>(to.sink_logits)), own_rows(std::as_const(plain.sink_logits)),
                   own_rows(std::as_const(exact.sink_logits)));
    if (me != 0) continue;
    add_whole(out, outs[0], reference::attention<T>(all.sequence(p, 0), p.options).out,
              reference::attention<exact_type<T>>(all.sequence(p, 0), p.options).out, "");
  }
  EXPECT_TRUE(grad_sinks.holds());
  if (me == 0) {
    EXPECT_TRUE(out.holds());
  }
}

/// Parts of the ranks, in another order than the world's, make calls of their own at the same time.
TEST(Ranks, OfAPartOfACommunicatorShareTheirOwnSequences) {
  MPI_Comm some = MPI_COMM_NULL;
  const int color = world().rank() % 2;
  MPI_Comm_split(MPI_COMM_WORLD, color, -world().rank(), &some);
  {
    const mpi::communicator part(some);
    random_engine random(17 + static_cast<std::uint64_t>(color));
    const std::vector<std::int64_t> lengths{90 + 30 * color};
    spread_problem p{lengths, mpi::layout::contiguous(part.size(), lengths)};
    p.options = {.group_size = 5, .window = 11, .sink_tokens = 3};
    const whole_operands<T> all(p, random);
    const auto grad_out = random_whole<T>(p, p.heads, p.value_dim, random);
    const range mine = p.layout.segments()[static_cast<std::size_t>(part.rank())].tokens;
    const auto own = [&](const auto& whole) { return whole.view().slice(mine.begin, mine.size()); };
    const auto empty = [&](std::int64_t heads, std::int64_t dim) { return tensor<T>({1, heads, mine.size(), dim}); };
    const inputs<T> in{own(all.query[0]), own(all.key[0]), own(all.value[0])};
    const tensor<T> out = empty(p.heads, p.value_dim), grad_query = empty(p.heads, p.dim),
                    grad_key = empty(p.kv_heads, p.dim), grad_value = empty(p.kv_heads, p.value_dim);
    tensor<T, 3> lse({1, p.heads, mine.size()});
    const auto written = [](const tensor<T>& of) { return const_cast<tensor<T>&>(of).view(); };
    const cca::results<T, T> to{written(out), lse.view()};
    mpi::attention({part, p.layout}, in, to, p.options);
    mpi::attention_gradient({part, p.layout}, in, to, incoming{own(std::as_const(grad_out[0]))},
                            gradients<T>{written(grad_query), written(grad_key), written(grad_value)}, p.options);
    const incoming from{std::as_const(grad_out[0]).view()};
    const auto plain = reference::attention<T>(all.sequence(p, 0), p.options);
    const auto exact = reference::attention<exact_type<T>>(all.sequence(p, 0), p.options);
    const auto plain_grad = reference::attention_gradient<T>(all.sequence(p, 0), from, p.options);
    const auto exact_grad = reference::attention_gradient<exact_type<T>>(all.sequence(p, 0), from, p.options);
    const auto holds = [&](const tensor<T>& got, const auto& textbook, const auto& exactly) {
      error_rule<T> rule;
      rule.add(got.view(), own(textbook), own(exactly));
      return rule.holds();
    };
    EXPECT_TRUE(holds(out, plain.out, exact.out));
    EXPECT_TRUE(holds(grad_query, plain_grad.query, exact_grad.query));
    EXPECT_TRUE(holds(grad_key, plain_grad.key, exact_grad.key));
    EXPECT_TRUE(holds(grad_value, plain_grad.value, exact_grad.value));
  }
  MPI_Comm_free(&some);
}

TEST(Ranks, HaveNothingToDoWithoutSequences) {
  random_engine random(18);
  for (const options& o : {options{}, options{.group_size = 4, .window = 8}}) {
    spread_problem p{{}, mpi::layout::contiguous(world().size(), std::vector<std::int64_t>{})};
    p.options = o;
    const whole_operands<T> all(p, random);
    const own_operands<T> own(p, all, ragged_layout::packed);
    const own_results<T> r(p, ragged_layout::packed);
    spread_gradient<T> grad(p, ragged_layout::packed);
    EXPECT_EQ("nothing", refusal([&] {
                mpi::attention(over(p), own.in, r.view(), p.options);
                mpi::attention_gradient(over(p), own.in, r.view(), incoming{r.view().out}, grad.view(p), p.options);
              }));
  }
}

TEST(Communicators, AreOfRanksThatShareSequences) {
  EXPECT_EQ("cca: communicator: got MPI_COMM_NULL, wants one that this rank is in",
            refusal([] { const mpi::communicator none(MPI_COMM_NULL); }));
  if (world().size() == 1) return;
  // On such a one a reduction gives each group what the other has.
  const bool first = world().rank() == 0;
  MPI_Comm group = MPI_COMM_NULL, between = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, first, 0, &group);
  MPI_Intercomm_create(group, 0, MPI_COMM_WORLD, first ? 1 : 0, 0, &between);
  EXPECT_EQ("cca: communicator: got one between two groups of ranks, wants one of all ranks that share sequences",
            refusal([&] { const mpi::communicator none(between); }));
  MPI_Comm_free(&between);
  MPI_Comm_free(&group);
}

/// What a rank has received, by its count, is what the layout says.
TEST(Ranks, CountWhatTheyReceive) {
  random_engine random(13);
  const std::int64_t ranks = world().size(), me = world().rank();
  const std::vector<std::int64_t> lengths{64 * ranks};
  spread_problem p{lengths, mpi::layout::contiguous(ranks, lengths)};
  const whole_operands<T> all(p, random);
  const own_operands<T> own(p, all, ragged_layout::packed);
  const own_results<T> r(p, ragged_layout::packed);
  const auto bytes_of = [&](std::int64_t heads) {
    return heads * (p.dim + p.value_dim) * static_cast<std::int64_t>(sizeof(T));
  };
  const auto count = [&](const options& o, bool backward) {
    world().received() = {};
    mpi::attention(over(p), own.in, r.view(), o);
    if (!backward) return world().received();
    world().received() = {};
    spread_gradient<T> grad(p, ragged_layout::packed);
    mpi::attention_gradient(over(p), own.in, r.view(), incoming{r.view().out}, grad.view(p), o);
    return world().received();
  };
  // Dense: all tokens before one's own; and gradients of one's own from all behind.
  mpi::traffic got = count({}, false);
  EXPECT_EQ(64 * me * bytes_of(p.kv_heads), got.raw);
  EXPECT_EQ(0, got.cores + got.gradients + got.partials);
  EXPECT_EQ(ranks > 1, got.compared > 0);
  got = count({}, true);
  EXPECT_EQ(64 * me * bytes_of(p.kv_heads), got.raw);
  EXPECT_EQ(64 * (ranks - 1 - me) * bytes_of(p.kv_heads), got.gradients);
  // Groups of 4, a window of 8, 3 sink tokens: query 64 r sees from token 3 + 4 floor((64 r + 1 - 11) / 4) on, 9 before its own.
  // Cores of the last rank stay there; rank 0 has the last tokens of 15 groups, the others of 16.
  const options o{.group_size = 4, .window = 8, .sink_tokens = 3};
  const std::int64_t sent = 16 * (ranks - 1) - 1, own_sent = me + 1 == ranks ? 0 : me == 0 ? 15 : 16;
  for (const bool backward : {false, true}) {
    got = count(o, backward);
    EXPECT_EQ(me > 0 ? (9 + 3) * bytes_of(p.kv_heads) : 0, got.raw);
    EXPECT_EQ(ranks > 1 ? (sent - own_sent) * bytes_of(p.heads) : 0, got.cores);
  }
}

/// An executor that ends a call between what is sent and what is received, on all ranks: they go on.
TEST(Ranks, GoOnAfterAnExceptionOnAllOfThem) {
  random_engine random(14);
  const std::int64_t ranks = world().size();
  const std::vector<std::int64_t> lengths{200 * ranks};
  spread_problem p{lengths, mpi::layout::head_to_tail(ranks, lengths)};
  p.options = {.group_size = 4, .window = 8};
  const whole_operands<T> all(p, random);
  const own_operands<T> own(p, all, ragged_layout::packed);
  const own_results<T> before(p, ragged_layout::packed), after(p, ragged_layout::packed);
  mpi::attention(over(p), own.in, before.view(), p.options);
  for (int good = 0; good < 4; ++good) {
    int runs = 0;
    const any_executor ends{1, [&](std::int64_t n, const auto& f) {
                              if (runs++ == good) throw std::runtime_error("no more");
                              for (std::int64_t i = 0; i < n; ++i) f(i);
                            }};
    const own_results<T> lost(p, ragged_layout::packed);
    const std::string said = refusal([&] { mpi::attention(over(p), own.in, lost.view(), p.options, ends); });
    EXPECT_EQ(good < 2 || ranks > 1 ? "no more" : said, said);
    mpi::attention(over(p), own.in, after.view(), p.options);
    EXPECT_TRUE(same_bits(before.out.view(), after.out.view()));
  }
}

/// Memory into which messages come stays until MPI needs it no more, whatever ends a call: here until the last rank has begun.
TEST(Messages, AreNotWrittenIntoFreedMemory) {
  const std::int64_t ranks = world().size(), row = 64, rows = 256;
  const std::vector<std::int64_t> lengths{rows * ranks};
  const mpi::layout tokens = mpi::layout::contiguous(ranks, lengths);
  const auto now = [] { return std::chrono::steady_clock::now().time_since_epoch().count(); };  // of the machine
  MPI_Barrier(MPI_COMM_WORLD);
  std::int64_t last_began = 0;
  {
    mpi::detail::gathering all(world(), tokens, row, [&](std::int64_t) { return rows; });
    std::fill_n(all.own(), rows * row, std::byte{1});
    if (world().rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    last_began = now();
    all.start();
  }
  const std::int64_t freed = now();
  MPI_Bcast(&last_began, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
  EXPECT_LT(last_began, freed);
}

/// Where a rank cannot write its message, it takes back what it has asked for: what it gets next is what is meant.
TEST(Messages, OfAnExchangeThatFailedAreNotWaitedFor) {
  const std::int64_t ranks = world().size();
  const std::vector<std::int64_t> lengths{10 * ranks};
  const mpi::layout tokens = mpi::layout::contiguous(ranks, lengths);
  const mpi::plan planned(tokens, {.window = unlimited, .lookahead = unlimited}, false);
  const mpi::detail::piece_exchange exchange(world(), planned, planned.pieces_of(world().rank()));
  using way = mpi::detail::piece_exchange::direction;
  const auto move = [&](bool fails, const auto& take) {
    // As ranks wait for each other where a call begins: none sends to one that is still in the exchange before.
    MPI_Barrier(MPI_COMM_WORLD);
    return exchange.move(
        way::to_readers, sizeof(std::int64_t), "testing",
        [&](const mpi::piece& p, std::byte* to) {
          if (fails) throw std::runtime_error("no message");
          for (std::int64_t t = p.tokens.begin; t < p.tokens.end; ++t, to += sizeof t) std::memcpy(to, &t, sizeof t);
        },
        take);
  };
  EXPECT_EQ("no message", refusal([&] { move(true, [](const mpi::piece&, const std::byte*) { FAIL(); }); }));
  std::int64_t taken = 0;
  move(false, [&](const mpi::piece& p, const std::byte* from) {
    for (std::int64_t t = p.tokens.begin; t < p.tokens.end; ++t, ++taken) {
      std::int64_t got = -1;
      std::memcpy(&got, from + (t - p.tokens.begin) * static_cast<std::int64_t>(sizeof got), sizeof got);
      EXPECT_EQ(t, got);
    }
  });
  EXPECT_EQ(10 * ranks, taken);
}

/// What a rank was sent for a call that it had to leave is not taken for that of the next one.
TEST(Messages, OfACallThatEndedAreNotThoseOfTheNext) {
  const std::int64_t ranks = world().size();
  const std::vector<std::int64_t> lengths{10 * ranks};
  const mpi::layout tokens = mpi::layout::contiguous(ranks, lengths);
  const mpi::plan planned(tokens, {.window = 11}, false);
  const mpi::detail::piece_exchange exchange(world(), planned, planned.pieces_of(world().rank()));
  for (const std::int64_t call : {1, 2}) {
    mpi::detail::agreement same("testing");
    same.compare(world());
    if (call == 1 && world().rank() + 1 == ranks) continue;  // as if there were no memory for what it is sent
    exchange.move(
        mpi::detail::piece_exchange::direction::to_readers, sizeof call, "testing",
        [&](const mpi::piece& p, std::byte* to) {
          for (std::int64_t t = p.tokens.begin; t < p.tokens.end; ++t, to += sizeof call)
            std::memcpy(to, &call, sizeof call);
        },
        [&](const mpi::piece&, const std::byte* from) {
          std::int64_t got = 0;
          std::memcpy(&got, from, sizeof got);
          EXPECT_EQ(call, got);
        });
  }
}

}}  // namespace cca::test
