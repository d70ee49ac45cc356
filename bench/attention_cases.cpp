// Attention over sequences, what it is made of, and the rulers it is measured by.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <cca/cca.hpp>

#include "baselines.hpp"
#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "shape.hpp"
#include "timing.hpp"

namespace bench {
namespace {

enum class kernel { cca, dense, local, eigen_cca };

struct attention_case {
  kernel what = kernel::cca;
  std::int64_t batch = 1, heads = 1, kv_heads = 0, queries = 0, length = 0, dim = 128;
  std::int64_t group_size = 0, window = cca::unlimited;
  int threads = 1;
  bool lse = false, heads_last = false;

  [[nodiscard]] std::int64_t kv_head_count() const { return kv_heads ? kv_heads : heads; }
  [[nodiscard]] std::int64_t query_length() const { return queries ? queries : length; }
  [[nodiscard]] bool pools() const { return what == kernel::cca || what == kernel::eigen_cca; }
  [[nodiscard]] cca::options options() const { return {.group_size = group_size, .window = window}; }

  [[nodiscard]] double flops() const {
    const cca::partition partition = cca::partition_of(options());
    const cca::range positions{length - query_length(), length};
    std::int64_t pairs = partition.pair_count(positions);
    if (!pools())
      for (std::int64_t t = positions.begin; t < positions.end; ++t) pairs -= partition.core_count(t);
    return 4.0 * static_cast<double>(dim) * static_cast<double>(batch * heads * pairs);
  }

