// Operands and results of 16 bits. They are computed with in float, so every result has to be, to the bit, that of the
// same call on the same numbers as floats, rounded to nearest where it is stored in 16 bits.

#include "gradient_entry_points.hpp"

#include <cca/kv_cache.hpp>

namespace {

using namespace cca;
using namespace cca::test;

template <class Element>
float as_float(Element x) {
  return static_cast<float>(x);
}

template <class T>
struct types_of;
template <class Query, class Key, class Value, class Out>
struct types_of<std::tuple<Query, Key, Value, Out>> {
  using query = Query;
  using key = Key;
  using value = Value;
  using out = Out;
};

using Eigen::bfloat16, Eigen::half;

template <class Types>
class ElementTest : public testing::Test {};

using element_types = testing::Types<std::tuple<bfloat16, bfloat16, bfloat16, bfloat16>,
                                     std::tuple<half, half, half, half>, std::tuple<float, half, bfloat16, float>>;
TYPED_TEST_SUITE(ElementTest, element_types);

/// Memory in the layout of a view of the extents, with elements of another type.
template <class To>
std::vector<To> converted(tensor_view<const float> from) {
  std::vector<To> to;
  for_each_row(from, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < from.dim(); ++d) to.push_back(static_cast<To>(from.row(b, h, i)[d]));
  });
  return to;
}

template <class T>
tensor_view<T> view_of(std::vector<T>& memory, const extents& e) {
  return bhsd(memory.data(), e[0], e[1], e[2], e[3]);
}

template <class T>
tensor_view<const T> view_of(const std::vector<T>& memory, const extents& e) {
  return bhsd(memory.data(), e[0], e[1], e[2], e[3]);
}

/// Rounds the elements to those of a 16-bit type.
template <class Element>
void round_to(tensor<float>& t) {
  for_each_row(t.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < row_size(t.view()); ++d) t.row(b, h, i)[d] = as_float(Element(t.row(b, h, i)[d]));
  });
}

template <class Element>
testing::AssertionResult same_numbers(tensor_view<const float> want, const std::vector<Element>& got) {
  const std::vector<Element> rounded = converted<Element>(want);
  for (std::size_t i = 0; i < rounded.size(); ++i)
    if (!same_bits(as_float(rounded[i]), as_float(got[i])))
      return testing::AssertionFailure() << as_float(got[i]) << " where " << as_float(rounded[i]) << " is right, at "
                                         << i;
  return testing::AssertionSuccess();
}

/// Sizes that reach every path: a single query, few and many, one tile and several, grouped heads, dims with and without
/// tails.
std::vector<sizes> some_sizes() {
  return {{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 90, .dim = 33, .value_dim = 20},
          {.batch = 1, .heads = 2, .kv_heads = 1, .queries = 150, .keys = 150, .dim = 64, .value_dim = 48},
          {.batch = 1, .heads = 3, .kv_heads = 3, .queries = 40, .keys = 300, .dim = 17, .value_dim = 128},
          {.batch = 1, .heads = 2, .kv_heads = 2, .queries = 1, .keys = 1100, .dim = 201, .value_dim = 67}};
}

template <class Types>
struct element_call {
  using types = types_of<Types>;
  using query_type = typename types::query;
  using key_type = typename types::key;
  using value_type = typename types::value;
  using out_type = typename types::out;

  problem p;
  gradient_memory<float> floats;
  std::vector<query_type> query;
  std::vector<key_type> key, far_key;
  std::vector<value_type> value, far_value;

  element_call(const problem& of, random_engine& random) : p(of), floats(of) {
    for (std::size_t i = 0; i < floats.operands.size(); ++i) floats.operands[i].randomize(random);
    round_to<query_type>(floats.operands[0]);
    for (std::size_t i = 1; i < floats.forward_operands(); ++i)
      i % 2 == 1 ? round_to<key_type>(floats.operands[i]) : round_to<value_type>(floats.operands[i]);
    floats.forward();
    query = converted<query_type>(operand(0));
    key = converted<key_type>(operand(1));
    value = converted<value_type>(operand(2));
    if (p.entry != entry::attend) return;
    far_key = converted<key_type>(operand(3));
    far_value = converted<value_type>(operand(4));
  }

  [[nodiscard]] tensor_view<const float> operand(std::size_t i) const { return floats.operands[i].view(); }
  [[nodiscard]] auto q() const { return view_of(query, operand(0).extent); }
  [[nodiscard]] auto k() const { return view_of(key, operand(1).extent); }
  [[nodiscard]] auto v() const { return view_of(value, operand(2).extent); }
  [[nodiscard]] auto far_rows() const {
    return far_context{view_of(far_key, operand(3).extent), view_of(far_value, operand(4).extent), floats.seen.view()};
  }

