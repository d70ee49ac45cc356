// Rows of 8 bits with scales as operands. Where the scales are powers of two their numbers are floats without rounding, and
// every result has to be, to the bit, that of the same call on those floats.

#include "guarded_pages.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/quantize.hpp>
#include <stdexcept>

namespace cca::test { namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// Rows of 8 bits, and the numbers that they stand for.
struct quantized {
  tensor<q8> elements;
  tensor<float, 3> scales;
  tensor<float> numbers;

  /// Every element is as likely, -128 too; scales are `next_scale()`.
  template <class Scale>
  quantized(const extents& e, random_engine& random, const Scale& next_scale)
      : elements(e, random_operand_layout(random)),
        scales({e[0], e[1], e[2]}, random_operand_layout(random)),
        numbers(e) {
    elements.generate([&] { return static_cast<q8>(draw(random, -128, 127)); });
    scales.generate(next_scale);
    convert();
  }

  void convert() {
    for_each_row(numbers.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < numbers.view().dim(); ++d)
        numbers.row(b, h, i)[d] = static_cast<float>(elements.row(b, h, i)[d]) * *scales.row(b, h, i);
    });
  }
};

/// Powers of two, with which keys are of the size of normal numbers.
auto powers(random_engine& random) {
  return [&random] { return std::ldexp(1.0f, static_cast<int>(draw(random, -9, -6))); };
}

/// Operands of 8 bits and the same of floats.
struct quantized_operands {
  sizes s;
  tensor<float> query;
  quantized key, value;

  template <class Scale>
  quantized_operands(const sizes& of, random_engine& random, const Scale& next_scale)
      : s(of),
        query({s.batch, s.heads, s.queries, s.dim}, random_operand_layout(random)),
        key({s.batch, s.kv_heads, s.keys, s.dim}, random, next_scale),
        value({s.batch, s.kv_heads, s.keys, s.value_dim}, random, next_scale) {
    query.randomize(random);
  }

  [[nodiscard]] inputs<float, q8> rows() const {
    return {.query = query.view(),
            .key = key.elements.view(),
            .value = value.elements.view(),
            .key_scales = key.scales.view(),
            .value_scales = value.scales.view()};
  }
  [[nodiscard]] inputs<float> floats() const { return {query.view(), key.numbers.view(), value.numbers.view()}; }
};

/// Sizes that reach every path: a single query, few and many, one tile and several, grouped heads, dims with and without
/// tails.
std::vector<sizes> some_sizes() {
  return {{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 90, .dim = 33, .value_dim = 20},
          {.batch = 1, .heads = 2, .kv_heads = 1, .queries = 150, .keys = 150, .dim = 64, .value_dim = 48},
          {.batch = 1, .heads = 3, .kv_heads = 3, .queries = 40, .keys = 300, .dim = 17, .value_dim = 128},
          {.batch = 1, .heads = 8, .kv_heads = 1, .queries = 1, .keys = 200, .dim = 128, .value_dim = 80},
          {.batch = 1, .heads = 2, .kv_heads = 2, .queries = 1, .keys = 1100, .dim = 201, .value_dim = 67}};
}

template <class Inputs>
results<float> attention_of(const sizes& s, const Inputs& in, const options& options) {
  return collect<float>(s, [&](tensor_view<float> out, lse_view<float> lse) {
    attention(in, cca::results<float>{out, lse}, options);
  });
}

template <class Inputs, class Context>
results<float> attend_of(const sizes& s, const Inputs& in, const Context& context, const options& options) {
  return collect<float>(s, [&](tensor_view<float> out, lse_view<float> lse) {
    attend(in, context, cca::results<float>{out, lse}, options);
  });
}

TEST(QuantizedRows, AreTheNumbersThatTheyStandFor) {
  random_engine random(1);
  for (const sizes& s : some_sizes())
    for (options options : {cca::options{}, {.window = 9, .sink_tokens = 2}, {.group_size = 40, .window = 5}}) {
      if (options.group_size > 0 && s.queries != s.keys) options.group_size = 0;
      const quantized_operands o(s, random, powers(random));
      EXPECT_TRUE(same_bits(attention_of(s, o.rows(), options), attention_of(s, o.floats(), options)))
          << describe(s) << ", " << describe(options);
    }
}

