#pragma once

// Attention and its gradients across ranks against the textbook, for operands of any elements.

#include "ranks.hpp"

namespace cca::test {

/// Random problems of `Element`s, computed in T, by the error rule.
template <class T, class Element>
void check_attention(std::uint64_t seed, int count) {
  random_engine random(seed);
  error_rule<T> out, lse;
  for (int repeat = 0; repeat < count; ++repeat) {
    const spread_problem p = random_problem(random, world().size());
    const whole_operands<T, Element> all(p, random);
    const ragged_layout memory = draw_from(random, all_ragged_layouts);
    const own_operands<T, Element> own(p, all, memory);
    const own_results<T> r(p, memory);
    mpi::attention(over(p, draw(random, 0, 2) > 0), own.in, r.view(), p.options);
    EXPECT_TRUE(r.out.canaries_intact());
    EXPECT_TRUE(r.lse.canaries_intact());
    const auto outs = r.out.whole(p), lses = r.lse.whole(p);
    if (world().rank() != 0) continue;
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (p.lengths[q] == 0) continue;
      const auto plain = reference::attention<T>(all.sequence(p, q), p.options);
      const auto exact = reference::attention<exact_type<T>>(all.sequence(p, q), p.options);
      add_whole(out, outs[q], plain.out, exact.out, label.str());
      add_whole(lse, lses[q], plain.lse, exact.lse, label.str());
    }
  }
  if (world().rank() != 0) return;
  EXPECT_TRUE(out.holds());
  EXPECT_TRUE(lse.holds());
}

/// Numbers that all ranks have: on each the same, to the bit.
template <class T>
void expect_same_on_all_ranks(const tensor<T, 3>& numbers) {
  for_each_row(numbers.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    T first = *numbers.row(b, h, i);
    MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD);
    EXPECT_TRUE(same_bits(first, *numbers.row(b, h, i)));
  });
}

/// The same of gradients.
template <class T, class Element>
void check_gradients(std::uint64_t seed, int count) {
  random_engine random(seed);
  std::array<error_rule<T>, 7> rules;
  for (int repeat = 0; repeat < count; ++repeat) {
    const spread_problem p = random_problem(random, world().size());
    const whole_operands<T, Element> all(p, random);
    const auto grad_out = random_whole<T>(p, p.heads, p.value_dim, random),
               grad_lse = random_whole<T>(p, p.heads, 1, random);
    const ragged_layout memory = draw_from(random, all_ragged_layouts);
    const own_operands<T, Element> own(p, all, memory);
    const own_results<T> r(p, memory);
    own_results<T> incoming_gradients(p, memory);
    incoming_gradients.out.take(grad_out);
    incoming_gradients.lse.take(grad_lse);
    spread_gradient<T> grad(p, memory);
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

}  // namespace cca::test
