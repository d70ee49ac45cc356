#pragma once

// Executors of many kinds.

#include "entry_points.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <memory>
#include <numeric>
#include <thread>
#include <unsupported/Eigen/CXX11/ThreadPool>

namespace cca::test {

struct named_executor {
  std::string name;
  any_executor run;
};

/// One thread for each task.
inline void thread_per_task(std::int64_t n, const std::function<void(std::int64_t)>& f) {
  std::vector<std::jthread> threads;
  for (std::int64_t i = 0; i < n; ++i) threads.emplace_back([&f, i] { f(i); });
}

inline std::vector<named_executor> executors() {
  std::vector<named_executor> all;
  for (const std::int64_t threads : {1, 2, 5}) {
    const std::string with = " with " + std::to_string(threads) + " at a time";
    all.push_back({"backwards" + with, {threads, [](std::int64_t n, const auto& f) {
                                          for (std::int64_t i = n; i-- > 0;) f(i);
                                        }}});
    all.push_back({"shuffled" + with, {threads, [](std::int64_t n, const auto& f) {
                                         std::vector<std::int64_t> order(static_cast<std::size_t>(n));
                                         std::iota(order.begin(), order.end(), 0);
                                         random_engine random(static_cast<std::uint64_t>(n));
                                         std::shuffle(order.begin(), order.end(), random);
                                         for (const std::int64_t i : order) f(i);
                                       }}});
  }
  for (const std::int64_t threads : {3, 64}) all.push_back({"a thread per task", {threads, thread_per_task}});
#if defined(_OPENMP)
  for (const int threads : {1, 2, 3, 7, 64}) {
    const openmp_executor openmp{.threads = threads};
    all.push_back({"OpenMP with " + std::to_string(threads), {openmp.concurrency(), openmp}});
  }
#endif
  for (const int threads : {1, 2, 3, 7}) {
    const auto pool = std::make_shared<Eigen::ThreadPool>(threads);
    const thread_pool_executor run(*pool);
    all.push_back({"pool of " + std::to_string(threads),
                   {run.concurrency(), [pool, run](std::int64_t n, const auto& f) { run(n, f); }}});
    // From one of its own threads, which must not wait for a thread that waits for it.
    all.push_back({"from within a pool of " + std::to_string(threads),
                   {run.concurrency(), [pool, run](std::int64_t n, const auto& f) {
                      Eigen::Barrier done(1);
                      pool->Schedule([&] {
                        run(n, f);
                        done.Notify();
                      });
                      done.Wait();
                    }}});
  }
  return all;
}

}  // namespace cca::test
