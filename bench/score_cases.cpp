// What each option of the scores costs: CCA attention with it, in turns with the same call without. Its counters:
//   cost       by how much the call with the option takes longer, the median of the turns
//   flop/s, peak  as of other cases, of the best turn

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <cca/cca.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct score_case {
  std::string name;
  cca::options options{.group_size = 16, .window = 1024};
  bool sink_logits = false, alibi_slopes = false;
  std::int64_t length = 32 * 1024, dim = 128;
};

/// A head with what the case asks for, and without.
struct score_call {
  operands<float> data;
  float sink = 1.0f, slope = 0.01f;
  cca::inputs<float> plain, in;

  explicit score_call(const score_case& c) : data(1, 1, 1, c.length, c.length, c.dim) {
    plain = {std::as_const(data.query).view(), std::as_const(data.key).view(), std::as_const(data.value).view()};
    in = plain;
    if (c.sink_logits) in.sink_logits = cca::bhs(&std::as_const(sink), 1, 1, 1);
    if (c.alibi_slopes) in.alibi_slopes = cca::bhs(&std::as_const(slope), 1, 1, 1);
  }
  score_call(const score_call&) = delete;
  score_call& operator=(const score_call&) = delete;

  void run(const cca::inputs<float>& inputs, const cca::options& options) {
    cca::attention(inputs, cca::results{data.out.view()}, options);
  }
};

/// The textbook's output of some queries, one after the other.
template <class Scalar>
tensor<Scalar> textbook_of(const cca::inputs<float>& in, const cca::options& options,
                           const std::vector<std::int64_t>& rows) {
  namespace reference = cca::reference;
  const cca::partition partition = cca::partition_of(options);
  reference::converter<Scalar> numbers;
  const reference::operands<Scalar> all = numbers(in);
  const auto cores = reference::pool(all, options);
  const auto biases = reference::core_biases(all, options);
  tensor<Scalar> out(1, 1, static_cast<std::int64_t>(rows.size()), in.value.dim());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t t = rows[i];
    reference::operands<Scalar> one = all;
    one.query = all.query.slice(t, 1);
    cca::options at = options;
    at.first_position = t;
    const auto answer = reference::attend<Scalar>(
        one, cores.first.view(), cores.second.view(), at,
        [&](std::int64_t, std::int64_t, std::int64_t) { return reference::first_rows(partition.core_count(t)); },
        [&](std::int64_t) { return reference::raw_tokens(partition, t, in.key.length()); },
        reference::core_terms(options, biases, 1));
    std::copy(answer.out.data.begin(), answer.out.data.end(), out.view().row(0, 0, static_cast<std::int64_t>(i)));
  }
  return out;
}

bool agrees(const score_case& c, const score_call& call) {
  const std::vector<std::int64_t> rows{0, c.options.window, c.length / 2 + 7, c.length - 1};
  tensor<float> got(1, 1, static_cast<std::int64_t>(rows.size()), c.dim);
  for (std::size_t i = 0; i < rows.size(); ++i)
    std::copy_n(call.data.out.view().row(0, 0, rows[i]), c.dim, got.view().row(0, 0, static_cast<std::int64_t>(i)));
  return bench::agrees(got, textbook_of<double>(call.in, c.options, rows), textbook_of<float>(call.in, c.options, rows));
}

void scores(benchmark::State& state, const score_case& c) {
  score_call call(c);
  const cca::options plain = score_case{}.options;
  call.run(call.plain, plain);
  call.run(call.in, c.options);
  if (!agrees(c, call)) return state.SkipWithError("wrong result");

  std::vector<double> ratios;
  double before = 0;
  const timing best = time<float>(
      state, [&] { call.run(call.in, c.options); },
      [&](const auto& run) {
        before = seconds([&] { call.run(call.plain, plain); });
        const double with = seconds(run);
        ratios.push_back(with / before);
        return with;
      },
      [] {});
  std::nth_element(ratios.begin(), ratios.begin() + std::ssize(ratios) / 2, ratios.end());
  state.counters["cost"] = ratios[ratios.size() / 2] - 1;
  const std::int64_t pairs = cca::partition_of(c.options).pair_count({0, c.length});
  count_flops(state, best, 4.0 * static_cast<double>(c.dim) * static_cast<double>(pairs));
}

}  // namespace

void add_score_cases() {
  std::vector<score_case> cases(5);
  cases[0].name = "sink_tokens:4";
  cases[0].options.sink_tokens = 4;
  cases[1].name = "sink_logits";
  cases[1].sink_logits = true;
  cases[2].name = "core_bias:entropy";
  cases[2].options.core_bias = cca::core_bias::entropy;
  cases[3].name = "alibi_slopes";
  cases[3].alibi_slopes = true;
  cases[4].name = "softcap:50";
  cases[4].options.softcap = 50;
  for (const score_case& c : cases)
    add("score/float/D:128/L:32768/g:16/s:1024/" + c.name, 0.2, [c](benchmark::State& state) { scores(state, c); });
}

}  // namespace bench
