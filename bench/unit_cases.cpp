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
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>
#include <Eigen/Core>

#include <cca/cca.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "shape.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct unit_case {
  bool gradient = false;
  std::int64_t batch = 1, heads = 1, kv_heads = 0, length = 0, dim = 128;
  context seen{16, 1024};

  [[nodiscard]] cca::options options(cca::matrix_unit unit) const {
    return {.group_size = seen.group_size, .window = seen.window, .unit = unit};
  }
  [[nodiscard]] std::int64_t kv_head_count() const { return kv_heads ? kv_heads : heads; }
  [[nodiscard]] double flops() const {
    const cca::options o = options(cca::matrix_unit::none);
    const std::int64_t pairs = cca::partition_of(o).pair_count({0, length});
    return (gradient ? 10.0 : 4.0) * static_cast<double>(dim) * static_cast<double>(batch * heads * pairs);
  }
  [[nodiscard]] std::string name(const char* element) const {
    case_name name{std::string("unit/") + (gradient ? "gradient/" : "") + seen.name() + "/" + element};
    name.add("D", dim);
    if (batch > 1) name.add("B", batch);
    if (heads > 1) name.add("H", heads);
    if (kv_heads) name.add("Hkv", kv_heads);
    name.add("L", length);
    name.add(seen);
    return name.text;
  }
};

