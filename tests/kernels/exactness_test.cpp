// What has to be exact where floats are not: masks of rows whose numbers no float holds.

#include "entry_points.hpp"
#if defined(CCA_TEST_UNITS)
#include "unit_entry_points.hpp"
#endif

namespace cca::test { namespace {

constexpr std::int64_t far_row = std::int64_t{1} << 24;  // the first whose successor is no float

/// Queries behind 2^24 rows, each of which sees five: keys are zeros, so that each answers with the mean of its five values.
/// Values differ from row to row, so that a row too many, or another, shows.
template <class T, class Element, class Call>
void check_far_rows(std::int64_t queries, const Call& call) {
  const std::int64_t keys = far_row + 2000, first = far_row + 1001;
  std::vector<Element> value(static_cast<std::size_t>(keys));
  const auto value_of = [](std::int64_t j) { return static_cast<double>(j % 97); };  // exact in 8 bits of mantissa
  for (std::int64_t j = 0; j < keys; ++j)
    value[static_cast<std::size_t>(j)] = static_cast<Element>(static_cast<float>(value_of(j)));
  const Element zero(0);
  tensor<T> out({1, 1, queries, 1}), lse({1, 1, queries, 1});
  const problem p{.entry = entry::local,
                  .sizes = {.queries = queries, .keys = keys},
                  .options = {.window = 5, .first_position = first}};
  call(p,
       std::vector{tensor_view<const Element>{&zero, {1, 1, queries, 1}, {0, 0, 0, 1}},
                   tensor_view<const Element>{&zero, {1, 1, keys, 1}, {0, 0, 0, 1}},
                   tensor_view<const Element>{value.data(), {1, 1, keys, 1}, {0, 0, 1, 1}}},
       std::vector{out.view(), lse.view()});
  for (std::int64_t i = 0; i < queries; ++i) {
    double mean = 0;
    for (std::int64_t j = first + i - 4; j <= first + i; ++j) mean += value_of(j) / 5;
    EXPECT_NEAR(static_cast<double>(*out.row(0, 0, i)), mean, 1e-4) << "query " << i << " of " << queries;
    EXPECT_NEAR(static_cast<double>(*lse.row(0, 0, i)), std::log(5.0), 1e-6) << "query " << i << " of " << queries;
  }
}

constexpr std::array<std::int64_t, 3> query_counts{3, 20, 200};  // few, a tile, and a stack

TEST(FarRows, OfFloats) {
  for (const std::int64_t queries : query_counts)
    check_far_rows<float, float>(queries, [](const problem& p, const auto& operands, const auto& results) {
      call(p, arguments<float>{.operands = operands, .results = results, .seen = {}});
    });
}

#if defined(CCA_TEST_UNITS)  // whose kernels are compiled for the newest instruction set alone
TEST(FarRows, OfAMatrixUnit) {
  if (!detail::has_unit<Eigen::bfloat16>(matrix_unit::avx512_bf16)) GTEST_SKIP() << "no AVX-512 BF16";
  for (const std::int64_t queries : query_counts)
    check_far_rows<float, Eigen::bfloat16>(queries, [](problem p, const auto& operands, const auto& results) {
      p.options.unit = matrix_unit::avx512_bf16;
      call(p, unit_arguments<Eigen::bfloat16>{.operands = operands, .seen = {}, .results = results});
    });
}
#endif

}}  // namespace cca::test