  void forward(tensor_view<out_type> out, lse_view<float> lse) const {
    const cca::results to{out, lse};
    if (p.entry == entry::attend) return attend(inputs{q(), k(), v()}, far_rows(), to, p.options);
    if (p.entry == entry::attention) return attention(inputs{q(), k(), v()}, to, p.options);
    local_attention(inputs{q(), k(), v()}, to, p.options);
  }

  /// With the output and gradients in floats.
  void gradient(std::vector<std::vector<float>>& grads) const {
    const std::size_t first = floats.forward_operands();
    const cca::results of{operand(first), without_dim(operand(first + 1))};
    const incoming from{operand(first + 2), without_dim(operand(first + 3))};
    const auto grad = [&](std::size_t i) { return view_of(grads[i], operand(i).extent); };
    if (p.entry == entry::attend)
      attend_gradient(inputs{q(), k(), v()}, far_rows(), of, from,
                      gradients{grad(0), grad(1), grad(2), grad(3), grad(4)}, p.options);
    else if (p.entry == entry::attention)
      attention_gradient(inputs{q(), k(), v()}, of, from, gradients{grad(0), grad(1), grad(2)}, p.options);
    else
      local_attention_gradient(inputs{q(), k(), v()}, of, from, gradients{grad(0), grad(1), grad(2)}, p.options);
  }
};

constexpr std::array entries{entry::local, entry::attention, entry::attend};

TYPED_TEST(ElementTest, AttendsAsFloatsDo) {
  using call = element_call<TypeParam>;
  random_engine random(1);
  for (const entry entry : entries)
    for (const sizes& s : some_sizes()) {
      call c(example(entry, s), random);
      SCOPED_TRACE(testing::Message() << c.p);
      const extents of_out = result_extents(c.p)[0], of_lse = result_extents(c.p)[1];
      std::vector<typename call::out_type> out(
          converted<typename call::out_type>(c.operand(c.floats.forward_operands())).size());
      std::vector<float> lse(static_cast<std::size_t>(of_lse[0] * of_lse[1] * of_lse[2]));
      c.forward(view_of(out, of_out), without_dim(view_of(lse, of_lse)));
      EXPECT_TRUE(same_numbers(c.operand(c.floats.forward_operands()), out));
      EXPECT_TRUE(same_numbers(c.operand(c.floats.forward_operands() + 1), lse));
    }
}

TYPED_TEST(ElementTest, GradientsAreThoseOfFloats) {
  random_engine random(2);
  for (const entry entry : entries)
    for (const sizes& s : some_sizes()) {
      element_call<TypeParam> c(example(entry, s), random);
      SCOPED_TRACE(testing::Message() << c.p);
      std::vector<std::vector<float>> grads;
      for (std::size_t i = 0; i < c.floats.forward_operands(); ++i)
        grads.emplace_back(converted<float>(c.operand(i)).size());
      c.gradient(grads);
      c.floats.gradient();
      for (std::size_t i = 0; i < grads.size(); ++i)
        EXPECT_TRUE(same_numbers(c.floats.results[i].view(), grads[i])) << "gradient " << i;
    }
}

TYPED_TEST(ElementTest, PoolsAsFloatsDo) {
  using call = element_call<TypeParam>;
  random_engine random(3);
  for (const pooling pooling : all_poolings)
    for (const core_heads cores : all_core_heads) {
      problem p = example(entry::pool, some_sizes()[1]);
      p.options.group_size = 40;  // more than the rows that are converted at a time
      p.options.pool = pooling;
      p.options.window = pool_window(pooling, 70);
      p.options.core_heads = cores;
      call c(p, random);
      SCOPED_TRACE(testing::Message() << p);
      argument_memory<float> floats(p);
      for (std::size_t i = 0; i < 3; ++i) copy(c.operand(i), floats.operands[i].view());
      test::call(p, floats.arguments());
      std::vector<typename call::out_type> core_key, core_value;
      core_key.resize(converted<float>(floats.results[0].view()).size());
      core_value.resize(converted<float>(floats.results[1].view()).size());
      pool(c.q(), c.k(), c.v(), view_of(core_key, result_extents(p)[0]), view_of(core_value, result_extents(p)[1]),
           p.options);
      EXPECT_TRUE(same_numbers(floats.results[0].view(), core_key));
      EXPECT_TRUE(same_numbers(floats.results[1].view(), core_value));
      // What is selected was stored in so many bits, and is none but that.
      for (std::size_t r = 0; r < 2 && (pooling == pooling::select || pooling == pooling::select_by_mass); ++r)
        for_each_row(floats.results[r].view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          const float* core = floats.results[r].row(b, h, i);
          const std::int64_t dim = floats.results[r].view().dim();
          bool stored = false;
          for (std::int64_t j = 40 * i; j < 40 * (i + 1); ++j)
            stored = stored || std::equal(core, core + dim, c.operand(r + 1).row(b, 0, j));
          EXPECT_TRUE(stored) << r << " " << h << " " << i;
        });

      std::vector<std::vector<float>> grads;
      for (std::size_t i = 0; i < 3; ++i) grads.emplace_back(converted<float>(c.operand(i)).size());
      const auto grad = [&](std::size_t i) { return view_of(grads[i], c.operand(i).extent); };
      pool_gradient(inputs{c.q(), c.k(), c.v()}, cca::cores{c.operand(3), c.operand(4)},
                    gradients{grad(0), grad(1), grad(2)}, p.options);
      c.floats.gradient();
      for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(same_numbers(c.floats.results[i].view(), grads[i]));
    }
}

