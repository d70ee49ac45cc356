#pragma once

// What the tests share: tensors in odd layouts, a comparison that no NaN slips through, and the rule for errors.

// The plain textbook, the measure of all errors here, adds one number after the other, as its formulas read. Vectorised,
// Eigen adds several partial sums, as many as the processor's vectors are wide: smaller errors, and others on each
// machine.
#define EIGEN_DONT_VECTORIZE

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cca/cca.hpp>
#include <cca/reference.hpp>
#include <cca/reference_gradient.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "textbook_instances.hpp"

#if defined(EIGEN_VECTORIZE)
#error "include support.hpp before Eigen"
#endif

namespace cca::test {

/// Numbers as refusals write them.
template <std::size_t Rank>
std::string text_of(const std::array<std::int64_t, Rank>& numbers) {
  return detail::text{numbers}.c_str();
}

/// What a call throws as an `Error`: the text of a refusal, or "none".
template <class Error = std::invalid_argument, class Call>
std::string refusal_of(const Call& call) {
  try {
    call();
  } catch (const Error& refused) {
    return refused.what();
  }
  return "none";
}

/// Every test seeds its own: it draws the same numbers whichever tests run beside it.
using random_engine = std::mt19937_64;

/// Normally distributed numbers by the polar method, those of libstdc++'s distribution, which takes logarithms in long
/// double for each of them: a tenth of the tests' time.
class normal_numbers {
 public:
  normal_numbers(random_engine& random, double deviation) : random_(random), deviation_(deviation) {}

  double operator()() {
    if (saved_) return deviation_ * *std::exchange(saved_, std::nullopt);
    double x, y, square;
    do {
      x = 2 * uniform() - 1;
      y = 2 * uniform() - 1;
      square = x * x + y * y;
    } while (square > 1 || square == 0);
    const double factor = std::sqrt(-2 * std::log(square) / square);
    saved_ = x * factor;
    return deviation_ * (y * factor);
  }

 private:
  /// In `[0, 1)`.
  double uniform() { return std::min(static_cast<double>(random_()) * 0x1p-64, 1 - 0x1p-53); }

  random_engine& random_;
  double deviation_;
  std::optional<double> saved_;
};

/// A number in `[least, greatest]`.
inline std::int64_t draw(random_engine& random, std::int64_t least, std::int64_t greatest) {
  return std::uniform_int_distribution<std::int64_t>(least, greatest)(random);
}

/// One of the choices.
template <class Random, class Choices>
const auto& draw_from(Random& random, const Choices& choices) {
  return choices[static_cast<std::size_t>(draw(random, 0, std::ssize(choices) - 1))];
}

// ---------------------------------------------------------------------------------------------------------- tensors

/// How a tensor lies in memory. The flags are those of batch, heads and length.
struct layout {
  std::array<std::size_t, 3> order{0, 1, 2};  ///< of these dimensions, outermost first; {0, 2, 1} is bshd
  std::int64_t padding = 0;                   ///< elements between neighbours in each of them
  std::array<bool, 3> reversed{};             ///< runs backwards: negative stride
  std::array<bool, 3> broadcast{};            ///< stride 0, for operands only
};

inline constexpr layout bshd_layout{.order = {0, 2, 1}};

/// Any layout that an output may have.
inline layout random_layout(random_engine& random) {
  layout layout;
  std::shuffle(layout.order.begin(), layout.order.end(), random);
  layout.padding = draw_from(random, std::array{0, 1, 3, 16});
  for (bool& reversed : layout.reversed) reversed = draw(random, 0, 3) == 0;
  return layout;
}

/// Any layout that an operand may have.
inline layout random_operand_layout(random_engine& random) {
  layout layout = random_layout(random);
  for (bool& broadcast : layout.broadcast) broadcast = draw(random, 0, 7) == 0;
  return layout;
}

/// What memory holds that nobody should touch: read it, and NaNs appear; write it, and the payload is gone.
template <class T>
T canary() {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(0x7fc0dead);
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(0x7ff8dead'7ff8dead);
  else
    return std::numeric_limits<T>::min();
}

template <class T>
requires std::is_arithmetic_v<T> ||(sizeof(T) == 2)  // 16-bit elements
    bool same_bits(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return a == b;
  } else {
    // Not memcmp, which sanitizers replace: a call for each of millions of numbers.
    using bits = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                    std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
    return std::bit_cast<bits>(a) == std::bit_cast<bits>(b);
  }
}

/// Calls `f(b, h, i)` for every row of a view.
template <class View, class F>
void for_each_row(const View& view, const F& f) {
  for (std::int64_t b = 0; b < view.batch(); ++b)
    for (std::int64_t h = 0; h < view.heads(); ++h)
      for (std::int64_t i = 0; i < view.length(b); ++i) f(b, h, i);
}

/// Elements of a row.
template <class T, std::size_t Rank>
constexpr std::int64_t row_size(const tensor_view<T, Rank>& view) {
  if constexpr (Rank == 3)
    return 1;
  else
    return view.dim();
}

/// Owns the elements of a view in any layout. All of the memory starts as canaries: between the rows they stay, and
/// rows of them are an output that nothing was written to.
template <class T, std::size_t Rank = 4>
class tensor {
  static constexpr std::int64_t margin = 64;

