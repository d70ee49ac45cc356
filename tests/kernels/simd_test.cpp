// The vector functions below the kernels, at every size and over the whole range of numbers.

#include "support.hpp"

#include <set>

namespace cca::test {
namespace {

using namespace detail;

template <class T>
class Simd : public testing::Test {
 protected:
  static constexpr std::int64_t W = width<T>;
  static constexpr T infinity = std::numeric_limits<T>::infinity();
  static constexpr T least_exponent = 1 - exp2_constants<T>::bias;  // of the normal numbers

  /// A vector with the same number in every lane, or with those at `from`.
  struct lanes {
    alignas(alignment<T>) T at[W];

    explicit lanes(T x) { std::fill_n(at, W, x); }
    explicit lanes(vec<T> x) { x.store_aligned(at); }

    [[nodiscard]] vec<T> load() const { return vec<T>::load_aligned(at); }
  };

  static T exp2_of(T x) { return lanes(detail::exp2<T>(lanes(x).load())).at[0]; }

  /// The error of `power` as 2^x, in units of its last place.
  static double ulp(T x, T power) {
    const auto exact = std::exp2(static_cast<long double>(x));
    const auto unit = std::ldexp(static_cast<long double>(std::numeric_limits<T>::epsilon()), std::ilogb(exact));
    return static_cast<double>(std::fabs(static_cast<long double>(power) - exact) / unit);
  }

