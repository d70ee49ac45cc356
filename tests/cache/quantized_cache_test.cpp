// Caches of 8-bit rows: they answer like attention over the tokens that they have rounded, whose cores they round, too.

#include "kv_cache_life.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <stdexcept>

namespace cca::test { namespace {

template <class Types>
class QuantizedCacheOf : public testing::Test {};
/// Elements and cores.
using ElementTypes = testing::Types<std::pair<float, q8>, std::pair<q8, q8>>;
TYPED_TEST_SUITE(QuantizedCacheOf, ElementTypes);

/// A file holds all, says what it is, and every changed byte of it is noticed.
TYPED_TEST(QuantizedCacheOf, ComesBackFromAFileBitByBit) {
  using Element = typename TypeParam::first_type;
  using Core = typename TypeParam::second_type;
  random_engine random(1);
  for (const options& options : {cca::options{},
                                 {.group_size = 3, .window = 4},
                                 {.group_size = 2, .window = 3, .sink_tokens = 4, .core_bias = core_bias::entropy}}) {
    const cache_setup setup = example_cache(options, {.rewind = 2});
    const operands<float> tokens = random_tokens(setup, 1, 40, random);
    auto cache = setup.make<Element, Core>();
    append(cache, tokens_of(tokens, {0, 25}));
    const std::string file = content(cache);
    std::istringstream stream(file);
    auto loaded = load<Element, Core>(stream);
    EXPECT_EQ(content(loaded), file);
    EXPECT_EQ(loaded.bytes(), cache.bytes());
    for (const range part : {range{25, 26}, {26, 40}})
      EXPECT_TRUE(same_bits(attend(loaded, tokens_of(tokens, part)), attend(cache, tokens_of(tokens, part))));
    EXPECT_EQ(content(loaded), content(cache));

    const auto refusal_of_file = []<class E, class C>(const std::string& from) {
      std::istringstream of(from);
      return refusal_of<std::runtime_error>([&] { (void)load<E, C>(of); });
    };
    using Other = std::conditional_t<std::is_same_v<Element, q8>, float, q8>;
    for (const std::string& message :
         {refusal_of_file.template operator()<float, float>(file), refusal_of_file.template operator()<Other, q8>(file)})
      EXPECT_EQ(message.find("cca: cache file: got elements of "), 0U) << message;
    for (std::size_t i = 0; i < file.size(); ++i) {
      std::string damaged = file;
      damaged[i] = static_cast<char>(damaged[i] ^ 0x10);
      ASSERT_NE((refusal_of_file.template operator()<Element, Core>(damaged)), "none") << i;
      if (i % 7 == 0) {
        ASSERT_NE((refusal_of_file.template operator()<Element, Core>(file.substr(0, i))), "none") << i;
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ rounding

/// Rows of whole numbers, the largest 127, times a power of two: 8 bits hold them without rounding.
void make_exact(const tensor_view<float>& rows, random_engine& random) {
  for_each_row(rows, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    const float scale = std::ldexp(1.0f, static_cast<int>(draw(random, -9, -6)));
    for (std::int64_t d = 0; d < rows.dim(); ++d)
      rows.row(b, h, i)[d] = scale * static_cast<float>(draw(random, -127, 127));
    rows.row(b, h, i)[draw(random, 0, rows.dim() - 1)] = 127 * scale;
  });
}

operands<float> exact_tokens(const cache_setup& setup, std::int64_t count, random_engine& random) {
  operands<float> tokens = random_tokens(setup, 1, count, random);
  make_exact(tokens.key.view(), random);
  make_exact(tokens.value.view(), random);
  return tokens;
}

/// Of rows that 8 bits hold a cache answers, to the bit, as one that keeps them as floats: a single token, a few and many,
/// with the window past the end of its memory.
TEST(QuantizedCache, IsToTheBitThatOfItsNumbers) {
  random_engine random(2);
  for (const cache_shape& shape : {cache_shape{.heads = 4, .kv_heads = 2, .dim = 40, .value_dim = 67},
                                   cache_shape{.heads = 6, .kv_heads = 1, .dim = 17, .value_dim = 3}})
    for (const options& options : {cca::options{.sink_tokens = 3},
                                   {.group_size = 4, .window = 16},
                                   {.group_size = 5, .window = 9, .sink_tokens = 7, .pool = pooling::mean}}) {
      const cache_setup setup{shape, options};
      const operands<float> tokens = exact_tokens(setup, 200, random);
      auto cache = setup.make<q8, q8>();
      auto floats = setup.make<float, q8>();
      for (std::int64_t done = 0; done < 200;) {
        const std::int64_t count = std::min<std::int64_t>(draw_from(random, std::array{1, 1, 2, 11, 60}), 200 - done);
        const token_views<float> next = tokens_of(tokens, {done, done + count});
        EXPECT_TRUE(same_bits(attend(cache, next), attend(floats, next))) << describe(setup) << ", " << done;
        done += count;
      }
    }
}

/// Tokens may come as rows of 8 bits with scales, of a layout of their own, or as 16 bits.
TEST(QuantizedCache, TakesRowsThatAreRoundedAlready) {
  random_engine random(3);
  const cache_setup setup{{.heads = 4, .kv_heads = 2, .dim = 24, .value_dim = 9}, {.group_size = 4, .window = 6}};
  const operands<float> tokens = random_tokens(setup, 1, 60, random);
  auto cache = setup.make<q8>(), rounded = setup.make<q8>(), halves = setup.make<q8>(), of_halves = setup.make<q8>();
  for (const range part : {range{0, 30}, {30, 31}, {31, 60}}) {
    const token_views<float> next = tokens_of(tokens, part);
    EXPECT_TRUE(same_bits(attend(rounded, rounded_tokens(next, random).views()), attend(cache, next)));
    EXPECT_EQ(content(rounded), content(cache));

    tensor<Eigen::bfloat16> key_bits(next.key.extent), value_bits(next.value.extent);
    tensor<float> key_numbers(next.key.extent), value_numbers(next.value.extent);
    const auto halve = [](const tensor_view<const float>& from, tensor<Eigen::bfloat16>& to, tensor<float>& numbers) {
      for_each_row(from, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        for (std::int64_t d = 0; d < from.dim(); ++d) {
          to.row(b, h, i)[d] = static_cast<Eigen::bfloat16>(from.row(b, h, i)[d]);
          numbers.row(b, h, i)[d] = static_cast<float>(to.row(b, h, i)[d]);
        }
      });
    };
    halve(next.key, key_bits, key_numbers);
    halve(next.value, value_bits, value_numbers);
    halves.append(next.query, key_bits.view(), value_bits.view());
    append(of_halves, token_views<float>{next.query, key_numbers.view(), value_numbers.view()});
    EXPECT_EQ(content(halves), content(of_halves));
  }
}

/// However a sequence is cut, what it holds is the same: tokens are rounded one by one, before they are pooled.
TEST(QuantizedCache, HoldsTheSameHoweverItIsCut) {
  random_engine random(4);
  const cache_setup setup =
      example_cache({.group_size = 3, .window = 4, .sink_tokens = 2, .pool = pooling::max}, {.capacity = 50});
  const operands<float> tokens = random_tokens(setup, 1, 50, random);
  auto whole = setup.make<q8>();
  append(whole, tokens_of(tokens, {0, 50}));
  for (std::int64_t chunk = 1; chunk < 50; ++chunk) {
    auto cache = setup.make<q8>();
    for (std::int64_t done = 0; done < 50; done += chunk)
      append(cache, tokens_of(tokens, {done, std::min<std::int64_t>(done + chunk, 50)}));
    EXPECT_EQ(content(cache), content(whole)) << chunk;
  }
}

/// Rows of zeros, and rows of which one element is huge.
TEST(QuantizedCache, HoldsRowsOfZerosAndHugeElements) {
  random_engine random(5);
  const cache_setup setup = example_cache({.group_size = 3, .window = 4});
  operands<float> tokens = random_tokens(setup, 1, 40, random);
  for_each_row(tokens.key.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    if (i % 4 == 0) std::fill_n(tokens.key.row(b, h, i), 5, 0.0f);
    if (i % 4 == 1) std::fill_n(tokens.value.row(b, h, i), 3, 0.0f);
    if (i % 4 == 2) tokens.value.row(b, h, i)[1] = 1e30f;
    if (i % 4 == 3) tokens.key.row(b, h, i)[4] = -1e4f;
  });
  attention_rule<float> rule;
  auto cache = setup.make<q8>();
  for (std::int64_t t = 0; t < 40; t += 4) {
    const range part{t, t + 4};
    rule.add(attend(cache, tokens_of(tokens, part)),
             textbook_of<q8, q8>(tokens_of(tokens, {0, t + 4}), 4, setup.options));
  }
  EXPECT_TRUE(rule.holds());
}

/// A NaN makes its row NaN: queries that see the token have it, others are as they were.
TEST(QuantizedCache, ShowsANaNToThoseThatSeeIt) {
  random_engine random(6);
  const cache_setup setup = example_cache({.window = 4});
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    operands<float> tokens = random_tokens(setup, 1, 30, random), clean = tokens;
    tokens.value.row(0, 1, 10)[2] = bad;
    auto cache = setup.make<q8>(), good = setup.make<q8>();
    for (std::int64_t t = 0; t < 30; ++t) {
      const results<float> got = attend(cache, tokens_of(tokens, {t, t + 1})),
                           want = attend(good, tokens_of(clean, {t, t + 1}));
      for (std::int64_t h = 0; h < 4; ++h)
        for (std::int64_t d = 0; d < 3; ++d) {
          const bool sees = h >= 2 && 10 <= t && t < 14;
          EXPECT_TRUE(sees ? std::isnan(got.out.row(0, h, 0)[d])
                           : same_bits(got.out.row(0, h, 0)[d], want.out.row(0, h, 0)[d]))
              << t << " " << h;
        }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ memory

TEST(QuantizedCache, TakesAQuarterOfTheBytes) {
  const cache_setup setup{{.heads = 2, .kv_heads = 2, .dim = 128}, {.group_size = 4, .window = 64}};
  random_engine random(7);
  const operands<float> tokens = random_tokens(setup, 1, 500, random);
  auto floats = setup.make<float>();
  auto cache = setup.make<q8>();
  append(floats, tokens_of(tokens, {0, 500}));
  append(cache, tokens_of(tokens, {0, 500}));
  EXPECT_LE(static_cast<double>(cache.bytes()), 0.27 * static_cast<double>(floats.bytes()));
  EXPECT_LE(static_cast<double>(cache.allocated_bytes()), 0.27 * static_cast<double>(floats.allocated_bytes()));
}

TEST(QuantizedCache, RefusesRowsWithoutScalesAndStaysAsItWas) {
  random_engine random(8);
  const cache_setup setup = example_cache({.group_size = 3, .window = 4});
  const operands<float> tokens = random_tokens(setup, 1, 9, random);
  auto cache = setup.make<q8>();
  append(cache, tokens_of(tokens, {0, 9}));
  const std::string before = content(cache);
  const std::vector<q8> rows(2 * 5, 1);
  const std::vector<float> scales(2, 1.0f);
  const inputs<float, q8> good{.query = tokens_of(tokens.query.view(), {0, 1}),
                               .key = bhsd(rows.data(), 1, 2, 1, 5),
                               .value = bhsd(rows.data(), 1, 2, 1, 3),
                               .key_scales = bhs(scales.data(), 1, 2, 1),
                               .value_scales = bhs(scales.data(), 1, 2, 1)};
  const auto expect_refused = [&](const std::string& message, const auto& change) {
    inputs<float, q8> in = good;
    change(in);
    const std::string refusal = refusal_of([&] { cache.append(in); });
    EXPECT_EQ(refusal.find("cca: " + message), 0U) << refusal;
    EXPECT_EQ(content(cache), before);
  };
  expect_refused("key_scales: got none", [](auto& in) { in.key_scales = {}; });
  expect_refused("value_scales: got none", [](auto& in) { in.value_scales = {}; });
  expect_refused("key_scales: got [1, 2, 2], wants extents [1, 2, 1]", [](auto& in) { in.key_scales.extent[2] = 2; });
  cache.append(good);
  EXPECT_EQ(cache.length(), 10);
}

}}  // namespace cca::test
