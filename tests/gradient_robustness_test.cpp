// Gradients wherever their arguments lie, whoever runs the tasks, whatever the numbers are; and what is refused.

#include "allocations.hpp"
#include "executors.hpp"
#include "gradient_entry_points.hpp"
#include "guarded_pages.hpp"

namespace cca::test {
namespace {

template <class T>
class GradientRobustness : public testing::Test {
 protected:
  using shape = detail::tile_shape<T>;
  static constexpr std::int64_t lanes = shape::lanes, block = shape::gradient_block;
  static constexpr std::int64_t stack = shape::gradient_stack * lanes;
};

TYPED_TEST_SUITE(GradientRobustness, precisions);

/// Sets every element of a row.
template <class T>
void fill_row(tensor<T>& tensor, std::int64_t b, std::int64_t h, std::int64_t i, T value) {
  std::fill_n(tensor.row(b, h, i), tensor.view().dim(), value);
}

// ------------------------------------------------------------------------------------------------------------- memory

/// The arguments of a call and its workspace, each between guards of its own.
template <class T>
class guarded_arguments {
 public:
  arguments<T> place_all(const gradient_memory<T>& content, bool end, std::int64_t padding) const {
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

/// Lengths and dims around those of the kernel's loops.
template <class Shape>
std::vector<std::pair<std::int64_t, std::int64_t>> edges() {
  const std::int64_t lanes = Shape::lanes, stack = Shape::gradient_stack * lanes;
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  for (std::int64_t length = 1; length <= lanes + 2; length += 1 + length / 7)
    all.emplace_back(length, 1 + length % 13);
  for (const std::int64_t edge : {lanes, Shape::gradient_block, stack, 2 * stack})
    for (std::int64_t length = edge - 1; length <= edge + 1; ++length) all.emplace_back(length, 5);
  for (std::int64_t dim = 1; dim <= lanes + 2; ++dim) all.emplace_back(3 + dim % 4, dim);
  return all;
}

TYPED_TEST(GradientRobustness, NothingIsTouchedBesideTheArguments) {
  using T = TypeParam;
  const std::int64_t greatest = this->lanes + 2;
  const guarded_arguments<T> guarded;
  random_engine random(1);
  for (const auto& [length, dim] : edges<typename TestFixture::shape>())
    for (const entry entry : gradient_entries) {
      const problem p = example(entry, {.heads = 2,
                                        .queries = length,
                                        .keys = length,
                                        .dim = dim,
                                        .value_dim = dim <= greatest ? greatest + 1 - dim : dim});
      gradient_memory<T> plain = gradient_memory<T>(p).randomize(random).gradient();
      for (const bool end : {false, true})
        for (const std::int64_t padding : {0, 3}) {
          const arguments<T> a = guarded.place_all(plain, end, padding);
          call_gradient(p, a, {}, guarded.workspace(end, gradient_workspace_size(p, a)));
          ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p << ", padding " << padding;
        }
    }
}

/// What `gradient_workspace_size` says is enough however the first byte is aligned; a byte is not.
TYPED_TEST(GradientRobustness, TheWorkspaceIsAsLargeAsSaid) {
  using T = TypeParam;
  const guarded_arguments<T> guarded;
  random_engine random(2);
  const std::vector<any_executor> runs{{}, {7, thread_per_task}};
  for (const entry entry : gradient_entries)
    for (const std::int64_t length : {std::int64_t{1}, this->lanes + 1, 2 * this->stack + 1})
      for (const any_executor& run : runs) {
        const problem p = example(entry, {.heads = 2, .queries = length, .keys = length, .dim = 17, .value_dim = 10});
        gradient_memory<T> plain = gradient_memory<T>(p).randomize(random).gradient();
        const arguments<T> a = guarded.place_all(plain, true, 0);
        const std::size_t said = gradient_workspace_size(p, a, run);
        for (const std::size_t less : {0u, 1u, 63u}) {
          // The first byte lies `less` below the place that is aligned like the guard.
          const auto workspace = guarded.workspace(true, said + less).first(said);
          call_gradient(p, a, run, workspace);
          ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p << ", misaligned by " << less;
        }
        for (tensor<T>& result : plain.results) result.fill(T(3));
        const arguments<T> unwritten = plain.arguments();
        const auto expected = plain;
        std::byte byte{};
        try {
          call_gradient(p, unwritten, run, {&byte, 1});
          ADD_FAILURE() << p << " is content with a byte";
        } catch (const std::invalid_argument& refusal) {
          EXPECT_NE(std::string(refusal.what()).find("workspace: got 1 bytes, wants "), std::string::npos)
              << refusal.what();
        }
        ASSERT_TRUE(same_bits<T>(unwritten.results, gradient_memory<T>(expected).arguments().results)) << p;
      }
}

TYPED_TEST(GradientRobustness, NothingIsAllocatedWhereThereIsAWorkspace) {
  using T = TypeParam;
  random_engine random(3);
  for (const entry entry : gradient_entries)
    for (const std::int64_t length : {std::int64_t{1}, this->stack + 3}) {
      const problem p = example(entry, {.heads = 2, .queries = length, .keys = length, .dim = 9, .value_dim = 5});
      gradient_memory<T> memory = gradient_memory<T>(p).randomize(random);
      const arguments<T> a = memory.arguments();
      std::vector<std::byte> workspace(gradient_workspace_size(p, a));
      const any_executor run;
      const std::int64_t before = allocation_count();
      call_gradient(p, a, run, workspace);
      EXPECT_EQ(allocation_count() - before, 0) << p;
    }
}

/// NaNs between the rows do not get in, nothing is written there, and an operand with stride 0 is its row repeated.
TYPED_TEST(GradientRobustness, AnyLayoutIsReadAndWrittenWhereItsElementsAre) {
  using T = TypeParam;
  random_engine random(4);
  for (const entry entry : gradient_entries)
    for (int i = 0; i < 60; ++i) {
      const std::int64_t kv_heads = draw(random, 1, 2), keys = draw(random, 1, this->lanes + 9);
      const problem p = example(entry, {.batch = draw(random, 1, 3),
                                        .heads = kv_heads * draw(random, 1, 3),
                                        .kv_heads = kv_heads,
                                        .queries = draw(random, 1, 2) == 1 ? draw(random, 1, 5) : keys,
                                        .keys = keys,
                                        .dim = draw(random, 1, 20),
                                        .value_dim = draw(random, 1, 20)});
      gradient_memory<T> memory(
          p, [&](bool may_broadcast) { return may_broadcast ? random_operand_layout(random) : random_layout(random); });
      memory.randomize(random).gradient();
      ASSERT_TRUE(memory.canaries_intact()) << p;
      const arguments<T> a = memory.arguments();
      gradient_memory<T> plain(p);
      for (std::size_t o = 0; o < a.operands.size(); ++o) copy(a.operands[o], plain.operands[o].view());
      plain.seen = tensor<std::int64_t, 3>(a.seen.extent);
      for_each_row(a.seen, [&](std::int64_t b, std::int64_t h, std::int64_t q) {
        *plain.seen.row(b, h, q) = *a.seen.row(b, h, q);
      });
      plain.gradient();
      ASSERT_TRUE(same_bits(a.results, plain.arguments().results)) << p;
    }
}

/// Strides beyond 2^31 and 2^32 elements: one argument after the other is spread over address space of which only the
/// rows are ever touched.
TYPED_TEST(GradientRobustness, StridesMayExceed32Bits) {
  using T = TypeParam;
  random_engine random(5);
  // A stride that is cut to 32 bits becomes negative, or 0.
  constexpr std::array<std::int64_t, 2> strides{(std::int64_t{1} << 31) + 1, std::int64_t{1} << 32};
  constexpr std::int64_t most = 3;
  constexpr std::size_t bytes = sizeof(T) * ((std::size_t{1} << 32) + 9) * most;
  if (mapping(bytes, PROT_READ | PROT_WRITE).data() == nullptr)
    GTEST_SKIP() << "the system does not give " << bytes << " bytes of address space";
  for (const entry entry : gradient_entries)
    for (const std::size_t dimension : {0u, 1u, 2u})
      for (const std::int64_t stride : strides) {
        sizes s{.queries = most, .keys = most, .dim = 4, .value_dim = 4};
        if (dimension == 0) s.batch = most;
        if (dimension == 1) s.heads = s.kv_heads = most;
        problem p = example(entry, s);
        p.far_length = most;
        if (p.options.group_size > 1) p.options.group_size = 1;
        if (p.options.window != unlimited) p.options.window = 1;
        const gradient_memory<T> plain = gradient_memory<T>(p).randomize(random).gradient();
        const std::size_t operands = plain.operands.size();
        for (std::size_t spread = 0; spread < operands + plain.results.size(); ++spread) {
          const mapping memory(bytes, PROT_READ | PROT_WRITE);
          gradient_memory<T> expected = plain, called = plain;
          arguments<T> a = called.arguments();
          tensor_view<T> view = spread < operands ? called.operands[spread].view() : a.results[spread - operands];
          view.data = reinterpret_cast<T*>(memory.data());
          view.stride[dimension] = stride;
          if (spread < operands) {
            copy(plain.operands[spread].view(), view);
            a.operands[spread] = view;
          } else {
            a.results[spread - operands] = view;
          }
          call_gradient(p, a);
          ASSERT_TRUE(same_bits(a.results, expected.arguments().results))
              << p << ", argument " << spread << " with stride " << stride << " in dimension " << dimension;
        }
      }
}

/// Query and window far along see what those near by see, when all keys come before them.
TYPED_TEST(GradientRobustness, PositionsMayExceed32Bits) {
  using T = TypeParam;
  random_engine random(6);
  for (const entry entry : {entry::local, entry::attend})
    for (const std::int64_t group_size : {1, 5}) {
      problem p = example(entry, {.queries = this->lanes + 3, .keys = this->block + 7, .dim = 4, .value_dim = 4});
      const auto shift = [&](problem& q, std::int64_t position) {
        q.options = {.group_size = group_size, .window = position + 11, .first_position = position};
      };
      shift(p, p.sizes.keys);
      gradient_memory<T> near = gradient_memory<T>(p).randomize(random), far = near;
      near.gradient();
      for (const std::int64_t position :
           {(std::int64_t{1} << 31) - 2, std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 40}) {
        shift(far.problem, position);
        far.gradient();
        ASSERT_TRUE(same_bits(far.arguments().results, near.arguments().results)) << far.problem;
      }
    }
}

// ---------------------------------------------------------------------------------------------------------- executors

TYPED_TEST(GradientRobustness, ResultsAreTheSameForAnyExecutor) {
  using T = TypeParam;
  random_engine random(7);
  const auto all = executors();
  // One long head, heads that share keys, and few queries.
  const std::array shapes{sizes{.queries = 7 * this->stack + 7, .keys = 7 * this->stack + 7, .dim = 4, .value_dim = 4},
                          sizes{.batch = 2,
                                .heads = 12,
                                .kv_heads = 3,
                                .queries = this->stack + 3,
                                .keys = this->stack + 3,
                                .dim = 4,
                                .value_dim = 4},
                          sizes{.heads = 4, .kv_heads = 2, .queries = 2, .keys = 2000, .dim = 4, .value_dim = 4}};
  std::vector<problem> problems;
  for (const entry entry : gradient_entries)
    for (const sizes& s : shapes) {
      problem p = example(entry, s);
      if (s.queries < s.keys && entry == entry::attention) continue;  // which has a query for every key
      if (s.queries < s.keys && entry == entry::local) p.options.window = s.keys - 5;
      problems.push_back(p);
    }
  // Two heads of one kind share one of the other kind, but not with the same heads.
  problems.push_back(example(
      entry::attend,
      {.heads = 6, .kv_heads = 3, .queries = 3 * this->stack, .keys = 3 * this->stack, .dim = 40, .value_dim = 40}));
  problems.back().far_heads = 2;
  for (const problem& p : problems) {
    const gradient_memory<T> serial = gradient_memory<T>(p).randomize(random).gradient();
    for (const auto& [name, run] : all)
      for (const bool given : {false, true}) {
        gradient_memory<T> memory = serial, expected = serial;
        for (tensor<T>& result : memory.results) result.fill(canary<T>());
        const arguments<T> a = memory.arguments();
        // Large numbers of any type, so that what is read before it is written shows.
        std::vector<std::byte> workspace(given ? gradient_workspace_size(p, a, run) : 0, std::byte{0x7f});
        call_gradient(p, a, run, workspace);
        ASSERT_TRUE(same_bits(a.results, expected.arguments().results)) << p << ", " << name;
      }
  }
}

/// No memory is shared between calls.
TYPED_TEST(GradientRobustness, CallsMayOverlap) {
  using T = TypeParam;
  random_engine random(8);
  for (const entry entry : gradient_entries) {
    const problem p = example(entry, {.heads = 2, .queries = 200, .keys = 200, .dim = 9, .value_dim = 9});
    std::array memories{gradient_memory<T>(p).randomize(random), gradient_memory<T>(p).randomize(random)};
    auto expected = memories;
    for (auto& memory : expected) memory.gradient();
    for (int repeat = 0; repeat < 5; ++repeat) {
      std::vector<std::jthread> threads;
      for (auto& memory : memories) threads.emplace_back([&] { memory.gradient(); });
      threads.clear();
      for (std::size_t i = 0; i < memories.size(); ++i)
        ASSERT_TRUE(same_bits(memories[i].arguments().results, expected[i].arguments().results)) << p;
    }
  }
}

/// The part of a view that is sequence `b`, and of it the heads `[first, last)`.
template <class T, std::size_t Rank>
tensor_view<T, Rank> part(tensor_view<T, Rank> view, std::int64_t b, range heads) {
  view.data = view.row(b, heads.begin, 0);
  view.extent[0] = 1;
  view.extent[1] = heads.size();
  return view;
}

TYPED_TEST(GradientRobustness, ASequenceAloneIsTheSameAsInABatch) {
  using T = TypeParam;
  random_engine random(9);
  for (const entry entry : gradient_entries)
    for (const core_heads cores : all_core_heads)
      for (const auto& [heads, kv_heads] : std::array<std::pair<std::int64_t, std::int64_t>, 2>{{{3, 3}, {6, 2}}})
        for (const std::int64_t length : {std::int64_t{1}, std::int64_t{6}, this->stack + 5}) {
          problem p = example(entry, {.batch = 3,
                                      .heads = heads,
                                      .kv_heads = kv_heads,
                                      .queries = length,
                                      .keys = length,
                                      .dim = 7,
                                      .value_dim = 5});
          if (entry == entry::attention || entry == entry::pool) p.options.cores = cores;
          gradient_memory<T> batch = gradient_memory<T>(p).randomize(random).gradient();
          const arguments<T> together = batch.arguments();
          // Each key/value head with its queries, of each sequence, by itself.
          for (std::int64_t b = 0; b < 3; ++b)
            for (std::int64_t h = 0; h < kv_heads; ++h) {
              problem alone = p;
              alone.sizes.batch = alone.sizes.kv_heads = alone.far_heads = 1;
              alone.sizes.heads = heads / kv_heads;
              const auto heads_of = [h, kv_heads = kv_heads](std::int64_t all) {
                return range{h * all / kv_heads, (h + 1) * all / kv_heads};
              };
              gradient_memory<T> memory(alone);
              arguments<T> a = memory.arguments();
              std::vector<tensor_view<T>> expected;
              for (std::size_t o = 0; o < a.operands.size(); ++o)
                a.operands[o] = part(together.operands[o], b, heads_of(together.operands[o].heads()));
              for (const tensor_view<T>& result : together.results)
                expected.push_back(part(result, b, heads_of(result.heads())));
              if (entry == entry::attend) a.seen = part(together.seen, b, heads_of(heads));
              call_gradient(alone, a);
              ASSERT_TRUE(same_bits(a.results, expected)) << p << ", sequence " << b << ", head " << h;
            }
        }
}

/// Batch, heads, keys and queries of 0 in every combination: nothing is divided by them, and there are gradients of 0
/// where there are any.
TYPED_TEST(GradientRobustness, SizesMayBe0) {
  using T = TypeParam;
  const std::vector<any_executor> runs{{}, {7, thread_per_task}};
  for (const entry entry : gradient_entries)
    for (const std::int64_t batch : {0, 2})
      for (const std::int64_t heads : {0, 4})
        for (const std::int64_t kv_heads : {0, 2})
          for (const std::int64_t queries : {0, 3, 9})
            for (const std::int64_t keys : {0, 9})
              for (const std::int64_t far_length : {0, 9})
                for (const any_executor& run : runs) {
                  if (heads > 0 && kv_heads == 0) continue;  // refused: these queries have no keys
                  problem p = example(entry, {.batch = batch,
                                              .heads = heads,
                                              .kv_heads = kv_heads,
                                              .queries = queries,
                                              .keys = keys,
                                              .dim = 3,
                                              .value_dim = 2});
                  p.far_length = far_length;
                  random_engine random(10);
                  gradient_memory<T> memory = gradient_memory<T>(p).randomize(random).gradient(run);
                  ASSERT_TRUE(memory.canaries_intact()) << p;
                  for (std::size_t r = 0; r < memory.results.size(); ++r) {
                    const bool of_far_rows = r >= 3;
                    const bool nothing = p.sizes.queries == 0 || heads == 0 || (of_far_rows && far_length == 0) ||
                                         (keys == 0 && far_length == 0) || (keys == 0 && entry != entry::attend);
                    for_each_row(memory.results[r].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
                      for (std::int64_t d = 0; d < memory.results[r].view().dim(); ++d) {
                        const T gradient = memory.results[r].row(b, h, i)[d];
                        ASSERT_TRUE(nothing ? gradient == 0 : std::isfinite(gradient)) << p << ", gradient " << r;
                      }
                    });
                  }
                }
}

// ----------------------------------------------------------------------------------------------------- special values

/// With a NaN in the last element of row `j` of operand `o`, gradients are NaN where the textbook's are, and elsewhere
/// have the bits that they have without.
template <class T>
void expect_shown_where_seen(const gradient_memory<T>& clean, std::size_t o, std::int64_t h, std::int64_t j) {
  const problem& p = clean.problem;
  gradient_memory<T> spoilt = clean;
  spoilt.operands[o].row(0, h, j)[spoilt.operands[o].view().dim() - 1] = std::numeric_limits<T>::quiet_NaN();
  if (o < spoilt.forward_operands()) spoilt.forward();
  spoilt.gradient();
  const auto textbook = textbook_gradient<T>(p, spoilt.arguments());
  // A NaN is the maximum: what had been it is no longer.
  const bool moves_maximum = p.options.pool == pooling::max && (o == 1 || o == 2);
  for (std::size_t r = 0; r < textbook.size(); ++r)
    for_each_row(textbook[r].view(), [&](std::int64_t b, std::int64_t head, std::int64_t i) {
      for (std::int64_t d = 0; d < textbook[r].view().dim(); ++d) {
        const T gradient = spoilt.results[r].row(b, head, i)[d];
        const bool shows = std::isnan(textbook[r].view().row(b, head, i)[d]);
        ASSERT_EQ(std::isnan(gradient), shows) << p << ": NaN in operand " << o << ", head " << h << ", row " << j
                                               << ", gradient " << r << " at " << detail::to_string<4>({b, head, i, d});
        if (!shows && !moves_maximum) {
          ASSERT_TRUE(same_bits(gradient, clean.results[r].row(b, head, i)[d]))
              << p << ": NaN in operand " << o << ", head " << h << ", row " << j << " changes gradient " << r << " at "
              << detail::to_string<4>({b, head, i, d});
        }
      }
    });
}

TYPED_TEST(GradientRobustness, NaNsShowExactlyWhereTheyAreSeen) {
  using T = TypeParam;
  random_engine random(11);
  const std::int64_t length = this->stack + this->lanes + 5;
  std::vector<problem> problems;
  for (const std::int64_t queries : {std::int64_t{3}, this->lanes + 7, length}) {
    const sizes s{.heads = 2, .kv_heads = 1, .queries = queries, .keys = length, .dim = 6, .value_dim = 5};
    problems.push_back(example(entry::dense, s));
    problems.push_back(example(entry::attend, s));
    for (const options& options : {options{.window = 1},
                                   {.window = this->block + 3},
                                   {.group_size = 7, .window = 20},
                                   {.group_size = 5, .window = 9, .first_position = 40}})
      problems.push_back({.entry = entry::local, .sizes = s, .options = options});
  }
  const sizes whole{.heads = 2, .kv_heads = 1, .queries = length, .keys = length, .dim = 6, .value_dim = 5};
  for (const pooling pool : all_poolings)
    for (const core_heads cores : all_core_heads) {
      problems.push_back({.entry = entry::attention,
                          .sizes = whole,
                          .options = {.group_size = 6, .window = 15, .pool = pool, .cores = cores}});
      problems.push_back(
          {.entry = entry::pool, .sizes = whole, .options = {.group_size = 7, .pool = pool, .cores = cores}});
    }
  problems.push_back({.entry = entry::attention, .sizes = whole, .options = {.group_size = 1, .window = 30}});

  for (const problem& p : problems) {
    const gradient_memory<T> clean = gradient_memory<T>(p).randomize(random).gradient();
    for (std::size_t o = 0; o < clean.operands.size(); ++o) {
      const auto& operand = clean.operands[o].view();
      if (clean.is_forward_result(o)) continue;  // the textbook has its own
      for (std::int64_t j = draw(random, 0, 5); j < operand.length(); j += draw(random, 1, operand.length() / 4 + 1)) {
        expect_shown_where_seen(clean, o, draw(random, 0, operand.heads() - 1), j);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

/// Memory that no query sees may hold anything, all of it at once: its gradients are 0, the others the same to the bit.
TYPED_TEST(GradientRobustness, UnseenMemoryMayHoldAnything) {
  using T = TypeParam;
  constexpr T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  random_engine random(12);
  const auto expect_unseen = [&](const problem& p, const std::vector<std::size_t>& operands, const auto& unseen) {
    gradient_memory<T> clean = gradient_memory<T>(p).randomize(random), spoilt = clean;
    clean.gradient();
    for (const std::size_t o : operands)
      for_each_row(spoilt.operands[o].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        if (unseen(o, i)) fill_row(spoilt.operands[o], b, h, i, draw(random, 0, 1) == 0 ? nan : infinity);
      });
    spoilt.forward().gradient();
    ASSERT_TRUE(same_bits(spoilt.arguments().results, clean.arguments().results)) << p;
    for (const std::size_t o : operands)
      if (o < spoilt.results.size())
        for_each_row(spoilt.results[o].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          for (std::int64_t d = 0; d < spoilt.results[o].view().dim(); ++d)
            ASSERT_TRUE(!unseen(o, i) || spoilt.results[o].row(b, h, i)[d] == 0) << p << ", gradient " << o;
        });
  };

  const std::int64_t keys = 2 * this->block + 9, queries = this->lanes + 3, window = 20;
  const sizes s{.heads = 4, .kv_heads = 2, .queries = queries, .keys = keys, .dim = 6, .value_dim = 5};
  expect_unseen({.entry = entry::local, .sizes = s, .options = {.window = window}}, {1, 2},
                [&](std::size_t, std::int64_t j) { return j < keys - queries + 1 - window; });
  expect_unseen({.entry = entry::local, .sizes = s, .options = {.window = window, .first_position = 30}}, {1, 2},
                [&](std::size_t, std::int64_t j) { return j < 30 + 1 - window || j >= 30 + queries; });
  // By the rule of `seen_count` three queries see at most 24 rows.
  problem far = example(entry::attend, s);
  far.sizes.queries = 3;
  far.far_length = this->block + 9;
  expect_unseen(far, {3, 4}, [](std::size_t, std::int64_t j) { return j >= 24; });
  for (const pooling pool : all_poolings) {
    const std::int64_t g = 6, length = 4 * g + 5;
    const sizes whole{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 6, .value_dim = 5};
    expect_unseen({.entry = entry::pool, .sizes = whole, .options = {.group_size = g, .pool = pool}}, {0, 1, 2},
                  [&](std::size_t o, std::int64_t i) {
                    return i >= 4 * g || (o == 0 && (pool != pooling::last_query || i % g != g - 1));
                  });
  }
}

/// A query that sees nothing has no gradient and gives none, whatever its own and the incoming ones hold.
TYPED_TEST(GradientRobustness, QueriesThatSeeNothingHaveNoGradient) {
  using T = TypeParam;
  random_engine random(13);
  const auto expect_none = [&](const problem& p, const auto& sees_nothing) {
    gradient_memory<T> clean = gradient_memory<T>(p).randomize(random), spoilt = clean;
    clean.gradient();
    for (const std::size_t o : {std::size_t{0}, clean.operands.size() - 2, clean.operands.size() - 1})
      for_each_row(spoilt.operands[o].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        if (sees_nothing(b, h, i)) fill_row(spoilt.operands[o], b, h, i, std::numeric_limits<T>::quiet_NaN());
      });
    spoilt.forward().gradient();
    ASSERT_TRUE(same_bits(spoilt.arguments().results, clean.arguments().results)) << p;
    std::int64_t count = 0;
    for_each_row(spoilt.results[0].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      if (!sees_nothing(b, h, i)) return;
      ++count;
      for (std::int64_t d = 0; d < p.sizes.dim; ++d) ASSERT_EQ(spoilt.results[0].row(b, h, i)[d], 0) << p;
    });
    ASSERT_GT(count, 0) << p;
  };
  for (const std::int64_t queries : {std::int64_t{2}, this->lanes + 5, this->stack + 3})
    for (const entry entry : {entry::dense, entry::local})
      // Before the first key, and far behind the last.
      for (const std::int64_t first : {std::int64_t{-1}, -queries, std::int64_t{1000}}) {
        problem p = example(entry, {.heads = 2, .queries = queries, .keys = 20, .dim = 3, .value_dim = 4});
        if (entry == entry::dense && first > 0) continue;  // which sees all of them
        p.options.first_position = first;
        expect_none(p, [&](std::int64_t, std::int64_t, std::int64_t i) { return first + i < 0 || first >= 20 + 7; });
      }
  // All that is seen is far, and some queries see nothing there.
  problem p = example(entry::attend, {.heads = 2, .queries = this->lanes + 5, .keys = 0, .dim = 3, .value_dim = 4});
  p.far_length = 12;
  expect_none(p, [&](std::int64_t b, std::int64_t h, std::int64_t i) { return seen_count(p, b, h, i) == 0; });
}

/// Keys whose logits are -inf get and give nothing, neither from queries that see other keys as well nor from those that
/// see no other, whose own log-sum-exp is -inf.
TYPED_TEST(GradientRobustness, LogitsOfMinusInfinityWeighNothing) {
  using T = TypeParam;
  random_engine random(14);
  const std::int64_t infinite = this->block + 3;
  // Where the last vector of queries is full, and where it is not.
  for (const std::int64_t length : {2 * this->stack, 2 * this->stack - 1, this->stack + 1}) {
    const problem p = example(entry::dense, {.queries = length, .keys = length, .dim = 4, .value_dim = 3});
    gradient_memory<T> memory = gradient_memory<T>(p).randomize(random);
    memory.operands[0].fill(T(1));  // positive, so that -inf in a key is -inf in its logits
    for (std::int64_t j = 0; j < infinite; ++j)
      memory.operands[1].row(0, 0, j)[0] = -std::numeric_limits<T>::infinity();
    memory.forward().gradient();
    for (std::int64_t j = 0; j < length; ++j)
      for (const std::size_t o : {1u, 2u})
        for (std::int64_t d = 0; d < memory.results[o].view().dim(); ++d) {
          const T gradient = memory.results[o].row(0, 0, j)[d];
          ASSERT_TRUE(j < infinite ? gradient == 0 : std::isfinite(gradient))
              << p << ", gradient " << o << ", key " << j;
        }
    for (std::int64_t i = 0; i < length; ++i)  // 0 * inf is NaN: not the column of the infinities
      for (std::int64_t d = 1; d < p.sizes.dim; ++d) {
        const T gradient = memory.results[0].row(0, 0, i)[d];
        ASSERT_TRUE(i < infinite ? gradient == 0 : std::isfinite(gradient)) << p << ", query " << i;
      }
  }
}

// ----------------------------------------------------------------------------------------------------------- refusals

/// A call that is valid until something is changed.
struct prepared {
  problem p;
  gradient_memory<float> memory;
  arguments<float> a;