  /// The largest error at the arguments `x(0), .. x(count-1)`, as many at a time as there are lanes.
  template <class Arguments>
  static double worst_ulp(std::int64_t count, const Arguments& x) {
    double worst = 0;
    for (std::int64_t i = 0; i < count; i += W) {
      lanes arguments(T(0));
      for (std::int64_t lane = 0; lane < W; ++lane) arguments.at[lane] = x(std::min(i + lane, count - 1));
      const lanes powers(detail::exp2<T>(arguments.load()));
      for (std::int64_t lane = 0; lane < W; ++lane) worst = std::max(worst, ulp(arguments.at[lane], powers.at[lane]));
    }
    return worst;
  }
};

TYPED_TEST_SUITE(Simd, precisions);

// ------------------------------------------------------------------------------------------------------------- exp2

TYPED_TEST(Simd, Exp2IsWithinTwoUlp) {
  using T = TypeParam;
  using integer = typename exp2_constants<T>::integer;
  constexpr T last = TestFixture::least_exponent;
  constexpr integer steps = 300'000;
  const auto evenly = [&](std::int64_t i) { return last * static_cast<T>(i) / static_cast<T>(steps); };
  EXPECT_LE(this->worst_ulp(steps + 1, evenly), 2);
  // The bit patterns from -0 on: every exponent alike.
  const integer first_bits = std::bit_cast<integer>(T(-0.0)),
                step = (std::bit_cast<integer>(last) - first_bits) / steps;
  const auto by_bits = [&](std::int64_t i) { return std::bit_cast<T>(first_bits + static_cast<integer>(i) * step); };
  EXPECT_LE(this->worst_ulp(steps + 1, by_bits), 2);
}

/// Where rounding to an integer turns.
TYPED_TEST(Simd, Exp2IsWithinTwoUlpAroundHalves) {
  using T = TypeParam;
  std::vector<T> arguments;
  for (T x = -T(0.5); x > TestFixture::least_exponent; x -= T(0.5))
    for (const T towards : {x, T(0), -TestFixture::infinity}) arguments.push_back(std::nextafter(x, towards));
  const auto nth = [&](std::int64_t i) { return arguments[static_cast<std::size_t>(i)]; };
  EXPECT_LE(this->worst_ulp(std::ssize(arguments), nth), 2);
}

TYPED_TEST(Simd, Exp2OfIntegersIsExact) {
  using T = TypeParam;
  for (T x = 0; x >= TestFixture::least_exponent; --x)
    EXPECT_EQ(this->exp2_of(x), std::ldexp(T(1), static_cast<int>(x))) << x;
}

TYPED_TEST(Simd, Exp2OfTheSmallestArguments) {
  using T = TypeParam;
  using limits = std::numeric_limits<T>;
  for (const T x : {T(0), T(-0.0), -limits::denorm_min(), -limits::min(), -limits::epsilon() / 4})
    EXPECT_EQ(this->exp2_of(x), 1) << x;
}

TYPED_TEST(Simd, Exp2EndsWithTheNormalNumbers) {
  using T = TypeParam;
  using limits = std::numeric_limits<T>;
  constexpr T least = TestFixture::least_exponent;
  EXPECT_EQ(this->exp2_of(least), limits::min());
  for (const T x : {std::nextafter(least, T(-5000)), least - T(0.5), least - 1, least - 2, 2 * least, T(-1e9), T(-1e30),
                    limits::lowest(), -TestFixture::infinity})
    EXPECT_TRUE(same_bits(this->exp2_of(x), T(0))) << x;
}

TYPED_TEST(Simd, Exp2OfNanIsNan) {
  using T = TypeParam;
  using integer = typename exp2_constants<T>::integer;
  const integer exponent = std::bit_cast<integer>(TestFixture::infinity);
  for (int payload = 0; payload < exp2_constants<T>::mantissa_bits; ++payload)
    for (const T sign : {T(1), T(-1)}) {
      const T nan = std::copysign(std::bit_cast<T>(exponent | integer(1) << payload), sign);
      const typename TestFixture::lanes all(detail::exp2<T>(typename TestFixture::lanes(nan).load()));
      for (const T lane : all.at) EXPECT_TRUE(std::isnan(lane)) << "payload bit " << payload;
    }
}

TYPED_TEST(Simd, Exp2KeepsLanesApart) {
  using T = TypeParam;
  for (std::int64_t lane = 0; lane < this->W; ++lane)
    for (const T x : {std::numeric_limits<T>::quiet_NaN(), -TestFixture::infinity, T(-3)}) {
      typename TestFixture::lanes argument(T(-1));
      argument.at[lane] = x;
      const typename TestFixture::lanes result(detail::exp2<T>(argument.load()));
      for (std::int64_t i = 0; i < this->W; ++i) {
        if (i == lane) continue;
        EXPECT_EQ(result.at[i], T(0.5));
      }
    }
}

// ------------------------------------------------------------------------------------------- parts and sums of vectors

TYPED_TEST(Simd, PartsOfVectors) {
  using T = TypeParam;
  for (std::int64_t n = 0; n < this->W; ++n) {
    tensor<T> from({1, 1, 1, n}), to = from;
    random_engine random(1);
    from.randomize(random);
    const vec<T> x = load_partial<T>(from.row(0, 0, 0), n);
    const typename TestFixture::lanes loaded(x);
    for (std::int64_t i = 0; i < this->W; ++i)
      EXPECT_TRUE(same_bits(loaded.at[i], i < n ? from.row(0, 0, 0)[i] : T(0))) << i << " of " << n;
    store_partial<T>(to.row(0, 0, 0), x, n);
    EXPECT_TRUE(to.canaries_intact());
    for (std::int64_t i = 0; i < n; ++i) EXPECT_EQ(to.row(0, 0, 0)[i], from.row(0, 0, 0)[i]);
  }
}

TYPED_TEST(Simd, SumOfLanes) {
  using T = TypeParam;
  typename TestFixture::lanes powers(T(0));
  for (std::int64_t i = 0; i < this->W; ++i) powers.at[i] = std::ldexp(T(1), static_cast<int>(i));
  EXPECT_EQ(reduce_add<T>(powers.load()), std::ldexp(T(1), static_cast<int>(this->W)) - 1);
}

TYPED_TEST(Simd, FindsAnyNumberThatIsNotFinite) {
  using T = TypeParam;
  for (std::int64_t n = 0; n <= 3 * this->W; ++n) {
    std::vector<T> row(static_cast<std::size_t>(n + 1), std::numeric_limits<T>::max());
    row.back() = std::numeric_limits<T>::quiet_NaN();  // behind the end
    EXPECT_TRUE(all_finite(row.data(), n)) << n;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i)
      for (const T x : {TestFixture::infinity, -TestFixture::infinity, std::numeric_limits<T>::quiet_NaN()}) {
        const T before = std::exchange(row[i], x);
        EXPECT_FALSE(all_finite(row.data(), n)) << x << " at " << i << " of " << n;
        row[i] = before;
      }
  }
}

// -------------------------------------------------------------------------------------------------------- transpose

template <class From, class To>
void expect_transposes() {
  random_engine random(2);
  for (std::int64_t rows = 1; rows <= 37; ++rows)
    for (std::int64_t columns = 1; columns <= 37; ++columns) {
      const layout padded{.padding = draw(random, 0, 3)};
      tensor<From> from({1, 1, rows, columns}, padded);
      tensor<To> to({1, 1, columns, rows}, padded);
      from.randomize(random);
      transpose(from.row(0, 0, 0), from.view().stride[2], to.row(0, 0, 0), to.view().stride[2], rows, columns);
      ASSERT_TRUE(to.canaries_intact()) << rows << " x " << columns;
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j)
          ASSERT_EQ(to.row(0, 0, j)[i], static_cast<To>(from.row(0, 0, i)[j])) << rows << " x " << columns;
    }
}

