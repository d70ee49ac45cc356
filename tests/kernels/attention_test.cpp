// Dense, local and CCA attention: what is seen, and how exactly.

#include "entry_points.hpp"

namespace cca::test { namespace {

template <class T>
results<T> run(entry entry, const sizes& s, const operands<T>& o, const options& options, const layout& out_layout = {},
               const layout& lse_layout = {}) {
  const problem p{.entry = entry, .sizes = s, .options = options};
  const auto kernel = [&](tensor_view<T> out, lse_view<T> lse) {
    call<T>(p,
            {.operands = {o.query.view(), o.key.view(), o.value.view()}, .results = {out, with_dim(lse)}, .seen = {}});
  };
  return collect<T>(s, kernel, out_layout, lse_layout);
}

/// Judges one problem: the kernel against the textbook of the same entry point.
template <class T>
void add(attention_rule<T>& rule, entry entry, const sizes& s, const operands<T>& o, const options& options,
         const layout& out_layout = {}, const layout& lse_layout = {}) {
  const auto textbook = [&]<class Scalar>() {
    return entry == entry::attention
               ? reference::attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, options)
               : reference::local_attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, options);
  };
  std::ostringstream label;
  label << problem{.entry = entry, .sizes = s, .options = options};
  rule.add(run(entry, s, o, options, out_layout, lse_layout), textbook, label.str());
}

template <class T>
testing::AssertionResult exact(entry entry, const sizes& s, const operands<T>& o, const options& options) {
  attention_rule<T> rule;
  add(rule, entry, s, o, options);
  return rule.holds();
}

template <class T>
class Attention : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block, stack = tile<T>().stack * lanes;
};

TYPED_TEST_SUITE(Attention, precisions);

// ------------------------------------------------------------------------------------------------- who sees what

/// Each row lists the tokens that a query sees, by its output: `r` raw, `c` in a core, `.` not at all. Queries of zeros
/// give every token and every core the same weight, so that with the identity for values output j is the share of
/// token j: that of a raw token is the largest, and that of one in a core, at most half of it.
template <class T>
std::string seen(entry entry, std::int64_t queries, std::int64_t keys, const options& options) {
  const sizes s{.queries = queries, .keys = keys, .value_dim = keys};
  random_engine random(3);
  operands<T> o = random_operands<T>(s, random);
  o.query.fill(0);
  o.value.fill(0);
  for (std::int64_t j = 0; j < keys; ++j) o.value.row(0, 0, j)[j] = 1;
  const results<T> r = run(entry, s, o, options);

  std::string list;
  for (std::int64_t i = 0; i < queries; ++i) {
    const T* share = r.out.row(0, 0, i);
    const T largest = *std::max_element(share, share + keys);
    for (std::int64_t j = 0; j < keys; ++j)
      list += std::isnan(share[j]) ? '?' : share[j] == 0 ? '.' : share[j] > T(0.75) * largest ? 'r' : 'c';
    // The lse counts the entries of the softmax.
    list += ' ' + std::to_string(std::llround(std::exp(*r.lse.row(0, 0, i)))) + '\n';
  }
  return list;
}

/// The same by the rules: a group whose tokens all come before the window is a core, all other tokens up to the query's
/// position are raw.
std::string expected(entry entry, std::int64_t queries, std::int64_t keys, const options& options) {
  const std::int64_t g = std::max<std::int64_t>(options.group_size, 1), s = options.window;
  const std::int64_t first = options.first_position.value_or(keys - queries);
  std::string list;
  for (std::int64_t t = first; t < first + queries; ++t) {
    std::int64_t entries = 0;
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t last_of_group = j / g * g + g - 1;
      const bool before_window = s != unlimited && last_of_group < t + 1 - s;
      const bool counts = j <= t && (!before_window || (entry == entry::attention && j == last_of_group));
      if (counts) ++entries;
      list += j > t ? '.' : !before_window ? 'r' : entry != entry::attention ? '.' : g == 1 ? 'r' : 'c';
    }
    list += ' ' + std::to_string(entries) + '\n';
  }
  return list;
}

