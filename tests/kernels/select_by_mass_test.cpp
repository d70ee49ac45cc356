// The token of a group to which the queries that see it raw give most.

#include "entry_points.hpp"

namespace cca::test { namespace {

template <class T>
class SelectByMass : public testing::Test {};

TYPED_TEST_SUITE(SelectByMass, precisions);

template <class T>
struct cores {
  tensor<T> key, value;
};

template <class T>
cores<T> pool(const sizes& s, const operands<T>& o, const options& options) {
  const std::int64_t heads = detail::core_head_count(options, s.heads, s.kv_heads);
  const std::int64_t groups = partition_of(options).group_count(s.keys);
  cores<T> c{tensor<T>({s.batch, heads, groups, s.dim}), tensor<T>({s.batch, heads, groups, s.value_dim})};
  call<T>({.entry = entry::pool, .sizes = s, .options = options},
          {.operands = {o.query.view(), o.key.view(), o.value.view()},
           .results = {c.key.view(), c.value.view()},
           .seen = {}});
  return c;
}

/// Written from the definition, token by token: the query at t is an observer of the tokens [first, end) of a group if
/// it sees all of them raw, end - 1 <= t < end - 1 + s, and if max(1, s / 32) divides t. It gives to each token its share
/// of a softmax over the sink tokens and the raw ones, from the first group on that has no core for it.
template <class T>
void add_masses(const operands<T>& o, const options& by, std::int64_t h, std::int64_t kv_head, range group,
                std::vector<double>& masses) {
  const std::int64_t g = by.group_size, s = by.window, m = by.sink_tokens, dim = o.key.view().dim();
  for (std::int64_t t = group.end - 1; t < group.end - 1 + s && t < o.key.view().length(); ++t) {
    if (t % std::max<std::int64_t>(1, s / 32) != 0) continue;
    const std::int64_t pooled = t + 1 - m < s ? 0 : (t + 1 - m - s) / g;
    const auto score = [&](std::int64_t i) {
      double x = 0;
      for (std::int64_t d = 0; d < dim; ++d)
        x += static_cast<double>(o.query.row(0, h, t)[d]) * static_cast<double>(o.key.row(0, kv_head, i)[d]);
      return std::exp(x / std::sqrt(static_cast<double>(dim)));
    };
    double all = 0;
    for (std::int64_t i = 0; i <= t; ++i)
      if (i < m || i >= m + pooled * g) all += score(i);
    for (std::int64_t j = group.begin; j < group.end; ++j)
      masses[static_cast<std::size_t>(j - group.begin)] += score(j) / all;
  }
}

/// As it is, to the bit. Windows of one observer in each place, of one in several, and of more than a block of rows.
TYPED_TEST(SelectByMass, ATokenAsItIs) {
  using T = TypeParam;
  random_engine random(1);
  for (const std::int64_t window : {1, 9, 64, 101})
    for (const std::int64_t g : {std::int64_t{1}, std::int64_t{6}, detail::row_block + 5})
      for (const std::int64_t sinks : {0, 3})
        for (const core_heads heads : all_core_heads) {
          const std::int64_t length = window + 3 * g + 5;
          const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 9, .value_dim = 5};
          const operands<T> o = random_operands<T>(s, random);
          const options by{.group_size = g,
                           .window = window,
                           .sink_tokens = sinks,
                           .pool = pooling::select_by_mass,
                           .core_heads = heads};
          const auto c = pool(s, o, by);
          const std::int64_t sharing = s.heads / c.key.view().heads();
          for_each_row(c.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
            const range group{sinks + i * g, sinks + (i + 1) * g};
            std::vector<double> masses(static_cast<std::size_t>(g));
            for (std::int64_t q = h * sharing; q < (h + 1) * sharing; ++q)
              add_masses(o, by, q, h * sharing / 2, group, masses);
            const std::int64_t selected =
                group.begin + (std::max_element(masses.begin(), masses.end()) - masses.begin());
            for (std::int64_t d = 0; d < s.dim; ++d)
              EXPECT_EQ(c.key.row(b, h, i)[d], o.key.row(b, h * sharing / 2, selected)[d]) << describe(by) << " " << i;
            for (std::int64_t d = 0; d < s.value_dim; ++d)
              EXPECT_EQ(c.value.row(b, h, i)[d], o.value.row(b, h * sharing / 2, selected)[d]) << describe(by);
          });
        }
}

