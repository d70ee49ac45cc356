// Executors at their edges: counts that make no sense, pools and tasks that fail, threads that compute in another mode.

#include "executors.hpp"
#include "passes.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <atomic>
#include <cfenv>
#include <chrono>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace cca::test { namespace {

template <class Pass>
class ThreadsOf : public testing::Test {};

TYPED_TEST_SUITE(ThreadsOf, passes);

// ---------------------------------------------------------------------------------------------------------- counts

/// Calls with `run` and expects a refusal that names it, and nothing written.
template <class Pass>
void expect_refused(const problem& p, const any_executor& run) {
  using T = typename Pass::element;
  random_engine random(1);
  typename Pass::memory memory(p);
  const arguments<T> a = memory.randomize(random).arguments();
  std::string message;
  try {
    Pass::call(p, a, run);
  } catch (const std::invalid_argument& refused) {
    message = refused.what();
  }
  EXPECT_EQ(message, "cca: executor: got a concurrency of " + std::to_string(run.threads) + ", wants at least 1") << p;
  for (const tensor_view<T>& result : a.results)
    for_each_row(result, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < result.dim(); ++d)
        ASSERT_TRUE(same_bits(result.row(b, h, i)[d], canary<T>())) << p << " writes before it refuses";
    });
}

TYPED_TEST(ThreadsOf, CountsBelow1AreRefused) {
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {3, 40})
      for (const std::int64_t threads : {std::int64_t{0}, std::int64_t{-1}, std::numeric_limits<std::int64_t>::min()})
        expect_refused<TypeParam>(example(entry, {.queries = length, .keys = length, .dim = 4, .value_dim = 4}),
                                  {.threads = threads});
}

#if defined(_OPENMP)
TEST(Threads, OpenMPRefusesCountsBelow1) {
  for (const int threads : {0, -1, std::numeric_limits<int>::min()}) {
    const openmp_executor run{.threads = threads};
    const auto expect_refused = [&](const auto& f) {
      std::string message;
      try {
        f();
      } catch (const std::invalid_argument& refused) {
        message = refused.what();
      }
      EXPECT_EQ(message, "cca: openmp_executor.threads: got " + std::to_string(threads) + ", wants at least 1");
    };
    int calls = 0;
    expect_refused([&] { run(2, [&](std::int64_t) { ++calls; }); });
    EXPECT_EQ(calls, 0);
    expect_refused([&] { (void)detail::concurrency(run); });
    // Of 0 tasks, too: a count does not become right by being of no use.
    for (const std::int64_t length : {0, 5}) {
      const tensor<float> part({1, 1, length, 2});
      const tensor<float, 3> lse({1, 1, length});
      tensor<float> out({1, 1, length, 2});
      tensor<float, 3> out_lse({1, 1, length});
      expect_refused([&] {
        merge<const float, const float>({part.view(), lse.view()}, {part.view(), lse.view()},
                                        {out.view(), out_lse.view()}, run);
      });
    }
  }
}

/// As many as OpenMP would not get.
TEST(Threads, OpenMPTakesNoMoreThreadsThanTasks) {
  const openmp_executor run{.threads = std::numeric_limits<int>::max()};
  std::atomic<int> calls{0};
  run(3, [&](std::int64_t) { ++calls; });
  EXPECT_EQ(calls, 3);
}
#endif

/// An executor without a bound runs a few calls, whatever it says.
template <class Number>
struct boundless {
  [[nodiscard]] Number concurrency() const { return std::numeric_limits<Number>::max(); }
  template <class F>
  void operator()(std::int64_t n, F&& f) const {
    for (std::int64_t i = 0; i < n && i < 4; ++i) f(i);
  }
};

TEST(Threads, NoBoundMeansTheProcessors) {
  const auto callable = [](std::int64_t n, const auto& f) { serial_executor{}(n, f); };
  const std::int64_t processors = detail::concurrency(callable);
  EXPECT_GE(processors, 1);
  EXPECT_LE(processors, detail::most_workers);
  EXPECT_EQ(detail::concurrency(boundless<std::int64_t>{}), processors);
  EXPECT_EQ(detail::concurrency(boundless<std::size_t>{}), processors);
  EXPECT_EQ(detail::concurrency(boundless<int>{}), processors);
  EXPECT_EQ(detail::concurrency(any_executor{.threads = detail::most_workers}), detail::most_workers);
}

