// Integers of 8 bits, which are asked for by name. Their results are measured against the exact ones by the rule of all errors
// here, where the plain textbook rounds the same numbers to 8 bits: queries, keys and values row by row, and weights, in
// the scales of their values, relative to the largest of a block of rows.

#include "byte_textbook.hpp"
#include "unit_calls.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/gradient.hpp>
#include <cca/kv_cache.hpp>
#include <cca/kv_cache_file.hpp>
#include <cstdlib>
#include <sstream>
#include <string>
#include <utility>

#include "executors.hpp"
#include "guarded_pages.hpp"

namespace {

using namespace cca;
using namespace cca::test;
using cca::test::results;
using Eigen::bfloat16, Eigen::half;

constexpr matrix_unit vnni = matrix_unit::vnni;

/// With CCA_TEST_AVX_VNNI in the environment all of this is tested with registers of 256 bits.
[[maybe_unused]] const bool in_half_registers = [] {
  if (std::getenv("CCA_TEST_AVX_VNNI") == nullptr) return false;
  detail::present_units().avx512_vnni = false;
  return true;
}();

// ---------------------------------------------------------------------------------------------------------------- tests

/// What the rule takes in: outputs and log-sum-exps.
template <class Element>
class rules {
 public:
  void add(const unit_call<Element>& c, const layout& out_layout = {}) {
    const reference::result<float> plain = byte_textbook(c.p, c.in(), c.far_rows());
    const auto exact = textbook_attention<double>(c.p, c.in(), c.far_rows());
    std::ostringstream label;
    label << c.p;
    const results<float> got = c.forward(vnni, {}, out_layout);
    out_.add(got.out.view(), plain.out.view(), exact.out.view(), label.str());
    lse_.add(with_dim(got.lse.view()), plain.lse.view(), exact.lse.view(), label.str());
  }
  void expect() const {
    EXPECT_TRUE(out_.holds());
    EXPECT_TRUE(lse_.holds());
  }

 private:
  error_rule<float> out_, lse_;
};

/// Attention of views on the unit.
template <class Element>
void attend_to(const tensor_view<const Element>& query, const tensor_view<const Element>& key,
               const tensor_view<const Element>& value, const tensor_view<float>& out, lse_view<float> lse,
               options options) {
  options.unit = vnni;
  unit_arguments<Element> a{.operands = {query, key, value}, .seen = {}, .results = {out, with_dim(lse)}};
  call({.entry = entry::attention, .options = options}, a);
}

template <class Element>
class VnniTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!detail::has_unit<Element>(vnni)) GTEST_SKIP() << "no VNNI";
  }
};
using elements = testing::Types<float, bfloat16, half>;
TYPED_TEST_SUITE(VnniTest, elements);

TYPED_TEST(VnniTest, EveryHeadDim) {
  random_engine random(1);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    for (std::size_t i = 0; i < head_dims.size(); ++i)
      rules.add(unit_call<TypeParam>(
          example(entry, {.queries = 70, .keys = 70, .dim = head_dim(i), .value_dim = head_dim(i, 7)}), random));
    rules.expect();
  }
}

TYPED_TEST(VnniTest, EveryLengthAroundTilesAndQuads) {
  random_engine random(2);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    for (const std::int64_t length : {9, 13, 14, 15, 16, 17, 63, 64, 65, 66, 67, 128, 130, 255, 256, 257, 259, 300})
      rules.add(unit_call<TypeParam>(example(entry, {.queries = length, .keys = length, .dim = 32, .value_dim = 24}),
                                     random));
    rules.expect();
  }
}

