// Several rows that are not finite in one block of a matrix unit: each is left out of the products by itself, and reaches
// exactly the queries, or keys, that see it.

#include "unit_entry_points.hpp"

#include "amx_emulator.hpp"

namespace cca::test { namespace {

using Eigen::bfloat16, Eigen::half;

template <class Element>
class UnitRows : public testing::Test {
 protected:
  static constexpr std::int64_t length = 200, dim = 40;  // less than a block of any unit, and several tiles
  static constexpr float nan = std::numeric_limits<float>::quiet_NaN(),
                         infinity = std::numeric_limits<float>::infinity();

  static void SetUpTestSuite() {
    auto& present = detail::present_units();
    if (!present.amx_bf16 && install_amx_emulator()) present.amx_bf16 = present.amx_fp16 = true;
  }

  void SetUp() override {
    for (const matrix_unit unit : {matrix_unit::avx512_bf16, matrix_unit::amx})
      if (detail::has_unit<Element>(unit)) units.push_back(unit);
    if (units.empty()) GTEST_SKIP() << "no unit for such elements, and none can be emulated here";
    random_engine random(1);
    for (tensor<Element>& t : operands) t.randomize(random);
    grad_out.randomize(random);
  }

  [[nodiscard]] unit_arguments<Element> arguments() const {
    unit_arguments<Element> a{.operands = {}, .seen = {}, .results = {}};
    for (const tensor<Element>& t : operands) a.operands.push_back(t.view());
    return a;
  }

  [[nodiscard]] problem with(matrix_unit unit) const {
    return {.entry = entry::local,
            .sizes = {.queries = length, .keys = length, .dim = dim, .value_dim = dim},
            .options = {.unit = unit}};
  }

  /// The output, of dense attention.
  tensor<float> forward(matrix_unit unit) {
    tensor<float> out({1, 1, length, dim});
    lse = tensor<float>({1, 1, length, 1});
    unit_arguments<Element> a = arguments();
    a.results = {out.view(), lse.view()};
    call(with(unit), a);
    return out;
  }

  /// The gradients of query, key and value, for an output and log-sum-exps that were computed before.
  std::array<tensor<float>, 3> backward(matrix_unit unit, const tensor<float>& out) {
    const extents e{1, 1, length, dim};
    std::array grad{tensor<float>(e), tensor<float>(e), tensor<float>(e)};
    unit_arguments<Element> a = arguments();
    for (tensor<float>& g : grad) a.results.push_back(g.view());
    a.out = out.view();
    a.lse = without_dim(std::as_const(lse).view());
    a.grad_out = grad_out.view();
    call_gradient(with(unit), a);
    return grad;
  }

  std::vector<matrix_unit> units;
  std::array<tensor<Element>, 3> operands{tensor<Element>({1, 1, length, dim}), tensor<Element>({1, 1, length, dim}),
                                          tensor<Element>({1, 1, length, dim})};
  tensor<Element> grad_out{{1, 1, length, dim}};
  tensor<float> lse{{1, 1, length, 1}};
};

using unit_elements = testing::Types<bfloat16, half>;
TYPED_TEST_SUITE(UnitRows, unit_elements);

/// Neighbours in a pair, in a chunk, in two chunks, first and last.
constexpr std::array<std::pair<std::int64_t, std::int64_t>, 4> row_pairs{{{6, 7}, {31, 32}, {10, 40}, {0, 199}}};

TYPED_TEST(UnitRows, ValuesOfTwo) {
  for (const matrix_unit unit : this->units) {
    const tensor<float> want = this->forward(unit);
    for (const auto& [first, second] : row_pairs)
      for (const float bad : {this->nan, this->infinity}) {
        const std::array clean = this->operands;
        this->operands[2].row(0, 0, first)[3] = TypeParam(bad);
        this->operands[2].row(0, 0, second)[5] = TypeParam(-bad);
        const tensor<float> got = this->forward(unit);
        this->operands = clean;
        for (std::int64_t t = 0; t < this->length; ++t)
          for (std::int64_t d = 0; d < this->dim; ++d) {
            const bool shown = (d == 3 && t >= first) || (d == 5 && t >= second);
            const float x = got.row(0, 0, t)[d];
            ASSERT_TRUE(shown || std::isfinite(x)) << first << " or " << second << " reaches query " << t;
            ASSERT_TRUE(!shown || !std::isfinite(x)) << first << " or " << second << " is hidden from query " << t;
            // Before either is seen nothing changes by a bit.
            ASSERT_TRUE(t >= first || same_bits(x, want.row(0, 0, t)[d])) << t;
          }
      }
  }
}

/// The gradient of a query is of the keys that it sees, and those of a key and value of the queries that see it.
TYPED_TEST(UnitRows, GradientsOfTwo) {
  for (const matrix_unit unit : this->units) {
    const tensor<float> out = this->forward(unit);
    const auto want = this->backward(unit, out);
    for (const auto& [first, second] : row_pairs)
      for (const std::size_t spoilt : {0u, 1u, 3u}) {  // queries, keys, or gradients of the output
        const std::array clean = this->operands;
        const tensor<TypeParam> clean_grad = this->grad_out;
        tensor<TypeParam>& victim = spoilt == 3 ? this->grad_out : this->operands[spoilt];
        for (const std::int64_t j : {first, second}) victim.row(0, 0, j)[3] = TypeParam(this->nan);
        const auto got = this->backward(unit, out);
        this->operands = clean;
        this->grad_out = clean_grad;
        for (std::int64_t t = 0; t < this->length; ++t) {
          const auto is_nan = [&](std::size_t of) { return std::isnan(got[of].row(0, 0, t)[3]); };
          const auto unchanged = [&](std::size_t of) {
            const float* x = got[of].row(0, 0, t);
            return std::equal(x, x + this->dim, want[of].row(0, 0, t));
          };
          const bool is_one = t == first || t == second;
          if (spoilt == 1) {  // seen by the queries from the first on
            ASSERT_EQ(is_nan(0), t >= first) << "key " << first << " or " << second << ", query " << t;
            ASSERT_TRUE(t >= first || unchanged(0)) << "key " << first << " reaches query " << t;
          } else {  // queries that see the keys up to their own
            ASSERT_TRUE(t > second || is_nan(1)) << "query " << second << " is hidden from key " << t;
            ASSERT_TRUE(t <= second || unchanged(1)) << "query " << second << " reaches key " << t;
            ASSERT_TRUE(t <= second || unchanged(2)) << "query " << second << " reaches value " << t;
            ASSERT_TRUE(is_one ? is_nan(0) : unchanged(0)) << "query " << first << " or " << second << " at " << t;
          }
        }
      }
  }
}

}}  // namespace cca::test
