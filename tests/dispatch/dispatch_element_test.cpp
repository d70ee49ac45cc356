// Operands of 16 bits and rows of 8 bits through cca::dispatch: on every architecture, to the bit, what the floats of the same
// numbers give through it. (dispatch_test.cpp compares those with the program's own kernels.)

#include <cca/dispatch.hpp>
#include <cca/quantize.hpp>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "support.hpp"

namespace cca::test { namespace {

template <class To, class From, std::size_t Rank>
tensor<To, Rank> converted(const tensor<From, Rank>& from) {
  tensor<To, Rank> to(from.view().extent);
  for_each_row(from.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    std::transform(from.row(b, h, i), from.row(b, h, i) + row_size(from.view()), to.row(b, h, i),
                   [](From x) { return static_cast<To>(static_cast<float>(x)); });
  });
  return to;
}

/// A tensor of 16 bits, and the same numbers as floats.
template <class Element>
struct both {
  tensor<Element> elements;
  tensor<float> floats;

  both(const std::array<std::int64_t, 4>& extent, random_engine& random)
      : elements(extent), floats((elements.randomize(random), converted<float>(elements))) {}
};

/// What `call(operand, out, lse)` writes where `operand(x)` picks the elements, and where it picks the floats.
template <class Element, class Call>
testing::AssertionResult same_results(const sizes& s, const Call& call) {
  const std::array<std::int64_t, 4> extent{s.batch, s.heads, s.queries, s.value_dim};
  tensor<Element> out(extent);
  tensor<float> want(extent);
  tensor<float, 3> lse({s.batch, s.heads, s.queries}), want_lse({s.batch, s.heads, s.queries});
  call([](auto& x) { return x.elements.view(); }, out.view(), lse.view());
  call([](auto& x) { return x.floats.view(); }, want.view(), want_lse.view());
  if (!out.canaries_intact()) return out.canaries_intact();
  if (!same_bits(lse.view(), want_lse.view())) return testing::AssertionFailure() << "other log-sum-exps";
  return same_bits(converted<float>(out).view(), converted<float>(converted<Element>(want)).view());
}

template <class Element>
class DispatchElement : public testing::Test {
 protected:
  void TearDown() override { dispatch::use(before_); }

  random_engine random{1};

 private:
  std::string_view before_ = dispatch::architecture();
};
using elements_of_16_bits = testing::Types<Eigen::bfloat16, Eigen::half>;
TYPED_TEST_SUITE(DispatchElement, elements_of_16_bits);

constexpr sizes example_sizes{
    .batch = 2, .heads = 4, .kv_heads = 2, .queries = 53, .keys = 53, .dim = 19, .value_dim = 21};
constexpr options example_options{.group_size = 3, .window = 7, .core_heads = core_heads::per_kv_head};

template <class Element>
struct operands_of_16_bits {
  const sizes s = example_sizes;
  both<Element> query, key, value, far_key, far_value;
  tensor<std::int64_t, 3> seen{{s.batch, s.heads, s.queries}};

