// Gradients whatever the sizes and the numbers are; and what is refused.

#include "executors.hpp"
#include "gradient_entry_points.hpp"

namespace cca::test { namespace {

template <class T>
class GradientRobustness : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().gradient_block;
  const std::int64_t stack = tile<T>().gradient_stack * lanes;
};

TYPED_TEST_SUITE(GradientRobustness, precisions);

/// Sets every element of a row.
template <class T>
void fill_row(tensor<T>& tensor, std::int64_t b, std::int64_t h, std::int64_t i, T value) {
  std::fill_n(tensor.row(b, h, i), tensor.view().dim(), value);
}

// --------------------------------------------------------------------------------------------------------- zero sizes

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
                                               << ", gradient " << r << " at " << text_of<4>({b, head, i, d});
        if (!shows && !moves_maximum) {
          ASSERT_TRUE(same_bits(gradient, clean.results[r].row(b, head, i)[d]))
              << p << ": NaN in operand " << o << ", head " << h << ", row " << j << " changes gradient " << r << " at "
              << text_of<4>({b, head, i, d});
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
                          .options = {.group_size = 6, .window = 15, .pool = pool, .core_heads = cores}});
      problems.push_back(
          {.entry = entry::pool,
           .sizes = whole,
           .options = {.group_size = 7, .window = pool_window(pool, 15), .pool = pool, .core_heads = cores}});
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
  for (const pooling pool : group_poolings) {
    const std::int64_t g = 6, length = 4 * g + 5;
    const sizes whole{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 6, .value_dim = 5};
    expect_unseen({.entry = entry::pool, .sizes = whole, .options = {.group_size = g, .pool = pool}}, {0, 1, 2},
                  [&](std::size_t o, std::int64_t i) {
                    return i >= 4 * g || (o == 0 && (!detail::uses_query(pool) || i % g != g - 1));
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
  const std::string text = refusal_of([&] { call_gradient(call.p, call.a); });
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
      {all, "group_size", [](options& o) { o.group_size = -1; }},
      {{entry::pool}, "group_size", [](options& o) { o.group_size = 0; }},
      {with_window, "window", [](options& o) { o.window = 0; }},
      {all, "softmax_scale", [](options& o) { o.softmax_scale = std::numeric_limits<double>::infinity(); }},
      {all, "softmax_scale", [](options& o) { o.softmax_scale = 1e300; }},
      {all, "softcap", [](options& o) { o.softcap = -1; }},
      {with_query_per_key, "pooling_scale", [](options& o) { o.pooling_scale = -1; }},
      {with_query_per_key, "pooling_scale", [](options& o) { o.pooling_scale = 3, o.pool = pooling::max; }},
      {all, "pool", [](options& o) { o.pool = static_cast<pooling>(5); }},
      {all, "core_heads", [](options& o) { o.core_heads = static_cast<cca::core_heads>(-1); }},
      {with_raw, "first_position", [](options& o) { o.first_position = unlimited; }},
      {with_query_per_key, "first_position", [](options& o) { o.first_position = 3; }},
      // Whatever would have no effect.
      {with_raw, "pool", [](options& o) { o.pool = pooling::mean; }},
      {with_raw, "core_heads", [](options& o) { o.core_heads = core_heads::per_kv_head; }},
      {with_raw, "pooling_scale", [](options& o) { o.pooling_scale = 3; }},
      {{entry::dense, entry::pool}, "window", [](options& o) { o.window = 5; }},
      {{entry::dense}, "group_size", [](options& o) { o.group_size = 5; }},
      {all, "sink_tokens", [](options& o) { o.sink_tokens = -1; }},
      {all, "lookahead", [](options& o) { o.lookahead = -1; }},
      {all, "prefix", [](options& o) { o.prefix = -1; }},
      {{entry::local, entry::attention, entry::pool}, "lookahead", [](options& o) { o.lookahead = 1; }},
      {{entry::local, entry::attention, entry::pool}, "prefix", [](options& o) { o.prefix = 1; }},
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

}}  // namespace cca::test