TYPED_TEST(Attention, SeesTheWindowAndTheCoresBeforeIt) {
  const std::int64_t length = this->stack + 5;
  std::vector<std::int64_t> windows;
  for (std::int64_t window = 1; window <= this->lanes + 2; ++window) windows.push_back(window);
  for (const std::int64_t edge : {this->block, length})
    for (std::int64_t window = edge - 2; window <= edge + 2; ++window) windows.push_back(window);
  for (const std::int64_t window : windows)
    for (const std::int64_t group_size : {1, 2, 3, 7, 16})
      for (const entry entry : {entry::local, entry::attention}) {
        const options options{.group_size = group_size, .window = window};
        ASSERT_EQ(seen<TypeParam>(entry, length, length, options), expected(entry, length, length, options))
            << entry << ", " << describe(options);
      }
}

TYPED_TEST(Attention, FewerQueriesAreTheLastOnes) {
  for (std::int64_t queries = 1; queries <= 40; ++queries)
    for (std::int64_t keys = 1; keys <= 40; ++keys) {
      ASSERT_EQ(seen<TypeParam>(entry::dense, queries, keys, {}), expected(entry::dense, queries, keys, {}));
      for (const options& options :
           {options{.window = 1}, {.window = 6}, {.group_size = 4, .window = 6}, {.group_size = 5, .window = 40}})
        ASSERT_EQ(seen<TypeParam>(entry::local, queries, keys, options), expected(entry::local, queries, keys, options))
            << describe(options);
    }
}

TYPED_TEST(Attention, QueriesStartAtAnyPosition) {
  constexpr std::int64_t far = std::int64_t{1} << 40, farthest = std::int64_t{1} << 62;
  std::vector<std::int64_t> positions{-farthest, -far, far - 3, far, farthest};
  for (std::int64_t position = -25; position <= 25; ++position) positions.push_back(position);
  for (const std::int64_t position : positions)
    for (const std::int64_t queries : {1, 3, 20})
      for (const std::int64_t keys : {1, 7, 20})
        for (const std::int64_t window : {std::int64_t{1}, std::int64_t{6}, far - 5, far, unlimited})
          for (const std::int64_t group_size : {1, 4}) {
            if (group_size > 1 && window == unlimited) continue;
            const options options{.group_size = group_size, .window = window, .first_position = position};
            const entry entry = window == unlimited ? entry::dense : entry::local;
            ASSERT_EQ(seen<TypeParam>(entry, queries, keys, options), expected(entry, queries, keys, options))
                << queries << " queries, " << keys << " keys, " << describe(options);
          }
}

TYPED_TEST(Attention, OfNoTokenIsZero) {
  using T = TypeParam;
  const sizes s{.queries = 5, .keys = 2, .dim = 3, .value_dim = 3};
  random_engine random(4);
  const results<T> r = run(entry::dense, s, random_operands<T>(s, random), {});
  for (std::int64_t i = 0; i < 3; ++i) {
    for (std::int64_t d = 0; d < 3; ++d) EXPECT_TRUE(same_bits(r.out.row(0, 0, i)[d], T(0)));
    EXPECT_EQ(*r.lse.row(0, 0, i), -std::numeric_limits<T>::infinity());
  }
  EXPECT_GT(*r.lse.row(0, 0, 3), -std::numeric_limits<T>::infinity());
}

// ----------------------------------------------------------------------------------------------------- identities

TYPED_TEST(Attention, IsDenseWhereNothingIsPooled) {
  using T = TypeParam;
  random_engine random(5);
  for (std::int64_t length = 1; length <= 3 * this->lanes; ++length) {
    const sizes s{.heads = 2, .queries = length, .keys = length, .dim = 5, .value_dim = 3};
    const operands<T> o = random_operands<T>(s, random);
    const results<T> dense = run(entry::dense, s, o, {});
    const std::int64_t g = draw(random, 2, 20);
    EXPECT_TRUE(same_bits(run(entry::attention, s, o, {}), dense)) << describe(s);
    EXPECT_TRUE(same_bits(run(entry::attention, s, o, {.group_size = g, .window = length}), dense))
        << describe(s) << ", s >= L";
    const std::int64_t shortest = std::max<std::int64_t>(length - g + 1, 1);
    EXPECT_TRUE(same_bits(run(entry::attention, s, o, {.group_size = g, .window = shortest}), dense))
        << describe(s) << ", n < s + g";
  }
}

