// How much memory a call needs: said exactly, refused where it is too much, and never counted beyond 64 bits.

#include "allocations.hpp"
#include "executors.hpp"
#include "kv_cache_steps.hpp"
#include "passes.hpp"

namespace cca::test { namespace {

testing::AssertionResult contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "\"" << text << "\" does not say \"" << part << "\"";
}

TEST(Scratch, ProductsOfSizesAreExactOrRefused) {
  constexpr std::int64_t large = std::int64_t{1} << 20, huge = std::int64_t{1} << 40;
  EXPECT_EQ(detail::element_count<float>(3, 5, 7), 105);
  EXPECT_EQ(detail::element_count<std::byte>(large, large, 3, large / 8), 3 * (large * large * large / 8));
  EXPECT_EQ(detail::element_count<double>(huge, huge, 0, huge), 0);
  const auto refused = [](const std::string& bytes, auto... sizes) {
    EXPECT_TRUE(contains(refusal_of([&] { (void)detail::element_count<float>(sizes...); }),
                         "workspace: got operands that need " + bytes + " bytes of it, wants fewer than 2^59"));
  };
  refused("1152921504606846976", large, large, large / 4);
  refused("4835703278458516698824704", huge, huge);
  refused("1329227995784915872903807060280344576", huge, huge, huge / 4);
  refused("-12", std::int64_t{-3});
}

TEST(Scratch, BytesOfWorkersAreExactOrRefused) {
  EXPECT_EQ(detail::scratch_bytes<float>(17), 128U);
  EXPECT_EQ(detail::worker_scratch<float>::bytes(3, 17), 3 * 128U);
  EXPECT_THROW((void)detail::scratch_bytes<float>(std::int64_t{1} << 57), std::invalid_argument);
  EXPECT_THROW((void)detail::scratch_bytes<float>(-1), std::invalid_argument);
  EXPECT_THROW((void)detail::worker_scratch<float>::bytes(std::int64_t{1} << 30, std::int64_t{1} << 30),
               std::invalid_argument);
}

// ------------------------------------------------------------------------------------------------- too many tokens

/// Arguments of one call whose operands repeat one row, so that they may be as long as one likes; where each result would
/// be there is a pointer, but no memory.
template <class Pass>
struct endless {
  using T = typename Pass::element;
  std::array<T, 4> row{};
  std::array<std::array<T, 4>, 3> written{};
  arguments<T> a;

  explicit endless(const problem& p) {
    const bool backward = std::is_same_v<typename Pass::memory, gradient_memory<T>>;
    for (const extents& e : backward ? gradient_operand_extents(p) : operand_extents(p))
      a.operands.push_back({row.data(), e, {0, 0, 0, 1}});
    for (const extents& e : backward ? gradient_result_extents(p) : result_extents(p)) {
      T* const first = written[a.results.size()].data();
      a.results.push_back(bhsd(first, e[0], e[1], e[2], e[3]));
    }
  }
};

template <class Pass>
class ScratchOf : public testing::Test {};

TYPED_TEST_SUITE(ScratchOf, passes);

/// The bytes are those of the cores, which alone are as many.
TYPED_TEST(ScratchOf, ALengthOf2To40IsRefusedWithItsBytes) {
  constexpr std::int64_t length = std::int64_t{1} << 40;
  problem p = example(entry::attention, {.queries = length, .keys = length, .dim = 4, .value_dim = 4});
  p.options = {.group_size = 2, .window = 1024};
  const endless<TypeParam> call(p);
  const std::size_t bytes = TypeParam::workspace_size(p, call.a) - detail::scratch_alignment;
  EXPECT_GT(bytes, static_cast<std::size_t>(length) / 2 * 8 * sizeof(typename TypeParam::element) - 100000);
  EXPECT_TRUE(contains(refusal_of([&] { TypeParam::call(p, call.a); }),
                       "workspace: got a call that needs " + std::to_string(bytes) + " bytes of it, wants"));
}

/// Nothing beyond 64 bits where there are heads and batches of such lengths, either.
TYPED_TEST(ScratchOf, ProductsBeyond64BitsAreRefused) {
  constexpr std::int64_t many = std::int64_t{1} << 57;
  problem p = example(entry::attention, {.heads = many, .kv_heads = 1, .dim = 1, .value_dim = 1});
  p.sizes.queries = p.sizes.keys = 1;
  const endless<TypeParam> call(p);  // few queries: a partial result for each head
  EXPECT_TRUE(contains(refusal_of([&] { (void)TypeParam::workspace_size(p, call.a); }),
                       "workspace: got operands that need "));
  EXPECT_TRUE(contains(refusal_of([&] { TypeParam::call(p, call.a); }),
                       "workspace: got operands that need "));
}

/// Where memory is out for less, the exception says how much was wanted.
TYPED_TEST(ScratchOf, MemoryThatIsOutIsSaid) {
  random_engine random(1);
  const problem p = example(entry::attention, {.queries = 100, .keys = 100, .dim = 4, .value_dim = 4});
  typename TypeParam::memory memory(p);
  const auto a = memory.randomize(random).arguments();
  const std::size_t bytes = TypeParam::workspace_size(p, a) - detail::scratch_alignment;
  const any_executor run;
  const std::string message = refusal_of<std::bad_alloc>([&] {
    const allocation_limit limit(0);
    TypeParam::call(p, a, run);
  });
  EXPECT_TRUE(contains(message, "cca: no memory for " + std::to_string(bytes) + " bytes"));
}

TYPED_TEST(ScratchOf, ARefusedWorkspaceSaysWhatTellsItsSize) {
  const bool backward = std::is_same_v<typename TypeParam::memory, gradient_memory<typename TypeParam::element>>;
  random_engine random(1);
  for (const entry entry : TypeParam::entries) {
    if (entry == entry::merge) continue;  // which needs none
    const problem p = example(entry, {.queries = 20, .keys = 20, .dim = 4, .value_dim = 4});
    typename TypeParam::memory memory(p);
    const auto a = memory.randomize(random).arguments();
    std::vector<std::byte> workspace(1);
    EXPECT_TRUE(contains(refusal_of([&] { TypeParam::call(p, a, {}, workspace); }),
                         backward ? "(see gradient_workspace_size" : "(see workspace_size"))
        << p;
  }
}

/// There is no more scratch memory than there are tasks, however many might run at once.
TYPED_TEST(ScratchOf, WorkersAreNoMoreThanTasks) {
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {std::int64_t{3}, TypeParam::lanes()}) {
      const problem p = example(entry, {.queries = length, .keys = length, .dim = 4, .value_dim = 4});
      if (p.entry == entry::attend) continue;  // its far context is another task
      typename TypeParam::memory memory(p);
      const auto a = memory.arguments();
      EXPECT_EQ(TypeParam::workspace_size(p, a, {.threads = 1000, .run = {}}), TypeParam::workspace_size(p, a)) << p;
    }
}