 public:
  explicit tensor(std::array<std::int64_t, Rank> extent, const layout& layout = {}) {
    view_.extent = extent;
    std::int64_t size = 1, origin = margin;
    if constexpr (Rank == 4) {
      view_.stride[3] = 1;
      size = extent[3];
    }
    for (auto d = layout.order.rbegin(); d != layout.order.rend(); ++d) {
      const std::int64_t stride = size + layout.padding, last = std::max<std::int64_t>(extent[*d] - 1, 0);
      if (layout.broadcast[*d]) continue;
      view_.stride[*d] = layout.reversed[*d] ? -stride : stride;
      if (layout.reversed[*d]) origin += stride * last;
      size += stride * last;
    }
    memory_.assign(static_cast<std::size_t>(size + 2 * margin), canary<T>());
    origin_ = origin;
  }

  // The view is made anew each time, so that copies and moved tensors have their own.
  [[nodiscard]] tensor_view<T, Rank> view() { return {memory_.data() + origin_, view_.extent, view_.stride}; }
  [[nodiscard]] tensor_view<const T, Rank> view() const {
    return {memory_.data() + origin_, view_.extent, view_.stride};
  }

  [[nodiscard]] T* row(std::int64_t b, std::int64_t h, std::int64_t i) { return view().row(b, h, i); }
  [[nodiscard]] const T* row(std::int64_t b, std::int64_t h, std::int64_t i) const { return view().row(b, h, i); }

  /// Sets every element to `next()`, in the order of the indices whatever the layout.
  template <class Next>
  tensor& generate(const Next& next) {
    for_each_row(view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      std::generate_n(row(b, h, i), row_size(view()), next);
    });
    return *this;
  }

  tensor& fill(T value) {
    return generate([value] { return value; });
  }

  tensor& randomize(random_engine& random, double deviation = 1) {
    normal_numbers normal(random, deviation);
    return generate([&] { return static_cast<T>(normal()); });
  }

  /// Whether nothing was written beside the elements.
  [[nodiscard]] testing::AssertionResult canaries_intact() const {
    std::vector<bool> element(memory_.size());
    for_each_row(view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      std::fill_n(element.begin() + (row(b, h, i) - memory_.data()), row_size(view()), true);
    });
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if (!element[i] && !same_bits(memory_[i], canary<T>()))
        return testing::AssertionFailure() << "memory between the rows holds " << memory_[i];
    return testing::AssertionSuccess();
  }

 private:
  tensor_view<T, Rank> view_;  // without the pointer
  std::int64_t origin_ = 0;
  std::vector<T> memory_;
};

/// Extents of one attention problem.
struct sizes {
  std::int64_t batch = 1, heads = 1, kv_heads = 1, queries = 1, keys = 1, dim = 1, value_dim = 1;
};

inline std::string describe(const sizes& s) {
  std::ostringstream text;
  text << "batch " << s.batch << ", heads " << s.heads << "/" << s.kv_heads << ", queries " << s.queries << ", keys "
       << s.keys << ", dim " << s.dim << ", value dim " << s.value_dim;
  return text.str();
}

inline std::string describe(const options& o) {
  std::ostringstream text;
  detail::for_each_option(o, [&](const char* name, const auto& option) {
    text << (text.tellp() > 0 ? ", " : "") << name << " " << detail::text{detail::option_text(option)}.c_str();
  });
  return text.str();
}

inline constexpr std::array all_poolings{pooling::last_query, pooling::mean, pooling::max, pooling::select,
                                         pooling::select_by_mass};
/// Those that ask no query behind a group, and no window.
inline constexpr std::array group_poolings{pooling::last_query, pooling::mean, pooling::max, pooling::select};
/// The window of `pool`: `window` for a pooling that needs one.
inline std::int64_t pool_window(pooling pool, std::int64_t window) {
  return pool == pooling::select_by_mass ? window : unlimited;
}
inline constexpr std::array all_core_heads{core_heads::per_query_head, core_heads::per_kv_head};

/// Head dims in use, and odd ones.
inline constexpr std::array<std::int64_t, 19> head_dims{1,  2,  3,  5,  7,  8,   15,  16,  17, 31,
                                                        33, 64, 72, 80, 96, 128, 192, 256, 576};

