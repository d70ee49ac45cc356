// What the entry points and their gradients read and write: their operands, their results and their workspace, to the
// byte, wherever those lie in memory.

#include <memory>
#include <numeric>

#include "allocations.hpp"
#include "executors.hpp"
#include "guarded_pages.hpp"
#include "passes.hpp"

namespace cca::test {
namespace {

template <class Pass>
class Memory : public testing::Test {};

TYPED_TEST_SUITE(Memory, passes);

/// Random arguments one after the other, alone in memory, and the results of a serial call.
template <class Pass>
typename Pass::memory called(const problem& p, random_engine& random) {
  typename Pass::memory memory(p);
  memory.randomize(random);
  Pass::call(p, memory.arguments());
  return memory;
}

// --------------------------------------------------------------------------------------------------- guard pages

/// The arguments of a call and its workspace, each between guards of its own.
template <class Pass>
class guarded_arguments {
  using T = typename Pass::element;

 public:
  arguments<T> place_all(const typename Pass::memory& content, bool end, std::int64_t padding) const {
    arguments<T> a;
    const guarded_pages* next = pages_.data();
    for (const tensor<T>& operand : content.operands) {
      const auto view = place<T>(*next++, end, operand.view().extent, padding);
      copy(operand.view(), view);
      a.operands.push_back(view);
    }
    for (const tensor<T>& result : content.results)
      a.results.push_back(place<T>(*next++, end, result.view().extent, padding));
    const auto rows = content.seen.view().extent;
    const auto seen = place<std::int64_t>(*next++, end, {rows[0], rows[1], rows[2], 1}, padding);
    for_each_row(
        seen, [&](std::int64_t b, std::int64_t h, std::int64_t i) { *seen.row(b, h, i) = *content.seen.row(b, h, i); });
    a.seen = {seen.data, rows, {seen.stride[0], seen.stride[1], seen.stride[2]}};
    return a;
  }

  /// Filled with NaNs, so that what is read before it is written shows.
  [[nodiscard]] std::span<std::byte> workspace(bool end, std::size_t bytes) const {
    std::byte* memory = workspace_.at(end, bytes);
    std::memset(memory, 0xff, bytes);
    return {memory, bytes};
  }

 private:
  std::array<guarded_pages, 15> pages_;  // nine operands, five results and the counts of far rows
  guarded_pages workspace_{std::size_t{1} << 23};
};

/// Lengths and dims around those of the kernels' loops.
template <class Pass>
std::vector<std::pair<std::int64_t, std::int64_t>> edges() {
  using T = typename Pass::element;
  const std::int64_t greatest = Pass::lanes() + 2;
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  for (std::int64_t length = 1; length <= greatest; ++length)
    for (const std::int64_t dim : {1, 6, 13}) all.emplace_back(length, dim);
  for (const std::int64_t edge : {Pass::block(), Pass::stack(), 2 * Pass::stack()})
    for (std::int64_t length = edge - 1; length <= edge + 2; ++length) all.emplace_back(length, 5);
  for (std::int64_t dim = 1; dim <= greatest; ++dim)
    for (const std::int64_t length : {3, 6}) all.emplace_back(length, dim);
  // Pooling takes eight vectors of a row at a time.
  for (std::int64_t dim = 8 * tile<T>().width - 1; dim <= 8 * tile<T>().width + 1; ++dim) all.emplace_back(6, dim);
  return all;
}

TYPED_TEST(Memory, NothingIsTouchedBesideTheArguments) {
  const std::int64_t greatest = TypeParam::lanes() + 2;
  const guarded_arguments<TypeParam> guarded;
  random_engine random(1);
  for (const auto& [length, dim] : edges<TypeParam>())
    for (const entry entry : TypeParam::entries) {
      const problem p = example(entry, {.heads = 2,
                                        .queries = length,
                                        .keys = length,
                                        .dim = dim,
                                        .value_dim = dim <= greatest ? greatest + 1 - dim : dim});
      auto plain = called<TypeParam>(p, random);
      for (const bool end : {false, true})
        for (const std::int64_t padding : {0, 3}) {
          const auto a = guarded.place_all(plain, end, padding);
          TypeParam::call(p, a, {}, guarded.workspace(end, TypeParam::workspace_size(p, a)));
          ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p << ", padding " << padding;
        }
    }
}

// --------------------------------------------------------------------------------------------------- the workspace

/// The fewest bytes of a workspace, from `begin` on, that a call is content with.
template <class Pass, class T>
std::size_t fewest_bytes(const problem& p, const arguments<T>& a, const any_executor& run, std::byte* begin,
                         std::size_t enough) {
  const auto refuses = [&](std::size_t bytes) {
    try {
      Pass::call(p, a, run, std::span(begin, bytes));
      return false;
    } catch (const std::invalid_argument& refusal) {
      const std::string text = refusal.what();
      EXPECT_NE(text.find("workspace: got " + std::to_string(bytes) + " bytes, wants "), std::string::npos) << text;
      return true;
    }
  };
  std::size_t low = 1, high = enough;
  while (low < high) {
    const std::size_t middle = std::midpoint(low, high);
    if (refuses(middle))
      low = middle + 1;
    else
      high = middle;
  }
  EXPECT_FALSE(refuses(low));
  if (low == 1) return low;
  for (const tensor_view<T>& result : a.results)
    for_each_row(result, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      std::fill_n(result.row(b, h, i), result.dim(), canary<T>());
    });
  EXPECT_TRUE(refuses(low - 1)) << p;
  for (const tensor_view<T>& result : a.results)
    for_each_row(result, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < result.dim(); ++d)
        EXPECT_TRUE(same_bits(result.row(b, h, i)[d], canary<T>())) << p << " writes before it refuses";
    });
  return low;
}

