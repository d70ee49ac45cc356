// Tasks that add to the same rows follow each other row by row. A task is held back here by a counter that plays the task
// before it: so it is certain, and no matter of how threads are scheduled, what it has done when it says so.

#include "support.hpp"

#include <cca/gradient.hpp>
#include <chrono>
#include <thread>

namespace cca::test { namespace {

using detail::turn;
using counter = turn::counter;

/// Whether the counter gets there.
bool reaches(const counter& passed, std::int64_t row) {
  using clock = std::chrono::steady_clock;
  for (const auto end = clock::now() + std::chrono::seconds(30); clock::now() < end; std::this_thread::yield())
    if (passed.load(std::memory_order_acquire) >= row) return true;
  return false;
}

void pass_up_to(counter& to, std::int64_t row) {
  to.store(row, std::memory_order_release);
  to.notify_all();
}

/// A task of 70 queries that all see the same rows, with a task before it that has passed some of them. Blocks of any kernel
/// end where `step` divides.
template <class Stack, class Element>
void check_stack(const detail::tile_form& form) {
  using T = compute_type<Element>;
  constexpr std::int64_t rows = 1024, step = 256, queries = 70;
  random_engine random(1);
  const auto random_tensor = [&](std::int64_t count, std::int64_t dim) {
    return tensor<Element>({1, 1, count, dim}).randomize(random, 0.1);
  };
  const tensor<Element> query = random_tensor(queries, form.dim), key = random_tensor(rows, form.dim);
  const tensor<Element> value = random_tensor(rows, form.value_dim), grad_out = random_tensor(queries, form.value_dim);
  tensor<T> out({1, 1, queries, form.value_dim}), grad_key({1, 1, rows, form.dim}),
      grad_value({1, 1, rows, form.value_dim});
  tensor<T, 3> lse({1, 1, queries});
  out.fill(0);
  lse.fill(T(7));
  grad_key.fill(0);
  grad_value.fill(0);
  const detail::aligned_memory memory(
      static_cast<std::size_t>(Stack::size(Stack::lanes_for(queries, form), form, false)) * sizeof(T));
  const detail::query_results results{query.view(), std::as_const(out).view(), std::as_const(lse).view(),
                                      grad_out.view(), lse_view<const T>{}};
  const auto source = detail::view_source(key.view(), value.view(), [](std::int64_t, std::int64_t, std::int64_t) {
    return range{0, rows};
  });
  const detail::source_gradient gradient{source, grad_key.view(), grad_value.view()};

  counter before{0}, mine{0};
  std::jthread task([&] {
    Stack stack(reinterpret_cast<T*>(memory.data()), form, queries);
    stack.begin(results, 0, 0, 0, T(1));
    turn turn(&before, &mine);
    stack.absorb(gradient, 0, 0, 1, 0, 0, turn);
  });
  const auto added = [&](std::int64_t j) {
    const T *k = grad_key.row(0, 0, j), *v = grad_value.row(0, 0, j);
    const auto all_of = [](const T* x, std::int64_t n, bool zero) {
      return std::all_of(x, x + n, [zero](T y) { return (y == 0) == zero; });
    };
    // Both or neither.
    const bool yes = all_of(k, form.dim, false) && all_of(v, form.value_dim, false);
    EXPECT_TRUE(yes || (all_of(k, form.dim, true) && all_of(v, form.value_dim, true))) << j;
    return yes;
  };
  for (std::int64_t end = step; end <= rows; end += step) {
    pass_up_to(before, end);
    const bool arrived = reaches(mine, end);
    EXPECT_TRUE(arrived) << "the rows below " << end << " are not passed on";
    // The task before is not done with the rows from here on: this one waits in front of them, and leaves them alone.
    EXPECT_EQ(mine, end);
    for (std::int64_t j = 0; j < end; ++j)
      EXPECT_TRUE(added(j)) << "row " << j << " is passed on before it is added to, below " << end;
    if (end == rows / 2) std::this_thread::sleep_for(std::chrono::milliseconds(50));  // time to go too far
    for (std::int64_t j = end; j < rows; ++j)
      EXPECT_FALSE(added(j)) << "row " << j << " is added to out of turn, below " << end;
    if (testing::Test::HasFailure()) break;
  }
  pass_up_to(before, std::numeric_limits<std::int64_t>::max());  // also where something failed: the thread has to end
}

const detail::tile_form form{.dim = 8, .value_dim = 5};

TEST(Turn, OfFloats) { check_stack<detail::gradient_stack<float>, float>(form); }
TEST(Turn, OfDoubles) { check_stack<detail::gradient_stack<double>, double>(form); }
TEST(Turn, OfAMatrixUnit) {
  if (!detail::has_unit<Eigen::bfloat16>(matrix_unit::avx512_bf16)) GTEST_SKIP() << "no AVX-512 BF16";
  check_stack<detail::unit_gradient_stack<Eigen::bfloat16>, Eigen::bfloat16>(
      {.dim = form.dim, .value_dim = form.value_dim, .unit = matrix_unit::avx512_bf16});
}

/// A task that skips rows has no right to give them away either.
TEST(Turn, RowsLeftOutArePassedInOrder) {
  counter before{10}, mine{0};
  std::jthread task([&] { turn(&before, &mine).pass(20); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(mine, 0);
  pass_up_to(before, 20);
  EXPECT_TRUE(reaches(mine, 20));
}

}}  // namespace cca::test
