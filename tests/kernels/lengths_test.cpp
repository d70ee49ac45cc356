// Sequences of their own lengths, packed or padded: to the bit as if each were called alone, forward and backward.

#include "ragged.hpp"

#include "executors.hpp"
#include "passes.hpp"
#if defined(CCA_TEST_UNITS)
#include "amx_emulator.hpp"
#include "unit_entry_points.hpp"
#endif

namespace cca::test { namespace {

template <class Pass>
class Lengths : public testing::Test {
 protected:
  /// Lengths at every edge: none, a part of a group, groups and a few tokens, tiles, stacks, and long.
  static std::vector<lengths> of(entry entry) {
    constexpr std::int64_t g = 3, few = detail::most_few_queries;
    const std::int64_t lanes = Pass::lanes(), stack = Pass::stack();
    std::vector<lengths> all;
    for (const std::int64_t n : {std::int64_t{7}, std::int64_t{0}, std::int64_t{1}, g - 1, 5 * g + 3, few, few + 1,
                                 lanes - 1, lanes, lanes + 1, 2 * stack + 3, std::int64_t{1000}, std::int64_t{0}})
      all.push_back({n, n, n / 2});
    if (entry != entry::attention && entry != entry::pool)
      // Fewer queries than keys, also where the context is cut into parts; more; and one side empty.
      for (const lengths& l : std::initializer_list<lengths>{{1, 1100, 5},
                                                             {3, 40, 1030},
                                                             {few, 2 * detail::part_rows + 1, 0},
                                                             {20, 300, 0},
                                                             {5, 0, 9},
                                                             {0, 5, 9},
                                                             {30, 11, 3}})
        all.push_back(l);
    return all;
  }

