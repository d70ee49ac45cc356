// Speed of matrix units: the one with the most multiply-adds that this processor has for bfloat16 and for half, and integers
// of 8 bits (`vnni`) for floats and for bfloat16; no cases where it has none. Each
// iteration takes turns of the unit, of floats, and of the same 16-bit operands computed in float, each timed by the
// thread's own clock; the counters are of the best turns:
//   flop/s     useful operations of the unit, as elsewhere
//   peak       their share of the unit's products of 32 x 64 x 128 (integers: 128 x 64 x 128) from first-level cache on
//              random numbers, with their loads and stores, measured around the calls
//   speedup    over floats
//   best       1 where `matrix_unit::best` means this unit, 0 where floats are faster
//   stored     speed of the same operands without the unit, over floats
//   error      root of the mean square of the differences from floats' result, over that of the result

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>
#include <Eigen/Core>

#include <cca/cca.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct unit_case {
  bool gradient = false, dense = false;
  std::int64_t heads = 1, length = 0, dim = 128;

  [[nodiscard]] cca::options options(cca::matrix_unit unit) const {
    return dense ? cca::options{.unit = unit} : cca::options{.group_size = 16, .window = 1024, .unit = unit};
  }
  [[nodiscard]] double flops() const {
    const cca::options o = options(cca::matrix_unit::none);
    const std::int64_t pairs = cca::partition_of(o).pair_count({0, length});
    return (gradient ? 10.0 : 4.0) * static_cast<double>(dim) * static_cast<double>(heads * pairs);
  }
  [[nodiscard]] std::string name(const char* element) const {
    std::string text = std::string("unit/") + (gradient ? "gradient/" : "") + (dense ? "dense/" : "cca/") + element;
    text += "/D:" + std::to_string(dim);
    if (heads > 1) text += "/H:" + std::to_string(heads);
    return text + "/L:" + std::to_string(length) + (dense ? "" : "/g:16/s:1024");
  }
};

/// The same of integers, 128 columns of 128 values by 64 lanes.
inline double byte_peak() {
  using namespace cca::detail;
  constexpr std::int64_t rows = 128, lanes = 64, depth = 128, times = 100;
  alignas(64) static std::int8_t a[rows * depth];
  alignas(64) static packed_quad b[depth / 4 * lanes];
  alignas(64) static float c[rows * lanes], share[lanes], rescale[lanes];
  for (std::int64_t i = 0; i < rows * depth; ++i) a[i] = static_cast<std::int8_t>(i * 37 % 255 - 127);
  for (std::int64_t i = 0; i < depth / 4 * lanes; ++i) b[i] = static_cast<packed_quad>(i) * 2654435761u;
  const double time = best_seconds(5, [&] {
    for (std::int64_t i = 0; i < times; ++i) {
      add_bytes({a, depth}, {b, lanes, share}, rescale, c, rows, depth / 4);
      benchmark::DoNotOptimize(c[0]);
      benchmark::ClobberMemory();
    }
  });
  return 2.0 * rows * lanes * depth * times / time;
}

/// FLOP/s of a unit's products on numbers of `from`, 32 rows by 64 lanes, in first-level cache.
template <class Element>
double unit_peak(cca::matrix_unit unit, const std::vector<Element>& from) {
  using namespace cca::detail;
  constexpr std::int64_t rows = 32, lanes = 64, depth = 128, times = 200;
  if (unit == cca::matrix_unit::vnni) return byte_peak();
  alignas(64) static std::uint16_t a[rows * depth];
  alignas(64) static packed_pair b[depth / 2 * lanes];
  alignas(64) static float c[rows * lanes];
  std::memcpy(a, from.data(), sizeof a);
  std::memcpy(b, from.data() + rows * depth, sizeof b);
  const tile_registers registers(unit);
  const double time = best_seconds(5, [&] {
    for (std::int64_t i = 0; i < times; ++i) {
      multiply<Element>(unit, {a, depth}, {b, lanes}, c, lanes, rows, lanes, depth);
      benchmark::DoNotOptimize(c[0]);
      benchmark::ClobberMemory();
    }
  });
  return 2.0 * rows * lanes * depth * times / time;
}

/// Operands of one type, and what is computed from them.
template <class T>
struct unit_operands {
  std::vector<T> query, key, value, grad_out;
  std::vector<float> out, lse, grad_query, grad_key, grad_value;

  template <class From>
  unit_operands(const unit_case& c, const operands<From>& from) {
    const auto convert = [](const auto& data) {
      std::vector<T> to;
      for (const auto x : data) to.push_back(static_cast<T>(x));
      return to;
    };
    query = convert(from.query.data);
    key = convert(from.key.data);
    value = convert(from.value.data);
    grad_out = convert(from.out.data);
    out.resize(query.size());
    lse.resize(static_cast<std::size_t>(c.heads * c.length));
    if (c.gradient)
      for (auto* grad : {&grad_query, &grad_key, &grad_value}) grad->resize(query.size());
  }

