#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <benchmark/benchmark.h>

#include <cca/detail/simd/simd.hpp>

/// The rulers: what one core of this machine can do in this build. Its clock and its neighbours wobble, so each takes a
/// few milliseconds and is laid on again around whatever it measures.
namespace bench {

#if defined(__clang__)
inline constexpr const char* compiler = __VERSION__;
#else
inline constexpr const char* compiler = "g++ " __VERSION__;
#endif

inline const char* instruction_set() { return cca::detail::vec<float>::arch_type::name(); }

/// Seconds of the wall clock.
template <class F>
double elapsed_seconds(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Seconds that the calling thread ran: other programs on the same core do not count.
template <class F>
double seconds(const F& f) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double start = now();
  f();
  return now() - start;
}

/// The shortest of `rounds` runs.
template <class F>
double best_seconds(int rounds, const F& f) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < rounds; ++i) best = std::min(best, seconds(f));
  return best;
}

/// FLOP/s of independent multiply-adds.
template <class T>
double fma_peak() {
  using cca::detail::unroll, cca::detail::vec;
  // Two multiply-adds a cycle of 4 or 5 cycles each want 10 chains; with both operands, 12 fit 16 registers.
  constexpr std::int64_t chains = 12, steps = 1 << 16;
  T start = T(1), factor = T(0.999), addend = T(0.001);
  benchmark::DoNotOptimize(start);
  benchmark::DoNotOptimize(factor);
  benchmark::DoNotOptimize(addend);
  const double time = best_seconds(5, [&] {
    const vec<T> a(factor), b(addend);
    vec<T> x[chains];
    // Different values, or the compiler would compute one chain for all.
    unroll<chains>([&](auto i) CCA_INLINE_LAMBDA { x[i] = vec<T>(start + static_cast<T>(i)); });
    for (std::int64_t step = 0; step < steps; ++step)
      unroll<chains>([&](auto i) CCA_INLINE_LAMBDA { x[i] = cca::detail::fma<T>(x[i], a, b); });
    unroll<chains - 1>([&](auto i) CCA_INLINE_LAMBDA { x[0] += x[i + 1]; });
    T sum = cca::detail::reduce_add<T>(x[0]);
    benchmark::DoNotOptimize(sum);
  });
  return 2.0 * steps * chains * cca::detail::width<T> / time;
}

/// Reads `count` elements in order, as fast as it goes.
template <class T>
void read(const T* from, std::int64_t count) {
  using cca::detail::unroll, cca::detail::vec;
  constexpr std::int64_t W = cca::detail::width<T>, sums = 8;
  vec<T> sum[sums];
  unroll<sums>([&](auto i) CCA_INLINE_LAMBDA { sum[i] = vec<T>(T(0)); });
  for (std::int64_t i = 0; i + sums * W <= count; i += sums * W)
    unroll<sums>([&](auto n) CCA_INLINE_LAMBDA { sum[n] += vec<T>::load_unaligned(from + i + n * W); });
  unroll<sums - 1>([&](auto i) CCA_INLINE_LAMBDA { sum[0] += sum[i + 1]; });
  T total = cca::detail::reduce_add<T>(sum[0]);
  benchmark::DoNotOptimize(total);
}

}  // namespace bench
