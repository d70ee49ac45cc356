// Index-selected attention: causal attention to blocks of the keys that a list of each block of queries selects, its
// own among them. Its counters:
//   flop/s, peak  as of other cases: of the pairs that are seen
//   of_dense      its fraction of the peak by that of dense attention of the same heads, in turns with it

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <cca/cca.hpp>
#include <cca/gradient.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct selection_case {
  std::int64_t block_rows = 64, block_queries = 64, most = 32;
  std::int64_t heads = 1, length = 16 * 1024, dim = 128;
  bool gradient = false;
};

/// The blocks that hold the queries of a list, and before them others by chance; in all as many as there may be.
std::vector<std::int64_t> list_of(const selection_case& c, std::int64_t list, std::mt19937& random) {
  const std::int64_t own_begin = list * c.block_queries / c.block_rows;
  const std::int64_t own_end = std::min((list + 1) * c.block_queries, c.length) + c.block_rows - 1;
  std::vector<std::int64_t> own, before(static_cast<std::size_t>(own_begin));
  for (std::int64_t block = own_begin; block < own_end / c.block_rows; ++block) own.push_back(block);
  for (std::int64_t block = 0; block < own_begin; ++block) before[static_cast<std::size_t>(block)] = block;
  std::vector<std::int64_t> some;
  std::sample(before.begin(), before.end(), std::back_inserter(some), c.most - std::ssize(own), random);
  some.insert(some.end(), own.begin(), own.end());
  some.resize(static_cast<std::size_t>(c.most), -1);
  return some;
}

/// Query heads that share the rows and lists of one, as in multi-query attention.
struct selection_call {
  selection_case c;
  operands<float> data;
  std::vector<std::int64_t> lists, seen;
  cca::inputs<float> dense, in;
  cca::far_context<float> context;

  explicit selection_call(const selection_case& of) : c(of), data(1, of.heads, 1, of.length, of.length, of.dim) {
    std::mt19937 random(1);
    const std::int64_t count = (c.length + c.block_queries - 1) / c.block_queries;
    for (std::int64_t list = 0; list < count; ++list) {
      const std::vector<std::int64_t> more = list_of(c, list, random);
      lists.insert(lists.end(), more.begin(), more.end());
    }
    for (std::int64_t t = 0; t < c.length; ++t) seen.push_back(t + 1);
    dense = {std::as_const(data.query).view(), std::as_const(data.key).view(), std::as_const(data.value).view()};
    in = {dense.query, dense.key.slice(0, 0), dense.value.slice(0, 0)};
    context.key = dense.key;
    context.value = dense.value;
    context.seen = {seen.data(), {1, c.heads, c.length}, {0, 0, 1}};
    context.selected = {cca::bhsd(std::as_const(lists).data(), 1, 1, count, c.most), c.block_rows, c.block_queries};
  }
  selection_call(const selection_call&) = delete;
  selection_call& operator=(const selection_call&) = delete;

  /// The rows that query `t` sees.
  [[nodiscard]] cca::reference::row_numbers rows_of(std::int64_t t) const {
    const std::int64_t* list = context.selected.blocks.row(0, 0, t / c.block_queries);
    return cca::reference::rows_where(
        t + 1, [&](std::int64_t j) { return std::find(list, list + c.most, j / c.block_rows) != list + c.most; });
  }
  [[nodiscard]] double pairs() const {
    double sum = 0;
    for (std::int64_t t = 0; t < c.length; ++t) {
      const std::int64_t* list = context.selected.blocks.row(0, 0, t / c.block_queries);
      for (std::int64_t i = 0; i < c.most && list[i] >= 0; ++i)
        sum += static_cast<double>(std::clamp<std::int64_t>(t + 1 - list[i] * c.block_rows, 0, c.block_rows));
    }
    return sum * static_cast<double>(c.heads);
  }

  void run_dense() { cca::attention(dense, cca::results{data.out.view()}, {}); }
  void run() { cca::attend(in, context, cca::results{data.out.view(), data.lse_view()}); }
};

template <class Scalar>
tensor<Scalar> textbook_of(const selection_call& call, const std::vector<std::int64_t>& rows) {
  tensor<Scalar> out(1, 1, static_cast<std::int64_t>(rows.size()), call.c.dim);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    cca::inputs<float> one = call.in;
    one.query = call.in.query.slice_heads(call.c.heads - 1, 1).slice(rows[i], 1);
    cca::reference::converter<Scalar> numbers;
    const auto answer = cca::reference::attend<Scalar>(
        numbers(one), numbers(call.context.key), numbers(call.context.value), {},
        [&](std::int64_t, std::int64_t, std::int64_t) { return call.rows_of(rows[i]); },
        [](std::int64_t) { return cca::reference::first_rows(0); });
    std::copy(answer.out.data.begin(), answer.out.data.end(), out.view().row(0, 0, static_cast<std::int64_t>(i)));
  }
  return out;
}