/// The same of integers, 128 columns of 128 values by 64 lanes.
inline double byte_peak() {
  using namespace cca::detail;
  constexpr std::int64_t rows = 128, lanes = 64, depth = 128, times = 100;
  alignas(64) static packed_quad a[depth / 4 * rows];
  alignas(64) static packed_quad b[depth / 4 * lanes];
  alignas(64) static float c[rows * lanes], share[lanes], rescale[lanes];
  for (std::int64_t i = 0; i < depth / 4 * rows; ++i) a[i] = static_cast<packed_quad>(i) * 2246822519u;
  for (std::int64_t i = 0; i < depth / 4 * lanes; ++i) b[i] = static_cast<packed_quad>(i) * 2654435761u;
  const double time = best_seconds(5, [&] {
    for (std::int64_t i = 0; i < times; ++i) {
      add_bytes({a, rows}, {b, lanes, share}, {c, rescale, depth / 4}, rows);
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
    lse.resize(static_cast<std::size_t>(c.batch * c.heads * c.length));
    if (!c.gradient) return;
    grad_query.resize(query.size());
    for (auto* grad : {&grad_key, &grad_value}) grad->resize(key.size());
  }

  void run(const unit_case& c, cca::matrix_unit unit) {
    if (!c.gradient) return forward(c, unit);
    const std::int64_t kv = c.kv_head_count();
    cca::attention_gradient(
        inputs(c), cca::results{rows(c, std::as_const(out), c.heads), lses(c, std::as_const(lse))},
        cca::incoming{rows(c, std::as_const(grad_out), c.heads)},
        cca::gradients{rows(c, grad_query, c.heads), rows(c, grad_key, kv), rows(c, grad_value, kv)}, c.options(unit));
  }
  void forward(const unit_case& c, cca::matrix_unit unit) {
    cca::attention(inputs(c), cca::results{rows(c, out, c.heads), lses(c, lse)}, c.options(unit));
  }
  [[nodiscard]] const std::vector<float>& result(const unit_case& c) const { return c.gradient ? grad_query : out; }

 private:
  template <class V>
  static auto rows(const unit_case& c, V& of, std::int64_t heads) {
    return cca::bhsd(of.data(), c.batch, heads, c.length, c.dim);
  }
  template <class V>
  static auto lses(const unit_case& c, V& of) {
    return cca::bhs(of.data(), c.batch, c.heads, c.length);
  }
  [[nodiscard]] auto inputs(const unit_case& c) const {
    return cca::inputs{rows(c, query, c.heads), rows(c, key, c.kv_head_count()), rows(c, value, c.kv_head_count())};
  }
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
  operands<float> numbers(c.batch, c.heads, c.kv_head_count(), c.length, c.length, c.dim);
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

  iteration_times times(state);
  double off = std::numeric_limits<double>::infinity(), in_floats = off, peak = 0;
  for ([[maybe_unused]] auto _ : state) {
    peak = std::max(peak, unit == cca::matrix_unit::none ? fma_peak<float>() : unit_peak(unit, stored.query));
    times.add(seconds([&] { stored.run(c, unit); }));
    off = std::min(off, seconds([&] { stored.run(c, cca::matrix_unit::none); }));
    in_floats = std::min(in_floats, seconds([&] { floats.run(c, cca::matrix_unit::none); }));
  }
  times.report();
  const double on = times.best();
  state.counters["flop/s"] = c.flops() / on;
  state.counters["peak"] = c.flops() / on / peak;
  state.counters["speedup"] = in_floats / on;
  state.counters["best"] = cca::best_unit<Element>() == unit;
  state.counters["stored"] = in_floats / off;
  state.counters["error"] = error;
}

template <class Element>
constexpr const char* element_name = std::is_same_v<Element, Eigen::half> ? "half" : "bfloat16";

template <class Element>
void add_case(const unit_case& c) {
  add(c.name(element_name<Element>), c.flops() / 40e9,
      [c](benchmark::State& state) { on_unit<Element>(state, c, cca::detail::present_unit<Element>()); });
}

template <class Element>
void add_cases_of() {
  if (cca::detail::present_unit<Element>() == cca::matrix_unit::none) return;
  constexpr std::int64_t K = 1024;
  for (const std::int64_t length : {32 * K, 128 * K}) add_case<Element>({.length = length});
  for (const std::int64_t dim : {64, 80, 256}) add_case<Element>({.length = 32 * K, .dim = dim});
  add_case<Element>({.heads = 8, .length = 4 * K});
  for (const std::int64_t length : {4 * K, 16 * K}) add_case<Element>({.length = length, .seen = {}});
  add_case<Element>({.gradient = true, .length = 16 * K});
  add_case<Element>({.gradient = true, .length = 16 * K, .dim = 64});
  add_case<Element>({.gradient = true, .length = 4 * K, .seen = {}});
}

template <class Element>
void add_case_of_bytes(const unit_case& c) {
  const std::string element = std::is_same_v<Element, float> ? "float" : element_name<Element>;
  add(c.name((element + "/vnni").c_str()), c.flops() / 80e9,
      [c](benchmark::State& state) { on_unit<Element>(state, c, cca::matrix_unit::vnni); });
}

template <class Element>
void add_cases_of_bytes() {
  if (!cca::detail::has_unit<Element>(cca::matrix_unit::vnni)) return;
  constexpr std::int64_t K = 1024;
  for (const std::int64_t length : {32 * K, 128 * K}) add_case_of_bytes<Element>({.length = length});
  for (const std::int64_t dim : {64, 256}) add_case_of_bytes<Element>({.length = 32 * K, .dim = dim});
  for (const std::int64_t dim : {128, 64}) add_case_of_bytes<Element>({.length = 32 * K, .dim = dim, .seen = {}});
}

}  // namespace

void add_unit_cases() {
  add_cases_of<Eigen::bfloat16>();
  add_cases_of<Eigen::half>();
  add_cases_of_bytes<float>();
  add_cases_of_bytes<Eigen::bfloat16>();
}

void add_unit_shape(shape of, std::string_view kind, bool gradient) {
  const std::string type = of.take_text("dtype", "float"), unit = of.take_text("unit", "best");
  unit_case c{gradient, of.take("B", 1), of.take("H", 1), of.take("Hkv", 0, 0), of.take("L", 4096), of.take("D", 128)};
  const std::vector<context> contexts = take_contexts(of, kind);
  of.finish();
  if (unit != "best" && unit != "vnni") of.refuse("unit", unit, "best or vnni");
  if (gradient && unit == "vnni") of.refuse("unit", unit, "best: integers have no gradients");
  if (unit == "best" && type == "float") of.refuse("dtype", type, "bf16 or half, with unit=best");
  for (const context& seen : contexts) {
    c.seen = seen;
    if (unit == "best")
      type == "half" ? add_case<Eigen::half>(c) : add_case<Eigen::bfloat16>(c);
    else if (type == "float")
      add_case_of_bytes<float>(c);
    else
      type == "half" ? add_case_of_bytes<Eigen::half>(c) : add_case_of_bytes<Eigen::bfloat16>(c);
  }
}

}  // namespace bench