/// For threads, too. The fewest bytes depend on how far the first is from an aligned one: all that are said, at the worst.
TYPED_TEST(Memory, TheWorkspaceIsAsLargeAsSaid) {
  const guarded_arguments<TypeParam> guarded;
  random_engine random(2);
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {std::int64_t{1}, std::int64_t{4}, TypeParam::lanes() + 1, 2 * TypeParam::stack() + 1})
      for (const std::int64_t dim : {1, 16, 17}) {
        if (entry == entry::merge) continue;  // which needs none
        const problem p =
            example(entry, {.heads = 2, .queries = length, .keys = length, .dim = dim, .value_dim = dim + 2});
        auto plain = called<TypeParam>(p, random);
        const auto a = guarded.place_all(plain, true, 0);
        const any_executor run = dim == 17 ? any_executor{7, thread_per_task} : any_executor{};
        for (const std::size_t misalignment : {0u, 1u, 63u}) {
          const std::size_t said = TypeParam::workspace_size(p, a, run);
          const std::size_t fewest =
              fewest_bytes<TypeParam>(p, a, run, guarded.workspace(false, said + 64).data() + misalignment, said);
          ASSERT_LE(fewest, said) << p;
          // At the end of a page, so that not even a vector more may be written.
          const auto exact = guarded.workspace(true, fewest);
          ASSERT_TRUE(misalignment != 0 || reinterpret_cast<std::uintptr_t>(exact.data()) % 64 == 0) << p;
          TypeParam::call(p, a, run, exact);
          ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p << ", misaligned by " << misalignment;
        }
      }
}

/// How many queries go together depends on how long their context is.
TYPED_TEST(Memory, TheWorkspaceIsAsLargeAsLongContextsNeed) {
  const guarded_arguments<TypeParam> guarded;
  random_engine random(6);
  for (const entry entry : TypeParam::entries) {
    if (entry == entry::attention || entry == entry::pool || entry == entry::merge) continue;  // no more keys than queries
    for (const std::int64_t keys : {4096, 8192}) {
      const problem p = example(entry, {.heads = 2, .queries = 256, .keys = keys, .dim = 1, .value_dim = 2});
      auto plain = called<TypeParam>(p, random);
      const auto a = guarded.place_all(plain, true, 0);
      TypeParam::call(p, a, {}, guarded.workspace(true, TypeParam::workspace_size(p, a)));
      ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p;
    }
  }
}

/// Blocks of rows that lie a page and more apart are put side by side there.
TYPED_TEST(Memory, TheWorkspaceIsAsLargeAsRowsThatLieApartNeed) {
  using T = typename TypeParam::element;
  const guarded_arguments<TypeParam> guarded;
  random_engine random(7);
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {std::int64_t{3}, TypeParam::lanes() + 1, TypeParam::stack() + 1}) {
      if (entry == entry::merge) continue;  // which needs none
      const problem p = example(entry, {.queries = length, .keys = length, .dim = 5, .value_dim = 3});
      auto plain = called<TypeParam>(p, random);
      const auto a = guarded.place_all(plain, true, 4096 / static_cast<std::int64_t>(sizeof(T)));
      TypeParam::call(p, a, {}, guarded.workspace(true, TypeParam::workspace_size(p, a)));
      ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p;
    }
}