bool agrees(const selection_call& call) {
  const std::int64_t length = call.c.length;
  const std::vector<std::int64_t> rows{0, call.c.block_queries, length / 2 + 7, length - 1};
  tensor<float> got(1, 1, static_cast<std::int64_t>(rows.size()), call.c.dim);
  for (std::size_t i = 0; i < rows.size(); ++i)
    std::copy_n(call.data.out.view().row(0, call.c.heads - 1, rows[i]), call.c.dim,
                got.view().row(0, 0, static_cast<std::int64_t>(i)));
  return bench::agrees(got, textbook_of<double>(call, rows), textbook_of<float>(call, rows));
}

/// What a case's gradient, and that of dense attention, needs.
struct selection_gradients {
  tensor<float> grad_out, query, key, value, none{1, 1, 0, 1};

  explicit selection_gradients(const selection_call& call)
      : grad_out(call.data.out.extent),
        query(call.data.query.extent),
        key(call.data.key.extent),
        value(call.data.value.extent) {
    fill(grad_out, 4);
  }

  void run(selection_call& call) {
    const cca::results of{std::as_const(call.data.out).view(), const_lse(call)};
    auto no_key = key.view(), no_value = value.view();
    no_key.extent[2] = no_value.extent[2] = 0;
    cca::attend_gradient(call.in, call.context, of, cca::incoming{std::as_const(grad_out).view()},
                         cca::gradients{query.view(), no_key, no_value, key.view(), value.view()});
  }
  void run_dense(selection_call& call) {
    const cca::results of{std::as_const(call.data.out).view(), const_lse(call)};
    cca::attention_gradient(call.dense, of, cca::incoming{std::as_const(grad_out).view()},
                            cca::gradients{query.view(), key.view(), value.view()});
  }

 private:
  static cca::lse_view<const float> const_lse(selection_call& call) { return call.data.lse_view(); }
};

void selections(benchmark::State& state, const selection_case& c) {
  selection_call call(c);
  call.run();
  if (!agrees(call)) return state.SkipWithError("wrong result");
  selection_gradients gradients(call);

  std::vector<double> ratios;
  const double per_pair = (c.gradient ? 10.0 : 4.0) * static_cast<double>(c.dim), flops = per_pair * call.pairs();
  const double dense_flops = per_pair * static_cast<double>(c.heads) * static_cast<double>(c.length) *
                             static_cast<double>(c.length + 1) / 2;
  const timing best = time<float>(
      state, [&] { c.gradient ? gradients.run(call) : call.run(); },
      [&](const auto& run) {
        const double dense = seconds([&] { c.gradient ? gradients.run_dense(call) : call.run_dense(); });
        const double selected = seconds(run);
        ratios.push_back(flops / selected / (dense_flops / dense));
        return selected;
      },
      [] {});
  std::nth_element(ratios.begin(), ratios.begin() + std::ssize(ratios) / 2, ratios.end());
  state.counters["of_dense"] = ratios[ratios.size() / 2];
  count_flops(state, best, flops);
}

}  // namespace

void add_selection_cases() {
  const auto add_case = [](const std::string& name, const selection_case& c) {
    add("selection/float/D:" + std::to_string(c.dim) + "/L:" + std::to_string(c.length) + "/H:" +
            std::to_string(c.heads) + "/rows:" + std::to_string(c.block_rows) + "/queries:" +
            std::to_string(c.block_queries) + name,
        0.3, [c](benchmark::State& state) { selections(state, c); });
  };
  for (const std::int64_t queries : {64, 128, 256}) add_case("", {.block_queries = queries});
  for (const std::int64_t heads : {1, 4, 16, 64})  // lists of one query, of heads that share them
    add_case("", {.block_queries = 1, .most = 16, .heads = heads, .length = 4096});
  add_case("", {.block_rows = 1, .block_queries = 1, .most = 512, .heads = 16, .length = 4096});
  add_case("", {.block_rows = 1, .most = 512, .length = 8192});
  for (const std::int64_t queries : {64, 128})
    add_case("/gradient", {.block_queries = queries, .length = 8192, .gradient = true});
}

}  // namespace bench
