#pragma once

// One call of an entry point and its gradient, or the life of a cache, as a string of bytes says: sizes, layouts, options,
// data, and now and then an argument that makes no sense. Whatever the bytes, the call has to agree with the textbook and
// touch nothing but its arguments, or to refuse and write nothing. fuzz_main.cpp lets libFuzzer look for bytes that break it; fuzz_test.cpp
// plays random ones, and all that ever did.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>

#include "guarded_pages.hpp"
#include "kv_cache_life.hpp"
#include "unit_entry_points.hpp"

namespace cca::test {

/// Bytes as a source of choices; zeros when they are used up.
class byte_source {
 public:
  byte_source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return next_ < size_ ? data_[next_++] : std::uint8_t{0}; }

  /// A number in `[least, greatest]`, of at most 256 choices.
  std::int64_t draw(std::int64_t least, std::int64_t greatest) { return least + byte() % (greatest - least + 1); }

  /// True in one of `times` cases.
  bool once_in(std::int64_t times) { return draw(1, times) == times; }

  template <class Choices>
  auto choice(const Choices& choices) {
    return choices[static_cast<std::size_t>(draw(0, std::ssize(choices) - 1))];
  }

  /// In [-2, 2): logits stay small enough for one tolerance.
  double number() { return static_cast<std::int8_t>(byte()) / 64.0; }

 private:
  const std::uint8_t* data_;
  std::size_t size_, next_ = 0;
};

inline std::int64_t draw(byte_source& bytes, std::int64_t least, std::int64_t greatest) {
  return bytes.draw(least, greatest);
}

/// A problem that one of the entry points takes.
template <class Entries>
problem draw_problem(byte_source& bytes, const Entries& entries) {
  problem p{.entry = bytes.choice(entries), .sizes = {}, .options = {}};
  sizes& s = p.sizes;
  s.batch = bytes.once_in(8) ? 0 : bytes.draw(1, 2);
  s.kv_heads = bytes.draw(1, 3);
  s.heads = s.kv_heads * bytes.draw(1, 3);
  s.keys = bytes.draw(0, 90);
  s.queries = bytes.draw(0, 90);
  s.dim = bytes.draw(1, 40);
  s.value_dim = bytes.draw(1, 40);
  options& o = p.options;
  if (bytes.once_in(3)) o.softmax_scale = bytes.choice(std::array{0.0, -0.5, 0.3, 1.0});
  const auto group = [&] {
    o.group_size = bytes.draw(1, 20);
    o.window = bytes.draw(1, 100);
  };
  switch (p.entry) {
    case entry::attention:
      group();
      [[fallthrough]];
    case entry::pool:
      s.queries = s.keys;
      o.group_size = bytes.draw(1, 20);
      if (bytes.once_in(3)) o.sink_tokens = bytes.draw(0, 100);
      o.pool = bytes.choice(all_poolings);
      o.core_heads = bytes.choice(all_core_heads);
      if (p.entry == entry::pool) o.window = pool_window(o.pool, bytes.draw(1, 100));
      if (p.entry == entry::pool && !detail::uses_query(o.pool)) o.softmax_scale.reset();
      if (o.pool == pooling::last_query && bytes.once_in(3)) o.pooling_scale = bytes.choice(std::array{0.0, 0.5, 4.0});
      break;
    case entry::attend:
      p.far_heads = bytes.draw(1, s.heads);
      while (s.heads % p.far_heads != 0) --p.far_heads;
      p.far_length = bytes.draw(0, 60);
      [[fallthrough]];
    case entry::local:
      if (!bytes.once_in(4)) group();
      [[fallthrough]];
    default:
      if (bytes.once_in(3)) o.first_position = bytes.draw(-60, 120);
      if (bytes.once_in(3)) o.sink_tokens = bytes.draw(0, 100);
      if (o.group_size == 0 && bytes.once_in(3)) o.prefix = bytes.draw(0, 100);
      if (o.group_size == 0 && bytes.once_in(3)) o.lookahead = bytes.choice(std::array{std::int64_t{2}, unlimited});
  }
  return p;
}