/// Windows and groups of any size, fewer queries than keys, heads that share, layouts, scales of either sign, softcaps,
/// sink logits, slopes and biases.
TYPED_TEST(VnniTest, EveryConvention) {
  random_engine random(3);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    for (int times = 0; times < 60; ++times) {
      sizes s{.batch = draw(random, 1, 2), .kv_heads = draw(random, 1, 2), .keys = draw(random, 13, 150)};
      s.heads = s.kv_heads * draw(random, 1, 3);
      s.queries = entry == entry::attention ? s.keys : draw(random, 13, s.keys);
      s.dim = draw(random, 1, 40);
      s.value_dim = draw(random, 1, 40);
      problem p = example(entry, s);
      p.options.window = draw(random, 1, s.keys + 5);
      if (entry != entry::attend) p.options.group_size = draw(random, 1, 9);
      if (entry == entry::attention) {
        p.options.core_heads = draw_from(random, all_core_heads);
        p.options.pool = draw_from(random, all_poolings);
      }
      if (times % 3 == 0) p.options.softmax_scale = draw_from(random, std::array{-0.3, 0.0, 0.02, 0.7});
      if (entry != entry::attention && times % 4 == 0) p.options.first_position = draw(random, -20, s.keys);
      if (times % 2 == 1) p.options.sink_tokens = draw(random, 1, 40);
      if (times % 4 == 1) p.options.softcap = draw_from(random, std::array{0.5, 4.0, 30.0});
      if (entry != entry::attention && times % 5 == 3) {
        p.options.group_size = 0;
        p.options.lookahead = draw_from(random, std::array<std::int64_t, 3>{1, 30, unlimited});
        p.options.prefix = draw(random, 0, 40);
      }
      unit_call<TypeParam> c(p, random, [&] { return random_operand_layout(random); });
      if (times % 4 == 2) c.sinks = tensor<float, 3>({1, s.heads, 1}).randomize(random, 3);
      if (times % 5 == 0) {
        c.slopes = tensor<float, 3>({s.batch, s.heads, 1});
        c.slopes.generate([&] { return static_cast<float>(draw(random, 1, 9)) * 0.05f; });
        c.positions = tensor<std::int64_t, 3>({1, p.far_heads, p.far_length});
        c.positions.generate([&] { return draw(random, -20, s.keys); });
      }
      if (times % 5 == 1 && entry != entry::attention)
        c.key_bias = tensor<float, 3>({1, s.kv_heads, s.keys}).randomize(random, 1);
      rules.add(c, random_layout(random));
    }
    rules.expect();
  }
}

/// Longer than a block of rows, and several stacks of queries.
TYPED_TEST(VnniTest, ManyBlocks) {
  random_engine random(4);
  rules<TypeParam> rules;
  for (const auto& [g, w] : {std::pair<std::int64_t, std::int64_t>{1, unlimited}, {2, 200}, {16, 300}})
    rules.add(unit_call<TypeParam>({.entry = entry::attention,
                                    .sizes = {.queries = 1100, .keys = 1100, .dim = 16, .value_dim = 16},
                                    .options = {.group_size = g, .window = w}},
                                   random));
  rules.expect();
}

/// Logits that grow along the rows: the maximum has to be raised again and again, by a little and by a lot; and values whose
/// scales differ as much.
TYPED_TEST(VnniTest, GrowingLogitsAndValues) {
  random_engine random(5);
  for (const double step : {0.3, 5.0, 100.0})
    for (const bool growing : {false, true}) {
      rules<TypeParam> rules;
      unit_call<TypeParam> c({.entry = entry::local,
                              .sizes = {.queries = 600, .keys = 600, .dim = 1, .value_dim = 16},
                              .options = {.softmax_scale = 1.0}},
                             random);
      for (std::int64_t i = 0; i < 600; ++i) {
        c.operands[0].row(0, 0, i)[0] = TypeParam(1.0f);
        c.operands[1].row(0, 0, i)[0] = TypeParam(static_cast<float>(step * static_cast<double>(i)));
        for (std::int64_t d = 0; growing && d < 16; ++d) {
          TypeParam& x = c.operands[2].row(0, 0, i)[d];
          x = TypeParam(static_cast<float>(x) * std::exp2(static_cast<float>(i % 60) / 5.0f - 6.0f));
        }
      }
      rules.add(c);
      rules.expect();
    }
}

/// Rows of logits that are all very large or very small are ordinary rows.
TYPED_TEST(VnniTest, LargeLogits) {
  random_engine random(6);
  for (const float root : {-1e4f, -250.0f, 250.0f, 1e4f}) {
    rules<TypeParam> rules;
    unit_call<TypeParam> c({.entry = entry::local,
                            .sizes = {.queries = 80, .keys = 80, .dim = 1, .value_dim = 16},
                            .options = {.softmax_scale = 1.0}},
                           random);
    for (std::int64_t i = 0; i < 80; ++i) {
      c.operands[0].row(0, 0, i)[0] = TypeParam(root);
      c.operands[1].row(0, 0, i)[0] = TypeParam(std::abs(root));
    }
    rules.add(c);
    rules.expect();
  }
}