TYPED_TEST(ScratchOf, SizesThatMakeNoSenseHaveNoWorkspace) {
  const problem valid = example(entry::attention, {.queries = 9, .keys = 9, .dim = 4, .value_dim = 4});
  for (std::size_t operand = 0; operand < 3; ++operand)
    for (const auto& [dimension, extent] : std::array<std::pair<std::size_t, std::int64_t>, 4>{
             {{2, -1}, {3, 0}, {3, (std::int64_t{1} << 31) + 1}, {1, std::int64_t{1} << 62}}}) {
      endless<TypeParam> call(valid);
      call.a.operands[operand].extent[dimension] = extent;
      const std::string name = std::array{"query", "key", "value"}[operand];
      EXPECT_TRUE(contains(refusal_of([&] { (void)TypeParam::workspace_size(valid, call.a); }),
                           name + ": got"));
      EXPECT_TRUE(contains(refusal_of([&] { TypeParam::call(valid, call.a); }), ": got"));
    }
}

/// A cache says what its tokens would take, and stays as it was.
TEST(Scratch, ACacheOf2To40TokensIsRefusedWithItsBytes) {
  constexpr std::int64_t length = std::int64_t{1} << 40;
  const cache_setup setup = example_cache({.group_size = 2, .window = 4});
  // Of cores, four heads of half as many rows of eight floats; of raw tokens, two heads of six rows.
  const std::string bytes =
      std::to_string(length) + " tokens of " + std::to_string(length / 2 * 4 * 8 * 4 + 2 * 6 * 8 * 4) + " bytes";
  cache_setup large = setup;
  large.shape.capacity = length;
  EXPECT_TRUE(contains(refusal_of([&] { (void)large.make(); }), "shape.capacity: got " + bytes));

  std::array<float, 5> row{};
  kv_cache<float> cache = setup.make();
  const auto repeated = [&](std::int64_t heads, std::int64_t dim) {
    return tensor_view<const float>{row.data(), {1, heads, length, dim}, {0, 0, 0, 1}};
  };
  const token_views<float> tokens{repeated(4, 5), repeated(2, 5), repeated(2, 3)};
  EXPECT_TRUE(contains(refusal_of([&] { append(cache, tokens); }), "key: got " + bytes));
  EXPECT_EQ(cache.length(), 0);
  EXPECT_EQ(cache.allocated_bytes(), 0U);
}

}}  // namespace cca::test