  explicit prepared(entry entry)
      : prepared(example(entry,
                         {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 6, .keys = 6, .dim = 5, .value_dim = 3})) {}
  explicit prepared(const problem& valid) : p(valid), memory(p) {
    random_engine random(1);
    memory.randomize(random);
    a = memory.arguments();
  }
  // The views point into the memory.
  prepared(const prepared&) = delete;
  prepared& operator=(const prepared&) = delete;
};

/// Expects a refusal that names `argument` and says what it got, before anything is written.
void expect_refused(prepared& call, const std::string& argument, const std::string& got = {}) {
  std::string text;
  try {
    call_gradient(call.p, call.a);
  } catch (const std::invalid_argument& refused) {
    text = refused.what();
  }
  EXPECT_NE(text.find("cca: " + argument + ": got " + got), std::string::npos)
      << call.p << ": '" << text << "' names not " << argument << ", got " << got;
  for (const tensor<float>& result : call.memory.results)
    for_each_row(result.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < result.view().dim(); ++d)
        ASSERT_TRUE(same_bits(result.row(b, h, i)[d], canary<float>())) << text << " comes after writing";
    });
}

bool is_lse(const std::string& name) { return name == "lse" || name == "grad_lse"; }

/// Calls `change(view)` with one tensor of a call after the other, in a new call each, and expects a refusal of it.
template <class Change>
void expect_each_refused(bool operands_too, bool lse_too, const Change& change) {
  for (const entry entry : gradient_entries) {
    const std::vector<std::string> names = gradient_argument_names(entry);
    for (std::size_t i = 0; i < names.size(); ++i) {
      prepared call(entry);
      const std::size_t operands = call.a.operands.size();
      if ((i < operands && !operands_too) || (is_lse(names[i]) && !lse_too)) continue;
      if (i < operands)
        change(call.a.operands[i]);
      else
        change(call.a.results[i - operands]);
      SCOPED_TRACE(testing::Message() << entry << ", " << names[i]);
      expect_refused(call, names[i]);
    }
  }
}

TEST(GradientRefuses, ViewsThatMakeNoSense) {
  for (std::size_t dimension = 0; dimension < 3; ++dimension)
    expect_each_refused(true, true, [&](auto& view) { view.extent[dimension] = -1; });
  expect_each_refused(true, false, [](auto& view) { view.extent[3] = 0; });
  for (const std::int64_t stride : {-1, 0, 2})
    expect_each_refused(true, false, [&](auto& view) { view.stride[3] = stride; });
  expect_each_refused(true, true, [](auto& view) { view.data = nullptr; });
  expect_each_refused(true, true, [](auto& view) { view.stride[0] = std::int64_t{1} << 60; });
}

TEST(GradientRefuses, GradientsThatOverlap) {
  for (std::size_t dimension = 0; dimension < 3; ++dimension) {
    expect_each_refused(false, false, [&](auto& view) { view.stride[dimension] = 0; });
    expect_each_refused(false, false, [&](auto& view) { view.stride[dimension] = -view.stride[(dimension + 1) % 3]; });
  }
  expect_each_refused(false, false, [](auto& view) { view.stride[2] = view.extent[3] - 1; });
}

/// One extent too few, of every tensor but the query and what is the key's own to say.
TEST(GradientRefuses, ExtentsThatDoNotFit) {
  for (const entry entry : gradient_entries) {
    const std::vector<std::string> names = gradient_argument_names(entry);
    for (std::size_t i = 1; i < names.size(); ++i)
      for (std::size_t dimension = 0; dimension < 4; ++dimension) {
        prepared call(entry);
        const std::size_t operands = call.a.operands.size();
        const bool is_key = names[i] == "key" || names[i] == "far.key";
        if ((is_lse(names[i]) && dimension == 3) || (is_key && (dimension == 1 || dimension == 2)) ||
            (names[i] == "value" && dimension == 3))
          continue;
        (i < operands ? call.a.operands[i].extent : call.a.results[i - operands].extent)[dimension] -= 1;
        SCOPED_TRACE(testing::Message() << entry << ", " << names[i] << ", dimension " << dimension);
        expect_refused(call, names[i]);
      }
  }
}

TEST(GradientRefuses, AMissingLogSumExp) {
  for (const entry entry : gradient_entries) {
    if (entry == entry::pool) continue;
    prepared call(entry);
    call.a.operands[call.a.operands.size() - 3] = {};
    expect_refused(call, "lse");
  }
}

TEST(GradientRefuses, HeadsThatDoNotDivideAndCountsOfFarRowsThatThereAreNot) {
  for (const entry entry : gradient_entries)
    for (const std::int64_t heads : {0, 3, 8}) {
      prepared call(entry);
      for (std::size_t o : {1u, 2u}) call.a.operands[o].extent[1] = call.a.results[o].extent[1] = heads;
      expect_refused(call, "key", std::to_string(heads) + " heads");
    }
  for (const std::int64_t count : {std::int64_t{-1}, std::int64_t{10}, unlimited}) {
    prepared call(entry::attend);
    *call.memory.seen.row(1, 3, 5) = count;
    expect_refused(call, "far.seen", std::to_string(count) + " at [1, 3, 5]");
  }
  prepared call(entry::attend);
  call.a.seen.extent[1] -= 1;
  expect_refused(call, "far.seen");
}

TEST(GradientRefuses, LengthsThatDoNotFit) {
  for (const entry entry : {entry::attention, entry::pool}) {
    prepared call(entry);
    call.a.operands[0].extent[2] = call.a.results[0].extent[2] = 5;
    expect_refused(call, "query", "5 queries");
  }
}

TEST(GradientRefuses, Options) {
  struct option_refusal {
    std::vector<entry> entries;
    std::string option;
    std::function<void(options&)> change;
  };
  const std::vector<entry> all(gradient_entries.begin(), gradient_entries.end());
  const std::vector<entry> with_raw{entry::dense, entry::local, entry::attend};
  const std::vector<entry> with_window{entry::local, entry::attention, entry::attend};
  const std::vector<entry> with_query_per_key{entry::attention, entry::pool};
  const std::vector<option_refusal> table{
      {all, "group_size", [](options& o) { o.group_size = 0; }},
      {with_window, "window", [](options& o) { o.window = 0; }},
      {all, "softmax_scale", [](options& o) { o.softmax_scale = std::numeric_limits<double>::infinity(); }},
      {all, "softmax_scale", [](options& o) { o.softmax_scale = 1e300; }},
      {all, "pool", [](options& o) { o.pool = static_cast<pooling>(3); }},
      {all, "cores", [](options& o) { o.cores = static_cast<core_heads>(-1); }},
      {with_raw, "first_position", [](options& o) { o.first_position = unlimited; }},
      {with_query_per_key, "first_position", [](options& o) { o.first_position = 3; }},
      // Whatever would have no effect.
      {with_raw, "pool", [](options& o) { o.pool = pooling::mean; }},
      {with_raw, "cores", [](options& o) { o.cores = core_heads::per_kv_head; }},
      {{entry::dense, entry::pool}, "window", [](options& o) { o.window = 5; }},
      {{entry::dense}, "group_size", [](options& o) { o.group_size = 5; }},
      {with_window, "group_size", [](options& o) { o.group_size = 5, o.window = unlimited; }},
  };
  for (const auto& [entries, option, change] : table)
    for (const entry entry : entries) {
      prepared call(entry);
      change(call.p.options);
      SCOPED_TRACE(testing::Message() << call.p);
      expect_refused(call, "options." + option);
    }
  // The mean and the maximum have no softmax.
  const sizes s{.heads = 2, .queries = 6, .keys = 6, .dim = 5, .value_dim = 3};
  prepared scaled({.entry = entry::pool, .sizes = s, .options = {.group_size = 3, .pool = pooling::mean}});
  scaled.p.options.softmax_scale = 0.5;
  expect_refused(scaled, "options.softmax_scale");
}

TEST(GradientRefuses, NothingThatIsAllowed) {
  for (const entry entry : gradient_entries)
    for (const std::size_t dimension : {0u, 2u}) {
      prepared call(entry);
      for (auto& view : call.a.operands) view.extent[dimension] = 0, view.data = nullptr;
      for (auto& view : call.a.results) view.extent[dimension] = 0, view.data = nullptr;
      call.a.seen.extent[dimension] = 0;
      call.a.seen.data = nullptr;
      EXPECT_NO_THROW(call_gradient(call.p, call.a)) << entry;
    }
  for (const entry entry : gradient_entries) {
    prepared call(entry);  // of one sequence, the stride is any number
    for (auto& view : call.a.operands) view.extent[0] = 1, view.stride[0] = unlimited;
    for (auto& view : call.a.results) view.extent[0] = 1, view.stride[0] = -unlimited - 1;
    call.a.seen.extent[0] = 1;
    EXPECT_NO_THROW(call_gradient(call.p, call.a)) << entry;
  }
}

}  // namespace
}  // namespace cca::test