/// Rows of the largest bytes, of either sign, in every element: sums of the largest size, to the last unit of a float.
TYPED_TEST(VnniTest, LargestBytes) {
  for (const std::int64_t dim : {3, 128, 1000})
    for (const float q : {-2.0f, 2.0f}) {
      const std::int64_t n = 14;
      std::vector<TypeParam> query(static_cast<std::size_t>(n * dim), TypeParam(q)), key(query.size()),
          value(query.size());
      for (std::int64_t j = 0; j < n; ++j) {
        std::fill_n(key.begin() + j * dim, dim, TypeParam(j % 2 == 0 ? 1.0f : -1.0f));
        std::fill_n(value.begin() + j * dim, dim, TypeParam(j % 2 == 0 ? 4.0f : -4.0f));
      }
      std::vector<float> out(query.size()), lse(static_cast<std::size_t>(n));
      const auto rows = [&](const auto& x) { return bhsd(x.data(), 1, 1, n, dim); };
      attend_to(rows(std::as_const(query)), rows(std::as_const(key)), rows(std::as_const(value)),
                bhsd(out.data(), 1, 1, n, dim), bhs(lse.data(), 1, 1, n),
                {.lookahead = unlimited, .softmax_scale = 0.25 / static_cast<double>(dim)});
      // Logits are q / 4 of even keys, and -q / 4 of odd ones.
      for (std::int64_t i = 0; i < n; ++i) {
        EXPECT_NEAR(lse[static_cast<std::size_t>(i)],
                    std::log(static_cast<double>(n) / 2 * (std::exp(q / 4) + std::exp(-q / 4))), 1e-5);
        const double even = 1 / (1 + std::exp(-q / 2)), weights = 4 * (2 * even - 1);
        EXPECT_NEAR(out[static_cast<std::size_t>(i * dim)], weights, 4 * 0.5 / 255) << dim << ", " << q;
      }
    }
}

/// 32K equal keys, and logits of a spread of 0.1: small weights of long flat rows do not vanish.
TYPED_TEST(VnniTest, FlatRows) {
  constexpr std::int64_t keys = 32768, queries = 16, dim = 8;
  random_engine random(7);
  for (const float spread : {0.0f, 0.1f}) {
    tensor<TypeParam> query({1, 1, queries, 1}), key({1, 1, keys, 1}), value({1, 1, keys, dim});
    query.fill(TypeParam(1.0f));
    std::normal_distribution<float> normal;
    key.generate([&] { return TypeParam(1.0f + spread * normal(random)); });
    value.generate([&] { return TypeParam(1.0f + normal(random)); });
    const options o{.softmax_scale = 1.0, .first_position = keys - queries};
    tensor<float> out({1, 1, queries, dim});
    tensor<float, 3> lse({1, 1, queries});
    attend_to<TypeParam>(query.view(), key.view(), value.view(), out.view(), lse.view(), o);
    const auto exact = reference::local_attention<double>(
        inputs{std::as_const(query).view(), std::as_const(key).view(), std::as_const(value).view()}, o);
    for (std::int64_t i = 0; i < queries; ++i) {
      for (std::int64_t d = 0; d < dim; ++d)
        EXPECT_NEAR(out.row(0, 0, i)[d], exact.out.view().row(0, 0, i)[d], 1e-3) << spread;
      EXPECT_NEAR(*lse.row(0, 0, i), *exact.lse.view().row(0, 0, i), 1e-2) << spread;
    }
  }
}

/// A key that most of every sum goes to, with values of a hundredth of the others', as models have it at their first token:
/// the others' weights keep their bits.
TYPED_TEST(VnniTest, SinkOfSmallValues) {
  random_engine random(8);
  rules<TypeParam> rules;
  unit_call<TypeParam> c({.entry = entry::local,
                          .sizes = {.queries = 200, .keys = 200, .dim = 16, .value_dim = 16},
                          .options = {.softmax_scale = 1.0}},
                         random);
  for (std::int64_t i = 0; i < 200; ++i)
    for (std::int64_t d = 0; d < 16; ++d) c.operands[0].row(0, 0, i)[d] = TypeParam(d == 0 ? 1.0f : 0.0f);
  for (std::int64_t d = 0; d < 16; ++d) {
    c.operands[1].row(0, 0, 0)[d] = TypeParam(d == 0 ? 8.0f : 0.0f);
    c.operands[2].row(0, 0, 0)[d] = TypeParam(d % 2 == 0 ? 0.01f : 0.0f);
  }
  rules.add(c);
  rules.expect();
  const results<float> got = c.forward(vnni);
  const auto exact = reference::local_attention<double>(c.in(), c.p.options);
  for (std::int64_t d = 0; d < 16; ++d) {
    const auto want = exact.out.view().row(0, 0, 199)[d];
    EXPECT_NEAR(got.out.row(0, 0, 199)[d], want, 3e-3) << d;
  }
}

