#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <benchmark/benchmark.h>

#include "machine.hpp"
#include "operands.hpp"

/// How cases are timed and what they report.
namespace bench {

/// How long the iterations of a case took.
class iteration_times {
 public:
  explicit iteration_times(benchmark::State& state) : state_(&state) {}

  void add(double seconds) {
    state_->SetIterationTime(seconds);
    seconds_.push_back(seconds);
  }
  [[nodiscard]] double best() const { return *std::min_element(seconds_.begin(), seconds_.end()); }

  /// Counters `best_ms` and `median_ms`.
  void report() const {
    std::vector<double> sorted = seconds_;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t middle = sorted.size() / 2;
    state_->counters["best_ms"] = 1e3 * sorted.front();
    state_->counters["median_ms"] = 5e2 * (sorted[middle] + sorted[sorted.size() - 1 - middle]);
  }

 private:
  benchmark::State* state_;
  std::vector<double> seconds_;
};

/// The best of the iterations of a case, and the best peak measured around them.
struct timing {
  double seconds = 0, peak = 0;
};

/// Times `f` by the clock `seconds_of`. `between` runs untimed in every iteration: what `f` is compared with has the
/// same neighbours then.
template <class T, class F, class Clock, class Between>
timing time(benchmark::State& state, const F& f, const Clock& seconds_of, const Between& between) {
  iteration_times times(state);
  double peak = 0;
  for ([[maybe_unused]] auto _ : state) {
    peak = std::max(peak, fma_peak<T>());
    times.add(seconds_of(f));
    between();
  }
  times.report();
  return {times.best(), std::max(peak, fma_peak<T>())};
}

/// Times `f`, which runs on one thread.
template <class T, class F>
timing time(benchmark::State& state, const F& f) {
  return time<T>(
      state, f, [](const auto& g) { return seconds(g); }, [] {});
}

/// Times `f(helpers)` by the wall clock where it has helping threads, and the same without them in turn.
template <class T, class Pool, class F>
timing time(benchmark::State& state, const F& f, Pool& helpers) {
  if (helpers.NumThreads() == 0) return time<T>(state, [&] { f(helpers); });
  Pool none(0);
  const auto clock = [](const auto& g) { return elapsed_seconds(g); };
  double serial = std::numeric_limits<double>::infinity();
  const timing best = time<T>(
      state, [&] { f(helpers); }, clock, [&] { serial = std::min(serial, clock([&] { f(none); })); });
  state.counters["speedup"] = serial / best.seconds;
  return best;
}

inline void count_flops(benchmark::State& state, const timing& best, double flops, int threads = 1) {
  state.counters["flop/s"] = flops / best.seconds;
  state.counters["peak"] = flops / best.seconds / best.peak / threads;
}

/// `operands` are all read once.
template <class... T>
void count_bytes(benchmark::State& state, const timing& best, const tensor<T>&... operands) {
  const auto bytes = static_cast<double>(((operands.data.size() * sizeof(T)) + ...));
  const double ruler = best_seconds(
      10, [&] { (bench::read(operands.data.data(), static_cast<std::int64_t>(operands.data.size())), ...); });
  state.counters["byte/s"] = bytes / best.seconds;
  state.counters["bandwidth"] = ruler / best.seconds;
}

template <class T>
constexpr const char* type_name = std::is_same_v<T, float> ? "float" : "double";

/// One call is an iteration; short calls are repeated for about a second.
template <class F>
void add(const std::string& name, double seconds_estimate, const F& f) {
  benchmark::RegisterBenchmark(name.c_str(), f)
      ->Iterations(static_cast<benchmark::IterationCount>(std::clamp(1 / seconds_estimate, 3.0, 50.0)))
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace bench