TYPED_TEST(Memory, NothingIsAllocatedWhereThereIsAWorkspace) {
  random_engine random(3);
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {std::int64_t{1}, TypeParam::stack() + 3}) {
      const problem p = example(entry, {.heads = 2, .queries = length, .keys = length, .dim = 9, .value_dim = 5});
      typename TypeParam::memory memory(p);
      const auto a = memory.randomize(random).arguments();
      std::vector<std::byte> workspace(TypeParam::workspace_size(p, a));
      const any_executor run;
      const std::int64_t before = allocation_count();
      TypeParam::call(p, a, run, workspace);
      EXPECT_EQ(allocation_count() - before, 0) << p;
    }
}

/// A step of decoding by a window is cut into parts of what it sees, not of all that lies before.
TEST(MemoryOfFewQueries, IsThatOfTheirWindow) {
  const auto size = [](std::int64_t queries, std::int64_t keys) {
    random_engine random(5);
    const operands<float> o =
        random_operands<float>({.heads = 4, .kv_heads = 2, .queries = queries, .keys = keys, .dim = 3, .value_dim = 2}, random);
    return cca::workspace_size({o.query.view(), o.key.view(), o.value.view()}, {.window = 7});
  };
  for (const std::int64_t queries : {std::int64_t{1}, detail::most_few_queries})
    EXPECT_EQ(size(queries, 64 * detail::part_rows), size(queries, 40)) << queries << " queries";
}

// ------------------------------------------------------------------------------------------------- layouts and gaps

/// NaNs between the rows do not get in, nothing is written there, and an operand with stride 0 is its row repeated.
TYPED_TEST(Memory, AnyLayoutIsReadAndWrittenWhereItsElementsAre) {
  random_engine random(4);
  for (const entry entry : TypeParam::entries)
    for (int i = 0; i < 60; ++i) {
      const std::int64_t kv_heads = draw(random, 1, 2), keys = draw(random, 1, TypeParam::lanes() + 9);
      const problem p = example(entry, {.batch = draw(random, 1, 3),
                                        .heads = kv_heads * draw(random, 1, 3),
                                        .kv_heads = kv_heads,
                                        .queries = draw(random, 1, 2) == 1 ? draw(random, 1, 5) : keys,
                                        .keys = keys,
                                        .dim = draw(random, 1, 20),
                                        .value_dim = draw(random, 1, 20)});
      typename TypeParam::memory memory(
          p, [&](bool may_broadcast) { return may_broadcast ? random_operand_layout(random) : random_layout(random); });
      const auto a = memory.randomize(random).arguments();
      TypeParam::call(p, a);
      ASSERT_TRUE(memory.canaries_intact()) << p;
      typename TypeParam::memory plain(p);
      for (std::size_t o = 0; o < a.operands.size(); ++o) copy(a.operands[o], plain.operands[o].view());
      for_each_row(a.seen, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
        *plain.seen.row(b, h, q) = *a.seen.row(b, h, q);
      });
      TypeParam::call(p, plain.arguments());
      ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p;
    }
}

/// A view into the midst of a larger tensor: cache tails, other sequences, other heads and other columns are NaN, and
/// stay as they are.
TYPED_TEST(Memory, NeighboursInALargerTensorDoNotMatter) {
  using T = typename TypeParam::element;
  random_engine random(5);
  for (const entry entry : TypeParam::entries)
    for (const std::int64_t length : {std::int64_t{2}, TypeParam::lanes() + 1}) {
      const problem p =
          example(entry, {.batch = 2, .heads = 2, .queries = length, .keys = length, .dim = 7, .value_dim = 5});
      auto plain = called<TypeParam>(p, random);

      std::vector<tensor<T>> larger;
      const auto within = [&](const extents& e) {
        larger.emplace_back(extents{e[0] + 2, e[1] + 2, e[2] + 2, e[3] + 2});
        const tensor_view<T> whole = larger.back().view();
        return tensor_view<T>{whole.row(1, 1, 1) + 1, e, whole.stride};
      };
      arguments<T> a{.operands = {}, .results = {}, .seen = plain.seen.view()};
      for (const tensor<T>& operand : plain.operands) {
        const auto view = within(operand.view().extent);
        copy(operand.view(), view);
        a.operands.push_back(view);
      }
      for (const tensor<T>& result : plain.results) a.results.push_back(within(result.view().extent));
      TypeParam::call(p, a);
      ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p;
      for (std::size_t i = 0; i < larger.size(); ++i) {
        // With the elements of the view made canaries again, there is nothing else.
        const extents e = i < a.operands.size() ? a.operands[i].extent : a.results[i - a.operands.size()].extent;
        for_each_row(tensor_view<T>{nullptr, e, {}}, [&](std::int64_t b, std::int64_t h, std::int64_t r) {
          std::fill_n(larger[i].row(b + 1, h + 1, r + 1) + 1, e[3], canary<T>());
        });
        for_each_row(larger[i].view(), [&](std::int64_t b, std::int64_t h, std::int64_t r) {
          for (std::int64_t d = 0; d < e[3] + 2; ++d)
            ASSERT_TRUE(same_bits(larger[i].row(b, h, r)[d], canary<T>())) << p << ", tensor " << i;
        });
      }
    }
}

