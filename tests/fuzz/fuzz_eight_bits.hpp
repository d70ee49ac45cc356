#pragma once

// Rows of 8 bits with scales, and products of integers: calls of them that fuzz.hpp plays.

#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "byte_textbook.hpp"
#include "drawing.hpp"
#include "guarded_arguments.hpp"
#include "judging.hpp"
#include "unit_entry_points.hpp"

namespace cca::test {

/// Scales of rows. Ordinary ones make numbers of the size of `byte_source::number()`. With huge keys a logit's rounding
/// alone may say which row wins: then results only have to be within what they are averages of.
enum class scale_kind { ordinary, extreme, huge };

inline float draw_scale(byte_source& bytes, scale_kind kind, float huge) {
  if (kind == scale_kind::huge && bytes.once_in(4)) return huge;
  if (kind != scale_kind::ordinary && bytes.once_in(2))
    return bytes.choice(std::array{0.0f, 0x1p-149f, 0x1p-140f, 0x1p-100f});
  return std::ldexp(1.0f, static_cast<int>(bytes.draw(-9, -6)));
}

/// Rows of 8 bits and their scales between pages that fault, and their numbers.
struct guarded_rows {
  tensor_view<q8> elements;
  lse_view<float> scales;
  tensor<float> numbers;

  guarded_rows(const extents& e, std::size_t first_pages, scale_kind kind, float huge, byte_source& bytes)
      : numbers(e) {
    const bool at_end = bytes.once_in(2);
    const std::int64_t padding = bytes.choice(std::array{0, 0, 1, 5});
    elements = place<q8>(pages(first_pages), at_end, e, padding);
    scales = without_dim(place<float>(pages(first_pages + 1), at_end, {e[0], e[1], e[2], 1}, padding));
    for_each_row(elements, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      *scales.row(b, h, i) = draw_scale(bytes, kind, huge);
      for (std::int64_t d = 0; d < e[3]; ++d) {
        elements.row(b, h, i)[d] = static_cast<q8>(bytes.byte());
        numbers.row(b, h, i)[d] = static_cast<float>(elements.row(b, h, i)[d]) * *scales.row(b, h, i);
      }
    });
  }
};

/// The arguments of a call on such rows: all of them, or far ones beside keys and values of floats.
class row_arguments {
 public:
  row_arguments(const problem& p, byte_source& bytes)
      : kinds_{draw_kind(bytes), draw_kind(bytes)},
        huge_value_(p.options.unit == matrix_unit::vnni ? 0x1p20f : huge_),
        query_(place<float>(pages(0), bytes.once_in(2), operand_extents(p)[0], 0)),
        key_(operand_extents(p)[1], 1, kinds_[0], huge_, bytes),
        value_(operand_extents(p)[2], 3, kinds_[1], huge_value_, bytes),
        far_key_({p.sizes.batch, p.far_heads, p.far_length, p.sizes.dim}, 5, kinds_[0], huge_, bytes),
        far_value_({p.sizes.batch, p.far_heads, p.far_length, p.sizes.value_dim}, 7, kinds_[1], huge_value_, bytes),
        seen_({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0}) {
    for (const extents& e : result_extents(p)) results_.push_back(place<float>(pages(9 + results_.size()), true, e, 0));
    for_each_row(query_, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      std::generate_n(query_.row(b, h, i), query_.dim(), [&] { return static_cast<float>(bytes.number()); });
    });
    seen_.generate([&] { return bytes.draw(0, p.far_length); });
    guarded_rows& spoilt = bytes.once_in(2) ? key_ : value_;
    if (!bytes.once_in(6) || spoilt.elements.empty()) return;
    const std::int64_t row = bytes.byte() % spoilt.elements.length();
    has_nan = true;
    *spoilt.scales.row(0, 0, row) = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(spoilt.numbers.row(0, 0, row), spoilt.elements.dim(), *spoilt.scales.row(0, 0, row));
  }

  bool has_nan = false;

  [[nodiscard]] bool has_huge_keys() const { return kinds_[0] == scale_kind::huge; }

  [[nodiscard]] inputs<float, q8> rows() const {
    return {.query = query_,
            .key = key_.elements,
            .value = value_.elements,
            .key_scales = key_.scales,
            .value_scales = value_.scales};
  }
  [[nodiscard]] inputs<float> floats() const { return {query_, key_.numbers.view(), value_.numbers.view()}; }
  [[nodiscard]] far_context<q8> far_rows() const {
    return {.key = far_key_.elements,
            .value = far_value_.elements,
            .seen = seen_.view(),
            .key_scales = far_key_.scales,
            .value_scales = far_value_.scales};
  }
  [[nodiscard]] const std::vector<tensor_view<float>>& results() const { return results_; }

  /// The largest number of a value: no average is larger.
  [[nodiscard]] double largest_value() const {
    double largest = 0;
    for (const guarded_rows* rows : {&value_, &far_value_})
      for_each_row(rows->numbers.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        for (std::int64_t d = 0; d < rows->numbers.view().dim(); ++d)
          largest = std::max(largest, std::fabs(static_cast<double>(rows->numbers.row(b, h, i)[d])));
      });
    return largest;
  }

 private:
  static scale_kind draw_kind(byte_source& bytes) {
    return bytes.choice(std::array{scale_kind::ordinary, scale_kind::ordinary, scale_kind::extreme, scale_kind::huge});
  }

  static constexpr float huge_ = 0x1p90f;

  std::array<scale_kind, 2> kinds_;  // of keys, of values
  float huge_value_;                 // values of integers may differ by less than 2^100, see matrix_units.md
  tensor_view<float> query_;
  guarded_rows key_, value_, far_key_, far_value_;
  tensor<std::int64_t, 3> seen_;
  std::vector<tensor_view<float>> results_;
};