  void run(const unit_case& c, cca::matrix_unit unit) {
    const auto in = [&](const auto& x) { return cca::bhsd(std::as_const(x).data(), 1, c.heads, c.length, c.dim); };
    const auto to = [&](std::vector<float>& x) { return cca::bhsd(x.data(), 1, c.heads, c.length, c.dim); };
    if (c.gradient)
      return cca::attention_gradient(cca::inputs{in(query), in(key), in(value)},
                                     cca::results{in(out), cca::bhs(std::as_const(lse).data(), 1, c.heads, c.length)},
                                     cca::incoming{in(grad_out)},
                                     cca::gradients{to(grad_query), to(grad_key), to(grad_value)}, c.options(unit));
    forward(c, unit);
  }
  void forward(const unit_case& c, cca::matrix_unit unit) {
    const auto in = [&](const auto& x) { return cca::bhsd(std::as_const(x).data(), 1, c.heads, c.length, c.dim); };
    cca::attention(
        cca::inputs{in(query), in(key), in(value)},
        cca::results{cca::bhsd(out.data(), 1, c.heads, c.length, c.dim), cca::bhs(lse.data(), 1, c.heads, c.length)},
        c.options(unit));
  }
  [[nodiscard]] const std::vector<float>& result(const unit_case& c) const { return c.gradient ? grad_query : out; }
};

double relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(error / size);
}

template <class Element>
void on_unit(benchmark::State& state, const unit_case& c, cca::matrix_unit unit) {
  operands<float> numbers(1, c.heads, c.heads, c.length, c.length, c.dim);
  fill(numbers.out, 4);
  unit_operands<Element> stored(c, numbers);
  for (auto [from, to] : {std::pair(&stored.query, &numbers.query), std::pair(&stored.key, &numbers.key),
                          std::pair(&stored.value, &numbers.value), std::pair(&stored.grad_out, &numbers.out)})
    std::transform(from->begin(), from->end(), to->data.begin(), [](Element x) { return static_cast<float>(x); });
  unit_operands<float> floats(c, numbers);
  floats.forward(c, cca::matrix_unit::none);
  stored.forward(c, unit);
  floats.run(c, cca::matrix_unit::none);
  stored.run(c, unit);
  const double error = relative_error(stored.result(c), floats.result(c));
  // What is rounded, cores, weights and gradients of logits, is rounded by half an epsilon each; to 8 bits, of numbers of
  // which the largest of a row is some three times the usual one, queries, keys, values and weights.
  const bool bytes = unit == cca::matrix_unit::vnni;
  if (!(error <= (bytes ? 0.02 : static_cast<double>(std::numeric_limits<Element>::epsilon()))))
    return state.SkipWithError("wrong result");

  double on = std::numeric_limits<double>::infinity(), off = on, in_floats = on, peak = 0;
  for (auto _ : state) {
    peak = std::max(peak, unit_peak(unit, stored.query));
    const double time = seconds([&] { stored.run(c, unit); });
    on = std::min(on, time);
    off = std::min(off, seconds([&] { stored.run(c, cca::matrix_unit::none); }));
    in_floats = std::min(in_floats, seconds([&] { floats.run(c, cca::matrix_unit::none); }));
    state.SetIterationTime(time);
  }
  state.counters["flop/s"] = c.flops() / on;
  state.counters["peak"] = c.flops() / on / peak;
  state.counters["speedup"] = in_floats / on;
  state.counters["best"] = cca::best_unit<Element>() == unit;
  state.counters["stored"] = in_floats / off;
  state.counters["error"] = error;
}

template <class Element>
void add_cases_of(const char* element) {
  if (cca::detail::present_unit<Element>() == cca::matrix_unit::none) return;
  constexpr std::int64_t K = 1024;
  const auto add_case = [&](const unit_case& c) {
    add(c.name(element), c.flops() / 40e9,
        [c](benchmark::State& state) { on_unit<Element>(state, c, cca::detail::present_unit<Element>()); });
  };
  for (const std::int64_t length : {32 * K, 128 * K}) add_case({.length = length});
  for (const std::int64_t dim : {64, 80, 256}) add_case({.length = 32 * K, .dim = dim});
  add_case({.heads = 8, .length = 4 * K});
  for (const std::int64_t length : {4 * K, 16 * K}) add_case({.dense = true, .length = length});
  add_case({.gradient = true, .length = 16 * K});
  add_case({.gradient = true, .length = 16 * K, .dim = 64});
  add_case({.gradient = true, .dense = true, .length = 4 * K});
}

template <class Element>
void add_cases_of_bytes(const char* element) {
  constexpr cca::matrix_unit unit = cca::matrix_unit::vnni;
  if (!cca::detail::has_unit<Element>(unit)) return;
  constexpr std::int64_t K = 1024;
  for (const unit_case& c :
       {unit_case{.length = 32 * K}, unit_case{.length = 128 * K}, unit_case{.length = 32 * K, .dim = 64},
        unit_case{.length = 32 * K, .dim = 256}, unit_case{.dense = true, .length = 32 * K},
        unit_case{.dense = true, .length = 32 * K, .dim = 64}})
    add(c.name(element), c.flops() / 80e9, [c](benchmark::State& state) { on_unit<Element>(state, c, unit); });
}

}  // namespace

void add_unit_cases() {
  add_cases_of<Eigen::bfloat16>("bfloat16");
  add_cases_of<Eigen::half>("half");
  add_cases_of_bytes<float>("float/vnni");
  add_cases_of_bytes<Eigen::bfloat16>("bfloat16/vnni");
}

}  // namespace bench
