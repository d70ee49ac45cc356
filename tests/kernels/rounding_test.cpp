// The rounding to 16 bits, bit by bit.

#include "support.hpp"

#include <bit>
#include <cca/detail/product/pairs.hpp>
#include <cca/detail/simd/convert.hpp>

namespace cca::test { namespace {

/// The bits that a float is rounded to, by a function of vectors.
template <class Element>
std::uint16_t vector_rounding(float x) {
  constexpr auto W = static_cast<std::size_t>(detail::width<float>);
  alignas(detail::alignment<float>) std::array<float, W> lanes;
  lanes.fill(1.0f);
  const std::size_t lane = std::bit_cast<std::uint32_t>(x) % W;
  lanes[lane] = x;
  alignas(detail::alignment<float>) std::array<std::uint32_t, W> bits;
  detail::round_to_elements<Element>(detail::vec<float>::load_aligned(lanes.data())).store_aligned(bits.data());
  EXPECT_LE(bits[lane], 0xffffu) << x;
  return static_cast<std::uint16_t>(bits[lane]);
}

/// The same by the conversion that results are stored with.
template <class Element>
std::uint16_t stored_rounding(float x) {
  Element to;
  detail::convert(&x, 1, &to);
  return std::bit_cast<std::uint16_t>(to);
}

enum class ties { away_from_zero, to_even };

/// Every number of 16 bits, what lies halfway to the next, and what lies just beside that.
template <class Element, class Round>
void check_rounding(ties ties, const Round& round) {
  constexpr std::uint16_t infinite = detail::largest_exponent<Element>;
  for (std::uint32_t i = 0; i < 2u * infinite; ++i) {
    const auto magnitude = static_cast<std::uint16_t>(i / 2), sign = static_cast<std::uint16_t>(i % 2 << 15);
    const auto bits = static_cast<std::uint16_t>(magnitude | sign), next = static_cast<std::uint16_t>(bits + 1);
    const float x = static_cast<float>(std::bit_cast<Element>(bits));
    // What would follow the largest number if its exponent were not that of infinity.
    float step = static_cast<float>(std::bit_cast<Element>(next)) - x;
    if (magnitude + 1 == infinite)
      step = x - static_cast<float>(std::bit_cast<Element>(static_cast<std::uint16_t>(bits - 1)));
    const float tie = x + step / 2;
    const bool denormal = magnitude < (infinite & static_cast<std::uint16_t>(-infinite));
    // Between denormals of half, a detour over floats of their own exponents loses what is smaller than this.
    const float beside = denormal && std::is_same_v<Element, Eigen::half> ? std::copysign(0x1p-36f, step) : 0.0f;
    const float below = beside != 0 ? tie - beside : std::nextafter(tie, 0.0f);
    const float above = beside != 0 ? tie + beside : std::nextafter(tie, 2 * tie);
    ASSERT_EQ(round(x), bits) << x;
    ASSERT_EQ(round(below), bits) << "just below the middle of " << x << " and the next";
    ASSERT_EQ(round(above), next) << "just above the middle of " << x << " and the next";
    const bool stays = ties == ties::to_even && bits % 2 == 0;
    ASSERT_EQ(round(tie), stays ? bits : next) << "in the middle of " << x << " and the next";
  }
  for (const float sign : {1.0f, -1.0f}) {
    const auto infinity = static_cast<std::uint16_t>(infinite | (sign < 0 ? 0x8000 : 0));
    ASSERT_EQ(round(sign * std::numeric_limits<float>::infinity()), infinity);
    ASSERT_EQ(round(sign * std::numeric_limits<float>::max()), infinity);
  }
}

/// Whatever the payload of a NaN, it stays one: those whose payload carries into the sign, or lies in the bits that go.
template <class Element, class Round>
void check_nan(const Round& round) {
  constexpr std::uint16_t infinite = detail::largest_exponent<Element>;
  for (std::uint32_t i = 0; i < 23 * 23 * 2; ++i) {
    const std::uint32_t payload = (1u << i % 23) | (1u << i / 23 % 23), sign = i / 529 << 31;
    for (const std::uint32_t bits : {payload, 0x7fffffu ^ (payload & 0x3fffffu), 0x400000u | payload, 0x7fffffu}) {
      const std::uint16_t got = round(std::bit_cast<float>(0x7f800000u | sign | bits));
      ASSERT_TRUE((got & 0x7fff) > infinite) << std::hex << (0x7f800000u | sign | bits) << " became " << got;
    }
  }
}

#if defined(__AVX512F__)
constexpr ties ties_of_half = ties::to_even;  // the instruction's
#else
constexpr ties ties_of_half = ties::away_from_zero;
#endif

TEST(Rounding, OfVectorsToBfloat16) {
  check_rounding<Eigen::bfloat16>(ties::away_from_zero, vector_rounding<Eigen::bfloat16>);
  check_nan<Eigen::bfloat16>(vector_rounding<Eigen::bfloat16>);
}
TEST(Rounding, OfVectorsToHalf) {
  check_rounding<Eigen::half>(ties_of_half, vector_rounding<Eigen::half>);
  check_nan<Eigen::half>(vector_rounding<Eigen::half>);
}
TEST(Rounding, OfResults) {
  check_rounding<Eigen::bfloat16>(ties::to_even, stored_rounding<Eigen::bfloat16>);
  check_nan<Eigen::bfloat16>(stored_rounding<Eigen::bfloat16>);
  check_rounding<Eigen::half>(ties::to_even, stored_rounding<Eigen::half>);
  check_nan<Eigen::half>(stored_rounding<Eigen::half>);
}

}}  // namespace cca::test