/// Every dim, so that tails of every length are read.
TEST(QuantizedRows, MayBeOfAnyDim) {
  random_engine random(2);
  for (std::int64_t dim = 1; dim <= 70; ++dim)
    for (const std::int64_t queries : {std::int64_t{1}, detail::most_few_queries + 3}) {
      const sizes s{.heads = 2, .kv_heads = 1, .queries = queries, .keys = 45, .dim = dim, .value_dim = 71 - dim};
      const quantized_operands o(s, random, powers(random));
      EXPECT_TRUE(same_bits(attention_of(s, o.rows(), {}), attention_of(s, o.floats(), {}))) << describe(s);
    }
}

/// A far context of 8-bit rows beside raw tokens of any elements, all of it or what is selected of it.
TEST(QuantizedRows, AreAFarContext) {
  random_engine random(3);
  for (const sizes& s : some_sizes())
    for (const std::int64_t block_rows : {0, 1, 8, 40}) {
      const quantized_operands o(s, random, powers(random)), f(s, random, powers(random));
      tensor<std::int64_t, 3> seen({s.batch, s.heads, s.queries});
      seen.generate([&] { return draw(random, 0, s.keys); });
      far_context<q8> rows{.key = f.key.elements.view(),
                           .value = f.value.elements.view(),
                           .key_scales = f.key.scales.view(),
                           .value_scales = f.value.scales.view()};
      far_context<float> floats{f.key.numbers.view(), f.value.numbers.view()};
      const std::int64_t most = 5;
      tensor<std::int64_t> blocks({1, s.kv_heads, s.queries, most});
      if (block_rows > 0) {
        const std::int64_t count = (s.keys + block_rows - 1) / block_rows;
        for_each_row(blocks.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          std::int64_t* const list = blocks.row(b, h, i);
          std::int64_t next = -1;
          for (std::int64_t j = 0; j < most; ++j) {
            next = next < 0 && j > 0 ? -1 : next + draw(random, 1, std::max<std::int64_t>(count / most, 1));
            list[j] = next < count ? next : -1;
            if (list[j] < 0) next = -2;
          }
        });
        rows.selected = {.blocks = blocks.view(), .block_rows = block_rows};
        floats.selected = rows.selected;
      } else {
        rows.seen = floats.seen = seen.view();
      }
      const options options{.window = 7};
      const results<float> expected = attend_of(s, o.floats(), floats, options);
      EXPECT_TRUE(same_bits(attend_of(s, o.floats(), rows, options), expected)) << describe(s) << ", " << block_rows;
      EXPECT_TRUE(same_bits(attend_of(s, o.rows(), rows, options), expected)) << describe(s) << ", " << block_rows;
    }
}

/// Scales of any size: the textbook multiplies them into every element first.
TEST(QuantizedRows, AreAsGoodAsTheTextbookOfTheirNumbers) {
  random_engine random(4);
  attention_rule<float> rule;
  for (const sizes& s : some_sizes())
    for (const float least : {1e-3f, 1e-2f}) {
      const quantized_operands o(s, random, [&] {
        return draw(random, 0, 9) == 0 ? 0.0f : least * static_cast<float>(draw(random, 1000, 3000)) * 1e-3f;
      });
      rule.add(
          attention_of(s, o.rows(), {}),
          [&]<class Scalar>() { return reference::attention<Scalar>(o.rows(), options{}); }, describe(s));
    }
  EXPECT_TRUE(rule.holds());
}

/// What a query gets does not depend on up to three heads that share its rows, which are converted for several at a time.
/// (More take longer slices of rows, of which each is summed by itself.)
TEST(QuantizedRows, GiveAHeadWhatItGetsAlone) {
  random_engine random(5);
  const sizes s{.heads = 4, .kv_heads = 1, .queries = 1, .keys = 130, .dim = 72, .value_dim = 40};
  const quantized_operands o(s, random, [&] { return 1e-5f * static_cast<float>(draw(random, 100, 999)); });
  const results<float> all = attention_of(s, o.rows(), {});
  sizes one = s;
  one.heads = 1;
  for (std::int64_t h = 0; h < s.heads; ++h) {
    inputs<float, q8> in = o.rows();
    in.query = in.query.slice_heads(h, 1);
    const results<float> alone = attention_of(one, in, {});
    EXPECT_TRUE(same_bits(alone.out.view(), all.out.view().slice_heads(h, 1))) << h;
    EXPECT_TRUE(same_bits(alone.lse.view(), all.lse.view().slice_heads(h, 1))) << h;
  }
}

