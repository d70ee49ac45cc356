// Speed of sequences of their own lengths: 64 of 16 to 2048 tokens in one call, beside the same sequences called one after
// the other.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <cca/cca.hpp>

#include "cases.hpp"
#include "machine.hpp"
#include "operands.hpp"
#include "timing.hpp"

namespace bench {
namespace {

struct packed_case {
  bool together = true;
  std::int64_t heads = 8, kv_heads = 2, dim = 128;
  std::int64_t group_size = 0, window = cca::unlimited;
  int threads = 1;

  [[nodiscard]] cca::options options() const { return {.group_size = group_size, .window = window}; }
  [[nodiscard]] bool pools() const { return group_size > 0; }

  [[nodiscard]] std::string name(const char* type) const {
    std::string text = std::string("packed/") + type + (together ? "/together" : "/one_by_one");
    text += "/D:" + std::to_string(dim) + "/H:" + std::to_string(heads);
    if (kv_heads != heads) text += "/Hkv:" + std::to_string(kv_heads);
    if (pools()) text += "/g:" + std::to_string(group_size);
    if (window != cca::unlimited) text += "/s:" + std::to_string(window);
    if (threads > 1) text += "/threads:" + std::to_string(threads);
    return text;
  }
};

/// Where 64 sequences of 16 to 2048 tokens begin: the same numbers everywhere (Knuth's MMIX generator).
const std::vector<std::int64_t>& offsets() {
  static const std::vector<std::int64_t> all = [] {
    std::vector<std::int64_t> sums{0};
    std::uint64_t state = 1;
    for (int b = 0; b < 64; ++b) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sums.push_back(sums.back() + 16 + static_cast<std::int64_t>((state >> 33) % 2033));
    }
    return sums;
  }();
  return all;
}

double flops(const packed_case& c) {
  std::int64_t pairs = 0;
  for (std::size_t b = 0; b + 1 < offsets().size(); ++b)
    pairs += cca::partition_of(c.options()).pair_count({0, offsets()[b + 1] - offsets()[b]});
  return 4.0 * static_cast<double>(c.dim) * static_cast<double>(c.heads * pairs);
}

template <class T>
struct packed_operands {
  operands<T> memory;
  cca::tensor_view<T> query, key, value, out;

  explicit packed_operands(const packed_case& c)
      : memory(1, c.heads, c.kv_heads, offsets().back(), offsets().back(), c.dim),
        query(cca::packed(memory.query.data.data(), offsets(), c.heads, c.dim)),
        key(cca::packed(memory.key.data.data(), offsets(), c.kv_heads, c.dim)),
        value(cca::packed(memory.value.data.data(), offsets(), c.kv_heads, c.dim)),
        out(cca::packed(memory.out.data.data(), offsets(), c.heads, c.dim)) {}
  packed_operands(const packed_operands&) = delete;
  packed_operands& operator=(const packed_operands&) = delete;
};

template <class T>
void call(const packed_case& c, const packed_operands<T>& data, const cca::execution& run) {
  if (c.together) return cca::attention(data.query, data.key, data.value, data.out, c.options(), run);
  for (std::int64_t b = 0; b < data.query.batch(); ++b)
    cca::attention(data.query.sequence(b), data.key.sequence(b), data.value.sequence(b), data.out.sequence(b),
                   c.options(), run);
}

/// Whether a sequence alone agrees with the textbook, and has the same bits in the call that is timed.
template <class T>
bool check(const packed_case& c, const packed_operands<T>& data, std::int64_t b) {
  const std::int64_t length = data.query.length(b);
  operands<T> one(1, c.heads, c.kv_heads, length, length, c.dim);
  const auto copy = [&](cca::tensor_view<T> from, tensor<T>& to) {
    for (std::int64_t h = 0; h < from.heads(); ++h)
      for (std::int64_t i = 0; i < length; ++i) std::copy_n(from.row(b, h, i), c.dim, to.view().row(0, h, i));
  };
  copy(data.query, one.query);
  copy(data.key, one.key);
  copy(data.value, one.value);
  cca::attention(one.query.view(), one.key.view(), one.value.view(), one.out.view(), c.options());
  if (!bench::check(one, c.pools(), c.options())) return false;
  for (std::int64_t h = 0; h < c.heads; ++h)
    for (std::int64_t i = 0; i < length; ++i)
      if (std::memcmp(data.out.row(b, h, i), one.out.view().row(0, h, i),
                      static_cast<std::size_t>(c.dim) * sizeof(T)) != 0)
        return false;
  return true;
}

template <class T>
void attention(benchmark::State& state, const packed_case& c) {
  const packed_operands<T> data(c);
  Eigen::ThreadPool helpers(c.threads - 1);
  const auto run = [&](Eigen::ThreadPool& pool) { call(c, data, cca::thread_pool_executor(pool)); };
  run(helpers);
  for (std::int64_t b = 0; b < data.query.batch(); ++b)
    if (!check(c, data, b)) return state.SkipWithError("wrong result");

  const timing best = time<T>(state, run, helpers);
  count_flops(state, best, flops(c), c.threads);
  state.counters["token/s"] = static_cast<double>(offsets().back()) / best.seconds;
}

template <class T>
void add_packed(packed_case c) {
  for (const bool together : {true, false}) {
    c.together = together;
    const double estimate = flops(c) / 80e9 / c.threads;
    bench::add(c.name(type_name<T>), estimate, [c](benchmark::State& state) { attention<T>(state, c); });
  }
}

}  // namespace

void add_packed_cases() {
  add_packed<float>({});
  add_packed<float>({.group_size = 16, .window = 256});
  add_packed<float>({.heads = 32, .dim = 64, .group_size = 16, .window = 256});
  add_packed<float>({.group_size = 16, .window = 256, .threads = 2});
}

}  // namespace bench