TYPED_TEST(Attention, WithGroupsOfOneIsDense) {
  using T = TypeParam;
  random_engine random(6);
  attention_rule<T> rule;
  for (std::int64_t length = 1; length <= 3 * this->lanes; ++length) {
    const sizes s{.heads = 2, .queries = length, .keys = length, .dim = 5, .value_dim = 3};
    const operands<T> o = random_operands<T>(s, random);
    add(rule, entry::dense, s, o, {});
    const options groups_of_one{.group_size = 1, .window = draw(random, 1, length)};
    rule.add(run(entry::attention, s, o, groups_of_one), [&]<class Scalar>() {
      return reference::local_attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, {});
    });
  }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Attention, IsTheSameWithoutLse) {
  using T = TypeParam;
  random_engine random(7);
  const sizes s{.heads = 2, .queries = 50, .keys = 50, .dim = 9, .value_dim = 7};
  const operands<T> o = random_operands<T>(s, random);
  for (const entry entry : {entry::dense, entry::local, entry::attention}) {
    const problem p = example(entry, s);
    tensor<T> out({1, s.heads, s.queries, s.value_dim});
    call<T>(p, {.operands = {o.query.view(), o.key.view(), o.value.view()}, .results = {out.view(), {}}, .seen = {}});
    EXPECT_TRUE(same_bits(out.view(), run(entry, s, o, p.options).out.view())) << p;
  }
}

TYPED_TEST(Attention, SharesHeadsAsIfTheyWereRepeated) {
  using T = TypeParam;
  random_engine random(8);
  for (const std::int64_t ratio : {1, 2, 3, 7, 8, 16})
    for (const std::int64_t length : {detail::most_few_queries, std::int64_t{40}}) {
      const sizes s{
          .batch = 2, .heads = 2 * ratio, .kv_heads = 2, .queries = length, .keys = length, .dim = 7, .value_dim = 5};
      const operands<T> shared = random_operands<T>(s, random);
      sizes wide = s;
      wide.kv_heads = s.heads;
      operands<T> repeated = random_operands<T>(wide, random);
      repeated.query = shared.query;
      for_each_row(repeated.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::copy_n(shared.key.row(b, h / ratio, i), s.dim, repeated.key.row(b, h, i));
        std::copy_n(shared.value.row(b, h / ratio, i), s.value_dim, repeated.value.row(b, h, i));
      });
      const auto expect = [&](entry entry, const options& options) {
        EXPECT_TRUE(same_bits(run(entry, s, shared, options), run(entry, wide, repeated, options)))
            << entry << ", " << describe(s) << ", " << describe(options);
      };
      expect(entry::dense, {});
      expect(entry::local, {.window = 3});
      for (const pooling pool : all_poolings) expect(entry::attention, {.group_size = 4, .window = 3, .pool = pool});

      // Where every query head has a key/value head of its own, both kinds of cores are the same.
      options cores{.group_size = 4, .window = 3};
      const results<T> per_query_head = run(entry::attention, wide, repeated, cores);
      cores.core_heads = core_heads::per_kv_head;
      EXPECT_TRUE(same_bits(run(entry::attention, wide, repeated, cores), per_query_head));
    }
}

// ------------------------------------------------------------------------------------------------------- exactness

TYPED_TEST(Attention, IsExactAroundTheSizesOfTheKernel) {
  using T = TypeParam;
  random_engine random(9);
  for (const std::int64_t edge : {this->lanes, this->block, 2 * this->block, this->stack, 2 * this->stack})
    for (std::int64_t length = edge - 1; length <= edge + 1; ++length) {
      const sizes s{.heads = 4, .queries = length, .keys = length, .dim = 20, .value_dim = 12};
      const operands<T> o = random_operands<T>(s, random);
      EXPECT_TRUE(exact(entry::dense, s, o, {}));
      EXPECT_TRUE(exact(entry::local, s, o, {.group_size = 9, .window = 17}));
      // Groups of 1 and 2 make so many cores that they, too, fill blocks.
      for (const options& options :
           {options{.window = 3}, {.group_size = 2, .window = 50}, {.group_size = 9, .window = 17}})
        EXPECT_TRUE(exact(entry::attention, s, o, options));
    }
}

