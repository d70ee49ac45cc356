#pragma once

// One call of an entry point and its gradient, or the life of a cache, as a string of bytes says: sizes, layouts,
// options, data, and now and then an argument that makes no sense. Whatever the bytes, the call has to agree with the
// textbook and touch nothing but its arguments, or to refuse and write nothing. fuzz_main.cpp lets libFuzzer look for
// bytes that break it; fuzz_test.cpp plays random ones, and all that ever did.

#include <stdexcept>
#include <string>
#include <type_traits>

#include "drawing.hpp"
#include "guarded_arguments.hpp"
#include "judging.hpp"
#include "kv_cache_life.hpp"
#if defined(CCA_TEST_UNITS)  // whose kernels are compiled for the newest instruction set alone
#include "fuzz_eight_bits.hpp"
#endif

namespace cca::test {

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

/// Cores of 8 bits are judged by the textbook that rounds them, too, which may round what is half-way to the other side.
template <class Element>
constexpr long double cache_tolerance_of =
    std::is_same_v<Element, q8> ? 0.05L : tolerance_of<number_of<Element>>;

template <class Element>
void fuzz_cache(byte_source& bytes) {
  using T = number_of<Element>;
  const auto judge = [](const results<T>& got, const auto& textbook, const std::string& label) {
    const auto want = textbook.template operator()<std::conditional_t<std::is_same_v<Element, q8>, float, double>>();
    compare(label, "out", got.out.view(), want.out, cache_tolerance_of<Element>);
    compare(label, "lse", with_dim(got.lse.view()), want.lse, cache_tolerance_of<Element>);
  };
  cache_life<Element, Element, byte_source, decltype(judge)> life(bytes, "cache", judge);
  life.live(static_cast<int>(bytes.draw(1, 30)), [](const auto&...) {});
}

/// What a cache should be is expected as in a test: a failure there is a finding, too.
inline void fuzz(const std::uint8_t* data, std::size_t size) {
  byte_source bytes(data, size);
  switch (bytes.draw(0, 10)) {
    case 0:
      return fuzz_entry_point<double>(bytes);
    case 1:
      return fuzz_entry_point<float>(bytes);
    case 2:
      return fuzz_cache<float>(bytes);
    case 3:
      return fuzz_cache<double>(bytes);
#if defined(CCA_TEST_UNITS)
    case 4:
      return fuzz_unit<Eigen::bfloat16>(bytes);
    case 5:
      return fuzz_unit<Eigen::half>(bytes);
    case 6:
      return fuzz_rows_of_8_bits(bytes);
    case 7:
      return fuzz_integers<float>(bytes);
    case 8:
      return fuzz_integers<Eigen::bfloat16>(bytes);
    case 9:
      return fuzz_integers<Eigen::half>(bytes);
#endif
    case 10:
      return fuzz_cache<q8>(bytes);
  }
}

}  // namespace cca::test
