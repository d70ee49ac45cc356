// Views: which element an index means, in each layout that has a factory.

#include "support.hpp"

#include <map>

namespace cca::test { namespace {

static_assert(std::is_trivially_copyable_v<tensor_view<double>> && std::is_trivially_copyable_v<lse_view<float>>);
static_assert(std::is_trivially_copyable_v<tensor_view<const float>>);
static_assert(std::is_convertible_v<tensor_view<float>, tensor_view<const float>>);
static_assert(!std::is_convertible_v<tensor_view<const float>, tensor_view<float>>, "constness is not cast away");
static_assert(!std::is_convertible_v<tensor_view<float>, tensor_view<const double>>, "elements are not converted");

/// Numbers in the order of memory.
std::vector<float> numbers(std::int64_t count) {
  std::vector<float> all(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<float>(i);
  return all;
}

/// Calls `f(b, h, i, d)` for every element.
template <class View, class F>
void for_each_element(const View& view, const F& f) {
  for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < row_size(view); ++d) f(b, h, i, d);
  });
}

TEST(View, BhsdIsBatchHeadsLengthDim) {
  auto memory = numbers(2 * 3 * 5 * 7);
  const auto view = bhsd(memory.data(), 2, 3, 5, 7);
  EXPECT_EQ(view.extent, (std::array<std::int64_t, 4>{2, 3, 5, 7}));
  for_each_element(view, [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    EXPECT_EQ(view.row(b, h, i)[d], static_cast<float>(((b * 3 + h) * 5 + i) * 7 + d));
  });
}

TEST(View, BshdIsBatchLengthHeadsDim) {
  auto memory = numbers(2 * 3 * 5 * 7);
  const auto view = bshd(memory.data(), 2, 5, 3, 7);
  EXPECT_EQ(view.extent, (std::array<std::int64_t, 4>{2, 3, 5, 7})) << "the order of the extents is always the same";
  for_each_element(view, [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    EXPECT_EQ(view.row(b, h, i)[d], static_cast<float>(((b * 5 + i) * 3 + h) * 7 + d));
  });
}

TEST(View, BhsIsBatchHeadsLength) {
  auto memory = numbers(2 * 3 * 5);
  const auto view = bhs(memory.data(), 2, 3, 5);
  EXPECT_EQ(view.extent, (std::array<std::int64_t, 3>{2, 3, 5}));
  for_each_element(view, [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t) {
    EXPECT_EQ(*view.row(b, h, i), static_cast<float>((b * 3 + h) * 5 + i));
  });
}

using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Whether the view of a matrix has its coefficients, where they lie.
template <class View, class Matrix>
void expect_same_elements(const View& view, const Matrix& m) {
  ASSERT_EQ(view.extent, (std::array<std::int64_t, 4>{1, 1, m.rows(), m.cols()}));
  for (Eigen::Index i = 0; i < m.rows(); ++i)
    for (Eigen::Index d = 0; d < m.cols(); ++d) EXPECT_EQ(view.row(0, 0, i) + d, &m.coeffRef(i, d));
}

TEST(View, OfAMatrixHasItsCoefficients) {
  row_major m(5, 7);
  expect_same_elements(matrix(m), m);
  const row_major& constant = m;
  static_assert(std::is_same_v<decltype(matrix(m)), tensor_view<float>>);
  static_assert(std::is_same_v<decltype(matrix(constant)), tensor_view<const float>>);
  expect_same_elements(matrix(constant), m);

  Eigen::Matrix<double, 3, 4, Eigen::RowMajor> fixed;
  expect_same_elements(matrix(fixed), fixed);
}

TEST(View, OfAMapOrABlockHasItsCoefficients) {
  auto memory = numbers(5 * 11);
  Eigen::Map<row_major, 0, Eigen::OuterStride<>> map(memory.data(), 5, 7, Eigen::OuterStride<>(11));
  expect_same_elements(matrix(map), map);

  auto block = map.block(1, 2, 3, 4);
  expect_same_elements(matrix(block), block);
  EXPECT_EQ(*matrix(block).row(0, 0, 2), 3 * 11 + 2);
  expect_same_elements(matrix(map.middleRows(2, 2)), map.middleRows(2, 2));
}

TEST(View, OfAMapWithInnerStrideSaysSo) {
  auto memory = numbers(60);
  Eigen::Map<row_major, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> map(
      memory.data(), 5, 3, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(12, 2));
  EXPECT_EQ(matrix(map).stride[3], 2) << "which the entry points refuse";
}

