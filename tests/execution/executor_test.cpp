// Results depend neither on who runs the tasks nor on what else is in the batch: they are the same to the bit.

#include "executors.hpp"
#include "passes.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <mutex>

namespace cca::test { namespace {

// ----------------------------------------------------------------------------------------------------- executors

template <class Pass>
class ExecutorOf : public testing::Test {};

TYPED_TEST_SUITE(ExecutorOf, passes);

TYPED_TEST(ExecutorOf, ResultsAreTheSameForAny) {
  using T = typename TypeParam::element;
  const std::int64_t stack = TypeParam::stack();
  random_engine random(1);
  const auto all = executors();
  // One long head, many heads, and few queries over a context that is cut into parts.
  const std::array shapes{
      sizes{.queries = 7 * stack + 7, .keys = 7 * stack + 7, .dim = 4, .value_dim = 4},
      sizes{.batch = 2, .heads = 12, .kv_heads = 3, .queries = stack + 3, .keys = stack + 3, .dim = 4, .value_dim = 4},
      sizes{.heads = 4, .kv_heads = 2, .queries = 2, .keys = 5000, .dim = 4, .value_dim = 4}};
  std::vector<problem> problems;
  for (const entry entry : TypeParam::entries)
    for (const sizes& s : shapes) {
      problem p = example(entry, s);
      if (s.queries < s.keys && entry == entry::attention) continue;  // which has a query for every key
      if (s.queries < s.keys && entry == entry::local) p.options.window = s.keys - 5;
      problems.push_back(p);
    }
  // Two heads of one kind share one of the other kind, but not with the same heads.
  problems.push_back(example(
      entry::attend, {.heads = 6, .kv_heads = 3, .queries = 3 * stack, .keys = 3 * stack, .dim = 40, .value_dim = 40}));
  problems.back().far_heads = 2;
  for (const problem& p : problems) {
    typename TypeParam::memory serial(p);
    serial.randomize(random);
    TypeParam::call(p, serial.arguments());
    for (const auto& [name, run] : all)
      for (const bool given : {false, true}) {
        auto memory = serial;
        for (tensor<T>& result : memory.results) result.fill(canary<T>());
        const arguments<T> a = memory.arguments();
        // Large numbers of any type, so that what is read before it is written shows.
        std::vector<std::byte> workspace(given ? TypeParam::workspace_size(p, a, run) : 0, std::byte{0x7f});
        TypeParam::call(p, a, run, workspace);
        ASSERT_TRUE(same_bits(a.results, serial.arguments().results)) << p << ", " << name;
      }
  }
}

/// A callable with no `concurrency()` is an executor, too, and may run as many tasks at once as it likes.
TEST(Executor, IsAnyCallable) {
  const auto threads = [](std::int64_t n, const auto& f) { thread_per_task(n, std::ref(f)); };
  static_assert(executor<decltype(threads)>);
  static_assert(executor<serial_executor> && executor<thread_pool_executor<Eigen::ThreadPool>>);
  static_assert(!executor<int>);

  random_engine random(2);
  const problem p = example(entry::pool, {.heads = 3, .queries = 4000, .keys = 4000, .dim = 4, .value_dim = 4});
  argument_memory<float> serial = argument_memory<float>(p).randomize(random), parallel = serial;
  call(p, serial.arguments());
  const auto a = parallel.arguments();
  through::pool(inputs_of(a), cores{a.results[0], a.results[1]}, p.options, threads);
  EXPECT_TRUE(same_bits(a.results, serial.arguments().results));
}

/// Every task is run once, and tasks with the same worker one after the other.
TEST(Executor, RunsEachTaskOnceAndOnePerWorker) {
  for (const auto& [name, run] : executors())
    for (const std::int64_t count : {0, 1, 2, 3, 100}) {
      const std::int64_t workers = run.concurrency();
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
      std::vector<std::mutex> busy(static_cast<std::size_t>(workers));
      std::atomic<int> collisions{0};
      detail::run_tasks(run, workers, count, [&](std::int64_t worker, std::int64_t i) {
        ASSERT_LT(worker, workers);
        const std::unique_lock lock(busy[static_cast<std::size_t>(worker)], std::try_to_lock);
        if (!lock.owns_lock()) ++collisions;
        ++runs[static_cast<std::size_t>(i)];
      });
      EXPECT_EQ(collisions, 0) << name;
      for (const std::atomic<int>& times : runs) EXPECT_EQ(times, 1) << name << ", " << count << " tasks";
    }
}

/// What a task is told of the next is what its worker runs next; and where tasks are few, none is held back.
TEST(Executor, TellsWhichTaskAWorkerRunsNext) {
  for (const auto& [name, run] : executors())
    for (const std::int64_t count : {0, 1, 2, 5, 100}) {
      const std::int64_t workers = run.concurrency();
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
      std::vector<std::int64_t> told(static_cast<std::size_t>(workers), count);
      std::atomic<int> wrong{0}, known{0};
      detail::run_tasks_in_sight(run, workers, count, [&](std::int64_t worker, std::int64_t i, std::int64_t next) {
        std::int64_t& last_told = told[static_cast<std::size_t>(worker)];
        if (last_told < count && last_told != i) ++wrong;
        if (workers > 1 && next < count && count - i <= 4 * workers) ++wrong;
        known += next < count;
        last_told = next;
        ++runs[static_cast<std::size_t>(i)];
      });
      EXPECT_EQ(wrong, 0) << name;
      EXPECT_GE(known, workers == 1 ? count - 1 : count - 5 * workers) << name;
      for (const std::atomic<int>& times : runs) EXPECT_EQ(times, 1) << name << ", " << count << " tasks";
    }
}

// ---------------------------------------------------------------------------------------------- batch composition

/// The part of a view that is sequence `b`, and of it the heads `[first, last)`.
template <class T, std::size_t Rank>
tensor_view<T, Rank> part(tensor_view<T, Rank> view, std::int64_t b, range heads) {
  view.data = view.row(b, heads.begin, 0);
  view.extent[0] = 1;
  view.extent[1] = heads.size();
  return view;
}

TYPED_TEST(ExecutorOf, ASequenceAloneIsTheSameAsInABatch) {
  using T = typename TypeParam::element;
  random_engine random(3);
  for (const entry entry : TypeParam::entries)
    for (const core_heads cores : all_core_heads)
      for (const auto& [heads, kv_heads] : std::array<std::pair<std::int64_t, std::int64_t>, 2>{{{3, 3}, {6, 2}}})
        for (const std::int64_t length : {std::int64_t{1}, std::int64_t{3}, std::int64_t{6}, TypeParam::stack() + 5}) {
          problem p = example(entry, {.batch = 3,
                                      .heads = heads,
                                      .kv_heads = kv_heads,
                                      .queries = length,
                                      .keys = length,
                                      .dim = 7,
                                      .value_dim = 5});
          if (entry == entry::attention || entry == entry::pool) p.options.core_heads = cores;
          typename TypeParam::memory batch(p);
          const arguments<T> together = batch.randomize(random).arguments();
          TypeParam::call(p, together);
          // Each key/value head with its queries, of each sequence, by itself.
          for (std::int64_t b = 0; b < 3; ++b)
            for (std::int64_t h = 0; h < kv_heads; ++h) {
              problem alone = p;
              alone.sizes.batch = alone.sizes.kv_heads = alone.far_heads = 1;
              alone.sizes.heads = heads / kv_heads;
              const auto heads_of = [h, kv_heads = kv_heads](std::int64_t all) {
                return range{h * all / kv_heads, (h + 1) * all / kv_heads};
              };
              typename TypeParam::memory memory(alone);
              arguments<T> a = memory.arguments();
              std::vector<tensor_view<T>> expected;
              for (std::size_t o = 0; o < a.operands.size(); ++o)
                a.operands[o] = part(together.operands[o], b, heads_of(together.operands[o].heads()));
              for (const tensor_view<T>& result : together.results)
                expected.push_back(part(result, b, heads_of(result.heads())));
              if (entry == entry::attend) a.seen = part(together.seen, b, heads_of(heads));
              TypeParam::call(alone, a);
              ASSERT_TRUE(same_bits(a.results, expected)) << p << ", sequence " << b << ", head " << h;
            }
        }
}

// ----------------------------------------------------------------------------------------------- zero sizes, races

template <class T>
class ForwardExecutor : public testing::Test {};

TYPED_TEST_SUITE(ForwardExecutor, precisions);

/// Batch, heads, keys and queries of 0 in every combination: nothing is divided by them, and nothing is seen.
TYPED_TEST(ForwardExecutor, SizesMayBe0) {
  using T = TypeParam;
  const auto all = executors();
  for (const entry entry : all_entries)
    for (const std::int64_t batch : {0, 2})
      for (const std::int64_t heads : {0, 4})
        for (const std::int64_t kv_heads : {0, 2})
          for (const std::int64_t queries : {0, 3, 9})
            for (const std::int64_t keys : {0, 9})
              for (const std::int64_t far_length : {0, 9}) {
                if (heads > 0 && kv_heads == 0) continue;  // refused: these queries have no keys
                problem p = example(entry, {.batch = batch,
                                            .heads = heads,
                                            .kv_heads = kv_heads,
                                            .queries = queries,
                                            .keys = keys,
                                            .dim = 3,
                                            .value_dim = 2});
                p.far_length = far_length;
                if (heads == 0 && queries == 3) p.far_heads = 1;  // keys may have none all the same
                random_engine random(4);
                argument_memory<T> memory = argument_memory<T>(p).randomize(random);
                const arguments<T> a = memory.arguments();
                call(p, a);
                ASSERT_TRUE(memory.canaries_intact()) << p;
                for (const tensor_view<T>& result : a.results)
                  for_each_row(result, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
                    const bool empty = keys == 0 && entry != entry::merge && seen_count(p, b, h, i) == 0;
                    const bool is_lse = &result == &a.results[1];
                    for (std::int64_t d = 0; d < result.dim(); ++d) {
                      ASSERT_FALSE(std::isnan(result.row(b, h, i)[d])) << p;
                      ASSERT_TRUE(!empty ||
                                  result.row(b, h, i)[d] == (is_lse ? -std::numeric_limits<T>::infinity() : T(0)))
                          << p;
                    }
                  });
                // Executors are not surprised by no tasks.
                const argument_memory<T> serial = memory;
                for (const auto& [name, run] : all) {
                  if (batch * heads * queries * keys > 0) break;
                  call(p, a, run);
                  ASSERT_TRUE(same_bits<T>(a.results, argument_memory<T>(serial).arguments().results)) << p << name;
                }
              }
}

/// No memory is shared between calls.
TYPED_TEST(ExecutorOf, CallsMayOverlap) {
  using memory = typename TypeParam::memory;
  random_engine random(5);
  for (const entry entry : TypeParam::entries) {
    const problem p = example(entry, {.heads = 2, .queries = 200, .keys = 200, .dim = 9, .value_dim = 9});
    std::array memories{memory(p).randomize(random), memory(p).randomize(random)};
    auto expected = memories;
    for (memory& one : expected) TypeParam::call(p, one.arguments());
    for (int repeat = 0; repeat < 5; ++repeat) {
      std::vector<std::jthread> threads;
      for (memory& one : memories) threads.emplace_back([&] { TypeParam::call(p, one.arguments()); });
      threads.clear();
      for (std::size_t i = 0; i < memories.size(); ++i)
        ASSERT_TRUE(same_bits(memories[i].arguments().results, expected[i].arguments().results)) << p;
    }
  }
}

}}  // namespace cca::test