  explicit operands_of_16_bits(random_engine& random)
      : query({s.batch, s.heads, s.queries, s.dim}, random),
        key({s.batch, s.kv_heads, s.keys, s.dim}, random),
        value({s.batch, s.kv_heads, s.keys, s.value_dim}, random),
        far_key({s.batch, s.kv_heads, 9, s.dim}, random),
        far_value({s.batch, s.kv_heads, 9, s.value_dim}, random) {
    seen.fill(5);
  }
};

TYPED_TEST(DispatchElement, GivesWhatFloatsGive) {
  const operands_of_16_bits<TypeParam> o(this->random);
  const options raw{.window = 7};
  for (const std::string_view name : dispatch::architectures()) {
    SCOPED_TRACE(name);
    dispatch::use(name);
    EXPECT_TRUE(same_results<TypeParam>(o.s, [&](const auto& of, auto out, auto lse) {
      dispatch::attention(inputs{of(o.query), of(o.key), of(o.value)}, cca::results{out, lse}, example_options);
    }));
    EXPECT_TRUE(same_results<TypeParam>(o.s, [&](const auto& of, auto out, auto lse) {
      dispatch::attention(inputs{of(o.query), of(o.key), of(o.value)}, cca::results{out, lse}, raw);
    }));
    EXPECT_TRUE(same_results<TypeParam>(o.s, [&](const auto& of, auto out, auto lse) {
      dispatch::attention(inputs{of(o.query), of(o.key), of(o.value)}, cca::results{out, lse});
    }));
    EXPECT_TRUE(same_results<TypeParam>(o.s, [&](const auto& of, auto out, auto lse) {
      const inputs in{of(o.query), of(o.key), of(o.value)};
      const far_context context{of(o.far_key), of(o.far_value), o.seen.view()};
      std::vector<std::byte> workspace(dispatch::workspace_size(in, context, raw));
      dispatch::attend(in, context, cca::results{out, lse}, raw, {serial_executor{}, workspace});
    }));
    sizes cores = o.s;
    cores.heads = o.s.kv_heads;
    cores.queries = o.s.keys / 3;
    cores.value_dim = o.s.dim;
    EXPECT_TRUE(same_results<TypeParam>(cores, [&](const auto& of, auto out, auto) {
      std::vector<std::remove_reference_t<decltype(*out.data)>> values(static_cast<std::size_t>(2 * 2 * 17 * 21));
      dispatch::pool(of(o.query), of(o.key), of(o.value), out, bhsd(values.data(), 2, 2, 17, 21),
                     {.group_size = 3, .core_heads = core_heads::per_kv_head});
    }));
  }
}

TYPED_TEST(DispatchElement, GradientsAreThoseOfFloats) {
  const operands_of_16_bits<TypeParam> o(this->random);
  const sizes& s = o.s;
  const both<TypeParam> out({s.batch, s.heads, s.queries, s.value_dim}, this->random),
      grad_out({s.batch, s.heads, s.queries, s.value_dim}, this->random);
  tensor<float, 3> lse({s.batch, s.heads, s.queries});
  lse.randomize(this->random);
  const auto lse_in = std::as_const(lse).view();
  for (const std::string_view name : dispatch::architectures()) {
    SCOPED_TRACE(name);
    dispatch::use(name);
    const auto same = [&](const auto& call) {
      std::vector<tensor<float>> got, want;
      for (auto* results : {&got, &want})
        for (const auto* operand : {&o.query, &o.key, &o.value, &o.far_key, &o.far_value})
          results->emplace_back(operand->floats.view().extent).fill(0);
      call([](auto& x) { return x.elements.view(); }, got);
      call([](auto& x) { return x.floats.view(); }, want);
      for (std::size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(same_bits(got[i].view(), want[i].view())) << i;
    };
    const auto results_of = [&](const auto& of) { return cca::results{of(out), lse_in}; };
    same([&](const auto& of, auto& grad) {
      dispatch::attention_gradient(inputs{of(o.query), of(o.key), of(o.value)}, results_of(of), incoming{of(grad_out)},
                                   gradients{grad[0].view(), grad[1].view(), grad[2].view()}, example_options);
    });
    same([&](const auto& of, auto& grad) {
      dispatch::attend_gradient(
          inputs{of(o.query), of(o.key), of(o.value)}, far_context{of(o.far_key), of(o.far_value), o.seen.view()},
          results_of(of), incoming{of(grad_out)},
          gradients{grad[0].view(), grad[1].view(), grad[2].view(), grad[3].view(), grad[4].view()}, {.window = 7});
    });
    same([&](const auto& of, auto& grad) {
      dispatch::attention_gradient(inputs{of(o.query), of(o.key), of(o.value)}, results_of(of),
                                   incoming{of(grad_out), lse_in},
                                   gradients{grad[0].view(), grad[1].view(), grad[2].view()});
    });
  }
}

/// Tokens by the piece, each by another architecture: a cache moves there by file.
TYPED_TEST(DispatchElement, CachesAnswerAsAttentionDoes) {
  const operands_of_16_bits<TypeParam> o(this->random);
  const sizes& s = o.s;
  const cache_shape shape{
      .batch = s.batch, .heads = s.heads, .kv_heads = s.kv_heads, .dim = s.dim, .value_dim = s.value_dim};
  const auto rows = [](auto view, range part) {
    view.data = view.row(0, 0, part.begin);
    view.extent[2] = part.size();
    return view;
  };
  const std::vector<std::string_view> all = dispatch::architectures();
  for (std::size_t first = 0; first < all.size(); ++first) {
    SCOPED_TRACE(all[first]);
    dispatch::use(all[first]);
    dispatch::kv_cache<TypeParam> cache(shape, example_options);
    tensor<TypeParam> out({s.batch, s.heads, s.queries, s.value_dim});
    std::size_t moves = 0;
    for (const range part : {range{0, 40}, range{40, 41}, range{41, 53}}) {
      cache.attend(rows(o.query.elements.view(), part), rows(o.key.elements.view(), part),
                   rows(o.value.elements.view(), part), rows(out.view(), part));
      std::stringstream file;
      save(cache, file);
      dispatch::use(all[(first + ++moves) % all.size()]);
      cache = dispatch::load<TypeParam>(file);
    }
    EXPECT_EQ(cache.length(), 53);
    // One rounding of the result, and one of each core.
    tensor<TypeParam> whole({s.batch, s.heads, s.queries, s.value_dim});
    dispatch::attention(o.query.elements.view(), o.key.elements.view(), o.value.elements.view(), whole.view(),
                        example_options);
    const double eps = std::is_same_v<TypeParam, Eigen::half> ? 0x1p-10 : 0x1p-7;
    for_each_row(whole.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < s.value_dim; ++d)
        EXPECT_NEAR(static_cast<float>(out.row(b, h, i)[d]), static_cast<float>(whole.row(b, h, i)[d]), 4 * eps);
    });
  }
}