/// Rows of zeros: queries that see all alike, keys and values of nothing. Weights of values of zeros count.
TYPED_TEST(VnniTest, Zeros) {
  random_engine random(9);
  rules<TypeParam> rules;
  for (const std::size_t operand : {0u, 1u, 2u})
    for (const std::int64_t step : {1, 3}) {
      unit_call<TypeParam> c(example(entry::local, {.queries = 90, .keys = 90, .dim = 8, .value_dim = 8}), random);
      for (std::int64_t i = 0; i < 90; i += step) std::fill_n(c.operands[operand].row(0, 0, i), 8, TypeParam(0.0f));
      rules.add(c);
    }
  rules.expect();
}

/// Logits that differ by denormal numbers, where those count as zeros and where not, with values in the scale 1: all rows weigh
/// alike.
TEST(VnniDenormals, AreNoDifference) {
  if (!detail::has_unit<float>(vnni)) GTEST_SKIP() << "no VNNI";
  constexpr std::int64_t n = 16, dim = 16;
  const std::vector<float> query(n, 0x1p-50f);
  std::vector<float> key(n), value(n * dim), out(n * dim), lse(n);
  for (std::int64_t j = 0; j < n; ++j) {
    key[static_cast<std::size_t>(j)] = 0x1p-56f * (1 + static_cast<float>(j) * 0x1p-23f);
    for (std::int64_t d = 0; d < dim; ++d)
      value[static_cast<std::size_t>(j * dim + d)] = static_cast<float>(d == 0 ? 127 : (j * 37 + d * 11) % 255 - 127);
  }
  for (const detail::float_mode mode : {0x0u, 0x40u, 0x8040u}) {
    {
      const detail::float_mode_scope scope(mode);
      attend_to<float>(bhsd(query.data(), 1, 1, n, 1), bhsd(key.data(), 1, 1, n, 1), bhsd(value.data(), 1, 1, n, dim),
                       bhsd(out.data(), 1, 1, n, dim), bhs(lse.data(), 1, 1, n),
                       {.lookahead = unlimited, .softmax_scale = 1.0});
    }
    for (std::int64_t i = 0; i < n; ++i) {
      EXPECT_NEAR(lse[static_cast<std::size_t>(i)], std::log(static_cast<double>(n)), 1e-5) << mode;
      for (std::int64_t d = 0; d < dim; ++d) {
        double mean = 0;
        for (std::int64_t j = 0; j < n; ++j) mean += value[static_cast<std::size_t>(j * dim + d)];
        EXPECT_NEAR(out[static_cast<std::size_t>(i * dim + d)], mean / n, 1e-4) << mode;
      }
    }
  }
}

/// Rows of 8 bits with scales of any sign, 0 among them, are to the bit the floats that they stand for. A scale that is NaN
/// reaches those who see its row.
TEST(VnniRowsOf8Bits, AreTheFloatsThatTheyStandFor) {
  if (!detail::has_unit<float>(vnni)) GTEST_SKIP() << "no VNNI";
  random_engine random(11);
  const std::int64_t length = 130, heads = 2, dim = 33, value_dim = 20;
  tensor<float> query({1, heads, length, dim}), key({1, 1, length, dim}), value({1, 1, length, value_dim});
  tensor<q8> key8({1, 1, length, dim}), value8({1, 1, length, value_dim});
  tensor<float, 3> key_scales({1, 1, length}), value_scales({1, 1, length});
  query.randomize(random);
  const auto convert = [&](tensor<q8>& from, tensor<float, 3>& scales, tensor<float>& to) {
    for (std::int64_t j = 0; j < length; ++j)
      for (std::int64_t d = 0; d < to.view().dim(); ++d)
        to.row(0, 0, j)[d] = static_cast<float>(from.row(0, 0, j)[d]) * *scales.row(0, 0, j);
  };
  const auto attention_of = [&](const auto& in) {
    return collect<float>({.heads = heads, .queries = length, .keys = length, .dim = dim, .value_dim = value_dim},
                          [&](tensor_view<float> out, lse_view<float> lse) {
                            attention(in, cca::results<float>{out, lse}, {.window = 40, .unit = vnni});
                          });
  };
  for (const bool is_nan : {false, true}) {
    for (auto* of : {&key8, &value8}) of->generate([&] { return static_cast<q8>(draw(random, -128, 127)); });
    for (auto* of : {&key_scales, &value_scales})
      of->generate([&] { return static_cast<float>(draw(random, -4, 4)) * 0.004f; });
    if (is_nan) *key_scales.row(0, 0, 50) = *value_scales.row(0, 0, 70) = std::numeric_limits<float>::quiet_NaN();
    convert(key8, key_scales, key);
    convert(value8, value_scales, value);
    const results<float> want = attention_of(inputs<float>{query.view(), key.view(), value.view()});
    const results<float> got = attention_of(inputs<float, q8>{.query = query.view(),
                                                              .key = key8.view(),
                                                              .value = value8.view(),
                                                              .key_scales = key_scales.view(),
                                                              .value_scales = value_scales.view()});
    for (std::int64_t i = 0; i < length; ++i)
      for (std::int64_t d = 0; d < value_dim; ++d) {
        const float x = got.out.row(0, 1, i)[d], y = want.out.row(0, 1, i)[d];
        ASSERT_TRUE(same_bits(x, y) || (std::isnan(x) && std::isnan(y))) << i << " " << d;
        ASSERT_EQ(std::isnan(x), is_nan && i >= 50 && i < 110) << i << " " << d;
      }
  }
}