/// A NaN for a scale is one for the whole row: it shows where the row is seen, and nowhere else.
TEST(QuantizedRows, KeepTheNaNOfAScaleWithThoseThatSeeIt) {
  random_engine random(6);
  for (const std::int64_t queries : {std::int64_t{4}, std::int64_t{80}}) {
    const sizes s{.heads = 2, .kv_heads = 1, .queries = queries, .keys = 80, .dim = 24, .value_dim = 9};
    quantized_operands o(s, random, powers(random));
    const options options{.window = 3};
    const results<float> clean = attention_of(s, o.rows(), options);
    for (const bool of_keys : {true, false}) {
      tensor<float, 3> scales = of_keys ? o.key.scales : o.value.scales;
      inputs<float, q8> in = o.rows();
      tensor<float, 3> own({1, 1, s.keys});
      for (std::int64_t j = 0; j < s.keys; ++j) *own.row(0, 0, j) = *scales.row(0, 0, j);
      const std::int64_t bad = s.keys - 3;
      *own.row(0, 0, bad) = not_a_number;
      (of_keys ? in.key_scales : in.value_scales) = own.view();
      const results<float> got = attention_of(s, in, options);
      for (std::int64_t h = 0; h < s.heads; ++h)
        for (std::int64_t i = 0; i < s.queries; ++i) {
          const std::int64_t t = s.keys - s.queries + i;
          const bool sees = t - 3 < bad && bad <= t;
          for (std::int64_t d = 0; d < s.value_dim; ++d)
            EXPECT_TRUE(sees ? std::isnan(got.out.row(0, h, i)[d])
                             : same_bits(got.out.row(0, h, i)[d], clean.out.row(0, h, i)[d]))
                << of_keys << " " << i << " " << d;
        }
    }
  }
}

/// Sequences one after the other, their scales too: each is to the bit as if called alone.
TEST(QuantizedRows, MayBePacked) {
  random_engine random(7);
  const std::vector<std::int64_t> offsets{0, 7, 7, 8, 40, 140};
  const std::int64_t tokens = offsets.back(), heads = 4, kv_heads = 2, dim = 20;
  std::vector<float> query(static_cast<std::size_t>(tokens * heads * dim)), out(query.size()), alone(query.size());
  std::vector<q8> key(static_cast<std::size_t>(tokens * kv_heads * dim)), value(key.size());
  std::vector<float> key_scales(static_cast<std::size_t>(tokens * kv_heads)), value_scales(key_scales.size());
  for (float& x : query) x = static_cast<float>(draw(random, -99, 99)) / 64;
  for (std::vector<q8>* all : {&key, &value})
    for (q8& x : *all) x = static_cast<q8>(draw(random, -128, 127));
  for (std::vector<float>* all : {&key_scales, &value_scales})
    for (float& x : *all) x = powers(random)();
  const auto scales = [&](const std::vector<float>& of) {  // [tokens][heads]
    lse_view<const float> view = packed(of.data(), offsets, kv_heads);
    view.stride = {0, 1, kv_heads};
    return view;
  };
  const inputs<float, q8> in{.query = packed(query.data(), offsets, heads, dim),
                             .key = packed(key.data(), offsets, kv_heads, dim),
                             .value = packed(value.data(), offsets, kv_heads, dim),
                             .key_scales = scales(key_scales),
                             .value_scales = scales(value_scales)};
  const options options{.group_size = 4, .window = 6};
  attention(in, cca::results<float>{packed(out.data(), offsets, heads, dim)}, options);
  for (std::int64_t b = 0; b + 1 < std::ssize(offsets); ++b) {
    const inputs<float, q8> one{.query = in.query.sequence(b),
                                .key = in.key.sequence(b),
                                .value = in.value.sequence(b),
                                .key_scales = in.key_scales.sequence(b),
                                .value_scales = in.value_scales.sequence(b)};
    attention(one, cca::results<float>{packed(alone.data(), offsets, heads, dim).sequence(b)}, options);
  }
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_TRUE(same_bits(out[i], alone[i])) << i;
}