  static problem example(entry entry) {
    problem p = test::example(entry, {.heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3});
    p.far_heads = 2;
    return p;
  }
};
TYPED_TEST_SUITE(Lengths, passes);

TYPED_TEST(Lengths, EverySequenceIsAsIfAlone) {
  random_engine random(1);
  for (const entry entry : TypeParam::entries) {
    const alone<TypeParam> want(this->example(entry), this->of(entry), random);
    for (const ragged_layout layout : all_ragged_layouts) {
      const together<TypeParam> all(want, [&] { return layout; });
      TypeParam::call(all.p, all.arguments());
      ASSERT_TRUE(all.same_as(want)) << all.p << ", layout " << static_cast<int>(layout);
    }
    const together<TypeParam> mixed(want, [&] { return draw_from(random, all_ragged_layouts); });
    TypeParam::call(mixed.p, mixed.arguments());
    ASSERT_TRUE(mixed.same_as(want)) << mixed.p << ", mixed layouts";
  }
}

/// Random lengths, options and order: what is planned for one sequence is not used for another.
TYPED_TEST(Lengths, OfAnyBatchAndOptions) {
  random_engine random(2);
  for (int repeat = 0; repeat < 60; ++repeat) {
    problem p = this->example(draw_from(random, TypeParam::entries));
    if (p.entry == entry::attention || p.entry == entry::pool) {
      p.options.group_size = draw(random, 1, 20);
      p.options.pool = draw_from(random, all_poolings);
      if (p.entry == entry::pool) p.options.window = pool_window(p.options.pool, draw(random, 1, 90));
      p.options.core_heads = draw_from(random, all_core_heads);
    }
    if (p.entry == entry::local || p.entry == entry::attend) p.options.group_size = draw(random, 0, 9);
    if (p.entry != entry::dense && p.entry != entry::pool && p.entry != entry::merge)
      p.options.window = draw(random, 1, 90);
    if (p.entry == entry::dense && draw(random, 0, 2) == 0) p.options.first_position = draw(random, -20, 90);
    if (p.entry != entry::merge && draw(random, 0, 1) == 0) p.options.sink_tokens = draw(random, 0, 40);
    if (p.entry == entry::dense && draw(random, 0, 1) == 0) {
      p.options.lookahead = draw_from(random, std::array<std::int64_t, 3>{0, 7, unlimited});
      p.options.prefix = draw(random, 0, 60);
    }
    std::vector<lengths> all(static_cast<std::size_t>(draw(random, 1, 6)));
    for (lengths& l : all) {
      l = {draw(random, 0, 90), draw(random, 0, 200), draw(random, 0, 50)};
      if (draw(random, 0, 2) == 0) l.queries = draw(random, 0, detail::most_few_queries);
      if (p.entry == entry::attention || p.entry == entry::pool) l.queries = l.keys;
    }
    const alone<TypeParam> want(p, all, random);
    const together<TypeParam> got(want, [&] { return draw_from(random, all_ragged_layouts); });
    TypeParam::call(p, got.arguments());
    ASSERT_TRUE(got.same_as(want)) << p << ", batch " << all.size();
  }
}

TYPED_TEST(Lengths, DoNotDependOnTheExecutor) {
  random_engine random(3);
  const auto all_executors = executors();
  for (const entry entry : TypeParam::entries) {
    const alone<TypeParam> want(this->example(entry), this->of(entry), random);
    for (const named_executor& executor : all_executors) {
      const together<TypeParam> got(want, [] { return ragged_layout::packed; });
      TypeParam::call(got.p, got.arguments(), executor.run);
      ASSERT_TRUE(got.same_as(want)) << got.p << ", " << executor.name;
    }
  }
}

TYPED_TEST(Lengths, NothingIsTouchedBesideTheSequencesAndTheWorkspace) {
  random_engine random(4);
  const std::vector<guarded_pages> pages(15);
  const guarded_pages workspace(std::size_t{1} << 25);
  for (const entry entry : TypeParam::entries) {
    const alone<TypeParam> want(this->example(entry), this->of(entry), random);
    for (const bool end : {false, true})
      for (const any_executor& run : {any_executor{}, any_executor{3, thread_per_task}}) {
        const together<TypeParam> got(
            want, [] { return ragged_layout::packed; }, &pages, end);
        const std::size_t bytes = TypeParam::workspace_size(got.p, got.arguments(), run);
        std::byte* memory = workspace.at(end, bytes);
        std::memset(memory, 0xff, bytes);
        TypeParam::call(got.p, got.arguments(), run, {memory, bytes});
        ASSERT_TRUE(got.same_as(want)) << got.p;
      }
  }
}

/// One token of one document says nothing to the others.
TYPED_TEST(Lengths, DocumentsDoNotLeak) {
  using T = typename TypeParam::element;
  random_engine random(5);
  const std::int64_t changed = 2;
  for (const entry entry : TypeParam::entries) {
    const alone<TypeParam> from(this->example(entry), {{7, 7, 2}, {40, 40, 9}, {18, 18, 5}, {3, 3, 1}, {100, 100, 0}},
                                random);
    for (std::size_t operand = 0; operand < from.memories[0].operands.size(); ++operand) {
      const together<TypeParam> before(from, [] { return ragged_layout::packed; });
      const together<TypeParam> after(from, [] { return ragged_layout::packed; });
      const auto view = after.operands[operand].view();
      for (const std::int64_t i : {std::int64_t{0}, view.length(changed) - 1})
        if (i >= 0) *view.row(changed, 0, i) += T(1);
      TypeParam::call(before.p, before.arguments());
      TypeParam::call(after.p, after.arguments());
      for (std::size_t r = 0; r < before.results.size(); ++r)
        for (std::int64_t b = 0; b < from.count(); ++b)
          if (b != changed) {
            ASSERT_TRUE(same_bits(before.results[r].view().sequence(b), after.results[r].view().sequence(b)))
                << before.p << ", operand " << operand << ", result " << r << ", sequence " << b;
          }
    }
  }
}

/// Views without lengths among such with lengths, where all sequences are as long.
TYPED_TEST(Lengths, MayBeThoseOfAPlainBatch) {
  using T = typename TypeParam::element;
  random_engine random(6);
  for (const entry entry : TypeParam::entries) {
    const std::vector<lengths> all(3, {20, 20, 4});
    const alone<TypeParam> want(this->example(entry), all, random);
    const together<TypeParam> got(want, [] { return ragged_layout::padded_front; });
    arguments<T> a = got.arguments();
    const auto forget = [&](auto& view) {
      if (draw(random, 0, 1) == 0) return;
      if (!view.empty()) view.data = view.row(0, 0, 0);
      view.begins = view.ends = nullptr;
    };
    for (auto& view : a.operands) forget(view);
    for (auto& view : a.results) forget(view);
    forget(a.seen);
    TypeParam::call(got.p, a);
    ASSERT_TRUE(got.same_as(want)) << got.p;
  }
}

/// Sequences beyond 2^31 and 2^32 elements of each other, in address space of which only the rows are ever touched.
TYPED_TEST(Lengths, OffsetsMayExceed32Bits) {
  using T = typename TypeParam::element;
  constexpr std::array<std::int64_t, 3> firsts{3, (std::int64_t{1} << 31) + 1, (std::int64_t{1} << 32) + 9};
  constexpr std::size_t bytes = sizeof(T) * ((std::size_t{1} << 32) + 100) * 4 * 2;
  if (mapping(bytes, PROT_READ | PROT_WRITE).data() == nullptr)
    GTEST_SKIP() << "the system does not give " << bytes << " bytes of address space";
  random_engine random(7);
  for (const entry entry : TypeParam::entries) {
    problem p = test::example(entry, {.heads = 2, .kv_heads = 2, .dim = 4, .value_dim = 4});
    p.far_heads = 2;
    const alone<TypeParam> want(p, {{5, 5, 5}, {12, 12, 12}, {9, 9, 9}}, random);
    const together<TypeParam> plain(want, [] { return ragged_layout::packed; });
    for (std::size_t spread = 0; spread < plain.operands.size() + plain.results.size(); ++spread) {
      const together<TypeParam> got(want, [] { return ragged_layout::packed; });
      const mapping memory(bytes, PROT_READ | PROT_WRITE);
      arguments<T> a = got.arguments();
      const auto far_apart = [&](auto view) {
        using Element = typename decltype(view)::element_type;
        view.data = reinterpret_cast<Element*>(memory.data());
        return view;
      };
      std::array<std::int64_t, 3> begins = firsts, ends{};
      const bool is_operand = spread < got.operands.size();
      const tensor_view<T> old =
          is_operand ? got.operands[spread].view() : got.results[spread - got.operands.size()].view();
      for (std::size_t b = 0; b < 3; ++b) ends[b] = begins[b] + old.length(static_cast<std::int64_t>(b));
      tensor_view<T> view = far_apart(old);
      view.begins = begins.data();
      view.ends = ends.data();
      if (is_operand) {
        for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          std::copy_n(old.row(b, h, i), view.dim(), view.row(b, h, i));
        });
        a.operands[spread] = view;
      } else {
        a.results[spread - got.operands.size()] = view;
      }
      TypeParam::call(p, a);
      if (!is_operand)
        for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          std::copy_n(view.row(b, h, i), view.dim(), old.row(b, h, i));
        });
      ASSERT_TRUE(got.same_as(want)) << p << ", argument " << spread;
    }
  }
}