/// The option arrives: by the unit other numbers come out, near those of floats; a unit that is not there is refused as by
/// the headers.
TYPED_TEST(DispatchElement, TakesMatrixUnits) {
  const operands_of_16_bits<TypeParam> o(this->random);
  const auto query = o.query.elements.view(), key = o.key.elements.view(), value = o.value.elements.view();
  const auto result = [&](matrix_unit unit) {
    options options = example_options;
    options.unit = unit;
    tensor<TypeParam> out({o.s.batch, o.s.heads, o.s.queries, o.s.value_dim});
    std::vector<std::byte> workspace(dispatch::workspace_size(inputs{query, key, value}, options));
    dispatch::attention(query, key, value, out.view(), options, {serial_executor{}, workspace});
    return out;
  };
  const bool present = best_unit<TypeParam>() != matrix_unit::none;
  for (const std::string_view name : dispatch::architectures()) {
    SCOPED_TRACE(name);
    dispatch::use(name);
    const auto floats = result(matrix_unit::none), by_unit = result(matrix_unit::best);
    EXPECT_EQ(static_cast<bool>(same_bits(floats.view(), by_unit.view())), !present);
    for_each_row(floats.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < o.s.value_dim; ++d)
        EXPECT_NEAR(static_cast<float>(by_unit.row(b, h, i)[d]), static_cast<float>(floats.row(b, h, i)[d]), 0x1p-5);
    });
    if (best_unit<TypeParam>() != matrix_unit::amx) {
      EXPECT_THROW(static_cast<void>(result(matrix_unit::amx)), std::invalid_argument);
    }
    dispatch::kv_cache<TypeParam> cache({.heads = 1, .kv_heads = 1, .dim = 4}, {.unit = matrix_unit::best});
    EXPECT_EQ(cache.options().unit, matrix_unit::best);
  }
  if (!present) GTEST_SKIP() << "no unit for such elements here";
}

/// Rows of 8 bits with scales, powers of two, laid out in any way, and the floats that they are.
struct rows_of_8_bits {
  tensor<q8> elements;
  tensor<float, 3> scales;
  tensor<float> floats;

  rows_of_8_bits(const std::array<std::int64_t, 4>& e, random_engine& random)
      : elements(e, random_operand_layout(random)), scales({e[0], e[1], e[2]}, random_operand_layout(random)), floats(e) {
    elements.generate([&] { return static_cast<q8>(draw(random, -128, 127)); });
    scales.generate([&] { return std::ldexp(1.0f, static_cast<int>(draw(random, -9, -6))); });
    convert();
  }

  /// Elements up to 127, which every row has.
  void make_as_quantized() {
    for_each_row(elements.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      q8* const row = elements.row(b, h, i);
      std::replace(row, row + elements.view().dim(), q8{-128}, q8{-127});
      row[3] = 127;
    });
    convert();
  }

 private:
  void convert() {
    for_each_row(floats.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      for (std::int64_t d = 0; d < floats.view().dim(); ++d)
        floats.row(b, h, i)[d] = static_cast<float>(elements.row(b, h, i)[d]) * *scales.row(b, h, i);
    });
  }
};

/// Runs tests on every architecture.
class DispatchEverywhere : public testing::Test {
 protected:
  void TearDown() override { dispatch::use(before_); }

  template <class Test>
  void on_each_architecture(const Test& test) const {
    for (const std::string_view name : dispatch::architectures()) {
      SCOPED_TRACE(name);
      dispatch::use(name);
      test();
    }
  }