/// The head dim `shift` places after the `i`th, around the end.
inline std::int64_t head_dim(std::size_t i, std::size_t shift = 0) { return head_dims[(i + shift) % head_dims.size()]; }

/// What the typed tests run over.
using precisions = testing::Types<float, double>;

template <class T>
struct operands {
  tensor<T> query, key, value;
};

/// Normally distributed operands, in memory as a view of the extents would be.
template <class T>
operands<T> random_operands(const sizes& s, random_engine& random, const std::array<layout, 3>& layouts = {}) {
  operands<T> o{tensor<T>({s.batch, s.heads, s.queries, s.dim}, layouts[0]),
                tensor<T>({s.batch, s.kv_heads, s.keys, s.dim}, layouts[1]),
                tensor<T>({s.batch, s.kv_heads, s.keys, s.value_dim}, layouts[2])};
  o.query.randomize(random);
  o.key.randomize(random);
  o.value.randomize(random);
  return o;
}

inline std::array<layout, 3> random_operand_layouts(random_engine& random) {
  return {random_operand_layout(random), random_operand_layout(random), random_operand_layout(random)};
}

/// What attention writes. The lse is in the operands' precision, so that its error can be judged, too.
template <class T>
struct results {
  tensor<T> out;
  tensor<T, 3> lse;
};

/// A view of log-sum-exps as one of rows of a single element.
template <class T>
tensor_view<T> with_dim(const lse_view<T>& view) {
  const auto& [batch, heads, length] = view.stride;
  return {view.data, {view.batch(), view.heads(), view.length(), 1}, {batch, heads, length, 1}, view.begins, view.ends};
}

/// The other way round: log-sum-exps as the entry points take them.
template <class T>
lse_view<T> without_dim(const tensor_view<T>& view) {
  return {view.data,
          {view.batch(), view.heads(), view.length()},
          {view.stride[0], view.stride[1], view.stride[2]},
          view.begins,
          view.ends};
}

/// Calls `entry(out view, lse view)` and checks that nothing is written between the rows.
template <class T, class Entry>
results<T> collect(const sizes& s, const Entry& entry, const layout& out_layout = {}, const layout& lse_layout = {}) {
  results<T> r{tensor<T>({s.batch, s.heads, s.queries, s.value_dim}, out_layout),
               tensor<T, 3>({s.batch, s.heads, s.queries}, lse_layout)};
  entry(r.out.view(), r.lse.view());
  EXPECT_TRUE(r.out.canaries_intact());
  EXPECT_TRUE(r.lse.canaries_intact());
  return r;
}

// ------------------------------------------------------------------------------------------------------- comparison

/// The distance of two numbers; infinite when only one of them is NaN, or they are not the same infinity.
template <class A, class B>
long double distance(A a, B b) {
  const auto x = static_cast<long double>(a), y = static_cast<long double>(b);
  if (std::isnan(x) && std::isnan(y)) return 0;
  if (x == y) return 0;  // also of equal infinities, whose difference is NaN
  const long double difference = std::fabs(x - y);
  return std::isnan(difference) ? std::numeric_limits<long double>::infinity() : difference;
}