/// A cache of 16 bits answers, to the bit, as one of floats of the same numbers whose cores are of the same type, with many
/// queries and with one.
template <class Element, class Core>
void check_cache() {
  random_engine random(4);
  for (const std::int64_t kv_heads : {1, 3})
    for (const core_heads cores : all_core_heads) {
      const std::int64_t heads = 3, length = 300, dim = 40, value_dim = 67;
      const auto tokens = [&](std::int64_t h, std::int64_t d) {
        std::normal_distribution<float> normal;
        std::vector<Element> all(static_cast<std::size_t>(h * length * d));
        std::generate(all.begin(), all.end(), [&] { return Element(normal(random)); });
        return all;
      };
      const std::vector<Element> query = tokens(heads, dim), key = tokens(kv_heads, dim),
                                 value = tokens(kv_heads, value_dim);
      const auto answers = [&]<class T>(kv_cache<T, Core> cache) {
        const auto floats = [](const std::vector<Element>& of) { return std::vector<T>(of.begin(), of.end()); };
        const std::vector<T> q = floats(query), k = floats(key), v = floats(value);
        const auto part = [&](const std::vector<T>& of, std::int64_t h, std::int64_t d, std::int64_t t,
                              std::int64_t count) {
          auto view = bhsd(of.data(), 1, h, length, d);
          view.data = view.row(0, 0, t);
          view.extent[2] = count;
          return view;
        };
        std::vector<float> out(static_cast<std::size_t>(heads * length * value_dim));
        const auto attend = [&](std::int64_t t, std::int64_t count) {
          auto to = bhsd(out.data(), 1, heads, length, value_dim);
          to.data = to.row(0, 0, t);
          to.extent[2] = count;
          cache.attend(part(q, heads, dim, t, count), part(k, kv_heads, dim, t, count),
                       part(v, kv_heads, value_dim, t, count), to);
        };
        std::int64_t t = 0;
        for (; t < length / 2; t += 10) attend(t, 10);
        for (; t < length; t += 3) attend(t, 1), attend(t + 1, 2);
        return out;
      };
      const cache_shape shape{.heads = heads, .kv_heads = kv_heads, .dim = dim, .value_dim = value_dim};
      const options options{.group_size = 4, .window = 16, .core_heads = cores};
      const std::vector<float> got = answers(kv_cache<Element, Core>(shape, options)),
                               want = answers(kv_cache<float, Core>(shape, options));
      for (std::size_t i = 0; i < got.size(); ++i) ASSERT_TRUE(same_bits(got[i], want[i])) << i;
    }
}

TEST(CacheTest, OfBfloat16) {
  check_cache<bfloat16, bfloat16>();
  check_cache<bfloat16, float>();
}
TEST(CacheTest, OfHalf) {
  check_cache<half, half>();
  check_cache<half, float>();
}
TEST(CacheTest, OfBfloat16AndHalf) { check_cache<bfloat16, half>(); }

/// Every number of 16 bits, at every place in a block and in the rest after it.
template <class Element>
void check_conversion() {
  std::vector<Element> all;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half_bits = static_cast<std::uint16_t>(bits);
    all.push_back(std::bit_cast<Element>(half_bits));
  }
  std::vector<float> wide(all.size() + 1, 7.0f);
  for (std::size_t shift = 0; shift < 40; ++shift) {
    cca::detail::convert(all.data() + shift, static_cast<std::int64_t>(all.size() - shift), wide.data() + shift);
    for (std::size_t i = shift; i < all.size(); ++i) {
      const float want = as_float(all[i]);
      ASSERT_TRUE(std::isnan(want) ? std::isnan(wide[i]) : same_bits(want, wide[i])) << std::hex << i;
    }
    ASSERT_EQ(wide.back(), 7.0f);
  }
}

TEST(ConvertTest, EveryBfloat16) { check_conversion<bfloat16>(); }
TEST(ConvertTest, EveryHalf) { check_conversion<half>(); }

/// The form that processors without an instruction for it use.
TEST(ConvertTest, EveryHalfFromItsBits) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half_bits = static_cast<std::uint16_t>(bits);
    const float want = as_float(std::bit_cast<half>(half_bits)), got = cca::detail::float_of_half(half_bits);
    ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : same_bits(want, got)) << std::hex << bits;
  }
}

}  // namespace