/// NaN and infinity of a token reach the queries that see it, and change no bit of another's results.
TYPED_TEST(VnniTest, NotFinite) {
  random_engine random(10);
  const std::int64_t length = 150, g = 4, s = 40;
  const problem p{.entry = entry::attention,
                  .sizes = {.queries = length, .keys = length, .dim = 32, .value_dim = 20},
                  .options = {.group_size = g, .window = s}};
  const unit_call<TypeParam> clean(p, random);
  const float infinity = std::numeric_limits<float>::infinity();
  const results<float> want = clean.forward(vnni);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity})
    for (const std::size_t operand : {0u, 1u, 2u})
      for (const std::int64_t j : {0, 1, 30, 31, 63, 64, 100, 127, 149}) {
        unit_call<TypeParam> spoilt = clean;
        spoilt.operands[operand].row(0, 0, j)[3] = TypeParam(bad);
        const results<float> got = spoilt.forward(vnni);
        const std::int64_t group_end = j / g * g + g;
        for (std::int64_t t = 0; t < length; ++t) {
          const bool core = group_end <= t + 1 - s;
          const bool seen = operand == 0 ? t == j || (core && j == group_end - 1) : j <= t;
          const float* out = got.out.row(0, 0, t);
          if (!seen) {
            ASSERT_TRUE(std::equal(out, out + 20, want.out.row(0, 0, t))) << "row " << j << " reaches query " << t;
            ASSERT_TRUE(same_bits(*got.lse.row(0, 0, t), *want.lse.row(0, 0, t)));
          } else if (std::isnan(bad)) {
            // A value shows in its own column, what weighs in all.
            ASSERT_TRUE(std::isnan(out[3])) << "row " << j << " is hidden from query " << t;
            ASSERT_TRUE(operand == 2 || std::isnan(out[0])) << "row " << j << " is hidden from query " << t;
          } else if (operand == 2) {
            ASSERT_FALSE(std::isfinite(out[3])) << "row " << j << " is hidden from query " << t;
          }
          if (seen && operand == 2) {
            ASSERT_TRUE(std::isfinite(out[0])) << "row " << j << ", query " << t;
            ASSERT_NEAR(out[0], want.out.row(0, 0, t)[0], 0.1) << "row " << j << ", query " << t;
          }
        }
      }
}

/// Of two rows in a block each is left out of the products by itself.
TYPED_TEST(VnniTest, TwoNotFinite) {
  random_engine random(21);
  const std::int64_t length = 200;
  const problem p{.entry = entry::local, .sizes = {.queries = length, .keys = length, .dim = 40, .value_dim = 40}};
  const unit_call<TypeParam> clean(p, random);
  const results<float> want = clean.forward(vnni);
  for (const auto& [first, second] : {std::pair<std::int64_t, std::int64_t>{6, 7}, {31, 32}, {10, 40}, {0, 199}}) {
    unit_call<TypeParam> spoilt = clean;
    spoilt.operands[2].row(0, 0, first)[3] = TypeParam(std::numeric_limits<float>::quiet_NaN());
    spoilt.operands[2].row(0, 0, second)[5] = TypeParam(-std::numeric_limits<float>::infinity());
    const results<float> got = spoilt.forward(vnni);
    for (std::int64_t t = 0; t < length; ++t)
      for (std::int64_t d = 0; d < 40; ++d) {
        const bool shown = (d == 3 && t >= first) || (d == 5 && t >= second);
        const float x = got.out.row(0, 0, t)[d];
        ASSERT_EQ(std::isfinite(x), !shown) << first << " or " << second << ", query " << t;
        ASSERT_TRUE(t >= first || same_bits(x, want.out.row(0, 0, t)[d])) << t;
      }
  }
}

