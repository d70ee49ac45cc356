#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "detail/base/float_mode.hpp"
#include "detail/base/function_ref.hpp"
#include "detail/base/numbers.hpp"
#include "detail/base/refuse.hpp"
#include "detail/base/target.hpp"

namespace cca { inline namespace CCA_TARGET {

/// Anything that can run `f(i)` once for every i in `[0, n)`, in any order and on any threads, and returns when all are
/// done. An optional member `concurrency()`, at least 1, says how many of them may run at once; it bounds the scratch
/// memory and the threads used. The processor's thread count is taken where there is no such member, and where it says
/// more than 4096, which means that there is no bound.
///
/// Results never depend on the executor: every thread computes in the rounding mode of the calling one, and treats
/// denormal numbers as that does. Should a call throw, the executors below begin no other, wait for those that run, and
/// throw the first exception in the calling thread.
template <class E>
concept executor = requires(const E& run, void (*f)(std::int64_t)) {
  run(std::int64_t{}, f);
};

namespace detail {

/// More calls at a time than any machine runs.
inline constexpr std::int64_t most_workers = 4096;

/// How many calls `run` makes at once.
template <executor E>
std::int64_t concurrency(const E& run) {
  if constexpr (requires { run.concurrency(); }) {
    const auto said = run.concurrency();
    if (said < 1) refuse("executor", {"a concurrency of ", said}, {"at least 1"});
    if (said <= most_workers) return static_cast<std::int64_t>(said);
  }
  return std::clamp<std::int64_t>(std::thread::hardware_concurrency(), 1, most_workers);
}

/// How many workers, each with scratch memory of its own, share `tasks` tasks.
template <executor E>
std::int64_t worker_count(const E& run, std::int64_t tasks) {
  return std::clamp<std::int64_t>(tasks, 1, concurrency(run));
}

/// Runs `work(worker)` on each of some workers, in the calling thread's treatment of numbers.
template <executor E>
void run_workers(const E& run, std::int64_t workers, function_ref<void(std::int64_t)> work) {
  run(workers, [&, mode = current_float_mode()](std::int64_t worker) {
    const float_mode_scope scope(mode);
    work(worker);
  });
}

/// Runs `task(worker, i)` once for every i in `[0, count)`. Calls with the same `worker` in `[0, workers)` never
/// overlap, so each worker can have scratch memory of its own. Tasks are begun in order: put the long ones first.
template <executor E>
void run_tasks(const E& run, std::int64_t workers, std::int64_t count,
               function_ref<void(std::int64_t, std::int64_t)> task) {
  if (count <= 0) return;
  std::atomic<std::int64_t> next{0};
  run_workers(run, smaller(workers, count), [&](std::int64_t worker) {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(worker, i);
  });
}

/// The same of `task(worker, i, next)`, which is told what its worker runs next: `count` where nothing is known, as of the last
/// tasks, which whoever is free first takes.
template <executor E>
void run_tasks_in_sight(const E& run, std::int64_t workers, std::int64_t count,
                        function_ref<void(std::int64_t, std::int64_t, std::int64_t)> task) {
  if (count <= 0) return;
  std::atomic<std::int64_t> free{0};
  const auto claim = [&] { return smaller(free.fetch_add(1, std::memory_order_relaxed), count); };
  run_workers(run, smaller(workers, count), [&](std::int64_t worker) {
    for (std::int64_t i = claim(); i < count;) {
      const bool in_sight = workers == 1 || count - i > 4 * workers;
      const std::int64_t next = in_sight ? claim() : count;
      task(worker, i, next);
      i = in_sight ? next : claim();
    }
  });
}

/// The first exception among calls that some threads make. It must leave neither the thread of a pool nor, while others
/// still run, the function that they were called from: it waits here.
class first_failure {
 public:
  /// Calls `f` unless a call has failed before.
  template <class F>
  void attempt(const F& f) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }

  /// Throws it in the calling thread, once all attempts are over.
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace detail

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
///
/// It hangs in the child of a process that had used OpenMP before `fork()`: GNU's OpenMP (libgomp) keeps the threads of a
/// parallel region for the next one, and the child, which inherits none of them, waits for them forever. Fork before the
/// first use, or let the child call with `serial_executor` or with a pool that it has made itself.
struct openmp_executor {
  int threads = omp_get_max_threads();  ///< how many take part, at most; at least 1

  /// One call per thread.
  /// @throws std::invalid_argument  for less than one thread
  [[nodiscard]] std::int64_t concurrency() const {
    if (threads < 1) detail::refuse("openmp_executor.threads", {threads}, {"at least 1"});
    return threads;
  }

  /// Runs `f(i)` for i in `[0, n)` on OpenMP's threads.
  template <class F>
  void operator()(std::int64_t n, F&& f) const {
    [[maybe_unused]] const int team = static_cast<int>(detail::worker_count(*this, n));
    detail::first_failure failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (std::int64_t i = 0; i < n; ++i) failure.attempt([&] { f(i); });
    failure.rethrow();
  }
};
#endif

/// `Eigen::ThreadPool`, or any pool with `Schedule(function)` and `NumThreads()`. The calling thread works too, and
/// waits only for calls that have begun: so it may be one of the pool's own threads. What `Schedule` throws is treated
/// as if a call had thrown it.
template <class Pool>
struct thread_pool_executor {
  Pool& pool;  ///< the caller's; outlives the executor

  /// Does not own the pool.
  explicit thread_pool_executor(Pool& p) : pool(p) {}

  /// The pool's threads and the calling one.
  [[nodiscard]] std::int64_t concurrency() const { return static_cast<std::int64_t>(pool.NumThreads()) + 1; }

  /// Runs `f(i)` for i in `[0, n)` on the pool's threads and the calling one.
  template <class F>
  void operator()(std::int64_t n, F&& f) const {
    struct progress : detail::first_failure {
      std::atomic<std::int64_t> next{0}, done{0};
    };
    // Shared: a helper that the pool starts late finds nothing left, after this call has returned.
    const auto state = std::make_shared<progress>();
    const auto work = [state, n, &f] {
      for (std::int64_t i; (i = state->next.fetch_add(1)) < n;) {
        state->attempt([&] { f(i); });
        if (state->done.fetch_add(1) + 1 == n) state->done.notify_all();
      }
    };
    state->attempt([&] {
      for (std::int64_t helper = 1; helper < n && helper < concurrency(); ++helper) pool.Schedule(work);
    });
    work();
    for (std::int64_t done; (done = state->done.load()) < n;) state->done.wait(done);
    state->rethrow();
  }
};

}}  // namespace cca::CCA_TARGET