  random_engine random{2};

 private:
  std::string_view before_ = dispatch::architecture();
};
using DispatchRowsOf8Bits = DispatchEverywhere;
using DispatchIntegers = DispatchEverywhere;

/// Operands of a call with far context, keys and far rows in 8 bits or as floats.
struct operands_of_8_bits {
  sizes s = example_sizes;
  tensor<float> query;
  rows_of_8_bits key, value, far_key, far_value;
  tensor<std::int64_t, 3> seen{{s.batch, s.heads, s.queries}};

  explicit operands_of_8_bits(random_engine& random)
      : query({s.batch, s.heads, s.queries, s.dim}),
        key({s.batch, s.kv_heads, s.keys, s.dim}, random),
        value({s.batch, s.kv_heads, s.keys, s.value_dim}, random),
        far_key({s.batch, s.kv_heads, 9, s.dim}, random),
        far_value({s.batch, s.kv_heads, 9, s.value_dim}, random) {
    query.randomize(random);
    seen.fill(5);
  }

  [[nodiscard]] inputs<float> floats() const { return {query.view(), key.floats.view(), value.floats.view()}; }
  [[nodiscard]] inputs<float, q8> rows() const {
    return {.query = query.view(),
            .key = key.elements.view(),
            .value = value.elements.view(),
            .key_scales = key.scales.view(),
            .value_scales = value.scales.view()};
  }
  [[nodiscard]] far_context<float> far_floats() const {
    return {far_key.floats.view(), far_value.floats.view(), seen.view()};
  }
  [[nodiscard]] far_context<q8> far_rows() const {
    return {.key = far_key.elements.view(),
            .value = far_value.elements.view(),
            .seen = seen.view(),
            .key_scales = far_key.scales.view(),
            .value_scales = far_value.scales.view()};
  }
};

/// Of all queries, by a workspace of the size that the call says.
template <class Call>
cca::test::results<float> answers(const sizes& s, const Call& call) {
  return collect<float>(
      s, [&](tensor_view<float> out, lse_view<float> lse) { call(cca::results<float>{out, lse}); });
}

TEST_F(DispatchRowsOf8Bits, ViewsGiveWhatFloatsGive) {
  operands_of_8_bits o(random);
  const auto attention_of = [&](const auto& in, const options& options) {
    return answers(o.s, [&](const cca::results<float>& to) {
      std::vector<std::byte> workspace(dispatch::workspace_size(in, options));
      dispatch::attention(in, to, options, {serial_executor{}, workspace});
    });
  };
  const auto attend_of = [&](const auto& in, const auto& context, const options& options) {
    return answers(o.s, [&](const cca::results<float>& to) {
      std::vector<std::byte> workspace(dispatch::workspace_size(in, context, options));
      dispatch::attend(in, context, to, options, {serial_executor{}, workspace});
    });
  };
  on_each_architecture([&] {
    for (const options& options : {example_options, {.window = 7}, {}})
      EXPECT_TRUE(same_bits(attention_of(o.rows(), options), attention_of(o.floats(), options)));
    const options raw{.window = 7};
    const auto want = attend_of(o.floats(), o.far_floats(), raw);
    EXPECT_TRUE(same_bits(attend_of(o.rows(), o.far_rows(), raw), want));
    EXPECT_TRUE(same_bits(attend_of(o.floats(), o.far_rows(), raw), want));
    EXPECT_TRUE(same_bits(attend_of(o.rows(), o.far_floats(), raw), want));
  });
}

TEST_F(DispatchRowsOf8Bits, AreRefusedWithoutTheirScales) {
  const operands_of_8_bits o(random);
  tensor<float> out({o.s.batch, o.s.heads, o.s.queries, o.s.value_dim});
  on_each_architecture([&] {
    inputs<float, q8> in = o.rows();
    in.key_scales = {};
    EXPECT_EQ(refusal_of([&] { dispatch::attention(in, cca::results<float>{out.view()}); })
                  .find("cca: key_scales: got none, wants a scale for each row of key"),
              0U);
    far_context<q8> context = o.far_rows();
    context.value_scales.extent[2] = 8;
    EXPECT_EQ(refusal_of([&] { dispatch::attend(o.floats(), context, cca::results<float>{out.view()}); })
                  .find("cca: far.value_scales: got ["),
              0U);
  });
}

