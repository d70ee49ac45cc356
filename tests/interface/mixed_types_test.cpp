// Operands, results and cores of types that differ, which cca::dispatch does not take.

#include "kv_cache_life.hpp"

namespace cca::test { namespace {

/// The elements in another type.
template <class To, class From>
tensor<To> converted(const tensor<From>& from) {
  tensor<To> to(from.view().extent);
  for_each_row(from.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    std::transform(from.row(b, h, i), from.row(b, h, i) + from.view().dim(), to.row(b, h, i),
                   [](From x) { return static_cast<To>(x); });
  });
  return to;
}

/// Operands of any types are as good as all of them in the type that is computed in, and the result is rounded once.
template <class Query, class Key, class Value, class Out>
void expect_conversion(std::int64_t length) {
  using T = compute_type<Query, Key, Value>;
  const sizes s{.heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 9, .value_dim = 13};
  const options options{.group_size = 4, .window = 3};
  random_engine random(16);
  const operands<double> numbers = random_operands<double>(s, random);
  const tensor<Query> query = converted<Query>(numbers.query);
  const tensor<Key> key = converted<Key>(numbers.key);
  const tensor<Value> value = converted<Value>(numbers.value);
  tensor<Out> out({1, s.heads, s.queries, s.value_dim});
  tensor<float, 3> lse({1, s.heads, s.queries});
  attention(inputs{query.view(), key.view(), value.view()}, cca::results{out.view(), lse.view()}, options);

  const operands<T> same{converted<T>(query), converted<T>(key), converted<T>(value)};
  const results<T> expected = collect<T>(s, [&](tensor_view<T> to, lse_view<T> to_lse) {
    call({.entry = entry::attention, .sizes = s, .options = options},
         arguments<T>{.operands = {same.query.view(), same.key.view(), same.value.view()},
                      .results = {to, with_dim(to_lse)},
                      .seen = {}});
  });
  EXPECT_TRUE(same_bits(out.view(), converted<Out>(expected.out).view()));
  for (std::int64_t i = 0; i < s.queries; ++i)
    EXPECT_TRUE(same_bits(*lse.row(0, 0, i), static_cast<float>(*expected.lse.row(0, 0, i))));
}

// Types that all compute in double, to compile the float kernel once less.
TEST(AttentionOf, MixedElementTypes) {
  for (const std::int64_t length : {detail::most_few_queries, std::int64_t{120}}) {
    expect_conversion<float, double, float, float>(length);
    expect_conversion<double, float, float, double>(length);
  }
}

TEST(AttendOf, RefusesBiasesOfAnotherTypeThanIsComputedIn) {
  const sizes s{.heads = 4, .kv_heads = 2, .queries = 9, .keys = 9, .dim = 5, .value_dim = 3};
  random_engine random(12);
  const operands<float> o = random_operands<float>(s, random);
  tensor<float> out({1, 4, 9, 3});
  const tensor<double, 3> biases({1, 1, 9});
  tensor<std::int64_t, 3> seen({1, 4, 9});
  seen.fill(0);
  const inputs<float> in{o.query.view(), o.key.view(), o.value.view()};
  const cca::far_context<float, float, double> context{in.key, in.value, seen.view(), biases.view()};
  const std::string message = refusal_of([&] { attend(in, context, cca::results<float>{out.view()}); });
  EXPECT_NE(message.find("far.bias: got numbers of 8 bytes"), std::string::npos) << message;
}

// ----------------------------------------------------------------------------------------------------------- cores

template <class Types>
class KvCacheOf : public testing::Test {};
/// Elements and cores; kv_cache_test.cpp has those of one type.
using ElementTypes = testing::Types<std::pair<float, Eigen::bfloat16>, std::pair<float, Eigen::half>,
                                    std::pair<double, float>, std::pair<float, q8>>;
TYPED_TEST_SUITE(KvCacheOf, ElementTypes);

TYPED_TEST(KvCacheOf, AnswersLikeRecomputationAfterAnyOperations) {
  expect_answers_like_recomputation<typename TypeParam::first_type, typename TypeParam::second_type>();
}

/// A file of one type for tokens and cores says what it said before there could be two.
TEST(KvCacheFile, SaysItsTypes) {
  using detail::element_code;
  EXPECT_EQ((element_code::of<float, float>()), (element_code{4, 24}));
  EXPECT_EQ((element_code::of<double, double>()), (element_code{8, 53}));
  EXPECT_EQ((element_code::of<Eigen::bfloat16, Eigen::bfloat16>()), (element_code{2, 8}));
  const cache_setup setup = example_cache({.group_size = 3, .window = 4});
  const std::string plain = content(setup.make()), mixed = content(setup.make<float, Eigen::bfloat16>());
  const auto refusal = []<class Element, class Core>(const std::string& file) {
    std::istringstream stream(file);
    return refusal_of<std::runtime_error>([&] { (void)load<Element, Core>(stream); });
  };
  EXPECT_EQ((refusal.operator()<float, float>(plain)), "none");
  EXPECT_EQ((refusal.operator()<float, Eigen::bfloat16>(mixed)), "none");
  EXPECT_EQ(
      (refusal.operator()<float, Eigen::half>(mixed)),
      "cca: cache file: got elements of 4 bytes and 24 digits, cores of 2 bytes and 8 digits, wants elements of 4 "
      "bytes and 24 digits, cores of 2 bytes and 11 digits");
  for (const std::string& message :
       {refusal.operator()<float, float>(mixed), refusal.operator()<float, Eigen::bfloat16>(plain),
        refusal.operator()<Eigen::bfloat16, float>(mixed), refusal.operator()<double, double>(plain)})
    EXPECT_EQ(message.find("cca: cache file: got elements of 4 bytes and 24 digits"), 0U) << message;
}

}}  // namespace cca::test
