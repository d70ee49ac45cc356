// Attention to a caller's far context beside the window.

#include "entry_points.hpp"

namespace cca::test { namespace {

/// A caller's far context: rows and, query by query, how many of them are seen.
template <class T>
struct far_rows {
  tensor<T> key, value;
  tensor<std::int64_t, 3> seen;

  [[nodiscard]] cca::far_context<const T, const T> view() const { return {key.view(), value.view(), seen.view()}; }
};

/// Random rows. The counts are in no order: a later query may see less.
template <class T>
far_rows<T> random_far(const sizes& s, std::int64_t heads, std::int64_t length, random_engine& random,
                       const std::array<layout, 3>& layouts = {}) {
  far_rows<T> f{tensor<T>({s.batch, heads, length, s.dim}, layouts[0]),
                tensor<T>({s.batch, heads, length, s.value_dim}, layouts[1]),
                tensor<std::int64_t, 3>({s.batch, s.heads, s.queries}, layouts[2])};
  f.key.randomize(random);
  f.value.randomize(random);
  f.seen.generate([&] { return draw(random, 0, length); });
  return f;
}

template <class T>
results<T> run(const sizes& s, const operands<T>& o, const far_rows<T>& f, const options& options,
               const layout& out_layout = {}, const layout& lse_layout = {}) {
  const problem p{.entry = entry::attend, .sizes = s, .options = options};
  const auto kernel = [&](tensor_view<T> out, lse_view<T> lse) {
    call<T>(p, {.operands = {o.query.view(), o.key.view(), o.value.view(), f.key.view(), f.value.view()},
                .results = {out, with_dim(lse)},
                .seen = f.seen.view()});
  };
  return collect<T>(s, kernel, out_layout, lse_layout);
}

/// An entry point without far context.
template <class T>
results<T> run_near(entry entry, const sizes& s, const operands<T>& o, const options& options) {
  const problem p{.entry = entry, .sizes = s, .options = options};
  return collect<T>(s, [&](tensor_view<T> out, lse_view<T> lse) {
    call<T>(p,
            {.operands = {o.query.view(), o.key.view(), o.value.view()}, .results = {out, with_dim(lse)}, .seen = {}});
  });
}

template <class T>
void add(attention_rule<T>& rule, const sizes& s, const operands<T>& o, const far_rows<T>& f, const options& options,
         const layout& out_layout = {}, const layout& lse_layout = {}) {
  const auto textbook = [&]<class Scalar>() {
    return reference::attend<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, f.view(), options);
  };
  rule.add(run(s, o, f, options, out_layout, lse_layout), textbook, describe(s) + ", " + describe(options));
}

template <class T>
class Attend : public testing::Test {
 protected:
  const std::int64_t lanes = tile<T>().lanes, block = tile<T>().block, stack = tile<T>().stack * lanes;
};

TYPED_TEST_SUITE(Attend, precisions);

TYPED_TEST(Attend, IsExactForAnyCompressor) {
  using T = TypeParam;
  random_engine random(1);
  attention_rule<T> rule;
  for (int i = 0; i < 100; ++i) {
    const std::int64_t keys = draw(random, 1, 70);
    const sizes s{.batch = draw(random, 1, 2),
                  .heads = 12,
                  .kv_heads = draw_from(random, std::array{1, 2, 3, 4, 6, 12}),
                  .queries = draw(random, 1, 70),
                  .keys = keys,
                  .dim = draw(random, 1, 20),
                  .value_dim = draw(random, 1, 20)};
    const std::int64_t far_heads = draw_from(random, std::array{1, 2, 3, 4, 6, 12});
    options options{.group_size = draw(random, 1, 9), .window = draw(random, 1, keys + 1)};
    if (draw(random, 0, 1) == 0) options.first_position = draw(random, -5, keys + 5);
    const operands<T> o = random_operands<T>(s, random, random_operand_layouts(random));
    const far_rows<T> f =
        random_far<T>(s, far_heads, draw(random, 1, 2 * this->block), random, random_operand_layouts(random));
    add(rule, s, o, f, options, random_layout(random), random_layout(random));
  }
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Attend, IsExactAroundTheSizesOfTheKernel) {
  using T = TypeParam;
  random_engine random(2);
  for (const std::int64_t edge : {this->lanes, this->block, this->stack})
    for (std::int64_t length = edge - 1; length <= edge + 1; ++length) {
      const sizes s{.heads = 2, .queries = length, .keys = length, .dim = 8, .value_dim = 8};
      attention_rule<T> rule;
      add(rule, s, random_operands<T>(s, random), random_far<T>(s, 1, length, random), {.window = 20});
      EXPECT_TRUE(rule.holds()) << length;
    }
}

/// Few queries go through both contexts by themselves, in parts where they are long.
TYPED_TEST(Attend, IsExactForFewQueries) {
  using T = TypeParam;
  random_engine random(8);
  constexpr std::int64_t part = detail::part_rows, few = detail::most_few_queries;
  attention_rule<T> rule;
  for (const std::int64_t queries : {std::int64_t{1}, few, few + 1})
    for (const std::int64_t far_heads : {1, 2, 3, 6, 12})
      for (const std::int64_t far_length : {std::int64_t{20}, part, 2 * part + 5}) {
        const sizes s{.heads = 12, .kv_heads = 6, .queries = queries, .keys = part + 30, .dim = 5, .value_dim = 6};
        const std::int64_t window = draw(random, 1, s.keys);
        add(rule, s, random_operands<T>(s, random), random_far<T>(s, far_heads, far_length, random),
            {.window = window});
      }
  EXPECT_TRUE(rule.holds());
}

/// With queries of zeros, and values whose bits tell the row, the output lists the rows that are seen.
TYPED_TEST(Attend, SeesWhatItIsTold) {
  using T = TypeParam;
  random_engine random(3);
  const std::int64_t far_length = 7;
  const options options{.group_size = 3, .window = 5};
  for (std::int64_t queries = 1; queries <= 40; ++queries)
    for (std::int64_t keys = 1; keys <= 40; ++keys) {
      const sizes s{.queries = queries, .keys = keys, .value_dim = far_length + keys};
      operands<T> o = random_operands<T>(s, random);
      far_rows<T> f = random_far<T>(s, 1, far_length, random);
      o.query.fill(0);
      o.value.fill(0);
      f.value.fill(0);
      for (std::int64_t j = 0; j < far_length; ++j) f.value.row(0, 0, j)[j] = 1;
      for (std::int64_t j = 0; j < keys; ++j) o.value.row(0, 0, j)[far_length + j] = 1;
      const results<T> r = run(s, o, f, options);
      for (std::int64_t i = 0; i < queries; ++i) {
        const std::int64_t t = keys - queries + i;
        for (std::int64_t j = 0; j < far_length + keys; ++j) {
          const std::int64_t token = j - far_length;
          const std::int64_t last_of_group = token / options.group_size * options.group_size + options.group_size - 1;
          const bool in_window = token <= t && last_of_group >= t + 1 - options.window;
          const bool seen = j < far_length ? j < *f.seen.row(0, 0, i) : in_window;
          ASSERT_EQ(r.out.row(0, 0, i)[j] != 0, seen) << describe(s) << ", query " << i << ", row " << j;
        }
      }
    }
}

TYPED_TEST(Attend, WithoutFarContextIsLocal) {
  using T = TypeParam;
  random_engine random(4);
  const sizes s{.heads = 4, .kv_heads = 2, .queries = 30, .keys = 70, .dim = 6, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  const options options{.group_size = 4, .window = 10};
  const results<T> local = run_near(entry::local, s, o, options);
  EXPECT_TRUE(same_bits(run(s, o, random_far<T>(s, 1, 0, random), options), local)) << "no far rows";
  far_rows<T> unseen = random_far<T>(s, 1, 20, random);
  unseen.seen.fill(0);
  EXPECT_TRUE(same_bits(run(s, o, unseen, options), local)) << "none of them seen";
}

TYPED_TEST(Attend, WithoutNearContextIsTheFarOne) {
  using T = TypeParam;
  random_engine random(5);
  const sizes s{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 30, .keys = 0, .dim = 6, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  const far_rows<T> f = random_far<T>(s, 1, 50, random);
  attention_rule<T> rule;
  add(rule, s, o, f, {});
  EXPECT_TRUE(rule.holds());
}

TYPED_TEST(Attend, ToCoresIsAttention) {
  using T = TypeParam;
  random_engine random(6);
  const sizes s{.batch = 2, .heads = 6, .kv_heads = 2, .queries = 150, .keys = 150, .dim = 6, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  for (const pooling pool : all_poolings)
    for (const core_heads cores : all_core_heads)
      for (const std::int64_t group_size : {1, 4, 7}) {
        const std::int64_t sinks = group_size == 1 ? 0 : group_size + 1;
        const options pooled{
            .group_size = group_size, .window = 10, .sink_tokens = sinks, .pool = pool, .core_heads = cores};
        const results<T> expected = run_near(entry::attention, s, o, pooled);

        const std::int64_t heads = detail::core_head_count(pooled, s.heads, s.kv_heads);
        far_rows<T> f = random_far<T>(s, heads, (s.keys - sinks) / group_size, random);
        const options groups{.group_size = group_size,
                             .window = pool_window(pool, 10),
                             .sink_tokens = sinks,
                             .pool = pool,
                             .core_heads = cores};
        call<T>({.entry = entry::pool, .sizes = s, .options = groups},
                {.operands = {o.query.view(), o.key.view(), o.value.view()},
                 .results = {f.key.view(), f.value.view()},
                 .seen = {}});
        for_each_row(f.seen.view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
          *f.seen.row(b, h, t) = partition_of(pooled).core_count(t);
        });
        EXPECT_TRUE(same_bits(run(s, o, f, {.group_size = group_size, .window = 10, .sink_tokens = sinks}), expected))
            << describe(pooled);
      }
}

TYPED_TEST(Attend, HeedsEveryOption) {
  using T = TypeParam;
  random_engine random(7);
  const sizes s{.queries = 20, .keys = 30, .dim = 6, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  const far_rows<T> f = random_far<T>(s, 1, 9, random);
  const results<T> before = run(s, o, f, {.group_size = 2, .window = 5});
  for (const options& options : {options{.group_size = 2, .window = 6}, options{.group_size = 3, .window = 5},
                                 options{.group_size = 2, .window = 5, .softmax_scale = 0.5},
                                 options{.group_size = 2, .window = 5, .first_position = 3},
                                 options{.group_size = 2, .window = 5, .sink_tokens = 2},
                                 options{.window = 5, .lookahead = 2}, options{.window = 5, .prefix = 28}}) {
    const results<T> after = run(s, o, f, options);
    EXPECT_FALSE(same_bits(before.out.view(), after.out.view())) << describe(options);
    EXPECT_FALSE(same_bits(before.lse.view(), after.lse.view())) << describe(options);
  }
}

}}  // namespace cca::test