TEST_F(DispatchRowsOf8Bits, AreRoundedAsByTheHeaders) {
  tensor<float> rows({2, 3, 5, 37}, random_operand_layout(random));
  rows.randomize(random);
  rows.row(0, 1, 2)[3] = std::numeric_limits<float>::infinity();
  tensor<q8> want({2, 3, 5, 37}), got({2, 3, 5, 37});
  tensor<float, 3> want_scales({2, 3, 5}), scales({2, 3, 5});
  quantize(rows.view(), want.view(), want_scales.view());
  on_each_architecture([&] {
    got.fill(77);
    dispatch::quantize(rows.view(), got.view(), scales.view());
    EXPECT_TRUE(same_bits(scales.view(), want_scales.view()));
    for_each_row(got.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      EXPECT_TRUE(std::equal(got.row(b, h, i), got.row(b, h, i) + 37, want.row(b, h, i)));
    });
    EXPECT_THROW(dispatch::quantize(rows.view(), got.view(), scales.view().slice(0, 4)), std::invalid_argument);
  });
}

/// The tokens of a part of a sequence, with all that belongs to them.
template <class Row>
inputs<float, Row> part_of(inputs<float, Row> in, range part) {
  const auto cut = [&](auto& view) {
    if (view.data != nullptr) view = view.slice(part.begin, part.size());
  };
  cut(in.query), cut(in.key), cut(in.value), cut(in.key_scales), cut(in.value_scales);
  return in;
}

/// Tokens that 8 bits hold, as `quantize` makes them: a cache of q8 answers and holds the same whether they come as floats or as
/// rows with scales, and answers as a cache of floats where nothing is pooled. (dispatch_test.cpp compares caches of q8 with the
/// program's own.)
TEST_F(DispatchRowsOf8Bits, GiveWhatFloatsGive) {
  operands_of_8_bits o(random);
  const sizes& s = o.s;
  o.key.make_as_quantized();
  o.value.make_as_quantized();
  const cache_shape shape{
      .batch = s.batch, .heads = s.heads, .kv_heads = s.kv_heads, .dim = s.dim, .value_dim = s.value_dim};
  const auto ends_up = [&](auto& cache, const auto& in) {
    tensor<float> out({s.batch, s.heads, s.queries, s.value_dim});
    for (const range part : {range{0, 40}, range{40, 41}, range{41, 50}})  // a tile, a lone query, and few
      cache.attend(part_of(in, part), cca::results<float>{out.view().slice(part.begin, part.size())});
    cache.append(part_of(in, {50, 51}));
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const auto of_sequence = [&](range part) {
        auto one = part_of(in, part);
        const auto pick = [&](auto& view) {
          if (view.data != nullptr) view = view.sequence(b);
        };
        pick(one.query), pick(one.key), pick(one.value), pick(one.key_scales), pick(one.value_scales);
        return one;
      };
      cache.append(b, of_sequence({51, 52}));
      cache.attend(b, of_sequence({52, 53}), cca::results<float>{out.view().sequence(b).slice(52, 1)});
    }
    return out;
  };
  const auto file_of = [](const auto& cache) {
    std::ostringstream file;
    save(cache, file);
    return file.str();
  };
  for (const options& options : {cca::options{.window = 30}, {.group_size = 3, .window = 7, .sink_tokens = 2}}) {
    on_each_architecture([&] {
      dispatch::kv_cache<q8> of_rows(shape, options), of_floats(shape, options);
      dispatch::kv_cache<float> floats(shape, options);
      const auto got = ends_up(of_rows, o.rows());
      EXPECT_TRUE(same_bits(got.view(), ends_up(of_floats, o.floats()).view()));
      EXPECT_EQ(file_of(of_rows), file_of(of_floats));
      if (options.group_size == 0) {
        EXPECT_TRUE(same_bits(got.view(), ends_up(floats, o.floats()).view()));
      }
    });
  }
}

TEST_F(DispatchRowsOf8Bits, AreRefusedByCachesWithoutTheirScales) {
  const operands_of_8_bits o(random);
  const sizes& s = o.s;
  tensor<float> out({s.batch, s.heads, s.queries, s.value_dim});
  on_each_architecture([&] {
    dispatch::kv_cache<q8> cache({s.batch, s.heads, s.kv_heads, s.dim, s.value_dim}, {.window = 7});
    const auto expect_refused = [&](const auto& in, const std::string& message) {
      const auto refused = [&](const auto& call) { EXPECT_EQ(refusal_of(call).find("cca: " + message), 0U); };
      refused([&] { cache.append(in); });
      refused([&] { cache.attend(in, cca::results<float>{out.view()}); });
      EXPECT_EQ(cache.length(), 0);
    };
    inputs<float, q8> in = o.rows();
    in.key_scales = {};
    expect_refused(in, "key_scales: got none, wants a scale for each row of key");
    in = o.rows();
    --in.value_scales.extent[2];
    expect_refused(in, "value_scales: got [2, 2, 52], wants extents [2, 2, 53]");
    inputs<float> floats = o.floats();
    floats.key_scales = o.key.scales.view();
    expect_refused(floats, "key_scales: got [2, 2, 53], wants none: key has no elements of 8 bits");
  });
}