TEST(Transpose, OfEverySize) {
  expect_transposes<float, float>();
  expect_transposes<double, double>();
}

TEST(Transpose, ConvertsElements) {
  expect_transposes<float, double>();
  expect_transposes<double, float>();
}

TEST(RowBlocks, CoverEveryRowOnce) {
  for (std::int64_t count = 0; count <= 40; ++count) {
    std::vector<int> times(static_cast<std::size_t>(count));
    for_row_blocks<6>(count, [&](auto rows, std::int64_t i) {
      EXPECT_LE(rows(), 6);
      for (std::int64_t r = 0; r < rows(); ++r) ++times.at(static_cast<std::size_t>(i + r));
    });
    EXPECT_EQ(std::count(times.begin(), times.end(), 1), count);
  }
}

// -------------------------------------------------------------------------------------------------- the row kernel

/// Every dim up to past two full register blocks, and every remainder of the rows.
template <class T>
constexpr std::int64_t greatest_dim = 17 * width<T> + 3;

TYPED_TEST(Simd, DotRowsIsExactForEveryDim) {
  using T = TypeParam;
  random_engine random(3);
  for (std::int64_t dim = 1; dim <= greatest_dim<T>; ++dim) {
    for (const std::int64_t count :
         {std::int64_t{1}, std::int64_t{2}, std::int64_t{3}, std::int64_t{4}, std::int64_t{64}}) {
      tensor<T> keys({1, 1, count, dim}, {.padding = draw(random, 0, 3)}), logits({1, 1, 1, count});
      keys.randomize(random);
      alignas(64) T query[greatest_dim<T> + width<T>] = {};
      std::normal_distribution<double> normal;
      std::generate_n(query, dim, [&] { return static_cast<T>(normal(random)); });
      dot_rows<T>(query, {keys.row(0, 0, 0), keys.view().stride[2]}, dim, count, logits.row(0, 0, 0));
      ASSERT_TRUE(logits.canaries_intact());

      const Eigen::Map<const reference::vector<T>> q(query, dim);
      for (std::int64_t j = 0; j < count; ++j) {
        const Eigen::Map<const reference::vector<T>> k(keys.row(0, 0, j), dim);
        const auto exact = q.template cast<exact_type<T>>().dot(k.template cast<exact_type<T>>());
        // Whatever the order of the sum, no rounding error is larger.
        const auto size = q.cwiseAbs().dot(k.cwiseAbs());
        ASSERT_LE(distance(logits.row(0, 0, 0)[j], exact),
                  static_cast<T>(dim) * std::numeric_limits<T>::epsilon() * size)
            << "dim " << dim << ", row " << j << " of " << count;
      }
    }
  }
}

TYPED_TEST(Simd, AddWeightedRowsIsExactForEveryDim) {
  using T = TypeParam;
  random_engine random(4);
  for (std::int64_t dim = 1; dim <= greatest_dim<T>; ++dim)
    for (const std::int64_t count : {1, 2, 5}) {
      tensor<T> rows({1, 1, count, dim}, {.padding = draw(random, 0, 3)}), sum({1, 1, 1, dim});
      tensor<T> weights({1, 1, 1, count});
      rows.randomize(random);
      sum.randomize(random);
      weights.randomize(random);
      const tensor<T> before = sum;
      const T rescale = T(0.75);
      add_weighted_rows<T>(weights.row(0, 0, 0), {rows.row(0, 0, 0), rows.view().stride[2]}, dim, count, rescale,
                           sum.row(0, 0, 0));
      ASSERT_TRUE(sum.canaries_intact());
      for (std::int64_t d = 0; d < dim; ++d) {
        exact_type<T> exact = static_cast<exact_type<T>>(before.row(0, 0, 0)[d]) * rescale, size = std::fabs(exact);
        for (std::int64_t j = 0; j < count; ++j) {
          const auto term = static_cast<exact_type<T>>(weights.row(0, 0, 0)[j]) * rows.row(0, 0, j)[d];
          exact += term;
          size += std::fabs(term);
        }
        ASSERT_LE(distance(sum.row(0, 0, 0)[d], exact),
                  static_cast<exact_type<T>>(count + 1) * std::numeric_limits<T>::epsilon() * size)
            << "dim " << dim << ", element " << d;
      }
    }
}

