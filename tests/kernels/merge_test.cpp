// Parts of a context, attended to one by one and joined.

#include "entry_points.hpp"

namespace cca::test { namespace {

/// The tokens `[begin, end)` of a view.
template <class T>
tensor_view<T> tokens(tensor_view<T> view, std::int64_t begin, std::int64_t end) {
  view.data = view.row(0, 0, begin);
  view.extent[2] = end - begin;
  return view;
}

template <class T>
results<T> run(entry entry, const sizes& s, const std::vector<tensor_view<const T>>& operands, const options& options,
               const layout& out_layout = {}, const layout& lse_layout = {}, lse_view<const std::int64_t> seen = {}) {
  const problem p{.entry = entry, .sizes = s, .options = options};
  const auto kernel = [&](tensor_view<T> out, lse_view<T> lse) {
    call<T>(p, {.operands = operands, .results = {out, with_dim(lse)}, .seen = seen});
  };
  return collect<T>(s, kernel, out_layout, lse_layout);
}

template <class T>
results<T> merged(const sizes& s, const results<T>& a, const results<T>& b, const layout& out_layout = {},
                  const layout& lse_layout = {}) {
  return run<T>(entry::merge, s, {a.out.view(), with_dim(a.lse.view()), b.out.view(), with_dim(b.lse.view())}, {},
                out_layout, lse_layout);
}

/// Attention of every query to the tokens `[begin, end)`, by positions as if all were there.
template <class T>
results<T> attend_to(const sizes& s, const operands<T>& o, std::int64_t begin, std::int64_t end,
                     const layout& out_layout = {}, const layout& lse_layout = {}) {
  return run<T>(entry::dense, s, {o.query.view(), tokens(o.key.view(), begin, end), tokens(o.value.view(), begin, end)},
                {.first_position = s.keys - s.queries - begin}, out_layout, lse_layout);
}

template <class T>
class Merge : public testing::Test {};

TYPED_TEST_SUITE(Merge, precisions);

TYPED_TEST(Merge, OfPartsIsTheWhole) {
  using T = TypeParam;
  random_engine random(1);
  attention_rule<T> rule;
  for (int i = 0; i < 60; ++i) {
    const sizes s{.batch = 2,
                  .heads = 4,
                  .kv_heads = 2,
                  .queries = draw(random, 1, 60),
                  .keys = draw(random, 1, 60),
                  .dim = 8,
                  .value_dim = draw(random, 1, 20)};
    const operands<T> o = random_operands<T>(s, random);
    std::array cuts{draw(random, 0, s.keys), draw(random, 0, s.keys)};
    std::sort(cuts.begin(), cuts.end());
    const auto part = [&](std::int64_t begin, std::int64_t end) {
      return attend_to(s, o, begin, end, random_layout(random), random_layout(random));
    };
    const results<T> first = part(0, cuts[0]), second = part(cuts[0], cuts[1]), third = part(cuts[1], s.keys);
    const results<T> whole = merged(s, first, merged(s, third, second), random_layout(random), random_layout(random));
    const auto textbook = [&]<class Scalar>() {
      return reference::local_attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, {});
    };
    rule.add(whole, textbook, describe(s) + ", cut at " + std::to_string(cuts[0]) + " and " + std::to_string(cuts[1]));
  }
  EXPECT_TRUE(rule.holds());
}

/// The cores and the window of CCA attention, each by itself.
TYPED_TEST(Merge, OfFarAndNearIsAttention) {
  using T = TypeParam;
  random_engine random(2);
  const sizes s{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 90, .keys = 90, .dim = 8, .value_dim = 6};
  const operands<T> o = random_operands<T>(s, random);
  const options options{.group_size = 5, .window = 20};
  const std::int64_t groups = s.keys / options.group_size;
  tensor<T> core_key({s.batch, s.heads, groups, s.dim}), core_value({s.batch, s.heads, groups, s.value_dim});
  call<T>({.entry = entry::pool, .sizes = s, .options = {.group_size = 5}},
          {.operands = {o.query.view(), o.key.view(), o.value.view()},
           .results = {core_key.view(), core_value.view()},
           .seen = {}});
  tensor<std::int64_t, 3> seen({s.batch, s.heads, s.queries});
  for_each_row(seen.view(), [&](std::int64_t b, std::int64_t h, std::int64_t t) {
    *seen.row(b, h, t) = partition_of(options).core_count(t);
  });
  const results<T> far_part = run<T>(
      entry::attend, s,
      {o.query.view(), tokens(o.key.view(), 0, 0), tokens(o.value.view(), 0, 0), core_key.view(), core_value.view()},
      {}, {}, {}, seen.view());
  const results<T> near_part = run<T>(entry::local, s, {o.query.view(), o.key.view(), o.value.view()}, options);
  attention_rule<T> rule;
  rule.add(merged(s, far_part, near_part), [&]<class Scalar>() {
    return reference::attention<Scalar>(inputs{o.query.view(), o.key.view(), o.value.view()}, options);
  });
  EXPECT_TRUE(rule.holds());
}

/// Sums of weights 3 and 1: natural logarithms, and shares of 3/4 and 1/4.
TYPED_TEST(Merge, WeighsByTheExponentialsOfTheLse) {
  using T = TypeParam;
  const sizes s{.queries = 1, .keys = 1, .value_dim = 2};
  const auto part = [&](T lse, T out) {
    return collect<T>(s, [&](tensor_view<T> o, lse_view<T> l) {
      std::fill_n(o.row(0, 0, 0), 2, out);
      *l.row(0, 0, 0) = lse;
    });
  };
  for (const T shift : {T(0), T(-1000), T(1000)}) {
    const results<T> r = merged(s, part(std::log(T(3)) + shift, 4), part(shift, 8));
    // The shift costs the lse its last digits: its spacing there bounds the error of either weight.
    const T spacing = std::numeric_limits<T>::epsilon() * (2 + std::fabs(shift));
    EXPECT_NEAR(r.out.row(0, 0, 0)[0], 5, 4 * spacing);
    EXPECT_NEAR(r.out.row(0, 0, 0)[1], 5, 4 * spacing);
    EXPECT_NEAR(*r.lse.row(0, 0, 0), std::log(T(4)) + shift, 2 * spacing);
  }
}

TYPED_TEST(Merge, WritesOverAPart) {
  using T = TypeParam;
  random_engine random(3);
  const sizes s{.heads = 2, .kv_heads = 2, .queries = 20, .keys = 20, .dim = 4, .value_dim = 5};
  const operands<T> o = random_operands<T>(s, random);
  results<T> a = attend_to(s, o, 0, 7), b = attend_to(s, o, 7, 20);
  const results<T> expected = merged(s, a, b);
  for (results<T>* in_place : {&a, &b}) {
    const results<T> untouched = *in_place;
    call({.entry = entry::merge, .sizes = s},
         arguments<T>{.operands = {a.out.view(), with_dim(a.lse.view()), b.out.view(), with_dim(b.lse.view())},
                      .results = {in_place->out.view(), with_dim(in_place->lse.view())},
                      .seen = {}});
    EXPECT_TRUE(same_bits(*in_place, expected));
    *in_place = untouched;
  }
}

}}  // namespace cca::test