/// A key of -inf is masked where the query's element is positive.
TYPED_TEST(VnniTest, InfiniteKeysMask) {
  random_engine random(11);
  const std::int64_t length = 40;
  unit_call<TypeParam> c(example(entry::local, {.queries = length, .keys = length, .dim = 4, .value_dim = 4}), random);
  c.p.options = {};
  for (std::int64_t i = 0; i < length; ++i) c.operands[0].row(0, 0, i)[2] = TypeParam(1.0f);
  c.operands[1].row(0, 0, 5)[2] = TypeParam(-std::numeric_limits<float>::infinity());
  rules<TypeParam> rules;
  const results<float> got = c.forward(vnni);
  const auto exact = reference::local_attention<double>(c.in(), c.p.options);
  for (std::int64_t i = 0; i < length; ++i)
    for (std::int64_t d = 0; d < 4; ++d)
      ASSERT_NEAR(got.out.row(0, 0, i)[d], exact.out.view().row(0, 0, i)[d], 0.05) << i;
}

/// No output before a token changes by a bit with it.
TYPED_TEST(VnniTest, Causality) {
  random_engine random(12);
  for (const entry entry : {entry::local, entry::attention}) {
    const unit_call<TypeParam> clean(example(entry, {.queries = 200, .keys = 200, .dim = 16, .value_dim = 16}), random);
    const results<float> want = clean.forward(vnni);
    for (const std::int64_t t : {3, 64, 97, 130, 199}) {
      unit_call<TypeParam> other = clean;
      for (std::size_t i = 0; i < 3; ++i)
        for (int d = 0; d < 16; ++d) other.operands[i].row(0, 0, t)[d] = TypeParam(static_cast<float>(40 + d));
      const results<float> got = other.forward(vnni);
      for (std::int64_t i = 0; i < t; ++i) {
        ASSERT_TRUE(std::equal(got.out.row(0, 0, i), got.out.row(0, 0, i) + 16, want.out.row(0, 0, i)))
            << i << " of " << t;
        ASSERT_TRUE(same_bits(*got.lse.row(0, 0, i), *want.lse.row(0, 0, i)));
      }
    }
  }
}

/// What a query gets hangs neither on the other queries of the call nor on the other sequences of the batch.
TYPED_TEST(VnniTest, Neighbours) {
  random_engine random(13);
  problem p{.entry = entry::local,
            .sizes = {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 300, .keys = 700, .dim = 24, .value_dim = 16},
            .options = {.window = 500}};
  const unit_call<TypeParam> c(p, random);
  const results<float> want = c.forward(vnni);
  for (const std::int64_t begin : {0, 1, 70, 200}) {  // of sequence 1 and head 1 alone
    const std::int64_t count = 300 - begin;
    options o = p.options;
    o.first_position = 400 + begin;
    tensor<float> out({1, 1, count, 16});
    tensor<float, 3> lse({1, 1, count});
    const auto alone = [](auto view, std::int64_t b, std::int64_t h, std::int64_t first) {
      view.data = view.row(b, h, first);
      view.extent = {1, 1, view.extent[2] - first, view.extent[3]};
      return view;
    };
    attend_to(alone(c.operand(0), 1, 1, begin), alone(c.operand(1), 1, 0, 0), alone(c.operand(2), 1, 0, 0), out.view(),
              lse.view(), o);
    for (std::int64_t i = 0; i < count; ++i)
      ASSERT_TRUE(std::equal(out.row(0, 0, i), out.row(0, 0, i) + 16, want.out.row(1, 1, begin + i)))
          << begin << ", " << i;
  }
}

/// A query that sees nothing: 0 and -inf.
TYPED_TEST(VnniTest, NothingSeen) {
  random_engine random(14);
  problem p = example(entry::local, {.queries = 90, .keys = 30, .dim = 8, .value_dim = 8});
  p.options.first_position = -20;
  const results<float> got = unit_call<TypeParam>(p, random).forward(vnni);
  for (std::int64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(*got.lse.row(0, 0, i), -std::numeric_limits<float>::infinity());
    for (int d = 0; d < 8; ++d) EXPECT_EQ(got.out.row(0, 0, i)[d], 0.0f);
  }
}