/// Only long sequences have stacks of as many tiles as there may be.
TYPED_TEST(Attention, IsExactForLongSequences) {
  random_engine random(23);
  attention_rule<TypeParam> rule;
  for (const std::int64_t length : {16 * this->stack + 1, 64 * this->stack + 37}) {
    const sizes s{.queries = length, .keys = length, .dim = 3, .value_dim = 2};
    const auto o = random_operands<TypeParam>(s, random);
    add(rule, entry::attention, s, o, {.group_size = 64, .window = 70});
    add(rule, entry::local, s, o, {.window = this->block + 3});
  }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Attention, IsExactForEveryHeadDim) {
  using T = TypeParam;
  random_engine random(10);
  for (std::size_t i = 0; i < head_dims.size(); ++i)
    for (const std::int64_t value_dim : {head_dim(i), head_dim(i, 1), head_dim(i, 8)}) {
      const sizes s{.heads = 2, .queries = 70, .keys = 70, .dim = head_dim(i), .value_dim = value_dim};
      EXPECT_TRUE(exact(entry::attention, s, random_operands<T>(s, random), {.group_size = 5, .window = 12}));
    }
}

/// Lengths and dims up to a tile: every remainder of every loop.
TYPED_TEST(Attention, IsExactForSmallSizes) {
  using T = TypeParam;
  random_engine random(11);
  const std::int64_t greatest = this->lanes + 2;
  for (std::int64_t dim = 1; dim <= greatest; ++dim) {
    attention_rule<T> rule;
    for (std::int64_t length = 1; length <= greatest; ++length) {
      const bool edge = length <= 2 || length >= greatest - 3;
      if (!edge && (length + dim) % 5 != 0) continue;
      const sizes s{.queries = length, .keys = length, .dim = dim, .value_dim = greatest + 1 - dim};
      const operands<T> o = random_operands<T>(s, random);
      add(rule, entry::attention, s, o, {.group_size = draw(random, 1, 4), .window = draw(random, 1, length)});
    }
    EXPECT_TRUE(rule.holds()) << "dim " << dim;
  }
}

TYPED_TEST(Attention, IsExactForGroupedQueries) {
  using T = TypeParam;
  random_engine random(12);
  for (const std::int64_t ratio : {1, 2, 3, 7, 8, 16})
    for (const pooling pool : all_poolings)
      for (const core_heads cores : all_core_heads) {
        const sizes s{
            .batch = 2, .heads = 2 * ratio, .kv_heads = 2, .queries = 45, .keys = 45, .dim = 6, .value_dim = 9};
        const options options{.group_size = 4, .window = 11, .pool = pool, .core_heads = cores};
        EXPECT_TRUE(exact(entry::attention, s, random_operands<T>(s, random), options));
      }
}

TYPED_TEST(Attention, IsExactForAnyScale) {
  using T = TypeParam;
  random_engine random(13);
  for (const double scale : {0.0, 1e-3, 1.0, 4.0, -0.3, -4.0}) {
    const sizes s{.heads = 16, .kv_heads = 8, .queries = 90, .keys = 90, .dim = 16, .value_dim = 16};
    const operands<T> o = random_operands<T>(s, random);
    for (const core_heads cores : all_core_heads)
      EXPECT_TRUE(
          exact(entry::attention, s, o, {.group_size = 6, .window = 20, .core_heads = cores, .softmax_scale = scale}));
    for (const double pooling_scale : {0.0, 0.5, 8.0})
      EXPECT_TRUE(exact(
          entry::attention, s, o,
          {.group_size = 6, .window = 20, .softmax_scale = scale, .pooling_scale = pooling_scale, .softcap = 2}));
    EXPECT_TRUE(exact(entry::local, s, o, {.window = 20, .softmax_scale = scale}));
    EXPECT_TRUE(exact(entry::dense, s, o, {.softmax_scale = scale}));
  }
}