// -------------------------------------------------------------------------------------------------- large offsets

/// Strides beyond 2^31 and 2^32 elements: one argument after the other is spread over address space of which only the
/// rows are ever touched.
TYPED_TEST(Memory, StridesMayExceed32Bits) {
  using T = typename TypeParam::element;
  random_engine random(6);
  // A stride that is cut to 32 bits becomes negative, small, or 0.
  constexpr std::array<std::int64_t, 3> strides{(std::int64_t{1} << 31) + 1, (std::int64_t{1} << 32) + 9,
                                                std::int64_t{1} << 32};
  constexpr std::int64_t most = 5;
  constexpr std::size_t bytes = sizeof(T) * ((std::size_t{1} << 32) + 9) * most;
  if (mapping(bytes, PROT_READ | PROT_WRITE).data() == nullptr)
    GTEST_SKIP() << "the system does not give " << bytes << " bytes of address space";
  for (const entry entry : TypeParam::entries)
    for (const std::size_t dimension : {0u, 1u, 2u})
      for (const auto& [stride, length] : std::array<std::pair<std::int64_t, std::int64_t>, 4>{
               {{strides[0], 3}, {strides[0], most}, {strides[1], most}, {strides[2], 3}}}) {
        sizes s{.queries = length, .keys = length, .dim = 4, .value_dim = 4};
        if (dimension == 0) s.batch = most;
        if (dimension == 1) s.heads = s.kv_heads = most;
        problem p = example(entry, s);
        p.far_length = length;
        if (p.options.group_size > 1) p.options.group_size = 1;
        if (p.options.window != unlimited) p.options.window = 1;
        auto plain = called<TypeParam>(p, random);
        const std::size_t operands = plain.operands.size();
        for (std::size_t spread = 0; spread < operands + plain.results.size(); ++spread) {
          const mapping memory(bytes, PROT_READ | PROT_WRITE);
          auto other = plain;
          arguments<T> a = other.arguments();
          tensor_view<T> view = spread < operands ? other.operands[spread].view() : a.results[spread - operands];
          view.data = reinterpret_cast<T*>(memory.data());
          view.stride[dimension] = stride;
          if (spread < operands) {
            copy(plain.operands[spread].view(), view);
            a.operands[spread] = view;
          } else {
            a.results[spread - operands] = view;
          }
          TypeParam::call(p, a);
          ASSERT_TRUE(same_bits(a.results, plain.arguments().results))
              << p << ", argument " << spread << " with stride " << stride << " in dimension " << dimension;
        }
      }
}

/// Query and window far along see what those near by see, when all keys come before them.
TYPED_TEST(Memory, PositionsMayExceed32Bits) {
  random_engine random(7);
  for (const entry entry : {entry::local, entry::attend})
    for (const std::int64_t queries : {std::int64_t{2}, TypeParam::lanes() + 3})
      for (const std::int64_t group_size : {1, 5}) {
        problem p = example(entry, {.queries = queries, .keys = TypeParam::block() + 7, .dim = 4, .value_dim = 4});
        const auto shift = [&](std::int64_t position) {
          p.options = {.group_size = group_size, .window = position + 11, .first_position = position};
        };
        shift(p.sizes.keys);
        auto near = called<TypeParam>(p, random);
        for (const std::int64_t position :
             {(std::int64_t{1} << 31) - 2, std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 40}) {
          shift(position);
          auto far = near;
          TypeParam::call(p, far.arguments());
          ASSERT_TRUE(same_bits(far.arguments().results, near.arguments().results)) << p;
        }
      }
}

}  // namespace
}  // namespace cca::test