/// Arguments in memory between pages that fault, at their beginning or their end. Each operand is there as numbers of 16
/// bits, too, where `Element` is such a type.
template <class T, class Element>
class guarded_arguments {
 public:
  guarded_arguments(const problem& p, byte_source& bytes) : problem_(p) {
    const auto next = [&](const extents& e) {
      const bool at_end = bytes.once_in(2);
      const std::int64_t padding = bytes.choice(std::array{0, 0, 1, 5});
      if (sizeof(Element) == 2) short_.push_back(place<Element>(pages(used_++), at_end, e, padding));
      return place<T>(pages(used_++), at_end, e, padding);
    };
    for (const extents& e : gradient_operand_extents(p)) operands_.push_back(next(e));
    for (const extents& e : gradient_result_extents(p)) results_.push_back(next(e));
    for (const extents& e : result_extents(p)) forward_results_.push_back(next(e));
    short_.resize(operands_.size());
    seen_ = tensor<std::int64_t, 3>({p.sizes.batch, p.sizes.heads, p.entry == entry::attend ? p.sizes.queries : 0});
    for_each_row(seen_.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
      *seen_.row(b, h, i) = bytes.draw(0, p.far_length);
    });
    const bool poison = bytes.once_in(4);
    for (const tensor_view<T>& view : operands_)
      for_each_row(view, [&](std::int64_t b, std::int64_t h, std::int64_t i) {
        std::generate_n(view.row(b, h, i), view.dim(), [&] { return static_cast<T>(bytes.number()); });
      });
    const tensor_view<T>& poisoned = operands_[static_cast<std::size_t>(bytes.draw(0, 2))];
    if (poison && !poisoned.empty()) {
      *poisoned.row(0, 0, bytes.byte() % poisoned.length()) = std::numeric_limits<T>::quiet_NaN();
      has_nan = true;
    }
    for (std::size_t i = 0; sizeof(Element) == 2 && i < short_.size(); ++i)
      for_each_row(operands_[i], [&](std::int64_t b, std::int64_t h, std::int64_t t) {
        const T* from = operands_[i].row(b, h, t);
        std::transform(from, from + operands_[i].dim(), short_[i].row(b, h, t), [](T x) { return Element(x); });
      });
  }

  bool has_nan = false;

  /// The arguments of the entry point.
  [[nodiscard]] arguments<T> forward() const {
    arguments<T> a{.operands = {}, .results = forward_results_, .seen = seen_.view()};
    a.operands.assign(operands_.begin(), operands_.begin() + std::ssize(operand_extents(problem_)));
    return a;
  }

  /// The arguments of its gradient, with the output and log-sum-exps that belong to them.
  [[nodiscard]] arguments<T> gradient() const {
    arguments<T> a{.operands = {}, .results = results_, .seen = seen_.view()};
    a.operands.assign(operands_.begin(), operands_.end());
    const std::size_t first = operand_extents(problem_).size();
    for (std::size_t i = 0; i < 2 && problem_.entry != entry::pool; ++i)
      copy(forward_results_[i], operands_[first + i]);
    return a;
  }

  /// The same arguments, which may have been spoilt, with the operands of 16 bits: `number()` needs no more.
  [[nodiscard]] unit_arguments<Element> in_short(const arguments<T>& a) const {
    const auto operand = [&](std::size_t i) {
      return tensor_view<const Element>{short_[i].data, a.operands[i].extent, a.operands[i].stride};
    };
    unit_arguments<Element> s{.operands = {}, .seen = a.seen, .results = a.results};
    const std::size_t count = operand_extents(problem_).size();
    for (std::size_t i = 0; i < count; ++i) s.operands.push_back(operand(i));
    if (a.operands.size() == count) return s;
    s.out = a.operands[count];
    s.lse = without_dim(a.operands[count + 1]);
    s.grad_out = operand(count + 2);
    s.grad_lse = without_dim(a.operands[count + 3]);
    return s;
  }

 private:
  static const guarded_pages& pages(std::size_t i) {
    static std::vector<std::unique_ptr<guarded_pages>> all;
    while (all.size() <= i) all.push_back(std::make_unique<guarded_pages>(std::size_t{1} << 20));
    return *all[i];
  }

  problem problem_;
  std::size_t used_ = 0;
  std::vector<tensor_view<T>> operands_, results_, forward_results_;
  std::vector<tensor_view<Element>> short_;
  tensor<std::int64_t, 3> seen_{{0, 0, 0}};
};

/// `about` says what the call was.
template <class About>
[[noreturn]] void finding(const About& about, const std::string& what) {
  std::ostringstream text;
  text << what << "\n  " << about;
  std::fprintf(stderr, "%s\n", text.str().c_str());
  std::abort();
}

/// Relative to the largest number of a result, or to 1.
template <class T>
constexpr long double tolerance_of = std::is_same_v<T, float> ? 1e-4L : 1e-12L;