TYPED_TEST(Attention, IsExactForFewerQueries) {
  using T = TypeParam;
  random_engine random(14);
  attention_rule<T> rule;
  for (std::int64_t queries = 1; queries <= 40; ++queries)
    for (std::int64_t keys = 1; keys <= 40; ++keys) {
      const sizes s{.queries = queries, .keys = keys, .dim = 4, .value_dim = 3};
      const operands<T> o = random_operands<T>(s, random);
      add(rule, entry::dense, s, o, {});
      add(rule, entry::local, s, o, {.group_size = draw(random, 1, 5), .window = draw(random, 1, 40)});
    }
  EXPECT_TRUE(rule.holds());
}

/// Few queries go through the context by themselves, a long one in parts.
TYPED_TEST(Attention, IsExactForFewQueriesOfALongContext) {
  using T = TypeParam;
  random_engine random(19);
  constexpr std::int64_t part = detail::part_rows, few = detail::most_few_queries;
  for (const std::int64_t queries : {std::int64_t{1}, few - 1, few, few + 1}) {
    attention_rule<T> rule;
    for (const std::int64_t keys : {part - 1, part, part + 1, 2 * part + 77}) {
      const sizes s{.batch = 2, .heads = 6, .kv_heads = 2, .queries = queries, .keys = keys, .dim = 9, .value_dim = 7};
      const operands<T> o = random_operands<T>(s, random);
      add(rule, entry::dense, s, o, {});
      add(rule, entry::dense, s, o, {.first_position = part - 3});
      add(rule, entry::local, s, o, {.window = part - 2});
      add(rule, entry::local, s, o, {.group_size = 10, .window = 85});
    }
    EXPECT_TRUE(rule.holds()) << queries << " queries";
  }
}

/// Queries of many heads that share rows ride in lanes: of one tile, of several, and of more than go at a time.
TYPED_TEST(Attention, IsExactForFewQueriesOfManyHeads) {
  using T = TypeParam;
  random_engine random(20);
  constexpr std::int64_t least = 7, least_of_widest = 10;  // `least_in_lanes`, and where a vector has 16
  for (const std::int64_t heads : {least - 1, least, least_of_widest - 1, least_of_widest, this->lanes - 1,
                                   this->lanes + 1, this->stack + 3}) {
    attention_rule<T> rule;
    for (const std::int64_t queries : {1, 2, 5})
      for (const std::int64_t keys : {std::int64_t{40}, detail::part_rows + 30}) {
        const sizes s{
            .batch = 1, .heads = 2 * heads, .kv_heads = 2, .queries = queries, .keys = keys, .dim = 9, .value_dim = 7};
        const operands<T> o = random_operands<T>(s, random);
        add(rule, entry::dense, s, o, {.softcap = queries == 2 ? 1.5 : 0.0});
        add(rule, entry::local, s, o, {.window = 17});
        add(rule, entry::local, s, o, {.group_size = 10, .window = 25});
      }
    EXPECT_TRUE(rule.holds()) << heads << " heads";
  }
}

TYPED_TEST(Attention, IsExactInAnyLayout) {
  using T = TypeParam;
  random_engine random(15);
  attention_rule<T> rule;
  for (int i = 0; i < 150; ++i) {
    const entry entry = draw_from(random, std::array{entry::dense, entry::local, entry::attention});
    const std::int64_t keys = draw(random, 1, 70), kv_heads = draw(random, 1, 3);
    const sizes s{.batch = draw(random, 1, 3),
                  .heads = kv_heads * draw(random, 1, 3),
                  .kv_heads = kv_heads,
                  .queries = entry == entry::attention ? keys : draw(random, 1, 70),
                  .keys = keys,
                  .dim = draw(random, 1, 40),
                  .value_dim = draw(random, 1, 40)};
    options options;
    if (entry != entry::dense) {
      options.group_size = draw(random, 1, 9);
      options.window = draw(random, 1, keys + 1);
    }
    if (entry == entry::attention) {
      options.pool = draw_from(random, all_poolings);
      options.core_heads = draw_from(random, all_core_heads);
    } else if (draw(random, 0, 1) == 0) {
      options.first_position = draw(random, -5, keys + 5);
    }
    const operands<T> o = random_operands<T>(s, random, random_operand_layouts(random));
    add(rule, entry, s, o, options, random_layout(random), random_layout(random));
  }
  EXPECT_TRUE(rule.holds());
}

// ------------------------------------------------------------------------------------------------------- causality