/// Logits absorbed in pieces give the weights, and the sum, of all of them at once.
TYPED_TEST(Simd, RowSoftmaxInPieces) {
  using T = TypeParam;
  random_engine random(5);
  for (std::int64_t count = 1; count <= row_block; ++count) {
    alignas(64) T logits[2 * row_block];
    std::normal_distribution<double> normal(0, 3);
    std::vector<T> all;
    row_softmax<T> softmax;
    exact_type<T> scaled = 1;  // what is left of a weight of the first piece
    for (int piece = 0; piece < 3; ++piece) {
      std::generate_n(logits, count, [&] { return static_cast<T>(normal(random)); });
      all.insert(all.end(), logits, logits + count);
      const T rescale = softmax.absorb(logits, count, T(1));
      if (piece > 0) scaled *= static_cast<exact_type<T>>(rescale);
      for (std::int64_t j = 0; j < count; ++j) {
        const T logit = all[static_cast<std::size_t>(piece * count + j)];
        EXPECT_EQ(logits[j], this->exp2_of(logit - softmax.maximum));
      }
    }
    EXPECT_EQ(softmax.maximum, *std::max_element(all.begin(), all.end()));
    exact_type<T> sum = 0;
    for (const T logit : all) sum += std::exp2(static_cast<exact_type<T>>(logit) - softmax.maximum);
    // Two ulp of each exp2, half a one of the difference in its argument, up to 20, and of every addition.
    const auto bound = static_cast<exact_type<T>>(22 + std::ssize(all)) * std::numeric_limits<T>::epsilon() * sum;
    EXPECT_LE(distance(softmax.sum, sum), bound);
    const T first = *std::max_element(all.begin(), all.begin() + count);
    EXPECT_LE(distance(scaled, std::exp2(static_cast<exact_type<T>>(first) - softmax.maximum)),
              22 * std::numeric_limits<T>::epsilon());
  }
}

// ------------------------------------------------------------------------------------------------------------- memory

/// Every line of the rows is asked for once, in the order of memory, at the pace that was set: by those who always ask and,
/// where these would have to ask for many lines, by others as often.
TEST(WantedMemory, AsksForAllLinesInTime) {
  const std::vector<char> memory(1 << 20);
  for (const std::int64_t rows : {1, 3, 4, 33, 128})
    for (const std::int64_t dim : {1, 16, 33, 128, 192})  // the last lie one behind the other
      for (const auto& [asks, others] : {std::pair(1, true), {1, false}, {64, true}, {64, false}, {1000, true}}) {
        const auto* const data = reinterpret_cast<const float*>(memory.data());
        wanted_memory wanted;
        std::set<std::uintptr_t> missing;
        for (const std::int64_t first : {0, 65536}) {
          wanted.want({data + first, 192, dim, {2, 2 + rows}});
          for (std::int64_t j = 2; j < 2 + rows; ++j)
            for (std::int64_t d = 0; d < dim; d += 16) missing.insert(reinterpret_cast<std::uintptr_t>(data + first + j * 192 + d));
        }
        const auto lines = static_cast<std::int64_t>(missing.size());
        wanted.pace(asks, others);
        EXPECT_EQ(wanted.hurried(), others && lines > 4 * asks);
        const std::int64_t in_time = wanted.hurried() ? 2 * asks : asks;
        std::int64_t calls = 0, most = 0, asked = 0;
        std::uintptr_t last = 0;
        for (; !missing.empty() && calls < 10000; ++calls) {
          const std::int64_t before = asked;
          wanted.next_lines([&](std::uintptr_t line) {
            ++asked;
            EXPECT_EQ(missing.erase(line), 1);
            EXPECT_GT(line, last);
            last = line;
          });
          most = std::max(most, asked - before);
        }
        EXPECT_TRUE(missing.empty()) << rows << " rows of " << dim << " in " << asks << " calls";
        EXPECT_LE(calls, std::max(in_time, lines / 32 + 1)) << rows << " rows of " << dim << " in " << asks << " calls";
        EXPECT_LE(most, 32);
        wanted.next_lines([&](std::uintptr_t) { FAIL() << "asked for more"; });
        wanted.want({data, 192, dim, {0, rows}});
        wanted.pace(asks, others);
        wanted.clear();
        wanted.next_lines([&](std::uintptr_t) { FAIL() << "asked for what was forgotten"; });
      }
}

}  // namespace
}  // namespace cca::test