/// Both have the same NaNs, and numbers within a tolerance.
template <class About, class T, class Exact>
void compare(const About& about, const std::string& what, const tensor_view<T>& got,
             const reference::tensor<Exact>& exact, long double tolerance) {
  const auto want = exact.view();
  if (got.extent != want.extent) finding(about, what + ": other extents");
  long double size = 1;
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
  const reference::result<double> want =
      p.entry == entry::attention ? reference::attention<double>(inputs{in[0], in[1], in[2]}, p.options)
      : p.entry == entry::attend
          ? reference::attend<double>(inputs{in[0], in[1], in[2]}, far_context{in[3], in[4], a.seen}, p.options)
          : reference::local_attention<double>(inputs{in[0], in[1], in[2]}, p.options);
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

/// Spoils an argument: the call has to refuse it and to write nothing.
template <class T, class Call>
void check_refusal(problem p, arguments<T> a, byte_source& bytes, const Call& call) {
  const std::vector<tensor_view<T>> results = a.results;
  const std::string what = spoil(p, a, bytes);
  if (what.empty()) return;
  const std::vector<T> before = elements(results);
  try {
    call(p, a);
  } catch (const std::invalid_argument&) {
    const std::vector<T> after = elements(results);
    if (std::memcmp(before.data(), after.data(), before.size() * sizeof(T)) != 0) finding(p, "written: " + what);
    return;
  }
  finding(p, "accepted: " + what);
}

/// A call and its gradient, `forward(problem, arguments)` and `backward(problem, arguments)`.
template <class T, class Memory, class Forward, class Backward>
void fuzz_call(const problem& p, const Memory& memory, byte_source& bytes, long double tolerance,
               const Forward& forward, const Backward& backward) {
  try {
    forward(p, memory.forward());
    compare_forward(p, memory.forward(), tolerance);
    const arguments<T> gradient = memory.gradient();
    backward(p, gradient);
    if (!memory.has_nan) {
      const auto want = textbook_gradient<double>(p, gradient);
      for (std::size_t i = 0; i < want.size(); ++i)
        compare(p, "gradient " + std::to_string(i), gradient.results[i], want[i], tolerance);
    }
    if (bytes.once_in(2)) check_refusal(p, memory.forward(), bytes, forward);
    if (bytes.once_in(2)) check_refusal(p, gradient, bytes, backward);
  } catch (const std::invalid_argument& error) {
    finding(p, std::string("refused: ") + error.what());
  }
}

template <class T>
void fuzz_entry_point(byte_source& bytes) {
  const problem p = draw_problem(bytes, gradient_entries);
  fuzz_call<T>(
      p, guarded_arguments<T, T>(p, bytes), bytes, tolerance_of<T>,
      [](const problem& q, const arguments<T>& a) { call(q, a); },
      [](const problem& q, const arguments<T>& a) { call_gradient(q, a); });
}

/// Operands of 16 bits, converted or multiplied as they are.
template <class Element>
void fuzz_unit(byte_source& bytes) {
  problem p = draw_problem(bytes, unit_entries);
  const bool unit = bytes.once_in(2);
  // Cores are rounded to 16 bits, too: what that changes in a logit has to stay below the tolerance.
  if (unit && p.options.softmax_scale) p.options.softmax_scale = *p.options.softmax_scale / 10;
  const guarded_arguments<float, Element> memory(p, bytes);
  const auto asked = [unit](problem q) {
    if (unit) q.options.unit = matrix_unit::best;
    return q;
  };
  fuzz_call<float>(
      p, memory, bytes, unit ? 0.05L : tolerance_of<float>,
      [&](const problem& q, const arguments<float>& a) { call(asked(q), memory.in_short(a)); },
      [&](const problem& q, const arguments<float>& a) { call_gradient(asked(q), memory.in_short(a)); });
}

template <class T>
void fuzz_cache(byte_source& bytes) {
  const auto judge = [](const results<T>& got, const auto& textbook, const std::string& label) {
    const reference::result<double> want = textbook.template operator()<double>();
    compare(label, "out", got.out.view(), want.out, tolerance_of<T>);
    compare(label, "lse", with_dim(got.lse.view()), want.lse, tolerance_of<T>);
  };
  cache_life<T, T, byte_source, decltype(judge)> life(bytes, "cache", judge);
  life.live(static_cast<int>(bytes.draw(1, 30)), [](const auto&...) {});
}

/// What a cache should be is expected as in a test: a failure there is a finding, too.
inline void fuzz(const std::uint8_t* data, std::size_t size) {
  byte_source bytes(data, size);
  switch (bytes.draw(0, 5)) {
    case 0:
      return fuzz_entry_point<double>(bytes);
    case 1:
      return fuzz_entry_point<float>(bytes);
    case 2:
      return fuzz_cache<float>(bytes);
    case 3:
      return fuzz_cache<double>(bytes);
#if defined(CCA_TEST_UNITS)  // whose kernels are compiled for the newest instruction set alone
    case 4:
      return fuzz_unit<Eigen::bfloat16>(bytes);
    case 5:
      return fuzz_unit<Eigen::half>(bytes);
#endif
  }
}

}  // namespace cca::test