/// Whether all elements have the same bits, NaNs and signs of zeros included.
template <class A, class B, std::size_t Rank>
testing::AssertionResult same_bits(const tensor_view<A, Rank>& a, const tensor_view<B, Rank>& b) {
  static_assert(std::is_same_v<std::remove_const_t<A>, std::remove_const_t<B>>, "bits of the same type");
  if (a.extent != b.extent)
    return testing::AssertionFailure() << "extents " << text_of(a.extent) << " and "
                                       << text_of(b.extent);
  std::ostringstream difference;
  std::int64_t differences = 0;
  for_each_row(a, [&](std::int64_t i, std::int64_t j, std::int64_t k) {
    const A* const row_of_a = a.row(i, j, k);
    const B* const row_of_b = b.row(i, j, k);
    for (std::int64_t d = 0; d < row_size(a); ++d)
      if (!same_bits(row_of_a[d], row_of_b[d]) && differences++ == 0)
        difference << row_of_a[d] << " and " << row_of_b[d] << " at " << text_of<4>({i, j, k, d});
  });
  if (differences == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << differences << " elements differ, the first: " << difference.str();
}

/// Out and lse alike.
template <class T>
testing::AssertionResult same_bits(const results<T>& a, const results<T>& b) {
  const testing::AssertionResult out = same_bits(a.out.view(), b.out.view());
  return out ? same_bits(a.lse.view(), b.lse.view()) : out;
}

// --------------------------------------------------------------------------------------------------- the error rule

/// The precision of the oracle for kernels that compute in `T`: its own rounding has to be out of sight.
template <class T>
using exact_type = std::conditional_t<std::is_same_v<T, float>, double, long double>;

static_assert(std::numeric_limits<long double>::digits >= std::numeric_limits<double>::digits + 11,
              "double kernels are measured against long double, which has to be more precise");

/// The rule: the error of a kernel is at most twice that of the plain textbook in the same precision, plus the rounding
/// of the result. The error of a tensor is the root of the mean square of its distances to an exact reference: the same
/// sums in another order keep it within a few percent, where the largest distance varies by factors of three. It still
/// tells of a single wrong element, whose distance counts by the root of the size of the tensor. Tensors of a few
/// elements are for `add` to put together.
template <class T>
class error_rule {
 public:
  template <class Kernel, class Textbook, class Exact, std::size_t Rank>
  void add(const tensor_view<Kernel, Rank>& kernel, const tensor_view<Textbook, Rank>& textbook,
           const tensor_view<Exact, Rank>& exact, const std::string& label = {}) {
    if (kernel.extent != exact.extent || textbook.extent != exact.extent) {
      worst_ = infinite;
      where_ = "extents differ, " + label;
      return;
    }
    for_each_row(exact, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const Exact* const exact_row = exact.row(b, h, i);
      const Kernel* const kernel_row = kernel.row(b, h, i);
      const Textbook* const textbook_row = textbook.row(b, h, i);
      for (std::int64_t d = 0; d < row_size(exact); ++d) {
        const auto x = static_cast<long double>(exact_row[d]);
        const long double error = distance(kernel_row[d], x), textbook_error = distance(textbook_row[d], x);
        if (error > worst_) {
          worst_ = error;
          where_ = text_of<4>({b, h, i, d}) + ", " + label;
        }
        kernel_ += error * error;
        textbook_ += textbook_error * textbook_error;
        if (std::isfinite(x)) size_ += x * x;
        ++count_;
      }
    });
  }

  [[nodiscard]] testing::AssertionResult holds() const {
    const auto mean = [&](long double squares) { return std::sqrt(squares / static_cast<long double>(count_)); };
    // A number is stored to half a unit in its last place, and the step before it, by the sum of the weights or from
    // base 2 to base e, rounds as much again: together epsilon times the number at most.
    // Below the normal numbers a unit in the last place is the least of them.
    const long double rounding = std::max(static_cast<long double>(std::numeric_limits<T>::epsilon()) * mean(size_),
                                          static_cast<long double>(std::numeric_limits<T>::denorm_min()));
    // An infinite error of the textbook would allow anything.
    if (std::isfinite(worst_) && std::isfinite(textbook_) && mean(kernel_) <= 2 * mean(textbook_) + rounding)
      return testing::AssertionSuccess();
    return testing::AssertionFailure() << "error " << mean(kernel_) << ", the textbook's " << mean(textbook_)
                                       << ", rounding " << rounding << "; largest " << worst_ << " at " << where_;
  }

 private:
  static constexpr long double infinite = std::numeric_limits<long double>::infinity();

  long double kernel_ = 0, textbook_ = 0, size_ = 0;  // sums of squares
  std::int64_t count_ = 0;
  long double worst_ = 0;
  std::string where_;
};

/// The log-sum-exps of the textbook as the entry points write them: without the last dimension.
template <class Scalar>
tensor_view<const Scalar, 3> lse_of(const reference::result<Scalar>& result) {
  const auto lse = result.lse.view();
  return {lse.data, {lse.batch(), lse.heads(), lse.length()}, {lse.stride[0], lse.stride[1], lse.stride[2]}};
}

/// The error rule for results of attention. `textbook` is called as `textbook.template operator()<Scalar>()` and
/// returns a `reference::result<Scalar>`.
template <class T>
class attention_rule {
 public:
  template <class Textbook>
  void add(const results<T>& kernel, const Textbook& textbook, const std::string& label = {}) {
    const reference::result<T> plain = textbook.template operator()<T>();
    const reference::result<exact_type<T>> exact = textbook.template operator()<exact_type<T>>();
    out_.add(kernel.out.view(), plain.out.view(), exact.out.view(), label);
    lse_.add(kernel.lse.view(), lse_of(plain), lse_of(exact), label);
  }

  [[nodiscard]] testing::AssertionResult holds() const {
    if (const auto out = out_.holds(); !out) return testing::AssertionFailure() << "out: " << out.message();
    if (const auto lse = lse_.holds(); !lse) return testing::AssertionFailure() << "lse: " << lse.message();
    return testing::AssertionSuccess();
  }

 private:
  error_rule<T> out_, lse_;
};

}  // namespace cca::test
