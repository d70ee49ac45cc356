// Tasks that add to the same rows follow each other row by row. What a task says and what it does is compared where it first
// touches a row: the gradients lie in pages that fault there, so it is certain, and no matter of how threads are scheduled.

#include "guarded_pages.hpp"

#include <cca/gradient.hpp>
#include <chrono>
#include <csignal>
#include <thread>

namespace cca::test { namespace {

using detail::turn;
using counter = turn::counter;

/// What the task before had passed, and what this one, when a row was touched.
struct touch {
  std::int64_t before = -1, mine = -1;
};

/// Rows of zeros, each in a page of its own that faults until it is touched.
class watched_rows {
 public:
  watched_rows(std::int64_t rows, const counter& before, const counter& mine)
      : before_(before),
        mine_(mine),
        page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        touches_(static_cast<std::size_t>(rows)),
        memory_(touches_.size() * page_, PROT_NONE) {
    watched().push_back(this);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, watched().size() == 1 ? &previous() : nullptr);
  }
  watched_rows(const watched_rows&) = delete;
  watched_rows& operator=(const watched_rows&) = delete;
  ~watched_rows() {
    std::erase(watched(), this);
    if (watched().empty()) sigaction(SIGSEGV, &previous(), nullptr);
  }

  template <class T>
  [[nodiscard]] tensor_view<T> view(std::int64_t dim) const {
    const auto rows = std::ssize(touches_), stride = static_cast<std::int64_t>(page_ / sizeof(T));
    return {reinterpret_cast<T*>(memory_.data()), {1, 1, rows, dim}, {rows * stride, rows * stride, stride, 1}};
  }

  [[nodiscard]] const touch& at(std::int64_t row) const { return touches_[static_cast<std::size_t>(row)]; }

 private:
  static std::vector<watched_rows*>& watched() {
    static std::vector<watched_rows*> all;
    return all;
  }
  static struct sigaction& previous() {
    static struct sigaction action;
    return action;
  }

  static void on_fault(int, siginfo_t* info, void*) {
    for (watched_rows* rows : watched())
      if (rows->open(static_cast<std::byte*>(info->si_addr))) return;
    sigaction(SIGSEGV, &previous(), nullptr);  // a fault of another kind: it comes again
  }

  bool open(const std::byte* address) {
    if (address < memory_.data() || address >= memory_.data() + touches_.size() * page_) return false;
    const std::size_t row = static_cast<std::size_t>(address - memory_.data()) / page_;
    touches_[row] = {before_.load(), mine_.load()};
    return mprotect(memory_.data() + row * page_, page_, PROT_READ | PROT_WRITE) == 0;
  }

  const counter &before_, &mine_;
  std::size_t page_;
  std::vector<touch> touches_;
  mapping memory_;
};

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

/// A task of 70 queries that all see the same rows, behind a task that passes them step by step. Blocks of any kernel end
/// where `step` divides.
template <class Product>
void check_stack(const detail::tile_form& form) {
  using Tile = detail::gradient_tile<Product>;
  using Element = typename Product::element;
  using T = typename Product::number;
  constexpr std::int64_t rows = 768, step = 256, queries = 70;
  static_assert(step % Tile::block_rows == 0);
  random_engine random(1);
  const auto random_tensor = [&](std::int64_t count, std::int64_t dim) {
    return tensor<Element>({1, 1, count, dim}).randomize(random, 0.1);
  };
  const tensor<Element> query = random_tensor(queries, form.dim), key = random_tensor(rows, form.dim);
  const tensor<Element> value = random_tensor(rows, form.value_dim), grad_out = random_tensor(queries, form.value_dim);
  const detail::score_rule<T> rule;
  const auto size = static_cast<std::size_t>(detail::stack<Tile>::size(queries, form, false, false));
  const detail::aligned_memory memory(size * sizeof(T));
  counter before{0}, mine{0};
  const watched_rows grad_key(rows, before, mine), grad_value(rows, before, mine);
  const auto source = detail::view_source(
      key.view(), value.view(),
      [](std::int64_t, std::int64_t, std::int64_t) {
        return range{0, rows};
      },
      [](std::int64_t, std::int64_t) { return detail::row_terms<T>{}; });
  const detail::source_gradient gradient{source, grad_key.view<T>(form.dim), grad_value.view<T>(form.value_dim)};
  {
    const std::jthread task([&] {
      detail::stack<Tile> stack(reinterpret_cast<T*>(memory.data()), {form, &rule}, {{0, 0, 0}, 1, queries}, false);
      stack.memory().query.load(queries, [&](std::int64_t i) { return query.row(0, 0, i); });
      stack.memory().grad_out.load(queries, [&](std::int64_t i) { return grad_out.row(0, 0, i); });
      stack.for_each_tile([&](Tile tile, std::int64_t first) {
        tile.begin(stack.memory(), first);
        for (std::int64_t i = 0; i < tile.count(); ++i) tile.set(i, T(7), T(0));
      });
      turn turn(&before, &mine);
      detail::task_shift<Tile> shift;
      detail::absorb_in_turn(stack, detail::ref_of(gradient), 0, 0, 0, turn, shift);
    });
    for (std::int64_t end = 0; end <= rows; end += step) {
      pass_up_to(before, end);
      EXPECT_TRUE(reaches(mine, end)) << "the rows below " << end << " are not passed on";
      if (testing::Test::HasFailure()) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // time to go too far
    }
    pass_up_to(before, std::numeric_limits<std::int64_t>::max());  // also where something failed: the thread has to end
  }
  EXPECT_EQ(mine, rows);
  for (std::int64_t j = 0; j < rows; ++j)
    for (const watched_rows* of : {&grad_key, &grad_value}) {
      const char* const name = of == &grad_key ? "key " : "value ";
      EXPECT_GT(of->at(j).before, j) << "the gradient of " << name << j << " is added to before it is this task's turn";
      EXPECT_LE(of->at(j).mine, j) << "the gradient of " << name << j << " is added to after it was passed on";
    }
}

const detail::tile_form form{.dim = 8, .value_dim = 5};

TEST(Turn, OfFloats) { check_stack<detail::vectors<float>>(form); }
TEST(Turn, OfDoubles) { check_stack<detail::vectors<double>>(form); }
TEST(Turn, OfAMatrixUnit) {
  if (!detail::has_unit<Eigen::bfloat16>(matrix_unit::avx512_bf16)) GTEST_SKIP() << "no AVX-512 BF16";
  check_stack<detail::sixteen_bits<Eigen::bfloat16>>(
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
