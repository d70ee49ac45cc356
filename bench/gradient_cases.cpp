// Speed of the gradients. Useful operations: five products for the forward pass's two, 2 (3 dim + 2 value dim) for each
// query-key pair that is seen.
//
// Before it is timed, a case is checked whole: for random directions of query, key and value, the gradient times the
// direction has to be the slope of `sum(out * grad_out)` there, by central differences of the forward pass in double.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <cca/cca.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "shape.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct gradient_case {
  bool dense = false;
  std::int64_t heads = 1, kv_heads = 1, length = 0, dim = 128;
  std::int64_t group_size = 0, window = cca::unlimited;
  int threads = 1;

  [[nodiscard]] cca::options options() const { return {.group_size = group_size, .window = window}; }

  [[nodiscard]] double flops() const {
    const std::int64_t pairs = cca::partition_of(options()).pair_count({0, length});
    return 10.0 * static_cast<double>(dim) * static_cast<double>(heads * pairs);
  }

  [[nodiscard]] std::string name(const char* type) const {
    std::string text = std::string("gradient/") + (dense ? "dense/" : "cca/") + type + "/D:" + std::to_string(dim);
    if (heads > 1) text += "/H:" + std::to_string(heads);
    if (kv_heads != heads) text += "/Hkv:" + std::to_string(kv_heads);
    text += "/L:" + std::to_string(length);
    if (!dense) text += "/g:" + std::to_string(group_size);
    if (window != cca::unlimited) text += "/s:" + std::to_string(window);
    if (threads > 1) text += "/threads:" + std::to_string(threads);
    return text;
  }
};

template <class T>
struct gradient_operands {
  operands<T> forward;
  tensor<T> lse, grad_out, grad_query, grad_key, grad_value;

  explicit gradient_operands(const gradient_case& c)
      : forward(1, c.heads, c.kv_heads, c.length, c.length, c.dim),
        lse(1, c.heads, c.length, 1),
        grad_out(1, c.heads, c.length, c.dim),
        grad_query(1, c.heads, c.length, c.dim),
        grad_key(1, c.kv_heads, c.length, c.dim),
        grad_value(1, c.kv_heads, c.length, c.dim) {
    fill(grad_out, 4);
  }

  [[nodiscard]] auto lse_rows() { return cca::bhs(lse.data.data(), 1, lse.extent[1], lse.extent[2]); }
};

template <class T>
void attend(const gradient_case& c, gradient_operands<T>& data, const cca::execution& run) {
  operands<T>& f = data.forward;
  cca::attention<T>({f.query.view(), f.key.view(), f.value.view()}, {f.out.view(), data.lse_rows()}, c.options(), run);
}

template <class T>
void differentiate(const gradient_case& c, gradient_operands<T>& data, const cca::execution& run) {
  operands<T>& f = data.forward;
  cca::attention_gradient<T>({f.query.view(), f.key.view(), f.value.view()}, {f.out.view(), data.lse_rows()},
                             {data.grad_out.view()},
                             {data.grad_query.view(), data.grad_key.view(), data.grad_value.view()}, c.options(), run);
}

template <class A, class B>
double dot(const tensor<A>& a, const tensor<B>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i)
    sum += static_cast<double>(a.data[i]) * static_cast<double>(b.data[i]);
  return sum;
}

/// Whether the gradient of one operand has the slope of the forward pass along a random direction.
template <class T>
bool slope_agrees(const gradient_case& c, gradient_operands<double>& exact, tensor<double>& operand,
                  const tensor<T>& gradient, std::uint64_t seed) {
  tensor<double> direction(1, operand.extent[1], operand.extent[2], operand.extent[3]);
  fill(direction, seed);
  constexpr double step = 1e-5;
  const auto value_at = [&](double distance) {
    tensor<double> moved = operand;
    for (std::size_t i = 0; i < moved.data.size(); ++i) moved.data[i] += distance * direction.data[i];
    std::swap(moved, operand);
    attend(c, exact, cca::serial_executor{});
    std::swap(moved, operand);
    return dot(exact.forward.out, exact.grad_out);
  };
  const double slope = (value_at(step) - value_at(-step)) / (2 * step);
  // As many independent errors of rounding as there are elements add up to this much of a sum of their squares.
  const double size = std::sqrt(dot(gradient, gradient));
  return std::abs(dot(gradient, direction) - slope) <= 1e-4 * size;
}

template <class T>
bool check(const gradient_case& c, const gradient_operands<T>& data) {
  gradient_operands<double> exact(c);
  return slope_agrees(c, exact, exact.forward.query, data.grad_query, 5) &&
         slope_agrees(c, exact, exact.forward.key, data.grad_key, 6) &&
         slope_agrees(c, exact, exact.forward.value, data.grad_value, 7);
}

template <class T>
void gradient(benchmark::State& state, const gradient_case& c) {
  gradient_operands<T> data(c);
  Eigen::ThreadPool helpers(c.threads - 1);
  const auto run = [&](Eigen::ThreadPool& pool) { differentiate(c, data, cca::thread_pool_executor(pool)); };
  attend(c, data, cca::serial_executor{});
  const std::size_t before = allocated_bytes();
  run(helpers);
  const std::size_t scratch = allocated_bytes() - before;
  if (!check(c, data)) return state.SkipWithError("wrong result");

  const timing best = time<T>(state, run, helpers);
  count_flops(state, best, c.flops(), c.threads);
  state.counters["token/s"] = static_cast<double>(c.length) / best.seconds;
  const std::int64_t cores = c.dense ? 0 : c.heads * cca::partition_of(c.options()).core_count(c.length - 1);
  state.counters["scratch"] = static_cast<double>(scratch);
  state.counters["per_thread"] =
      (static_cast<double>(scratch) - static_cast<double>(cores * 4 * c.dim) * sizeof(T)) / c.threads;
}

template <class T>
void add_gradient(const gradient_case& c) {
  const double estimate = c.flops() / (std::is_same_v<T, float> ? 80e9 : 40e9) / c.threads;
  bench::add(c.name(type_name<T>), estimate, [c](benchmark::State& state) { gradient<T>(state, c); });
}

}  // namespace

void add_gradient_cases() {
  constexpr std::int64_t K = 1024;
  for (const std::int64_t dim : {128, 64, 80, 256})
    add_gradient<float>({.length = 32 * K, .dim = dim, .group_size = 16, .window = 1024});
  add_gradient<float>({.dense = true, .length = 4 * K});
  add_gradient<float>({.heads = 32, .kv_heads = 8, .length = 2 * K, .group_size = 16, .window = 512});
  add_gradient<double>({.length = 8 * K, .group_size = 16, .window = 1024});
  add_gradient<float>({.length = 32 * K, .group_size = 16, .window = 1024, .threads = 2});
  add_gradient<float>({.heads = 8, .kv_heads = 8, .length = 4 * K, .group_size = 16, .window = 1024, .threads = 2});
}

void add_gradient_shape(shape of, std::string_view kind) {
  const std::string type = of.take_text("dtype", "float");
  gradient_case c{.heads = of.take("H", 1)};
  c.kv_heads = of.take("Hkv", c.heads);
  c.length = of.take("L", 4096);
  c.dim = of.take("D", 128);
  c.threads = static_cast<int>(of.take("threads", 1));
  const std::vector<context> contexts = take_contexts(of, kind);
  of.finish();
  for (const context& seen : contexts) {
    c.dense = seen.group_size == 0;
    c.group_size = seen.group_size;
    c.window = seen.window;
    type == "double" ? add_gradient<double>(c) : add_gradient<float>(c);
  }
}

}  // namespace bench