/// Nothing beside a row or a scale is read.
TEST(QuantizedRows, AreReadToTheirEndsAndNoFurther) {
  const guarded_pages key_pages, value_pages, key_scale_pages, value_scale_pages;
  random_engine random(8);
  for (const bool end : {false, true})
    for (const std::int64_t dim : {1, 5, 16, 31, 64, 67})
      for (const std::int64_t queries : {std::int64_t{1}, std::int64_t{30}}) {
        const sizes s{.heads = 1, .kv_heads = 1, .queries = queries, .keys = 41, .dim = dim, .value_dim = dim};
        const quantized_operands o(s, random, powers(random));
        const extents e{1, 1, s.keys, dim};
        const auto moved = [&](const guarded_pages& pages, const tensor<q8>& from) {
          const tensor_view<q8> to = place<q8>(pages, end, e, 0);
          copy<q8>(from.view(), to);
          return to;
        };
        const auto moved_scales = [&](const guarded_pages& pages, const tensor<float, 3>& from) {
          const tensor_view<float> to = place<float>(pages, end, {1, 1, s.keys, 1}, 0);
          copy<float>(with_dim(from.view()), to);
          return without_dim(to);
        };
        const inputs<float, q8> in{.query = o.query.view(),
                                   .key = moved(key_pages, o.key.elements),
                                   .value = moved(value_pages, o.value.elements),
                                   .key_scales = moved_scales(key_scale_pages, o.key.scales),
                                   .value_scales = moved_scales(value_scale_pages, o.value.scales)};
        EXPECT_TRUE(same_bits(attention_of(s, in, {}), attention_of(s, o.floats(), {}))) << describe(s);
      }
}

// ---------------------------------------------------------------------------------------------------------- rounding

/// A row and its scale, made by `quantize`.
struct rounded {
  std::vector<q8> elements;
  float scale = -1;

  explicit rounded(const std::vector<float>& row) : elements(row.size(), 77) {
    const std::int64_t dim = std::ssize(row);
    quantize(bhsd(row.data(), 1, 1, 1, dim), bhsd(elements.data(), 1, 1, 1, dim), bhs(&scale, 1, 1, 1));
  }
};

TEST(Quantize, RoundsToTheNearest) {
  const rounded whole({127, -127, 1, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0.51f, 0, -0.0f, 63.499f});
  EXPECT_EQ(whole.scale, 1);
  EXPECT_EQ(whole.elements, (std::vector<q8>{127, -127, 1, 0, 2, 2, 0, -2, 1, 0, 0, 63}));
  const rounded negative({-5, 2.5f});
  EXPECT_EQ(negative.scale, 5.0f / 127);
  EXPECT_EQ(negative.elements, (std::vector<q8>{-127, 64}));  // 63.5 is a tie, 64 is even
}

TEST(Quantize, GivesARowOfZerosTheScaleZero) {
  const rounded zeros({0, -0.0f, 0, 0, 0});
  EXPECT_EQ(zeros.scale, 0);
  EXPECT_EQ(zeros.elements, std::vector<q8>(5, 0));
}

/// One huge element, the largest and the least of floats: no element is beyond +-127, no scale infinite.
TEST(Quantize, HoldsNumbersOfAnySize) {
  constexpr float most = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
  const rounded large({most, -most, 1, 0});
  EXPECT_TRUE(std::isfinite(large.scale * 127));
  EXPECT_EQ(large.elements, (std::vector<q8>{127, -127, 0, 0}));
  for (int units = 1; units < 2000; ++units) {
    const float x = static_cast<float>(units) * least;
    const rounded small({x, -x, 0});
    EXPECT_EQ(small.elements[0], -small.elements[1]);
    EXPECT_GE(small.elements[0], 0);
    // The scale is a whole number of units in the last place of the least numbers.
    EXPECT_LE(std::fabs(static_cast<float>(small.elements[0]) * small.scale - x), 64 * least) << units;
  }
}

TEST(Quantize, MakesARowThatIsNotFiniteNaN) {
  for (const float bad :
       {not_a_number, -not_a_number, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()})
    for (const std::size_t place : {0u, 3u, 40u}) {
      std::vector<float> row(41, 1.0f);
      row[place] = bad;
      EXPECT_TRUE(std::isnan(rounded(row).scale)) << bad << " at " << place;
    }
}