// --------------------------------------------------------------------------------------------------------- sink logits

/// Calls `f` with one and the other.
template <class A, class B, class F>
void for_both(A& a, B& b, const F& f) {
  f(a);
  f(b);
}

template <class T>
class LengthsOfSinks : public testing::Test {};
TYPED_TEST_SUITE(LengthsOfSinks, precisions);

/// Random sink logits of sequences, and their gradients.
template <class T>
struct sink_tensors {
  std::vector<tensor<T, 3>> logits, grads;
  std::vector<extents> all;

  sink_tensors(const std::vector<lengths>& sequences, bool per_query, random_engine& random) {
    for (const lengths& l : sequences) {
      const std::array<std::int64_t, 3> e{1, 4, per_query ? l.queries : 1};
      all.push_back({e[0], e[1], e[2], 1});
      logits.emplace_back(e).randomize(random);
      grads.emplace_back(e);
    }
  }
};

/// One per query, of the queries' lengths, and one per head of each sequence: as if alone, and so are their gradients.
TYPED_TEST(LengthsOfSinks, AreThoseOfTheQueries) {
  using T = TypeParam;
  using Pass = backward_pass<T>;
  const problem p = test::example(entry::attention, {.heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3});
  const std::vector<lengths> sequences{{7, 7}, {0, 0}, {40, 40}, {1, 1}, {100, 100}};
  random_engine random(8);
  for (const bool per_query : {false, true})
    for (const ragged_layout layout : all_ragged_layouts) {
      alone<Pass> want(p, sequences, random);
      sink_tensors<T> sinks(sequences, per_query, random);
      ragged_tensor<T, 3> logits(sinks.all, layout), grads(sinks.all, layout);
      for (std::size_t b = 0; b < sequences.size(); ++b) {
        auto& memory = want.memories[b];
        arguments<T> a = memory.arguments();
        a.sinks = std::as_const(sinks.logits[b]).view();
        a.grad_sinks = sinks.grads[b].view();
        a.results = {memory.operands[3].view(), memory.operands[4].view()};
        call(p, a);
        a.results = memory.arguments().results;
        Pass::call(p, a);
        logits.take(static_cast<std::int64_t>(b), a.sinks);
      }
      const together<Pass> got(want, [&] { return layout; });
      arguments<T> a = got.arguments();
      a.sinks = logits.view();
      a.grad_sinks = grads.view();
      if (!per_query)
        for_both(a.sinks, a.grad_sinks, [](auto& view) {  // said without lengths
          const std::int64_t stride = view.row(1, 0, 0) - view.row(0, 0, 0);
          view = {view.row(0, 0, 0), {view.batch(), view.heads(), 1}, {stride, view.stride[1], 0}};
        });
      const together<Pass> out(want, [&] { return layout; });
      arguments<T> forward = a;
      forward.results = {out.operands[3].view(), out.operands[4].view()};
      call(p, forward);
      Pass::call(p, a);
      ASSERT_TRUE(got.same_as(want));
      ASSERT_TRUE(grads.canaries_intact());
      for (std::int64_t b = 0; b < want.count(); ++b) {
        const auto& memory = want.memories[static_cast<std::size_t>(b)];
        ASSERT_TRUE(same_bits(forward.results[0].sequence(b), memory.operands[3].view()));
        ASSERT_TRUE(same_bits(forward.results[1].sequence(b), memory.operands[4].view()));
        ASSERT_TRUE(same_bits(grads.view().sequence(b), sinks.grads[static_cast<std::size_t>(b)].view()));
      }
    }
}

