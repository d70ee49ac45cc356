#pragma once

// Whether a call did what it should; where not, the program ends.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "drawing.hpp"
#include "textbooks.hpp"

namespace cca::test {

/// `about` says what the call was.
template <class About>
[[noreturn]] void finding(const About& about, const std::string& what) {
  std::ostringstream text;
  text << what << "\n  " << about;
  std::fprintf(stderr, "%s\n", text.str().c_str());
  std::abort();
}

/// Relative to the largest number of a result, or to the size that `compare` is told.
template <class T>
constexpr long double tolerance_of = std::is_same_v<T, float> ? 1e-4L : 1e-12L;

/// Both have the same NaNs, and numbers within a tolerance, relative to the largest of them or to `size`.
template <class About, class T, class Exact>
void compare(const About& about, const std::string& what, const tensor_view<T>& got,
             const reference::tensor<Exact>& exact, long double tolerance, long double size = 1) {
  const auto want = exact.view();
  if (got.extent != want.extent) finding(about, what + ": other extents");
  for (const Exact x : exact.data)
    if (std::isfinite(x)) size = std::max(size, std::fabs(static_cast<long double>(x)));
  for_each_row(want, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    for (std::int64_t d = 0; d < want.dim(); ++d)
      if (!(distance(got.row(b, h, i)[d], want.row(b, h, i)[d]) <= size * tolerance))
        finding(about, what + ": " + std::to_string(got.row(b, h, i)[d]) + " where " +
                           std::to_string(want.row(b, h, i)[d]) + " is right, at " +
                           text_of<4>({b, h, i, d}));
  });
}

template <class T>
void compare_forward(const problem& p, const arguments<T>& a, long double tolerance) {
  const auto& in = a.operands;
  if (p.entry == entry::pool) {
    const auto cores = reference::pool<double>(in[0], in[1], in[2], p.options);
    compare(p, "core_key", a.results[0], cores.first, tolerance);
    return compare(p, "core_value", a.results[1], cores.second, tolerance);
  }
  far_context<T> context;
  if (p.entry == entry::attend) context = far_of(a);
  const auto want = textbook_attention<double>(p, inputs_of(a), context);
  compare(p, "out", a.results[0], want.out, tolerance);
  compare(p, "lse", a.results[1], want.lse, tolerance);
}

/// Makes one argument wrong; returns what it did, or nothing where the argument does not matter for this problem.
template <class T>
std::string spoil(problem& p, arguments<T>& a, byte_source& bytes) {
  const auto operand = static_cast<std::size_t>(bytes.draw(0, std::ssize(a.operands) - 1));
  tensor_view<const T>& view = a.operands[operand];
  const auto dimension = static_cast<std::size_t>(bytes.draw(0, 3));
  const std::size_t behind = operand - std::min(operand, operand_extents(p).size());
  if (p.entry != entry::pool && behind % 2 == 1) return {};  // a log-sum-exp: it has no dim
  switch (bytes.draw(0, 6)) {
    case 0:
      p.options.group_size = -bytes.draw(1, 3);
      return "group size";
    case 1:
      p.options.window = -bytes.draw(0, 3);
      return "window";
    case 2:
      p.options.softmax_scale = bytes.choice(std::array{std::nan(""), 1e300 * 1e300});
      return "scale";
    case 3:
      view.extent[dimension] = -1;
      return "extent";
    case 4:
      view.stride[3] = bytes.choice(std::array{0, 2, -1});
      return "inner stride";
    case 5:
      if (view.extent[dimension] < 2 || view.empty()) return {};
      view.stride[dimension] = std::numeric_limits<std::int64_t>::max() / 2;
      return "stride";
    default:
      a.results[0].extent[dimension] += 1;
      return "extent of the result";
  }
}

template <class T>
std::vector<T> elements(const std::vector<tensor_view<T>>& views) {
  std::vector<T> all{T(0)};
  for (const tensor_view<T>& view : views)
    for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      all.insert(all.end(), view.row(b, h, i), view.row(b, h, i) + view.dim());
    });
  return all;
}

/// A call with an argument that was made wrong, as `what` says, has to refuse it and to write nothing.
template <class About, class T, class Call>
void expect_refused(const About& about, const std::string& what, const std::vector<tensor_view<T>>& results,
                    const Call& call) {
  const std::vector<T> before = elements(results);
  try {
    call();
  } catch (const std::invalid_argument&) {
    const std::vector<T> after = elements(results);
    if (std::memcmp(before.data(), after.data(), before.size() * sizeof(T)) != 0) finding(about, "written: " + what);
    return;
  }
  finding(about, "accepted: " + what);
}

/// Spoils an argument.
template <class T, class Call>
void check_refusal(problem p, arguments<T> a, byte_source& bytes, const Call& call) {
  const std::vector<tensor_view<T>> results = a.results;
  const std::string what = spoil(p, a, bytes);
  if (!what.empty()) expect_refused(p, what, results, [&] { call(p, a); });
}

}  // namespace cca::test