TYPED_TEST(VnniTest, AnyExecutor) {
  random_engine random(15);
  for (const entry entry : unit_entries) {
    const unit_call<TypeParam> c(
        example(entry, {.batch = 2, .heads = 2, .queries = 70, .keys = 70, .dim = 16, .value_dim = 16}), random);
    const results<float> want = c.forward(vnni);
    EXPECT_FALSE(same_bits(c.forward(matrix_unit::none), want));
    for (const auto& [name, run] : executors()) EXPECT_TRUE(same_bits(c.forward(vnni, run), want)) << name;
  }
}

/// Nothing beside the operands is touched, whatever the sizes: their memory ends, or begins, where access faults.
TYPED_TEST(VnniTest, GuardPages) {
  random_engine random(16);
  std::vector<guarded_pages> pages(4);
  for (const bool end : {false, true})
    for (const std::int64_t length : {13, 64, 70, 129})
      for (const std::int64_t dim : {1, 3, 16, 31, 64, 70}) {
        const unit_call<TypeParam> c(
            example(entry::attention, {.queries = length, .keys = length, .dim = dim, .value_dim = dim}), random);
        for (const std::int64_t padding : {0, 3}) {
          std::array<tensor_view<TypeParam>, 3> operand;
          for (std::size_t i = 0; i < 3; ++i) {
            operand[i] = place<TypeParam>(pages[i], end, c.operand(i).extent, padding);
            for (std::int64_t t = 0; t < length; ++t)
              std::copy_n(c.operand(i).row(0, 0, t), dim, operand[i].row(0, 0, t));
          }
          const auto out = place<float>(pages[3], end, c.operand(2).extent, padding);
          tensor<float, 3> lse({1, 1, length});
          attend_to<TypeParam>(operand[0], operand[1], operand[2], out, lse.view(), c.p.options);
          const results<float> want = c.forward(vnni);
          ASSERT_TRUE(same_bits(tensor_view<const float>(out), want.out.view())) << length << ", " << dim;
        }
      }
}

/// A cache answers a prompt, whole or in pieces, within the rule. It comes back from a file with the unit that is asked for.
TEST(Vnni, Cache) {
  if (!detail::has_unit<float>(vnni)) GTEST_SKIP() << "no VNNI";
  random_engine random(18);
  problem p = example(entry::attention,
                      {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 90, .keys = 90, .dim = 24, .value_dim = 40});
  p.options.sink_tokens = 5;
  const unit_call<float> c(p, random);
  const sizes& s = p.sizes;
  const reference::result<float> plain = byte_textbook(c.p, c.in(), c.far_rows());
  const auto exact = reference::attention<double>(c.in(), p.options);
  const auto rows = [](auto view, range part) {
    view.data = view.row(0, 0, part.begin);
    view.extent[2] = part.size();
    return view;
  };
  error_rule<float> out_rule, lse_rule;
  for (const std::vector<std::int64_t>& pieces : {std::vector<std::int64_t>{90}, {40, 1, 33, 16}}) {
    options options = p.options;
    options.unit = vnni;
    kv_cache<float> cache(
        {.batch = s.batch, .heads = s.heads, .kv_heads = s.kv_heads, .dim = s.dim, .value_dim = s.value_dim}, options);
    const auto got = collect<float>(s, [&](tensor_view<float> out, lse_view<float> lse) {
      std::int64_t begin = 0;
      for (const std::int64_t count : pieces) {
        const range part{begin, begin + count};
        lse_view<float> lse_part = lse;
        lse_part.data = lse.row(0, 0, begin);
        lse_part.extent[2] = count;
        cache.attend(inputs{rows(c.operand(0), part), rows(c.operand(1), part), rows(c.operand(2), part)},
                     cca::results{rows(out, part), lse_part});
        begin += count;
        std::stringstream file;
        save(cache, file);
        cache = load<float>(file, vnni);
      }
    });
    EXPECT_EQ(cache.options().unit, vnni);
    out_rule.add(got.out.view(), plain.out.view(), exact.out.view(), "cache");
    lse_rule.add(with_dim(got.lse.view()), plain.lse.view(), exact.lse.view(), "cache");
  }
  EXPECT_TRUE(out_rule.holds());
  EXPECT_TRUE(lse_rule.holds());
}