TYPED_TEST(ThreadsOf, ExecutorsWithoutABoundAreLikeAnyOther) {
  random_engine random(2);
  const any_executor run{boundless<std::int64_t>{}.concurrency(), boundless<std::int64_t>{}};
  for (const entry entry : TypeParam::entries) {
    const problem p = example(entry, {.heads = 2, .queries = 300, .keys = 300, .dim = 4, .value_dim = 4});
    typename TypeParam::memory serial(p);
    TypeParam::call(p, serial.randomize(random).arguments());
    auto other = serial;
    TypeParam::call(p, other.arguments(), run);
    ASSERT_TRUE(same_bits(other.arguments().results, serial.arguments().results)) << p;
  }
}

// -------------------------------------------------------------------------------------------------------- failures

/// A pool that takes `room` functions and then throws. They run on threads of their own: at once, or when told to. At once,
/// it waits until each has begun a call, where `begun` counts them, and otherwise for a while.
class failing_pool {
 public:
  failing_pool(std::size_t room, bool at_once, const std::atomic<int>* begun = nullptr)
      : room_(room), at_once_(at_once), begun_(begun) {}

  [[nodiscard]] static int NumThreads() { return 4; }
  void Schedule(std::function<void()> f) {
    if (taken_.size() == room_) throw std::runtime_error("the pool is full");
    taken_.push_back(std::move(f));
    if (at_once_) run_last();
  }

  void run_all() {
    for (std::function<void()>& f : taken_) threads_.emplace_back(f);
    threads_.clear();
  }

