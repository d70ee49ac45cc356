// Attention across ranks: what all of them together get is what one process gets. Run by mpirun, see CMakeLists.txt.

#include "ranks.hpp"

#include "executors.hpp"

namespace cca::test { namespace {

using T = float;

/// As many as the time allows: CCA_MPI_PROBLEMS says otherwise.
int problems(int few) {
  const char* const said = std::getenv("CCA_MPI_PROBLEMS");
  return said != nullptr ? std::atoi(said) : few;
}

mpi::context_parallel over(const spread_problem& p, bool overlap = true) { return {world(), p.layout, overlap}; }

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
    const auto grad_out = random_whole<T>(p, p.heads, p.value_dim, random), grad_lse = random_whole<T>(p, p.heads, 1, random);
    const ragged_layout memory = draw_from(random, all_ragged_layouts);
    const own_operands<T> own(p, all, memory);
    const own_results<T> r(p, memory);
    own_results<T> incoming_gradients(p, memory);
    incoming_gradients.out.take(grad_out);
    incoming_gradients.lse.take(grad_lse);
    spread_gradient grad(p, memory);
    mpi::attention(over(p), own.in, r.view(), p.options);
    mpi::attention_gradient(over(p), own.in, r.view(), incoming{incoming_gradients.view().out, incoming_gradients.view().lse},
                            grad.view(p), p.options);
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
      if (p.sinks_per_query) add_whole(rules[3], got[3][q], plain.sink_logits, exact.sink_logits, "sinks, " + label.str());
      if (p.key_bias) add_whole(rules[4], got[4][q], plain.key_bias, exact.key_bias, "biases, " + label.str());
      const auto add = [&](auto& sum, const auto& one) {
        for (std::size_t i = 0; i < one.data.size(); ++i) sum.data[i] += one.data[i];
      };
      if (p.sink_logits && !p.sinks_per_query) add(sinks, plain.sink_logits), add(exact_sinks, exact.sink_logits);
      if (p.alibi) add(slopes, plain.alibi_slopes), add(exact_slopes, exact.alibi_slopes);
    }
    if (p.sink_logits && !p.sinks_per_query)
      rules[5].add(with_dim(std::as_const(grad.sinks).view()), std::as_const(sinks).view(), std::as_const(exact_sinks).view(),
                   label.str());
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
    const own_part<T> key(of_cores, heads, p.dim, ragged_layout::packed), value(of_cores, heads, p.value_dim, ragged_layout::packed);
    mpi::pool(over(p), own.in, cores{key.view(), value.view()}, p.options);
    EXPECT_TRUE(key.canaries_intact() && value.canaries_intact());
    const auto keys = key.whole(of_cores), values = value.whole(of_cores);
    if (world().rank() != 0) continue;
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (groups[q] == 0) continue;
      const auto plain = reference::pool<T>(all.query[q].view(), all.key[q].view(), all.value[q].view(), p.options);
      const auto exact = reference::pool<exact_type<T>>(all.query[q].view(), all.key[q].view(), all.value[q].view(), p.options);
      add_whole(rules[0], keys[q], plain.first, exact.first, label.str());
      add_whole(rules[1], values[q], plain.second, exact.second, label.str());
    }
  }
  if (world().rank() != 0) return;
  for (const auto& rule : rules) EXPECT_TRUE(rule.holds());
}

}}  // namespace cca::test
