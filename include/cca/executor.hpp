#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET {

/// Anything that can run `f(i)` once for every i in `[0, n)`, in any order and on any threads, and returns when all are
/// done. An optional member `concurrency()` says how many of them may run at once; it bounds the scratch memory and the
/// threads used. Without it the processor's thread count is taken. Results never depend on the executor.
template <class E>
concept executor = requires(const E& run, void (*f)(std::int64_t)) {
  run(std::int64_t{}, f);
};

/// Runs on the calling thread.
struct serial_executor {
  /// One call at a time.
  [[nodiscard]] static constexpr std::int64_t concurrency() { return 1; }

  /// Runs `f(0), .. f(n - 1)` in this order.
  template <class F>
  void operator()(std::int64_t n, F&& f) const {
    for (std::int64_t i = 0; i < n; ++i) f(i);
  }
};

#if defined(_OPENMP)
/// OpenMP's threads. Declared only where the translation unit is compiled with OpenMP: without it the pragma would
/// silently mean one thread.
struct openmp_executor {
  int threads = omp_get_max_threads();  ///< how many take part, at most

  /// One call per thread.
  [[nodiscard]] std::int64_t concurrency() const { return threads; }

  /// Runs `f(i)` for i in `[0, n)` on OpenMP's threads.
  template <class F>
  void operator()(std::int64_t n, F&& f) const {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t i = 0; i < n; ++i) f(i);
  }
};
#endif

/// `Eigen::ThreadPool`, or any pool with `Schedule(function)` and `NumThreads()`. The calling thread works too, and
/// waits only for calls that have begun: so it may be one of the pool's own threads.
template <class Pool>
struct thread_pool_executor {
  Pool& pool;  ///< the caller's; outlives the executor

  /// Takes no part in the pool's lifetime.
  explicit thread_pool_executor(Pool& p) : pool(p) {}

  /// The pool's threads and the calling one.
  [[nodiscard]] std::int64_t concurrency() const { return pool.NumThreads() + 1; }

  /// Runs `f(i)` for i in `[0, n)` on the pool's threads and the calling one.
  template <class F>
  void operator()(std::int64_t n, F&& f) const {
    struct progress {
      std::atomic<std::int64_t> next{0}, done{0};
    };
    // Shared: a helper that the pool starts late finds nothing left, after this call has returned.
    const auto state = std::make_shared<progress>();
    const auto work = [state, n, &f] {
      for (std::int64_t i; (i = state->next.fetch_add(1)) < n;) {
        f(i);
        if (state->done.fetch_add(1) + 1 == n) state->done.notify_all();
      }
    };
    for (std::int64_t helper = 1; helper < n && helper < concurrency(); ++helper) pool.Schedule(work);
    work();
    for (std::int64_t done; (done = state->done.load()) < n;) state->done.wait(done);
  }
};

namespace detail {

/// How many calls `run` makes at once: as many as there are scratch areas to give out.
template <executor E>
std::int64_t concurrency(const E& run) {
  if constexpr (requires { run.concurrency(); })
    return run.concurrency() > 1 ? static_cast<std::int64_t>(run.concurrency()) : 1;
  else
    return std::thread::hardware_concurrency() > 1 ? std::thread::hardware_concurrency() : 1;
}

/// Runs `task(worker, i)` once for every i in `[0, count)`. Calls with the same `worker` in `[0, workers)` never
/// overlap, so each worker can have scratch memory of its own. Tasks are begun in order: put the long ones first.
template <executor E, class Task>
void run_tasks(const E& run, std::int64_t workers, std::int64_t count, const Task& task) {
  if (count <= 0) return;
  std::atomic<std::int64_t> next{0};
  run(workers < count ? workers : count, [&](std::int64_t worker) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(worker, i);
  });
}

}  // namespace detail
}}  // namespace cca::CCA_TARGET