/// A token that changes, even to NaN, leaves every earlier output as it was, and shows in its own.
TYPED_TEST(Attention, NeverLooksAhead) {
  using T = TypeParam;
  random_engine random(17);
  const std::int64_t length = 75;
  const sizes s{.heads = 2, .kv_heads = 1, .queries = length, .keys = length, .dim = 6, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  const auto expect = [&](entry entry, const options& options) {
    const results<T> before = run(entry, s, o, options);
    for (std::int64_t t = 0; t < length; t += 1 + t % 3) {
      operands<T> changed = o;
      const T poison = t % 2 ? std::numeric_limits<T>::quiet_NaN() : T(3);
      for (std::int64_t h = 0; h < s.heads; ++h) std::fill_n(changed.query.row(0, h, t), s.dim, poison);
      std::fill_n(changed.key.row(0, 0, t), s.dim, poison);
      std::fill_n(changed.value.row(0, 0, t), s.value_dim, poison);
      const results<T> after = run(entry, s, changed, options);
      const auto same_row = [&](std::int64_t h, std::int64_t i) {
        return std::memcmp(after.out.row(0, h, i), before.out.row(0, h, i), sizeof(T) * 5) == 0 &&
               same_bits(*after.lse.row(0, h, i), *before.lse.row(0, h, i));
      };
      for (std::int64_t h = 0; h < s.heads; ++h) {
        for (std::int64_t i = 0; i < t; ++i)
          ASSERT_TRUE(same_row(h, i)) << entry << ", " << describe(options) << ": query " << i << " sees token " << t;
        ASSERT_FALSE(same_row(h, t)) << entry << ", " << describe(options) << ": query " << t << " does not see itself";
      }
    }
  };
  expect(entry::dense, {});
  expect(entry::local, {.window = 7});
  for (const std::int64_t group_size : {1, 2, 5, 16, 40})
    for (const pooling pool : all_poolings)
      expect(entry::attention, {.group_size = group_size, .window = 7, .pool = pool});
  expect(entry::attention, {.group_size = 5, .window = 7, .core_heads = core_heads::per_kv_head});
}

// --------------------------------------------------------------------------------------------------------- options

TYPED_TEST(Attention, HeedsEveryOption) {
  using T = TypeParam;
  random_engine random(18);
  const sizes s{.heads = 2, .kv_heads = 1, .queries = 30, .keys = 30, .dim = 8, .value_dim = 8};
  const operands<T> o = random_operands<T>(s, random);
  const auto expect_change = [&](entry entry, const options& a, const options& b) {
    const results<T> before = run(entry, s, o, a), after = run(entry, s, o, b);
    EXPECT_FALSE(same_bits(before.out.view(), after.out.view())) << entry << ", " << describe(b);
    EXPECT_FALSE(same_bits(before.lse.view(), after.lse.view())) << entry << ", " << describe(b);
  };
  expect_change(entry::dense, {}, {.softmax_scale = 0.5});
  expect_change(entry::dense, {}, {.first_position = 3});
  expect_change(entry::dense, {}, {.lookahead = 1});
  expect_change(entry::dense, {}, {.lookahead = unlimited});
  expect_change(entry::dense, {}, {.prefix = 2});

  const options local{.window = 5};
  expect_change(entry::local, local, {.window = 6});
  expect_change(entry::local, local, {.group_size = 2, .window = 5});
  expect_change(entry::local, local, {.window = 5, .softmax_scale = 0.5});
  expect_change(entry::local, local, {.window = 5, .first_position = 3});
  expect_change(entry::local, local, {.window = 5, .sink_tokens = 1});
  expect_change(entry::local, local, {.window = 5, .lookahead = 1});
  expect_change(entry::local, local, {.window = 5, .prefix = 2});

  const options pooled{.group_size = 3, .window = 5};
  expect_change(entry::attention, pooled, {.group_size = 4, .window = 5});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 6});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .pool = pooling::mean});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .pool = pooling::max});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .core_heads = core_heads::per_kv_head});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .softmax_scale = 0.5});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .sink_tokens = 1});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .pool = pooling::select});
  expect_change(entry::attention, pooled, {.group_size = 3, .window = 5, .pooling_scale = 2});
}

}}  // namespace cca::test