/// Tolerances of products of integers: of the textbook that rounds as they do, which may round what is half-way to the
/// other side, and rounds where few queries are computed in floats; and none, where NaNs alone are compared.
constexpr long double tolerance_of_integers = 0.02L, any_number = 1e30L;

/// Judges what a call wrote, averages of values: what weights are off by counts by the largest of these, however small an
/// average is.
template <class Inputs, class Context>
void judge_rows(const problem& p, const Inputs& in, const Context& context,
                const std::vector<tensor_view<float>>& results, bool has_nan, bool has_huge_keys,
                double largest_value) {
  const bool by_integers = p.options.unit == matrix_unit::vnni;
  const bool rounds = by_integers && !has_nan;
  const long double tolerance = by_integers ? (has_nan ? any_number : tolerance_of_integers) : tolerance_of<float>;
  const auto judge = [&](const auto& want) {
    if (!has_huge_keys) compare(p, "out", results[0], want.out, tolerance, std::max(1.0, largest_value));
    compare(p, "lse", results[1], want.lse, has_huge_keys && by_integers ? any_number : tolerance, 2);
  };
  if (rounds)
    judge(byte_textbook(p, in, context));
  else
    judge(textbook_attention<double>(p, in, context));
  if (!has_huge_keys || has_nan) return;
  const double bound = largest_value * (by_integers ? 1.02 : 1.0001);
  for_each_row(results[0], [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < results[0].dim(); ++d) {
      const double x = results[0].row(b, h, i)[d];
      if (!(std::fabs(x) <= bound))
        finding(p, "out: " + std::to_string(x) + ", of values up to " + std::to_string(largest_value));
    }
  });
}

/// Takes from rows of 8 bits what they need, or gives it another form; returns what it did.
inline std::string spoil_scales(lse_view<const float>& scales, byte_source& bytes) {
  const auto dimension = static_cast<std::size_t>(bytes.draw(0, 2));
  switch (bytes.draw(0, 2)) {
    case 0:
      scales = {};
      return "no scales";
    case 1:
      scales.extent[dimension] += 1;
      return "extent of the scales";
    default:
      scales.data = nullptr;
      return "scales nowhere";
  }
}

/// What rounding changes in a logit has to stay below the tolerance.
inline void ask_for_integers(problem& p) {
  p.options.unit = matrix_unit::vnni;
  if (p.options.softmax_scale) p.options.softmax_scale = *p.options.softmax_scale / 10;
}

inline void fuzz_rows_of_8_bits(byte_source& bytes) {
  problem p = draw_problem(bytes, unit_entries);
  if (bytes.once_in(3) && detail::has_unit<float>(matrix_unit::vnni)) ask_for_integers(p);
  const row_arguments a(p, bytes);
  const bool far_alone = p.entry == entry::attend && bytes.once_in(2);
  const cca::results<float> to{a.results()[0], without_dim(a.results()[1])};
  const auto go = [&](const auto& in, const far_context<q8>& context) {
    try {
      call_rows(p, in, context, to);
    } catch (const std::invalid_argument& error) {
      finding(p, std::string("refused: ") + error.what());
    }
    judge_rows(p, in, context, a.results(), a.has_nan, a.has_huge_keys(), a.largest_value());
  };
  far_alone ? go(a.floats(), a.far_rows()) : go(a.rows(), a.far_rows());
  if (!bytes.once_in(2) || a.rows().key.empty()) return;
  inputs<float, q8> in = a.rows();
  const std::string what = spoil_scales(bytes.once_in(2) ? in.key_scales : in.value_scales, bytes);
  expect_refused(p, what, a.results(), [&] { call_rows(p, in, a.far_rows(), to); });
}

/// Operands of floats or of 16 bits, multiplied as integers.
template <class Element>
void fuzz_integers(byte_source& bytes) {
  if (!detail::has_unit<Element>(matrix_unit::vnni)) return;
  problem p = draw_problem(bytes, unit_entries);
  ask_for_integers(p);
  const guarded_arguments<float, Element> memory(p, bytes);
  const auto go = [&](const problem& q, const arguments<float>& a) { call(q, memory.in_short(a)); };
  const arguments<float> a = memory.forward();
  try {
    go(p, a);
  } catch (const std::invalid_argument& error) {
    finding(p, std::string("refused: ") + error.what());
  }
  far_context<float> context;
  if (p.entry == entry::attend) context = far_of(a);
  judge_rows(p, inputs_of(a), context, a.results, memory.has_nan, false, 2);  // `number()` is below it
  if (bytes.once_in(2)) check_refusal(p, a, bytes, go);
}

}  // namespace cca::test