/// Equal keys get the same, wherever they lie in the blocks of rows: the first of them is selected.
TYPED_TEST(SelectByMass, TheFirstOfEquals) {
  using T = TypeParam;
  random_engine random(2);
  for (std::int64_t g = 1; g <= 2 * detail::row_block + 3; g += g < 12 ? 1 : 5)
    for (const std::int64_t dim : {1, 6, 33, 100}) {
      const sizes s{.queries = 3 * g, .keys = 3 * g, .dim = dim, .value_dim = 1};
      operands<T> o = random_operands<T>(s, random);
      for (std::int64_t j = 0; j < 3 * g; ++j) {
        copy<T>(o.query.view().slice(0, 1), o.query.view().slice(j, 1));
        for (std::int64_t d = 0; d < dim; ++d)
          o.key.row(0, 0, j)[d] = (j % g < g / 2 ? T(-1) : T(1)) * o.query.row(0, 0, 0)[d];
      }
      const auto c = pool(s, o, {.group_size = g, .window = 40, .pool = pooling::select_by_mass});
      for (std::int64_t i = 0; i < 3; ++i)
        EXPECT_EQ(*c.value.row(0, 0, i), *o.value.row(0, 0, i * g + g / 2)) << g << " " << dim << " " << i;
    }
}

/// Where nobody observes, or gives a number above 0, the first token is as good as any.
TYPED_TEST(SelectByMass, TheFirstWhereNobodyGivesAny) {
  using T = TypeParam;
  random_engine random(3);
  const std::int64_t g = 4, window = 320, length = 12;  // observers at 0, 10, ..
  const sizes s{.queries = length, .keys = length, .dim = 3, .value_dim = 2};
  operands<T> o = random_operands<T>(s, random);
  o.query.fill(1);
  for (std::int64_t j = 0; j < length; ++j) std::fill_n(o.key.row(0, 0, j), s.dim, j == 9 ? T(0) : T(-1e5) * T(20 - j));
  const auto c = pool(s, o, {.group_size = g, .window = window, .pool = pooling::select_by_mass});
  for (std::int64_t i = 0; i < 2; ++i) EXPECT_EQ(*c.key.row(0, 0, i), *o.key.row(0, 0, i * g)) << i;
}

/// A query sees cores that were selected without it and without any after it; and the last one before it had its say.
TYPED_TEST(SelectByMass, LaterTokensChangeNothing) {
  using T = TypeParam;
  random_engine random(4);
  const std::int64_t length = 230;
  const sizes s{.heads = 2, .kv_heads = 1, .queries = length, .keys = length, .dim = 6, .value_dim = 5};
  for (const std::int64_t window : {3, 70, 100}) {
    const problem p{.entry = entry::attention,
                    .sizes = s,
                    .options = {.group_size = 6, .window = window, .sink_tokens = 2, .pool = pooling::select_by_mass}};
    argument_memory<T> clean = argument_memory<T>(p).randomize(random);
    call(p, clean.arguments());
    for (std::int64_t t = 1; t < length; t += 7) {
      argument_memory<T> changed = clean;
      for (tensor<T>& operand : changed.operands)
        for (std::int64_t h = 0; h < operand.view().heads(); ++h)
          for (std::int64_t i = t; i < length; ++i) std::fill_n(operand.row(0, h, i), operand.view().dim(), T(7));
      call(p, changed.arguments());
      for (std::size_t r = 0; r < 2; ++r)
        for (std::int64_t h = 0; h < s.heads; ++h)
          for (std::int64_t i = 0; i < t; ++i)
            for (std::int64_t d = 0; d < changed.results[r].view().dim(); ++d)
              ASSERT_TRUE(same_bits(changed.results[r].row(0, h, i)[d], clean.results[r].row(0, h, i)[d]))
                  << "query " << i << " learns of token " << t << ", window " << window;
    }
  }
}

}}  // namespace cca::test