  [[nodiscard]] std::string name(const char* type) const {
    static constexpr const char* kernels[] = {"cca", "dense", "local", "eigen_cca"};
    case_name name{std::string(kernels[static_cast<int>(what)]) + "/" + type};
    name.add("D", dim);
    if (batch > 1) name.add("B", batch);
    if (heads > 1) name.add("H", heads);
    if (kv_heads) name.add("Hkv", kv_heads);
    if (queries) name.add("Lq", queries);
    name.add("L", length);
    name.add({group_size, window});
    if (threads > 1) name.add("threads", threads);
    return name.text + (lse ? "/lse" : "") + (heads_last ? "/bshd" : "");
  }
};

/// On the calling thread and those of the pool.
template <class T>
void call(const attention_case& c, operands<T>& data, Eigen::ThreadPool& helpers) {
  const cca::thread_pool_executor run(helpers);
  const auto q = data.view(std::as_const(data.query)), k = data.view(std::as_const(data.key)),
             v = data.view(std::as_const(data.value));
  if (c.what == kernel::eigen_cca) return eigen_attention<T>(q, k, v, data.view(data.out), c.options());
  cca::results to{data.view(data.out), cca::lse_view<float>{}};
  if (c.lse) to.lse = data.lse_view();
  cca::attention(cca::inputs{q, k, v}, to, c.options(), run);
}

template <class T>
void attention(benchmark::State& state, const attention_case& c) {
  operands<T> data(c.batch, c.heads, c.kv_head_count(), c.query_length(), c.length, c.dim);
  data.heads_last = c.heads_last;
  Eigen::ThreadPool helpers(c.threads - 1);
  const auto run = [&](Eigen::ThreadPool& pool) { call(c, data, pool); };

  const std::size_t before = allocated_bytes();
  run(helpers);
  const std::size_t scratch = allocated_bytes() - before;
  if (!check(data, c.pools(), c.options())) return state.SkipWithError("wrong result");

  const timing best = time<T>(state, run, helpers);
  count_flops(state, best, c.flops(), c.threads);
  if (c.query_length() < 64 && c.window == cca::unlimited) count_bytes(state, best, data.key, data.value);
  state.counters["token/s"] = static_cast<double>(c.batch * c.query_length()) / best.seconds;
  if (c.what == kernel::eigen_cca) return;
  const std::int64_t cores =
      c.pools() ? c.batch * c.heads * cca::partition_of(c.options()).core_count(c.length - 1) : 0;
  state.counters["scratch"] = static_cast<double>(scratch);
  state.counters["per_thread"] =
      (static_cast<double>(scratch) - static_cast<double>(cores * 2 * c.dim) * sizeof(T)) / c.threads;
}

template <class T>
void pooling(benchmark::State& state, std::int64_t length, std::int64_t dim, std::int64_t group_size) {
  operands<T> data(1, 1, 1, length, length, dim);
  tensor<T> core_key(1, 1, length / group_size, dim), core_value(1, 1, length / group_size, dim);
  const auto q = std::as_const(data.query).view();
  const auto k = std::as_const(data.key).view(), v = std::as_const(data.value).view();
  const cca::options options{.group_size = group_size};
  const auto run = [&] { cca::pool(q, k, v, core_key.view(), core_value.view(), options); };
  run();
  const auto exact = cca::reference::pool<exact_type<T>>(q, k, v, options);
  const auto plain = cca::reference::pool<T>(q, k, v, options);
  if (!agrees(core_key, exact.first, plain.first) || !agrees(core_value, exact.second, plain.second))
    return state.SkipWithError("wrong result");

  const timing best = time<T>(state, run);
  count_bytes(state, best, data.key, data.value);
  state.counters["token/s"] = static_cast<double>(length) / best.seconds;
  const double attention =
      seconds([&] { cca::attention(q, k, v, data.out.view(), {.group_size = group_size, .window = 1024}); });
  state.counters["share_of_cca"] = best.seconds / attention;
}

template <class T>
void merging(benchmark::State& state, std::int64_t heads, std::int64_t length, std::int64_t dim) {
  tensor<T> a(1, heads, length, dim), b(1, heads, length, dim), out(1, heads, length, dim);
  tensor<float> lse_a(1, heads, length, 1), lse_b(1, heads, length, 1), lse(1, heads, length, 1);
  fill(a, 1);
  fill(b, 2);
  fill(lse_a, 3);
  fill(lse_b, 4);
  const auto rows = [&](tensor<float>& of) { return cca::bhs(of.data.data(), 1, heads, length); };
  const auto run = [&] {
    cca::merge(cca::results{a.view(), rows(lse_a)}, cca::results{b.view(), rows(lse_b)},
               cca::results{out.view(), rows(lse)});
  };
  run();
  for (std::size_t i = 0; i < out.data.size(); ++i) {
    const std::size_t row = i / static_cast<std::size_t>(dim);
    const double share =
        1 / (1 + std::exp(static_cast<double>(lse_b.data[row]) - static_cast<double>(lse_a.data[row])));
    const double exact = share * static_cast<double>(a.data[i]) + (1 - share) * static_cast<double>(b.data[i]);
    if (!(std::abs(static_cast<double>(out.data[i]) - exact) <= 8 * std::numeric_limits<T>::epsilon()))
      return state.SkipWithError("wrong result");
  }
  const timing best = time<T>(state, run);
  count_bytes(state, best, a, b, out);
  state.counters["token/s"] = static_cast<double>(length) / best.seconds;
}

/// Eigen's matrix product, a ruler: `rows` x `depth` times `depth` x `columns`.
template <class T>
void gemm(benchmark::State& state, std::int64_t rows, std::int64_t columns, std::int64_t depth) {
  const matrix<T> a = matrix<T>::Random(rows, depth), b = matrix<T>::Random(depth, columns);
  matrix<T> product(rows, columns);
  const timing best = time<T>(state, [&] { product.noalias() = a * b; });
  benchmark::DoNotOptimize(product.data());
  count_flops(state, best, 2.0 * static_cast<double>(rows * columns * depth));
}

template <class T>
void add_attention(const attention_case& c) {
  const double estimate = c.flops() / (std::is_same_v<T, float> ? 80e9 : 40e9) / c.threads;
  add(c.name(type_name<T>), estimate, [c](benchmark::State& state) { attention<T>(state, c); });
}

}  // namespace

void add_attention_cases() {
  using enum kernel;
  constexpr std::int64_t K = 1024;
  for (const std::int64_t length : {32 * K, 128 * K})
    add_attention<float>({.what = cca, .length = length, .group_size = 16, .window = 1024});
  for (const std::int64_t dim : {64, 80, 96, 256})
    add_attention<float>({.what = cca, .length = 32 * K, .dim = dim, .group_size = 16, .window = 1024});
  for (const std::int64_t length : {4 * K, 32 * K}) add_attention<float>({.what = dense, .length = length});
  for (const std::int64_t window : {1024, 256, 64})
    add_attention<float>({.what = local, .length = 32 * K, .window = window});
  for (const std::int64_t length : {512, 128, 64})
    add_attention<float>({.what = dense, .batch = 8, .heads = 8, .length = length});
  add_attention<double>({.what = cca, .length = 32 * K, .group_size = 16, .window = 1024});

  // What else a caller chooses.
  add_attention<float>({.what = cca, .length = 32 * K, .group_size = 16, .window = 1024, .lse = true});
  add_attention<float>({.what = cca, .length = 32 * K, .group_size = 4, .window = 256});
  add_attention<float>({.what = cca, .length = 32 * K, .group_size = 32, .window = 2048});
  add_attention<float>({.what = cca, .heads = 32, .length = 4 * K, .group_size = 16, .window = 1024});
  add_attention<float>({.what = cca, .heads = 32, .kv_heads = 8, .length = 4 * K, .group_size = 16, .window = 1024});

  // From decoding to prefill: a few queries after many keys.
  for (std::int64_t queries = 1; queries <= 512; queries *= 2)
    add_attention<float>({.what = dense, .queries = queries, .length = 32 * K});
  add_attention<float>({.what = dense, .heads = 32, .kv_heads = 8, .queries = 1, .length = 8 * K});
  add_attention<float>({.what = local, .heads = 64, .kv_heads = 8, .queries = 1, .length = 32 * K, .dim = 64, .window = 128});

  // Heads side by side, as projections leave them.
  for (const bool heads_last : {false, true})
    add_attention<float>({.what = dense, .heads = 32, .kv_heads = 8, .length = K, .heads_last = heads_last});

  add_attention<float>({.what = cca, .length = 32 * K, .group_size = 16, .window = 1024, .threads = 2});
  add_attention<float>({.what = cca, .heads = 32, .length = 4 * K, .group_size = 16, .window = 1024, .threads = 2});

  for (const std::int64_t length : {32 * K, 128 * K})
    add("pool/float/D:128/L:" + std::to_string(length) + "/g:16", 0.02,
        [length](benchmark::State& state) { pooling<float>(state, length, 128, 16); });
  add("merge/float/D:128/H:32/L:2048", 0.02, [](benchmark::State& state) { merging<float>(state, 32, 2048, 128); });

  // Baselines and rulers.
  add_attention<float>({.what = eigen_cca, .length = 32 * K, .group_size = 16, .window = 1024});
  add("eigen_gemm/float/1024x1024x1024", 0.02, [](benchmark::State& state) { gemm<float>(state, 1024, 1024, 1024); });
  add("eigen_gemm/float/128x1024x128", 0.02, [](benchmark::State& state) { gemm<float>(state, 128, 1024, 128); });
  add("eigen_gemm/float/128x128x1024", 0.02, [](benchmark::State& state) { gemm<float>(state, 128, 128, 1024); });
}

void add_attention_shape(shape of, std::string_view kind) {
  const std::string type = of.take_text("dtype", "float");
  attention_case c{.batch = of.take("B", 1),
                   .heads = of.take("H", 1),
                   .kv_heads = of.take("Hkv", 0, 0),
                   .queries = of.take("Lq", 0, 0),
                   .length = of.take("L", 4096),
                   .dim = of.take("D", 128)};
  c.threads = static_cast<int>(of.take("threads", 1));
  const std::string layout = of.take_text("layout", "bhsd");
  if (layout != "bhsd" && layout != "bshd") of.refuse("layout", layout, "bhsd or bshd");
  c.heads_last = layout == "bshd";
  const std::vector<context> contexts = take_contexts(of, kind);
  of.finish();
  for (const context& seen : contexts) {
    c.what = seen.group_size > 0 ? kernel::cca : seen.window == cca::unlimited ? kernel::dense : kernel::local;
    c.group_size = seen.group_size;
    c.window = seen.window;
    type == "double" ? add_attention<double>(c) : add_attention<float>(c);
  }
}

}  // namespace bench
