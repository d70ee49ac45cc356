#pragma once

// Attention, its gradients and decoding across ranks against the textbook, for operands of any elements.

#include "ranks.hpp"

namespace cca::test {

/// The error rule for results of attention across ranks, which rank 0 applies for all.
template <class T>
class spread_rule {
 public:
  template <class Element>
  void add(int repeat, const spread_problem& p, const whole_operands<T, Element>& all, const whole_tensor<T>& outs,
           const whole_tensor<T>& lses) {
    if (world().rank() != 0) return;
    std::ostringstream label;
    label << "problem " << repeat << ": " << p;
    for (std::size_t q = 0; q < p.lengths.size(); ++q) {
      if (p.lengths[q] == 0) continue;
      const auto plain = reference::attention<T>(all.sequence(p, q), p.options);
      const auto exact = reference::attention<exact_type<T>>(all.sequence(p, q), p.options);
      add_whole(out_, outs[q], plain.out, exact.out, "out, " + label.str());
      add_whole(lse_, lses[q], plain.lse, exact.lse, "lse, " + label.str());
    }
  }

  [[nodiscard]] testing::AssertionResult holds() const {
    if (world().rank() != 0) return testing::AssertionSuccess();
    const auto out = out_.holds();
    return out ? lse_.holds() : out;
  }

 private:
  error_rule<T> out_, lse_;
};

/// Random problems of `Element`s, computed in T, by the error rule.
template <class T, class Element>
void check_attention(std::uint64_t seed, int count) {
  random_engine random(seed);
  spread_rule<T> rule;
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
    rule.add(repeat, p, all, outs, lses);
  }
  EXPECT_TRUE(rule.holds());
}

/// Numbers that all ranks have: on each the same, to the bit.
template <class T>
void expect_same_on_all_ranks(const tensor<T, 3>& numbers) {
  tensor<T, 3> first = numbers;
  const auto bytes = numbers.view().heads() * static_cast<std::int64_t>(sizeof(T));
  MPI_Bcast(first.view().data, static_cast<int>(bytes), MPI_BYTE, 0, MPI_COMM_WORLD);
  EXPECT_TRUE(same_bits(std::as_const(first).view(), numbers.view()));
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

/// A prompt, chunks, tokens one by one: each as the whole sequence in one process.
template <class T, class Element, class Core>
void check_decoding(std::uint64_t seed, int repeats) {
  random_engine random(seed);
  spread_rule<T> rule;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    spread_problem p = random_problem(random, world().size());
    p.lengths.assign(static_cast<std::size_t>(draw(random, 1, 2)), draw(random, 60, 140));
    p.options.lookahead = p.options.prefix = 0;
    p.key_bias = p.sinks_per_query = false;
    const whole_operands<T, Element> all(p, random);
    const std::int64_t batch = std::ssize(p.lengths), length = p.lengths[0];
    mpi::kv_cache<Element, Core> cache(
        world(), {.batch = batch, .heads = p.heads, .kv_heads = p.kv_heads, .dim = p.dim, .value_dim = p.value_dim},
        p.options, static_cast<int>(draw(random, 0, world().size() - 1)));
    whole_tensor<T> outs = make_whole<T>(p, p.heads, p.value_dim), lses = make_whole<T>(p, p.heads, 1);
    // Half of the time a prompt is answered across the ranks, and then taken over.
    const std::int64_t prompt = draw(random, 0, 1) * draw(random, 0, length);
    spread_problem of_prompt = p;
    of_prompt.lengths.assign(p.lengths.size(), prompt);
    of_prompt.layout = random_spread(random, world().size(), of_prompt.lengths);
    if (prompt > 0) {
      const own_operands<T, Element> own(of_prompt, all, draw_from(random, all_ragged_layouts));
      const own_results<T> r(of_prompt, ragged_layout::packed);
      mpi::attention(over(of_prompt), own.in, r.view(), p.options);
      cache.append(over(of_prompt), {own.query.view(), own.key.view(), own.value.view()});
      const auto prompt_outs = r.out.whole(of_prompt), prompt_lses = r.lse.whole(of_prompt);
      for (std::size_t q = 0; q < p.lengths.size(); ++q)
        for_each_row(prompt_outs[q].view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
          std::copy_n(prompt_outs[q].row(b, h, t), p.value_dim, outs[q].row(0, h, t));
          *lses[q].row(0, h, t) = *prompt_lses[q].row(b, h, t);
        });
    }
    for (std::int64_t first = prompt; first < length;) {
      const std::int64_t count =
          std::min(length - first, draw(random, 0, 3) == 0 ? draw(random, 1, 40) : draw(random, 0, 3));
      const auto chunk = [&](const whole_tensor<T>& from, std::int64_t heads, std::int64_t dim) {
        tensor<Element> some({batch, heads, count, dim});
        for_each_row(some.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          const T* const row = from[static_cast<std::size_t>(b)].row(0, h, first + i);
          std::transform(row, row + dim, some.row(b, h, i), [](T x) { return static_cast<Element>(x); });
        });
        return some;
      };
      const tensor<Element> query = chunk(all.query, p.heads, p.dim), key = chunk(all.key, p.kv_heads, p.dim),
                            value = chunk(all.value, p.kv_heads, p.value_dim);
      inputs<Element> in{query.view(), key.view(), value.view()};
      if (p.sink_logits) in.sink_logits = all.sinks.view();
      if (p.alibi) in.alibi_slopes = all.slopes.view();
      tensor<T> to({batch, p.heads, count, p.value_dim});
      tensor<T, 3> to_lse({batch, p.heads, count});
      cache.attend(in, cca::results{to.view(), to_lse.view()});
      for_each_row(to.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::copy_n(to.row(b, h, i), p.value_dim, outs[static_cast<std::size_t>(b)].row(0, h, first + i));
        *lses[static_cast<std::size_t>(b)].row(0, h, first + i) = *to_lse.row(b, h, i);
      });
      first += count;
      EXPECT_EQ(first, cache.length());
      std::int64_t cores = cache.core_count();
      MPI_Allreduce(MPI_IN_PLACE, &cores, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
      EXPECT_EQ(detail::pools(p.options) ? partition_of(p.options).group_count(first) : 0, cores);
    }
    rule.add(repeat, p, all, outs, lses);
  }
  EXPECT_TRUE(rule.holds());
}

}  // namespace cca::test