/// Random rows in any layout: half a scale off at most, and nothing is written beside them.
TEST(Quantize, IsHalfAScaleOffAtMost) {
  random_engine random(9);
  for (const std::int64_t dim : {1, 7, 64, 130}) {
    const extents e{2, 3, 5, dim};
    tensor<float> rows(e, random_operand_layout(random));
    rows.randomize(random);
    tensor<q8> to(e, random_layout(random));
    tensor<float, 3> scales({2, 3, 5}, random_layout(random));
    quantize(rows.view(), to.view(), scales.view());
    EXPECT_TRUE(to.canaries_intact());
    EXPECT_TRUE(scales.canaries_intact());
    for_each_row(rows.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const double scale = static_cast<double>(*scales.row(b, h, i));
      int largest = 0;
      for (std::int64_t d = 0; d < dim; ++d) {
        const int element = to.row(b, h, i)[d];
        largest = std::max(largest, std::abs(element));
        EXPECT_LE(std::fabs(element * scale - static_cast<double>(rows.row(b, h, i)[d])), scale * (0.5 + 1e-5));
      }
      EXPECT_EQ(largest, 127);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------- refusals

TEST(QuantizedRows, AreRefusedWithoutTheirScales) {
  const sizes s{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 9, .dim = 5, .value_dim = 3};
  random_engine random(10);
  const quantized_operands o(s, random, powers(random));
  tensor<float> out({2, 4, 3, 3});
  tensor<std::int64_t, 3> seen({2, 4, 3});
  seen.fill(1);
  const auto expect_refused = [&](const std::string& message, const auto& change) {
    inputs<float, q8> in = o.rows();
    far_context<q8> context{.key = in.key,
                            .value = in.value,
                            .seen = seen.view(),
                            .key_scales = in.key_scales,
                            .value_scales = in.value_scales};
    change(in, context);
    EXPECT_EQ(refusal_of([&] { attend(in, context, cca::results<float>{out.view()}); }).find("cca: " + message), 0U)
        << message << "; " << refusal_of([&] { attend(in, context, cca::results<float>{out.view()}); });
  };
  expect_refused("key_scales: got none, wants a scale for each row of key, of 8 bits",
                 [](auto& in, auto&) { in.key_scales = {}; });
  expect_refused("value_scales: got none", [](auto& in, auto&) { in.value_scales = {}; });
  expect_refused("far.key_scales: got none", [](auto&, auto& context) { context.key_scales = {}; });
  expect_refused("far.value_scales: got none", [](auto&, auto& context) { context.value_scales = {}; });
  for (const std::size_t extent : {0U, 1U, 2U}) {
    expect_refused("key_scales: got [", [&](auto& in, auto&) { --in.key_scales.extent[extent]; });
    expect_refused("value_scales: got [", [&](auto& in, auto&) { ++in.value_scales.extent[extent]; });
    expect_refused("far.key_scales: got [", [&](auto&, auto& context) { ++context.key_scales.extent[extent]; });
  }
  expect_refused("key_scales: got a null pointer", [](auto& in, auto&) { in.key_scales.data = nullptr; });
  inputs<float> floats = o.floats();
  floats.value_scales = o.value.scales.view();
  EXPECT_EQ(refusal_of([&] { attention(floats, cca::results<float>{out.view()}); }),
            "cca: value_scales: got [2, 2, 9], wants none: value has no elements of 8 bits");
}

TEST(Quantize, RefusesViewsThatDoNotFit) {
  tensor<float> rows({2, 3, 4, 5});
  rows.fill(1);
  tensor<q8> to({2, 3, 4, 5});
  tensor<float, 3> scales({2, 3, 4});
  for (const std::size_t extent : {0U, 1U, 2U, 3U}) {
    tensor_view<q8> wrong = to.view();
    ++wrong.extent[extent];
    EXPECT_EQ(refusal_of([&] { quantize(rows.view(), wrong, scales.view()); }).find("cca: to: got "), 0U);
    if (extent == 3) continue;
    lse_view<float> wrong_scales = scales.view();
    --wrong_scales.extent[extent];
    EXPECT_EQ(refusal_of([&] { quantize(rows.view(), to.view(), wrong_scales); }).find("cca: scales: got "), 0U);
  }
  lse_view<float> shared = scales.view();
  shared.stride[1] = 0;
  EXPECT_EQ(refusal_of([&] { quantize(rows.view(), to.view(), shared); }).find("cca: scales: got "), 0U);
}

}}  // namespace cca::test