/// Integers, with each of what shapes or shifts scores: near the results of floats on every architecture, of operands of any
/// type and of rows of 8 bits; and not those of floats themselves. A cache takes them for its prompt.
TEST_F(DispatchIntegers, AreNearFloats) {
  if (!detail::has_unit<float>(matrix_unit::vnni)) GTEST_SKIP() << "no VNNI";
  const operands_of_8_bits o(random);
  const both<Eigen::bfloat16> query({2, 4, 53, 19}, random), key({2, 2, 53, 19}, random), value({2, 2, 53, 21}, random);
  const auto with_unit = [](options options) {
    options.unit = matrix_unit::vnni;
    return options;
  };
  const auto near_floats = [&](const auto& attend, const options& options) {
    const auto want = answers(o.s, [&](const auto& to) { attend(to, options); }),
               got = answers(o.s, [&](const auto& to) { attend(to, with_unit(options)); });
    double error = 0, size = 0;
    for_each_row(want.out.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      EXPECT_NEAR(*got.lse.row(b, h, i), *want.lse.row(b, h, i), 0.15);
      for (std::int64_t d = 0; d < o.s.value_dim; ++d) {
        const double expected = want.out.row(b, h, i)[d], difference = got.out.row(b, h, i)[d] - expected;
        error += difference * difference;
        size += expected * expected;
      }
    });
    EXPECT_GT(error, 0);
    EXPECT_LT(std::sqrt(error / size), 0.03);
  };
  tensor<float, 3> sinks({1, o.s.heads, 1}), slopes({1, o.s.heads, 1}), bias({1, 1, o.s.keys});
  sinks.fill(0.5f);
  slopes.fill(0.1f);
  bias.randomize(random, 1);
  on_each_architecture([&] {
    for (const options& options : std::initializer_list<cca::options>{
             {}, {.window = 20}, {.window = 9, .sink_tokens = 5}, {.lookahead = 7}, {.prefix = 11}, {.softcap = 2},
             {.group_size = 4, .window = 20}, {.group_size = 4, .window = 20, .core_bias = core_bias::entropy},
             {.group_size = 4, .window = 20, .core_heads = core_heads::per_kv_head, .softcap = 2}}) {
      SCOPED_TRACE(describe(options));
      near_floats([&](const auto& to, const auto& options_of) { dispatch::attention(o.rows(), to, options_of); },
                  options);
      near_floats([&](const auto& to, const auto& options_of) { dispatch::attention(o.floats(), to, options_of); },
                  options);
      inputs<float> shifted = o.floats();
      shifted.sink_logits = sinks.view();
      shifted.alibi_slopes = slopes.view();
      if (options.group_size == 0) shifted.key_bias = bias.view();
      near_floats([&](const auto& to, const auto& options_of) { dispatch::attention(shifted, to, options_of); },
                  options);
      near_floats(
          [&](const auto& to, const auto& options_of) {
            tensor<Eigen::bfloat16> out({2, 4, 53, 21});
            dispatch::attention(inputs{query.elements.view(), key.elements.view(), value.elements.view()},
                                cca::results{out.view(), to.lse}, options_of);
            for_each_row(to.out, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
              std::transform(out.row(b, h, i), out.row(b, h, i) + 21, to.out.row(b, h, i),
                             [](Eigen::bfloat16 x) { return static_cast<float>(x); });
            });
          },
          options);
    }
    near_floats([&](const auto& to, const auto& options) { dispatch::attend(o.rows(), o.far_rows(), to, options); },
                {.window = 7});
    near_floats(
        [&](const auto& to, const auto& options) {
          dispatch::kv_cache<q8> cache({.batch = 2, .heads = 4, .kv_heads = 2, .dim = 19, .value_dim = 21}, options);
          cache.attend(o.floats(), to);
        },
        {.window = 20});
  });
}

}}  // namespace cca::test