TEST(View, StridesMayBeNegativeOrZero) {
  auto memory = numbers(6);
  const tensor_view<float> backwards{memory.data() + 4, {1, 1, 3, 2}, {0, 0, -2, 1}};
  EXPECT_EQ(*backwards.row(0, 0, 0), 4);
  EXPECT_EQ(*backwards.row(0, 0, 2), 0);
  const tensor_view<float> broadcast{memory.data(), {9, 1, 3, 2}, {0, 0, 2, 1}};
  EXPECT_EQ(broadcast.row(8, 0, 1), broadcast.row(0, 0, 1));
}

TEST(View, OffsetsHave64Bits) {
  constexpr std::int64_t stride = (std::int64_t{1} << 32) + 1;
  char first = 0;
  const tensor_view<char> view{&first, {4, 4, 4, 1}, {stride, 2 * stride, 3 * stride, 1}};
  EXPECT_EQ(reinterpret_cast<std::intptr_t>(view.row(3, 2, 1)) - reinterpret_cast<std::intptr_t>(&first), 10 * stride);
}

TEST(View, OfConstElementsIsTheSameMemory) {
  auto memory = numbers(8);
  const tensor_view<float> view = bhsd(memory.data(), 1, 2, 2, 2);
  const tensor_view<const float> constant = view;
  EXPECT_EQ(constant.data, view.data);
  EXPECT_EQ(constant.extent, view.extent);
  EXPECT_EQ(constant.stride, view.stride);
}

/// Model buffers: [batch][capacity][heads][dim], of which some tokens are filled, and all of one projection's heads in one.
TEST(View, SlicesAreTheirTokensAndHeads) {
  auto memory = numbers(2 * 5 * 6 * 3);
  const auto whole = bshd(memory.data(), 2, 5, 6, 3);
  const auto lse = bhs(memory.data(), 2, 6, 5);
  for (std::int64_t first = 0; first <= 6; ++first)
    for (std::int64_t count = 0; count <= 6 - first; ++count) {
      if (first + count <= 5) {
        const auto tokens = whole.slice(first, count);
        const auto of_lse = lse.slice(first, count);
        EXPECT_EQ(tokens.extent, (std::array<std::int64_t, 4>{2, 6, count, 3}));
        EXPECT_EQ(of_lse.extent, (std::array<std::int64_t, 3>{2, 6, count}));
        EXPECT_EQ(tokens.stride, whole.stride);
        for_each_row(tokens, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
          EXPECT_EQ(tokens.row(b, h, i), whole.row(b, h, first + i));
          EXPECT_EQ(of_lse.row(b, h, i), lse.row(b, h, first + i));
        });
      }
      const auto heads = whole.slice_heads(first, count);
      EXPECT_EQ(heads.extent, (std::array<std::int64_t, 4>{2, count, 5, 3}));
      for_each_row(heads, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        EXPECT_EQ(heads.row(b, h, i), whole.row(b, first + h, i));
      });
    }
}

TEST(View, SlicesOutOfRangeAreRefused) {
  const auto whole = bshd<float>(nullptr, 2, 5, 6, 3);
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  const auto expect_refused = [](const std::string& message, const auto& f) {
    const std::string refusal = refusal_of(f);
    EXPECT_EQ(refusal.find(message), 0U) << refusal;
  };
  for (const std::pair<std::int64_t, std::int64_t>& part : std::array<std::pair<std::int64_t, std::int64_t>, 7>{
           {{-1, 1}, {0, 7}, {7, 0}, {1, -1}, {6, 1}, {most, most}, {1, most}}}) {
    const std::int64_t first = part.first, count = part.second;
    const std::string got =
        ": got " + std::to_string(count) + " from " + std::to_string(first) + " on, wants a part of ";
    expect_refused("cca: slice of tokens" + got + "[0, 5)", [&] { (void)whole.slice(first, count); });
    expect_refused("cca: slice of heads" + got + "[0, 6)", [&] { (void)whole.slice_heads(first, count); });
  }
  expect_refused("cca: slice of tokens", [&] { (void)whole.slice(0, 6); });
  // Without elements there is no pointer to move.
  EXPECT_EQ(whole.slice(2, 3).data, nullptr);
  EXPECT_EQ(bhsd<float>(nullptr, 1, 1, 0, 4).slice(0, 0).data, nullptr);
}