 private:
  void run_last() {
    threads_.emplace_back(taken_.back());
    for (int i = 0; i < 10000 && (begun_ == nullptr ? i < 5 : *begun_ < std::ssize(taken_)); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  std::size_t room_;
  bool at_once_;
  const std::atomic<int>* begun_;
  std::vector<std::function<void()>> taken_;
  std::vector<std::jthread> threads_;
};

/// What helpers see of a call: whether it still runs, and how many of them are in it.
struct watched_call {
  std::atomic<bool> over{false};
  std::atomic<int> running{0}, begun{0}, late{0};

  void operator()(std::int64_t) {
    if (over) ++late;
    ++begun;
    ++running;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (over) ++late;
    --running;
  }
};

TEST(Threads, APoolThatFailsToScheduleLeavesNoHelperBehind) {
  for (const std::size_t room : {0U, 1U, 2U})
    for (const bool at_once : {false, true}) {
      watched_call call;
      failing_pool pool(room, at_once, &call.begun);
      std::string message;
      try {
        thread_pool_executor{pool}(100, std::ref(call));
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      EXPECT_EQ(call.running, 0);
      call.over = true;
      if (!at_once) pool.run_all();
      EXPECT_EQ(message, "the pool is full") << room;
      EXPECT_EQ(call.late, 0) << room;
      EXPECT_EQ(call.begun, at_once ? static_cast<int>(room) : 0);
    }
}

TYPED_TEST(ThreadsOf, APoolThatFailsToScheduleDoesNotHang) {
  random_engine random(3);
  for (const entry entry : TypeParam::entries) {
    const problem p =
        example(entry, {.heads = 8, .kv_heads = 8, .queries = 300, .keys = 300, .dim = 4, .value_dim = 4});
    typename TypeParam::memory memory(p);
    const auto a = memory.randomize(random).arguments();
    for (const std::size_t room : {1U, 2U}) {
      const auto pool = std::make_shared<failing_pool>(room, true);
      const any_executor run{5, [pool](std::int64_t n, const auto& f) { thread_pool_executor{*pool}(n, f); }};
      EXPECT_THROW(TypeParam::call(p, a, run), std::runtime_error) << p;
    }
  }
}

/// A call that throws: no other is begun after it, those that run come to their end, and the caller hears of the first.
TEST(Threads, ACallThatThrowsEndsTheOthersAndReachesTheCaller) {
  Eigen::ThreadPool pool(3);
  std::vector<named_executor> all{
      {"serial", {1, serial_executor{}}},
      {"pool", {4, [&](std::int64_t n, const auto& f) { thread_pool_executor{pool}(n, f); }}}};
#if defined(_OPENMP)
  all.push_back({"OpenMP", {4, openmp_executor{.threads = 4}}});
#endif
  for (const auto& [name, run] : all)
    for (const std::int64_t thrower : {0, 1, 37, 99}) {
      watched_call call;
      std::atomic<int> begun{0};
      std::string message;
      try {
        run(100, [&](std::int64_t i) {
          ++begun;
          if (i == thrower) throw std::runtime_error("call " + std::to_string(i));
          if (i > thrower) call(i);
        });
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      EXPECT_EQ(call.running, 0) << name;
      call.over = true;
      EXPECT_EQ(message, "call " + std::to_string(thrower)) << name;
      EXPECT_LE(begun, thrower + 8) << name;
      // The threads are still of use.
      std::atomic<int> more{0};
      run(10, [&](std::int64_t) { ++more; });
      EXPECT_EQ(more, 10) << name;
      EXPECT_EQ(call.late, 0) << name;
    }
}

// ---------------------------------------------------------------------------------------------- floating-point modes

#if defined(__SSE2__)
constexpr detail::float_mode usual = 0, flushing = 0x8040, upwards = 0x4000;
#else
constexpr detail::float_mode usual = 0, flushing = 1 << 24, upwards = 1 << 22;
#endif
constexpr std::array modes{usual, flushing, upwards};

/// Threads of which each computes in `mode` and expects to do so after a task, too.
any_executor threads_in(detail::float_mode mode, std::atomic<int>& changed) {
  return {3, [mode, &changed](std::int64_t n, const auto& f) {
            thread_per_task(n, [&](std::int64_t i) {
              const detail::float_mode_scope scope(mode);
              f(i);
              if (detail::current_float_mode() != mode) ++changed;
            });
          }};
}

/// Numbers of which many products and sums are denormal.
template <class Pass>
typename Pass::memory denormal_operands(const problem& p, random_engine& random) {
  using T = typename Pass::element;
  typename Pass::memory memory(p);
  memory.randomize(random);
  for (tensor<T>& operand : memory.operands) operand.randomize(random, std::numeric_limits<T>::min());
  if constexpr (std::is_same_v<typename Pass::memory, gradient_memory<T>>) memory.forward();
  return memory;
}

/// Flushed denormals and directed rounding give other bits: those of the calling thread's mode, whatever the others'.
TYPED_TEST(ThreadsOf, AllComputeInTheModeOfTheCallingThread) {
  using T = typename TypeParam::element;
  random_engine random(4);
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {5, 200}) {
      const problem p = example(entry, {.heads = 2, .queries = length, .keys = length, .dim = 4, .value_dim = 4});
      const auto operands = denormal_operands<TypeParam>(p, random);
      std::vector<typename TypeParam::memory> expected;
      for (const detail::float_mode mode : modes) {
        const detail::float_mode_scope scope(mode);
        expected.push_back(operands);
        TypeParam::call(p, expected.back().arguments());
      }
      for (std::size_t i = 1; i < modes.size(); ++i)
        ASSERT_FALSE(same_bits<T>(expected[0].arguments().results, expected[i].arguments().results)) << p << ", " << i;
      for (std::size_t i = 0; i < modes.size(); ++i)
        for (const detail::float_mode other : modes) {
          const detail::float_mode_scope scope(modes[i]);
          std::atomic<int> changed{0};
          auto memory = operands;
          TypeParam::call(p, memory.arguments(), threads_in(other, changed));
          ASSERT_EQ(detail::current_float_mode(), modes[i]) << p;
          ASSERT_EQ(changed, 0) << p << ": a thread is left in another mode";
          ASSERT_TRUE(same_bits<T>(memory.arguments().results, expected[i].arguments().results))
              << p << ", mode " << modes[i] << " among threads in " << other;
        }
    }
}

/// Exceptions that were raised stay with the thread that raised them.
TEST(Threads, AModeIsNoMoreThanRoundingAndDenormals) {
  const detail::float_mode before = detail::current_float_mode();
  std::feclearexcept(FE_ALL_EXCEPT);
  {
    const detail::float_mode_scope scope(flushing);
    EXPECT_EQ(detail::current_float_mode(), flushing);
    volatile float one = 1, zero = 0;
    one = one / zero;
  }
  EXPECT_EQ(detail::current_float_mode(), before);
  EXPECT_TRUE(std::fetestexcept(FE_DIVBYZERO));
  std::feclearexcept(FE_ALL_EXCEPT);
}

}}  // namespace cca::test