/// Keys of another type than the query's, which no unit of 16 bits takes, are as if they had been converted. A workspace of the
/// size that is asked for will do, one of a byte less is refused.
TEST(Vnni, MixedTypes) {
  if (!detail::has_unit<float>(vnni)) GTEST_SKIP() << "no VNNI";
  random_engine random(19);
  const extents e{1, 2, 80, 24};
  tensor<float> query(e), wide_key(e), wide_value(e), out(e), want(e);
  tensor<bfloat16> key(e);
  tensor<half> value(e);
  query.randomize(random);
  key.randomize(random);
  value.randomize(random);
  for_each_row(key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < 24; ++d) {
      wide_key.row(b, h, i)[d] = static_cast<float>(key.row(b, h, i)[d]);
      wide_value.row(b, h, i)[d] = static_cast<float>(value.row(b, h, i)[d]);
    }
  });
  const inputs in{std::as_const(query).view(), std::as_const(key).view(), std::as_const(value).view()};
  std::vector<std::byte> workspace(workspace_size(in, {.unit = vnni}));
  attention(in, cca::results{out.view()}, {.unit = vnni}, {serial_executor{}, workspace});
  tensor<float, 3> lse({1, 2, 80});
  attend_to<float>(query.view(), wide_key.view(), wide_value.view(), want.view(), lse.view(), {});
  EXPECT_TRUE(same_bits(out.view(), want.view()));
  const std::size_t least = workspace.size() - detail::scratch_alignment;
  EXPECT_THROW(attention(in, cca::results{out.view()}, {.unit = vnni},
                         {serial_executor{}, std::span(workspace).first(least - 1)}),
               std::invalid_argument);
}

/// What there is no integer for is not asked for in silence, and no one gets integers who does not ask.
TEST(Vnni, Refusals) {
  std::vector<float> f(64);
  std::vector<double> d(64);
  const auto of = [](auto& x) { return bhsd(std::as_const(x).data(), 1, 1, 16, 4); };
  EXPECT_EQ(refusal_of([&] {
              static_cast<void>(workspace_size(inputs{of(d), of(d), of(d)}, {.unit = vnni}));
            }),
            "cca: options.unit: got vnni, wants none: integers stand for floats and 16-bit operands, not for doubles");
  EXPECT_NE(best_unit<float>(), vnni);
  EXPECT_NE(best_unit<bfloat16>(), vnni);
  EXPECT_NE(best_unit<half>(), vnni);
  random_engine random(20);
  const unit_call<bfloat16> c(example(entry::local, {.queries = 16, .keys = 16, .dim = 4, .value_dim = 4}), random);
  if (detail::has_unit<bfloat16>(vnni)) {
    const char* const wanted =
        "cca: options.unit: got vnni, wants none, or a unit of 16 bits: integers have no gradients";
    const tensor<bfloat16> grad_out({1, 1, 16, 4});
    const tensor<float, 3> grad_lse({1, 1, 16});
    for (const entry entry : unit_entries) {
      const unit_call<bfloat16> one(example(entry, {.queries = 16, .keys = 16, .dim = 4, .value_dim = 4}), random);
      EXPECT_EQ(refusal_of([&] { static_cast<void>(one.gradient(vnni, one.forward(vnni), grad_out, grad_lse)); }),
                wanted);
    }
    EXPECT_EQ(refusal_of([&] { static_cast<void>(gradient_workspace_size(c.in(), {.unit = vnni})); }), wanted);
    std::vector<float> wide(2 * 65537);
    const auto rows = bhsd(std::as_const(wide).data(), 1, 1, 2, 65537);
    EXPECT_EQ(refusal_of([&] {
                static_cast<void>(workspace_size(inputs{rows, rows, rows}, {.unit = vnni}));
              }),
              "cca: query: got the dim 65537, wants at most 65536 with options.unit vnni");
  }
  detail::matrix_units& present = detail::present_units();
  const detail::matrix_units had = std::exchange(present, {});
  EXPECT_EQ(refusal_of([&] { static_cast<void>(c.forward(vnni)); }),
            "cca: options.unit: got vnni, wants best, or a unit that this processor has for the operands' type");
  EXPECT_NE(refusal_of([&] {
              static_cast<void>(workspace_size(inputs{of(f), of(f), of(f)}, {.unit = vnni}));
            }).find("unit"),
            std::string::npos);
  present = had;
}

}  // namespace