TEST(View, OfPackedSequencesHasTheTokensBetweenTheOffsets) {
  auto memory = numbers(12 * 3 * 2);
  const std::vector<std::int64_t> offsets{1, 4, 4, 12};
  const auto view = packed(memory.data(), offsets, 3, 2);
  const auto lse = packed(memory.data(), offsets, 3);
  EXPECT_EQ(view.extent, (std::array<std::int64_t, 4>{3, 3, 8, 2})) << "the longest";
  EXPECT_EQ(lse.extent, (std::array<std::int64_t, 3>{3, 3, 8}));
  for (const auto& [b, length] : std::map<std::int64_t, std::int64_t>{{0, 3}, {1, 0}, {2, 8}}) {
    EXPECT_EQ(view.length(b), length);
    EXPECT_EQ(lse.length(b), length);
  }
  for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t token = offsets[static_cast<std::size_t>(b)] + i;
    EXPECT_EQ(*view.row(b, h, i), static_cast<float>((token * 3 + h) * 2));
    EXPECT_EQ(*lse.row(b, h, i), static_cast<float>(h * 12 + token));
  });
  EXPECT_TRUE(packed(memory.data(), std::vector<std::int64_t>{0}, 3, 2).empty());
  EXPECT_TRUE(packed(memory.data(), std::vector<std::int64_t>{5, 5, 5}, 3, 2).empty());
}

TEST(View, WithLengthsHasTheFirstTokensOfEachSequence) {
  auto memory = numbers(2 * 5 * 3 * 2);
  const std::vector<std::int64_t> lengths{5, 2};
  const auto whole = bshd(memory.data(), 2, 5, 3, 2), view = whole.with_lengths(lengths);
  EXPECT_FALSE(whole.has_lengths());
  EXPECT_EQ(whole.length(1), 5);
  EXPECT_EQ(view.length(1), 2);
  EXPECT_EQ(view.extent, whole.extent);
  for_each_row(
      view, [&](std::int64_t b, std::int64_t h, std::int64_t i) { EXPECT_EQ(view.row(b, h, i), whole.row(b, h, i)); });
  EXPECT_EQ(bhs(memory.data(), 2, 3, 5).with_lengths(lengths).length(1), 2);
  const tensor_view<const float> constant = view;
  EXPECT_EQ(constant.length(1), 2);
  EXPECT_EQ(view.slice_heads(1, 2).length(1), 2);
}

TEST(View, OfASequenceIsABatchOfOne) {
  auto memory = numbers(12 * 3 * 2);
  const std::vector<std::int64_t> offsets{1, 4, 4, 12}, begins{2, 0}, ends{4, 1};
  tensor_view<float> front = bhsd(memory.data(), 2, 3, 4, 2);  // padded before its tokens
  front.begins = begins.data();
  front.ends = ends.data();
  for (const auto& all : {packed(memory.data(), offsets, 3, 2), bhsd(memory.data(), 2, 3, 4, 2), front})
    for (std::int64_t b = 0; b < all.batch(); ++b) {
      const auto one = all.sequence(b);
      EXPECT_FALSE(one.has_lengths());
      EXPECT_EQ(one.extent, (std::array<std::int64_t, 4>{1, 3, all.length(b), 2}));
      for_each_row(
          one, [&](std::int64_t, std::int64_t h, std::int64_t i) { EXPECT_EQ(one.row(0, h, i), all.row(b, h, i)); });
    }
  EXPECT_EQ(packed<float>(nullptr, offsets, 3, 2).sequence(2).data, nullptr);
}

TEST(View, LengthsThatDoNotFitAreRefused) {
  const std::vector<std::int64_t> offsets{0, 4, 9}, none;
  const auto view = packed<float>(nullptr, offsets, 3, 2);
  EXPECT_EQ(refusal_of([&] { (void)view.slice(0, 1); }),
            "cca: slice of tokens: got a view with lengths per sequence, wants one without, such as `sequence(b)`");
  EXPECT_EQ(refusal_of([&] { (void)view.with_lengths(offsets); }),
            "cca: lengths: got 3 lengths, wants one for each of 2 sequences");
  EXPECT_EQ(refusal_of([&] { (void)packed<float>(nullptr, none, 3, 2); }).find("cca: offsets: got none"), 0U);
}

TEST(View, IsEmptyWithAnyExtent0) {
  EXPECT_FALSE(bhsd<float>(nullptr, 1, 1, 1, 1).empty());
  for (std::size_t i = 0; i < 4; ++i) {
    tensor_view<float> view = bhsd<float>(nullptr, 2, 3, 4, 5);
    view.extent[i] = 0;
    EXPECT_TRUE(view.empty());
  }
  EXPECT_TRUE(lse_view<>{}.empty());
}

}}  // namespace cca::test