// ------------------------------------------------------------------------------------------------------- the reference

template <class T>
class LengthsOfTheTextbook : public testing::Test {};
TYPED_TEST_SUITE(LengthsOfTheTextbook, precisions);

/// The textbook takes one sequence after the other, of numbers in double, which those of floats become first.
TYPED_TEST(LengthsOfTheTextbook, AreThoseOfEachSequence) {
  using Pass = backward_pass<TypeParam>;
  random_engine random(9);
  const std::vector<lengths> all{{7, 7, 3}, {0, 0, 2}, {25, 25, 0}, {1, 1, 4}};
  for (const entry entry : gradient_entries) {
    problem p = test::example(entry, {.heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3});
    p.far_heads = 2;
    alone<Pass> want(p, all, random);
    const together<Pass> got(want, [&] { return draw_from(random, all_ragged_layouts); });
    const arguments<TypeParam> a = got.arguments();
    const auto gradient = textbook_gradient<double>(p, a);
    const auto forward = [&](const arguments<TypeParam>& in) {
      if (entry == entry::pool)
        return reference::pool<double>(in.operands[0], in.operands[1], in.operands[2], p.options);
      const auto r = entry == entry::attend      ? reference::attend<double>(inputs_of(in), far_of(in), p.options)
                     : entry == entry::attention ? reference::attention<double>(inputs_of(in), p.options)
                                                 : reference::local_attention<double>(inputs_of(in), p.options);
      return std::pair(r.out, r.lse);
    };
    const auto result = forward(a);
    for (std::int64_t b = 0; b < want.count(); ++b) {
      const arguments<TypeParam> one = want.memories[static_cast<std::size_t>(b)].arguments();
      const auto alone_gradient = textbook_gradient<double>(p, one);
      const auto alone_result = forward(one);
      const auto expect_same = [&](const reference::tensor<double>& of_all, const reference::tensor<double>& of_one) {
        tensor_view<const double> rows = of_all.view();
        rows.data = rows.row(b, 0, 0);
        rows.extent[0] = 1;
        rows.extent[2] = of_one.extent[2];
        EXPECT_TRUE(same_bits(rows, of_one.view())) << p << ", sequence " << b;
      };
      for (std::size_t i = 0; i < gradient.size(); ++i) expect_same(gradient[i], alone_gradient[i]);
      expect_same(result.first, alone_result.first);
      expect_same(result.second, alone_result.second);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- refusals

/// What a call of packed sequences of 4 and 6 tokens refuses.
template <class Change>
void expect_refused(const std::string& message, entry entry, const Change& change) {
  using Pass = backward_pass<float>;
  random_engine random(10);
  problem p = test::example(entry, {.heads = 2, .kv_heads = 2, .dim = 4, .value_dim = 3});
  p.far_heads = 2;
  alone<Pass> want(p, {{4, 4, 5}, {6, 6, 2}}, random);
  const together<Pass> got(want, [] { return ragged_layout::packed; });
  arguments<float> a = got.arguments();
  change(a);
  const std::string text = refusal_of([&] { Pass::call(p, a); });
  EXPECT_EQ(text, "cca: " + message) << entry;
  for (const auto& result : got.results)
    for_each_row(result.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      ASSERT_TRUE(same_bits(*result.view().row(b, h, i), canary<float>())) << text << " comes after writing";
    });
}

TEST(LengthsRefused, NameTheArgumentAndTheSequence) {
  const auto lengths_of_operand = [](std::size_t i, const std::array<std::int64_t, 2>& begins,
                                     const std::array<std::int64_t, 2>& ends) {
    return [i, &begins, &ends](arguments<float>& a) {
      a.operands[i].begins = begins.data();
      a.operands[i].ends = ends.data();
    };
  };
  const std::array<std::int64_t, 2> from{0, 4}, to{4, 10}, below{-1, 4}, back{4, 3}, beyond{4, 11}, short_one{4, 9};
  expect_refused("key: got sequence 0 from token -1 to 4, wants offsets of at least 0 that never decrease",
                 entry::dense, lengths_of_operand(1, below, to));
  expect_refused("query: got sequence 1 from token 4 to 3, wants offsets of at least 0 that never decrease",
                 entry::dense, lengths_of_operand(0, from, back));
  expect_refused("value: got sequence 1 from token 4 to 11, wants a length of at most 6", entry::attention,
                 lengths_of_operand(2, from, beyond));
  expect_refused("value: got length 5 of sequence 1, wants length 6", entry::attention,
                 lengths_of_operand(2, from, short_one));
  expect_refused("query: got begins without ends, wants both or none", entry::dense,
                 [](arguments<float>& a) { a.operands[0].ends = nullptr; });
  expect_refused(
      "query: got 5 queries of sequence 1, wants a query for each of the 6 keys, since a group is pooled with its "
      "last one; new tokens after old ones are for kv_cache",
      entry::attention, lengths_of_operand(0, from, short_one));
  expect_refused("out: got length 5 of sequence 1, wants length 6", entry::dense,
                 lengths_of_operand(3, from, short_one));
  expect_refused("lse: got length 5 of sequence 1, wants length 6", entry::dense,
                 lengths_of_operand(4, from, short_one));
  expect_refused("grad_out: got length 5 of sequence 1, wants length 6", entry::dense,
                 lengths_of_operand(5, from, short_one));
  expect_refused("grad_core_key: got length 2 of sequence 0, wants length 1", entry::pool,
                 [](arguments<float>& a) { a.operands[3].begins = a.operands[3].ends = nullptr; });
  const auto lengths_of_result = [](std::size_t i, const std::array<std::int64_t, 2>& begins,
                                    const std::array<std::int64_t, 2>& ends) {
    return [i, &begins, &ends](arguments<float>& a) {
      a.results[i].begins = begins.data();
      a.results[i].ends = ends.data();
    };
  };
  expect_refused("grad_key: got length 5 of sequence 1, wants length 6", entry::attention,
                 lengths_of_result(1, from, short_one));
  expect_refused("grad_value: got sequence 1 from token 3, wants one that begins where those before it end, at 4",
                 entry::dense, [&](arguments<float>& a) {
                   static const std::array<std::int64_t, 2> begins{0, 3}, ends{4, 9};
                   a.results[2].begins = begins.data();
                   a.results[2].ends = ends.data();
                 });
  expect_refused("far.seen: got 3 at [1, 0, 2], wants a count in [0, 2]", entry::attend,
                 [](arguments<float>& a) { *const_cast<std::int64_t*>(a.seen.row(1, 0, 2)) = 3; });
  expect_refused("grad_far_key: got length 4 of sequence 0, wants length 5", entry::attend, [&](arguments<float>& a) {
    static const std::array<std::int64_t, 2> begins{0, 5}, ends{4, 7};
    a.results[3].begins = begins.data();
    a.results[3].ends = ends.data();
  });
  static const float sinks[20] = {};
  expect_refused("sink_logits: got length 3 of sequence 0, wants length 4", entry::dense, [&](arguments<float>& a) {
    static const std::array<std::int64_t, 2> begins{0, 4}, ends{3, 10};
    a.sinks = {sinks, {2, 2, 6}, {0, 10, 1}, begins.data(), ends.data()};
  });
}

TEST(LengthsRefused, ByWorkspaceSizesToo) {
  const std::array<std::int64_t, 3> offsets{0, 4, 10}, wrong{0, 4, 3};
  const std::array<std::int64_t, 4> more{0, 4, 10, 12};
  const float* none = nullptr;
  const auto q = packed(none, offsets, 2, 4), k = packed(none, wrong, 2, 4), k3 = packed(none, more, 2, 4);
  arguments<float> a{.operands = {q, k, k}, .results = {}, .seen = {}};
  const problem p{};
  EXPECT_THROW((void)workspace_size(p, a), std::invalid_argument);
  EXPECT_THROW((void)gradient_workspace_size(p, a), std::invalid_argument);
  a.operands = {q, k3, k3};
  EXPECT_THROW((void)workspace_size(p, a), std::invalid_argument);
  EXPECT_THROW((void)gradient_workspace_size(p, a), std::invalid_argument);
}

/// Cores lie one after the other, too: their memory is that of the tokens, however long the longest sequence is.
TEST(LengthsOfAWorkspace, AreThoseOfAllSequencesAndNotOfTheLongest) {
  std::vector<std::int64_t> offsets{0, 100'000};
  for (int b = 0; b < 200; ++b) offsets.push_back(offsets.back() + 20);
  const float* none = nullptr;
  const auto view = packed(none, offsets, 1, 64);
  const problem p{.entry = entry::attention, .options = {.group_size = 4, .window = 8}};
  const std::size_t all =
      workspace_size(p, arguments<float>{.operands = {view, view, view}, .results = {}, .seen = {}});
  const auto longest = view.sequence(0);
  const std::size_t one =
      workspace_size(p, arguments<float>{.operands = {longest, longest, longest}, .results = {}, .seen = {}});
  EXPECT_LT(all, one + one / 4);
}

// -------------------------------------------------------------------------------------------------------- matrix units

#if defined(CCA_TEST_UNITS)  // whose kernels are compiled for the newest instruction set alone

/// Operands of 16 bits of one sequence alone, its results and its gradients.
template <class Element>
struct unit_sequence {
  problem p;
  std::vector<tensor<Element>> operands;
  tensor<std::int64_t, 3> seen;
  tensor<float> out, lse, grad_lse;
  tensor<Element> grad_out;
  std::vector<tensor<float>> grads;

  unit_sequence(const problem& of, random_engine& random)
      : p(of),
        seen({1, p.sizes.heads, p.sizes.queries}),
        out(result_extents(p)[0]),
        lse(result_extents(p)[1]),
        grad_lse(result_extents(p)[1]),
        grad_out(result_extents(p)[0]) {
    for (const extents& e : operand_extents(p)) operands.emplace_back(e).randomize(random), grads.emplace_back(e);
    for_each_row(seen.view(),
                 [&](std::int64_t b, std::int64_t h, std::int64_t i) { *seen.row(b, h, i) = seen_count(p, b, h, i); });
    grad_out.randomize(random);
    grad_lse.randomize(random);
    unit_arguments<Element> a{.operands = {}, .seen = std::as_const(seen).view(), .results = {out.view(), lse.view()}};
    for (const auto& t : operands) a.operands.push_back(t.view());
    call(p, a);
    a.results.clear();
    for (auto& t : grads) a.results.push_back(t.view());
    a.out = out.view(), a.lse = without_dim(std::as_const(lse).view());
    a.grad_out = std::as_const(grad_out).view(), a.grad_lse = without_dim(std::as_const(grad_lse).view());
    call_gradient(p, a);
  }
};

template <class Element>
void check_unit(matrix_unit unit, ragged_layout layout) {
  random_engine random(11);
  for (const entry entry : unit_entries) {
    std::vector<lengths> all{{7, 7, 3}, {0, 0, 0}, {1, 1, 9}, {2, 2, 0}, {18, 18, 40}, {65, 65, 70}, {270, 270, 5}};
    if (entry != entry::attention) all.insert(all.end(), {{1, 300, 5}, {20, 150, 0}, {70, 140, 33}});
    problem p = test::example(entry, {.heads = 2, .kv_heads = 1, .dim = 40, .value_dim = 24});
    p.options.unit = unit;
    std::vector<unit_sequence<Element>> alone;
    for (const lengths& l : all) {
      problem one = p;
      one.sizes.queries = l.queries, one.sizes.keys = l.keys, one.far_length = l.far_rows;
      alone.emplace_back(one, random);
    }
    const auto gather = [&](auto of) {
      using U = std::remove_cvref_t<decltype(*of(alone[0]).row(0, 0, 0))>;
      std::vector<extents> e;
      for (auto& one : alone) e.push_back(of(one).view().extent);
      ragged_tensor<U> t(e, layout);
      return t;
    };
    const auto filled = [&](auto of) {
      auto t = gather(of);
      for (std::size_t b = 0; b < alone.size(); ++b) t.take(static_cast<std::int64_t>(b), of(alone[b]).view());
      return t;
    };
    std::vector<extents> seen_extents;
    for (const auto& one : alone) seen_extents.push_back({1, 2, one.seen.view().length(), 1});
    ragged_tensor<std::int64_t, 3> seen(seen_extents, layout);
    for (std::size_t b = 0; b < alone.size(); ++b) seen.take(static_cast<std::int64_t>(b), alone[b].seen.view());
    std::vector<ragged_tensor<Element>> operands;
    std::vector<ragged_tensor<float>> grads;
    for (std::size_t i = 0; i < alone[0].operands.size(); ++i) {
      operands.push_back(filled([i](auto& s) -> auto& { return s.operands[i]; }));
      grads.push_back(gather([i](auto& s) -> auto& { return s.grads[i]; }));
    }
    const auto out = gather([](auto&s) -> auto& { return s.out; }), lse = gather([](auto&s) -> auto& { return s.lse; });
    const auto grad_lse = filled([](auto& s) -> auto& { return s.grad_lse; });
    const auto grad_out = filled([](auto& s) -> auto& { return s.grad_out; });
    unit_arguments<Element> a{.operands = {}, .seen = seen.view(), .results = {out.view(), lse.view()}};
    for (const auto& t : operands) a.operands.push_back(t.view());
    call(p, a, {3, thread_per_task});
    a.results.clear();
    for (const auto& t : grads) a.results.push_back(t.view());
    a.out = out.view(), a.lse = without_dim(lse.view());
    a.grad_out = grad_out.view(), a.grad_lse = without_dim(grad_lse.view());
    call_gradient(p, a, {3, thread_per_task});
    for (std::size_t s = 0; s < alone.size(); ++s) {
      const auto b = static_cast<std::int64_t>(s);
      EXPECT_TRUE(same_bits(out.view().sequence(b), alone[s].out.view())) << p << ", sequence " << b;
      EXPECT_TRUE(same_bits(lse.view().sequence(b), alone[s].lse.view())) << p << ", sequence " << b;
      for (std::size_t i = 0; i < grads.size(); ++i) {
        EXPECT_TRUE(same_bits(grads[i].view().sequence(b), alone[s].grads[i].view()))
            << p << ", sequence " << b << ", gradient " << i;
        EXPECT_TRUE(grads[i].canaries_intact());
      }
    }
    EXPECT_TRUE(out.canaries_intact());
    EXPECT_TRUE(lse.canaries_intact());
  }
}

TEST(LengthsOfUnits, EverySequenceIsAsIfAlone) {
  detail::matrix_units& present = detail::present_units();
  if (!present.amx_bf16 && install_amx_emulator()) present.amx_bf16 = present.amx_fp16 = true;
  for (const matrix_unit unit : {matrix_unit::none, matrix_unit::avx512_bf16, matrix_unit::amx})
    for (const ragged_layout layout : {ragged_layout::packed, ragged_layout::padded}) {
      if (unit == matrix_unit::none || detail::has_unit<Eigen::bfloat16>(unit))
        check_unit<Eigen::bfloat16>(unit, layout);
      if (unit == matrix_unit::none || detail::has_unit<Eigen::half>(unit)) check_unit<Eigen::half>(unit, layout);
    }
}
#endif

}}  // namespace cca::test
